//! Control and debug registers, descriptor-table registers, flags, halting, caches and TLB.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use terem_cpu::{DescriptorTable, rflags, xstate};

use crate::cpu::{Cpu, cr0, cr4, efer};
use crate::decode::{CodeSize, Mode, gpr_number};
use crate::fault::{Exec, Fault};
use crate::op::{Handler, Op};
use crate::vm86::InterruptFlag;

/// CPUID leaf 0Dh, subleaf 1: XSAVEC and XSAVES, which have the compacted format.
const XSAVEC_OR_XSAVES: u32 = 1 << 1 | 1 << 3;

/// CR0 bits that exist.
const CR0_KNOWN: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

pub(super) fn handler(insn: &Instruction, mode: Mode, op: &mut Op) -> Option<Handler> {
    let long = mode.code == CodeSize::Code64;
    Some(match insn.mnemonic() {
        Mnemonic::Mov => return mov(insn, op),
        Mnemonic::Lgdt | Mnemonic::Lidt | Mnemonic::Sgdt | Mnemonic::Sidt => {
            let small = matches!(
                insn.code(),
                Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 | Code::Sgdt_m1632_16 | Code::Sidt_m1632_16
            );
            op.extra = u16::from(long) | u16::from(small) << 1;
            match insn.mnemonic() {
                Mnemonic::Lgdt => lgdt,
                Mnemonic::Lidt => lidt,
                Mnemonic::Sgdt => sgdt,
                _ => sidt,
            }
        }
        Mnemonic::Smsw => {
            op.extra = if insn.op0_kind() == OpKind::Memory { 0 } else { insn.op0_register().size() as u16 };
            smsw
        }
        Mnemonic::Lmsw => {
            op.extra = u16::from(insn.op0_kind() == OpKind::Memory);
            lmsw
        }
        Mnemonic::Clts => clts,
        Mnemonic::Invlpg => invlpg,
        Mnemonic::Invpcid => invpcid,
        Mnemonic::Wbinvd | Mnemonic::Invd | Mnemonic::Wbnoinvd => caches,
        Mnemonic::Hlt => hlt,
        Mnemonic::Cli => cli,
        Mnemonic::Sti => sti,
        Mnemonic::Stac => stac,
        Mnemonic::Clac => clac,
        Mnemonic::Cpuid => cpuid,
        Mnemonic::Xsetbv => xsetbv,
        Mnemonic::Rdpkru => rdpkru,
        Mnemonic::Wrpkru => wrpkru,
        _ => return None,
    })
}

fn mov(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    if insn.op_count() != 2 || insn.op0_kind() != OpKind::Register || insn.op1_kind() != OpKind::Register {
        return None;
    }
    let (to, from) = (insn.op0_register(), insn.op1_register());
    let special = |r: Register| r.is_cr() || r.is_dr();
    if special(to) {
        (op.reg, op.rm) = (to.number() as u8, gpr_number(from));
        op.extra = from.size() as u16;
        Some(if to.is_cr() { mov_to_cr } else { mov_to_dr })
    } else if special(from) {
        (op.reg, op.rm) = (from.number() as u8, gpr_number(to));
        op.extra = to.size() as u16;
        Some(if from.is_cr() { mov_from_cr } else { mov_from_dr })
    } else {
        None
    }
}

fn operand(cpu: &Cpu, op: &Op) -> u64 {
    let value = cpu.gpr[usize::from(op.rm)];
    if op.extra == 8 { value } else { value & 0xffff_ffff }
}

fn mov_from_cr(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.privileged()?;
    let value = match op.reg {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        8 => cpu.apic.cr8(),
        _ => return Err(Fault::UD),
    };
    cpu.set_gpr(op.rm, u64::from(op.extra), value);
    Ok(())
}

fn mov_to_cr(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.privileged()?;
    let value = operand(cpu, op);
    match op.reg {
        0 => cpu.set_cr0(value),
        2 => {
            cpu.cr2 = value;
            Ok(())
        }
        3 => cpu.set_cr3(value),
        4 => cpu.set_cr4(value),
        8 if value < 16 => {
            cpu.apic.set_cr8(value);
            Ok(())
        }
        8 => Err(Fault::GP0),
        _ => Err(Fault::UD),
    }
}

/// DR4 and DR5 are DR6 and DR7 unless CR4.DE says that they are not there.
fn debug_index(cpu: &Cpu, n: u8) -> Exec<usize> {
    match n {
        0..=3 => Ok(usize::from(n)),
        4 | 5 if cpu.cr4 & cr4::DE == 0 => Ok(usize::from(n)),
        6 | 7 => Ok(usize::from(n) - 2),
        _ => Err(Fault::UD),
    }
}

fn mov_from_dr(cpu: &mut Cpu, op: &Op) -> Exec {
    let index = debug_index(cpu, op.reg)?;
    cpu.privileged()?;
    cpu.debug_registers_guarded()?;
    cpu.set_gpr(op.rm, u64::from(op.extra), cpu.debug[index]);
    Ok(())
}

fn mov_to_dr(cpu: &mut Cpu, op: &Op) -> Exec {
    let index = debug_index(cpu, op.reg)?;
    cpu.privileged()?;
    cpu.debug_registers_guarded()?;
    let value = operand(cpu, op);
    cpu.debug[index] = match index {
        4 | 5 if value >> 32 != 0 => return Err(Fault::GP0),
        4 => value & 0xe00f | 0xffff_0ff0,
        5 => value & 0xffff_2fff | 0x400,
        _ => value,
    };
    cpu.refresh_watches();
    Ok(())
}

impl Cpu {
    pub(crate) fn set_cr0(&mut self, value: u64) -> Exec {
        let value = value | cr0::ET;
        let bad = value >> 32 != 0
            || (value & cr0::PG != 0 && value & cr0::PE == 0)
            || (value & cr0::NW != 0 && value & cr0::CD == 0)
            || (value & cr0::PG == 0 && self.cr4 & cr4::PCIDE != 0);
        if bad {
            return Err(Fault::GP0);
        }
        let value = value & CR0_KNOWN;
        let changed = self.cr0 ^ value;
        if changed & cr0::PG != 0 && self.msrs.efer & efer::LME != 0 {
            let on = value & cr0::PG != 0;
            let cs_long = self.segments[1].access & terem_cpu::Segment::LONG != 0;
            if if on { self.cr4 & cr4::PAE == 0 || cs_long } else { self.code64() } {
                return Err(Fault::GP0);
            }
            self.msrs.efer = if on { self.msrs.efer | efer::LMA } else { self.msrs.efer & !efer::LMA };
        }
        self.cr0 = value;
        if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.flush_tlb();
        }
        self.refresh_mode();
        Ok(())
    }

    pub(crate) fn set_cr3(&mut self, value: u64) -> Exec {
        let keep = self.cr4 & cr4::PCIDE != 0 && value >> 63 != 0;
        let value = if self.cr4 & cr4::PCIDE != 0 { value & !(1 << 63) } else { value };
        if self.long_mode()
            && value & 0x000f_ffff_ffff_ffff >> self.cpuid.phys_bits() << self.cpuid.phys_bits() != 0
        {
            return Err(Fault::GP0);
        }
        self.cr3 = value;
        self.switch_context(keep);
        Ok(())
    }

    /// The bits of CR4 that the model has.
    pub(crate) fn known_cr4(&self) -> u64 {
        let f = &self.cpuid.model().features;
        let mut known = cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::PCE;
        known |= cr4::OSFXSR | cr4::OSXMMEXCPT;
        let optional = [
            ("vme", cr4::VME | cr4::PVI),
            ("umip", cr4::UMIP),
            ("fsgsbase", cr4::FSGSBASE),
            ("pcid", cr4::PCIDE),
            ("xsave", cr4::OSXSAVE),
            ("smep", cr4::SMEP),
            ("smap", cr4::SMAP),
            ("pku", cr4::PKE),
        ];
        for (name, bit) in optional {
            if f.has(name) {
                known |= bit;
            }
        }
        known
    }

    pub(crate) fn set_cr4(&mut self, value: u64) -> Exec {
        let known = self.known_cr4();
        let changed = self.cr4 ^ value;
        let pcid_on = changed & value & cr4::PCIDE != 0;
        let bad = value & !known != 0
            || (self.long_mode() && value & cr4::PAE == 0)
            || (pcid_on && (!self.long_mode() || self.cr3 & 0xfff != 0));
        if bad {
            return Err(Fault::GP0);
        }
        self.cr4 = value;
        if changed & cr4::DE != 0 {
            self.refresh_watches();
        }
        if changed & (cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::PKE) != 0 {
            self.flush_tlb();
        }
        self.refresh_mode();
        Ok(())
    }
}

fn load_table(cpu: &mut Cpu, op: &Op) -> Exec<DescriptorTable> {
    cpu.privileged()?;
    let at = cpu.operand_address(op, if op.extra & 1 != 0 { 10 } else { 6 }, false)?;
    let limit: u16 = cpu.load(at)?;
    let base = if op.extra & 1 != 0 {
        cpu.load::<u64>(at.wrapping_add(2))?
    } else {
        let base = u64::from(cpu.load::<u32>(at.wrapping_add(2))?);
        if op.extra & 2 != 0 { base & 0xff_ffff } else { base }
    };
    if op.extra & 1 != 0 && (base as i64) << 16 >> 16 != base as i64 {
        return Err(Fault::GP0);
    }
    Ok(DescriptorTable { base, limit })
}

fn lgdt(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.gdtr = load_table(cpu, op)?;
    Ok(())
}

fn lidt(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.idtr = load_table(cpu, op)?;
    Ok(())
}

fn store_table(cpu: &mut Cpu, op: &Op, table: DescriptorTable) -> Exec {
    cpu.not_under_umip()?;
    let at = cpu.operand_address(op, if op.extra & 1 != 0 { 10 } else { 6 }, true)?;
    cpu.store(at, table.limit)?;
    if op.extra & 1 != 0 {
        cpu.store(at.wrapping_add(2), table.base)
    } else {
        cpu.store(at.wrapping_add(2), table.base as u32)
    }
}

fn sgdt(cpu: &mut Cpu, op: &Op) -> Exec {
    store_table(cpu, op, cpu.gdtr)
}

fn sidt(cpu: &mut Cpu, op: &Op) -> Exec {
    store_table(cpu, op, cpu.idtr)
}

fn smsw(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.not_under_umip()?;
    let value = cpu.cr0;
    if op.extra == 0 {
        return cpu.store_operand(op, value as u16);
    }
    cpu.set_gpr(op.reg, u64::from(op.extra), value);
    Ok(())
}

fn lmsw(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.privileged()?;
    let value =
        if op.extra != 0 { cpu.load_operand::<u16>(op)? } else { cpu.gpr[usize::from(op.reg)] as u16 };
    // PE can be set but not cleared.
    let keep = cpu.cr0 & !(cr0::MP | cr0::EM | cr0::TS);
    cpu.set_cr0(keep | u64::from(value) & 15)
}

fn clts(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.privileged()?;
    cpu.cr0 &= !cr0::TS;
    cpu.refresh_mode();
    Ok(())
}

fn invlpg(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.privileged()?;
    let at = cpu.segment_base[usize::from(op.segment)].wrapping_add(cpu.offset(op));
    cpu.invalidate_page(cpu.wrap(at));
    Ok(())
}

fn invpcid(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.privileged()?;
    let descriptor: u128 = cpu.load_operand(op)?;
    let (low, linear) = (descriptor as u64, (descriptor >> 64) as u64);
    if low >> 12 != 0 {
        return Err(Fault::GP0);
    }
    let pcid = low as u16;
    match cpu.gpr[usize::from(op.reg)] {
        0 if (linear as i64) << 16 >> 16 != linear as i64 => return Err(Fault::GP0),
        0 => {
            cpu.invalidate_page(linear);
            if pcid != cpu.pcid() {
                cpu.forget_context(pcid);
            }
        }
        1 if pcid == cpu.pcid() => cpu.switch_context(false),
        1 => cpu.forget_context(pcid),
        2 | 3 => cpu.flush_tlb(),
        _ => return Err(Fault::GP0),
    }
    Ok(())
}

fn caches(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.privileged()
}

fn hlt(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.privileged()?;
    cpu.halted = true;
    cpu.apic.look_again();
    Ok(())
}

fn cli(cpu: &mut Cpu, _: &Op) -> Exec {
    match cpu.interrupt_flag() {
        InterruptFlag::Real => cpu.system_flags &= !rflags::IF,
        InterruptFlag::Virtual => cpu.system_flags &= !rflags::VIF,
        InterruptFlag::Denied => return Err(Fault::GP0),
    }
    Ok(())
}

fn sti(cpu: &mut Cpu, _: &Op) -> Exec {
    match cpu.interrupt_flag() {
        InterruptFlag::Real if cpu.system_flags & rflags::IF == 0 => {
            cpu.system_flags |= rflags::IF;
            cpu.interrupt_shadow = true;
            cpu.shadow_of_stack = false;
            cpu.apic.accepts_more();
        }
        InterruptFlag::Real => {}
        InterruptFlag::Virtual if cpu.system_flags & rflags::VIP != 0 => return Err(Fault::GP0),
        InterruptFlag::Virtual => cpu.system_flags |= rflags::VIF,
        InterruptFlag::Denied => return Err(Fault::GP0),
    }
    Ok(())
}

fn stac(cpu: &mut Cpu, _: &Op) -> Exec {
    set_ac(cpu, rflags::AC)
}

fn clac(cpu: &mut Cpu, _: &Op) -> Exec {
    set_ac(cpu, 0)
}

fn set_ac(cpu: &mut Cpu, to: u64) -> Exec {
    if cpu.cpl != 0 {
        return Err(Fault::UD);
    }
    cpu.system_flags = cpu.system_flags & !rflags::AC | to;
    cpu.mode_changed();
    Ok(())
}

fn cpuid(cpu: &mut Cpu, _: &Op) -> Exec {
    let (leaf, subleaf) = (cpu.gpr[0] as u32, cpu.gpr[1] as u32);
    let [a, mut b, mut c, mut d] = cpu.cpuid.query(leaf, subleaf).registers;
    match leaf {
        1 => {
            if cpu.cr4 & cr4::OSXSAVE != 0 {
                c |= 1 << 27;
            }
            if cpu.apic.base_msr() & crate::apic::base::ENABLED == 0 {
                d &= !(1 << 9);
            }
        }
        7 if subleaf == 0 && cpu.cr4 & cr4::PKE != 0 => c |= 1 << 4, // OSPKE
        0xd if subleaf == 0 && b != 0 => b = xstate::standard_size(cpu.xcr0) as u32,
        0xd if subleaf == 1 && a & XSAVEC_OR_XSAVES != 0 => b = xstate::compacted_size(cpu.xcr0) as u32,
        _ => {}
    }
    for (register, value) in [(0, a), (3, b), (1, c), (2, d)] {
        cpu.gpr[register] = u64::from(value);
    }
    Ok(())
}

fn xsetbv(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    cpu.privileged()?;
    let value = cpu.gpr[2] << 32 | cpu.gpr[0] & 0xffff_ffff;
    let known = xstate::components(&cpu.cpuid.model().features);
    // x87 must be on, and SSE with AVX.
    let halves = value & (xstate::SSE | xstate::AVX) == xstate::AVX;
    if cpu.gpr[1] as u32 != 0 || value & xstate::X87 == 0 || value & !known != 0 || halves {
        return Err(Fault::GP0);
    }
    cpu.xcr0 = value;
    cpu.refresh_mode();
    Ok(())
}

/// What `rdpkru` and `wrpkru` ask for; and ECX must be 0.
fn keys_enabled(cpu: &Cpu) -> Exec {
    if cpu.cr4 & cr4::PKE == 0 {
        return Err(Fault::UD);
    }
    if cpu.gpr[1] as u32 == 0 { Ok(()) } else { Err(Fault::GP0) }
}

fn rdpkru(cpu: &mut Cpu, _: &Op) -> Exec {
    keys_enabled(cpu)?;
    cpu.gpr[0] = u64::from(cpu.pkru);
    cpu.gpr[2] = 0;
    Ok(())
}

fn wrpkru(cpu: &mut Cpu, _: &Op) -> Exec {
    keys_enabled(cpu)?;
    if cpu.gpr[2] as u32 != 0 {
        return Err(Fault::GP0);
    }
    cpu.set_pkru(cpu.gpr[0] as u32);
    Ok(())
}
