//! What the vCPUs of a machine have in common for direct execution: which pages programs may write without anybody looking.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use terem_bus::locked;
use terem_memory::{GuestMemory, PAGE_SIZE};

use super::stub::Image;
use crate::apic::ApicSystem;

/// Pages that one vCPU has to take from its programs before it runs guest code directly again.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    waiting: AtomicBool,
    pages: Mutex<Vec<u64>>,
}

/// So many pages are all pages: a vCPU that runs no programs does not collect them for ever.
const ALL: usize = 1024;

impl Inbox {
    fn put(&self, page: u64) {
        let mut pages = locked(&self.pages);
        if pages.len() < ALL {
            pages.push(page);
        }
        drop(pages);
        self.waiting.store(true, Ordering::SeqCst);
    }

    /// Whether there is something.
    pub(super) fn waits(&self) -> bool {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Takes it; `None`: all pages.
    pub(super) fn take(&self) -> Option<Vec<u64>> {
        let mut pages = locked(&self.pages);
        self.waiting.store(false, Ordering::SeqCst);
        let taken = std::mem::take(&mut *pages);
        (taken.len() < ALL).then_some(taken)
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
    /// The host has refused a process.
    refused: AtomicBool,
    /// All programs run directly.
    pub(super) always: bool,
}

impl Shared {
    pub(crate) fn new(apics: Arc<ApicSystem>, memory: GuestMemory, always: bool) -> Self {
        // Zeroes, which the host gives lazily.
        let pages = usize::try_from(memory.window_len().div_ceil(PAGE_SIZE)).unwrap_or(0);
        let writers = Box::into_raw(vec![0_u16; pages].into_boxed_slice());
        // SAFETY: an atomic has the layout of its number, and nobody else has these.
        let writers = unsafe { Box::from_raw(writers as *mut [AtomicU16]) };
        let inboxes = (0..apics.count()).map(|_| Arc::default()).collect();
        Self {
            writers,
            inboxes,
            apics,
            memory,
            image: OnceLock::new(),
            refused: AtomicBool::new(false),
            always,
        }
    }

    pub(super) fn inbox(&self, vcpu: u32) -> Arc<Inbox> {
        self.inboxes.get(vcpu as usize).map(Arc::clone).unwrap_or_default()
    }

    /// The executable of new processes, if the host lets there be one.
    pub(super) fn image(&self) -> Option<&Image> {
        let made = self.image.get_or_init(|| Image::new().inspect_err(|e| self.refuse(e)).ok());
        made.as_ref()
    }

    /// The host lets no processes be made: programs are translated. Says so once.
    pub(super) fn refuse(&self, why: &io::Error) {
        if !self.refused.swap(true, Ordering::SeqCst) {
            tracing::warn!("this host lets guest programs not run directly ({why}): they are translated");
        }
    }

    /// Whether that is so.
    pub(super) fn is_refused(&self) -> bool {
        self.refused.load(Ordering::SeqCst)
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

#[cfg(test)]
mod tests {
    use super::*;
    use terem_memory::RamRange;

    fn shared(vcpus: u32) -> Shared {
        let ranges = [RamRange { base: 0, size: 1 << 20 }, RamRange { base: 4 << 20, size: 1 << 20 }];
        let memory = GuestMemory::new(&ranges).unwrap();
        let bus = Arc::new(terem_bus::Bus::new(terem_bus::Clock::manual()));
        let ids: Vec<u32> = (0..vcpus).collect();
        Shared::new(ApicSystem::new(&ids, bus), memory, false)
    }

    #[test]
    fn code_is_not_written_and_what_is_written_is_taken_away_first() {
        let shared = shared(2);
        assert!(shared.let_write(5));
        shared.keep_from_writing(0, 6);
        assert!(!shared.inbox(1).waits(), "nobody writes page 6");
        shared.memory.marks().mark_code(5);
        shared.keep_from_writing(0, 5);
        for vcpu in 0..2 {
            assert_eq!(shared.inbox(vcpu).take(), Some(vec![5]));
        }
        assert!(!shared.let_write(5), "it holds code");
        shared.memory.marks().written(5);
        assert!(shared.let_write(5));
        assert!(!shared.let_write(1 << 20), "there is no such page");
    }

    #[test]
    fn many_pages_are_all_pages() {
        let inbox = Inbox::default();
        (0..5000).for_each(|page| inbox.put(page));
        assert!(inbox.waits());
        assert_eq!(inbox.take(), None);
        assert_eq!((inbox.waits(), inbox.take()), (false, Some(Vec::new())));
    }

    #[test]
    fn pages_are_found_in_the_file() {
        let shared = shared(1);
        assert_eq!(shared.offset(3), Some(0x3000));
        assert_eq!(shared.offset((4 << 20 | 0x5000) >> 12), Some(1 << 20 | 0x5000));
        assert_eq!(shared.offset((2 << 20) >> 12), None);
    }
}
