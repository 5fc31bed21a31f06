//! An area in memory that remembers what was written, for tests.

use std::cell::RefCell;
use std::io;

use crate::Area;

/// What was done to an area.
#[derive(Debug, Clone)]
#[cfg_attr(not(test), allow(dead_code, reason = "only tests look at it"))]
pub(crate) enum Event {
    Write(usize, Vec<u8>),
    Sync,
}

/// Bytes, and what was done to them.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    bytes: RefCell<Vec<u8>>,
    events: RefCell<Vec<Event>>,
}

impl Memory {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: RefCell::new(bytes), events: RefCell::default() }
    }

    #[cfg(test)]
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.bytes.borrow().clone()
    }

    /// What was done since this was asked the last time.
    #[cfg(test)]
    pub(crate) fn take_events(&self) -> Vec<Event> {
        self.events.take()
    }
}

impl Area for Memory {
    fn len(&self) -> u64 {
        self.bytes.borrow().len() as u64
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.borrow();
        let from = usize::try_from(offset).ok().and_then(|at| bytes.get(at..at.checked_add(buf.len())?));
        buf.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut bytes = self.bytes.borrow_mut();
        let at = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let to = at.checked_add(buf.len()).and_then(|end| bytes.get_mut(at..end));
        to.ok_or(io::ErrorKind::UnexpectedEof)?.copy_from_slice(buf);
        self.events.borrow_mut().push(Event::Write(at, buf.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.events.borrow_mut().push(Event::Sync);
        Ok(())
    }
}

/// What the storage may hold if the power goes at any point of `events`: everything before the last flush, and of what
/// was written after it any one write missing, and the last one in part.
#[cfg(test)]
pub(crate) fn cuts(before: &[u8], events: &[Event]) -> Vec<Vec<u8>> {
    const TORN: usize = 5;
    let mut states = vec![before.to_vec()];
    let mut flushed = before.to_vec();
    let mut flying: Vec<(usize, Vec<u8>)> = Vec::new();
    for event in events {
        match event {
            Event::Sync => {
                for (at, bytes) in flying.drain(..) {
                    flushed[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                states.push(flushed.clone());
            }
            Event::Write(at, bytes) => {
                flying.push((*at, bytes.clone()));
                for missing in 0..flying.len() {
                    let mut state = flushed.clone();
                    for (i, (at, bytes)) in flying.iter().enumerate() {
                        if i != missing {
                            state[*at..at + bytes.len()].copy_from_slice(bytes);
                        }
                    }
                    // The beginning of the missing one, whole sectors of the disk.
                    let (at, bytes) = &flying[missing];
                    for part in 0..TORN {
                        let end = (at + bytes.len() * part / TORN) / 512 * 512;
                        let n = end.saturating_sub(*at).min(bytes.len());
                        let mut torn = state.clone();
                        torn[*at..at + n].copy_from_slice(&bytes[..n]);
                        states.push(torn);
                    }
                }
            }
        }
    }
    states.dedup();
    states
}
