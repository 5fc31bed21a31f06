//! A guest program's address space, as far as a process has it mapped.
//!
//! It is to the page tables what a TLB is: what is in it was there when it was put in, and stays until the guest says that it
//! may have changed (`invlpg`, writes to CR3 …). A flush of everything does not drop it: before the next run each page is looked
//! up in the page tables again, which costs a hundredth of mapping it anew.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::child::Child;
use super::shared::Shared;
use super::stub::{Call, STUB_END, Source, USER_END, map, unmap};

/// What a program may do with a mapped page beside reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Read,
    Write,
    /// Execute, while the page has this mark.
    Execute(u32),
    /// Execute a copy, which is there in the copies' file, while the page has this mark.
    Copy(u32, u64),
    /// Read; as long as the page has this mark, it holds code that must not run.
    Kept(u32),
}

impl Use {
    fn protection(self) -> libc::c_int {
        match self {
            Self::Read | Self::Kept(_) => libc::PROT_READ,
            Self::Write => libc::PROT_READ | libc::PROT_WRITE,
            Self::Execute(_) | Self::Copy(..) => libc::PROT_READ | libc::PROT_EXEC,
        }
    }
}

/// A page: its physical number, and what for it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) physical: u64,
    pub(super) usage: Use,
}

/// Mappings of one process, at most: below Linux' limit of 65,530, whatever neighbours it can join.
const MOST_REGIONS: usize = 30_000;
/// Pages of one process, at most: 2 GiB, for which some 20 MiB are kept in mind here.
const MOST_PAGES: usize = 1 << 19;
/// Areas of 2 MiB that it has pages in, at most: each costs the host a page table.
const MOST_AREAS: usize = 4096;
/// Single pages that may have changed, above which all may.
const MOST_GONE: usize = 1024;

/// The address space of one CR3, on one vCPU.
pub(super) struct Space {
    /// CR3 without what is no address.
    pub(super) root: u64,
    pub(super) pcid: u16,
    pub(super) child: Child,
    pub(super) pages: BTreeMap<u64, Page>,
    /// Everything may have changed.
    pub(super) stale: bool,
    /// Linear page numbers that may have changed.
    pub(super) gone: Vec<u64>,
    /// How often code of the machine had been written over when marks were last compared.
    pub(super) changes: u64,
    /// When it was last used, in runs of this vCPU.
    pub(super) used: u64,
    /// The CPU that the process is on.
    pub(super) cpu: Option<usize>,
    /// How often code was met that must not run, or of which nothing is sure.
    pub(super) kept: u32,
    regions: usize,
    areas: BTreeSet<u64>,
    /// A call has failed: what is mapped is not what is known.
    pub(super) broken: bool,
}

impl Space {
    /// An empty one of nobody's.
    pub(super) fn new(child: Child) -> Self {
        Self {
            root: 0,
            pcid: 0,
            child,
            pages: BTreeMap::new(),
            stale: false,
            gone: Vec::new(),
            changes: 0,
            used: 0,
            cpu: None,
            kept: 0,
            regions: 0,
            areas: BTreeSet::new(),
            broken: false,
        }
    }

    /// Takes all pages away, for another program.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub(super) fn empty(&mut self, shared: &Shared) -> io::Result<()> {
        let result = self.child.call(&[unmap(STUB_END, USER_END - STUB_END)]);
        self.broken |= result.is_err();
        self.child.forget_extended();
        self.forget(shared);
        self.gone.clear();
        self.areas.clear();
        (self.stale, self.kept, self.regions) = (false, 0, 0);
        result
    }

    /// Whether there is room for this many more mappings.
    pub(super) fn has_room(&self, more: usize) -> bool {
        self.regions + more <= MOST_REGIONS
            && self.pages.len() + more <= MOST_PAGES
            && self.areas.len() < MOST_AREAS
    }

    /// Maps pages by linear page number, ascending. What must not be written as things are, is mapped for reading.
    ///
    /// # Errors
    /// The host's; the space is good for nothing then.
    pub(super) fn put(&mut self, shared: &Shared, pages: &[(u64, Page)]) -> io::Result<()> {
        let mut calls: Vec<Call> = Vec::new();
        let mut before = Vec::new();
        let mut group: Option<Group> = None;
        for &(linear, mut page) in pages {
            let Some(own) = shared.offset(page.physical) else { continue };
            let (source, offset) =
                if let Use::Copy(_, at) = page.usage { (Source::Copies, at) } else { (Source::Ram, own) };
            if page.usage == Use::Write && !shared.let_write(page.physical) {
                page.usage = Use::Read;
            }
            self.areas.insert(linear >> 9);
            if let Some(old) = self.pages.insert(linear, page)
                && old.usage == Use::Write
            {
                before.push(old.physical);
            }
            let protection = page.usage.protection();
            group = match group {
                Some(g)
                    if (g.protection, g.source) == (protection, source)
                        && g.last + 1 == linear
                        && g.offset + (linear - g.from) * 4096 == offset =>
                {
                    Some(Group { last: linear, ..g })
                }
                done => {
                    calls.extend(done.map(Group::call));
                    Some(Group { from: linear, last: linear, source, offset, protection })
                }
            };
        }
        calls.extend(group.map(Group::call));
        // One in the middle of another makes two more of it.
        self.regions += 2 * calls.len();
        let result = self.child.call(&calls);
        self.broken |= result.is_err();
        before.into_iter().for_each(|page| shared.no_longer_writes(page));
        result
    }

    /// Takes pages away that are mapped, by linear page number, ascending.
    ///
    /// # Errors
    /// As [`Self::put`].
    pub(super) fn take(&mut self, shared: &Shared, linear: &[u64]) -> io::Result<()> {
        let mut calls: Vec<Call> = Vec::new();
        let mut written = Vec::new();
        let mut group: Option<(u64, u64)> = None;
        for &page in linear {
            let Some(old) = self.pages.remove(&page) else { continue };
            if old.usage == Use::Write {
                written.push(old.physical);
            }
            group = match group {
                Some((from, last)) if last + 1 == page => Some((from, page)),
                done => {
                    calls.extend(done.map(|(from, last)| unmap(from * 4096, (last + 1 - from) * 4096)));
                    Some((page, page))
                }
            };
        }
        calls.extend(group.map(|(from, last)| unmap(from * 4096, (last + 1 - from) * 4096)));
        self.regions += calls.len();
        let result = self.child.call(&calls);
        self.broken |= result.is_err();
        if self.pages.is_empty() {
            self.regions = 0;
        }
        written.into_iter().for_each(|page| shared.no_longer_writes(page));
        result
    }

    /// A linear page may have changed.
    pub(super) fn may_have_changed(&mut self, page: u64) {
        if self.stale || !self.pages.contains_key(&page) {
            return;
        }
        if self.gone.len() < MOST_GONE {
            self.gone.push(page);
        } else {
            self.stale = true;
        }
    }

    /// Forgets all pages, without the process: it is about to go.
    pub(super) fn forget(&mut self, shared: &Shared) {
        for page in std::mem::take(&mut self.pages).into_values() {
            if page.usage == Use::Write {
                shared.no_longer_writes(page.physical);
            }
        }
    }
}

/// Pages that one call maps.
struct Group {
    from: u64,
    last: u64,
    source: Source,
    /// Of the first one in the file.
    offset: u64,
    protection: libc::c_int,
}

impl Group {
    fn call(self) -> Call {
        map(self.from * 4096, (self.last + 1 - self.from) * 4096, self.protection, self.source, self.offset)
    }
}
