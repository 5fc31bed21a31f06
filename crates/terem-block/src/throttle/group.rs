//! A group's buckets and queues. Pure: time is a number that the caller gives.

use std::collections::VecDeque;

use super::bucket::{Bucket, SECOND};
use super::{Rates, ThrottleLimits};

/// Which way data goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

const BOTH: [Direction; 2] = [Direction::Read, Direction::Write];

/// Buckets of one kind of unit.
#[derive(Debug)]
struct Buckets {
    total: Bucket,
    each: [Bucket; 2],
}

impl Buckets {
    fn new(rates: Rates) -> Self {
        Self { total: Bucket::new(rates.total), each: [Bucket::new(rates.read), Bucket::new(rates.write)] }
    }

    fn leak(&mut self, nanoseconds: u64) {
        self.total.leak(nanoseconds);
        self.each.iter_mut().for_each(|bucket| bucket.leak(nanoseconds));
    }

    fn fill(&mut self, direction: Direction, amount: u128) {
        self.total.fill(amount);
        self.each[direction as usize].fill(amount);
    }

    fn wait(&self, direction: Direction) -> u64 {
        self.total.wait().max(self.each[direction as usize].wait())
    }
}

/// One disk of the group: what of it waits, with the bytes of each.
struct Member<T> {
    queues: [VecDeque<(u64, T)>; 2],
    /// Requests that [`Group::advance`] gave out and that are not with the backend yet.
    in_hand: usize,
}

/// Limits, and the requests `T` that wait for them.
pub(super) struct Group<T> {
    limits: ThrottleLimits,
    bytes: Buckets,
    operations: Buckets,
    /// By number; numbers of those that have left are taken again.
    members: Vec<Option<Member<T>>>,
    /// The member that had the last turn, in each direction.
    last: [usize; 2],
    /// Requests that wait, in each direction.
    waiting: [usize; 2],
    /// The direction that is first the next time both can go.
    first: usize,
    /// When the buckets leaked last.
    leaked: u64,
}

impl<T> Group<T> {
    pub(super) fn new(limits: ThrottleLimits, now: u64) -> Self {
        Self {
            limits,
            bytes: Buckets::new(limits.bytes),
            operations: Buckets::new(limits.operations),
            members: Vec::new(),
            last: [0; 2],
            waiting: [0; 2],
            first: 0,
            leaked: now,
        }
    }

    pub(super) fn limits(&self) -> ThrottleLimits {
        self.limits
    }

    /// A new member's number.
    pub(super) fn join(&mut self) -> usize {
        let number = self.members.iter().position(Option::is_none).unwrap_or(self.members.len());
        let member = Member { queues: [VecDeque::new(), VecDeque::new()], in_hand: 0 };
        if number == self.members.len() {
            self.members.push(Some(member));
        } else {
            self.members[number] = Some(member);
        }
        number
    }

    /// Forgets a member, which has nothing that waits.
    pub(super) fn leave(&mut self, number: usize) {
        self.members[number] = None;
    }

    /// Requests of a member that wait.
    pub(super) fn waiting(&self, number: usize) -> usize {
        self.member(number).map_or(0, |member| member.queues.iter().map(VecDeque::len).sum())
    }

    /// Requests that wait in one direction.
    pub(super) fn waiting_in(&self, direction: Direction) -> usize {
        self.waiting[direction as usize]
    }

    /// Requests of a member that were given out and are not handed over.
    pub(super) fn in_hand(&self, number: usize) -> usize {
        self.member(number).map_or(0, |member| member.in_hand)
    }

    /// One that was given out is with the backend.
    pub(super) fn handed_over(&mut self, number: usize) {
        if let Some(Some(member)) = self.members.get_mut(number) {
            member.in_hand = member.in_hand.saturating_sub(1);
        }
    }

    fn member(&self, number: usize) -> Option<&Member<T>> {
        self.members.get(number)?.as_ref()
    }

    /// A member wants to do something: it may at once and gets it back, or it waits.
    pub(super) fn enter(
        &mut self,
        number: usize,
        direction: Direction,
        bytes: u64,
        now: u64,
        item: T,
    ) -> Option<T> {
        self.leak(now);
        let way = direction as usize;
        if self.waiting[way] == 0 && self.wait(direction) == 0 {
            self.account(direction, bytes);
            self.last[way] = number;
            return Some(item);
        }
        let Some(Some(member)) = self.members.get_mut(number) else { return Some(item) };
        member.queues[way].push_back((bytes, item));
        self.waiting[way] += 1;
        None
    }

    /// Gives out, with their members, the requests whose time has come; and says when the next one's comes.
    pub(super) fn advance(&mut self, now: u64) -> (Vec<(usize, T)>, Option<u64>) {
        self.leak(now);
        let mut gone = Vec::new();
        loop {
            let before = gone.len();
            // Reads and writes take turns where they share a bucket.
            for way in [self.first, 1 - self.first] {
                let direction = BOTH[way];
                if self.waiting[way] > 0 && self.wait(direction) == 0 {
                    gone.extend(self.take_next(direction));
                    self.first = 1 - way;
                }
            }
            if gone.len() == before {
                break;
            }
        }
        let next = BOTH
            .into_iter()
            .filter(|&direction| self.waiting[direction as usize] > 0)
            .map(|direction| now.saturating_add(self.wait(direction)))
            .min();
        (gone, next)
    }

    /// Takes the oldest request of the next member whose turn it is.
    fn take_next(&mut self, direction: Direction) -> Option<(usize, T)> {
        let (way, count) = (direction as usize, self.members.len());
        for step in 1..=count {
            let number = (self.last[way] + step) % count;
            let Some(member) = &mut self.members[number] else { continue };
            let Some((bytes, item)) = member.queues[way].pop_front() else { continue };
            member.in_hand += 1;
            self.last[way] = number;
            self.waiting[way] -= 1;
            self.account(direction, bytes);
            return Some((number, item));
        }
        None
    }

    /// Takes out all that waits of a member, reads before writes. It is accounted.
    pub(super) fn release(&mut self, number: usize) -> Vec<T> {
        let mut released = Vec::new();
        for direction in BOTH {
            let way = direction as usize;
            let Some(Some(member)) = self.members.get_mut(number) else { continue };
            let queue = std::mem::take(&mut member.queues[way]);
            self.waiting[way] -= queue.len();
            for (bytes, item) in queue {
                self.account(direction, bytes);
                released.push(item);
            }
        }
        released
    }

    fn leak(&mut self, now: u64) {
        let passed = now.saturating_sub(self.leaked);
        self.leaked = self.leaked.max(now);
        self.bytes.leak(passed);
        self.operations.leak(passed);
    }

    fn wait(&self, direction: Direction) -> u64 {
        self.bytes.wait(direction).max(self.operations.wait(direction))
    }

    fn account(&mut self, direction: Direction, bytes: u64) {
        let (amount, piece) = (u128::from(bytes) * SECOND, u128::from(self.limits.operation_size));
        self.bytes.fill(direction, amount);
        let operations = amount.checked_div(piece).unwrap_or(0);
        self.operations.fill(direction, operations.max(SECOND));
    }
}
