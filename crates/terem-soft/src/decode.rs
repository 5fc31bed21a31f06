//! From bytes to [`Op`]s: `iced-x86` decodes, the instruction modules choose handlers.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register,
};
use terem_cpu::FeatureSet;

use crate::cpu::Cpu;
use crate::fault::{Exec, Fault};
use crate::op::{ADDR16, ADDR32, CHECKED, FLAT, Handler, IP_REG, NO_REG, Op, STACK16, STACK32};
use crate::{integer, sse, system, vex, x87};

/// Operand and address size that code has by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeSize {
    /// Real mode, virtual-8086 mode, and 16-bit protected mode.
    Code16,
    /// 32-bit protected and compatibility mode.
    Code32,
    /// 64-bit mode.
    Code64,
}

/// What the control registers say about floating-point and vector instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// They execute.
    On,
    /// `#NM`: the state belongs to somebody else (CR0.TS), or x87 is emulated (CR0.EM).
    NotAvailable,
    /// `#UD`: the operating system has not enabled them.
    Undefined,
}

/// Everything outside the bytes that decides what an instruction means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode {
    /// Default sizes.
    pub code: CodeSize,
    /// Whether SS.B says that pushes use ESP (outside 64-bit mode).
    pub stack32: bool,
    /// SSE and later.
    pub sse: Unit,
    /// AVX and what else is encoded with VEX and uses vectors.
    pub avx: Unit,
    /// x87.
    pub x87: Unit,
    /// MMX.
    pub mmx: Unit,
    /// Whether `fwait` gives `#NM` (CR0.MP and TS).
    pub wait: Unit,
    /// One instruction a block (single stepping).
    pub single: bool,
}

impl Mode {
    /// Real mode with everything on.
    pub(crate) const REAL: Self = Self {
        code: CodeSize::Code16,
        stack32: false,
        sse: Unit::On,
        avx: Unit::Undefined,
        x87: Unit::On,
        mmx: Unit::On,
        wait: Unit::On,
        single: false,
    };

    /// All of it in a few bits, as part of a block's key.
    #[must_use]
    pub fn key(self) -> u32 {
        let Self { code, stack32, sse, avx, x87, mmx, wait, single } = self;
        code as u32
            | u32::from(stack32) << 2
            | (sse as u32) << 3
            | (x87 as u32) << 5
            | (mmx as u32) << 7
            | (wait as u32) << 9
            | u32::from(single) << 11
            | (avx as u32) << 12
    }

    fn bits(self) -> u32 {
        match self.code {
            CodeSize::Code16 => 16,
            CodeSize::Code32 => 32,
            CodeSize::Code64 => 64,
        }
    }
}

/// Which instructions a CPU model has.
#[derive(Debug, Clone)]
pub struct InstructionSet {
    allowed: Vec<bool>,
    options: u32,
}

impl InstructionSet {
    /// The instructions that a model with `features` has.
    #[must_use]
    pub fn new(features: &FeatureSet) -> Self {
        use CpuidFeature as F;
        let mut set =
            Self { allowed: vec![false; CpuidFeature::values().len()], options: DecoderOptions::NONE };
        let always = [
            F::INTEL8086,
            F::INTEL186,
            F::INTEL286,
            F::INTEL386,
            F::INTEL486,
            F::INTEL8086_ONLY,
            F::X64,
            F::CPUID,
            F::FPU,
            F::FPU287,
            F::FPU387,
            F::MULTIBYTENOP,
            F::PAUSE,
            F::RDPMC,
            F::SMM,
            F::INTEL286_ONLY,
            F::INTEL386_ONLY,
            F::CET_IBT,
            F::PREFETCHW,
            F::PREFETCHWT1,
            F::CX8,
            F::TSC,
            F::MSR,
        ];
        for f in always {
            set.allowed[f as usize] = true;
        }
        let named: &[(&str, &[CpuidFeature])] = &[
            ("cmov", &[F::CMOV]),
            ("mmx", &[F::MMX]),
            ("fxsr", &[F::FXSR]),
            ("sse", &[F::SSE]),
            ("sse2", &[F::SSE2]),
            ("sse3", &[F::SSE3]),
            ("ssse3", &[F::SSSE3]),
            ("sse4.1", &[F::SSE4_1]),
            ("sse4.2", &[F::SSE4_2]),
            ("popcnt", &[F::POPCNT]),
            ("aes", &[F::AES]),
            ("pclmulqdq", &[F::PCLMULQDQ]),
            ("movbe", &[F::MOVBE]),
            ("cx16", &[F::CMPXCHG16B]),
            ("sep", &[F::SEP]),
            ("syscall", &[F::SYSCALL]),
            ("rdtscp", &[F::RDTSCP]),
            ("rdpid", &[F::RDPID]),
            ("fsgsbase", &[F::FSGSBASE]),
            ("clflush", &[F::CLFSH]),
            ("clflushopt", &[F::CLFLUSHOPT]),
            ("clwb", &[F::CLWB]),
            ("xsave", &[F::XSAVE]),
            ("xsaveopt", &[F::XSAVEOPT]),
            ("rdrand", &[F::RDRAND]),
            ("rdseed", &[F::RDSEED]),
            ("smap", &[F::SMAP]),
            ("invpcid", &[F::INVPCID]),
            ("abm", &[F::LZCNT]),
            ("pku", &[F::PKU]),
            ("xsavec", &[F::XSAVEC]),
            ("xsaves", &[F::XSAVES]),
            ("monitor", &[F::MONITOR]),
        ];
        for (name, codes) in named.iter().chain(&vex::FEATURES) {
            if features.has(name) {
                for &f in *codes {
                    set.allowed[f as usize] = true;
                }
            }
        }
        // Without BMI1 and ABM, F3 before bsf and bsr means nothing.
        if !features.has("bmi1") {
            set.options |= DecoderOptions::NO_MPFX_0FBC;
        }
        if !features.has("abm") {
            set.options |= DecoderOptions::NO_MPFX_0FBD;
        }
        set
    }

    /// Options of the decoder.
    #[cfg(test)]
    pub(crate) fn options(&self) -> u32 {
        self.options
    }

    pub(crate) fn has(&self, code: Code) -> bool {
        code.cpuid_features().iter().all(|&f| self.allowed[f as usize])
    }
}

/// The number (0–15) of a general, segment, XMM, MMX, x87, control or debug register.
#[must_use]
pub fn gpr_number(register: Register) -> u8 {
    let n = register.number() as u8;
    // iced numbers AL CL DL BL SPL BPL SIL DIL R8L…, with AH CH DH BH counted in between as 4–7.
    if register.is_gpr8() && !is_high_byte(register) {
        return register.full_register().number() as u8;
    }
    if is_high_byte(register) { register as u8 - Register::AH as u8 + 4 } else { n }
}

/// Whether it is AH, CH, DH or BH.
#[must_use]
pub fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// A segment register's index in [`terem_cpu::VcpuState::segments`].
#[must_use]
pub fn segment_number(register: Register) -> u8 {
    match register {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::DS => 3,
        Register::FS => 4,
        Register::GS => 5,
        _ => FLAT,
    }
}

/// The instruction's address size flag and its memory operand, filled into `op`.
fn memory_operand(insn: &Instruction, mode: Mode, op: &mut Op) {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let size = if base != Register::None {
        base.size()
    } else if index != Register::None {
        index.size()
    } else {
        match insn.memory_displ_size() {
            8 => 8,
            4 if mode.code != CodeSize::Code64 => 4,
            2 => 2,
            _ => 8, // 64-bit mode, displacement only: already cut or extended as it should be
        }
    };
    op.flags |= address_flag(size);
    let slot = |r: Register| match r {
        Register::None => NO_REG,
        Register::RIP | Register::EIP => IP_REG,
        r => gpr_number(r),
    };
    (op.base, op.index) = (slot(base), slot(index));
    op.shift = insn.memory_index_scale().trailing_zeros() as u8;
    op.disp = insn.memory_displacement64();
    op.segment = operand_segment(insn, mode);
}

/// The memory operand's segment. In 64-bit mode prefixes for ES, CS, SS and DS mean nothing, so that whether
/// a bad address is `#SS` or `#GP` depends on the base register only.
fn operand_segment(insn: &Instruction, mode: Mode) -> u8 {
    if mode.code != CodeSize::Code64 || matches!(insn.memory_segment(), Register::FS | Register::GS) {
        return segment_number(insn.memory_segment());
    }
    let on_stack =
        matches!(insn.memory_base(), Register::RSP | Register::RBP | Register::ESP | Register::EBP);
    segment_number(if on_stack { Register::SS } else { Register::DS })
}

fn address_flag(bytes: usize) -> u8 {
    match bytes {
        2 => ADDR16,
        4 => ADDR32,
        _ => 0,
    }
}

/// A decoded instruction, for the interpreter and as iced has it.
pub(crate) struct Decoded {
    pub(crate) op: Op,
    pub(crate) insn: Instruction,
    /// Nothing can be said about what comes after it.
    pub(crate) last: bool,
    /// It exists, and its unit is on.
    pub(crate) known: bool,
}

/// Decodes the instruction at `bytes`, `offset` bytes after the block's start. `None`: the bytes end
/// before it does.
pub(crate) fn decode(bytes: &[u8], offset: u16, mode: Mode, set: &InstructionSet) -> Option<(Op, bool)> {
    decode_both(bytes, offset, mode, set).map(|d| (d.op, d.last))
}

/// [`decode`], with what iced says of it.
pub(crate) fn decode_both(bytes: &[u8], offset: u16, mode: Mode, set: &InstructionSet) -> Option<Decoded> {
    let mut decoder = Decoder::with_ip(mode.bits(), bytes, u64::from(offset), set.options);
    let insn = decoder.decode();
    if insn.is_invalid() && decoder.last_error() == iced_x86::DecoderError::NoMoreBytes {
        return None;
    }
    let len = if insn.is_invalid() { 1 } else { insn.len() as u8 };
    let mut op = Op {
        run: undefined,
        imm: 0,
        disp: 0,
        base: NO_REG,
        index: NO_REG,
        shift: 0,
        segment: FLAT,
        reg: 0,
        rm: 0,
        len,
        flags: if mode.code == CodeSize::Code64 { 0 } else { CHECKED },
        next: offset + u16::from(len),
        extra: 0,
    };
    if mode.code != CodeSize::Code64 {
        op.flags |= if mode.stack32 { STACK32 } else { STACK16 };
    }
    if insn.is_invalid() {
        return Some(Decoded { op, insn, last: true, known: false });
    }
    operands(&insn, mode, &mut op);
    let off = unit(&insn, mode);
    let available = off.is_none();
    let found = off.or_else(|| {
        if !set.has(insn.code()) {
            return None;
        }
        integer::handler(&insn, mode, &mut op)
            .or_else(|| sse::handler(&insn, mode, &mut op))
            .or_else(|| vex::handler(&insn, mode, &mut op))
            .or_else(|| x87::handler(&insn, mode, &mut op))
            .or_else(|| system::handler(&insn, mode, &mut op))
    });
    op.run = found.unwrap_or(undefined);
    Some(Decoded {
        op,
        insn,
        last: found.is_none() || ends_block(&insn),
        known: available && found.is_some(),
    })
}

fn operands(insn: &Instruction, mode: Mode, op: &mut Op) {
    let (mut registers, mut memory) = (0, false);
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            OpKind::Register => {
                let n = gpr_number(insn.op_register(i));
                match registers {
                    0 => op.reg = n,
                    1 => op.rm = n,
                    _ => {}
                }
                registers += 1;
            }
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                op.imm = insn.near_branch_target();
            }
            OpKind::FarBranch16 | OpKind::FarBranch32 => {}
            OpKind::Memory => memory = true,
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => op.flags |= ADDR16,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => op.flags |= ADDR32,
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => {}
            // enter and extrq have a second immediate; their handlers take it from the instruction.
            _ if op.imm == 0 => op.imm = insn.immediate(i),
            _ => {}
        }
    }
    if memory {
        memory_operand(insn, mode, op);
    } else if insn.is_string_instruction() || insn.memory_segment() != Register::None {
        op.segment = operand_segment(insn, mode);
    }
}

/// `#NM` or `#UD` for units that are switched off.
fn unit(insn: &Instruction, mode: Mode) -> Option<Handler> {
    let features = insn.cpuid_features();
    let has = |f: &[CpuidFeature]| features.iter().any(|x| f.contains(x));
    use CpuidFeature as F;
    let state = match insn.mnemonic() {
        _ if vex::uses_avx_state(insn) => mode.avx,
        Mnemonic::Wait => mode.wait,
        Mnemonic::Fxsave | Mnemonic::Fxrstor | Mnemonic::Fxsave64 | Mnemonic::Fxrstor64 => match mode.x87 {
            Unit::On => return None,
            other => other,
        },
        Mnemonic::Crc32 | Mnemonic::Popcnt | Mnemonic::Movnti | Mnemonic::Lfence | Mnemonic::Mfence => {
            return None;
        }
        Mnemonic::Sfence | Mnemonic::Pause | Mnemonic::Prefetchnta | Mnemonic::Prefetcht0 => return None,
        Mnemonic::Prefetcht1 | Mnemonic::Prefetcht2 | Mnemonic::Clflush => return None,
        _ if insn.is_string_instruction() => return None,
        _ if has(&[F::FPU, F::FPU287, F::FPU387]) => mode.x87,
        _ if (0..insn.op_count())
            .any(|i| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_mm())
            || insn.mnemonic() == Mnemonic::Emms =>
        {
            mode.mmx
        }
        _ if has(&[
            F::SSE,
            F::SSE2,
            F::SSE3,
            F::SSSE3,
            F::SSE4_1,
            F::SSE4_2,
            F::AES,
            F::PCLMULQDQ,
            F::SHA,
        ]) =>
        {
            mode.sse
        }
        _ => return None,
    };
    match state {
        Unit::On => None,
        Unit::NotAvailable => Some(not_available),
        Unit::Undefined => Some(undefined),
    }
}

/// Whether nothing can be said about what comes after it.
fn ends_block(insn: &Instruction) -> bool {
    if !matches!(insn.flow_control(), FlowControl::Next) {
        return true;
    }
    let rep = insn.has_rep_prefix() || insn.has_repne_prefix();
    if insn.is_string_instruction() && rep {
        return true;
    }
    let writes_segment = insn.op_count() > 0
        && insn.op0_kind() == OpKind::Register
        && (insn.op0_register().is_segment_register()
            || insn.op0_register().is_cr()
            || insn.op0_register().is_dr());
    writes_segment
        || matches!(
            insn.mnemonic(),
            Mnemonic::Popf
                | Mnemonic::Popfd
                | Mnemonic::Popfq
                | Mnemonic::Sti
                | Mnemonic::Hlt
                | Mnemonic::Mwait
                | Mnemonic::Wrmsr
                | Mnemonic::Lmsw
                | Mnemonic::Clts
                | Mnemonic::Stac
                | Mnemonic::Clac
                | Mnemonic::Lgdt
                | Mnemonic::Lidt
                | Mnemonic::Lldt
                | Mnemonic::Ltr
                | Mnemonic::Invlpg
                | Mnemonic::Invpcid
                | Mnemonic::Wbinvd
                | Mnemonic::Invd
                | Mnemonic::Xsetbv
                | Mnemonic::Swapgs
                | Mnemonic::Wrfsbase
                | Mnemonic::Wrgsbase
                | Mnemonic::Cpuid
                | Mnemonic::Lss
                | Mnemonic::Lds
                | Mnemonic::Les
                | Mnemonic::Lfs
                | Mnemonic::Lgs
        )
}

fn undefined(_: &mut Cpu, _: &Op) -> Exec {
    Err(Fault::UD)
}

fn not_available(_: &mut Cpu, _: &Op) -> Exec {
    Err(Fault::NM)
}
