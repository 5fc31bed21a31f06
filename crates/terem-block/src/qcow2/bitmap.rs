//! Persistent dirty bitmaps: their directory and their bits (specification, "Bitmaps").

use super::entry::OFFSET;
use super::header::{Header, be32, be64};
use super::tables::read_table;
use crate::OpenError;
use crate::chain::ImageFile;

/// Most bitmaps and bytes of their directory (QEMU's limits).
const MAX_BITMAPS: u32 = 65535;
const MAX_DIRECTORY: u64 = 64 << 20;
/// Most bytes of a bitmap's table, and so of one bitmap: 512 MiB at 512-byte clusters.
const MAX_TABLE: u64 = 8 << 20;
/// Most bytes of all tables.
const MAX_TABLES: u64 = 64 << 20;
/// Most bits of a bitmap.
const MAX_BITS: u64 = 1 << 32;
/// Bytes of a directory entry before its extra data.
const FIXED: usize = 24;

/// Not all writes since it was last stored are in it, since whoever used it did not close the image.
pub(crate) const IN_USE: u32 = 1;
/// It follows all writes.
pub(crate) const AUTO: u32 = 2;
/// The value of a table entry without a cluster for "all ones".
const ALL_ONES: u64 = 1;

/// A bitmap as its directory entry and table say.
#[derive(Debug, Clone)]
pub(crate) struct Bitmap {
    pub(crate) name: String,
    pub(crate) flags: u32,
    /// log2 of the bytes that a bit stands for.
    pub(crate) granularity_bits: u32,
    pub(crate) table_offset: u64,
    pub(crate) table: Vec<u64>,
    /// Type and extra data, only kept.
    kind: u8,
    extra: Vec<u8>,
}

impl Bitmap {
    pub(crate) fn new(name: String, granularity_bits: u32, flags: u32) -> Self {
        let (table_offset, table, kind, extra) = (0, Vec::new(), 1, Vec::new());
        Self { name, flags, granularity_bits, table_offset, table, kind, extra }
    }

    /// Bits for a disk of `size` bytes.
    pub(crate) fn bits(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.granularity_bits)
    }

    /// Entries of the table for a disk of `size` bytes.
    pub(crate) fn entries(&self, size: u64, cluster_size: u64) -> u64 {
        self.bits(size).div_ceil(8).div_ceil(cluster_size)
    }

    /// Sets the table's length as the disk's size asks for it; new parts are 0.
    pub(crate) fn resize(&mut self, size: u64, cluster_size: u64) {
        self.table.resize(usize::try_from(self.entries(size, cluster_size)).unwrap_or(0), 0);
    }

    /// Sets all bits, or none.
    pub(crate) fn fill(&mut self, ones: bool) {
        self.table.fill(if ones { ALL_ONES } else { 0 });
    }

    /// All its bytes.
    pub(crate) fn load(&self, image: &ImageFile, size: u64, cluster_size: u64) -> Result<Vec<u8>, OpenError> {
        let length = self.bits(size).div_ceil(8);
        let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
        for &entry in &self.table {
            let n = (length - bytes.len() as u64).min(cluster_size);
            let n_usize = usize::try_from(n).unwrap_or(0);
            match entry & OFFSET {
                0 => bytes.resize(bytes.len() + n_usize, if entry & ALL_ONES != 0 { 0xff } else { 0 }),
                offset => bytes.extend(image.read(offset, n, "a bitmap")?),
            }
        }
        bytes.resize(usize::try_from(length).unwrap_or(0), 0);
        Ok(bytes)
    }
}

/// The bitmaps of an image, if they are up to date.
pub(crate) fn read_bitmaps(image: &ImageFile, header: &Header) -> Result<Vec<Bitmap>, OpenError> {
    let Some((offset, length, number)) = header.bitmaps else { return Ok(Vec::new()) };
    let corrupt = |what: String| Err(OpenError::corrupt(image.path(), what));
    let cluster_size = header.cluster_size();
    if number > MAX_BITMAPS || length > MAX_DIRECTORY || !offset.is_multiple_of(cluster_size) {
        return corrupt(format!("a directory of {number} bitmaps in {length} bytes at {offset:#x}"));
    }
    let directory = image.read(offset, length, "the bitmap directory")?;
    let mut bitmaps = Vec::new();
    let (mut at, mut table_bytes) = (0, 0);
    for _ in 0..number {
        let Some(entry) = directory.get(at..).filter(|rest| rest.len() >= FIXED) else {
            return corrupt("the bitmap directory is cut short".into());
        };
        let (table_offset, entries, flags) = (be64(entry, 0), u64::from(be32(entry, 8)), be32(entry, 12));
        let (kind, granularity_bits) = (entry[16], u32::from(entry[17]));
        let (name, extra) = (be32(entry, 16) as usize & 0xffff, be32(entry, 20) as usize);
        let length = FIXED.checked_add(extra).and_then(|n| n.checked_add(name));
        let Some(strings) = length.and_then(|n| entry.get(FIXED..n)) else {
            return corrupt("the bitmap directory is cut short".into());
        };
        let (extra, name) = strings.split_at(extra);
        if entries * 8 > MAX_TABLE || !(9..=31).contains(&granularity_bits) {
            return corrupt(format!("a bitmap of 2^{granularity_bits} bytes a bit with {entries} clusters"));
        }
        if header.size >> granularity_bits > MAX_BITS || !table_offset.is_multiple_of(cluster_size) {
            return corrupt(format!("a bitmap of 2^{granularity_bits} bytes a bit at {table_offset:#x}"));
        }
        // Many bitmaps could name the same table.
        table_bytes += entries * 8;
        if table_bytes > MAX_TABLES {
            return corrupt(format!("bitmaps with tables of more than {MAX_TABLES} bytes"));
        }
        let table = read_table(image, table_offset, entries * 8, "a bitmap table")?;
        if let Some(wrong) = table.iter().find(|&e| !(e & OFFSET).is_multiple_of(cluster_size)) {
            return corrupt(format!("a bitmap table entry {wrong:#x}"));
        }
        let name = String::from_utf8_lossy(name).into_owned();
        let extra = extra.to_vec();
        bitmaps.push(Bitmap { name, flags, granularity_bits, table_offset, table, kind, extra });
        at += (FIXED + strings.len()).next_multiple_of(8);
    }
    Ok(bitmaps)
}

/// The bytes of the directory.
pub(crate) fn encode_directory(bitmaps: &[Bitmap]) -> Vec<u8> {
    let mut directory = Vec::new();
    for bitmap in bitmaps {
        directory.extend(bitmap.table_offset.to_be_bytes());
        directory.extend(u32::try_from(bitmap.table.len()).unwrap_or(0).to_be_bytes());
        directory.extend(bitmap.flags.to_be_bytes());
        directory.push(bitmap.kind);
        directory.push(u8::try_from(bitmap.granularity_bits).unwrap_or(0));
        directory.extend(u16::try_from(bitmap.name.len()).unwrap_or(0).to_be_bytes());
        directory.extend(u32::try_from(bitmap.extra.len()).unwrap_or(0).to_be_bytes());
        directory.extend(&bitmap.extra);
        directory.extend(bitmap.name.bytes());
        directory.resize(directory.len().next_multiple_of(8), 0);
    }
    directory
}
