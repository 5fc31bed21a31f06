//! How fast an image is.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use terem_memory::{AlignedBuffer, IoMemory};

use crate::convert::request;
use crate::{
    BlockBackend, Disk, Op, OpenError, OpenOptions, Request, ThrottleGroup, ThrottleLimits, Throttled,
};

/// What [`bench`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BenchOptions {
    /// Requests.
    pub count: u64,
    /// Requests under way at once.
    pub depth: usize,
    /// Bytes of a request.
    pub size: usize,
    /// First byte.
    pub offset: u64,
    /// From one request's beginning to the next's.
    pub step: u64,
    /// Write (and with what) rather than read.
    pub write: Option<u8>,
    /// Flush after so many writes.
    pub flush_interval: u64,
    /// What the disk may do in a second.
    pub limits: ThrottleLimits,
}

impl Default for BenchOptions {
    fn default() -> Self {
        let size = 4096;
        Self {
            count: 75_000,
            depth: 64,
            size,
            offset: 0,
            step: 4096,
            write: None,
            flush_interval: 0,
            limits: ThrottleLimits::default(),
        }
    }
}

/// Carries out requests one place after the other, from the beginning again at the disk's end; how long it took.
///
/// # Errors
/// [`OpenError`] when the image cannot be opened, or a request failed.
pub fn bench(
    path: impl AsRef<Path>,
    open: &OpenOptions,
    options: &BenchOptions,
) -> Result<Duration, OpenError> {
    let path = path.as_ref();
    let open = OpenOptions { read_only: options.write.is_none(), ..open.clone() };
    let disk = Arc::new(Disk::open(path, &open)?);
    let length = options.size as u64;
    if length == 0 || length > disk.size() {
        let what = format!("requests of {length} bytes on a disk of {}", disk.size());
        return Err(OpenError::Limit { path: path.to_owned(), what });
    }
    let limit = |what| OpenError::Limit { path: path.to_owned(), what };
    let backend: Arc<dyn BlockBackend> = if options.limits.is_none() {
        Arc::clone(&disk) as _
    } else {
        let group = ThrottleGroup::new(options.limits).map_err(|error| limit(error.to_string()))?;
        Arc::new(Throttled::new(Arc::clone(&disk) as _, &group))
    };
    let memory: Arc<AlignedBuffer> =
        Arc::new(AlignedBuffer::from_slice(&vec![options.write.unwrap_or(0); options.size]));
    let (tell, told) = channel();
    let begun = Instant::now();
    let (mut started, mut ended, mut in_flight, mut since_flush) = (0, 0, 0, 0);
    let mut offset = options.offset % (disk.size() - length + 1);
    let fail = |e| request(path, "carrying out a request", e);
    while ended < options.count {
        while in_flight < options.depth.max(1) && started < options.count {
            let memory = Arc::clone(&memory) as Arc<dyn IoMemory>;
            let op = match options.write {
                Some(_) => Op::Write { offset, memory },
                None => Op::Read { offset, memory },
            };
            let tell = tell.clone();
            backend.submit(Request::new(op, move |result| drop(tell.send(result))));
            offset += options.step;
            if offset + length > disk.size() {
                offset = 0;
            }
            started += 1;
            in_flight += 1;
        }
        if let Ok(result) = told.recv() {
            result.map_err(fail)?;
        }
        ended += 1;
        in_flight -= 1;
        since_flush += 1;
        if options.flush_interval > 0 && since_flush == options.flush_interval {
            disk.run(Op::Flush).map_err(fail)?;
            since_flush = 0;
        }
    }
    let took = begun.elapsed();
    // After that nothing else has the disk.
    backend.drain();
    drop(backend);
    Arc::into_inner(disk).map_or(Ok(()), Disk::close).map_err(fail)?;
    Ok(took)
}
