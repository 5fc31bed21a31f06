//! The metadata table and its items (specification, section 2.6).

use super::guid;
use super::header::{KIB, MIB};
use super::log::Replay;
use super::region::Regions;
use crate::OpenError;
use crate::bytes::{le16, le32, le64};
use crate::chain::ImageFile;

pub(super) const SIGNATURE: &[u8] = b"metadata";
/// Bytes of the table; the items follow.
pub(super) const TABLE_LENGTH: u64 = 64 * KIB;
const MAX_ENTRIES: u16 = 2047;
/// "IsRequired" of an entry.
pub(super) const REQUIRED: u32 = 4;
/// "IsVirtualDisk" of an entry.
pub(super) const VIRTUAL_DISK: u32 = 2;
/// "LeaveBlockAllocated" and "HasParent" of the file parameters.
pub(super) const LEAVE_ALLOCATED: u32 = 1;
const HAS_PARENT: u32 = 2;
pub(super) const MAX_SIZE: u64 = 64 << 40;
/// Sectors that a bitmap block tells of (section 2.5.1).
const SECTORS_OF_BITMAP: u64 = 1 << 23;

/// What the items say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Metadata {
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Bytes of a block: a power of two from 1 to 256 MiB.
    pub(crate) block_size: u64,
    /// 512 or 4096.
    pub(crate) logical_sector: u64,
    /// Whether blocks keep their place (a fixed image).
    pub(crate) fixed: bool,
}

/// An item's place: name, offset in the region, bytes.
type Item = ([u8; 16], u64, u64);

impl Metadata {
    pub(super) fn read(image: &ImageFile, replay: &Replay, regions: &Regions) -> Result<Self, OpenError> {
        let corrupt = |what: &str| OpenError::corrupt(image.path(), what);
        let region = &regions.metadata;
        if region.end - region.start < TABLE_LENGTH {
            return Err(corrupt("its metadata region is too small"));
        }
        let table = replay.read_through(image, region.start, TABLE_LENGTH, "the metadata table")?;
        let items = Self::items(&table).map_err(|what| {
            let path = image.path().to_owned();
            match what {
                Wrong::Corrupt(what) => OpenError::corrupt(image.path(), what),
                Wrong::Unknown(name) => OpenError::UnknownFeatures { path, names: vec![name] },
            }
        })?;
        let item = |name: [u8; 16], length: u64| {
            let found = items.iter().find(|item| item.0 == name && item.2 >= length);
            let &(_, offset, _) =
                found.ok_or_else(|| corrupt("a metadata item that it needs is not there"))?;
            if offset < TABLE_LENGTH || offset + length > region.end - region.start {
                return Err(corrupt("a metadata item lies outside of its region"));
            }
            replay.read_through(image, region.start + offset, length, "a metadata item")
        };
        if items.iter().any(|item| item.0 == guid::PARENT_LOCATOR) {
            return Err(differencing(image));
        }
        let parameters = item(guid::FILE_PARAMETERS, 8)?;
        if le32(&parameters, 4) & HAS_PARENT != 0 {
            return Err(differencing(image));
        }
        let new = Self {
            size: le64(&item(guid::VIRTUAL_DISK_SIZE, 8)?, 0),
            block_size: le32(&parameters, 0).into(),
            logical_sector: le32(&item(guid::LOGICAL_SECTOR_SIZE, 4)?, 0).into(),
            fixed: le32(&parameters, 4) & LEAVE_ALLOCATED != 0,
        };
        new.check().map_err(|what| OpenError::corrupt(image.path(), what))?;
        let bytes = regions.bat.end - regions.bat.start;
        if new.entries() * 8 > bytes {
            return Err(corrupt("its BAT is too small for the disk"));
        }
        if regions.bat.start + new.entries() * 8 > image.len() {
            return Err(OpenError::truncated(image.path(), "its BAT reaches beyond the end of the file"));
        }
        Ok(new)
    }

    /// The table's entries.
    pub(super) fn items(table: &[u8]) -> Result<Vec<Item>, Wrong> {
        let count = le16(table, 10);
        if !table.starts_with(SIGNATURE) || count > MAX_ENTRIES {
            return Err(Wrong::Corrupt("its metadata table is damaged".into()));
        }
        const KNOWN: [[u8; 16]; 6] = [
            guid::FILE_PARAMETERS,
            guid::VIRTUAL_DISK_SIZE,
            guid::VIRTUAL_DISK_ID,
            guid::LOGICAL_SECTOR_SIZE,
            guid::PHYSICAL_SECTOR_SIZE,
            guid::PARENT_LOCATOR,
        ];
        let mut items: Vec<Item> = Vec::new();
        for entry in table.get(32..).unwrap_or_default().chunks_exact(32).take(count.into()) {
            let name: [u8; 16] = entry[..16].try_into().unwrap_or_default();
            if KNOWN.contains(&name) && items.iter().any(|item| item.0 == name) {
                return Err(Wrong::Corrupt("a metadata item is there twice".into()));
            }
            if KNOWN.contains(&name) {
                items.push((name, le32(entry, 16).into(), le32(entry, 20).into()));
            } else if le32(entry, 24) & REQUIRED != 0 {
                return Err(Wrong::Unknown("a required metadata item of an unknown kind".into()));
            }
        }
        Ok(items)
    }

    fn check(&self) -> Result<(), String> {
        if !self.block_size.is_power_of_two() || !(MIB..=256 * MIB).contains(&self.block_size) {
            return Err(format!("blocks of {} bytes", self.block_size));
        }
        if !matches!(self.logical_sector, 512 | 4096) {
            return Err(format!("sectors of {} bytes", self.logical_sector));
        }
        if self.size > MAX_SIZE || !self.size.is_multiple_of(self.logical_sector) {
            return Err(format!("a disk of {} bytes", self.size));
        }
        Ok(())
    }

    /// Blocks of the disk.
    pub(crate) fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block_size)
    }

    /// Payload entries after which one for a bitmap follows (section 2.5).
    pub(crate) fn chunk_ratio(&self) -> u64 {
        SECTORS_OF_BITMAP * self.logical_sector / self.block_size
    }

    /// The index in the BAT of a block of the disk.
    pub(crate) fn index(&self, block: u64) -> u64 {
        block + block / self.chunk_ratio()
    }

    /// Entries of the BAT.
    pub(crate) fn entries(&self) -> u64 {
        self.blocks().checked_sub(1).map_or(0, |last| self.index(last) + 1)
    }
}

/// What is wrong with a metadata table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wrong {
    Corrupt(String),
    Unknown(String),
}

fn differencing(image: &ImageFile) -> OpenError {
    OpenError::Unsupported {
        path: image.path().to_owned(),
        feature: "a differencing VHDX image".into(),
        hint: "merge it with its parent in Hyper-V first",
    }
}
