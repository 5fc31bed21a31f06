//! MSI-X: a table of messages in a BAR, and the pending bits of those that are masked
//! (PCI 3.0 section 6.8.2).

use std::fmt;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use terem_bus::{Handler, MsiMessage, MsiSink, locked};

/// Bytes of a table entry: address (8), data (4), vector control (4).
const ENTRY: u64 = 16;
/// Vector control bit 0: masked.
const MASKED: u32 = 1;
/// Message Control bit 15: MSI-X enable.
pub(super) const ENABLE: u16 = 1 << 15;
/// Message Control bit 14: function mask.
pub(super) const FUNCTION_MASK: u16 = 1 << 14;
/// The most vectors a function can have: the table size field has 11 bits.
pub(super) const MAX_VECTORS: u16 = 2048;

#[derive(Debug, Clone, Copy)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

/// After reset vectors are masked.
const RESET: Entry = Entry { address: 0, data: 0, control: MASKED, pending: false };

#[derive(Debug)]
struct Table {
    enabled: bool,
    /// The function's mask bit, or bus mastering being off: messages are memory writes.
    held: bool,
    entries: Vec<Entry>,
}

impl Table {
    /// Takes the messages that are pending and not held back (any longer).
    fn released(&mut self) -> Vec<MsiMessage> {
        if !self.enabled || self.held {
            return Vec::new();
        }
        let ready = self.entries.iter_mut().filter(|e| e.pending && e.control & MASKED == 0);
        ready
            .map(|e| {
                e.pending = false;
                MsiMessage { address: e.address, data: e.data }
            })
            .collect()
    }
}

/// A function's MSI-X vectors: the handler of the BAR with table and pending bits, and what the
/// device triggers, from any thread.
pub struct MsixVectors {
    table: Mutex<Table>,
    sink: Arc<dyn MsiSink>,
    pba: u64,
}

impl fmt::Debug for MsixVectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MsixVectors({})", self.count())
    }
}

impl MsixVectors {
    pub(super) fn new(count: u16, sink: Arc<dyn MsiSink>) -> Self {
        let table = Table { enabled: false, held: true, entries: vec![RESET; usize::from(count)] };
        let half = (u64::from(count) * ENTRY).next_power_of_two().max(2048);
        Self { table: Mutex::new(table), sink, pba: half }
    }

    /// Bytes of the BAR: the table in the lower half, pending bits in the upper one.
    pub(super) fn bar_size(&self) -> u64 {
        self.pba * 2
    }

    /// Offset of the pending bits in the BAR.
    pub(super) fn pba_offset(&self) -> u64 {
        self.pba
    }

    /// How many vectors there are.
    #[must_use]
    pub fn count(&self) -> u16 {
        u16::try_from(locked(&self.table).entries.len()).unwrap_or(MAX_VECTORS)
    }

    /// Whether the guest uses MSI-X. While it does not, triggers are dropped: the device then uses
    /// [`super::PciFunction::set_intx`].
    #[must_use]
    pub fn enabled(&self) -> bool {
        locked(&self.table).enabled
    }

    /// Vector `index`, for a part of the device to keep; `None` when the function has fewer.
    #[must_use]
    pub fn vector(self: &Arc<Self>, index: u16) -> Option<MsixVector> {
        (index < self.count()).then(|| MsixVector { vectors: Arc::clone(self), index })
    }

    /// Sends vector `index`'s message, or makes it pending while it is masked. Indices come from
    /// guests: one past the table does nothing.
    pub fn trigger(&self, index: u16) {
        let mut table = locked(&self.table);
        let (enabled, held) = (table.enabled, table.held);
        let Some(e) = table.entries.get_mut(usize::from(index)).filter(|_| enabled) else { return };
        if held || e.control & MASKED != 0 {
            e.pending = true;
            return;
        }
        let message = MsiMessage { address: e.address, data: e.data };
        drop(table);
        self.sink.send_msi(message);
    }

    /// Takes over Message Control and the bus master bit from configuration space.
    pub(super) fn control(&self, control: u16, master: bool) {
        let mut table = locked(&self.table);
        table.enabled = control & ENABLE != 0;
        table.held = control & FUNCTION_MASK != 0 || !master;
        let messages = table.released();
        drop(table);
        self.send(messages);
    }

    fn send(&self, messages: Vec<MsiMessage>) {
        for m in messages {
            self.sink.send_msi(m);
        }
    }

    /// A dword of the table or the pending bits.
    fn read32(table: &Table, pba: u64, offset: u64) -> u32 {
        if offset >= pba {
            let first = usize::try_from((offset - pba) * 8).unwrap_or(usize::MAX);
            let bits = table.entries.iter().skip(first).take(32).enumerate();
            return bits.fold(0, |v, (i, e)| v | u32::from(e.pending) << i);
        }
        let entry = usize::try_from(offset / ENTRY).ok().and_then(|i| table.entries.get(i));
        entry.map_or(0, |e| {
            let [a, b, c, d, f, g, h, i] = e.address.to_le_bytes();
            match offset % ENTRY {
                0 => u32::from_le_bytes([a, b, c, d]),
                4 => u32::from_le_bytes([f, g, h, i]),
                8 => e.data,
                _ => e.control,
            }
        })
    }

    fn write32(table: &mut Table, offset: u64, value: u32) {
        let entry = usize::try_from(offset / ENTRY).ok().and_then(|i| table.entries.get_mut(i));
        let Some(e) = entry else { return };
        match offset % ENTRY {
            // Address bits 1:0 must be written as zero.
            0 => e.address = e.address & !0xffff_ffff | u64::from(value & !3),
            4 => e.address = e.address & 0xffff_ffff | u64::from(value) << 32,
            8 => e.data = value,
            _ => e.control = value & MASKED,
        }
    }

    /// What is to be saved.
    #[must_use]
    pub fn save(&self) -> MsixState {
        let Table { enabled: _, held: _, entries } = &*locked(&self.table);
        let vectors = entries.iter().map(|e| {
            let Entry { address, data, control, pending } = *e;
            VectorState { address, data, masked: control & MASKED != 0, pending }
        });
        MsixState { vectors: vectors.collect() }
    }

    /// Takes the table over from a saved state; [`Self::control`] follows from configuration space.
    /// False when it has another number of vectors.
    pub(super) fn restore(&self, state: &MsixState) -> bool {
        let mut table = locked(&self.table);
        if state.vectors.len() != table.entries.len() {
            return false;
        }
        table.enabled = false;
        for (e, s) in table.entries.iter_mut().zip(&state.vectors) {
            let VectorState { address, data, masked, pending } = *s;
            *e = Entry { address: address & !3, data, control: u32::from(masked), pending };
        }
        true
    }

    /// Back to after power-on.
    pub(super) fn reset(&self) {
        let mut table = locked(&self.table);
        table.enabled = false;
        table.held = true;
        table.entries.fill(RESET);
    }
}

impl Handler for MsixVectors {
    fn read(&self, offset: u64, size: u8) -> Option<u64> {
        // Section 6.8.2: only aligned dword and qword accesses are defined.
        if size < 4 || !offset.is_multiple_of(u64::from(size)) {
            return None;
        }
        let table = locked(&self.table);
        let low = u64::from(Self::read32(&table, self.pba, offset));
        let high = if size == 8 { u64::from(Self::read32(&table, self.pba, offset + 4)) } else { 0 };
        Some(low | high << 32)
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> bool {
        if size < 4 || !offset.is_multiple_of(u64::from(size)) || offset >= self.pba {
            return false;
        }
        let mut table = locked(&self.table);
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        Self::write32(&mut table, offset, u32::from_le_bytes([a, b, c, d]));
        if size == 8 {
            Self::write32(&mut table, offset + 4, u32::from_le_bytes([e, f, g, h]));
        }
        let messages = table.released();
        drop(table);
        self.send(messages);
        true
    }
}

/// One vector, for the part of the device that uses it.
#[derive(Debug, Clone)]
pub struct MsixVector {
    vectors: Arc<MsixVectors>,
    index: u16,
}

impl MsixVector {
    /// See [`MsixVectors::trigger`]. Callable from any thread.
    pub fn trigger(&self) {
        self.vectors.trigger(self.index);
    }
}

/// Saved table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    vectors: Vec<VectorState>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VectorState {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::function::tests::Messages;

    fn vectors(count: u16) -> (Arc<MsixVectors>, Arc<Messages>) {
        let sink = Arc::new(Messages::default());
        (Arc::new(MsixVectors::new(count, Arc::clone(&sink) as _)), sink)
    }

    fn program(v: &MsixVectors, index: u64, data: u32) {
        assert!(v.write(index * 16, 8, 0xfee0_1000));
        assert!(v.write(index * 16 + 8, 4, u64::from(data)));
        assert!(v.write(index * 16 + 12, 4, 0));
    }

    #[test]
    fn an_unmasked_vector_sends_at_once() {
        let (v, sent) = vectors(3);
        program(&v, 2, 0x41);
        v.trigger(2);
        assert!(sent.take().is_empty(), "not enabled: the device uses INTx");
        v.control(ENABLE, true);
        let line = v.vector(2).unwrap();
        std::thread::spawn(move || line.trigger()).join().unwrap();
        assert_eq!(sent.take(), [MsiMessage { address: 0xfee0_1000, data: 0x41 }]);
        v.trigger(3);
        v.trigger(0xffff);
        assert!(v.vector(3).is_none() && sent.take().is_empty());
    }

    #[test]
    fn masked_vectors_are_pending_and_sent_once_when_unmasked() {
        let (v, sent) = vectors(40);
        program(&v, 35, 0x50);
        v.control(ENABLE, true);
        v.write(35 * 16 + 12, 4, 1);
        v.trigger(35);
        v.trigger(35);
        assert_eq!(v.read(v.pba_offset() + 4, 4), Some(1 << 3));
        assert_eq!(v.read(v.pba_offset(), 8), Some(1 << 35));
        assert!(!v.write(v.pba_offset(), 8, u64::MAX), "pending bits are read-only");
        v.write(35 * 16 + 12, 4, 0);
        assert_eq!(sent.take().len(), 1);
        assert_eq!(v.read(v.pba_offset(), 8), Some(0));
        // The function mask and a missing bus master hold messages back as well.
        for (hold, master) in [(ENABLE | FUNCTION_MASK, true), (ENABLE, false)] {
            v.control(hold, master);
            v.trigger(35);
            assert!(sent.take().is_empty());
            v.control(ENABLE, true);
            assert_eq!(sent.take().len(), 1);
        }
    }

    #[test]
    fn a_saved_table_goes_on() {
        let (a, _) = vectors(2);
        program(&a, 1, 0x33);
        a.control(ENABLE | FUNCTION_MASK, true);
        a.trigger(1);
        let (b, sent) = vectors(2);
        assert!(b.restore(&a.save()));
        b.control(ENABLE, true);
        assert_eq!(sent.take(), [MsiMessage { address: 0xfee0_1000, data: 0x33 }]);
        assert!(!vectors(3).0.restore(&a.save()));
        b.reset();
        assert_eq!(b.read(16, 8), Some(0));
        assert_eq!(b.read(24, 8), Some(1 << 32));
    }
}
