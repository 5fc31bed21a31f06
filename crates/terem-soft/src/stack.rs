//! The stack as pushes and pops see it: SS:RSP, SS:ESP or SS:SP.

use terem_cpu::VcpuState;

use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::memory::Value;
use crate::op::{CHECKED, Op, STACK16, STACK32};

const SP: usize = 4;
const SS: u8 = VcpuState::SS as u8;

impl Cpu {
    /// The bits of RSP that count.
    #[inline(always)]
    fn stack_mask(op: &Op) -> u64 {
        if op.flags & STACK16 != 0 {
            0xffff
        } else if op.flags & STACK32 != 0 {
            0xffff_ffff
        } else {
            u64::MAX
        }
    }

    /// Sets the bits of RSP that count.
    #[inline(always)]
    pub(crate) fn set_sp(&mut self, op: &Op, value: u64) {
        self.gpr[SP] = if op.flags & STACK16 != 0 {
            self.gpr[SP] & !0xffff | value & 0xffff
        } else if op.flags & STACK32 != 0 {
            value & 0xffff_ffff
        } else {
            value
        };
    }

    /// Moves the stack pointer up.
    #[inline(always)]
    pub(crate) fn add_sp(&mut self, op: &Op, bytes: u64) {
        self.set_sp(op, self.gpr[SP].wrapping_add(bytes));
    }

    /// The linear address of `size` bytes of the stack, `above` bytes above the stack pointer.
    #[inline(always)]
    pub(crate) fn stack_linear(&self, op: &Op, above: u64, size: u64, write: bool) -> Exec<u64> {
        let offset = self.gpr[SP].wrapping_add(above) & Self::stack_mask(op);
        if op.flags & CHECKED != 0 {
            return self.checked_linear(SS, offset, size, write);
        }
        Ok(self.segment_base[usize::from(SS)].wrapping_add(offset))
    }

    /// Pushes a value; on a fault nothing has changed.
    ///
    /// # Errors
    /// What segmentation and paging say.
    #[inline(always)]
    pub(crate) fn push<T: Value>(&mut self, op: &Op, value: T) -> Exec {
        let at = self.stack_linear(op, T::SIZE.wrapping_neg(), T::SIZE, true)?;
        self.store_in(at, value, SS)?;
        self.set_sp(op, self.gpr[SP].wrapping_sub(T::SIZE));
        Ok(())
    }

    /// Reads the stack, `above` bytes above the stack pointer, which stays.
    ///
    /// # Errors
    /// What segmentation and paging say.
    #[inline(always)]
    pub(crate) fn peek<T: Value>(&mut self, op: &Op, above: u64) -> Exec<T> {
        let at = self.stack_linear(op, above, T::SIZE, false)?;
        self.load_in(at, SS)
    }

    /// Pops a value; on a fault nothing has changed.
    ///
    /// # Errors
    /// What segmentation and paging say.
    #[inline(always)]
    pub(crate) fn pop<T: Value>(&mut self, op: &Op) -> Exec<T> {
        let value = self.peek(op, 0)?;
        self.add_sp(op, T::SIZE);
        Ok(value)
    }

    /// The offset that BP, EBP or RBP has in the stack segment.
    pub(crate) fn frame_pointer(&self, op: &Op) -> u64 {
        self.gpr[5] & Self::stack_mask(op)
    }
}
