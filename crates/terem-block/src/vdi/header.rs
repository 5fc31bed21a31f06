//! The header.

use crate::OpenError;
use crate::bytes::{le32, le64};
use crate::chain::ImageFile;

/// Bytes of the header and its preface.
pub(super) const LENGTH: usize = 512;
/// At byte 0x40.
pub(super) const SIGNATURE: u32 = 0xbeda_107f;
pub(super) const VERSION: u32 = 0x0001_0001;
pub(super) const TYPE_DYNAMIC: u32 = 1;
pub(super) const TYPE_STATIC: u32 = 2;
/// Where the number of blocks that have a place is.
pub(super) const BLOCKS_ALLOCATED_AT: u64 = 0x184;
/// Entries from here on are no places.
pub(super) const DISCARDED: u64 = 0xffff_fffe;
pub(super) const UNALLOCATED: u64 = 0xffff_ffff;
/// The block size that QEMU and VirtualBox make.
pub(super) const BLOCK_SIZE: u32 = 1 << 20;
/// Most blocks: their map has 32-bit offsets.
pub(super) const MAX_BLOCKS: u64 = 0x3fff_ffff;

/// What the header says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) fixed: bool,
    /// Where the block map is; a multiple of 512.
    pub(crate) map_offset: u64,
    /// Where the first block is; a multiple of 512, after the map.
    pub(crate) data_offset: u64,
    /// Bytes of the disk as written.
    pub(crate) disk_size: u64,
    pub(crate) block_size: u64,
    /// Entries of the map.
    pub(crate) blocks: u64,
    /// How many blocks have a place, as written.
    pub(crate) allocated: u64,
}

impl Header {
    /// Bytes of the disk, a multiple of 512.
    pub(crate) fn size(&self) -> u64 {
        self.disk_size.next_multiple_of(512)
    }

    pub(crate) fn read(image: &ImageFile) -> Result<Self, OpenError> {
        let bytes = image.read(0, image.len().min(LENGTH as u64), "the header")?;
        let header = Self::parse(&bytes).map_err(|wrong| match wrong {
            Wrong::Corrupt(what) => OpenError::corrupt(image.path(), what),
            Wrong::Unsupported(feature, hint) => {
                OpenError::Unsupported { path: image.path().to_owned(), feature, hint }
            }
        })?;
        let map_end = header.map_offset + header.blocks * 4;
        if map_end > image.len() {
            return Err(OpenError::truncated(
                image.path(),
                format!("its block map ends at {map_end:#x}, the file at {:#x}", image.len()),
            ));
        }
        Ok(header)
    }

    /// Reads and checks the header in a file's first bytes.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Wrong> {
        let corrupt = |what: String| Err(Wrong::Corrupt(what));
        if bytes.len() < LENGTH || le32(bytes, 0x40) != SIGNATURE {
            return corrupt("it has no VDI header".into());
        }
        let version = le32(bytes, 0x44);
        if version != VERSION {
            let what = format!("VDI version {}.{}", version >> 16, version & 0xffff);
            return Err(Wrong::Unsupported(what, "convert it with VirtualBox"));
        }
        let fixed = match le32(bytes, 0x4c) {
            TYPE_DYNAMIC => false,
            TYPE_STATIC => true,
            other => {
                let what = format!("a VDI image of type {other} (undo or differencing)");
                return Err(Wrong::Unsupported(what, "merge it with its parent in VirtualBox"));
            }
        };
        if bytes[0x1a8..0x1c8].iter().any(|&b| b != 0) {
            let hint = "merge it with its parent in VirtualBox";
            return Err(Wrong::Unsupported("a VDI image with a parent".into(), hint));
        }
        let header = Self {
            fixed,
            map_offset: le32(bytes, 0x154).into(),
            data_offset: le32(bytes, 0x158).into(),
            disk_size: le64(bytes, 0x170),
            block_size: le32(bytes, 0x178).into(),
            blocks: le32(bytes, 0x180).into(),
            allocated: le32(bytes, 0x184).into(),
        };
        if le32(bytes, 0x168) != 512 {
            return corrupt(format!("sectors of {} bytes", le32(bytes, 0x168)));
        }
        if le32(bytes, 0x17c) != 0 {
            let hint = "convert it with VirtualBox";
            return Err(Wrong::Unsupported("extra data before each block".into(), hint));
        }
        if !header.block_size.is_power_of_two() || !(1 << 16..=1 << 26).contains(&header.block_size) {
            return corrupt(format!("blocks of {} bytes", header.block_size));
        }
        let room = header.blocks * header.block_size;
        if header.blocks > MAX_BLOCKS || header.disk_size > room || room > i64::MAX as u64 {
            return corrupt(format!(
                "a disk of {} bytes in {} blocks of {}",
                header.disk_size, header.blocks, header.block_size
            ));
        }
        // The last sector of the map is written whole.
        let map_end = (header.map_offset + header.blocks * 4).next_multiple_of(512);
        if !header.map_offset.is_multiple_of(512) || header.map_offset < LENGTH as u64 {
            return corrupt(format!("its block map is at {:#x}", header.map_offset));
        }
        if !header.data_offset.is_multiple_of(512) || header.data_offset < map_end {
            return corrupt(format!("its blocks begin at {:#x}", header.data_offset));
        }
        Ok(header)
    }
}

/// What is wrong with a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wrong {
    Corrupt(String),
    /// What it is, and what can be done.
    Unsupported(String, &'static str),
}
