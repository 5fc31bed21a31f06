//! MMX, and the SSE instructions that touch its registers. They are the mantissas of the x87 registers:
//! every one of these instructions marks all of them valid and sets the stack's top to 0
//! (Intel SDM vol. 1, 9.5), and waits for x87 exceptions.

use core::arch::asm;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::float::{Cvtdq2ps, Cvtpd2dq, Cvtps2dq, Cvttpd2dq, Cvttps2dq, Float};
use super::vector::{M32, M64, M128, Mmx, Register, Source, V};
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op};

/// `destination = f(destination, source)`.
trait Binary {
    fn apply(a: u64, b: u64) -> u64;
}

fn binary<F: Binary, S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let b = S::get(cpu, op)?.bits() as u64;
    cpu.fpu.start_mmx();
    cpu.fpu.set_mm(op.reg, F::apply(cpu.fpu.mm(op.reg), b));
    Ok(())
}

/// Shifts by an immediate: the same as by a register.
fn by_immediate<F: Binary>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    cpu.fpu.start_mmx();
    cpu.fpu.set_mm(op.reg, F::apply(cpu.fpu.mm(op.reg), op.imm & 0xff));
    Ok(())
}

fn forms<F: Binary>(insn: &Instruction) -> Option<Handler> {
    match (insn.op1_kind(), insn.memory_size().size()) {
        (OpKind::Register, _) => Some(binary::<F, Mmx>),
        (OpKind::Memory, 4) => Some(binary::<F, M32>),
        (OpKind::Memory, 8) => Some(binary::<F, M64>),
        (OpKind::Immediate8, _) => Some(by_immediate::<F>),
        _ => None,
    }
}

/// A line: mnemonic, the host's instruction.
macro_rules! binary_table {
    ($($name:ident $host:literal;)*) => {
        $(
            struct $name;

            impl Binary for $name {
                fn apply(mut a: u64, b: u64) -> u64 {
                    // SAFETY: reads and writes the two values; the x87 stack is empty before and after.
                    unsafe {
                        asm!("movq mm0, [{a}]", concat!($host, " mm0, [{b}]"), "movq [{a}], mm0", "emms",
                            a = in(reg) &raw mut a, b = in(reg) &raw const b,
                            out("mm0") _, out("mm1") _, out("mm2") _, out("mm3") _,
                            out("mm4") _, out("mm5") _, out("mm6") _, out("mm7") _,
                            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                            options(nostack, preserves_flags));
                    }
                    a
                }
            }
        )*

        fn plain(insn: &Instruction) -> Option<Handler> {
            match insn.mnemonic() {
                $(Mnemonic::$name => forms::<$name>(insn),)*
                _ => None,
            }
        }
    };
}

binary_table! {
    Pabsb "pabsb";
    Pabsd "pabsd";
    Pabsw "pabsw";
    Packssdw "packssdw";
    Packsswb "packsswb";
    Packuswb "packuswb";
    Paddb "paddb";
    Paddd "paddd";
    Paddq "paddq";
    Paddsb "paddsb";
    Paddsw "paddsw";
    Paddusb "paddusb";
    Paddusw "paddusw";
    Paddw "paddw";
    Pand "pand";
    Pandn "pandn";
    Pavgb "pavgb";
    Pavgw "pavgw";
    Pcmpeqb "pcmpeqb";
    Pcmpeqd "pcmpeqd";
    Pcmpeqw "pcmpeqw";
    Pcmpgtb "pcmpgtb";
    Pcmpgtd "pcmpgtd";
    Pcmpgtw "pcmpgtw";
    Phaddd "phaddd";
    Phaddsw "phaddsw";
    Phaddw "phaddw";
    Phsubd "phsubd";
    Phsubsw "phsubsw";
    Phsubw "phsubw";
    Pmaddubsw "pmaddubsw";
    Pmaddwd "pmaddwd";
    Pmaxsw "pmaxsw";
    Pmaxub "pmaxub";
    Pminsw "pminsw";
    Pminub "pminub";
    Pmulhrsw "pmulhrsw";
    Pmulhuw "pmulhuw";
    Pmulhw "pmulhw";
    Pmullw "pmullw";
    Pmuludq "pmuludq";
    Por "por";
    Psadbw "psadbw";
    Pshufb "pshufb";
    Psignb "psignb";
    Psignd "psignd";
    Psignw "psignw";
    Pslld "pslld";
    Psllq "psllq";
    Psllw "psllw";
    Psrad "psrad";
    Psraw "psraw";
    Psrld "psrld";
    Psrlq "psrlq";
    Psrlw "psrlw";
    Psubb "psubb";
    Psubd "psubd";
    Psubq "psubq";
    Psubsb "psubsb";
    Psubsw "psubsw";
    Psubusb "psubusb";
    Psubusw "psubusw";
    Psubw "psubw";
    Punpckhbw "punpckhbw";
    Punpckhdq "punpckhdq";
    Punpckhwd "punpckhwd";
    Punpcklbw "punpcklbw";
    Punpckldq "punpckldq";
    Punpcklwd "punpcklwd";
    Pxor "pxor";
}

/// `pshufw`.
fn shuffle_words<S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let b = S::get(cpu, op)?.bits() as u64;
    let word = |i: u64| (b >> ((op.imm >> (2 * i) & 3) * 16) & 0xffff) << (16 * i);
    cpu.fpu.start_mmx();
    cpu.fpu.set_mm(op.reg, word(0) | word(1) | word(2) | word(3));
    Ok(())
}

/// `palignr`.
fn align<S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let b = S::get(cpu, op)?.bits();
    let both = u128::from(cpu.fpu.mm(op.reg)) << 64 | b;
    let value = both.checked_shr(u32::from(op.imm as u8) * 8).unwrap_or(0);
    cpu.fpu.start_mmx();
    cpu.fpu.set_mm(op.reg, value as u64);
    Ok(())
}

/// `pinsrw`.
fn insert_word<const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let word = if MEMORY { cpu.load_operand::<u16>(op)? } else { cpu.slot(op.rm) as u16 };
    let at = (op.imm & 3) * 16;
    cpu.fpu.start_mmx();
    let value = cpu.fpu.mm(op.reg) & !(0xffff << at) | u64::from(word) << at;
    cpu.fpu.set_mm(op.reg, value);
    Ok(())
}

/// `pextrw`.
fn extract_word(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    cpu.fpu.start_mmx();
    let value = cpu.fpu.mm(op.rm) >> ((op.imm & 3) * 16) & 0xffff;
    cpu.set_slot(op.reg, value);
    Ok(())
}

/// `pmovmskb`.
fn signs(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    cpu.fpu.start_mmx();
    let bytes = cpu.fpu.mm(op.rm).to_le_bytes();
    let mask = bytes.iter().enumerate().fold(0, |m, (i, b)| m | u64::from(b >> 7) << i);
    cpu.set_slot(op.reg, mask);
    Ok(())
}

/// `movd`, `movq` into an MMX register.
fn load<S: Source, const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let value = S::get(cpu, op)?.bits() as u64;
    cpu.fpu.start_mmx();
    cpu.fpu.set_mm(op.reg, if WIDE { value } else { value & 0xffff_ffff });
    Ok(())
}

/// The same out of one, to memory.
fn store<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let value = cpu.fpu.mm(op.reg);
    if WIDE {
        cpu.store_operand(op, value)?;
    } else {
        cpu.store_operand(op, value as u32)?;
    }
    cpu.fpu.start_mmx();
    Ok(())
}

/// And to a general register.
fn to_general<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    cpu.fpu.start_mmx();
    let value = cpu.fpu.mm(op.rm);
    cpu.set_slot(op.reg, if WIDE { value } else { value & 0xffff_ffff });
    Ok(())
}

/// `maskmovq`.
fn masked_store(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let wide = |n| u128::from(cpu.fpu.mm(n)).to_le_bytes();
    let (value, mask) = (wide(op.reg), wide(op.rm));
    cpu.store_masked(op, value, mask)?;
    cpu.fpu.start_mmx();
    Ok(())
}

/// `movq2dq`.
fn to_vector(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    cpu.fpu.start_mmx();
    let value = V::from(u128::from(cpu.fpu.mm(op.rm)));
    cpu.set_vector(op.reg, value);
    Ok(())
}

/// `movdq2q`.
fn from_vector(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    cpu.fpu.start_mmx();
    cpu.fpu.set_mm(op.reg, cpu.low64(op.rm));
    Ok(())
}

/// `cvtpi2ps`: the low two elements; the others stay. From memory it has nothing to do with MMX.
fn to_singles<S: Source, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    if !MEMORY {
        cpu.wait_x87()?;
    }
    let b = S::get(cpu, op)?;
    if !MEMORY {
        cpu.fpu.start_mmx();
    }
    let low = cpu.float::<Cvtdq2ps>(V::default(), b)?.bits() as u64;
    let value = cpu.vector(op.reg).bits() >> 64 << 64 | u128::from(low);
    cpu.set_vector(op.reg, V::from(value));
    Ok(())
}

/// `cvtpi2pd`, in the same way; exact.
fn to_doubles<S: Source, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    if !MEMORY {
        cpu.wait_x87()?;
    }
    let b = S::get(cpu, op)?.bits();
    if !MEMORY {
        cpu.fpu.start_mmx();
    }
    let double = |v: u128| u128::from(f64::from(v as u32 as i32).to_bits());
    cpu.set_vector(op.reg, V::from(double(b) | double(b >> 32) << 64));
    Ok(())
}

/// `cvtps2pi` and the like: `F` gives two integers in the low half.
fn to_integers<F: Float, S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let b = S::get(cpu, op)?;
    // The stack is MMX's even if a floating-point exception comes now.
    cpu.fpu.start_mmx();
    let value = cpu.float::<F>(V::default(), b)?.bits() as u64;
    cpu.fpu.set_mm(op.reg, value);
    Ok(())
}

/// The low half of a vector register: what is above it must not raise anything.
struct LowHalf;

impl Source for LowHalf {
    fn get(cpu: &mut Cpu, op: &Op) -> Exec<V> {
        Ok(V::from(u128::from(cpu.low64(op.rm))))
    }
}

fn emms(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.wait_x87()?;
    cpu.fpu.empty();
    Ok(())
}

fn movd(insn: &Instruction, wide: bool) -> Option<Handler> {
    use super::vector::General;
    let mm = |i| insn.op_register(i).is_mm();
    Some(match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Memory) if wide => load::<M64, true>,
        (OpKind::Register, OpKind::Memory) => load::<M32, false>,
        (OpKind::Memory, _) if wide => store::<true>,
        (OpKind::Memory, _) => store::<false>,
        _ if mm(0) && mm(1) => load::<Mmx, true>,
        _ if mm(0) && wide => load::<General, true>,
        _ if mm(0) => load::<General, false>,
        _ if wide => to_general::<true>,
        _ => to_general::<false>,
    })
}

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    if insn.mnemonic() == Mnemonic::Emms {
        return Some(emms);
    }
    let memory = insn.op1_kind() == OpKind::Memory;
    match insn.mnemonic() {
        Mnemonic::Cvtpi2pd if memory => return Some(to_doubles::<M64, true>),
        Mnemonic::Cvtpi2ps if memory => return Some(to_singles::<M64, true>),
        _ => {}
    }
    if !(0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_mm()) {
        return None;
    }
    let found: Handler = match insn.mnemonic() {
        Mnemonic::Movd => return movd(insn, false),
        Mnemonic::Movq => return movd(insn, true),
        Mnemonic::Movntq => store::<true>,
        Mnemonic::Pshufw if memory => shuffle_words::<M64>,
        Mnemonic::Pshufw => shuffle_words::<Mmx>,
        Mnemonic::Palignr if memory => align::<M64>,
        Mnemonic::Palignr => align::<Mmx>,
        Mnemonic::Pinsrw if memory => insert_word::<true>,
        Mnemonic::Pinsrw => insert_word::<false>,
        Mnemonic::Pextrw => extract_word,
        Mnemonic::Pmovmskb => signs,
        Mnemonic::Maskmovq => masked_store,
        Mnemonic::Movq2dq => to_vector,
        Mnemonic::Movdq2q => from_vector,
        Mnemonic::Cvtpi2ps => to_singles::<Mmx, false>,
        Mnemonic::Cvtpi2pd => to_doubles::<Mmx, false>,
        Mnemonic::Cvtps2pi if memory => to_integers::<Cvtps2dq, M64>,
        Mnemonic::Cvtps2pi => to_integers::<Cvtps2dq, LowHalf>,
        Mnemonic::Cvttps2pi if memory => to_integers::<Cvttps2dq, M64>,
        Mnemonic::Cvttps2pi => to_integers::<Cvttps2dq, LowHalf>,
        Mnemonic::Cvtpd2pi if memory => to_integers::<Cvtpd2dq, M128>,
        Mnemonic::Cvtpd2pi => to_integers::<Cvtpd2dq, Register>,
        Mnemonic::Cvttpd2pi if memory => to_integers::<Cvttpd2dq, M128>,
        Mnemonic::Cvttpd2pi => to_integers::<Cvttpd2dq, Register>,
        _ => return plain(insn),
    };
    Some(found)
}
