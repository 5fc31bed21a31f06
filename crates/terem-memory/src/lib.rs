//! Guest memory: one contiguous host window with memfd-backed RAM at its guest-physical offsets.
//!
//! ```text
//!   host address:  window ─┬─────────────┬───────── no access ─────────┬──────────────────┐
//!   guest address:         0    low RAM  │   hole (PCI, APIC, ROM)     4 GiB   high RAM   end
//! ```
//!
//! Address space is reserved once and RAM is taken lazily, page by page, when a guest touches it.
//! A guest-physical address is therefore the window's base plus itself, which is what makes the
//! software CPU's memory accesses one addition. Devices see the same memory through `vm-memory`
//! ([`GuestMemory`] dereferences to [`GuestMemoryMmap`]) and never get a raw pointer.
//!
//! Each page has a *mark* ([`PageMarks`]): whether a software CPU has decoded code from it, and how
//! often such a page was written since. `vm-memory` reports every write by a device to its bitmap,
//! and that bitmap is the marks: a disk read over decoded code is noticed like a store is.

mod io;
mod marks;
mod window;

use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

pub use io::{AlignedBuffer, GuestSlices, IoMemory, IoVec};
pub use marks::{CODE, MarksView, PageMarks};
pub use vm_memory;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use window::Window;

/// The granule of guest memory: bytes in the smallest page.
pub const PAGE_SIZE: u64 = 4096;

/// A range of guest-physical RAM: first address and length in bytes, both multiples of [`PAGE_SIZE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

impl RamRange {
    /// One past the last address.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }
}

/// Why guest memory could not be made or accessed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The layout itself is wrong: a mistake of the caller.
    #[error("guest RAM {base:#x}+{size:#x} is empty, overlaps another range or is not a multiple of 4 KiB")]
    Layout {
        /// Guest-physical start.
        base: u64,
        /// Length in bytes.
        size: u64,
    },
    /// The host refused a system call.
    #[error("cannot {action} for {bytes} bytes of guest memory: {source}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// How much was asked for.
        bytes: u64,
        /// The host's answer.
        source: std::io::Error,
    },
    /// A guest-physical range is not (wholly) RAM.
    #[error("guest-physical {addr:#x}+{len:#x} is not RAM")]
    NotRam {
        /// Guest-physical start.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// A guest's physical memory. Cheap to clone; the memory goes when the last clone and the last
/// [`GuestSlices`] in flight are gone.
#[derive(Debug, Clone)]
pub struct GuestMemory(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    mmap: GuestMemoryMmap<MarksView>,
    ram: Vec<RamRange>,
    window: Arc<Window>,
    marks: Arc<PageMarks>,
}

impl GuestMemory {
    /// Reserves the window and maps RAM at `ranges` (ascending, page-aligned, not overlapping).
    ///
    /// # Errors
    /// [`MemoryError::Layout`] for a bad layout, [`MemoryError::Host`] when the host has no address
    /// space or file descriptors left. Pages themselves are taken lazily, so running out of them
    /// shows only later, as on any host that overcommits.
    pub fn new(ranges: &[RamRange]) -> Result<Self, MemoryError> {
        let mut end = 0;
        for r in ranges {
            let aligned = r.base.is_multiple_of(PAGE_SIZE) && r.size.is_multiple_of(PAGE_SIZE);
            if r.size == 0 || !aligned || r.base < end || r.base.checked_add(r.size).is_none() {
                return Err(MemoryError::Layout { base: r.base, size: r.size });
            }
            end = r.end();
        }
        let window = Arc::new(Window::map(ranges, end)?);
        let marks = Arc::new(PageMarks::new(Arc::clone(&window), end)?);
        let mut regions = Vec::with_capacity(ranges.len());
        for r in ranges {
            let layout = || MemoryError::Layout { base: r.base, size: r.size };
            let size = usize::try_from(r.size).map_err(|_| layout())?;
            let view = MarksView::new(Arc::clone(&marks), r.base);
            let region =
                window.region(r, MmapRegionBuilder::new_with_bitmap(size, view)).map_err(|_| layout())?;
            regions.push(GuestRegionMmap::new(region, GuestAddress(r.base)).ok_or_else(layout)?);
        }
        let mmap =
            GuestMemoryMmap::from_regions(regions).map_err(|_| MemoryError::Layout { base: 0, size: end })?;
        Ok(Self(Arc::new(Inner { mmap, ram: ranges.to_vec(), window, marks })))
    }

    /// The RAM ranges, ascending.
    #[must_use]
    pub fn ram(&self) -> &[RamRange] {
        &self.0.ram
    }

    /// Bytes of RAM in all ranges.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.ram.iter().map(|r| r.size).sum()
    }

    /// Whether `addr..addr + len` lies in one RAM range.
    #[must_use]
    pub fn is_ram(&self, addr: u64, len: u64) -> bool {
        self.0.ram.iter().any(|r| addr >= r.base && addr.checked_add(len).is_some_and(|e| e <= r.end()))
    }

    /// Host address of guest-physical 0, for accelerators. Only RAM ranges may be accessed behind it;
    /// it stays valid as long as a clone of this value lives.
    #[must_use]
    pub fn window_base(&self) -> *mut u8 {
        self.0.window.base()
    }

    /// Length of the window in bytes (the end of the highest RAM range).
    #[must_use]
    pub fn window_len(&self) -> u64 {
        self.0.window.len()
    }

    /// The marks of all pages of the window.
    #[must_use]
    pub fn marks(&self) -> &PageMarks {
        &self.0.marks
    }

    /// The memfd that backs RAM: range after range, in their order, from offset 0.
    #[must_use]
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.0.window.memfd().as_fd()
    }

    /// Guest memory as scatter-gather memory for I/O that outlives the caller.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`] names the first range that is not RAM.
    pub fn slices(&self, ranges: &[(GuestAddress, u32)]) -> Result<GuestSlices, MemoryError> {
        GuestSlices::new(self.clone(), ranges)
    }
}

impl Deref for GuestMemory {
    type Target = GuestMemoryMmap<MarksView>;

    fn deref(&self) -> &Self::Target {
        &self.0.mmap
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    const MIB: u64 = 1 << 20;

    #[test]
    fn ram_on_both_sides_of_a_hole() {
        let high = RamRange { base: 4 << 30, size: 2 * MIB };
        let mem = GuestMemory::new(&[RamRange { base: 0, size: MIB }, high]).unwrap();
        mem.write_obj(0x1122_3344_u32, GuestAddress(MIB - 4)).unwrap();
        mem.write_obj(0x55_u8, GuestAddress(high.base)).unwrap();
        assert_eq!(mem.read_obj::<u32>(GuestAddress(MIB - 4)).unwrap(), 0x1122_3344);
        assert!(mem.read_obj::<u8>(GuestAddress(MIB)).is_err());
        assert!(mem.is_ram(high.base, 2 * MIB) && !mem.is_ram(high.base, 2 * MIB + 1));
        assert!(!mem.is_ram(u64::MAX, 2));
        assert_eq!(mem.total(), 3 * MIB);
    }

    #[test]
    fn terabytes_cost_nothing_until_touched() {
        let mem = GuestMemory::new(&[RamRange { base: 0, size: 4 << 40 }]).unwrap();
        mem.write_obj(7_u64, GuestAddress((4 << 40) - 8)).unwrap();
        assert_eq!(mem.read_obj::<u64>(GuestAddress((4 << 40) - 8)).unwrap(), 7);
    }

    #[test]
    fn bad_layouts_are_named() {
        for (base, size) in [(0, 0), (1, PAGE_SIZE), (0, 100), (u64::MAX - 4095, PAGE_SIZE)] {
            assert!(matches!(GuestMemory::new(&[RamRange { base, size }]), Err(MemoryError::Layout { .. })));
        }
        let r = RamRange { base: 0, size: MIB };
        assert!(GuestMemory::new(&[r, r]).is_err());
    }

    #[test]
    fn a_device_write_to_code_is_noticed() {
        let mem = GuestMemory::new(&[RamRange { base: MIB, size: MIB }]).unwrap();
        let page = MIB / PAGE_SIZE + 3;
        let word = mem.marks().mark_code(page);
        assert_eq!(mem.marks().word(page), word);
        mem.write_obj(1_u8, GuestAddress(MIB)).unwrap();
        assert_eq!(mem.marks().word(page), word, "another page's write does not touch this one");
        mem.write_slice(&[0; 8192], GuestAddress(MIB + 2 * PAGE_SIZE)).unwrap();
        assert_ne!(mem.marks().word(page), word);
        assert_eq!(mem.marks().word(page) & CODE, 0);
        assert_ne!(mem.marks().mark_code(page), word, "the generation went on");
    }
}
