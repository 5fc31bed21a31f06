//! Paging: the page walk, and how it fills the software TLB (`mmu/tlb.rs`; Intel SDM vol. 3, chapter 4).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use terem_cpu::{Exit, rflags};

use crate::cpu::{Cpu, cr0, cr4, efer};
use crate::fault::{Exec, Fault, vector};

mod tlb;

use tlb::Permitted;
pub(crate) use tlb::{
    Entry, KERNEL, MIX, NOWHERE, PAGE_MASK, PAIRS, PLACES, Pair, Place, QUICK, Quick, Remembered, Tlb, USER,
};

/// What an access does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Execute,
}

/// Page-fault error code bits (Intel SDM vol. 3, 4.7).
mod code {
    pub(super) const PRESENT: u32 = 1;
    pub(super) const WRITE: u32 = 1 << 1;
    pub(super) const USER: u32 = 1 << 2;
    pub(super) const RESERVED: u32 = 1 << 3;
    pub(super) const FETCH: u32 = 1 << 4;
    pub(super) const KEY: u32 = 1 << 5;
}

/// Page-table entry bits.
mod pte {
    pub(super) const PRESENT: u64 = 1;
    pub(super) const WRITE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const ACCESSED: u64 = 1 << 5;
    pub(super) const DIRTY: u64 = 1 << 6;
    pub(super) const LARGE: u64 = 1 << 7;
    pub(super) const GLOBAL: u64 = 1 << 8;
    /// The protection key's place (bits 62:59), in a leaf entry of 4-level paging.
    pub(super) const KEY_SHIFT: u32 = 59;
    pub(super) const NX: u64 = 1 << 63;
}

/// Instead of an error code: an entry changed under the walk.
const CHANGED: u32 = u32::MAX;

/// What a page walk found.
#[derive(Debug, Clone, Copy)]
struct Mapping {
    /// Physical address of the byte.
    physical: u64,
    /// log2 of the page size.
    bits: u32,
    user: bool,
    writable: bool,
    executable: bool,
    /// The dirty bit is set (or there is none): writes need no further walk.
    dirty: bool,
    /// The page is in all contexts.
    global: bool,
    /// The protection key takes away reads and writes, only writes, or nothing.
    kept: Kept,
}

/// A page as a user's access finds it ([`Cpu::peek_user`]).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Leaf {
    /// The physical page's number.
    pub(crate) page: u64,
    pub(crate) writable: bool,
    pub(crate) executable: bool,
    pub(crate) accessed: bool,
    pub(crate) dirty: bool,
}

/// What a page's protection key takes away from data accesses (Intel SDM vol. 3, 4.6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Nothing,
    Writes,
    All,
}

impl Kept {
    fn denies(self, access: Access) -> bool {
        match access {
            Access::Read => self == Self::All,
            Access::Write => self != Self::Nothing,
            Access::Execute => false,
        }
    }
}

impl Cpu {
    /// The host address of a physical address of RAM.
    #[inline]
    pub(crate) fn ram(&self, physical: u64) -> Option<*mut u8> {
        let low = physical < self.low_ram;
        (low || self.memory.is_ram(physical, 1)).then(|| (self.window + physical) as *mut u8)
    }

    /// The TLB set for the present privilege, to be called when CPL, CR0, CR4, EFER or AC changed.
    pub(crate) fn mode_changed(&mut self) {
        let set = if self.cpl == 3 {
            2
        } else if self.cr4 & cr4::SMAP != 0 && self.system_flags & rflags::AC == 0 {
            0
        } else {
            1
        };
        self.tlb.set = set;
        let strict = set == USER && self.cr0 & cr0::AM != 0 && self.system_flags & rflags::AC != 0;
        if strict != self.tlb.strict() {
            self.tlb.set_strict(strict);
        }
        self.refresh_jump_key();
    }

    /// The present process-context identifier.
    pub(crate) fn pcid(&self) -> u16 {
        if self.cr4 & cr4::PCIDE != 0 { (self.cr3 & 0xfff) as u16 } else { 0 }
    }

    /// Translates for the present privilege, filling the TLB.
    pub(crate) fn translate(&mut self, linear: u64, access: Access) -> Exec<u64> {
        let addend = if access == Access::Execute {
            self.tlb.code(linear)
        } else {
            let entry = self.tlb.entry(linear);
            let tag = if access == Access::Read { entry.read } else { entry.write };
            (tag == self.tlb.tag(linear)).then_some(entry.addend)
        };
        if let Some(addend) = addend {
            return Ok(linear.wrapping_add(addend) - self.window);
        }
        let user = self.cpl == 3;
        let set = self.tlb.set();
        let m = self.walk(linear, access, user, set == 0)?;
        self.fill(linear, set, &m);
        Ok(m.physical)
    }

    /// Translates as the supervisor whatever the privilege is: for descriptor tables, TSS and the like.
    pub(crate) fn translate_system(&mut self, linear: u64, access: Access) -> Exec<u64> {
        Ok(self.walk(linear, access, false, false)?.physical)
    }

    fn fill(&mut self, linear: u64, set: usize, m: &Mapping) {
        let Some(host) = self.ram(m.physical) else { return };
        let supervisor = set != USER;
        // Supervisor data accesses to user pages are not for the set under SMAP, and fetches from them not
        // for either under SMEP.
        let data = if supervisor { !(set == KERNEL && m.user) } else { m.user && !self.tlb.strict() }
            && !m.kept.denies(Access::Read)
            && !self.watches.data_on(linear);
        let page = Permitted {
            data,
            write: data
                && m.dirty
                && !m.kept.denies(Access::Write)
                && (m.writable || (supervisor && self.cr0 & cr0::WP == 0)),
            fetch: if supervisor { !(m.user && self.cr4 & cr4::SMEP != 0) } else { m.user } && m.executable,
            global: m.global,
        };
        // SAFETY: a page of RAM has a mark.
        let mark = unsafe { self.marks.add((m.physical >> 12) as usize) };
        self.tlb.put(linear, set, &page, (host as u64).wrapping_sub(linear), mark);
        if m.bits > 12 {
            let from = linear & !((1 << m.bits) - 1);
            let to = from.saturating_add(1 << m.bits);
            let large = &mut self.tlb.large[(linear >> 63) as usize];
            *large = Some(large.map_or((from, to), |(a, b)| (a.min(from), b.max(to))));
        }
    }

    /// Walks the page tables; sets accessed and dirty bits as the access needs them.
    fn walk(&mut self, linear: u64, access: Access, user: bool, smap: bool) -> Exec<Mapping> {
        self.stats.page_walks.add(1);
        if self.cr0 & cr0::PG == 0 {
            let physical = linear & 0xffff_ffff;
            return Ok(Mapping {
                physical,
                bits: 12,
                user: true,
                writable: true,
                executable: true,
                dirty: true,
                global: false,
                kept: Kept::Nothing,
            });
        }
        let found = loop {
            let found = if self.cr4 & cr4::PAE == 0 {
                self.walk_32(linear, access, user, smap)
            } else {
                self.walk_pae(linear, access, user, smap)
            };
            if !matches!(found, Err(CHANGED)) {
                break found;
            }
        };
        found.map_err(|mut code| {
            if access == Access::Write {
                code |= code::WRITE;
            }
            if user {
                code |= code::USER;
            }
            let nx = self.msrs.efer & efer::NXE != 0 && self.cr4 & cr4::PAE != 0;
            if access == Access::Execute && (nx || self.cr4 & cr4::SMEP != 0) {
                code |= code::FETCH;
            }
            self.cr2 = linear;
            Fault::with_code(vector::PF, code)
        })
    }

    /// PAE, 4-level: entries of 8 bytes.
    fn walk_pae(&mut self, linear: u64, access: Access, user: bool, smap: bool) -> Result<Mapping, u32> {
        let long = self.long_mode();
        let width = (1_u64 << self.cpuid.phys_bits()) - 1;
        let no_nx = self.msrs.efer & efer::NXE == 0;
        let (mut table, mut level) =
            if long { (self.cr3 & 0x000f_ffff_ffff_f000, 4) } else { (self.cr3 & 0xffff_ffe0, 3) };
        let (mut writable, mut to_user, mut executable) = (true, true, true);
        loop {
            let shift = 12 + 9 * (level - 1);
            let index = if level == 3 && !long { linear >> 30 & 3 } else { linear >> shift & 0x1ff };
            let at = table + index * 8;
            let entry = self.table_entry(at).ok_or(0_u32)?;
            if entry & pte::PRESENT == 0 {
                return Err(0);
            }
            let pdpte = level == 3 && !long;
            let large = entry & pte::LARGE != 0 && (level == 2 || (level == 3 && long && self.has_1g()));
            let mut reserved = 0x000f_ffff_ffff_f000 & !width;
            if no_nx || pdpte {
                reserved |= pte::NX;
            }
            if pdpte {
                reserved |= 0x1e6;
            } else if entry & pte::LARGE != 0 && (level == 4 || (level == 3 && !large)) {
                reserved |= pte::LARGE;
            }
            if large {
                reserved |= ((1 << shift) - 1) & !0x1fff;
            }
            if entry & reserved != 0 {
                return Err(code::PRESENT | code::RESERVED);
            }
            if !pdpte {
                writable &= entry & pte::WRITE != 0;
                to_user &= entry & pte::USER != 0;
                executable &= entry & pte::NX == 0;
            }
            if level > 1 && !large {
                if !pdpte {
                    self.mark(at, entry, pte::ACCESSED)?;
                }
                table = entry & width & PAGE_MASK;
                level -= 1;
                continue;
            }
            let kept = if to_user { self.kept_by_key(entry, user) } else { Kept::Nothing };
            let key = if kept.denies(access) { code::KEY } else { 0 };
            self.permitted(access, user, smap, writable, to_user, executable).map_err(|code| code | key)?;
            if key != 0 {
                return Err(code::PRESENT | key);
            }
            let set = pte::ACCESSED | if access == Access::Write { pte::DIRTY } else { 0 };
            self.mark(at, entry, set)?;
            let offset = (1_u64 << shift) - 1;
            return Ok(Mapping {
                physical: entry & width & PAGE_MASK & !offset | linear & offset,
                bits: shift,
                user: to_user,
                writable,
                executable,
                dirty: (entry | set) & pte::DIRTY != 0,
                global: entry & pte::GLOBAL != 0,
                kept,
            });
        }
    }

    /// 32-bit paging: entries of 4 bytes, pages of 4 KiB and 4 MiB (with PSE-36).
    fn walk_32(&mut self, linear: u64, access: Access, user: bool, smap: bool) -> Result<Mapping, u32> {
        let at = (self.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4;
        let directory = u64::from(self.table_entry_32(at).ok_or(0_u32)?);
        if directory & pte::PRESENT == 0 {
            return Err(0);
        }
        let (mut writable, mut to_user) = (directory & pte::WRITE != 0, directory & pte::USER != 0);
        let set = pte::ACCESSED | if access == Access::Write { pte::DIRTY } else { 0 };
        if directory & pte::LARGE != 0 && self.cr4 & cr4::PSE != 0 {
            if directory & 1 << 21 != 0 {
                return Err(code::PRESENT | code::RESERVED);
            }
            self.permitted(access, user, smap, writable, to_user, true)?;
            self.mark_32(at, directory as u32, set as u32)?;
            let high = directory >> 13 & 0xff;
            let physical = directory & 0xffc0_0000 | high << 32 | linear & 0x3f_ffff;
            let dirty = (directory | set) & pte::DIRTY != 0;
            let global = directory & pte::GLOBAL != 0;
            return Ok(Mapping {
                physical,
                bits: 22,
                user: to_user,
                writable,
                executable: true,
                dirty,
                global,
                kept: Kept::Nothing,
            });
        }
        self.mark_32(at, directory as u32, pte::ACCESSED as u32)?;
        let at = (directory & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4;
        let entry = u64::from(self.table_entry_32(at).ok_or(0_u32)?);
        if entry & pte::PRESENT == 0 {
            return Err(0);
        }
        writable &= entry & pte::WRITE != 0;
        to_user &= entry & pte::USER != 0;
        self.permitted(access, user, smap, writable, to_user, true)?;
        self.mark_32(at, entry as u32, set as u32)?;
        let physical = entry & 0xffff_f000 | linear & 0xfff;
        let dirty = (entry | set) & pte::DIRTY != 0;
        let global = entry & pte::GLOBAL != 0;
        let kept = Kept::Nothing;
        Ok(Mapping { physical, bits: 12, user: to_user, writable, executable: true, dirty, global, kept })
    }

    /// What the protection key of a user page's entry takes away.
    fn kept_by_key(&self, entry: u64, user: bool) -> Kept {
        if self.cr4 & cr4::PKE == 0 || !self.long_mode() {
            return Kept::Nothing;
        }
        let rights = self.pkru >> (2 * (entry >> pte::KEY_SHIFT & 15)) & 3;
        match rights {
            0 => Kept::Nothing,
            2 if user || self.cr0 & cr0::WP != 0 => Kept::Writes,
            2 => Kept::Nothing,
            _ => Kept::All,
        }
    }

    /// Sets PKRU.
    pub(crate) fn set_pkru(&mut self, value: u32) {
        let changed = self.pkru != value;
        self.pkru = value;
        if changed && self.cr4 & cr4::PKE != 0 {
            self.flush_tlb();
        }
    }

    /// Access rights (Intel SDM vol. 3, 4.6.1).
    fn permitted(
        &self,
        access: Access,
        user: bool,
        smap: bool,
        writable: bool,
        to_user: bool,
        executable: bool,
    ) -> Result<(), u32> {
        let ok = match access {
            Access::Read => to_user || !user,
            Access::Write => (to_user || !user) && (writable || (!user && self.cr0 & cr0::WP == 0)),
            Access::Execute => {
                executable && if user { to_user } else { !to_user || self.cr4 & cr4::SMEP == 0 }
            }
        };
        let kept_out = smap && to_user && access != Access::Execute;
        if ok && !kept_out { Ok(()) } else { Err(code::PRESENT) }
    }

    /// What paging has for a user access at `linear`, in long mode, as far as it is RAM whose protection key takes nothing away;
    /// no bit is set.
    pub(crate) fn peek_user(&self, linear: u64) -> Option<Leaf> {
        let width = (1_u64 << self.cpuid.phys_bits()) - 1;
        let mut table = self.cr3 & 0x000f_ffff_ffff_f000;
        let (mut writable, mut executable) = (true, true);
        for level in (1..=4).rev() {
            let shift = 12 + 9 * (level - 1);
            let entry = self.table_entry(table + (linear >> shift & 0x1ff) * 8)?;
            if entry & (pte::PRESENT | pte::USER) != pte::PRESENT | pte::USER
                || entry & 0x000f_ffff_ffff_f000 & !width != 0
            {
                return None;
            }
            writable &= entry & pte::WRITE != 0;
            executable &= entry & pte::NX == 0;
            let large = level > 1 && entry & pte::LARGE != 0;
            if large && (level == 4 || (level == 3 && !self.has_1g())) {
                return None;
            }
            if level > 1 && !large {
                if entry & pte::ACCESSED == 0 {
                    return None;
                }
                table = entry & width & PAGE_MASK;
                continue;
            }
            let offset = (1_u64 << shift) - 1;
            let keyed = self.cr4 & cr4::PKE != 0 && entry >> pte::KEY_SHIFT & 15 != 0;
            if keyed || entry & width & offset & !0x1fff & if large { u64::MAX } else { 0 } != 0 {
                return None;
            }
            let physical = entry & width & PAGE_MASK & !offset | linear & offset & PAGE_MASK;
            self.ram(physical)?;
            return Some(Leaf {
                page: physical >> 12,
                writable,
                executable,
                accessed: entry & pte::ACCESSED != 0,
                dirty: entry & pte::DIRTY != 0,
            });
        }
        None
    }

    /// Walks the page tables for a user access, with all that it sets in them.
    pub(crate) fn walk_user(&mut self, linear: u64, access: Access) -> Exec {
        self.walk(linear, access, true, false).map(|_| ())
    }

    fn has_1g(&self) -> bool {
        self.cpuid.model().features.has("pdpe1gb")
    }

    /// The paging-structure entry at a physical address; tables outside RAM read as not present.
    fn table_entry(&self, at: u64) -> Option<u64> {
        // SAFETY: RAM in the window, aligned to 8; page tables are shared with other vCPUs, so atomic.
        self.ram(at).map(|p| unsafe { (*p.cast::<AtomicU64>()).load(Ordering::Relaxed) })
    }

    fn table_entry_32(&self, at: u64) -> Option<u32> {
        // SAFETY: as above, aligned to 4.
        self.ram(at).map(|p| unsafe { (*p.cast::<AtomicU32>()).load(Ordering::Relaxed) })
    }

    /// Sets bits of a paging-structure entry, if it still is what was read: else the walk starts anew, so
    /// that no dirty bit is lost on an entry that another processor took away.
    fn mark(&mut self, at: u64, entry: u64, bits: u64) -> Result<(), u32> {
        if entry & bits != bits
            && let Some(p) = self.ram(at)
        {
            // SAFETY: as in `table_entry`.
            let word = unsafe { &*p.cast::<AtomicU64>() };
            let done = word.compare_exchange(entry, entry | bits, Ordering::SeqCst, Ordering::Relaxed);
            self.stored(p as u64);
            done.map_err(|_| CHANGED)?;
        }
        Ok(())
    }

    fn mark_32(&mut self, at: u64, entry: u32, bits: u32) -> Result<(), u32> {
        if entry & bits != bits
            && let Some(p) = self.ram(at)
        {
            // SAFETY: as in `table_entry_32`.
            let word = unsafe { &*p.cast::<AtomicU32>() };
            let done = word.compare_exchange(entry, entry | bits, Ordering::SeqCst, Ordering::Relaxed);
            self.stored(p as u64);
            done.map_err(|_| CHANGED)?;
        }
        Ok(())
    }

    /// INVLPG, or INVPCID of one address: the page of `linear` in all contexts.
    pub(crate) fn invalidate_page(&mut self, linear: u64) {
        self.stats.tlb_page_flushes.add(1);
        self.direct_page_gone(linear);
        if !self.tlb.invalidate(linear) {
            self.flush_tlb();
        }
        self.refresh_jump_key();
    }

    /// Forgets all translations of all contexts.
    pub(crate) fn flush_tlb(&mut self) {
        self.stats.tlb_flushes.add(1);
        let pcid = self.pcid();
        self.direct_context_gone(None);
        self.tlb.flush_all(pcid, self.cr4 & cr4::PGE != 0);
        self.refresh_jump_key();
    }

    /// Goes to another context (a write to CR3); `keep` says that what is remembered of it may stay.
    pub(crate) fn switch_context(&mut self, keep: bool) {
        let pcid = self.pcid();
        if !keep {
            self.stats.tlb_flushes.add(1);
            self.direct_context_gone(Some(pcid));
        }
        self.tlb.switch(pcid, keep);
        self.refresh_jump_key();
        self.refresh_direct();
    }

    /// Forgets a context that is not the present one.
    pub(crate) fn forget_context(&mut self, pcid: u16) {
        self.direct_context_gone(Some(pcid));
        self.tlb.forget(pcid);
    }

    /// Reads MMIO in units of up to 8 bytes.
    pub(crate) fn mmio_read(&mut self, physical: u64, to: &mut [u8]) {
        let mut at = physical;
        for piece in to.chunks_mut(8) {
            let size = piece.len() as u8;
            if size.is_power_of_two() {
                let value = self.mmio_load(at, size);
                piece.copy_from_slice(&value.to_le_bytes()[..usize::from(size)]);
            } else {
                for (i, b) in piece.iter_mut().enumerate() {
                    *b = self.mmio_load(at + i as u64, 1) as u8;
                }
            }
            at += u64::from(size);
        }
    }

    /// Writes MMIO in units of up to 8 bytes.
    pub(crate) fn mmio_write(&mut self, physical: u64, from: &[u8]) {
        let mut at = physical;
        for piece in from.chunks(8) {
            let size = piece.len() as u8;
            if size.is_power_of_two() {
                let mut value = [0; 8];
                value[..piece.len()].copy_from_slice(piece);
                self.mmio_store(at, size, u64::from_le_bytes(value));
            } else {
                for (i, b) in piece.iter().enumerate() {
                    self.mmio_store(at + i as u64, 1, u64::from(*b));
                }
            }
            at += u64::from(size);
        }
    }

    fn mmio_load(&mut self, at: u64, size: u8) -> u64 {
        self.stats.mmio_accesses.add(1);
        let value = match self.apic.mmio_offset(at) {
            Some(offset) => u64::from(self.apic.read(&self.bus, offset)),
            None => self.bus.mmio.read(at, size),
        };
        self.trace_exit(|| Exit { port: false, address: at, size, write: false, value });
        value
    }

    fn mmio_store(&mut self, at: u64, size: u8, value: u64) {
        self.stats.mmio_accesses.add(1);
        match self.apic.mmio_offset(at) {
            Some(offset) => {
                self.apic.write(&self.bus, offset, value as u32);
                if self.apic.wants_attention() {
                    // An interrupt to itself comes before the next instruction.
                    self.op_end = std::ptr::null();
                }
            }
            None => self.bus.mmio.write(at, size, value),
        }
        self.trace_exit(|| Exit { port: false, address: at, size, write: true, value });
    }
}
