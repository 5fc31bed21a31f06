//! Limits on what a disk may do in a second: bytes and operations, with bursts, for one disk or a group of disks.
//!
//! ```text
//!  submit ──> has it to wait? ──no──────────────────────────────> the backend
//!                 │ yes                                               ▲
//!                 └─> queue of this disk and direction ──timer thread─┘   one thread a group, only when one waits
//! ```
//!
//! The meaning of every value is that of QEMU's throttle filter and groups (its `docs/throttle.txt`). Reads and writes
//! have queues of their own; write-zeroes and discards count as writes, flushes pass. A request goes out when no bucket
//! that it falls into is over its brim, however large it is, and is accounted then: the next ones wait for it.

mod bucket;
mod group;
mod limits;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{BlockBackend, Geometry, Op, Request};
use group::{Direction, Group};
pub use limits::{Rate, Rates, ThrottleError, ThrottleLimits};

/// A request and whom it is for.
type Held = (Arc<dyn BlockBackend>, Request);

struct State {
    group: Group<Held>,
    /// Whether the timer thread runs.
    ticking: bool,
    /// Nobody can submit any more.
    ended: bool,
}

struct Shared {
    state: Mutex<State>,
    /// Told when the timer must think again, and when requests have left the timer thread's hands.
    changed: Condvar,
    began: Instant,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The timer thread: lets requests go when their time has come.
    fn tick(&self) {
        let mut state = self.lock();
        while !state.ended {
            let (gone, next) = state.group.advance(self.now());
            if gone.is_empty() {
                state = match next {
                    Some(at) => {
                        let pause = Duration::from_nanos(at.saturating_sub(self.now()));
                        self.changed.wait_timeout(state, pause).unwrap_or_else(PoisonError::into_inner).0
                    }
                    None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                };
                continue;
            }
            drop(state);
            let members: Vec<_> = gone.iter().map(|(member, _)| *member).collect();
            for (_, (backend, request)) in gone {
                backend.submit(request);
            }
            state = self.lock();
            for member in members {
                state.group.handed_over(member);
            }
            self.changed.notify_all();
        }
    }
}

/// Disks that share one set of limits; every disk in it gets its turn. Clones are the same group.
#[derive(Clone)]
pub struct ThrottleGroup(Arc<Owner>);

impl fmt::Debug for ThrottleGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ThrottleGroup").field(&self.limits()).finish()
    }
}

/// Ends the timer thread with the last user of the group.
struct Owner(Arc<Shared>);

impl Drop for Owner {
    fn drop(&mut self) {
        // Not joined: this may be that very thread.
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

impl ThrottleGroup {
    /// A group without disks.
    ///
    /// # Errors
    /// [`ThrottleError`] when limits contradict each other.
    pub fn new(limits: ThrottleLimits) -> Result<Self, ThrottleError> {
        limits.check()?;
        let state = State { group: Group::new(limits, 0), ticking: false, ended: false };
        let shared = Shared { state: Mutex::new(state), changed: Condvar::new(), began: Instant::now() };
        Ok(Self(Arc::new(Owner(Arc::new(shared)))))
    }

    /// The limits.
    #[must_use]
    pub fn limits(&self) -> ThrottleLimits {
        self.0.0.lock().group.limits()
    }
}

/// A disk with limits. It delays requests; it takes them without waiting, and no thread waits for one of them.
///
/// [`BlockBackend::drain`] and dropping it let everything go at once that still waits, as QEMU does: who wants to close
/// a disk must not wait for hours. What went out so is accounted all the same, so a guest that resets its device gains
/// nothing.
pub struct Throttled {
    backend: Arc<dyn BlockBackend>,
    group: ThrottleGroup,
    member: usize,
}

impl fmt::Debug for Throttled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Throttled")
            .field("group", &self.group)
            .field("member", &self.member)
            .finish_non_exhaustive()
    }
}

impl Throttled {
    /// Puts `backend` under the limits of `group`.
    #[must_use]
    pub fn new(backend: Arc<dyn BlockBackend>, group: &ThrottleGroup) -> Self {
        let member = group.0.0.lock().group.join();
        Self { backend, group: group.clone(), member }
    }

    /// Requests of this disk that wait for their time.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared().lock().group.waiting(self.member)
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.group.0.0
    }

    /// Lets everything go that waits.
    fn release(&self) {
        let released = self.shared().lock().group.release(self.member);
        for (backend, request) in released {
            backend.submit(request);
        }
    }
}

/// Which buckets an operation falls into; `None` for those that have no limit.
fn direction(op: &Op) -> Option<Direction> {
    match op {
        Op::Read { .. } => Some(Direction::Read),
        Op::Write { .. } | Op::Discard { .. } | Op::WriteZeroes { .. } => Some(Direction::Write),
        Op::Flush => None,
    }
}

impl BlockBackend for Throttled {
    fn geometry(&self) -> Geometry {
        self.backend.geometry()
    }

    fn submit(&self, request: Request) {
        let Some(direction) = direction(&request.op) else { return self.backend.submit(request) };
        let (shared, bytes) = (self.shared(), request.op.range().1);
        let held = (Arc::clone(&self.backend), request);
        let mut state = shared.lock();
        if let Some((backend, request)) = state.group.enter(self.member, direction, bytes, shared.now(), held)
        {
            drop(state);
            return backend.submit(request);
        }
        if !state.ticking {
            let timer = Arc::clone(shared);
            let started = std::thread::Builder::new().name("throttle".into()).spawn(move || timer.tick());
            match started {
                Ok(_) => state.ticking = true,
                Err(error) => {
                    drop(state);
                    tracing::warn!(%error, "no thread that could delay requests: they go at once");
                    return self.release();
                }
            }
        }
        // Where others wait already, the timer knows when to wake up.
        let alone = state.group.waiting_in(direction) == 1;
        drop(state);
        if alone {
            shared.changed.notify_all();
        }
    }

    fn drain(&self) {
        self.release();
        let shared = self.shared();
        let mut state = shared.lock();
        while state.group.in_hand(self.member) > 0 {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.backend.drain();
    }
}

impl Drop for Throttled {
    fn drop(&mut self) {
        self.release();
        self.shared().lock().group.leave(self.member);
    }
}
