//! Where RAM and device windows lie in guest-physical addresses.
//!
//! ```text
//!   0 ─ RAM ─ 640K ─ VGA hole ─ 768K ─ RAM ─ low end (≤ 2 GiB) ─ … ─ ECAM ─ PCI32 ─ APICs ─ 4 GiB ─ RAM ─ … ─ PCI64 ─
//! ```

use serde::Serialize;
use terem_memory::RamRange;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The least RAM with which a board works at all, in bytes.
pub const MIN_MEMORY: u64 = 4 * MIB;
/// Most RAM below 4 GiB; the rest goes above.
pub const LOW_MEMORY_LIMIT: u64 = 2 * GIB;
/// Start of the legacy VGA window, where a PC has no RAM.
pub const VGA_HOLE: u64 = 0xa_0000;
/// End of the legacy VGA window.
pub const VGA_HOLE_END: u64 = 0xc_0000;
/// Where high RAM begins.
pub const HIGH_MEMORY: u64 = 4 * GIB;
/// Configuration space of 256 buses.
pub const ECAM_BASE: u64 = 0xb000_0000;
/// First address for 32-bit BARs.
pub const PCI32_BASE: u64 = 0xc000_0000;
/// One past the last address for 32-bit BARs: the I/O APIC is there.
pub const PCI32_END: u64 = 0xfec0_0000;
/// The I/O APIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// The HPET (ICH9 datasheet, "High Precision Event Timer Configuration").
pub const HPET_BASE: u64 = 0xfed0_0000;
/// Local APICs.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Bytes at the end of low RAM that are kept for firmware tables.
pub const TABLES_SIZE: u64 = 256 * KIB;
/// Least guest-physical address bits: what guests of earlier machines knew.
const MIN_PHYS_BITS: u8 = 40;
/// Most guest-physical address bits (Intel SDM vol. 3, 4.1.4).
const MAX_PHYS_BITS: u8 = 52;
/// Room for 64-bit BARs.
const PCI64_SIZE: u64 = 512 * GIB;

/// A range of guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Window {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

impl Window {
    /// From the first address to one past the last.
    #[must_use]
    pub fn between(base: u64, end: u64) -> Self {
        Self { base, size: end.saturating_sub(base) }
    }

    /// One past the last address.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }
}

/// The address map of a board with `size` bytes of RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryMap {
    /// Bytes of RAM that the guest was given (the VGA hole hides 128 KiB of them).
    pub size: u64,
    /// One past the last address of RAM below 4 GiB.
    pub low_end: u64,
    /// One past the last address of RAM above 4 GiB; 4 GiB where there is none.
    pub high_end: u64,
    /// Memory-mapped PCI configuration space.
    pub ecam: Window,
    /// Where 32-bit BARs go.
    pub pci32: Window,
    /// Where 64-bit BARs go.
    pub pci64: Window,
    /// Width of guest-physical addresses.
    pub phys_bits: u8,
    /// Firmware tables, at the end of low RAM: ACPI tables, and in the last page the FACS.
    pub tables: Window,
}

/// Why there is no address map for so much memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemoryMapError {
    /// Too little for tables, loader and anything.
    #[error("a machine needs at least {} MiB of memory, {size} bytes are too few", MIN_MEMORY >> 20)]
    TooSmall {
        /// Bytes asked for.
        size: u64,
    },
    /// Not a multiple of the page size.
    #[error("the memory size {size} bytes is not a multiple of 4 KiB")]
    Unaligned {
        /// Bytes asked for.
        size: u64,
    },
    /// Physical addresses would need more than 52 bits.
    #[error("{size} bytes of memory do not fit into 52 bits of physical addresses")]
    TooLarge {
        /// Bytes asked for.
        size: u64,
    },
}

impl MemoryMap {
    /// The q35's map for `size` bytes of RAM.
    ///
    /// # Errors
    /// See [`MemoryMapError`].
    pub fn q35(size: u64) -> Result<Self, MemoryMapError> {
        if size < MIN_MEMORY {
            return Err(MemoryMapError::TooSmall { size });
        }
        if !size.is_multiple_of(terem_memory::PAGE_SIZE) {
            return Err(MemoryMapError::Unaligned { size });
        }
        let too_large = MemoryMapError::TooLarge { size };
        let low_end = size.min(LOW_MEMORY_LIMIT);
        let high_end = HIGH_MEMORY.checked_add(size - low_end).ok_or(too_large)?;
        // Aligned to its size, so that the largest BAR fits, unless RAM reaches into it.
        let pci64_base = high_end.checked_next_multiple_of(PCI64_SIZE).ok_or(too_large)?;
        let top = pci64_base.checked_add(PCI64_SIZE).ok_or(too_large)?;
        let bits = (1..=MAX_PHYS_BITS).find(|&b| top <= 1 << b).ok_or(too_large)?;
        Ok(Self {
            size,
            low_end,
            high_end,
            ecam: Window { base: ECAM_BASE, size: 256 * MIB },
            pci32: Window::between(PCI32_BASE, PCI32_END),
            pci64: Window { base: pci64_base, size: PCI64_SIZE },
            phys_bits: bits.max(MIN_PHYS_BITS),
            tables: Window { base: low_end - TABLES_SIZE, size: TABLES_SIZE },
        })
    }

    /// RAM, ascending.
    #[must_use]
    pub fn ram(&self) -> Vec<RamRange> {
        let range = |base, end| RamRange { base, size: end - base };
        let mut ram = vec![range(0, VGA_HOLE), range(VGA_HOLE_END, self.low_end)];
        if self.high_end > HIGH_MEMORY {
            ram.push(range(HIGH_MEMORY, self.high_end));
        }
        ram
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_memory_lies_below_the_hole() {
        let m = MemoryMap::q35(256 * MIB).unwrap();
        assert_eq!((m.low_end, m.high_end, m.phys_bits), (256 * MIB, 4 * GIB, 40));
        assert_eq!(m.ram().len(), 2);
        assert_eq!(m.pci64.base, 512 * GIB);
        assert_eq!(m.tables.end(), m.low_end);
    }

    #[test]
    fn large_memory_goes_above_four_gibibytes() {
        let m = MemoryMap::q35(8 * GIB).unwrap();
        assert_eq!((m.low_end, m.high_end), (2 * GIB, 10 * GIB));
        let total: u64 = m.ram().iter().map(|r| r.size).sum();
        assert_eq!(total, 8 * GIB - (VGA_HOLE_END - VGA_HOLE));
        let m = MemoryMap::q35(6 << 40).unwrap();
        assert!(m.pci64.base >= m.high_end && m.pci64.end() <= 1 << m.phys_bits);
        assert_eq!(m.phys_bits, 43);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert_eq!(MemoryMap::q35(MIB), Err(MemoryMapError::TooSmall { size: MIB }));
        assert!(matches!(MemoryMap::q35(8 * MIB + 1), Err(MemoryMapError::Unaligned { .. })));
        for size in [1 << 52, u64::MAX - 4095] {
            assert_eq!(MemoryMap::q35(size), Err(MemoryMapError::TooLarge { size }));
        }
    }
}
