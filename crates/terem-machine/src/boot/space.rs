//! What of guest memory is taken while loading.

use terem_memory::GuestMemory;
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::{Image, Problem};
use crate::e820::{self, FIRMWARE_AREA_END};
use crate::plan::MemoryMap;

/// A null, code and data descriptors, TSS (see [`super::start`]).
pub(super) const GDT: u64 = 0x500;
/// PVH's start info, its memory map and module list; multiboot's information.
pub(super) const INFO: u64 = 0x1_0000;
/// Bytes for it.
pub(super) const INFO_SIZE: u64 = 0x1_0000;
/// Linux' zero page, `struct boot_params`.
pub(super) const ZERO_PAGE: u64 = 0x7000;
/// Top of a stack for those who expect one.
pub(super) const STACK_TOP: u64 = 0x8ff0;
/// Identity page tables: one PML4, one page of PDPT, four of PD.
pub(super) const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line.
pub(super) const CMDLINE: u64 = 0x2_0000;
/// Bytes for it with its zero byte.
pub(super) const CMDLINE_SIZE: u64 = 0x1_0000;

/// Guest memory with a list of what is where.
pub(super) struct Space<'a> {
    memory: &'a GuestMemory,
    map: &'a MemoryMap,
    taken: Vec<(u64, u64, &'static str)>,
}

impl<'a> Space<'a> {
    pub(super) fn new(memory: &'a GuestMemory, map: &'a MemoryMap) -> Self {
        let taken = vec![
            (0, CMDLINE + CMDLINE_SIZE, "the loader's own data"),
            (e820::BASE_MEMORY_END, FIRMWARE_AREA_END - e820::BASE_MEMORY_END, "the BIOS area"),
            (map.tables.base, map.tables.size, "the ACPI tables"),
        ];
        Self { memory, map, taken }
    }

    fn overlap(&self, at: u64, len: u64) -> Option<(u64, u64, &'static str)> {
        let end = at.saturating_add(len);
        self.taken.iter().copied().find(|&(start, size, _)| start < end && at < start.saturating_add(size))
    }

    /// Takes `at..at + len`.
    pub(super) fn claim(&mut self, what: &'static str, at: u64, len: u64) -> Result<(), Problem> {
        if len == 0 {
            return Ok(());
        }
        if !self.memory.is_ram(at, len) {
            return Err(self.too_big(what, at, len));
        }
        if let Some((.., other)) = self.overlap(at, len) {
            return Err(Problem::Overlap { what, at, len, other });
        }
        self.taken.push((at, len, what));
        Ok(())
    }

    pub(super) fn too_big(&self, what: &'static str, at: u64, len: u64) -> Problem {
        Problem::TooBig { what, at, needed: len.div_ceil(1 << 20), have: self.map.size >> 20 }
    }

    /// Takes the highest free place of `len` bytes in RAM from 1 MiB to `limit` (one past the last byte
    /// allowed) and below 4 GiB; `align` is a power of two.
    pub(super) fn claim_top(
        &mut self,
        what: &'static str,
        len: u64,
        align: u64,
        limit: u64,
    ) -> Result<u64, Problem> {
        let mut end = limit.min(self.map.low_end);
        loop {
            let at = end.checked_sub(len.max(1)).map(|at| at & !(align - 1));
            let Some(at) = at.filter(|&at| at >= FIRMWARE_AREA_END) else {
                return Err(self.too_big(what, FIRMWARE_AREA_END, len));
            };
            match self.overlap(at, len.max(1)) {
                None => {
                    self.claim(what, at, len)?;
                    return Ok(at);
                }
                Some((start, ..)) => end = start,
            }
        }
    }

    /// The lowest free place of `len` bytes in low RAM from `from` on, without taking it.
    pub(super) fn find_low(&self, from: u64, len: u64, align: u64) -> Option<u64> {
        let mut at = from.checked_next_multiple_of(align)?;
        while self.memory.is_ram(at, len) {
            match self.overlap(at, len) {
                None => return Some(at),
                Some((start, size, _)) => at = start.checked_add(size)?.checked_next_multiple_of(align)?,
            }
        }
        None
    }

    /// Writes bytes to a place that is ours.
    pub(super) fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), Problem> {
        self.memory.write_slice(bytes, GuestAddress(addr)).map_err(|e| Problem::Io(std::io::Error::other(e)))
    }

    /// Reads bytes that are ours.
    pub(super) fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), Problem> {
        self.memory.read_slice(bytes, GuestAddress(addr)).map_err(|e| Problem::Io(std::io::Error::other(e)))
    }

    /// Writes zeroes.
    pub(super) fn zero(&self, addr: u64, len: u64) -> Result<(), Problem> {
        let zeroes = [0; 4096];
        let mut done = 0;
        while done < len {
            let now = (len - done).min(4096);
            let piece = &zeroes[..usize::try_from(now).unwrap_or(0)];
            self.write(addr + done, piece)?;
            done += now;
        }
        Ok(())
    }

    /// Copies `image[offset..offset + len]`, checked here, to a claimed place.
    pub(super) fn copy(&self, image: &dyn Image, offset: u64, len: u64, addr: u64) -> Result<(), Problem> {
        image.check("a segment", offset, len)?;
        if len == 0 {
            return Ok(()); // what takes no place may be said to be anywhere
        }
        Ok(image.copy(offset, len, self.memory, addr)?)
    }

    /// Writes the command line, zero-terminated, for a kernel that takes `max` bytes of it.
    pub(super) fn cmdline(&self, text: &str, max: u64) -> Result<(), Problem> {
        let max = usize::try_from(max.min(CMDLINE_SIZE - 1)).unwrap_or(0);
        if text.len() > max {
            return Err(Problem::CmdlineTooLong { length: text.len(), max });
        }
        if text.contains('\0') {
            return Err(Problem::CmdlineZero);
        }
        self.write(CMDLINE, text.as_bytes())?;
        self.write(CMDLINE + text.len() as u64, &[0])
    }
}
