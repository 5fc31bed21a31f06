//! The workers of a copy: each takes a window from source to target.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};

use terem_memory::{AlignedBuffer, IoMemory};

use super::copy::{Shared, Window, is_plain, wants_readers};
use super::{Copying, is_zero, request};
use crate::file::{PlainFile, to_usize};
use crate::node::Packer;
use crate::{BlockBackend, Disk, Extent, ExtentKind, IoError, Op, OpenError, Request};

/// Requests to the target that a worker does not wait for yet.
const IN_FLIGHT: usize = 8;

/// What the target can do.
pub(super) struct Target {
    /// Bytes that are written, or left out as zeroes, together.
    pub(super) unit: u64,
    /// Bytes between two places in its file.
    cluster: u64,
    how: How,
    /// Whether zeroes must be written: what is there now may be something else.
    zeroes: bool,
    /// Whether it has the source's backing files too.
    shares_backing: bool,
}

enum How {
    /// Its file is the disk.
    Plain(PlainFile),
    /// It gives out storage in its file.
    Place(PlainFile),
    /// Compressed clusters, and what cannot be compressed by requests.
    Compress(Packer),
    /// By requests.
    Requests,
}

impl Target {
    pub(super) fn look_at(copying: &Copying<'_>) -> Result<Self, OpenError> {
        let facts = copying.to.with_node(|node| {
            Box::pin(async move {
                let image = node.image();
                let plain = image.plain_data().and_then(crate::file::File::plain);
                Ok::<_, IoError>((
                    plain,
                    image.unit(),
                    image.places(),
                    image.compression(),
                    node.backing().is_some(),
                ))
            })
        });
        let facts = facts.map_err(|e| request(copying.target, "looking at the copy", e))?;
        let (plain, cluster, places, packer, backed) = facts;
        let options = copying.options;
        let how = match (packer, plain) {
            (Some(packer), _) if options.compress || packer.always => How::Compress(packer),
            _ if options.compress => {
                return Err(OpenError::Unsupported {
                    path: copying.target.to_owned(),
                    feature: "compression in this format".into(),
                    hint: "qcow2 has it",
                });
            }
            (_, Some(file)) if cluster == 0 && !options.existing => How::Plain(file),
            (_, Some(file)) if places && !options.existing && !backed => How::Place(file),
            _ => How::Requests,
        };
        // Of a cluster that holds data, nothing is saved by leaving parts out.
        let unit = cluster.max(options.sparse.next_power_of_two()).clamp(4096, 2 << 20);
        let unknown =
            if options.existing { !options.target_is_zero } else { !copying.to.facts().zero_when_new };
        let zeroes = unknown || backed;
        Ok(Self { unit, cluster, how, zeroes, shares_backing: backed && options.share_backing })
    }

    /// Whether the target has this already, from its backing file.
    pub(super) fn skips(&self, extent: &Extent) -> bool {
        self.shares_backing && (extent.depth > 0 || extent.kind == ExtentKind::Unallocated)
    }

    /// Whether nothing needs to be written for it.
    pub(super) fn leaves_out(&self, extent: &Extent) -> bool {
        extent.is_zero() && !self.zeroes
    }
}

/// What a part of a window is to the target.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Skipped,
    Zero,
    Data,
}

/// One worker.
pub(super) struct Worker<'a> {
    copying: &'a Copying<'a>,
    shared: &'a Shared,
    target: &'a Target,
    files: &'a [Option<PlainFile>],
    /// A reader of its own, once it is needed: decompression takes time.
    reader: Option<Disk>,
    /// Storage of the target that it has not used yet: host offset and bytes.
    pool: (u64, u64),
    pending: VecDeque<Receiver<Result<(), IoError>>>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        copying: &'a Copying<'a>,
        shared: &'a Shared,
        target: &'a Target,
        files: &'a [Option<PlainFile>],
    ) -> Self {
        Self { copying, shared, target, files, reader: None, pool: (0, 0), pending: VecDeque::new() }
    }

    pub(super) fn run(mut self) {
        let mut result = self.work();
        let given_back = self.give_pool_back();
        result = result.and(given_back);
        while let Some(pending) = self.pending.pop_front() {
            result = result.and(self.wait_for(&pending));
        }
        if let Err(e) = result {
            self.shared.fail(e);
        }
    }

    fn work(&mut self) -> Result<(), OpenError> {
        let mut buffer = Vec::new();
        while let Some(window) = self.shared.next() {
            buffer.resize(to_usize(window.length.next_multiple_of(self.target.unit)), 0);
            self.read(&window, &mut buffer)?;
            self.write(&window, &buffer)?;
            self.shared.done.fetch_add(window.length, Ordering::Relaxed);
            while self.pending.len() > IN_FLIGHT {
                if let Some(pending) = self.pending.pop_front() {
                    self.wait_for(&pending)?;
                }
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

    fn read_failed(&self, source: impl Into<IoError>) -> OpenError {
        request(self.copying.source, "reading the source", source.into())
    }

    /// Fills the buffer with the window's contents; what follows is zeroes.
    fn read(&mut self, window: &Window, buffer: &mut [u8]) -> Result<(), OpenError> {
        let mut at = 0;
        let mut extents = window.extents.as_slice();
        while let [first, ..] = extents {
            let n = if first.is_zero() || self.file_of(first).is_some() {
                1
            } else {
                // All that takes requests, in one.
                extents.iter().take_while(|e| !e.is_zero() && self.file_of(e).is_none()).count()
            };
            let length: u64 = extents[..n].iter().map(|e| e.length).sum();
            let part = &mut buffer[at..at + to_usize(length)];
            if first.is_zero() {
                part.fill(0);
            } else if let Some((file, host)) = self.file_of(first) {
                file.read(host, part).map_err(|e| self.read_failed(e))?;
            } else {
                self.read_by_request(first.offset, part)?;
            }
            at += to_usize(length);
            extents = &extents[n..];
        }
        buffer[at..].fill(0);
        Ok(())
    }

    /// Where an extent's data lies as it is.
    fn file_of(&self, extent: &Extent) -> Option<(&'a PlainFile, u64)> {
        let file = self.files.get(extent.depth as usize)?.as_ref()?;
        if is_plain(extent) { extent.host.map(|host| (file, host)) } else { None }
    }

    fn read_by_request(&mut self, offset: u64, part: &mut [u8]) -> Result<(), OpenError> {
        if self.reader.is_none() && wants_readers(self.copying.from.facts().format) {
            self.reader = Some(Disk::open(self.copying.source, self.copying.open)?);
        }
        let disk = self.reader.as_ref().unwrap_or(&self.copying.from);
        let memory = Arc::new(AlignedBuffer::new(part.len()));
        disk.run(Op::Read { offset, memory: Arc::clone(&memory) as _ }).map_err(|e| self.read_failed(e))?;
        memory.read_at(0, part);
        Ok(())
    }

    /// Writes what is not zero.
    fn write(&mut self, window: &Window, buffer: &[u8]) -> Result<(), OpenError> {
        let unit = to_usize(self.target.unit);
        let sparse = self.copying.options.sparse > 0;
        let target = self.target;
        let mut placed = Vec::new();
        let (mut at, length) = (0, to_usize(window.length));
        while at < length {
            let kind = |at: usize| {
                let end = window.offset + (at + unit).min(length) as u64;
                let start = window.offset + at as u64;
                let extents = || window.extents.iter().filter(|e| e.offset < end && e.end() > start);
                if extents().all(|extent| target.skips(extent)) {
                    Kind::Skipped
                } else if extents().all(Extent::is_zero) || sparse && is_zero(&buffer[at..at + unit]) {
                    Kind::Zero
                } else {
                    Kind::Data
                }
            };
            let first = kind(at);
            let mut end = at + unit;
            while end < length && kind(end) == first {
                end += unit;
            }
            let end = end.min(buffer.len());
            let offset = window.offset + at as u64;
            let there = end.min(length) - at;
            match first {
                Kind::Skipped => {}
                Kind::Zero => self.write_zeroes(offset, there as u64),
                Kind::Data => self.write_data(offset, &buffer[at..end], there, &mut placed)?,
            }
            at = end;
        }
        if !placed.is_empty() {
            let (tell, told) = channel();
            self.copying.to.start(
                move |node| Box::pin(async move { node.image().map_placed(placed).await }),
                move |result| drop(tell.send(result)),
            );
            self.pending.push_back(told);
        }
        Ok(())
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

    /// Writes `bytes`, of which the first `length` are on the disk.
    fn write_data(
        &mut self,
        offset: u64,
        bytes: &[u8],
        length: usize,
        placed: &mut Vec<(u64, u64, u64)>,
    ) -> Result<(), OpenError> {
        match &self.target.how {
            How::Plain(file) => file.write(offset, &bytes[..length]).map_err(|e| self.write_failed(e)),
            How::Place(file) => {
                let mut at = 0;
                while at < bytes.len() {
                    let host = self.take(bytes.len() as u64 - at as u64)?;
                    let n = to_usize(host.1);
                    file.write(host.0, &bytes[at..at + n]).map_err(|e| self.write_failed(e))?;
                    placed.push((offset + at as u64, host.0, host.1));
                    at += n;
                }
                Ok(())
            }
            How::Compress(packer) => {
                let packer = *packer;
                self.write_compressed(packer, offset, bytes, length)
            }
            How::Requests => {
                let memory = Arc::new(AlignedBuffer::from_slice(&bytes[..length]));
                self.submit(Op::Write { offset, memory });
                Ok(())
            }
        }
    }

    fn write_compressed(
        &mut self,
        packer: Packer,
        offset: u64,
        bytes: &[u8],
        length: usize,
    ) -> Result<(), OpenError> {
        let mut packed = Vec::new();
        for (i, cluster) in bytes.chunks(to_usize(packer.unit)).enumerate() {
            let at = i as u64 * packer.unit;
            if is_zero(cluster) {
                continue;
            }
            if let Some(smaller) = (packer.compress)(cluster) {
                packed.push((offset + at, smaller));
            } else {
                let there = cluster.len().min(length - to_usize(at));
                let memory = Arc::new(AlignedBuffer::from_slice(&cluster[..there]));
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
        Ok(())
    }

    /// Storage of the target, up to `want` bytes.
    fn take(&mut self, want: u64) -> Result<(u64, u64), OpenError> {
        if self.pool.1 == 0 {
            // No more than is needed now: what is given back later would be a hole between the parts of two workers.
            let clusters = want.max(self.target.cluster);
            let place = move |node: std::rc::Rc<crate::node::Node>| {
                Box::pin(async move { node.image().place(clusters).await })
                    as crate::executor::LocalFuture<'_, _>
            };
            self.pool = self.copying.to.with_node(place).map_err(|e| self.write_failed(e))?;
        }
        let n = want.min(self.pool.1);
        let host = self.pool.0;
        self.pool = (host + n, self.pool.1 - n);
        Ok((host, n))
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
