//! Two-operand and one-operand arithmetic and logic, shifts and rotates.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::operand::{Imm, Mem, Reg, Source, is_mem, is_reg, reg, sized, width, worded};
use super::width::{Flags, Int, Word};
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op};

/// A two-operand instruction.
trait Binary {
    /// Whether the result is kept.
    const WRITES: bool = true;
    fn run<W: Int>(flags: Flags, a: W, b: W) -> (W, Flags);
}

/// A one-operand instruction.
trait Unary {
    fn run<W: Int>(flags: Flags, a: W) -> (W, Flags);
}

/// A shift or rotate.
trait Shift {
    fn run<W: Int>(flags: Flags, a: W, count: u8) -> (W, Flags);
}

/// A double shift.
trait DoubleShift {
    fn run<W: Word>(flags: Flags, a: W, b: W, count: u8) -> (W, Flags);
}

macro_rules! binary_operations {
    ($($name:ident $f:ident $writes:literal;)*) => { $(
        struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;

            #[inline(always)]
            fn run<W: Int>(flags: Flags, a: W, b: W) -> (W, Flags) {
                W::$f(flags, a, b)
            }
        }
    )* };
}
binary_operations! {
    Add add true; Or or true; Adc adc true; Sbb sbb true; And and true; Sub sub true; Xor xor true;
    Cmp sub false; Test and false;
}

macro_rules! unary_operations {
    ($($name:ident $f:ident)*) => { $(
        struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn run<W: Int>(flags: Flags, a: W) -> (W, Flags) {
                W::$f(flags, a)
            }
        }
    )* };
}
unary_operations! { Inc inc Dec dec Neg neg }

macro_rules! shifts {
    ($($name:ident $f:ident)*) => { $(
        struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn run<W: Int>(flags: Flags, a: W, count: u8) -> (W, Flags) {
                W::$f(flags, a, count)
            }
        }
    )* };
}
shifts! { Shl shl Shr shr Sar sar Rol rol Ror ror Rcl rcl Rcr rcr }

macro_rules! double_shifts {
    ($($name:ident $f:ident)*) => { $(
        struct $name;
        impl DoubleShift for $name {
            #[inline(always)]
            fn run<W: Word>(flags: Flags, a: W, b: W, count: u8) -> (W, Flags) {
                W::$f(flags, a, b, count)
            }
        }
    )* };
}
double_shifts! { Shld shld Shrd shrd }

struct Not;
impl Unary for Not {
    #[inline(always)]
    fn run<W: Int>(flags: Flags, a: W) -> (W, Flags) {
        (W::cut(!a.wide()), flags)
    }
}

pub(super) fn handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Add => binary::<Add>(insn, op),
        Mnemonic::Or => binary::<Or>(insn, op),
        Mnemonic::Adc => binary::<Adc>(insn, op),
        Mnemonic::Sbb => binary::<Sbb>(insn, op),
        Mnemonic::And => binary::<And>(insn, op),
        Mnemonic::Sub => binary::<Sub>(insn, op),
        Mnemonic::Xor => binary::<Xor>(insn, op),
        Mnemonic::Cmp => binary::<Cmp>(insn, op),
        Mnemonic::Test => binary::<Test>(insn, op),
        Mnemonic::Inc => unary::<Inc>(insn, op),
        Mnemonic::Dec => unary::<Dec>(insn, op),
        Mnemonic::Neg => unary::<Neg>(insn, op),
        Mnemonic::Not => unary::<Not>(insn, op),
        Mnemonic::Shl | Mnemonic::Sal => shift::<Shl>(insn, op),
        Mnemonic::Shr => shift::<Shr>(insn, op),
        Mnemonic::Sar => shift::<Sar>(insn, op),
        Mnemonic::Rol => shift::<Rol>(insn, op),
        Mnemonic::Ror => shift::<Ror>(insn, op),
        Mnemonic::Rcl => shift::<Rcl>(insn, op),
        Mnemonic::Rcr => shift::<Rcr>(insn, op),
        Mnemonic::Shld => double_shift::<Shld>(insn, op),
        Mnemonic::Shrd => double_shift::<Shrd>(insn, op),
        _ => return None,
    })
}

fn binary<O: Binary>(insn: &Instruction, op: &mut Op) -> Handler {
    let w = width(insn, 0);
    if is_mem(insn, 0) {
        let from_register = is_reg(insn, 1);
        if from_register {
            op.rm = reg(insn, 1);
        }
        return match (O::WRITES, insn.has_lock_prefix(), from_register) {
            (false, _, true) => sized!(w, compare_memory, O, Reg),
            (false, _, false) => sized!(w, compare_memory, O, Imm),
            (true, true, true) => sized!(w, locked, O, Reg),
            (true, true, false) => sized!(w, locked, O, Imm),
            (true, false, true) => sized!(w, to_memory, O, Reg),
            (true, false, false) => sized!(w, to_memory, O, Imm),
        };
    }
    op.reg = reg(insn, 0);
    match insn.op_kind(1) {
        OpKind::Register => {
            op.rm = reg(insn, 1);
            sized!(w, to_register, O, Reg)
        }
        OpKind::Memory => sized!(w, to_register, O, Mem),
        _ => sized!(w, to_register, O, Imm),
    }
}

fn to_register<O: Binary, S: Source, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read::<W>(cpu, op)?;
    let (result, flags) = O::run(cpu.flags(), W::get(cpu, op.reg), b);
    if O::WRITES {
        result.set(cpu, op.reg);
    }
    cpu.set_flags(flags);
    Ok(())
}

fn compare_memory<O: Binary, S: Source, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.load_operand::<W>(op)?;
    let b = S::read(cpu, op)?;
    let (_, flags) = O::run(cpu.flags(), a, b);
    cpu.set_flags(flags);
    Ok(())
}

fn to_memory<O: Binary, S: Source, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read::<W>(cpu, op)?;
    let mut flags = cpu.flags();
    cpu.modify_operand(op, |a| {
        let (result, f) = O::run(flags, a, b);
        flags = f;
        result
    })?;
    cpu.set_flags(flags);
    Ok(())
}

fn locked<O: Binary, S: Source, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read::<W>(cpu, op)?;
    let (old, mut flags) = (cpu.flags(), 0);
    cpu.modify_locked(op, |a| {
        let (result, f) = O::run(old, a, b);
        flags = f;
        result
    })?;
    cpu.set_flags(flags);
    Ok(())
}

fn unary<O: Unary>(insn: &Instruction, op: &mut Op) -> Handler {
    let w = width(insn, 0);
    if is_mem(insn, 0) {
        return if insn.has_lock_prefix() { sized!(w, unary_locked, O) } else { sized!(w, unary_memory, O) };
    }
    op.reg = reg(insn, 0);
    sized!(w, unary_register, O)
}

fn unary_register<O: Unary, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (result, flags) = O::run(cpu.flags(), W::get(cpu, op.reg));
    result.set(cpu, op.reg);
    cpu.set_flags(flags);
    Ok(())
}

fn unary_memory<O: Unary, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mut flags = cpu.flags();
    cpu.modify_operand::<W>(op, |a| {
        let (result, f) = O::run(flags, a);
        flags = f;
        result
    })?;
    cpu.set_flags(flags);
    Ok(())
}

fn unary_locked<O: Unary, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (old, mut flags) = (cpu.flags(), 0);
    cpu.modify_locked::<W>(op, |a| {
        let (result, f) = O::run(old, a);
        flags = f;
        result
    })?;
    cpu.set_flags(flags);
    Ok(())
}

/// Where a shift's count comes from.
trait Count {
    fn count(cpu: &Cpu, op: &Op) -> u8;
}

impl Count for Imm {
    #[inline(always)]
    fn count(_: &Cpu, op: &Op) -> u8 {
        op.imm as u8
    }
}

/// The count is in CL.
struct Cl;
impl Count for Cl {
    #[inline(always)]
    fn count(cpu: &Cpu, _: &Op) -> u8 {
        cpu.gpr[1] as u8
    }
}

/// Whether the count (operand `n`) is CL.
fn by_cl(insn: &Instruction, n: u32) -> bool {
    insn.op_kind(n) == OpKind::Register && insn.op_register(n) == Register::CL
}

fn shift<O: Shift>(insn: &Instruction, op: &mut Op) -> Handler {
    let w = width(insn, 0);
    if is_mem(insn, 0) {
        return if by_cl(insn, 1) { sized!(w, shift_memory, O, Cl) } else { sized!(w, shift_memory, O, Imm) };
    }
    op.reg = reg(insn, 0);
    if by_cl(insn, 1) { sized!(w, shift_register, O, Cl) } else { sized!(w, shift_register, O, Imm) }
}

fn shift_register<O: Shift, C: Count, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (result, flags) = O::run(cpu.flags(), W::get(cpu, op.reg), C::count(cpu, op));
    result.set(cpu, op.reg);
    cpu.set_flags(flags);
    Ok(())
}

fn shift_memory<O: Shift, C: Count, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (mut flags, count) = (cpu.flags(), C::count(cpu, op));
    cpu.modify_operand::<W>(op, |a| {
        let (result, f) = O::run(flags, a, count);
        flags = f;
        result
    })?;
    cpu.set_flags(flags);
    Ok(())
}

fn double_shift<O: DoubleShift>(insn: &Instruction, op: &mut Op) -> Handler {
    let w = width(insn, 0);
    op.rm = reg(insn, 1);
    let cl = by_cl(insn, 2);
    if is_mem(insn, 0) {
        return if cl { worded!(w, double_memory, O, Cl) } else { worded!(w, double_memory, O, Imm) };
    }
    op.reg = reg(insn, 0);
    if cl { worded!(w, double_register, O, Cl) } else { worded!(w, double_register, O, Imm) }
}

fn double_register<O: DoubleShift, C: Count, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (W::get(cpu, op.reg), W::get(cpu, op.rm));
    let (result, flags) = O::run(cpu.flags(), a, b, C::count(cpu, op));
    result.set(cpu, op.reg);
    cpu.set_flags(flags);
    Ok(())
}

fn double_memory<O: DoubleShift, C: Count, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (mut flags, count, b) = (cpu.flags(), C::count(cpu, op), W::get(cpu, op.rm));
    cpu.modify_operand::<W>(op, |a| {
        let (result, f) = O::run(flags, a, b, count);
        flags = f;
        result
    })?;
    cpu.set_flags(flags);
    Ok(())
}
