//! Copying images: any format to any, sparsely, by several threads.
//!
//! ```text
//!  planner (the caller's thread): block status of the source ──> windows that hold data ──> queue
//!  workers: a window each: read ──> find zeroes ──> write or compress ──> tell the target's tables
//! ```
//!
//! Where the data lies in a file as it is, workers read it from there, past the source's I/O thread; where the target
//! can give out storage (`Image::place`), they write to it past the target's, which then only changes its tables.
//! A window is small enough to stay in a processor's cache from the read to the write.

mod buffers;
mod copy;
mod reading;
mod stream;
mod target;
mod worker;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

pub use stream::{export, import};

use crate::create::{create_as, other_files};
use crate::{
    AioEngine, BackingPolicy, BlockBackend, Cache, CreateOptions, Disk, IoError, OpenError, OpenOptions,
    Source,
};
use copy::copy;

/// What to tell about a long operation: bytes done, and bytes in all. It answers whether to go on.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// How to copy.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// Windows worked on at once; `None` for what suits this host.
    pub threads: Option<usize>,
    /// Compress the target's clusters.
    pub compress: bool,
    /// Zeroes of at least this many bytes (and of a cluster) take no space; 0: nothing is looked for.
    pub sparse: u64,
    /// Write into the image that is there, which must be large enough, rather than make one.
    pub existing: bool,
    /// With `existing`: that image is known to hold zeroes only.
    pub target_is_zero: bool,
    /// The target's backing file holds what the source's does: only what the source has of its own is copied.
    pub share_backing: bool,
    /// Make the target durable before it counts as done.
    pub durable: bool,
    /// Make the target under another name, and give it its own when it is complete.
    pub replace: bool,
    /// With `existing`: how to open that image, if there is more to say than its format.
    pub existing_open: Option<OpenOptions>,
    /// Put zeroes where the source cannot be read, and warn, rather than give up.
    pub salvage: bool,
    /// Let the file system copy where both files have the bytes as they are (`copy_file_range`), without looking for
    /// zeroes in them.
    pub offload: bool,
    /// Most bytes to write a second.
    pub rate: Option<u64>,
    /// Takes what is to be known of a copy that succeeds.
    pub warn: fn(&str),
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            threads: None,
            compress: false,
            sparse: 4096,
            existing: false,
            target_is_zero: false,
            share_backing: false,
            durable: true,
            replace: true,
            existing_open: None,
            salvage: false,
            offload: false,
            rate: None,
            warn: |text| tracing::warn!("{text}"),
        }
    }
}

/// Copies the image `source` (with its backing files) into a new image at `target`; zeroes take no space.
///
/// `target_options.size` of `None` is the source's size. Until it is complete the target does not exist, or is what it
/// was before.
///
/// # Errors
/// [`OpenError`] of either image; [`OpenError::Cancelled`] when `progress` said so. An unfinished target is removed.
pub fn convert(
    source: impl AsRef<Path>,
    source_options: &OpenOptions,
    target: impl AsRef<Path>,
    target_options: &CreateOptions,
    options: &ConvertOptions,
    progress: Progress<'_>,
) -> Result<(), OpenError> {
    let source = Source { path: source.as_ref().to_owned(), options: source_options.clone() };
    convert_sources(std::slice::from_ref(&source), target, target_options, options, progress)
}

/// As [`convert`], of several images whose disks come one after the other in the target.
///
/// # Errors
/// As [`convert`].
pub fn convert_sources(
    sources: &[Source],
    target: impl AsRef<Path>,
    target_options: &CreateOptions,
    options: &ConvertOptions,
    progress: Progress<'_>,
) -> Result<(), OpenError> {
    let target = target.as_ref();
    let threads = options.threads.unwrap_or_else(default_threads).clamp(1, 64);
    let sources: Vec<Source> = sources
        .iter()
        .map(|source| Source { path: source.path.clone(), options: source_open(&source.options) })
        .collect();
    let from = Disk::open_sources(sources.clone())?;
    if crate::nbd::is_address(target) && !options.existing {
        // An export is there already: it is emptied, then filled.
        crate::create(target, &CreateOptions { size: Some(from.size()), ..target_options.clone() })?;
        drop(from);
        let options = ConvertOptions { existing: true, target_is_zero: true, ..options.clone() };
        return convert_sources(&sources, target, target_options, &options, progress);
    }
    let sources = &sources;
    if options.existing {
        let open = target_open(target_options, options);
        let to = Disk::open(target, &open)?;
        check_size(target, to.size(), from.size())?;
        copy(&Copying { sources, from, target, to, threads, options }, progress)
    } else {
        into_new(target, target_options, from.size(), options, |path, to| {
            copy(&Copying { sources, from, target: path, to, threads, options }, progress)
        })
    }
}

/// One copy.
pub(crate) struct Copying<'a> {
    /// What further readers open.
    pub(crate) sources: &'a [Source],
    pub(crate) from: Disk,
    pub(crate) target: &'a Path,
    pub(crate) to: Disk,
    pub(crate) threads: usize,
    pub(crate) options: &'a ConvertOptions,
}

impl Copying<'_> {
    /// The source's path, for messages.
    pub(crate) fn source(&self) -> &Path {
        &self.from.facts().path
    }
}

fn source_open(options: &OpenOptions) -> OpenOptions {
    OpenOptions { read_only: true, ..options.clone() }
}

fn target_open(target: &CreateOptions, options: &ConvertOptions) -> OpenOptions {
    if let Some(open) = options.existing_open.as_ref().filter(|_| options.existing) {
        return open.clone();
    }
    OpenOptions {
        format: Some(target.format),
        keys: target.keys.clone(),
        // It is synchronised once, at the end.
        cache: if options.existing { Cache::Writeback } else { Cache::Unsafe },
        backing: BackingPolicy::Any,
        aio: AioEngine::Auto,
        ..OpenOptions::default()
    }
}

/// Enough to keep both storage and processors busy.
fn default_threads() -> usize {
    thread::available_parallelism().map_or(4, |n| n.get().clamp(2, 16))
}

fn check_size(target: &Path, has: u64, needs: u64) -> Result<(), OpenError> {
    if has >= needs {
        return Ok(());
    }
    let what = format!("its {has} bytes are less than the {needs} of its source");
    Err(OpenError::Limit { path: target.to_owned(), what })
}

/// Makes the image, lets `write` fill it, closes it, and gives it its name. Removes it when something failed.
pub(crate) fn into_new(
    target: &Path,
    target_options: &CreateOptions,
    size: u64,
    options: &ConvertOptions,
    write: impl FnOnce(&Path, Disk) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    let create_options =
        CreateOptions { size: Some(target_options.size.unwrap_or(size)), ..target_options.clone() };
    check_size(target, create_options.size.unwrap_or(size), size)?;
    let regular = fs::symlink_metadata(target).map_or(true, |meta| meta.is_file());
    let exists = target.exists();
    if exists && !target_options.overwrite {
        return Err(OpenError::Exists { path: target.to_owned() });
    }
    // Files that name each other cannot get their names later.
    let others = other_files(target, &create_options);
    let beside = options.replace && regular && others.is_empty();
    let place = if beside { Unfinished::beside(target) } else { Unfinished::itself(target, &others) };
    if exists && place.path != target {
        // In use is in use, although only its name would go.
        drop(crate::chain::ImageFile::open(target, true, true, &mut Vec::new())?);
    }
    create_as(&place.path, target, &create_options)?;
    let to = Disk::open(&place.path, &target_open(&create_options, options))?;
    write(&place.path, to)?;
    if options.durable {
        for path in others.iter().chain([&place.path]) {
            let synced = fs::File::open(path).and_then(|file| file.sync_all());
            synced.map_err(|e| OpenError::io(path, "making the copy durable", e))?;
        }
    }
    place.finish(target)
}

/// A target that is removed unless it is finished.
struct Unfinished {
    path: PathBuf,
    remove: bool,
    /// Further files that go with it.
    others: Vec<PathBuf>,
}

impl Unfinished {
    /// Under a name of its own in the same directory.
    fn beside(target: &Path) -> Self {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let path = target.with_file_name(format!(".{name}.{}.part", std::process::id()));
        Self { path, remove: true, others: Vec::new() }
    }

    fn itself(target: &Path, others: &[PathBuf]) -> Self {
        let others = others.iter().filter(|path| !path.exists()).cloned().collect();
        Self { path: target.to_owned(), remove: !target.exists(), others }
    }

    fn finish(mut self, target: &Path) -> Result<(), OpenError> {
        if self.path != target {
            fs::rename(&self.path, target).map_err(|e| OpenError::io(target, "naming the copy", e))?;
        }
        self.remove = false;
        self.others.clear();
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.remove {
            let _ = fs::remove_file(&self.path);
        }
        for path in &self.others {
            let _ = fs::remove_file(path);
        }
    }
}

/// Keeps work to so many bytes a second.
pub(crate) struct Pace {
    begun: Instant,
    rate: Option<u64>,
    done: u64,
}

impl Pace {
    pub(crate) fn new(rate: Option<u64>) -> Self {
        Self { begun: Instant::now(), rate: rate.filter(|&rate| rate > 0), done: 0 }
    }

    /// Waits until `bytes` more may be worked on; false when `tick`, which is asked now and then, says to stop.
    pub(crate) fn wait(&mut self, bytes: u64, tick: &mut dyn FnMut() -> bool) -> bool {
        const STEP: Duration = Duration::from_millis(100);
        let Some(rate) = self.rate else { return true };
        let nanoseconds = u128::from(self.done) * 1_000_000_000 / u128::from(rate);
        let due = self.begun + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        self.done = self.done.saturating_add(bytes);
        loop {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            thread::sleep(left.min(STEP));
            if !tick() {
                return false;
            }
        }
    }
}

pub(crate) fn request(path: &Path, doing: &'static str, source: IoError) -> OpenError {
    OpenError::Request { path: path.to_owned(), doing, source }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // The C library compares with the widest registers that the processor has.
    static ZEROES: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROES.len()).all(|chunk| *chunk == ZEROES[..chunk.len()])
}
