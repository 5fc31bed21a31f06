//! Where accelerators and devices meet.
//!
//! ```text
//!   vCPU ──port and MMIO accesses──> Bus ──AddressSpace──> device registers
//!   device ──IrqLine──> PIC, I/O APIC ──ApicMessage──> ApicBus (the accelerator's local APICs)
//!   device ──MsiMessage──────────────────────────────> MsiSink (the same)
//!   device <──Timer──── Clock (virtual time)
//! ```
//!
//! Nothing in here knows a device, an accelerator or an address. A device implements [`Registers`]
//! (plain `&mut self` methods); a [`std::sync::Mutex`] around it is what gets mapped, so that each
//! device has a lock of its own and the bus has none.

#![forbid(unsafe_code)]

mod interrupt;
mod space;
mod state;
mod timer;

use std::fmt;
use std::sync::{Arc, OnceLock};

pub use interrupt::{
    ApicBus, ApicMessage, DeliveryMode, EoiSink, InterruptAcknowledge, IrqLine, LineSink, MsiMessage, MsiSink,
};
pub use space::{AddressSpace, Handler, MapError, RegionId, Registers, all_ones, locked};
pub use state::{Device, DeviceState, SavedDevice, StateError};
pub use timer::{Clock, Timer};

/// Everything that a vCPU reaches outside its memory.
pub struct Bus {
    /// The 64 KiB of I/O ports.
    pub ports: AddressSpace,
    /// Guest-physical addresses that are not RAM.
    pub mmio: AddressSpace,
    /// Virtual time.
    pub clock: Clock,
    acknowledge: OnceLock<Arc<dyn InterruptAcknowledge>>,
    eoi: OnceLock<Arc<dyn EoiSink>>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ports, mmio, clock, acknowledge: _, eoi: _ } = self;
        f.debug_struct("Bus").field("ports", ports).field("mmio", mmio).field("clock", clock).finish()
    }
}

impl Bus {
    /// An empty bus on `clock`.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self {
            ports: AddressSpace::new("port", 0x1_0000),
            mmio: AddressSpace::new("MMIO", u64::MAX),
            clock,
            acknowledge: OnceLock::new(),
            eoi: OnceLock::new(),
        }
    }

    /// Says who answers interrupt acknowledge cycles (the PIC pair). The first call counts.
    pub fn set_interrupt_acknowledge(&self, pic: Arc<dyn InterruptAcknowledge>) {
        let _ = self.acknowledge.set(pic);
    }

    /// Says who hears of the end of level-triggered interrupts (the I/O APIC). The first call counts.
    pub fn set_eoi_sink(&self, ioapic: Arc<dyn EoiSink>) {
        let _ = self.eoi.set(ioapic);
    }

    /// An interrupt acknowledge cycle: the vector of the PIC's highest pending request. Without a PIC
    /// the vector is the 8259A's spurious one at its power-on base (IR7 of base 0).
    #[must_use]
    pub fn acknowledge_interrupt(&self) -> u8 {
        self.acknowledge.get().map_or(7, |pic| pic.acknowledge())
    }

    /// A local APIC's EOI broadcast for a level-triggered `vector`.
    pub fn end_of_interrupt(&self, vector: u8) {
        if let Some(sink) = self.eoi.get() {
            sink.end_of_interrupt(vector);
        }
    }
}
