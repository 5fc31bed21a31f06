//! Virtual time and timers.
//!
//! A [`Clock`] counts nanoseconds of virtual time since the machine was made; it stands still while the
//! machine is paused. Timers fire on one thread of the clock, without any lock of the clock held, so a
//! callback may lock its device, and a device may arm timers while it is locked.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use crate::locked;

type Callback = Box<dyn Fn(u64) + Send + Sync>;

/// Nobody's deadline.
const IDLE: u64 = u64::MAX;

/// The flag in [`Shared::base`]; the times beside it are taken modulo 2^63 ns, which is 292 years.
const RUNNING: u64 = 1 << 63;

struct Shared {
    /// With [`RUNNING`]: real time (since `start`) minus virtual time. Without: virtual time. One word, so that a
    /// reader never sees half of a change.
    base: AtomicU64,
    start: Option<Instant>,
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    /// Deadline and timer; a timer that was armed anew has several entries, all but one out of date.
    heap: BinaryHeap<Reverse<(u64, u64)>>,
    timers: std::collections::HashMap<u64, Weak<Armed>>,
    next: u64,
    /// The deadline that the timer thread sleeps for: only an earlier one needs to wake it.
    sleeping_until: u64,
    thread: bool,
    end: bool,
}

struct Armed {
    id: u64,
    deadline: AtomicU64,
    fire: Callback,
}

/// Virtual time, in nanoseconds. Cheap to clone.
#[derive(Clone)]
pub struct Clock(Arc<Owner>);

/// Ends the timer thread when the last clock goes.
struct Owner(Arc<Shared>);

impl Drop for Owner {
    fn drop(&mut self) {
        locked(&self.0.queue).end = true;
        self.0.wake.notify_all();
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Clock({} ns)", self.now())
    }
}

impl Clock {
    /// A clock that runs with the host's monotonic clock, stopped at `start` ns until [`Self::resume`].
    #[must_use]
    pub fn system(start: u64) -> Self {
        Self::with(Some(Instant::now()), start)
    }

    /// A clock that moves only by [`Self::advance`], for tests.
    #[must_use]
    pub fn manual() -> Self {
        Self::with(None, 0)
    }

    fn with(start: Option<Instant>, now: u64) -> Self {
        Self(Arc::new(Owner(Arc::new(Shared {
            base: AtomicU64::new(now),
            start,
            queue: Mutex::new(Queue { sleeping_until: IDLE, ..Queue::default() }),
            wake: Condvar::new(),
        }))))
    }

    /// Nanoseconds of virtual time.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.0.0.now()
    }

    /// Lets time pass. Does nothing to a running or manual clock.
    pub fn resume(&self) {
        let s = &self.0.0;
        let mut queue = locked(&s.queue);
        let base = s.base.load(Ordering::Acquire);
        if let Some(real) = s.real()
            && base & RUNNING == 0
        {
            s.base.store(real.wrapping_sub(base) | RUNNING, Ordering::Release);
            if !queue.thread {
                queue.thread = true;
                let shared = Arc::clone(s);
                let started = std::thread::Builder::new().name("timer".into()).spawn(move || shared.run());
                if let Err(e) = started {
                    // A machine without timers would hang in odd places: say it where it is looked for.
                    tracing::error!("cannot start the timer thread: {e}");
                }
            }
            s.wake.notify_all();
        }
    }

    /// Stops time. Does nothing to a stopped or manual clock.
    pub fn pause(&self) {
        let s = &self.0.0;
        let _queue = locked(&s.queue);
        if s.base.load(Ordering::Acquire) & RUNNING != 0 {
            s.base.store(s.now(), Ordering::Release);
        }
    }

    /// Moves a manual clock (or a stopped one) on by `ns`, firing in order what comes due.
    pub fn advance(&self, ns: u64) {
        let s = &self.0.0;
        let target = s.now().saturating_add(ns);
        loop {
            let due = {
                let mut queue = locked(&s.queue);
                queue.first().filter(|&d| d <= target).map(|d| (d, queue.due(d)))
            };
            let Some((deadline, timers)) = due else { break };
            s.base.fetch_max(deadline, Ordering::AcqRel);
            for t in timers {
                (t.fire)(deadline);
            }
        }
        s.base.fetch_max(target, Ordering::AcqRel);
    }

    /// A timer that calls `fire` with the present time when its deadline has come. A call may still come
    /// after the timer was cancelled or armed anew, if it was under way: `fire` looks at its device's
    /// state, not at the fact that it was called. It should hold its device weakly.
    #[must_use]
    pub fn timer(&self, fire: impl Fn(u64) + Send + Sync + 'static) -> Timer {
        let mut queue = locked(&self.0.0.queue);
        let id = queue.next;
        queue.next += 1;
        let armed = Arc::new(Armed { id, deadline: AtomicU64::new(IDLE), fire: Box::new(fire) });
        queue.timers.insert(id, Arc::downgrade(&armed));
        Timer { armed, shared: Arc::clone(&self.0.0) }
    }
}

impl Shared {
    fn real(&self) -> Option<u64> {
        self.start.map(|s| u64::try_from(s.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn now(&self) -> u64 {
        match self.base.load(Ordering::Acquire) {
            base if base & RUNNING != 0 => self.real().unwrap_or(0).wrapping_sub(base) & !RUNNING,
            base => base,
        }
    }

    fn run(&self) {
        let mut queue = locked(&self.queue);
        while !queue.end {
            let running = self.base.load(Ordering::Acquire) & RUNNING != 0;
            let next = if running { queue.first() } else { None };
            let now = self.now();
            match next {
                Some(deadline) if deadline <= now => {
                    let timers = queue.due(now);
                    drop(queue);
                    for t in timers {
                        (t.fire)(now);
                    }
                    queue = locked(&self.queue);
                }
                Some(deadline) => {
                    queue.sleeping_until = deadline;
                    let sleep = Duration::from_nanos(deadline - now);
                    queue = match self.wake.wait_timeout(queue, sleep) {
                        Ok((guard, _)) => guard,
                        Err(poisoned) => poisoned.into_inner().0,
                    };
                }
                None => {
                    queue.sleeping_until = IDLE;
                    queue = self.wake.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
                }
            }
        }
    }
}

impl Queue {
    /// The earliest deadline that is still meant, dropping entries that are out of date.
    fn first(&mut self) -> Option<u64> {
        while let Some(&Reverse((deadline, id))) = self.heap.peek() {
            match self.timers.get(&id).and_then(Weak::upgrade) {
                Some(t) if t.deadline.load(Ordering::Acquire) == deadline => return Some(deadline),
                Some(_) => {}
                None => {
                    self.timers.remove(&id);
                }
            }
            self.heap.pop();
        }
        None
    }

    /// Takes out the timers that are due at `now`, disarming them.
    fn due(&mut self, now: u64) -> Vec<Arc<Armed>> {
        let mut due = Vec::new();
        while let Some(deadline) = self.first().filter(|&d| d <= now) {
            let Some(Reverse((_, id))) = self.heap.pop() else { break };
            if let Some(t) = self.timers.get(&id).and_then(Weak::upgrade)
                && t.deadline.compare_exchange(deadline, IDLE, Ordering::AcqRel, Ordering::Acquire).is_ok()
            {
                due.push(t);
            }
        }
        due
    }
}

/// One timer of a [`Clock`]; disarmed when dropped.
pub struct Timer {
    armed: Arc<Armed>,
    shared: Arc<Shared>,
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Timer({:?})", self.deadline())
    }
}

impl Timer {
    /// Fires once at virtual time `deadline` (ns), at once if that has passed; replaces what was armed.
    pub fn arm(&self, deadline: u64) {
        let deadline = deadline.min(IDLE - 1);
        if self.armed.deadline.swap(deadline, Ordering::AcqRel) == deadline {
            return;
        }
        let mut queue = locked(&self.shared.queue);
        queue.heap.push(Reverse((deadline, self.armed.id)));
        if deadline < queue.sleeping_until {
            queue.sleeping_until = deadline;
            self.shared.wake.notify_one();
        }
    }

    /// Disarms it.
    pub fn cancel(&self) {
        self.armed.deadline.store(IDLE, Ordering::Release);
    }

    /// The virtual time for which it is armed.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        Some(self.armed.deadline.load(Ordering::Acquire)).filter(|&d| d != IDLE)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        locked(&self.shared.queue).timers.remove(&self.armed.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    type Log = Arc<Mutex<Vec<(u32, u64)>>>;

    fn recorder(clock: &Clock, name: u32) -> (Timer, Log) {
        let log = Arc::new(Mutex::new(Vec::new()));
        let l = Arc::clone(&log);
        (clock.timer(move |now| locked(&l).push((name, now))), log)
    }

    #[test]
    fn a_manual_clock_fires_in_order_and_once() {
        let clock = Clock::manual();
        let (a, log) = recorder(&clock, 1);
        a.arm(100);
        a.arm(50);
        clock.advance(40);
        assert!(locked(&log).is_empty());
        clock.advance(100);
        assert_eq!(*locked(&log), [(1, 50)]);
        assert_eq!((clock.now(), a.deadline()), (140, None));
        a.arm(10);
        clock.advance(0);
        assert_eq!(locked(&log).len(), 2, "a deadline in the past fires at once");
        a.arm(200);
        a.cancel();
        clock.advance(1000);
        assert_eq!(locked(&log).len(), 2);
        // Armed again for the same deadline after a cancel: fires.
        a.arm(2000);
        a.cancel();
        a.arm(2000);
        clock.advance(1000);
        assert_eq!(locked(&log).len(), 3);
    }

    #[test]
    fn a_periodic_timer_rearms_itself_from_its_callback() {
        let clock = Clock::manual();
        let count = Arc::new(AtomicU64::new(0));
        let slot: Arc<Mutex<Option<Timer>>> = Arc::default();
        let (c, s) = (Arc::clone(&count), Arc::downgrade(&slot));
        *locked(&slot) = Some(clock.timer(move |now| {
            c.fetch_add(1, Ordering::Relaxed);
            if let Some(slot) = s.upgrade() {
                locked(&slot).as_ref().unwrap().arm(now + 10);
            }
        }));
        locked(&slot).as_ref().unwrap().arm(10);
        clock.advance(105);
        assert_eq!(count.load(Ordering::Relaxed), 10);
    }

    #[test]
    fn a_system_clock_fires_and_stands_still_while_paused() {
        let clock = Clock::system(5);
        assert_eq!(clock.now(), 5);
        let (tx, rx) = mpsc::channel();
        let t = clock.timer(move |now| tx.send(now).unwrap());
        t.arm(5_000_000);
        assert!(rx.recv_timeout(Duration::from_millis(30)).is_err(), "stopped clocks fire nothing");
        clock.resume();
        assert!(rx.recv_timeout(Duration::from_secs(20)).unwrap() >= 5_000_000);
        t.arm(clock.now() + 3_600_000_000_000);
        t.arm(clock.now() + 1_000_000);
        rx.recv_timeout(Duration::from_secs(20)).expect("an earlier deadline wakes the thread");
        clock.pause();
        let now = clock.now();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(clock.now(), now);
    }
}
