//! The frequent x87 instructions, without moving the whole state to the host: only the operands go there.
//!
//! They are for the plain case: all exceptions masked, registers where they are needed and room where
//! something is pushed. Whatever else comes up, and whatever raises an exception flag that the guest does
//! not have set already, is left to `native.rs`, which starts from the unchanged state; so flags that the
//! host's x87 still has from earlier cost time but do no harm.

use core::arch::asm;
use std::sync::LazyLock;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{CONTROL_DEFAULT, EXCEPTIONS, Fpu, native};

/// C1: here always "rounded up".
const C1: u16 = 1 << 9;

/// What an instruction does with the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// None of the below.
    Other,
    /// ST(0) = ST(0) op ST(i).
    ToTop,
    /// ST(i) = ST(i) op ST(0).
    FromTop,
    /// The same; pops.
    FromTopPop,
    /// Compares ST(0) with ST(i) into RFLAGS.
    Compare,
    /// The same; pops.
    ComparePop,
    /// Pushes ST(i).
    Push,
    /// ST(i) = ST(0).
    Copy,
    /// The same; pops.
    CopyPop,
    /// Exchanges ST(0) and ST(i).
    Exchange,
    /// Pushes one or zero.
    One,
    Zero,
    /// Changes the sign of ST(0), or clears it.
    ChangeSign,
    Absolute,
    /// ST(0) = ST(0) op memory.
    WithMemory,
    /// Pushes memory.
    Load,
    /// Memory = ST(0).
    Store,
    /// The same; pops.
    StorePop,
}

impl Shape {
    const ALL: [Self; 18] = [
        Self::Other,
        Self::ToTop,
        Self::FromTop,
        Self::FromTopPop,
        Self::Compare,
        Self::ComparePop,
        Self::Push,
        Self::Copy,
        Self::CopyPop,
        Self::Exchange,
        Self::One,
        Self::Zero,
        Self::ChangeSign,
        Self::Absolute,
        Self::WithMemory,
        Self::Load,
        Self::Store,
        Self::StorePop,
    ];

    /// From its place in the enumeration, which an [`crate::op::Op`] has room for.
    pub(super) fn from_index(index: u8) -> Self {
        Self::ALL.get(usize::from(index)).copied().unwrap_or(Self::Other)
    }

    pub(super) fn of(insn: &Instruction) -> Self {
        let memory = insn.op_count() > 0 && insn.op0_kind() == OpKind::Memory;
        let to_top = insn.op_count() > 0 && insn.op0_register() == iced_x86::Register::ST0;
        match insn.mnemonic() {
            Mnemonic::Fadd
            | Mnemonic::Fmul
            | Mnemonic::Fsub
            | Mnemonic::Fsubr
            | Mnemonic::Fdiv
            | Mnemonic::Fdivr => match (memory, insn.op_code().op_code() >> 8) {
                (true, _) => Self::WithMemory,
                (_, 0xd8) if to_top => Self::ToTop,
                (_, 0xdc) => Self::FromTop,
                _ => Self::Other,
            },
            Mnemonic::Faddp
            | Mnemonic::Fmulp
            | Mnemonic::Fsubp
            | Mnemonic::Fsubrp
            | Mnemonic::Fdivp
            | Mnemonic::Fdivrp => Self::FromTopPop,
            Mnemonic::Fiadd
            | Mnemonic::Fimul
            | Mnemonic::Fisub
            | Mnemonic::Fisubr
            | Mnemonic::Fidiv
            | Mnemonic::Fidivr => Self::WithMemory,
            Mnemonic::Fcomi | Mnemonic::Fucomi => Self::Compare,
            Mnemonic::Fcomip | Mnemonic::Fucomip => Self::ComparePop,
            Mnemonic::Fld | Mnemonic::Fild if memory => Self::Load,
            Mnemonic::Fld => Self::Push,
            Mnemonic::Fst | Mnemonic::Fist if memory => Self::Store,
            Mnemonic::Fstp | Mnemonic::Fistp if memory => Self::StorePop,
            Mnemonic::Fst => Self::Copy,
            Mnemonic::Fstp => Self::CopyPop,
            Mnemonic::Fxch => Self::Exchange,
            Mnemonic::Fld1 => Self::One,
            Mnemonic::Fldz => Self::Zero,
            Mnemonic::Fchs => Self::ChangeSign,
            Mnemonic::Fabs => Self::Absolute,
            _ => Self::Other,
        }
    }
}

static CONTROL_DEFAULT_WORD: u16 = CONTROL_DEFAULT;

/// The control word to load, unless it is the one that the host has.
fn different(control: &u16) -> *const u16 {
    if *control == CONTROL_DEFAULT { core::ptr::null() } else { control }
}

/// Whether `fcomi` leaves C1 alone, as AMD's processors do, or clears it, as Intel's manual has it.
static COMPARING_KEEPS_C1: LazyLock<bool> = LazyLock::new(|| {
    let mut fpu = Fpu { status: C1, valid: 0xff, ..Fpu::default() };
    // fcomi st, st(1) of zeros.
    native::register_form(&mut fpu, 3 * 64 + 0x31, 0);
    fpu.status & C1 != 0
});

/// What the host said.
struct Outcome {
    status: u16,
    flags: u16,
}

/// Runs a two-byte instruction on the host, by its place in the table of `native.rs`, with `b` in ST(1) and
/// `a` in ST(0), which take the results. Pops are the caller's: `encoding` has the form without.
#[inline(never)]
fn on_registers(encoding: u16, control: u16, a: &mut u128, b: &mut u128) -> Outcome {
    let (status, flags): (u16, u16);
    // SAFETY: the host's x87 is empty before and after, with all exceptions masked; the jump lands on one of
    // the entries of 8 bytes.
    unsafe {
        asm!(
            "test {c}, {c}",
            "jz 4f",
            "fldcw [{c}]",
            "4:",
            "fld tbyte ptr [{b}]",
            "fld tbyte ptr [{a}]",
            "lea {t}, [rip + 2f]",
            "lea {t}, [{t} + {i} * 8]",
            "jmp {t}",
            ".balign 8",
            "2:",
            ".set .Lterem_x87, 0",
            ".rept 512",
            ".byte 0xd8 + (.Lterem_x87 >> 6), 0xc0 + (.Lterem_x87 & 63)",
            "jmp 3f",
            ".balign 8",
            ".set .Lterem_x87, .Lterem_x87 + 1",
            ".endr",
            "3:",
            "lahf",
            "mov {f:e}, eax",
            "fnstsw ax",
            "fstp tbyte ptr [{a}]",
            "fstp tbyte ptr [{b}]",
            "test {c}, {c}",
            "jz 5f",
            "fldcw [{h}]",
            "5:",
            a = in(reg) &raw mut *a,
            b = in(reg) &raw mut *b,
            c = in(reg) different(&control),
            h = in(reg) &raw const CONTROL_DEFAULT_WORD,
            i = in(reg) u64::from(encoding & 511),
            t = out(reg) _,
            f = out(reg) flags,
            out("ax") status,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            out("mm0") _, out("mm1") _, out("mm2") _, out("mm3") _,
            out("mm4") _, out("mm5") _, out("mm6") _, out("mm7") _,
            options(nostack)
        );
    }
    Outcome { status, flags }
}

/// The same for instructions with a memory operand: `a` is ST(0) before (unless `LOAD`) and after (unless
/// `STORE`).
#[inline(never)]
fn on_memory<const LOAD: bool, const STORE: bool>(
    encoding: u16,
    control: u16,
    a: &mut u128,
    operand: &mut [u8; 16],
) -> u16 {
    macro_rules! run {
        ($before:literal, $after:literal) => {{
            let status: u16;
            // SAFETY: as in `on_registers`; the instructions access up to 10 bytes at `operand`.
            unsafe {
                asm!(
                    "test {c}, {c}",
                    "jz 4f",
                    "fldcw [{c}]",
                    "4:",
                    $before,
                    "lea {t}, [rip + 2f]",
                    "lea {t}, [{t} + {i} * 8]",
                    "jmp {t}",
                    ".balign 8",
                    "2:",
                    ".set .Lterem_x87, 0",
                    ".rept 64",
                    // ModRM 0x07: [rdi]
                    ".byte 0xd8 + (.Lterem_x87 >> 3), 0x07 + ((.Lterem_x87 & 7) << 3)",
                    "jmp 3f",
                    ".balign 8",
                    ".set .Lterem_x87, .Lterem_x87 + 1",
                    ".endr",
                    "3:",
                    "fnstsw ax",
                    $after,
                    "test {c}, {c}",
                    "jz 5f",
                    "fldcw [{h}]",
                    "5:",
                    a = in(reg) &raw mut *a,
                    c = in(reg) different(&control),
                    h = in(reg) &raw const CONTROL_DEFAULT_WORD,
                    i = in(reg) u64::from(encoding & 63),
                    t = out(reg) _,
                    in("rdi") operand.as_mut_ptr(),
                    out("ax") status,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                    out("mm0") _, out("mm1") _, out("mm2") _, out("mm3") _,
                    out("mm4") _, out("mm5") _, out("mm6") _, out("mm7") _,
                    options(nostack)
                );
            }
            status
        }};
    }
    match (LOAD, STORE) {
        (true, _) => run!("", "fstp tbyte ptr [{a}]"),
        (_, true) => run!("fld tbyte ptr [{a}]", ""),
        _ => run!("fld tbyte ptr [{a}]", "fstp tbyte ptr [{a}]"),
    }
}

impl Fpu {
    fn is_valid(&self, i: u8) -> bool {
        self.valid >> (self.top().wrapping_add(i) & 7) & 1 != 0
    }

    /// All exceptions are masked, so none can be pending.
    fn is_plain(&self) -> bool {
        self.control & EXCEPTIONS == EXCEPTIONS
    }

    fn pop(&mut self) {
        self.valid &= !(1 << self.top());
        self.set_top(self.top().wrapping_add(1));
    }

    /// There is room.
    fn push(&mut self, value: u128) {
        self.set_top(self.top().wrapping_sub(1));
        self.valid |= 1 << self.top();
        self.set_st(0, value);
        self.status &= !C1;
    }

    /// Whether the host's flags are none that the guest has not.
    fn nothing_new(&self, status: u16) -> bool {
        status & EXCEPTIONS & !self.status == 0
    }

    fn take_rounding(&mut self, status: u16) {
        self.status = self.status & !C1 | status & C1;
    }

    /// Runs an instruction without memory operand if it can be done in the plain way. `flags` are what
    /// `lahf` gives; a comparison sets them.
    #[inline]
    pub(super) fn register_form_directly(&mut self, shape: Shape, encoding: u16, flags: &mut u8) -> bool {
        let i = encoding as u8 & 7;
        if !self.is_plain() || shape == Shape::Other {
            return false;
        }
        let (pushes, reads_i) = match shape {
            Shape::One | Shape::Zero => (true, false),
            Shape::Push => (true, true),
            Shape::Copy | Shape::CopyPop | Shape::ChangeSign | Shape::Absolute => (false, false),
            _ => (false, true),
        };
        let top_right = match shape {
            Shape::One | Shape::Zero | Shape::Push => true,
            _ => self.is_valid(0),
        };
        if !top_right || (reads_i && !self.is_valid(i)) || (pushes && self.is_valid(7)) {
            return false;
        }
        match shape {
            Shape::ToTop | Shape::FromTop | Shape::FromTopPop | Shape::Compare | Shape::ComparePop => {
                return self.compute(shape, encoding, i, flags);
            }
            Shape::Push => self.push(self.st(i)),
            Shape::One => self.push(0x3fff << 64 | 1 << 63),
            Shape::Zero => self.push(0),
            Shape::Copy | Shape::CopyPop => {
                self.set_st(i, self.st(0));
                self.valid |= 1 << (self.top().wrapping_add(i) & 7);
                self.status &= !C1;
                if shape == Shape::CopyPop {
                    self.pop();
                }
            }
            Shape::Exchange => {
                let (a, b) = (self.st(0), self.st(i));
                self.set_st(0, b);
                self.set_st(i, a);
                self.status &= !C1;
            }
            Shape::ChangeSign => {
                self.set_st(0, self.st(0) ^ 1 << 79);
                self.status &= !C1;
            }
            Shape::Absolute => {
                self.set_st(0, self.st(0) & !(1 << 79));
                self.status &= !C1;
            }
            _ => return false,
        }
        true
    }

    fn compute(&mut self, shape: Shape, encoding: u16, i: u8, flags: &mut u8) -> bool {
        let (mut a, mut b) = (self.st(0), self.st(i));
        // The form with ST(1), and without pop: DE is DC and DF is DB then.
        let mut form = encoding & !7 | 1;
        match shape {
            Shape::FromTopPop => form -= 2 * 64,
            Shape::ComparePop => form -= 4 * 64,
            _ => {}
        }
        let done = on_registers(form, self.control, &mut a, &mut b);
        if !self.nothing_new(done.status) {
            return false;
        }
        match shape {
            Shape::ToTop => self.set_st(0, a),
            Shape::FromTop => self.set_st(i, b),
            Shape::FromTopPop => {
                self.set_st(i, b);
                self.pop();
            }
            _ => {
                *flags = (done.flags >> 8) as u8;
                if shape == Shape::ComparePop {
                    self.pop();
                }
                if !*COMPARING_KEEPS_C1 {
                    self.status &= !C1;
                }
                return true;
            }
        }
        self.take_rounding(done.status);
        true
    }

    /// The same for instructions that read memory.
    #[inline]
    pub(super) fn reading_form_directly(
        &mut self,
        shape: Shape,
        encoding: u16,
        operand: &mut [u8; 16],
    ) -> bool {
        if !self.is_plain() {
            return false;
        }
        match shape {
            Shape::Load if !self.is_valid(7) => {
                let mut a = 0;
                let status = on_memory::<true, false>(encoding, self.control, &mut a, operand);
                if self.nothing_new(status) {
                    self.push(a);
                    return true;
                }
                false
            }
            Shape::WithMemory if self.is_valid(0) => {
                let mut a = self.st(0);
                let status = on_memory::<false, false>(encoding, self.control, &mut a, operand);
                if self.nothing_new(status) {
                    self.set_st(0, a);
                    self.take_rounding(status);
                    return true;
                }
                false
            }
            _ => false,
        }
    }

    /// The same for instructions that write memory: the operand's bytes are in `operand` if it returns the
    /// status word to go on with, for [`Self::stored`].
    #[inline]
    pub(super) fn writing_form_directly(
        &self,
        shape: Shape,
        encoding: u16,
        operand: &mut [u8; 16],
    ) -> Option<u16> {
        if !self.is_plain() || !matches!(shape, Shape::Store | Shape::StorePop) || !self.is_valid(0) {
            return None;
        }
        let mut a = self.st(0);
        // The form that pops, which there is for all: /3 for /2.
        let form = if shape == Shape::Store { encoding | 1 } else { encoding };
        let status = on_memory::<false, true>(form, self.control, &mut a, operand);
        self.nothing_new(status).then_some(status)
    }

    /// After the store.
    pub(super) fn stored(&mut self, shape: Shape, status: u16) {
        self.take_rounding(status);
        if shape == Shape::StorePop {
            self.pop();
        }
    }
}
