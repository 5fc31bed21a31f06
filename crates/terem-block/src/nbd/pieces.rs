//! Messages on their way out: headers and data in order, to be sent in one system call.

use std::sync::Arc;

use terem_memory::{AlignedBuffer, IoMemory};

use crate::engine::View;

/// Messages that are not sent yet.
#[derive(Default)]
pub(crate) struct Pieces {
    /// Headers, one after the other.
    pub(crate) headers: Vec<u8>,
    /// Data, and how many bytes of headers go before each.
    data: Vec<(usize, View)>,
}

impl Pieces {
    /// Appends data after the headers so far.
    pub(crate) fn push(&mut self, view: View) {
        self.data.push((self.headers.len(), view));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.headers.is_empty()
    }

    /// Takes all of it. `buffer`, which has room, holds the headers.
    pub(crate) fn take(&mut self, buffer: &mut Arc<AlignedBuffer>) -> Vec<View> {
        match Arc::get_mut(buffer) {
            Some(own) => own.as_mut_slice()[..self.headers.len()].copy_from_slice(&self.headers),
            None => *buffer = Arc::new(AlignedBuffer::from_slice(&self.headers)),
        }
        let all = View::new(Arc::clone(buffer) as Arc<dyn IoMemory>);
        let mut views = Vec::with_capacity(2 * self.data.len() + 1);
        let mut at = 0;
        for (before, data) in self.data.drain(..) {
            if before > at {
                views.push(all.part(at, before - at));
            }
            views.push(data);
            at = before;
        }
        if at < self.headers.len() {
            views.push(all.part(at, self.headers.len() - at));
        }
        self.headers.clear();
        views
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_kept() {
        let mut pieces = Pieces::default();
        pieces.headers.extend(b"one");
        pieces.push(View::copy_of(b"1"));
        pieces.headers.extend(b"two");
        pieces.headers.extend(b"three");
        pieces.push(View::copy_of(b"3"));
        pieces.headers.extend(b"four");
        let mut buffer = Arc::new(AlignedBuffer::new(4096));
        let sent: Vec<u8> = pieces.take(&mut buffer).iter().flat_map(View::to_vec).collect();
        assert_eq!(sent, b"one1twothree3four");
        assert!(pieces.is_empty());
        assert!(pieces.take(&mut buffer).is_empty());
    }
}
