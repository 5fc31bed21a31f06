//! Memory operands larger than what one access moves.

use crate::cpu::Cpu;
use crate::fault::{Exec, Fault};
use crate::mmu::{Access, PAGE_MASK};
use crate::op::Op;

impl Cpu {
    /// Linear address of the memory operand, which must be aligned to `alignment` bytes.
    ///
    /// # Errors
    /// `#GP(0)` if it is not; what segmentation says.
    pub(super) fn aligned_area(&mut self, op: &Op, size: u64, alignment: u64, write: bool) -> Exec<u64> {
        let at = self.operand_address(op, size, write)?;
        if at % alignment != 0 {
            return Err(Fault::GP0);
        }
        Ok(at)
    }

    /// Reads the memory operand.
    ///
    /// # Errors
    /// What segmentation and paging say.
    pub(super) fn load_area(&mut self, op: &Op, to: &mut [u8]) -> Exec {
        let at = self.operand_address(op, to.len() as u64, false)?;
        self.load_bytes(at, op.segment, to)
    }

    /// Writes the memory operand: all of it or, if it faults, nothing.
    ///
    /// # Errors
    /// What segmentation and paging say.
    pub(super) fn store_area(&mut self, op: &Op, from: &[u8]) -> Exec {
        let at = self.operand_address(op, from.len() as u64, true)?;
        self.check_writable(at, op.segment, from.len() as u64)?;
        self.store_bytes(at, op.segment, from)
    }

    /// Reads from a linear address, in pieces of 8 bytes as far as it goes.
    pub(super) fn load_bytes(&mut self, mut at: u64, segment: u8, to: &mut [u8]) -> Exec {
        let (wide, rest) = to.as_chunks_mut::<8>();
        for piece in wide {
            *piece = self.load_in::<u64>(self.wrap(at), segment)?.to_le_bytes();
            at = at.wrapping_add(8);
        }
        let (pairs, rest) = rest.as_chunks_mut::<2>();
        for piece in pairs {
            *piece = self.load_in::<u16>(self.wrap(at), segment)?.to_le_bytes();
            at = at.wrapping_add(2);
        }
        for byte in rest {
            *byte = self.load_in::<u8>(self.wrap(at), segment)?;
        }
        Ok(())
    }

    /// Writes to a linear address, in pieces of 8 bytes as far as it goes.
    pub(crate) fn store_bytes(&mut self, mut at: u64, segment: u8, from: &[u8]) -> Exec {
        let (wide, rest) = from.as_chunks::<8>();
        for piece in wide {
            self.store_in(self.wrap(at), u64::from_le_bytes(*piece), segment)?;
            at = at.wrapping_add(8);
        }
        let (pairs, rest) = rest.as_chunks::<2>();
        for piece in pairs {
            self.store_in(self.wrap(at), u16::from_le_bytes(*piece), segment)?;
            at = at.wrapping_add(2);
        }
        for byte in rest {
            self.store_in(self.wrap(at), *byte, segment)?;
        }
        Ok(())
    }

    /// Checks that a store of `size` (1 or more) bytes will not fault.
    pub(crate) fn check_writable(&mut self, at: u64, segment: u8, size: u64) -> Exec {
        self.canonical(at, size, segment)?;
        self.translate(self.wrap(at), Access::Write)?;
        let last = self.wrap(at.wrapping_add(size - 1));
        if last >> 12 != self.wrap(at) >> 12 {
            self.translate(last & PAGE_MASK, Access::Write)?;
        }
        Ok(())
    }
}
