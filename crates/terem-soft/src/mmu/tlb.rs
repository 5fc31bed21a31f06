//! The software TLB.
//!
//! The TLB is tagged: an entry's tag is its linear page with a *generation* in the low 12 bits. Flushing
//! is taking a new generation; with PCID each context keeps one. There are three sets of entries, for
//! supervisor accesses under SMAP, supervisor accesses without it, and user accesses, so that changes of
//! privilege flush nothing.

use std::cell::UnsafeCell;
use std::sync::atomic::AtomicU32;

/// The page number's bits of a linear address.
pub const PAGE_MASK: u64 = !0xfff;

/// Pairs of entries in each set.
pub(crate) const PAIRS: usize = 2048;
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
/// Entries of each set that translated code looks at.
pub(crate) const QUICK: usize = 1024;

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

/// One page of linear addresses as translated code finds it, by the page number's low bits. Always of the present context:
/// there is no generation to compare. Translated code knows this layout.
///
/// An entry that is not valid has for its page one whose place in the table is another: no address that leads to the entry
/// is on it, whatever a guest tries.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Quick {
    /// The page's linear address, for reads.
    pub(crate) read: u64,
    /// The same for writes. Pages that held code when they were put in are not there.
    pub(crate) write: u64,
    /// Where the host has it.
    pub(crate) host: u64,
    _pad: u64,
}

impl Quick {
    /// The page of an entry that is not valid.
    const fn elsewhere(place: usize) -> u64 {
        if place == 0 { 0x1000 } else { 0 }
    }

    /// Where in a set the page of `linear` is.
    fn place(linear: u64) -> usize {
        (linear >> 12) as usize % QUICK
    }
}

/// The entries of two pages that share a place: the one that was put in last, and the one before. In one line of the host's
/// cache.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Pair(pub(crate) [Entry; 2]);

/// The page that the stack was last on, which may be written. Translated code knows this layout.
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

/// The linear address of no page: no access has it, since it is not canonical. A guest that comes by it all the same reaches
/// [`NOTHING`].
const NO_PAGE: u64 = 0x7ffd_a5c3_96e1_f000;

/// A page of the host's that means nothing, and behind it one more.
#[repr(align(4096))]
struct Nothing(UnsafeCell<[u8; 0x2000]>);

// SAFETY: nobody but translated code goes there, with accesses whose values mean nothing.
unsafe impl Sync for Nothing {}

static NOTHING: Nothing = Nothing(UnsafeCell::new([0; 0x2000]));
/// The mark of [`NOTHING`].
static NO_MARK: AtomicU32 = AtomicU32::new(0);

impl Remembered {
    fn nothing() -> Self {
        Self { page: NO_PAGE, host: NOTHING.0.get() as u64, mark: &raw const NO_MARK }
    }
}

/// Which code lies in a page of linear addresses, in the present context. Translated code knows this layout.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Place {
    /// The page's linear address, plus 1 for the user's.
    pub(crate) page: u64,
    /// The physical page's number, and in the lower half the mark under which its code is valid; [`NOWHERE`]: not known.
    pub(crate) code: u64,
}

/// Entries of the table of code's places, for the supervisor and the user.
pub(crate) const PLACES: usize = 1024;
/// No code's place: that of no page, since it would be beyond all physical addresses.
pub(crate) const NOWHERE: u64 = u64::MAX;
const NO_PLACE: Place = Place { page: u64::MAX, code: NOWHERE };

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
/// CR3 leave alone.
///
/// In front of it stands, for data accesses of translated code, a smaller table without tags ([`Quick`]).
pub(crate) struct Tlb {
    pub(crate) sets: [[Pair; PAIRS]; 3],
    /// Generation of each set's entries.
    pub(crate) generations: [u64; 3],
    /// What translated code looks at.
    pub(crate) quick: [[Quick; QUICK]; 3],
    /// Whether there is anything in a set of `quick`. Bytes that translated code sets.
    pub(crate) quick_used: [bool; 3],
    /// For each set, the page that the stack is on.
    pub(crate) stacks: [Remembered; 3],
    /// Where code lies, for the supervisor and the user.
    pub(crate) places: [[Place; PLACES]; 2],
    /// Whether there is anything in a part of `places`.
    places_used: [bool; 2],
    /// For the supervisor and the user.
    code: [[CodeEntry; CODE_ENTRIES]; 2],
    /// The set of the present mode.
    pub(super) set: usize,
    /// Generation of the present context.
    generation: u64,
    /// Accesses to data are checked for alignment: none finds an entry.
    strict: bool,
    /// Generation of what is global.
    of_globals: u64,
    /// Whether global pages are on (CR4.PGE).
    globals: bool,
    /// Pairs of the kernel's set that may have entries that are not of global pages.
    passing: Vec<u16>,
    /// The supervisor has fetched from pages that are not global.
    passing_code: bool,
    /// What is remembered of each process-context identifier.
    of_pcid: Vec<Context>,
    next_generation: u16,
    /// Epoch of the present context's code, and of what is global.
    epochs: [u64; 2],
    last_epoch: u64,
    /// The supervisor has fetched from the lower half.
    low_code: bool,
    /// Which linear pages were fetched from in these epochs (a filter of hashes).
    fetched: [u64; 1024],
    /// Ranges of linear addresses in the lower and the upper half that cover every large page put in.
    pub(super) large: [Option<(u64, u64)>; 2],
}

/// What is remembered of a context: 0 where nothing is.
#[derive(Debug, Clone, Copy, Default)]
struct Context {
    generation: u16,
    /// Epoch of code.
    code: u64,
}

impl Tlb {
    /// Where the present mode's set is in this.
    pub(crate) const SET: usize = std::mem::offset_of!(Tlb, set);

    pub(crate) fn new() -> Self {
        Self {
            sets: [[Pair([EMPTY; 2]); PAIRS]; 3],
            generations: [1; 3],
            quick: [Self::no_quick(); 3],
            quick_used: [false; 3],
            stacks: [Remembered::nothing(); 3],
            places: [[NO_PLACE; PLACES]; 2],
            places_used: [false; 2],
            code: [[NO_CODE; CODE_ENTRIES]; 2],
            set: 0,
            generation: 1,
            strict: false,
            of_globals: 1,
            globals: false,
            passing: Vec::new(),
            passing_code: false,
            of_pcid: vec![Context::default(); 4096],
            next_generation: 2,
            epochs: [1, 2],
            last_epoch: 2,
            low_code: false,
            fetched: [0; 1024],
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
        (page + (page >> MIX)) as usize % PAIRS
    }

    /// The entry of `linear` in the present set. (Who may write may read: the tag for reads is there if the other is.)
    #[inline(always)]
    pub(crate) fn entry(&self, linear: u64) -> Entry {
        // SAFETY: `set` is below 3 and the index is masked.
        let Pair([a, b]) = unsafe { self.sets.get_unchecked(self.set).get_unchecked(Self::place(linear)) };
        if a.read == self.tag(linear) { *a } else { *b }
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
        self.passing_code = false;
        self.fetched = [0; 1024];
        self.clear_places(0);
        self.clear_places(1);
    }

    fn clear_places(&mut self, user: usize) {
        if std::mem::take(&mut self.places_used[user]) {
            self.places[user].fill(NO_PLACE);
        }
    }

    /// The code of the physical page `page`, valid under `mark`, is where `linear` is, which the present mode may fetch from.
    pub(crate) fn put_place(&mut self, linear: u64, page: u64, mark: u32) {
        let user = usize::from(self.set == USER);
        self.places[user][(linear >> 12) as usize % PLACES] =
            Place { page: linear & PAGE_MASK | user as u64, code: Self::code_of(page, mark) };
        self.places_used[user] = true;
    }

    /// [`Place::code`].
    pub(crate) fn code_of(page: u64, mark: u32) -> u64 {
        page << 32 | u64::from(mark)
    }

    fn no_quick() -> [Quick; QUICK] {
        std::array::from_fn(|i| Quick {
            read: Quick::elsewhere(i),
            write: Quick::elsewhere(i),
            host: 0,
            _pad: 0,
        })
    }

    /// Forgets what translated code knows of the pages of a set.
    fn clear_quick(&mut self, set: usize) {
        self.stacks[set] = Remembered::nothing();
        if std::mem::take(&mut self.quick_used[set]) {
            for (i, quick) in self.quick[set].iter_mut().enumerate() {
                (quick.read, quick.write) = (Quick::elsewhere(i), Quick::elsewhere(i));
            }
        }
    }

    /// Lets translated code know the page of `linear`, whose entry is in the present set.
    pub(crate) fn put_quick(&mut self, linear: u64, write: bool) {
        let (host, page) = (linear.wrapping_add(self.entry(linear).addend) & PAGE_MASK, linear & PAGE_MASK);
        let place = Quick::place(linear);
        let write = if write { page } else { Quick::elsewhere(place) };
        self.quick[self.set][place] = Quick { read: page, write, host, _pad: 0 };
        self.quick_used[self.set] = true;
    }

    /// Lets translated code know the page of the stack, as [`Self::put_quick`].
    pub(crate) fn put_stack(&mut self, linear: u64) {
        let (entry, page) = (self.entry(linear), linear & PAGE_MASK);
        self.stacks[self.set] = Remembered { page, host: page.wrapping_add(entry.addend), mark: entry.mark };
    }

    /// The page at the host address `host` holds code from now on: translated code does not write there on its own.
    pub(crate) fn holds_code(&mut self, host: u64) {
        for set in 0..3 {
            if self.stacks[set].host == host {
                self.stacks[set] = Remembered::nothing();
            }
            if self.quick_used[set] {
                for (i, quick) in self.quick[set].iter_mut().enumerate() {
                    if quick.host == host {
                        quick.write = Quick::elsewhere(i);
                    }
                }
            }
        }
    }

    fn filter(linear: u64) -> (usize, u64) {
        let hash = (linear >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
        ((hash >> 6) as usize, 1 << (hash & 63))
    }

    /// A generation that no entry has.
    fn take_generation(&mut self) -> u16 {
        if self.next_generation > LAST_GENERATION {
            self.sets.iter_mut().flatten().for_each(|pair| *pair = Pair([EMPTY; 2]));
            self.of_pcid.fill(Context::default());
            self.passing.clear();
            (0..3).for_each(|set| self.clear_quick(set));
            self.new_epochs();
            self.next_generation = 2;
            self.of_globals = 1;
        }
        self.next_generation += 1;
        self.next_generation - 1
    }

    fn use_generations(&mut self) {
        let kernel = if self.globals { self.of_globals } else { self.generation };
        // No entry has generation 0.
        let user = if self.strict { 0 } else { self.generation };
        self.generations = [kernel, self.generation, user];
    }

    pub(super) fn set_strict(&mut self, strict: bool) {
        self.strict = strict;
        self.clear_quick(USER);
        self.use_generations();
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
        self.clear_quick(KERNEL);
        self.new_epochs();
        self.of_globals = u64::from(self.take_generation());
        self.switch(pcid, false);
    }

    /// Goes to a context; `keep` says that what is remembered of it may stay.
    pub(crate) fn switch(&mut self, pcid: u16, keep: bool) {
        let known = if keep { self.of_pcid[usize::from(pcid)] } else { Context::default() };
        let generation = if known.generation != 0 { known.generation } else { self.take_generation() };
        // Taking a generation may have begun new epochs: this must come after it.
        let code = if known.code != 0 { known.code } else { self.take_epoch() };
        self.of_pcid[usize::from(pcid)] = Context { generation, code };
        self.generation = u64::from(generation);
        self.epochs[0] = code;
        if !self.globals || !self.passing.is_empty() {
            self.clear_quick(KERNEL);
        }
        (1..3).for_each(|set| self.clear_quick(set));
        self.clear_places(1);
        if !self.globals || self.passing_code {
            self.clear_places(0);
        }
        for i in self.passing.drain(..) {
            self.sets[KERNEL][usize::from(i)] = Pair([EMPTY; 2]);
        }
        if std::mem::take(&mut self.passing_code) {
            // Code of the kernel's that is not global is rare; what was linked to it has to go.
            self.epochs[1] = self.take_epoch();
            self.code[0] = [NO_CODE; CODE_ENTRIES];
        }
        self.use_generations();
    }

    /// Forgets what is remembered of a context that is not the present one.
    pub(crate) fn forget(&mut self, pcid: u16) {
        self.of_pcid[usize::from(pcid)] = Context::default();
    }

    /// Forgets the page of `linear` in all contexts. Returns false if it may be part of a large page, so that everything
    /// must be flushed.
    #[must_use]
    pub(crate) fn invalidate(&mut self, linear: u64) -> bool {
        if self.large[(linear >> 63) as usize].is_some_and(|(from, to)| (from..to).contains(&linear)) {
            return false;
        }
        let page = linear & PAGE_MASK;
        let place = Quick::place(linear);
        for set in 0..3 {
            let quick = &mut self.quick[set][place];
            if quick.read == page {
                (quick.read, quick.write) = (Quick::elsewhere(place), Quick::elsewhere(place));
            }
            if self.stacks[set].page == page {
                self.stacks[set] = Remembered::nothing();
            }
        }
        for set in &mut self.sets {
            for entry in &mut set[Self::place(linear)].0 {
                if [entry.read, entry.write].iter().any(|t| t & PAGE_MASK == page) {
                    *entry = EMPTY;
                }
            }
        }
        let (word, bit) = Self::filter(linear);
        if self.fetched[word] & bit != 0 {
            // Where other pages' code lies stays known: what was good for the last epoch is soon good for the next one.
            self.epochs[0] = self.take_epoch();
            self.of_pcid.iter_mut().for_each(|of| of.code = 0);
            if self.low_code || linear >> 63 != 0 {
                self.epochs[1] = self.take_epoch();
            }
            for user in 0..2 {
                let entry = &mut self.code[user][(linear >> 12) as usize % CODE_ENTRIES];
                if entry.tag & PAGE_MASK == page {
                    *entry = NO_CODE;
                }
                let place = &mut self.places[user][(linear >> 12) as usize % PLACES];
                if place.page & PAGE_MASK == page {
                    *place = NO_PLACE;
                }
            }
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
        if page.data {
            let tag = linear & PAGE_MASK | self.generations[set];
            let write = if page.write { tag } else { INVALID };
            let Pair([first, second]) = &mut self.sets[set][Self::place(linear)];
            if first.read != tag {
                *second = *first;
            }
            *first = Entry { read: tag, write, addend, mark };
            if set == KERNEL && self.globals && !page.global {
                if self.passing.len() >= PASSING {
                    if self.next_generation >= LAST_GENERATION {
                        // Both of the present context's are taken anew if they begin again.
                        self.next_generation = LAST_GENERATION + 1;
                        self.generation = u64::from(self.take_generation());
                    }
                    self.of_globals = u64::from(self.take_generation());
                    self.passing.clear();
                    self.clear_quick(KERNEL);
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
            self.low_code |= user == 0 && linear >> 63 == 0;
            self.passing_code |= user == 0 && self.globals && !page.global;
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
