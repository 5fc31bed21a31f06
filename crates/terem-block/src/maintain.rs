//! Changes of images that nobody uses: snapshots, bitmaps, size, backing file, repair.
//!
//! Each is done whole or not at all, also when the power fails midway.

use std::path::Path;

use crate::chain::{ImageFile, open_chain, resolve_backing};
use crate::create::reserve_storage;
use crate::engine::Engine;
use crate::{
    AioEngine, BackingFile, BackingPolicy, BlockBackend, CheckReport, Disk, Format, Keys, Op, OpenError,
    OpenOptions, Preallocation, check, info,
};
use crate::{luks, qcow2};

/// What to do with an internal snapshot. A name can also be an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotAction<'a> {
    /// Takes one of that name.
    Create(&'a str),
    /// Makes the disk what it was then.
    Apply(&'a str),
    /// Forgets it.
    Delete(&'a str),
}

/// What to do with a persistent dirty bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapAction<'a> {
    /// Adds one.
    Add {
        /// Bytes that a bit stands for: a power of two from 512 to 2 GiB.
        granularity: u64,
        /// Whether it follows writes.
        enabled: bool,
    },
    /// Removes it.
    Remove,
    /// Clears all bits.
    Clear,
    /// Lets it follow writes from now on.
    Enable,
    /// Lets it be as it is from now on.
    Disable,
    /// Adds the bits of a bitmap of another image, or of this one.
    Merge {
        /// That image, if it is another one.
        image: Option<&'a Path>,
        /// That bitmap.
        bitmap: &'a str,
    },
}

/// What [`amend`] is to change; `None` leaves it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Amend {
    /// Version of the format, 2 or 3.
    pub version: Option<u32>,
    /// Bits of a reference count.
    pub refcount_bits: Option<u32>,
    /// Whether reference counts may be behind while the image is open.
    pub lazy_refcounts: Option<bool>,
    /// Bytes of the disk.
    pub size: Option<u64>,
    /// The name of its data file, if it has one.
    pub data_file: Option<String>,
    /// Whether its data file is kept readable as a raw image; that can only be given up.
    pub data_file_raw: Option<bool>,
}

/// Changes how the qcow2 image at `path` is made up.
///
/// # Errors
/// [`OpenError`] when the image is in use or damaged, or has something that the new form cannot hold.
pub fn amend(path: impl AsRef<Path>, format: Option<Format>, changes: &Amend) -> Result<(), OpenError> {
    let path = path.as_ref();
    let (mut image, format) = open(path, format)?;
    match format {
        Format::Qcow2 => qcow2::edit(&mut image, |edit| edit.amend(changes)),
        _ => Err(unsupported(path, format, "amending")),
    }
}

/// What a repair may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Only give lost space back.
    Leaks,
    /// Everything that is wrong. Where two structures claim the same cluster, or a table has nonsense in it, data is lost that was lost before.
    All,
}

fn open(path: &Path, format: Option<Format>) -> Result<(ImageFile, Format), OpenError> {
    let image = ImageFile::open(path, true, true, &mut Vec::new())?;
    let format = image.format(format)?;
    Ok((image, format))
}

fn unsupported(path: &Path, format: Format, what: &str) -> OpenError {
    OpenError::Unsupported {
        path: path.to_owned(),
        feature: format!("{what} of a {} image", format.name()),
        hint: "convert it to qcow2 with `terem disk convert`",
    }
}

/// Takes, applies or deletes an internal snapshot of the qcow2 image at `path`.
///
/// # Errors
/// [`OpenError`] when the image is in use or damaged, or there is no such snapshot.
pub fn snapshot(
    path: impl AsRef<Path>,
    format: Option<Format>,
    action: SnapshotAction<'_>,
) -> Result<(), OpenError> {
    let path = path.as_ref();
    let (mut image, format) = open(path, format)?;
    match format {
        Format::Qcow2 => qcow2::edit(&mut image, |edit| match action {
            SnapshotAction::Create(name) => edit.create_snapshot(name),
            SnapshotAction::Apply(name) => edit.apply_snapshot(name),
            SnapshotAction::Delete(name) => edit.delete_snapshot(name),
        }),
        _ => Err(unsupported(path, format, "snapshots")),
    }
}

/// Changes a persistent bitmap of the qcow2 image at `path`.
///
/// # Errors
/// [`OpenError`] when an image is in use or damaged, or there is no such bitmap.
pub fn bitmap(
    path: impl AsRef<Path>,
    format: Option<Format>,
    name: &str,
    actions: &[BitmapAction<'_>],
) -> Result<(), OpenError> {
    let path = path.as_ref();
    let (mut image, format) = open(path, format)?;
    if format != Format::Qcow2 {
        return Err(unsupported(path, format, "bitmaps"));
    }
    qcow2::edit(&mut image, |edit| {
        for action in actions {
            match *action {
                BitmapAction::Add { granularity, enabled } => edit.add_bitmap(name, granularity, enabled)?,
                BitmapAction::Remove => edit.remove_bitmap(name)?,
                BitmapAction::Clear => edit.clear_bitmap(name)?,
                BitmapAction::Enable => edit.enable_bitmap(name, true)?,
                BitmapAction::Disable => edit.enable_bitmap(name, false)?,
                BitmapAction::Merge { image, bitmap } => {
                    let (bits, granularity) = match image {
                        None => edit.bitmap_bits(bitmap)?,
                        Some(other) => {
                            let other = ImageFile::open(other, false, true, &mut Vec::new())?;
                            qcow2::bitmap_bits(&other, bitmap)?
                        }
                    };
                    edit.merge_bitmap(name, &bits, granularity)?;
                }
            }
        }
        Ok(())
    })
}

/// Makes the disk at `path` larger, or with `shrink` smaller (what is beyond `size` is lost).
///
/// # Errors
/// [`OpenError`]: smaller without `shrink`, in use, damaged, or the format cannot.
pub fn resize(
    path: impl AsRef<Path>,
    format: Option<Format>,
    size: u64,
    shrink: bool,
    preallocation: Preallocation,
) -> Result<(), OpenError> {
    let path = path.as_ref();
    let limit = |what: String| OpenError::Limit { path: path.to_owned(), what };
    let (mut image, format) = open(path, format)?;
    let size = size
        .checked_next_multiple_of(512)
        .filter(|&size| i64::try_from(size).is_ok())
        .ok_or_else(|| limit(format!("{size} bytes are more than a disk can have")))?;
    let old = match format {
        Format::Qcow2 => qcow2::disk_size(&image)?,
        Format::Luks => luks::disk_size(&image)?.1,
        _ => image.len(),
    };
    if size < old && !shrink {
        return Err(OpenError::WouldShrink { path: path.to_owned(), old, new: size });
    }
    if image.is_block_device() && matches!(format, Format::Raw | Format::Luks) && size != old {
        return Err(limit(format!(
            "the block device has {old} bytes for the disk; change the device's size"
        )));
    }
    match format {
        Format::Raw => {
            image.set_len(size)?;
            reserve_storage(image.plain(), old, size, preallocation)
                .and_then(|()| image.plain().sync_all())
                .map_err(|e| OpenError::io(path, "changing the file's length", e))
        }
        Format::Luks => {
            // What is added reads as anything until it is written, as everything in it did at first.
            let offset = luks::disk_size(&image)?.0;
            let end = offset.checked_add(size).filter(|&end| i64::try_from(end).is_ok());
            let end = end.ok_or_else(|| limit(format!("{size} bytes are more than a file can have")))?;
            image.set_len(end)?;
            reserve_storage(image.plain(), offset + old, end, preallocation)
                .and_then(|()| image.plain().sync_all())
                .map_err(|e| OpenError::io(path, "changing the file's length", e))
        }
        Format::Qcow2 => {
            // A data file that is a raw image by itself has the disk's size.
            let data_file = info(path, Some(format))?.qcow2.and_then(|qcow2| qcow2.data_file);
            qcow2::edit(&mut image, |edit| edit.resize(size))?;
            if let Some(name) = data_file {
                let data = resolve_backing(path, &name, &BackingPolicy::SameDirectory)?;
                let mut data = ImageFile::open(&data, true, true, &mut Vec::new())?;
                data.set_len(size)?;
            }
            // `image` goes on holding the lock.
            zero_what_shows_through(path, old)?;
            if preallocation == Preallocation::Off || size <= old {
                return Ok(());
            }
            qcow2::preallocate_from(path, old, preallocation)
        }
        #[allow(unreachable_patterns, reason = "there may be more formats than these two")]
        _ => Err(unsupported(path, format, "resizing")),
    }
}

/// A disk that was made larger is zero there, even if its backing file is longer than it was.
fn zero_what_shows_through(path: &Path, from: u64) -> Result<(), OpenError> {
    let options = OpenOptions {
        backing: BackingPolicy::Any,
        lock: false,
        keys: Keys::locked(),
        ..OpenOptions::default()
    };
    let engine = Engine::new(AioEngine::Threads)?;
    let below = match open_chain(&engine, path, &OpenOptions { read_only: true, ..options.clone() }) {
        Ok(node) => node.backing().map_or(0, crate::node::Node::size),
        // A backing file that is not there now cannot be asked, and the size has changed already.
        Err(OpenError::Backing { .. }) => return Ok(()),
        Err(e) => return Err(e),
    };
    if below <= from {
        return Ok(());
    }
    let disk = Disk::open(path, &options)?;
    let until = below.min(disk.size());
    let fail = |source| OpenError::Request { path: path.to_owned(), doing: "zeroing what was added", source };
    let mut at = from;
    while at < until {
        let length = disk.geometry().max_discard.min(until - at);
        disk.run(Op::WriteZeroes { offset: at, length, unmap: true }).map_err(fail)?;
        at += length;
    }
    disk.close().map_err(fail)
}

/// Writes another backing file's name into the image at `path`, or none, and changes nothing else: what the disk
/// holds changes, unless the new backing file has the same contents.
///
/// # Errors
/// [`OpenError`] when the image is in use or damaged, or the name does not fit.
pub fn set_backing(
    path: impl AsRef<Path>,
    format: Option<Format>,
    backing: Option<&BackingFile>,
) -> Result<(), OpenError> {
    let path = path.as_ref();
    let (mut image, format) = open(path, format)?;
    if format != Format::Qcow2 {
        return Err(unsupported(path, format, "a backing file"));
    }
    if let Some(backing) = backing {
        let name = backing.path.to_string_lossy();
        // It need not be there now; only itself it must not be.
        if let Ok(below) = resolve_backing(path, &name, &BackingPolicy::Any)
            && path.canonicalize().is_ok_and(|path| path == below)
        {
            return Err(OpenError::BackingCycle { path: path.to_owned(), again: below });
        }
    }
    qcow2::set_backing(&mut image, backing)
}

/// Repairs the image at `path`. Returns what was wrong before, and what is wrong now.
///
/// # Errors
/// [`OpenError`] when it is in use, or so damaged that nothing can be said of it.
pub fn repair(
    path: impl AsRef<Path>,
    format: Option<Format>,
    repair: Repair,
) -> Result<(CheckReport, CheckReport), OpenError> {
    let path = path.as_ref();
    let (mut image, format) = open(path, format)?;
    if format != Format::Qcow2 {
        drop(image);
        let report = check(path, Some(format))?;
        return Ok((report.clone(), report));
    }
    let before = qcow2::check_file(&image)?;
    let needed = before.errors > 0 && repair == Repair::All || before.errors == 0 && before.leaks > 0;
    if needed {
        qcow2::repair(&mut image, repair == Repair::All)?;
        image.refresh_len()?;
    }
    let after = qcow2::check_file(&image)?;
    Ok((before, after))
}
