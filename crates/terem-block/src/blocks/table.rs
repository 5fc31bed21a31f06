//! A table of block places that lies in one piece in the file, of which parts are kept in memory.

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::chain::ImageFile;
use crate::file::{File, to_usize};
use crate::qcow2::{DirtyPart, TableCache};
use crate::{IoError, OpenError};

/// How entries are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entries {
    /// Little-endian, 32 bits.
    Le32,
    /// Big-endian, 32 bits.
    Be32,
    /// Little-endian, 64 bits.
    Le64,
}

impl Entries {
    pub(crate) fn bytes(self) -> u64 {
        match self {
            Self::Le32 | Self::Be32 => 4,
            Self::Le64 => 8,
        }
    }

    /// The entry at the beginning of `bytes`.
    pub(crate) fn decode(self, bytes: &[u8]) -> u64 {
        let word = |n: usize| bytes.get(..n).unwrap_or_default();
        match self {
            Self::Le32 => word(4).try_into().map_or(0, u32::from_le_bytes).into(),
            Self::Be32 => word(4).try_into().map_or(0, u32::from_be_bytes).into(),
            Self::Le64 => word(8).try_into().map_or(0, u64::from_le_bytes),
        }
    }

    fn encode(self, value: u64, bytes: &mut [u8]) {
        #[allow(clippy::cast_possible_truncation, reason = "formats give values that fit their entries")]
        let short = value as u32;
        match self {
            Self::Le32 => bytes.copy_from_slice(&short.to_le_bytes()),
            Self::Be32 => bytes.copy_from_slice(&short.to_be_bytes()),
            Self::Le64 => bytes.copy_from_slice(&value.to_le_bytes()),
        }
    }
}

/// A table in the file.
pub(crate) struct Table {
    cache: TableCache,
    entries: Entries,
    /// Its first byte in the file.
    start: u64,
    /// Bytes that are read and written at once.
    page: u64,
    count: u64,
    /// Pages that are not on the storage as they should be, for images that are only read.
    instead: BTreeMap<u64, Vec<u8>>,
    /// Parts being written back.
    writing: RefCell<Vec<DirtyPart>>,
}

impl Table {
    /// A table of `count` entries at `start`, read and written in pages of `page` bytes, of which about `memory` bytes
    /// are kept. The last page must lie wholly in the table's place in the file.
    pub(crate) fn new(entries: Entries, start: u64, count: u64, page: u64, memory: usize) -> Self {
        let cache = TableCache::new(page, memory);
        Self { cache, entries, start, page, count, instead: BTreeMap::new(), writing: RefCell::default() }
    }

    /// Lets the page at `offset` of the file read as `bytes`. Only for tables that are not changed.
    pub(crate) fn read_instead(&mut self, offset: u64, bytes: &[u8]) {
        if offset >= self.start && offset < self.end() && bytes.len() as u64 == self.page {
            self.instead.insert(offset, bytes.to_vec());
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The first byte after it in the file.
    pub(crate) fn end(&self) -> u64 {
        self.start + self.count * self.entries.bytes()
    }

    fn page_of(&self, index: u64) -> (u64, usize) {
        let at = index * self.entries.bytes();
        (self.start + at - at % self.page, to_usize(at % self.page))
    }

    /// Makes an entry present, until the caller awaits. False: there is no room; a write-back makes some.
    pub(crate) async fn present(&self, file: &File, index: u64) -> Result<bool, IoError> {
        let (page, _) = self.page_of(index);
        if self.instead.contains_key(&page) {
            return Ok(true);
        }
        while !self.cache.contains(page) {
            if !self.cache.make_room() {
                return Ok(false);
            }
            self.cache.load(file, page).await?;
        }
        Ok(true)
    }

    /// An entry that is present.
    pub(crate) fn get(&self, index: u64) -> Result<u64, IoError> {
        let (page, at) = self.page_of(index);
        if let Some(bytes) = self.instead.get(&page) {
            return Ok(self.entries.decode(&bytes[at..]));
        }
        let entry = self.cache.with(page, |bytes| self.entries.decode(&bytes[at..]));
        entry.ok_or_else(|| IoError::Corrupt("a table has gone".into()))
    }

    /// Sets an entry that is present.
    pub(crate) fn set(&self, index: u64, value: u64) -> Result<(), IoError> {
        let (page, at) = self.page_of(index);
        let range = at..at + to_usize(self.entries.bytes());
        let changed =
            self.cache.change(page, range.clone(), |bytes| self.entries.encode(value, &mut bytes[range]));
        changed.ok_or_else(|| IoError::Corrupt("a table has gone".into()))
    }

    /// Takes what has changed: place in the file and bytes. [`Self::written`] must follow.
    pub(crate) fn take_dirty(&self) -> Vec<(u64, Vec<u8>)> {
        let parts = self.cache.take_dirty();
        let found = parts.iter().map(|part| (part.table + part.at as u64, part.bytes.clone())).collect();
        *self.writing.borrow_mut() = parts;
        found
    }

    /// What was taken has been written, or could not be.
    pub(crate) fn written(&self, ok: bool) {
        self.cache.written(&self.writing.take(), ok);
    }

    /// Calls `look` for every entry in order, as it is on the storage: for who has changed nothing yet.
    pub(crate) async fn scan(&self, file: &File, mut look: impl FnMut(u64, u64)) -> Result<(), IoError> {
        const STEP: u64 = 1 << 18;
        let (width, end) = (to_usize(self.entries.bytes()), self.end());
        let (mut at, mut index) = (self.start, 0);
        while at < end {
            let n = STEP.min(end - at);
            let bytes = file.read_bytes(at, to_usize(n)).await?;
            for entry in bytes.chunks_exact(width) {
                look(index, self.entries.decode(entry));
                index += 1;
            }
            at += n;
        }
        Ok(())
    }
}

/// Calls `look` for each of `count` entries at `start` of an image that is not open.
pub(crate) fn check_table(
    image: &ImageFile,
    entries: Entries,
    start: u64,
    count: u64,
    mut look: impl FnMut(u64, u64),
) -> Result<(), OpenError> {
    const STEP: u64 = 1 << 18;
    let mut index = 0;
    while index < count {
        let n = (STEP / entries.bytes()).min(count - index);
        let bytes =
            image.read(start + index * entries.bytes(), n * entries.bytes(), "its table of blocks")?;
        for entry in bytes.chunks_exact(to_usize(entries.bytes())) {
            look(index, entries.decode(entry));
            index += 1;
        }
    }
    Ok(())
}
