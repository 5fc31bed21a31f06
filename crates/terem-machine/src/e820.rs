//! The memory map that a guest is told of: E820 entries, which Linux, PVH and multiboot all take.

use crate::plan::MemoryMap;
use crate::plan::memory::{HIGH_MEMORY, VGA_HOLE};
use terem_memory::PAGE_SIZE;

/// Kinds of memory (ACPI 6.5, table 15.4 "Address Range Types").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// RAM for the guest's use.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
    /// ACPI tables; RAM once they have been read.
    AcpiData = 3,
    /// To be kept over sleep.
    AcpiNvs = 4,
}

/// One entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
    /// What is there.
    pub kind: Kind,
}

impl Entry {
    /// The 20 bytes of an E820 record.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 20] {
        let mut bytes = [0; 20];
        bytes[0..8].copy_from_slice(&self.base.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.size.to_le_bytes());
        bytes[16..20].copy_from_slice(&(self.kind as u32).to_le_bytes());
        bytes
    }
}

/// End of usable memory below 640 KiB: the extended BIOS data area is above.
pub const BASE_MEMORY_END: u64 = 0x9_fc00;
/// Where firmware keeps its tables below 1 MiB.
pub const FIRMWARE_AREA: u64 = 0xe_0000;
/// One past them.
pub const FIRMWARE_AREA_END: u64 = 0x10_0000;

/// The entries for a map, ascending and not overlapping.
#[must_use]
pub fn entries(map: &MemoryMap) -> Vec<Entry> {
    let entry = |base, end: u64, kind| Entry { base, size: end - base, kind };
    let facs = map.tables.end() - PAGE_SIZE;
    let mut all = vec![
        entry(0, BASE_MEMORY_END, Kind::Ram),
        entry(BASE_MEMORY_END, VGA_HOLE, Kind::Reserved),
        entry(FIRMWARE_AREA, FIRMWARE_AREA_END, Kind::Reserved),
        entry(FIRMWARE_AREA_END, map.tables.base, Kind::Ram),
        entry(map.tables.base, facs, Kind::AcpiData),
        entry(facs, map.tables.end(), Kind::AcpiNvs),
        entry(map.ecam.base, map.ecam.end(), Kind::Reserved),
    ];
    if map.high_end > HIGH_MEMORY {
        all.push(entry(HIGH_MEMORY, map.high_end, Kind::Ram));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_ascend_and_cover_the_ram() {
        for size in [64 << 20, 2 << 30, 3 << 30, 1 << 40] {
            let map = MemoryMap::q35(size).unwrap();
            let all = entries(&map);
            for pair in all.windows(2) {
                assert!(pair[0].base + pair[0].size <= pair[1].base, "{pair:x?}");
            }
            let ram: u64 = all.iter().filter(|e| e.kind == Kind::Ram).map(|e| e.size).sum();
            assert!(size - ram < 1 << 20, "less than a MiB is kept from the guest");
        }
    }
}
