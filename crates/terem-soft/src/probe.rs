//! What a linear address maps to, without any effect on the guest: for debuggers.

use terem_memory::vm_memory::{Bytes, GuestAddress};

use crate::cpu::{Cpu, cr0, cr4};

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Bits 51:12 of a paging-structure entry (Intel SDM vol. 3, 4.5).
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

impl Cpu {
    /// The physical address of a linear one, whatever the tables permit.
    pub(crate) fn probe(&self, linear: u64) -> Option<u64> {
        if self.cr0 & cr0::PG == 0 {
            return Some(linear & 0xffff_ffff);
        }
        if self.long_mode() {
            let canonical = (linear as i64) << 16 >> 16 == linear as i64;
            return canonical.then(|| self.probe_levels(linear, self.cr3 & ADDRESS, 4)).flatten();
        }
        let linear = linear & 0xffff_ffff;
        if self.cr4 & cr4::PAE != 0 {
            let entry: u64 = self.entry((self.cr3 & 0xffff_ffe0) + (linear >> 30) * 8)?;
            let table = (entry & PRESENT != 0).then_some(entry & ADDRESS)?;
            return self.probe_levels(linear, table, 2);
        }
        self.probe_32(linear)
    }

    /// Tables of 8-byte entries from `level` down.
    fn probe_levels(&self, linear: u64, mut table: u64, level: u32) -> Option<u64> {
        for level in (1..=level).rev() {
            let shift = 12 + 9 * (level - 1);
            let entry: u64 = self.entry(table + (linear >> shift & 0x1ff) * 8)?;
            if entry & PRESENT == 0 {
                return None;
            }
            if level == 1 || (level < 4 && entry & LARGE != 0) {
                let offset = (1 << shift) - 1;
                return Some(entry & ADDRESS & !offset | linear & offset);
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// Tables of 4-byte entries (Intel SDM vol. 3, 4.3).
    fn probe_32(&self, linear: u64) -> Option<u64> {
        let directory: u32 = self.entry((self.cr3 & 0xffff_f000) + (linear >> 22) * 4)?;
        let directory = u64::from(directory);
        if directory & PRESENT == 0 {
            return None;
        }
        if directory & LARGE != 0 && self.cr4 & cr4::PSE != 0 {
            return Some(directory & 0xffc0_0000 | (directory >> 13 & 0xff) << 32 | linear & 0x3f_ffff);
        }
        let entry: u32 = self.entry((directory & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4)?;
        let entry = u64::from(entry);
        (entry & PRESENT != 0).then_some(entry & 0xffff_f000 | linear & 0xfff)
    }

    fn entry<T: terem_memory::vm_memory::AtomicAccess>(&self, at: u64) -> Option<T> {
        self.memory.load(GuestAddress(at), std::sync::atomic::Ordering::Relaxed).ok()
    }
}
