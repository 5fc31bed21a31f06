//! Moves between vector registers, general registers and memory; MXCSR.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::float::MXCSR_MASK;
use super::vector::{M32, M64, M128, Register, Source, U128, V};
use crate::cpu::Cpu;
use crate::fault::{Exec, Fault};
use crate::mmu::{Access, PAGE_MASK};
use crate::op::{Handler, Op};

const LOW32: u128 = 0xffff_ffff;
const LOW64: u128 = 0xffff_ffff_ffff_ffff;

/// The whole register, or zeros above a narrower source.
fn load<S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = S::get(cpu, op)?;
    cpu.set_vector(op.reg, value);
    Ok(())
}

/// The low `BITS` of the source; the rest of the destination stays.
fn merge<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Exec {
    let low = (1 << BITS) - 1;
    let value = cpu.vector(op.reg).bits() & !low | cpu.vector(op.rm).bits() & low;
    cpu.set_vector(op.reg, V::from(value));
    Ok(())
}

/// `movq xmm, xmm`: the low half; the upper one is zero.
fn move_low(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = u128::from(cpu.low64(op.rm));
    cpu.set_vector(op.reg, V::from(value));
    Ok(())
}

fn store_aligned(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.vector(op.reg);
    cpu.store_aligned(op, value)
}

fn store_any(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.vector(op.reg);
    cpu.store_operand(op, value)
}

fn store32(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.low64(op.reg) as u32;
    cpu.store_operand(op, value)
}

fn store64(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.low64(op.reg);
    cpu.store_operand(op, value)
}

fn store_high(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = (cpu.vector(op.reg).bits() >> 64) as u64;
    cpu.store_operand(op, value)
}

fn load_low(cpu: &mut Cpu, op: &Op) -> Exec {
    let low = u128::from(cpu.load_operand::<u64>(op)?);
    let value = cpu.vector(op.reg).bits() & !LOW64 | low;
    cpu.set_vector(op.reg, V::from(value));
    Ok(())
}

fn load_high(cpu: &mut Cpu, op: &Op) -> Exec {
    let high = u128::from(cpu.load_operand::<u64>(op)?);
    let value = cpu.vector(op.reg).bits() & LOW64 | high << 64;
    cpu.set_vector(op.reg, V::from(value));
    Ok(())
}

/// `movhlps`.
fn high_to_low(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.vector(op.reg).bits() & !LOW64 | cpu.vector(op.rm).bits() >> 64;
    cpu.set_vector(op.reg, V::from(value));
    Ok(())
}

/// `movlhps`.
fn low_to_high(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.vector(op.reg).bits() & LOW64 | cpu.vector(op.rm).bits() << 64;
    cpu.set_vector(op.reg, V::from(value));
    Ok(())
}

/// `movd`, `movq` from a general register.
fn from_general<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = u128::from(cpu.slot(op.rm));
    cpu.set_vector(op.reg, V::from(if WIDE { value } else { value & LOW32 }));
    Ok(())
}

/// `movd`, `movq` to a general register.
fn to_general<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.low64(op.rm);
    cpu.set_slot(op.reg, if WIDE { value } else { value & 0xffff_ffff });
    Ok(())
}

/// `movnti`.
fn store_general<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.slot(op.reg);
    if WIDE { cpu.store_operand(op, value) } else { cpu.store_operand(op, value as u32) }
}

/// Element `imm` of a vector of `BITS`-wide elements, to a general register.
fn extract<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = element::<BITS>(cpu.vector(op.rm), op.imm);
    cpu.set_slot(op.reg, value);
    Ok(())
}

fn element<const BITS: u32>(v: V, index: u64) -> u64 {
    let at = index as u32 % (128 / BITS) * BITS;
    let value = (v.bits() >> at) as u64;
    value & (u64::MAX >> (64 - BITS))
}

/// The same, to memory.
fn extract_store<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = element::<BITS>(cpu.vector(op.reg), op.imm);
    match BITS {
        8 => cpu.store_operand(op, value as u8),
        16 => cpu.store_operand(op, value as u16),
        32 => cpu.store_operand(op, value as u32),
        _ => cpu.store_operand(op, value),
    }
}

/// An element of a vector comes from a general register or memory.
fn insert<const BITS: u32, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = match (MEMORY, BITS) {
        (false, _) => cpu.slot(op.rm),
        (true, 8) => cpu.load_operand::<u8>(op)?.into(),
        (true, 16) => cpu.load_operand::<u16>(op)?.into(),
        (true, 32) => cpu.load_operand::<u32>(op)?.into(),
        (true, _) => cpu.load_operand::<u64>(op)?,
    };
    let at = op.imm as u32 % (128 / BITS) * BITS;
    let mask = u128::from(u64::MAX >> (64 - BITS)) << at;
    let value = cpu.vector(op.reg).bits() & !mask | u128::from(value) << at & mask;
    cpu.set_vector(op.reg, V::from(value));
    Ok(())
}

/// The sign bits of the elements, to a general register.
fn signs<const BITS: u32>(cpu: &mut Cpu, op: &Op) -> Exec {
    use core::arch::x86_64::{
        _mm_castsi128_pd, _mm_castsi128_ps, _mm_movemask_epi8, _mm_movemask_pd, _mm_movemask_ps,
    };
    let v = cpu.vector(op.rm).0;
    // SAFETY: SSE2 is part of x86-64.
    let mask = unsafe {
        match BITS {
            8 => _mm_movemask_epi8(v),
            32 => _mm_movemask_ps(_mm_castsi128_ps(v)),
            _ => _mm_movemask_pd(_mm_castsi128_pd(v)),
        }
    };
    cpu.set_slot(op.reg, u64::from(mask as u32));
    Ok(())
}

/// `maskmovdqu`: the bytes whose mask byte has its top bit set, to `DS:rDI`.
pub(crate) fn masked_store(cpu: &mut Cpu, op: &Op) -> Exec {
    let (value, mask) = (cpu.vector(op.reg).bits(), cpu.vector(op.rm).bits());
    cpu.store_masked(op, value.to_le_bytes(), mask.to_le_bytes())
}

impl Cpu {
    /// Writes the bytes of `value` whose byte in `mask` has its top bit set to `DS:rDI`. All of them are
    /// checked before the first is written.
    pub(super) fn store_masked(&mut self, op: &Op, value: [u8; 16], mask: [u8; 16]) -> Exec {
        let mut places = [None; 16];
        for (i, place) in places.iter_mut().enumerate() {
            if mask[i] & 0x80 != 0 {
                let offset = self.string_offset(op, i as u64);
                let at = self.linear(op, offset, 1, true)?;
                self.canonical(at, 1, op.segment)?;
                // The fault's address is that of the first byte on the page, wanted or not.
                let first = self.wrap(at.wrapping_sub(i as u64));
                let page = self.wrap(at) & PAGE_MASK;
                self.translate(if first & PAGE_MASK == page { first } else { page }, Access::Write)?;
                *place = Some(at);
            }
        }
        for (i, at) in places.iter().enumerate().filter_map(|(i, at)| at.map(|at| (i, at))) {
            self.store_in(at, value[i], op.segment)?;
        }
        Ok(())
    }

    /// rDI plus `i`, cut to the address size.
    fn string_offset(&self, op: &Op, i: u64) -> u64 {
        let at = self.gpr[7].wrapping_add(i);
        if op.flags & crate::op::ADDR32 != 0 {
            at & 0xffff_ffff
        } else if op.flags & crate::op::ADDR16 != 0 {
            at & 0xffff
        } else {
            at
        }
    }
}

pub(crate) fn ldmxcsr(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.load_operand::<u32>(op)?;
    if value & !MXCSR_MASK != 0 {
        return Err(Fault::GP0);
    }
    cpu.set_mxcsr(value);
    Ok(())
}

pub(crate) fn stmxcsr(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.guest_mxcsr();
    cpu.store_operand(op, value)
}

/// What the forms of a move are: between registers, from memory, to memory.
fn forms(insn: &Instruction, register: Handler, from_memory: Handler, to_memory: Handler) -> Option<Handler> {
    match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) => Some(register),
        (OpKind::Register, OpKind::Memory) => Some(from_memory),
        (OpKind::Memory, OpKind::Register) => Some(to_memory),
        _ => None,
    }
}

/// `movd` and `movq`.
fn narrow(insn: &Instruction, wide: bool) -> Option<Handler> {
    let (load_memory, store, from, to): (Handler, Handler, Handler, Handler) = if wide {
        (load::<M64>, store64, from_general::<true>, to_general::<true>)
    } else {
        (load::<M32>, store32, from_general::<false>, to_general::<false>)
    };
    let register = if insn.op0_register().is_gpr() {
        to
    } else if insn.op1_register().is_gpr() {
        from
    } else {
        move_low
    };
    forms(insn, register, load_memory, store)
}

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    let to_memory = insn.op0_kind() == OpKind::Memory;
    let memory = insn.op1_kind() == OpKind::Memory;
    match insn.mnemonic() {
        Mnemonic::Movaps | Mnemonic::Movapd | Mnemonic::Movdqa => {
            forms(insn, load::<Register>, load::<M128>, store_aligned)
        }
        Mnemonic::Movntps | Mnemonic::Movntpd | Mnemonic::Movntdq => Some(store_aligned),
        Mnemonic::Movntdqa => Some(load::<M128>),
        Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu | Mnemonic::Lddqu => {
            forms(insn, load::<Register>, load::<U128>, store_any)
        }
        Mnemonic::Movss => forms(insn, merge::<32>, load::<M32>, store32),
        Mnemonic::Movsd => forms(insn, merge::<64>, load::<M64>, store64),
        Mnemonic::Movd => narrow(insn, false),
        Mnemonic::Movq => narrow(insn, true),
        Mnemonic::Movlps | Mnemonic::Movlpd => Some(if to_memory { store64 } else { load_low }),
        Mnemonic::Movhps | Mnemonic::Movhpd => Some(if to_memory { store_high } else { load_high }),
        Mnemonic::Movhlps => Some(high_to_low),
        Mnemonic::Movlhps => Some(low_to_high),
        Mnemonic::Movnti if insn.op1_register().is_gpr64() => Some(store_general::<true>),
        Mnemonic::Movnti => Some(store_general::<false>),
        Mnemonic::Movmskps => Some(signs::<32>),
        Mnemonic::Movmskpd => Some(signs::<64>),
        Mnemonic::Pmovmskb => Some(signs::<8>),
        Mnemonic::Maskmovdqu => Some(masked_store),
        Mnemonic::Pextrb => Some(if to_memory { extract_store::<8> } else { extract::<8> }),
        Mnemonic::Pextrw => Some(if to_memory { extract_store::<16> } else { extract::<16> }),
        Mnemonic::Pextrd | Mnemonic::Extractps => {
            Some(if to_memory { extract_store::<32> } else { extract::<32> })
        }
        Mnemonic::Pextrq => Some(if to_memory { extract_store::<64> } else { extract::<64> }),
        Mnemonic::Pinsrb => Some(if memory { insert::<8, true> } else { insert::<8, false> }),
        Mnemonic::Pinsrw => Some(if memory { insert::<16, true> } else { insert::<16, false> }),
        Mnemonic::Pinsrd => Some(if memory { insert::<32, true> } else { insert::<32, false> }),
        Mnemonic::Pinsrq => Some(if memory { insert::<64, true> } else { insert::<64, false> }),
        Mnemonic::Ldmxcsr => Some(ldmxcsr),
        Mnemonic::Stmxcsr => Some(stmxcsr),
        _ => None,
    }
}
