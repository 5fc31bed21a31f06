//! Memory for requests, used again and again: new pages cost more than what is done with them.

use std::sync::Arc;

use terem_memory::{AlignedBuffer, IoMemory};

/// Most buffers that are kept.
const KEPT: usize = 16;
/// The smallest that are.
const SMALLEST: usize = 64 << 10;

/// Shares of buffers that went to requests. When this is the last share of one, its request has ended.
#[derive(Default)]
pub(super) struct Buffers(Vec<Arc<AlignedBuffer>>);

impl Buffers {
    /// A buffer of `len` bytes that nobody else has. It holds anything.
    pub(super) fn take(&mut self, len: usize) -> Arc<AlignedBuffer> {
        for kept in self.0.iter_mut().filter(|kept| kept.len() == len) {
            if Arc::get_mut(kept).is_some() {
                return Arc::clone(kept);
            }
        }
        let buffer = Arc::new(AlignedBuffer::new(len));
        if len >= SMALLEST {
            if self.0.len() >= KEPT {
                self.0.retain_mut(|kept| Arc::get_mut(kept).is_none());
            }
            if self.0.len() < KEPT {
                self.0.push(Arc::clone(&buffer));
            }
        }
        buffer
    }

    /// A buffer that holds a copy of `bytes`.
    pub(super) fn copy_of(&mut self, bytes: &[u8]) -> Arc<AlignedBuffer> {
        let buffer = self.take(bytes.len());
        buffer.write_at(0, bytes);
        buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_else_has_is_used_again() {
        let mut buffers = Buffers::default();
        let one = buffers.copy_of(&[1; SMALLEST]);
        let two = buffers.copy_of(&[2; SMALLEST]);
        assert!(!Arc::ptr_eq(&one, &two));
        let share = Arc::clone(&one);
        drop(one);
        assert!(!Arc::ptr_eq(&buffers.take(SMALLEST), &share));
        let place = Arc::as_ptr(&share);
        drop(share);
        assert_eq!(Arc::as_ptr(&buffers.take(SMALLEST)), place);
        let all: Vec<_> = (0..100).map(|i| buffers.take(SMALLEST + i)).collect();
        assert!(all.iter().enumerate().all(|(i, buffer)| buffer.len() == SMALLEST + i));
        assert!(buffers.0.len() <= KEPT);
    }
}
