//! Condition codes, and the instructions that depend on them: `jcc`, `setcc`, `cmovcc`.

use iced_x86::{ConditionCode, FlowControl, Instruction, OpKind};

use super::branch::go;
use super::operand::{Mem, Reg, Source, conditional, is_mem, reg, width};
use super::width::Int;
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, IP_REG, Op};

/// Whether condition `C` (0–15, as in the opcode) holds.
#[inline(always)]
fn holds<const C: u8>(cpu: &Cpu) -> bool {
    let ah = cpu.ah;
    let less = ah >> 7 != cpu.of;
    let yes = match C >> 1 {
        0 => cpu.of != 0,
        1 => ah & 0x01 != 0,
        2 => ah & 0x40 != 0,
        3 => ah & 0x41 != 0,
        4 => ah & 0x80 != 0,
        5 => ah & 0x04 != 0,
        6 => less,
        _ => less || ah & 0x40 != 0,
    };
    yes != (C & 1 != 0)
}

pub(super) fn handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    // iced's numbers begin with "none".
    let code = match insn.condition_code() {
        ConditionCode::None => return None,
        c => c as u8 - 1,
    };
    if insn.is_jcc_short_or_near() {
        return Some(match insn.op0_kind() {
            OpKind::NearBranch16 => conditional!(code, jump_16),
            OpKind::NearBranch32 => conditional!(code, jump_32),
            _ => conditional!(code, jump_64),
        });
    }
    // loope and loopne, and x87's fcmovcc have conditions too.
    if insn.flow_control() != FlowControl::Next
        || insn.op0_kind() == OpKind::Register && !insn.op0_register().is_gpr()
    {
        return None;
    }
    if insn.op_count() == 1 {
        if is_mem(insn, 0) {
            return Some(conditional!(code, set_memory));
        }
        op.reg = reg(insn, 0);
        return Some(conditional!(code, set_register));
    }
    op.reg = reg(insn, 0);
    let from_memory = is_mem(insn, 1);
    if !from_memory {
        op.rm = reg(insn, 1);
    }
    Some(match (width(insn, 0), from_memory) {
        (2, true) => conditional!(code, mov, Mem, u16),
        (2, false) => conditional!(code, mov, Reg, u16),
        (4, true) => conditional!(code, mov, Mem, u32),
        (4, false) => conditional!(code, mov, Reg, u32),
        (_, true) => conditional!(code, mov, Mem, u64),
        (_, false) => conditional!(code, mov, Reg, u64),
    })
}

fn jump_64<const C: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    if holds::<C>(cpu) {
        cpu.rip = cpu.gpr[usize::from(IP_REG)].wrapping_add(op.imm);
    }
    Ok(())
}

fn jump_32<const C: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    if holds::<C>(cpu) { go::<u32>(cpu, op) } else { Ok(()) }
}

fn jump_16<const C: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    if holds::<C>(cpu) { go::<u16>(cpu, op) } else { Ok(()) }
}

fn set_register<const C: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    u8::from(holds::<C>(cpu)).set(cpu, op.reg);
    Ok(())
}

fn set_memory<const C: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.store_operand(op, u8::from(holds::<C>(cpu)))
}

/// The source is read, and a 32-bit destination's upper half cleared, whether or not the condition holds.
fn mov<const C: u8, S: Source, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let source = S::read::<W>(cpu, op)?;
    let value = if holds::<C>(cpu) { source } else { W::get(cpu, op.reg) };
    value.set(cpu, op.reg);
    Ok(())
}
