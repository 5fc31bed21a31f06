//! The grains of an open sparse extent.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::rc::Rc;

use super::sparse::{SECTOR, SparseHeader};
use crate::blocks::{BlockMap, Place};
use crate::bytes::{le32, put};
use crate::file::{File, to_usize};
use crate::qcow2::TableCache;
use crate::range_lock::RangeLock;
use crate::{Format, IoError};

/// The entry of a grain of zeroes.
pub(super) const ZEROED: u32 = 1;
/// Bytes before a compressed grain's data: which one it is, and how long.
pub(super) const MARKER: usize = 12;
/// Decompressed grains that are kept, since guests read neighbouring sectors one after the other.
const KEPT: usize = 4;
/// The first sector that an entry cannot name.
const END: u64 = 1 << 32;

/// Decompressed grains by their place.
type Unpacked = VecDeque<(u64, Rc<Vec<u8>>)>;

/// Where grains are.
pub(super) struct Grains {
    file: Rc<File>,
    header: SparseHeader,
    directory: RefCell<Vec<u32>>,
    redundant: RefCell<Option<Vec<u32>>>,
    tables: TableCache,
    /// Which entry of the directory a table in the cache belongs to.
    owners: RefCell<HashMap<u64, usize>>,
    /// Where the next grain goes, once it was looked for.
    next: Cell<Option<u64>>,
    unpacked: RefCell<Unpacked>,
    placing: RangeLock,
    making: RangeLock,
    writing: RangeLock,
}

impl Grains {
    /// `memory`: most bytes of tables that are kept.
    pub(super) fn new(
        file: Rc<File>,
        header: SparseHeader,
        directories: (Vec<u32>, Option<Vec<u32>>),
        memory: usize,
    ) -> Self {
        Self {
            file,
            tables: TableCache::new(header.table_entries * 4, memory),
            header,
            directory: RefCell::new(directories.0),
            redundant: RefCell::new(directories.1),
            owners: RefCell::default(),
            next: Cell::new(None),
            unpacked: RefCell::default(),
            placing: RangeLock::default(),
            making: RangeLock::default(),
            writing: RangeLock::default(),
        }
    }

    /// Bytes of a table.
    fn table_length(&self) -> u64 {
        self.header.table_entries * 4
    }

    /// The directory's entry for a grain and the place in its table.
    fn index(&self, block: u64) -> (usize, usize) {
        (to_usize(block / self.header.table_entries), to_usize(block % self.header.table_entries) * 4)
    }

    /// Makes a table present, until the caller awaits; `None` where there is none.
    async fn present(&self, index: usize) -> Result<Option<u64>, IoError> {
        let sector = self.directory.borrow().get(index).copied().unwrap_or(0);
        if sector == 0 {
            return Ok(None);
        }
        let offset = u64::from(sector) * SECTOR;
        if offset + self.table_length() > self.file.len() {
            let what = format!("a grain table at {offset:#x} is beyond the end of the file");
            return Err(IoError::Corrupt(what));
        }
        while !self.tables.contains(offset) {
            if self.tables.make_room() {
                self.owners.borrow_mut().retain(|&table, _| self.tables.contains(table));
                self.tables.load(&self.file, offset).await?;
            } else {
                self.write_back().await?;
            }
        }
        self.owners.borrow_mut().insert(offset, index);
        Ok(Some(offset))
    }

    /// Makes a table, if there is none yet, and both directories refer to it.
    async fn make_table(&self, index: usize) -> Result<(), IoError> {
        let _one = self.making.all().await;
        if self.directory.borrow().get(index).is_none_or(|&sector| sector != 0) {
            return Ok(());
        }
        let length = self.table_length().next_multiple_of(SECTOR);
        let twice = self.redundant.borrow().is_some();
        let at = self.take(if twice { 2 * length } else { length }).await?;
        let zeroes = vec![0; to_usize(if twice { 2 * length } else { length })];
        self.file.write_bytes(at, &zeroes).await?;
        // An entry must not be there before its table.
        self.file.sync().await?;
        let sector = |at: u64| u32::try_from(at / SECTOR).map_err(|_| IoError::NoSpace);
        let (first, second) = (sector(at)?, sector(at + length)?);
        let entry = index as u64 * 4;
        self.file.write_bytes(self.header.directory + entry, &first.to_le_bytes()).await?;
        if let Some(redundant) = self.header.redundant.filter(|_| twice) {
            self.file.write_bytes(redundant + entry, &second.to_le_bytes()).await?;
        }
        self.directory.borrow_mut()[index] = first;
        if let Some(redundant) = self.redundant.borrow_mut().as_mut() {
            redundant[index] = second;
        }
        Ok(())
    }

    /// Takes bytes at the end of what is used.
    async fn take(&self, length: u64) -> Result<u64, IoError> {
        let _one = self.placing.all().await;
        let at = self.find_end().await?;
        let unit = if self.header.compressed { SECTOR } else { self.header.grain };
        let end = (at + length).next_multiple_of(unit);
        if end / SECTOR > END {
            return Err(IoError::NoSpace);
        }
        self.next.set(Some(end));
        Ok(at)
    }

    /// Where the next grain goes: after all that is there.
    async fn find_end(&self) -> Result<u64, IoError> {
        if let Some(next) = self.next.get() {
            return Ok(next);
        }
        let header = &self.header;
        if header.compressed {
            let next = self.file.len().next_multiple_of(SECTOR);
            self.next.set(Some(next));
            return Ok(next);
        }
        let directory_end = |at: u64| at + header.tables() * 4;
        let mut end = header.overhead.max(directory_end(header.directory)).max(LENGTH_OF_HEADER);
        end = end.max(header.redundant.map_or(0, directory_end));
        end = end.max(header.descriptor.as_ref().map_or(0, |d| d.end));
        let sectors = |table: &[u32]| -> Vec<u64> {
            table.iter().filter(|&&s| s != 0).map(|&s| u64::from(s) * SECTOR).collect()
        };
        let tables = sectors(&self.directory.borrow());
        for at in sectors(self.redundant.borrow().as_deref().unwrap_or_default()) {
            end = end.max(at + self.table_length());
        }
        // Tables mostly follow each other, and are read together then.
        const MOST: usize = 512;
        let step = self.table_length().next_multiple_of(SECTOR);
        let mut left = tables.as_slice();
        while let Some(&first) = left.first() {
            let row = left.iter().zip(0..).take(MOST).take_while(|(at, i)| **at == first + i * step).count();
            let bytes = self.file.read_bytes(first, to_usize(row as u64 * step)).await?;
            end = end.max(first + row as u64 * step);
            for table in bytes.chunks(to_usize(step)) {
                let entries = table[..to_usize(self.table_length())].as_chunks::<4>().0;
                let last = entries.iter().map(|&e| u32::from_le_bytes(e)).max().unwrap_or(0);
                if last > ZEROED {
                    end = end.max(u64::from(last) * SECTOR + header.grain);
                }
            }
            left = &left[row..];
        }
        let next = end.next_multiple_of(header.grain);
        self.next.set(Some(next));
        Ok(next)
    }

    fn entry_of(&self, place: Place) -> Result<u32, IoError> {
        match place {
            Place::Zero => Ok(ZEROED),
            Place::Data(host) | Place::Packed(host) => {
                u32::try_from(host / SECTOR).map_err(|_| IoError::NoSpace)
            }
            Place::Absent => Ok(0),
        }
    }

    /// Writes a grain's compressed bytes behind a marker; where it is.
    pub(super) async fn put_packed(&self, block: u64, packed: &[u8]) -> Result<u64, IoError> {
        let length = (MARKER + packed.len()).next_multiple_of(to_usize(SECTOR));
        let host = self.take(length as u64).await?;
        let mut bytes = vec![0; length];
        let sector = block * (self.header.grain / SECTOR);
        put(&mut bytes, 0, &sector.to_le_bytes());
        put(&mut bytes, 8, &u32::try_from(packed.len()).unwrap_or(u32::MAX).to_le_bytes());
        put(&mut bytes, MARKER, packed);
        self.file.write_bytes(host, &bytes).await?;
        Ok(host)
    }

    async fn read_packed(&self, host: u64) -> Result<Vec<u8>, IoError> {
        let grain = self.header.grain;
        // Mostly it is all in here.
        let first = self.file.read_bytes(host, to_usize(grain + SECTOR)).await?;
        if !self.header.has_markers() {
            return Ok(first);
        }
        let length = u64::from(le32(&first, 8));
        if length == 0 || length > 2 * grain {
            return Err(IoError::Corrupt(format!("a compressed grain of {length} bytes at {host:#x}")));
        }
        let all = MARKER + to_usize(length);
        let bytes = if all <= first.len() { first } else { self.file.read_bytes(host, all).await? };
        Ok(bytes[MARKER..all].to_vec())
    }
}

const LENGTH_OF_HEADER: u64 = super::sparse::LENGTH;

/// Compresses a grain's bytes (RFC 1950).
pub(super) fn compress(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut out = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    out.write_all(bytes)?;
    out.finish()
}

/// Decompresses to at most `size` bytes.
pub(super) fn decompress(packed: &[u8], size: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    flate2::read::ZlibDecoder::new(packed).take(size).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl BlockMap for Grains {
    fn format(&self) -> Format {
        Format::Vmdk
    }

    fn file(&self) -> &File {
        &self.file
    }

    fn block_size(&self) -> u64 {
        self.header.grain
    }

    fn has_zero_blocks(&self) -> bool {
        self.header.has_zero_grains()
    }

    fn packs(&self) -> bool {
        self.header.compressed
    }

    async fn place(&self, block: u64) -> Result<Place, IoError> {
        let (index, at) = self.index(block);
        let Some(table) = self.present(index).await? else { return Ok(Place::Absent) };
        let entry = self.tables.with(table, |bytes| le32(bytes, at));
        let entry = entry.ok_or_else(|| IoError::Corrupt("a table has gone".into()))?;
        if entry == 0 {
            return Ok(Place::Absent);
        }
        if entry == ZEROED && self.header.has_zero_grains() {
            return Ok(Place::Zero);
        }
        let host = u64::from(entry) * SECTOR;
        if host < self.header.overhead.max(LENGTH_OF_HEADER) || host >= self.file.len() {
            let what = format!("grain {block} is at {host:#x}, in the tables or beyond the end of the file");
            return Err(IoError::Corrupt(what));
        }
        Ok(if self.header.compressed { Place::Packed(host) } else { Place::Data(host) })
    }

    async fn allocate(&self, want: u64) -> Result<(u64, u64), IoError> {
        let host = self.take(want * self.header.grain).await?;
        Ok((host, want))
    }

    fn give_back(&self, host: u64, count: u64) {
        if self.next.get() == Some(host + count * self.header.grain) {
            self.next.set(Some(host));
        }
    }

    async fn commit(&self, block: u64, place: Place) -> Result<(), IoError> {
        let (entry, (index, at)) = (self.entry_of(place)?, self.index(block));
        let table = loop {
            match self.present(index).await? {
                Some(table) => break table,
                None => self.make_table(index).await?,
            }
        };
        let changed = self.tables.change(table, at..at + 4, |bytes| put(bytes, at, &entry.to_le_bytes()));
        changed.ok_or_else(|| IoError::Corrupt("a table has gone".into()))
    }

    async fn write_back(&self) -> Result<(), IoError> {
        let _one = self.writing.all().await;
        let parts = self.tables.take_dirty();
        let work = async {
            self.file.sync().await?;
            for part in &parts {
                self.file.write_bytes(part.table + part.at as u64, &part.bytes).await?;
                let owner = self.owners.borrow().get(&part.table).copied();
                let copy = owner.and_then(|i| self.redundant.borrow().as_ref()?.get(i).copied());
                if let Some(sector) = copy.filter(|&sector| sector != 0) {
                    let at = u64::from(sector) * SECTOR + part.at as u64;
                    self.file.write_bytes(at, &part.bytes).await?;
                }
            }
            if parts.is_empty() { Ok(()) } else { self.file.sync().await }
        };
        let result = work.await;
        self.tables.written(&parts, result.is_ok());
        result
    }

    async fn unpack(&self, host: u64) -> Result<Rc<Vec<u8>>, IoError> {
        let kept =
            self.unpacked.borrow().iter().find(|(at, _)| *at == host).map(|(_, bytes)| Rc::clone(bytes));
        if let Some(bytes) = kept {
            return Ok(bytes);
        }
        let packed = self.read_packed(host).await?;
        let bytes = decompress(&packed, self.header.grain)
            .map_err(|e| IoError::Corrupt(format!("the compressed grain at {host:#x}: {e}")))?;
        let bytes = Rc::new(bytes);
        let mut unpacked = self.unpacked.borrow_mut();
        unpacked.truncate(KEPT - 1);
        unpacked.push_front((host, Rc::clone(&bytes)));
        Ok(bytes)
    }

    async fn pack(&self, block: u64, bytes: &[u8]) -> Result<u64, IoError> {
        self.put_packed(block, &compress(bytes)?).await
    }
}
