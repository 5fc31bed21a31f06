//! The footer and the dynamic disk header (specification, "Hard Disk Footer Format", "Dynamic Disk Header Format").

use crate::OpenError;
use crate::bytes::{be16, be32, be64};
use crate::chain::ImageFile;

/// Bytes of a footer.
pub(super) const FOOTER: u64 = 512;
/// Bytes of a dynamic disk header.
pub(super) const DYNAMIC_HEADER: u64 = 1024;
pub(super) const COOKIE: &[u8] = b"conectix";
pub(super) const DYNAMIC_COOKIE: &[u8] = b"cxsparse";
/// Where the checksums are.
pub(super) const CHECKSUM_AT: usize = 64;
pub(super) const DYNAMIC_CHECKSUM_AT: usize = 36;
pub(super) const TYPE_FIXED: u32 = 2;
pub(super) const TYPE_DYNAMIC: u32 = 3;
pub(super) const TYPE_DIFFERENCING: u32 = 4;
/// An entry of the table for a block that is not there.
pub(super) const UNUSED: u64 = 0xffff_ffff;
/// Most sectors of a disk: 2040 GiB.
pub(super) const MAX_SECTORS: u64 = 0xff00_0000;
/// The largest geometry that the footer can hold; a disk that has it may be larger.
pub(super) const MAX_GEOMETRY: (u16, u8, u8) = (65535, 16, 255);

/// Sectors of a geometry: cylinders, heads, sectors of a track.
pub(super) fn sectors_of((cylinders, heads, sectors): (u16, u8, u8)) -> u64 {
    u64::from(cylinders) * u64::from(heads) * u64::from(sectors)
}

/// The complement of the sum of all bytes but those of the checksum at `at`.
pub(super) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().fold(0u32, |sum, &b| sum.wrapping_add(b.into()));
    !(sum(&bytes[..at]).wrapping_add(sum(&bytes[at + 4..])))
}

/// What a footer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Footer {
    /// As it is in the file.
    pub(super) bytes: Vec<u8>,
    pub(super) kind: u32,
    /// Where the dynamic header is.
    pub(super) data_offset: u64,
    pub(super) sectors: u64,
    /// Whether there was one at the file's end.
    pub(super) at_end: bool,
}

impl Footer {
    /// Bytes of the disk.
    pub(crate) fn size(&self) -> u64 {
        self.sectors * 512
    }

    /// Reads the footer at the end, or its copy at the beginning if there is none or it is damaged.
    pub(crate) fn read(image: &ImageFile) -> Result<Self, OpenError> {
        let corrupt = |what: &str| OpenError::corrupt(image.path(), what);
        if image.len() < FOOTER {
            return Err(corrupt("it is too short for a VHD footer"));
        }
        let end = image.read(image.len() - FOOTER, FOOTER, "the footer")?;
        let start = image.read(0, FOOTER, "the footer's copy")?;
        let whole = |bytes: &[u8]| checksum(bytes, CHECKSUM_AT) == be32(bytes, CHECKSUM_AT);
        let mut found: Vec<_> = [(&end, true), (&start, false)].into();
        found.retain(|(bytes, _)| bytes.starts_with(COOKIE));
        // A wrong checksum alone is no reason to lose an image, as long as there is nothing better.
        let best = found.iter().find(|(bytes, _)| whole(bytes)).or(found.last()).copied();
        let (bytes, at_end) = best.ok_or_else(|| corrupt("it has no VHD footer"))?;
        let mut footer = Self::parse(bytes).map_err(|what| OpenError::corrupt(image.path(), what))?;
        footer.at_end = at_end;
        Ok(footer)
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() as u64 != FOOTER || !bytes.starts_with(COOKIE) {
            return Err("it has no VHD footer".into());
        }
        if be32(bytes, 12) >> 16 != 1 {
            return Err(format!("version {:#x}", be32(bytes, 12)));
        }
        let geometry = (be16(bytes, 56), bytes[58], bytes[59]);
        // Virtual PC takes the geometry, Hyper-V and those below the size; which applies depends on who made it.
        let by_size = matches!(&bytes[28..32], b"win " | b"qem2" | b"d2v " | b"tap\0" | b"wa\0\0")
            || bytes[28..].starts_with(b"CXS")
            || geometry == MAX_GEOMETRY;
        let sectors = if by_size { be64(bytes, 48) / 512 } else { sectors_of(geometry) };
        if sectors > MAX_SECTORS {
            return Err(format!("a disk of {sectors} sectors ({MAX_SECTORS} at most)"));
        }
        let (kind, data_offset) = (be32(bytes, 60), be64(bytes, 16));
        Ok(Self { bytes: bytes.to_vec(), kind, data_offset, sectors, at_end: false })
    }
}

/// A dynamic disk's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dynamic {
    /// Where the table is; a multiple of 512.
    pub(crate) table: u64,
    /// Its entries.
    pub(crate) entries: u64,
    /// Bytes of the disk in a block.
    pub(crate) block_size: u64,
}

impl Dynamic {
    /// Bytes of the bitmap before each block's data.
    pub(super) fn bitmap_size(&self) -> u64 {
        (self.block_size / 512).div_ceil(8).next_multiple_of(512)
    }

    /// Where blocks can begin: after the table.
    pub(super) fn data_start(&self) -> u64 {
        (self.table + self.entries * 4).next_multiple_of(512)
    }

    pub(super) fn parse(bytes: &[u8], sectors: u64) -> Result<Self, String> {
        if bytes.len() as u64 != DYNAMIC_HEADER || !bytes.starts_with(DYNAMIC_COOKIE) {
            return Err("it has no dynamic disk header".into());
        }
        let new = Self {
            table: be64(bytes, 16),
            entries: be32(bytes, 28).into(),
            block_size: be32(bytes, 32).into(),
        };
        if !new.block_size.is_power_of_two() || !(512..=1 << 30).contains(&new.block_size) {
            return Err(format!("blocks of {} bytes", new.block_size));
        }
        if new.entries * new.block_size < sectors * 512 || new.entries > MAX_SECTORS {
            return Err(format!(
                "a table of {} blocks of {} for {sectors} sectors",
                new.entries, new.block_size
            ));
        }
        if !new.table.is_multiple_of(512) || new.table < FOOTER || new.table > i64::MAX as u64 {
            return Err(format!("its block allocation table is at {:#x}", new.table));
        }
        Ok(new)
    }
}

/// How the disk lies in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    Fixed,
    Dynamic(Dynamic),
}

impl Layout {
    pub(crate) fn read(image: &ImageFile, footer: &Footer) -> Result<Self, OpenError> {
        let corrupt = |what: String| OpenError::corrupt(image.path(), what);
        match footer.kind {
            TYPE_FIXED => {
                if footer.size() > image.len() - FOOTER {
                    let what = format!("a disk of {} bytes in a file of {}", footer.size(), image.len());
                    return Err(OpenError::truncated(image.path(), what));
                }
                Ok(Self::Fixed)
            }
            TYPE_DYNAMIC => {
                let bytes = image.read(footer.data_offset, DYNAMIC_HEADER, "the dynamic disk header")?;
                let dynamic = Dynamic::parse(&bytes, footer.sectors).map_err(corrupt)?;
                let header_end = footer.data_offset + DYNAMIC_HEADER;
                if dynamic.table < header_end && footer.data_offset < dynamic.data_start() {
                    return Err(corrupt("its table and its header overlap".into()));
                }
                if dynamic.data_start() > image.len() {
                    let what = format!("its table ends at {:#x}", dynamic.data_start());
                    return Err(OpenError::truncated(image.path(), what));
                }
                Ok(Self::Dynamic(dynamic))
            }
            TYPE_DIFFERENCING => Err(OpenError::Unsupported {
                path: image.path().to_owned(),
                feature: "a differencing VHD image".into(),
                hint: "merge it with its parent in Hyper-V first",
            }),
            other => Err(corrupt(format!("a disk of type {other}"))),
        }
    }
}
