//! A console between the guest and whoever looks at it, now or later.
//!
//! ```text
//!  guest ──write──> ring of the last output ──> the terminal, and any number of attached clients
//!  guest <──sink─── [`Console::send`]        <── all of them
//! ```

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How soon input is offered again that the guest had no room for.
const RETRY: Duration = Duration::from_millis(10);

/// Takes input for the guest and returns how much of it there was room for.
type Sink = Box<dyn Fn(&[u8]) -> usize + Send>;

/// See the module's documentation.
pub struct Console {
    state: Mutex<State>,
    changed: Condvar,
    sink: Mutex<Option<Sink>>,
}

struct State {
    ring: VecDeque<u8>,
    capacity: usize,
    /// Number of bytes that were ever written before `ring`'s first.
    gone: u64,
    /// Up to where the lossless reader has read, where there is one.
    lossless: Option<u64>,
    closed: bool,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

impl Console {
    /// A console that keeps the last `capacity` bytes of output. With `lossless`, the guest waits for [`Self::drain`] before
    /// output is lost that was not drained: for a terminal or a pipe, where people want all of it.
    pub fn new(capacity: usize, lossless: bool) -> Self {
        Self {
            state: Mutex::new(State {
                ring: VecDeque::new(),
                capacity: capacity.max(1),
                gone: 0,
                lossless: lossless.then_some(0),
                closed: false,
            }),
            changed: Condvar::new(),
            sink: Mutex::new(None),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says where input goes. What is sent before waits.
    pub fn connect(&self, sink: Sink) {
        *self.sink.lock().unwrap_or_else(PoisonError::into_inner) = Some(sink);
    }

    /// Output of the guest.
    pub fn write(&self, bytes: &[u8]) {
        let mut state = self.state();
        for &byte in bytes {
            while state.is_full() && !state.closed {
                // What is there already has to be told, or nobody would read it and make room.
                self.changed.notify_all();
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.ring.len() >= state.capacity {
                state.ring.pop_front();
                state.gone += 1;
            }
            state.ring.push_back(byte);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Gives input to the guest; waits while it has no room. `false` once the console is closed.
    pub fn send(&self, mut bytes: &[u8]) -> bool {
        loop {
            let sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
            let taken = sink.as_ref().map_or(0, |sink| sink(bytes));
            drop(sink);
            bytes = bytes.get(taken..).unwrap_or_default();
            if bytes.is_empty() {
                return true;
            }
            let open = |state: &mut State| !state.closed;
            let waited = self.changed.wait_timeout_while(self.state(), RETRY, open);
            if waited.unwrap_or_else(PoisonError::into_inner).0.closed {
                return false;
            }
        }
    }

    /// Output from place `from` on, waiting up to `wait` for some. Returns it with the place to go on from: later than
    /// expected where output was lost. `None` once the console is closed and all is read.
    pub fn output(&self, from: u64, wait: Duration) -> Option<(Vec<u8>, u64)> {
        let state = self.state();
        let empty = |state: &mut State| state.end() <= from && !state.closed;
        let (state, _) =
            self.changed.wait_timeout_while(state, wait, empty).unwrap_or_else(PoisonError::into_inner);
        if state.closed && state.end() <= from {
            return None;
        }
        let from = from.clamp(state.gone, state.end());
        // Within the ring's length, which is a usize.
        let skip = usize::try_from(from - state.gone).unwrap_or(usize::MAX);
        Some((state.ring.range(skip.min(state.ring.len())..).copied().collect(), state.end()))
    }

    /// The lossless reader's loop step: as [`Self::output`], for the one reader that the guest waits for. What is returned
    /// counts as read with the next call, so that nothing is lost while it is being written.
    pub fn drain(&self, from: u64, wait: Duration) -> Option<(Vec<u8>, u64)> {
        let mut state = self.state();
        if let Some(place) = &mut state.lossless {
            *place = from;
        }
        drop(state);
        self.changed.notify_all();
        self.output(from, wait)
    }

    /// The lossless reader has gone: the guest no longer waits for it.
    pub fn stop_waiting(&self) {
        self.state().lossless = None;
        self.changed.notify_all();
    }

    /// The place of the oldest output that is still there.
    pub fn oldest(&self) -> u64 {
        self.state().gone
    }

    /// Ends the console: nobody waits for it any more, output that is there can still be read.
    pub fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    /// Whether it was ended.
    pub fn is_closed(&self) -> bool {
        self.state().closed
    }
}

impl State {
    /// Number of bytes that were ever written.
    fn end(&self) -> u64 {
        self.gone + self.ring.len() as u64
    }

    /// Whether one more byte would push one out that the lossless reader has not read.
    fn is_full(&self) -> bool {
        self.ring.len() >= self.capacity && self.lossless.is_some_and(|read| read <= self.gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    const NOW: Duration = Duration::ZERO;

    #[test]
    fn late_readers_get_the_last_output() {
        let console = Console::new(4, false);
        console.write(b"abcdef");
        assert_eq!(console.output(0, NOW), Some((b"cdef".to_vec(), 6)));
        assert_eq!(console.output(6, NOW), Some((vec![], 6)));
        console.write(b"g");
        assert_eq!(console.output(6, NOW), Some((b"g".to_vec(), 7)));
        console.close();
        assert_eq!(console.output(5, NOW), Some((b"fg".to_vec(), 7)));
        assert_eq!(console.output(7, NOW), None);
    }

    #[test]
    fn lossless_reader_gets_everything() {
        let console = Arc::new(Console::new(16, true));
        let text: Vec<u8> = (0..=u8::MAX).cycle().take(10_000).collect();
        let writer = {
            let (console, text) = (console.clone(), text.clone());
            thread::spawn(move || {
                text.chunks(33).for_each(|chunk| console.write(chunk));
                console.close();
            })
        };
        let (mut got, mut place) = (Vec::new(), 0);
        while let Some((bytes, next)) = console.drain(place, Duration::from_secs(10)) {
            got.extend(bytes);
            place = next;
        }
        writer.join().unwrap();
        assert_eq!(got, text);
    }

    #[test]
    fn input_waits_for_room() {
        let console = Arc::new(Console::new(16, false));
        let sender = {
            let console = console.clone();
            thread::spawn(move || console.send(b"abcdefg"))
        };
        let got = Arc::new(Mutex::new(Vec::<u8>::new()));
        let sink = got.clone();
        console.connect(Box::new(move |bytes| {
            let count = bytes.len().min(3);
            sink.lock().unwrap().extend(&bytes[..count]);
            count
        }));
        assert!(sender.join().unwrap());
        assert_eq!(*got.lock().unwrap(), b"abcdefg");
        console.connect(Box::new(|_| 0));
        console.close();
        assert!(!console.send(b"y"));
    }

    #[test]
    fn closing_frees_a_waiting_guest() {
        let console = Arc::new(Console::new(2, true));
        let writer = {
            let console = console.clone();
            thread::spawn(move || console.write(b"abcdef"))
        };
        thread::sleep(Duration::from_millis(20));
        console.close();
        writer.join().unwrap();
    }
}
