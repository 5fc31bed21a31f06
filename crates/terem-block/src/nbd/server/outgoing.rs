//! Replies on their way out: those that are ready go together, in one system call.

use std::rc::Rc;
use std::sync::Arc;

use terem_memory::AlignedBuffer;

use super::connection::Connection;
use crate::engine::View;
use crate::nbd::pieces::Pieces;
use crate::nbd::protocol::{ReplyHeader, Request, chunk};

/// Pieces of replies in order, not sent yet.
#[derive(Default)]
pub(super) struct Outgoing {
    pieces: Pieces,
    /// Buffers to give back when all is sent.
    buffers: Vec<Arc<AlignedBuffer>>,
    /// Bytes and requests that end then.
    bytes: usize,
    requests: usize,
    /// Whether somebody is sending.
    sending: bool,
}

/// What is sent at once.
struct Batch {
    views: Vec<View>,
    buffers: Vec<Arc<AlignedBuffer>>,
    bytes: usize,
    requests: usize,
}

impl Connection {
    /// Queues a chunk of a structured reply: `head` is the beginning of its payload, `data` the rest.
    pub(super) fn chunk(
        self: &Rc<Self>,
        request: &Request,
        (flags, kind): (u16, u16),
        head: &[u8],
        data: Option<(View, Arc<AlignedBuffer>)>,
    ) {
        let length = (head.len() + data.as_ref().map_or(0, |(view, _)| view.len())) as u64;
        let header = ReplyHeader::Chunk { flags, kind, cookie: request.cookie, length };
        let mut outgoing = self.outgoing.borrow_mut();
        let out = &mut *outgoing;
        header.encode(self.agreement.extended, request.offset, &mut out.pieces.headers);
        out.pieces.headers.extend(head);
        if let Some((view, buffer)) = data {
            out.pieces.push(view);
            out.buffers.push(buffer);
        }
        if flags & chunk::DONE == 0 {
            drop(outgoing);
            self.start_sending();
        }
    }

    /// Queues a simple reply.
    pub(super) fn simple(&self, error: u32, cookie: u64, data: Option<(View, Arc<AlignedBuffer>)>) {
        let mut outgoing = self.outgoing.borrow_mut();
        let out = &mut *outgoing;
        ReplyHeader::Simple { error, cookie }.encode(false, 0, &mut out.pieces.headers);
        if let Some((view, buffer)) = data {
            out.pieces.push(view);
            out.buffers.push(buffer);
        }
    }

    /// The last piece of a request's reply is queued; `held` is what it keeps until it is sent.
    pub(super) fn replied(self: &Rc<Self>, held: usize) {
        {
            let mut outgoing = self.outgoing.borrow_mut();
            outgoing.bytes += held;
            outgoing.requests += 1;
        }
        self.start_sending();
    }

    fn start_sending(self: &Rc<Self>) {
        if !std::mem::replace(&mut self.outgoing.borrow_mut().sending, true) {
            let this = Rc::clone(self);
            self.local.engine.spawn(async move { this.send_all().await });
        }
    }

    /// Sends until nothing is left.
    async fn send_all(self: Rc<Self>) {
        while let Some(batch) = self.next_batch() {
            if !self.broken.get()
                && let Err(error) = self.socket.send(&batch.views).await
            {
                tracing::debug!(%error, "an NBD client is gone");
                self.broken.set(true);
                // Ends the reader's wait too.
                self.socket.hang_up();
            }
            drop(batch.views);
            for buffer in batch.buffers {
                self.buffers.give(buffer);
            }
            self.ended(batch.bytes, batch.requests);
        }
    }

    fn next_batch(&self) -> Option<Batch> {
        let mut outgoing = self.outgoing.borrow_mut();
        let out = &mut *outgoing;
        if out.pieces.is_empty() {
            out.sending = false;
            return None;
        }
        let mut headers = self.buffers.take(out.pieces.headers.len());
        let views = out.pieces.take(&mut headers);
        let mut buffers = std::mem::take(&mut out.buffers);
        buffers.push(headers);
        let (bytes, requests) = (std::mem::take(&mut out.bytes), std::mem::take(&mut out.requests));
        Some(Batch { views, buffers, bytes, requests })
    }
}
