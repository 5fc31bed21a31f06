//! Random instructions with operands that mostly make sense.
//!
//! Opcodes come from iced's tables; the rest of the encoding is random bytes, which are decoded again to
//! see what they mean. Registers that address memory then get values that lead to the data pages.

use iced_x86::{
    Code, Decoder, EncodingKind, FlowControl, Instruction, MandatoryPrefix, Mnemonic, OpCodeInfo,
    OpCodeOperandKind, OpCodeTableKind, OpKind, Register,
};

use super::case::{CODE, CODE_LEN, Case, DATA, DATA_LEN, FxArea, READ_ONLY, Random, Uppers, fill, value};
use super::testable::{blank, testable};
use crate::decode::{InstructionSet, gpr_number};

/// What may be tried.
pub(super) struct Generator {
    codes: Vec<Code>,
    /// Whether a code is among them.
    known: Vec<bool>,
    /// Options of the decoder, as the model has it.
    decoding: u32,
}

/// Longest sequence.
const MAX_SEQUENCE: usize = 6;
const ARITHMETIC: u64 = 0x8d5;

impl Generator {
    /// Instructions of the set whose name `wanted` accepts.
    pub(super) fn new(set: &InstructionSet, wanted: impl Fn(&str) -> bool) -> Self {
        let known = |c: &Code| set.has(*c) && testable(*c);
        let codes: Vec<Code> =
            Code::values().filter(|c| known(c) && wanted(&format!("{c:?}").to_lowercase())).collect();
        assert!(!codes.is_empty(), "no instruction has such a name");
        let mut known = vec![false; Code::values().len()];
        codes.iter().for_each(|c| known[*c as usize] = true);
        Self { codes, known, decoding: set.options() }
    }

    /// How many forms of instructions there are.
    pub(super) fn forms(&self) -> usize {
        self.codes.len()
    }

    /// A case from a seed.
    pub(super) fn case(&self, seed: u64) -> Case {
        let mut r = Random::new(seed);
        let mut case = Case {
            seed,
            code: [0xcc; CODE_LEN],
            len: 0,
            decoding: self.decoding,
            gpr: std::array::from_fn(|_| value(&mut r)),
            rflags: r.next() & (ARITHMETIC | if r.chance(25) { 0x400 } else { 0 }) | 0x202,
            fx: fx_area(&mut r),
            uppers: uppers(&mut r),
            present: 7,
            undefined: 0,
        };
        for reg in &mut case.gpr {
            if r.chance(20) {
                *reg = pointer(&mut r, 64);
            }
        }
        // The stack, mostly in the middle of the pages.
        case.gpr[4] = if r.chance(90) { DATA + 0x800 + (r.next() & 0xfff) } else { pointer(&mut r, 8) };
        if r.chance(80) {
            case.gpr[4] &= !7;
        }
        let count = if r.chance(70) { 1 } else { 1 + r.below(MAX_SEQUENCE) };
        let mut starts = Vec::new();
        for _ in 0..count {
            let Some((bytes, insn)) = self.instruction(&mut r, CODE + case.len as u64) else { continue };
            if !starts.is_empty() && only_first(insn.mnemonic()) {
                continue;
            }
            if case.len + bytes.len() + 16 > CODE_LEN {
                break;
            }
            starts.push((case.len, insn));
            case.code[case.len..case.len + bytes.len()].copy_from_slice(&bytes);
            case.len += bytes.len();
            // Later instructions find registers as earlier ones leave them; only the first is sure.
            aim(&insn, &mut case, &mut r);
            case.undefined |= undefined_flags(&insn);
            if matches!(insn.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu) {
                break; // nothing after it may aim its register elsewhere
            }
        }
        join_branches(&mut case, &starts, &mut r);
        case
    }

    fn instruction(&self, r: &mut Random, ip: u64) -> Option<(Vec<u8>, Instruction)> {
        for _ in 0..50 {
            let code = r.pick(&self.codes);
            let bytes = encode(code, r);
            let mut decoder = Decoder::with_ip(64, &bytes, ip, self.decoding);
            let insn = decoder.decode();
            if insn.is_invalid() || !self.known[insn.code() as usize] {
                // An instruction that does not exist is worth a try now and then, if it is a known one
                // with a prefix or operand that it must not have.
                if !(insn.is_invalid() && r.chance(2) && bytes.contains(&0xf0)) {
                    continue;
                }
                return None;
            }
            if matches!(insn.segment_prefix(), Register::FS | Register::GS)
                || differs_by_vendor(&insn, &bytes)
            {
                continue;
            }
            let mut bytes = bytes[..insn.len()].to_vec();
            let places = decoder.get_constant_offsets(&insn);
            let absolute = insn.memory_base() == Register::None && insn.memory_index() == Register::None;
            if (insn.is_ip_rel_memory_operand() || absolute)
                && places.has_displacement()
                && places.displacement_size() == 4
                && r.chance(95)
            {
                let target = pointer(r, 16);
                let from = if absolute { 0 } else { ip + bytes.len() as u64 };
                let at = places.displacement_offset();
                bytes[at..at + 4].copy_from_slice(&(target.wrapping_sub(from) as u32).to_le_bytes());
            }
            let insn = Decoder::with_ip(64, &bytes, ip, self.decoding).decode();
            return Some((bytes, insn));
        }
        None
    }
}

/// An address in the data pages, mostly one with `room` bytes after it.
fn pointer(r: &mut Random, room: u64) -> u64 {
    let end = DATA + DATA_LEN as u64;
    match r.below(40) {
        0 => end - r.next() % 64,
        1 => DATA + 0x1000 - r.next() % 32,
        2 => DATA + r.next() % 16,
        3 => READ_ONLY + (r.next() & 0xff0),
        4 => DATA.wrapping_sub(r.next() % 32),
        n => {
            let at = DATA + r.next() % (DATA_LEN as u64 - room);
            if n < 25 { at & !15 } else { at }
        }
    }
}

/// x87, MMX and SSE state: any values, mostly masked exceptions.
pub(super) fn fx_area(r: &mut Random) -> FxArea {
    let mut fx = FxArea([0; 512]);
    fill(r.next(), &mut fx.0[32..416]);
    let precision = r.pick(&[0x300_u16, 0x300, 0x300, 0x200, 0]);
    let rounding = (r.next() as u16 & 3) << 10;
    let masks = if r.chance(85) { 0x3f } else { r.next() as u16 & 0x3f };
    let control = precision | rounding | masks | 0x40;
    let top = if r.chance(50) { 0 } else { r.next() as u16 & 7 };
    let mut status = top << 11 | (r.next() as u16 & 0x4700);
    if r.chance(10) {
        // Flags of exceptions that are masked only, so that none waits.
        status |= r.next() as u16 & masks & 0x3f;
    }
    fx.0[0..2].copy_from_slice(&control.to_le_bytes());
    fx.0[2..4].copy_from_slice(&status.to_le_bytes());
    fx.0[4] = if r.chance(50) { 0xff } else { r.next() as u8 };
    for i in 0..8 {
        let at = 32 + i * 16;
        fx.0[at + 10..at + 16].fill(0);
        if r.chance(80) {
            // Extended precision numbers of many kinds.
            let exponent = match r.below(8) {
                0 => 0,
                1 => 0x7fff,
                2 => 1,
                3 => r.next() as u16 & 0x7fff,
                _ => 0x3fff + (r.next() as u16 & 63) - 32,
            } | r.next() as u16 & 0x8000;
            fx.0[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
            if r.chance(90) {
                fx.0[at + 7] |= 0x80;
            }
            if r.chance(20) {
                fx.0[at..at + 7].fill(0);
                fx.0[at + 7] &= 0xc0;
            }
        }
    }
    let masks = if r.chance(85) { 0x1f80 } else { (r.next() as u32 & 0x3f) << 7 };
    let mut mxcsr = masks | (r.next() as u32 & 3) << 13;
    if r.chance(20) {
        mxcsr |= r.next() as u32 & 0x8040; // flush to zero, denormals are zero
    }
    if r.chance(20) {
        mxcsr |= r.next() as u32 & 0x3f;
    }
    fx.0[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    fx
}

/// Upper halves of YMM registers: any values, or nothing as programs mostly leave them.
fn uppers(r: &mut Random) -> Uppers {
    let mut uppers = [0; 256];
    if r.chance(75) {
        fill(r.next(), &mut uppers);
    }
    uppers
}

/// Whether an instruction is for the beginning of a sequence only: it stores what the last x87 instruction
/// was, which the interpreter does not keep, or its address must be good, since whether masked bytes fault
/// depends on the processor (Intel SDM vol. 2, MASKMOVDQU).
fn only_first(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Fnstenv | M::Fstenv | M::Fnsave | M::Fsave | M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu
    )
}

/// What means different things on different processors: an operand-size prefix before a branch (AMD cuts
/// RIP, Intel ignores it), F3 before bit scans (where the host has `tzcnt` and `lzcnt` and the model not),
/// `pause` with REX.B, which is `xchg r8, rax` to some, and F2 and F3 before `loope` and `loopne` (on AMD Zen
/// they override the condition).
fn differs_by_vendor(insn: &Instruction, bytes: &[u8]) -> bool {
    let bytes = &bytes[..insn.len()];
    let branch = insn.flow_control() == FlowControl::ConditionalBranch;
    let scan = matches!(insn.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr);
    let pause = insn.mnemonic() == Mnemonic::Pause;
    let looping = matches!(insn.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne);
    (pause && insn.len() > 2)
        || (looping && (bytes.contains(&0xf2) || bytes.contains(&0xf3)))
        || (branch && bytes.contains(&0x66))
        || (scan && bytes.contains(&0xf3))
}

/// Bytes that begin like this instruction.
fn encode(code: Code, r: &mut Random) -> Vec<u8> {
    let o = code.op_code();
    let mut bytes = Vec::with_capacity(32);
    if r.chance(2) || (o.can_use_lock_prefix() && r.chance(15)) {
        bytes.push(0xf0);
    }
    if o.encoding() == EncodingKind::VEX {
        return encode_vex(o, bytes, r);
    }
    let string = blank(code).is_string_instruction();
    if r.chance(if string { 50 } else { 2 }) {
        bytes.push(if r.chance(60) { 0xf3 } else { 0xf2 });
    }
    if r.chance(5) {
        bytes.push(0x67);
    }
    if r.chance(2) {
        bytes.push(r.pick(&[0x2e, 0x36, 0x3e, 0x26]));
    }
    let branch = o.op_kinds().iter().any(|k| {
        matches!(k, OpCodeOperandKind::br64_1 | OpCodeOperandKind::br64_4 | OpCodeOperandKind::br32_1)
    });
    if o.operand_size() == 16 || (!branch && r.chance(2)) {
        bytes.push(0x66);
    }
    match o.mandatory_prefix() {
        MandatoryPrefix::P66 => bytes.push(0x66),
        MandatoryPrefix::PF3 => bytes.push(0xf3),
        MandatoryPrefix::PF2 => bytes.push(0xf2),
        _ => {}
    }
    let wide = o.operand_size() == 64 || o.op_kinds().iter().any(is_64);
    if wide || r.chance(40) {
        bytes.push(0x40 | r.next() as u8 & 7 | if wide || r.chance(10) { 8 } else { 0 });
    }
    match o.table() {
        OpCodeTableKind::T0F => bytes.push(0x0f),
        OpCodeTableKind::T0F38 => bytes.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => bytes.extend([0x0f, 0x3a]),
        _ => {}
    }
    let mut opcode = o.op_code();
    let in_opcode = |k: &OpCodeOperandKind| {
        use OpCodeOperandKind as K;
        matches!(k, K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode)
    };
    if o.op_kinds().iter().any(in_opcode) {
        opcode |= r.next() as u32 & 7;
    }
    if o.op_code_len() == 2 {
        bytes.push((opcode >> 8) as u8);
    }
    bytes.push(opcode as u8);
    let modrm = r.next() as u8;
    let mut modrm = if r.chance(60) { modrm & 0x3f | r.pick(&[0, 0x40, 0x80]) } else { modrm | 0xc0 };
    if o.group_index() >= 0 {
        modrm = modrm & !0x38 | (o.group_index() as u8) << 3;
    }
    if o.op_code_len() == 1 || o.group_index() >= 0 {
        bytes.push(modrm);
    }
    // SIB, displacement and immediate, whichever there are.
    let rest = if r.chance(50) { r.next() } else { value(r) };
    bytes.push(r.next() as u8);
    bytes.extend(rest.to_le_bytes());
    bytes.extend(value(r).to_le_bytes());
    bytes
}

/// The same with VEX: `bytes` are prefixes.
fn encode_vex(o: &OpCodeInfo, mut bytes: Vec<u8>, r: &mut Random) -> Vec<u8> {
    if r.chance(3) {
        bytes.push(0x67);
    }
    let map = match o.table() {
        OpCodeTableKind::T0F => 1,
        OpCodeTableKind::T0F38 => 2,
        _ => 3,
    };
    let prefix = match o.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    };
    let second = |k: &OpCodeOperandKind| {
        use OpCodeOperandKind as K;
        matches!(k, K::xmm_vvvv | K::xmmp3_vvvv | K::ymm_vvvv | K::r32_vvvv | K::r64_vvvv)
    };
    let second = if o.op_kinds().iter().any(second) { r.next() as u8 & 15 } else { 0 };
    let any = r.chance(50);
    let (w, l) = (if o.is_wig() { any } else { o.w() != 0 }, if o.is_lig() { any } else { o.l() != 0 });
    let extensions = if r.chance(50) { 0xe0 } else { r.next() as u8 & 0xe0 };
    bytes.extend([
        0xc4,
        extensions | map,
        u8::from(w) << 7 | (!second & 15) << 3 | u8::from(l) << 2 | prefix,
    ]);
    bytes.push(o.op_code() as u8);
    let mut modrm = r.next() as u8;
    if r.chance(60) {
        modrm = modrm & 0x3f | r.pick(&[0, 0x40, 0x80]);
    } else {
        modrm |= 0xc0;
    }
    let vsib = |k: &OpCodeOperandKind| {
        use OpCodeOperandKind as K;
        matches!(k, K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y)
    };
    if o.op_kinds().iter().any(vsib) {
        modrm = modrm & 0x38 | r.pick(&[0x04, 0x44, 0x84]);
    }
    if o.group_index() >= 0 {
        modrm = modrm & !0x38 | (o.group_index() as u8) << 3;
    }
    bytes.push(modrm);
    bytes.push(r.next() as u8);
    let rest = if r.chance(50) { r.next() } else { value(r) };
    bytes.extend(rest.to_le_bytes());
    bytes.extend(value(r).to_le_bytes());
    bytes
}

fn is_64(k: &OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(k, K::r64_opcode | K::r64_reg | K::r64_rm | K::r64_or_mem)
}

/// Sets the registers that address memory, so that the instruction finds data.
fn aim(insn: &Instruction, case: &mut Case, r: &mut Random) {
    if matches!(insn.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Maskmovq | Mnemonic::Vmaskmovdqu) {
        case.gpr[7] = DATA + r.next() % (DATA_LEN as u64 - 16);
        return;
    }
    if insn.is_string_instruction() {
        for n in [6, 7] {
            if r.chance(90) {
                case.gpr[n] = pointer(r, 64);
            }
        }
        if r.chance(80) {
            case.gpr[1] = r.next() & r.pick(&[3, 15, 63, 0x3ff]);
        }
        return;
    }
    if insn.mnemonic() == Mnemonic::Xlatb {
        case.gpr[3] = pointer(r, 256);
        return;
    }
    if !(0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory) || r.chance(2) {
        return;
    }
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let scale = u64::from(insn.memory_index_scale());
    let mut target = pointer(r, insn.memory_size().size().max(1) as u64 + 1);
    let size = insn.memory_size().size() as u64;
    if size >= 16 && r.chance(85) {
        target &= !(size.next_power_of_two() - 1);
    }
    if insn.is_vsib() {
        aim_indices(insn, case, r);
    }
    if masked(insn.mnemonic()) && r.chance(30) {
        // Across the end of what is there.
        target = DATA + DATA_LEN as u64 - r.next() % 40;
    }
    let displacement = insn.memory_displacement64();
    let gpr = |x: Register| x.is_gpr().then(|| usize::from(gpr_number(x)));
    match (gpr(base), gpr(index)) {
        (Some(b), Some(i)) if b == i => {
            case.gpr[b] = target.wrapping_sub(displacement) / (scale + 1);
        }
        (Some(b), Some(i)) => {
            if i != 4 {
                case.gpr[i] = (r.next() & 0x1ff).wrapping_sub(0x100);
            }
            let indexed = case.gpr[i].wrapping_mul(scale);
            case.gpr[b] = target.wrapping_sub(displacement).wrapping_sub(indexed);
        }
        (Some(b), None) => case.gpr[b] = target.wrapping_sub(displacement),
        (None, Some(i)) => case.gpr[i] = target.wrapping_sub(displacement) / scale,
        (None, None) => {}
    }
    // Bit offsets near by, and comparisons that succeed.
    if insn.op_count() > 1 && insn.op1_kind() == OpKind::Register && insn.op1_register().is_gpr() {
        let bit = usize::from(gpr_number(insn.op1_register()));
        let addresses = gpr(base) == Some(bit) || gpr(index) == Some(bit);
        let tests = matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
        if tests && !addresses && r.chance(80) {
            case.gpr[bit] = (r.next() & 0xfff).wrapping_sub(0x800);
        }
    }
    let exchanges = matches!(insn.mnemonic(), Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b);
    if exchanges && r.chance(50) && (DATA..DATA + DATA_LEN as u64 - 16).contains(&target) {
        let mut data = vec![0; DATA_LEN];
        fill(case.seed, &mut data);
        let at = (target - DATA) as usize;
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| data[at + i]));
        let used = |n| gpr(base) == Some(n) || gpr(index) == Some(n);
        if !used(0) {
            case.gpr[0] = word(at);
        }
        if !used(2) && insn.mnemonic() != Mnemonic::Cmpxchg {
            case.gpr[2] = if insn.mnemonic() == Mnemonic::Cmpxchg8b { word(at) >> 32 } else { word(at + 8) };
        }
    }
}

/// Moves of those elements that a mask asks for.
pub(super) fn masked(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq)
}

/// Lets the indices of a gather be small, mostly.
fn aim_indices(insn: &Instruction, case: &mut Case, r: &mut Random) {
    use Mnemonic as M;
    let n = insn.memory_index().number();
    let wide = matches!(insn.mnemonic(), M::Vpgatherqd | M::Vpgatherqq | M::Vgatherqps | M::Vgatherqpd);
    let mut bytes = [0; 32];
    for index in bytes.chunks_exact_mut(if wide { 8 } else { 4 }) {
        let value = if r.chance(4) { r.next() as i64 } else { (r.next() & 0xff) as i64 - 0x80 };
        index.copy_from_slice(&value.to_le_bytes()[..index.len()]);
    }
    case.fx.0[160 + 16 * n..176 + 16 * n].copy_from_slice(&bytes[..16]);
    case.uppers[16 * n..16 * n + 16].copy_from_slice(&bytes[16..]);
}

/// Flags that the manuals leave undefined, of those that iced counts as RFLAGS.
fn undefined_flags(insn: &Instruction) -> u64 {
    use iced_x86::RflagsBits as B;
    let undefined = insn.rflags_undefined();
    [(B::CF, 0), (B::PF, 2), (B::AF, 4), (B::ZF, 6), (B::SF, 7), (B::OF, 11)]
        .iter()
        .fold(0, |all, &(bit, place)| if undefined & bit != 0 { all | 1 << place } else { all })
}

/// Lets each relative branch go to the start of a later instruction or to the end.
fn join_branches(case: &mut Case, starts: &[(usize, Instruction)], r: &mut Random) {
    for (n, (at, insn)) in starts.iter().enumerate() {
        let size = match insn.code().op_code().op_kinds() {
            [OpCodeOperandKind::br64_1] => 1,
            [OpCodeOperandKind::br64_4] => 4,
            _ => continue,
        };
        let next = at + insn.len();
        let later = &starts[n + 1..];
        let pick = r.below(later.len() + 1);
        let to = later.get(pick).map_or(case.len, |l| l.0);
        let relative = (to - next) as u32;
        let place = next - size;
        case.code[place..next].copy_from_slice(&relative.to_le_bytes()[..size]);
    }
}
