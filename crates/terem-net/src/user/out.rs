//! Frames that wait for the guest.

use std::collections::VecDeque;

/// From here on, connections keep their data; the rest (answers to single frames, datagrams) has room up to
/// [`LIMIT`].
const FULL: usize = 1 << 20;
const LIMIT: usize = 4 << 20;

/// Buffers kept.
const SPARE: usize = 64;

/// A queue of frames.
#[derive(Debug, Default)]
pub(super) struct Out {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    pushed: u64,
    /// Buffers of earlier frames: fresh memory for each large one would cost more than filling it.
    spare: Vec<Vec<u8>>,
}

impl Out {
    /// Appends a frame, or drops it when there are far too many.
    pub(super) fn push(&mut self, frame: Vec<u8>) {
        if self.bytes >= LIMIT {
            tracing::debug!(length = frame.len(), "the guest takes no frames: one is dropped");
            return;
        }
        self.bytes += cost(&frame);
        self.pushed += 1;
        self.frames.push_back(frame);
    }

    pub(super) fn pop(&mut self) -> Option<Vec<u8>> {
        let frame = self.frames.pop_front()?;
        self.bytes -= cost(&frame);
        Some(frame)
    }

    /// How many frames there were so far.
    pub(super) fn pushed(&self) -> u64 {
        self.pushed
    }

    /// An empty buffer.
    pub(super) fn buffer(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    /// Takes back the buffer of a frame that was delivered.
    pub(super) fn recycle(&mut self, mut frame: Vec<u8>) {
        if self.spare.len() < SPARE {
            frame.clear();
            self.spare.push(frame);
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.bytes >= FULL
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Small frames cost more than their bytes.
fn cost(frame: &[u8]) -> usize {
    frame.len() + 256
}
