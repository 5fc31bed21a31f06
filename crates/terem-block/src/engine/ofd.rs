//! Byte-range locks that belong to an open file (`F_OFD_SETLK`, fcntl(2)).
#![allow(unsafe_code, reason = "fcntl takes a raw pointer to a structure of the caller's")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

fn request(kind: i32, byte: i64) -> libc::flock {
    // SAFETY: plain integers, all zeroes is a valid value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).unwrap_or(0);
    lock.l_whence = i16::try_from(libc::SEEK_SET).unwrap_or(0);
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn call(fd: impl AsFd, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: the structure is valid for the call, which keeps no pointer to it.
        if unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), command, std::ptr::from_mut(lock)) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Takes a shared lock on one byte, without waiting.
pub(crate) fn lock_shared(fd: impl AsFd, byte: i64) -> io::Result<()> {
    call(fd, libc::F_OFD_SETLK, &mut request(libc::F_RDLCK, byte))
}

/// Gives a byte's lock back.
pub(crate) fn unlock(fd: impl AsFd, byte: i64) -> io::Result<()> {
    call(fd, libc::F_OFD_SETLK, &mut request(libc::F_UNLCK, byte))
}

/// Whether another open file has any lock on the byte.
pub(crate) fn is_locked(fd: impl AsFd, byte: i64) -> io::Result<bool> {
    let mut lock = request(libc::F_WRLCK, byte);
    call(fd, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}
