//! Memory of an operation: views into shared memory, and the kernel's list of them.

use std::sync::Arc;

use terem_memory::{AlignedBuffer, IoMemory, IoVec};

/// Most pieces of memory in one system call (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;

/// A range of shared memory.
#[derive(Clone)]
pub(crate) struct View {
    memory: Arc<dyn IoMemory>,
    start: usize,
    len: usize,
}

impl View {
    /// All of `memory`.
    pub(crate) fn new(memory: Arc<dyn IoMemory>) -> Self {
        let len = memory.len();
        Self { memory, start: 0, len }
    }

    /// A new buffer of zeroes.
    pub(crate) fn zeroed(len: usize) -> Self {
        Self::new(Arc::new(AlignedBuffer::new(len)))
    }

    /// A new buffer with a copy of `bytes`.
    pub(crate) fn copy_of(bytes: &[u8]) -> Self {
        Self::new(Arc::new(AlignedBuffer::from_slice(bytes)))
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// `len` bytes from `offset` on, cut at this view's end.
    pub(crate) fn part(&self, offset: usize, len: usize) -> Self {
        let offset = offset.min(self.len);
        Self { memory: Arc::clone(&self.memory), start: self.start + offset, len: len.min(self.len - offset) }
    }

    pub(crate) fn zero(&self) {
        self.memory.zero_at(self.start, self.len);
    }

    /// Copies `bytes` to the view's beginning.
    pub(crate) fn put(&self, bytes: &[u8]) {
        let n = bytes.len().min(self.len);
        self.memory.write_at(self.start, &bytes[..n]);
    }

    /// Copies the beginning of `other`, as far as there is room.
    pub(crate) fn copy_from(&self, other: &Self) {
        let n = self.len.min(other.len);
        let mut at = 0;
        let mut some = [0; 4096];
        while at < n {
            let step = (n - at).min(some.len());
            other.get(at, &mut some[..step]);
            self.memory.write_at(self.start + at, &some[..step]);
            at += step;
        }
    }

    /// Copies bytes from `offset` on.
    pub(crate) fn get(&self, offset: usize, to: &mut [u8]) {
        let len = to.len().min(self.len.saturating_sub(offset));
        self.memory.read_at(self.start + offset, &mut to[..len]);
    }

    /// A copy of the contents.
    pub(crate) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.memory.read_at(self.start, &mut bytes);
        bytes
    }

    /// Says that the kernel wrote the first `len` bytes.
    pub(crate) fn mark_written(&self, len: usize) {
        self.memory.mark_written(self.start, len.min(self.len));
    }
}

/// The kernel's list for some views, with shares of their memory.
pub(crate) struct Vectors {
    pub(super) list: Vec<IoVec>,
    _memory: Vec<Arc<dyn IoMemory>>,
}

impl std::fmt::Debug for Vectors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} pieces", self.list.len())
    }
}

impl Vectors {
    /// The pieces of `views` from byte `skip` on, `MAX_VECTORS` at most, and how many bytes they hold.
    pub(crate) fn new(views: &[View], mut skip: usize) -> (Self, usize) {
        let (mut list, mut memory, mut total) = (Vec::new(), Vec::new(), 0);
        for view in views {
            if skip >= view.len {
                skip -= view.len;
                continue;
            }
            let (mut at, mut left) = (view.start + skip, view.len - skip);
            skip = 0;
            for piece in view.memory.iovecs() {
                if at >= piece.len() {
                    at -= piece.len();
                    continue;
                }
                let n = (piece.len() - at).min(left);
                if n == 0 || list.len() == MAX_VECTORS {
                    break;
                }
                let iov_base = piece.0.iov_base.cast::<u8>().wrapping_add(at).cast();
                list.push(IoVec(libc::iovec { iov_base, iov_len: n }));
                (total, left, at) = (total + n, left - n, 0);
            }
            memory.push(Arc::clone(&view.memory));
            if list.len() == MAX_VECTORS {
                break;
            }
        }
        (Self { list, _memory: memory }, total)
    }

    /// Bytes of all pieces.
    pub(super) fn len(&self) -> usize {
        self.list.iter().map(IoVec::len).sum()
    }

    /// Whether all pieces begin and end at multiples of `align`.
    pub(crate) fn aligned(&self, align: usize) -> bool {
        self.list.iter().all(|v| v.0.iov_base.addr() % align == 0 && v.len() % align == 0)
    }
}
