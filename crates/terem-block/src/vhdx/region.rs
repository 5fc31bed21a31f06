//! The region tables (specification, section 2.2.3).

use std::ops::Range;

use super::guid;
use super::header::{KIB, MIB, is_sealed};
use super::log::Replay;
use crate::OpenError;
use crate::bytes::{le32, le64};
use crate::chain::ImageFile;

pub(super) const SIGNATURE: &[u8] = b"regi";
/// Where the two copies are.
pub(super) const TABLES_AT: [u64; 2] = [192 * KIB, 256 * KIB];
/// Bytes of a table.
pub(super) const LENGTH: u64 = 64 * KIB;
const MAX_ENTRIES: u32 = 2047;

/// Where things are in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Regions {
    pub(crate) bat: Range<u64>,
    pub(crate) metadata: Range<u64>,
    /// All of them, and the header section: where no block can be.
    pub(crate) all: Vec<Range<u64>>,
}

impl Regions {
    pub(super) fn read(image: &ImageFile, replay: &Replay, log: &Range<u64>) -> Result<Self, OpenError> {
        let corrupt = |what: String| OpenError::corrupt(image.path(), what);
        let mut reason = String::new();
        for at in TABLES_AT {
            let bytes = replay.read_through(image, at, LENGTH, "the region table")?;
            match Self::parse(&bytes, log) {
                Ok(regions) => return Ok(regions),
                Err(Wrong::Damaged(what)) => reason = what,
                Err(Wrong::Unknown(name)) => {
                    return Err(OpenError::UnknownFeatures {
                        path: image.path().to_owned(),
                        names: vec![name],
                    });
                }
            }
        }
        Err(corrupt(reason))
    }

    pub(super) fn parse(bytes: &[u8], log: &Range<u64>) -> Result<Self, Wrong> {
        let damaged = |what: &str| Err(Wrong::Damaged(what.to_owned()));
        let count = le32(bytes, 8);
        if bytes.len() as u64 != LENGTH || !bytes.starts_with(SIGNATURE) || !is_sealed(bytes) {
            return damaged("both region tables are damaged");
        }
        if count > MAX_ENTRIES {
            return damaged("a region table has too many entries");
        }
        let mut all: Vec<Range<u64>> = [0..MIB, log.clone()].into();
        all.retain(|range| !range.is_empty());
        let (mut bat, mut metadata) = (None, None);
        for entry in bytes[16..].chunks_exact(32).take(count as usize) {
            let (start, length) = (le64(entry, 16), u64::from(le32(entry, 24)));
            let range = start..start.saturating_add(length);
            if !start.is_multiple_of(MIB) || !length.is_multiple_of(MIB) || range.end > i64::MAX as u64 {
                return damaged("a region does not lie at a multiple of 1 MiB");
            }
            if all.iter().any(|other| other.start < range.end && range.start < other.end) {
                return damaged("two regions lie over each other");
            }
            all.push(range.clone());
            let name: &[u8] = &entry[..16];
            if name == guid::BAT && bat.is_none() {
                bat = Some(range);
            } else if name == guid::METADATA && metadata.is_none() {
                metadata = Some(range);
            } else if name == guid::BAT || name == guid::METADATA {
                return damaged("a region is there twice");
            } else if le32(entry, 28) & 1 != 0 {
                return Err(Wrong::Unknown("a required region of an unknown kind".into()));
            }
        }
        match (bat, metadata) {
            (Some(bat), Some(metadata)) => Ok(Self { bat, metadata, all }),
            _ => damaged("a region table has no BAT or no metadata"),
        }
    }

    /// Whether a block there would lie over something else.
    pub(crate) fn reach_into(&self, block: &Range<u64>) -> bool {
        self.all.iter().any(|region| region.start < block.end && block.start < region.end)
    }

    /// The first byte after all of them.
    pub(crate) fn end(&self) -> u64 {
        self.all.iter().map(|region| region.end).max().unwrap_or(MIB)
    }
}

/// What is wrong with a region table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wrong {
    /// The other copy may be better.
    Damaged(String),
    /// It must be understood and is not.
    Unknown(String),
}
