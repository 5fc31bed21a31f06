//! Opens an image and, one after the other, its backing files.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use terem_crypt::FileArea;

use crate::engine::Engine;
use crate::file::{File, FileFacts};
use crate::lock::lock_image;
use crate::nbd;
use crate::node::{Node, directory_of};
use crate::probe::{HEAD, Looks, probe};
use crate::source::JSON;
use crate::{BackingPolicy, Below, Cache, FilePart, Format, OpenError, OpenOptions, Source};

/// Most backing files below an image.
const MAX_DEPTH: usize = 200;

/// How long to wait for a device that something still holds: an `io_uring` is closed some time after its last request.
const LAST_BREATH: Duration = Duration::from_millis(300);

/// An image file, checked and locked, before its format is known.
pub(crate) struct ImageFile {
    file: fs::File,
    path: PathBuf,
    /// Where in the file the image begins: 0, unless it is only a part of it.
    start: u64,
    /// Bytes from there on.
    len: u64,
    /// Whether it ends before the file does.
    cut: bool,
    block_device: bool,
    writing: bool,
}

impl ImageFile {
    /// Opens `path`, and locks it if `lock` is set. `seen` are the device and inode numbers of the images
    /// above it; its own are added.
    ///
    /// # Errors
    /// [`OpenError`].
    pub(crate) fn open(
        path: &Path,
        writing: bool,
        lock: bool,
        seen: &mut Vec<(u64, u64)>,
    ) -> Result<Self, OpenError> {
        let owned = || path.to_owned();
        if nbd::is_address(path) {
            let reason = "it is an NBD export, and this works with image files only".into();
            return Err(OpenError::Address { path: owned(), reason });
        }
        // Before opening: a FIFO or a device could do something at being opened.
        let kind = fs::metadata(path).map_err(|e| open_failed(path, writing, e))?.file_type();
        if kind.is_dir() {
            return Err(OpenError::IsDirectory { path: owned() });
        }
        if !kind.is_file() && !kind.is_block_device() {
            let kind = if kind.is_char_device() {
                "a character device"
            } else if kind.is_fifo() {
                "a FIFO"
            } else {
                "a socket"
            };
            return Err(OpenError::NotADisk { path: owned(), kind });
        }
        let alone = kind.is_block_device() && writing && lock;
        let file = open_file(path, writing, alone).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) if alone => OpenError::UsedByHost { path: owned() },
            _ => open_failed(path, writing, e),
        })?;
        let meta = file.metadata().map_err(|e| OpenError::io(path, "looking at the image", e))?;
        let identity = (meta.dev(), meta.ino());
        if seen.contains(&identity) {
            return Err(OpenError::BackingCycle { path: owned(), again: owned() });
        }
        seen.push(identity);
        let fd = OwnedFd::from(file);
        if lock {
            lock_image(&fd, path, writing)?;
        }
        let len = rustix::fs::seek(&fd, rustix::fs::SeekFrom::End(0))
            .map_err(|e| OpenError::io(path, "asking for the image's length", e.into()))?;
        let block_device = meta.file_type().is_block_device();
        let file = fd.into();
        Ok(Self { file, path: owned(), start: 0, len, cut: false, block_device, writing })
    }

    /// Takes a part of the file for all of it.
    pub(crate) fn narrow(&mut self, part: &FilePart) -> Result<(), OpenError> {
        let limit = |what: String| OpenError::Limit { path: self.path.clone(), what };
        let there = self
            .len
            .checked_sub(part.offset)
            .ok_or_else(|| limit(format!("it has {} bytes, and is to begin at {}", self.len, part.offset)))?;
        let len = part.size.unwrap_or(there);
        if len > there {
            return Err(limit(format!("{len} bytes are more than the {there} from there on")));
        }
        if !part.offset.is_multiple_of(512) || part.size.is_some_and(|size| !size.is_multiple_of(512)) {
            return Err(limit("a part of a file begins and ends at a multiple of 512 bytes".into()));
        }
        (self.start, self.len, self.cut) = (part.offset, len, part.size.is_some());
        Ok(())
    }

    /// Whether the image is not the whole file.
    pub(crate) fn is_part(&self) -> bool {
        self.start > 0 || self.cut
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Bytes in the file.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Looks again how long the file is, after it was written through [`Self::plain`].
    pub(crate) fn refresh_len(&mut self) -> Result<(), OpenError> {
        let meta = self.file.metadata().map_err(|e| OpenError::io(&self.path, "looking at the image", e))?;
        if !self.block_device && !self.cut {
            self.len = meta.len().saturating_sub(self.start);
        }
        Ok(())
    }

    /// The plain file, for reading and writing before there is an engine.
    pub(crate) fn plain(&self) -> &fs::File {
        &self.file
    }

    /// A part of it as [`terem_crypt`] takes it.
    pub(crate) fn area(&self, offset: u64, length: u64) -> FileArea<'_> {
        FileArea::new(&self.file, self.start + offset, length)
    }

    /// Writes `bytes` at `offset`.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), OpenError> {
        #[cfg(test)]
        let record = crate::journal::write_bytes(offset, bytes);
        let written = self.file.write_all_at(bytes, self.start + offset);
        written.map_err(|e| OpenError::io(&self.path, "writing the image", e))?;
        #[cfg(test)]
        crate::journal::ended(record);
        Ok(())
    }

    /// Makes all that was written durable.
    pub(crate) fn sync(&self) -> Result<(), OpenError> {
        #[cfg(test)]
        let covered = crate::journal::sync_begins();
        self.file.sync_data().map_err(|e| OpenError::io(&self.path, "writing the image", e))?;
        #[cfg(test)]
        crate::journal::synced(&covered);
        Ok(())
    }

    /// Gives storage back that is not needed any more; an economy that may fail.
    pub(crate) fn punch_hole(&self, offset: u64, length: u64) {
        use rustix::fs::FallocateFlags;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if rustix::fs::fallocate(&self.file, flags, self.start + offset, length).is_ok() {
            #[cfg(test)]
            crate::journal::allocated(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length);
        }
    }

    /// Cuts a regular file after `len` bytes, or lengthens it.
    pub(crate) fn set_len(&mut self, len: u64) -> Result<(), OpenError> {
        if self.cut {
            let what = "it is a part of a file, whose size cannot be changed".into();
            return Err(OpenError::Limit { path: self.path.clone(), what });
        }
        if !self.block_device {
            self.file
                .set_len(self.start + len)
                .map_err(|e| OpenError::io(&self.path, "changing the file's length", e))?;
            self.len = len;
        }
        Ok(())
    }

    /// `len` bytes from `offset` on; `what` is for the error message.
    ///
    /// # Errors
    /// [`OpenError::Truncated`] when they are not all in the file (checked before memory is taken).
    pub(crate) fn read(&self, offset: u64, len: u64, what: &str) -> Result<Vec<u8>, OpenError> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(OpenError::truncated(
                &self.path,
                format!(
                    "{what} at {offset:#x}, {len:#x} bytes, is beyond the end of the file ({:#x})",
                    self.len
                ),
            ));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.file
            .read_exact_at(&mut bytes, self.start + offset)
            .map_err(|e| OpenError::io(&self.path, "reading the image", e))?;
        Ok(bytes)
    }

    /// The first bytes, [`HEAD`] at most.
    pub(crate) fn head(&self) -> Result<Vec<u8>, OpenError> {
        self.read(0, self.len.min(HEAD as u64), "the beginning")
    }

    /// The format that was asked for, or the one the image looks like.
    pub(crate) fn format(&self, asked: Option<Format>) -> Result<Format, OpenError> {
        if let Some(format) = asked {
            return Ok(format);
        }
        match probe(&self.head()?) {
            Looks::Raw => Ok(Format::Raw),
            Looks::Like(format) => Ok(format),
            Looks::Foreign(other) => Err(OpenError::Unsupported {
                path: self.path.clone(),
                feature: format!("the image format {other}"),
                hint: "convert it with `qemu-img convert -O qcow2`, or open it with format=raw if it is a plain disk",
            }),
        }
    }

    /// Hands the file to an engine.
    pub(crate) fn into_storage(self, engine: &Rc<Engine>, cache: Cache) -> Result<File, OpenError> {
        let fd = OwnedFd::from(self.file);
        let fail = |e: rustix::io::Errno| match e {
            rustix::io::Errno::INVAL => OpenError::Unsupported {
                path: self.path.clone(),
                feature: "direct I/O on this file system".into(),
                hint: "use cache=writeback",
            },
            e => OpenError::io(&self.path, "switching to direct I/O", e.into()),
        };
        let sector = match self.block_device {
            true => Some(sector_size(&fd).map_err(fail)?),
            false => None,
        };
        let mut align = 1;
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(fail)? - rustix::fs::OFlags::NONBLOCK;
        rustix::fs::fcntl_setfl(&fd, flags).map_err(fail)?;
        if cache == Cache::Direct {
            rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::DIRECT).map_err(fail)?;
            align = sector.unwrap_or_else(|| direct_alignment(&fd));
        }
        let facts = FileFacts {
            align,
            sector,
            read_only: !self.writing,
            durable: cache != Cache::Unsafe,
            start: self.start,
            len: self.len,
            limit: if self.cut { self.len } else { u64::MAX },
        };
        if !self.start.is_multiple_of(align) {
            return Err(OpenError::Unsupported {
                path: self.path,
                feature: format!("direct I/O from byte {} on", self.start),
                hint: "use cache=writeback",
            });
        }
        Ok(File::new(Rc::clone(engine), fd, self.path, &facts))
    }
}

/// Opens the file of an image. With `alone` a block device must not be in use by the host itself, such as mounted.
fn open_file(path: &Path, writing: bool, alone: bool) -> io::Result<fs::File> {
    let flags = libc::O_NONBLOCK | if alone { libc::O_EXCL } else { 0 };
    let begun = Instant::now();
    loop {
        match fs::OpenOptions::new().read(true).write(writing).custom_flags(flags).open(path) {
            // We had it open ourselves, and the kernel has not closed it yet.
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && alone && begun.elapsed() < LAST_BREATH => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// Bytes of a block device's sector: what is read and written at once past the page cache, zeroed and discarded.
fn sector_size(fd: &OwnedFd) -> rustix::io::Result<u64> {
    let size = u64::from(rustix::fs::ioctl_blksszget(fd)?);
    if size.is_power_of_two() && size >= 512 { Ok(size) } else { Err(rustix::io::Errno::NODEV) }
}

/// What direct I/O on this file must be aligned to, in bytes.
fn direct_alignment(fd: &OwnedFd) -> u64 {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let align = statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .map_or(0, |s| s.stx_dio_offset_align.max(s.stx_dio_mem_align));
    // Old kernels do not say; 4096 suits all.
    if align.is_power_of_two() && (512..=4096).contains(&align) { align.into() } else { 4096 }
}

fn open_failed(path: &Path, writing: bool, error: io::Error) -> OpenError {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => {
            OpenError::Permission { path: path.to_owned(), writing }
        }
        _ => OpenError::io(path, "opening the image", error),
    }
}

/// Opens the image at `path` and all that is below it.
pub(crate) fn open_chain(engine: &Rc<Engine>, path: &Path, options: &OpenOptions) -> Result<Node, OpenError> {
    open_node(engine, path, options.format, !options.read_only, options, &mut Seen::default())
}

/// The files met so far on the way down a chain.
#[derive(Default)]
pub(crate) struct Seen {
    files: Vec<(u64, u64)>,
    depth: usize,
}

fn open_node(
    engine: &Rc<Engine>,
    path: &Path,
    format: Option<Format>,
    writing: bool,
    options: &OpenOptions,
    seen: &mut Seen,
) -> Result<Node, OpenError> {
    if nbd::is_address(path) {
        if options.part.is_some() {
            let what = "a part of an NBD export cannot be opened by itself".into();
            return Err(OpenError::Limit { path: path.to_owned(), what });
        }
        return nbd::open(engine, path, format, writing, options);
    }
    let opening = Opening::new(engine, path, format, writing, options, seen)?;
    if options.snapshot.is_some() && opening.is_top() && opening.format != Format::Qcow2 {
        let what = format!("a {} image has no snapshots", opening.format.name());
        return Err(OpenError::Limit { path: path.to_owned(), what });
    }
    (opening.format.driver().open)(opening)
}

/// An image that is being opened: what a format gets to work with.
pub(crate) struct Opening<'a> {
    pub(crate) image: ImageFile,
    pub(crate) format: Format,
    /// Whether nobody said which format it is.
    pub(crate) probed: bool,
    pub(crate) writing: bool,
    pub(crate) options: &'a OpenOptions,
    pub(crate) engine: &'a Rc<Engine>,
    /// Images of the chain up to this one.
    depth: usize,
    seen: &'a mut Seen,
}

/// Images of a chain that each get a whole cache of tables. Those below get less with their depth, so that a chain of any
/// length has a bounded cache.
const WHOLE_CACHES: usize = 4;

impl<'a> Opening<'a> {
    pub(crate) fn new(
        engine: &'a Rc<Engine>,
        path: &Path,
        format: Option<Format>,
        writing: bool,
        options: &'a OpenOptions,
        seen: &'a mut Seen,
    ) -> Result<Self, OpenError> {
        if seen.depth > MAX_DEPTH {
            return Err(OpenError::BackingTooDeep { path: path.to_owned(), max: MAX_DEPTH });
        }
        seen.depth += 1;
        let mut image = ImageFile::open(path, writing, options.lock, &mut seen.files)?;
        if let Some(part) = &options.part {
            image.narrow(part)?;
        }
        let probed = format.is_none();
        let format = image.format(format)?;
        if image.is_part() && writing && !matches!(format, Format::Raw | Format::Luks | Format::Qcow2) {
            let what = format!("a {} image in a part of a file can only be read", format.name());
            return Err(OpenError::Limit { path: path.to_owned(), what });
        }
        Ok(Self { image, format, probed, writing, options, engine, depth: seen.depth, seen })
    }

    /// Whether it is the image that was asked for, rather than one below it.
    pub(crate) fn is_top(&self) -> bool {
        self.seen.depth == 1
    }

    /// Bytes of mapping tables that this image may keep.
    pub(crate) fn table_cache(&self) -> usize {
        self.options.table_cache / self.depth.max(WHOLE_CACHES) * WHOLE_CACHES
    }

    /// The file, for I/O by the engine.
    pub(crate) fn storage(self) -> Result<File, OpenError> {
        self.image.into_storage(self.engine, self.options.cache)
    }

    /// Opens what is below the image: the backing file that it names, or what the caller wants there.
    pub(crate) fn open_below(
        &mut self,
        written: Option<(&str, Option<&str>)>,
    ) -> Result<Option<Node>, OpenError> {
        match (&self.options.below, written) {
            (Below::AsWritten, None) | (Below::Nothing, _) => Ok(None),
            (Below::AsWritten, Some((name, format))) => self.open_backing(name, format).map(Some),
            (Below::Image(source), _) => {
                let lock = self.options.lock && source.options.lock;
                let aio = self.options.aio;
                let options = OpenOptions { read_only: true, lock, aio, ..source.options.clone() };
                let below = &source.path;
                open_node(self.engine, below, options.format, false, &options, self.seen)
                    .map(Some)
                    .map_err(|error| self.below_failed(error))
            }
        }
    }

    /// Opens the image's backing file, whose name and format are written in the image.
    pub(crate) fn open_backing(&mut self, name: &str, format: Option<&str>) -> Result<Node, OpenError> {
        let Source { path, options } = backing_source(self.image.path(), name, format, self.options)?;
        open_node(self.engine, &path, options.format, false, &options, self.seen)
            .map_err(|error| self.below_failed(error))
    }

    fn below_failed(&self, error: OpenError) -> OpenError {
        let path = self.image.path().to_owned();
        match error {
            OpenError::BackingCycle { again, .. } => OpenError::BackingCycle { path, again },
            too_deep @ OpenError::BackingTooDeep { .. } => too_deep,
            other => OpenError::Backing { path, source: Box::new(other) },
        }
    }

    /// Opens another file that the image consists of and names, such as an extent. Where it may be is decided as for
    /// backing files; it is written if the image is.
    pub(crate) fn open_part(&mut self, name: &str) -> Result<ImageFile, OpenError> {
        let path = resolve_backing(self.image.path(), name, &self.options.backing)?;
        ImageFile::open(&path, self.writing, self.options.lock, &mut self.seen.files)
    }
}

/// What the image at `path` has below it by this name and format, opened as `options` say.
pub(crate) fn backing_source(
    path: &Path,
    name: &str,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Source, OpenError> {
    let options = OpenOptions { format: None, ..options.of_below() };
    let tree = name.starts_with(JSON);
    let mut source = if tree {
        if options.backing != BackingPolicy::Any {
            return Err(refused(path, name, NOT_PLAIN));
        }
        Source::json(name, &options)?
    } else {
        Source { path: resolve_backing(path, name, &options.backing)?, options }
    };
    if let Some(format) = format {
        let known = Format::from_name(format).ok_or_else(|| {
            let unsupported = OpenError::Unsupported {
                path: source.path.clone(),
                feature: format!("a backing file of format {format}"),
                hint: "convert it with `qemu-img convert -O qcow2`",
            };
            OpenError::Backing { path: path.to_owned(), source: Box::new(unsupported) }
        })?;
        // A tree says it better: the format that is written beside it can be that of its lowest node.
        source.options.format = source.options.format.filter(|_| tree).or(Some(known));
    }
    Ok(source)
}

/// Why a name that is none of a file is refused.
const NOT_PLAIN: &str = "it is not a plain file name; only local files can back an image";

fn refused(path: &Path, name: &str, reason: &str) -> OpenError {
    OpenError::BackingRefused { path: path.to_owned(), backing: name.to_owned(), reason: reason.to_owned() }
}

/// Where the backing file is that the image at `path` calls `name`, if it may be opened.
pub(crate) fn resolve_backing(path: &Path, name: &str, policy: &BackingPolicy) -> Result<PathBuf, OpenError> {
    let refused = |reason: &str| refused(path, name, reason);
    if *policy == BackingPolicy::None {
        return Err(refused(
            "backing files are switched off for this disk; flatten it with `qemu-img convert`",
        ));
    }
    if nbd::is_address(Path::new(name)) {
        let allowed = match policy {
            BackingPolicy::Any => true,
            BackingPolicy::Allow(paths) => paths.iter().any(|path| path.as_os_str() == name),
            BackingPolicy::SameDirectory | BackingPolicy::None => false,
        };
        return if allowed {
            Ok(PathBuf::from(name))
        } else {
            Err(refused("it is on a server; allow this very address if the image can be trusted"))
        };
    }
    let plain = name.strip_prefix("file:").unwrap_or(name);
    // As QEMU: a colon before the first slash is a protocol ("json:" too).
    if plain.split('/').next().is_some_and(|first| first.contains(':')) {
        return Err(refused(NOT_PLAIN));
    }
    let directory = directory_of(path);
    let below = directory.join(plain);
    let wrap =
        |e| OpenError::Backing { path: path.to_owned(), source: Box::new(open_failed(&below, false, e)) };
    let resolved = below.canonicalize().map_err(wrap)?;
    let allowed = match policy {
        BackingPolicy::Any => return Ok(resolved),
        BackingPolicy::Allow(paths) => paths.as_slice(),
        BackingPolicy::SameDirectory | BackingPolicy::None => &[],
    };
    let within = |p: &Path| p.canonicalize().is_ok_and(|p| resolved.starts_with(p));
    if within(directory) || allowed.iter().any(|p| within(p)) {
        return Ok(resolved);
    }
    Err(refused(&format!(
        "{} is outside of the image's directory; move it there, or allow it explicitly if the image can be trusted",
        resolved.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backing_files_stay_where_they_may_be() {
        let dir = tempfile::tempdir().expect("a directory");
        let (inner, other) = (dir.path().join("vm"), dir.path().join("other"));
        fs::create_dir_all(inner.join("sub")).expect("created");
        fs::create_dir(&other).expect("created");
        for file in [inner.join("base"), inner.join("sub/base"), other.join("base")] {
            fs::write(file, b"x").expect("written");
        }
        std::os::unix::fs::symlink(other.join("base"), inner.join("link")).expect("linked");
        let image = inner.join("top.qcow2");
        let same = BackingPolicy::SameDirectory;
        let absolute = inner.join("base").display().to_string();
        for name in ["base", "./base", "sub/base", "file:base", &absolute] {
            assert!(resolve_backing(&image, name, &same).is_ok(), "{name}");
        }
        for name in ["../other/base", "link", "json:{}", "nbd://x/y", "nbd:unix:/x", "/etc/passwd"] {
            let e = resolve_backing(&image, name, &same).expect_err(name);
            assert!(matches!(e, OpenError::BackingRefused { .. }), "{name}: {e}");
        }
        let allow = BackingPolicy::Allow(vec![other.clone()]);
        assert_eq!(
            resolve_backing(&image, "link", &allow).expect("allowed"),
            other.join("base").canonicalize().expect("there")
        );
        assert!(resolve_backing(&image, "/etc/passwd", &allow).is_err());
        assert!(resolve_backing(&image, "/etc/passwd", &BackingPolicy::Any).is_ok());
        let allow = BackingPolicy::Allow(vec!["nbd://host/a".into()]);
        assert!(resolve_backing(&image, "nbd://host/a", &allow).is_ok());
        assert!(resolve_backing(&image, "nbd://host/ab", &allow).is_err());
        assert!(resolve_backing(&image, "nbd://host/ab", &BackingPolicy::Any).is_ok());
        assert!(resolve_backing(&image, "base", &BackingPolicy::None).is_err());
        let e = resolve_backing(&image, "nowhere", &same).expect_err("missing");
        assert!(e.to_string().contains("nowhere"), "{e}");
    }
}
