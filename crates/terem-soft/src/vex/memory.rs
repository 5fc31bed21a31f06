//! Memory for stubs: one mapping that can be executed, another of the same pages that can be written.

use std::io;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Bytes: more than the stubs of all forms with all immediates come to.
const SIZE: usize = 4 << 20;

/// The stubs of the whole process, which stay as long as it does. Pages are taken from the host when they are first
/// written.
#[derive(Debug)]
pub(super) struct StubMemory {
    run: NonNull<u8>,
    write: NonNull<u8>,
    used: usize,
}

// SAFETY: the mappings belong to this value alone.
unsafe impl Send for StubMemory {}

impl StubMemory {
    pub(super) fn new() -> io::Result<Self> {
        let file = memfd_create("terem stubs", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, SIZE as u64)?;
        let map = |access: ProtFlags| {
            let flags = MapFlags::SHARED | MapFlags::NORESERVE;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let at = unsafe { mmap(std::ptr::null_mut(), SIZE, ProtFlags::READ | access, flags, &file, 0) }?;
            NonNull::new(at.cast()).ok_or(io::Error::from(io::ErrorKind::OutOfMemory))
        };
        Ok(Self { run: map(ProtFlags::EXEC)?, write: map(ProtFlags::WRITE)?, used: 0 })
    }

    /// Adds a stub; where it is executed, or `None` if there is no room.
    pub(super) fn add<const N: usize>(&mut self, code: &[u8; N]) -> Option<u64> {
        let at = self.used;
        if at + N > SIZE {
            return None;
        }
        self.used += N;
        // SAFETY: the range is in both mappings, and nobody executes it yet.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.as_ptr().add(at), N);
            Some(self.run.as_ptr().add(at) as u64)
        }
    }
}
