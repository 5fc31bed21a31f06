//! Copying images, sparsely.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use terem_memory::AlignedBuffer;

use crate::{
    BlockBackend, CreateOptions, Disk, Format, IoError, Op, OpenError, OpenOptions, Request, create,
};

/// Bytes of one piece; a multiple of every cluster size.
const PIECE: u64 = 2 << 20;
/// Pieces under way at once.
const IN_FLIGHT: u64 = 8;
/// Zeroes are left out in units of at least this many bytes.
const SPARSE: usize = 4096;

/// Copies the image `source` (with its backing files) into a new image at `target`; zeroes take no space.
/// `progress` is told bytes done and bytes in all.
///
/// `target_options.size` of `None` is the source's size.
///
/// # Errors
/// [`OpenError`] of either image. An unfinished target is removed.
pub fn convert(
    source: impl AsRef<Path>,
    source_options: &OpenOptions,
    target: impl AsRef<Path>,
    target_options: &CreateOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), OpenError> {
    let (source, target) = (source.as_ref(), target.as_ref());
    let from = Disk::open(source, &OpenOptions { read_only: true, ..source_options.clone() })?;
    let size = from.size();
    // A raw file's holes need not be read to know what is in them.
    let holes = (from.facts().format == Format::Raw).then(|| fs::File::open(source).ok()).flatten();
    let skip = |at: u64| match &holes {
        Some(file) => next_data(file, at).map_or(size, |data| data - data % PIECE),
        None => at,
    };
    into_new(target, target_options, size, |to| copy(source, &from, target, to, &skip, progress))
}

/// Writes `size` bytes from `source` into a new image at `target`; zeroes take no space. A source that
/// ends earlier is continued with zeroes.
///
/// # Errors
/// [`OpenError`] when reading the source or writing the image fails. An unfinished image is removed.
pub fn import(
    source: &mut dyn Read,
    size: u64,
    target: impl AsRef<Path>,
    target_options: &CreateOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), OpenError> {
    let target = target.as_ref();
    into_new(target, target_options, size, |to| {
        let (tell, told) = channel();
        let mut pending = 0;
        let mut piece = vec![0; crate::file::to_usize(PIECE)];
        let mut at = 0;
        while at < size {
            let want = crate::file::to_usize(PIECE.min(size - at));
            let got = fill(source, &mut piece[..want])
                .map_err(|e| OpenError::io(target, "reading what is to be imported", e))?;
            if got == 0 {
                break;
            }
            pending += write_data(to, &piece[..got], at, SPARSE, &tell);
            while pending > IN_FLIGHT {
                await_write(&told, target)?;
                pending -= 1;
            }
            at += got as u64;
            progress(at, size);
        }
        while pending > 0 {
            await_write(&told, target)?;
            pending -= 1;
        }
        progress(size, size);
        Ok(())
    })
}

/// Makes the image, lets `write` fill it, and closes it; removes it when something failed.
fn into_new(
    target: &Path,
    options: &CreateOptions,
    size: u64,
    write: impl FnOnce(&Disk) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    let options = CreateOptions { size: Some(options.size.unwrap_or(size)), ..options.clone() };
    if options.size.is_some_and(|s| s < size) {
        let what = format!("it would be smaller than its source of {size} bytes");
        return Err(OpenError::Limit { path: target.to_owned(), what });
    }
    let existed = target.exists();
    create(target, &options)?;
    let open = OpenOptions { format: Some(options.format), ..OpenOptions::default() };
    let fail = |source| OpenError::Request { path: target.to_owned(), doing: "writing the copy", source };
    let result = Disk::open(target, &open).and_then(|disk| {
        write(&disk)?;
        disk.close().map_err(fail)
    });
    if result.is_err() && !existed {
        let _ = fs::remove_file(target);
    }
    result
}

/// Copies all of `from`.
fn copy(
    source: &Path,
    from: &Disk,
    target: &Path,
    to: &Disk,
    skip: &dyn Fn(u64) -> u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), OpenError> {
    let size = from.size();
    let unit = (to.geometry().optimal_io_size as usize).max(SPARSE);
    let (read_tell, read_told) = channel::<(u64, Arc<AlignedBuffer>, Result<(), IoError>)>();
    let (tell, told) = channel();
    let (mut next, mut reading, mut pending, mut done) = (0, 0, 0, 0);
    loop {
        while next < size && reading < IN_FLIGHT {
            next = next.max(skip(next)).min(size);
            if next == size {
                break;
            }
            let memory = Arc::new(AlignedBuffer::new(crate::file::to_usize(PIECE.min(size - next))));
            let (at, tell, kept) = (next, read_tell.clone(), Arc::clone(&memory));
            from.submit(Request::new(Op::Read { offset: at, memory }, move |result| {
                let _ = tell.send((at, kept, result));
            }));
            next += PIECE;
            reading += 1;
        }
        if reading == 0 {
            break;
        }
        let (at, memory, result) = read_told.recv().map_err(|_| closed(source, "reading the source"))?;
        result.map_err(|e| OpenError::Request {
            path: source.to_owned(),
            doing: "reading the source",
            source: e,
        })?;
        reading -= 1;
        let bytes = memory.to_vec();
        pending += write_data(to, &bytes, at, unit, &tell);
        while pending > IN_FLIGHT {
            await_write(&told, target)?;
            pending -= 1;
        }
        done = at.max(done);
        progress(done, size);
    }
    while pending > 0 {
        await_write(&told, target)?;
        pending -= 1;
    }
    progress(size, size);
    Ok(())
}

/// Submits writes of what is not zero in `bytes`, which belong at `offset`; returns how many.
fn write_data(to: &Disk, bytes: &[u8], offset: u64, unit: usize, tell: &Sender<Result<(), IoError>>) -> u64 {
    let mut submitted = 0;
    let mut run: Option<usize> = None;
    let mut at = 0;
    while at <= bytes.len() {
        let end = (at + unit).min(bytes.len());
        let data = at < end && bytes[at..end].iter().any(|&b| b != 0);
        match (run, data) {
            (None, true) => run = Some(at),
            (Some(start), false) => {
                let memory = Arc::new(AlignedBuffer::from_slice(&bytes[start..at]));
                let tell = tell.clone();
                to.submit(Request::new(Op::Write { offset: offset + start as u64, memory }, move |result| {
                    let _ = tell.send(result);
                }));
                submitted += 1;
                run = None;
            }
            _ => {}
        }
        if at == bytes.len() {
            break;
        }
        at = end;
    }
    submitted
}

fn await_write(told: &Receiver<Result<(), IoError>>, target: &Path) -> Result<(), OpenError> {
    let result = told.recv().map_err(|_| closed(target, "writing the copy"))?;
    result.map_err(|source| OpenError::Request { path: target.to_owned(), doing: "writing the copy", source })
}

fn closed(path: &Path, doing: &'static str) -> OpenError {
    OpenError::Request { path: path.to_owned(), doing, source: IoError::Closed }
}

/// Fills `buf` as far as the source goes.
fn fill(source: &mut dyn Read, buf: &mut [u8]) -> std::io::Result<usize> {
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

/// The first byte from `at` on that is not in a hole, or `None` when there is no more.
fn next_data(file: &fs::File, at: u64) -> Option<u64> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(data) => Some(data),
        Err(rustix::io::Errno::NXIO) => None,
        Err(_) => Some(at),
    }
}
