//! What a run of guest code needs: which instructions can be executed as they are, and whose flags are looked at.

use iced_x86::{
    Code, CpuidFeature, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register, RflagsBits,
};

use crate::decode::{InstructionSet, Mode, decode_both};
use crate::op::Op;
use crate::vex;

/// Instructions in a translation, at most.
const MAX_ITEMS: usize = 64;
/// All arithmetic flags, as iced has them.
pub(super) const ALL_FLAGS: u32 =
    RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;

/// How an instruction is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Nothing happens.
    Nothing,
    /// Executed as it is, its memory operand replaced.
    Direct,
    /// `lea`.
    Address,
    Push,
    Pop,
    Leave,
    PushFlags,
    SetIf,
    ClearIf,
    SwapGs,
    SetAc,
    ClearAc,
    /// Unsigned or signed division by a register, unless it would fault.
    Divide {
        signed: bool,
    },
    JumpIf,
    Jump,
    Call,
    JumpTo,
    CallTo,
    Return,
    /// The interpreter's handler is called; `ends`: it goes elsewhere for certain.
    Handler {
        ends: bool,
    },
}

/// The memory operand of a direct instruction.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    pub(super) size: u8,
    pub(super) write: bool,
    /// It must lie at a multiple of its size.
    pub(super) aligned: bool,
}

impl Memory {
    /// Bits that must be 0 in the address.
    pub(super) fn mask(self) -> u8 {
        if self.aligned { self.size - 1 } else { 0 }
    }
}

/// One instruction of a translation.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) insn: Instruction,
    pub(super) op: Op,
    pub(super) kind: Kind,
    pub(super) memory: Option<Memory>,
    /// It uses XMM registers.
    pub(super) vector: bool,
    /// Arithmetic flags that it reads.
    pub(super) reads: u32,
    /// Arithmetic flags that it changes or leaves undefined.
    pub(super) writes: u32,
    /// General registers that it changes (a bit each).
    pub(super) changes: u32,
    /// Whether the flags as they are after it are looked at by anybody.
    pub(super) observed_after: bool,
    /// The way that is not followed kills all flags before anybody looks (for conditional jumps).
    pub(super) taken_kills: bool,
}

impl Item {
    /// It changes all arithmetic flags, whatever its operands are.
    pub(super) fn sets_all(&self) -> bool {
        self.writes == ALL_FLAGS && !counts_by_register(&self.insn)
    }

    /// Nothing comes after it in a translation. (What a call on this page comes back to does.)
    pub(super) fn ends(&self) -> bool {
        match self.kind {
            Kind::Jump | Kind::JumpTo | Kind::Return | Kind::Handler { ends: true } => true,
            Kind::Call | Kind::CallTo => self.next() >= 0x1000,
            _ => false,
        }
    }

    /// Somebody may look at the flags while it executes: it may fault, or be left to the interpreter.
    fn looks(&self) -> bool {
        self.memory.is_some()
            || self.vector
            || !matches!(self.kind, Kind::Nothing | Kind::Direct | Kind::Address)
    }

    /// Page offset of the next instruction.
    pub(super) fn next(&self) -> u16 {
        self.op.next
    }

    /// Page offset of the instruction.
    pub(super) fn start(&self) -> u16 {
        self.op.next - u16::from(self.op.len)
    }
}

/// Shifts by CL change no flags if CL is 0.
fn counts_by_register(insn: &Instruction) -> bool {
    let last = insn.op_count().wrapping_sub(1);
    matches!(
        insn.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    ) && (insn.op_kind(last) == OpKind::Register || insn.immediate8() & 0x1f == 0)
}

/// A translation's instructions, and whether they end before one that goes on to the next page; decoded from `bytes`, the rest of the page from offset `start` on (with the beginning
/// of the next page behind it if `straddles`: then there is one instruction only).
pub(super) fn analyse(
    bytes: &[u8],
    start: u16,
    mode: Mode,
    set: &InstructionSet,
    straddles: bool,
) -> (Vec<Item>, bool) {
    let mut info = InstructionInfoFactory::new();
    let (mut items, cut) = run_of(bytes, start, mode, set, &mut info, if straddles { 1 } else { MAX_ITEMS });
    let mut observed = true;
    for i in (0..items.len()).rev() {
        if items[i].kind == Kind::JumpIf && !straddles {
            items[i].taken_kills = target_kills(&items[i], bytes, start, mode, set, &mut info);
            observed |= !items[i].taken_kills;
        }
        items[i].observed_after = observed;
        let item = &items[i];
        let looks = item.looks() && item.kind != Kind::JumpIf;
        observed = looks || item.reads != 0 || (observed && !item.sets_all());
    }
    (items, cut && !straddles)
}

fn run_of(
    bytes: &[u8],
    start: u16,
    mode: Mode,
    set: &InstructionSet,
    info: &mut InstructionInfoFactory,
    most: usize,
) -> (Vec<Item>, bool) {
    let mut items = Vec::with_capacity(most.min(24));
    let mut at = 0_usize;
    while items.len() < most {
        let Some(d) = decode_both(&bytes[at..], start + at as u16, mode, set) else {
            return (items, usize::from(start) + at < 0x1000);
        };
        at += usize::from(d.op.len);
        let item = classify(d.insn, d.op, d.known, info);
        let ends = matches!(
            item.kind,
            Kind::Jump
                | Kind::Call
                | Kind::JumpTo
                | Kind::CallTo
                | Kind::Return
                | Kind::Handler { ends: true }
        );
        items.push(item);
        if ends {
            break;
        }
    }
    (items, false)
}

/// Whether the code that a conditional jump leads to sets all flags before anybody looks at them.
fn target_kills(
    jump: &Item,
    bytes: &[u8],
    start: u16,
    mode: Mode,
    set: &InstructionSet,
    info: &mut InstructionInfoFactory,
) -> bool {
    let target = jump.insn.near_branch_target();
    let Some(at) = target.checked_sub(u64::from(start)) else { return false };
    let Some(bytes) = bytes.get(at as usize..) else { return false };
    for item in run_of(bytes, target as u16, mode, set, info, 3).0 {
        if item.looks() || item.reads != 0 {
            return false;
        }
        if item.sets_all() {
            return true;
        }
    }
    false
}

fn classify(insn: Instruction, op: Op, known: bool, info: &mut InstructionInfoFactory) -> Item {
    let mut item = Item {
        insn,
        op,
        kind: Kind::Handler { ends: false },
        memory: None,
        vector: false,
        reads: ALL_FLAGS,
        writes: ALL_FLAGS,
        changes: u32::MAX,
        observed_after: true,
        taken_kills: false,
    };
    if !known {
        item.kind = Kind::Handler { ends: true };
        return item;
    }
    let kind = kind_of(&insn);
    if let Kind::Handler { .. } = kind {
        item.kind = kind;
        return item;
    }
    let used = info.info(&insn);
    item.changes = 0;
    for r in used.used_registers() {
        let changed = !matches!(r.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
        if changed && r.register().is_gpr() {
            item.changes |= 1 << r.register().full_register().number();
        }
    }
    // Conversions from memory to general registers use MXCSR, if no XMM register.
    item.vector = direct_vector(&insn)
        && !matches!(
            insn.mnemonic(),
            Mnemonic::Movnti | Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence
        );
    item.reads = insn.rflags_read() & ALL_FLAGS;
    item.writes = insn.rflags_modified() & ALL_FLAGS;
    if matches!(insn.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
        // iced takes rounds of 9 or 17 for nothing at all, but OF changes.
        item.writes |= RflagsBits::CF | RflagsBits::OF;
    }
    if kind == Kind::Direct
        && let [memory] = used.used_memory()
    {
        let write = !matches!(memory.access(), OpAccess::Read | OpAccess::CondRead);
        let size = memory.memory_size().size();
        if !matches!(size, 1 | 2 | 4 | 8 | 16 | 32)
            || i32::try_from(insn.memory_displacement64() as i64).is_err()
        {
            return Item { kind: Kind::Handler { ends: false }, changes: u32::MAX, ..item };
        }
        item.memory = Some(Memory { size: size as u8, write, aligned: size >= 16 && must_align(&insn) });
    } else if kind == Kind::Direct && !used.used_memory().is_empty() {
        return Item { kind: Kind::Handler { ends: false }, changes: u32::MAX, ..item };
    }
    item.kind = kind;
    if matches!(kind, Kind::Divide { .. }) {
        item.writes = ALL_FLAGS;
    }
    item
}

fn must_align(insn: &Instruction) -> bool {
    use Mnemonic as M;
    if vex::is_vex(insn) {
        return vex::must_align(insn);
    }
    !matches!(
        insn.mnemonic(),
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestrm
            | M::Pcmpistri
            | M::Pcmpistrm
    )
}

fn gpr(insn: &Instruction, n: u32) -> bool {
    insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_gpr()
}

fn kind_of(insn: &Instruction) -> Kind {
    use Mnemonic as M;
    let handler = Kind::Handler { ends: insn.flow_control() != FlowControl::Next };
    match insn.flow_control() {
        FlowControl::Next => {}
        FlowControl::ConditionalBranch if insn.is_jcc_short_or_near() => return Kind::JumpIf,
        FlowControl::UnconditionalBranch if insn.op0_kind() == OpKind::NearBranch64 => return Kind::Jump,
        FlowControl::Call if insn.code() == Code::Call_rel32_64 => return Kind::Call,
        FlowControl::IndirectBranch if insn.code() == Code::Jmp_rm64 => return Kind::JumpTo,
        FlowControl::IndirectCall if insn.code() == Code::Call_rm64 => {
            let stack = insn.op0_kind() == OpKind::Register && insn.op0_register() == Register::RSP;
            return if stack { handler } else { Kind::CallTo };
        }
        FlowControl::Return if matches!(insn.code(), Code::Retnq | Code::Retnq_imm16) => return Kind::Return,
        _ => return handler,
    }
    match insn.mnemonic() {
        M::Nop | M::Endbr64 | M::Endbr32 | M::Prefetchw | M::Prefetchwt1 => return Kind::Nothing,
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 => return Kind::Nothing,
        M::Lea => {
            let fits = i32::try_from(insn.memory_displacement64() as i64).is_ok();
            return if fits && insn.op0_register().size() >= 4 { Kind::Address } else { handler };
        }
        M::Push if matches!(insn.code(), Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32) => {
            return Kind::Push;
        }
        M::Pop if insn.code() == Code::Pop_r64 => return Kind::Pop,
        M::Leave if insn.code() == Code::Leaveq => return Kind::Leave,
        M::Pushfq => return Kind::PushFlags,
        M::Sti => return Kind::SetIf,
        M::Cli => return Kind::ClearIf,
        M::Swapgs => return Kind::SwapGs,
        M::Stac => return Kind::SetAc,
        M::Clac => return Kind::ClearAc,
        M::Div if gpr(insn, 0) && insn.op0_register().size() >= 4 => return Kind::Divide { signed: false },
        M::Idiv if gpr(insn, 0) && insn.op0_register().size() >= 4 => return Kind::Divide { signed: true },
        M::Bt | M::Btc | M::Btr | M::Bts => {
            let far = insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register;
            return if far { handler } else { Kind::Direct };
        }
        M::Mov => {
            let plain = (0..2).all(|n| insn.op_kind(n) != OpKind::Register || insn.op_register(n).is_gpr());
            return if plain { Kind::Direct } else { handler };
        }
        M::Movzx | M::Movsx | M::Movsxd | M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor => {}
        M::Cmp | M::Test | M::Inc | M::Dec | M::Neg | M::Not | M::Shl | M::Sal | M::Shr | M::Sar | M::Rol => {
        }
        M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd | M::Imul | M::Mul | M::Bsf | M::Bsr | M::Bswap => {}
        M::Xchg | M::Xadd | M::Cmpxchg | M::Cmpxchg8b | M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq => {}
        M::Cqo | M::Lahf | M::Sahf | M::Stc | M::Clc | M::Cmc => {}
        M::Popcnt | M::Lzcnt | M::Tzcnt | M::Movbe | M::Crc32 if host_has(insn.mnemonic()) => {}
        M::Movnti | M::Lfence | M::Mfence | M::Sfence => {}
        M::Cmova
        | M::Cmovae
        | M::Cmovb
        | M::Cmovbe
        | M::Cmove
        | M::Cmovg
        | M::Cmovge
        | M::Cmovl
        | M::Cmovle => {}
        M::Cmovne | M::Cmovno | M::Cmovnp | M::Cmovns | M::Cmovo | M::Cmovp | M::Cmovs => {}
        M::Seta | M::Setae | M::Setb | M::Setbe | M::Sete | M::Setg | M::Setge | M::Setl | M::Setle => {}
        M::Setne | M::Setno | M::Setnp | M::Setns | M::Seto | M::Setp | M::Sets => {}
        _ if vex::on_general(insn) => {}
        _ => return if direct_vector(insn) { Kind::Direct } else { handler },
    }
    Kind::Direct
}

/// Whether the host has an instruction that the interpreter can do without it.
fn host_has(mnemonic: Mnemonic) -> bool {
    match mnemonic {
        Mnemonic::Popcnt => is_x86_feature_detected!("popcnt"),
        Mnemonic::Lzcnt => is_x86_feature_detected!("lzcnt"),
        Mnemonic::Tzcnt => is_x86_feature_detected!("bmi1"),
        Mnemonic::Movbe => is_x86_feature_detected!("movbe"),
        _ => is_x86_feature_detected!("sse4.2"),
    }
}

/// Whether it is a vector instruction that executes as it is.
fn direct_vector(insn: &Instruction) -> bool {
    use CpuidFeature as F;
    use Mnemonic as M;
    let features = insn.cpuid_features();
    let known = [F::SSE, F::SSE2, F::SSE3, F::SSSE3, F::SSE4_1, F::SSE4_2, F::AES, F::PCLMULQDQ];
    let newer = [F::SHA, F::AVX, F::AVX2, F::FMA, F::F16C, F::VAES, F::VPCLMULQDQ];
    let ours = !features.is_empty() && features.iter().all(|f| known.contains(f) || newer.contains(f));
    let other = matches!(
        insn.mnemonic(),
        M::Ldmxcsr
            | M::Stmxcsr
            | M::Maskmovdqu
            | M::Maskmovq
            | M::Monitor
            | M::Mwait
            | M::Clflush
            | M::Pause
            | M::Fisttp
    );
    let plain = (0..insn.op_count()).all(|n| {
        let kind = insn.op_kind(n);
        kind != OpKind::Register || {
            let r = insn.op_register(n);
            r.is_xmm() || r.is_ymm() || r.is_gpr()
        }
    });
    let all = matches!(insn.mnemonic(), M::Vzeroupper | M::Vzeroall);
    ours && !other && plain && (all || !vex::by_hand(insn))
}
