//! A bounded cache of tables of one cluster each (L2 tables, refcount blocks), with dirty tracking.
//!
//! A table that is being written back must stay until the write has ended, or a reload could read what was
//! there before; a table that is being read is read once, whoever else wants it waits.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::ops::Range;
use std::task::{Poll, Waker};

use crate::IoError;
use crate::file::{File, to_usize};

/// Dirty ranges are widened to this many bytes: what storage writes at once anyway.
const WRITE_UNIT: usize = 4096;

#[derive(Debug)]
struct Table {
    bytes: Vec<u8>,
    dirty: Option<Range<usize>>,
    /// A write-back of it is under way.
    writing: bool,
    used: u64,
}

#[derive(Debug)]
enum Slot {
    Loading(Vec<Waker>),
    Ready(Table),
}

/// A part of a table as it is to be written.
#[derive(Debug)]
pub(crate) struct DirtyPart {
    pub(crate) table: u64,
    pub(crate) at: usize,
    pub(crate) bytes: Vec<u8>,
}

/// Tables by their offset in the file.
#[derive(Debug)]
pub(crate) struct TableCache {
    table_len: usize,
    capacity: usize,
    slots: RefCell<HashMap<u64, Slot>>,
    clock: Cell<u64>,
}

impl TableCache {
    /// A cache of tables of `table_len` bytes, about `bytes` in all, at least two.
    pub(crate) fn new(table_len: u64, bytes: usize) -> Self {
        let table_len = to_usize(table_len);
        let capacity = (bytes / table_len).max(2);
        Self { table_len, capacity, slots: RefCell::default(), clock: Cell::new(0) }
    }

    pub(crate) fn contains(&self, offset: u64) -> bool {
        matches!(self.slots.borrow().get(&offset), Some(Slot::Ready(_)))
    }

    /// Drops clean tables until there is room for one more; false when too many are dirty.
    pub(crate) fn make_room(&self) -> bool {
        let mut slots = self.slots.borrow_mut();
        while slots.len() >= self.capacity {
            let oldest = slots
                .iter()
                .filter_map(|(&offset, slot)| match slot {
                    Slot::Ready(t) if t.dirty.is_none() && !t.writing => Some((t.used, offset)),
                    _ => None,
                })
                .min();
            match oldest {
                Some((_, offset)) => slots.remove(&offset),
                None => return slots.values().all(|slot| matches!(slot, Slot::Loading(_))),
            };
        }
        true
    }

    /// Reads the table at `offset` if it is not there. It is there when this returns, until the caller awaits.
    pub(crate) async fn load(&self, file: &File, offset: u64) -> Result<(), IoError> {
        loop {
            let mine = poll_fn(|cx| match self.slots.borrow_mut().get_mut(&offset) {
                Some(Slot::Loading(wakers)) => {
                    wakers.push(cx.waker().clone());
                    Poll::Pending
                }
                Some(Slot::Ready(_)) => Poll::Ready(false),
                None => Poll::Ready(true),
            })
            .await;
            if !mine {
                return Ok(());
            }
            // Nothing ran since the look: poll_fn's end did not await.
            self.slots.borrow_mut().insert(offset, Slot::Loading(Vec::new()));
            if offset.checked_add(self.table_len as u64).is_none_or(|end| end > file.len()) {
                self.loaded(offset, None);
                return Err(IoError::Corrupt(format!(
                    "a table at {offset:#x} is beyond the end of the file"
                )));
            }
            let bytes = file.read_bytes(offset, self.table_len).await;
            match bytes {
                Ok(bytes) => {
                    self.loaded(offset, Some(bytes));
                    if self.contains(offset) {
                        return Ok(());
                    }
                }
                Err(e) => {
                    self.loaded(offset, None);
                    return Err(e);
                }
            }
        }
    }

    fn loaded(&self, offset: u64, bytes: Option<Vec<u8>>) {
        let mut slots = self.slots.borrow_mut();
        // A new table may have been put there while the old one was read: then what was read is out of date.
        if !matches!(slots.get(&offset), Some(Slot::Loading(_))) {
            return;
        }
        if let Some(Slot::Loading(wakers)) = slots.remove(&offset) {
            wakers.into_iter().for_each(Waker::wake);
        }
        if let Some(bytes) = bytes {
            let table = Table { bytes, dirty: None, writing: false, used: self.tick() };
            slots.insert(offset, Slot::Ready(table));
        }
    }

    fn tick(&self) -> u64 {
        self.clock.set(self.clock.get() + 1);
        self.clock.get()
    }

    /// Puts in a table that is not on the storage yet.
    pub(crate) fn insert_new(&self, offset: u64, bytes: Vec<u8>) {
        let dirty = Some(0..bytes.len());
        let table = Table { bytes, dirty, writing: false, used: self.tick() };
        if let Some(Slot::Loading(wakers)) = self.slots.borrow_mut().insert(offset, Slot::Ready(table)) {
            wakers.into_iter().for_each(Waker::wake);
        }
    }

    /// Forgets a table that is not referred to any more.
    pub(crate) fn remove(&self, offset: u64) {
        if self.contains(offset) {
            self.slots.borrow_mut().remove(&offset);
        }
    }

    /// Looks at a table that is there.
    pub(crate) fn with<R>(&self, offset: u64, look: impl FnOnce(&[u8]) -> R) -> Option<R> {
        match self.slots.borrow_mut().get_mut(&offset) {
            Some(Slot::Ready(table)) => {
                table.used = self.tick();
                Some(look(&table.bytes))
            }
            _ => None,
        }
    }

    /// Changes the bytes in `range` of a table that is there.
    pub(crate) fn change<R>(
        &self,
        offset: u64,
        range: Range<usize>,
        change: impl FnOnce(&mut [u8]) -> R,
    ) -> Option<R> {
        match self.slots.borrow_mut().get_mut(&offset) {
            Some(Slot::Ready(table)) => {
                table.used = self.tick();
                table.dirty = Some(match table.dirty.take() {
                    Some(dirty) => dirty.start.min(range.start)..dirty.end.max(range.end),
                    None => range,
                });
                Some(change(&mut table.bytes))
            }
            _ => None,
        }
    }

    /// A copy of all that is dirty. The tables count as clean, and stay until [`Self::written`].
    pub(crate) fn take_dirty(&self) -> Vec<DirtyPart> {
        let mut parts = Vec::new();
        for (&table, slot) in self.slots.borrow_mut().iter_mut() {
            let Slot::Ready(t) = slot else { continue };
            if let Some(dirty) = t.dirty.take() {
                let start = dirty.start - dirty.start % WRITE_UNIT;
                let end = dirty.end.next_multiple_of(WRITE_UNIT).min(t.bytes.len());
                parts.push(DirtyPart { table, at: start, bytes: t.bytes[start..end].to_vec() });
                t.writing = true;
            }
        }
        parts.sort_by_key(|part| part.table);
        parts
    }

    /// The write-back of `parts` has ended. If it failed they are dirty again.
    pub(crate) fn written(&self, parts: &[DirtyPart], ok: bool) {
        let mut slots = self.slots.borrow_mut();
        for part in parts {
            let Some(Slot::Ready(t)) = slots.get_mut(&part.table) else { continue };
            t.writing = false;
            if !ok {
                let again = part.at..part.at + part.bytes.len();
                t.dirty = Some(match t.dirty.take() {
                    Some(dirty) => dirty.start.min(again.start)..dirty.end.max(again.end),
                    None => again,
                });
            }
        }
    }
}
