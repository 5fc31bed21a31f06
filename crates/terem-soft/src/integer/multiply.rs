//! Multiplication and division.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Imm, Mem, Reg, Source, is_mem, reg, width, worded};
use super::width::{Word, byte};
use crate::cpu::Cpu;
use crate::fault::{Exec, Fault};
use crate::op::{Handler, Op};

const AX: u8 = 0;
const DX: u8 = 2;

pub(super) fn handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let w = width(insn, 0);
    if insn.op_count() == 1 {
        let from_memory = is_mem(insn, 0);
        macro_rules! one {
            ($byte:ident, $wide:ident) => {
                match (w, from_memory) {
                    (1, true) => $byte::<Mem>,
                    (1, false) => $byte::<Reg>,
                    (_, true) => worded!(w, $wide, Mem),
                    (_, false) => worded!(w, $wide, Reg),
                }
            };
        }
        let run: Handler = match insn.mnemonic() {
            Mnemonic::Mul => one!(mul_byte, mul),
            Mnemonic::Imul => one!(imul_byte, imul),
            Mnemonic::Div => one!(div_byte, div),
            Mnemonic::Idiv => one!(idiv_byte, idiv),
            _ => return None,
        };
        if !from_memory {
            op.rm = reg(insn, 0);
        }
        return Some(run);
    }
    if insn.mnemonic() != Mnemonic::Imul {
        return None;
    }
    op.reg = reg(insn, 0);
    let from_memory = is_mem(insn, 1);
    if !from_memory {
        op.rm = reg(insn, 1);
    }
    let by_immediate = insn.op_count() == 3 && insn.op_kind(2) != OpKind::Register;
    Some(match (by_immediate, from_memory) {
        (true, true) => worded!(w, imul_immediate, Mem),
        (true, false) => worded!(w, imul_immediate, Reg),
        (false, true) => worded!(w, imul_register, Mem),
        (false, false) => worded!(w, imul_register, Reg),
    })
}

fn imul_register<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read::<W>(cpu, op)?;
    let (result, flags) = W::imul(cpu.flags(), W::get(cpu, op.reg), b);
    result.set(cpu, op.reg);
    cpu.set_flags(flags);
    Ok(())
}

fn imul_immediate<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = S::read::<W>(cpu, op)?;
    let b = Imm::read(cpu, op)?;
    let (result, flags) = W::imul(cpu.flags(), a, b);
    result.set(cpu, op.reg);
    cpu.set_flags(flags);
    Ok(())
}

fn mul<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read::<W>(cpu, op)?;
    let (low, high, flags) = W::mul_wide(cpu.flags(), W::get(cpu, AX), b);
    low.set(cpu, AX);
    high.set(cpu, DX);
    cpu.set_flags(flags);
    Ok(())
}

fn imul<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read::<W>(cpu, op)?;
    let (low, high, flags) = W::imul_wide(cpu.flags(), W::get(cpu, AX), b);
    low.set(cpu, AX);
    high.set(cpu, DX);
    cpu.set_flags(flags);
    Ok(())
}

fn div<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let by = S::read::<W>(cpu, op)?;
    let (low, high) = (W::get(cpu, AX), W::get(cpu, DX));
    // The quotient fits exactly if the upper half is below the divisor, which leaves out zero as well.
    if high >= by {
        return Err(Fault::DE);
    }
    // SAFETY: just checked.
    let (low, high, flags) = unsafe { W::div_wide(cpu.flags(), low, high, by) };
    low.set(cpu, AX);
    high.set(cpu, DX);
    cpu.set_flags(flags);
    Ok(())
}

fn idiv<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let by = S::read::<W>(cpu, op)?;
    let (low, high) = (W::get(cpu, AX), W::get(cpu, DX));
    let min = -1_i64 << (W::BITS - 1);
    // The usual dividend is a sign-extended one, which overflows in one case only.
    let fits = if high.signed() == low.signed() >> 63 {
        by.signed() != 0 && !(low.signed() == min && by.signed() == -1)
    } else {
        let dividend = i128::from(high.signed()) << W::BITS | i128::from(low.wide());
        let quotient = dividend.checked_div(i128::from(by.signed()));
        quotient.is_some_and(|q| (i128::from(min)..=-1 - i128::from(min)).contains(&q))
    };
    if !fits {
        return Err(Fault::DE);
    }
    // SAFETY: just checked.
    let (low, high, flags) = unsafe { W::idiv_wide(cpu.flags(), low, high, by) };
    low.set(cpu, AX);
    high.set(cpu, DX);
    cpu.set_flags(flags);
    Ok(())
}

fn set_ax(cpu: &mut Cpu, ax: u16) {
    cpu.gpr[0] = cpu.gpr[0] & !0xffff | u64::from(ax);
}

fn mul_byte<S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read(cpu, op)?;
    // SAFETY: a multiplication.
    let (ax, flags) = unsafe { byte::mul(cpu.flags(), cpu.gpr[0] as u16, b) };
    set_ax(cpu, ax);
    cpu.set_flags(flags);
    Ok(())
}

fn imul_byte<S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read(cpu, op)?;
    // SAFETY: a multiplication.
    let (ax, flags) = unsafe { byte::imul(cpu.flags(), cpu.gpr[0] as u16, b) };
    set_ax(cpu, ax);
    cpu.set_flags(flags);
    Ok(())
}

fn div_byte<S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (ax, by) = (cpu.gpr[0] as u16, S::read::<u8>(cpu, op)?);
    if ax >> 8 >= u16::from(by) {
        return Err(Fault::DE);
    }
    // SAFETY: just checked.
    let (ax, flags) = unsafe { byte::div(cpu.flags(), ax, by) };
    set_ax(cpu, ax);
    cpu.set_flags(flags);
    Ok(())
}

fn idiv_byte<S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (ax, by) = (cpu.gpr[0] as u16, S::read::<u8>(cpu, op)?);
    let quotient = i32::from(ax as i16).checked_div(i32::from(by as i8));
    if !quotient.is_some_and(|q| (-128..128).contains(&q)) {
        return Err(Fault::DE);
    }
    // SAFETY: just checked.
    let (ax, flags) = unsafe { byte::idiv(cpu.flags(), ax, by) };
    set_ax(cpu, ax);
    cpu.set_flags(flags);
    Ok(())
}
