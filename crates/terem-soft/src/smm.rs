//! System management mode (Intel SDM vol. 3, chapter 31; AMD APM vol. 2, chapter 10): the SMI that firmware's handler
//! runs for, the state saved at SMBASE + FE00h, and `rsm`.
//!
//! ```text
//!   SMI ─ apic (latched) ─ run.rs between instructions ─ enter: state ─> SMRAM, CS:IP = SMBASE:8000h, real mode
//!                                                          rsm:  state <─ SMRAM
//! ```
//!
//! Models with long mode have AMD's 64-bit map (revision 64h), which QEMU has for all of them, and which OVMF and SeaBIOS
//! therefore know; the others have the 32-bit map. Both say that SMBASE can be relocated and that I/O instructions are not
//! started again. Memory is the same in this mode as outside it: what hides SMRAM is the chipset's part.

use terem_cpu::{DescriptorTable, Segment, SmmState, VcpuState, rflags};

use crate::cpu::{Cpu, cr0, cr4, efer};
use crate::fault::{Exec, Fault};
use crate::op::Op;

/// From SMBASE to the saved state, and its length.
const AREA: u64 = 0xfe00;
const AREA_LEN: usize = 0x200;
/// From SMBASE to the handler's first instruction, an offset in its CS.
const ENTRY: u64 = 0x8000;
/// Revision of the maps: bit 17, SMBASE can be relocated.
const REVISION_64: u64 = 1 << 17 | 0x64;
const REVISION_32: u64 = 1 << 17;
/// Bits of [`Segment::access`] that the maps have.
const ACCESS: u32 = 0xf0ff;

/// The saved state on its way out or back: each field is named once, for both directions.
struct Area {
    bytes: [u8; AREA_LEN],
    loads: bool,
}

impl Area {
    /// `size` bytes at `at`.
    fn field(&mut self, at: usize, size: usize, value: &mut u64) {
        let place = &mut self.bytes[at..at + size];
        if self.loads {
            let mut bytes = [0; 8];
            bytes[..size].copy_from_slice(place);
            *value = u64::from_le_bytes(bytes);
        } else {
            place.copy_from_slice(&value.to_le_bytes()[..size]);
        }
    }

    fn field_32(&mut self, at: usize, value: &mut u32) {
        let mut wide = u64::from(*value);
        self.field(at, 4, &mut wide);
        *value = wide as u32;
    }

    fn selector(&mut self, at: usize, segment: &mut Segment) {
        let mut wide = u64::from(segment.selector);
        self.field(at, 2, &mut wide);
        segment.selector = wide as u16;
    }

    /// Attributes, as descriptors have them. A segment that is not present is one that cannot be used.
    fn access(&mut self, at: usize, segment: &mut Segment) {
        let usable = segment.access & Segment::UNUSABLE == 0;
        let mut wide = u64::from(segment.access & ACCESS & if usable { !0 } else { !Segment::PRESENT });
        self.field(at, 2, &mut wide);
        let access = wide as u32 & ACCESS;
        segment.access = access | if access & Segment::PRESENT == 0 { Segment::UNUSABLE } else { 0 };
    }

    fn segment_64(&mut self, at: usize, segment: &mut Segment) {
        self.selector(at, segment);
        self.access(at + 2, segment);
        self.field_32(at + 4, &mut segment.limit);
        self.field(at + 8, 8, &mut segment.base);
    }

    /// Attributes, limit and base at `at`, the selector at `selector`.
    fn segment_32(&mut self, at: usize, selector: usize, segment: &mut Segment) {
        self.selector(selector, segment);
        self.access(at, segment);
        self.field_32(at + 4, &mut segment.limit);
        self.field(at + 8, 4, &mut segment.base);
    }

    fn table(&mut self, limit: usize, base: usize, size: usize, table: &mut DescriptorTable) {
        let mut wide = u64::from(table.limit);
        self.field(limit, 2, &mut wide);
        table.limit = wide as u16;
        self.field(base, size, &mut table.base);
    }
}

/// What the maps hold.
struct Saved {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    segments: [Segment; 6],
    ldtr: Segment,
    tr: Segment,
    gdtr: DescriptorTable,
    idtr: DescriptorTable,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    dr6: u64,
    dr7: u64,
    base: u32,
    /// The processor was halted, and is to be so again.
    halted: u64,
}

impl Saved {
    /// AMD APM vol. 2, table 10-1.
    fn map_64(&mut self, area: &mut Area) {
        for (i, segment) in self.segments.iter_mut().enumerate() {
            area.segment_64(i * 0x10, segment);
        }
        area.table(0x64, 0x68, 8, &mut self.gdtr);
        area.segment_64(0x70, &mut self.ldtr);
        area.table(0x84, 0x88, 8, &mut self.idtr);
        area.segment_64(0x90, &mut self.tr);
        area.field(0xc9, 1, &mut self.halted);
        area.field(0xd0, 8, &mut self.efer);
        area.field(0xfc, 4, &mut { REVISION_64 });
        area.field_32(0x100, &mut self.base);
        area.field(0x148, 8, &mut self.cr4);
        area.field(0x150, 8, &mut self.cr3);
        area.field(0x158, 8, &mut self.cr0);
        area.field(0x160, 8, &mut self.dr7);
        area.field(0x168, 8, &mut self.dr6);
        area.field(0x170, 8, &mut self.rflags);
        area.field(0x178, 8, &mut self.rip);
        for (i, register) in self.gpr.iter_mut().enumerate() {
            area.field(0x1f8 - 8 * i, 8, register);
        }
    }

    /// Intel SDM vol. 3, table 31-1; the fields that it leaves to each processor are where QEMU has them.
    fn map_32(&mut self, area: &mut Area) {
        area.field(0xfc, 4, &mut { REVISION_32 });
        area.field_32(0xf8, &mut self.base);
        area.field(0x102, 1, &mut self.halted);
        area.field(0x114, 4, &mut self.cr4);
        for (i, segment) in self.segments.iter_mut().enumerate() {
            let at = if i < 3 { 0x184 + 12 * i } else { 0x12c + 12 * (i - 3) };
            area.segment_32(at, 0x1a8 + 4 * i, segment);
        }
        area.table(0x154, 0x158, 4, &mut self.idtr);
        area.segment_32(0x15c, 0x1c4, &mut self.tr);
        area.table(0x170, 0x174, 4, &mut self.gdtr);
        area.segment_32(0x178, 0x1c0, &mut self.ldtr);
        area.field(0x1c8, 4, &mut self.dr7);
        area.field(0x1cc, 4, &mut self.dr6);
        for (i, register) in self.gpr[..8].iter_mut().enumerate() {
            area.field(0x1d0 + 4 * i, 4, register);
        }
        area.field(0x1f0, 4, &mut self.rip);
        area.field(0x1f4, 4, &mut self.rflags);
        area.field(0x1f8, 4, &mut self.cr3);
        area.field(0x1fc, 4, &mut self.cr0);
    }

    fn map(&mut self, area: &mut Area, long: bool) {
        if long { self.map_64(area) } else { self.map_32(area) }
    }

    /// Whether a processor can be in this state (Intel SDM vol. 3, 31.4.1.2 and 31.9).
    fn possible(&self, cpu: &Cpu) -> bool {
        let has = |bits: u64| self.cr0 & bits == bits;
        let paged = !has(cr0::PG) || has(cr0::PE);
        let cached = !has(cr0::NW) || has(cr0::CD);
        let long = self.efer & efer::LME != 0 && has(cr0::PG);
        let active = (self.efer & efer::LMA != 0) == long;
        let pae = !long || self.cr4 & cr4::PAE != 0;
        let pcid = long || self.cr4 & cr4::PCIDE == 0;
        let vm = !long || self.rflags & rflags::VM == 0;
        let known =
            self.cr0 >> 32 == 0 && self.cr4 & !cpu.known_cr4() == 0 && self.efer & !cpu.known_efer() == 0;
        paged && cached && active && pae && pcid && vm && known
    }
}

impl Cpu {
    /// Takes an SMI: saves the state and enters the handler.
    pub(crate) fn enter_smm(&mut self) {
        let base = self.smm.base;
        let mut saved = self.to_save();
        let mut area = Area { bytes: [0; AREA_LEN], loads: false };
        saved.map(&mut area, self.saves_long());
        self.smram(&mut area);
        self.smm.active = true;
        self.smm.inside_nmi = std::mem::replace(&mut self.nmi_masked, true);
        self.halted = false;
        self.cr0 &= !(cr0::PE | cr0::EM | cr0::TS | cr0::PG);
        (self.cr4, self.msrs.efer) = (0, 0);
        self.debug[5] = 0x400;
        // Real mode's segments, but for their limits.
        for (i, segment) in self.segments.iter_mut().enumerate() {
            let of_code = i == VcpuState::CS;
            *segment = Segment { limit: u32::MAX, ..Segment::real_mode(0, of_code) };
            segment.access |= Segment::PAGES;
            if of_code {
                (segment.selector, segment.base) = ((base >> 4) as u16, u64::from(base));
            }
        }
        self.cpl = 0;
        self.rip = ENTRY;
        self.set_rflags(rflags::FIXED);
        self.interrupt_shadow = false;
        self.steps_over = false;
        self.flush_tlb();
        self.refresh_watches();
        self.refresh_mode();
    }

    fn to_save(&self) -> Saved {
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&self.gpr[..16]);
        Saved {
            gpr,
            rip: self.rip,
            rflags: self.rflags(),
            segments: self.segments,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr0,
            cr3: self.cr3,
            cr4: self.cr4,
            efer: self.msrs.efer,
            dr6: self.debug[4],
            dr7: self.debug[5],
            base: self.smm.base,
            halted: u64::from(self.halted),
        }
    }

    fn saves_long(&self) -> bool {
        self.cpuid.model().features.has("lm")
    }

    /// Moves the saved state between `area` and memory. Where there is none, nothing is written and ones are read.
    fn smram(&self, area: &mut Area) {
        use terem_memory::vm_memory::{Bytes, GuestAddress};
        let at = GuestAddress(u64::from(self.smm.base) + AREA);
        let done = if area.loads {
            area.bytes.fill(0xff);
            self.memory.read_slice(&mut area.bytes, at)
        } else {
            self.memory.write_slice(&area.bytes, at)
        };
        if let Err(e) = done {
            tracing::debug!("SMRAM at {at:?}: {e}");
        }
    }

    /// Goes back to what was interrupted. A state that cannot be shuts the processor down.
    fn leave_smm(&mut self) {
        let mut saved = self.to_save();
        let mut area = Area { bytes: [0; AREA_LEN], loads: true };
        self.smram(&mut area);
        saved.map(&mut area, self.saves_long());
        if !saved.possible(self) {
            tracing::debug!("rsm to a state that cannot be");
            self.shut_down = true;
            return;
        }
        self.gpr[..16].copy_from_slice(&saved.gpr);
        self.rip = saved.rip;
        self.segments = saved.segments;
        (self.ldtr, self.tr, self.gdtr, self.idtr) = (saved.ldtr, saved.tr, saved.gdtr, saved.idtr);
        (self.cr0, self.cr3, self.cr4) = (saved.cr0 | cr0::ET, saved.cr3, saved.cr4);
        self.msrs.efer = saved.efer;
        (self.debug[4], self.debug[5]) = (saved.dr6 & 0xe00f | 0xffff_0ff0, saved.dr7 & 0xffff_2fff | 0x400);
        self.cpl = if self.cr0 & cr0::PE == 0 {
            0
        } else if saved.rflags & rflags::VM != 0 {
            3
        } else {
            self.segments[VcpuState::SS].dpl()
        };
        self.halted = saved.halted & 1 != 0;
        self.nmi_masked = self.smm.inside_nmi;
        self.smm = SmmState { active: false, inside_nmi: false, base: saved.base, ..self.smm };
        self.set_rflags(saved.rflags & 0xffff_ffff);
        self.flush_tlb();
        self.refresh_watches();
        self.refresh_mode();
    }
}

/// `rsm`.
pub(crate) fn rsm(cpu: &mut Cpu, _: &Op) -> Exec {
    if !cpu.smm.active {
        return Err(Fault::UD);
    }
    cpu.leave_smm();
    // To what waited meanwhile, or to sleep, or to the end.
    cpu.apic.look_again();
    Ok(())
}
