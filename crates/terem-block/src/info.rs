//! Facts about an image, without opening it as a disk.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::chain::ImageFile;
use crate::nbd;
use crate::{EncryptionInfo, FilePart, Format, OpenError, Source, VmdkInfo};

/// Facts about an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The path as given.
    pub filename: PathBuf,
    /// Its format.
    pub format: Format,
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// Bytes that the image takes on the host.
    pub actual_size: u64,
    /// How it is encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encryption: Option<EncryptionInfo>,
    /// Bytes of the blocks in which the image gives place, if it has such.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// What only qcow2 images have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qcow2: Option<Qcow2Info>,
    /// What only VMDK images have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmdk: Option<VmdkInfo>,
}

/// Facts about a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    /// Format version: 2 or 3.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// Bits of a reference count.
    pub refcount_bits: u32,
    /// Method of compressed clusters: `zlib` or `zstd`.
    pub compression_type: &'static str,
    /// Whether clusters have subclusters.
    pub extended_l2: bool,
    /// The file that holds the data, as written in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// Whether that file is kept readable as a raw image.
    pub data_file_raw: bool,
    /// Whether reference counts may be behind while it is open.
    pub lazy_refcounts: bool,
    /// Whether it was not closed properly with lazy reference counts.
    pub dirty: bool,
    /// Whether damage was found; it can only be read.
    pub corrupt: bool,
    /// Its backing file as written in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// The backing file's format as written in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_format: Option<String>,
    /// Its internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// Its persistent dirty bitmaps, as far as they are valid.
    pub bitmaps: Vec<BitmapInfo>,
}

/// A persistent dirty bitmap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes that a bit stands for.
    pub granularity: u64,
    /// Whether it follows writes.
    pub enabled: bool,
    /// Whether it is in use, or was not stored by the last who used it: then it is not consistent.
    pub in_use: bool,
}

/// An internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Unique id.
    pub id: String,
    /// Name.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub date: u32,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// How long the machine had run, in nanoseconds.
    pub vm_clock: u64,
    /// How many instructions it had carried out, if they were counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
    /// Bytes of the disk at that time.
    pub virtual_size: u64,
}

/// Tells about the image at `path`. It takes no lock, so it also works while the image is in use; the
/// answer is then that of a moment.
///
/// # Errors
/// [`OpenError`] when it cannot be read or is damaged.
pub fn info(path: impl AsRef<Path>, format: Option<Format>) -> Result<ImageInfo, OpenError> {
    info_of(path.as_ref(), format, None)
}

/// As [`info`], for an image that may be only a part of a file.
///
/// # Errors
/// As [`info`].
pub fn info_of_source(source: &Source) -> Result<ImageInfo, OpenError> {
    info_of(&source.path, source.options.format, source.options.part.as_ref())
}

fn info_of(path: &Path, format: Option<Format>, part: Option<&FilePart>) -> Result<ImageInfo, OpenError> {
    if nbd::is_address(path) {
        let (filename, virtual_size) = (path.to_owned(), nbd::size(path, format)?);
        // What it takes is the server's matter.
        return Ok(ImageInfo {
            filename,
            format: Format::Raw,
            virtual_size,
            actual_size: 0,
            encryption: None,
            cluster_size: None,
            qcow2: None,
            vmdk: None,
        });
    }
    let mut image = ImageFile::open(path, false, false, &mut Vec::new())?;
    if let Some(part) = part {
        image.narrow(part)?;
    }
    let meta = image.plain().metadata().map_err(|e| OpenError::io(path, "looking at the image", e))?;
    let format = image.format(format)?;
    let mut info = ImageInfo {
        filename: path.to_owned(),
        format,
        virtual_size: 0,
        actual_size: meta.blocks() * 512,
        encryption: None,
        cluster_size: None,
        qcow2: None,
        vmdk: None,
    };
    (format.driver().describe)(&image, &mut info)?;
    Ok(info)
}
