//! The engine on `io_uring`.
#![allow(unsafe_code, reason = "the kernel takes raw pointers; soundness: see the parent module")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use io_uring::squeue::Entry;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, opcode};

use super::{Action, Job};

/// Operations handed over at once; more wait in a queue of ours.
const ENTRIES: u32 = 128;
/// The completion of the poll on the bell.
const BELL: u64 = u64::MAX;

pub(super) struct Ring {
    ring: IoUring,
    bell: RawFd,
    /// Whether a poll on the bell is with the kernel.
    listening: bool,
    /// What found no room in the ring.
    backlog: VecDeque<Entry>,
}

impl Ring {
    /// A ring, tried out: seccomp profiles and old kernels refuse it in several ways.
    pub(super) fn new(bell: &OwnedFd) -> io::Result<Self> {
        let ring = IoUring::builder().setup_clamp().build(ENTRIES)?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::PollAdd::CODE,
        ];
        if !needed.iter().all(|&code| probe.is_supported(code)) || !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self { ring, bell: bell.as_raw_fd(), listening: false, backlog: VecDeque::new() })
    }

    /// Queues `job`, which must stay where it is until its completion was reaped.
    pub(super) fn start(&mut self, index: usize, job: &Job) {
        let fd = Fd(job.fd.as_raw_fd());
        let entry = match &job.action {
            Action::Read { offset, memory } => {
                opcode::Readv::new(fd, memory.list.as_ptr().cast(), count(memory.list.len()))
                    .offset(*offset)
                    .build()
            }
            Action::Write { offset, memory } => {
                opcode::Writev::new(fd, memory.list.as_ptr().cast(), count(memory.list.len()))
                    .offset(*offset)
                    .build()
            }
            // On a socket these take or give what there is, and wait in the kernel without a thread.
            Action::Receive { memory } => {
                opcode::Readv::new(fd, memory.list.as_ptr().cast(), count(memory.list.len())).build()
            }
            Action::Send { memory } => {
                opcode::Writev::new(fd, memory.list.as_ptr().cast(), count(memory.list.len())).build()
            }
            Action::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            Action::Allocate { mode, offset, length } => {
                opcode::Fallocate::new(fd, *length).offset(*offset).mode(*mode).build()
            }
            // Threads do it ([`Action::needs_thread`]).
            Action::Discard { .. } => opcode::Nop::new().build(),
        };
        self.backlog.push_back(entry.user_data(index as u64));
    }

    fn fill(&mut self) {
        if !self.listening {
            let events = u32::from(libc::POLLIN.unsigned_abs());
            self.backlog.push_front(opcode::PollAdd::new(Fd(self.bell), events).build().user_data(BELL));
            self.listening = true;
        }
        let mut queue = self.ring.submission();
        while let Some(entry) = self.backlog.front() {
            // SAFETY: the memory and descriptors of the entry belong to a job that lives in its slot until
            // the completion is reaped (or to the bell, which outlives the ring).
            if unsafe { queue.push(entry) }.is_err() {
                break;
            }
            self.backlog.pop_front();
        }
    }

    /// Submits and reaps; returns whether the bell's descriptor is readable.
    pub(super) fn wait(
        &mut self,
        block: bool,
        done: &mut Vec<(usize, io::Result<usize>)>,
    ) -> io::Result<bool> {
        self.fill();
        let want = usize::from(block && self.ring.completion().is_empty());
        match self.ring.submit_and_wait(want) {
            Ok(_) => {}
            // EBUSY: completions must be reaped first. EINTR, EAGAIN: the caller comes back.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EINTR | libc::EAGAIN)) => {}
            Err(e) => return Err(e),
        }
        let mut readable = false;
        for completion in self.ring.completion() {
            if completion.user_data() == BELL {
                self.listening = false;
                readable = true;
                continue;
            }
            let result = completion.result();
            let result = usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result));
            if let Ok(index) = usize::try_from(completion.user_data()) {
                done.push((index, result));
            }
        }
        Ok(readable)
    }
}

/// A list's length, which `MAX_VECTORS` bounds.
fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
