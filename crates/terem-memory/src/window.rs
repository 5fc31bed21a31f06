//! The host address range that stands for guest-physical memory.

use std::fs::File;
use std::io;
use std::ptr::NonNull;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};

use crate::{MemoryError, RamRange};

/// A reserved range of host addresses with RAM mapped into it; unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Window {
    base: NonNull<u8>,
    len: usize,
    memfd: File,
}

// SAFETY: the window is a mapping, valid from any thread; all access to what is inside goes through
// vm-memory's volatile slices or the accelerators' own atomics.
unsafe impl Send for Window {}
// SAFETY: as above; the fields themselves never change.
unsafe impl Sync for Window {}

fn host(action: &'static str, bytes: u64) -> impl Fn(rustix::io::Errno) -> MemoryError {
    move |e| MemoryError::Host { action, bytes, source: io::Error::from(e) }
}

impl Window {
    /// Reserves `end` bytes and maps `ranges` of one new memfd into them.
    pub(crate) fn map(ranges: &[RamRange], end: u64) -> Result<Self, MemoryError> {
        let total: u64 = ranges.iter().map(|r| r.size).sum();
        let memfd = memfd_create("guest-ram", MemfdFlags::CLOEXEC).map_err(host("create a memfd", total))?;
        ftruncate(&memfd, total).map_err(host("size a memfd", total))?;
        let len = usize::try_from(end.max(4096)).map_err(|_| MemoryError::Layout { base: 0, size: end })?;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing existing.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(host("reserve address space", end))?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(MemoryError::Layout { base: 0, size: end })?;
        let window = Self { base, len, memfd: File::from(memfd) };
        let mut offset = 0;
        for r in ranges {
            // `end` fits a usize, and so does everything below it.
            let (at, size) = (usize::try_from(r.base).unwrap_or(len), usize::try_from(r.size).unwrap_or(0));
            // SAFETY: base + at .. + size lies in the reservation made above (ranges end by `end`), which
            // nobody else uses yet; MAP_FIXED replaces just that part.
            unsafe {
                mmap(
                    base.as_ptr().add(at).cast(),
                    size,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                    &window.memfd,
                    offset,
                )
            }
            .map_err(host("map RAM", r.size))?;
            offset += r.size;
        }
        Ok(window)
    }

    /// `vm-memory`'s region over `range`. The builder's bitmap must keep this window alive.
    pub(crate) fn region<B: Bitmap>(
        &self,
        range: &RamRange,
        builder: MmapRegionBuilder<B>,
    ) -> Result<MmapRegion<B>, MmapRegionError> {
        let at = usize::try_from(range.base).map_err(|_| MmapRegionError::InvalidPointer)?;
        // SAFETY: `range` was mapped in `map`; the region's bitmap (MarksView) holds an Arc of this
        // window, so the mapping outlives the region.
        unsafe { builder.with_raw_mmap_pointer(self.base.as_ptr().add(at)) }
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    pub(crate) fn memfd(&self) -> &File {
        &self.memfd
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: base and len are those of the mapping made in `map`; nothing refers to it any more,
        // since regions, slices and accelerators hold an Arc of this value.
        let gone = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
        if let Err(e) = gone {
            tracing::warn!("guest memory was not unmapped: {e}");
        }
    }
}
