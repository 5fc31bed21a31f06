//! Making new images.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::chain::{ImageFile, open_chain, resolve_backing};
use crate::engine::Engine;
use crate::format::NewImage;
use crate::lock::lock_image;
use crate::{AioEngine, BackingPolicy, Format, OpenError, OpenOptions};

/// How much of a new image is given its place at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: it grows as it is written.
    #[default]
    Off,
    /// The tables, not the data: faster writing later, while the file stays sparse.
    Metadata,
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
    /// Bytes of a qcow2 cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// qcow2: where everything that is not written shows through from.
    pub backing: Option<BackingFile>,
    /// qcow2: let reference counts be behind while the image is open; faster, but they are counted anew after a
    /// crash.
    pub lazy_refcounts: bool,
    /// How much gets its place now.
    pub preallocation: Preallocation,
    /// Whether a file that is there already may be replaced.
    pub overwrite: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            format: Format::Qcow2,
            size: None,
            cluster_size: 65536,
            backing: None,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
            overwrite: false,
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
    let path = path.as_ref();
    let limit = |what: String| OpenError::Limit { path: path.to_owned(), what };
    if !(512..=2 << 20).contains(&options.cluster_size) || !options.cluster_size.is_power_of_two() {
        return Err(limit(format!(
            "a cluster size of {} bytes; it must be a power of two from 512 to 2097152",
            options.cluster_size
        )));
    }
    if options.format == Format::Raw && options.backing.is_some() {
        return Err(limit("a raw image cannot have a backing file; use qcow2".into()));
    }
    if options.backing.is_some() && options.preallocation != Preallocation::Off {
        return Err(limit("preallocated clusters would hide the backing file".into()));
    }
    let backing_size = match &options.backing {
        Some(backing) => Some(backing_size(path, backing)?),
        None => None,
    };
    let size = options
        .size
        .or(backing_size)
        .ok_or_else(|| limit("a new image needs a size, or a backing file to take it from".into()))?;
    let size = size
        .checked_next_multiple_of(512)
        .filter(|&size| i64::try_from(size).is_ok())
        .ok_or_else(|| limit(format!("{size} bytes are more than a file can have")))?;

    let existed = path.exists();
    let file = new_file(path, options.overwrite)?;
    let result = (options.format.driver().create)(&NewImage { path, file: &file, size, options })
        .and_then(|()| file.sync_all().map_err(|e| OpenError::io(path, "writing the new image", e)));
    if result.is_err() && !existed {
        let _ = fs::remove_file(path);
    }
    result
}

/// Opens the backing file as the new image would, and tells its size.
fn backing_size(path: &Path, backing: &BackingFile) -> Result<u64, OpenError> {
    let name = backing.path.to_str().unwrap_or_default();
    // The caller names it, so it may be anywhere.
    let below = resolve_backing(path, name, &BackingPolicy::Any)?;
    let options = OpenOptions {
        format: Some(backing.format),
        backing: BackingPolicy::Any,
        aio: AioEngine::Threads,
        ..OpenOptions::read_only()
    };
    let wrap = |source| OpenError::Backing { path: path.to_owned(), source: Box::new(source) };
    let engine = Engine::new(options.aio)?;
    open_chain(&engine, &below, &options).map(|node| node.size()).map_err(wrap)
}

fn new_file(path: &Path, overwrite: bool) -> Result<fs::File, OpenError> {
    let fail = |e: std::io::Error| match e.raw_os_error() {
        Some(libc::EEXIST) => OpenError::Exists { path: path.to_owned() },
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
            OpenError::Permission { path: path.to_owned(), writing: true }
        }
        _ => OpenError::io(path, "making the image", e),
    };
    if !overwrite || !path.exists() {
        return fs::OpenOptions::new().read(true).write(true).create_new(true).open(path).map_err(fail);
    }
    // Checked and locked as any image; emptied only then.
    let seen = &mut Vec::new();
    drop(ImageFile::open(path, true, true, seen)?);
    let file = fs::OpenOptions::new().read(true).write(true).open(path).map_err(fail)?;
    let fd = OwnedFd::from(file);
    lock_image(&fd, path, true)?;
    let file = fs::File::from(fd);
    file.set_len(0).map_err(fail)?;
    Ok(file)
}
