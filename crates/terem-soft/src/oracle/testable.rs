//! Which instructions can be tried in user mode, with results that depend on nothing else.

use iced_x86::{
    Code, CpuidFeature as F, EncodingKind, FlowControl, Instruction, Mnemonic as M, OpCodeOperandKind as K,
};

/// What the model has, as far as the interpreter does the work itself.
const FEATURES: &[F] = &[
    F::INTEL8086,
    F::INTEL186,
    F::INTEL286,
    F::INTEL386,
    F::INTEL486,
    F::X64,
    F::FPU,
    F::FPU287,
    F::FPU387,
    F::MULTIBYTENOP,
    F::CMOV,
    F::MMX,
    F::SSE,
    F::SSE2,
    F::SSE3,
    F::SSSE3,
    F::SSE4_1,
    F::SSE4_2,
    F::POPCNT,
    F::AES,
    F::PCLMULQDQ,
    F::MOVBE,
    F::CMPXCHG16B,
    F::CX8,
    F::CLFSH,
    F::CLFLUSHOPT,
    F::PAUSE,
    F::AVX,
    F::AVX2,
    F::FMA,
    F::F16C,
    F::BMI1,
    F::BMI2,
    F::ADX,
    F::LZCNT,
    F::SHA,
    F::VAES,
    F::VPCLMULQDQ,
    F::PREFETCHW,
];

/// Operands that are the system's.
const SYSTEM: &[K] = &[
    K::seg_reg,
    K::cr_reg,
    K::dr_reg,
    K::tr_reg,
    K::es,
    K::cs,
    K::ss,
    K::ds,
    K::fs,
    K::gs,
    K::farbr2_2,
    K::farbr4_2,
    K::mem_offs,
];

/// What must not run, or gives every processor's own answer, or is not there at all any more.
const LEFT_OUT: &[M] = &[
    M::Popf,
    M::Popfq,
    M::Iretq,
    M::Sgdt,
    M::Sidt,
    M::Sldt,
    M::Str,
    M::Smsw,
    M::Lar,
    M::Lsl,
    M::Verr,
    M::Verw,
    M::Lss,
    M::Lfs,
    M::Lgs,
    M::In,
    M::Out,
    M::Insb,
    M::Insw,
    M::Insd,
    M::Outsb,
    M::Outsw,
    M::Outsd,
    M::Cli,
    M::Sti,
    M::Arpl,
    M::Cpuid,
    M::Hlt,
    M::Invd,
    M::Fxsave,
    M::Fxsave64,
    M::Fxrstor,
    M::Fxrstor64,
    M::Rdtsc,
    M::Loadall,
    M::Umov,
    M::Ibts,
    M::Xbts,
    M::Fstsg,
    M::Frstpm,
    M::Fstdw,
    M::Fnstdw,
    M::Fsetpm,
    M::Fnsetpm,
    M::Reservednop,
    M::Getsec,
    M::Lmsw,
    M::Clts,
    M::Wait,
];

/// An instruction without operands, to ask about its kind.
pub(super) fn blank(code: Code) -> Instruction {
    let mut insn = Instruction::new();
    insn.set_code(code);
    insn
}

/// Whether an instruction can be tried.
pub(super) fn testable(code: Code) -> bool {
    let o = code.op_code();
    let insn = blank(code);
    o.is_instruction()
        && o.mode64()
        && !o.is_privileged()
        && matches!(o.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && code.cpuid_features().iter().all(|f| FEATURES.contains(f))
        && !o.op_kinds().iter().any(|k| SYSTEM.contains(k))
        && matches!(insn.flow_control(), FlowControl::Next | FlowControl::ConditionalBranch)
        && !LEFT_OUT.contains(&insn.mnemonic())
}
