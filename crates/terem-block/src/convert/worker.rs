//! The workers of a copy: each takes windows from source to target.
//!
//! Kernels write to one place of a file at a time, and let all others who write to it wait. So a worker that finds
//! another one writing reads its next window meanwhile, as long as it has room for one.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{MutexGuard, PoisonError, TryLockError};

use super::buffers::Buffers;
use super::copy::{Shared, Window};
use super::reading::{Part, Reader};
use super::target::{How, Target};
use super::{Copying, is_zero, request};
use crate::file::{PlainFile, to_usize};
use crate::node::Packer;
use crate::{BlockBackend, Extent, IoError, Op, OpenError, Request};

/// Requests to the target that a worker does not wait for yet.
const IN_FLIGHT: usize = 8;
/// Windows that a worker reads while another one writes; together they fit the second-level cache.
const AHEAD: usize = 2;
/// Written runs that the target's tables do not know yet.
const UNTOLD: usize = 64;

/// What a part of a window is to the target.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Skipped,
    Zero,
    Data,
}

/// A window that was read.
#[derive(Default)]
struct Filled {
    buffer: Vec<u8>,
    /// Bytes of the disk.
    length: u64,
    /// What is to be written: bytes of the buffer, and where in the target's file.
    writes: Vec<(Range<usize>, u64)>,
}

/// One worker.
pub(super) struct Worker<'a> {
    copying: &'a Copying<'a>,
    shared: &'a Shared,
    target: &'a Target,
    reader: Reader<'a>,
    buffers: Buffers,
    /// Storage of the target that it has not used yet: host offset and bytes.
    pool: (u64, u64),
    /// Bytes for which the window needs storage still.
    wanted: u64,
    /// Disk offset, host offset and bytes of what was written and is to be mapped.
    placed: Vec<(u64, u64, u64)>,
    pending: VecDeque<Receiver<Result<(), IoError>>>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        copying: &'a Copying<'a>,
        shared: &'a Shared,
        target: &'a Target,
        parts: &'a [Part],
    ) -> Self {
        Self {
            copying,
            shared,
            target,
            reader: Reader::new(copying, parts),
            buffers: Buffers::default(),
            pool: (0, 0),
            wanted: 0,
            placed: Vec::new(),
            pending: VecDeque::new(),
        }
    }

    pub(super) fn run(mut self) {
        let _ended = self.shared.worker_ends();
        let target = self.target;
        let mut result = match &target.how {
            How::Plain(file) | How::Place(file) => self.write_files(file),
            How::Compress(_) | How::Requests => self.work(),
        };
        self.tell_placed();
        result = result.and(self.give_pool_back());
        while let Some(pending) = self.pending.pop_front() {
            result = result.and(self.wait_for(&pending));
        }
        if let Err(e) = result {
            self.shared.fail(e);
        }
    }

    /// Reads a window, writes it, and so on.
    fn work(&mut self) -> Result<(), OpenError> {
        let mut filled = Filled::default();
        while let Some(window) = self.shared.next() {
            self.fill(&window, &mut filled)?;
            self.shared.done.fetch_add(filled.length, Ordering::Relaxed);
            self.wait_for_some()?;
        }
        Ok(())
    }

    /// Reads windows, and writes those that it has to the target's file when no other worker does.
    fn write_files(&mut self, file: &PlainFile) -> Result<(), OpenError> {
        let mut ahead: [Filled; AHEAD] = Default::default();
        let mut count = 0;
        loop {
            let window = match count {
                0 => self.shared.next(),
                AHEAD => None,
                _ => self.shared.next_if_any(),
            };
            if let Some(window) = &window {
                if self.offload(window, file)? {
                    continue;
                }
                self.fill(window, &mut ahead[count])?;
                count += 1;
            } else if count == 0 {
                return Ok(());
            }
            let Some(turn) = self.turn(window.is_none() || count == AHEAD) else { continue };
            for filled in &mut ahead[..count] {
                for (bytes, at) in filled.writes.drain(..) {
                    file.write(at, &filled.buffer[bytes]).map_err(|e| self.write_failed(e))?;
                }
                self.shared.done.fetch_add(filled.length, Ordering::Relaxed);
            }
            drop(turn);
            count = 0;
            if self.placed.len() >= UNTOLD {
                self.tell_placed();
            }
            self.wait_for_some()?;
        }
    }

    /// Lets the file system copy a window, if that is wanted and can be; false when it is still to be read.
    fn offload(&self, window: &Window, file: &PlainFile) -> Result<bool, OpenError> {
        if !self.copying.options.offload || !matches!(self.target.how, How::Plain(_)) {
            return Ok(false);
        }
        let target = self.target;
        for extent in window.extents.iter().filter(|e| !target.skips(e) && !target.leaves_out(e)) {
            let Some((from, host)) = self.reader.plain(extent) else { return Ok(false) };
            let copied = from.copy_to(host, file, extent.offset, extent.length);
            if !copied.map_err(|e| self.write_failed(e))? {
                return Ok(false);
            }
        }
        self.shared.done.fetch_add(window.length, Ordering::Relaxed);
        Ok(true)
    }

    /// The right to write to the target's file, if nobody else has it, or once nobody has.
    fn turn(&self, wait: bool) -> Option<MutexGuard<'a, ()>> {
        let writing = &self.shared.writing;
        if wait {
            return Some(writing.lock().unwrap_or_else(PoisonError::into_inner));
        }
        match writing.try_lock() {
            Ok(turn) => Some(turn),
            Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn wait_for_some(&mut self) -> Result<(), OpenError> {
        while self.pending.len() > IN_FLIGHT {
            if let Some(pending) = self.pending.pop_front() {
                self.wait_for(&pending)?;
            }
        }
        Ok(())
    }

    fn wait_for(&self, pending: &Receiver<Result<(), IoError>>) -> Result<(), OpenError> {
        pending.recv().unwrap_or(Err(IoError::Closed)).map_err(|e| self.write_failed(e))
    }

    fn write_failed(&self, source: impl Into<IoError>) -> OpenError {
        request(self.copying.target, "writing the copy", source.into())
    }

    /// Reads a window, and writes what is not zero or notes down where it is to be written.
    fn fill(&mut self, window: &Window, filled: &mut Filled) -> Result<(), OpenError> {
        let unit = to_usize(self.target.unit);
        let length = to_usize(window.length);
        filled.buffer.resize(length.next_multiple_of(unit), 0);
        filled.length = window.length;
        self.reader.read(window, &mut filled.buffer, unit)?;
        let mut runs = Vec::new();
        let mut at = 0;
        while at < length {
            let kind = self.kind(window, &filled.buffer, at);
            let mut end = at + unit;
            while end < length && self.kind(window, &filled.buffer, end) == kind {
                end += unit;
            }
            let end = end.min(filled.buffer.len());
            runs.push((kind, at..end));
            at = end;
        }
        let data = runs.iter().filter(|(kind, _)| *kind == Kind::Data);
        self.wanted = data.map(|(_, range)| range.len() as u64).sum();
        for (kind, range) in runs {
            let offset = window.offset + range.start as u64;
            let there = range.end.min(length) - range.start;
            match kind {
                Kind::Skipped => {}
                Kind::Zero => self.write_zeroes(offset, there as u64),
                Kind::Data => self.write_data(offset, range, there, filled)?,
            }
        }
        Ok(())
    }

    /// What the unit at `at` in a window is.
    fn kind(&self, window: &Window, buffer: &[u8], at: usize) -> Kind {
        let unit = to_usize(self.target.unit);
        let end = window.offset + (at + unit).min(to_usize(window.length)) as u64;
        let start = window.offset + at as u64;
        let extents = || window.extents.iter().filter(|e| e.offset < end && e.end() > start);
        if extents().all(|extent| self.target.skips(extent)) {
            Kind::Skipped
        } else if self.target.sparse && (extents().all(Extent::is_zero) || is_zero(&buffer[at..at + unit])) {
            Kind::Zero
        } else {
            Kind::Data
        }
    }

    fn write_zeroes(&mut self, offset: u64, length: u64) {
        if self.target.zeroes {
            self.submit(Op::WriteZeroes { offset, length, unmap: true });
        }
    }

    fn submit(&mut self, op: Op) {
        let (tell, told) = channel();
        self.copying.to.submit(Request::new(op, move |result| drop(tell.send(result))));
        self.pending.push_back(told);
    }

    /// Writes a range of the buffer, of which the first `length` bytes are on the disk, or notes down where to.
    fn write_data(
        &mut self,
        offset: u64,
        range: Range<usize>,
        length: usize,
        filled: &mut Filled,
    ) -> Result<(), OpenError> {
        match self.target.how {
            How::Plain(_) => filled.writes.push((range.start..range.start + length, offset)),
            How::Place(_) => {
                let mut at = range.start;
                while at < range.end {
                    let (host, n) = self.take((range.end - at) as u64)?;
                    self.placed.push((offset + (at - range.start) as u64, host, n));
                    filled.writes.push((at..at + to_usize(n), host));
                    at += to_usize(n);
                }
            }
            How::Compress(packer) => {
                self.write_compressed(packer, offset, &filled.buffer[range], length);
            }
            How::Requests => {
                let bytes = &filled.buffer[range.start..range.start + length];
                let memory = self.buffers.copy_of(bytes);
                self.submit(Op::Write { offset, memory });
            }
        }
        Ok(())
    }

    fn write_compressed(&mut self, packer: Packer, offset: u64, bytes: &[u8], length: usize) {
        let mut packed = Vec::new();
        for (i, cluster) in bytes.chunks(to_usize(packer.unit)).enumerate() {
            let at = i as u64 * packer.unit;
            let there = cluster.len().min(length.saturating_sub(to_usize(at)));
            if there == 0 {
                // Beyond the disk's end.
                break;
            }
            if self.target.sparse && is_zero(cluster) {
                self.write_zeroes(offset + at, there as u64);
            } else if let Some(smaller) = (packer.compress)(cluster) {
                packed.push((offset + at, smaller));
            } else {
                let memory = self.buffers.copy_of(&cluster[..there]);
                self.submit(Op::Write { offset: offset + at, memory });
            }
        }
        if !packed.is_empty() {
            let (tell, told) = channel();
            self.copying.to.start(
                move |node| Box::pin(async move { node.image().write_compressed(packed).await }),
                move |result| drop(tell.send(result)),
            );
            self.pending.push_back(told);
        }
    }

    /// Storage of the target, up to `want` bytes.
    fn take(&mut self, want: u64) -> Result<(u64, u64), OpenError> {
        if self.pool.1 == 0 {
            // No more than the window needs: what is given back later would be a hole between the parts of two workers.
            let clusters = self.wanted.max(self.target.cluster);
            let place = move |node: std::rc::Rc<crate::node::Node>| {
                Box::pin(async move { node.image().place(clusters).await })
                    as crate::executor::LocalFuture<'_, _>
            };
            self.pool = self.copying.to.with_node(place).map_err(|e| self.write_failed(e))?;
        }
        let n = want.min(self.pool.1);
        let host = self.pool.0;
        self.pool = (host + n, self.pool.1 - n);
        self.wanted = self.wanted.saturating_sub(n);
        Ok((host, n))
    }

    /// Has the target's tables name what was written.
    fn tell_placed(&mut self) {
        let placed = std::mem::take(&mut self.placed);
        if placed.is_empty() {
            return;
        }
        let (tell, told) = channel();
        self.copying.to.start(
            move |node| Box::pin(async move { node.image().map_placed(placed).await }),
            move |result| drop(tell.send(result)),
        );
        self.pending.push_back(told);
    }

    fn give_pool_back(&mut self) -> Result<(), OpenError> {
        let (host, length) = std::mem::take(&mut self.pool);
        if length == 0 {
            return Ok(());
        }
        let give = move |node: std::rc::Rc<crate::node::Node>| {
            Box::pin(async move { node.image().unplace(host, length).await })
                as crate::executor::LocalFuture<'_, _>
        };
        self.copying.to.with_node(give).map_err(|e| self.write_failed(e))
    }
}
