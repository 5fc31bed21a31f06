//! PCI addresses on bus 0, and where INTx pins lead.

use serde::{Serialize, Serializer};
use terem_devices::chipset::router::{PIRQ_GSI, pirq};
use terem_devices::pci::{Address, Pin};

/// Device numbers on a bus.
pub const SLOTS: u8 = 32;
/// INTA# to INTD#.
pub const INTX_PINS: [Pin; 4] = [Pin::A, Pin::B, Pin::C, Pin::D];
/// The slot of the LPC bridge, the last one.
const LPC_SLOT: u8 = 31;

/// The memory controller hub's host bridge.
#[must_use]
pub fn host_bridge() -> Address {
    Address::new(0, 0)
}

/// The ICH9's LPC bridge.
#[must_use]
pub fn lpc() -> Address {
    Address::new(LPC_SLOT, 0)
}

/// The I/O APIC input that an INTx pin of a slot arrives at.
#[must_use]
pub fn gsi(slot: u8, pin: Pin) -> u32 {
    PIRQ_GSI + u32::from(pirq(slot, pin))
}

/// Hands out slots in ascending order.
#[derive(Debug)]
pub struct Slots {
    next: u8,
}

impl Default for Slots {
    fn default() -> Self {
        Self { next: 1 }
    }
}

impl Slots {
    /// How many there are.
    pub const ROOM: usize = LPC_SLOT as usize - 1;

    /// The next one, if there is one.
    pub fn take(&mut self) -> Option<PciAddress> {
        let slot = self.next;
        (slot < LPC_SLOT).then(|| {
            self.next += 1;
            PciAddress(Address::new(slot, 0))
        })
    }
}

/// An address on bus 0 that is written as tools write it: `0000:00:01.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciAddress(pub Address);

impl std::fmt::Display for PciAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "0000:00:{}", self.0)
    }
}

impl Serialize for PciAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_spread_over_the_wires() {
        assert_eq!([1, 2, 3, 4, 5].map(|slot| gsi(slot, Pin::A)), [21, 22, 23, 20, 21]);
        assert_eq!(INTX_PINS.map(|pin| gsi(31, pin)), [16, 17, 18, 19]);
        for slot in 0..SLOTS {
            for pin in INTX_PINS {
                assert!((16..24).contains(&gsi(slot, pin)));
            }
        }
    }

    #[test]
    fn slots_end_before_the_bridge() {
        let mut slots = Slots::default();
        let all: Vec<_> = std::iter::from_fn(|| slots.take()).collect();
        assert_eq!(all.len(), Slots::ROOM);
        assert_eq!((all[0].to_string(), all[29].0.device()), ("0000:00:01.0".into(), 30));
    }
}
