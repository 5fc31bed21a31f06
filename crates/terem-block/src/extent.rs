//! Block status: which parts of a disk hold data, and where.

use serde::Serialize;

/// What a run of a disk's bytes is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ExtentKind {
    /// Data.
    Data,
    /// Zeroes, known without reading. With [`Extent::host`] storage is kept for them.
    Zero,
    /// Compressed data.
    Compressed,
    /// Nothing in any image of the chain (as a format answers: nothing in this image, so what its backing file has).
    /// Reads as zeroes.
    Unallocated,
}

/// A run of a disk's bytes of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Extent {
    /// First byte of the disk.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What they are.
    pub kind: ExtentKind,
    /// Which image of the chain decides that: 0 is the disk's own, 1 its backing file.
    pub depth: u32,
    /// Where the first byte is in that image's (data) file, if it lies there as it is.
    pub host: Option<u64>,
}

impl Extent {
    /// A run in the image that is asked.
    pub(crate) fn new(offset: u64, length: u64, kind: ExtentKind, host: Option<u64>) -> Self {
        Self { offset, length, kind, depth: 0, host }
    }

    /// Whether all of it reads as zeroes, known without reading.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        matches!(self.kind, ExtentKind::Zero | ExtentKind::Unallocated)
    }

    /// The first byte after it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// Adds `next` to this run, if it goes on as this one does.
    pub(crate) fn join(&mut self, next: &Self) -> bool {
        let goes_on = match (self.host, next.host) {
            (Some(host), Some(next)) => host.checked_add(self.length) == Some(next),
            (None, None) => true,
            _ => false,
        };
        let same = self.kind == next.kind && self.depth == next.depth && self.end() == next.offset;
        if goes_on && same {
            self.length += next.length;
        }
        goes_on && same
    }
}
