//! Software interrupts, `iret`, far jumps, calls and returns, `syscall` and `sysenter`.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use terem_cpu::{Segment, VcpuState, rflags};

use crate::cpu::{Cpu, efer};
use crate::decode::{CodeSize, Mode};
use crate::fault::{Exec, Fault, Kind, vector};
use crate::op::{Handler, Op};

pub(super) fn handler(insn: &Instruction, mode: Mode, op: &mut Op) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Int => {
            op.imm = insn.immediate(0) & 0xff;
            int
        }
        Mnemonic::Int3 => int3,
        Mnemonic::Int1 => int1,
        Mnemonic::Into => into,
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => {
            op.extra = match insn.mnemonic() {
                Mnemonic::Iret => 2,
                Mnemonic::Iretd => 4,
                _ => 8,
            };
            iret
        }
        Mnemonic::Syscall => syscall,
        Mnemonic::Sysret | Mnemonic::Sysretq => {
            op.extra = u16::from(insn.mnemonic() == Mnemonic::Sysretq);
            sysret
        }
        Mnemonic::Sysenter => sysenter,
        Mnemonic::Sysexit | Mnemonic::Sysexitq => {
            op.extra = u16::from(insn.mnemonic() == Mnemonic::Sysexitq);
            sysexit
        }
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => undefined,
        Mnemonic::Retf => {
            op.extra = match insn.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            op.imm = if insn.op_count() > 0 { insn.immediate(0) & 0xffff } else { 0 };
            retf
        }
        Mnemonic::Jmp | Mnemonic::Call => return far(insn, mode, op),
        _ => return None,
    })
}

fn far(insn: &Instruction, mode: Mode, op: &mut Op) -> Option<Handler> {
    let call = insn.mnemonic() == Mnemonic::Call;
    match insn.op0_kind() {
        OpKind::FarBranch16 | OpKind::FarBranch32 if mode.code != CodeSize::Code64 => {
            let wide = insn.op0_kind() == OpKind::FarBranch32;
            op.imm = if wide { u64::from(insn.far_branch32()) } else { u64::from(insn.far_branch16()) };
            op.disp = u64::from(insn.far_branch_selector());
            op.extra = if wide { 4 } else { 2 };
            Some(if call { call_far_direct } else { jmp_far_direct })
        }
        OpKind::Memory => {
            op.extra = match insn.code() {
                Code::Jmp_m1616 | Code::Call_m1616 => 2,
                Code::Jmp_m1632 | Code::Call_m1632 => 4,
                Code::Jmp_m1664 | Code::Call_m1664 => 8,
                _ => return None,
            };
            Some(if call { call_far } else { jmp_far })
        }
        _ => None,
    }
}

fn undefined(_: &mut Cpu, _: &Op) -> Exec {
    Err(Fault::UD)
}

fn software(vector: u8) -> Exec {
    Err(Fault { kind: Kind::Software, vector, has_code: false, code: 0 })
}

fn int(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.virtual_8086() && cpu.software_interrupt_8086(op, op.imm as u8)? {
        return Ok(());
    }
    software(op.imm as u8)
}

fn int3(_: &mut Cpu, _: &Op) -> Exec {
    software(vector::BP)
}

fn int1(_: &mut Cpu, _: &Op) -> Exec {
    Err(Fault { kind: Kind::Trap, vector: vector::DB, has_code: false, code: 0 })
}

fn into(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.of != 0 { software(vector::OF) } else { Ok(()) }
}

fn iret(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.iret(op, u64::from(op.extra))
}

fn retf(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.far_return(op, u64::from(op.extra), op.imm)
}

fn jmp_far_direct(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.far_transfer(op, op.disp as u16, op.imm, u64::from(op.extra), false)
}

fn call_far_direct(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.far_transfer(op, op.disp as u16, op.imm, u64::from(op.extra), true)
}

fn far_pointer(cpu: &mut Cpu, op: &Op) -> Exec<(u16, u64)> {
    let size = u64::from(op.extra);
    let at = cpu.operand_address(op, size + 2, false)?;
    let offset = match size {
        2 => u64::from(cpu.load::<u16>(at)?),
        4 => u64::from(cpu.load::<u32>(at)?),
        _ => cpu.load::<u64>(at)?,
    };
    Ok((cpu.load(cpu.wrap(at.wrapping_add(size)))?, offset))
}

fn jmp_far(cpu: &mut Cpu, op: &Op) -> Exec {
    let (selector, offset) = far_pointer(cpu, op)?;
    cpu.far_transfer(op, selector, offset, u64::from(op.extra), false)
}

fn call_far(cpu: &mut Cpu, op: &Op) -> Exec {
    let (selector, offset) = far_pointer(cpu, op)?;
    cpu.far_transfer(op, selector, offset, u64::from(op.extra), true)
}

/// A flat segment of privilege `dpl`, as `syscall` and `sysenter` load without looking at memory.
fn flat(selector: u16, code: bool, long: bool, dpl: u8) -> Segment {
    let s = Segment::flat(selector, code, long);
    let access = if code { s.access } else { s.access & !Segment::LONG | Segment::BIG };
    Segment { access: access | u32::from(dpl) << 5, ..s }
}

fn syscall(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.msrs.efer & efer::SCE == 0 || !cpu.protected() || no_syscall(cpu) {
        return Err(Fault::UD);
    }
    let next = cpu.next_rip(op);
    let selector = (cpu.msrs.star >> 32) as u16;
    cpu.kernel_entries += 1;
    if cpu.long_mode() {
        let flags = cpu.rflags() & !rflags::RF;
        cpu.gpr[1] = next;
        cpu.gpr[11] = flags;
        cpu.rip = if cpu.code64() { cpu.msrs.lstar } else { cpu.msrs.cstar };
        let kept = flags & !cpu.msrs.sfmask;
        cpu.steps_over = flags & !kept & rflags::TF != 0;
        cpu.segments[VcpuState::CS] = flat(selector & !3, true, true, 0);
        cpu.segments[VcpuState::SS] = flat((selector & !3).wrapping_add(8), false, false, 0);
        cpu.cpl = 0;
        cpu.set_rflags(kept);
    } else {
        cpu.gpr[1] = next & 0xffff_ffff;
        cpu.rip = cpu.msrs.star & 0xffff_ffff;
        cpu.segments[VcpuState::CS] = flat(selector & !3, true, false, 0);
        cpu.segments[VcpuState::SS] = flat((selector & !3).wrapping_add(8), false, false, 0);
        cpu.cpl = 0;
        cpu.system_flags &= !(rflags::IF | rflags::VM | rflags::RF);
    }
    cpu.refresh_mode();
    Ok(())
}

fn sysret(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.msrs.efer & efer::SCE == 0 || !cpu.protected() || no_syscall(cpu) {
        return Err(Fault::UD);
    }
    cpu.privileged()?;
    let base = (cpu.msrs.star >> 48) as u16;
    let ss = base.wrapping_add(8) | 3;
    if cpu.long_mode() {
        let to64 = op.extra != 0;
        let target = cpu.gpr[1];
        if to64 && (target as i64) << 16 >> 16 != target as i64 {
            return Err(Fault::GP0);
        }
        let cs = if to64 { base.wrapping_add(16) | 3 } else { base | 3 };
        let flags = cpu.gpr[11] & 0x003c_7fd7;
        cpu.segments[VcpuState::CS] = flat(cs, true, to64, 3);
        cpu.segments[VcpuState::SS] = flat(ss, false, false, 3);
        cpu.cpl = 3;
        cpu.rip = if to64 { target } else { target & 0xffff_ffff };
        cpu.set_rflags(flags);
    } else {
        cpu.segments[VcpuState::CS] = flat(base | 3, true, false, 3);
        cpu.segments[VcpuState::SS] = flat(ss, false, false, 3);
        cpu.cpl = 3;
        cpu.rip = cpu.gpr[1] & 0xffff_ffff;
        cpu.system_flags |= rflags::IF;
    }
    cpu.refresh_mode();
    cpu.apic.accepts_more();
    Ok(())
}

/// Intel's processors have `syscall` and `sysret` in 64-bit mode only.
fn no_syscall(cpu: &Cpu) -> bool {
    !cpu.code64() && !cpu.cpuid.model().vendor.is_like_amd()
}

/// AMD's processors do not have `sysenter` and `sysexit` in long mode.
fn no_sysenter(cpu: &Cpu) -> bool {
    cpu.long_mode() && cpu.cpuid.model().vendor.is_like_amd()
}

fn sysenter(cpu: &mut Cpu, _: &Op) -> Exec {
    if no_sysenter(cpu) {
        return Err(Fault::UD);
    }
    let selector = cpu.msrs.sysenter_cs as u16 & !3;
    if !cpu.protected() && cpu.cr0 & 1 == 0 || selector == 0 {
        return Err(Fault::GP0);
    }
    let long = cpu.long_mode();
    cpu.system_flags &= !(rflags::IF | rflags::VM | rflags::RF);
    cpu.segments[VcpuState::CS] = flat(selector, true, long, 0);
    cpu.segments[VcpuState::SS] = flat(selector.wrapping_add(8), false, false, 0);
    cpu.cpl = 0;
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.gpr[4] = cpu.msrs.sysenter_esp & mask;
    cpu.rip = cpu.msrs.sysenter_eip & mask;
    cpu.refresh_mode();
    Ok(())
}

fn sysexit(cpu: &mut Cpu, op: &Op) -> Exec {
    if no_sysenter(cpu) {
        return Err(Fault::UD);
    }
    let selector = cpu.msrs.sysenter_cs as u16 & !3;
    if cpu.cr0 & 1 == 0 || selector == 0 || cpu.cpl != 0 {
        return Err(Fault::GP0);
    }
    let to64 = op.extra != 0;
    let canonical = |v: u64| (v as i64) << 16 >> 16 == v as i64;
    if to64 && !(canonical(cpu.gpr[1]) && canonical(cpu.gpr[2])) {
        return Err(Fault::GP0);
    }
    let (cs, ss) = if to64 { (32, 40) } else { (16, 24) };
    cpu.segments[VcpuState::CS] = flat(selector.wrapping_add(cs) | 3, true, to64, 3);
    cpu.segments[VcpuState::SS] = flat(selector.wrapping_add(ss) | 3, false, false, 3);
    cpu.cpl = 3;
    let mask = if to64 { u64::MAX } else { 0xffff_ffff };
    cpu.gpr[4] = cpu.gpr[1] & mask;
    cpu.rip = cpu.gpr[2] & mask;
    cpu.refresh_mode();
    Ok(())
}
