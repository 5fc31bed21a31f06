//! Which pages of a program are mapped: when it touches them, and their neighbours; and when they are taken away again.

use std::io;

use super::patches::Patches;
use super::scan::{LEAD, TAIL, Verdict, look};
use super::space::{Page, Space, Use};
use super::stub::{STUB, STUB_END, USER_END};
use super::{Direct, Shared};
use crate::cpu::Cpu;
use crate::mmu::Access;

/// Pages around one that is touched, that are mapped with it if the program has used them before.
const AROUND: u64 = 64;
/// Pages that are looked up again after a flush, at most.
const MOST_LOOKED_UP: usize = 1 << 16;

impl Cpu {
    /// Makes a space's mappings right before a run: what may have changed is looked up, or taken away. False if it is another
    /// program's now.
    pub(super) fn catch_up(&self, direct: &mut Direct, at: usize) -> io::Result<bool> {
        let shared = &direct.shared;
        if direct.inbox.waits() {
            let pages = direct.inbox.take();
            for space in &mut direct.spaces {
                let written = |p: &Page| {
                    p.usage == Use::Write && pages.as_ref().is_none_or(|all| all.contains(&p.physical))
                };
                let found: Vec<u64> =
                    space.pages.iter().filter(|(_, p)| written(p)).map(|(l, _)| *l).collect();
                space.take(shared, &found)?;
            }
        }
        let space = &mut direct.spaces[at];
        let changes = self.memory.marks().changes();
        if space.changes != changes {
            space.changes = changes;
            let marks = self.memory.marks();
            let other = |p: &Page| matches!(p.usage, Use::Execute(w) | Use::Copy(w, _) | Use::Kept(w) if marks.word(p.physical) != w);
            let found: Vec<u64> = space.pages.iter().filter(|(_, p)| other(p)).map(|(l, _)| *l).collect();
            space.take(shared, &found)?;
        }
        if std::mem::take(&mut space.stale) {
            space.gone.clear();
            if space.pages.len() > MOST_LOOKED_UP {
                // That would take longer than the guest's time slices.
                space.empty(shared)?;
                direct.policy.move_back(space.root, self.bus.clock.now());
                return Ok(false);
            }
            let gone: Vec<u64> =
                space.pages.iter().filter(|&(l, p)| !self.still(*l, p)).map(|(l, _)| *l).collect();
            let all = space.pages.len();
            space.take(shared, &gone)?;
            if gone.len() * 2 > all && all > 64 {
                // Another program has taken the place of the one that was moved here.
                direct.policy.forget(space.root);
                return Ok(false);
            }
        } else if !space.gone.is_empty() {
            let mut gone = std::mem::take(&mut space.gone);
            gone.sort_unstable();
            space.take(shared, &gone)?;
        }
        Ok(true)
    }

    /// Whether a page is mapped as the page tables have it.
    fn still(&self, linear: u64, page: &Page) -> bool {
        self.peek_user(linear << 12).is_some_and(|leaf| {
            leaf.page == page.physical
                && leaf.accessed
                && match page.usage {
                    Use::Read => true,
                    Use::Write => leaf.writable && leaf.dirty,
                    Use::Execute(_) | Use::Copy(..) | Use::Kept(_) => leaf.executable,
                }
        })
    }

    /// Whether the guest has a page where the stub is.
    pub(super) fn stub_is_in_the_way(&self) -> bool {
        (STUB..STUB_END).step_by(0x1000).any(|at| self.peek_user(at).is_some())
    }

    /// The program has touched `address`, which is not mapped or not so; RIP is `rip`. True if that is mended, false if the
    /// interpreter has to look at the instruction.
    pub(super) fn touched(
        &mut self,
        shared: &Shared,
        patches: &mut Patches,
        space: &mut Space,
        address: u64,
        rip: u64,
    ) -> io::Result<bool> {
        if !(STUB_END..USER_END).contains(&address) {
            return Ok(false);
        }
        let linear = address >> 12;
        let fetched = linear == rip >> 12 || (linear == (rip >> 12) + 1 && rip & 0xfff > 0xff0);
        let access = match space.pages.get(&linear).map(|p| p.usage) {
            None if fetched => Access::Execute,
            None => Access::Read,
            Some(Use::Read) if fetched && self.peek_user(address).is_some_and(|l| l.executable) => {
                Access::Execute
            }
            Some(Use::Read) => Access::Write,
            Some(Use::Write) if fetched => Access::Execute,
            // A program that writes its code, or code that must not run.
            Some(_) => return Ok(false),
        };
        if access == Access::Write && self.peek_user(address).is_none_or(|l| !l.writable) {
            return Ok(false);
        }
        // The walk sets the bits that the access does. What it says of a fault has not happened yet.
        let cr2 = self.cr2;
        if self.walk_user(address, access).is_err() {
            self.cr2 = cr2;
            return Ok(false);
        }
        let first = linear & !(AROUND - 1);
        let (mut found, mut code) = (Vec::new(), Vec::new());
        for near in first..first + AROUND {
            let new = !space.pages.contains_key(&near) && near >= STUB_END >> 12;
            if (near == linear || new)
                && let Some(leaf) = self.peek_user(near << 12)
                && leaf.accessed
            {
                let own = (near == linear).then_some(access);
                let writes = leaf.writable && leaf.dirty;
                let executes = leaf.executable
                    && own != Some(Access::Write)
                    && (!writes || own == Some(Access::Execute));
                let usage = if writes { Use::Write } else { Use::Read };
                if executes {
                    code.push((near, leaf.page));
                } else {
                    found.push((near, Page { physical: leaf.page, usage }));
                }
            }
        }
        for ((near, physical), word) in code.iter().zip(self.look_at_code(shared, &code)) {
            let usage = match self.usage_of_code(patches, *near, *physical, word) {
                // Where code and data share a page, data that looks like code is read as it is.
                Use::Copy(..) if !(*near == linear && access == Access::Execute) => Use::Read,
                usage => usage,
            };
            found.push((*near, Page { physical: *physical, usage }));
        }
        found.sort_unstable_by_key(|(near, _)| *near);
        if !space.has_room(found.len()) {
            space.empty(shared)?;
        }
        space.put(shared, &found)?;
        Ok(match space.pages.get(&linear).map(|p| p.usage) {
            Some(Use::Execute(_) | Use::Copy(..)) => access != Access::Write,
            Some(Use::Write) => access != Access::Execute,
            Some(Use::Read) => access == Access::Read,
            Some(Use::Kept(_)) => access == Access::Read,
            None => false,
        })
    }

    /// What a page of code is mapped for, that has this mark.
    fn usage_of_code(&self, patches: &mut Patches, linear: u64, physical: u64, word: u32) -> Use {
        if let Some(usage) = patches.known(physical, word) {
            return usage;
        }
        let mut bytes = [0; LEAD + 0x1000 + TAIL];
        let (mut from, mut to) = (LEAD, LEAD + 0x1000);
        self.page_bytes(physical, 0, &mut bytes[from..to]);
        if let Some(next) = self.peek_user((linear + 1) << 12) {
            self.page_bytes(next.page, 0, &mut bytes[to..]);
            to = bytes.len();
        }
        if let Some(before) = self.peek_user(linear.wrapping_sub(1) << 12) {
            self.page_bytes(before.page, 0x1000 - LEAD as u64, &mut bytes[..LEAD]);
            from = 0;
        }
        let usage = match look(&bytes[from..to], LEAD - from) {
            Verdict::Clean => Use::Execute(word),
            Verdict::At(offsets) => patches
                .put(physical, word, &bytes[LEAD..LEAD + 0x1000], offsets)
                .map_or(Use::Kept(word), |at| Use::Copy(word, at)),
            Verdict::Unsure => Use::Kept(word),
        };
        patches.remember(physical, word, usage);
        usage
    }

    /// Marks pages as holding code that is looked at; their marks.
    fn look_at_code(&mut self, shared: &Shared, pages: &[(u64, u64)]) -> Vec<u32> {
        let marks = self.memory.marks();
        let words = pages.iter().map(|&(_, page)| marks.mark_code(page)).collect();
        if !pages.is_empty() {
            // Whoever has marked a page before may not have come this far yet.
            crate::membarrier::all_threads();
        }
        for &(_, page) in pages {
            shared.keep_from_writing(self.id, page);
            self.tlb.holds_code(self.window + (page << 12));
        }
        words
    }

    pub(super) fn page_bytes(&self, page: u64, offset: u64, to: &mut [u8]) {
        use terem_memory::vm_memory::{Bytes, GuestAddress};
        // Pages that `peek_user` gives are RAM.
        let read = self.memory.read_slice(to, GuestAddress(page << 12 | offset));
        debug_assert!(read.is_ok());
    }
}
