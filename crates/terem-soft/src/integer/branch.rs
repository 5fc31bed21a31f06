//! Near jumps, calls and returns, and loops.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::operand::{Mem, Reg, Source, is_mem, reg, width, worded};
use super::width::Int;
use crate::cpu::Cpu;
use crate::fault::{Exec, Fault};
use crate::op::{CHECKED, Handler, IP_REG, Op};

const CX: u8 = 1;

pub(super) fn handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let target = match insn.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => 0,
    };
    macro_rules! looping {
        ($f:ident) => {
            match counter_width(insn) {
                2 => worded!(target, $f, u16),
                4 => worded!(target, $f, u32),
                _ => worded!(target, $f, u64),
            }
        };
    }
    Some(match insn.mnemonic() {
        Mnemonic::Jmp | Mnemonic::Call => {
            let call = insn.mnemonic() == Mnemonic::Call;
            if insn.is_jmp_far()
                || insn.is_call_far()
                || insn.is_jmp_far_indirect()
                || insn.is_call_far_indirect()
            {
                return None;
            }
            if target != 0 {
                return Some(if call {
                    worded!(target, call_relative)
                } else {
                    worded!(target, jump_relative)
                });
            }
            let w = width(insn, 0);
            let from_memory = is_mem(insn, 0);
            if !from_memory {
                op.rm = reg(insn, 0);
            }
            match (call, from_memory) {
                (true, true) => worded!(w, call_to, Mem),
                (true, false) => worded!(w, call_to, Reg),
                (false, true) => worded!(w, jump_to, Mem),
                (false, false) => worded!(w, jump_to, Reg),
            }
        }
        Mnemonic::Ret => match insn.code() {
            Code::Retnw | Code::Retnw_imm16 => ret::<u16>,
            Code::Retnd | Code::Retnd_imm16 => ret::<u32>,
            _ => ret::<u64>,
        },
        Mnemonic::Loop => looping!(looped),
        Mnemonic::Loope => looping!(loope),
        Mnemonic::Loopne => looping!(loopne),
        Mnemonic::Jcxz => worded!(target, jump_if_zero, u16),
        Mnemonic::Jecxz => worded!(target, jump_if_zero, u32),
        Mnemonic::Jrcxz => worded!(target, jump_if_zero, u64),
        _ => return None,
    })
}

/// The counter of `loop` is as wide as addresses are.
fn counter_width(insn: &Instruction) -> usize {
    match insn.code() {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 2,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX => 8,
        _ => 4,
    }
}

/// The relative target, cut to the operand size.
#[inline(always)]
fn relative<T: Int>(cpu: &Cpu, op: &Op) -> Exec<u64> {
    check_limit::<T>(cpu, op, T::cut(cpu.gpr[usize::from(IP_REG)].wrapping_add(op.imm)).wide())
}

/// `#GP(0)` where a target is beyond the code segment's limit (outside 64-bit mode).
#[inline(always)]
fn check_limit<T: Int>(cpu: &Cpu, op: &Op, target: u64) -> Exec<u64> {
    let limit = u64::from(cpu.segments[terem_cpu::VcpuState::CS].limit);
    if T::BITS != 64 && op.flags & CHECKED != 0 && target > limit {
        return Err(Fault::GP0);
    }
    Ok(target)
}

/// Whether an absolute target can be.
#[inline(always)]
fn check_target<T: Int>(cpu: &Cpu, op: &Op, target: T) -> Exec<u64> {
    let target = target.wide();
    if T::BITS == 64 && (target as i64) << 16 >> 16 != target as i64 {
        return Err(Fault::GP0);
    }
    check_limit::<T>(cpu, op, target)
}

/// Jumps there.
#[inline(always)]
pub(super) fn go<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.rip = relative::<T>(cpu, op)?;
    Ok(())
}

fn jump_relative<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    go::<T>(cpu, op)
}

fn call_relative<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let target = relative::<T>(cpu, op)?;
    cpu.push(op, T::cut(cpu.next_rip(op)))?;
    cpu.rip = target;
    Ok(())
}

fn jump_to<S: Source, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let target = S::read::<T>(cpu, op)?;
    cpu.rip = check_target(cpu, op, target)?;
    Ok(())
}

fn call_to<S: Source, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let target = S::read::<T>(cpu, op)?;
    let target = check_target(cpu, op, target)?;
    cpu.push(op, T::cut(cpu.next_rip(op)))?;
    cpu.rip = target;
    Ok(())
}

fn ret<T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let target = cpu.peek::<T>(op, 0)?;
    let target = check_target(cpu, op, target)?;
    cpu.add_sp(op, T::SIZE + (op.imm & 0xffff));
    cpu.rip = target;
    Ok(())
}

/// What the counter will be.
fn counted<C: Int>(cpu: &Cpu) -> C {
    C::cut(C::get(cpu, CX).wide().wrapping_sub(1))
}

/// Goes to the target if the counter is not through and `wanted`; the counter changes if that does not fault.
#[inline(always)]
fn loop_while<C: Int, T: Int>(cpu: &mut Cpu, op: &Op, wanted: bool) -> Exec {
    let left = counted::<C>(cpu);
    if left != C::default() && wanted {
        go::<T>(cpu, op)?;
    }
    left.set(cpu, CX);
    Ok(())
}

fn looped<C: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    loop_while::<C, T>(cpu, op, true)
}

fn loope<C: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    loop_while::<C, T>(cpu, op, cpu.ah & 0x40 != 0)
}

fn loopne<C: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    loop_while::<C, T>(cpu, op, cpu.ah & 0x40 == 0)
}

fn jump_if_zero<C: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    if C::get(cpu, CX) == C::default() {
        go::<T>(cpu, op)?;
    }
    Ok(())
}
