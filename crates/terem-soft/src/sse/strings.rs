//! The string comparisons of SSE4.2 (`pcmpestri` and its family).

use core::arch::asm;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::vector::{Register, Source, U128, V};
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op};

/// What a comparison gives.
struct Found {
    /// For the forms that give an index.
    index: u32,
    /// For the forms that give a mask.
    mask: V,
    /// SF, ZF, AF, PF and CF as `lahf` has them.
    ah: u8,
    of: u8,
}

/// A line: name, the host's instruction (the assembler has no name for those with REX.W). The lengths (RAX, RDX) count for the explicit forms only.
macro_rules! string_table {
    ($($name:ident $host:literal;)*) => { $(
        #[inline(never)]
        fn $name(a: V, b: V, immediate: u8, lengths: (u64, u64)) -> Found {
            let (index, flags, mask): (u64, u64, _);
            // SAFETY: registers only; the jump lands on one of the 256 entries, each of which fits in 16
            // bytes and leaves to the end. The guest has the instruction only if the host has it.
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
                    $host,
                    "jmp 3f",
                    ".balign 16",
                    ".set .Lterem_immediate, .Lterem_immediate + 1",
                    ".endr",
                    "3:",
                    "lahf",
                    "seto %al",
                    t = out(reg) _, i = inout(reg) u64::from(immediate) => _,
                    inout("rax") lengths.0 => flags, in("rdx") lengths.1, inout("rcx") 0_u64 => index,
                    out("xmm0") mask, in("xmm1") a.0, in("xmm2") b.0,
                    options(att_syntax, pure, nomem, nostack)
                );
            }
            Found { index: index as u32, mask: V(mask), ah: (flags >> 8) as u8, of: flags as u8 & 1 }
        }
    )* };
}

string_table! {
    pcmpestri "pcmpestri $.Lterem_immediate, %xmm2, %xmm1";
    pcmpestri_64 ".byte 0x66, 0x48, 0x0f, 0x3a, 0x61, 0xca, .Lterem_immediate";
    pcmpestrm "pcmpestrm $.Lterem_immediate, %xmm2, %xmm1";
    pcmpestrm_64 ".byte 0x66, 0x48, 0x0f, 0x3a, 0x60, 0xca, .Lterem_immediate";
    pcmpistri "pcmpistri $.Lterem_immediate, %xmm2, %xmm1";
    pcmpistrm "pcmpistrm $.Lterem_immediate, %xmm2, %xmm1";
}

/// What tells the six apart.
trait Compare {
    /// Whether the result is an index (to ECX) or a mask (to XMM0).
    const INDEX: bool;
    fn run(a: V, b: V, immediate: u8, lengths: (u64, u64)) -> Found;
}

macro_rules! compare_table {
    ($($mnemonic:ident $name:ident $index:literal;)*) => {
        $(
            struct $mnemonic;

            impl Compare for $mnemonic {
                const INDEX: bool = $index;

                fn run(a: V, b: V, immediate: u8, lengths: (u64, u64)) -> Found {
                    $name(a, b, immediate, lengths)
                }
            }
        )*

        pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
            let memory = insn.op1_kind() == OpKind::Memory;
            match insn.mnemonic() {
                $(Mnemonic::$mnemonic => {
                    Some(if memory { compare::<$mnemonic, U128> } else { compare::<$mnemonic, Register> })
                })*
                _ => None,
            }
        }
    };
}

compare_table! {
    Pcmpestri pcmpestri true;
    Pcmpestri64 pcmpestri_64 true;
    Pcmpestrm pcmpestrm false;
    Pcmpestrm64 pcmpestrm_64 false;
    Pcmpistri pcmpistri true;
    Pcmpistrm pcmpistrm false;
}

fn compare<F: Compare, S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::get(cpu, op)?;
    let found = F::run(cpu.vector(op.reg), b, op.imm as u8, (cpu.slot(0), cpu.slot(2)));
    if F::INDEX {
        cpu.set_slot(1, u64::from(found.index));
    } else {
        cpu.set_vector(0, found.mask);
    }
    (cpu.ah, cpu.of) = (found.ah, found.of);
    Ok(())
}
