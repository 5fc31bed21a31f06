//! What a disk looks like from a device: [`BlockBackend`] and the requests it takes.

use std::fmt;
use std::sync::Arc;

use terem_memory::IoMemory;

/// Size and limits of a disk, fixed while it is open.
///
/// All byte values; offsets and lengths of requests need no alignment unless a device promises its guest
/// otherwise: the block layer splits, bounces and merges as the storage below requires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes that can be read and written. A multiple of 512.
    pub size: u64,
    /// Whether writes, discards and write-zeroes are refused.
    pub read_only: bool,
    /// Smallest unit a guest should address, in bytes: 512 or 4096.
    pub logical_block_size: u32,
    /// Unit that is written without read-modify-write, in bytes.
    pub physical_block_size: u32,
    /// Best request size in bytes (a qcow2 cluster), 0 when there is no preference.
    pub optimal_io_size: u32,
    /// Whether [`Op::Discard`] gives storage back. Where false a discard is accepted and does nothing.
    pub discard: bool,
    /// Unit in bytes in which storage can be given back; smaller parts are kept.
    pub discard_granularity: u32,
    /// Most bytes of one discard or write-zeroes request. Larger ones are refused as [`IoError::TooLarge`].
    pub max_discard: u64,
    /// Whether the disk has a volatile cache, so that a write is durable only after a flush.
    pub volatile_cache: bool,
}

/// One thing a disk can be asked to do. Offsets and lengths are bytes of the virtual disk; they may come
/// straight from a guest.
#[derive(Clone)]
pub enum Op {
    /// Fills all of `memory` from `offset` on.
    Read {
        /// First byte.
        offset: u64,
        /// Where the data goes; its length is the request's length.
        memory: Arc<dyn IoMemory>,
    },
    /// Writes all of `memory` at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// The data; its length is the request's length.
        memory: Arc<dyn IoMemory>,
    },
    /// Makes every write that was completed before this flush was submitted durable.
    Flush,
    /// Says that the contents are not needed any more; they may read back as anything the disk held
    /// there or as zeroes, but never as another's data.
    Discard {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
    /// Makes the range read back as zeroes.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// Whether the storage may be given back.
        unmap: bool,
    },
}

impl Op {
    /// First byte and number of bytes (0, 0 for a flush).
    #[must_use]
    pub fn range(&self) -> (u64, u64) {
        match self {
            Self::Read { offset, memory } | Self::Write { offset, memory } => (*offset, memory.len() as u64),
            Self::Flush => (0, 0),
            Self::Discard { offset, length } | Self::WriteZeroes { offset, length, .. } => (*offset, *length),
        }
    }

    /// The operation's name, for messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Flush => "flush",
            Self::Discard { .. } => "discard",
            Self::WriteZeroes { .. } => "write-zeroes",
        }
    }
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (offset, length) = self.range();
        write!(f, "{} {offset:#x}+{length:#x}", self.name())
    }
}

/// Called exactly once when a request has ended, from a thread of the disk. It must not block.
pub type Complete = Box<dyn FnOnce(Result<(), IoError>) + Send + 'static>;

/// An [`Op`] and whom to tell when it has ended.
pub struct Request {
    /// What to do.
    pub op: Op,
    /// Called once with the outcome, from the disk's I/O thread (or from the submitting thread when the
    /// disk is already closed).
    pub complete: Complete,
}

impl Request {
    /// A request that calls `complete` when `op` has ended.
    pub fn new(op: Op, complete: impl FnOnce(Result<(), IoError>) + Send + 'static) -> Self {
        Self { op, complete: Box::new(complete) }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Request").field(&self.op).finish()
    }
}

/// Why a request failed. Only this request is affected unless said otherwise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The request does not lie within the disk.
    #[error("{offset:#x}+{length:#x} is outside of the disk of {size:#x} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        length: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// A write-like request for a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
    /// More than [`Geometry::max_discard`] bytes at once.
    #[error("{length:#x} bytes in one request, {max:#x} are allowed")]
    TooLarge {
        /// Bytes asked for.
        length: u64,
        /// Bytes allowed.
        max: u64,
    },
    /// The storage below is full; space must be made there before the write can be tried again.
    #[error("no space left for the image")]
    NoSpace,
    /// The image's metadata makes no sense at this place.
    #[error("the image is corrupt: {0}")]
    Corrupt(String),
    /// An earlier flush failed: what was written before may be lost, so no later flush can succeed.
    #[error("an earlier flush of the image failed; data written before it may be lost")]
    FlushFailed,
    /// The format or the image cannot do it.
    #[error("{0} are not supported by this image")]
    Unsupported(&'static str),
    /// Data of an encrypted image that was opened without its passphrase.
    #[error("the image is encrypted, and was opened without its passphrase")]
    Locked,
    /// The disk is closed.
    #[error("the disk is closed")]
    Closed,
    /// The server that has the disk is not there any more, or talks nonsense.
    #[error("{0}")]
    Server(String),
    /// The host reported this error number.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Os(i32),
}

impl IoError {
    /// The nearest error number of `errno.h`, for devices that report one.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::OutOfRange { .. } | Self::TooLarge { .. } => libc::EINVAL,
            Self::ReadOnly => libc::EROFS,
            Self::Locked => libc::EACCES,
            Self::Unsupported(_) => libc::ENOTSUP,
            Self::NoSpace => libc::ENOSPC,
            Self::Corrupt(_) | Self::FlushFailed | Self::Closed | Self::Server(_) => libc::EIO,
            Self::Os(errno) => *errno,
        }
    }
}

impl From<std::io::Error> for IoError {
    fn from(error: std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Self::NoSpace,
            Some(errno) => Self::Os(errno),
            None => Self::Os(libc::EIO),
        }
    }
}

/// A disk as its device sees it.
///
/// Requests may come from any thread, many at once, and complete in any order; two overlapping requests in
/// flight at the same time leave, block by block, the result of one of both orders. Offsets and lengths may
/// be a guest's: implementations answer nonsense with an [`IoError`] and never panic.
pub trait BlockBackend: Send + Sync {
    /// Size and limits.
    fn geometry(&self) -> Geometry;

    /// Takes a request; never waits for I/O. `request.complete` is called exactly once.
    fn submit(&self, request: Request);

    /// Waits until every request submitted before has ended. Blocks; does not flush. Not to be called
    /// from a completion.
    fn drain(&self);

    /// Size in bytes.
    fn size(&self) -> u64 {
        self.geometry().size
    }

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool {
        self.geometry().read_only
    }
}
