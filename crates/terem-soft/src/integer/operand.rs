//! Where operands come from, and read-modify-write of memory.

use std::sync::{Mutex, MutexGuard, PoisonError};

use iced_x86::{Instruction, OpKind, Register};

use super::width::Int;
use crate::cpu::Cpu;
use crate::decode::{gpr_number, is_high_byte};
use crate::fault::Exec;
use crate::memory::Value;
use crate::op::{ADDR16, ADDR32, Op};

/// A source operand, fixed at decode time.
pub(super) trait Source {
    /// Its value.
    fn read<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec<W>;
}

/// The register [`Op::rm`].
pub(super) struct Reg;
/// The memory operand.
pub(super) struct Mem;
/// The immediate.
pub(super) struct Imm;

impl Source for Reg {
    #[inline(always)]
    fn read<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec<W> {
        Ok(W::get(cpu, op.rm))
    }
}

impl Source for Mem {
    #[inline(always)]
    fn read<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec<W> {
        cpu.load_operand(op)
    }
}

impl Source for Imm {
    #[inline(always)]
    fn read<W: Int>(_: &mut Cpu, op: &Op) -> Exec<W> {
        Ok(W::cut(op.imm))
    }
}

/// The handler for an operand width in bytes.
macro_rules! sized {
    ($bytes:expr, $f:ident $(, $g:ty)*) => {
        match $bytes {
            1 => $f::<$($g,)* u8> as crate::op::Handler,
            2 => $f::<$($g,)* u16>,
            4 => $f::<$($g,)* u32>,
            _ => $f::<$($g,)* u64>,
        }
    };
}

/// The same for what has no 8-bit form.
macro_rules! worded {
    ($bytes:expr, $f:ident $(, $g:ty)*) => {
        match $bytes {
            2 => $f::<$($g,)* u16> as crate::op::Handler,
            4 => $f::<$($g,)* u32>,
            _ => $f::<$($g,)* u64>,
        }
    };
}

/// The handler for a condition code (0–15, as in the opcode).
macro_rules! conditional {
    ($c:expr, $f:ident $(, $g:ty)*) => {
        match $c {
            0 => $f::<0 $(, $g)*> as crate::op::Handler,
            1 => $f::<1 $(, $g)*>,
            2 => $f::<2 $(, $g)*>,
            3 => $f::<3 $(, $g)*>,
            4 => $f::<4 $(, $g)*>,
            5 => $f::<5 $(, $g)*>,
            6 => $f::<6 $(, $g)*>,
            7 => $f::<7 $(, $g)*>,
            8 => $f::<8 $(, $g)*>,
            9 => $f::<9 $(, $g)*>,
            10 => $f::<10 $(, $g)*>,
            11 => $f::<11 $(, $g)*>,
            12 => $f::<12 $(, $g)*>,
            13 => $f::<13 $(, $g)*>,
            14 => $f::<14 $(, $g)*>,
            _ => $f::<15 $(, $g)*>,
        }
    };
}

pub(super) use {conditional, sized, worded};

/// The width of operand `n` in bytes.
pub(super) fn width(insn: &Instruction, n: u32) -> usize {
    match insn.op_kind(n) {
        OpKind::Register => insn.op_register(n).size(),
        OpKind::Memory => insn.memory_size().size(),
        _ => 0,
    }
}

/// Whether operand `n` is a general register.
pub(super) fn is_reg(insn: &Instruction, n: u32) -> bool {
    n < insn.op_count() && insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_gpr()
}

/// Whether operand `n` is memory.
pub(super) fn is_mem(insn: &Instruction, n: u32) -> bool {
    n < insn.op_count() && insn.op_kind(n) == OpKind::Memory
}

/// The number of the general register that is operand `n`, as [`Int::get`] takes it.
pub(super) fn reg(insn: &Instruction, n: u32) -> u8 {
    register(insn.op_register(n))
}

/// The number of a general register as [`Int::get`] takes it: for 8-bit ones the byte's place in the file.
pub(super) fn register(r: Register) -> u8 {
    let n = gpr_number(r);
    match (r.is_gpr8(), is_high_byte(r)) {
        (false, _) => n,
        (true, false) => n * 8,
        (true, true) => (n - 4) * 8 + 1,
    }
}

/// Held during a read-modify-write that must be atomic but that the host's own atomics cannot do.
static BUS_LOCK: Mutex<()> = Mutex::new(());

/// The bus, locked.
pub(super) fn bus_lock() -> MutexGuard<'static, ()> {
    BUS_LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For accesses at any alignment.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T: Copy>(T);

impl Cpu {
    /// The memory operand's offset in its segment, moved by `delta` bytes.
    #[inline(always)]
    pub(super) fn offset_plus(&self, op: &Op, delta: u64) -> u64 {
        let at = self.offset(op).wrapping_add(delta);
        if op.flags & ADDR32 != 0 {
            at & 0xffff_ffff
        } else if op.flags & ADDR16 != 0 {
            at & 0xffff
        } else {
            at
        }
    }

    /// Reads the memory operand, changes it and writes it back. `change` is called at most once, and not
    /// before it is certain that the write does not fault.
    #[inline(always)]
    pub(super) fn modify_operand<T: Value>(&mut self, op: &Op, change: impl FnOnce(T) -> T) -> Exec {
        let at = self.linear(op, self.offset(op), T::SIZE, true)?;
        self.modify(at, op.segment, change)
    }

    /// [`Self::modify_operand`] at a linear address.
    #[inline(always)]
    pub(super) fn modify<T: Value>(&mut self, at: u64, segment: u8, change: impl FnOnce(T) -> T) -> Exec {
        let entry = self.tlb.entry(at);
        if entry.write == self.tlb.tag(at.wrapping_add(T::SIZE - 1)) {
            let host = at.wrapping_add(entry.addend) as *mut Unaligned<T>;
            // SAFETY: the tag matched for the access' last byte, and its first is on the entry's page: all
            // of it is on a page of guest RAM that may be written.
            unsafe { host.write_volatile(Unaligned(change(host.read_volatile().0))) };
            self.stored(host as u64);
            return Ok(());
        }
        // Reported as a write whatever comes first (Intel SDM vol. 3, 4.7).
        self.atomic_address(at, T::SIZE, segment)?;
        let value = self.load_in(at, segment)?;
        self.store_in(at, change(value), segment)
    }

    /// Reads the memory operand, changes it and writes it back, all atomically. `change` may be called
    /// several times; its last call counts.
    #[inline(always)]
    pub(super) fn modify_locked<T: Int>(&mut self, op: &Op, change: impl FnMut(T) -> T) -> Exec {
        let at = self.linear(op, self.offset(op), T::SIZE, true)?;
        self.modify_locked_at(at, op.segment, change)
    }

    /// [`Self::modify_locked`] at a linear address.
    #[inline(always)]
    pub(super) fn modify_locked_at<T: Int>(
        &mut self,
        at: u64,
        segment: u8,
        mut change: impl FnMut(T) -> T,
    ) -> Exec {
        let Some(host) = self.atomic_address(at, T::SIZE, segment)? else {
            let _lock = bus_lock();
            let value = self.load_in(at, segment)?;
            return self.store_in(at, change(value), segment);
        };
        // SAFETY: `atomic_address` gives a place in RAM for this width; the read may tear only where the
        // compare-and-exchange then fails.
        let mut seen = unsafe { host.cast::<Unaligned<T>>().read_volatile() }.0;
        loop {
            let new = change(seen);
            // SAFETY: as above.
            let found = unsafe { T::compare_exchange(host, seen, new) };
            if found == seen {
                break;
            }
            seen = found;
        }
        self.stored(host as u64);
        Ok(())
    }
}
