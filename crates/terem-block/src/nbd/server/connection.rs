//! A connection in transmission: tasks on the disk's own I/O thread, so that a request goes from the socket to the image and back
//! without waking another thread.
//!
//! ```text
//!  socket ──> reader: takes a request, waits until there is room for it ──> a task for each ──> Node
//!  socket <── writer: all replies that are ready, in one piece <──────────────┘
//! ```
//!
//! Memory: what the requests in flight hold is counted, and the reader takes no more of them than fit; so a client that
//! does not take its replies only stops itself.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use terem_memory::{AlignedBuffer, IoMemory};

use super::negotiate::Agreement;
use super::outgoing::Outgoing;
use crate::disk::Local;
use crate::engine::View;
use crate::nbd::buffers::Buffers;
use crate::nbd::input::Input;
use crate::nbd::protocol::{self as wire, Request, command, error, flag};
use crate::nbd::socket::Socket;

/// Most data of the requests in flight, in bytes: the largest request.
const MAX_BYTES: usize = wire::MAX_PAYLOAD as usize;
/// Most requests in flight.
const MAX_REQUESTS: usize = 256;

/// A connection.
pub(crate) struct Connection {
    pub(super) local: Local,
    pub(super) socket: Socket,
    pub(super) agreement: Agreement,
    pub(super) buffers: Buffers,
    pub(super) outgoing: RefCell<Outgoing>,
    /// Bytes and requests in flight, until their replies are sent.
    bytes: Cell<usize>,
    requests: Cell<usize>,
    /// The reader, waiting for room or for the end of all requests.
    reader: RefCell<Option<Waker>>,
    /// No reply can be sent any more.
    pub(super) broken: Cell<bool>,
}

impl Connection {
    pub(crate) fn new(local: Local, socket: Socket, agreement: Agreement) -> Rc<Self> {
        Rc::new(Self {
            local,
            socket,
            agreement,
            buffers: Buffers::default(),
            outgoing: RefCell::default(),
            bytes: Cell::new(0),
            requests: Cell::new(0),
            reader: RefCell::default(),
            broken: Cell::new(false),
        })
    }

    /// Serves the client until it leaves. All its requests have ended then.
    ///
    /// # Errors
    /// What the client did wrong, or what became of the socket.
    pub(crate) async fn serve(self: Rc<Self>) -> io::Result<()> {
        let result = self.read_requests().await;
        if result.is_err() {
            // Out of step: nothing that we would say makes sense to it.
            self.socket.hang_up();
        }
        self.idle().await;
        result
    }

    async fn read_requests(self: &Rc<Self>) -> io::Result<()> {
        let mut input = Input::new();
        let extended = self.agreement.extended;
        let mut header = [0; wire::EXTENDED_REQUEST_LEN];
        let header = &mut header[..Request::len(extended)];
        loop {
            if !input.fill(&self.socket, header.len()).await? {
                return Ok(());
            }
            input.take(header);
            let request = Request::decode(header, extended)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no request's magic number"))?;
            if request.command == command::DISC {
                return Ok(());
            }
            let carries = request.command == command::WRITE || (extended && request.has(flag::PAYLOAD_LEN));
            if carries && request.length > u64::from(wire::MAX_PAYLOAD) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "more data in a request than allowed",
                ));
            }
            let held = self.held(&request, carries);
            self.room_for(held).await;
            let payload = if carries {
                Some(self.take_payload(&mut input, crate::file::to_usize(request.length)).await?)
            } else {
                None
            };
            if self.broken.get() {
                return Ok(());
            }
            self.bytes.set(self.bytes.get() + held);
            self.requests.set(self.requests.get() + 1);
            let this = Rc::clone(self);
            self.local.engine.spawn(async move { this.perform(request, payload, held).await });
        }
    }

    /// Bytes of memory that a request needs.
    fn held(&self, request: &Request, carries: bool) -> usize {
        let length = match request.command {
            _ if carries => request.length,
            command::READ if request.length <= wire::MAX_PAYLOAD.into() => request.length,
            command::CACHE => super::perform::CACHE_STEP,
            command::BLOCK_STATUS => super::perform::STATUS_BYTES,
            _ => 0,
        };
        crate::file::to_usize(length).min(MAX_BYTES)
    }

    /// Waits until a request with `bytes` more fits.
    async fn room_for(&self, bytes: usize) {
        poll_fn(|cx| {
            let fits = self.bytes.get() + bytes <= MAX_BYTES && self.requests.get() < MAX_REQUESTS;
            if fits || self.broken.get() {
                return Poll::Ready(());
            }
            *self.reader.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Waits until no request is in flight.
    async fn idle(&self) {
        poll_fn(|cx| {
            if self.requests.get() == 0 {
                return Poll::Ready(());
            }
            *self.reader.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// A request's reply is sent (or cannot be).
    pub(super) fn ended(&self, bytes: usize, requests: usize) {
        self.bytes.set(self.bytes.get() - bytes);
        self.requests.set(self.requests.get() - requests);
        if let Some(waker) = self.reader.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Receives the data of a request.
    async fn take_payload(&self, input: &mut Input, len: usize) -> io::Result<Arc<AlignedBuffer>> {
        let buffer = self.buffers.take(len);
        let view = View::new(Arc::clone(&buffer) as Arc<dyn IoMemory>).part(0, len);
        input.read(&self.socket, &view).await?;
        Ok(buffer)
    }

    async fn perform(self: Rc<Self>, request: Request, payload: Option<Arc<AlignedBuffer>>, held: usize) {
        let result = match self.check(&request) {
            Ok(()) => self.execute(&request, payload.as_ref()).await,
            Err(error) => Err(error),
        };
        if let Some(buffer) = payload {
            self.buffers.give(buffer);
        }
        self.finish(&request, result, held);
    }

    /// Whether the request makes sense for this export.
    fn check(&self, request: &Request) -> Result<(), u32> {
        let known = match request.command {
            command::READ => flag::FUA | if self.agreement.structured { flag::DF } else { 0 },
            command::WRITE if self.agreement.extended => flag::FUA | flag::PAYLOAD_LEN,
            command::WRITE_ZEROES => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
            command::BLOCK_STATUS => flag::FUA | flag::REQ_ONE,
            _ => flag::FUA,
        };
        if request.flags & !known != 0 {
            return Err(error::EINVAL);
        }
        let size = self.local.node.size();
        let within = request.offset.checked_add(request.length).is_some_and(|end| end <= size);
        let writes = matches!(request.command, command::WRITE | command::WRITE_ZEROES | command::TRIM);
        match request.command {
            _ if writes && self.local.read_only => Err(error::EPERM),
            command::FLUSH => Ok(()),
            command::WRITE | command::WRITE_ZEROES if !within => Err(error::ENOSPC),
            _ if !within => Err(error::EINVAL),
            command::READ if request.length > wire::MAX_PAYLOAD.into() => Err(error::EOVERFLOW),
            command::BLOCK_STATUS if !self.agreement.allocation || request.length == 0 => Err(error::EINVAL),
            command::READ..=command::BLOCK_STATUS => Ok(()),
            _ => Err(error::EINVAL),
        }
    }
}
