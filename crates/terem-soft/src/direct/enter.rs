//! Going into a process, and what it comes back with.

use std::io;

use terem_cpu::{Segment, VcpuState, rflags};

use super::child::{Child, Why};
use super::patches::Patches;
use super::pin::Pin;
use super::space::{Space, Use};
use super::stub::USER_END;
use super::{Direct, ROOT, SPACES, pin};
use crate::cpu::{Cpu, cr0, cr4, efer};
use crate::decode::CodeSize;
use crate::x87::SHARED_SIZE;

/// Selectors of user mode on Linux, guest and host: only these can be the same in both.
const CODE: u64 = 0x33;
const DATA: u64 = 0x2b;
/// What a program may have in RFLAGS for a run.
const FLAGS: u64 = rflags::ARITHMETIC | rflags::DF | rflags::AC | rflags::TF | rflags::NT;
/// Times that code was met of which nothing is sure, before it is looked at again.
const LOOK_AGAIN: u32 = 256;
/// DR6.BS: a single step.
const STEP: u64 = 1 << 14;
/// The same fault so often in a row is the interpreter's.
const SAME: u32 = 3;

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ran {
    /// It ran.
    Some,
    /// Not this code.
    Not,
    /// This program does not run directly.
    Never,
}

impl Cpu {
    /// Whether user code could run directly as things are.
    pub(super) fn may_run_directly(&self) -> bool {
        self.cpl == 3
            && self.mode.code == CodeSize::Code64
            && !self.mode.single
            && u64::from(self.segments[VcpuState::CS].selector) == CODE
            && u64::from(self.segments[VcpuState::SS].selector) == DATA
            && self.rip < USER_END
            && self.cr0 & (cr0::PG | cr0::WP | cr0::TS | cr0::EM) == cr0::PG | cr0::WP
            && self.cr4 & cr4::OSFXSR != 0
            && self.msrs.efer & (efer::LMA | efer::NXE | efer::SCE) == efer::LMA | efer::NXE | efer::SCE
            && self.pkru & 3 == 0
            && self.rflags() & (rflags::IF | rflags::IOPL | rflags::TF | rflags::NT) == rflags::IF
            && !(self.rflags() & rflags::AC != 0 && self.cr0 & cr0::AM != 0)
            && !self.interrupt_shadow
            && self.deferred.is_none()
            && !self.watches.any()
            && self.tracing.is_none()
            && self.user_data_segments().is_some()
            && [VcpuState::FS, VcpuState::GS].iter().all(|&i| self.segments[i].base < USER_END)
    }

    /// DS, ES, FS and GS, if the host has the same.
    fn user_data_segments(&self) -> Option<[u64; 4]> {
        let of = |i: usize| {
            let selector = u64::from(self.segments[i].selector);
            is_selector(selector).then_some(selector)
        };
        Some([of(VcpuState::DS)?, of(VcpuState::ES)?, of(VcpuState::FS)?, of(VcpuState::GS)?])
    }

    /// Runs the present program directly if it is one that does; true if it ran.
    #[cold]
    #[inline(never)]
    pub(crate) fn run_program(&mut self) -> bool {
        if !self.may_run_directly() {
            return false;
        }
        let Some(mut direct) = self.direct.take() else { return false };
        let root = self.cr3 & ROOT;
        let ran = match self.space_for(&mut direct, root) {
            Some(at) => self.run_space(&mut direct, at),
            None => Ok(Ran::Never),
        };
        let ran = ran.unwrap_or_else(|e| {
            tracing::debug!("a program is no longer run directly: {e}");
            Ran::Never
        });
        if ran == Ran::Never {
            direct.policy.move_back(root, self.bus.clock.now());
        }
        self.drop_spaces(&mut direct, |space| space.broken);
        self.direct = Some(direct);
        self.refresh_direct();
        // What has ended goes on nowhere.
        ran == Ran::Some || self.shut_down
    }

    /// The space of a CR3, made if there is none yet.
    fn space_for(&mut self, direct: &mut Direct, root: u64) -> Option<usize> {
        let thread = std::thread::current().id();
        if direct.thread.replace(thread) != Some(thread) {
            // Only the thread that made them can use them.
            self.drop_spaces(direct, |_| true);
            direct.pin = Pin::default();
        }
        direct.runs += 1;
        let pcid = self.pcid();
        if let Some(at) = direct.spaces.iter().position(|s| s.root == root && s.pcid == pcid) {
            direct.spaces[at].used = direct.runs;
            return Some(at);
        }
        let mut space = match self.used_space(direct) {
            Some(space) => space,
            None => self.new_space(direct)?,
        };
        (space.root, space.pcid, space.used) = (root, pcid, direct.runs);
        space.changes = self.memory.marks().changes();
        direct.spaces.push(space);
        Some(direct.spaces.len() - 1)
    }

    /// The space that was not used for longest, emptied, if there are many.
    fn used_space(&self, direct: &mut Direct) -> Option<Space> {
        if direct.spaces.len() < SPACES {
            return None;
        }
        let oldest = (0..direct.spaces.len()).min_by_key(|&i| direct.spaces[i].used)?;
        let mut space = direct.spaces.swap_remove(oldest);
        if space.empty(&direct.shared).is_err() {
            self.end_space(direct, &mut space);
            return None;
        }
        Some(space)
    }

    fn new_space(&self, direct: &mut Direct) -> Option<Space> {
        if direct.shared.is_refused() {
            return None;
        }
        let image = direct.shared.image()?;
        let made = direct.patches.file().and_then(|copies| Child::new(image, self.memory.memfd(), copies));
        made.map(Space::new).inspect_err(|e| direct.shared.refuse(e)).ok()
    }

    fn end_space(&self, direct: &Direct, space: &mut Space) {
        space.forget(&direct.shared);
        // Whoever has read the process's number to stop it has done so after this.
        self.apic.forget_process();
    }

    fn drop_spaces(&self, direct: &mut Direct, which: impl Fn(&Space) -> bool) {
        while let Some(at) = direct.spaces.iter().position(&which) {
            let mut space = direct.spaces.swap_remove(at);
            self.end_space(direct, &mut space);
        }
    }

    fn run_space(&mut self, direct: &mut Direct, at: usize) -> io::Result<Ran> {
        if !self.catch_up(direct, at)? {
            return Ok(Ran::Not);
        }
        if self.stub_is_in_the_way() {
            return Ok(Ran::Never);
        }
        let Direct { shared, spaces, pin, patches, .. } = direct;
        let space = &mut spaces[at];
        // What would stop it at once.
        for address in [self.rip, self.cr2] {
            if address < USER_END
                && !space.pages.contains_key(&(address >> 12))
                && self.peek_user(address).is_some()
            {
                let rip = self.rip;
                self.touched(shared, patches, space, address, rip)?;
            }
        }
        match space.pages.get(&(self.rip >> 12)).map(|p| p.usage) {
            Some(Use::Execute(_) | Use::Copy(..)) => {}
            // Code that must not run: translated as any other; what it goes on to on other pages comes by here again.
            Some(Use::Kept(_)) => {
                space.kept += 1;
                if space.kept.is_multiple_of(LOOK_AGAIN) {
                    // Its neighbours may be known by now.
                    let page = self.rip >> 12;
                    space.pages.get(&page).iter().for_each(|p| patches.forget(p.physical));
                    space.take(shared, &[page])?;
                }
                return Ok(Ran::Not);
            }
            _ => {
                self.native.interpret = true;
                return Ok(Ran::Not);
            }
        }
        let before = self.bus.clock.now();
        if let Some(cpu) = pin.hold(before)
            && space.cpu.replace(cpu) != Some(cpu)
        {
            pin::put(space.child.pid(), cpu);
        }
        self.put_state(&mut space.child)?;
        self.stats.direct_runs.add(1);
        let why = self.run_to_a_stop(direct, at, before).and_then(|why| {
            self.take_state(&mut direct.spaces[at].child, why)?;
            Ok(why)
        });
        let why = why.inspect_err(|e| {
            tracing::error!(
                "vCPU {}: a guest program's process is gone ({e}), and its registers with it",
                self.id
            );
            self.shut_down = true;
        })?;
        if let Why::Trap { step } = why
            && self.trapped_directly(&direct.patches, step).is_err()
        {
            self.shut_down = true;
            return Ok(Ran::Some);
        }
        self.native.interpret = why != Why::Other || !self.apic.wants_attention();
        Ok(Ran::Some)
    }

    /// Runs a program until something stops it that is not mended here, or somebody wants the vCPU. `before`: the time.
    fn run_to_a_stop(&mut self, direct: &mut Direct, at: usize, mut before: u64) -> io::Result<Why> {
        let Direct { shared, inbox, spaces, policy, patches, .. } = direct;
        let space = &mut spaces[at];
        let mut last = (0, 0, 0);
        loop {
            self.apic.begin_direct_run(space.child.pid());
            if self.apic.wants_attention() || inbox.waits() {
                self.apic.end_own_direct_run();
                return Ok(Why::Other);
            }
            let why = space.child.run();
            self.apic.end_own_direct_run();
            let (why, after) = (why?, self.bus.clock.now());
            policy.stopped(space.root, after, after - before);
            let mended = match why {
                Why::Trap { step: false } => self.answers(&mut space.child, patches),
                Why::Fault(address) => {
                    let rip = space.child.registers.rip;
                    let times = if last.0 == rip && last.1 == address { last.2 + 1 } else { 0 };
                    last = (rip, address, times);
                    let pages = space.pages.len();
                    // What fails has marked the space as broken; the program's state is in its process all the same.
                    let mapped = times < SAME
                        && address != 0
                        && goes_on(&space.child.registers)
                        && self.touched(shared, patches, space, address, rip).unwrap_or(false);
                    if mapped {
                        self.stats.direct_pages.add(space.pages.len().saturating_sub(pages) as u64);
                    }
                    mapped
                }
                _ => false,
            };
            if !mended {
                return Ok(why);
            }
            before = self.bus.clock.now();
        }
    }

    fn put_state(&mut self, child: &mut Child) -> io::Result<()> {
        let mut state = [0; SHARED_SIZE];
        self.save_shared(&mut state);
        child.put_extended(&state)?;
        let [ds, es, fs, gs] = self.user_data_segments().unwrap_or_default();
        let g = &self.gpr;
        let r = &mut child.registers;
        [r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi] = std::array::from_fn(|i| g[i]);
        [r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15] = std::array::from_fn(|i| g[i + 8]);
        (r.rip, r.eflags, r.orig_rax) =
            (self.rip, self.rflags() & FLAGS | rflags::IF | rflags::FIXED, u64::MAX);
        (r.cs, r.ss, r.ds, r.es, r.fs, r.gs) = (CODE, DATA, ds, es, fs, gs);
        (r.fs_base, r.gs_base) = (self.segments[VcpuState::FS].base, self.segments[VcpuState::GS].base);
        child.changed = true;
        Ok(())
    }

    fn take_state(&mut self, child: &mut Child, why: Why) -> io::Result<()> {
        let before = *child.extended();
        self.load_shared(child.get_extended()?, &before);
        let r = child.registers;
        self.gpr[..8].copy_from_slice(&[r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi]);
        self.gpr[8..16].copy_from_slice(&[r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15]);
        self.rip = r.rip;
        let kept = self.rflags() & !FLAGS;
        self.set_rflags(kept | r.eflags & FLAGS);
        match why {
            Why::SystemCall => {
                self.gpr[0] = r.orig_rax;
                self.rip = r.rip.wrapping_sub(2);
            }
            Why::OldCall(address) => {
                self.rip = address;
                self.gpr[4] = r.rsp.wrapping_sub(8);
            }
            Why::Trap { .. } | Why::Fault(_) | Why::Other => {}
        }
        self.take_segments(&r);
        Ok(())
    }

    /// Executes the instruction whose breakpoint was hit, if it asks for the time: programs do that often.
    fn answers(&mut self, child: &mut Child, patches: &Patches) -> bool {
        let at = child.registers.rip.wrapping_sub(1);
        let (offset, trapped) = ((at & 0xfff) as u16, child.registers.eflags & rflags::TF != 0);
        if self.cr4 & cr4::TSD != 0 || trapped || offset > 0xffd {
            return false;
        }
        let Some(page) = self.peek_user(at).map(|leaf| leaf.page).filter(|&page| patches.has(page, offset))
        else {
            return false;
        };
        let mut bytes = [0; 3];
        self.page_bytes(page, u64::from(offset), &mut bytes);
        let len = match bytes {
            [0x0f, 0x31, _] => 2,
            [0x0f, 0x01, 0xf9] => 3,
            _ => return false,
        };
        let (tsc, r) = (self.tsc(), &mut child.registers);
        (r.rax, r.rdx, r.rip) = (tsc & 0xffff_ffff, tsc >> 32, at + len);
        if len == 3 {
            r.rcx = self.msrs.tsc_aux & 0xffff_ffff;
        }
        child.changed = true;
        true
    }

    /// After a trap: that of an instruction goes back to it, for the interpreter to execute it; a single step is told.
    fn trapped_directly(&mut self, patches: &Patches, step: bool) -> Result<(), crate::event::Shutdown> {
        if step {
            return self.debug_trap(STEP, self.rip);
        }
        let byte = |before: u64| -> Option<u8> {
            use terem_memory::vm_memory::{Bytes, GuestAddress};
            let at = self.rip.wrapping_sub(before);
            let page = self.peek_user(at)?.page;
            self.memory.read_obj(GuestAddress(page << 12 | at & 0xfff)).ok()
        };
        let at = self.rip.wrapping_sub(1);
        let ours = self.peek_user(at).is_some_and(|leaf| patches.has(leaf.page, (at & 0xfff) as u16));
        self.rip = self.rip.wrapping_sub(match (byte(2), byte(1)) {
            _ if ours => 1,
            (_, Some(0xcc | 0xf1)) => 1, // int3, int1
            (Some(0xcd), Some(3)) => 2,  // int 3
            _ => 0,
        });
        Ok(())
    }

    /// Segment registers that the program has loaded.
    fn take_segments(&mut self, r: &libc::user_regs_struct) {
        let selectors = (self.segments[VcpuState::FS].selector, self.segments[VcpuState::GS].selector);
        for (i, selector) in
            [(VcpuState::DS, r.ds), (VcpuState::ES, r.es), (VcpuState::FS, r.fs), (VcpuState::GS, r.gs)]
        {
            let selector = selector as u16;
            if self.segments[i].selector != selector {
                self.segments[i] = if selector & !3 == 0 {
                    Segment { selector, access: Segment::UNUSABLE, ..Segment::default() }
                } else {
                    let flat = Segment::flat(selector, false, false);
                    Segment { access: flat.access | 3 << 5, ..flat }
                };
            }
        }
        for (i, selector, base) in
            [(VcpuState::FS, selectors.0, r.fs_base), (VcpuState::GS, selectors.1, r.gs_base)]
        {
            // A kernel that has not allowed `wrfsbase` does not expect bases of a program's choice, though a host allows it.
            if self.cr4 & cr4::FSGSBASE != 0 || self.segments[i].selector != selector {
                self.segments[i].base = base;
            }
        }
        if r.cs != CODE {
            let flat = Segment::flat(r.cs as u16, true, false);
            self.segments[VcpuState::CS] = Segment { access: flat.access | 3 << 5, ..flat };
        }
        self.refresh_mode();
    }
}

/// A null selector or that of user data: what a process can be given.
fn is_selector(selector: u64) -> bool {
    matches!(selector, 0 | 3 | DATA)
}

/// Whether a process can be given these registers again, as far as a program can choose them.
fn goes_on(r: &libc::user_regs_struct) -> bool {
    r.cs == CODE
        && r.ss == DATA
        && [r.ds, r.es, r.fs, r.gs].into_iter().all(is_selector)
        && r.fs_base < USER_END
        && r.gs_base < USER_END
        && r.eflags & rflags::TF == 0
}
