//! The planner of a copy.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::reading::{largest_packed, parts};
use super::target::Target;
use super::worker::Worker;
use super::{Copying, Pace, Progress, request};
use crate::executor::LocalFuture;
use crate::node::Node;
use crate::{BlockBackend, Extent, ExtentKind, IoError, OpenError};

/// Bytes of a window, unless a cluster of the target is larger.
const WINDOW: u64 = 1 << 20;
/// Bytes whose status is asked for at once.
const LOOK_AHEAD: u64 = 256 << 20;
/// Windows that wait for a worker.
const QUEUE: usize = 64;
/// How often progress is told.
const TICK: Duration = Duration::from_millis(100);

/// A part of the disk, and what is in it (all of it, in order).
pub(super) struct Window {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) extents: Vec<Extent>,
}

/// What planner and workers share.
#[derive(Default)]
pub(super) struct Shared {
    queue: Mutex<Queue>,
    /// There is a window, or no more will come.
    more: Condvar,
    /// There is room for windows, or a worker has ended.
    room: Condvar,
    stop: AtomicBool,
    /// Bytes done by workers.
    pub(super) done: AtomicU64,
    /// Held by the worker that writes to the target's file.
    pub(super) writing: Mutex<()>,
}

#[derive(Default)]
struct Queue {
    windows: VecDeque<Window>,
    /// Workers that wait for a window.
    waiting: usize,
    /// Workers that have not ended.
    workers: usize,
    ended: bool,
    failed: Option<OpenError>,
}

/// A worker; it has ended when this is dropped, in whichever way.
pub(super) struct Ended<'a>(&'a Shared);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.lock().workers -= 1;
        self.0.room.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be kept by a worker while it works.
    pub(super) fn worker_ends(&self) -> Ended<'_> {
        Ended(self)
    }

    /// The next window to work on, once there is one.
    pub(super) fn next(&self) -> Option<Window> {
        let mut queue = self.lock();
        loop {
            if let Some(window) = self.take(&mut queue) {
                return Some(window);
            }
            if queue.ended || self.stop.load(Ordering::Relaxed) {
                return None;
            }
            queue.waiting += 1;
            queue = self.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.waiting -= 1;
        }
    }

    /// The next window to work on, if there is one now.
    pub(super) fn next_if_any(&self) -> Option<Window> {
        self.take(&mut self.lock())
    }

    fn take(&self, queue: &mut Queue) -> Option<Window> {
        if self.stop.load(Ordering::Relaxed) {
            return None;
        }
        // Not for each: the planner makes many at once.
        if queue.windows.len() == QUEUE / 2 {
            self.room.notify_all();
        }
        queue.windows.pop_front()
    }

    /// Ends the copy with an error, if it has none yet.
    pub(super) fn fail(&self, error: OpenError) {
        self.lock().failed.get_or_insert(error);
        self.stop();
    }

    fn stop(&self) {
        // With the lock: nobody is then between looking at it and going to sleep.
        let _queue = self.lock();
        self.stop.store(true, Ordering::Relaxed);
        self.more.notify_all();
        self.room.notify_all();
    }

    /// Puts a window in when there is room; false when the copy has ended.
    fn put(&self, window: Window, tick: &mut dyn FnMut() -> bool) -> bool {
        let mut queue = self.lock();
        while queue.windows.len() >= QUEUE && !self.stop.load(Ordering::Relaxed) {
            queue = self.room.wait_timeout(queue, TICK).unwrap_or_else(PoisonError::into_inner).0;
            drop(queue);
            if !tick() {
                self.stop();
            }
            queue = self.lock();
        }
        queue.windows.push_back(window);
        if queue.waiting > 0 {
            self.more.notify_one();
        }
        !self.stop.load(Ordering::Relaxed)
    }

    fn end(&self) {
        self.lock().ended = true;
        self.more.notify_all();
    }

    /// Waits until the workers have ended.
    fn wait_for_workers(&self, tick: &mut dyn FnMut() -> bool) {
        let mut queue = self.lock();
        while queue.workers > 0 {
            queue = self.room.wait_timeout(queue, TICK).unwrap_or_else(PoisonError::into_inner).0;
            drop(queue);
            if !tick() {
                self.stop();
            }
            queue = self.lock();
        }
    }
}

/// Copies everything, and closes the target.
pub(super) fn copy(copying: &Copying<'_>, progress: Progress<'_>) -> Result<(), OpenError> {
    let size = copying.from.size();
    let target = Target::look_at(copying)?;
    let parts = parts(copying)?;
    let window = WINDOW.max(target.unit).max(largest_packed(&parts));
    let shared = Shared::default();
    shared.lock().workers = copying.threads;
    let mut cancelled = false;
    std::thread::scope(|scope| {
        for _ in 0..copying.threads {
            let worker = Worker::new(copying, &shared, &target, &parts);
            scope.spawn(move || worker.run());
        }
        let mut tick = || {
            let on = progress(shared.done.load(Ordering::Relaxed).min(size), size);
            cancelled |= !on;
            on
        };
        if let Err(e) = plan(copying, &shared, &target, window, &mut tick) {
            shared.fail(e);
        }
        shared.end();
        shared.wait_for_workers(&mut tick);
    });
    if let Some(error) = shared.lock().failed.take() {
        return Err(error);
    }
    if cancelled {
        return Err(OpenError::Cancelled);
    }
    if !copying.options.existing {
        // Storage that workers took ahead and did not need.
        let trim = |node: std::rc::Rc<Node>| {
            Box::pin(async move { node.image().trim().await }) as LocalFuture<'_, Result<(), IoError>>
        };
        copying.to.with_node(trim).map_err(|e| request(copying.target, "writing the copy", e))?;
    }
    copying.to.flush_and_close().map_err(|e| request(copying.target, "writing the copy", e))?;
    progress(size, size);
    Ok(())
}

/// Cuts the source into windows, and hands those out that need work.
fn plan(
    copying: &Copying<'_>,
    shared: &Shared,
    target: &Target,
    window: u64,
    tick: &mut dyn FnMut() -> bool,
) -> Result<(), OpenError> {
    let size = copying.from.size();
    let needed = |extents: &[Extent]| extents.iter().any(|e| !target.skips(e) && !target.leaves_out(e));
    let mut pace = Pace::new(copying.options.rate);
    let mut at = 0;
    while at < size {
        let length = LOOK_AHEAD.next_multiple_of(window).min(size - at);
        let extents = statuses(copying, at, length)?;
        let end = at + length;
        let mut rest = extents.as_slice();
        while at < end {
            let (start, stop) = (at, (at + window).min(end));
            // A long run of zeroes is passed over at once.
            if let [first, ..] = rest
                && !needed(std::slice::from_ref(first))
                && first.end() >= stop
            {
                at = (first.end() - first.end() % window).max(stop).min(end);
                rest = &rest[rest.iter().take_while(|e| e.end() <= at).count()..];
                shared.done.fetch_add(at - start, Ordering::Relaxed);
                continue;
            }
            let mut parts = Vec::new();
            for extent in rest.iter().take_while(|e| e.offset < stop) {
                parts.push(part(extent, start, stop));
            }
            rest = &rest[rest.iter().take_while(|e| e.end() <= stop).count()..];
            at = stop;
            if needed(&parts) {
                let data: u64 = parts.iter().filter(|e| !e.is_zero()).map(|e| e.length).sum();
                let window = Window { offset: start, length: stop - start, extents: parts };
                if !pace.wait(data, tick) {
                    shared.stop();
                    return Ok(());
                }
                if !shared.put(window, tick) {
                    return Ok(());
                }
            } else {
                shared.done.fetch_add(stop - start, Ordering::Relaxed);
            }
        }
        if !tick() {
            shared.stop();
            return Ok(());
        }
    }
    Ok(())
}

/// What is where in a part of the source. What cannot be found out counts as data when the source is salvaged: reading
/// it tells.
fn statuses(copying: &Copying<'_>, at: u64, length: u64) -> Result<Vec<Extent>, OpenError> {
    /// Least bytes to ask for, and so the most that are taken for data without need.
    const LEAST: u64 = 64 << 10;
    match copying.from.block_status(at, length) {
        Err(error) if copying.options.salvage => {
            if length <= LEAST {
                (copying.options.warn)(&format!("error while reading block status at offset {at}: {error}"));
                return Ok(vec![Extent::new(at, length, ExtentKind::Data, None)]);
            }
            let half = (length / 2).next_multiple_of(LEAST).min(length - 1);
            let mut extents = statuses(copying, at, half)?;
            extents.append(&mut statuses(copying, at + half, length - half)?);
            Ok(extents)
        }
        result => result.map_err(|e| request(copying.source(), "asking where data is", e)),
    }
}

/// The part of an extent that lies in `start..stop`.
fn part(extent: &Extent, start: u64, stop: u64) -> Extent {
    let from = extent.offset.max(start);
    let host = extent.host.map(|host| host + (from - extent.offset));
    Extent { offset: from, length: extent.end().min(stop) - from, host, ..*extent }
}
