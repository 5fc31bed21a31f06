//! Decimal adjustments and other instructions of the first processors (Intel SDM vol. 2). None exists in
//! 64-bit mode.

use iced_x86::{Instruction, Mnemonic};

use super::operand::{is_mem, reg, width};
use super::width::Int;
use crate::cpu::Cpu;
use crate::fault::{Exec, Fault, vector};
use crate::op::{Handler, Op};

const CF: u8 = 0x01;
const AF: u8 = 0x10;
const ZF: u8 = 0x40;

pub(super) fn handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Daa => daa,
        Mnemonic::Das => das,
        Mnemonic::Aaa => aaa,
        Mnemonic::Aas => aas,
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        Mnemonic::Salc => salc,
        Mnemonic::Bound => {
            op.reg = reg(insn, 0);
            if width(insn, 0) == 2 { bound::<u16> } else { bound::<u32> }
        }
        Mnemonic::Arpl => {
            op.rm = reg(insn, 1);
            if is_mem(insn, 0) {
                return Some(arpl_memory);
            }
            op.reg = reg(insn, 0);
            arpl_register
        }
        _ => return None,
    })
}

fn al(cpu: &Cpu) -> u8 {
    cpu.gpr[0] as u8
}

fn set_ax(cpu: &mut Cpu, al: u8, ah: u8) {
    cpu.gpr[0] = cpu.gpr[0] & !0xffff | u64::from(ah) << 8 | u64::from(al);
}

fn set_al(cpu: &mut Cpu, al: u8) {
    cpu.gpr[0] = cpu.gpr[0] & !0xff | u64::from(al);
}

/// SF, ZF and PF of a result, with the carries given; OF (undefined here) is cleared.
fn result_flags(cpu: &mut Cpu, value: u8, carries: u8) {
    let (_, flags) = u8::and(0, value, value);
    cpu.set_flags(flags & 0xc400 | u16::from(carries) << 8);
}

fn daa(cpu: &mut Cpu, _: &Op) -> Exec {
    let (old, carry) = (al(cpu), cpu.ah & CF);
    let (mut value, mut carries) = (old, 0);
    if old & 15 > 9 || cpu.ah & AF != 0 {
        value = value.wrapping_add(6);
        carries |= AF;
    }
    if old > 0x99 || carry != 0 {
        value = value.wrapping_add(0x60);
        carries |= CF;
    }
    set_al(cpu, value);
    result_flags(cpu, value, carries);
    Ok(())
}

fn das(cpu: &mut Cpu, _: &Op) -> Exec {
    let (old, carry) = (al(cpu), cpu.ah & CF);
    let (mut value, mut carries) = (old, 0);
    if old & 15 > 9 || cpu.ah & AF != 0 {
        carries |= AF | if old < 6 { CF } else { carry };
        value = value.wrapping_sub(6);
    }
    if old > 0x99 || carry != 0 {
        value = value.wrapping_sub(0x60);
        carries |= CF;
    }
    set_al(cpu, value);
    result_flags(cpu, value, carries);
    Ok(())
}

fn aaa(cpu: &mut Cpu, _: &Op) -> Exec {
    let adjust = al(cpu) & 15 > 9 || cpu.ah & AF != 0;
    let ax = (cpu.gpr[0] as u16).wrapping_add(if adjust { 0x106 } else { 0 });
    set_ax(cpu, ax as u8 & 15, (ax >> 8) as u8);
    result_flags(cpu, ax as u8 & 15, if adjust { AF | CF } else { 0 });
    Ok(())
}

fn aas(cpu: &mut Cpu, _: &Op) -> Exec {
    let adjust = al(cpu) & 15 > 9 || cpu.ah & AF != 0;
    let ax = (cpu.gpr[0] as u16).wrapping_sub(if adjust { 0x106 } else { 0 });
    set_ax(cpu, ax as u8 & 15, (ax >> 8) as u8);
    result_flags(cpu, ax as u8 & 15, if adjust { AF | CF } else { 0 });
    Ok(())
}

fn aam(cpu: &mut Cpu, op: &Op) -> Exec {
    let (value, base) = (al(cpu), op.imm as u8);
    let (Some(high), Some(low)) = (value.checked_div(base), value.checked_rem(base)) else {
        return Err(Fault::DE);
    };
    set_ax(cpu, low, high);
    result_flags(cpu, low, 0);
    Ok(())
}

fn aad(cpu: &mut Cpu, op: &Op) -> Exec {
    let high = (cpu.gpr[0] >> 8) as u8;
    let value = al(cpu).wrapping_add(high.wrapping_mul(op.imm as u8));
    set_ax(cpu, value, 0);
    result_flags(cpu, value, 0);
    Ok(())
}

/// AL from CF; not in Intel's manuals, but in all their processors.
fn salc(cpu: &mut Cpu, _: &Op) -> Exec {
    let value = if cpu.carry() { 0xff } else { 0 };
    set_al(cpu, value);
    Ok(())
}

fn bound<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = cpu.operand_address(op, 2 * W::SIZE, false)?;
    let low = cpu.load_in::<W>(at, op.segment)?;
    let high = cpu.load_in::<W>(at.wrapping_add(W::SIZE), op.segment)?;
    let index = W::get(cpu, op.reg).signed();
    if index < low.signed() || index > high.signed() {
        return Err(Fault::new(vector::BR));
    }
    Ok(())
}

/// The selector with the greater RPL of both, and whether that changed it.
fn adjusted(selector: u16, other: u16) -> (u16, bool) {
    let raise = selector & 3 < other & 3;
    (if raise { selector & !3 | other & 3 } else { selector }, raise)
}

fn set_zero(cpu: &mut Cpu, on: bool) {
    cpu.ah = cpu.ah & !ZF | if on { ZF } else { 0 };
}

fn arpl_register(cpu: &mut Cpu, op: &Op) -> Exec {
    if !cpu.protected() {
        return Err(Fault::UD);
    }
    let (value, changed) = adjusted(u16::get(cpu, op.reg), u16::get(cpu, op.rm));
    value.set(cpu, op.reg);
    set_zero(cpu, changed);
    Ok(())
}

fn arpl_memory(cpu: &mut Cpu, op: &Op) -> Exec {
    if !cpu.protected() {
        return Err(Fault::UD);
    }
    let (other, mut changed) = (u16::get(cpu, op.rm), false);
    cpu.modify_operand(op, |selector| {
        let (value, c) = adjusted(selector, other);
        changed = c;
        value
    })?;
    set_zero(cpu, changed);
    Ok(())
}
