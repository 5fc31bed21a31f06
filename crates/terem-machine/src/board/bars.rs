//! PCI set-up as firmware does it: each function gets its BARs, its interrupt line's number, and is switched on.

use terem_devices::chipset::router::pirq;
use terem_devices::pci::{Address, BAR_COUNT, Pin, RootComplex, register};

use super::q35::PIC_LINES;
use crate::plan::memory::Window;

/// Where I/O BARs go: above everything that a PC has at fixed ports.
const IO_BASE: u64 = 0xc000;
const IO_END: u64 = 0x1_0000;
/// The pin in an interrupt pin register.
fn pin(register: u32) -> Option<Pin> {
    match register {
        1 => Some(Pin::A),
        2 => Some(Pin::B),
        3 => Some(Pin::C),
        4 => Some(Pin::D),
        _ => None,
    }
}

/// Hands out naturally aligned addresses from a window.
struct Pool {
    next: u64,
    end: u64,
}

impl Pool {
    fn take(&mut self, size: u64) -> Option<u64> {
        let at = self.next.checked_next_multiple_of(size)?;
        let end = at.checked_add(size).filter(|&end| end <= self.end)?;
        self.next = end;
        Some(at)
    }
}

/// The windows for BARs.
pub(super) struct Windows {
    io: Pool,
    memory32: Pool,
    memory64: Pool,
}

impl Windows {
    pub(super) fn new(memory32: Window, memory64: Window) -> Self {
        let pool = |w: Window| Pool { next: w.base, end: w.end() };
        Self { io: Pool { next: IO_BASE, end: IO_END }, memory32: pool(memory32), memory64: pool(memory64) }
    }

    /// Sets up the functions of bus 0.
    pub(super) fn assign(&mut self, root: &RootComplex) {
        for at in root.bus().addresses() {
            self.function(root, at);
        }
    }

    fn function(&mut self, root: &RootComplex, at: Address) {
        let header = root.read(0, at, register::HEADER_TYPE, 1) & 0x7f;
        if header != 0 {
            return;
        }
        let mut enable = 0;
        let mut index = 0;
        while index < BAR_COUNT {
            let (kind, wide) = self.bar(root, at, index);
            enable |= kind;
            index += if wide { 2 } else { 1 };
        }
        if let Some(pin) = pin(root.read(0, at, register::INTERRUPT_PIN, 1)) {
            let line = PIC_LINES[usize::from(pirq(at.device(), pin)) % PIC_LINES.len()];
            root.write(0, at, register::INTERRUPT_LINE, 1, line.into());
        }
        let command = root.read(0, at, register::COMMAND, 2);
        root.write(0, at, register::COMMAND, 2, command | u32::from(enable));
    }

    /// Sizes a BAR and gives it an address. The command bit that it needs (0 for none), and whether it takes
    /// two registers.
    fn bar(&mut self, root: &RootComplex, at: Address, index: u8) -> (u16, bool) {
        let offset = register::BAR0 + u16::from(index) * 4;
        let size = |offset| {
            root.write(0, at, offset, 4, u32::MAX);
            root.read(0, at, offset, 4)
        };
        let low = size(offset);
        if low == 0 {
            return (0, false);
        }
        if low & 1 != 0 {
            let bytes = u64::from(!(low & !3)).wrapping_add(1) & 0xffff;
            let base = self.io.take(bytes.max(4));
            root.write(0, at, offset, 4, u32::try_from(base.unwrap_or(0)).unwrap_or(0));
            return (if base.is_some() { register::COMMAND_IO } else { 0 }, false);
        }
        let wide = low & 6 == 4;
        let high = if wide { size(offset + 4) } else { u32::MAX };
        let mask = u64::from(high) << 32 | u64::from(low & !0xf);
        let bytes = (!mask).wrapping_add(1);
        let pool = if wide { &mut self.memory64 } else { &mut self.memory32 };
        let base = pool.take(bytes.max(16));
        let [l, h] =
            [base.unwrap_or(0) & 0xffff_ffff, base.unwrap_or(0) >> 32].map(|v| u32::try_from(v).unwrap_or(0));
        root.write(0, at, offset, 4, l);
        if wide {
            root.write(0, at, offset + 4, 4, h);
        }
        (if base.is_some() { register::COMMAND_MEMORY } else { 0 }, wide)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Weak};
    use terem_bus::{Bus, Clock, IrqLine, MsiMessage, MsiSink};
    use terem_devices::pci::{BarKind, ConfigSize, FunctionBuilder, Identity, Wiring};

    struct NoMessages;
    impl MsiSink for NoMessages {
        fn send_msi(&self, _message: MsiMessage) {}
    }

    #[test]
    fn every_bar_gets_its_place() {
        let bus = Arc::new(Bus::new(Clock::manual()));
        let root = RootComplex::default();
        for slot in 1..4 {
            let wiring: Weak<Bus> = Arc::downgrade(&bus);
            let wiring = Wiring { bus: wiring, msi: Arc::new(NoMessages), intx: IrqLine::unconnected() };
            let mut b = FunctionBuilder::new(&Identity::default(), ConfigSize::Extended, wiring);
            b.bar(0, BarKind::Io, 0x20, "ports").unwrap();
            b.bar(1, BarKind::Memory32 { prefetchable: false }, 0x1000, "small").unwrap();
            b.bar(4, BarKind::Memory64 { prefetchable: true }, 0x4000, "large").unwrap();
            b.interrupt_pin(Pin::A);
            root.bus().attach(Address::new(slot, 0), b.build()).unwrap();
        }
        let mut w = Windows::new(
            Window { base: 0xc000_0000, size: 1 << 20 },
            Window { base: 1 << 39, size: 1 << 30 },
        );
        w.assign(&root);
        let read = |slot, offset| root.read(0, Address::new(slot, 0), offset, 4);
        assert_eq!([1, 2, 3].map(|s| read(s, 0x10)), [0xc001, 0xc021, 0xc041]);
        assert_eq!([1, 2, 3].map(|s| read(s, 0x14)), [0xc000_0000, 0xc000_1000, 0xc000_2000]);
        assert_eq!(
            [1, 2, 3].map(|s| (read(s, 0x20), read(s, 0x24))),
            [(0xc, 0x80), (0x400c, 0x80), (0x800c, 0x80)]
        );
        assert_eq!([1, 2, 3].map(|s| read(s, 4) & 3), [3, 3, 3]);
        assert_eq!([1, 2, 3].map(|s| read(s, 0x3c) & 0xff), [10, 11, 11]);
    }
}
