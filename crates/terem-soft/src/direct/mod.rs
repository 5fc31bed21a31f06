//! Direct execution: guest programs (64-bit user mode) by the host's processor, in a process of their own.
//!
//! `docs/direct.md` says how it works and what it is worth. The files:
//!
//! ```text
//!   policy.rs  which programs                       child.rs   the process: traced, locked in
//!   stub.rs    what that is made of                  pin.rs     one CPU for thread and process
//!   space.rs   its address space: a kind of TLB     scan.rs    code that must not run directly
//!   shared.rs  what the vCPUs of a machine have in common
//!   patches.rs copies of pages that such code is on
//!   enter.rs   going there and back                 pages.rs   which pages are mapped, and when they are taken away
//! ```

mod child;
mod enter;
mod pages;
mod patches;
mod pin;
mod policy;
mod scan;
mod shared;
mod space;
mod stub;

use std::sync::Arc;
use std::thread::ThreadId;

pub(crate) use child::stop;
use patches::Patches;
use pin::Pin;
use policy::Policy;
use shared::Inbox;
pub(crate) use shared::Shared;
use space::Space;

use crate::cpu::Cpu;

/// Address spaces of one vCPU, at most.
const SPACES: usize = 8;

/// One vCPU's part.
pub(crate) struct Direct {
    shared: Arc<Shared>,
    inbox: Arc<Inbox>,
    spaces: Vec<Space>,
    policy: Policy,
    /// The thread that traces the processes.
    thread: Option<ThreadId>,
    runs: u64,
    pin: Pin,
    patches: Patches,
}

impl Direct {
    pub(crate) fn new(shared: Arc<Shared>, vcpu: u32) -> Box<Self> {
        let inbox = shared.inbox(vcpu);
        let (spaces, policy) = (Vec::new(), Policy::new(shared.always));
        Box::new(Self {
            shared,
            inbox,
            spaces,
            policy,
            thread: None,
            runs: 0,
            pin: Pin::default(),
            patches: Patches::default(),
        })
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        for space in &mut self.spaces {
            space.forget(&self.shared);
        }
    }
}

/// CR3's address of the top table.
const ROOT: u64 = 0x000f_ffff_ffff_f000;

impl Cpu {
    /// The page at `physical` (a page number) is marked: no program writes it directly from now on.
    #[inline]
    pub(crate) fn keep_from_direct_writing(&self, page: u64) {
        if let Some(direct) = &self.direct {
            direct.shared.keep_from_writing(self.id, page);
        }
    }

    /// Whether the program that CR3 belongs to runs directly, as translated code has to know.
    pub(crate) fn refresh_direct(&mut self) {
        let root = self.cr3 & ROOT;
        self.runs_directly_here = self.direct.as_ref().is_some_and(|d| d.policy.is_direct(root));
    }

    /// The vCPU is about to sleep.
    pub(crate) fn sleeps_for_policy(&mut self) {
        if let Some(direct) = &mut self.direct {
            direct.pin.let_go();
        }
    }

    /// An interrupt is about to be taken.
    pub(crate) fn interrupted_for_policy(&mut self) {
        if let Some(direct) = &mut self.direct
            && direct.pin.holds()
        {
            direct.pin.let_go_after_a_while(self.bus.clock.now());
        }
        if self.cpl == 3
            && !self.runs_directly_here
            && self.may_run_directly()
            && let Some(direct) = &mut self.direct
            && !direct.shared.is_refused()
        {
            direct.policy.interrupted(self.cr3 & ROOT, self.bus.clock.now(), self.kernel_entries);
            self.refresh_direct();
            if self.runs_directly_here {
                // Translations of its code do not find each other any more.
                self.native.jumps.fill(crate::translate::JumpEntry::NONE);
                self.tlb.new_epochs();
                self.refresh_jump_key();
            }
        }
    }

    /// A page of linear addresses may be another in all contexts.
    pub(crate) fn direct_page_gone(&mut self, linear: u64) {
        if let Some(direct) = &mut self.direct {
            direct.spaces.iter_mut().for_each(|space| space.may_have_changed(linear >> 12));
        }
    }

    /// All that is known of a context, or of all, may be wrong.
    pub(crate) fn direct_context_gone(&mut self, pcid: Option<u16>) {
        if let Some(direct) = &mut self.direct {
            direct
                .spaces
                .iter_mut()
                .filter(|s| pcid.is_none_or(|p| p == s.pcid))
                .for_each(|s| s.stale = true);
        }
    }
}
