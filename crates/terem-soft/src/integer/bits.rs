//! Bit tests and scans, population count, CRC-32.

use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u16, _mm_crc32_u32, _mm_crc32_u64};

use iced_x86::{Instruction, Mnemonic};

use super::operand::{Imm, Mem, Reg, Source, is_mem, is_reg, reg, width, worded};
use super::width::{Flags, Int, Word, ZERO};
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op};

/// `bt` and the like.
trait BitTest {
    /// Whether the operand is changed.
    const WRITES: bool = true;
    fn run<W: Word>(flags: Flags, a: W, bit: W) -> (W, Flags);
}

macro_rules! bit_tests {
    ($($name:ident $f:ident $writes:expr;)*) => { $(
        struct $name;
        impl BitTest for $name {
            const WRITES: bool = $writes;

            #[inline(always)]
            fn run<W: Word>(flags: Flags, a: W, bit: W) -> (W, Flags) {
                W::$f(flags, a, bit)
            }
        }
    )* };
}
bit_tests! { Bt bt false; Bts bts true; Btr btr true; Btc btc true; }

pub(super) fn handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Bt => return Some(bit_test::<Bt>(insn, op)),
        Mnemonic::Bts => return Some(bit_test::<Bts>(insn, op)),
        Mnemonic::Btr => return Some(bit_test::<Btr>(insn, op)),
        Mnemonic::Btc => return Some(bit_test::<Btc>(insn, op)),
        Mnemonic::Bsf | Mnemonic::Bsr | Mnemonic::Popcnt => {}
        Mnemonic::Lzcnt | Mnemonic::Tzcnt | Mnemonic::Crc32 => {}
        _ => return None,
    }
    op.reg = reg(insn, 0);
    let from_memory = is_mem(insn, 1);
    if !from_memory {
        op.rm = reg(insn, 1);
    }
    let w = width(insn, 0);
    macro_rules! scan {
        ($f:ident) => {
            if from_memory { worded!(w, $f, Mem) } else { worded!(w, $f, Reg) }
        };
    }
    Some(match insn.mnemonic() {
        Mnemonic::Bsf => scan!(bsf),
        Mnemonic::Bsr => scan!(bsr),
        Mnemonic::Popcnt => scan!(popcnt),
        Mnemonic::Lzcnt => scan!(lzcnt),
        Mnemonic::Tzcnt => scan!(tzcnt),
        _ => crc32(width(insn, 1), w == 8, from_memory),
    })
}

fn bit_test<O: BitTest>(insn: &Instruction, op: &mut Op) -> Handler {
    let w = width(insn, 0);
    let by_register = is_reg(insn, 1);
    if by_register {
        op.rm = reg(insn, 1);
    }
    if is_mem(insn, 0) {
        return match (by_register, insn.has_lock_prefix() && O::WRITES) {
            (true, false) => worded!(w, in_bit_string, O),
            (true, true) => worded!(w, in_bit_string_locked, O),
            (false, false) => worded!(w, in_memory, O),
            (false, true) => worded!(w, in_memory_locked, O),
        };
    }
    op.reg = reg(insn, 0);
    if by_register { worded!(w, in_register, O, Reg) } else { worded!(w, in_register, O, Imm) }
}

fn in_register<O: BitTest, S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let bit = S::read(cpu, op)?;
    let (result, flags) = O::run(cpu.flags(), W::get(cpu, op.reg), bit);
    if O::WRITES {
        result.set(cpu, op.reg);
    }
    cpu.set_flags(flags);
    Ok(())
}

/// The bit's place counts from the operand's address, both ways.
#[inline(always)]
fn bit_string_address<O: BitTest, W: Word>(cpu: &Cpu, op: &Op) -> Exec<u64> {
    let units = W::get(cpu, op.rm).signed() >> W::BITS.trailing_zeros();
    let offset = cpu.offset_plus(op, (units as u64).wrapping_mul(W::SIZE));
    cpu.linear(op, offset, W::SIZE, O::WRITES)
}

fn in_bit_string<O: BitTest, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = bit_string_address::<O, W>(cpu, op)?;
    let bit = W::get(cpu, op.rm);
    test_at::<O, W>(cpu, op, at, bit)
}

fn in_bit_string_locked<O: BitTest, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = bit_string_address::<O, W>(cpu, op)?;
    let bit = W::get(cpu, op.rm);
    test_locked_at::<O, W>(cpu, op, at, bit)
}

fn in_memory<O: BitTest, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = cpu.operand_address(op, W::SIZE, O::WRITES)?;
    test_at::<O, W>(cpu, op, at, W::cut(op.imm))
}

fn in_memory_locked<O: BitTest, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = cpu.operand_address(op, W::SIZE, true)?;
    test_locked_at::<O, W>(cpu, op, at, W::cut(op.imm))
}

#[inline(always)]
fn test_at<O: BitTest, W: Word>(cpu: &mut Cpu, op: &Op, at: u64, bit: W) -> Exec {
    let mut flags = cpu.flags();
    if O::WRITES {
        cpu.modify(at, op.segment, |a| {
            let (result, f) = O::run(flags, a, bit);
            flags = f;
            result
        })?;
    } else {
        let a = cpu.load_in(at, op.segment)?;
        (_, flags) = O::run(flags, a, bit);
    }
    cpu.set_flags(flags);
    Ok(())
}

#[inline(always)]
fn test_locked_at<O: BitTest, W: Word>(cpu: &mut Cpu, op: &Op, at: u64, bit: W) -> Exec {
    let (old, mut flags) = (cpu.flags(), 0);
    cpu.modify_locked_at(at, op.segment, |a| {
        let (result, f) = O::run(old, a, bit);
        flags = f;
        result
    })?;
    cpu.set_flags(flags);
    Ok(())
}

fn bsf<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read::<W>(cpu, op)?;
    let (result, flags) = W::bsf(cpu.flags(), W::get(cpu, op.reg), b);
    scanned(cpu, op, b, result, flags);
    Ok(())
}

fn bsr<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read::<W>(cpu, op)?;
    let (result, flags) = W::bsr(cpu.flags(), W::get(cpu, op.reg), b);
    scanned(cpu, op, b, result, flags);
    Ok(())
}

#[inline(always)]
fn scanned<W: Word>(cpu: &mut Cpu, op: &Op, source: W, result: W, flags: Flags) {
    // With no bit set the register stays as it is, all 64 bits of it (AMD APM vol. 3, BSF).
    if source != W::default() {
        result.set(cpu, op.reg);
    }
    cpu.set_flags(flags);
}

fn popcnt<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read::<W>(cpu, op)?;
    W::cut(u64::from(b.wide().count_ones())).set(cpu, op.reg);
    cpu.set_flags(if b == W::default() { ZERO } else { 0 });
    Ok(())
}

fn lzcnt<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read::<W>(cpu, op)?;
    counted(cpu, op, b.wide().leading_zeros() - (64 - W::BITS), W::BITS, W::cut);
    Ok(())
}

fn tzcnt<S: Source, W: Word>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::read::<W>(cpu, op)?;
    counted(cpu, op, b.wide().trailing_zeros().min(W::BITS), W::BITS, W::cut);
    Ok(())
}

#[inline(always)]
fn counted<W: Word>(cpu: &mut Cpu, op: &Op, count: u32, bits: u32, cut: impl FnOnce(u64) -> W) {
    cut(u64::from(count)).set(cpu, op.reg);
    let zero = if count == 0 { ZERO } else { 0 };
    let carry = if count == bits { 0x100 } else { 0 };
    // The others are undefined.
    cpu.set_flags(cpu.flags() & !(ZERO | 0x100) | zero | carry);
}

fn crc32(source: usize, wide: bool, from_memory: bool) -> Handler {
    match (source, from_memory) {
        (1, true) => crc::<Mem, u8>,
        (1, false) => crc::<Reg, u8>,
        (2, true) => crc::<Mem, u16>,
        (2, false) => crc::<Reg, u16>,
        (4, true) => crc::<Mem, u32>,
        (4, false) => crc::<Reg, u32>,
        (_, true) if wide => crc::<Mem, u64>,
        _ => crc::<Reg, u64>,
    }
}

fn crc<S: Source, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let data = S::read::<W>(cpu, op)?.wide();
    let before = cpu.slot(op.reg) as u32;
    cpu.gpr[usize::from(op.reg)] = u64::from(crc32c(before, data, W::SIZE));
    Ok(())
}

/// Goes on with a CRC-32C (reflected, no inversions) over the low `size` bytes of `data`.
fn crc32c(before: u32, data: u64, size: u64) -> u32 {
    if !std::arch::is_x86_feature_detected!("sse4.2") {
        return data.to_le_bytes()[..size as usize].iter().fold(before, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |c, _| c >> 1 ^ (0x82f6_3b78 & (c & 1).wrapping_neg()))
        });
    }
    // SAFETY: the host has the instruction.
    unsafe {
        match size {
            1 => _mm_crc32_u8(before, data as u8),
            2 => _mm_crc32_u16(before, data as u16),
            4 => _mm_crc32_u32(before, data as u32),
            _ => _mm_crc32_u64(u64::from(before), data) as u32,
        }
    }
}
