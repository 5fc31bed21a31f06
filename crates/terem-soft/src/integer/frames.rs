//! Pushes, pops, flags on the stack, and stack frames.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Imm, Mem, Reg, Source, is_mem, is_reg, reg, worded};
use super::width::Int;
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op, STACK16, STACK32};

const BP: u8 = 5;
const SP: u8 = 4;

pub(super) fn handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    // What one push or pop moves.
    let unit = insn.stack_pointer_increment().unsigned_abs() as usize;
    Some(match insn.mnemonic() {
        Mnemonic::Push if is_mem(insn, 0) => worded!(unit, push, Mem),
        Mnemonic::Push if is_reg(insn, 0) => {
            op.rm = reg(insn, 0);
            worded!(unit, push, Reg)
        }
        Mnemonic::Push if insn.op0_kind() != OpKind::Register => worded!(unit, push, Imm),
        Mnemonic::Pop if is_mem(insn, 0) => worded!(unit, pop_memory),
        Mnemonic::Pop if is_reg(insn, 0) => {
            op.reg = reg(insn, 0);
            worded!(unit, pop_register)
        }
        Mnemonic::Pusha => push_all::<u16>,
        Mnemonic::Pushad => push_all::<u32>,
        Mnemonic::Popa => pop_all::<u16>,
        Mnemonic::Popad => pop_all::<u32>,
        Mnemonic::Pushf => push_flags::<u16>,
        Mnemonic::Pushfd => push_flags::<u32>,
        Mnemonic::Pushfq => push_flags::<u64>,
        Mnemonic::Popf => pop_flags::<u16>,
        Mnemonic::Popfd => pop_flags::<u32>,
        Mnemonic::Popfq => pop_flags::<u64>,
        Mnemonic::Enter => {
            op.imm = u64::from(insn.immediate16());
            op.extra = u16::from(insn.immediate8_2nd() & 31);
            worded!(enter_width(insn), enter)
        }
        Mnemonic::Leave => worded!(enter_width(insn), leave),
        _ => return None,
    })
}

/// The operand size of `enter` and `leave`.
fn enter_width(insn: &Instruction) -> usize {
    use iced_x86::Code;
    match insn.code() {
        Code::Enterw_imm16_imm8 | Code::Leavew => 2,
        Code::Enterd_imm16_imm8 | Code::Leaved => 4,
        _ => 8,
    }
}

fn push<S: Source, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = S::read::<W>(cpu, op)?;
    cpu.push(op, value)
}

fn pop_register<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    // The stack pointer moves first, so that `pop rsp` ends with what was popped.
    cpu.pop::<W>(op)?.set(cpu, op.reg);
    Ok(())
}

/// The destination's address is computed with the stack pointer after the pop (Intel SDM vol. 2, POP).
fn pop_memory<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let before = cpu.gpr[usize::from(SP)];
    let value = cpu.pop::<W>(op)?;
    let stored = cpu.store_operand(op, value);
    if stored.is_err() {
        cpu.gpr[usize::from(SP)] = before;
    }
    stored
}

fn push_all<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    // The whole frame must be writable before anything changes.
    let mut places = [0; 8];
    for (i, place) in places.iter_mut().enumerate() {
        let above = (W::SIZE * (i as u64 + 1)).wrapping_neg();
        *place = cpu.stack_linear(op, above, W::SIZE, true)?;
        cpu.atomic_address(*place, W::SIZE, terem_cpu::VcpuState::SS as u8)?;
    }
    for (register, place) in (0_u8..8).zip(places) {
        cpu.store_in(place, W::get(cpu, register), terem_cpu::VcpuState::SS as u8)?;
    }
    cpu.add_sp(op, (W::SIZE * 8).wrapping_neg());
    Ok(())
}

fn pop_all<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mut values = [W::default(); 8];
    for (i, value) in values.iter_mut().enumerate() {
        *value = cpu.peek(op, W::SIZE * i as u64)?;
    }
    cpu.add_sp(op, W::SIZE * 8);
    for (register, value) in (0_u8..8).rev().zip(values) {
        if register != SP {
            value.set(cpu, register);
        }
    }
    Ok(())
}

fn push_flags<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let flags = cpu.flags_to_push(W::SIZE)?;
    cpu.push(op, W::cut(flags))
}

fn pop_flags<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.peek::<W>(op, 0)?;
    cpu.flags_popped(value.wide(), W::SIZE)?;
    cpu.add_sp(op, W::SIZE);
    Ok(())
}

/// Sets BP, EBP or RBP as wide as the operand, but as the stack pointer is where that is narrower.
fn set_frame<W: Int>(cpu: &mut Cpu, value: u64) {
    W::cut(value).set(cpu, BP);
}

fn enter<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (size, level) = (op.imm, u64::from(op.extra));
    let before = cpu.gpr;
    let done = enter_unsafely::<W>(cpu, op, size, level);
    if done.is_err() {
        cpu.gpr = before;
    }
    done
}

/// [`enter`], leaving the registers half done on a fault.
fn enter_unsafely<W: Int>(cpu: &mut Cpu, op: &Op, size: u64, level: u64) -> Exec {
    cpu.push(op, W::get(cpu, BP))?;
    let frame = cpu.gpr[usize::from(SP)];
    for i in 1..level {
        let offset = cpu.frame_pointer(op).wrapping_sub(i * W::SIZE);
        let above = offset.wrapping_sub(cpu.gpr[usize::from(SP)]);
        let value = cpu.peek::<W>(op, above)?;
        cpu.push(op, value)?;
    }
    if level > 0 {
        cpu.push(op, W::cut(frame))?;
    }
    cpu.add_sp(op, size.wrapping_neg());
    // The last byte of the new frame must be writable (Intel SDM vol. 2, ENTER).
    let end = cpu.stack_linear(op, 0, W::SIZE, true)?;
    cpu.atomic_address(end, W::SIZE, terem_cpu::VcpuState::SS as u8)?;
    set_frame::<W>(cpu, frame);
    Ok(())
}

fn leave<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let above = cpu.frame_pointer(op).wrapping_sub(cpu.gpr[usize::from(SP)]);
    let value = cpu.peek::<W>(op, above)?;
    let frame = if op.flags & STACK16 != 0 {
        cpu.gpr[5] & 0xffff
    } else if op.flags & STACK32 != 0 {
        cpu.gpr[5] & 0xffff_ffff
    } else {
        cpu.gpr[5]
    };
    cpu.set_sp(op, frame.wrapping_add(W::SIZE));
    value.set(cpu, BP);
    Ok(())
}
