//! What lies where in an image's file.

use std::path::Path;

use crate::chain::ImageFile;
use crate::{Format, OpenError};

/// What a part of a file is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileUse {
    /// Data of the disk.
    Data,
    /// Compressed data of the disk.
    Compressed,
    /// The header, and tables that say where data is.
    Table,
    /// Reference counts.
    Refcounts,
    /// Data and tables of snapshots that the disk does not have now.
    Snapshot,
    /// Nothing, but counted as used.
    Leaked,
}

/// A part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRun {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// What it is used for.
    pub what: FileUse,
}

/// The length of the file at `path`, and what is in it, in ascending order. Empty where the file's bytes are the
/// disk's, or the format cannot tell.
///
/// # Errors
/// [`OpenError`] when it cannot be read.
pub fn file_map(path: impl AsRef<Path>, format: Option<Format>) -> Result<(u64, Vec<FileRun>), OpenError> {
    let image = ImageFile::open(path.as_ref(), false, true, &mut Vec::new())?;
    let runs = match image.format(format)? {
        Format::Qcow2 => crate::qcow2::file_map(&image)?,
        _ => Vec::new(),
    };
    Ok((image.len(), runs))
}
