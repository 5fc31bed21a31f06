//! An opened image of any format, as its parent (the disk or an overlay) uses it.

use std::path::PathBuf;

use crate::engine::View;
use crate::executor::LocalFuture;
use crate::file::to_usize;
use crate::qcow2::Qcow2;
use crate::raw::Raw;
use crate::{Format, Geometry, IoError, Op};

/// Most bytes of one discard or write-zeroes.
const MAX_DISCARD: u64 = 2 << 30;

/// An opened image.
pub(crate) enum Node {
    /// Raw.
    Raw(Raw),
    /// qcow2.
    Qcow2(Box<Qcow2>),
}

impl Node {
    pub(crate) fn format(&self) -> Format {
        match self {
            Self::Raw(_) => Format::Raw,
            Self::Qcow2(_) => Format::Qcow2,
        }
    }

    /// Bytes of the disk, a multiple of 512.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Qcow2(qcow2) => qcow2.size(),
        }
    }

    /// The backing files from the nearest to the last.
    pub(crate) fn backing_paths(&self) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        let mut node = self;
        while let Self::Qcow2(qcow2) = node
            && let Some(backing) = qcow2.backing()
        {
            paths.push(match backing {
                Self::Raw(raw) => raw.file().path().to_owned(),
                Self::Qcow2(qcow2) => qcow2.file().path().to_owned(),
            });
            node = backing;
        }
        paths
    }

    pub(crate) fn geometry(&self, discard: bool) -> Geometry {
        let (file, unit) = match self {
            Self::Raw(raw) => (raw.file(), 4096),
            Self::Qcow2(qcow2) => (qcow2.file(), qcow2.cluster_size()),
        };
        Geometry {
            size: self.size(),
            read_only: file.is_read_only(),
            logical_block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: match self {
                Self::Raw(_) => 0,
                Self::Qcow2(_) => u32::try_from(unit).unwrap_or(0),
            },
            discard: discard && !file.is_read_only(),
            discard_granularity: u32::try_from(unit).unwrap_or(4096),
            max_discard: MAX_DISCARD,
            volatile_cache: true,
        }
    }

    /// Carries out a request that lies within the disk.
    pub(crate) async fn execute(&self, op: Op) -> Result<(), IoError> {
        match op {
            Op::Read { offset, memory } => self.read(offset, View::new(memory)).await,
            Op::Write { offset, memory } => match self {
                Self::Raw(raw) => raw.write(offset, View::new(memory)).await,
                Self::Qcow2(qcow2) => qcow2.write(offset, View::new(memory)).await,
            },
            Op::Flush => match self {
                Self::Raw(raw) => raw.flush().await,
                Self::Qcow2(qcow2) => qcow2.flush().await,
            },
            Op::Discard { offset, length } => match self {
                Self::Raw(raw) => raw.discard(offset, length).await,
                Self::Qcow2(qcow2) => qcow2.discard(offset, length).await,
            },
            Op::WriteZeroes { offset, length, unmap } => match self {
                Self::Raw(raw) => raw.write_zeroes(offset, length, unmap).await,
                Self::Qcow2(qcow2) => qcow2.write_zeroes(offset, length, unmap).await,
            },
        }
    }

    /// Fills `view` from `offset` on; zeroes beyond the image's end.
    pub(crate) fn read(&self, offset: u64, view: View) -> LocalFuture<'_, Result<(), IoError>> {
        Box::pin(async move {
            let there = to_usize(self.size().saturating_sub(offset).min(view.len() as u64));
            view.part(there, view.len()).zero();
            if there == 0 {
                return Ok(());
            }
            let view = view.part(0, there);
            match self {
                Self::Raw(raw) => raw.read(offset, view).await,
                Self::Qcow2(qcow2) => qcow2.read(offset, view).await,
            }
        })
    }

    /// Writes everything back. The image is not used after that.
    pub(crate) async fn close(&self) -> Result<(), IoError> {
        match self {
            Self::Raw(raw) => raw.flush().await,
            Self::Qcow2(qcow2) => qcow2.close().await,
        }
    }
}
