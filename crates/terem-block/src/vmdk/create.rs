//! New images.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::descriptor::NO_PARENT;
use super::open::Head;
use super::sparse::{
    COMPRESSED, HAS_MARKERS, HAS_REDUNDANT, HAS_ZERO_GRAINS, LENGTH, MAGIC, SECTOR, TABLE_ENTRIES,
};
use super::{VmdkOptions, VmdkSubformat};
use crate::bytes::{le32, new_uuid, put};
use crate::chain::{ImageFile, resolve_backing};
use crate::file::to_usize;
use crate::format::NewImage;
use crate::{BackingPolicy, CreateOptions, Format, OpenError};

/// Bytes of a grain.
const GRAIN: u64 = 64 << 10;
/// Most bytes of an extent of a split image.
const SPLIT: u64 = 2 << 30;
/// Sectors of the header and the descriptor's place.
const DESCRIPTOR_AT: u64 = 1;
const DESCRIPTOR_SECTORS: u64 = 20;
/// Most bytes of a disk.
const MAX_SIZE: u64 = 64 << 40;

pub(super) fn create(new: &NewImage<'_>) -> Result<(), OpenError> {
    let limit = |what: String| OpenError::Limit { path: new.path.to_owned(), what };
    let options = &new.options.vmdk;
    let subformat = options.subformat;
    if new.size > MAX_SIZE {
        return Err(limit(format!("{} bytes are too much for a VMDK image (64 TiB at most)", new.size)));
    }
    if new.size == 0 && !subformat.is_flat() && !subformat.is_split() {
        return Err(limit("a sparse VMDK image cannot be empty".into()));
    }
    if subformat.is_flat() && (new.options.backing.is_some() || options.zeroed_grain) {
        return Err(limit("a flat VMDK image has neither a parent nor zeroed grains".into()));
    }
    let parent = parent(new)?;
    let mut made = Vec::new();
    let result = write_all(new, &mut made, parent);
    if result.is_err() {
        for path in made {
            let _ = fs::remove_file(path);
        }
    }
    result
}

/// The parent's content ID and its name.
fn parent(new: &NewImage<'_>) -> Result<Option<(u32, String)>, OpenError> {
    let Some(backing) = &new.options.backing else { return Ok(None) };
    let limit = |what: &str| OpenError::Limit { path: new.path.to_owned(), what: what.into() };
    let name = backing.path.to_str().unwrap_or_default();
    if backing.format != Format::Vmdk {
        return Err(limit("the parent of a VMDK image must be one too"));
    }
    if name.is_empty() || name.contains(['"', '\n', '\r', '\0']) {
        return Err(limit("the parent's name cannot be written in a descriptor"));
    }
    let path = resolve_backing(new.path, name, &BackingPolicy::Any)?;
    let head = Head::read(&ImageFile::open(&path, false, true, &mut Vec::new())?)?;
    let cid = head.descriptor.map(|(descriptor, _)| descriptor.cid);
    let cid = cid.ok_or_else(|| limit("the parent has no content ID"))?;
    Ok(Some((cid, name.to_owned())))
}

fn write_all(
    new: &NewImage<'_>,
    made: &mut Vec<PathBuf>,
    parent: Option<(u32, String)>,
) -> Result<(), OpenError> {
    let fail = |e| OpenError::io(new.path, "writing the new image", e);
    let options = &new.options.vmdk;
    let subformat = options.subformat;
    let mut lines = String::new();
    let mut line = |size: u64, path: &Path| -> Result<(), OpenError> {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.is_empty() || name.contains(['"', '\n', '\r', '\0']) {
            let what = format!("the name {name:?} cannot be written in a descriptor");
            return Err(OpenError::Limit { path: new.path.to_owned(), what });
        }
        let (kind, offset) = if subformat.is_flat() { ("FLAT", " 0") } else { ("SPARSE", "") };
        let _ = writeln!(lines, "RW {} {kind} \"{name}\"{offset}", size.div_ceil(SECTOR));
        Ok(())
    };
    let embedded = !subformat.is_flat() && !subformat.is_split();
    if embedded {
        write_sparse(new.file, new.size, options).map_err(fail)?;
        line(new.size, new.name)?;
    } else {
        for (path, size) in extents(new.path, options, new.size) {
            let file = new_extent(&path, new.options.overwrite)?;
            made.push(path.clone());
            let fail = |e| OpenError::io(&path, "writing the new image", e);
            if subformat.is_flat() {
                file.set_len(size).map_err(fail)?;
            } else {
                write_sparse(&file, size, options).map_err(fail)?;
            }
            file.sync_all().map_err(fail)?;
            line(size, &path)?;
        }
    }
    let text = descriptor(new.size, options, parent, &lines).map_err(fail)?;
    if embedded && text.len() as u64 > DESCRIPTOR_SECTORS * SECTOR {
        let what = "the names are too long for the descriptor".into();
        return Err(OpenError::Limit { path: new.path.to_owned(), what });
    }
    let at = if embedded { DESCRIPTOR_AT * SECTOR } else { 0 };
    new.file.write_all_at(text.as_bytes(), at).map_err(fail)
}

/// The extents of an image whose extents are in files of their own: paths and bytes.
fn extents(path: &Path, options: &VmdkOptions, size: u64) -> Vec<(PathBuf, u64)> {
    let split = options.subformat.is_split();
    let step = if split { SPLIT } else { size.max(1) };
    let starts = (0..size).step_by(to_usize(step)).zip(1..);
    starts.map(|(at, n)| (extent_path(path, options.subformat, n), step.min(size - at))).collect()
}

/// The files of a new image besides its own.
pub(crate) fn extent_files(path: &Path, options: &CreateOptions) -> Vec<PathBuf> {
    let vmdk = &options.vmdk;
    if !vmdk.subformat.is_flat() && !vmdk.subformat.is_split() {
        return Vec::new();
    }
    extents(path, vmdk, options.size.unwrap_or(0)).into_iter().map(|(path, _)| path).collect()
}

/// `disk.vmdk` has `disk-flat.vmdk`, or `disk-s001.vmdk` and so on.
fn extent_path(path: &Path, subformat: VmdkSubformat, number: u32) -> PathBuf {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let (stem, ending) = match name.rfind('.') {
        Some(at) => name.split_at(at),
        None => (name, ""),
    };
    path.with_file_name(match subformat {
        VmdkSubformat::TwoGbMaxExtentFlat => format!("{stem}-f{number:03}{ending}"),
        VmdkSubformat::TwoGbMaxExtentSparse => format!("{stem}-s{number:03}{ending}"),
        _ => format!("{stem}-flat{ending}"),
    })
}

fn new_extent(path: &Path, overwrite: bool) -> Result<fs::File, OpenError> {
    let mut options = fs::OpenOptions::new();
    // A link in the way is not followed.
    options.read(true).write(true).custom_flags(libc::O_NOFOLLOW);
    if overwrite && path.exists() {
        // Checked and locked as any image; emptied only then.
        drop(ImageFile::open(path, true, true, &mut Vec::new())?);
        options.truncate(true);
    } else {
        options.create_new(true);
    }
    options.open(path).map_err(|e| match e.raw_os_error() {
        Some(libc::EEXIST) => OpenError::Exists { path: path.to_owned() },
        _ => OpenError::io(path, "making an extent of the image", e),
    })
}

/// Writes an empty sparse extent: header, both directories with all their tables.
fn write_sparse(file: &fs::File, size: u64, options: &VmdkOptions) -> io::Result<()> {
    let compressed = options.subformat == VmdkSubformat::StreamOptimized;
    let tables = size.div_ceil(GRAIN * TABLE_ENTRIES);
    let table_sectors = (TABLE_ENTRIES * 4).div_ceil(SECTOR);
    let directory_sectors = (tables * 4).div_ceil(SECTOR);
    let redundant = DESCRIPTOR_AT + DESCRIPTOR_SECTORS;
    let directory = redundant + directory_sectors + tables * table_sectors;
    let end = directory + directory_sectors + tables * table_sectors;
    let overhead = end.next_multiple_of(GRAIN / SECTOR);
    let version: u32 = match (compressed, options.zeroed_grain) {
        (true, _) => 3,
        (false, true) => 2,
        (false, false) => 1,
    };
    let mut flags = 1 | HAS_REDUNDANT; // the bytes that tell of a transfer as text are there
    flags |= if compressed { COMPRESSED | HAS_MARKERS } else { 0 };
    flags |= if options.zeroed_grain { HAS_ZERO_GRAINS } else { 0 };

    let mut header = vec![0; to_usize(LENGTH)];
    put(&mut header, 0, MAGIC);
    put(&mut header, 4, &version.to_le_bytes());
    put(&mut header, 8, &flags.to_le_bytes());
    put(&mut header, 0x0c, &(size / SECTOR).to_le_bytes());
    put(&mut header, 0x14, &(GRAIN / SECTOR).to_le_bytes());
    put(&mut header, 0x1c, &DESCRIPTOR_AT.to_le_bytes());
    put(&mut header, 0x24, &DESCRIPTOR_SECTORS.to_le_bytes());
    put(&mut header, 0x2c, &512u32.to_le_bytes());
    put(&mut header, 0x30, &redundant.to_le_bytes());
    put(&mut header, 0x38, &directory.to_le_bytes());
    put(&mut header, 0x40, &overhead.to_le_bytes());
    put(&mut header, 0x49, b"\n \r\n");
    put(&mut header, 0x4d, &u16::from(compressed).to_le_bytes());

    file.set_len(overhead * SECTOR)?;
    for at in [redundant, directory] {
        let first = at + directory_sectors;
        let sectors = (0..tables).map(|i| u32::try_from(first + i * table_sectors).unwrap_or(0));
        let entries: Vec<u8> = sectors.flat_map(u32::to_le_bytes).collect();
        file.write_all_at(&entries, at * SECTOR)?;
    }
    file.write_all_at(&header, 0)
}

fn descriptor(
    size: u64,
    options: &VmdkOptions,
    parent: Option<(u32, String)>,
    extents: &str,
) -> io::Result<String> {
    let heads = if options.adapter_type == "ide" { 16 } else { 255 };
    let cid = le32(&new_uuid()?, 0) & 0x7fff_ffff;
    let (parent_cid, parent) = match parent {
        Some((cid, name)) => (cid, format!("parentFileNameHint=\"{name}\"\n")),
        None => (NO_PARENT, String::new()),
    };
    Ok(format!(
        "# Disk DescriptorFile\nversion=1\nCID={cid:08x}\nparentCID={parent_cid:08x}\ncreateType=\"{}\"\n{parent}\n\
         # Extent description\n{extents}\n\
         # The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{}\"\nddb.geometry.cylinders = \"{}\"\n\
         ddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"{}\"\n\
         ddb.toolsVersion = \"{}\"\n",
        options.subformat.name(),
        options.hw_version,
        size / (63 * heads * SECTOR),
        options.adapter_type,
        options.tools_version,
    ))
}
