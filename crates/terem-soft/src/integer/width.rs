//! Operand widths: registers by width, and the host's own instructions for each.
//!
//! Operations are pure: they take the flags and give them back as the register AX holds them after
//! `lahf; seto al` (SF, ZF, AF, PF, CF in its upper half, OF in the lowest bit). What an instruction leaves
//! undefined comes out as on the host, which is exact for a guest that has the host's processor.

use std::arch::asm;

use crate::cpu::Cpu;
use crate::memory::Value;

/// Flags as `lahf; seto al` leaves them in AX.
pub(super) type Flags = u16;

/// ZF in [`Flags`].
pub(super) const ZERO: Flags = 0x4000;

/// An unsigned integer as instructions know it: 8, 16, 32 or 64 bits.
pub(crate) trait Int: Value + Eq + Ord {
    /// Width.
    const BITS: u32;
    /// The low bits of a value.
    fn cut(value: u64) -> Self;
    /// Zero-extended.
    fn wide(self) -> u64;
    /// Sign-extended.
    fn signed(self) -> i64;
    /// Reads a register. For 8 bits, `register` is [`byte_register`]'s number; else 0–15.
    fn get(cpu: &Cpu, register: u8) -> Self;
    /// Writes a register: 32 bits clear the upper half, 8 and 16 leave the rest as it was.
    fn set(self, cpu: &mut Cpu, register: u8);

    fn add(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    fn sub(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    fn and(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    fn or(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    fn xor(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    fn adc(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    fn sbb(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    fn inc(flags: Flags, a: Self) -> (Self, Flags);
    fn dec(flags: Flags, a: Self) -> (Self, Flags);
    fn neg(flags: Flags, a: Self) -> (Self, Flags);
    fn shl(flags: Flags, a: Self, count: u8) -> (Self, Flags);
    fn shr(flags: Flags, a: Self, count: u8) -> (Self, Flags);
    fn sar(flags: Flags, a: Self, count: u8) -> (Self, Flags);
    fn rol(flags: Flags, a: Self, count: u8) -> (Self, Flags);
    fn ror(flags: Flags, a: Self, count: u8) -> (Self, Flags);
    fn rcl(flags: Flags, a: Self, count: u8) -> (Self, Flags);
    fn rcr(flags: Flags, a: Self, count: u8) -> (Self, Flags);
    /// One atomic compare-and-exchange: what was there.
    ///
    /// # Safety
    /// `at` is valid for reads and writes of this width, at any alignment.
    unsafe fn compare_exchange(at: *mut u8, expected: Self, new: Self) -> Self;
    /// One atomic exchange: what was there.
    ///
    /// # Safety
    /// As for [`Self::compare_exchange`].
    unsafe fn exchange(at: *mut u8, new: Self) -> Self;
}

/// An [`Int`] of 16, 32 or 64 bits: what has no 8-bit form.
pub(crate) trait Word: Int {
    fn imul(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    fn bt(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    fn bts(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    fn btr(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    fn btc(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    /// Scans `b`; with no bit set the result is `a`.
    fn bsf(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    /// As [`Self::bsf`], from above.
    fn bsr(flags: Flags, a: Self, b: Self) -> (Self, Flags);
    fn shld(flags: Flags, a: Self, b: Self, count: u8) -> (Self, Flags);
    fn shrd(flags: Flags, a: Self, b: Self, count: u8) -> (Self, Flags);
    /// Low and high half of the product.
    fn mul_wide(flags: Flags, a: Self, b: Self) -> (Self, Self, Flags);
    /// The same, signed.
    fn imul_wide(flags: Flags, a: Self, b: Self) -> (Self, Self, Flags);
    /// Quotient and remainder, once it is known that there is no `#DE`.
    ///
    /// # Safety
    /// The divisor is not zero and the quotient fits.
    unsafe fn div_wide(flags: Flags, low: Self, high: Self, by: Self) -> (Self, Self, Flags);
    /// The same, signed.
    ///
    /// # Safety
    /// As for [`Self::div_wide`].
    unsafe fn idiv_wide(flags: Flags, low: Self, high: Self, by: Self) -> (Self, Self, Flags);
    /// Bytes in the other order.
    fn swapped(self) -> Self;
}

/// Puts the guest's flags into the host's (AX: see [`Flags`]).
macro_rules! old {
    () => {
        "add al, 0x7f\n sahf\n"
    };
}

/// Takes the host's flags to AX.
macro_rules! new {
    () => {
        "\n lahf\n seto al"
    };
}

/// Two operands; the flags before do not count.
macro_rules! plain {
    ($class:ident, $m:literal, $($name:ident)*) => { $(
        #[inline(always)]
        fn $name(_: Flags, mut a: Self, b: Self) -> (Self, Flags) {
            let f: Flags;
            // SAFETY: works on registers only.
            unsafe {
                asm!(concat!(stringify!($name), " {a", $m, "}, {b", $m, "}", new!()),
                    a = inout($class) a, b = in($class) b, out("ax") f, options(pure, nomem, nostack));
            }
            (a, f)
        }
    )* };
}

/// Two operands.
macro_rules! binary {
    ($class:ident, $m:literal, $($name:ident $ins:literal;)*) => { $(
        #[inline(always)]
        fn $name(flags: Flags, mut a: Self, b: Self) -> (Self, Flags) {
            let mut f = flags;
            // SAFETY: works on registers only.
            unsafe {
                asm!(concat!(old!(), $ins, " {a", $m, "}, {b", $m, "}", new!()),
                    a = inout($class) a, b = in($class) b, inout("ax") f, options(pure, nomem, nostack));
            }
            (a, f)
        }
    )* };
}

/// One operand.
macro_rules! unary {
    ($class:ident, $m:literal, $($name:ident)*) => { $(
        #[inline(always)]
        fn $name(flags: Flags, mut a: Self) -> (Self, Flags) {
            let mut f = flags;
            // SAFETY: works on registers only.
            unsafe {
                asm!(concat!("sahf\n", stringify!($name), " {a", $m, "}", new!()),
                    a = inout($class) a, inout("ax") f, options(pure, nomem, nostack));
            }
            (a, f)
        }
    )* };
}

/// An operand and a count in CL.
macro_rules! shift {
    ($class:ident, $m:literal, $($name:ident)*) => { $(
        #[inline(always)]
        fn $name(flags: Flags, mut a: Self, count: u8) -> (Self, Flags) {
            let mut f = flags;
            // SAFETY: works on registers only.
            unsafe {
                asm!(concat!(old!(), stringify!($name), " {a", $m, "}, cl", new!()),
                    a = inout($class) a, in("cl") count, inout("ax") f, options(pure, nomem, nostack));
            }
            (a, f)
        }
    )* };
}

/// What every width has.
macro_rules! int {
    ($class:ident, $m:literal, $acc:tt) => {
        const BITS: u32 = Self::BITS;

        #[inline(always)]
        fn cut(value: u64) -> Self {
            value as Self
        }

        #[inline(always)]
        fn wide(self) -> u64 {
            self as u64
        }

        plain! { $class, $m, add sub and or xor }
        binary! { $class, $m, adc "adc"; sbb "sbb"; }
        unary! { $class, $m, inc dec neg }
        shift! { $class, $m, shl shr sar rol ror rcl rcr }

        #[inline(always)]
        unsafe fn compare_exchange(at: *mut u8, expected: Self, new: Self) -> Self {
            let mut a = expected;
            // SAFETY: the caller's promise; `lock` works at any alignment.
            unsafe {
                asm!(concat!("lock cmpxchg [{at}], {new", $m, "}"),
                    at = in(reg) at, new = in($class) new, inout($acc) a, options(nostack));
            }
            a
        }

        #[inline(always)]
        unsafe fn exchange(at: *mut u8, new: Self) -> Self {
            let mut a = new;
            // SAFETY: the caller's promise; `xchg` with memory is atomic at any alignment.
            unsafe {
                asm!(concat!("xchg [{at}], {a", $m, "}"),
                    at = in(reg) at, a = inout($class) a, options(nostack));
            }
            a
        }
    };
}

impl Int for u8 {
    int! { reg_byte, "", "al" }

    #[inline(always)]
    fn signed(self) -> i64 {
        i64::from(self as i8)
    }

    #[inline(always)]
    fn get(cpu: &Cpu, register: u8) -> Self {
        // SAFETY: the decoder gives 0–127: bytes of the first sixteen slots.
        unsafe { *cpu.gpr.as_ptr().cast::<u8>().add(usize::from(register)) }
    }

    #[inline(always)]
    fn set(self, cpu: &mut Cpu, register: u8) {
        // The whole register is written, since reading it right after a store of a part stalls.
        let shift = (register & 1) * 8;
        // SAFETY: as in `get`.
        let slot = unsafe { cpu.gpr.get_unchecked_mut(usize::from(register >> 3)) };
        *slot = *slot & !(0xff << shift) | u64::from(self) << shift;
    }
}

/// What every width but 8 bits has.
macro_rules! word {
    ($t:ty, $i:ty, $m:literal, $a:tt, $d:tt, |$old:ident, $v:ident| $merge:expr) => {
        impl Int for $t {
            int! { reg, $m, $a }

            #[inline(always)]
            fn signed(self) -> i64 {
                self as $i as i64
            }

            #[inline(always)]
            fn get(cpu: &Cpu, register: u8) -> Self {
                cpu.slot(register) as $t
            }

            #[inline(always)]
            fn set(self, cpu: &mut Cpu, register: u8) {
                // SAFETY: the decoder gives 0–15.
                let $old = unsafe { cpu.gpr.get_unchecked_mut(usize::from(register)) };
                let $v = self;
                *$old = $merge;
            }
        }

        impl Word for $t {
            binary! { reg, $m,
                imul "imul"; bt "bt"; bts "bts"; btr "btr"; btc "btc"; bsf "bsf"; bsr "bsr";
            }

            #[inline(always)]
            fn shld(flags: Flags, mut a: Self, b: Self, count: u8) -> (Self, Flags) {
                let mut f = flags;
                // SAFETY: works on registers only.
                unsafe {
                    asm!(concat!(old!(), "shld {a", $m, "}, {b", $m, "}, cl", new!()), a = inout(reg) a,
                        b = in(reg) b, in("cl") count, inout("ax") f, options(pure, nomem, nostack));
                }
                (a, f)
            }

            #[inline(always)]
            fn shrd(flags: Flags, mut a: Self, b: Self, count: u8) -> (Self, Flags) {
                let mut f = flags;
                // SAFETY: works on registers only.
                unsafe {
                    asm!(concat!(old!(), "shrd {a", $m, "}, {b", $m, "}, cl", new!()), a = inout(reg) a,
                        b = in(reg) b, in("cl") count, inout("ax") f, options(pure, nomem, nostack));
                }
                (a, f)
            }

            #[inline(always)]
            fn mul_wide(flags: Flags, a: Self, b: Self) -> (Self, Self, Flags) {
                let (mut f, mut low) = (flags, a);
                let high: Self;
                // SAFETY: works on registers only.
                unsafe {
                    asm!(concat!(old!(), "mov rax, {a:r}\n mul {b", $m, "}\n mov {a:r}, rax", new!()),
                        a = inout(reg) low, b = in(reg) b, inout("ax") f, out($d) high,
                        options(pure, nomem, nostack));
                }
                (low, high, f)
            }

            #[inline(always)]
            fn imul_wide(flags: Flags, a: Self, b: Self) -> (Self, Self, Flags) {
                let (mut f, mut low) = (flags, a);
                let high: Self;
                // SAFETY: works on registers only.
                unsafe {
                    asm!(concat!(old!(), "mov rax, {a:r}\n imul {b", $m, "}\n mov {a:r}, rax", new!()),
                        a = inout(reg) low, b = in(reg) b, inout("ax") f, out($d) high,
                        options(pure, nomem, nostack));
                }
                (low, high, f)
            }

            #[inline(always)]
            unsafe fn div_wide(flags: Flags, low: Self, high: Self, by: Self) -> (Self, Self, Flags) {
                let (mut f, mut low, mut high) = (flags, low, high);
                // SAFETY: works on registers only, and the caller says that it does not fault.
                unsafe {
                    asm!(concat!(old!(), "mov rax, {a:r}\n div {b", $m, "}\n mov {a:r}, rax", new!()),
                        a = inout(reg) low, b = in(reg) by, inout("ax") f, inout($d) high,
                        options(pure, nomem, nostack));
                }
                (low, high, f)
            }

            #[inline(always)]
            unsafe fn idiv_wide(flags: Flags, low: Self, high: Self, by: Self) -> (Self, Self, Flags) {
                let (mut f, mut low, mut high) = (flags, low, high);
                // SAFETY: works on registers only, and the caller says that it does not fault.
                unsafe {
                    asm!(concat!(old!(), "mov rax, {a:r}\n idiv {b", $m, "}\n mov {a:r}, rax", new!()),
                        a = inout(reg) low, b = in(reg) by, inout("ax") f, inout($d) high,
                        options(pure, nomem, nostack));
                }
                (low, high, f)
            }

            #[inline(always)]
            fn swapped(self) -> Self {
                self.swap_bytes()
            }
        }
    };
}
word! { u16, i16, ":x", "ax", "dx", |old, v| *old & !0xffff | u64::from(v) }
word! { u32, i32, ":e", "eax", "edx", |old, v| { let _ = &old; u64::from(v) } }
word! { u64, i64, ":r", "rax", "rdx", |old, v| { let _ = &old; v } }

/// 8-bit multiplication and division work on AX.
pub(super) mod byte {
    use super::{Flags, asm};

    macro_rules! wide {
        ($($name:ident $ins:literal;)*) => { $(
            /// The instruction of this name: AX after it.
            ///
            /// # Safety
            /// A division must be known not to fault.
            #[inline(always)]
            pub(crate) unsafe fn $name(flags: Flags, ax: u16, b: u8) -> (u16, Flags) {
                let (mut f, mut ax) = (flags, ax);
                // SAFETY: works on registers only.
                unsafe {
                    asm!(concat!(old!(), "mov rax, {a:r}\n ", $ins, " {b}\n mov {a:r}, rax", new!()),
                        a = inout(reg) ax, b = in(reg_byte) b, inout("ax") f, options(pure, nomem, nostack));
                }
                (ax, f)
            }
        )* };
    }
    wide! { mul "mul"; imul "imul"; div "div"; idiv "idiv"; }
}

impl Cpu {
    /// The arithmetic flags.
    #[inline(always)]
    pub(super) fn flags(&self) -> Flags {
        u16::from(self.ah) << 8 | u16::from(self.of)
    }

    /// Sets the arithmetic flags.
    #[inline(always)]
    pub(super) fn set_flags(&mut self, flags: Flags) {
        self.ah = (flags >> 8) as u8;
        self.of = flags as u8;
    }
}
