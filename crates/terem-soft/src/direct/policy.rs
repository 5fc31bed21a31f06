//! Which programs run directly: those that compute for long between two entries into their kernel.
//!
//! Going into a process and back costs some 10 µs, mapping a page a few more. Translated code costs nothing of the kind, but is
//! two to eight times slower than the processor itself. So a program begins in translated code, and whoever is met by three timer
//! interrupts in a row with few entries in between is moved; and back, for a while, if it stops too often there.

use std::collections::HashMap;

/// Nanoseconds between two entries into the kernel above which a translated program is moved.
const LONG: u64 = 30_000;
/// Nanoseconds that going there and back costs beside the shortest run: state is taken over, instructions are interpreted.
const AROUND: u64 = 5_000;
/// Interrupts that have to find a program so.
const TIMES: u32 = 3;
/// Interrupts further apart say nothing.
const APART: u64 = 40_000_000;
/// Stops after which it is looked how far apart they were.
const WINDOW: u32 = 128;
/// Windows in which pages are mapped and nothing is judged.
const GRACE: u32 = 1;
/// Nanoseconds before a program that was moved back is looked at again: the first time, and at most.
const BACK_OFF: (u64, u64) = (50_000_000, 3_200_000_000);
/// Programs that are remembered.
const MOST: usize = 256;

/// What is known of a program, by its CR3.
#[derive(Debug, Clone, Copy, Default)]
struct Record {
    direct: bool,
    score: u32,
    /// Not before this time.
    not_before: u64,
    back_off: u64,
    grace: u32,
    stops: u32,
    /// Nanoseconds in the process, in this window.
    spent: u64,
}

/// The decisions of one vCPU.
#[derive(Debug)]
pub(super) struct Policy {
    always: bool,
    records: HashMap<u64, Record>,
    /// At the last interrupt: time, entries so far, program.
    last: (u64, u64, u64),
    direct: usize,
    /// Nanoseconds of the shortest runs.
    shortest: u64,
}

impl Policy {
    /// `always`: all programs run directly.
    pub(super) fn new(always: bool) -> Self {
        Self { always, records: HashMap::new(), last: (0, 0, 0), direct: 0, shortest: 20_000 }
    }

    /// Whether the program runs directly.
    pub(super) fn is_direct(&self, root: u64) -> bool {
        self.always || self.direct != 0 && self.records.get(&root).is_some_and(|r| r.direct)
    }

    /// A timer interrupt meets a program in translated code; `entries`: how often a kernel was entered so far.
    pub(super) fn interrupted(&mut self, root: u64, now: u64, entries: u64) {
        let (time, before, program) = std::mem::replace(&mut self.last, (now, entries, root));
        if program != root || now.wrapping_sub(time) > APART {
            return;
        }
        if self.records.len() >= MOST && !self.records.contains_key(&root) {
            self.records.clear();
            self.direct = 0;
        }
        let r = self.records.entry(root).or_default();
        let long = now.wrapping_sub(time) / entries.wrapping_sub(before).max(1) >= LONG;
        r.score = if long { r.score + 1 } else { 0 };
        if r.score >= TIMES && !r.direct && now >= r.not_before {
            *r = Record { direct: true, grace: GRACE, back_off: r.back_off, ..Record::default() };
            self.direct += 1;
        }
    }

    /// A program that runs directly has stopped, after so many nanoseconds.
    pub(super) fn stopped(&mut self, root: u64, now: u64, spent: u64) {
        // The shortest run is one that got nothing done: what it takes is the price of each. It may become dearer.
        self.shortest = if spent < self.shortest { spent } else { self.shortest + (self.shortest >> 10) + 1 };
        let shortest = self.shortest;
        if let Some(r) = self.records.get_mut(&root).filter(|r| r.direct) {
            r.stops += 1;
            r.spent += spent;
            if r.stops >= WINDOW {
                // Translated, the program would take two to three times what it computes here.
                let price = u64::from(r.stops) * (shortest + AROUND);
                let computed = r.spent.saturating_sub(u64::from(r.stops) * shortest);
                let worth_it = computed + computed / 2 > price;
                (r.stops, r.spent) = (0, 0);
                if r.grace > 0 {
                    r.grace -= 1;
                } else if worth_it {
                    r.back_off /= 2;
                } else {
                    self.move_back(root, now);
                }
            }
        }
    }

    /// The program is translated again, for a while.
    pub(super) fn move_back(&mut self, root: u64, now: u64) {
        if let Some(r) = self.records.get_mut(&root).filter(|r| r.direct) {
            let back_off = (r.back_off * 2).clamp(BACK_OFF.0, BACK_OFF.1);
            *r = Record { not_before: now + back_off, back_off, ..Record::default() };
            self.direct -= 1;
        }
    }

    /// This CR3 is another program's now.
    pub(super) fn forget(&mut self, root: u64) {
        if self.records.remove(&root).is_some_and(|r| r.direct) {
            self.direct -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn moved() -> Policy {
        let mut policy = Policy::new(false);
        for tick in 0..4 {
            assert!(!policy.is_direct(7));
            policy.interrupted(7, tick * 4 * MS, tick * 10);
        }
        assert!(policy.is_direct(7) && !policy.is_direct(8));
        policy
    }

    #[test]
    fn who_computes_is_moved_and_who_calls_is_not() {
        moved();
        let mut policy = Policy::new(false);
        for tick in 0..100 {
            policy.interrupted(7, tick * 4 * MS, tick * 1000);
        }
        assert!(!policy.is_direct(7));
    }

    #[test]
    fn who_stops_often_goes_back_and_is_tried_again_later() {
        let mut policy = moved();
        let mut now = 20 * MS;
        for _ in 0..WINDOW * (GRACE + 1) {
            assert!(policy.is_direct(7));
            now += 16_000;
            policy.stopped(7, now, 8_000);
        }
        assert!(!policy.is_direct(7));
        let since = now;
        for _ in 0..1000 {
            now += 4 * MS;
            policy.interrupted(7, now, 0);
            if policy.is_direct(7) {
                break;
            }
        }
        assert!(policy.is_direct(7) && now - since >= BACK_OFF.0);
    }

    #[test]
    fn who_stops_seldom_stays() {
        let mut policy = moved();
        for i in 0..10_000 {
            // A run of nothing now and then.
            policy.stopped(7, i * 100_000, if i % 100 == 0 { 8_000 } else { 90_000 });
        }
        assert!(policy.is_direct(7));
    }
}
