use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::{AlignedBuffer, CreateOptions, Disk, Format, IoError, OpenOptions};

const SECOND: u64 = 1_000_000_000;

/// Members that always have as many requests under way or waiting as their depth says.
struct Busy {
    group: Group<u64>,
    now: u64,
    /// Depth, direction, bytes of a request.
    members: Vec<(usize, Direction, u64)>,
    /// Requests that each has carried out.
    done: Vec<u64>,
}

impl Busy {
    fn new(limits: ThrottleLimits, members: Vec<(usize, Direction, u64)>) -> Self {
        limits.check().unwrap();
        let done = vec![0; members.len()];
        let mut busy = Self { group: Group::new(limits, 0), now: 0, members, done };
        for _ in 0..busy.members.len() {
            busy.group.join();
        }
        busy.fill();
        busy
    }

    /// Every member submits until its depth is reached. What goes at once is done at once.
    fn fill(&mut self) {
        for number in 0..self.members.len() {
            let (depth, direction, bytes) = self.members[number];
            while self.group.waiting(number) < depth {
                if self.group.enter(number, direction, bytes, self.now, bytes).is_some() {
                    self.done[number] += 1;
                }
            }
        }
    }

    fn run_until(&mut self, end: u64) {
        loop {
            let (gone, next) = self.group.advance(self.now);
            if gone.is_empty() {
                let next = next.unwrap();
                assert!(next > self.now, "the timer would spin");
                if next >= end {
                    self.now = end;
                    return;
                }
                self.now = next;
            }
            for (number, _) in gone {
                self.group.handed_over(number);
                self.done[number] += 1;
                self.fill();
            }
        }
    }
}

fn operations(total: Rate) -> ThrottleLimits {
    ThrottleLimits { operations: Rates { total, ..Rates::default() }, ..ThrottleLimits::default() }
}

fn bytes(total: Rate) -> ThrottleLimits {
    ThrottleLimits { bytes: Rates { total, ..Rates::default() }, ..ThrottleLimits::default() }
}

proptest! {
    /// In the long run exactly the rate, whatever the sizes; at first what the bucket holds besides.
    #[test]
    fn rates_are_kept(
        rate in 1_000u64..1_000_000,
        burst in prop::option::of((1u64..5, 1u64..4)),
        size in 512u64..200_000,
        depth in 1usize..40,
        seconds in 1u64..60,
    ) {
        let mut limit = Rate::new(rate);
        if let Some((factor, length)) = burst {
            limit.max = rate * factor;
            limit.seconds = length;
        }
        // As many seconds more as one request takes.
        let end = (seconds + size / rate * 3) * SECOND;
        let mut busy = Busy::new(bytes(limit), vec![(depth, Direction::Write, size)]);
        busy.run_until(end);
        let bucket = if limit.max == 0 { rate / 10 } else { limit.max * limit.seconds };
        let (done, leaked) = (u128::from(busy.done[0] * size), u128::from(rate) * u128::from(end) / u128::from(SECOND));
        prop_assert!(done <= leaked + u128::from(bucket + size), "{done} bytes, {leaked} and {bucket} are allowed");
        if limit.seconds == 1 {
            prop_assert!(done + u128::from(size) >= leaked, "{done} bytes, {leaked} are allowed");
        }
    }
}

/// The example of QEMU's document: 100 a second, bursts of 2000 a second for 60 seconds.
#[test]
fn a_long_burst() {
    let limit = Rate { average: 100, max: 2000, seconds: 60 };
    let mut busy = Busy::new(operations(limit), vec![(32, Direction::Read, 4096)]);
    // A tenth of a second's worth at once, and then the burst's rate.
    assert_eq!(busy.done[0], 201);
    let mut done_in = |seconds: u64| {
        let before = busy.done[0];
        busy.run_until(busy.now + seconds * SECOND);
        busy.done[0] - before
    };
    assert!((1999..=2001).contains(&done_in(1)));
    for _ in 1..60 {
        assert!((1999..=2001).contains(&done_in(1)));
    }
    // What leaked out meanwhile lets it last three seconds more.
    assert!((5900..=6400).contains(&done_in(4)));
    for _ in 64..100 {
        assert!((99..=101).contains(&done_in(1)));
    }
}

#[test]
fn a_burst_at_once_and_again_after_rest() {
    let limit = Rate { average: 100, max: 500, seconds: 1 };
    let mut group = Group::new(operations(limit), 0);
    let member = group.join();
    let mut at_once = |now| {
        let mut count = 0;
        while group.enter(member, Direction::Read, 4096, now, ()).is_some() {
            count += 1;
        }
        group.release(member);
        count
    };
    // The last one goes while the bucket is full to the brim, and not over it.
    assert_eq!(at_once(0), 501);
    assert_eq!(at_once(SECOND / 100), 0);
    // 502 or 503 were accounted: 5.03 seconds later all has leaked out.
    assert_eq!(at_once(6 * SECOND), 501);
}

#[test]
fn large_operations_count_as_several() {
    let mut limits = operations(Rate::new(1000));
    limits.operation_size = 4096;
    for (size, milliseconds) in [(512, 1.0), (4096, 1.0), (6144, 1.5), (8192, 2.0), (1 << 20, 256.0)] {
        let mut busy = Busy::new(limits, vec![(4, Direction::Read, size)]);
        busy.run_until(SECOND);
        let before = busy.done[0];
        busy.run_until(101 * SECOND);
        let took = 100_000.0 / (busy.done[0] - before) as f64;
        assert!((took / milliseconds - 1.0).abs() < 0.01, "{size}: {took}");
    }
}

#[test]
fn everybody_in_a_group_gets_the_same() {
    for limits in [operations(Rate::new(300)), bytes(Rate::new(300 * 4096))] {
        let members = [1, 8, 64].map(|depth| (depth, Direction::Read, 4096));
        let mut busy = Busy::new(limits, members.to_vec());
        busy.run_until(SECOND);
        let before = busy.done.clone();
        busy.run_until(101 * SECOND);
        for (done, before) in busy.done.iter().zip(&before) {
            assert!((9_999..=10_001).contains(&(done - before)), "{:?} {before:?}", busy.done);
        }
    }
}

#[test]
fn reads_and_writes() {
    // Together: half each.
    let members = || vec![(8, Direction::Read, 4096), (8, Direction::Write, 4096)];
    let mut busy = Busy::new(operations(Rate::new(100)), members());
    busy.run_until(100 * SECOND);
    assert!(
        // What the bucket held at first went to the first of them.
        (4_990..=5_015).contains(&busy.done[0]) && (4_990..=5_010).contains(&busy.done[1]),
        "{:?}",
        busy.done
    );
    // Each its own.
    let rates = Rates { read: Rate::new(300), write: Rate::new(10), ..Rates::default() };
    let limits = ThrottleLimits { operations: rates, ..ThrottleLimits::default() };
    let mut busy = Busy::new(limits, members());
    busy.run_until(100 * SECOND);
    assert!(
        (30_000..=30_040).contains(&busy.done[0]) && (1_000..=1_010).contains(&busy.done[1]),
        "{:?}",
        busy.done
    );
}

#[test]
fn what_is_let_go_is_accounted() {
    let mut group = Group::new(operations(Rate::new(10)), 0);
    let (a, b) = (group.join(), group.join());
    for number in 0..50 {
        group.enter(a, Direction::Write, 1, 0, number);
    }
    let waiting = group.waiting(a);
    assert_eq!(group.release(a), Vec::from_iter(50 - waiting..50));
    assert_eq!(group.waiting(a), 0);
    // 50 at 10 a second, one of them in the bucket.
    assert!(group.enter(b, Direction::Write, 1, SECOND, 99).is_none());
    let (gone, next) = group.advance(SECOND);
    assert_eq!((gone, next), (vec![], Some(49 * SECOND / 10)));
    assert_eq!(group.advance(5 * SECOND).0, [(b, 99)]);
    // A member that left makes room for another one.
    group.leave(a);
    assert_eq!((group.join(), group.join()), (a, 2));
}

#[test]
fn limits_that_contradict_each_other() {
    let each = Rates { total: Rate::new(1), read: Rate::new(1), ..Rates::default() };
    let rate = |average, max, seconds| bytes(Rate { average, max, seconds });
    for (limits, name) in [
        (ThrottleLimits { bytes: each, ..ThrottleLimits::default() }, "bps"),
        (ThrottleLimits { operations: each, ..ThrottleLimits::default() }, "iops"),
        (rate(0, 5, 1), "bps"),
        (rate(5, 4, 1), "bps"),
        (rate(5, 6, 0), "bps"),
        (rate(5, 0, 2), "bps"),
        (rate(5, 1 << 40, 1 << 40), "bps"),
        (rate(u64::MAX, 0, 1), "bps"),
        (ThrottleLimits { operation_size: 4096, ..bytes(Rate::new(5)) }, "iops-size"),
    ] {
        assert_eq!(ThrottleGroup::new(limits).unwrap_err().name, name, "{limits:?}");
    }
    assert!(ThrottleGroup::new(rate(5, 6, 2)).is_ok());
}

/// A raw disk of 1 MiB with limits.
fn throttled(limits: ThrottleLimits) -> (tempfile::TempDir, Arc<Disk>, ThrottleGroup, Throttled) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.raw");
    let create = CreateOptions { format: Format::Raw, size: Some(1 << 20), ..CreateOptions::default() };
    crate::create(&path, &create).unwrap();
    let options = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    let disk = Arc::new(Disk::open(&path, &options).unwrap());
    let group = ThrottleGroup::new(limits).unwrap();
    let throttled = Throttled::new(Arc::clone(&disk) as _, &group);
    (dir, disk, group, throttled)
}

fn write(offset: u64) -> Op {
    Op::Write { offset, memory: Arc::new(AlignedBuffer::from_slice(&[7; 4096])) }
}

/// Submits `count` writes; counts those that have ended well.
fn submit(disk: &Throttled, count: usize) -> Arc<AtomicUsize> {
    let ended = Arc::new(AtomicUsize::new(0));
    for number in 0..count {
        let ended = Arc::clone(&ended);
        disk.submit(Request::new(write(number as u64 % 256 * 4096), move |result| {
            assert_eq!(result, Ok(()));
            ended.fetch_add(1, Ordering::SeqCst);
        }));
    }
    ended
}

/// One operation in 1000 seconds: all but the first wait for ever.
fn nearly_never() -> ThrottleLimits {
    bytes(Rate::new(4))
}

#[test]
fn flushes_do_not_wait_and_the_end_lets_all_go() {
    let (_dir, disk, group, throttled) = throttled(nearly_never());
    let ended = submit(&throttled, 100);
    assert_eq!(throttled.waiting(), 99);
    let (tell, told) = channel();
    let tell_flush = tell.clone();
    throttled.submit(Request::new(Op::Flush, move |result| drop(tell_flush.send(result))));
    assert_eq!(told.recv().unwrap(), Ok(()));
    assert_eq!(throttled.waiting(), 99);
    // A second disk of the group waits as well, until it is closed.
    let second = Throttled::new(Arc::clone(&disk) as _, &group);
    let ended_second = submit(&second, 10);
    assert_eq!(second.waiting(), 10);
    drop(second);
    disk.drain();
    assert_eq!((ended_second.load(Ordering::SeqCst), throttled.waiting()), (10, 99));
    throttled.drain();
    assert_eq!((ended.load(Ordering::SeqCst), throttled.waiting()), (100, 0));
    // What was let go so is paid for.
    let ended = submit(&throttled, 3);
    assert_eq!(throttled.waiting(), 3);
    drop(throttled);
    disk.drain();
    assert_eq!(ended.load(Ordering::SeqCst), 3);
}

#[test]
fn requests_of_a_disk_that_was_closed_meanwhile() {
    let (_dir, disk, _group, throttled) = throttled(nearly_never());
    let (tell, told) = channel();
    for _ in 0..5 {
        let tell = tell.clone();
        throttled.submit(Request::new(write(0), move |result| drop(tell.send(result))));
    }
    assert_eq!(told.recv().unwrap(), Ok(()));
    disk.flush_and_close().unwrap();
    drop(throttled);
    for _ in 0..4 {
        assert_eq!(told.recv().unwrap(), Err(IoError::Closed));
    }
}

/// Only that nothing goes too early: how late it may be, this machine decides.
#[test]
fn the_clock_of_the_host() {
    let (_dir, _disk, _group, throttled) = throttled(operations(Rate::new(1000)));
    let begun = Instant::now();
    let (tell, told) = channel();
    for _ in 0..401 {
        let tell = tell.clone();
        throttled.submit(Request::new(write(0), move |result| drop(tell.send(result))));
    }
    for _ in 0..401 {
        assert_eq!(told.recv().unwrap(), Ok(()));
    }
    // 101 go at once.
    assert!(begun.elapsed() >= Duration::from_millis(299), "{:?}", begun.elapsed());
    assert_eq!(throttled.waiting(), 0);
}

/// Many threads, reads and writes, drains in between: every request ends once.
#[test]
fn from_many_threads() {
    let (_dir, _disk, group, first) = throttled(operations(Rate { average: 2000, max: 4000, seconds: 2 }));
    let disks = [first, Throttled::new(_disk.clone() as _, &group)];
    let ended: [_; 2] = std::array::from_fn(|_| AtomicUsize::new(0));
    let ended = Arc::new(ended);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (disk, ended) = (&disks[thread % 2], Arc::clone(&ended));
            scope.spawn(move || {
                for number in 0..100_u64 {
                    let op = if number % 3 == 0 {
                        Op::Read { offset: 0, memory: Arc::new(AlignedBuffer::from_slice(&[0; 512])) }
                    } else {
                        write(number * 4096)
                    };
                    let ended = Arc::clone(&ended);
                    disk.submit(Request::new(op, move |result| {
                        assert_eq!(result, Ok(()));
                        ended[thread % 2].fetch_add(1, Ordering::SeqCst);
                    }));
                    if number % 40 == 39 {
                        disk.drain();
                    }
                }
            });
        }
    });
    for (disk, ended) in disks.iter().zip(&*ended) {
        disk.drain();
        assert_eq!(ended.load(Ordering::SeqCst), 200);
    }
}
