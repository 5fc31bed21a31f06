//! A host file or block device as storage: any offset, length and memory, whatever its alignment rules.

use std::cell::Cell;
use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use rustix::io::ReadWriteFlags;

use crate::IoError;
use crate::engine::{Action, Engine, Job, Now, Vectors, View};
use crate::extent::{Extent, ExtentKind};
use crate::range_lock::RangeLock;

/// An open file and the engine for its I/O.
pub(crate) struct File {
    engine: Rc<Engine>,
    fd: Arc<OwnedFd>,
    path: PathBuf,
    /// Where in the file offset 0 is.
    start: u64,
    /// Where it must end.
    limit: u64,
    now: Now,
    /// What offsets, lengths and addresses must be multiples of: 1 through the page cache.
    align: u64,
    /// Bytes of a block device's sector; `None` for a regular file.
    sector: Option<u64>,
    read_only: bool,
    /// Whether flushes reach the storage.
    durable: bool,
    /// Bytes in the file: grows with our writes; nobody else changes it while we hold its lock.
    len: Cell<u64>,
    /// After a failed sync the kernel may have dropped what it could not write.
    sync_failed: Cell<bool>,
    no_zero_range: Cell<bool>,
    no_punch_hole: Cell<bool>,
    no_discard: Cell<bool>,
    /// With alignment rules: whole blocks are written shared, parts of blocks exclusively.
    blocks: RangeLock,
}

/// What [`File::new`] needs to know.
pub(crate) struct FileFacts {
    pub(crate) align: u64,
    pub(crate) sector: Option<u64>,
    pub(crate) read_only: bool,
    pub(crate) durable: bool,
    /// Where in the file the image begins: a multiple of 512.
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// Where it must end: `u64::MAX`, unless it is a part of a file.
    pub(crate) limit: u64,
}

impl File {
    pub(crate) fn new(engine: Rc<Engine>, fd: OwnedFd, path: PathBuf, facts: &FileFacts) -> Self {
        let &FileFacts { align, sector, read_only, durable, start, len, limit } = facts;
        Self {
            start,
            limit,
            engine,
            now: Now::new(&fd, align > 1, sector.is_some()),
            fd: Arc::new(fd),
            path,
            align,
            sector,
            read_only,
            durable,
            len: Cell::new(len),
            sync_failed: Cell::new(false),
            no_zero_range: Cell::new(false),
            no_punch_hole: Cell::new(false),
            no_discard: Cell::new(false),
            blocks: RangeLock::default(),
        }
    }

    /// What carries out its I/O.
    pub(crate) fn engine(&self) -> &Rc<Engine> {
        &self.engine
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes in the file.
    pub(crate) fn len(&self) -> u64 {
        self.len.get()
    }

    pub(crate) fn is_block_device(&self) -> bool {
        self.sector.is_some()
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    async fn run(&self, mut action: Action) -> Result<usize, IoError> {
        if self.start > 0 {
            action.shift(self.start);
        }
        if let Some(result) = self.now.perform(&self.fd, &action) {
            return Ok(result?);
        }
        Ok(self.engine.run(Job { fd: Arc::clone(&self.fd), action }).await?)
    }

    /// The end of a range that is to be written.
    fn end(&self, offset: u64, length: u64) -> Result<u64, IoError> {
        let end = offset.checked_add(length).ok_or(IoError::Os(libc::EFBIG))?;
        if end > self.limit { Err(IoError::NoSpace) } else { Ok(end) }
    }

    /// `fallocate(2)`.
    async fn allocate(&self, mode: i32, offset: u64, length: u64) -> Result<(), IoError> {
        loop {
            match self.run(Action::Allocate { mode, offset, length }).await {
                Err(IoError::Os(libc::EINTR)) => {}
                Err(e) => return Err(e),
                Ok(_) => {
                    #[cfg(test)]
                    crate::journal::allocated(mode, offset, length);
                    return Ok(());
                }
            }
        }
    }

    /// Fills `views`, one after the other, from `offset` on. What lies beyond the file's end reads as zeroes.
    pub(crate) async fn read(&self, offset: u64, views: &[View]) -> Result<(), IoError> {
        let total: usize = views.iter().map(View::len).sum();
        if self.align == 1 {
            return self.read_aligned(offset, views, total).await;
        }
        let (vectors, pieces) = Vectors::new(views, 0);
        let fits = pieces == total && vectors.aligned(to_usize(self.align));
        if fits && offset.is_multiple_of(self.align) {
            return self.read_aligned(offset, views, total).await;
        }
        let start = offset - offset % self.align;
        let bounce = View::zeroed(to_usize((offset - start + total as u64).next_multiple_of(self.align)));
        self.read_aligned(start, std::slice::from_ref(&bounce), bounce.len()).await?;
        let mut at = to_usize(offset - start);
        for view in views {
            view.put(&bounce.part(at, view.len()).to_vec());
            at += view.len();
        }
        Ok(())
    }

    async fn read_aligned(&self, offset: u64, views: &[View], total: usize) -> Result<(), IoError> {
        let mut done = 0;
        while done < total {
            let (memory, _) = Vectors::new(views, done);
            let position = offset.checked_add(done as u64).ok_or(IoError::Os(libc::EFBIG))?;
            if i64::try_from(position).is_err() {
                break;
            }
            let n = match self.run(Action::Read { offset: position, memory }).await {
                Err(IoError::Os(libc::EINTR | libc::EAGAIN)) => continue,
                other => other?,
            };
            // With alignment rules a short read that ends within a block is the end of the file.
            if n == 0 || !(n as u64).is_multiple_of(self.align) {
                done += n;
                break;
            }
            done += n;
        }
        let mut at = 0;
        for view in views {
            let got = done.saturating_sub(at).min(view.len());
            view.mark_written(got);
            view.part(got, view.len()).zero();
            at += view.len();
        }
        Ok(())
    }

    /// Writes `views`, one after the other, at `offset`.
    pub(crate) async fn write(&self, offset: u64, views: &[View]) -> Result<(), IoError> {
        let total: usize = views.iter().map(View::len).sum();
        let end = self.end(offset, total as u64)?;
        // Before, not after: should it fail midway, that place may not read as zeroes any more.
        self.len.set(self.len.get().max(end));
        if self.align > 1 {
            let (vectors, pieces) = Vectors::new(views, 0);
            let whole = offset.is_multiple_of(self.align) && end.is_multiple_of(self.align);
            let range = offset / self.align..end.div_ceil(self.align);
            if whole && pieces == total && vectors.aligned(to_usize(self.align)) {
                let _blocks = self.blocks.shared(range).await;
                self.write_aligned(offset, views, total).await?;
            } else {
                let _blocks = self.blocks.exclusive(range).await;
                self.write_bounced(offset, views, total).await?;
            }
        } else {
            self.write_aligned(offset, views, total).await?;
        }
        Ok(())
    }

    /// Writes through a buffer of whole blocks, whose other bytes are read before.
    async fn write_bounced(&self, offset: u64, views: &[View], total: usize) -> Result<(), IoError> {
        let start = offset - offset % self.align;
        let bounce = View::zeroed(to_usize((offset - start + total as u64).next_multiple_of(self.align)));
        self.read_aligned(start, std::slice::from_ref(&bounce), bounce.len()).await?;
        let mut at = to_usize(offset - start);
        for view in views {
            bounce.part(at, view.len()).put(&view.to_vec());
            at += view.len();
        }
        self.write_aligned(start, std::slice::from_ref(&bounce), bounce.len()).await
    }

    async fn write_aligned(&self, offset: u64, views: &[View], total: usize) -> Result<(), IoError> {
        #[cfg(test)]
        let record = crate::journal::write(offset, views);
        let mut done = 0;
        while done < total {
            let (memory, _) = Vectors::new(views, done);
            match self.run(Action::Write { offset: offset + done as u64, memory }).await {
                Ok(0) => return Err(IoError::NoSpace),
                Ok(n) => done += n,
                Err(IoError::Os(libc::EINTR | libc::EAGAIN)) => {}
                Err(e) => return Err(e),
            }
        }
        #[cfg(test)]
        crate::journal::ended(record);
        Ok(())
    }

    /// `len` bytes from `offset` on.
    pub(crate) async fn read_bytes(&self, offset: u64, len: usize) -> Result<Vec<u8>, IoError> {
        let view = View::zeroed(len);
        self.read(offset, std::slice::from_ref(&view)).await?;
        Ok(view.to_vec())
    }

    /// Writes a copy of `bytes`.
    pub(crate) async fn write_bytes(&self, offset: u64, bytes: &[u8]) -> Result<(), IoError> {
        self.write(offset, &[View::copy_of(bytes)]).await
    }

    /// The file for plain, blocking reads and writes by other threads, if it has no alignment rules.
    pub(crate) fn plain(&self) -> Option<PlainFile> {
        let file = || PlainFile { fd: Arc::clone(&self.fd), start: self.start };
        (self.align == 1 && self.limit == u64::MAX).then(file)
    }

    /// The file for other threads to read what is in memory already, if there may be such a thing.
    pub(crate) fn cached(&self) -> Option<CachedFile> {
        Some(CachedFile { fd: Arc::clone(&self.fd), flags: self.now.read_flags()? })
    }

    /// Takes note that a [`PlainFile`] was written up to `end`.
    pub(crate) fn written_by_others(&self, end: u64) {
        self.len.set(self.len.get().max(end));
    }

    /// The run at `offset`, of at most `length` bytes: data, or a hole. Asks the file system, which answers at once.
    pub(crate) fn status(&self, offset: u64, length: u64) -> Extent {
        use rustix::fs::{SeekFrom, seek};
        use rustix::io::Errno;
        let end = offset.saturating_add(length);
        if self.is_block_device() {
            return Extent::new(offset, length, ExtentKind::Data, Some(offset));
        }
        let at = |seek: rustix::io::Result<u64>| seek.map(|found| found - self.start);
        let place = self.start + offset;
        let (kind, until) = match at(seek(&*self.fd, SeekFrom::Data(place))) {
            Ok(data) if data > offset => (ExtentKind::Zero, data),
            Ok(_) => (ExtentKind::Data, at(seek(&*self.fd, SeekFrom::Hole(place))).unwrap_or(end)),
            // Nothing but a hole up to the end, or beyond it.
            Err(Errno::NXIO) => (ExtentKind::Zero, end),
            Err(_) => (ExtentKind::Data, end),
        };
        Extent::new(offset, until.clamp(offset + 1, end) - offset, kind, Some(offset))
    }

    /// Makes all that was written durable.
    pub(crate) async fn sync(&self) -> Result<(), IoError> {
        if self.sync_failed.get() {
            return Err(IoError::FlushFailed);
        }
        if !self.durable || self.read_only {
            return Ok(());
        }
        #[cfg(test)]
        let covered = crate::journal::sync_begins();
        self.run(Action::Sync).await.inspect_err(|_| self.sync_failed.set(true))?;
        #[cfg(test)]
        crate::journal::synced(&covered);
        Ok(())
    }

    /// The whole sectors of a block device within a range, which an image that is a part of it need not begin with: first
    /// byte, and byte after the last. Of a regular file: the range.
    fn whole_sectors(&self, offset: u64, length: u64) -> (u64, u64) {
        let (start, end) = whole(self.start.saturating_add(offset), length, self.sector.unwrap_or(1));
        (start.saturating_sub(self.start), end.saturating_sub(self.start))
    }

    /// Gives storage back; the range reads as zeroes or as before. Never fails for want of support.
    pub(crate) async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        if self.sector.is_none() {
            return self.punch_hole(offset, length).await.map(drop);
        }
        let (start, end) = self.whole_sectors(offset, length);
        if self.no_discard.get() || start >= end {
            return Ok(());
        }
        match self.run(Action::Discard { offset: start, length: end - start }).await {
            Err(e) if unsupported(&e) => {
                self.no_discard.set(true);
                Ok(())
            }
            result => result.map(drop),
        }
    }

    /// Whether the range reads as zeroes now, and its storage was given back.
    async fn punch_hole(&self, offset: u64, length: u64) -> Result<bool, IoError> {
        if self.no_punch_hole.get() || length == 0 {
            return Ok(length == 0);
        }
        match self.allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length).await {
            Ok(()) => Ok(true),
            Err(e) if unsupported(&e) => {
                self.no_punch_hole.set(true);
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// Whether the range reads as zeroes now, without its zeroes having been written by us.
    async fn zero_range(&self, offset: u64, length: u64) -> Result<bool, IoError> {
        if self.no_zero_range.get() {
            return Ok(false);
        }
        // A device has its size; the kernel wants to hear that.
        let keep = if self.is_block_device() { libc::FALLOC_FL_KEEP_SIZE } else { 0 };
        match self.allocate(libc::FALLOC_FL_ZERO_RANGE | keep, offset, length).await {
            Ok(()) => {
                self.len.set(self.len.get().max(offset + length));
                Ok(true)
            }
            Err(e) if unsupported(&e) => {
                self.no_zero_range.set(true);
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// Whether, as far as is known, [`Self::write_zeroes`] does not write zeroes.
    pub(crate) fn zeroes_fast(&self) -> bool {
        !self.no_zero_range.get() && !self.is_block_device()
    }

    /// Makes the range read as zeroes. With `unmap` storage may be given back.
    pub(crate) async fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<(), IoError> {
        let end = self.end(offset, length)?;
        // Of a device the kernel takes whole sectors only.
        let (start, stop) = self.whole_sectors(offset, length);
        if start >= stop {
            return self.write_zero_bytes(offset, end).await;
        }
        // Punching keeps the file's size, so it is no way to make a file grow.
        let punched = unmap && stop <= self.len.get() && self.punch_hole(start, stop - start).await?;
        if !punched && !self.zero_range(start, stop - start).await? {
            return self.write_zero_bytes(offset, end).await;
        }
        self.write_zero_bytes(offset, start).await?;
        self.write_zero_bytes(stop, end).await
    }

    async fn write_zero_bytes(&self, start: u64, end: u64) -> Result<(), IoError> {
        const STEP: u64 = 1 << 20;
        if start >= end {
            return Ok(());
        }
        let zeroes = View::zeroed(to_usize(STEP.min(end - start)));
        let mut at = start;
        while at < end {
            let n = STEP.min(end - at);
            self.write(at, &[zeroes.part(0, to_usize(n))]).await?;
            at += n;
        }
        Ok(())
    }

    /// Cuts a regular file after `len` bytes, if it is longer.
    pub(crate) fn cut(&self, len: u64) -> Result<(), IoError> {
        if self.is_block_device() || self.limit != u64::MAX || len >= self.len.get() {
            return Ok(());
        }
        rustix::fs::ftruncate(&*self.fd, self.start + len).map_err(std::io::Error::from)?;
        self.len.set(len);
        Ok(())
    }

    /// Makes sure that later writes to the range find space. The contents are then undefined.
    pub(crate) async fn reserve(&self, offset: u64, length: u64) -> Result<(), IoError> {
        if self.is_block_device() {
            return Ok(());
        }
        self.end(offset, length)?;
        match self.allocate(0, offset, length).await {
            Ok(_) => {
                self.len.set(self.len.get().max(offset + length));
                Ok(())
            }
            Err(IoError::Os(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                self.write_zeroes(offset, length, false).await
            }
            Err(e) => Err(e),
        }
    }
}

/// The whole units within a range: first byte, and byte after the last.
fn whole(offset: u64, length: u64, unit: u64) -> (u64, u64) {
    let end = offset.saturating_add(length);
    (offset.checked_next_multiple_of(unit).unwrap_or(u64::MAX), end - end % unit)
}

/// Whether a file system or a device says that it cannot do such a thing.
fn unsupported(error: &IoError) -> bool {
    const CANNOT: [i32; 6] =
        [libc::EOPNOTSUPP, libc::ENOSYS, libc::EINVAL, libc::EPERM, libc::ENODEV, libc::ENOTTY];
    matches!(error, IoError::Os(errno) if CANNOT.contains(errno))
}

/// A file for plain, blocking reads and writes.
#[derive(Clone)]
pub(crate) struct PlainFile {
    fd: Arc<OwnedFd>,
    start: u64,
}

impl PlainFile {
    /// Fills `bytes` from `offset` on. What lies beyond the file's end reads as zeroes.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pread(&*self.fd, &mut bytes[done..], self.start + offset + done as u64) {
                Ok(0) => {
                    bytes[done..].fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Lets the file system copy `length` bytes from `offset` on to another file; false when it cannot.
    pub(crate) fn copy_to(
        &self,
        offset: u64,
        target: &Self,
        place: u64,
        length: u64,
    ) -> std::io::Result<bool> {
        use rustix::io::Errno;
        let (mut from, mut to, mut left) = (self.start + offset, target.start + place, length);
        while left > 0 {
            let most = to_usize(left.min(1 << 30));
            match rustix::fs::copy_file_range(&*self.fd, Some(&mut from), &*target.fd, Some(&mut to), most) {
                // At the source's end; or it cannot, after all.
                Ok(0) => return Ok(false),
                Ok(n) => left -= n as u64,
                Err(Errno::INTR) => {}
                Err(
                    Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM | Errno::IO,
                ) => {
                    return Ok(false);
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    /// Writes `bytes` at `offset`.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pwrite(&*self.fd, &bytes[done..], self.start + offset + done as u64) {
                Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// A file of which other threads read what is in memory already.
pub(crate) struct CachedFile {
    fd: Arc<OwnedFd>,
    flags: ReadWriteFlags,
}

impl CachedFile {
    /// Fills `bytes` from `offset` on; false where that would have to wait, or fails.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> bool {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &mut [IoSliceMut::new(&mut bytes[done..])];
            match rustix::io::preadv2(&*self.fd, rest, offset + done as u64, self.flags) {
                Ok(0) | Err(_) => return false,
                Ok(n) => done += n,
            }
        }
        true
    }
}

/// A length that is known to be that of memory.
pub(crate) fn to_usize(n: u64) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}
