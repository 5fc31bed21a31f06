//! Carries out file I/O: on `io_uring`, or on a pool of threads where the host refuses it.
//!
//! The only module with `unsafe` code in this crate: the kernel takes raw pointers to memory that must stay
//! valid until an operation has ended. What makes it sound: a [`Job`] owns (shares of) the descriptor and
//! of all the memory it names, and sits in a slot of the engine, not in the future that waits for it,
//! until the kernel or the worker thread is done with it, even when the future is dropped.
//!
//! ```text
//!  task ──run(job)──> slot ──> ring / queue ──> kernel / worker thread
//!   ^                  |                              |
//!   └──── waker ───────┴───────── result <────────────┘   reaped by wait(), on the same thread as the tasks
//! ```

mod now;
mod sockets;
mod threads;
mod uring;
mod vectors;

use std::cell::{RefCell, RefMut};
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

pub(crate) use now::Now;
pub(crate) use sockets::send_now;
pub(crate) use vectors::{Vectors, View};

use crate::{AioEngine, OpenError};

pub(crate) mod ofd;

/// Wakes a sleeping engine from any thread.
///
/// Two flags save the system calls while the engine is awake. Either the ringer sees `asleep`, and writes to
/// the descriptor that ends the sleep; or the engine, which sets `asleep` before it looks at `rung`, sees
/// that and does not sleep.
#[derive(Debug)]
pub(crate) struct Bell {
    fd: OwnedFd,
    rung: AtomicBool,
    asleep: AtomicBool,
}

impl Bell {
    fn new() -> io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { fd, rung: AtomicBool::new(false), asleep: AtomicBool::new(false) })
    }

    /// Makes the current or the next sleep of the engine end.
    pub(crate) fn ring(&self) {
        self.rung.store(true, Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::SeqCst) {
            // It can only fail with EAGAIN, when the counter is full: then it is readable already.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    /// Whether to sleep: not if it rang since the last look.
    fn fall_asleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        !self.rung.load(Ordering::SeqCst)
    }

    /// After a sleep, `readable` says that the descriptor ended it. Returns whether it rang.
    fn wake_up(&self, readable: bool) -> bool {
        self.asleep.store(false, Ordering::SeqCst);
        if readable {
            let _ = rustix::io::read(&self.fd, &mut [0; 8]);
        }
        self.rung.swap(false, Ordering::SeqCst)
    }
}

/// What is to be done to a file.
#[derive(Debug)]
pub(crate) enum Action {
    /// Reads into memory; the result is the number of bytes.
    Read { offset: u64, memory: Vectors },
    /// Writes from memory; the result is the number of bytes.
    Write { offset: u64, memory: Vectors },
    /// `fdatasync`.
    Sync,
    /// `fallocate` with these mode bits.
    Allocate { mode: i32, offset: u64, length: u64 },
    /// `BLKDISCARD` of a block device: whole sectors.
    Discard { offset: u64, length: u64 },
    /// Takes what a stream socket has, and waits until it has something; the result is the number of bytes, 0 at the
    /// peer's end. The socket is in blocking mode.
    Receive { memory: Vectors },
    /// Gives a stream socket what it has room for, and waits until it has some; the result is the number of bytes.
    Send { memory: Vectors },
}

impl Action {
    /// Moves it on by so many bytes of the file.
    pub(crate) fn shift(&mut self, by: u64) {
        match self {
            Self::Read { offset, .. }
            | Self::Write { offset, .. }
            | Self::Allocate { offset, .. }
            | Self::Discard { offset, .. } => {
                *offset = offset.saturating_add(by);
            }
            Self::Sync | Self::Receive { .. } | Self::Send { .. } => {}
        }
    }

    /// Whether it waits for a peer, for as long as that likes.
    fn is_socket(&self) -> bool {
        matches!(self, Self::Receive { .. } | Self::Send { .. })
    }

    /// Whether a ring cannot do it.
    fn needs_thread(&self) -> bool {
        matches!(self, Self::Discard { .. })
    }
}

/// An operation with all that it needs to stay alive.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) fd: Arc<OwnedFd>,
    pub(crate) action: Action,
}

#[derive(Debug)]
enum Slot {
    Free,
    /// With the kernel or a worker. The job is here unless a worker (or the list of sockets) has it.
    Flying {
        job: Option<Box<Job>>,
        waker: Option<Waker>,
    },
    /// Nobody waits for it any more, but its memory may still be written.
    Abandoned {
        job: Option<Box<Job>>,
    },
    Done(io::Result<usize>),
}

/// An I/O engine. It belongs to one thread: futures of [`Self::run`] make progress in [`Self::wait`].
pub(crate) struct Engine {
    slots: RefCell<Vec<Slot>>,
    /// Free slots.
    free: RefCell<Vec<usize>>,
    ring: Option<RefCell<uring::Ring>>,
    pool: RefCell<threads::Pool>,
    /// Sockets, without a ring.
    sockets: RefCell<sockets::Sockets>,
    bell: Arc<Bell>,
    /// Told whenever the bell rang.
    on_bell: RefCell<Option<Waker>>,
    /// Tasks for the executor that runs over this engine.
    spawned: RefCell<Vec<Spawned>>,
}

/// A task of its own.
pub(crate) type Spawned = Pin<Box<dyn Future<Output = ()>>>;

impl Engine {
    /// An engine of the given kind.
    ///
    /// # Errors
    /// [`OpenError::NoIoUring`] when it was asked for and is refused; [`OpenError::Thread`] when the host
    /// is out of descriptors.
    pub(crate) fn new(kind: AioEngine) -> Result<Rc<Self>, OpenError> {
        let bell = Arc::new(Bell::new().map_err(OpenError::Thread)?);
        let ring = match kind {
            AioEngine::Threads => None,
            AioEngine::IoUring => Some(uring::Ring::new(&bell.fd).map_err(OpenError::NoIoUring)?),
            AioEngine::Auto => match uring::Ring::new(&bell.fd) {
                Ok(ring) => Some(ring),
                Err(error) => {
                    tracing::debug!(%error, "io_uring is not available, using threads");
                    None
                }
            },
        };
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads =
            if ring.is_some() { processors.min(threads::MAX_THREADS) } else { threads::MAX_THREADS };
        let pool = RefCell::new(threads::Pool::new(Arc::clone(&bell), threads));
        Ok(Rc::new(Self {
            slots: RefCell::default(),
            free: RefCell::default(),
            ring: ring.map(RefCell::new),
            pool,
            sockets: RefCell::default(),
            bell,
            on_bell: RefCell::default(),
            spawned: RefCell::default(),
        }))
    }

    /// What ends [`Self::wait`] from elsewhere.
    pub(crate) fn bell(&self) -> Arc<Bell> {
        Arc::clone(&self.bell)
    }

    /// The engine's name.
    pub(crate) fn kind(&self) -> AioEngine {
        if self.ring.is_some() { AioEngine::IoUring } else { AioEngine::Threads }
    }

    /// Starts a task of its own, for an image that has work besides its requests. It runs while the executor over this
    /// engine runs, and is dropped with that.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.spawned.borrow_mut().push(Box::pin(task));
    }

    /// The tasks started since the last call.
    pub(crate) fn take_spawned(&self) -> Vec<Spawned> {
        std::mem::take(&mut *self.spawned.borrow_mut())
    }

    /// Whether [`Self::take_spawned`] would give something.
    pub(crate) fn has_spawned(&self) -> bool {
        !self.spawned.borrow().is_empty()
    }

    /// Has `waker` woken the next time the bell rings.
    pub(crate) fn wake_on_bell(&self, waker: &Waker) {
        *self.on_bell.borrow_mut() = Some(waker.clone());
    }

    /// Starts `job`; the future ends with its result.
    pub(crate) fn run(self: &Rc<Self>, job: Job) -> Running {
        let (mut slots, index) = self.free_slot();
        let job = Box::new(job);
        let job = if let Some(ring) = self.ring.as_ref().filter(|_| !job.action.needs_thread()) {
            ring.borrow_mut().start(index, &job);
            Some(job)
        } else if job.action.is_socket() {
            self.sockets.borrow_mut().start(index, job);
            None
        } else {
            self.pool.borrow_mut().start(index, threads::Work::Io(job));
            None
        };
        slots[index] = Slot::Flying { job, waker: None };
        Running { engine: Rc::clone(self), index, finished: false }
    }

    /// Starts `work`, which takes long, on another thread; the future ends with it. What it owns lives until then,
    /// whatever becomes of the future.
    pub(crate) fn compute(self: &Rc<Self>, work: impl FnOnce() + Send + 'static) -> Running {
        let (mut slots, index) = self.free_slot();
        self.pool.borrow_mut().start(index, threads::Work::Compute(Box::new(work)));
        slots[index] = Slot::Flying { job: None, waker: None };
        Running { engine: Rc::clone(self), index, finished: false }
    }

    fn free_slot(&self) -> (RefMut<'_, Vec<Slot>>, usize) {
        let mut slots = self.slots.borrow_mut();
        let index = self.free.borrow_mut().pop().unwrap_or_else(|| {
            slots.push(Slot::Free);
            slots.len() - 1
        });
        (slots, index)
    }

    /// Hands started jobs to the kernel and collects what is done. With `block` it sleeps until there is
    /// something, or the bell rings.
    pub(crate) fn wait(&self, block: bool) -> io::Result<()> {
        let mut done = Vec::new();
        let block = block && self.bell.fall_asleep();
        let readable = if let Some(ring) = &self.ring {
            ring.borrow_mut().wait(block, &mut done)
        } else {
            self.sockets.borrow_mut().wait(&self.bell.fd, block, &mut done)
        };
        if self.bell.wake_up(*readable.as_ref().unwrap_or(&false)) {
            self.pool.borrow().collect(&mut done);
            if let Some(waker) = self.on_bell.borrow_mut().take() {
                waker.wake();
            }
        }
        readable?;
        for (index, result) in done {
            let mut slots = self.slots.borrow_mut();
            let Some(slot) = slots.get_mut(index) else { continue };
            match std::mem::replace(slot, Slot::Free) {
                Slot::Flying { waker, .. } => {
                    *slot = Slot::Done(result);
                    drop(slots);
                    if let Some(waker) = waker {
                        waker.wake();
                    }
                }
                Slot::Abandoned { .. } => self.free.borrow_mut().push(index),
                other => *slot = other,
            }
        }
        Ok(())
    }

    fn busy(&self) -> bool {
        self.slots
            .borrow()
            .iter()
            .any(|slot| matches!(slot, Slot::Flying { job: Some(_), .. } | Slot::Abandoned { job: Some(_) }))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // The kernel may still write to the memory of these jobs (worker threads own theirs).
        while self.busy() {
            if self.wait(true).is_err() {
                // Better to lose the memory than to free what the kernel writes to.
                std::mem::forget(std::mem::take(self.slots.get_mut()));
            }
        }
    }
}

/// A job under way.
pub(crate) struct Running {
    engine: Rc<Engine>,
    index: usize,
    finished: bool,
}

impl Future for Running {
    type Output = io::Result<usize>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let engine = Rc::clone(&self.engine);
        let mut slots = engine.slots.borrow_mut();
        let slot = &mut slots[self.index];
        match slot {
            Slot::Flying { waker, .. } => {
                *waker = Some(cx.waker().clone());
                Poll::Pending
            }
            Slot::Done(_) => {
                let taken = std::mem::replace(slot, Slot::Free);
                engine.free.borrow_mut().push(self.index);
                drop(slots);
                self.finished = true;
                match taken {
                    Slot::Done(result) => Poll::Ready(result),
                    _ => Poll::Ready(Err(io::ErrorKind::Other.into())),
                }
            }
            Slot::Free | Slot::Abandoned { .. } => Poll::Ready(Err(io::ErrorKind::Other.into())),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let mut slots = self.engine.slots.borrow_mut();
        let slot = &mut slots[self.index];
        *slot = match std::mem::replace(slot, Slot::Free) {
            Slot::Flying { job, .. } => Slot::Abandoned { job },
            _ => {
                self.engine.free.borrow_mut().push(self.index);
                Slot::Free
            }
        };
    }
}

#[cfg(test)]
mod tests;
