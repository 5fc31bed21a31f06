//! The thread that moves frames between the rings and the backend.
//!
//! ```text
//!   loop: send what is in TX, deliver what the backend has into RX, then sleep until
//!         a notification or a change of the driver      (the wake descriptor)
//!         a frame to receive, while RX has room for it  (the backend's descriptor, readable)
//!         room to send, while a frame waits for it      (the backend's descriptor, writable)
//! ```

use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use terem_bus::locked;
use terem_net::{MAX_FRAME, MIN_FRAME, NetBackend, Offloads, Transmit, VNET_HEADER_LEN, VnetHeader};

use super::super::device::Queues;
use super::super::queue::{Queue, QueueError, Token};
use super::{Driver, F_MRG_RXBUF, KIND, RX, TX};

/// Frames moved in one direction before the other one gets its turn.
const BATCH: usize = 64;

/// What the device and its thread share.
pub(super) struct Shared {
    pub(super) backend: Arc<dyn NetBackend>,
    pub(super) driver: Mutex<Driver>,
    running: Mutex<Running>,
    wake: OwnedFd,
    stop: AtomicBool,
    /// The carrier's state that the driver knows of.
    link_up: AtomicBool,
}

/// The driver's queues while it runs, and how often that has changed.
#[derive(Debug, Default)]
struct Running {
    queues: Option<Arc<Queues>>,
    life: u64,
}

/// The thread's own.
struct Worker {
    /// Room for the header in guest form, then a frame.
    received: Vec<u8>,
    /// A frame in `received` that waits for a buffer.
    pending: Option<(VnetHeader, usize)>,
    sending: Vec<u8>,
    life: u64,
}

/// What a direction waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// Nothing: there may be more to do.
    Not,
    /// The guest: buffers, frames, or the queue to run at all.
    Driver,
    /// The backend.
    Backend,
}

impl Shared {
    pub(super) fn new(backend: Arc<dyn NetBackend>, driver: Driver) -> std::io::Result<Self> {
        Ok(Self {
            link_up: AtomicBool::new(backend.link_up()),
            backend,
            driver: Mutex::new(driver),
            running: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            stop: AtomicBool::new(false),
        })
    }

    pub(super) fn queues(&self) -> Option<Arc<Queues>> {
        locked(&self.running).queues.clone()
    }

    pub(super) fn set_queues(&self, queues: Option<Arc<Queues>>) {
        // Whatever the driver reads from now on is no older than this.
        self.link_up.store(self.backend.link_up(), Ordering::Release);
        let mut running = locked(&self.running);
        running.queues = queues;
        running.life += 1;
        drop(running);
        self.wake();
    }

    pub(super) fn set_receive_offloads(&self, agreed: Offloads) {
        if let Err(e) = self.backend.set_receive_offloads(agreed) {
            tracing::warn!(
                device = KIND.name,
                "{}: offloads stay as they were: {e}",
                self.backend.description()
            );
        }
    }

    /// Makes the thread look at everything.
    pub(super) fn wake(&self) {
        // Only a counter at its end refuses, and that wakes too.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    /// The thread.
    pub(super) fn run(&self) {
        let mut worker = Worker {
            received: vec![0; VNET_HEADER_LEN + MAX_FRAME],
            pending: None,
            sending: vec![0; MAX_FRAME],
            life: 0,
        };
        while !self.stop.load(Ordering::Acquire) {
            let (queues, life) = {
                let running = locked(&self.running);
                (running.queues.clone(), running.life)
            };
            if worker.life != life {
                worker.life = life;
                // A frame for an earlier driver is not for this one.
                worker.pending = None;
            }
            let (mut sends, mut receives) = (Wait::Driver, Wait::Driver);
            if let Some(queues) = queues {
                sends = worker.send(self, &queues);
                receives = worker.receive(self, &queues);
                self.watch_link(&queues);
            }
            self.sleep(sends, receives);
        }
    }

    fn watch_link(&self, queues: &Queues) {
        let link_up = self.backend.link_up();
        if self.link_up.swap(link_up, Ordering::AcqRel) != link_up {
            queues.config_changed();
        }
    }

    fn sleep(&self, sends: Wait, receives: Wait) {
        if sends == Wait::Not || receives == Wait::Not {
            return;
        }
        let mut events = PollFlags::empty();
        if receives == Wait::Backend {
            events |= PollFlags::IN;
        }
        if sends == Wait::Backend || self.backend.has_unsent() {
            events |= PollFlags::OUT;
        }
        let backend = self.backend.poll_fd().filter(|_| !events.is_empty() && self.backend.link_up());
        let wake = PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN);
        let outcome = match backend {
            Some(fd) => poll(&mut [wake, PollFd::from_borrowed_fd(fd, events)], None),
            None => poll(&mut [wake], None),
        };
        if let Err(e) = outcome
            && e != Errno::INTR
        {
            tracing::error!(device = KIND.name, "poll failed: {e}");
        }
        // Empty unless somebody woke the thread: what they wanted is looked at next.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }
}

impl Worker {
    /// Sends what the driver has made available.
    fn send(&mut self, shared: &Shared, queues: &Queues) -> Wait {
        if shared.backend.has_unsent() && shared.backend.flush().is_err() {
            // The link is down now, which is noticed later: frames are dropped from here on.
            tracing::debug!(device = KIND.name, "{} is gone", shared.backend.description());
        }
        queues.with(TX, |queue| self.send_from(shared, queue)).unwrap_or(Wait::Driver)
    }

    fn send_from(&mut self, shared: &Shared, queue: &mut Queue) -> Result<Wait, QueueError> {
        queue.disable_notifications()?;
        for _ in 0..BATCH {
            let mark = queue.mark();
            let Some(chain) = queue.pop()? else {
                return Ok(if queue.enable_notifications()? { Wait::Not } else { Wait::Driver });
            };
            let mut header = [0; VNET_HEADER_LEN];
            let got = chain.readable.read(queue.memory(), 0, &mut header)?;
            let length = chain.readable.len().saturating_sub(VNET_HEADER_LEN as u64);
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            if got == VNET_HEADER_LEN && (MIN_FRAME..=MAX_FRAME).contains(&length) {
                let frame = &mut self.sending[..length];
                chain.readable.read(queue.memory(), VNET_HEADER_LEN as u64, frame)?;
                if Self::transmit(shared, &header, frame) == Transmit::Busy {
                    queue.rewind(mark);
                    return Ok(Wait::Backend);
                }
            } else {
                tracing::debug!(device = KIND.name, length, "a frame that cannot be: dropped");
            }
            queue.publish(&[(chain.token, 0)])?;
        }
        Ok(Wait::Not)
    }

    fn transmit(shared: &Shared, header: &[u8; VNET_HEADER_LEN], frame: &[u8]) -> Transmit {
        let header = match VnetHeader::from_bytes(header) {
            Ok(header) => header,
            Err(e) => {
                tracing::debug!(device = KIND.name, "frame dropped: {e}");
                return Transmit::Taken;
            }
        };
        shared.backend.transmit(&header, &[IoSlice::new(frame)]).unwrap_or_else(|e| {
            tracing::debug!(device = KIND.name, "frame lost: {e}");
            Transmit::Taken
        })
    }

    /// Delivers what the backend has.
    fn receive(&mut self, shared: &Shared, queues: &Queues) -> Wait {
        queues.with(RX, |queue| self.receive_into(shared, queue)).unwrap_or(Wait::Driver)
    }

    fn receive_into(&mut self, shared: &Shared, queue: &mut Queue) -> Result<Wait, QueueError> {
        queue.disable_notifications()?;
        for _ in 0..BATCH {
            if self.pending.is_none() {
                match shared.backend.receive(&mut self.received[VNET_HEADER_LEN..]) {
                    Ok(Some(got)) => {
                        let length = got.length.min(MAX_FRAME);
                        let frame = &self.received[VNET_HEADER_LEN..VNET_HEADER_LEN + length];
                        if !locked(&shared.driver).accepts(frame) {
                            continue;
                        }
                        self.pending = Some((got.header, length));
                    }
                    Ok(None) => return Ok(Wait::Backend),
                    Err(e) => {
                        tracing::debug!(device = KIND.name, "nothing more to receive: {e}");
                        return Ok(Wait::Driver);
                    }
                }
            }
            let Some((header, length)) = self.pending else { continue };
            let merge = locked(&shared.driver).has(F_MRG_RXBUF);
            if !self.deliver(queue, &header, length, merge)? {
                return Ok(Wait::Driver);
            }
            self.pending = None;
        }
        Ok(Wait::Not)
    }

    /// Puts the frame in `received` into the guest's buffers; false when there are too few, and the
    /// driver was asked to say when there are more.
    fn deliver(
        &mut self,
        queue: &mut Queue,
        header: &VnetHeader,
        length: usize,
        merge: bool,
    ) -> Result<bool, QueueError> {
        let needed = (VNET_HEADER_LEN + length) as u64;
        let mark = queue.mark();
        let (mut chains, mut room) = (Vec::new(), 0);
        while room < needed && (merge || chains.is_empty()) {
            if queue.in_flight() >= queue.size() {
                break;
            }
            let Some(chain) = queue.pop()? else {
                // Asked for from here on, behind the buffers that are too few: the driver would not
                // speak of those again.
                if queue.enable_notifications()? {
                    continue;
                }
                queue.rewind(mark);
                return Ok(false);
            };
            room += chain.writable.len();
            chains.push(chain);
        }
        if room < needed {
            // Buffers as small as that never hold it: the frame is lost, the buffers are not.
            tracing::debug!(device = KIND.name, length, "no receive buffer is large enough: frame dropped");
            queue.rewind(mark);
            return Ok(true);
        }
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        self.received[..VNET_HEADER_LEN].copy_from_slice(&header.to_bytes(count));
        let mut rest = &self.received[..VNET_HEADER_LEN + length];
        let mut used: Vec<(Token, u32)> = Vec::with_capacity(chains.len());
        for chain in &chains {
            let written = chain.writable.write(queue.memory(), 0, rest)?;
            rest = &rest[written..];
            used.push((chain.token, u32::try_from(written).unwrap_or(0)));
        }
        queue.publish(&used)?;
        Ok(true)
    }
}
