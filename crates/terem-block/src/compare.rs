//! Whether two disks hold the same.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use terem_memory::{AlignedBuffer, IoMemory};

use crate::convert::{Progress, is_zero, request};
use crate::file::to_usize;
use crate::{BlockBackend, Disk, Extent, ExtentKind, IoError, Op, OpenError, OpenOptions, Request};

/// Bytes compared at once.
const PIECE: u64 = 1 << 20;
/// Pieces read ahead.
const AHEAD: usize = 4;
/// Bytes whose status is asked for at once.
const LOOK_AHEAD: u64 = 256 << 20;

/// What a comparison found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// The same contents; if one disk is larger, the rest of it is zeroes.
    Equal {
        /// Whether they have the same size.
        same_size: bool,
    },
    /// They differ.
    Differ {
        /// The first byte that does, or the beginning of the first part in which one has storage and the other none.
        offset: u64,
        /// Which one.
        what: Difference,
    },
}

/// How two disks differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// In contents.
    Contents,
    /// In size (only when that is asked for).
    Size,
    /// In what a part is: data, compressed, zeroes, or nothing (only when that is asked for).
    Allocation,
}

/// Compares the disks of two images. With `strict` their sizes must be the same, too, and what
/// each part is: data, compressed, zeroes, or nothing.
///
/// # Errors
/// [`OpenError`] when one of them cannot be opened or read.
pub fn compare(
    a: impl AsRef<Path>,
    a_options: &OpenOptions,
    b: impl AsRef<Path>,
    b_options: &OpenOptions,
    strict: bool,
    progress: Progress<'_>,
) -> Result<Comparison, OpenError> {
    let open = |path, options: &OpenOptions| -> Result<(_, Disk), OpenError> {
        Ok((path, Disk::open(path, &OpenOptions { read_only: true, ..options.clone() })?))
    };
    let (a, b) = (open(a.as_ref(), a_options)?, open(b.as_ref(), b_options)?);
    let (size_a, size_b) = (a.1.size(), b.1.size());
    if strict && size_a != size_b {
        return Ok(Comparison::Differ { offset: size_a.min(size_b), what: Difference::Size });
    }
    let size = size_a.max(size_b);
    let mut at = 0;
    while at < size {
        let length = LOOK_AHEAD.min(size - at);
        let (extents_a, extents_b) = (status(&a, at, length)?, status(&b, at, length)?);
        if let Some(found) = compare_extents((&a, &extents_a), (&b, &extents_b), strict, at, length)? {
            return Ok(found);
        }
        at += length;
        if !progress(at, size) {
            return Err(OpenError::Cancelled);
        }
    }
    Ok(Comparison::Equal { same_size: size_a == size_b })
}

type Side<'a> = (&'a Path, Disk);

fn status(side: &Side<'_>, at: u64, length: u64) -> Result<Vec<Extent>, OpenError> {
    let mut extents =
        side.1.block_status(at, length).map_err(|e| request(side.0, "asking where data is", e))?;
    let end = extents.last().map_or(at, Extent::end);
    // Beyond its end a disk counts as zero.
    if end < at + length {
        extents.push(Extent::new(end.max(at), at + length - end.max(at), ExtentKind::Unallocated, None));
    }
    Ok(extents)
}

/// Compares a range whose extents are known.
fn compare_extents(
    (a, extents_a): (&Side<'_>, &[Extent]),
    (b, extents_b): (&Side<'_>, &[Extent]),
    strict: bool,
    start: u64,
    length: u64,
) -> Result<Option<Comparison>, OpenError> {
    let mut parts = Vec::new();
    let (mut i, mut j, mut at) = (0, 0, start);
    while at < start + length {
        let (x, y) = (&extents_a[i], &extents_b[j]);
        let end = x.end().min(y.end());
        if strict && x.kind != y.kind {
            return Ok(Some(Comparison::Differ { offset: at, what: Difference::Allocation }));
        }
        if !(x.is_zero() && y.is_zero()) {
            let mut from = at;
            while from < end {
                let n = PIECE.min(end - from);
                parts.push((from, n, x.is_zero(), y.is_zero()));
                from += n;
            }
        }
        at = end;
        i += usize::from(x.end() == end);
        j += usize::from(y.end() == end);
    }
    let mut reads = std::collections::VecDeque::new();
    let mut rest = parts.into_iter();
    loop {
        while reads.len() < AHEAD
            && let Some((offset, length, zero_a, zero_b)) = rest.next()
        {
            let read = |side: &Side<'_>, zero: bool| (!zero).then(|| Reading::start(&side.1, offset, length));
            reads.push_back((offset, read(a, zero_a), read(b, zero_b)));
        }
        let Some((offset, x, y)) = reads.pop_front() else { return Ok(None) };
        let x = x.map(|read| read.end(a.0)).transpose()?;
        let y = y.map(|read| read.end(b.0)).transpose()?;
        let first = match (&x, &y) {
            (Some(x), Some(y)) if x == y => None,
            (Some(x), Some(y)) => x.iter().zip(y).position(|(x, y)| x != y),
            (Some(bytes), None) | (None, Some(bytes)) if is_zero(bytes) => None,
            (Some(bytes), None) | (None, Some(bytes)) => bytes.iter().position(|byte| *byte != 0),
            (None, None) => None,
        };
        if let Some(first) = first {
            let offset = offset + first as u64;
            return Ok(Some(Comparison::Differ { offset, what: Difference::Contents }));
        }
    }
}

/// A read under way; what lies beyond the disk's end is zero.
struct Reading {
    memory: Arc<AlignedBuffer>,
    told: Receiver<Result<(), IoError>>,
    length: u64,
}

impl Reading {
    fn start(disk: &Disk, offset: u64, length: u64) -> Self {
        let there = disk.size().saturating_sub(offset).min(length);
        let memory = Arc::new(AlignedBuffer::new(to_usize(there)));
        let (tell, told) = channel();
        let op = Op::Read { offset: offset.min(disk.size()), memory: Arc::clone(&memory) as _ };
        disk.submit(Request::new(op, move |result| drop(tell.send(result))));
        Self { memory, told, length }
    }

    fn end(self, path: &Path) -> Result<Vec<u8>, OpenError> {
        let result = self.told.recv().unwrap_or(Err(IoError::Closed));
        result.map_err(|e| request(path, "reading it", e))?;
        let mut bytes = vec![0; to_usize(self.length)];
        self.memory.read_at(0, &mut bytes);
        Ok(bytes)
    }
}
