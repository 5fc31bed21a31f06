//! The block allocation table of an open dynamic image.

use std::cell::{Cell, RefCell};

use super::footer::{Dynamic, FOOTER, Footer, UNUSED};
use crate::blocks::{BlockMap, Entries, Place, Table};
use crate::file::{File, to_usize};
use crate::range_lock::RangeLock;
use crate::{Format, IoError, OpenOptions};

/// Bytes of a page of the table: a sector, since the first block may follow its last one.
const PAGE: u64 = 512;

/// Where blocks are.
pub(super) struct VhdMap {
    file: File,
    table: Table,
    dynamic: Dynamic,
    footer: Vec<u8>,
    /// Where the next block goes, once it was looked for.
    next: Cell<Option<u64>>,
    /// Whether the footer at the end must be written.
    footer_due: Cell<bool>,
    /// A bit for each block whose bitmap is known to be all ones.
    marked: RefCell<Vec<u64>>,
    marking: RangeLock,
    placing: RangeLock,
    writing: RangeLock,
}

impl VhdMap {
    pub(super) fn new(file: File, footer: &Footer, dynamic: Dynamic, options: &OpenOptions) -> Self {
        Self {
            file,
            table: Table::new(Entries::Be32, dynamic.table, dynamic.entries, PAGE, options.table_cache),
            dynamic,
            footer: footer.bytes.clone(),
            next: Cell::new(None),
            footer_due: Cell::new(!footer.at_end),
            marked: RefCell::default(),
            marking: RangeLock::default(),
            placing: RangeLock::default(),
            writing: RangeLock::default(),
        }
    }

    /// Bytes of a block with its bitmap.
    fn unit(&self) -> u64 {
        self.dynamic.bitmap_size() + self.dynamic.block_size
    }

    /// Makes an entry present, until the caller awaits.
    async fn present(&self, block: u64) -> Result<(), IoError> {
        while !self.table.present(&self.file, block).await? {
            self.write_back().await?;
        }
        Ok(())
    }

    /// Where the next block goes: after all that the table names.
    async fn find_end(&self) -> Result<u64, IoError> {
        if let Some(next) = self.next.get() {
            return Ok(next);
        }
        let mut end = self.dynamic.data_start();
        self.table
            .scan(&self.file, |_, entry| {
                if entry != UNUSED {
                    end = end.max(entry * 512 + self.unit());
                }
            })
            .await?;
        self.next.set(Some(end));
        Ok(end)
    }

    fn is_marked(&self, block: u64) -> bool {
        self.marked.borrow().get(to_usize(block / 64)).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    fn mark(&self, block: u64) {
        let mut marked = self.marked.borrow_mut();
        let words = to_usize(self.dynamic.entries.div_ceil(64));
        marked.resize(words, 0);
        marked[to_usize(block / 64)] |= 1 << (block % 64);
    }
}

impl BlockMap for VhdMap {
    fn format(&self) -> Format {
        Format::Vhd
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn block_size(&self) -> u64 {
        self.dynamic.block_size
    }

    async fn place(&self, block: u64) -> Result<Place, IoError> {
        self.present(block).await?;
        let entry = self.table.get(block)?;
        if entry == UNUSED {
            return Ok(Place::Absent);
        }
        let bitmap = entry * 512;
        if bitmap < self.dynamic.data_start() && bitmap + self.unit() > self.dynamic.table || bitmap < FOOTER
        {
            return Err(IoError::Corrupt(format!("block {block} is at {bitmap:#x}, in the image's tables")));
        }
        let host = bitmap + self.dynamic.bitmap_size();
        if host >= self.file.len() {
            let what = format!("block {block} is at {bitmap:#x}, beyond the end of the file");
            return Err(IoError::Corrupt(what));
        }
        Ok(Place::Data(host))
    }

    async fn before_write(&self, block: u64, host: u64) -> Result<(), IoError> {
        if self.is_marked(block) {
            return Ok(());
        }
        let _one = self.marking.exclusive(block..block + 1).await;
        let length = self.dynamic.bitmap_size();
        let at = host - length;
        let bitmap = self.file.read_bytes(at, to_usize(length)).await?;
        if bitmap.iter().any(|&byte| byte != 0xff) {
            self.file.write_bytes(at, &vec![0xff; bitmap.len()]).await?;
        }
        self.mark(block);
        Ok(())
    }

    async fn allocate(&self, _want: u64) -> Result<(u64, u64), IoError> {
        let _one = self.placing.all().await;
        let at = self.find_end().await?;
        if at / 512 >= UNUSED {
            return Err(IoError::NoSpace);
        }
        let length = self.dynamic.bitmap_size();
        self.file.write_bytes(at, &vec![0xff; to_usize(length)]).await?;
        self.next.set(Some(at + self.unit()));
        self.footer_due.set(true);
        Ok((at + length, 1))
    }

    fn give_back(&self, host: u64, _count: u64) {
        if self.next.get() == Some(host + self.dynamic.block_size) {
            self.next.set(Some(host - self.dynamic.bitmap_size()));
        }
    }

    async fn commit(&self, block: u64, place: Place) -> Result<(), IoError> {
        let Place::Data(host) = place else { return Err(IoError::Os(libc::ENOTSUP)) };
        self.present(block).await?;
        self.table.set(block, (host - self.dynamic.bitmap_size()) / 512)?;
        self.mark(block);
        Ok(())
    }

    async fn write_back(&self) -> Result<(), IoError> {
        let _one = self.writing.all().await;
        let parts = self.table.take_dirty();
        let work = async {
            if self.footer_due.get() {
                // No new block may begin there meanwhile.
                let _one = self.placing.all().await;
                self.footer_due.set(false);
                let next = self.find_end().await?;
                let last = self.file.len().next_multiple_of(512).saturating_sub(FOOTER);
                self.file.write_bytes(next.max(last), &self.footer).await?;
            }
            self.file.sync().await?;
            for (at, bytes) in &parts {
                self.file.write_bytes(*at, bytes).await?;
            }
            if parts.is_empty() { Ok(()) } else { self.file.sync().await }
        };
        let result = work.await;
        self.table.written(result.is_ok());
        if result.is_err() {
            self.footer_due.set(true);
        }
        result
    }
}
