//! Moves and conversions.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Imm, Mem, Reg, Source, is_mem, is_reg, reg, sized, width, worded};
use super::width::{Int, Word};
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, NO_REG, Op};

pub(super) fn handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let w = width(insn, 0);
    Some(match insn.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti => return mov(insn, op),
        Mnemonic::Movzx => extend(insn, op, false),
        Mnemonic::Movsx | Mnemonic::Movsxd => extend(insn, op, true),
        Mnemonic::Lea => {
            op.reg = reg(insn, 0);
            worded!(w, lea)
        }
        Mnemonic::Bswap => {
            op.reg = reg(insn, 0);
            worded!(w, bswap)
        }
        Mnemonic::Movbe if is_mem(insn, 0) => {
            op.reg = reg(insn, 1);
            worded!(width(insn, 1), movbe_store)
        }
        Mnemonic::Movbe => {
            op.reg = reg(insn, 0);
            worded!(w, movbe_load)
        }
        Mnemonic::Xlatb => {
            // AL is added without the rest of RAX, which a slot cannot say.
            op.index = NO_REG;
            xlat
        }
        Mnemonic::Cbw => sign_extend::<u8, u16>,
        Mnemonic::Cwde => sign_extend::<u16, u32>,
        Mnemonic::Cdqe => sign_extend::<u32, u64>,
        Mnemonic::Cwd => sign_fill::<u16>,
        Mnemonic::Cdq => sign_fill::<u32>,
        Mnemonic::Cqo => sign_fill::<u64>,
        _ => return None,
    })
}

fn mov(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    if is_mem(insn, 0) {
        if insn.op1_kind() == OpKind::Register {
            if !is_reg(insn, 1) {
                return None; // segment registers
            }
            op.rm = reg(insn, 1);
            return Some(sized!(width(insn, 1), store, Reg));
        }
        return Some(sized!(width(insn, 0), store, Imm));
    }
    if !is_reg(insn, 0) {
        return None;
    }
    let w = width(insn, 0);
    op.reg = reg(insn, 0);
    Some(match insn.op1_kind() {
        OpKind::Register if is_reg(insn, 1) => {
            op.rm = reg(insn, 1);
            sized!(w, load, Reg)
        }
        OpKind::Register => return None,
        OpKind::Memory => sized!(w, load, Mem),
        _ => sized!(w, load, Imm),
    })
}

fn load<S: Source, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    S::read::<W>(cpu, op)?.set(cpu, op.reg);
    Ok(())
}

fn store<S: Source, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = S::read::<W>(cpu, op)?;
    cpu.store_operand(op, value)
}

fn extend(insn: &Instruction, op: &mut Op, signed: bool) -> Handler {
    op.reg = reg(insn, 0);
    let from_memory = is_mem(insn, 1);
    if !from_memory {
        op.rm = reg(insn, 1);
    }
    let to = width(insn, 0);
    macro_rules! from {
        ($f:ident, $s:ident) => {
            match width(insn, 1) {
                1 => worded!(to, $f, $s, u8),
                2 => worded!(to, $f, $s, u16),
                _ => worded!(to, $f, $s, u32),
            }
        };
    }
    match (signed, from_memory) {
        (false, true) => from!(movzx, Mem),
        (false, false) => from!(movzx, Reg),
        (true, true) => from!(movsx, Mem),
        (true, false) => from!(movsx, Reg),
    }
}

fn movzx<S: Source, F: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = S::read::<F>(cpu, op)?;
    W::cut(value.wide()).set(cpu, op.reg);
    Ok(())
}

fn movsx<S: Source, F: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = S::read::<F>(cpu, op)?;
    W::cut(value.signed() as u64).set(cpu, op.reg);
    Ok(())
}

fn lea<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    W::cut(cpu.offset(op)).set(cpu, op.reg);
    Ok(())
}

fn bswap<W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    // With a 16-bit operand the result is undefined; processors give zero.
    let value = if W::BITS == 16 { W::default() } else { W::get(cpu, op.reg).swapped() };
    value.set(cpu, op.reg);
    Ok(())
}

fn movbe_load<W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.load_operand::<W>(op)?.swapped().set(cpu, op.reg);
    Ok(())
}

fn movbe_store<W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = W::get(cpu, op.reg).swapped();
    cpu.store_operand(op, value)
}

fn xlat(cpu: &mut Cpu, op: &Op) -> Exec {
    let offset = cpu.offset_plus(op, cpu.gpr[0] & 0xff);
    let at = cpu.linear(op, offset, 1, false)?;
    cpu.load_in::<u8>(at, op.segment)?.set(cpu, 0);
    Ok(())
}

fn sign_extend<F: Int, W: Int>(cpu: &mut Cpu, _: &Op) -> Exec {
    W::cut(F::get(cpu, 0).signed() as u64).set(cpu, 0);
    Ok(())
}

fn sign_fill<W: Int>(cpu: &mut Cpu, _: &Op) -> Exec {
    W::cut((W::get(cpu, 0).signed() >> 63) as u64).set(cpu, 2);
    Ok(())
}
