//! A word for each page of guest memory: does it hold decoded code, and has that been written over.
//!
//! How code that changes is noticed, on several vCPUs, without a lock in the way of stores:
//!
//! - who decodes from a page first sets [`CODE`] ([`PageMarks::mark_code`]), then makes that visible to
//!   all running threads (`membarrier(2)`), then reads the bytes, and keeps the word with the block;
//! - who stores to a page looks at the word *after* the store: with `CODE` set, [`PageMarks::written`]
//!   moves the generation on and clears the bit;
//! - a block is entered only while its page's word is the one that was kept.
//!
//! A store that came before the bit was visible was done before the bytes were read; one that came
//! after sees the bit. So no block of old bytes stays valid.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::window::Window;
use crate::{MemoryError, PAGE_SIZE};

/// Bit of a page's word: decoded code of this page exists. The other bits count generations.
pub const CODE: u32 = 1;

/// The words of all pages of a window, taken lazily from the host like the memory itself.
pub struct PageMarks {
    words: NonNull<AtomicU32>,
    pages: u64,
    /// How often code was written over.
    changes: AtomicU64,
    listener: OnceLock<Box<dyn Fn() + Send + Sync>>,
    /// Kept so that whoever holds the marks (each region does) holds the memory.
    _window: Arc<Window>,
}

impl std::fmt::Debug for PageMarks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageMarks")
            .field("pages", &self.pages)
            .field("changes", &self.changes)
            .finish_non_exhaustive()
    }
}

// SAFETY: the words are atomics in a mapping that lives as long as this value.
unsafe impl Send for PageMarks {}
// SAFETY: as above.
unsafe impl Sync for PageMarks {}

impl PageMarks {
    pub(crate) fn new(window: Arc<Window>, end: u64) -> Result<Self, MemoryError> {
        let pages = end.div_ceil(PAGE_SIZE).max(1);
        let bytes = pages * 4;
        let len = usize::try_from(bytes).map_err(|_| MemoryError::Layout { base: 0, size: end })?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let at = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(|e| MemoryError::Host { action: "map page marks", bytes, source: e.into() })?;
        let words = NonNull::new(at.cast::<AtomicU32>()).ok_or(MemoryError::Layout { base: 0, size: end })?;
        Ok(Self { words, pages, changes: AtomicU64::new(0), listener: OnceLock::new(), _window: window })
    }

    /// How many pages there are.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The first word, for accelerators that look words up in line; there are [`Self::pages`] of them.
    #[must_use]
    pub fn as_ptr(&self) -> *const AtomicU32 {
        self.words.as_ptr()
    }

    /// Calls `listener` each time after decoded code was written over, on the thread that wrote. The first one stays.
    pub fn on_change(&self, listener: impl Fn() + Send + Sync + 'static) {
        let _ = self.listener.set(Box::new(listener));
    }

    /// How often code was written over so far.
    #[must_use]
    #[inline]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    fn at(&self, page: u64) -> Option<&AtomicU32> {
        // SAFETY: an index below `pages` is in the mapping, which is zero-filled and only ever used as
        // atomics.
        (page < self.pages).then(|| unsafe { self.words.add(usize::try_from(page).unwrap_or(0)).as_ref() })
    }

    /// The word of `page` (a guest-physical address divided by 4096); 0 beyond the window.
    #[must_use]
    pub fn word(&self, page: u64) -> u32 {
        self.at(page).map_or(0, |w| w.load(Ordering::Acquire))
    }

    /// Says that code is being decoded from `page`, and returns the word under which it is valid.
    pub fn mark_code(&self, page: u64) -> u32 {
        self.at(page).map_or(0, |w| w.fetch_or(CODE, Ordering::SeqCst) | CODE)
    }

    /// Says that `page` was written: code decoded from it is valid no longer.
    pub fn written(&self, page: u64) {
        if let Some(w) = self.at(page) {
            let mut word = w.load(Ordering::Acquire);
            while word & CODE != 0 {
                let next = (word & !CODE).wrapping_add(2);
                match w.compare_exchange_weak(word, next, Ordering::SeqCst, Ordering::Acquire) {
                    Ok(_) => {
                        self.changes.fetch_add(1, Ordering::SeqCst);
                        if let Some(listener) = self.listener.get() {
                            listener();
                        }
                        break;
                    }
                    Err(seen) => word = seen,
                }
            }
        }
    }

    /// [`Self::written`] for each page that `addr..addr + len` touches (guest-physical bytes).
    pub fn written_range(&self, addr: u64, len: u64) {
        if len > 0 {
            let last = (addr.saturating_add(len - 1) / PAGE_SIZE).min(self.pages - 1);
            for page in addr / PAGE_SIZE..=last {
                self.written(page);
            }
        }
    }
}

impl Drop for PageMarks {
    fn drop(&mut self) {
        let len = usize::try_from(self.pages * 4).unwrap_or(0);
        // SAFETY: the mapping made in `new`, to which no reference is left.
        let _ = unsafe { munmap(self.words.as_ptr().cast(), len) };
    }
}

/// `vm-memory`'s bitmap of one region: the marks from a guest-physical address on.
#[derive(Debug, Clone)]
pub struct MarksView {
    marks: Arc<PageMarks>,
    base: u64,
}

impl MarksView {
    pub(crate) fn new(marks: Arc<PageMarks>, base: u64) -> Self {
        Self { marks, base }
    }
}

impl WithBitmapSlice<'_> for MarksView {
    type S = Self;
}

impl BitmapSlice for MarksView {}

impl Bitmap for MarksView {
    fn mark_dirty(&self, offset: usize, len: usize) {
        // Offsets are of accesses that vm-memory has checked; a wrapped one would only mark too much.
        self.marks.written_range(self.base.wrapping_add(offset as u64), len as u64);
    }

    /// Whether the page holds no decoded code: nobody asks in this project, since marks are not a
    /// dirty log, but it is true of each page that was written.
    fn dirty_at(&self, offset: usize) -> bool {
        self.marks.word(self.base.wrapping_add(offset as u64) / PAGE_SIZE) & CODE == 0
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { marks: Arc::clone(&self.marks), base: self.base.wrapping_add(offset as u64) }
    }
}
