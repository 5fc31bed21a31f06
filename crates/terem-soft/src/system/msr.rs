//! Model-specific registers and the time-stamp counter.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::cpu::{Cpu, cr4, efer};
use crate::fault::{Exec, Fault};
use crate::op::{Handler, Op};

/// MSR numbers (Intel SDM vol. 4; AMD APM vol. 2, appendix A).
mod nr {
    pub(super) const TSC: u32 = 0x10;
    pub(super) const PLATFORM_ID: u32 = 0x17;
    pub(super) const APIC_BASE: u32 = 0x1b;
    pub(super) const TSC_ADJUST: u32 = 0x3b;
    pub(super) const BIOS_SIGN_ID: u32 = 0x8b;
    /// Can be read in system management mode only.
    pub(super) const SMBASE: u32 = 0x9e;
    pub(super) const MTRR_CAP: u32 = 0xfe;
    pub(super) const SYSENTER_CS: u32 = 0x174;
    pub(super) const SYSENTER_ESP: u32 = 0x175;
    pub(super) const SYSENTER_EIP: u32 = 0x176;
    pub(super) const MCG_CAP: u32 = 0x179;
    pub(super) const MCG_STATUS: u32 = 0x17a;
    pub(super) const MISC_ENABLE: u32 = 0x1a0;
    pub(super) const DEBUGCTL: u32 = 0x1d9;
    pub(super) const MTRR_PHYS_FIRST: u32 = 0x200;
    pub(super) const MTRR_PHYS_LAST: u32 = 0x20f;
    pub(super) const MTRR_FIX_64K: u32 = 0x250;
    pub(super) const MTRR_FIX_16K: u32 = 0x258;
    pub(super) const MTRR_FIX_16K_2: u32 = 0x259;
    pub(super) const MTRR_FIX_4K_FIRST: u32 = 0x268;
    pub(super) const MTRR_FIX_4K_LAST: u32 = 0x26f;
    pub(super) const PAT: u32 = 0x277;
    pub(super) const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub(super) const TSC_DEADLINE: u32 = 0x6e0;
    pub(super) const XSS: u32 = 0xda0;
    pub(super) const X2APIC_FIRST: u32 = 0x800;
    pub(super) const X2APIC_LAST: u32 = 0x83f;
    pub(super) const EFER: u32 = 0xc000_0080;
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const SFMASK: u32 = 0xc000_0084;
    pub(super) const FS_BASE: u32 = 0xc000_0100;
    pub(super) const GS_BASE: u32 = 0xc000_0101;
    pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub(super) const TSC_AUX: u32 = 0xc000_0103;
    /// AMD's SYSCFG, HWCR and others that its guests touch without asking.
    pub(super) const AMD_SYSCFG: u32 = 0xc001_0010;
    pub(super) const AMD_HWCR: u32 = 0xc001_0015;
    pub(super) const AMD_NB_CFG: u32 = 0xc001_001f;
    pub(super) const AMD_INT_PENDING: u32 = 0xc001_0055;
    pub(super) const AMD_PATCH_LEVEL: u32 = 0x0000_008b;
    pub(super) const AMD_OSVW_LENGTH: u32 = 0xc001_0140;
    pub(super) const AMD_LS_CFG: u32 = 0xc001_1020;
    pub(super) const AMD_DE_CFG: u32 = 0xc001_1029;
}

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Rdmsr => rdmsr,
        Mnemonic::Wrmsr => wrmsr,
        Mnemonic::Rdtsc => rdtsc,
        Mnemonic::Rdtscp => rdtscp,
        Mnemonic::Rdpid if insn.op0_kind() == OpKind::Register => rdpid,
        Mnemonic::Rdpmc => rdpmc,
        _ => return None,
    })
}

fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.gpr[0] = value & 0xffff_ffff;
    cpu.gpr[2] = value >> 32;
}

fn rdmsr(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.privileged()?;
    let number = cpu.gpr[1] as u32;
    let value = cpu.read_msr(number).ok_or_else(|| {
        tracing::debug!(number = format_args!("{number:#x}"), "read of an unknown MSR");
        Fault::GP0
    })?;
    set_edx_eax(cpu, value);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.privileged()?;
    let (number, value) = (cpu.gpr[1] as u32, cpu.gpr[2] << 32 | cpu.gpr[0] & 0xffff_ffff);
    if cpu.write_msr(number, value) {
        return Ok(());
    }
    tracing::debug!(number = format_args!("{number:#x}"), value, "write to an MSR refused");
    Err(Fault::GP0)
}

impl Cpu {
    /// The time-stamp counter: virtual time at 1 GHz, so it stands still with the machine and goes on at
    /// the same rate on another host.
    pub(crate) fn tsc(&self) -> u64 {
        self.bus.clock.now().wrapping_add(self.tsc_offset)
    }

    fn read_msr(&self, number: u32) -> Option<u64> {
        let m = &self.msrs;
        let segment = |i: usize| self.segments[i].base;
        Some(match number {
            nr::TSC => self.tsc(),
            nr::PLATFORM_ID | nr::BIOS_SIGN_ID | nr::MCG_STATUS => 0,
            nr::DEBUGCTL => m.debugctl,
            nr::SMBASE if self.smm.active => u64::from(self.smm.base),
            nr::MCG_CAP => 0, // no banks
            nr::APIC_BASE => self.apic.base_msr(),
            nr::TSC_ADJUST => m.tsc_adjust,
            nr::MTRR_CAP => 0x508, // 8 variable, fixed, write-combining
            nr::SYSENTER_CS => m.sysenter_cs,
            nr::SYSENTER_ESP => m.sysenter_esp,
            nr::SYSENTER_EIP => m.sysenter_eip,
            nr::MISC_ENABLE => m.misc_enable,
            nr::MTRR_PHYS_FIRST..=nr::MTRR_PHYS_LAST => {
                let (base, mask) = m.mtrr_variable[(number - nr::MTRR_PHYS_FIRST) as usize / 2];
                if number & 1 == 0 { base } else { mask }
            }
            nr::MTRR_FIX_64K => m.mtrr_fixed[0],
            nr::MTRR_FIX_16K | nr::MTRR_FIX_16K_2 => m.mtrr_fixed[(number - nr::MTRR_FIX_16K) as usize + 1],
            nr::MTRR_FIX_4K_FIRST..=nr::MTRR_FIX_4K_LAST => {
                m.mtrr_fixed[(number - nr::MTRR_FIX_4K_FIRST) as usize + 3]
            }
            nr::PAT => m.pat,
            nr::MTRR_DEF_TYPE => m.mtrr_def_type,
            nr::TSC_DEADLINE => self.apic.tsc_deadline(),
            nr::X2APIC_FIRST..=nr::X2APIC_LAST => {
                return self.apic.read_msr(&self.bus, (number - nr::X2APIC_FIRST) as usize);
            }
            // No component is the supervisor's.
            nr::XSS if self.cpuid.model().features.has("xsaves") => 0,
            nr::EFER => m.efer,
            nr::STAR => m.star,
            nr::LSTAR => m.lstar,
            nr::CSTAR => m.cstar,
            nr::SFMASK => m.sfmask,
            nr::FS_BASE => segment(4),
            nr::GS_BASE => segment(5),
            nr::KERNEL_GS_BASE => m.kernel_gs_base,
            nr::TSC_AUX => m.tsc_aux,
            nr::AMD_SYSCFG
            | nr::AMD_HWCR
            | nr::AMD_NB_CFG
            | nr::AMD_INT_PENDING
            | nr::AMD_OSVW_LENGTH
            | nr::AMD_LS_CFG
            | nr::AMD_DE_CFG => 0,
            _ => return None,
        })
    }

    fn write_msr(&mut self, number: u32, value: u64) -> bool {
        let canonical = (value as i64) << 16 >> 16 == value as i64;
        let m = &mut self.msrs;
        match number {
            nr::TSC => {
                let now = self.bus.clock.now();
                let delta = value.wrapping_sub(now.wrapping_add(self.tsc_offset));
                self.tsc_offset = self.tsc_offset.wrapping_add(delta);
                m.tsc_adjust = m.tsc_adjust.wrapping_add(delta);
            }
            nr::TSC_ADJUST => {
                self.tsc_offset = self.tsc_offset.wrapping_add(value.wrapping_sub(m.tsc_adjust));
                m.tsc_adjust = value;
            }
            nr::APIC_BASE => {
                let x2apic = self.cpuid.model().features.has("x2apic");
                return self.apic.set_base_msr(value, x2apic);
            }
            nr::SYSENTER_CS => m.sysenter_cs = value,
            nr::SYSENTER_ESP if canonical => m.sysenter_esp = value,
            nr::SYSENTER_EIP if canonical => m.sysenter_eip = value,
            nr::MISC_ENABLE => m.misc_enable = value,
            nr::MTRR_PHYS_FIRST..=nr::MTRR_PHYS_LAST => {
                let pair = &mut m.mtrr_variable[(number - nr::MTRR_PHYS_FIRST) as usize / 2];
                *(if number & 1 == 0 { &mut pair.0 } else { &mut pair.1 }) = value;
            }
            nr::MTRR_FIX_64K => m.mtrr_fixed[0] = value,
            nr::MTRR_FIX_16K | nr::MTRR_FIX_16K_2 => {
                m.mtrr_fixed[(number - nr::MTRR_FIX_16K) as usize + 1] = value;
            }
            nr::MTRR_FIX_4K_FIRST..=nr::MTRR_FIX_4K_LAST => {
                m.mtrr_fixed[(number - nr::MTRR_FIX_4K_FIRST) as usize + 3] = value;
            }
            nr::PAT => {
                // Types 0, 1, 4, 5, 6 and 7.
                if value.to_le_bytes().iter().any(|t| !matches!(t, 0 | 1 | 4..=7)) {
                    return false;
                }
                m.pat = value;
            }
            nr::MTRR_DEF_TYPE => m.mtrr_def_type = value & 0xcff,
            nr::TSC_DEADLINE => self.apic.set_tsc_deadline(&self.bus, value, self.tsc_offset),
            nr::X2APIC_FIRST..=nr::X2APIC_LAST => {
                return self.apic.write_msr(&self.bus, (number - nr::X2APIC_FIRST) as usize, value);
            }
            nr::XSS => return value == 0 && self.cpuid.model().features.has("xsaves"),
            nr::EFER => return self.write_efer(value),
            nr::STAR => m.star = value,
            nr::LSTAR if canonical => m.lstar = value,
            nr::CSTAR if canonical => m.cstar = value,
            nr::SFMASK => m.sfmask = value & 0xffff_ffff,
            nr::FS_BASE if canonical => self.set_segment_base(4, value),
            nr::GS_BASE if canonical => self.set_segment_base(5, value),
            nr::KERNEL_GS_BASE if canonical => m.kernel_gs_base = value,
            nr::TSC_AUX if value >> 32 == 0 => m.tsc_aux = value,
            nr::AMD_PATCH_LEVEL | nr::MCG_STATUS => {}
            // LBR, BTF and the PBi pins (AMD APM vol. 2, 13.1.1.6).
            nr::DEBUGCTL if value >> 6 == 0 => m.debugctl = value,
            nr::AMD_SYSCFG
            | nr::AMD_HWCR
            | nr::AMD_NB_CFG
            | nr::AMD_INT_PENDING
            | nr::AMD_LS_CFG
            | nr::AMD_DE_CFG => {}
            _ => return false,
        }
        true
    }

    /// The bits of EFER that the model has.
    pub(crate) fn known_efer(&self) -> u64 {
        let f = &self.cpuid.model().features;
        let mut known = efer::LMA;
        for (name, bit) in [("syscall", efer::SCE), ("lm", efer::LME), ("nx", efer::NXE)] {
            if f.has(name) {
                known |= bit;
            }
        }
        known
    }

    fn write_efer(&mut self, value: u64) -> bool {
        let known = self.known_efer();
        let paging = self.cr0 & crate::cpu::cr0::PG != 0;
        if value & !known != 0 || (paging && (value ^ self.msrs.efer) & efer::LME != 0) {
            return false;
        }
        let changed = self.msrs.efer ^ value;
        self.msrs.efer = value & !efer::LMA | self.msrs.efer & efer::LMA;
        if changed & efer::NXE != 0 {
            self.flush_tlb();
        }
        self.refresh_mode();
        true
    }

    /// Sets the base of FS or GS.
    pub(super) fn set_segment_base(&mut self, index: usize, value: u64) {
        self.segments[index].base = value;
        self.segment_base[index] = value;
    }

    fn tsc_allowed(&self) -> Exec {
        let off = self.cr4 & cr4::TSD != 0 && self.cpl != 0 && self.protected();
        if off { Err(Fault::GP0) } else { Ok(()) }
    }
}

fn rdtsc(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.tsc_allowed()?;
    let tsc = cpu.tsc();
    set_edx_eax(cpu, tsc);
    Ok(())
}

fn rdtscp(cpu: &mut Cpu, op: &Op) -> Exec {
    rdtsc(cpu, op)?;
    cpu.gpr[1] = cpu.msrs.tsc_aux & 0xffff_ffff;
    Ok(())
}

fn rdpid(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.gpr[usize::from(op.reg)] = cpu.msrs.tsc_aux & 0xffff_ffff;
    Ok(())
}

/// There are no performance counters: every index is out of range.
fn rdpmc(_: &mut Cpu, _: &Op) -> Exec {
    Err(Fault::GP0)
}
