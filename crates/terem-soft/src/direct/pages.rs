//! Which pages of a program are mapped: when it touches them, and their neighbours; and when they are taken away again.

use std::io;

use super::child::{STUB, STUB_END, USER_END};
use super::scan::{TAIL, must_not_run};
use super::space::{Page, Space, Use};
use super::{Direct, Shared};
use crate::cpu::Cpu;
use crate::mmu::{Access, Leaf};

/// Pages around one that is touched, that are mapped with it if the program has used them before.
const AROUND: u64 = 32;

impl Cpu {
    /// Makes a space's mappings right before a run: what may have changed is looked up, or taken away.
    pub(super) fn catch_up(&self, direct: &mut Direct, at: usize) -> io::Result<()> {
        let shared = &direct.shared;
        if direct.inbox.waits() {
            let pages = direct.inbox.take();
            for space in &mut direct.spaces {
                let written = |p: &Page| p.usage == Use::Write && pages.contains(&p.physical);
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
            let other =
                |p: &Page| matches!(p.usage, Use::Execute(w) | Use::Kept(w) if marks.word(p.physical) != w);
            let found: Vec<u64> = space.pages.iter().filter(|(_, p)| other(p)).map(|(l, _)| *l).collect();
            space.take(shared, &found)?;
        }
        if std::mem::take(&mut space.stale) {
            space.gone.clear();
            let gone: Vec<u64> =
                space.pages.iter().filter(|&(l, p)| !self.still(*l, p)).map(|(l, _)| *l).collect();
            let all = space.pages.len();
            space.take(shared, &gone)?;
            if gone.len() * 2 > all && all > 64 {
                // Another program has taken the place of the one that was moved here.
                direct.policy.forget(space.root);
            }
        } else if !space.gone.is_empty() {
            let mut gone = std::mem::take(&mut space.gone);
            gone.sort_unstable();
            space.take(shared, &gone)?;
        }
        Ok(())
    }

    /// Whether a page is mapped as the page tables have it.
    fn still(&self, linear: u64, page: &Page) -> bool {
        self.peek_user(linear << 12).is_some_and(|leaf| {
            leaf.page == page.physical
                && leaf.accessed
                && match page.usage {
                    Use::Read => true,
                    Use::Write => leaf.writable && leaf.dirty,
                    Use::Execute(_) | Use::Kept(_) => leaf.executable,
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
        space: &mut Space,
        address: u64,
        rip: u64,
    ) -> io::Result<bool> {
        if address >= USER_END || (STUB..STUB_END).contains(&address) {
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
        let mut found = Vec::new();
        for near in first..first + AROUND {
            let new = !space.pages.contains_key(&near);
            if (near == linear || new)
                && let Some(leaf) = self.peek_user(near << 12)
                && leaf.accessed
                && !(STUB..STUB_END).contains(&(near << 12))
                && let Some(usage) = self.usage_of(shared, near, &leaf, (near == linear).then_some(access))
            {
                found.push((near, Page { physical: leaf.page, usage }));
            }
        }
        if !space.has_room(found.len()) {
            let all: Vec<u64> = space.pages.keys().copied().collect();
            space.take(shared, &all)?;
        }
        space.put(shared, &found)?;
        Ok(match space.pages.get(&linear).map(|p| p.usage) {
            Some(Use::Execute(_)) => access != Access::Write,
            Some(Use::Write) => access != Access::Execute,
            Some(Use::Read) => access == Access::Read,
            Some(Use::Kept(_)) => access == Access::Read,
            None => false,
        })
    }

    /// What a page is mapped for; `access` is what has just been done with it, if anything.
    fn usage_of(&self, shared: &Shared, linear: u64, leaf: &Leaf, access: Option<Access>) -> Option<Use> {
        let writes = leaf.writable && leaf.dirty;
        let executes =
            leaf.executable && access != Some(Access::Write) && (!writes || access == Some(Access::Execute));
        if !executes {
            return Some(if writes { Use::Write } else { Use::Read });
        }
        let word = self.look_at_code(shared, leaf.page)?;
        let mut bytes = [0; 0x1000 + TAIL];
        self.page_bytes(leaf.page, &mut bytes[..0x1000]);
        let mut len = 0x1000;
        if let Some(next) = self.peek_user((linear + 1) << 12) {
            self.page_bytes(next.page, &mut bytes[0x1000..]);
            len = bytes.len();
        }
        Some(if must_not_run(&bytes[..len]) { Use::Kept(word) } else { Use::Execute(word) })
    }

    /// Marks a page as holding code that is looked at.
    fn look_at_code(&self, shared: &Shared, page: u64) -> Option<u32> {
        let marks = self.memory.marks();
        let word = marks.mark_code(page);
        crate::membarrier::all_threads();
        shared.keep_from_writing(self.id, page);
        (word != 0).then_some(word)
    }

    fn page_bytes(&self, page: u64, to: &mut [u8]) {
        use terem_memory::vm_memory::{Bytes, GuestAddress};
        // Pages that `peek_user` gives are RAM.
        let read = self.memory.read_slice(to, GuestAddress(page << 12));
        debug_assert!(read.is_ok());
    }
}
