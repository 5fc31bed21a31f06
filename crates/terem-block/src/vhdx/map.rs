//! The BAT of an open image (specification, section 2.5).

use std::cell::{Cell, RefCell};

use super::guid;
use super::header::{Header, MIB};
use super::log::{SECTOR, entry, pages_in};
use super::metadata::Metadata;
use super::open::Parts;
use super::region::Regions;
use crate::blocks::{BlockMap, Entries, Place, Table};
use crate::bytes::new_uuid;
use crate::file::File;
use crate::range_lock::RangeLock;
use crate::{Format, IoError, OpenOptions};

/// The bits of an entry that say the block's state, and those that say where it is, in bytes.
pub(super) const STATE: u64 = 7;
pub(super) const OFFSET: u64 = !0 << 20;
/// States of payload blocks (section 2.5.1.1). Other states than these two read as zeroes, or are not valid here.
pub(super) const ZERO: u64 = 2;
pub(super) const PRESENT: u64 = 6;
pub(super) const PARTLY_PRESENT: u64 = 7;

/// Where blocks are.
pub(super) struct VhdxMap {
    file: File,
    table: Table,
    metadata: Metadata,
    regions: Regions,
    header: RefCell<Header>,
    /// Where the next block goes, once it was looked for.
    next: Cell<Option<u64>>,
    /// The next log entry's sequence number.
    sequence: Cell<u64>,
    /// Bytes that the file had at opening.
    length: u64,
    /// Whether the headers say that the image is being written.
    started: Cell<bool>,
    starting: RangeLock,
    placing: RangeLock,
    writing: RangeLock,
}

impl VhdxMap {
    pub(super) fn new(file: File, parts: Parts, options: &OpenOptions) -> Self {
        let Parts { header, regions, metadata, replay, next_entry } = parts;
        let (start, page) = (regions.bat.start, SECTOR as u64);
        let mut table = Table::new(Entries::Le64, start, metadata.entries(), page, options.table_cache);
        if !replay.is_empty() {
            // The pages of the table that the log changes, as they are with all of its changes.
            for (at, bytes) in replay.pages_in(start..table.end()) {
                table.read_instead(at, &bytes);
            }
        }
        Self {
            length: file.len(),
            file,
            table,
            metadata,
            regions,
            header: RefCell::new(header),
            next: Cell::new(None),
            sequence: Cell::new(next_entry),
            started: Cell::new(false),
            starting: RangeLock::default(),
            placing: RangeLock::default(),
            writing: RangeLock::default(),
        }
    }

    /// Makes an entry present, until the caller awaits.
    async fn present(&self, index: u64) -> Result<(), IoError> {
        while !self.table.present(&self.file, index).await? {
            self.write_back().await?;
        }
        Ok(())
    }

    /// Where the next block goes: after all that is there.
    async fn find_end(&self) -> Result<u64, IoError> {
        if let Some(next) = self.next.get() {
            return Ok(next);
        }
        let mut end = self.regions.end();
        let size = self.metadata.block_size;
        self.table
            .scan(&self.file, |_, entry| {
                end = end.max((entry & OFFSET).saturating_add(size));
            })
            .await?;
        let end = end.checked_next_multiple_of(MIB).ok_or(IoError::NoSpace)?;
        self.next.set(Some(end));
        Ok(end)
    }

    /// Writes both headers, one after the other, with what `change` makes of them (section 2.2.2.1).
    async fn update_headers(&self, change: impl FnOnce(&mut Header)) -> Result<(), IoError> {
        let mut header = self.header.borrow().clone();
        change(&mut header);
        for _ in 0..2 {
            header = header.next();
            self.file.write_bytes(header.offset(), &header.bytes()).await?;
            self.file.sync().await?;
            self.header.replace(header.clone());
        }
        Ok(())
    }

    /// Writes pages of the table through the log. All that was written before must be durable. Afterwards the log is;
    /// the pages themselves will be with the next sync, before which the log does not change.
    async fn write_pages(&self, pages: &[(u64, Vec<u8>)]) -> Result<(), IoError> {
        let (name, log_offset, log_length) = {
            let header = self.header.borrow();
            (header.log_guid, header.log_offset, header.log_length)
        };
        for (i, pages) in pages.chunks(pages_in(log_length).max(1)).enumerate() {
            if i > 0 {
                self.file.sync().await?;
            }
            // What the entry before changed is durable by now, so this one may take its place in the log.
            let sequence = self.sequence.get();
            self.sequence.set(sequence.wrapping_add(1));
            self.file.write_bytes(log_offset, &entry(pages, &name, sequence, self.length)).await?;
            self.file.sync().await?;
            for (at, bytes) in pages {
                self.file.write_bytes(*at, bytes).await?;
            }
        }
        Ok(())
    }
}

impl BlockMap for VhdxMap {
    fn format(&self) -> Format {
        Format::Vhdx
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn block_size(&self) -> u64 {
        self.metadata.block_size
    }

    fn preallocated(&self) -> bool {
        self.metadata.fixed
    }

    async fn place(&self, block: u64) -> Result<Place, IoError> {
        let index = self.metadata.index(block);
        self.present(index).await?;
        let entry = self.table.get(index)?;
        let host = entry & OFFSET;
        match entry & STATE {
            PRESENT if self.regions.reach_into(&(host..host.saturating_add(self.block_size()))) => {
                let what = format!("block {block} is at {host:#x}, in the image's own structures");
                Err(IoError::Corrupt(what))
            }
            PRESENT if host >= self.file.len() => {
                let what = format!("block {block} is at {host:#x}, beyond the end of the file");
                Err(IoError::Corrupt(what))
            }
            PRESENT => Ok(Place::Data(host)),
            ZERO => Ok(Place::Zero),
            state @ (PARTLY_PRESENT | 4) => {
                Err(IoError::Corrupt(format!("block {block} has state {state}, which has no meaning here")))
            }
            _ => Ok(Place::Absent),
        }
    }

    async fn begin_write(&self) -> Result<(), IoError> {
        if self.started.get() {
            return Ok(());
        }
        let _one = self.starting.all().await;
        if self.started.get() {
            return Ok(());
        }
        let [file_write, data_write, log_guid] = [new_uuid()?, new_uuid()?, new_uuid()?];
        self.update_headers(|header| {
            *header = Header { file_write, data_write, log_guid, ..header.clone() };
        })
        .await?;
        self.started.set(true);
        Ok(())
    }

    async fn allocate(&self, want: u64) -> Result<(u64, u64), IoError> {
        let _one = self.placing.all().await;
        let host = self.find_end().await?;
        let end = want.checked_mul(self.block_size()).and_then(|bytes| host.checked_add(bytes));
        let end = end.filter(|&end| i64::try_from(end).is_ok()).ok_or(IoError::NoSpace)?;
        self.next.set(Some(end));
        Ok((host, want))
    }

    fn give_back(&self, host: u64, count: u64) {
        if self.next.get() == Some(host + count * self.block_size()) {
            self.next.set(Some(host));
        }
    }

    async fn commit(&self, block: u64, place: Place) -> Result<(), IoError> {
        let Place::Data(host) = place else { return Err(IoError::Os(libc::ENOTSUP)) };
        let index = self.metadata.index(block);
        self.present(index).await?;
        self.table.set(index, host | PRESENT)
    }

    async fn write_back(&self) -> Result<(), IoError> {
        let _one = self.writing.all().await;
        let pages = self.table.take_dirty();
        let work = async {
            self.file.sync().await?;
            self.write_pages(&pages).await
        };
        let result = work.await;
        self.table.written(result.is_ok());
        result
    }

    async fn close(&self) -> Result<(), IoError> {
        if self.started.get() {
            self.file.sync().await?;
            self.update_headers(|header| header.log_guid = guid::NONE).await?;
            self.started.set(false);
        }
        Ok(())
    }
}
