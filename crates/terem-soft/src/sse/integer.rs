//! Instructions that combine two vectors without regard to MXCSR: integer arithmetic, logic, shuffles,
//! AES, and those with an immediate operand. The host's own instruction does the work.

use core::arch::asm;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::vector::{M16, M32, M64, M128, Register, Source, V};
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op};

/// `destination = f(destination, source)`.
trait Binary {
    /// Its source when that is in memory.
    type Memory: Source;
    fn apply(a: V, b: V) -> V;
}

fn binary<F: Binary, S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::get(cpu, op)?;
    let a = cpu.vector(op.reg);
    cpu.set_vector(op.reg, F::apply(a, b));
    Ok(())
}

fn forms<F: Binary>(insn: &Instruction) -> Option<Handler> {
    match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) => Some(binary::<F, Register>),
        (OpKind::Register, OpKind::Memory) => Some(binary::<F, F::Memory>),
        _ => None,
    }
}

/// A line: mnemonic, its source in memory, the host's instruction.
macro_rules! binary_table {
    ($($name:ident $memory:ident $host:literal;)*) => {
        $(
            struct $name;

            impl Binary for $name {
                type Memory = $memory;

                #[inline(always)]
                fn apply(mut a: V, b: V) -> V {
                    // SAFETY: registers only. The guest has the instruction only if the host has it.
                    unsafe {
                        asm!(concat!($host, " {a}, {b}"), a = inout(xmm_reg) a.0, b = in(xmm_reg) b.0,
                            options(pure, nomem, nostack, preserves_flags));
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
    Aesdec M128 "aesdec";
    Aesdeclast M128 "aesdeclast";
    Aesenc M128 "aesenc";
    Aesenclast M128 "aesenclast";
    Aesimc M128 "aesimc";
    Andnpd M128 "andnpd";
    Andnps M128 "andnps";
    Andpd M128 "andpd";
    Andps M128 "andps";
    Cvtdq2pd M64 "cvtdq2pd";
    Movddup M64 "movddup";
    Movshdup M128 "movshdup";
    Movsldup M128 "movsldup";
    Orpd M128 "orpd";
    Orps M128 "orps";
    Pabsb M128 "pabsb";
    Pabsd M128 "pabsd";
    Pabsw M128 "pabsw";
    Packssdw M128 "packssdw";
    Packsswb M128 "packsswb";
    Packusdw M128 "packusdw";
    Packuswb M128 "packuswb";
    Paddb M128 "paddb";
    Paddd M128 "paddd";
    Paddq M128 "paddq";
    Paddsb M128 "paddsb";
    Paddsw M128 "paddsw";
    Paddusb M128 "paddusb";
    Paddusw M128 "paddusw";
    Paddw M128 "paddw";
    Pand M128 "pand";
    Pandn M128 "pandn";
    Pavgb M128 "pavgb";
    Pavgw M128 "pavgw";
    Pcmpeqb M128 "pcmpeqb";
    Pcmpeqd M128 "pcmpeqd";
    Pcmpeqq M128 "pcmpeqq";
    Pcmpeqw M128 "pcmpeqw";
    Pcmpgtb M128 "pcmpgtb";
    Pcmpgtd M128 "pcmpgtd";
    Pcmpgtq M128 "pcmpgtq";
    Pcmpgtw M128 "pcmpgtw";
    Phaddd M128 "phaddd";
    Phaddsw M128 "phaddsw";
    Phaddw M128 "phaddw";
    Phminposuw M128 "phminposuw";
    Phsubd M128 "phsubd";
    Phsubsw M128 "phsubsw";
    Phsubw M128 "phsubw";
    Pmaddubsw M128 "pmaddubsw";
    Pmaddwd M128 "pmaddwd";
    Pmaxsb M128 "pmaxsb";
    Pmaxsd M128 "pmaxsd";
    Pmaxsw M128 "pmaxsw";
    Pmaxub M128 "pmaxub";
    Pmaxud M128 "pmaxud";
    Pmaxuw M128 "pmaxuw";
    Pminsb M128 "pminsb";
    Pminsd M128 "pminsd";
    Pminsw M128 "pminsw";
    Pminub M128 "pminub";
    Pminud M128 "pminud";
    Pminuw M128 "pminuw";
    Pmovsxbd M32 "pmovsxbd";
    Pmovsxbq M16 "pmovsxbq";
    Pmovsxbw M64 "pmovsxbw";
    Pmovsxdq M64 "pmovsxdq";
    Pmovsxwd M64 "pmovsxwd";
    Pmovsxwq M32 "pmovsxwq";
    Pmovzxbd M32 "pmovzxbd";
    Pmovzxbq M16 "pmovzxbq";
    Pmovzxbw M64 "pmovzxbw";
    Pmovzxdq M64 "pmovzxdq";
    Pmovzxwd M64 "pmovzxwd";
    Pmovzxwq M32 "pmovzxwq";
    Pmuldq M128 "pmuldq";
    Pmulhrsw M128 "pmulhrsw";
    Pmulhuw M128 "pmulhuw";
    Pmulhw M128 "pmulhw";
    Pmulld M128 "pmulld";
    Pmullw M128 "pmullw";
    Pmuludq M128 "pmuludq";
    Por M128 "por";
    Psadbw M128 "psadbw";
    Pshufb M128 "pshufb";
    Psignb M128 "psignb";
    Psignd M128 "psignd";
    Psignw M128 "psignw";
    Pslld M128 "pslld";
    Psllq M128 "psllq";
    Psllw M128 "psllw";
    Psrad M128 "psrad";
    Psraw M128 "psraw";
    Psrld M128 "psrld";
    Psrlq M128 "psrlq";
    Psrlw M128 "psrlw";
    Psubb M128 "psubb";
    Psubd M128 "psubd";
    Psubq M128 "psubq";
    Psubsb M128 "psubsb";
    Psubsw M128 "psubsw";
    Psubusb M128 "psubusb";
    Psubusw M128 "psubusw";
    Psubw M128 "psubw";
    Punpckhbw M128 "punpckhbw";
    Punpckhdq M128 "punpckhdq";
    Punpckhqdq M128 "punpckhqdq";
    Punpckhwd M128 "punpckhwd";
    Punpcklbw M128 "punpcklbw";
    Punpckldq M128 "punpckldq";
    Punpcklqdq M128 "punpcklqdq";
    Punpcklwd M128 "punpcklwd";
    Pxor M128 "pxor";
    Rcpps M128 "rcpps";
    Rcpss M32 "rcpss";
    Rsqrtps M128 "rsqrtps";
    Rsqrtss M32 "rsqrtss";
    Unpckhpd M128 "unpckhpd";
    Unpckhps M128 "unpckhps";
    Unpcklpd M128 "unpcklpd";
    Unpcklps M128 "unpcklps";
    Xorpd M128 "xorpd";
    Xorps M128 "xorps";
}

/// Shifts whose count is an immediate: the instruction that takes it from a register does the same.
fn shift_by_immediate<F: Binary>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.vector(op.reg);
    cpu.set_vector(op.reg, F::apply(a, V::from(u128::from(op.imm as u8))));
    Ok(())
}

/// Shifts all 16 bytes.
fn shift_bytes<const LEFT: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.vector(op.reg).bits();
    let bits = u32::from(op.imm as u8) * 8;
    let shifted = if LEFT { a.checked_shl(bits) } else { a.checked_shr(bits) };
    cpu.set_vector(op.reg, V::from(shifted.unwrap_or(0)));
    Ok(())
}

fn shift(insn: &Instruction) -> Option<Handler> {
    if insn.op1_kind() != OpKind::Immediate8 {
        return None;
    }
    Some(match insn.mnemonic() {
        Mnemonic::Pslldq => shift_bytes::<true>,
        Mnemonic::Psrldq => shift_bytes::<false>,
        Mnemonic::Psllw => shift_by_immediate::<Psllw>,
        Mnemonic::Pslld => shift_by_immediate::<Pslld>,
        Mnemonic::Psllq => shift_by_immediate::<Psllq>,
        Mnemonic::Psrlw => shift_by_immediate::<Psrlw>,
        Mnemonic::Psrld => shift_by_immediate::<Psrld>,
        Mnemonic::Psrlq => shift_by_immediate::<Psrlq>,
        Mnemonic::Psraw => shift_by_immediate::<Psraw>,
        Mnemonic::Psrad => shift_by_immediate::<Psrad>,
        _ => return None,
    })
}

/// `destination = f(destination, source, XMM0)`.
macro_rules! by_xmm0 {
    ($($mnemonic:ident $name:ident $host:literal;)*) => {
        $(
            fn $name<S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
                let b = S::get(cpu, op)?;
                let (mut a, mask) = (cpu.vector(op.reg), cpu.vector(0));
                // SAFETY: registers only. The guest has the instruction only if the host has it.
                unsafe {
                    asm!(concat!($host, " {a}, {b}"), a = inout(xmm_reg) a.0, b = in(xmm_reg) b.0,
                        in("xmm0") mask.0, options(pure, nomem, nostack, preserves_flags));
                }
                cpu.set_vector(op.reg, a);
                Ok(())
            }
        )*

        fn variable_blend(insn: &Instruction) -> Option<Handler> {
            let memory = insn.op1_kind() == OpKind::Memory;
            match insn.mnemonic() {
                $(Mnemonic::$mnemonic => Some(if memory { $name::<M128> } else { $name::<Register> }),)*
                _ => None,
            }
        }
    };
}

by_xmm0! {
    Pblendvb pblendvb "pblendvb";
    Blendvps blendvps "blendvps";
    Blendvpd blendvpd "blendvpd";
}

/// `destination = f(destination, source, immediate)`.
trait WithImmediate {
    type Memory: Source;
    fn apply(a: V, b: V, immediate: u8) -> V;
}

fn immediate<F: WithImmediate, S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::get(cpu, op)?;
    let a = cpu.vector(op.reg);
    cpu.set_vector(op.reg, F::apply(a, b, op.imm as u8));
    Ok(())
}

fn immediate_forms<F: WithImmediate>(insn: &Instruction) -> Option<Handler> {
    match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) => Some(immediate::<F, Register>),
        (OpKind::Register, OpKind::Memory) => Some(immediate::<F, F::Memory>),
        _ => None,
    }
}

/// The host's instruction takes the immediate in its encoding only: so 256 of them, 16 bytes each, and a
/// jump to the one that is wanted.
macro_rules! immediate_table {
    ($($name:ident $memory:ident $host:literal;)*) => {
        $(
            struct $name;

            impl WithImmediate for $name {
                type Memory = $memory;

                #[inline(never)]
                fn apply(mut a: V, b: V, immediate: u8) -> V {
                    // SAFETY: registers only; the jump lands on one of the 256 entries, each of which fits
                    // in 16 bytes and leaves to the end. The guest has it only if the host has it.
                    unsafe {
                        asm!(
                            "leaq 2f(%rip), {t}",
                            "shlq $4, {i}",
                            "addq {i}, {t}",
                            "jmpq *{t}",
                            ".balign 16",
                            "2:",
                            ".set .Lterem_immediate, 0",
                            ".rept 256",
                            concat!($host, " $.Lterem_immediate, %xmm1, %xmm0"),
                            "jmp 3f",
                            ".balign 16",
                            ".set .Lterem_immediate, .Lterem_immediate + 1",
                            ".endr",
                            "3:",
                            t = out(reg) _, i = inout(reg) u64::from(immediate) => _,
                            inout("xmm0") a.0, in("xmm1") b.0,
                            options(att_syntax, pure, nomem, nostack)
                        );
                    }
                    a
                }
            }
        )*

        fn with_immediate(insn: &Instruction) -> Option<Handler> {
            match insn.mnemonic() {
                $(Mnemonic::$name => immediate_forms::<$name>(insn),)*
                _ => None,
            }
        }
    };
}

immediate_table! {
    Aeskeygenassist M128 "aeskeygenassist";
    Blendpd M128 "blendpd";
    Blendps M128 "blendps";
    Mpsadbw M128 "mpsadbw";
    Palignr M128 "palignr";
    Pblendw M128 "pblendw";
    Pclmulqdq M128 "pclmulqdq";
    Pshufd M128 "pshufd";
    Pshufhw M128 "pshufhw";
    Pshuflw M128 "pshuflw";
    Shufpd M128 "shufpd";
    Shufps M128 "shufps";
}

/// `insertps`: an element of the source (the only one, if that is memory) to a place of the destination,
/// and zeros where the immediate says so.
fn insertps<S: Source, const MEMORY: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let source = S::get(cpu, op)?.bits();
    let from = if MEMORY { 0 } else { op.imm >> 6 & 3 };
    let to = (op.imm >> 4 & 3) * 32;
    let element = source >> (from * 32) & 0xffff_ffff;
    let mut value = cpu.vector(op.reg).bits() & !(0xffff_ffff << to) | element << to;
    for place in (0..4).filter(|place| op.imm >> place & 1 != 0) {
        value &= !(0xffff_ffff << (place * 32));
    }
    cpu.set_vector(op.reg, V::from(value));
    Ok(())
}

/// `ptest`: ZF if no bit of the source is set in the destination, CF if none is set outside it.
fn ptest<S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::get(cpu, op)?.bits();
    let a = cpu.vector(op.reg).bits();
    cpu.ah = u8::from(a & b == 0) << 6 | u8::from(!a & b == 0);
    cpu.of = 0;
    Ok(())
}

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    let memory = insn.op1_kind() == OpKind::Memory;
    match insn.mnemonic() {
        Mnemonic::Insertps if memory => Some(insertps::<M32, true>),
        Mnemonic::Insertps => Some(insertps::<Register, false>),
        Mnemonic::Ptest if memory => Some(ptest::<M128>),
        Mnemonic::Ptest => Some(ptest::<Register>),
        _ => shift(insn)
            .or_else(|| plain(insn))
            .or_else(|| variable_blend(insn))
            .or_else(|| with_immediate(insn)),
    }
}
