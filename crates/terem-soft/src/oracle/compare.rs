//! What must be equal, and how a difference is told.

use std::fmt::Write as _;

use iced_x86::{CpuidFeature, Decoder, Instruction, Mnemonic, OpKind, Register};

use super::case::{CODE, Case, DATA, END, Outcome};
use super::generate::masked;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
/// Arithmetic flags and DF.
const FLAGS: u64 = 0xcd5;
/// Vector of a general protection fault.
const GENERAL_PROTECTION: u32 = 13;
/// Vector of a page fault.
const PAGE_FAULT: u32 = 14;
/// RSP's place in [`NAMES`].
const RSP: usize = 4;
/// Vector of an SSE exception.
const SIMD_EXCEPTION: u32 = 19;

/// What differs, a line each.
pub(super) fn differences(case: &Case, host: &Outcome, ours: &Outcome, strict: bool) -> Vec<String> {
    let mut out = Vec::new();
    let mut check = |what: &str, a: u64, b: u64| {
        if a != b {
            out.push(format!("{what}: host {a:#x}, ours {b:#x}"));
        }
    };
    let own = own_affairs(case, host, ours, strict);
    if own.ignore {
        return Vec::new();
    }
    if !both_sides_fault(case, host, ours) {
        check("vector", u64::from(host.vector), u64::from(ours.vector));
    }
    if host.vector == ours.vector && !both_sides_fault(case, host, ours) {
        if host.vector == PAGE_FAULT {
            // Which byte of a large operand is touched first is the processor's own affair.
            let mask = if in_pieces(case) { !0xfff } else { !0 };
            check("cr2", host.cr2 & mask, ours.cr2 & mask);
            // The kernel says "present" of all its own addresses.
            let mask = if host.cr2 >> 63 != 0 { !1 } else { !0 };
            check("error code", u64::from(host.code) & mask, u64::from(ours.code) & mask);
        }
        let end = u64::from(host.vector == END);
        check("rip", host.rip, ours.rip + end);
    }
    for (i, name) in NAMES.iter().enumerate() {
        if i == RSP
            && host.vector == SIMD_EXCEPTION
            && ours.vector == SIMD_EXCEPTION
            && writes_rsp(case, ours.rip)
        {
            continue;
        }
        let mask = if own.upper_halves { u64::from(u32::MAX) } else { u64::MAX };
        check(name, host.gpr[i] & mask, ours.gpr[i] & mask);
    }
    let mask = if strict { FLAGS } else { FLAGS & !case.undefined };
    let mask = if own.flags { 0 } else { mask };
    check("flags", host.rflags & mask, ours.rflags & mask);
    // MXCSR.MM (misaligned SSE) is the host's only: the model gives #GP.
    if fx_number(&host.fx.0, 24, 4) >> 17 & 1 != 0 {
        return Vec::new();
    }
    fx_differences(host, ours, &own, &mut check);
    for at in (0..host.data.len()).step_by(8) {
        let word = |o: &Outcome| u64::from_le_bytes(std::array::from_fn(|i| o.data[at + i]));
        check(&format!("[{:#x}]", DATA + at as u64), word(host), word(ours));
    }
    out.truncate(24);
    out
}

/// Whether the instruction at `rip` has RSP for its destination. AMD's family 17h forgets an RSP that was changed by
/// pushes and pops just before, when such a conversion raises `#XM`.
fn writes_rsp(case: &Case, rip: u64) -> bool {
    instructions(case).iter().any(|i| i.ip() == rip && i.op0_register().full_register() == Register::RSP)
}

/// Whether it is `cmps` that faults: with two bad addresses, processors differ in which one they tell of (AMD's family
/// 17h tells of the second, 1Ah of the first).
fn both_sides_fault(case: &Case, host: &Outcome, ours: &Outcome) -> bool {
    use Mnemonic as M;
    let faulted = |o: &Outcome| o.vector == PAGE_FAULT || o.vector == GENERAL_PROTECTION;
    let compares = |i: &Instruction| {
        i.is_string_instruction() && matches!(i.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq)
    };
    host.rip == ours.rip
        && faulted(host)
        && faulted(ours)
        && instructions(case).iter().any(|i| i.ip() == ours.rip && compares(i))
}

/// What of a case is each processor family's own affair.
#[derive(Default)]
struct Own {
    ignore: bool,
    flags: bool,
    x87: bool,
    /// The upper halves of general registers.
    upper_halves: bool,
    /// Vector registers (a bit each).
    vectors: u32,
}

/// When an instruction faults, the families leave different things behind: in the middle of a repeated string
/// instruction, the flags of an earlier round (AMD) or of the last (Intel), and with 32-bit addresses the registers cut to
/// 32 bits or not; of an MMX instruction, the x87 state before (AMD) or after (Intel) its change to MMX. An x87 store
/// that raises an exception which is not masked accesses memory (AMD) or does not (Intel). How far a gather has come shows in its
/// destination and mask; `strict`: as on Intel's. What a conversion raises whose store faults is raised before or after.
/// `xrstor` that faults in the middle has loaded some of its components, and some processors touch the place of one
/// that the header says is not there, or look at the header before they look whether all of the area is.
fn own_affairs(case: &Case, host: &Outcome, ours: &Outcome, strict: bool) -> Own {
    let faulted = |o: &Outcome| o.vector == PAGE_FAULT || o.vector == GENERAL_PROTECTION;
    let repeats = |i: &Instruction| i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix());
    let narrow = |i: &Instruction| i.op_kinds().any(|k| NARROW.contains(&k));
    // With a count of 0 Intel's cut the registers as well.
    let mut own =
        Own { upper_halves: instructions(case).iter().any(|i| repeats(i) && narrow(i)), ..Own::default() };
    let restores = |i: &Instruction| matches!(i.mnemonic(), Mnemonic::Xrstor | Mnemonic::Xrstor64);
    let missing =
        host.vector == PAGE_FAULT || (ours.vector == PAGE_FAULT && host.vector == GENERAL_PROTECTION);
    if missing && instructions(case).iter().any(|i| i.ip() == host.rip && restores(i)) {
        own.ignore = true;
    }
    let Some(insn) = instructions(case).into_iter().find(|i| i.ip() == ours.rip) else { return own };
    if insn.is_vsib() && ours.vector != END && !strict {
        own.vectors = 1 << insn.op0_register().number() | 1 << insn.op2_register().number();
    }
    if restores(&insn) && host.rip == ours.rip && faulted(host) {
        (own.x87, own.vectors) = (true, !0);
    }
    let both = host.vector != END && ours.vector != END && host.rip == ours.rip;
    if both && insn.mnemonic() == Mnemonic::Vcvtps2ph && insn.op0_kind() == OpKind::Memory {
        own.ignore = true;
    }
    if !faulted(ours) {
        return own;
    }
    let x87 = insn.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU387));
    let status = fx_number(&host.fx.0, 2, 2);
    own.ignore |= x87 && host.rip != ours.rip && status & 0x80 != 0;
    own.flags = repeats(&insn) && host.rip == ours.rip;
    own.x87 |= host.rip == ours.rip
        && (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_mm());
    own
}

/// Memory operands of string instructions with 32-bit addresses.
const NARROW: [OpKind; 3] = [OpKind::MemorySegESI, OpKind::MemorySegEDI, OpKind::MemoryESEDI];

/// A number in an FXSAVE area.
fn fx_number(bytes: &[u8; 512], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

fn fx_differences(host: &Outcome, ours: &Outcome, own: &Own, check: &mut impl FnMut(&str, u64, u64)) {
    let (a, b) = (&host.fx.0, &ours.fx.0);
    let number = fx_number;
    // Which flags come together with an exception that is reported depends on where in its work the
    // processor stopped: denormal and precision then are not compared.
    let flags = if host.vector == SIMD_EXCEPTION { !0x22 } else { !0 };
    check("mxcsr", number(a, 24, 4) & flags, number(b, 24, 4) & flags);
    // The last instruction's opcode and pointers (6–23) are not compared.
    for (what, at, len) in [("fcw", 0, 2), ("fsw", 2, 2), ("ftw", 4, 1)] {
        if !own.x87 {
            check(what, number(a, at, len), number(b, at, len));
        }
    }
    for i in (0..8).filter(|_| !own.x87) {
        let at = 32 + i * 16;
        check(&format!("st{i}"), number(a, at, 8), number(b, at, 8));
        check(&format!("st{i} exponent"), number(a, at + 8, 2), number(b, at + 8, 2));
    }
    for i in (0..16).filter(|i| own.vectors >> i & 1 == 0) {
        let at = 160 + i * 16;
        check(&format!("xmm{i} low"), number(a, at, 8), number(b, at, 8));
        check(&format!("xmm{i} high"), number(a, at + 8, 8), number(b, at + 8, 8));
        for (part, at) in [(2, i * 16), (3, i * 16 + 8)] {
            let word = |u: &[u8; 256]| u64::from_le_bytes(std::array::from_fn(|k| u[at + k]));
            check(&format!("ymm{i} quarter {part}"), word(&host.uppers), word(&ours.uppers));
        }
    }
}

fn instructions(case: &Case) -> Vec<Instruction> {
    Decoder::with_ip(64, &case.code[..case.len], CODE, case.decoding).iter().collect()
}

const XSAVE: [CpuidFeature; 3] = [CpuidFeature::XSAVE, CpuidFeature::XSAVEOPT, CpuidFeature::XSAVEC];

/// Whether an instruction moves memory in pieces whose order no manual tells.
fn in_pieces(case: &Case) -> bool {
    use Mnemonic as M;
    instructions(case).iter().any(|i| {
        masked(i.mnemonic())
            || i.cpuid_features().iter().any(|f| XSAVE.contains(f))
            || matches!(i.mnemonic(), M::Fldenv | M::Fnstenv | M::Fstenv | M::Frstor | M::Fnsave | M::Fsave)
    })
}

/// Whether an instruction reads flags that an earlier one left undefined, which processor families do not agree on.
pub(super) fn reads_undefined(case: &Case) -> bool {
    let mut undefined = 0;
    instructions(case).iter().any(|i| {
        let reads = i.rflags_read() & undefined != 0;
        undefined =
            undefined & !(i.rflags_written() | i.rflags_cleared() | i.rflags_set()) | i.rflags_undefined();
        reads
    })
}

/// What a failure is counted under.
pub(super) fn name(case: &Case) -> String {
    let all = instructions(case);
    match all.as_slice() {
        [one] => format!("{:?}", one.code()),
        _ => "(a sequence)".into(),
    }
}

/// A failing case in full.
pub(super) fn report(case: &Case, differences: &[String]) -> String {
    let mut text = format!("\n--- ORACLE_SEED={} ORACLE_CASES=1\n", case.seed);
    for insn in instructions(case) {
        let at = (insn.ip() - CODE) as usize;
        let bytes = &case.code[at..at + insn.len()];
        let _ = writeln!(text, "  {:#x}: {bytes:02x?} {:?} {}", insn.ip(), insn.code(), operands(&insn));
    }
    for (name, value) in NAMES.iter().zip(case.gpr) {
        let _ = write!(text, "  {name}={value:#x}");
    }
    let word = |at: usize, len: usize| {
        case.fx.0[at..at + len].iter().rev().fold(0_u64, |n, b| n << 8 | u64::from(*b))
    };
    let _ = writeln!(
        text,
        "\n  rflags={:#x} fcw={:#x} fsw={:#x} ftw={:#x} mxcsr={:#x}",
        case.rflags,
        word(0, 2),
        word(2, 2),
        word(4, 1),
        word(24, 4)
    );
    for d in differences {
        let _ = writeln!(text, "    {d}");
    }
    text
}

fn operands(insn: &Instruction) -> String {
    let mut text = String::new();
    iced_x86::FastFormatter::new().format(insn, &mut text);
    text
}
