//! Making new images.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::chain::{ImageFile, backing_source, open_chain};
use crate::engine::Engine;
use crate::format::NewImage;
use crate::lock::lock_image;
use crate::nbd;
use crate::{
    AioEngine, BackingPolicy, EncryptionOptions, Format, Keys, OpenError, OpenOptions, VdiOptions,
    VhdOptions, VhdxOptions, VmdkOptions,
};

/// How much of a new image is given its place at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: it grows as it is written.
    #[default]
    Off,
    /// The tables, not the data: faster writing later, while the file stays sparse.
    Metadata,
    /// All storage, without writing to it.
    Falloc,
    /// All storage, written with zeroes.
    Full,
}

impl Preallocation {
    /// The mode of that name (QEMU's names).
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "off" => Some(Self::Off),
            "metadata" => Some(Self::Metadata),
            "falloc" => Some(Self::Falloc),
            "full" => Some(Self::Full),
            _ => None,
        }
    }
}

/// How the clusters of an image are compressed that are written compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compression {
    /// Deflate.
    #[default]
    Zlib,
    /// Zstandard: better and faster; QEMU 5.1 and later read it.
    Zstd,
}

impl Compression {
    /// The name in options and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

/// What can be chosen for a new qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qcow2Options {
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// Bytes of a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// Bits of a reference count: a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// Let reference counts be behind while the image is open; faster, but they are counted anew after a crash.
    pub lazy_refcounts: bool,
    /// Subclusters: a 32nd of a cluster can be written without copying the rest.
    pub extended_l2: bool,
    /// For compressed clusters.
    pub compression: Compression,
    /// A file that holds the data, beside the image, which then has only tables. Its name as written in the image.
    pub data_file: Option<String>,
    /// Keep the data file readable as a raw image.
    pub data_file_raw: bool,
    /// Encrypt the data with LUKS, as [`CreateOptions::encryption`] says.
    pub encrypted: bool,
}

impl Default for Qcow2Options {
    fn default() -> Self {
        Self {
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            compression: Compression::Zlib,
            data_file: None,
            data_file_raw: false,
            encrypted: false,
        }
    }
}

/// A backing file of a new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingFile {
    /// Its path: absolute, or relative to the new image's directory. Written into the image as it is here.
    pub path: PathBuf,
    /// Its format; recorded, so that it never needs to be guessed.
    pub format: Format,
}

/// What [`create`] is to make.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// The image's format.
    pub format: Format,
    /// Bytes of the disk (rounded up to 512); `None` takes the backing file's.
    pub size: Option<u64>,
    /// qcow2: where everything that is not written shows through from.
    pub backing: Option<BackingFile>,
    /// Take the backing file as told, without looking whether it can be opened.
    pub backing_unchecked: bool,
    /// How much gets its place now.
    pub preallocation: Preallocation,
    /// What only VDI images have.
    pub vdi: VdiOptions,
    /// What only VHD images have.
    pub vhd: VhdOptions,
    /// What only VHDX images have.
    pub vhdx: VhdxOptions,
    /// What only VMDK images have.
    pub vmdk: VmdkOptions,
    /// Whether a file that is there already may be replaced.
    pub overwrite: bool,
    /// What only qcow2 has.
    pub qcow2: Qcow2Options,
    /// How a LUKS or an encrypted qcow2 image is encrypted.
    pub encryption: EncryptionOptions,
    /// The passphrase of such an image.
    pub keys: Keys,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            format: Format::Qcow2,
            size: None,
            backing: None,
            backing_unchecked: false,
            preallocation: Preallocation::Off,
            vdi: VdiOptions::default(),
            vhd: VhdOptions::default(),
            vhdx: VhdxOptions::default(),
            vmdk: VmdkOptions::default(),
            overwrite: false,
            qcow2: Qcow2Options::default(),
            encryption: EncryptionOptions::default(),
            keys: Keys::default(),
        }
    }
}

impl CreateOptions {
    /// A plain image of `size` bytes.
    #[must_use]
    pub fn new(format: Format, size: u64) -> Self {
        Self { format, size: Some(size), ..Self::default() }
    }
}

/// Makes a new image at `path`.
///
/// # Errors
/// [`OpenError`]: the file exists or is in use, the options contradict each other, the backing file
/// cannot be opened, or writing failed. A file that was begun is removed.
pub fn create(path: impl AsRef<Path>, options: &CreateOptions) -> Result<(), OpenError> {
    create_as(path.as_ref(), path.as_ref(), options)
}

/// As [`create`], for an image that will be renamed to `name` when it is complete.
pub(crate) fn create_as(path: &Path, name: &Path, options: &CreateOptions) -> Result<(), OpenError> {
    let limit = |what: String| OpenError::Limit { path: path.to_owned(), what };
    if options.format == Format::Raw && options.backing.is_some() {
        return Err(limit("a raw image cannot have a backing file; use qcow2".into()));
    }
    if options.backing.is_some() && options.preallocation != Preallocation::Off {
        return Err(limit("preallocated clusters would hide the backing file".into()));
    }
    let backing_size = match &options.backing {
        Some(_) if options.backing_unchecked => None,
        Some(backing) => Some(backing_size(path, backing)?),
        None => None,
    };
    let size = options
        .size
        .or(backing_size)
        .or_else(|| device_room(path, options))
        .ok_or_else(|| limit("a new image needs a size, or a backing file to take it from".into()))?;
    let size = size
        .checked_next_multiple_of(512)
        .filter(|&size| i64::try_from(size).is_ok())
        .ok_or_else(|| limit(format!("{size} bytes are more than a file can have")))?;

    if nbd::is_address(path) {
        return empty_export(path, size, options);
    }
    let existed = path.exists();
    let (file, device) = new_file(path, options.overwrite)?;
    if let Some(device) = device {
        fits_device(path, device, size, options)?;
    }
    let new = NewImage { path, name, file: &file, device, size, options };
    let result = (options.format.driver().create)(&new)
        .and_then(|()| file.sync_all().map_err(|e| OpenError::io(path, "writing the new image", e)));
    if result.is_err() && !existed {
        let _ = fs::remove_file(path);
    }
    result
}

/// The files that [`create`] makes besides the image itself.
pub(crate) fn other_files(path: &Path, options: &CreateOptions) -> Vec<PathBuf> {
    match options.format {
        Format::Vmdk => crate::vmdk::extent_files(path, options),
        _ => Vec::new(),
    }
}

/// Makes an export that is there already an empty disk.
fn empty_export(path: &Path, size: u64, options: &CreateOptions) -> Result<(), OpenError> {
    let limit = |what: String| OpenError::Limit { path: path.to_owned(), what };
    if options.format != Format::Raw {
        return Err(limit("what is behind NBD is a raw disk; use the format raw".into()));
    }
    if !options.overwrite {
        return Err(OpenError::Exists { path: path.to_owned() });
    }
    nbd::empty(path, size)
}

/// Opens the backing file as the new image would, and tells its size.
fn backing_size(path: &Path, backing: &BackingFile) -> Result<u64, OpenError> {
    let name = backing.path.to_str().unwrap_or_default();
    // The caller names it, so it may be anywhere.
    let options = OpenOptions {
        backing: BackingPolicy::Any,
        keys: Keys::locked(),
        aio: AioEngine::Threads,
        ..OpenOptions::read_only()
    };
    let below = backing_source(path, name, Some(backing.format.name()), &options)?;
    let wrap = |source| OpenError::Backing { path: path.to_owned(), source: Box::new(source) };
    let engine = Engine::new(options.aio)?;
    open_chain(&engine, &below.path, &below.options).map(|node| node.size()).map_err(wrap)
}

/// The length of the block device at `path`, if that is one.
pub(crate) fn device_length(path: &Path) -> Option<u64> {
    use std::os::unix::fs::FileTypeExt;
    if !fs::metadata(path).ok()?.file_type().is_block_device() {
        return None;
    }
    let mut device = fs::File::open(path).ok()?;
    std::io::Seek::seek(&mut device, std::io::SeekFrom::End(0)).ok()
}

/// The size of a disk that fills a block device.
fn device_room(path: &Path, options: &CreateOptions) -> Option<u64> {
    let device = device_length(path)?;
    match options.format {
        Format::Raw => Some(device),
        Format::Luks => device.checked_sub(crate::luks::data_offset(&options.encryption)?),
        _ => None,
    }
}

/// Refuses what a block device cannot take.
fn fits_device(path: &Path, device: u64, size: u64, options: &CreateOptions) -> Result<(), OpenError> {
    let limit = |what: String| Err(OpenError::Limit { path: path.to_owned(), what });
    match options.format {
        Format::Raw | Format::Luks | Format::Qcow2 => {}
        format => {
            return Err(OpenError::Unsupported {
                path: path.to_owned(),
                feature: format!("the format {} on a block device", format.name()),
                hint: "raw, qcow2 and luks can be there",
            });
        }
    }
    if options.preallocation != Preallocation::Off {
        return limit("a block device has its space already: without preallocation".into());
    }
    if options.format == Format::Raw && size > device {
        return limit(format!("the disk has {size} bytes, and the device {device}"));
    }
    Ok(())
}

/// The new image's empty file; or the block device with its length.
fn new_file(path: &Path, overwrite: bool) -> Result<(fs::File, Option<u64>), OpenError> {
    let fail = |e: std::io::Error| match e.raw_os_error() {
        Some(libc::EEXIST) => OpenError::Exists { path: path.to_owned() },
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
            OpenError::Permission { path: path.to_owned(), writing: true }
        }
        _ => OpenError::io(path, "making the image", e),
    };
    if !overwrite || !path.exists() {
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(path).map_err(fail);
        return file.map(|file| (file, None));
    }
    // Checked and locked as any image; emptied only then.
    let seen = &mut Vec::new();
    let image = ImageFile::open(path, true, true, seen)?;
    if image.is_block_device() {
        let file = image.plain().try_clone().map_err(fail)?;
        return Ok((file, Some(image.len())));
    }
    drop(image);
    let file = fs::OpenOptions::new().read(true).write(true).open(path).map_err(fail)?;
    let fd = OwnedFd::from(file);
    lock_image(&fd, path, true)?;
    let file = fs::File::from(fd);
    file.set_len(0).map_err(fail)?;
    Ok((file, None))
}

/// Gives the file storage from `start` to `end`, written with zeroes or not.
pub(crate) fn reserve_storage(
    file: &fs::File,
    start: u64,
    end: u64,
    preallocation: Preallocation,
) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    const STEP: u64 = 1 << 20;
    if start >= end {
        return Ok(());
    }
    match preallocation {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => {
            Ok(rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), start, end - start)?)
        }
        Preallocation::Full => {
            let zeroes = vec![0; crate::file::to_usize(STEP.min(end - start))];
            let mut at = start;
            while at < end {
                let n = STEP.min(end - at);
                file.write_all_at(&zeroes[..crate::file::to_usize(n)], at)?;
                at += n;
            }
            Ok(())
        }
    }
}
