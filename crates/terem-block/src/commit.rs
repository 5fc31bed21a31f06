//! Moving data between an image and its backing file: commit and rebase.

use std::path::Path;

use crate::chain::{ImageFile, backing_source};
use crate::convert::{Pace, Progress, is_zero, request};
use crate::executor::LocalFuture;
use crate::file::to_usize;
use crate::node::{Node, directory_of};
use crate::{
    BackingFile, BackingPolicy, Below, BlockBackend, Disk, Extent, ExtentKind, Format, IoError, Op,
    OpenError, OpenOptions, Preallocation, Source, info, info_of_source, resize, set_backing,
};
use std::sync::Arc;
use terem_memory::{AlignedBuffer, IoMemory};

/// Bytes copied at once.
const PIECE: u64 = 1 << 20;
/// Bytes whose status is asked for at once.
const LOOK_AHEAD: u64 = 256 << 20;

/// How [`commit`] goes about it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CommitOptions {
    /// Empty the image afterwards, if what it has went into its own backing file.
    pub empty: bool,
    /// Most bytes to write a second.
    pub rate: Option<u64>,
}

/// Writes everything that `image` has of its own into the image `base` of its chain (its backing file, if `None`), and
/// perhaps empties the image. What lies between them is written, too.
///
/// After a power cut nothing is lost: the image is emptied only when all of it is in the base durably.
///
/// # Errors
/// [`OpenError`] of either; the image then still has everything.
pub fn commit(
    image: impl AsRef<Path>,
    options: &OpenOptions,
    base: Option<&Path>,
    how: CommitOptions,
    progress: Progress<'_>,
) -> Result<(), OpenError> {
    let CommitOptions { empty, rate } = how;
    let image = image.as_ref();
    let options = OpenOptions { backing: BackingPolicy::Any, ..options.clone() };
    // The base is read through the image while it is written: the lock is ours to share.
    let from = Disk::open(image, &OpenOptions { read_only: true, lock: false, ..options.clone() })?;
    if from.facts().format != Format::Qcow2 {
        return Err(OpenError::Unsupported {
            path: image.to_owned(),
            feature: format!("committing a {} image", from.facts().format.name()),
            hint: "`terem disk convert` makes one image of it and what is below it",
        });
    }
    let mut chain = chain_of(image, &options)?;
    // Below a qcow2 image can be others that have backing files.
    let facts = from.facts();
    for (path, format) in facts.backing.iter().zip(&facts.backing_formats).skip(chain.len()) {
        let options = OpenOptions { format: Some(*format), ..options.of_below() };
        chain.push(Source { path: path.clone(), options });
    }
    let limit = |what: &str| OpenError::Limit { path: image.to_owned(), what: what.into() };
    let depth = match base {
        None => 0,
        Some(base) => {
            // As its user names it, or as the images do.
            let beside = directory_of(image).join(base);
            let same = |path: &Path, name: &Path| {
                path == base
                    || name.canonicalize().is_ok_and(|name| path.canonicalize().is_ok_and(|p| p == name))
            };
            let found = chain.iter().position(|s| same(&s.path, base) || same(&s.path, &beside));
            found.ok_or_else(|| limit("the base is not in its chain of backing files"))?
        }
    };
    let Some(Source { path: base, options: base_options }) = chain.get(depth) else {
        return Err(limit("it has no backing file to commit to"));
    };
    let guard = ImageFile::open(image, true, options.lock, &mut Vec::new())?;
    let base_format = base_options.format;
    let base_options = OpenOptions {
        read_only: false,
        backing: BackingPolicy::Any,
        cache: options.cache,
        ..base_options.clone()
    };
    if base_options.part.is_none() && info(base, base_format)?.virtual_size < from.size() {
        resize(base, base_format, from.size(), false, Preallocation::Off)?;
    }
    let to = Disk::open(base, &base_options)?;
    let size = from.size();
    let mut pace = Pace::new(rate);
    each_extent(image, &from, progress, |extent| {
        // What the base itself or something below it decides is there already.
        if extent.depth as usize > depth || extent.kind == ExtentKind::Unallocated {
            return Ok(());
        }
        copy_extent(image, &from, base, &to, extent, &mut pace)
    })?;
    to.run(Op::Flush).map_err(|e| request(base, "making it durable", e))?;
    to.close().map_err(|e| request(base, "closing it", e))?;
    drop(from);
    drop(guard);
    if empty && depth == 0 {
        empty_image(image, &options, size)?;
    }
    Ok(())
}

/// Lets everything show through from the backing file again.
fn empty_image(image: &Path, options: &OpenOptions, size: u64) -> Result<(), OpenError> {
    let (mut file, format) = open_format(image, options)?;
    match format {
        Format::Qcow2 => crate::qcow2::edit(&mut file, |edit| {
            edit.empty();
            Ok(())
        }),
        _ => {
            let what = format!("a {} image of {size} bytes cannot be emptied", format.name());
            Err(OpenError::Limit { path: image.to_owned(), what })
        }
    }
}

fn open_format(image: &Path, options: &OpenOptions) -> Result<(ImageFile, Format), OpenError> {
    let file = ImageFile::open(image, true, options.lock, &mut Vec::new())?;
    let format = file.format(options.format)?;
    Ok((file, format))
}

/// The backing files of an image with their formats, nearest first, as far as they are those of qcow2 images.
fn chain_of(image: &Path, options: &OpenOptions) -> Result<Vec<Source>, OpenError> {
    let mut found: Vec<Source> = Vec::new();
    let mut source = Source { path: image.to_owned(), options: options.clone() };
    while found.len() <= 200 {
        let below = match &source.options.below {
            Below::Image(below) => (**below).clone(),
            Below::Nothing => break,
            Below::AsWritten => {
                let Some(qcow2) = info_of_source(&source)?.qcow2 else { break };
                let Some(name) = qcow2.backing_filename else { break };
                backing_source(&source.path, &name, qcow2.backing_format.as_deref(), &source.options)?
            }
        };
        let format = Some(info_of_source(&below)?.format);
        source = Source { path: below.path, options: OpenOptions { format, ..below.options } };
        found.push(source.clone());
    }
    Ok(found)
}

/// How [`rebase`] goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rebase {
    /// The disk keeps its contents: what differs between the old and the new backing file is written into the image.
    Safe {
        /// Write it compressed, where whole clusters differ.
        compress: bool,
    },
    /// Only the name is changed: for a backing file that was moved or converted.
    Unsafe,
}

/// Lets `image` be continued by another backing file, or by none.
///
/// # Errors
/// [`OpenError`] of any of them. The backing file is changed last, so after an error the disk is as it was.
pub fn rebase(
    image: impl AsRef<Path>,
    options: &OpenOptions,
    backing: Option<&BackingFile>,
    how: Rebase,
    progress: Progress<'_>,
) -> Result<(), OpenError> {
    let image = image.as_ref();
    let options = OpenOptions { backing: BackingPolicy::Any, ..options.clone() };
    if let Rebase::Safe { compress } = how {
        keep_contents(image, &options, backing, compress, progress)?;
    }
    set_backing(image, options.format, backing)
}

/// Writes into the image what would change.
fn keep_contents(
    image: &Path,
    options: &OpenOptions,
    backing: Option<&BackingFile>,
    compress: bool,
    progress: Progress<'_>,
) -> Result<(), OpenError> {
    let new = match backing {
        None => None,
        Some(backing) => {
            let name = backing.path.to_string_lossy();
            let Source { path, options } =
                backing_source(image, &name, Some(backing.format.name()), options)?;
            let disk = Disk::open(&path, &OpenOptions { read_only: true, ..options })?;
            Some((path, disk))
        }
    };
    // The unit in which the image is written: less would only be filled up from the old backing file.
    let disk = Disk::open(image, &OpenOptions { read_only: false, ..options.clone() })?;
    let unit = u64::from(disk.geometry().optimal_io_size).max(4096);
    let (size, backed) = (disk.size(), !disk.facts().backing.is_empty());
    let read = |path: &Path, disk: &Disk, offset: u64, length: u64| -> Result<Vec<u8>, OpenError> {
        let there = disk.size().saturating_sub(offset).min(length);
        let memory = Arc::new(AlignedBuffer::new(to_usize(there)));
        let op = Op::Read { offset: offset.min(disk.size()), memory: Arc::clone(&memory) as _ };
        disk.run(op).map_err(|e| request(path, "reading it", e))?;
        let mut bytes = vec![0; to_usize(length)];
        memory.read_at(0, &mut bytes);
        Ok(bytes)
    };
    let fail = |e| request(image, "writing what differs", e);
    let packer =
        disk.with_node(|node| Box::pin(async move { Ok(node.image().compression()) })).map_err(fail)?;
    if compress && packer.is_none() {
        return Err(OpenError::Unsupported {
            path: image.to_owned(),
            feature: "compression in this format".into(),
            hint: "qcow2 has it",
        });
    }
    let packer = packer.filter(|packer| compress && packer.unit == unit);
    each_extent(image, &disk, progress, |extent| {
        if extent.depth == 0 && extent.kind != ExtentKind::Unallocated {
            return Ok(());
        }
        let mut at = extent.offset;
        while at < extent.end() {
            let end = (at + unit - at % unit).min(extent.end());
            let old = read(image, &disk, at, end - at)?;
            let same = match &new {
                None => is_zero(&old),
                Some((path, new)) => read(path, new, at, end - at)? == old,
            };
            if !same {
                let packed = packer.filter(|_| end - at == unit && !is_zero(&old));
                if let Some(smaller) = packed.and_then(|packer| (packer.compress)(&old)) {
                    let write = move |node: std::rc::Rc<Node>| {
                        Box::pin(async move { node.image().write_compressed(vec![(at, smaller)]).await })
                            as LocalFuture<'_, Result<(), IoError>>
                    };
                    disk.with_node(write).map_err(fail)?;
                    at = end;
                    continue;
                }
                // What the old backing file leaves zero would be left out; it must be there for the new one.
                let op = if is_zero(&old) && backed && end - at == unit {
                    Op::WriteZeroes { offset: at, length: end - at, unmap: true }
                } else {
                    Op::Write { offset: at, memory: Arc::new(AlignedBuffer::from_slice(&old)) }
                };
                disk.run(op).map_err(fail)?;
            }
            at = end;
        }
        Ok(())
    })?;
    debug_assert!(size == disk.size());
    disk.run(Op::Flush).map_err(fail)?;
    disk.close().map_err(fail)
}

/// Calls `each` with the runs of a disk, as they are when their turn comes.
fn each_extent(
    path: &Path,
    disk: &Disk,
    progress: Progress<'_>,
    mut each: impl FnMut(&Extent) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    let size = disk.size();
    let mut at = 0;
    while at < size {
        let length = LOOK_AHEAD.min(size - at);
        let status = disk.block_status(at, length);
        for extent in status.map_err(|e| request(path, "asking where data is", e))? {
            each(&extent)?;
            if !progress(extent.end(), size) {
                return Err(OpenError::Cancelled);
            }
        }
        at += length;
    }
    Ok(())
}

fn copy_extent(
    from_path: &Path,
    from: &Disk,
    to_path: &Path,
    to: &Disk,
    extent: &Extent,
    pace: &mut Pace,
) -> Result<(), OpenError> {
    let mut at = extent.offset;
    while at < extent.end() {
        let most = if extent.is_zero() { to.geometry().max_discard } else { PIECE };
        let length = most.min(extent.end() - at);
        if !extent.is_zero() {
            pace.wait(length, &mut || true);
        }
        let op = if extent.is_zero() {
            Op::WriteZeroes { offset: at, length, unmap: true }
        } else {
            let memory = Arc::new(AlignedBuffer::new(to_usize(length)));
            let read = Op::Read { offset: at, memory: Arc::clone(&memory) as _ };
            from.run(read).map_err(|e| request(from_path, "reading it", e))?;
            Op::Write { offset: at, memory }
        };
        to.run(op).map_err(|e| request(to_path, "writing it", e))?;
        at += length;
    }
    Ok(())
}
