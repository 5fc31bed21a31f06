//! The connection to a server, and its requests in flight.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use super::connect::{Connected, connect};
use super::negotiate::Terms;
use crate::engine::{Engine, View};
use crate::extent::Extent;
use crate::nbd::buffers::Buffers;
use crate::nbd::pieces::Pieces;
use crate::nbd::protocol::{Request, command};
use crate::nbd::socket::Socket;
use crate::nbd::tls::ClientTls;
use crate::nbd::uri::NbdUri;
use crate::{IoError, OpenError};

/// Time between two attempts to connect again.
const RETRY: Duration = Duration::from_millis(200);

/// What a request wants back.
#[derive(Clone)]
pub(super) enum Wanted {
    /// That it is done; with data to send.
    Done(Option<View>),
    /// Data, into this view.
    Data(View),
    /// Block status.
    Extents,
}

/// What came back.
#[derive(Debug)]
pub(super) enum Answer {
    /// It is done; the data is in the view.
    Done,
    /// Block status.
    Extents(Vec<Extent>),
}

/// How a request ended.
pub(super) enum Outcome {
    Answered(Result<Answer, IoError>),
    /// The connection broke before that; it can be tried again on another.
    Lost,
}

/// A request that the server has not answered completely.
pub(super) struct Pending {
    pub(super) request: Request,
    pub(super) wanted: Wanted,
    /// Bytes of a read that came so far.
    pub(super) got: u64,
    /// What went wrong so far.
    pub(super) error: Option<IoError>,
    pub(super) extents: Vec<Extent>,
    outcome: Option<Outcome>,
    waker: Option<Waker>,
}

/// Whether there is a connection.
enum State {
    Up(Rc<Socket>),
    /// Lost; somebody is trying to get another.
    Down,
    /// Lost for good, and why.
    Gone(String),
}

/// A connection to an export, which outlives its sockets.
pub(super) struct Link {
    engine: Rc<Engine>,
    uri: NbdUri,
    tls: Option<ClientTls>,
    terms: Terms,
    state: RefCell<State>,
    /// Requests by the lower half of their cookies.
    pending: RefCell<Vec<Option<Pending>>>,
    free: RefCell<Vec<usize>>,
    /// The upper half of cookies: other in each connection, so that no late answer is taken for another's.
    generation: Cell<u32>,
    pieces: RefCell<Pieces>,
    sending: Cell<bool>,
    /// Whether somebody reads what the socket receives: from the first request on.
    receiving: Cell<bool>,
    buffers: Buffers,
    /// Who waits for another connection.
    waiting: RefCell<VecDeque<Waker>>,
    /// Tells the thread that connects again to stop.
    closed: Arc<AtomicBool>,
}

impl Link {
    pub(super) fn start(
        engine: Rc<Engine>,
        uri: NbdUri,
        tls: Option<ClientTls>,
        connected: Connected,
    ) -> Rc<Self> {
        let Connected { fd, session, terms } = connected;
        let socket = Rc::new(Socket::new(Rc::clone(&engine), Arc::new(fd), session));
        let link = Rc::new(Self {
            engine,
            uri,
            tls,
            terms,
            state: RefCell::new(State::Down),
            pending: RefCell::default(),
            free: RefCell::default(),
            generation: Cell::new(0),
            pieces: RefCell::default(),
            sending: Cell::new(false),
            receiving: Cell::new(false),
            buffers: Buffers::default(),
            waiting: RefCell::default(),
            closed: Arc::default(),
        });
        link.come_up(socket);
        link
    }

    pub(super) fn uri(&self) -> &NbdUri {
        &self.uri
    }

    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Uses a new socket from here on.
    fn come_up(&self, socket: Rc<Socket>) {
        self.generation.set(self.generation.get().wrapping_add(1));
        *self.pieces.borrow_mut() = Pieces::default();
        *self.state.borrow_mut() = State::Up(socket);
        self.receiving.set(false);
        for waker in self.waiting.borrow_mut().drain(..) {
            waker.wake();
        }
    }

    /// Sends a request and waits for its answer, over more than one connection if need be.
    pub(super) async fn ask(
        self: &Rc<Self>,
        (command, flags, offset, length): (u16, u16, u64, u64),
        wanted: Wanted,
    ) -> Result<Answer, IoError> {
        loop {
            self.wait_for_connection().await?;
            let index = self.free.borrow_mut().pop().unwrap_or_else(|| {
                let mut pending = self.pending.borrow_mut();
                pending.push(None);
                pending.len() - 1
            });
            let cookie = u64::from(self.generation.get()) << 32 | index as u64;
            let request = Request { flags, command, cookie, offset, length };
            {
                let mut pieces = self.pieces.borrow_mut();
                request.encode(self.terms.extended, &mut pieces.headers);
                if let Wanted::Done(Some(view)) = &wanted {
                    pieces.push(view.clone());
                }
            }
            self.pending.borrow_mut()[index] = Some(Pending {
                request,
                wanted: wanted.clone(),
                got: 0,
                error: None,
                extents: Vec::new(),
                outcome: None,
                waker: None,
            });
            self.start_sending();
            match self.outcome(index).await {
                Outcome::Answered(result) => return result,
                Outcome::Lost => {}
            }
        }
    }

    /// Waits for the end of a request.
    async fn outcome(&self, index: usize) -> Outcome {
        let outcome = poll_fn(|cx| {
            let mut pending = self.pending.borrow_mut();
            let Some(request) = pending.get_mut(index).and_then(Option::as_mut) else {
                return Poll::Ready(Outcome::Lost);
            };
            match request.outcome.take() {
                Some(outcome) => Poll::Ready(outcome),
                None => {
                    request.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await;
        self.pending.borrow_mut()[index] = None;
        self.free.borrow_mut().push(index);
        outcome
    }

    async fn wait_for_connection(&self) -> Result<(), IoError> {
        poll_fn(|cx| match &*self.state.borrow() {
            State::Up(_) => Poll::Ready(Ok(())),
            State::Gone(why) => Poll::Ready(Err(IoError::Server(why.clone()))),
            State::Down => {
                self.waiting.borrow_mut().push_back(cx.waker().clone());
                Poll::Pending
            }
        })
        .await
    }

    /// Lets `f` look at a request in flight; `None` when there is none with that cookie.
    pub(super) fn with_pending<R>(&self, cookie: u64, f: impl FnOnce(&mut Pending) -> R) -> Option<R> {
        let index = usize::try_from(cookie & 0xffff_ffff).ok()?;
        let mut pending = self.pending.borrow_mut();
        let request = pending.get_mut(index)?.as_mut()?;
        (request.request.cookie == cookie && request.outcome.is_none()).then(|| f(request))
    }

    /// A request has its answer.
    pub(super) fn answered(&self, cookie: u64, result: Result<Answer, IoError>) {
        self.with_pending(cookie, |pending| pending.end(Outcome::Answered(result)));
    }

    fn start_sending(self: &Rc<Self>) {
        let State::Up(socket) = &*self.state.borrow() else { return };
        if !self.receiving.replace(true) {
            let (link, socket) = (Rc::clone(self), Rc::clone(socket));
            self.engine.spawn(async move {
                let error = link.receive_all(&socket).await;
                link.lose(&socket, &error);
            });
        }
        if !self.sending.replace(true) {
            let (link, socket) = (Rc::clone(self), Rc::clone(socket));
            self.engine.spawn(async move { link.send_all(&socket).await });
        }
    }

    /// Sends until nothing is left, or the connection is lost.
    async fn send_all(self: Rc<Self>, socket: &Rc<Socket>) {
        let generation = self.generation.get();
        loop {
            let (views, buffer) = {
                let mut pieces = self.pieces.borrow_mut();
                if pieces.is_empty() {
                    break;
                }
                let mut buffer = self.buffers.take(pieces.headers.len());
                (pieces.take(&mut buffer), buffer)
            };
            let sent = socket.send(&views).await;
            drop(views);
            self.buffers.give(buffer);
            if sent.is_err() {
                // The reader will see its end, and tell.
                socket.hang_up();
            }
            if sent.is_err() || generation != self.generation.get() {
                break;
            }
        }
        if generation == self.generation.get() {
            self.sending.set(false);
        }
    }

    /// The connection over `socket` broke: requests are tried again, or fail.
    fn lose(self: &Rc<Self>, socket: &Rc<Socket>, why: &str) {
        socket.hang_up();
        if !matches!(&*self.state.borrow(), State::Up(current) if Rc::ptr_eq(current, socket)) {
            return;
        }
        let why = format!("{}: {why}", self.uri.text);
        let again = !self.uri.reconnect.is_zero() && !self.closed.load(Ordering::Relaxed);
        if again {
            tracing::warn!("{why}; connecting again");
            *self.state.borrow_mut() = State::Down;
            self.connect_again();
        } else {
            self.give_up(why);
        }
        self.sending.set(false);
        for request in self.pending.borrow_mut().iter_mut().flatten() {
            request.end(Outcome::Lost);
        }
    }

    fn give_up(&self, why: String) {
        if !self.closed.load(Ordering::Relaxed) {
            tracing::error!("{why}");
        }
        *self.state.borrow_mut() = State::Gone(why);
        for waker in self.waiting.borrow_mut().drain(..) {
            waker.wake();
        }
    }

    /// Has a thread connect again, and goes on when it has.
    fn connect_again(self: &Rc<Self>) {
        let (uri, tls, closed) = (self.uri.clone(), self.tls.clone(), Arc::clone(&self.closed));
        let (meeting, bell) = (Arc::new(Meeting::default()), self.engine.bell());
        let theirs = Arc::clone(&meeting);
        let thread = std::thread::Builder::new().name("nbd-reconnect".into()).spawn(move || {
            theirs.arrive(connect_until(&uri, tls.as_ref(), &closed));
            bell.ring();
        });
        if let Err(error) = thread {
            return self.give_up(format!("{}: cannot connect again: {error}", self.uri.text));
        }
        let link = Rc::clone(self);
        self.engine.spawn(async move {
            match meeting.result().await {
                Ok(Connected { fd, session, terms }) if terms == link.terms => {
                    tracing::info!("{}: connected again", link.uri.text);
                    link.come_up(Rc::new(Socket::new(Rc::clone(&link.engine), Arc::new(fd), session)));
                }
                Ok(_) => link.give_up(format!(
                    "{}: the export is another one since the server came back",
                    link.uri.text
                )),
                Err(error) => link.give_up(error.to_string()),
            }
        });
    }

    /// Says good-bye. No request is in flight.
    pub(super) async fn leave(self: &Rc<Self>) {
        self.closed.store(true, Ordering::Relaxed);
        let socket = match &*self.state.borrow() {
            State::Up(socket) => Rc::clone(socket),
            _ => return,
        };
        let mut bye = Vec::new();
        let request = Request { flags: 0, command: command::DISC, cookie: 0, offset: 0, length: 0 };
        request.encode(self.terms.extended, &mut bye);
        let _ = socket.send(&[View::copy_of(&bye)]).await;
        socket.hang_up();
    }

    /// Hangs up, if that was not done.
    pub(super) fn abandon(&self) {
        self.closed.store(true, Ordering::Relaxed);
        if let State::Up(socket) = &*self.state.borrow() {
            socket.hang_up();
        }
    }
}

impl Pending {
    fn end(&mut self, outcome: Outcome) {
        if self.outcome.is_none() {
            self.outcome = Some(outcome);
            if let Some(waker) = self.waker.take() {
                waker.wake();
            }
        }
    }
}

/// Tries to connect until it works, the time is over, or the link is closed.
fn connect_until(uri: &NbdUri, tls: Option<&ClientTls>, closed: &AtomicBool) -> Result<Connected, OpenError> {
    let end = Instant::now() + uri.reconnect;
    loop {
        let result = connect(uri, tls);
        if result.is_ok() || Instant::now() + RETRY > end || closed.load(Ordering::Relaxed) {
            return result;
        }
        std::thread::sleep(RETRY);
    }
}

/// Where the thread that connects hands over its result.
#[derive(Default)]
struct Meeting(Mutex<Arrived>);

#[derive(Default)]
struct Arrived {
    result: Option<Result<Connected, OpenError>>,
    waiting: Option<Waker>,
}

impl Meeting {
    fn arrive(&self, result: Result<Connected, OpenError>) {
        let mut meeting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        meeting.result = Some(result);
        if let Some(waker) = meeting.waiting.take() {
            waker.wake();
        }
    }

    async fn result(&self) -> Result<Connected, OpenError> {
        poll_fn(|cx| {
            let mut meeting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match meeting.result.take() {
                Some(result) => Poll::Ready(result),
                None => {
                    meeting.waiting = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}
