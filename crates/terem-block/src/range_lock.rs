//! Locks on ranges of numbers between the tasks of one thread: many shared holders or one exclusive holder
//! of each number, in the order in which they asked (so nobody waits forever).

use std::cell::RefCell;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

#[derive(Debug)]
struct Claim {
    id: u64,
    range: Range<u64>,
    exclusive: bool,
    granted: bool,
    waker: Option<Waker>,
}

impl Claim {
    fn conflicts(&self, other: &Self) -> bool {
        (self.exclusive || other.exclusive)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }
}

#[derive(Debug, Default)]
struct State {
    /// In the order of arrival.
    claims: Vec<Claim>,
    next_id: u64,
    waiting: usize,
}

/// Locks on ranges.
#[derive(Debug, Default)]
pub(crate) struct RangeLock(RefCell<State>);

impl RangeLock {
    /// Others may hold the range shared too.
    pub(crate) fn shared(&self, range: Range<u64>) -> Acquire<'_> {
        self.acquire(range, false)
    }

    /// Nobody else may hold any part of the range.
    pub(crate) fn exclusive(&self, range: Range<u64>) -> Acquire<'_> {
        self.acquire(range, true)
    }

    /// Used as a plain mutex.
    pub(crate) fn all(&self) -> Acquire<'_> {
        self.acquire(0..u64::MAX, true)
    }

    fn acquire(&self, range: Range<u64>, exclusive: bool) -> Acquire<'_> {
        let mut state = self.0.borrow_mut();
        let id = state.next_id;
        state.next_id += 1;
        let mut claim = Claim { id, range, exclusive, granted: false, waker: None };
        claim.granted = !state.claims.iter().any(|earlier| earlier.conflicts(&claim));
        state.waiting += usize::from(!claim.granted);
        state.claims.push(claim);
        Acquire { lock: self, id, guard_made: false }
    }

    fn release(&self, id: u64) {
        let mut state = self.0.borrow_mut();
        if let Some(at) = state.claims.iter().position(|claim| claim.id == id) {
            let claim = state.claims.remove(at);
            state.waiting -= usize::from(!claim.granted);
        }
        if state.waiting == 0 {
            return;
        }
        for i in 0..state.claims.len() {
            let (earlier, rest) = state.claims.split_at_mut(i);
            let claim = &mut rest[0];
            if !claim.granted && !earlier.iter().any(|e| e.conflicts(claim)) {
                claim.granted = true;
                if let Some(waker) = claim.waker.take() {
                    waker.wake();
                }
                state.waiting -= 1;
            }
        }
    }
}

/// Waits for its turn.
pub(crate) struct Acquire<'a> {
    lock: &'a RangeLock,
    id: u64,
    guard_made: bool,
}

impl<'a> Future for Acquire<'a> {
    type Output = RangeGuard<'a>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let lock = self.lock;
        let mut state = lock.0.borrow_mut();
        let id = self.id;
        match state.claims.iter_mut().find(|claim| claim.id == id) {
            Some(claim) if !claim.granted => {
                claim.waker = Some(cx.waker().clone());
                Poll::Pending
            }
            _ => {
                self.guard_made = true;
                Poll::Ready(RangeGuard { lock, id })
            }
        }
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        if !self.guard_made {
            self.lock.release(self.id);
        }
    }
}

/// The range is ours until this is dropped.
#[derive(Debug)]
pub(crate) struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.release(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;

    fn ready<'a>(acquire: Pin<&mut Acquire<'a>>) -> Option<RangeGuard<'a>> {
        match acquire.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(guard) => Some(guard),
            Poll::Pending => None,
        }
    }

    #[test]
    fn conflicts_wait_in_order() {
        let lock = RangeLock::default();
        let a = ready(pin!(lock.shared(0..10))).expect("free");
        let b = ready(pin!(lock.shared(5..15))).expect("shared with a");
        let mut writer = pin!(lock.exclusive(12..20));
        assert!(ready(writer.as_mut()).is_none(), "b is there");
        let mut late = pin!(lock.shared(12..13));
        assert!(ready(late.as_mut()).is_none(), "the writer asked first");
        let other = ready(pin!(lock.exclusive(20..21))).expect("touches nobody");
        drop((a, other));
        assert!(ready(writer.as_mut()).is_none());
        drop(b);
        let held = ready(writer.as_mut()).expect("free now");
        assert!(ready(late.as_mut()).is_none());
        drop(held);
        assert!(ready(late.as_mut()).is_some());
    }

    #[test]
    fn giving_up_lets_others_through() {
        let lock = RangeLock::default();
        let a = ready(pin!(lock.shared(0..1))).expect("free");
        let mut late = pin!(lock.shared(0..1));
        {
            let mut writer = pin!(lock.all());
            assert!(ready(writer.as_mut()).is_none());
            late.set(lock.shared(0..1));
            assert!(ready(late.as_mut()).is_none());
        }
        assert!(ready(late.as_mut()).is_some());
        drop(a);
    }
}
