//! Guest memory as instructions access it: linear addresses, through the software TLB.
//!
//! All accesses are volatile, so that guest threads on several host threads see each other as the
//! hardware's memory model has it (which is the guest's own).

use crate::cpu::Cpu;
use crate::fault::{Exec, Fault, vector};
use crate::mmu::{Access, PAGE_MASK};
use crate::op::{ADDR16, ADDR32, CHECKED, Op};

/// A value that one memory access moves. Plain old data of 1, 2, 4, 8 or 16 bytes.
///
/// # Safety
/// Every bit pattern is a value, and there is no padding.
pub unsafe trait Value: Copy + Default {
    /// Bytes.
    const SIZE: u64 = size_of::<Self>() as u64;
    /// From little-endian bytes (as many as [`Self::SIZE`]).
    fn from_bytes(bytes: &[u8]) -> Self;
    /// Little-endian bytes in the first [`Self::SIZE`] places.
    fn to_bytes(self) -> [u8; 16];
}

macro_rules! value {
    ($($t:ty),*) => { $(
        // SAFETY: an integer.
        unsafe impl Value for $t {
            fn from_bytes(bytes: &[u8]) -> Self {
                let mut b = [0; size_of::<$t>()];
                b.copy_from_slice(&bytes[..size_of::<$t>()]);
                Self::from_le_bytes(b)
            }

            fn to_bytes(self) -> [u8; 16] {
                let mut b = [0; 16];
                b[..size_of::<$t>()].copy_from_slice(&self.to_le_bytes());
                b
            }
        }
    )* };
}
value!(u8, u16, u32, u64, u128);

/// For volatile accesses at any address.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T: Copy>(T);

impl Cpu {
    /// The memory operand's offset in its segment.
    #[inline(always)]
    #[must_use]
    pub fn offset(&self, op: &Op) -> u64 {
        let at = self.slot(op.base).wrapping_add(self.slot(op.index) << op.shift).wrapping_add(op.disp);
        if op.flags & (ADDR32 | ADDR16) == 0 {
            at
        } else if op.flags & ADDR32 != 0 {
            at & 0xffff_ffff
        } else {
            at & 0xffff
        }
    }

    /// The linear address of `offset` in the operand's segment, for `size` bytes.
    ///
    /// # Errors
    /// `#GP(0)` or `#SS(0)` where the segment does not allow the access.
    #[inline(always)]
    pub fn linear(&self, op: &Op, offset: u64, size: u64, write: bool) -> Exec<u64> {
        if op.flags & CHECKED != 0 {
            return self.checked_linear(op.segment, offset, size, write);
        }
        Ok(self.segment_base[usize::from(op.segment & 7)].wrapping_add(offset))
    }

    /// Reads the memory operand.
    ///
    /// # Errors
    /// What segmentation and paging say.
    #[inline(always)]
    pub fn load_operand<T: Value>(&mut self, op: &Op) -> Exec<T> {
        let at = self.linear(op, self.offset(op), T::SIZE, false)?;
        self.load_in(at, op.segment)
    }

    /// Writes the memory operand.
    ///
    /// # Errors
    /// What segmentation and paging say.
    #[inline(always)]
    pub fn store_operand<T: Value>(&mut self, op: &Op, value: T) -> Exec {
        let at = self.linear(op, self.offset(op), T::SIZE, true)?;
        self.store_in(at, value, op.segment)
    }

    /// The memory operand's linear address, for handlers that access it more than once.
    ///
    /// # Errors
    /// What segmentation says of `size` bytes.
    #[inline(always)]
    pub fn operand_address(&mut self, op: &Op, size: u64, write: bool) -> Exec<u64> {
        self.linear(op, self.offset(op), size, write)
    }

    /// Reads a value at a linear address with the present privilege.
    ///
    /// # Errors
    /// `#PF`, or `#GP(0)` for a non-canonical address.
    #[inline(always)]
    pub fn load<T: Value>(&mut self, linear: u64) -> Exec<T> {
        self.load_in(linear, crate::op::FLAT)
    }

    /// Writes a value at a linear address with the present privilege.
    ///
    /// # Errors
    /// `#PF`, or `#GP(0)` for a non-canonical address.
    #[inline(always)]
    pub fn store<T: Value>(&mut self, linear: u64, value: T) -> Exec {
        self.store_in(linear, value, crate::op::FLAT)
    }

    /// [`Self::load`]; a non-canonical address in SS is `#SS(0)`.
    #[inline(always)]
    pub fn load_in<T: Value>(&mut self, linear: u64, segment: u8) -> Exec<T> {
        let entry = self.tlb.entry(linear);
        if entry.read == self.tlb.tag(linear.wrapping_add(T::SIZE - 1)) {
            let host = linear.wrapping_add(entry.addend) as *const Unaligned<T>;
            // SAFETY: the tag matched for the access' last byte, in the place of its first byte's page; pages next to each
            // other have different places, so both are on the page that the entry is for, which is RAM in the window.
            return Ok(unsafe { host.read_volatile() }.0);
        }
        self.load_slow(linear, segment)
    }

    /// [`Self::store`]; a non-canonical address in SS is `#SS(0)`.
    #[inline(always)]
    pub fn store_in<T: Value>(&mut self, linear: u64, value: T, segment: u8) -> Exec {
        let entry = self.tlb.entry(linear);
        if entry.write == self.tlb.tag(linear.wrapping_add(T::SIZE - 1)) {
            let host = linear.wrapping_add(entry.addend) as *mut Unaligned<T>;
            // SAFETY: as in `load_in`; the write tag is set only for pages that may be written.
            unsafe { host.write_volatile(Unaligned(value)) };
            self.stored(host as u64);
            return Ok(());
        }
        self.store_slow(linear, value, segment)
    }

    /// After a store to the host address `host`: if the page holds decoded code, that is void now.
    /// Looking after the store, not before, is what makes it right with several vCPUs (see
    /// [`terem_memory::PageMarks`]).
    #[inline(always)]
    pub(crate) fn stored(&mut self, host: u64) {
        let page = (host - self.window) >> 12;
        // SAFETY: `host` is in the window, so `page` is below the number of marks.
        let word = unsafe { (*self.marks.add(page as usize)).load(std::sync::atomic::Ordering::Relaxed) };
        if word & terem_memory::CODE != 0 {
            self.code_written(page);
        }
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn code_written(&mut self, page: u64) {
        self.memory.marks().written(page);
        // The block that is running may be from this page: let it end after this instruction.
        self.op_end = std::ptr::null();
        self.stats.code_writes.add(1);
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Value>(&mut self, linear: u64, segment: u8) -> Exec<T> {
        let mut bytes = [0; 16];
        let size = T::SIZE;
        let on_page = 0x1000 - (linear & !PAGE_MASK);
        self.canonical(linear, size, segment)?;
        if self.tlb.strict() {
            self.aligned(linear, size, Access::Read)?;
        }
        if on_page >= size {
            self.load_piece(linear, &mut bytes[..size as usize])?;
        } else {
            let (a, b) = bytes[..size as usize].split_at_mut(on_page as usize);
            // Both pages must be there before anything is read, since reading MMIO has effects.
            self.translate(linear, Access::Read)?;
            self.translate(self.wrap(linear.wrapping_add(on_page)), Access::Read)?;
            self.load_piece(linear, a)?;
            self.load_piece(self.wrap(linear.wrapping_add(on_page)), b)?;
        }
        if self.watches.data() {
            self.data_accessed(self.wrap(linear), size, false);
        }
        Ok(T::from_bytes(&bytes))
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Value>(&mut self, linear: u64, value: T, segment: u8) -> Exec {
        let bytes = value.to_bytes();
        let size = T::SIZE;
        let on_page = 0x1000 - (linear & !PAGE_MASK);
        self.canonical(linear, size, segment)?;
        if self.tlb.strict() {
            self.aligned(linear, size, Access::Write)?;
        }
        if self.watches.data() {
            self.data_accessed(self.wrap(linear), size, true);
        }
        if on_page >= size {
            return self.store_piece(linear, &bytes[..size as usize]);
        }
        let (a, b) = bytes[..size as usize].split_at(on_page as usize);
        let second = self.wrap(linear.wrapping_add(on_page));
        self.translate(linear, Access::Write)?;
        self.translate(second, Access::Write)?;
        self.store_piece(linear, a)?;
        self.store_piece(second, b)
    }

    /// Reads up to 16 bytes that lie on one page.
    fn load_piece(&mut self, linear: u64, to: &mut [u8]) -> Exec {
        let physical = self.translate(linear, Access::Read)?;
        if let Some(host) = self.ram(physical) {
            // SAFETY: `ram` says that the page is RAM in the window; one page holds the piece. The access
            // is one instruction for the usual sizes, and torn only where hardware tears it as well.
            unsafe { copy_volatile(host, to.as_mut_ptr(), to.len()) };
        } else {
            self.mmio_read(physical, to);
        }
        Ok(())
    }

    /// Writes up to 16 bytes that lie on one page.
    fn store_piece(&mut self, linear: u64, from: &[u8]) -> Exec {
        let physical = self.translate(linear, Access::Write)?;
        if let Some(host) = self.ram(physical) {
            // SAFETY: as in `load_piece`.
            unsafe { copy_volatile(from.as_ptr(), host, from.len()) };
            self.stored(host as u64);
        } else {
            self.mmio_write(physical, from);
        }
        Ok(())
    }

    /// The host address for an atomic read-modify-write of `size` (1–16) bytes that lie on one page of
    /// RAM, with write permission checked; `None` where they do not (MMIO, or across pages). The caller
    /// calls [`Self::stored`] with it afterwards.
    ///
    /// # Errors
    /// `#PF` (as for a write), `#GP(0)` for a non-canonical address.
    pub fn atomic_address(&mut self, linear: u64, size: u64, segment: u8) -> Exec<Option<*mut u8>> {
        let entry = self.tlb.entry(linear);
        if entry.write == self.tlb.tag(linear.wrapping_add(size - 1)) {
            return Ok(Some(linear.wrapping_add(entry.addend) as *mut u8));
        }
        self.canonical(linear, size, segment)?;
        if self.tlb.strict() {
            self.aligned(linear, size, Access::Write)?;
        }
        let physical = self.translate(linear, Access::Write)?;
        if self.watches.data() {
            self.data_accessed(self.wrap(linear), size, false);
            self.data_accessed(self.wrap(linear), size, true);
        }
        if 0x1000 - (linear & !PAGE_MASK) < size {
            self.translate(self.wrap(linear.wrapping_add(size - 1) & PAGE_MASK), Access::Write)?;
            return Ok(None);
        }
        Ok(self.ram(physical))
    }

    /// `#AC(0)` unless `linear` is a multiple of `size` (2, 4 or 8 bytes; larger operands have rules of their own).
    /// What paging says comes first.
    #[cold]
    fn aligned(&mut self, linear: u64, size: u64, access: Access) -> Exec {
        if size > 8 || linear & (size - 1) == 0 {
            return Ok(());
        }
        self.translate(linear, access)?;
        self.translate(self.wrap(linear.wrapping_add(size - 1)), access)?;
        Err(Fault::with_code(vector::AC, 0))
    }

    /// Checks that `size` bytes at `linear` are canonical (in 64-bit mode).
    pub(crate) fn canonical(&self, linear: u64, size: u64, segment: u8) -> Exec {
        let ok = |at: u64| (at as i64) << 16 >> 16 == at as i64;
        if !self.long_mode() || (ok(linear) && ok(linear.wrapping_add(size - 1))) {
            return Ok(());
        }
        Err(if segment == terem_cpu::VcpuState::SS as u8 { Fault::SS0 } else { Fault::GP0 })
    }

    /// Linear addresses are 32 bits wide outside long mode.
    #[inline]
    pub(crate) fn wrap(&self, linear: u64) -> u64 {
        if self.long_mode() { linear } else { linear & 0xffff_ffff }
    }
}

/// Copies in units as large as possible, each with one access.
///
/// # Safety
/// Both ranges are valid for `len` bytes; one of them may be changed by others meanwhile.
unsafe fn copy_volatile(mut from: *const u8, mut to: *mut u8, mut len: usize) {
    macro_rules! unit {
        ($t:ty) => {
            while len >= size_of::<$t>() {
                // SAFETY: as the function's own condition: `len` bytes are left in both.
                unsafe {
                    let v = from.cast::<Unaligned<$t>>().read_volatile();
                    to.cast::<Unaligned<$t>>().write_volatile(v);
                    from = from.add(size_of::<$t>());
                    to = to.add(size_of::<$t>());
                }
                len -= size_of::<$t>();
            }
        };
    }
    unit!(u64);
    unit!(u32);
    unit!(u16);
    unit!(u8);
}
