//! Interrupts: lines, messages, and the way to the local APICs.

use std::fmt;
use std::sync::Arc;

/// Something with numbered interrupt inputs: a PIC, an I/O APIC, or a board's wiring in front of both.
pub trait LineSink: Send + Sync {
    /// Sets input `line` high or low. Setting the level that it has already changes nothing.
    fn set_line(&self, line: u32, high: bool);
}

/// A device's end of one interrupt line. Each line has one driver; where a board wires several devices
/// to one input, the board's sink combines them.
#[derive(Clone)]
pub struct IrqLine {
    sink: Arc<dyn LineSink>,
    line: u32,
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IrqLine({})", self.line)
    }
}

impl IrqLine {
    /// The line to input `line` of `sink`.
    #[must_use]
    pub fn new(sink: Arc<dyn LineSink>, line: u32) -> Self {
        Self { sink, line }
    }

    /// A line that leads nowhere, for tests and unwired devices.
    #[must_use]
    pub fn unconnected() -> Self {
        struct Nowhere;
        impl LineSink for Nowhere {
            fn set_line(&self, _line: u32, _high: bool) {}
        }
        Self::new(Arc::new(Nowhere), 0)
    }

    /// Drives the line.
    pub fn set(&self, high: bool) {
        self.sink.set_line(self.line, high);
    }

    /// An edge: high, then low.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// A message-signalled interrupt: a write of `data` to `address`
/// (Intel SDM vol. 3, "Message Signalled Interrupts").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// Guest-physical address, `0xfee0_0000` and up.
    pub address: u64,
    /// The data word.
    pub data: u32,
}

impl MsiMessage {
    /// The message on the APIC bus that this write stands for.
    ///
    /// Address: bits 19:12 destination ID, bit 2 logical; bits 63:40 carry destination bits 31:8 as
    /// hypervisors with extended destination IDs do not use here, so they are ignored. Data: bits 7:0
    /// vector, 10:8 delivery mode, 14 level, 15 trigger.
    #[must_use]
    pub fn to_apic(self) -> ApicMessage {
        let [vector, mode, ..] = self.data.to_le_bytes();
        ApicMessage {
            destination: u32::try_from(self.address >> 12 & 0xff).unwrap_or(0),
            logical: self.address & 1 << 2 != 0,
            mode: DeliveryMode::from_bits(mode),
            vector,
            level_triggered: self.data & 1 << 15 != 0,
            assert: self.data & 1 << 15 == 0 || self.data & 1 << 14 != 0,
        }
    }
}

/// Where message-signalled interrupts go.
pub trait MsiSink: Send + Sync {
    /// Delivers one message.
    fn send_msi(&self, message: MsiMessage);
}

/// How a message acts on the local APIC that takes it (Intel SDM vol. 3, "Interrupt Command Register").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector, to all destinations.
    Fixed,
    /// The vector, to the destination with the lowest priority.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT: reset to the wait-for-SIPI state.
    Init,
    /// Start-up: begin at `vector << 12` in real mode.
    StartUp,
    /// An interrupt whose vector the PIC gives.
    ExtInt,
}

impl DeliveryMode {
    /// From the 3-bit encoding of ICR, LVT, I/O APIC and MSI (other bits are ignored). The reserved
    /// encoding 3 is taken as fixed.
    #[must_use]
    pub fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => Self::Fixed,
        }
    }
}

/// A message to local APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApicMessage {
    /// APIC ID or logical destination; `0xff` (and `0xffff_ffff` in x2APIC mode) is everybody.
    pub destination: u32,
    /// Whether the destination is logical.
    pub logical: bool,
    /// What it does.
    pub mode: DeliveryMode,
    /// The vector, where the mode has one.
    pub vector: u8,
    /// Whether the interrupt is level-triggered (its EOI is broadcast).
    pub level_triggered: bool,
    /// False for an INIT level de-assert, which does nothing.
    pub assert: bool,
}

/// The local APICs, as seen by everybody outside the CPUs. An accelerator implements it.
pub trait ApicBus: Send + Sync {
    /// Delivers a message to the local APICs that it names.
    fn deliver(&self, message: ApicMessage);

    /// Drives the PIC's INTR output, wired to LINT0 of every local APIC (taken by the one whose LVT
    /// says `ExtINT` and is not masked: the boot processor).
    fn set_intr(&self, high: bool);

    /// Raises NMI on LINT1 of every local APIC.
    fn pulse_nmi(&self);

    /// Raises SMI on every processor: firmware has written the chipset's port for it.
    fn pulse_smi(&self);
}

/// Who answers interrupt acknowledge cycles: the PIC pair.
pub trait InterruptAcknowledge: Send + Sync {
    /// The vector of the highest request, which thereby is in service.
    fn acknowledge(&self) -> u8;
}

/// Who hears of the end of level-triggered interrupts: the I/O APIC.
pub trait EoiSink: Send + Sync {
    /// A local APIC ended a level-triggered interrupt of this vector.
    fn end_of_interrupt(&self, vector: u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msi_fields_are_where_the_manual_has_them() {
        let m = MsiMessage { address: 0xfee0_3004, data: 0xc141 }.to_apic();
        assert_eq!(m.destination, 3);
        assert!(m.logical && m.level_triggered && m.assert);
        assert_eq!((m.vector, m.mode), (0x41, DeliveryMode::LowestPriority));
        let edge = MsiMessage { address: 0xfeef_f000, data: 0x30 }.to_apic();
        assert_eq!(
            (edge.destination, edge.logical, edge.level_triggered, edge.assert),
            (0xff, false, false, true)
        );
    }
}
