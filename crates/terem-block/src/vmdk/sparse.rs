//! The header of a sparse extent (specification, "Hosted Sparse Extents", "Stream-Optimized Compressed Sparse
//! Extents").

use std::ops::Range;

use crate::OpenError;
use crate::bytes::{le16, le32, le64};
use crate::chain::ImageFile;

pub(super) const MAGIC: &[u8] = b"KDMV";
/// The header of ESX's sparse extents.
pub(super) const COWD_MAGIC: &[u8] = b"COWD";
/// Bytes of the header.
pub(super) const LENGTH: u64 = 512;
pub(super) const SECTOR: u64 = 512;
/// Flags: both directories are there; a table entry of 1 is a grain of zeroes; grains are compressed; and have markers.
pub(super) const HAS_REDUNDANT: u32 = 1 << 1;
pub(super) const HAS_ZERO_GRAINS: u32 = 1 << 2;
pub(super) const COMPRESSED: u32 = 1 << 16;
pub(super) const HAS_MARKERS: u32 = 1 << 17;
/// The directory's place is in the footer.
const AT_END: u64 = u64::MAX;
/// The footer's marker, the footer, and the end-of-stream marker.
const FOOTER_LENGTH: u64 = 3 * SECTOR;
const MARKER_FOOTER: u32 = 3;
/// Most entries of a table; everybody has so many.
pub(super) const TABLE_ENTRIES: u64 = 512;
/// Most entries of a directory.
const MAX_TABLES: u64 = 8 << 20;
/// Most bytes of a grain, of which some are kept in memory.
const MAX_GRAIN: u64 = 16 << 20;

/// What a header says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SparseHeader {
    pub(super) version: u32,
    pub(super) flags: u32,
    /// Bytes of the extent.
    pub(super) size: u64,
    /// Bytes of a grain.
    pub(super) grain: u64,
    /// Entries of a grain table.
    pub(super) table_entries: u64,
    /// The embedded descriptor's place.
    pub(super) descriptor: Option<Range<u64>>,
    /// Where the directory and the redundant one are.
    pub(super) directory: u64,
    pub(super) redundant: Option<u64>,
    /// Where grains can begin.
    pub(super) overhead: u64,
    pub(super) compressed: bool,
    /// Whether the header is a footer: nothing can be added then.
    pub(super) at_end: bool,
}

impl SparseHeader {
    pub(super) fn read(image: &ImageFile) -> Result<Self, OpenError> {
        let bytes = image.read(0, LENGTH, "the header")?;
        let fail = |wrong: Wrong| match wrong {
            Wrong::Corrupt(what) => OpenError::corrupt(image.path(), what),
            Wrong::Unsupported(feature) => OpenError::Unsupported {
                path: image.path().to_owned(),
                feature,
                hint: "convert it with VMware's vmware-vdiskmanager or vmkfstools",
            },
        };
        let mut header = Self::parse(&bytes).map_err(fail)?;
        if le64(&bytes, 0x38) == AT_END {
            let at = image.len().checked_sub(FOOTER_LENGTH).unwrap_or(u64::MAX);
            let footer = image.read(at, FOOTER_LENGTH, "the footer")?;
            let marker = le32(&footer, 8) == 0 && le32(&footer, 12) == MARKER_FOOTER;
            let end_of_stream = footer[1024..1040].iter().all(|&b| b == 0);
            if !marker || !end_of_stream {
                return Err(OpenError::truncated(
                    image.path(),
                    "it has no footer: it was not written to its end",
                ));
            }
            let descriptor = header.descriptor;
            header = Self { at_end: true, ..Self::parse(&footer[512..1024]).map_err(fail)? };
            header.descriptor = header.descriptor.or(descriptor);
        }
        header.check_place(image)?;
        Ok(header)
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Wrong> {
        let corrupt = |what: String| Err(Wrong::Corrupt(what));
        if bytes.len() as u64 != LENGTH || !bytes.starts_with(MAGIC) {
            return corrupt("it has no VMDK header".into());
        }
        let version = le32(bytes, 4);
        if !(1..=3).contains(&version) {
            return Err(Wrong::Unsupported(format!("VMDK version {version}")));
        }
        let sectors = |at: usize| le64(bytes, at).checked_mul(SECTOR).filter(|&n| n <= i64::MAX as u64);
        let (Some(size), Some(grain)) = (sectors(0x0c), sectors(0x14)) else {
            return corrupt("its sizes are beyond all bounds".into());
        };
        let (flags, entries) = (le32(bytes, 8), u64::from(le32(bytes, 0x2c)));
        let compressed = match le16(bytes, 0x4d) {
            0 => false,
            1 => true,
            other => return Err(Wrong::Unsupported(format!("compression algorithm {other}"))),
        };
        if size == 0 {
            return Err(Wrong::Unsupported("an embedded descriptor of other extents".into()));
        }
        if !grain.is_power_of_two() || !(SECTOR..=MAX_GRAIN).contains(&grain) {
            return corrupt(format!("grains of {grain} bytes"));
        }
        if entries == 0 || entries > TABLE_ENTRIES || size.div_ceil(grain * entries) > MAX_TABLES {
            return corrupt(format!("tables of {entries} grains for {size} bytes"));
        }
        let descriptor = match (sectors(0x1c), sectors(0x24)) {
            (Some(0), _) | (_, Some(0)) => None,
            (Some(at), Some(length)) if length <= super::descriptor::MAX_LENGTH => Some(at..at + length),
            _ => return corrupt("its descriptor's place is not in the file".into()),
        };
        let redundant = match sectors(0x30) {
            Some(at) if flags & HAS_REDUNDANT != 0 && at > 0 => Some(at),
            _ => None,
        };
        Ok(Self {
            version,
            flags,
            size,
            grain,
            table_entries: entries,
            descriptor,
            // That of a header with a footer is not a place.
            directory: sectors(0x38).unwrap_or(0),
            redundant,
            overhead: sectors(0x40).unwrap_or(u64::MAX),
            compressed,
            at_end: false,
        })
    }

    fn check_place(&self, image: &ImageFile) -> Result<(), OpenError> {
        let truncated = |what: String| Err(OpenError::truncated(image.path(), what));
        if image.len() < self.overhead {
            return truncated(format!(
                "its grains begin at {:#x}, the file ends at {:#x}",
                self.overhead,
                image.len()
            ));
        }
        for at in [Some(self.directory), self.redundant].into_iter().flatten() {
            if at < SECTOR {
                return Err(OpenError::corrupt(image.path(), format!("a grain directory is at {at:#x}")));
            }
            if at.checked_add(self.tables() * 4).is_none_or(|end| end > image.len()) {
                return truncated(format!("a grain directory at {at:#x} is not all in the file"));
            }
        }
        Ok(())
    }

    /// Entries of the directory.
    pub(super) fn tables(&self) -> u64 {
        self.size.div_ceil(self.grain * self.table_entries)
    }

    pub(super) fn has_zero_grains(&self) -> bool {
        self.flags & HAS_ZERO_GRAINS != 0
    }

    pub(super) fn has_markers(&self) -> bool {
        self.flags & HAS_MARKERS != 0
    }

    /// Why the extent cannot be written, if so.
    pub(super) fn read_only_reason(&self) -> Option<&'static str> {
        if self.at_end {
            return Some("writing a streamOptimized VMDK with a footer");
        }
        if self.compressed && !self.has_markers() {
            return Some("writing a compressed VMDK without markers");
        }
        if self.version == 3 && !self.compressed {
            // It may track changed blocks, which we would not.
            return Some("writing a VMDK of version 3");
        }
        None
    }

    /// The directory and the redundant one.
    pub(super) fn directories(&self, image: &ImageFile) -> Result<(Vec<u32>, Option<Vec<u32>>), OpenError> {
        let read = |at: u64| -> Result<Vec<u32>, OpenError> {
            let bytes = image.read(at, self.tables() * 4, "a grain directory")?;
            Ok(bytes.as_chunks::<4>().0.iter().map(|&e| u32::from_le_bytes(e)).collect())
        };
        Ok((read(self.directory)?, self.redundant.map(read).transpose()?))
    }
}

/// What is wrong with a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wrong {
    Corrupt(String),
    Unsupported(String),
}
