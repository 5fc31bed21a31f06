//! An open disk: its I/O thread, and the way from [`BlockBackend::submit`] to a format and back.
//!
//! ```text
//!  any thread ──submit──> inbox ──bell──> I/O thread: one task a request ──> Node (any format)
//!       <───────────── complete(result) ──────────────────┘                    │
//!                                                   engine (io_uring or threads) ──> file
//! ```

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::task::Poll;
use std::thread::JoinHandle;

use crate::engine::{Bell, Engine};
use crate::executor::{Executor, LocalFuture};
use crate::joined::open_joined;
use crate::node::Node;
use crate::{
    AioEngine, BlockBackend, Complete, Extent, Format, Geometry, IoError, Op, OpenError, OpenOptions,
    Request, Source,
};

/// Stack of an I/O thread: a read may go down a chain of 200 images. Only what is used takes memory.
const STACK: usize = 8 << 20;

/// Facts about an open disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFacts {
    /// The image's path as given.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Its backing files from the nearest to the last.
    pub backing: Vec<PathBuf>,
    /// Their formats.
    pub backing_formats: Vec<Format>,
    /// What carries out the I/O ([`AioEngine::IoUring`] or [`AioEngine::Threads`]).
    pub aio: AioEngine,
    /// Whether it reads as zeroes where nothing was written since it was made. Encrypted disks without tables do not.
    pub zero_when_new: bool,
}

/// Something to be done with the image that is not an [`Op`]; started on the I/O thread.
type Call = Box<dyn FnOnce(Rc<Node>) -> LocalFuture<'static, ()> + Send>;

/// Work that lives on the I/O thread for longer, such as a connection. The disk closes when it has ended.
type Resident = Box<dyn FnOnce(Local) -> LocalFuture<'static, ()> + Send>;

enum Task {
    Request(Op, Completion),
    Call(Call),
    Resident(Resident),
}

/// What there is on a disk's I/O thread.
#[derive(Clone)]
pub(crate) struct Local {
    pub(crate) node: Rc<Node>,
    pub(crate) engine: Rc<Engine>,
    /// Whether writes are to be refused.
    pub(crate) read_only: bool,
}

#[derive(Default)]
struct Inbox {
    requests: VecDeque<Task>,
    /// No request is taken any more.
    closed: bool,
}

#[derive(Default)]
struct Shared {
    inbox: Mutex<Inbox>,
    /// Requests taken and not completed. Counted without a lock: every request of every thread comes by here twice.
    in_flight: AtomicU64,
    /// Threads that wait for the last of them.
    draining: AtomicU64,
    /// What those sleep on.
    drained: (Mutex<()>, Condvar),
    /// Whether to leave without writing anything back, as if killed (for tests of crash consistency).
    abandon: AtomicBool,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request has been completed.
    fn ended(&self) {
        // One side changes its number before it looks at the other's, and so does the other: one of them sees.
        if self.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 && self.draining.load(Ordering::SeqCst) > 0 {
            let _between = self.drained.0.lock().unwrap_or_else(PoisonError::into_inner);
            self.drained.1.notify_all();
        }
    }

    /// Waits until all requests have been completed.
    fn drain(&self) {
        self.draining.fetch_add(1, Ordering::SeqCst);
        let mut waiting = self.drained.0.lock().unwrap_or_else(PoisonError::into_inner);
        while self.in_flight.load(Ordering::SeqCst) > 0 {
            waiting = self.drained.1.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        drop(waiting);
        self.draining.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Calls the callback exactly once, whatever happens to its task.
struct Completion {
    complete: Option<Complete>,
    shared: Arc<Shared>,
}

impl Completion {
    fn finish(mut self, result: Result<(), IoError>) {
        self.call(result);
    }

    fn call(&mut self, result: Result<(), IoError>) {
        let Some(complete) = self.complete.take() else { return };
        complete(result);
        self.shared.ended();
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.call(Err(IoError::Closed));
    }
}

/// An open disk. Dropping it completes all requests, flushes and closes the image.
pub struct Disk {
    geometry: Geometry,
    facts: DiskFacts,
    shared: Arc<Shared>,
    bell: Arc<Bell>,
    thread: Option<JoinHandle<Result<(), IoError>>>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("facts", &self.facts)
            .field("geometry", &self.geometry)
            .finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens the image at `path`, its backing files, and starts its I/O thread.
    ///
    /// # Errors
    /// [`OpenError`] says which file, why, and what to do.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self, OpenError> {
        Self::open_sources(vec![Source { path: path.as_ref().to_owned(), options: options.clone() }])
    }

    /// Opens an image, or several as one disk: what each has one after the other, which can only be read.
    ///
    /// # Errors
    /// As [`Self::open`]'s.
    pub(crate) fn open_sources(sources: Vec<Source>) -> Result<Self, OpenError> {
        let shared = Arc::new(Shared::default());
        let (tell, told) = mpsc::channel();
        let thread_shared = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("disk".into())
            .stack_size(STACK)
            .spawn(move || io_thread(sources, &thread_shared, &tell))
            .map_err(OpenError::Thread)?;
        match told.recv() {
            Ok(Ok((geometry, facts, bell))) => {
                Ok(Self { geometry, facts, shared, bell, thread: Some(thread) })
            }
            Ok(Err(error)) => {
                // Its locks must be gone when the caller tries again.
                let _ = thread.join();
                Err(error)
            }
            Err(_) => Err(OpenError::Thread(std::io::Error::other("it ended at once"))),
        }
    }

    /// Path, format and backing files.
    #[must_use]
    pub fn facts(&self) -> &DiskFacts {
        &self.facts
    }

    /// Completes all requests, flushes and closes the image.
    ///
    /// # Errors
    /// [`IoError`] when the last flush failed: data written since the flush before may be lost.
    pub fn close(mut self) -> Result<(), IoError> {
        self.shut_down()
    }

    /// Leaves the image as a killed process would: nothing that is not written yet will be.
    #[doc(hidden)]
    pub fn abandon(mut self) {
        self.shared.abandon.store(true, Ordering::Relaxed);
        let _ = self.shut_down();
    }

    /// Submits `op` and waits for its end. For tools and tests; devices use [`BlockBackend::submit`].
    ///
    /// # Errors
    /// As the request's.
    pub fn run(&self, op: Op) -> Result<(), IoError> {
        let (tell, told) = mpsc::channel();
        self.submit(Request::new(op, move |result| {
            let _ = tell.send(result);
        }));
        told.recv().unwrap_or(Err(IoError::Closed))
    }

    /// Asks which parts of a range hold data: all runs in it, in order, up to the disk's end. `complete` is called once,
    /// from the disk's thread or, when the disk is closed, not at all (it is dropped).
    pub fn query_status(
        &self,
        offset: u64,
        length: u64,
        complete: impl FnOnce(Result<Vec<Extent>, IoError>) + Send + 'static,
    ) {
        let _ = self.push(Task::Call(Box::new(move |node| {
            Box::pin(async move { complete(node.statuses(offset, length).await) })
        })));
    }

    /// As [`Self::query_status`], waiting for the answer.
    ///
    /// # Errors
    /// [`IoError`] when the image's tables cannot be read.
    pub fn block_status(&self, offset: u64, length: u64) -> Result<Vec<Extent>, IoError> {
        let (tell, told) = mpsc::channel();
        self.query_status(offset, length, move |result| {
            let _ = tell.send(result);
        });
        told.recv().unwrap_or(Err(IoError::Closed))
    }

    /// Starts `call` with the opened image on the disk's thread; `complete` is called there with its result. When the
    /// disk is closed both are dropped.
    pub(crate) fn start<T: 'static>(
        &self,
        call: impl FnOnce(Rc<Node>) -> LocalFuture<'static, Result<T, IoError>> + Send + 'static,
        complete: impl FnOnce(Result<T, IoError>) + Send + 'static,
    ) {
        let _ =
            self.push(Task::Call(Box::new(move |node| Box::pin(async move { complete(call(node).await) }))));
    }

    /// Runs `call` with the opened image on the disk's thread, and waits for its end.
    pub(crate) fn with_node<T: Send + 'static>(
        &self,
        call: impl FnOnce(Rc<Node>) -> LocalFuture<'static, Result<T, IoError>> + Send + 'static,
    ) -> Result<T, IoError> {
        let (tell, told) = mpsc::channel();
        self.start(call, move |result| drop(tell.send(result)));
        told.recv().unwrap_or(Err(IoError::Closed))
    }

    /// Writes everything back, as [`Self::close`] does; the disk takes requests no more.
    pub(crate) fn flush_and_close(&self) -> Result<(), IoError> {
        self.drain();
        let result = self.with_node(|node| Box::pin(async move { node.close().await }));
        self.shared.abandon.store(true, Ordering::Relaxed);
        self.shared.inbox().closed = true;
        self.bell.ring();
        result
    }

    /// Starts work on the I/O thread that uses the image and the engine itself; whether the disk was still open. It must
    /// come to an end before the disk can close.
    pub(crate) fn host(&self, work: impl FnOnce(Local) -> LocalFuture<'static, ()> + Send + 'static) -> bool {
        self.push(Task::Resident(Box::new(work))).is_ok()
    }

    /// Hands a task to the I/O thread, or gives it back when that takes no more.
    fn push(&self, task: Task) -> Result<(), Task> {
        let mut inbox = self.shared.inbox();
        if inbox.closed {
            return Err(task);
        }
        let first = inbox.requests.is_empty();
        inbox.requests.push_back(task);
        drop(inbox);
        if first {
            self.bell.ring();
        }
        Ok(())
    }

    fn shut_down(&mut self) -> Result<(), IoError> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        self.shared.inbox().closed = true;
        self.bell.ring();
        thread.join().unwrap_or(Err(IoError::Closed))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = self.shut_down() {
            tracing::error!(path = %self.facts.path.display(), %error, "the last flush of the disk failed");
        }
    }
}

impl BlockBackend for Disk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&self, request: Request) {
        let completion = Completion { complete: Some(request.complete), shared: Arc::clone(&self.shared) };
        self.shared.in_flight.fetch_add(1, Ordering::SeqCst);
        if let Err(error) = check_request(&self.geometry, &request.op) {
            return completion.finish(Err(error));
        }
        if let Err(Task::Request(_, completion)) = self.push(Task::Request(request.op, completion)) {
            completion.finish(Err(IoError::Closed));
        }
    }

    fn drain(&self) {
        self.shared.drain();
    }
}

/// Whether a request, which may be a guest's, can be carried out on such a disk.
fn check_request(geometry: &Geometry, op: &Op) -> Result<(), IoError> {
    let (offset, length) = op.range();
    let size = geometry.size;
    if offset.checked_add(length).is_none_or(|end| end > size) {
        return Err(IoError::OutOfRange { offset, length, size });
    }
    match op {
        Op::Read { .. } | Op::Flush => Ok(()),
        _ if geometry.read_only => Err(IoError::ReadOnly),
        Op::Write { .. } => Ok(()),
        Op::Discard { .. } | Op::WriteZeroes { .. } if length > geometry.max_discard => {
            Err(IoError::TooLarge { length, max: geometry.max_discard })
        }
        Op::Discard { .. } | Op::WriteZeroes { .. } => Ok(()),
    }
}

type Opened = Result<(Geometry, DiskFacts, Arc<Bell>), OpenError>;

/// The life of an I/O thread.
fn io_thread(sources: Vec<Source>, shared: &Arc<Shared>, tell: &mpsc::Sender<Opened>) -> Result<(), IoError> {
    let Some(Source { path, options }) = sources.first() else {
        let _ = tell.send(Err(OpenError::Thread(std::io::Error::other("no image"))));
        return Ok(());
    };
    let (path, discard) = (path.clone(), options.discard);
    let opened = Engine::new(options.aio).and_then(|engine| {
        let node = open_joined(&engine, &sources)?;
        Ok((engine, node))
    });
    // Passphrases are needed no more: the last one who has them wipes them.
    drop(sources);
    let (engine, node) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            let _ = tell.send(Err(error));
            return Ok(());
        }
    };
    let facts = DiskFacts {
        path,
        format: node.format(),
        backing: node.backing_paths(),
        backing_formats: node.backing_formats(),
        aio: engine.kind(),
        zero_when_new: node.image().reads_as_zero_when_new(),
    };
    let _ = tell.send(Ok((node.geometry(discard), facts, engine.bell())));
    let _closed = CloseAtEnd(shared);
    let executor = Executor::new(Rc::clone(&engine));
    let node = Rc::new(node);
    let served = executor.block_on(serve(&engine, &executor, &node, shared));
    served.unwrap_or_else(|error| Err(error.into()))
}

/// Whichever way the I/O thread ends: nobody waits for an answer that cannot come any more.
struct CloseAtEnd<'a>(&'a Shared);

impl Drop for CloseAtEnd<'_> {
    fn drop(&mut self) {
        let mut inbox = self.0.inbox();
        inbox.closed = true;
        let left = std::mem::take(&mut inbox.requests);
        drop(inbox);
        // Their completions say Closed.
        drop(left);
    }
}

/// Takes requests until the disk is closed and all of them have ended; then closes the image.
async fn serve(
    engine: &Rc<Engine>,
    executor: &Rc<Executor>,
    node: &Rc<Node>,
    shared: &Arc<Shared>,
) -> Result<(), IoError> {
    let tasks = Rc::new(Tasks::default());
    let local =
        Local { node: Rc::clone(node), engine: Rc::clone(engine), read_only: node.geometry(false).read_only };
    loop {
        let (requests, closed) = poll_fn(|cx| {
            engine.wake_on_bell(cx.waker());
            tasks.wake_when_idle(cx.waker());
            let mut inbox = shared.inbox();
            if inbox.requests.is_empty() && !(inbox.closed && tasks.count.get() == 0) {
                return Poll::Pending;
            }
            Poll::Ready((std::mem::take(&mut inbox.requests), inbox.closed))
        })
        .await;
        if requests.is_empty() && closed {
            break;
        }
        for task in requests {
            let (local, tasks) = (local.clone(), Rc::clone(&tasks));
            tasks.count.set(tasks.count.get() + 1);
            executor.spawn(async move {
                match task {
                    Task::Request(op, completion) => perform(&local.node, op, completion).await,
                    Task::Call(call) => call(local.node).await,
                    Task::Resident(work) => work(local).await,
                }
                tasks.ended();
            });
        }
    }
    if shared.abandon.load(Ordering::Relaxed) { Ok(()) } else { node.close().await }
}

async fn perform(node: &Node, op: Op, completion: Completion) {
    let (name, (offset, length)) = (op.name(), op.range());
    let result = node.execute(op).await;
    if let Err(error) = &result {
        tracing::debug!("{name} {offset:#x}+{length:#x} failed: {error}");
    }
    completion.finish(result);
}

/// Counts the tasks of requests.
#[derive(Default)]
struct Tasks {
    count: std::cell::Cell<usize>,
    idle: std::cell::RefCell<Option<std::task::Waker>>,
}

impl Tasks {
    fn wake_when_idle(&self, waker: &std::task::Waker) {
        *self.idle.borrow_mut() = Some(waker.clone());
    }

    fn ended(&self) {
        self.count.set(self.count.get() - 1);
        if self.count.get() == 0
            && let Some(waker) = self.idle.borrow_mut().take()
        {
            waker.wake();
        }
    }
}
