//! Memory for code: one mapping that can be executed, another of the same pages that can be written; data that code
//! reaches relative to RIP lies behind it.
//!
//! ```text
//!   executed      stubs and hot code │ cold code │ links │ sites │ calls
//!   written       the same memory    ┘
//! ```

use std::io;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Bytes of code that all vCPUs of a machine keep together, at most; each has an equal part.
const ALL_CODE: usize = 192 << 20;
/// The least and the most that one vCPU has.
const CODE: std::ops::RangeInclusive<usize> = 8 << 20..=96 << 20;
/// Bytes of code or sites that one translation takes at most.
const ONE: usize = 256 << 10;

/// A range of the memory, and how much of it is used.
#[derive(Debug, Clone, Copy)]
struct Part {
    begin: usize,
    end: usize,
    used: usize,
}

impl Part {
    fn fits(self, bytes: usize) -> bool {
        self.used + bytes <= self.end
    }
}

/// The code of one vCPU. Pages are taken from the host when they are first written.
#[derive(Debug)]
pub(super) struct CodeMemory {
    /// Where code is executed, and what follows it.
    run: NonNull<u8>,
    /// Where code is written.
    write: NonNull<u8>,
    hot: Part,
    cold: Part,
    links: Part,
    sites: Part,
    calls: Part,
}

// SAFETY: the mappings belong to this value alone.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// For one of `vcpus` vCPUs.
    pub(super) fn new(vcpus: usize) -> io::Result<Self> {
        let code = (ALL_CODE / vcpus.max(1)).clamp(*CODE.start(), *CODE.end()) & !0xffff;
        let mut end = 0;
        let mut part = |bytes: usize| {
            let begin = end;
            end += bytes;
            Part { begin, end, used: begin }
        };
        let (hot, cold, links) = (part(code / 2), part(code / 2), part(code / 8));
        let (sites, calls) = (part(code / 4), part(code / 4));
        let file = memfd_create("terem code", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, code as u64)?;
        // SAFETY: new mappings at addresses of the kernel's choice; then, over the first one's own pages, the same
        // file again and data.
        unsafe {
            let none = std::ptr::null_mut();
            let flags = MapFlags::SHARED | MapFlags::NORESERVE;
            let run = mmap_anonymous(
                none,
                calls.end,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?;
            mmap(run, code, ProtFlags::READ | ProtFlags::EXEC, flags | MapFlags::FIXED, &file, 0)?;
            let write = mmap(none, code, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0)?;
            let (run, write) = (run.cast(), write.cast());
            let (Some(run), Some(write)) = (NonNull::new(run), NonNull::new(write)) else {
                return Err(io::ErrorKind::OutOfMemory.into());
            };
            Ok(Self { run, write, hot, cold, links, sites, calls })
        }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        // SAFETY: offsets are of the parts, which lie in the mapping.
        unsafe { self.run.as_ptr().add(offset) }
    }

    /// Where the next code will lie.
    pub(super) fn next(&self) -> u64 {
        self.at(self.hot.used) as u64
    }

    /// Where the next code will lie that is executed rarely.
    pub(super) fn next_cold(&self) -> u64 {
        self.at(self.cold.used) as u64
    }

    /// The first byte of the links.
    pub(super) fn links(&self) -> *mut u8 {
        self.at(self.links.begin)
    }

    /// Bytes for links.
    pub(super) fn links_size(&self) -> usize {
        self.links.end - self.links.begin
    }

    /// Where the next sites will lie, aligned to 8.
    pub(super) fn next_sites(&self) -> *mut u8 {
        self.at(self.sites.used)
    }

    /// Where the next calls will lie, aligned to 8.
    pub(super) fn next_calls(&self) -> *mut u8 {
        self.at(self.calls.used)
    }

    /// Takes bytes (multiples of 8) at [`Self::next_sites`] and [`Self::next_calls`]; false if there is no room.
    pub(super) fn take(&mut self, sites: usize, calls: usize) -> bool {
        let fits = self.sites.fits(sites) && self.calls.fits(calls);
        if fits {
            self.sites.used += sites;
            self.calls.used += calls;
        }
        fits
    }

    /// Whether there may be no room for another translation.
    pub(super) fn is_nearly_full(&self) -> bool {
        [self.hot, self.cold, self.sites, self.calls].iter().any(|part| !part.fits(ONE))
    }

    /// Bytes of code.
    pub(super) fn code_used(&self) -> usize {
        self.hot.used + self.cold.used - self.cold.begin
    }

    /// Bytes of code at most.
    pub(super) fn code_size(&self) -> usize {
        self.cold.end - self.hot.begin
    }

    /// Adds code, which lies at [`Self::next`] and [`Self::next_cold`] then; false if there is no room.
    pub(super) fn add(&mut self, hot: &[u8], cold: &[u8]) -> bool {
        if !(self.hot.fits(hot.len() + 16) && self.cold.fits(cold.len() + 16)) {
            return false;
        }
        for (code, part) in [(hot, &mut self.hot), (cold, &mut self.cold)] {
            // SAFETY: the range is in the mapping that can be written and is executed by nobody yet.
            unsafe {
                let to = self.write.as_ptr().add(part.used);
                std::ptr::copy_nonoverlapping(code.as_ptr(), to, code.len());
            }
            part.used += code.len().next_multiple_of(16);
        }
        true
    }

    /// Lets the jump whose 4 bytes are executed at `at` lead to `target`.
    pub(super) fn patch(&mut self, at: u64, target: u64) {
        let offset = (at - self.run.as_ptr() as u64) as usize;
        debug_assert!(offset + 4 <= self.cold.used);
        let distance = target.wrapping_sub(at + 4) as i32;
        // SAFETY: `at` is in code that was added. The vCPU's thread is the only one that executes it, and it is here.
        unsafe { self.write.as_ptr().add(offset).cast::<i32>().write_unaligned(distance) };
    }

    /// Has what was added so far stay when all is forgotten.
    pub(super) fn keep(&mut self) {
        self.hot.begin = self.hot.used;
    }

    /// Forgets all code but what is kept, and all data.
    pub(super) fn clear(&mut self) {
        self.hot.used = self.hot.begin;
        self.cold.used = self.cold.begin;
        self.sites.used = self.sites.begin;
        self.calls.used = self.calls.begin;
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: the mappings made in `new`, which nobody uses any more.
        unsafe {
            let _ = munmap(self.run.as_ptr().cast(), self.calls.end);
            let _ = munmap(self.write.as_ptr().cast(), self.cold.end);
        }
    }
}
