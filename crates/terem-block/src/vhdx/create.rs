//! New images.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::guid;
use super::header::{FILE_SIGNATURE, Header, KIB, MIB, seal};
use super::map::{PRESENT, ZERO};
use super::metadata::{LEAVE_ALLOCATED, MAX_SIZE, Metadata, REQUIRED, SIGNATURE, TABLE_LENGTH, VIRTUAL_DISK};
use super::region;
use crate::OpenError;
use crate::bytes::{le32, new_uuid, put};
use crate::file::to_usize;
use crate::format::NewImage;

/// What can be chosen for a new VHDX image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VhdxOptions {
    /// Whether every block gets its place at once.
    pub fixed: bool,
    /// Bytes of a block: a power of two from 1 to 256 MiB, or 0 for one that suits the disk's size.
    pub block_size: u64,
    /// Bytes of the log, rounded up to whole MiB.
    pub log_size: u64,
    /// Whether blocks of a dynamic image are marked as zero at first, not as not present. It makes no difference to
    /// who reads them.
    pub zero_blocks: bool,
}

/// Where the parts of a new image are.
struct Plan {
    metadata: Metadata,
    log: u64,
    bat: u64,
    bat_length: u64,
    metadata_at: u64,
    data: u64,
}

pub(super) fn create(new: &NewImage<'_>) -> Result<(), OpenError> {
    let plan = plan(new.size, &new.options.vhdx)
        .map_err(|what| OpenError::Limit { path: new.path.to_owned(), what })?;
    write(new.file, &plan, &new.options.vhdx).map_err(|e| OpenError::io(new.path, "writing the new image", e))
}

fn plan(size: u64, options: &VhdxOptions) -> Result<Plan, String> {
    const GIB: u64 = 1 << 30;
    if size > MAX_SIZE {
        return Err(format!("{size} bytes are too much for a VHDX image (64 TiB at most)"));
    }
    let block_size = match options.block_size {
        0 if size > 32 << 40 => 64 * MIB,
        0 if size > 100 * GIB => 32 * MIB,
        0 if size > GIB => 16 * MIB,
        0 => 8 * MIB,
        given => given,
    };
    if !block_size.is_power_of_two() || !(MIB..=256 * MIB).contains(&block_size) {
        return Err(format!(
            "a block size of {block_size} bytes; it must be a power of two from 1 to 256 MiB"
        ));
    }
    let log = options.log_size.max(1).next_multiple_of(MIB);
    if log > 256 * MIB {
        return Err(format!("a log of {log} bytes; it can have 1 to 256 MiB"));
    }
    let metadata = Metadata { size, block_size, logical_sector: 512, fixed: options.fixed };
    let bat = MIB + log;
    let bat_length = (metadata.entries() * 8).max(1).next_multiple_of(MIB);
    let metadata_at = bat + bat_length;
    Ok(Plan { metadata, log, bat, bat_length, metadata_at, data: metadata_at + MIB })
}

fn write(file: &File, plan: &Plan, options: &VhdxOptions) -> io::Result<()> {
    let blocks = plan.metadata.blocks();
    let end = plan.data + if options.fixed { blocks * plan.metadata.block_size } else { 0 };
    file.set_len(end)?;
    if options.fixed || options.zero_blocks {
        write_bat(file, plan, |block| {
            if options.fixed { (plan.data + block * plan.metadata.block_size) | PRESENT } else { ZERO }
        })?;
    }
    file.write_all_at(&metadata_table(), plan.metadata_at)?;
    file.write_all_at(&metadata_items(plan)?, plan.metadata_at + TABLE_LENGTH)?;
    for at in region::TABLES_AT {
        file.write_all_at(&region_table(plan), at)?;
    }
    let mut header = Header {
        sequence: u64::from(le32(&new_uuid()?, 0)),
        file_write: new_uuid()?,
        data_write: new_uuid()?,
        log_guid: guid::NONE,
        log_offset: MIB,
        log_length: u32::try_from(plan.log).unwrap_or(u32::MAX),
        place: 1,
    };
    for _ in 0..2 {
        header = header.next();
        file.write_all_at(&header.bytes(), header.offset())?;
    }
    // Last: until then it is no image.
    let mut identifier = FILE_SIGNATURE.to_vec();
    identifier.extend("Teremok".encode_utf16().flat_map(u16::to_le_bytes));
    file.write_all_at(&identifier, 0)
}

/// Writes the entries of all blocks.
fn write_bat(file: &File, plan: &Plan, entry: impl Fn(u64) -> u64) -> io::Result<()> {
    let (mut at, mut bytes) = (plan.bat, Vec::new());
    for block in 0..plan.metadata.blocks() {
        // Entries of bitmaps in between stay zero.
        let skipped = to_usize((plan.bat + plan.metadata.index(block) * 8) - (at + bytes.len() as u64));
        bytes.resize(bytes.len() + skipped, 0);
        bytes.extend(entry(block).to_le_bytes());
        if bytes.len() >= 1 << 20 {
            file.write_all_at(&bytes, at)?;
            at += bytes.len() as u64;
            bytes.clear();
        }
    }
    file.write_all_at(&bytes, at)
}

fn region_table(plan: &Plan) -> Vec<u8> {
    let mut table = vec![0; to_usize(region::LENGTH)];
    put(&mut table, 0, region::SIGNATURE);
    put(&mut table, 8, &2u32.to_le_bytes());
    let entries = [(guid::BAT, plan.bat, plan.bat_length), (guid::METADATA, plan.metadata_at, MIB)];
    for (i, (name, offset, length)) in entries.into_iter().enumerate() {
        let at = 16 + i * 32;
        put(&mut table, at, &name);
        put(&mut table, at + 16, &offset.to_le_bytes());
        put(&mut table, at + 24, &u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
        put(&mut table, at + 28, &1u32.to_le_bytes());
    }
    seal(&mut table);
    table
}

/// The items of a new image: name, bytes, flags.
const ITEMS: [([u8; 16], u32, u32); 5] = [
    (guid::FILE_PARAMETERS, 8, REQUIRED),
    (guid::VIRTUAL_DISK_SIZE, 8, REQUIRED | VIRTUAL_DISK),
    (guid::VIRTUAL_DISK_ID, 16, REQUIRED | VIRTUAL_DISK),
    (guid::LOGICAL_SECTOR_SIZE, 4, REQUIRED | VIRTUAL_DISK),
    (guid::PHYSICAL_SECTOR_SIZE, 4, REQUIRED | VIRTUAL_DISK),
];

fn metadata_table() -> Vec<u8> {
    let mut table = vec![0; to_usize(TABLE_LENGTH)];
    put(&mut table, 0, SIGNATURE);
    put(&mut table, 10, &5u16.to_le_bytes());
    let mut offset = 64 * KIB;
    for (i, (name, length, flags)) in ITEMS.into_iter().enumerate() {
        let at = 32 + i * 32;
        put(&mut table, at, &name);
        put(&mut table, at + 16, &u32::try_from(offset).unwrap_or(0).to_le_bytes());
        put(&mut table, at + 20, &length.to_le_bytes());
        put(&mut table, at + 24, &flags.to_le_bytes());
        offset += u64::from(length);
    }
    table
}

/// In the order of [`ITEMS`].
fn metadata_items(plan: &Plan) -> io::Result<Vec<u8>> {
    let block_size = u32::try_from(plan.metadata.block_size).unwrap_or(u32::MAX);
    let flags = if plan.metadata.fixed { LEAVE_ALLOCATED } else { 0 };
    let mut items = Vec::new();
    items.extend(block_size.to_le_bytes());
    items.extend(flags.to_le_bytes());
    items.extend(plan.metadata.size.to_le_bytes());
    items.extend(new_uuid()?);
    items.extend(512u32.to_le_bytes());
    items.extend(4096u32.to_le_bytes());
    Ok(items)
}
