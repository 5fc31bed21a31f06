//! x87: state, and the choice of handlers.
//!
//! `native.rs` runs instructions on the host's x87, `direct.rs` the frequent ones faster; `control.rs` has those that load and store control and
//! status words and environments; `state.rs` FXSAVE and XSAVE areas.

mod area;
mod control;
mod direct;
mod native;
mod state;
pub(crate) use state::SHARED_SIZE;
mod xsave;

#[cfg(test)]
mod tests;

use iced_x86::{Instruction, Mnemonic, OpCodeOperandKind, OpKind};

use crate::cpu::{Cpu, cr0};
use crate::decode::Mode;
use crate::fault::{Exec, Fault};
use crate::op::{Handler, Op};

use direct::Shape;

/// ES and B of the status word: they follow from flags and masks, so [`Fpu::status`] has them clear.
const SUMMARY: u16 = 0x8080;
/// The exception flags of the status word, and their masks in the control word.
const EXCEPTIONS: u16 = 0x3f;
/// Those whose instructions store nothing to memory when they are not masked: all but precision.
const STORES_NOTHING: u16 = 0x1f;
/// Control word after `fninit`.
const CONTROL_DEFAULT: u16 = 0x037f;
/// The control bits that can be cleared: rounding, precision, masks and the inert infinity control.
const CONTROL_BITS: u16 = 0x1f3f;
/// Bit 6 of the control word is always set.
const CONTROL_FIXED: u16 = 0x0040;

/// x87 state; the MMX registers are its mantissas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fpu {
    /// Control word.
    pub control: u16,
    /// Status word: flags, condition bits and the stack's top; ES and B are kept clear, see
    /// [`Self::status_word`].
    pub status: u16,
    /// A bit for each physical register that is not empty.
    pub valid: u8,
    /// Physical registers R0–R7, 80 bits each.
    pub registers: [u128; 8],
    /// Last instruction's opcode: zero, as processors do that keep it only for unmasked exceptions.
    pub opcode: u16,
    /// Last instruction's offset and selector.
    pub instruction: (u64, u16),
    /// Last memory operand's offset and selector.
    pub data: (u64, u16),
}

impl Default for Fpu {
    fn default() -> Self {
        Self {
            control: CONTROL_DEFAULT,
            status: 0,
            valid: 0,
            registers: [0; 8],
            opcode: 0,
            instruction: (0, 0),
            data: (0, 0),
        }
    }
}

impl Fpu {
    /// The physical register that is the stack's top.
    #[must_use]
    pub fn top(&self) -> u8 {
        (self.status >> 11 & 7) as u8
    }

    fn set_top(&mut self, top: u8) {
        self.status = self.status & !0x3800 | u16::from(top & 7) << 11;
    }

    /// ST(`i`).
    #[must_use]
    pub fn st(&self, i: u8) -> u128 {
        self.registers[usize::from(self.top().wrapping_add(i) & 7)]
    }

    fn set_st(&mut self, i: u8, value: u128) {
        self.registers[usize::from(self.top().wrapping_add(i) & 7)] = value;
    }

    /// Whether an exception that is not masked waits to be reported.
    #[must_use]
    pub fn pending(&self) -> bool {
        self.status & !self.control & EXCEPTIONS != 0
    }

    /// The status word as programs see it.
    #[must_use]
    pub fn status_word(&self) -> u16 {
        self.status | if self.pending() { SUMMARY } else { 0 }
    }

    fn set_control(&mut self, value: u16) {
        self.control = value & CONTROL_BITS | CONTROL_FIXED;
    }

    /// The tag word of 2 bits a register (Intel SDM vol. 1, 8.1.7).
    #[must_use]
    pub fn tag_word(&self) -> u16 {
        (0..8).fold(0, |word, i| word | self.tag(i) << (2 * i))
    }

    fn tag(&self, i: usize) -> u16 {
        let value = self.registers[i];
        let (exponent, mantissa) = ((value >> 64) as u16 & 0x7fff, value as u64);
        if self.valid >> i & 1 == 0 {
            3
        } else if exponent == 0 && mantissa == 0 {
            1
        } else if exponent == 0 || exponent == 0x7fff || mantissa >> 63 == 0 {
            2
        } else {
            0
        }
    }

    fn set_tag_word(&mut self, word: u16) {
        self.valid = (0..8).filter(|i| word >> (2 * i) & 3 != 3).fold(0, |v, i| v | 1 << i);
    }

    /// `fninit`.
    fn initialise(&mut self) {
        let registers = self.registers;
        *self = Self { registers, ..Self::default() };
    }

    /// MMX register `n` (0–7).
    #[inline(always)]
    pub(crate) fn mm(&self, n: u8) -> u64 {
        self.registers[usize::from(n & 7)] as u64
    }

    /// Sets MMX register `n`; sign and exponent become all ones.
    #[inline(always)]
    pub(crate) fn set_mm(&mut self, n: u8, value: u64) {
        self.registers[usize::from(n & 7)] = 0xffff << 64 | u128::from(value);
    }

    /// What every MMX instruction does to the stack.
    #[inline(always)]
    pub(crate) fn start_mmx(&mut self) {
        self.set_top(0);
        self.valid = 0xff;
    }

    /// `emms`.
    pub(crate) fn empty(&mut self) {
        self.set_top(0);
        self.valid = 0;
    }
}

impl Cpu {
    /// What waiting x87 and MMX instructions do first. With CR0.NE clear a PC reports through its interrupt
    /// controller, which nothing since MS-DOS uses: such an exception stays pending.
    ///
    /// # Errors
    /// `#MF`.
    #[inline(always)]
    pub(crate) fn wait_x87(&self) -> Exec {
        if self.fpu.pending() && self.cr0 & cr0::NE != 0 {
            return Err(Fault::MF);
        }
        Ok(())
    }

    /// Notes where the instruction is.
    fn note_instruction(&mut self, op: &Op) {
        self.fpu.instruction = (self.op_rip(op), self.segments[terem_cpu::VcpuState::CS].selector);
    }

    /// Notes where its memory operand is.
    fn note_data(&mut self, op: &Op) {
        self.note_instruction(op);
        let selector = self.segments.get(usize::from(op.segment)).map_or(0, |s| s.selector);
        self.fpu.data = (self.offset(op), selector);
    }
}

/// Instructions on the stack alone; [`Op::extra`] says which.
fn on_stack(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    cpu.note_instruction(op);
    let shape = Shape::from_index(op.rm);
    let mut ah = cpu.ah;
    if cpu.fpu.register_form_directly(shape, op.extra, &mut ah) {
        if matches!(shape, Shape::Compare | Shape::ComparePop) {
            (cpu.ah, cpu.of) = (ah, 0);
        }
        return Ok(());
    }
    let flags = u16::from(cpu.ah) << 8 | u16::from(cpu.of);
    let flags = native::register_form(&mut cpu.fpu, op.extra, flags);
    (cpu.ah, cpu.of) = ((flags >> 8) as u8, flags as u8 & 1);
    Ok(())
}

/// Instructions that read `SIZE` bytes of memory.
fn reading<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let mut operand = [0; 16];
    cpu.load_area(op, &mut operand[..SIZE])?;
    cpu.note_data(op);
    if !cpu.fpu.reading_form_directly(Shape::from_index(op.rm), op.extra, &mut operand) {
        native::memory_form(&mut cpu.fpu, op.extra, &mut operand);
    }
    Ok(())
}

/// Instructions that write `SIZE` bytes of memory.
fn writing<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let mut operand = [0; 16];
    let shape = Shape::from_index(op.rm);
    if let Some(status) = cpu.fpu.writing_form_directly(shape, op.extra, &mut operand) {
        cpu.store_area(op, &operand[..SIZE])?;
        cpu.fpu.stored(shape, status);
        cpu.note_data(op);
        return Ok(());
    }
    let mut fpu = cpu.fpu.clone();
    fpu.status &= !(fpu.status & !fpu.control & EXCEPTIONS);
    let kept = cpu.fpu.status & EXCEPTIONS;
    native::memory_form(&mut fpu, op.extra, &mut operand);
    if fpu.status & !fpu.control & STORES_NOTHING == 0 {
        cpu.store_area(op, &operand[..SIZE])?;
    } else {
        // Nothing is stored, but a bad address comes before the exception.
        let at = cpu.operand_address(op, SIZE as u64, true)?;
        cpu.check_writable(at, op.segment, SIZE as u64)?;
    }
    fpu.status |= kept;
    cpu.fpu = fpu;
    cpu.note_data(op);
    Ok(())
}

/// Where the instruction is in the tables of `native.rs`.
fn encoding(insn: &Instruction) -> u16 {
    let code = insn.op_code();
    let bytes = code.op_code();
    if insn.op0_kind() == OpKind::Memory {
        return (bytes as u16 & 7) * 8 + code.group_index().max(0) as u16;
    }
    let register = (0..insn.op_count())
        .find(|&i| code.op_kind(i) == OpCodeOperandKind::sti_opcode)
        .map_or(0, |i| insn.op_register(i).number() as u16);
    (bytes as u16 >> 8 & 7) * 64 + (bytes as u16 & 63) + register
}

/// The handler of an x87 instruction, or of one that saves or restores its state.
pub(crate) fn handler(insn: &Instruction, _: Mode, op: &mut Op) -> Option<Handler> {
    if let Some(found) =
        control::handler(insn).or_else(|| state::handler(insn)).or_else(|| xsave::handler(insn))
    {
        return Some(found);
    }
    let x87 = insn.cpuid_features().iter().any(|f| {
        use iced_x86::CpuidFeature;
        matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387)
    });
    // fcmov and fisttp belong to other features; every other instruction with an opcode in the x87's range
    // is one.
    let first = insn.op_code().op_code();
    let in_range = matches!(first, 0xd8..=0xdf | 0xd8c0..=0xdfff);
    if !(x87 || in_range) || insn.op_code().table() != iced_x86::OpCodeTableKind::Normal {
        return None;
    }
    if !in_range {
        return None;
    }
    op.extra = encoding(insn);
    op.rm = Shape::of(insn) as u8;
    if insn.op_count() == 0 || insn.op0_kind() == OpKind::Register {
        return Some(on_stack);
    }
    let writes = matches!(
        insn.mnemonic(),
        Mnemonic::Fst
            | Mnemonic::Fstp
            | Mnemonic::Fist
            | Mnemonic::Fistp
            | Mnemonic::Fisttp
            | Mnemonic::Fbstp
    );
    match (writes, insn.memory_size().size()) {
        (false, 2) => Some(reading::<2>),
        (false, 4) => Some(reading::<4>),
        (false, 8) => Some(reading::<8>),
        (false, 10) => Some(reading::<10>),
        (true, 2) => Some(writing::<2>),
        (true, 4) => Some(writing::<4>),
        (true, 8) => Some(writing::<8>),
        (true, 10) => Some(writing::<10>),
        _ => None,
    }
}
