//! I/O that can be done at once, where that costs less than handing it to the kernel and coming back for the result.
#![allow(unsafe_code, reason = "preadv2 and pwritev2 take raw pointers; soundness: see the parent module")]

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::ReadWriteFlags;

use super::Action;

/// Up to so many bytes are copied at once; more would keep other requests waiting, which other cores could serve.
const MOST: usize = 256 << 10;

/// What of a file can be done at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Eager {
    /// Nothing.
    Never,
    /// What the page cache has (`RWF_NOWAIT`).
    Cached,
    /// Everything: the file is memory, so there is nothing to wait for.
    Memory,
}

/// Does I/O at once where nothing has to be waited for.
pub(crate) struct Now {
    reads: Cell<Eager>,
    writes: Cell<Eager>,
}

impl Now {
    /// For a file that is read and written through the page cache, or not (`direct`); what a block device's file system
    /// is says nothing about the device.
    pub(crate) fn new(fd: &OwnedFd, direct: bool, block_device: bool) -> Self {
        const MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6]; // TMPFS_MAGIC, RAMFS_MAGIC (statfs(2))
        let eager = match rustix::fs::fstatfs(fd) {
            _ if direct => Eager::Never,
            _ if block_device => Eager::Cached,
            Ok(system) if MEMORY.contains(&system.f_type) => Eager::Memory,
            _ => Eager::Cached,
        };
        Self { reads: Cell::new(eager), writes: Cell::new(eager) }
    }

    /// With which flags other threads may read, so as not to wait; `None` if they would.
    pub(crate) fn read_flags(&self) -> Option<ReadWriteFlags> {
        match self.reads.get() {
            Eager::Never => None,
            Eager::Cached => Some(ReadWriteFlags::NOWAIT),
            Eager::Memory => Some(ReadWriteFlags::empty()),
        }
    }

    /// The result, if `action` could be done.
    pub(crate) fn perform(&self, fd: &OwnedFd, action: &Action) -> Option<io::Result<usize>> {
        let (eager, memory, offset, read) = match action {
            Action::Read { offset, memory } => (&self.reads, memory, *offset, true),
            Action::Write { offset, memory } => (&self.writes, memory, *offset, false),
            _ => return None,
        };
        if eager.get() == Eager::Never || memory.len() > MOST {
            return None;
        }
        let flags = if eager.get() == Eager::Cached { libc::RWF_NOWAIT } else { 0 };
        let (list, count) = (memory.list.as_ptr().cast(), i32::try_from(memory.list.len()).ok()?);
        let (fd, offset) = (fd.as_fd().as_raw_fd(), i64::try_from(offset).ok()?);
        let result = if read {
            // SAFETY: the list and the memory that it names are owned by the action, which outlives the call.
            unsafe { libc::preadv2(fd, list, count, offset, flags) }
        } else {
            // SAFETY: as above.
            unsafe { libc::pwritev2(fd, list, count, offset, flags) }
        };
        if let Ok(n) = usize::try_from(result) {
            return Some(Ok(n));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            // Not in the cache, or not now.
            Some(libc::EAGAIN | libc::EINTR) => None,
            // The file system cannot tell beforehand whether it would wait.
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) if eager.get() == Eager::Cached => {
                eager.set(Eager::Never);
                None
            }
            _ => Some(Err(error)),
        }
    }
}
