//! Memory for the data of requests, used again and again: new pages cost more than what is done with them.

use std::cell::RefCell;
use std::sync::Arc;

use terem_memory::AlignedBuffer;

/// The smallest buffer, in bytes.
const SMALLEST: usize = 4096;
/// The largest buffer that is kept.
const LARGEST: usize = 1 << 20;
/// Most bytes that are kept.
const KEPT: usize = 8 << 20;

/// Buffers that nobody uses now, by size: powers of two.
#[derive(Default)]
pub(crate) struct Buffers(RefCell<Kept>);

#[derive(Default)]
struct Kept {
    classes: [Vec<Arc<AlignedBuffer>>; 9],
    bytes: usize,
}

fn class(len: usize) -> usize {
    (len.next_power_of_two().trailing_zeros() - SMALLEST.trailing_zeros()) as usize
}

impl Buffers {
    /// A buffer of at least `len` bytes that nobody else has. It holds anything.
    pub(crate) fn take(&self, len: usize) -> Arc<AlignedBuffer> {
        let len = len.max(SMALLEST);
        if len > LARGEST {
            return Arc::new(AlignedBuffer::new(len));
        }
        let mut kept = self.0.borrow_mut();
        while let Some(buffer) = kept.classes[class(len)].pop() {
            kept.bytes -= len.next_power_of_two();
            // A request that was given up may still have a share.
            if Arc::strong_count(&buffer) == 1 {
                return buffer;
            }
        }
        Arc::new(AlignedBuffer::new(len.next_power_of_two()))
    }

    /// Gives a buffer of [`Self::take`] back.
    pub(crate) fn give(&self, buffer: Arc<AlignedBuffer>) {
        use terem_memory::IoMemory;
        let len = buffer.iovecs()[0].len();
        let mut kept = self.0.borrow_mut();
        if len <= LARGEST && kept.bytes + len <= KEPT {
            kept.bytes += len;
            kept.classes[class(len)].push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use terem_memory::IoMemory;

    #[test]
    fn what_is_kept_is_bounded_and_nobody_elses() {
        let buffers = Buffers::default();
        let one = buffers.take(5000);
        assert_eq!(one.len(), 8192);
        let share = Arc::clone(&one);
        buffers.give(one);
        let two = buffers.take(8192);
        assert!(!Arc::ptr_eq(&share, &two));
        drop(share);
        for _ in 0..100 {
            buffers.give(buffers.take(LARGEST));
            buffers.give(Arc::new(AlignedBuffer::new(LARGEST)));
        }
        assert!(buffers.0.borrow().bytes <= KEPT);
        assert_eq!(buffers.take(LARGEST + 1).len(), LARGEST + 1);
    }
}
