//! Capability IDs, and the bodies of those that all kinds of devices share.
//!
//! A body starts after the two bytes (ID and next pointer) of a capability's header.

/// Power management (PCI Bus Power Management Interface 1.2).
pub const POWER_MANAGEMENT: u8 = 0x01;
/// Message-signalled interrupts (PCI 3.0 section 6.8.1).
pub const MSI: u8 = 0x05;
/// Vendor-specific: virtio's structures.
pub const VENDOR: u8 = 0x09;
/// PCI Express (PCI Express Base section 7.5.3).
pub const PCI_EXPRESS: u8 = 0x10;
/// MSI-X (PCI 3.0 section 6.8.2).
pub const MSIX: u8 = 0x11;

/// A register block: the value after reset and the bits that can be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Body {
    /// Bytes after reset.
    pub value: Vec<u8>,
    /// Bits that a guest may change.
    pub writable: Vec<u8>,
}

/// PMCSR's offset in the power management capability.
pub(super) const PMCSR: u16 = 4;
/// PMCSR bits 1:0, the power state; 3 is D3hot.
pub(super) const POWER_STATE: u16 = 3;

/// Power management with D0 and D3hot, and state kept over D3hot (`No_Soft_Reset`).
#[must_use]
pub fn power_management() -> Body {
    // PMC: version 3 (1.2), no D1, D2 or PME. PMCSR: No_Soft_Reset.
    Body { value: vec![0x03, 0x00, 0x08, 0x00, 0, 0], writable: vec![0, 0, 3, 0, 0, 0] }
}

/// What a PCI Express function is (PCI Express Base section 7.5.3.2, Device/Port Type).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpressType {
    /// Endpoint below a port.
    Endpoint,
    /// Endpoint on the root complex's own bus.
    RootComplexIntegrated,
}

/// The PCI Express capability, version 2 (60 bytes with header). An endpoint below a port has a link
/// of 2.5 GT/s and one lane; one that is integrated in the root complex has none.
#[must_use]
pub fn pci_express(kind: ExpressType) -> Body {
    let mut value = vec![0; 58];
    let mut writable = vec![0; 58];
    let mut put = |offset: usize, v: u32, w: u32| {
        value[offset - 2..offset + 2].copy_from_slice(&v.to_le_bytes());
        writable[offset - 2..offset + 2].copy_from_slice(&w.to_le_bytes());
    };
    let (port_type, link) = match kind {
        ExpressType::Endpoint => (0x0, true),
        ExpressType::RootComplexIntegrated => (0x9, false),
    };
    // PCI Express Capabilities: version 2 and the type. It shares its dword with the header.
    put(0x02, 2 | port_type << 4, 0);
    // Device Capabilities: role-based error reporting, 128-byte payloads. Device Control: error
    // reporting, relaxed ordering, payload and read request size can be written.
    put(0x04, 1 << 15, 0);
    put(0x08, 0x2810, 0x7fff);
    if link {
        put(0x0c, 0x11, 0); // Link Capabilities: 2.5 GT/s, x1.
        put(0x10, 0x0011_0000, 0x0043); // Link Control: ASPM, common clock; Status: 2.5 GT/s, x1.
    }
    Body { value, writable }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{ConfigSize, ConfigSpace, Identity};

    #[test]
    fn the_express_capability_reads_as_the_specification_says() {
        let mut c = ConfigSpace::new(&Identity::default(), ConfigSize::Extended);
        let b = pci_express(ExpressType::RootComplexIntegrated);
        let at = c.add_capability(PCI_EXPRESS, &b.value, &b.writable).unwrap();
        assert_eq!(c.read16(at + 2), 0x0092);
        assert_eq!(c.read32(at + 4), 0x8000);
        assert_eq!(c.read16(at + 8), 0x2810);
        assert_eq!(c.read32(at + 0xc), 0);
        c.write(at + 8, 4, 0xffff_ffff);
        assert_eq!(c.read32(at + 8), 0x7fff);
        let e = pci_express(ExpressType::Endpoint);
        assert_eq!((e.value[0], e.value[0x0c - 2]), (0x02, 0x11));
        assert_eq!(e.value.len(), 58);
    }
}
