//! Floating-point instructions: the host's own, under the guest's MXCSR with all exceptions masked.
//!
//! Flags that they raise go to the guest's MXCSR. If one of these exceptions is not masked there, the
//! guest gets `#XM` and the destination stays as it was (Intel SDM vol. 1, 11.5.3): exceptions found
//! before computing (invalid, denormal, divide by zero) hide those found after (overflow, underflow,
//! precision).
//!
//! Loading and storing MXCSR costs several times what the computation costs. So as long as the guest's
//! control bits are the default, which are the host's as well, instructions run without either, and the
//! host's flags, cleared to the guest's before, collect what the guest raises ([`Cpu::mxcsr_on_host`]).

use core::arch::asm;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::vector::{General, M32, M64, M128, Register, Source, V};
use crate::cpu::{Cpu, cr4};
use crate::fault::{Exec, Fault};
use crate::op::{Handler, Op};

/// The bits of MXCSR that may be set.
pub(crate) const MXCSR_MASK: u32 = 0xffff;
/// MXCSR after reset, and the host's while Rust code runs.
pub(crate) const MXCSR_DEFAULT: u32 = 0x1f80;

const FLAGS: u32 = 0x3f;
const MASKS: u32 = 0x1f80;
/// Exceptions found before computing: invalid, denormal, divide by zero.
const BEFORE: u32 = 0x07;
const UNDERFLOW: u32 = 1 << 4;
const UNDERFLOW_MASK: u32 = 1 << 11;
const FLUSH_TO_ZERO: u32 = 1 << 15;

static HOST: u32 = MXCSR_DEFAULT;

/// What a result consists of, to find tiny ones.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// Results cannot be tiny.
    Whole,
    /// This many `f32` from the lowest place on.
    Single(u32),
    /// This many `f64`.
    Double(u32),
}

impl Shape {
    /// Whether an element is denormal.
    fn tiny(self, value: V) -> bool {
        let bits = value.bits();
        match self {
            Self::Whole => false,
            Self::Single(n) => (0..n).any(|i| f32::from_bits((bits >> (32 * i)) as u32).is_subnormal()),
            Self::Double(n) => (0..n).any(|i| f64::from_bits((bits >> (64 * i)) as u64).is_subnormal()),
        }
    }
}

impl Cpu {
    /// Whether a floating-point instruction can run as it is, leaving its flags in the host's MXCSR.
    #[inline(always)]
    pub(crate) fn runs_directly(&mut self) -> bool {
        self.mxcsr_on_host || self.put_mxcsr()
    }

    #[cold]
    #[inline(never)]
    fn put_mxcsr(&mut self) -> bool {
        if self.mxcsr & !FLAGS != MXCSR_DEFAULT {
            return false;
        }
        // SAFETY: the control bits are the host's own; flags may be anything.
        unsafe { asm!("ldmxcsr [{m}]", m = in(reg) &raw const self.mxcsr, options(nostack, readonly)) };
        self.mxcsr_on_host = true;
        true
    }

    /// The guest's MXCSR. To be called on the thread that runs the vCPU.
    #[must_use]
    pub(crate) fn guest_mxcsr(&self) -> u32 {
        if !self.mxcsr_on_host {
            return self.mxcsr;
        }
        let mut host = 0_u32;
        // SAFETY: stores 4 bytes.
        unsafe { asm!("stmxcsr [{m}]", m = in(reg) &raw mut host, options(nostack, preserves_flags)) };
        self.mxcsr | host & FLAGS
    }

    /// Takes the guest's flags off the host's MXCSR: before others use this thread or this vCPU's state.
    pub(crate) fn take_mxcsr(&mut self) {
        self.mxcsr = self.guest_mxcsr();
        self.mxcsr_on_host = false;
    }

    /// Sets MXCSR; `value` has valid bits only.
    pub(crate) fn set_mxcsr(&mut self, value: u32) {
        self.mxcsr = value;
        self.mxcsr_on_host = false;
    }

    /// The guest's MXCSR with its exceptions masked and its flags clear. An underflow exception that is
    /// not masked switches flushing to zero off (Intel SDM vol. 1, 10.2.3.3).
    #[inline(always)]
    pub(crate) fn masked_mxcsr(&self) -> u32 {
        let csr = self.mxcsr & !FLAGS | MASKS;
        if self.mxcsr & UNDERFLOW_MASK == 0 { csr & !FLUSH_TO_ZERO } else { csr }
    }

    /// Takes the flags over that an instruction raised; `tiny` says whether its result is.
    ///
    /// # Errors
    /// The exceptions that the guest has not masked.
    #[inline(always)]
    pub(crate) fn raised(&mut self, csr: u32, tiny: impl FnOnce() -> bool) -> Exec {
        if self.mxcsr & MASKS == MASKS {
            self.mxcsr |= csr & FLAGS;
            return Ok(());
        }
        self.raised_unmasked(csr & FLAGS, tiny())
    }

    #[cold]
    fn raised_unmasked(&mut self, mut flags: u32, tiny: bool) -> Exec {
        let unmasked = !(self.mxcsr >> 7) & FLAGS;
        if flags & BEFORE & unmasked != 0 {
            flags &= BEFORE;
        } else if tiny && unmasked & UNDERFLOW != 0 {
            // Without the mask, being tiny is enough: it need not be inexact as well.
            flags |= UNDERFLOW;
        }
        self.mxcsr |= flags;
        if flags & unmasked == 0 {
            return Ok(());
        }
        Err(if self.cr4 & cr4::OSXMMEXCPT != 0 { Fault::XM } else { Fault::UD })
    }
}

/// `destination = f(destination, source)`.
pub(super) trait Float {
    type Memory: Source;
    const RESULT: Shape;
    /// Under the host's MXCSR as it is.
    fn direct(a: V, b: V) -> V;
    /// `csr` is loaded before and stored after.
    fn controlled(a: V, b: V, csr: &mut u32) -> V;
}

fn float<F: Float, S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::get(cpu, op)?;
    let value = cpu.float::<F>(cpu.vector(op.reg), b)?;
    cpu.set_vector(op.reg, value);
    Ok(())
}

impl Cpu {
    /// Computes as `F` does.
    ///
    /// # Errors
    /// The exceptions that the guest has not masked.
    #[inline(always)]
    pub(super) fn float<F: Float>(&mut self, a: V, b: V) -> Exec<V> {
        if self.runs_directly() {
            return Ok(F::direct(a, b));
        }
        let mut csr = self.masked_mxcsr();
        let value = F::controlled(a, b, &mut csr);
        self.raised(csr, || F::RESULT.tiny(value))?;
        Ok(value)
    }
}

fn forms<F: Float>(insn: &Instruction) -> Option<Handler> {
    match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) => Some(float::<F, Register>),
        (OpKind::Register, OpKind::Memory) => Some(float::<F, F::Memory>),
        _ => None,
    }
}

/// A line: mnemonic, its source in memory, its result, the host's instruction.
macro_rules! float_table {
    ($($name:ident $memory:ident $result:expr, $host:literal;)*) => {
        $(
            pub(super) struct $name;

            impl Float for $name {
                type Memory = $memory;
                const RESULT: Shape = $result;

                #[inline(always)]
                fn direct(mut a: V, b: V) -> V {
                    // SAFETY: registers, and flags of MXCSR, only. The guest has it only if the host has it.
                    unsafe {
                        asm!(concat!($host, " {a}, {b}"), a = inout(xmm_reg) a.0, b = in(xmm_reg) b.0,
                            options(nomem, nostack));
                    }
                    a
                }

                #[inline(always)]
                fn controlled(mut a: V, b: V, csr: &mut u32) -> V {
                    // SAFETY: `csr` has valid bits only, with all exceptions masked; the host's MXCSR is
                    // back at its default afterwards. The guest has the instruction only if the host has.
                    unsafe {
                        asm!("ldmxcsr [{m}]", concat!($host, " {a}, {b}"), "stmxcsr [{m}]", "ldmxcsr [{h}]",
                            a = inout(xmm_reg) a.0, b = in(xmm_reg) b.0, m = in(reg) &raw mut *csr,
                            h = in(reg) &raw const HOST, options(nostack));
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

float_table! {
    Addpd M128 Shape::Double(2), "addpd";
    Addps M128 Shape::Single(4), "addps";
    Addsd M64 Shape::Double(1), "addsd";
    Addss M32 Shape::Single(1), "addss";
    Addsubpd M128 Shape::Double(2), "addsubpd";
    Addsubps M128 Shape::Single(4), "addsubps";
    Cvtdq2ps M128 Shape::Whole, "cvtdq2ps";
    Cvtpd2dq M128 Shape::Whole, "cvtpd2dq";
    Cvtpd2ps M128 Shape::Single(2), "cvtpd2ps";
    Cvtps2dq M128 Shape::Whole, "cvtps2dq";
    Cvtps2pd M64 Shape::Whole, "cvtps2pd";
    Cvtsd2ss M64 Shape::Single(1), "cvtsd2ss";
    Cvtss2sd M32 Shape::Whole, "cvtss2sd";
    Cvttpd2dq M128 Shape::Whole, "cvttpd2dq";
    Cvttps2dq M128 Shape::Whole, "cvttps2dq";
    Divpd M128 Shape::Double(2), "divpd";
    Divps M128 Shape::Single(4), "divps";
    Divsd M64 Shape::Double(1), "divsd";
    Divss M32 Shape::Single(1), "divss";
    Haddpd M128 Shape::Double(2), "haddpd";
    Haddps M128 Shape::Single(4), "haddps";
    Hsubpd M128 Shape::Double(2), "hsubpd";
    Hsubps M128 Shape::Single(4), "hsubps";
    Maxpd M128 Shape::Whole, "maxpd";
    Maxps M128 Shape::Whole, "maxps";
    Maxsd M64 Shape::Whole, "maxsd";
    Maxss M32 Shape::Whole, "maxss";
    Minpd M128 Shape::Whole, "minpd";
    Minps M128 Shape::Whole, "minps";
    Minsd M64 Shape::Whole, "minsd";
    Minss M32 Shape::Whole, "minss";
    Mulpd M128 Shape::Double(2), "mulpd";
    Mulps M128 Shape::Single(4), "mulps";
    Mulsd M64 Shape::Double(1), "mulsd";
    Mulss M32 Shape::Single(1), "mulss";
    Sqrtpd M128 Shape::Whole, "sqrtpd";
    Sqrtps M128 Shape::Whole, "sqrtps";
    Sqrtsd M64 Shape::Whole, "sqrtsd";
    Sqrtss M32 Shape::Whole, "sqrtss";
    Subpd M128 Shape::Double(2), "subpd";
    Subps M128 Shape::Single(4), "subps";
    Subsd M64 Shape::Double(1), "subsd";
    Subss M32 Shape::Single(1), "subss";
}

/// `destination = f(destination, source, immediate)`.
trait WithImmediate {
    type Memory: Source;
    const RESULT: Shape;
    /// Under `csr`, which is loaded before and stored after, or under the host's MXCSR as it is.
    fn apply(a: V, b: V, immediate: u8, csr: Option<&mut u32>) -> V;
}

fn immediate<F: WithImmediate, S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = S::get(cpu, op)?;
    let a = cpu.vector(op.reg);
    if cpu.runs_directly() {
        cpu.set_vector(op.reg, F::apply(a, b, op.imm as u8, None));
        return Ok(());
    }
    let mut csr = cpu.masked_mxcsr();
    let value = F::apply(a, b, op.imm as u8, Some(&mut csr));
    cpu.raised(csr, || F::RESULT.tiny(value))?;
    cpu.set_vector(op.reg, value);
    Ok(())
}

fn immediate_forms<F: WithImmediate>(insn: &Instruction) -> Option<Handler> {
    match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) => Some(immediate::<F, Register>),
        (OpKind::Register, OpKind::Memory) => Some(immediate::<F, F::Memory>),
        _ => None,
    }
}

/// As in `integer.rs`: 256 instructions, and a jump to the one that is wanted.
macro_rules! immediate_table {
    ($($name:ident $memory:ident $result:expr, $host:literal;)*) => {
        $(
            struct $name;

            impl WithImmediate for $name {
                type Memory = $memory;
                const RESULT: Shape = $result;

                #[inline(never)]
                fn apply(mut a: V, b: V, immediate: u8, csr: Option<&mut u32>) -> V {
                    let csr = csr.map_or(core::ptr::null_mut(), core::ptr::from_mut);
                    // SAFETY: the jump lands on one of the 256 entries, each of which fits in 16 bytes and
                    // leaves to the end; MXCSR as in `float_table`, if there is a place for it.
                    unsafe {
                        asm!(
                            "testq {m}, {m}",
                            "jz 4f",
                            "ldmxcsr ({m})",
                            "4:",
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
                            "testq {m}, {m}",
                            "jz 5f",
                            "stmxcsr ({m})",
                            "ldmxcsr ({h})",
                            "5:",
                            t = out(reg) _, i = inout(reg) u64::from(immediate) => _,
                            m = in(reg) csr, h = in(reg) &raw const HOST,
                            inout("xmm0") a.0, in("xmm1") b.0,
                            options(att_syntax, nostack)
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
    Cmppd M128 Shape::Whole, "cmppd";
    Cmpps M128 Shape::Whole, "cmpps";
    Cmpsd M64 Shape::Whole, "cmpsd";
    Cmpss M32 Shape::Whole, "cmpss";
    Dppd M128 Shape::Double(2), "dppd";
    Dpps M128 Shape::Single(4), "dpps";
    Roundpd M128 Shape::Whole, "roundpd";
    Roundps M128 Shape::Whole, "roundps";
    Roundsd M64 Shape::Whole, "roundsd";
    Roundss M32 Shape::Whole, "roundss";
}

/// `dpps` and `dppd`, whose multiplications and additions raise exceptions one step after the other.
fn dot_product<F: WithImmediate, S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (cpu.vector(op.reg).bits(), S::get(cpu, op)?.bits());
    let width = if F::RESULT == Shape::Double(2) { 64 } else { 32 };
    dot_product_exceptions(cpu, width, &[(a, b)], op.imm as u8)?;
    immediate::<F, S>(cpu, op)
}

/// If any exception is not masked: tries the steps of a dot product of elements of `width` bits, in all 128-bit lanes
/// at once.
///
/// # Errors
/// The exceptions that the guest has not masked.
pub(crate) fn dot_product_exceptions(
    cpu: &mut Cpu,
    width: u32,
    lanes: &[(u128, u128)],
    immediate: u8,
) -> Exec {
    if cpu.mxcsr & MASKS == MASKS {
        return Ok(());
    }
    let element = u128::from(u64::MAX >> (64 - width));
    let wanted = |i: &u32| immediate >> (4 + i) & 1 != 0;
    let mask = (0..128 / width).filter(wanted).fold(0, |m, i| m | element << (i * width));
    let values: Vec<_> = lanes.iter().map(|(a, b)| (V::from(a & mask), V::from(b & mask))).collect();
    if width == 64 {
        let products = step::<Mulpd>(cpu, &values)?;
        return step::<Haddpd>(cpu, &products).map(drop);
    }
    let products = step::<Mulps>(cpu, &values)?;
    let sums = step::<Haddps>(cpu, &products)?;
    step::<Haddps>(cpu, &sums).map(drop)
}

/// Computes as `F` does in each lane; each result twice, as the next step takes it.
fn step<F: Float>(cpu: &mut Cpu, lanes: &[(V, V)]) -> Exec<Vec<(V, V)>> {
    let (mut flags, mut tiny) = (0, false);
    let mut one = |&(a, b): &(V, V)| {
        let mut csr = cpu.masked_mxcsr();
        let value = F::controlled(a, b, &mut csr);
        flags |= csr & FLAGS;
        tiny |= F::RESULT.tiny(value);
        (value, value)
    };
    let results = lanes.iter().map(&mut one).collect();
    cpu.raised(flags, || tiny)?;
    Ok(results)
}

/// Comparisons that set ZF, PF and CF, and clear OF, SF and AF.
macro_rules! compare_table {
    ($($mnemonic:ident $name:ident $memory:ident $host:literal;)*) => {
        $(
            fn $name<S: Source>(cpu: &mut Cpu, op: &Op) -> Exec {
                let b = S::get(cpu, op)?;
                let a = cpu.vector(op.reg);
                let flags: u16;
                if cpu.runs_directly() {
                    // SAFETY: registers and flags only.
                    unsafe {
                        asm!(concat!($host, " {a}, {b}"), "lahf", a = in(xmm_reg) a.0, b = in(xmm_reg) b.0,
                            out("ax") flags, options(nomem, nostack));
                    }
                    (cpu.ah, cpu.of) = ((flags >> 8) as u8, 0);
                    return Ok(());
                }
                let mut csr = cpu.masked_mxcsr();
                // SAFETY: as in `float_table`.
                unsafe {
                    asm!("ldmxcsr [{m}]", concat!($host, " {a}, {b}"), "lahf", "stmxcsr [{m}]", "ldmxcsr [{h}]",
                        a = in(xmm_reg) a.0, b = in(xmm_reg) b.0, m = in(reg) &raw mut csr,
                        h = in(reg) &raw const HOST, out("ax") flags, options(nostack));
                }
                cpu.raised(csr, || false)?;
                (cpu.ah, cpu.of) = ((flags >> 8) as u8, 0);
                Ok(())
            }
        )*

        fn compare(insn: &Instruction) -> Option<Handler> {
            let memory = insn.op1_kind() == OpKind::Memory;
            match insn.mnemonic() {
                $(Mnemonic::$mnemonic => Some(if memory { $name::<$memory> } else { $name::<Register> }),)*
                _ => None,
            }
        }
    };
}

compare_table! {
    Comisd comisd M64 "comisd";
    Comiss comiss M32 "comiss";
    Ucomisd ucomisd M64 "ucomisd";
    Ucomiss ucomiss M32 "ucomiss";
}

/// Conversions to a general register of 32 or (`WIDE`) 64 bits.
macro_rules! to_general_table {
    ($($mnemonic:ident $name:ident $memory:ident $host:literal;)*) => {
        $(
            fn $name<S: Source, const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
                let b = S::get(cpu, op)?;
                let value: u64;
                if cpu.runs_directly() {
                    // SAFETY: registers, and flags of MXCSR, only.
                    unsafe {
                        if WIDE {
                            asm!(concat!($host, " {r:r}, {b}"), r = out(reg) value, b = in(xmm_reg) b.0,
                                options(nomem, nostack));
                        } else {
                            asm!(concat!($host, " {r:e}, {b}"), r = out(reg) value, b = in(xmm_reg) b.0,
                                options(nomem, nostack));
                        }
                    }
                    cpu.set_slot(op.reg, value);
                    return Ok(());
                }
                let mut csr = cpu.masked_mxcsr();
                // SAFETY: as in `float_table`.
                unsafe {
                    if WIDE {
                        asm!("ldmxcsr [{m}]", concat!($host, " {r:r}, {b}"), "stmxcsr [{m}]", "ldmxcsr [{h}]",
                            r = out(reg) value, b = in(xmm_reg) b.0, m = in(reg) &raw mut csr,
                            h = in(reg) &raw const HOST, options(nostack));
                    } else {
                        asm!("ldmxcsr [{m}]", concat!($host, " {r:e}, {b}"), "stmxcsr [{m}]", "ldmxcsr [{h}]",
                            r = out(reg) value, b = in(xmm_reg) b.0, m = in(reg) &raw mut csr,
                            h = in(reg) &raw const HOST, options(nostack));
                    }
                }
                cpu.raised(csr, || false)?;
                cpu.set_slot(op.reg, value);
                Ok(())
            }
        )*

        fn to_general(insn: &Instruction) -> Option<Handler> {
            let memory = insn.op1_kind() == OpKind::Memory;
            let wide = insn.op0_register().is_gpr64();
            match insn.mnemonic() {
                $(Mnemonic::$mnemonic => Some(match (memory, wide) {
                    (true, true) => $name::<$memory, true>,
                    (true, false) => $name::<$memory, false>,
                    (false, true) => $name::<Register, true>,
                    (false, false) => $name::<Register, false>,
                }),)*
                _ => None,
            }
        }
    };
}

to_general_table! {
    Cvtsd2si cvtsd2si M64 "cvtsd2si";
    Cvtss2si cvtss2si M32 "cvtss2si";
    Cvttsd2si cvttsd2si M64 "cvttsd2si";
    Cvttss2si cvttss2si M32 "cvttss2si";
}

/// Conversions from a general register or integer in memory of 32 or (`WIDE`) 64 bits.
macro_rules! from_general_table {
    ($($mnemonic:ident $name:ident $host:literal;)*) => {
        $(
            fn $name<S: Source, const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
                let b = S::get(cpu, op)?.bits() as u64;
                let mut a = cpu.vector(op.reg);
                if cpu.runs_directly() {
                    // SAFETY: registers, and flags of MXCSR, only.
                    unsafe {
                        if WIDE {
                            asm!(concat!($host, " {a}, {b:r}"), a = inout(xmm_reg) a.0, b = in(reg) b,
                                options(nomem, nostack));
                        } else {
                            asm!(concat!($host, " {a}, {b:e}"), a = inout(xmm_reg) a.0, b = in(reg) b,
                                options(nomem, nostack));
                        }
                    }
                    cpu.set_vector(op.reg, a);
                    return Ok(());
                }
                let mut csr = cpu.masked_mxcsr();
                // SAFETY: as in `float_table`.
                unsafe {
                    if WIDE {
                        asm!("ldmxcsr [{m}]", concat!($host, " {a}, {b:r}"), "stmxcsr [{m}]", "ldmxcsr [{h}]",
                            a = inout(xmm_reg) a.0, b = in(reg) b, m = in(reg) &raw mut csr,
                            h = in(reg) &raw const HOST, options(nostack));
                    } else {
                        asm!("ldmxcsr [{m}]", concat!($host, " {a}, {b:e}"), "stmxcsr [{m}]", "ldmxcsr [{h}]",
                            a = inout(xmm_reg) a.0, b = in(reg) b, m = in(reg) &raw mut csr,
                            h = in(reg) &raw const HOST, options(nostack));
                    }
                }
                cpu.raised(csr, || false)?;
                cpu.set_vector(op.reg, a);
                Ok(())
            }
        )*

        fn from_general(insn: &Instruction) -> Option<Handler> {
            let memory = insn.op1_kind() == OpKind::Memory;
            let wide = if memory { insn.memory_size().size() == 8 } else { insn.op1_register().is_gpr64() };
            match insn.mnemonic() {
                $(Mnemonic::$mnemonic => Some(match (memory, wide) {
                    (true, true) => $name::<M64, true>,
                    (true, false) => $name::<M32, false>,
                    (false, true) => $name::<General, true>,
                    (false, false) => $name::<General, false>,
                }),)*
                _ => None,
            }
        }
    };
}

from_general_table! {
    Cvtsi2sd cvtsi2sd "cvtsi2sd";
    Cvtsi2ss cvtsi2ss "cvtsi2ss";
}

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    let memory = insn.op1_kind() == OpKind::Memory;
    match insn.mnemonic() {
        Mnemonic::Dppd if memory => return Some(dot_product::<Dppd, M128>),
        Mnemonic::Dppd => return Some(dot_product::<Dppd, Register>),
        Mnemonic::Dpps if memory => return Some(dot_product::<Dpps, M128>),
        Mnemonic::Dpps => return Some(dot_product::<Dpps, Register>),
        _ => {}
    }
    plain(insn)
        .or_else(|| with_immediate(insn))
        .or_else(|| compare(insn))
        .or_else(|| to_general(insn))
        .or_else(|| from_general(insn))
}
