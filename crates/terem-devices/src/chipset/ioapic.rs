//! I/O APIC (Intel 82093AA datasheet, order 290566), with the EOI register of version 20h that ICH9 has
//! (ICH9 datasheet section 13.5).

use std::fmt;
use std::sync::{Arc, Mutex};

use bitfield_struct::bitfield;
use serde::{Deserialize, Serialize};
use terem_bus::{
    ApicBus, ApicMessage, DeliveryMode, DeviceState, EoiSink, LineSink, Registers, StateError, locked,
};

/// Inputs.
pub const PINS: usize = 24;

/// IOREGSEL, IOWIN (82093AA section 3.1) and EOI (ICH9 section 13.5.1), from the base address.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;

/// Indirect registers: ID, version, arbitration ID, redirection table (section 3.2).
const IOAPICID: u8 = 0x00;
const IOAPICVER: u8 = 0x01;
const IOAPICARB: u8 = 0x02;
const IOREDTBL: u8 = 0x10;
const IOREDTBL_LAST: u8 = IOREDTBL + 2 * 24 - 1;

/// Version 20h, entries up to 23.
const VERSION: u32 = 0x0017_0020;
/// IOAPICID bits 27:24.
const ID_BITS: u32 = 0x0f00_0000;

/// A redirection table entry (section 3.2.4).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
struct Entry {
    vector: u8,
    #[bits(3)]
    delivery_mode: u8,
    logical: bool,
    /// Read-only; delivery takes no time here, so it is always idle.
    pending: bool,
    active_low: bool,
    /// Read-only: a level interrupt was accepted and its EOI has not come.
    remote_irr: bool,
    level: bool,
    masked: bool,
    #[bits(39)]
    __: u64,
    destination: u8,
}

/// Bits of an entry that a guest can write: all but delivery status, remote IRR and reserved ones.
const WRITABLE: u64 = 0xff00_0000_0001_afff;
/// After reset entries are masked.
const RESET: Entry = Entry::new().with_masked(true);

#[derive(Debug, Clone, Copy)]
struct Pin {
    entry: Entry,
    /// The wire: whether its driver asserts it.
    asserted: bool,
    /// An edge has come and not been sent. The datasheet says that edges of masked inputs are lost
    /// (section 3.2.4); they are kept here, as other hypervisors do: an interrupt too many does no
    /// harm, and one too few hangs guests that mask for a moment.
    edge: bool,
}

const PIN: Pin = Pin { entry: RESET, asserted: false, edge: false };

/// The I/O APIC.
pub struct IoApic {
    select: u8,
    id: u32,
    pins: [Pin; PINS],
    apic: Arc<dyn ApicBus>,
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { select, id, pins, apic: _ } = self;
        f.debug_struct("IoApic").field("select", select).field("id", id).field("pins", pins).finish()
    }
}

impl IoApic {
    /// The chip in its state after power-on, sending to `apic`.
    #[must_use]
    pub fn new(apic: Arc<dyn ApicBus>) -> Self {
        Self { select: 0, id: 0, pins: [PIN; PINS], apic }
    }

    /// Sets input `pin` (others are ignored). `high` means asserted: boards wire active-low inputs
    /// through an inverter, as far as the polarity bit goes.
    pub fn set_line(&mut self, pin: usize, high: bool) {
        let Some(p) = self.pins.get_mut(pin) else { return };
        if high && !p.asserted && !p.entry.level() {
            p.edge = true;
        }
        p.asserted = high;
        self.serve(pin);
    }

    /// Sends pin's interrupt if it has one and may.
    fn serve(&mut self, pin: usize) {
        let Some(p) = self.pins.get_mut(pin) else { return };
        if p.entry.masked() {
            return;
        }
        if p.entry.level() {
            if !p.asserted || p.entry.remote_irr() {
                return;
            }
        } else if !std::mem::take(&mut p.edge) {
            return;
        }
        let mode = DeliveryMode::from_bits(p.entry.delivery_mode());
        // SMI, NMI, INIT and ExtINT are edges whatever the trigger bit says (section 3.2.4), and no
        // EOI comes for them.
        let level = p.entry.level() && matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        p.entry.set_remote_irr(level);
        let message = ApicMessage {
            destination: u32::from(p.entry.destination()),
            logical: p.entry.logical(),
            mode,
            vector: p.entry.vector(),
            level_triggered: level,
            assert: true,
        };
        self.apic.deliver(message);
    }

    /// An EOI for `vector`: a line that is still asserted asks again.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..PINS {
            let entry = &mut self.pins[pin].entry;
            if entry.level() && entry.remote_irr() && entry.vector() == vector {
                entry.set_remote_irr(false);
                self.serve(pin);
            }
        }
    }

    fn read_indirect(&self) -> u32 {
        match self.select {
            IOAPICID | IOAPICARB => self.id,
            IOAPICVER => VERSION,
            IOREDTBL..=IOREDTBL_LAST => {
                let index = self.select - IOREDTBL;
                let [a, b, c, d, e, f, g, h] =
                    self.pins[usize::from(index / 2)].entry.into_bits().to_le_bytes();
                u32::from_le_bytes(if index.is_multiple_of(2) { [a, b, c, d] } else { [e, f, g, h] })
            }
            // Reserved registers read as zero.
            _ => 0,
        }
    }

    fn write_indirect(&mut self, value: u32) {
        match self.select {
            IOAPICID => self.id = value & ID_BITS,
            IOREDTBL..=IOREDTBL_LAST => {
                let index = self.select - IOREDTBL;
                let pin = usize::from(index / 2);
                let p = &mut self.pins[pin];
                let shift = u32::from(index % 2) * 32;
                let bits = WRITABLE & 0xffff_ffff << shift;
                let old = p.entry;
                p.entry = Entry::from_bits(old.into_bits() & !bits | u64::from(value) << shift & bits);
                if p.entry.level() {
                    p.edge = false;
                } else {
                    // How Linux clears a remote IRR that is stuck: to edge and back to level.
                    p.entry.set_remote_irr(false);
                }
                self.serve(pin);
            }
            _ => {}
        }
    }
}

impl Registers for IoApic {
    fn read(&mut self, offset: u64, size: u8) -> Option<u64> {
        // Section 3.1: dword accesses; narrower ones see the low bytes.
        match (offset, size) {
            (IOREGSEL, 1 | 2 | 4) => Some(u64::from(self.select)),
            (IOWIN, 1 | 2 | 4) => Some(u64::from(self.read_indirect())),
            (EOI, 1 | 2 | 4) => Some(0),
            _ => None,
        }
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) -> bool {
        let [a, b, c, d, ..] = value.to_le_bytes();
        match (offset, size) {
            (IOREGSEL, 1 | 2 | 4) => self.select = a,
            (IOWIN, 4) => self.write_indirect(u32::from_le_bytes([a, b, c, d])),
            (EOI, 1 | 2 | 4) => self.end_of_interrupt(a),
            _ => return false,
        }
        true
    }
}

/// The inputs, and the ear for EOIs.
#[derive(Debug, Clone)]
pub struct IoApicLines(pub Arc<Mutex<IoApic>>);

impl LineSink for IoApicLines {
    fn set_line(&self, line: u32, high: bool) {
        locked(&self.0).set_line(usize::try_from(line).unwrap_or(usize::MAX), high);
    }
}

impl EoiSink for IoApicLines {
    fn end_of_interrupt(&self, vector: u8) {
        locked(&self.0).end_of_interrupt(vector);
    }
}

/// Saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApicState {
    select: u8,
    id: u32,
    pins: Vec<PinState>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PinState {
    entry: u64,
    asserted: bool,
    edge: bool,
}

impl DeviceState for IoApic {
    const NAME: &'static str = "ioapic";
    type State = IoApicState;

    fn save(&self) -> IoApicState {
        let Self { select, id, pins, apic: _ } = self;
        let pins = pins.iter().map(|p| {
            let Pin { entry, asserted, edge } = *p;
            PinState { entry: entry.into_bits(), asserted, edge }
        });
        IoApicState { select: *select, id: *id, pins: pins.collect() }
    }

    fn restore(&mut self, state: IoApicState) -> Result<(), StateError> {
        let IoApicState { select, id, pins } = state;
        if pins.len() != PINS {
            return Err(Self::invalid(format!("{} pins instead of {PINS}", pins.len())));
        }
        self.select = select;
        self.id = id & ID_BITS;
        let kept = WRITABLE | Entry::new().with_remote_irr(true).into_bits();
        for (p, PinState { entry, asserted, edge }) in self.pins.iter_mut().zip(pins) {
            *p = Pin { entry: Entry::from_bits(entry & kept), asserted, edge };
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.select = 0;
        self.id = 0;
        for p in &mut self.pins {
            // Levels belong to whoever drives the lines.
            *p = Pin { asserted: p.asserted, ..PIN };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::lab::Apics;
    use proptest::prelude::*;

    fn ioapic() -> (IoApic, Arc<Apics>) {
        let apic = Arc::new(Apics::default());
        (IoApic::new(Arc::clone(&apic) as _), apic)
    }

    fn write(io: &mut IoApic, register: u8, value: u32) {
        assert!(Registers::write(io, IOREGSEL, 4, u64::from(register)));
        assert!(Registers::write(io, IOWIN, 4, u64::from(value)));
    }

    fn read(io: &mut IoApic, register: u8) -> u64 {
        Registers::write(io, IOREGSEL, 4, u64::from(register));
        Registers::read(io, IOWIN, 4).unwrap()
    }

    /// Pin 4 as level, vector 51h, to APIC 3.
    fn level(io: &mut IoApic) {
        write(io, 0x19, 0x0300_0000);
        write(io, 0x18, 0x8051);
    }

    #[test]
    fn registers_read_as_the_datasheet_says() {
        let (mut io, _) = ioapic();
        assert_eq!(read(&mut io, 1), 0x0017_0020);
        assert_eq!(read(&mut io, 0x10), 0x1_0000, "masked after reset");
        write(&mut io, 0, 0xffff_ffff);
        assert_eq!((read(&mut io, 0), read(&mut io, 2)), (0x0f00_0000, 0x0f00_0000));
        write(&mut io, 0x3e, 0xffff_ffff);
        write(&mut io, 0x3f, 0xffff_ffff);
        assert_eq!((read(&mut io, 0x3e), read(&mut io, 0x3f)), (0x1_afff, 0xff00_0000));
        assert_eq!(read(&mut io, 0x40), 0);
        assert_eq!(Registers::read(&mut io, 4, 4), None);
    }

    #[test]
    fn edges_are_sent_once_and_kept_while_masked() {
        let (mut io, apic) = ioapic();
        io.set_line(4, true);
        io.set_line(4, false);
        write(&mut io, 0x19, 0x0200_0000);
        write(&mut io, 0x18, 0x0841);
        let m = ApicMessage {
            destination: 2,
            logical: true,
            mode: DeliveryMode::Fixed,
            vector: 0x41,
            level_triggered: false,
            assert: true,
        };
        assert_eq!(apic.take(), [m], "the edge from before unmasking");
        io.set_line(4, true);
        io.set_line(4, true);
        assert_eq!(apic.take(), [m]);
        io.end_of_interrupt(0x41);
        assert!(apic.take().is_empty());
        io.set_line(24, true);
        io.set_line(usize::MAX, true);
    }

    #[test]
    fn a_level_is_sent_again_after_eoi_while_it_lasts() {
        let (mut io, apic) = ioapic();
        level(&mut io);
        io.set_line(4, true);
        assert_eq!(apic.take().len(), 1);
        assert_eq!(read(&mut io, 0x18), 0xc051, "remote IRR");
        io.set_line(4, false);
        io.set_line(4, true);
        assert!(apic.take().is_empty(), "not before its EOI");
        io.end_of_interrupt(0x52);
        assert!(apic.take().is_empty());
        io.end_of_interrupt(0x51);
        assert!(apic.take().iter().all(|m| m.level_triggered));
        io.set_line(4, false);
        assert!(Registers::write(&mut io, EOI, 4, 0x51));
        assert_eq!(read(&mut io, 0x18), 0x8051);
        assert!(apic.take().is_empty());
        // Masking keeps remote IRR; changing to edge clears it.
        io.set_line(4, true);
        write(&mut io, 0x18, 0x1_8051);
        assert_eq!(read(&mut io, 0x18), 0x1_c051);
        write(&mut io, 0x18, 0x1_0051);
        write(&mut io, 0x18, 0x8051);
        assert_eq!(apic.take().len(), 2);
    }

    #[test]
    fn a_saved_ioapic_goes_on() {
        let (mut a, _) = ioapic();
        level(&mut a);
        a.set_line(4, true);
        let (mut b, apic) = ioapic();
        b.restore(a.save()).unwrap();
        assert_eq!(b.save(), a.save());
        b.end_of_interrupt(0x51);
        assert_eq!(apic.take()[0].destination, 3);
        b.reset();
        assert_eq!(read(&mut b, 0x18), 0x1_0000);
        let mut bad = a.save();
        bad.pins.pop();
        assert!(b.restore(bad).is_err());
    }

    proptest! {
        /// A level interrupt is outstanding exactly from its message to its EOI.
        #[test]
        fn remote_irr_counts_messages(ops in prop::collection::vec((0_u8..5, any::<u8>(), any::<u32>()), 0..80)) {
            let (mut io, apic) = ioapic();
            for (op, n, value) in ops {
                match op {
                    0 => io.set_line(usize::from(n % 26), value & 1 != 0),
                    1 => io.end_of_interrupt(n),
                    2 => { Registers::read(&mut io, u64::from(n), [1, 2, 4, 8][value as usize & 3]); }
                    _ => write(&mut io, n % 0x48, value),
                }
                for m in apic.take() {
                    let out = |p: &Pin| p.entry.remote_irr() && p.entry.vector() == m.vector;
                    prop_assert_eq!(m.level_triggered, m.level_triggered && io.pins.iter().any(out));
                }
                for p in &io.pins {
                    let e = p.entry;
                    prop_assert!(!e.remote_irr() || e.level());
                    prop_assert!(!e.pending());
                    let fixed = e.delivery_mode() < 2 || e.delivery_mode() == 3;
                    prop_assert!(!(fixed && p.asserted && e.level() && !e.masked()) || e.remote_irr());
                }
            }
        }
    }
}
