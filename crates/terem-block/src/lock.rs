//! Image locks that QEMU respects, and the other way round.
//!
//! QEMU describes what it does with an image by permissions, and publishes them as byte-range locks that
//! belong to the open file (`block/file-posix.c`, "Locking" in QEMU's `docs/system/images.rst`): a shared
//! lock on byte 100 + *n* says "I use permission *n*", on byte 200 + *n* "nobody else may use permission
//! *n*". Permissions: 0 consistent read, 1 write, 2 write-unchanged, 3 resize.

mod holder;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

pub use holder::Holder;

use crate::OpenError;
use crate::engine::ofd;

/// Where "I use it" bytes begin (`RAW_LOCK_PERM_BASE`).
const USED: i64 = 100;
/// Where "nobody else may" bytes begin (`RAW_LOCK_SHARED_BASE`).
const DENIED: i64 = 200;

/// `BLK_PERM_CONSISTENT_READ`.
const CONSISTENT_READ: i64 = 0;
/// `BLK_PERM_WRITE`.
const WRITE: i64 = 1;
/// `BLK_PERM_RESIZE`.
const RESIZE: i64 = 3;

/// How long to wait for a lock that no process holds any more: after a kill the kernel closes the files of
/// an `io_uring` only once its last requests have ended. A child of ours has our files until it runs its program.
const LAST_BREATH: Duration = Duration::from_secs(1);

/// Locks the image for as long as `fd`'s open file lives: to write it alone, or to read it with others.
///
/// # Errors
/// [`OpenError::Busy`] with the processes that hold it; [`OpenError::Io`] when the file system has no locks.
pub(crate) fn lock_image(fd: &OwnedFd, path: &Path, writing: bool) -> Result<(), OpenError> {
    let begun = Instant::now();
    loop {
        match try_lock(fd, path, writing) {
            Err(OpenError::Busy { holders, .. })
                if holders.iter().all(Holder::is_passing) && begun.elapsed() < LAST_BREATH =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

fn try_lock(fd: &OwnedFd, path: &Path, writing: bool) -> Result<(), OpenError> {
    let uses: &[i64] = if writing { &[CONSISTENT_READ, WRITE, RESIZE] } else { &[CONSISTENT_READ] };
    let denies = [WRITE, RESIZE];
    let ours = uses.iter().map(|n| USED + n).chain(denies.iter().map(|n| DENIED + n));
    // What would contradict us: somebody denies what we use, or uses what we deny.
    let theirs = uses.iter().map(|n| DENIED + n).chain(denies.iter().map(|n| USED + n));

    let fail =
        |source: io::Error| OpenError::Io { path: path.to_owned(), doing: "locking the image", source };
    // First ours, then a look: of two processes at the same time at least one sees the other.
    for byte in ours.clone() {
        match ofd::lock_shared(fd.as_fd(), byte) {
            Ok(()) => {}
            // Someone has an exclusive lock there: not QEMU, but it wants to be alone.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                release(fd, ours).map_err(fail)?;
                return Err(busy(fd, path, writing));
            }
            Err(e) => return Err(fail(e)),
        }
    }
    for byte in theirs {
        if ofd::is_locked(fd.as_fd(), byte).map_err(fail)? {
            release(fd, ours).map_err(fail)?;
            return Err(busy(fd, path, writing));
        }
    }
    Ok(())
}

fn release(fd: &OwnedFd, mut bytes: impl Iterator<Item = i64>) -> io::Result<()> {
    bytes.try_for_each(|byte| ofd::unlock(fd.as_fd(), byte))
}

fn busy(fd: &OwnedFd, path: &Path, writing: bool) -> OpenError {
    OpenError::Busy { path: path.to_owned(), holders: holder::holders(fd), writing }
}
