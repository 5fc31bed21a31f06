//! An opened image, as its parent (the disk or an overlay) uses it; and what a format must do for that.

use std::any::Any;
use std::path::{Path, PathBuf};

use crate::engine::View;
use crate::executor::LocalFuture;
use crate::extent::{Extent, ExtentKind};
use crate::file::{File, to_usize};
use crate::{Format, Geometry, IoError, Op};

/// Most bytes of one discard or write-zeroes.
const MAX_DISCARD: u64 = 2 << 30;

/// The result of an asynchronous operation on an image.
pub(crate) type Answer<'a, T = ()> = LocalFuture<'a, Result<T, IoError>>;

/// An opened image of one format. Its [`Node`] has checked that requests lie within [`Self::size`], and that only
/// images open for writing are written; offsets and lengths have no alignment.
///
/// Requests come many at once, all on one thread: a task loses control only where it awaits.
pub(crate) trait Image: Any {
    fn format(&self) -> Format;

    /// Bytes of the disk, a multiple of 512.
    fn size(&self) -> u64;

    /// The image's main file, or `None` when it is not on this host (NBD).
    fn file(&self) -> Option<&File>;

    /// Where the image is, for messages and lists.
    fn path(&self) -> PathBuf {
        self.file().map_or_else(PathBuf::new, |file| file.path().to_owned())
    }

    fn is_read_only(&self) -> bool {
        self.file().is_none_or(File::is_read_only)
    }

    /// The image that shows through where this one has nothing.
    fn backing(&self) -> Option<&Node> {
        None
    }

    /// Bytes that get their place together, such as a cluster; 0 where there is no such unit.
    fn unit(&self) -> u64;

    /// Fills `view`.
    fn read(&self, offset: u64, view: View) -> Answer<'_>;

    fn write(&self, offset: u64, view: View) -> Answer<'_>;

    /// Makes all completed writes durable.
    fn flush(&self) -> Answer<'_>;

    /// As [`Op::Discard`]; may do nothing.
    fn discard(&self, offset: u64, length: u64) -> Answer<'_>;

    /// As [`Op::WriteZeroes`].
    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Answer<'_>;

    /// Whether [`Self::write_zeroes`] of this range is faster than writing zeroes would be.
    fn zeroes_fast(&self, _offset: u64, _length: u64) -> bool {
        false
    }

    /// The run at `offset`, of at least one and at most `length` bytes; `depth` is 0. `Unallocated` means that
    /// reading goes on in the backing file, or gives zeroes if there is none.
    fn status(&self, offset: u64, length: u64) -> Answer<'_, Extent>;

    /// Whether a new image reads as zeroes where nothing was written.
    fn reads_as_zero_when_new(&self) -> bool {
        true
    }

    /// How clusters are compressed for [`Self::write_compressed`]; `None` where none can be.
    fn compression(&self) -> Option<Packer> {
        None
    }

    /// Puts in compressed clusters, in ascending order: place on the disk, and bytes that [`Packer::compress`] made of
    /// what belongs there.
    fn write_compressed(&self, clusters: Vec<(u64, Vec<u8>)>) -> Answer<'_> {
        drop(clusters);
        Box::pin(async { Err(IoError::Unsupported("compressed clusters")) })
    }

    /// How compressed clusters are decompressed that [`Self::packed`] finds, and the file they are in.
    fn unpacking(&self) -> Option<(&File, Unpacker)> {
        None
    }

    /// The compressed clusters that hold a part of the disk, in order.
    fn packed(&self, offset: u64, length: u64) -> Answer<'_, Vec<Packed>> {
        let _ = (offset, length);
        Box::pin(async { Err(IoError::Unsupported("compressed clusters")) })
    }

    /// The file in which data lies as it is where [`Extent::host`] says, for whoever reads it past this image.
    fn plain_data(&self) -> Option<&File> {
        None
    }

    /// Whether [`Self::place`] can be used.
    fn places(&self) -> bool {
        false
    }

    /// Takes storage in a row in [`Self::plain_data`], whole units and at most `length` bytes: host offset and bytes.
    fn place(&self, length: u64) -> Answer<'_, (u64, u64)> {
        let _ = length;
        Box::pin(async { Err(IoError::Unsupported("storage to write to")) })
    }

    /// Makes storage that was taken and written to a part of the disk: disk offset, host offset, bytes (whole units).
    fn map_placed(&self, runs: Vec<(u64, u64, u64)>) -> Answer<'_> {
        drop(runs);
        Box::pin(async { Err(IoError::Unsupported("storage to write to")) })
    }

    /// Gives storage back that was taken and not used.
    fn unplace(&self, host: u64, length: u64) -> Answer<'_> {
        let _ = (host, length);
        Box::pin(async { Err(IoError::Unsupported("storage to write to")) })
    }

    /// Lets the file end where the image does, when no request is under way.
    fn trim(&self) -> Answer<'_> {
        Box::pin(async { Ok(()) })
    }

    /// Writes everything back. The image is not used after that.
    fn close(&self) -> Answer<'_> {
        self.flush()
    }
}

/// How an image has its clusters compressed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packer {
    /// Bytes of a cluster.
    pub(crate) unit: u64,
    /// Whether the image has no other clusters.
    pub(crate) always: bool,
    /// Compresses one on any thread; `None` if that does not make it smaller.
    pub(crate) compress: fn(&[u8]) -> Option<Vec<u8>>,
}

/// How an image's compressed clusters are decompressed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unpacker {
    /// Bytes of a cluster.
    pub(crate) unit: u64,
    /// Decompresses one on any thread, to exactly as many bytes as the second slice has. What follows it in the first
    /// does not matter.
    pub(crate) decompress: fn(&[u8], &mut [u8]) -> std::io::Result<()>,
}

/// A compressed cluster.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packed {
    /// Its first byte's place on the disk.
    pub(crate) offset: u64,
    /// Where it is in the file.
    pub(crate) host: u64,
    /// Most bytes that it takes there.
    pub(crate) length: u64,
}

/// An opened image of any format.
pub(crate) struct Node(Box<dyn Image>);

impl Node {
    pub(crate) fn new(image: impl Image) -> Self {
        Self(Box::new(image))
    }

    pub(crate) fn format(&self) -> Format {
        self.0.format()
    }

    /// Bytes of the disk, a multiple of 512.
    pub(crate) fn size(&self) -> u64 {
        self.0.size()
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.path()
    }

    pub(crate) fn backing(&self) -> Option<&Self> {
        self.0.backing()
    }

    /// The image, if its format's type is `T`: for what only that format can do.
    pub(crate) fn of<T: Image>(&self) -> Option<&T> {
        let image: &dyn Any = &*self.0;
        image.downcast_ref()
    }

    pub(crate) fn image(&self) -> &dyn Image {
        &*self.0
    }

    /// The backing files from the nearest to the last.
    pub(crate) fn backing_paths(&self) -> Vec<PathBuf> {
        std::iter::successors(self.backing(), |node| node.backing()).map(Self::path).collect()
    }

    /// Their formats.
    pub(crate) fn backing_formats(&self) -> Vec<Format> {
        std::iter::successors(self.backing(), |node| node.backing()).map(Self::format).collect()
    }

    pub(crate) fn geometry(&self, discard: bool) -> Geometry {
        let (read_only, unit) = (self.0.is_read_only(), u32::try_from(self.0.unit()).unwrap_or(0));
        Geometry {
            size: self.size(),
            read_only,
            logical_block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: unit,
            discard: discard && !read_only,
            discard_granularity: if unit == 0 { 4096 } else { unit },
            max_discard: MAX_DISCARD,
            volatile_cache: true,
        }
    }

    /// Carries out a request that lies within the disk.
    pub(crate) async fn execute(&self, op: Op) -> Result<(), IoError> {
        match op {
            Op::Read { offset, memory } => self.read(offset, View::new(memory)).await,
            Op::Write { offset, memory } => self.0.write(offset, View::new(memory)).await,
            Op::Flush => self.0.flush().await,
            Op::Discard { offset, length } => self.0.discard(offset, length).await,
            Op::WriteZeroes { offset, length, unmap } => self.0.write_zeroes(offset, length, unmap).await,
        }
    }

    /// Writes `view`, which lies within the disk.
    pub(crate) async fn write(&self, offset: u64, view: View) -> Result<(), IoError> {
        self.0.write(offset, view).await
    }

    /// Whether write-zeroes of this range is faster than writing zeroes would be.
    pub(crate) fn zeroes_fast(&self, offset: u64, length: u64) -> bool {
        self.0.zeroes_fast(offset, length)
    }

    /// Fills `view` from `offset` on; zeroes beyond the image's end.
    pub(crate) async fn read(&self, offset: u64, view: View) -> Result<(), IoError> {
        let there = to_usize(self.size().saturating_sub(offset).min(view.len() as u64));
        if there < view.len() {
            view.part(there, view.len()).zero();
        }
        if there == 0 {
            return Ok(());
        }
        self.0.read(offset, view.part(0, there)).await
    }

    /// The run at `offset`, of at most `length` bytes, in this image and those below. Beyond the disk's end there is
    /// nothing.
    pub(crate) async fn status(&self, offset: u64, length: u64) -> Result<Extent, IoError> {
        let (mut node, mut left, mut depth) = (self, length, 0);
        loop {
            let there = node.size().saturating_sub(offset).min(left);
            if there == 0 {
                // As QEMU: the image whose backing file is too short decides.
                let depth = u32::saturating_sub(depth, 1);
                return Ok(Extent { depth, ..Extent::new(offset, left, ExtentKind::Unallocated, None) });
            }
            let found = node.0.status(offset, there).await?;
            debug_assert!(found.offset == offset && (1..=there).contains(&found.length), "{found:?}");
            left = found.length.clamp(1, there);
            match node.backing() {
                Some(backing) if found.kind == ExtentKind::Unallocated => {
                    (node, depth) = (backing, depth + 1);
                }
                _ => return Ok(Extent { depth, length: left, ..found }),
            }
        }
    }

    /// All runs of a part of the disk, in order; neighbours of one kind are one run.
    pub(crate) async fn statuses(&self, offset: u64, length: u64) -> Result<Vec<Extent>, IoError> {
        let end = offset.saturating_add(length).min(self.size());
        let (mut at, mut extents) = (offset, Vec::<Extent>::new());
        while at < end {
            let extent = self.status(at, end - at).await?;
            at = extent.end();
            if !extents.last_mut().is_some_and(|last| last.join(&extent)) {
                extents.push(extent);
            }
        }
        Ok(extents)
    }

    /// Writes everything back. The image is not used after that.
    pub(crate) async fn close(&self) -> Result<(), IoError> {
        self.0.close().await
    }
}

/// The directory of a file, to which names inside it are relative.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
