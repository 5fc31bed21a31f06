//! What the vCPUs of a machine have in common for direct execution: which pages programs may write without anybody looking.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use terem_bus::locked;
use terem_memory::{GuestMemory, PAGE_SIZE};

use super::child::Image;
use crate::apic::ApicSystem;

/// Pages whose mappings a vCPU has to take away before it runs guest code directly again.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    waiting: AtomicBool,
    pages: Mutex<Vec<u64>>,
}

impl Inbox {
    fn put(&self, page: u64) {
        locked(&self.pages).push(page);
        self.waiting.store(true, Ordering::SeqCst);
    }

    /// Whether there is something.
    pub(super) fn waits(&self) -> bool {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Takes it.
    pub(super) fn take(&self) -> Vec<u64> {
        let mut pages = locked(&self.pages);
        self.waiting.store(false, Ordering::SeqCst);
        std::mem::take(&mut *pages)
    }
}

/// The vCPUs' common part.
///
/// A page that holds code which somebody has looked at (decoded, or searched for what must not run) is written by nobody without
/// its mark being looked at afterwards ([`terem_memory::PageMarks`]). Programs that run directly look at no marks: so such
/// pages are not writable for them, and pages that are lose that before their code is looked at. Who does either first says
/// so (counts a writer; marks the page) and only then looks at what the other has said.
pub(crate) struct Shared {
    /// For each page of guest memory, in how many address spaces it can be written.
    writers: Box<[AtomicU16]>,
    inboxes: Vec<Arc<Inbox>>,
    apics: Arc<ApicSystem>,
    memory: GuestMemory,
    image: OnceLock<Option<Image>>,
    /// All programs run directly.
    pub(super) always: bool,
}

impl Shared {
    pub(crate) fn new(apics: Arc<ApicSystem>, memory: GuestMemory, always: bool) -> Self {
        // Zeroes, which the host gives lazily.
        let pages = usize::try_from(memory.window_len().div_ceil(PAGE_SIZE)).unwrap_or(0);
        let writers = std::iter::repeat_with(AtomicU16::default).take(pages).collect();
        let inboxes = (0..apics.count()).map(|_| Arc::default()).collect();
        Self { writers, inboxes, apics, memory, image: OnceLock::new(), always }
    }

    pub(super) fn inbox(&self, vcpu: u32) -> Arc<Inbox> {
        self.inboxes.get(vcpu as usize).map(Arc::clone).unwrap_or_default()
    }

    /// The executable of new processes, if the host lets there be one.
    pub(super) fn image(&self) -> Option<&Image> {
        let made = self.image.get_or_init(|| {
            let made: io::Result<Image> = Image::new();
            made.inspect_err(|e| tracing::warn!("guest programs are translated, not run directly: {e}")).ok()
        });
        made.as_ref()
    }

    /// Where in guest memory's file a physical page is.
    pub(super) fn offset(&self, page: u64) -> Option<u64> {
        let (address, mut before) = (page * PAGE_SIZE, 0);
        for r in self.memory.ram() {
            if (r.base..r.end()).contains(&address) {
                return Some(before + (address - r.base));
            }
            before += r.size;
        }
        None
    }

    /// Counts an address space in which `page` can be written from now on; false where it must not, since it holds code.
    pub(super) fn let_write(&self, page: u64) -> bool {
        let Some(writers) = self.writers.get(page as usize) else { return false };
        let counted = writers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_add(1)).is_ok();
        if counted && self.memory.marks().word(page) & terem_memory::CODE != 0 {
            self.no_longer_writes(page);
            return false;
        }
        counted
    }

    /// In one address space less.
    pub(super) fn no_longer_writes(&self, page: u64) {
        if let Some(writers) = self.writers.get(page as usize) {
            writers.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// To be called by vCPU `own` when it has marked `page`, before it looks at its code: nobody writes it directly from now on.
    #[inline]
    pub(crate) fn keep_from_writing(&self, own: u32, page: u64) {
        if self.writers.get(page as usize).is_some_and(|n| n.load(Ordering::SeqCst) != 0) {
            self.take_away(own, page);
        }
    }

    #[cold]
    fn take_away(&self, own: u32, page: u64) {
        for inbox in &self.inboxes {
            inbox.put(page);
        }
        for vcpu in 0..self.inboxes.len() {
            if vcpu != own as usize
                && let Some(apic) = self.apics.apic(vcpu)
            {
                apic.stop_direct_run();
                // It looks into the inbox before it goes on.
                while apic.runs_directly() && self.inboxes[vcpu].waits() {
                    std::thread::yield_now();
                }
            }
        }
    }
}
