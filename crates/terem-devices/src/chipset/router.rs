//! The board's interrupt wiring, between devices and the PIC and I/O APIC.
//!
//! ```text
//!   ISA IRQ n ────────┬──> PIC input n          (IRQ 2 is the cascade)
//!                     └──> I/O APIC input n     (IRQ 0 arrives at input 2)
//!   PIRQ A–H ─────────┬──> I/O APIC input 16–23
//!   (PCI INTx)        └──> PIC input of PIRQx_ROUT, unless switched off
//!   HPET, others ────────> I/O APIC input n
//! ```
//!
//! A wire with several drivers is high while any of them is: each [`IrqLine`] that the router hands
//! out is one driver, which is counted once.

use std::fmt;
use std::sync::{Arc, Mutex};

use terem_bus::{IrqLine, LineSink, locked};

use super::hpet::LegacyReplacement;
use crate::pci::{Address, Pin};

/// PIRQ lines, A to H.
pub const PIRQS: u8 = 8;
/// The I/O APIC input of PIRQA; the others follow.
pub const PIRQ_GSI: u32 = 16;
/// I/O APIC inputs.
const GSIS: u32 = 24;
/// The I/O APIC input of IRQ 0 (the MADT says so with an interrupt source override).
pub const TIMER_GSI: u32 = 2;
/// PIRQx_ROUT bit 7: not routed to the PIC (ICH9 datasheet section 13.1.17).
const NOT_ROUTED: u8 = 1 << 7;
/// IRQs that a PIRQ can be routed to: 3–7, 9–12, 14, 15.
const ROUTABLE: u16 = 0xdef8;
/// Slots from here on belong to the ICH9 itself.
const FIRST_OWN_SLOT: u8 = 25;

/// The PIRQ (0 is A) of a function on bus 0 of a q35: the ICH9's own devices have A to D by their pin
/// (reset value 3210h of DxxIR), all others E to H, turned by one from slot to slot.
#[must_use]
pub fn pirq(slot: u8, pin: Pin) -> u8 {
    let pin = pin as u8 - 1;
    if slot >= FIRST_OWN_SLOT { pin } else { 4 + (slot.wrapping_add(pin) & 3) }
}

/// A wire, which may have several drivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wire {
    Isa(u8),
    Gsi(u8),
    Pirq(u8),
    /// IRQ 0 of the PIT and IRQ 8 of the RTC, which the HPET may replace.
    Replaced(u8),
}

#[derive(Debug, Clone, Copy)]
struct Driver {
    wire: Wire,
    high: bool,
}

struct Wiring {
    drivers: Vec<Driver>,
    /// PIRQA_ROUT to PIRQH_ROUT.
    routes: [u8; PIRQS as usize],
    replaced: bool,
    /// What the PIC and the I/O APIC were told last.
    pic: u16,
    gsi: u32,
}

/// The wiring. Its state follows from the devices' and registers', so it has none to save.
pub struct InterruptRouter {
    wiring: Mutex<Wiring>,
    pic: Arc<dyn LineSink>,
    ioapic: Arc<dyn LineSink>,
}

impl fmt::Debug for InterruptRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let w = locked(&self.wiring);
        write!(f, "InterruptRouter(pic {:#06x}, ioapic {:#08x})", w.pic, w.gsi)
    }
}

impl InterruptRouter {
    /// Wires to the PIC pair's 16 inputs and the I/O APIC's 24.
    #[must_use]
    pub fn new(pic: Arc<dyn LineSink>, ioapic: Arc<dyn LineSink>) -> Arc<Self> {
        let routes = [NOT_ROUTED; PIRQS as usize];
        let wiring = Wiring { drivers: Vec::new(), routes, replaced: false, pic: 0, gsi: 0 };
        Arc::new(Self { wiring: Mutex::new(wiring), pic, ioapic })
    }

    fn driver(self: &Arc<Self>, wire: Wire) -> IrqLine {
        let mut w = locked(&self.wiring);
        let id = u32::try_from(w.drivers.len()).unwrap_or(u32::MAX);
        w.drivers.push(Driver { wire, high: false });
        IrqLine::new(Arc::clone(self) as _, id)
    }

    /// A new driver of ISA IRQ `irq` (0–15).
    #[must_use]
    pub fn isa(self: &Arc<Self>, irq: u8) -> IrqLine {
        self.driver(Wire::Isa(irq & 0xf))
    }

    /// IRQ 0 for the PIT: silent while the HPET replaces it.
    #[must_use]
    pub fn pit(self: &Arc<Self>) -> IrqLine {
        self.driver(Wire::Replaced(0))
    }

    /// IRQ 8 for the RTC: silent while the HPET replaces it.
    #[must_use]
    pub fn rtc(self: &Arc<Self>) -> IrqLine {
        self.driver(Wire::Replaced(8))
    }

    /// A new driver of I/O APIC input `gsi` (0–23) alone.
    #[must_use]
    pub fn gsi(self: &Arc<Self>, gsi: u8) -> IrqLine {
        self.driver(Wire::Gsi(gsi.min(23)))
    }

    /// A driver for each I/O APIC input, as [`super::hpet::HpetWiring`] wants them.
    #[must_use]
    pub fn all_gsis(self: &Arc<Self>) -> Vec<IrqLine> {
        (0..24).map(|gsi| self.gsi(gsi)).collect()
    }

    /// The INTx line of a function on bus 0.
    #[must_use]
    pub fn intx(self: &Arc<Self>, at: Address, pin: Pin) -> IrqLine {
        self.driver(Wire::Pirq(pirq(at.device(), pin)))
    }

    /// Takes over PIRQA_ROUT to PIRQH_ROUT.
    pub fn set_pirq_routes(&self, routes: [u8; PIRQS as usize]) {
        let mut w = locked(&self.wiring);
        w.routes = routes;
        self.drive(&mut w);
    }

    /// Makes the inputs what the drivers say. Under the lock, so that levels arrive in their order.
    fn drive(&self, w: &mut Wiring) {
        let (mut pic, mut gsi) = (0_u16, 0_u32);
        for d in w.drivers.iter().filter(|d| d.high) {
            match d.wire {
                Wire::Replaced(_) if w.replaced => {}
                Wire::Isa(irq) | Wire::Replaced(irq) => {
                    pic |= 1 << irq;
                    gsi |= 1 << if irq == 0 { TIMER_GSI } else { u32::from(irq) };
                }
                Wire::Gsi(n) => gsi |= 1 << n,
                Wire::Pirq(n) => {
                    gsi |= 1 << (PIRQ_GSI + u32::from(n));
                    let route = w.routes[usize::from(n)];
                    if route & NOT_ROUTED == 0 {
                        pic |= 1 << (route & 0xf) & ROUTABLE;
                    }
                }
            }
        }
        for n in bits(u32::from(pic ^ w.pic)) {
            self.pic.set_line(n, pic & 1 << n != 0);
        }
        for n in bits(gsi ^ w.gsi).filter(|&n| n < GSIS) {
            self.ioapic.set_line(n, gsi & 1 << n != 0);
        }
        (w.pic, w.gsi) = (pic, gsi);
    }
}

/// The numbers of the bits that are set.
fn bits(word: u32) -> impl Iterator<Item = u32> {
    (0..32).filter(move |n| word & 1 << n != 0)
}

impl LineSink for InterruptRouter {
    fn set_line(&self, line: u32, high: bool) {
        let mut w = locked(&self.wiring);
        let driver = usize::try_from(line).ok().and_then(|i| w.drivers.get_mut(i));
        if let Some(d) = driver.filter(|d| d.high != high) {
            d.high = high;
            self.drive(&mut w);
        }
    }
}

impl LegacyReplacement for InterruptRouter {
    fn set_legacy_replacement(&self, on: bool) {
        let mut w = locked(&self.wiring);
        w.replaced = on;
        self.drive(&mut w);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::lab::Lines;
    use proptest::prelude::*;

    fn router() -> (Arc<InterruptRouter>, Arc<Lines>, Arc<Lines>) {
        let (pic, ioapic) = (Arc::new(Lines::default()), Arc::new(Lines::default()));
        (InterruptRouter::new(Arc::clone(&pic) as _, Arc::clone(&ioapic) as _), pic, ioapic)
    }

    #[test]
    fn isa_lines_go_to_both_and_the_timer_to_input_2() {
        let (r, pic, ioapic) = router();
        let (timer, com1) = (r.pit(), r.isa(4));
        timer.pulse();
        com1.set(true);
        assert_eq!((pic.edges(0), ioapic.edges(2), ioapic.edges(0)), (1, 1, 0));
        assert!(pic.level(4) && ioapic.level(4));
        r.gsi(20).set(true);
        assert!(ioapic.level(20));
    }

    #[test]
    fn shared_lines_are_high_while_any_driver_is() {
        let (r, pic, ioapic) = router();
        let a = r.intx(Address::new(1, 0), Pin::A);
        let b = r.intx(Address::new(5, 0), Pin::A);
        assert_eq!((pirq(1, Pin::A), pirq(5, Pin::A), pirq(4, Pin::B), pirq(31, Pin::B)), (5, 5, 5, 1));
        a.set(true);
        b.set(true);
        b.set(true);
        a.set(false);
        assert!(ioapic.level(21));
        assert_eq!(ioapic.edges(21), 1);
        // Routed to IRQ 10 in the PIC while it is high, and off again.
        r.set_pirq_routes([0x80, 0x80, 0x80, 0x80, 0x80, 0x0a, 0x80, 0x80]);
        assert!(pic.level(10) && !ioapic.level(10));
        r.set_pirq_routes([0x02; 8]);
        assert!(!pic.level(10) && !pic.level(2), "IRQ 2 cannot be had");
        b.set(false);
        assert!(!ioapic.level(21));
    }

    #[test]
    fn the_hpet_replaces_timer_and_clock() {
        let (r, pic, _) = router();
        let (pit, rtc, hpet) = (r.pit(), r.rtc(), r.isa(0));
        rtc.set(true);
        r.set_legacy_replacement(true);
        assert!(!pic.level(8));
        pit.pulse();
        assert_eq!(pic.edges(0), 0);
        hpet.pulse();
        assert_eq!(pic.edges(0), 1);
        r.set_legacy_replacement(false);
        assert!(pic.level(8));
    }

    proptest! {
        /// An input is high exactly when one of its drivers is.
        #[test]
        fn inputs_are_the_or_of_drivers(ops in prop::collection::vec((0_usize..12, any::<bool>()), 0..60)) {
            let (r, pic, ioapic) = router();
            let lines: Vec<_> = (0..12).map(|i: u8| r.isa(i / 3 * 3)).collect();
            let mut levels = [false; 12];
            for (i, high) in ops {
                lines[i].set(high);
                levels[i] = high;
                for (n, group) in levels.chunks(3).enumerate() {
                    let expected = group.iter().any(|&l| l);
                    prop_assert_eq!(pic.level(n * 3), expected);
                    prop_assert_eq!(ioapic.level(if n == 0 { 2 } else { n * 3 }), expected);
                }
            }
        }
    }
}
