//! Memory that the host's kernel may read and write while an I/O request is in flight.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use vm_memory::{GuestAddress, VolatileSlice};

use crate::{GuestMemory, MemoryError};

/// One contiguous piece of [`IoMemory`], laid out as the kernel's `struct iovec`.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct IoVec(pub libc::iovec);

// SAFETY: an address and a length; the owner (an IoMemory) promises that the memory is valid.
unsafe impl Send for IoVec {}
// SAFETY: as above.
unsafe impl Sync for IoVec {}

impl IoVec {
    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: the IoMemory that owns this entry keeps it valid as long as itself is borrowed.
        unsafe { VolatileSlice::new(self.0.iov_base.cast(), self.0.iov_len) }
    }
}

/// Scatter-gather memory of an I/O request.
///
/// # Safety
/// Until the value is dropped, all of [`Self::iovecs`] must be valid memory that others (the kernel, a
/// guest, other threads) may read and write at any time; so no reference to it may exist.
pub unsafe trait IoMemory: Send + Sync + 'static {
    /// The pieces, in order.
    fn iovecs(&self) -> &[IoVec];

    /// To be called after `len` bytes from `offset` (bytes from the first piece's start) were written
    /// by anybody who went around this trait's own methods, such as the kernel.
    fn mark_written(&self, offset: usize, len: usize);

    /// Bytes in all pieces.
    fn len(&self) -> usize {
        self.iovecs().iter().map(IoVec::len).sum()
    }

    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes from `offset` on into `buf`; returns how many there were.
    fn read_at(&self, offset: usize, buf: &mut [u8]) -> usize {
        let mut done = 0;
        for_pieces(self.iovecs(), offset, buf.len(), |piece, n| {
            piece.copy_to(&mut buf[done..done + n]);
            done += n;
        });
        done
    }

    /// Copies `buf` to `offset`; returns how many bytes had room. Marks them written.
    fn write_at(&self, offset: usize, buf: &[u8]) -> usize {
        let mut done = 0;
        for_pieces(self.iovecs(), offset, buf.len(), |piece, n| {
            piece.copy_from(&buf[done..done + n]);
            done += n;
        });
        self.mark_written(offset, done);
        done
    }

    /// Fills `len` bytes from `offset` on with zeroes; returns how many there were.
    fn zero_at(&self, offset: usize, len: usize) -> usize {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut done = 0;
        for_pieces(self.iovecs(), offset, len, |piece, n| {
            let mut at = 0;
            while at < n {
                let step = (n - at).min(ZEROES.len());
                if let Ok(part) = piece.subslice(at, step) {
                    part.copy_from(&ZEROES[..step]);
                }
                at += step;
            }
            done += n;
        });
        self.mark_written(offset, done);
        done
    }
}

/// Calls `f` with each piece (cut to the range) of `len` bytes from `offset` on.
fn for_pieces(iovecs: &[IoVec], offset: usize, len: usize, mut f: impl FnMut(&VolatileSlice<'_>, usize)) {
    let (mut skip, mut left) = (offset, len);
    for v in iovecs {
        if skip >= v.len() {
            skip -= v.len();
            continue;
        }
        let n = (v.len() - skip).min(left);
        if n == 0 {
            break;
        }
        if let Ok(piece) = v.slice().subslice(skip, n) {
            f(&piece, n);
        }
        left -= n;
        skip = 0;
    }
}

/// Pieces of guest RAM, kept alive as long as this value.
#[derive(Debug)]
pub struct GuestSlices {
    memory: GuestMemory,
    iovecs: Vec<IoVec>,
    ranges: Vec<(GuestAddress, u32)>,
}

impl GuestSlices {
    pub(crate) fn new(memory: GuestMemory, ranges: &[(GuestAddress, u32)]) -> Result<Self, MemoryError> {
        let mut iovecs = Vec::with_capacity(ranges.len());
        for &(addr, len) in ranges {
            let bad = || MemoryError::NotRam { addr: addr.0, len: u64::from(len) };
            if !memory.is_ram(addr.0, u64::from(len)) {
                return Err(bad());
            }
            let offset = usize::try_from(addr.0).map_err(|_| bad())?;
            let iov_base = memory.window_base().wrapping_add(offset).cast();
            iovecs.push(IoVec(libc::iovec { iov_base, iov_len: len as usize }));
        }
        Ok(Self { memory, iovecs, ranges: ranges.to_vec() })
    }
}

// SAFETY: the pieces are RAM of `memory` (checked in `new`), whose mapping this value keeps alive.
unsafe impl IoMemory for GuestSlices {
    fn iovecs(&self) -> &[IoVec] {
        &self.iovecs
    }

    fn mark_written(&self, offset: usize, len: usize) {
        let (mut skip, mut left) = (offset as u64, len as u64);
        for &(addr, size) in &self.ranges {
            let size = u64::from(size);
            if skip >= size {
                skip -= size;
                continue;
            }
            let n = (size - skip).min(left);
            self.memory.marks().written_range(addr.0 + skip, n);
            left -= n;
            skip = 0;
            if left == 0 {
                break;
            }
        }
    }
}

/// An owned, zeroed buffer, aligned to 4096 bytes so that it can be used for direct I/O.
#[derive(Debug)]
pub struct AlignedBuffer {
    iovec: [IoVec; 1],
    layout: Layout,
}

impl AlignedBuffer {
    /// A buffer of `len` bytes of zeroes.
    ///
    /// # Panics
    /// When `len` is more than `isize::MAX` or there is no memory: the sizes asked for are our own and
    /// bounded (cluster and table sizes), never taken unchecked from an image.
    #[must_use]
    #[allow(clippy::expect_used, reason = "documented: a caller's mistake")]
    pub fn new(len: usize) -> Self {
        let layout = Layout::from_size_align(len.max(1), 4096).expect("a buffer size below isize::MAX");
        // SAFETY: the layout's size is not zero.
        let Some(at) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        Self { iovec: [IoVec(libc::iovec { iov_base: at.as_ptr().cast(), iov_len: len })], layout }
    }

    /// A buffer that holds a copy of `bytes`.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Self {
        let buffer = Self::new(bytes.len());
        buffer.write_at(0, bytes);
        buffer
    }

    /// A copy of the contents.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.read_at(0, &mut bytes);
        bytes
    }

    /// The contents. Exclusive access means that no request is in flight: requests hold a share.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: allocated and zeroed in `new`; exclusive by &mut.
        unsafe { std::slice::from_raw_parts_mut(self.iovec[0].0.iov_base.cast(), self.iovec[0].0.iov_len) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.iovec[0].0.iov_base.cast(), self.layout) };
    }
}

// SAFETY: the allocation lives as long as the value, and is only reached through volatile copies or
// exclusive access.
unsafe impl IoMemory for AlignedBuffer {
    fn iovecs(&self) -> &[IoVec] {
        &self.iovec
    }

    fn mark_written(&self, _offset: usize, _len: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PAGE_SIZE, RamRange};
    use vm_memory::Bytes;

    #[test]
    fn slices_scatter_gather_and_mark() {
        let mem = GuestMemory::new(&[RamRange { base: 0, size: 1 << 20 }]).unwrap();
        let a =
            mem.slices(&[(GuestAddress(4090), 4), (GuestAddress(0), 0), (GuestAddress(8192), 8)]).unwrap();
        assert_eq!(a.len(), 12);
        let word = mem.marks().mark_code(2);
        assert_eq!(a.write_at(2, &[1, 2, 3, 4]), 4);
        assert_ne!(mem.marks().word(8192 / PAGE_SIZE), word);
        let mut got = [0; 2];
        mem.read_slice(&mut got, GuestAddress(4092)).unwrap();
        assert_eq!(got, [1, 2]);
        mem.read_slice(&mut got, GuestAddress(8192)).unwrap();
        assert_eq!(got, [3, 4]);
        let mut all = [9; 20];
        assert_eq!(a.read_at(0, &mut all), 12);
        assert_eq!(&all[..7], &[0, 0, 1, 2, 3, 4, 0]);
        assert_eq!(a.zero_at(3, 100), 9);
        assert_eq!(a.read_at(0, &mut all), 12);
        assert_eq!(&all[..5], &[0, 0, 1, 0, 0]);
    }

    #[test]
    fn slices_outside_ram_are_refused() {
        let mem = GuestMemory::new(&[RamRange { base: 0, size: 8192 }]).unwrap();
        for bad in [(8192, 1), (8190, 4), (u64::MAX, 2)] {
            assert!(matches!(mem.slices(&[(GuestAddress(bad.0), bad.1)]), Err(MemoryError::NotRam { .. })));
        }
    }

    #[test]
    fn aligned_buffers_hold_what_was_put() {
        let mut b = AlignedBuffer::from_slice(b"teremok");
        assert_eq!(b.iovecs()[0].0.iov_base.addr() % 4096, 0);
        b.as_mut_slice()[0] = b'T';
        assert_eq!(b.to_vec(), b"Teremok");
        assert_eq!(AlignedBuffer::new(0).len(), 0);
    }
}
