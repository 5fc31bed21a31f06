//! Vector values, and where an instruction's second operand comes from.

use core::arch::x86_64::__m128i;

use crate::cpu::{Cpu, Xmm};
use crate::fault::{Exec, Fault};
use crate::memory::Value;
use crate::op::Op;

/// A 128-bit value in a host vector register.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct V(pub(crate) __m128i);

impl V {
    #[inline(always)]
    pub(crate) fn bits(self) -> u128 {
        // SAFETY: both are 16 plain bytes.
        unsafe { core::mem::transmute::<__m128i, u128>(self.0) }
    }
}

impl From<u128> for V {
    #[inline(always)]
    fn from(bits: u128) -> Self {
        // SAFETY: both are 16 plain bytes.
        Self(unsafe { core::mem::transmute::<u128, __m128i>(bits) })
    }
}

impl Default for V {
    #[inline(always)]
    fn default() -> Self {
        Self::from(0)
    }
}

// SAFETY: 16 plain bytes.
unsafe impl Value for V {
    fn from_bytes(bytes: &[u8]) -> Self {
        Self::from(<u128 as Value>::from_bytes(bytes))
    }

    fn to_bytes(self) -> [u8; 16] {
        self.bits().to_le_bytes()
    }
}

impl Cpu {
    /// XMM register `n` (0–15).
    #[inline(always)]
    pub(crate) fn vector(&self, n: u8) -> V {
        let from: *const Xmm = &raw const self.ymm[usize::from(n & 15)].low;
        // SAFETY: both are 16 plain bytes, aligned. (By way of `u128` it would be two general registers.)
        unsafe { *from.cast::<V>() }
    }

    /// Sets XMM register `n`.
    #[inline(always)]
    pub(crate) fn set_vector(&mut self, n: u8, value: V) {
        let to: *mut Xmm = &raw mut self.ymm[usize::from(n & 15)].low;
        // SAFETY: as in `vector`.
        unsafe { *to.cast::<V>() = value };
    }

    /// The low 64 bits of XMM register `n`.
    #[inline(always)]
    pub(crate) fn low64(&self, n: u8) -> u64 {
        self.ymm[usize::from(n & 15)].low.0 as u64
    }

    /// A general register; `n` comes from the decoder (0–15).
    #[inline(always)]
    pub(crate) fn set_slot(&mut self, n: u8, value: u64) {
        self.gpr[usize::from(n & 15)] = value;
    }

    /// Reads the memory operand of 16 bytes, which must be aligned (Intel SDM vol. 1, 4.1.1).
    #[inline(always)]
    pub(crate) fn load_aligned(&mut self, op: &Op) -> Exec<V> {
        let at = self.operand_address(op, 16, false)?;
        if at & 15 != 0 {
            return Err(Fault::GP0);
        }
        self.load_in(at, op.segment)
    }

    /// Writes the memory operand of 16 bytes, which must be aligned.
    #[inline(always)]
    pub(crate) fn store_aligned(&mut self, op: &Op, value: V) -> Exec {
        let at = self.operand_address(op, 16, true)?;
        if at & 15 != 0 {
            return Err(Fault::GP0);
        }
        self.store_in(at, value, op.segment)
    }
}

/// Where a source operand is.
pub(crate) trait Source {
    /// Reads it, with zeros above its size.
    fn get(cpu: &mut Cpu, op: &Op) -> Exec<V>;
}

/// The XMM register [`Op::rm`].
pub(crate) struct Register;

impl Source for Register {
    #[inline(always)]
    fn get(cpu: &mut Cpu, op: &Op) -> Exec<V> {
        Ok(cpu.vector(op.rm))
    }
}

/// 16 bytes of memory, aligned.
pub(crate) struct M128;

impl Source for M128 {
    #[inline(always)]
    fn get(cpu: &mut Cpu, op: &Op) -> Exec<V> {
        cpu.load_aligned(op)
    }
}

/// 16 bytes of memory at any address.
pub(crate) struct U128;

impl Source for U128 {
    #[inline(always)]
    fn get(cpu: &mut Cpu, op: &Op) -> Exec<V> {
        cpu.load_operand::<V>(op)
    }
}

macro_rules! narrow {
    ($($(#[$doc:meta])* $name:ident $t:ty;)*) => { $(
        $(#[$doc])*
        pub(crate) struct $name;

        impl Source for $name {
            #[inline(always)]
            fn get(cpu: &mut Cpu, op: &Op) -> Exec<V> {
                Ok(V::from(u128::from(cpu.load_operand::<$t>(op)?)))
            }
        }
    )* };
}

narrow! {
    /// 8 bytes of memory.
    M64 u64;
    /// 4 bytes of memory.
    M32 u32;
    /// 2 bytes of memory.
    M16 u16;
}

/// The general register [`Op::rm`], all of it.
pub(crate) struct General;

impl Source for General {
    #[inline(always)]
    fn get(cpu: &mut Cpu, op: &Op) -> Exec<V> {
        Ok(V::from(u128::from(cpu.slot(op.rm))))
    }
}

/// The MMX register [`Op::rm`].
pub(crate) struct Mmx;

impl Source for Mmx {
    #[inline(always)]
    fn get(cpu: &mut Cpu, op: &Op) -> Exec<V> {
        Ok(V::from(u128::from(cpu.fpu.mm(op.rm))))
    }
}
