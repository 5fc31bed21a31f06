//! What translated code calls, and how the vCPU goes from translation to translation.

use std::sync::atomic::Ordering;

use super::analyse::{Item, analyse};
use super::emit::Emitter;
use super::flow::jump_index;
use super::{Call, CrossLink, HOT, JumpEntry, Link, NO_LINK, SET_SHIFT, Site, Translator};
use crate::block::Block;
use crate::cpu::Cpu;
use crate::decode::CodeSize;
use crate::event::Shutdown;
use crate::mmu::{Access, NOWHERE, PAGE_MASK, Tlb};
use crate::op::IP_REG;

/// To translated code: go on (for an access: the page is known now).
const GO_ON: u64 = 0;
/// To translated code: leave; [`Cpu::rip`] says where to go on.
pub(super) const LEAVE: u64 = 2;
/// To translated code: go on in the translation at [`Cpu::rip`], if there is one.
const ELSEWHERE: u64 = 3;

/// The vCPU is an argument so that the compiler knows that it changes; translated code has its address.
type Enter = extern "sysv64" fn(cpu: *mut Cpu, code: u64) -> u64;

/// What [`slow`] gets for the page of the stack.
pub(super) const STACK: u64 = 1;

/// A memory access to a page that the TLB does not have, or not in the way that it takes: has translated code know the page,
/// or the interpreter go on. `table`: [`STACK`], or something else.
pub(super) extern "sysv64" fn slow(cpu: *mut Cpu, table: u64, linear: u64, site: *const Site) -> u64 {
    // SAFETY: translated code passes its own vCPU, which nobody else uses while it runs, and one of its sites, which
    // live as long as the code.
    let (cpu, site) = unsafe { (&mut *cpu, &*site) };
    let on_page = linear & !PAGE_MASK <= u64::from(site.limit);
    let canonical = (linear as i64) << 16 >> 16 == linear as i64;
    let aligned = linear & u64::from(site.mask) == 0;
    if !(on_page && canonical && aligned) {
        return cpu.by_interpreter(site);
    }
    let writes = site.flags & Site::WRITES != 0;
    let access = if writes { Access::Write } else { Access::Read };
    if let Err(fault) = cpu.translate(linear, access) {
        if site.flags & Site::SEVERAL != 0 {
            // Which of them faults, and how?
            return cpu.by_interpreter(site);
        }
        let next = cpu.end_of(site);
        let result = cpu.faulted_at(fault, next.wrapping_sub(u64::from(site.len)), next);
        return cpu.leave(&result);
    }
    // It is not in the TLB if it is not RAM.
    let (entry, tag) = (cpu.tlb.entry(linear), cpu.tlb.tag(linear));
    let stack = table == STACK;
    let write = writes || stack;
    let known = if write { entry.write } else { entry.read } == tag;
    // SAFETY: a page in the TLB has a mark.
    if !known || (write && unsafe { (*entry.mark).load(Ordering::Relaxed) } & terem_memory::CODE != 0) {
        return cpu.by_interpreter(site);
    }
    if stack {
        cpu.tlb.put_stack(linear);
    } else {
        cpu.tlb.put_quick(linear, write);
    }
    GO_ON
}

/// Executes an instruction by its handler.
pub(super) extern "sysv64" fn handler(cpu: *mut Cpu, call: *const Call) -> u64 {
    // SAFETY: as in `slow`.
    let (cpu, call) = unsafe { (&mut *cpu, &*call) };
    cpu.by_handler(call)
}

/// Before the first vector instruction of a translation, with the XMM registers in memory.
pub(super) extern "sysv64" fn vectors(cpu: *mut Cpu, site: *const Site) -> u64 {
    // SAFETY: as in `slow`.
    let (cpu, site) = unsafe { (&mut *cpu, &*site) };
    if cpu.runs_directly() {
        return GO_ON;
    }
    // A rounding mode or unmasked exceptions that the host's MXCSR must not have.
    cpu.by_interpreter(site)
}

/// A store has hit a page that holds code; `mark` is the page's.
pub(super) extern "sysv64" fn marked(cpu: *mut Cpu, mark: u64, site: *const Site) -> u64 {
    // SAFETY: as in `slow`.
    let (cpu, site) = unsafe { (&mut *cpu, &*site) };
    cpu.code_written((mark - cpu.marks as u64) / 4);
    if site.flags & Site::FLOW != 0 {
        cpu.apic.look_again();
        return GO_ON;
    }
    cpu.rip = cpu.end_of(site);
    LEAVE
}

impl Cpu {
    /// What to tell translated code when it is to go on at [`Cpu::rip`].
    fn elsewhere(&self) -> u64 {
        let direct = self.runs_directly_here && self.cpl == 3;
        let here = self.native.interpret || self.interrupt_shadow || direct || self.apic.wants_attention();
        if here { LEAVE } else { ELSEWHERE }
    }

    fn leave(&mut self, result: &Result<(), Shutdown>) -> u64 {
        if result.is_err() {
            self.shut_down = true;
            return LEAVE;
        }
        self.elsewhere()
    }

    /// Where the next instruction is.
    fn end_of(&self, site: &Site) -> u64 {
        self.gpr[usize::from(IP_REG)].wrapping_add(u64::from(site.next))
    }

    /// Leaves for the interpreter, which executes the instruction and what follows it.
    fn by_interpreter(&mut self, site: &Site) -> u64 {
        self.rip = self.end_of(site).wrapping_sub(u64::from(site.len));
        self.native.interpret = true;
        self.interrupt_shadow = site.flags & Site::SHADOW != 0;
        LEAVE
    }

    /// Executes an instruction by its handler.
    fn by_handler(&mut self, call: &Call) -> u64 {
        let op = &call.op;
        let (next, key) = (self.next_rip(op), self.native.jump_key);
        self.trace_handler(op);
        self.rip = next;
        self.op_end = op;
        if let Err(fault) = (op.run)(self, op) {
            let fault = self.faulted(fault, op);
            return self.leave(&fault);
        }
        if self.watches.pending() {
            let trap = self.trapped(op, None);
            return self.leave(&trap);
        }
        let stays = self.rip == next
            && !call.flow
            && self.native.jump_key == key
            && !self.op_end.is_null()
            && !self.interrupt_shadow
            && !self.apic.wants_attention()
            && (self.mxcsr_on_host || !self.native.vectors_were_loaded);
        if stays { GO_ON } else { self.elsewhere() }
    }

    /// Epoch and mode, as jumps are remembered under.
    pub(crate) fn refresh_jump_key(&mut self) {
        self.native.jump_key = self.tlb.epoch() << (SET_SHIFT + 3)
            | u64::from(self.tlb.strict()) << (SET_SHIFT + 2)
            | (self.tlb.set() as u64) << SET_SHIFT
            | u64::from(self.mode_key);
    }

    /// Whether blocks are to be translated at all as things are.
    pub(crate) fn translates(&self) -> bool {
        self.mode.code == CodeSize::Code64
            && !self.mode.single
            && matches!(self.cpl, 0 | 3)
            && !self.tlb.strict()
            && !self.interrupt_shadow
            && self.native.translator.is_some()
            && !self.traces_instructions()
    }

    /// Forgets where code lies if some of it was written over.
    #[inline]
    pub(crate) fn follow_changes(&mut self) {
        let changes = self.memory.marks().changes();
        if changes != self.native.changes {
            self.native.changes = changes;
            self.tlb.new_epochs();
            self.refresh_jump_key();
        }
    }

    /// The translation of a block at [`Cpu::rip`], made if it has run often enough.
    pub(crate) fn translation(&mut self, block: &Block) -> Option<u64> {
        let code = block.code[self.tlb.set()].get();
        if code != 0 {
            return (code != u64::MAX).then_some(code);
        }
        let runs = block.runs.get() + 1;
        block.runs.set(runs);
        (runs >= HOT).then(|| self.translate_block(block)).flatten()
    }

    #[cold]
    #[inline(never)]
    fn translate_block(&mut self, block: &Block) -> Option<u64> {
        let mut translator = self.native.translator.take()?;
        if translator.is_full() {
            tracing::debug!(
                translations = self.stats.blocks_translated.get(),
                code = translator.memory.code_used(),
                links = translator.links.len(),
                cross = translator.cross_links,
                "translations are dropped"
            );
            translator.clear();
            self.stats.code_flushes.add(1);
            self.blocks.drop_translations();
            self.native.jumps.fill(JumpEntry::NONE);
            self.tlb.new_epochs();
            self.refresh_jump_key();
            self.native.link = NO_LINK;
        }
        let code = translator.translate(self, block);
        self.stats.blocks_translated.add(u64::from(code.is_some()));
        self.stats.code_bytes.set(translator.code_bytes());
        self.native.translator = Some(translator);
        block.code[self.tlb.set()].set(code.unwrap_or(u64::MAX));
        if code.is_some() {
            self.blocks.translated(block);
        }
        code
    }

    /// Runs translated code from [`Cpu::rip`] on.
    pub(crate) fn run_translated(&mut self, block: &Block, code: u64) {
        let Some(translator) = &mut self.native.translator else { return };
        let page = self.rip & PAGE_MASK;
        let (physical, mark) = block.page();
        self.tlb.put_place(page, physical, mark);
        // What begins here may go on elsewhere.
        let place = if block.straddles() { NOWHERE } else { Tlb::code_of(physical, mark) };
        if self.native.link == NO_LINK {
            self.native.jumps[jump_index(self.rip)] =
                JumpEntry { linear: self.rip, key: self.native.jump_key, target: code, code: place };
        } else {
            let source = self.gpr[usize::from(IP_REG)];
            let cross = CrossLink { page: source, key: self.native.jump_key, code: place };
            translator.connect(self.native.link, cross, block, code);
        }
        self.gpr[usize::from(IP_REG)] = page;
        // SAFETY: the address is the entry stub's, which has this signature.
        let enter: Enter = unsafe { std::mem::transmute(translator.stubs.enter as *const ()) };
        let link = enter(self, code) as u32;
        self.native.link = link;
        if link != NO_LINK
            && let Some(translator) = &self.native.translator
        {
            let offset = i64::from(translator.links[link as usize].offset);
            self.rip = self.gpr[usize::from(IP_REG)].wrapping_add_signed(offset);
        }
    }
}

impl Translator {
    /// Bytes of host code that are kept.
    pub(crate) fn code_bytes(&self) -> u64 {
        self.memory.code_used() as u64
    }

    /// Bytes of host code that can be kept.
    pub(crate) fn code_capacity(&self) -> u64 {
        self.memory.code_size() as u64
    }

    fn is_full(&self) -> bool {
        // A translation takes less than this of each.
        self.memory.is_nearly_full()
            || (self.cross_links as usize + 256) * size_of::<CrossLink>() > self.memory.links_size()
    }

    /// Lets a link lead to a translation.
    fn connect(&mut self, link: u32, good_for: CrossLink, block: &Block, code: u64) {
        let Link { at, cross, .. } = self.links[link as usize];
        match cross {
            Some(cross) => {
                let data = self.memory.links().cast::<CrossLink>();
                // SAFETY: the data has room for all links, aligned; only this vCPU's thread uses it.
                unsafe { data.add(cross as usize).write(good_for) };
            }
            // A block on two pages is good only as long as the second one is where it was.
            None if block.straddles() => return,
            None => {}
        }
        self.memory.patch(at, code);
    }

    fn translate(&mut self, cpu: &mut Cpu, block: &Block) -> Option<u64> {
        let start = (cpu.rip & !PAGE_MASK) as u16;
        let mut bytes = [0; 0x1000 + 16];
        let len = cpu.bytes_of(block, start, &mut bytes)?;
        let bytes = &bytes[..len];
        let straddles = block.straddles();
        let (items, cut) = analyse(bytes, start, cpu.mode, &cpu.instruction_set, straddles);
        if items.is_empty() {
            return None;
        }
        let stubs = self.stubs;
        let mut emitter = Emitter::new(&stubs, &mut self.encoder, bytes, start, cpu.tlb.set(), self.state);
        emitter.asm.base = self.memory.next();
        emitter.first_site = self.memory.next_sites() as u64;
        emitter.first_call = self.memory.next_calls() as u64;
        emitter.alone = self.alone;
        emitter.cold_base = self.memory.next_cold();
        emitter.first_link = self.links.len() as u32;
        emitter.first_cross = self.cross_links;
        emitter.cross_data = self.memory.links() as u64;
        emitter.run(&items, cut);
        let Emitter { asm, sites, calls, links, crosses, .. } = emitter;
        let (hot, cold) = asm.code.split_at(asm.cold.map_or(asm.code.len(), |c| c.0));
        if !self.memory.add(hot, cold) || !self.add_data(sites, calls) {
            return None;
        }
        for i in 0..crosses {
            let data = self.memory.links().cast::<CrossLink>();
            // SAFETY: as in `connect`.
            unsafe { data.add((self.cross_links + i) as usize).write(CrossLink::NONE) };
        }
        self.cross_links += crosses;
        let base = asm.base;
        tracing::trace!(
            "translation of {:#x} at {base:#x}: guest {} host {}",
            cpu.rip,
            hex(&bytes[..usize::from(items.last().map_or(start, Item::next) - start).min(bytes.len())]),
            hex(&asm.code)
        );
        self.links.extend(links.iter().map(|l| Link {
            at: asm.address(l.at),
            offset: l.offset,
            cross: l.cross,
        }));
        Some(base)
    }

    /// Puts sites and calls where the code of the translation expects them.
    fn add_data(&mut self, sites: Vec<Site>, calls: Vec<Call>) -> bool {
        let (site, call) = (self.memory.next_sites().cast::<Site>(), self.memory.next_calls().cast::<Call>());
        if !self.memory.take(sites.len() * size_of::<Site>(), calls.len() * size_of::<Call>()) {
            return false;
        }
        // SAFETY: the ranges have just been taken, are aligned to 8, and only this vCPU's thread uses them.
        unsafe {
            sites.into_iter().enumerate().for_each(|(i, of)| site.add(i).write(of));
            calls.into_iter().enumerate().for_each(|(i, of)| call.add(i).write(of));
        }
        true
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |s, b| s + &format!("{b:02x}"))
}
