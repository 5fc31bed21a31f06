//! The block map of an open image.

use std::cell::{Cell, RefCell};

use super::header::{BLOCKS_ALLOCATED_AT, DISCARDED, Header};
use crate::blocks::{BlockMap, Entries, Place, Table};
use crate::file::{File, to_usize};
use crate::range_lock::RangeLock;
use crate::{Format, IoError, OpenOptions};

/// Bytes of a page of the map: a sector, since the first block follows the map's last one.
const PAGE: u64 = 512;
/// Most unused places that are kept in memory; there may be more.
const MAX_HOLES: usize = 1 << 16;

/// Where blocks are.
pub(crate) struct VdiMap {
    file: File,
    table: Table,
    fixed: bool,
    block_size: u64,
    data_offset: u64,
    /// Places below `used` that no entry names, once they were looked for.
    holes: RefCell<Option<Vec<u64>>>,
    /// All places from here on are free.
    used: Cell<u64>,
    /// The header's count on the storage.
    counted: Cell<u64>,
    placing: RangeLock,
    writing: RangeLock,
}

impl VdiMap {
    pub(crate) fn new(file: File, header: &Header, options: &OpenOptions) -> Self {
        Self {
            file,
            table: Table::new(Entries::Le32, header.map_offset, header.blocks, PAGE, options.table_cache),
            fixed: header.fixed,
            block_size: header.block_size,
            data_offset: header.data_offset,
            holes: RefCell::new(None),
            used: Cell::new(0),
            counted: Cell::new(header.allocated),
            placing: RangeLock::default(),
            writing: RangeLock::default(),
        }
    }

    fn host(&self, place: u64) -> u64 {
        self.data_offset + place * self.block_size
    }

    /// Makes an entry present, until the caller awaits.
    async fn present(&self, block: u64) -> Result<(), IoError> {
        while !self.table.present(&self.file, block).await? {
            self.write_back().await?;
        }
        Ok(())
    }

    /// Looks which places are used.
    async fn find_holes(&self) -> Result<(), IoError> {
        if self.holes.borrow().is_some() {
            return Ok(());
        }
        let mut taken = vec![0u64; to_usize(self.table.count().div_ceil(64))];
        let mut used = 0;
        self.table
            .scan(&self.file, |_, entry| {
                if entry < DISCARDED {
                    used = used.max(entry + 1);
                    if let Some(word) = taken.get_mut(to_usize(entry / 64)) {
                        *word |= 1 << (entry % 64);
                    }
                }
            })
            .await?;
        let is_free =
            |&place: &u64| taken.get(to_usize(place / 64)).is_some_and(|w| w >> (place % 64) & 1 == 0);
        // An entry may name any place; holes are looked for among as many as there are blocks.
        let looked_at = 0..used.min(self.table.count());
        let mut holes: Vec<u64> = looked_at.filter(is_free).take(MAX_HOLES).collect();
        holes.reverse();
        self.used.set(used);
        *self.holes.borrow_mut() = Some(holes);
        Ok(())
    }
}

impl BlockMap for VdiMap {
    fn format(&self) -> Format {
        Format::Vdi
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn block_size(&self) -> u64 {
        self.block_size
    }

    fn preallocated(&self) -> bool {
        self.fixed
    }

    async fn place(&self, block: u64) -> Result<Place, IoError> {
        self.present(block).await?;
        let entry = self.table.get(block)?;
        if entry >= DISCARDED {
            return Ok(Place::Absent);
        }
        let host = self.host(entry);
        if host >= self.file.len() {
            let what = format!("block {block} is at {host:#x}, beyond the end of the file");
            return Err(IoError::Corrupt(what));
        }
        Ok(Place::Data(host))
    }

    async fn allocate(&self, want: u64) -> Result<(u64, u64), IoError> {
        let _one = self.placing.all().await;
        self.find_holes().await?;
        if let Some(place) = self.holes.borrow_mut().as_mut().and_then(Vec::pop) {
            return Ok((self.host(place), 1));
        }
        let place = self.used.get();
        if place + want >= DISCARDED {
            return Err(IoError::NoSpace);
        }
        self.used.set(place + want);
        Ok((self.host(place), want))
    }

    fn give_back(&self, host: u64, count: u64) {
        let place = (host - self.data_offset) / self.block_size;
        if place + count == self.used.get() {
            self.used.set(place);
        } else if let Some(holes) = self.holes.borrow_mut().as_mut() {
            holes.extend(place..place + count);
        }
    }

    async fn commit(&self, block: u64, place: Place) -> Result<(), IoError> {
        let Place::Data(host) = place else { return Err(IoError::Os(libc::ENOTSUP)) };
        self.present(block).await?;
        self.table.set(block, (host - self.data_offset) / self.block_size)
    }

    async fn write_back(&self) -> Result<(), IoError> {
        let _one = self.writing.all().await;
        let (parts, used) = (self.table.take_dirty(), self.used.get());
        let work = async {
            if !parts.is_empty() && self.counted.get() != used {
                let count = u32::try_from(used).unwrap_or(u32::MAX);
                self.file.write_bytes(BLOCKS_ALLOCATED_AT, &count.to_le_bytes()).await?;
            }
            self.file.sync().await?;
            for (at, bytes) in &parts {
                self.file.write_bytes(*at, bytes).await?;
            }
            if parts.is_empty() {
                return Ok(());
            }
            self.counted.set(used);
            self.file.sync().await
        };
        let result = work.await;
        self.table.written(result.is_ok());
        result
    }
}
