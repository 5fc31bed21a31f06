//! From and to streams, such as standard input and output.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use terem_memory::AlignedBuffer;

use super::{ConvertOptions, Progress, into_new, is_zero, request};
use crate::create::device_length;
use crate::file::to_usize;
use crate::{
    BlockBackend, CreateOptions, Disk, Format, IoError, Op, OpenError, OpenOptions, Preallocation, Request,
    resize,
};

/// The outcome of a request, once it is known.
type Told = Receiver<Result<(), IoError>>;

/// Bytes of one piece; a multiple of every cluster size.
const PIECE: u64 = 2 << 20;
/// Pieces under way at once.
const IN_FLIGHT: usize = 8;
/// The size of an image whose source's length is not known yet: 8 TiB, cut at the end.
const UNKNOWN: u64 = 1 << 43;

/// Writes what `source` gives into a new image at `target`; zeroes take no space. A source that ends before `size`
/// bytes is continued with zeroes; without a size the disk ends with the source.
///
/// # Errors
/// [`OpenError`] when reading the source or writing the image fails. An unfinished image is removed.
pub fn import(
    source: &mut dyn Read,
    size: Option<u64>,
    target: impl AsRef<Path>,
    target_options: &CreateOptions,
    progress: Progress<'_>,
) -> Result<(), OpenError> {
    let target = target.as_ref();
    // What is on a block device has the device's size already.
    let device = device_length(target).filter(|_| target_options.format == Format::Raw);
    let room = size.or(device).unwrap_or(UNKNOWN);
    into_new(target, target_options, room, &ConvertOptions::default(), |path, to| {
        let at = fill(source, room, target, &to, progress)?;
        if let Some(size) = size.filter(|_| !to.facts().zero_when_new) {
            zero_rest(target, &to, at, size)?;
        }
        to.close().map_err(|e| request(target, "writing the copy", e))?;
        if device.is_some() {
            return if size.is_none() && more(source) {
                let what = format!("the source has more than the {room} bytes of the device");
                Err(OpenError::Limit { path: target.to_owned(), what })
            } else {
                Ok(())
            };
        }
        if size.is_none() {
            resize(path, Some(target_options.format), at, true, Preallocation::Off)?;
        }
        Ok(())
    })
}

/// Whether the source has not ended.
fn more(source: &mut dyn Read) -> bool {
    read_full(source, &mut [0]).is_ok_and(|n| n > 0)
}

/// The rest of a disk that does not read as zeroes by itself.
fn zero_rest(target: &Path, to: &Disk, from: u64, size: u64) -> Result<(), OpenError> {
    let mut at = from;
    while at < size {
        let length = to.geometry().max_discard.min(size - at);
        let op = Op::WriteZeroes { offset: at, length, unmap: true };
        to.run(op).map_err(|e| request(target, "writing the copy", e))?;
        at += length;
    }
    Ok(())
}

fn fill(
    source: &mut dyn Read,
    room: u64,
    target: &Path,
    to: &Disk,
    progress: Progress<'_>,
) -> Result<u64, OpenError> {
    let mut pending: VecDeque<Told> = VecDeque::new();
    let wait = |pending: &mut VecDeque<Told>, left: usize| {
        while pending.len() > left {
            let result =
                pending.pop_front().map_or(Ok(()), |told| told.recv().unwrap_or(Err(IoError::Closed)));
            result.map_err(|e| request(target, "writing the copy", e))?;
        }
        Ok(())
    };
    let unit = (to.geometry().optimal_io_size as usize).max(4096);
    let (mut piece, mut at) = (vec![0; to_usize(PIECE)], 0);
    while at < room {
        let want = to_usize(PIECE.min(room - at));
        let read = read_full(source, &mut piece[..want]);
        let got = read.map_err(|e| OpenError::io(target, "reading what is to be imported", e))?;
        let mut start = 0;
        while start < got {
            let end = (start + unit).min(got);
            if !to.facts().zero_when_new || !is_zero(&piece[start..end]) {
                let memory = Arc::new(AlignedBuffer::from_slice(&piece[start..end]));
                let (tell, told) = channel();
                let op = Op::Write { offset: at + start as u64, memory };
                to.submit(Request::new(op, move |result| drop(tell.send(result))));
                pending.push_back(told);
            }
            start = end;
        }
        wait(&mut pending, IN_FLIGHT)?;
        at += got as u64;
        if !progress(at, if room == UNKNOWN { 0 } else { room }) {
            return Err(OpenError::Cancelled);
        }
        if got < want {
            break;
        }
    }
    wait(&mut pending, 0)?;
    Ok(at)
}

/// Writes all bytes of the disk `source` to `target`.
///
/// # Errors
/// [`OpenError`] when reading the image or writing fails.
pub fn export(
    source: impl AsRef<Path>,
    source_options: &OpenOptions,
    target: &mut dyn Write,
    progress: Progress<'_>,
) -> Result<(), OpenError> {
    let source = source.as_ref();
    let from = Disk::open(source, &OpenOptions { read_only: true, ..source_options.clone() })?;
    let size = from.size();
    let mut pending: VecDeque<(Arc<AlignedBuffer>, Told)> = VecDeque::new();
    let (mut asked, mut done) = (0, 0);
    while done < size {
        while asked < size && pending.len() < IN_FLIGHT {
            let memory = Arc::new(AlignedBuffer::new(to_usize(PIECE.min(size - asked))));
            let (tell, told) = channel();
            let op = Op::Read { offset: asked, memory: Arc::clone(&memory) as _ };
            from.submit(Request::new(op, move |result| drop(tell.send(result))));
            pending.push_back((memory, told));
            asked = (asked + PIECE).min(size);
        }
        let Some((memory, told)) = pending.pop_front() else { break };
        let result = told.recv().unwrap_or(Err(IoError::Closed));
        result.map_err(|e| request(source, "reading the source", e))?;
        let bytes = memory.to_vec();
        let fail = |e| OpenError::io(Path::new("-"), "writing the copy", e);
        target.write_all(&bytes).map_err(fail)?;
        done += bytes.len() as u64;
        if !progress(done, size) {
            return Err(OpenError::Cancelled);
        }
    }
    target.flush().map_err(|e| OpenError::io(Path::new("-"), "writing the copy", e))
}

/// Fills `buf` as far as the source goes.
fn read_full(source: &mut dyn Read, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match source.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}
