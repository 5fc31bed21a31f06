//! Sockets where there is no `io_uring`: `poll(2)` on the engine's own thread.
#![allow(unsafe_code, reason = "recvmsg and sendmsg take raw pointers; soundness: see the parent module")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};

use super::{Action, Job};

/// Jobs on sockets that wait for their peers.
#[derive(Default)]
pub(super) struct Sockets {
    waiting: Vec<(usize, Box<Job>)>,
    /// Whether there are new ones that may be ready at once.
    fresh: bool,
}

impl Sockets {
    pub(super) fn start(&mut self, index: usize, job: Box<Job>) {
        self.waiting.push((index, job));
        self.fresh = true;
    }

    /// Does what can be done; with `block` sleeps until there is something, or `bell` is readable, which it returns.
    pub(super) fn wait(
        &mut self,
        bell: &OwnedFd,
        block: bool,
        done: &mut Vec<(usize, io::Result<usize>)>,
    ) -> io::Result<bool> {
        if std::mem::take(&mut self.fresh) {
            self.perform(done, |_| true);
        }
        if self.waiting.is_empty() && !block {
            return Ok(false);
        }
        let mut fds = vec![PollFd::new(bell, PollFlags::IN)];
        for (_, job) in &self.waiting {
            let wanted = match job.action {
                Action::Send { .. } => PollFlags::OUT,
                _ => PollFlags::IN,
            };
            fds.push(PollFd::new(&*job.fd, wanted));
        }
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = if block && done.is_empty() { None } else { Some(&now) };
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        let readable = !fds[0].revents().is_empty();
        let ready: Vec<bool> = fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect();
        self.perform(done, |i| ready[i]);
        Ok(readable)
    }

    /// Tries those that `which` says may be ready.
    fn perform(&mut self, done: &mut Vec<(usize, io::Result<usize>)>, which: impl Fn(usize) -> bool) {
        let mut i = 0;
        self.waiting.retain(|(index, job)| {
            let try_it = which(i);
            i += 1;
            if !try_it {
                return true;
            }
            match transfer(&job.fd, &job.action) {
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => true,
                result => {
                    done.push((*index, result));
                    false
                }
            }
        });
    }
}

/// Sends what a socket has room for at once: mostly all of it, and then without a way through the kernel and back.
pub(crate) fn send_now(fd: &OwnedFd, action: &Action) -> io::Result<usize> {
    transfer(fd, action)
}

/// Receives or sends what is possible without waiting.
fn transfer(fd: &OwnedFd, action: &Action) -> io::Result<usize> {
    let fd = fd.as_raw_fd();
    // SAFETY: integers and null pointers, all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let result = match action {
        Action::Receive { memory } => {
            (message.msg_iov, message.msg_iovlen) =
                (memory.list.as_ptr().cast_mut().cast(), memory.list.len());
            // SAFETY: the list, which is only read, and the memory that it names are owned by the action, which
            // outlives the call.
            unsafe { libc::recvmsg(fd, &raw mut message, flags) }
        }
        Action::Send { memory } => {
            (message.msg_iov, message.msg_iovlen) =
                (memory.list.as_ptr().cast_mut().cast(), memory.list.len());
            // SAFETY: as above.
            unsafe { libc::sendmsg(fd, &raw const message, flags) }
        }
        _ => return Err(io::ErrorKind::Unsupported.into()),
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
