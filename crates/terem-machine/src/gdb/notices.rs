//! What the machine tells the debugger.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use rustix::event::{EventfdFlags, eventfd};
use terem_bus::locked;
use terem_cpu::DebugEvent;

/// Something that the debugger should know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Notice {
    /// A vCPU stopped, in this run (as numbered by [`crate::handle::DebugRequest::Run`]). The machine is held.
    Stopped {
        /// The run.
        run: u64,
        /// The vCPU.
        vcpu: u32,
        /// Why.
        event: DebugEvent,
    },
    /// The machine is over.
    Ended,
}

/// A queue of them, with a descriptor that can be polled. Telling never waits.
#[derive(Debug)]
pub(crate) struct Notices {
    queue: Mutex<VecDeque<Notice>>,
    wake: OwnedFd,
}

impl Notices {
    pub(crate) fn new() -> std::io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { queue: Mutex::default(), wake })
    }

    pub(crate) fn tell(&self, notice: Notice) {
        locked(&self.queue).push_back(notice);
        // The counter is nowhere near its limit.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// The oldest, if there is one.
    pub(crate) fn next(&self) -> Option<Notice> {
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        let mut queue = locked(&self.queue);
        let next = queue.pop_front();
        if !queue.is_empty() {
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
        next
    }
}

impl AsFd for Notices {
    /// Readable while there is something to be told.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
