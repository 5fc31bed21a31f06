//! Memory for code: one mapping that can be executed, another of the same pages that can be written.

use std::io;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

/// Bytes of code that one vCPU keeps.
pub(super) const CODE_SIZE: usize = 32 << 20;
/// Bytes of links to other pages beside it, which code reaches relative to RIP.
pub(super) const LINKS_SIZE: usize = 4 << 20;
/// Bytes of what accesses remember, after the links; likewise.
pub(super) const SITES_SIZE: usize = 28 << 20;
const DATA_SIZE: usize = LINKS_SIZE + SITES_SIZE;

/// The code of one vCPU. Pages are taken from the host when they are first written.
#[derive(Debug)]
pub(super) struct CodeMemory {
    /// Where code is executed; [`DATA_SIZE`] bytes of data follow it.
    run: NonNull<u8>,
    /// Where it is written.
    write: NonNull<u8>,
    used: usize,
    /// Bytes of sites used.
    sites: usize,
}

// SAFETY: the mappings belong to this value alone.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    pub(super) fn new() -> io::Result<Self> {
        let file = memfd_create("terem code", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, CODE_SIZE as u64)?;
        // SAFETY: new mappings at addresses of the kernel's choice; then, over the first one's own pages, the same
        // file again and data.
        unsafe {
            let none = std::ptr::null_mut();
            let flags = MapFlags::SHARED | MapFlags::NORESERVE;
            let run = mmap_anonymous(
                none,
                CODE_SIZE + DATA_SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?;
            mmap(run, CODE_SIZE, ProtFlags::READ | ProtFlags::EXEC, flags | MapFlags::FIXED, &file, 0)?;
            let write = mmap(none, CODE_SIZE, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0)?;
            let (run, write) = (run.cast(), write.cast());
            let (Some(run), Some(write)) = (NonNull::new(run), NonNull::new(write)) else {
                return Err(io::ErrorKind::OutOfMemory.into());
            };
            Ok(Self { run, write, used: 0, sites: Self::FIRST_SITE })
        }
    }

    /// Where the next code will lie.
    pub(super) fn next(&self) -> u64 {
        self.run.as_ptr() as u64 + self.used as u64
    }

    /// The first byte of the links.
    pub(super) fn links(&self) -> *mut u8 {
        // SAFETY: the mapping has data behind the code.
        unsafe { self.run.as_ptr().add(CODE_SIZE) }
    }

    /// The sites begin with a page that holds nothing: [`Self::nothing`].
    const FIRST_SITE: usize = 0x1000;

    /// The host address of a page that means nothing, may be written, and is nobody's.
    pub(super) fn nothing(&self) -> u64 {
        self.run.as_ptr() as u64 + (CODE_SIZE + LINKS_SIZE) as u64
    }

    /// Where the next data about sites will lie, aligned to 8.
    pub(super) fn next_sites(&self) -> *mut u8 {
        // SAFETY: `sites` is at most the size of what follows the links.
        unsafe { self.run.as_ptr().add(CODE_SIZE + LINKS_SIZE + self.sites) }
    }

    /// Takes `bytes` (a multiple of 8) at [`Self::next_sites`]; false if there is no room.
    pub(super) fn take_sites(&mut self, bytes: usize) -> bool {
        let fits = self.sites + bytes <= SITES_SIZE;
        self.sites += if fits { bytes } else { 0 };
        fits
    }

    /// Bytes of sites used.
    pub(super) fn sites_used(&self) -> usize {
        self.sites
    }

    /// Bytes used.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Adds code, which lies at [`Self::next`] then; false if there is no room.
    pub(super) fn add(&mut self, code: &[u8]) -> bool {
        let len = code.len().next_multiple_of(16);
        if self.used + len > CODE_SIZE {
            return false;
        }
        // SAFETY: the range is in the mapping that can be written and is executed by nobody yet.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.as_ptr().add(self.used), code.len());
        }
        self.used += len;
        true
    }

    /// Lets the jump whose 4 bytes are executed at `at` lead to `target`.
    pub(super) fn patch(&mut self, at: u64, target: u64) {
        let offset = (at - self.run.as_ptr() as u64) as usize;
        debug_assert!(offset + 4 <= self.used);
        let distance = target.wrapping_sub(at + 4) as i32;
        // SAFETY: `at` is in code that was added. The vCPU's thread is the only one that executes it, and it is here.
        unsafe { self.write.as_ptr().add(offset).cast::<i32>().write_unaligned(distance) };
    }

    /// Forgets all code after the first `keep` bytes, and all sites.
    pub(super) fn truncate(&mut self, keep: usize) {
        self.used = keep;
        self.sites = Self::FIRST_SITE;
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: the mappings made in `new`, which nobody uses any more.
        unsafe {
            let _ = munmap(self.run.as_ptr().cast(), CODE_SIZE + DATA_SIZE);
            let _ = munmap(self.write.as_ptr().cast(), CODE_SIZE);
        }
    }
}
