//! The engine on a pool of threads with blocking calls; and work for the CPU, whichever engine does the I/O.
#![allow(unsafe_code, reason = "preadv and pwritev take raw pointers; soundness: see the parent module")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::{Action, Bell, Job};

/// Most threads of one disk. Blocking calls wait for storage, so more than CPUs make sense.
pub(super) const MAX_THREADS: usize = 8;

/// Gives up the contents of a range of a block device: `_IO(0x12, 119)` of `linux/fs.h`.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// Work for the CPU.
pub(super) type Compute = Box<dyn FnOnce() + Send>;

/// What a thread does.
pub(super) enum Work {
    Io(Box<Job>),
    Compute(Compute),
}

#[derive(Default)]
struct Queues {
    todo: VecDeque<(usize, Work)>,
    done: Vec<(usize, io::Result<usize>)>,
    idle: usize,
    stop: bool,
}

struct Shared {
    queues: Mutex<Queues>,
    more: Condvar,
    bell: Arc<Bell>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        // No code panics while it holds the lock.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    max: usize,
}

impl Pool {
    /// A pool of up to `max` threads, none of which is there yet.
    pub(super) fn new(bell: Arc<Bell>, max: usize) -> Self {
        let shared = Shared { queues: Mutex::default(), more: Condvar::new(), bell };
        Self { shared: Arc::new(shared), threads: Vec::new(), max }
    }

    /// Queues `work`, and starts a thread for it if all are busy.
    pub(super) fn start(&mut self, index: usize, work: Work) {
        let mut queues = self.shared.lock();
        queues.todo.push_back((index, work));
        let crowded = queues.idle < queues.todo.len() && self.threads.len() < self.max;
        drop(queues);
        if crowded {
            let shared = Arc::clone(&self.shared);
            match std::thread::Builder::new().name("disk-io".into()).spawn(move || serve(&shared)) {
                Ok(thread) => self.threads.push(thread),
                Err(error) if self.threads.is_empty() => {
                    // Nobody else will do it: slow but right.
                    tracing::warn!(%error, "no thread for disk I/O, doing it on the disk's own");
                    let mut queues = self.shared.lock();
                    while let Some((index, work)) = queues.todo.pop_front() {
                        queues.done.push((index, carry_out(work)));
                    }
                    self.shared.bell.ring();
                }
                Err(_) => {}
            }
        }
        self.shared.more.notify_one();
    }

    /// Takes what is done.
    pub(super) fn collect(&self, done: &mut Vec<(usize, io::Result<usize>)>) {
        done.append(&mut self.shared.lock().done);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn carry_out(work: Work) -> io::Result<usize> {
    match work {
        Work::Io(job) => perform(&job),
        // A panic must not take the answer with it: somebody waits for that.
        Work::Compute(compute) => std::panic::catch_unwind(std::panic::AssertUnwindSafe(compute))
            .map(|()| 0)
            .map_err(|_| io::Error::other("a worker thread panicked")),
    }
}

fn serve(shared: &Shared) {
    let mut queues = shared.lock();
    loop {
        if let Some((index, work)) = queues.todo.pop_front() {
            drop(queues);
            let result = carry_out(work);
            queues = shared.lock();
            queues.done.push((index, result));
            shared.bell.ring();
        } else if queues.stop {
            return;
        } else {
            queues.idle += 1;
            queues = shared.more.wait(queues).unwrap_or_else(PoisonError::into_inner);
            queues.idle -= 1;
        }
    }
}

/// Carries out `job` with blocking calls.
fn perform(job: &Job) -> io::Result<usize> {
    let fd = job.fd.as_raw_fd();
    let result = match &job.action {
        Action::Read { offset, memory } => {
            let (list, count) = (memory.list.as_ptr().cast(), count(memory.list.len()));
            // SAFETY: the list and the memory that it names are owned by the job.
            unsafe { libc::preadv(fd, list, count, position(*offset)?) }
        }
        Action::Write { offset, memory } => {
            let (list, count) = (memory.list.as_ptr().cast(), count(memory.list.len()));
            // SAFETY: as above.
            unsafe { libc::pwritev(fd, list, count, position(*offset)?) }
        }
        // The engine has its own place for them: they would take all threads.
        Action::Receive { .. } | Action::Send { .. } => return Err(io::ErrorKind::Unsupported.into()),
        Action::Sync => return Ok(rustix::fs::fdatasync(&job.fd).map(|()| 0)?),
        Action::Allocate { mode, offset, length } => {
            let mode = rustix::fs::FallocateFlags::from_bits_retain(mode.unsigned_abs());
            return Ok(rustix::fs::fallocate(&job.fd, mode, *offset, *length).map(|()| 0)?);
        }
        Action::Discard { offset, length } => {
            let range = [*offset, *length];
            // SAFETY: this request reads two numbers of 64 bits, which live until it returns.
            let result = unsafe { libc::ioctl(fd, BLKDISCARD, range.as_ptr()) };
            isize::try_from(result).unwrap_or(-1)
        }
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn count(len: usize) -> i32 {
    i32::try_from(len).unwrap_or(i32::MAX)
}

fn position(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}
