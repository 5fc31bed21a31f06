//! The software TLB.
//!
//! The TLB is tagged: an entry's tag is its linear page with a *generation* in the low 12 bits. Flushing
//! is taking a new generation; with PCID each context keeps one. There are three sets of entries, for
//! supervisor accesses under SMAP, supervisor accesses without it, and user accesses, so that changes of
//! privilege flush nothing.

use std::sync::atomic::AtomicU32;

/// The page number's bits of a linear address.
pub const PAGE_MASK: u64 = !0xfff;

/// Entries of each set.
pub(crate) const ENTRIES: usize = 4096;
/// Right shift of a page number whose result is added to its place, so that arrays at a multiple of 16 MiB from each
/// other do not fight for the same entries.
pub(crate) const MIX: u32 = 12;
/// Entries for fetches.
const CODE_ENTRIES: usize = 256;
/// A tag that nothing matches: generation 0xfff is never used.
const INVALID: u64 = 0xfff;
/// Generations are 1 … this.
const LAST_GENERATION: u16 = 0xffe;
/// The set of supervisor accesses under SMAP, which sees supervisor pages only.
pub(crate) const KERNEL: usize = 0;
/// The set of user accesses.
pub(crate) const USER: usize = 2;
/// Entries of pages that are not global in the kernel's set, at most.
const PASSING: usize = 256;

/// One page of linear addresses, for data. Translated code knows this layout.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Entry {
    /// Tag for reads.
    pub(crate) read: u64,
    /// Tag for writes.
    pub(crate) write: u64,
    /// Host address minus linear address.
    pub(crate) addend: u64,
    /// The page's mark.
    pub(crate) mark: *const AtomicU32,
}

/// The page that accesses in translated code last went to. Translated code knows this layout.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Remembered {
    /// Its linear address, or [`NO_PAGE`].
    pub(crate) page: u64,
    /// Where the host has it; for [`NO_PAGE`], a page that means nothing.
    pub(crate) host: u64,
    /// Its mark.
    pub(crate) mark: *const AtomicU32,
}

/// The linear address of no page: no access has it, since it is not canonical. (A guest that comes by it all the same
/// gets nothing but nonsense of its own.)
pub(crate) const NO_PAGE: u64 = 0x7ffd_a5c3_96e1_f000;

/// One page of linear addresses, for fetches.
#[derive(Debug, Clone, Copy)]
struct CodeEntry {
    tag: u64,
    addend: u64,
}

const EMPTY: Entry = Entry { read: INVALID, write: INVALID, addend: 0, mark: std::ptr::null() };
const NO_CODE: CodeEntry = CodeEntry { tag: INVALID, addend: 0 };

/// The software TLB.
///
/// Beside translations it keeps *epochs*: numbers that change whenever a translation for fetches may have. What
/// translated code remembers of where code lies (jumps to other pages, targets of indirect jumps) is good in one
/// epoch. Pages that are global (PTE.G) have an epoch and, under SMAP, a generation of their own, which changes of
/// CR3 leave alone. Likewise there are epochs of data accesses: what an access in translated code remembers of the page
/// that it last went to is good in one of them.
pub(crate) struct Tlb {
    pub(crate) sets: [[Entry; ENTRIES]; 3],
    /// Generation of each set's entries.
    pub(crate) generations: [u64; 3],
    /// Epoch of each set's data accesses.
    pub(crate) data_epochs: [u64; 3],
    /// For each set, the page that the stack is on, which may be written.
    pub(crate) stacks: [Remembered; 3],
    /// For the supervisor and the user.
    code: [[CodeEntry; CODE_ENTRIES]; 2],
    /// The set of the present mode.
    pub(super) set: usize,
    /// Generation of the present context.
    generation: u64,
    /// Accesses to data are checked for alignment: none finds an entry.
    pub(super) strict: bool,
    /// Generation of what is global.
    of_globals: u64,
    /// Whether global pages are on (CR4.PGE).
    globals: bool,
    /// Entries of the kernel's set that are not of global pages.
    passing: Vec<u16>,
    /// The same of the supervisor's code.
    passing_code: Vec<u16>,
    /// What is remembered of each process-context identifier.
    of_pcid: Vec<Context>,
    next_generation: u16,
    /// Epoch of the present context's code, and of what is global.
    epochs: [u64; 2],
    /// The same for data.
    data: [u64; 2],
    last_epoch: u64,
    /// Epochs of data that other contexts had before this one are over: a page that may be global was invalidated.
    data_ended: u64,
    /// The kernel's set has had entries in the lower half.
    low: bool,
    /// There have been global pages in the lower half.
    low_globals: bool,
    /// Which linear pages were fetched from in these epochs (a filter of hashes).
    fetched: [u64; 64],
    /// Ranges of linear addresses in the lower and the upper half that cover every large page put in.
    pub(super) large: [Option<(u64, u64)>; 2],
}

/// What is remembered of a context: 0 where nothing is.
#[derive(Debug, Clone, Copy, Default)]
struct Context {
    generation: u16,
    /// Epoch of code.
    code: u64,
    /// Epoch of data.
    data: u64,
}

impl Tlb {
    /// Where the present mode's set is in this.
    pub(crate) const SET: usize = std::mem::offset_of!(Tlb, set);

    pub(crate) fn new() -> Self {
        Self {
            sets: [[EMPTY; ENTRIES]; 3],
            generations: [1; 3],
            data_epochs: [0; 3],
            stacks: [Remembered { page: NO_PAGE, host: 0, mark: std::ptr::null() }; 3],
            code: [[NO_CODE; CODE_ENTRIES]; 2],
            set: 0,
            generation: 1,
            strict: false,
            of_globals: 1,
            globals: false,
            passing: Vec::new(),
            passing_code: Vec::new(),
            of_pcid: vec![Context::default(); 4096],
            next_generation: 2,
            epochs: [1, 2],
            data: [0; 2],
            last_epoch: 2,
            data_ended: 0,
            low: false,
            low_globals: false,
            fetched: [0; 64],
            large: [None; 2],
        }
    }

    /// The set of the present mode.
    pub(crate) fn set(&self) -> usize {
        self.set
    }

    /// Where in a set the entry of `linear` is. Pages next to each other never share a place (from one to the next it
    /// moves by 1 or 2): that is why an access across pages cannot pass for one on the second page, whose entry it would
    /// find with the first one's address.
    #[inline(always)]
    fn place(linear: u64) -> usize {
        let page = linear >> 12;
        (page + (page >> MIX)) as usize % ENTRIES
    }

    /// The entry of `linear` in the present set.
    #[inline(always)]
    pub(crate) fn entry(&self, linear: u64) -> Entry {
        // SAFETY: `set` is below 3 and the index is masked.
        unsafe { *self.sets.get_unchecked(self.set).get_unchecked(Self::place(linear)) }
    }

    /// The tag that an entry has if it is valid for the page of `linear`.
    #[inline(always)]
    pub(crate) fn tag(&self, linear: u64) -> u64 {
        // SAFETY: `set` is below 3.
        linear & PAGE_MASK | unsafe { *self.generations.get_unchecked(self.set) }
    }

    /// Host address minus linear address of the page of `linear`, if it may be fetched from and is remembered.
    #[inline(always)]
    pub(crate) fn code(&self, linear: u64) -> Option<u64> {
        let user = usize::from(self.set == USER);
        let entry = &self.code[user][(linear >> 12) as usize % CODE_ENTRIES];
        (entry.tag == linear & PAGE_MASK | self.code_generation(user)).then_some(entry.addend)
    }

    #[inline(always)]
    fn code_generation(&self, user: usize) -> u64 {
        if user == 0 && self.globals { self.of_globals } else { self.generation }
    }

    /// The epoch of code in the present mode.
    pub(crate) fn epoch(&self) -> u64 {
        self.epochs[usize::from(self.set != USER && self.globals)]
    }

    fn take_epoch(&mut self) -> u64 {
        self.last_epoch += 1;
        self.last_epoch
    }

    /// Begins new epochs: what is known of where code lies is no longer so.
    pub(crate) fn new_epochs(&mut self) {
        self.epochs = [self.take_epoch(), self.take_epoch()];
        for of in &mut self.of_pcid {
            of.code = 0;
        }
        self.code = [[NO_CODE; CODE_ENTRIES]; 2];
        self.passing_code.clear();
        self.fetched = [0; 64];
    }

    /// Whether that is where a stack's page is remembered.
    pub(crate) fn is_stack(&self, page: *const Remembered) -> bool {
        self.stacks.as_ptr_range().contains(&page)
    }

    /// Begins new epochs of data accesses: what they remember of their pages is no longer so.
    pub(crate) fn new_data_epochs(&mut self) {
        for of in &mut self.of_pcid {
            of.data = 0;
        }
        self.data = [self.take_epoch(), self.take_epoch()];
        self.use_generations();
    }

    fn filter(linear: u64) -> (usize, u64) {
        let hash = (linear >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
        ((hash >> 6) as usize, 1 << (hash & 63))
    }

    /// A generation that no entry has.
    fn take_generation(&mut self) -> u16 {
        if self.next_generation > LAST_GENERATION {
            self.sets.iter_mut().flatten().for_each(|e| *e = EMPTY);
            self.of_pcid.fill(Context::default());
            self.passing.clear();
            self.new_epochs();
            self.data = [self.take_epoch(), self.take_epoch()];
            self.next_generation = 2;
            self.of_globals = 1;
        }
        self.next_generation += 1;
        self.next_generation - 1
    }

    pub(super) fn use_generations(&mut self) {
        let kernel = if self.globals { self.of_globals } else { self.generation };
        // No entry has generation 0.
        let user = if self.strict { 0 } else { self.generation };
        self.generations = [kernel, self.generation, user];
        let [context, global] = self.data;
        self.data_epochs = [if self.globals { global } else { context }, context, context];
        self.stacks.iter_mut().for_each(|s| s.page = NO_PAGE);
    }

    /// Whether accesses to data are checked for alignment.
    #[inline(always)]
    pub(crate) fn strict(&self) -> bool {
        self.strict
    }

    /// Forgets everything of all contexts; `globals` says whether there are global pages from now on.
    pub(super) fn flush_all(&mut self, pcid: u16, globals: bool) {
        self.globals = globals;
        self.of_pcid.fill(Context::default());
        self.large = [None; 2];
        self.passing.clear();
        (self.low, self.low_globals) = (false, false);
        self.new_epochs();
        self.data[1] = self.take_epoch();
        self.of_globals = u64::from(self.take_generation());
        self.switch(pcid, false);
    }

    /// Goes to a context; `keep` says that what is remembered of it may stay.
    pub(crate) fn switch(&mut self, pcid: u16, keep: bool) {
        let known = if keep { self.of_pcid[usize::from(pcid)] } else { Context::default() };
        let generation = if known.generation != 0 { known.generation } else { self.take_generation() };
        // Taking a generation may have begun new epochs: these must come after it.
        let code = if known.code != 0 { known.code } else { self.take_epoch() };
        let data = if known.data > self.data_ended { known.data } else { self.take_epoch() };
        self.of_pcid[usize::from(pcid)] = Context { generation, code, data };
        self.generation = u64::from(generation);
        (self.epochs[0], self.data[0]) = (code, data);
        if !self.passing.is_empty() {
            self.data[1] = self.take_epoch();
        }
        for i in self.passing.drain(..) {
            self.sets[KERNEL][usize::from(i)] = EMPTY;
        }
        if !self.passing_code.is_empty() {
            // Code of the kernel's that is not global is rare; what was linked to it has to go.
            self.epochs[1] = self.take_epoch();
            for i in self.passing_code.drain(..) {
                self.code[0][usize::from(i)] = NO_CODE;
            }
        }
        self.use_generations();
    }

    /// Forgets what is remembered of a context that is not the present one.
    pub(crate) fn forget(&mut self, pcid: u16) {
        self.of_pcid[usize::from(pcid)] = Context::default();
    }

    /// Forgets the page of `linear` in all contexts (what accesses remember, in the context `pcid` only, which is the
    /// present one, unless the page may be global). Returns false if it may be part of a large page, so that everything must be flushed.
    #[must_use]
    pub(crate) fn invalidate(&mut self, linear: u64, pcid: u16) -> bool {
        if self.large[(linear >> 63) as usize].is_some_and(|(from, to)| (from..to).contains(&linear)) {
            return false;
        }
        let page = linear & PAGE_MASK;
        if self.globals && (linear >> 63 != 0 || self.low_globals) {
            self.data_ended = self.last_epoch;
        }
        self.data[0] = self.take_epoch();
        self.of_pcid[usize::from(pcid)].data = self.data[0];
        if linear >> 63 != 0 || self.low {
            self.data[1] = self.take_epoch();
        }
        self.use_generations();
        for set in &mut self.sets {
            let entry = &mut set[Self::place(linear)];
            if [entry.read, entry.write].iter().any(|t| t & PAGE_MASK == page) {
                *entry = EMPTY;
            }
        }
        let (word, bit) = Self::filter(linear);
        if self.fetched[word] & bit != 0 {
            self.new_epochs();
        }
        true
    }

    /// Puts a page in. `host` is where `linear` lies, `mark` its page's mark.
    pub(super) fn put(
        &mut self,
        linear: u64,
        set: usize,
        page: &Permitted,
        addend: u64,
        mark: *const AtomicU32,
    ) {
        let index = (linear >> 12) as usize;
        self.low_globals |= page.global && linear >> 63 == 0;
        if page.data {
            let tag = linear & PAGE_MASK | self.generations[set];
            let write = if page.write { tag } else { INVALID };
            self.sets[set][Self::place(linear)] = Entry { read: tag, write, addend, mark };
            self.low |= set == KERNEL && linear >> 63 == 0;
            if set == KERNEL && self.globals && !page.global {
                if self.passing.len() >= PASSING {
                    if self.next_generation >= LAST_GENERATION {
                        // Both of the present context's are taken anew if they begin again.
                        self.next_generation = LAST_GENERATION + 1;
                        self.generation = u64::from(self.take_generation());
                    }
                    self.of_globals = u64::from(self.take_generation());
                    self.passing.clear();
                    self.data[1] = self.take_epoch();
                    self.use_generations();
                    return; // the entry just made is of an old generation: it will be filled again
                }
                self.passing.push(Self::place(linear) as u16);
            }
        }
        if page.fetch {
            let user = usize::from(set == USER);
            let tag = linear & PAGE_MASK | self.code_generation(user);
            self.code[user][index % CODE_ENTRIES] = CodeEntry { tag, addend };
            let (word, bit) = Self::filter(linear);
            self.fetched[word] |= bit;
            if user == 0 && self.globals && !page.global && self.passing_code.len() < CODE_ENTRIES {
                self.passing_code.push((index % CODE_ENTRIES) as u16);
            }
        }
    }
}

/// What the present mode may do with a page.
pub(super) struct Permitted {
    pub(super) data: bool,
    pub(super) write: bool,
    pub(super) fetch: bool,
    pub(super) global: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_never_share_a_place() {
        // Every carry, into every value of the bits that are added, and the end of the address space.
        for high in 0..1_u64 << 24 {
            let last = (high << 24) | 0xff_ffff;
            let (a, b) = (Tlb::place(last), Tlb::place(last.wrapping_add(1)));
            assert_ne!(a, b, "{last:#x}");
        }
        assert_ne!(Tlb::place(u64::MAX), Tlb::place(0));
        assert_ne!(Tlb::place(0x7_ffff_ffff), Tlb::place(0x8_0000_0000));
    }
}
