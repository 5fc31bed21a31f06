//! Runs the tasks of one disk on one thread, over its [`Engine`].

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use crate::engine::{Engine, Spawned};

/// A future that stays on its thread.
pub(crate) type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// A task, and what wakes it.
struct Task {
    future: Spawned,
    waker: Waker,
}

/// Numbers of tasks that can go on. Wakers must be `Send`, so it is behind a (never contended) mutex.
#[derive(Default)]
struct Ready(Mutex<VecDeque<usize>>);

struct TaskWaker {
    ready: Arc<Ready>,
    number: usize,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ready.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(self.number);
    }
}

/// The number of the future that [`Executor::block_on`] runs.
const ROOT: usize = usize::MAX;

/// Steps of tasks between two looks at what has come from outside.
const TURNS: usize = 256;

/// Tasks and the engine that they wait for.
pub(crate) struct Executor {
    engine: Rc<Engine>,
    tasks: RefCell<Vec<Option<Task>>>,
    free: RefCell<Vec<usize>>,
    ready: Arc<Ready>,
}

impl Executor {
    pub(crate) fn new(engine: Rc<Engine>) -> Rc<Self> {
        Rc::new(Self { engine, tasks: RefCell::default(), free: RefCell::default(), ready: Arc::default() })
    }

    /// Starts a task. It first runs when control is back in [`Self::block_on`].
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.start(Box::pin(task));
    }

    fn start(&self, future: Spawned) {
        let mut tasks = self.tasks.borrow_mut();
        let number = self.free.borrow_mut().pop().unwrap_or_else(|| {
            tasks.push(None);
            tasks.len() - 1
        });
        tasks[number] = Some(Task { future, waker: self.waker(number) });
        self.ready.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(number);
    }

    fn waker(&self, number: usize) -> Waker {
        Waker::from(Arc::new(TaskWaker { ready: Arc::clone(&self.ready), number }))
    }

    /// Runs `future` and all tasks until `future` has ended.
    ///
    /// # Errors
    /// The host's error when waiting for I/O itself fails; nothing can go on then.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> std::io::Result<T> {
        let mut future = pin!(future);
        let root = self.waker(ROOT);
        root.wake_by_ref();
        loop {
            // I/O that is done at once lets tasks go on without end; others must be heard between.
            for _ in 0..TURNS {
                for task in self.engine.take_spawned() {
                    self.start(task);
                }
                let next = self.ready.0.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                let Some(number) = next else { break };
                if number == ROOT {
                    if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&root)) {
                        return Ok(value);
                    }
                } else {
                    self.step(number);
                }
            }
            let ready = !self.ready.0.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
            self.engine.wait(!ready && !self.engine.has_spawned())?;
        }
    }

    /// Lets one task go on.
    fn step(&self, number: usize) {
        // It is taken out while it runs, since it may spawn others. A wake of an ended task finds nothing,
        // or at worst a successor with the same number, which a needless wake does not harm.
        let Some(mut task) = self.tasks.borrow_mut().get_mut(number).and_then(Option::take) else { return };
        if task.future.as_mut().poll(&mut Context::from_waker(&task.waker)).is_ready() {
            drop(task);
            self.free.borrow_mut().push(number);
        } else {
            self.tasks.borrow_mut()[number] = Some(task);
        }
    }
}

/// Lets other tasks have their turn.
pub(crate) async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Runs several futures side by side; the first error, once all have ended.
pub(crate) async fn join_all<E>(futures: Vec<LocalFuture<'_, Result<(), E>>>) -> Result<(), E> {
    let mut left: Vec<_> = futures.into_iter().map(Some).collect();
    let mut failed = None;
    std::future::poll_fn(move |cx| {
        let mut pending = false;
        for slot in &mut left {
            let Some(future) = slot else { continue };
            match future.as_mut().poll(cx) {
                Poll::Pending => pending = true,
                Poll::Ready(result) => {
                    *slot = None;
                    failed = failed.take().or(result.err());
                }
            }
        }
        if pending { Poll::Pending } else { Poll::Ready(failed.take().map_or(Ok(()), Err)) }
    })
    .await
}
