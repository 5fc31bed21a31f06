//! Break- and watchpoints: the debug registers' and a debugger's (Intel SDM vol. 3, chapter "Debug, Branch
//! Profile, …", debug registers).
//!
//! ```text
//!   DR0–DR3, DR7, CR4.DE ──┐                     ┌─> Execute: the page's code runs an instruction at a time,
//!                          ├─> Watches::list ────┤     from blocks of its own that are never translated
//!   Cpu::set_debugger ─────┘   (linear ranges)   ├─> Write, Access: the page is kept out of the TLB, so that each
//!                                                │     access to it takes the slow way, which asks
//!                                                └─> Port: `in` and `out` ask
//! ```
//!
//! So a list that is empty costs nothing, and one that is not costs on the pages that it names. What changes the
//! list calls [`Cpu::refresh_watches`], which forgets all that was remembered about pages.
//!
//! What happens at a hit depends on whose the watch is ([`Owner`]):
//!
//! - a *register's*: `#DB` as the manual says, an instruction breakpoint before its instruction (unless RFLAGS.RF),
//!   the others after theirs;
//! - a *debugger's*: [`Cpu::run`] returns [`terem_cpu::Stop::Debug`]. A breakpoint's instruction has not been executed
//!   then, that of a watchpoint has.
//!
//! A debugger's single step is [`Cpu::set_debugger`] with `step`: `run` returns after one instruction, or before the
//! first one of an exception's handler. Interrupts wait meanwhile: a program is not stepped through if each step ends
//! in the handler of the timer's interrupt, which is due whenever a person looks at the screen.

use terem_cpu::{CpuError, DebugControl, DebugEvent, Stop, Watchpoint, rflags};

use crate::cpu::{Cpu, cr4};
use crate::event::Shutdown;
use crate::fault::{Exec, Fault, Kind, vector};
use crate::mmu::PAGE_MASK;
use crate::op::Op;

/// Bits of DR6.
pub(crate) mod dr6 {
    /// What breakpoint conditions were met.
    pub(crate) const BREAKPOINTS: u64 = 15;
    /// General detect: a debug register was touched under DR7.GD.
    pub(crate) const BD: u64 = 1 << 13;
    /// Single step.
    pub(crate) const BS: u64 = 1 << 14;
    /// Task switch to a TSS with its T bit set.
    pub(crate) const BT: u64 = 1 << 15;
    /// Indices into [`Cpu::debug`](crate::cpu::Cpu::debug) of DR6 and DR7.
    pub(crate) const INDEX: usize = 4;
}

/// Bits of DR7, which is [`Cpu::debug`](crate::cpu::Cpu::debug)`[5]`.
pub(crate) mod dr7 {
    /// L0–L3 and LE: what a task switch clears.
    pub(crate) const LOCAL: u64 = 0x155;
    /// General detect.
    pub(crate) const GD: u64 = 1 << 13;
    pub(crate) const INDEX: usize = 5;
}

/// IA32_DEBUGCTL.BTF: single steps are from branch to branch.
pub(crate) const BTF: u64 = 1 << 1;

/// What is watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WatchKind {
    /// The instruction that begins there.
    Execute,
    /// Writes to any of the bytes.
    Write,
    /// Reads of and writes to any of the bytes.
    Access,
    /// Reads of any of the bytes. Debug registers have no such.
    Read,
    /// `in` and `out` of any of the ports.
    Port,
}

/// Whose a watch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Debug register 0–3.
    Register(u8),
    /// The debugger outside.
    Debugger,
}

/// A range of linear addresses (or ports) to be told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Watch {
    /// Linear address (port number) of the first byte.
    pub(crate) at: u64,
    /// Bytes, 1 or more; of no account for [`WatchKind::Execute`].
    pub(crate) len: u64,
    pub(crate) kind: WatchKind,
    pub(crate) owner: Owner,
}

impl Watch {
    fn is_data(&self) -> bool {
        matches!(self.kind, WatchKind::Write | WatchKind::Access | WatchKind::Read)
    }

    /// What a debugger is told of a hit.
    fn event(&self) -> DebugEvent {
        let kind = match self.kind {
            WatchKind::Execute | WatchKind::Port => return DebugEvent::Breakpoint(self.at),
            WatchKind::Write => terem_cpu::WatchKind::Write,
            WatchKind::Access => terem_cpu::WatchKind::Access,
            WatchKind::Read => terem_cpu::WatchKind::Read,
        };
        DebugEvent::Watchpoint(Watchpoint { address: self.at, length: self.len as u8, kind })
    }

    fn touches(&self, at: u64, len: u64) -> bool {
        at < self.at.saturating_add(self.len) && self.at < at.saturating_add(len)
    }
}

/// All watches of a vCPU, and what of them was hit.
#[derive(Debug, Default)]
pub(crate) struct Watches {
    list: Vec<Watch>,
    /// Whether there are any of these kinds.
    executes: bool,
    data: bool,
    ports: bool,
    /// The debugger wants to be told after the next instruction.
    step: bool,
    /// DR6 bits of what the instruction that runs has hit.
    hits: u64,
    /// A debugger's watch that it has hit.
    hit: Option<Watch>,
    /// Whether either is set.
    pending: bool,
    /// It is a repeated string instruction that is not through.
    repeats: bool,
    /// For the debugger, once the vCPU has come to rest.
    stop: Option<DebugEvent>,
    /// Linear address of the debugger's breakpoint that `run` begins on.
    passing: Option<u64>,
}

impl Watches {
    /// Whether there are any, or a debugger steps.
    pub(crate) fn any(&self) -> bool {
        !self.list.is_empty() || self.step
    }

    /// Whether code on the page of `linear` runs an instruction at a time.
    pub(crate) fn execute_on(&self, linear: u64) -> bool {
        let same_page = |w: &Watch| w.kind == WatchKind::Execute && w.at & PAGE_MASK == linear & PAGE_MASK;
        self.executes && self.list.iter().any(same_page)
    }

    /// Whether data on the page of `linear` is kept out of the TLB.
    pub(crate) fn data_on(&self, linear: u64) -> bool {
        self.data && self.list.iter().any(|w| w.is_data() && w.touches(linear & PAGE_MASK, 0x1000))
    }

    /// Whether any data is watched.
    #[inline(always)]
    pub(crate) fn data(&self) -> bool {
        self.data
    }

    /// Whether the instruction that runs has hit something.
    #[inline(always)]
    pub(crate) fn pending(&self) -> bool {
        self.pending
    }

    /// Whether the debugger waits for the next instruction's end.
    pub(crate) fn stepping(&self) -> bool {
        self.step
    }

    /// Whether the vCPU is to come to rest.
    pub(crate) fn stopped(&self) -> bool {
        self.stop.is_some()
    }

    fn note(&mut self, at: u64, len: u64, kinds: &[WatchKind]) {
        for w in &self.list {
            if kinds.contains(&w.kind) && w.touches(at, len) {
                match w.owner {
                    Owner::Register(n) => self.hits |= 1 << n,
                    Owner::Debugger => self.hit = Some(*w),
                }
                self.pending = true;
            }
        }
    }

    fn forget_hits(&mut self) {
        (self.hits, self.hit, self.pending) = (0, None, false);
    }
}

/// The watches that DR0–DR3 and DR7 ask for; `ports`: CR4.DE.
fn of_registers(debug: &[u64; 6], ports: bool) -> impl Iterator<Item = Watch> {
    let dr7 = debug[dr7::INDEX];
    (0..4_u8).filter_map(move |n| {
        let enabled = dr7 >> (2 * n) & 3 != 0;
        let control = dr7 >> (16 + 4 * n);
        // LEN: 1, 2, 8 and 4 bytes; the address is taken as aligned to it.
        let len = [1, 2, 8, 4][(control >> 2 & 3) as usize];
        let kind = match control & 3 {
            0 => WatchKind::Execute,
            1 => WatchKind::Write,
            2 if ports => WatchKind::Port,
            2 => return None,
            _ => WatchKind::Access,
        };
        let at = debug[usize::from(n)];
        let at = if kind == WatchKind::Execute { at } else { at & !(len - 1) };
        enabled.then_some(Watch { at, len, kind, owner: Owner::Register(n) })
    })
}

impl Cpu {
    /// Takes the debug registers' watches anew, to be called when DR0–DR3, DR7 or CR4.DE changed.
    pub(crate) fn refresh_watches(&mut self) {
        let mut list: Vec<Watch> = of_registers(&self.debug, self.cr4 & cr4::DE != 0).collect();
        list.extend(self.watches.list.iter().filter(|w| w.owner == Owner::Debugger));
        self.set_watches(list);
    }

    /// What the debugger wants: its break- and watchpoints in place of those before, and whether to stop after one
    /// instruction. Not while the vCPU runs.
    ///
    /// # Errors
    /// A watchpoint is empty, or longer than [`Watchpoint::LONGEST`].
    pub(crate) fn set_debugger(&mut self, wanted: &DebugControl) -> Result<(), CpuError> {
        let DebugControl { breakpoints, watchpoints, step, pass } = wanted;
        if watchpoints.iter().any(|w| !(1..=Watchpoint::LONGEST).contains(&w.length)) {
            let reason = format!("a watchpoint has 1 to {} bytes", Watchpoint::LONGEST);
            return Err(CpuError::Unsupported { accelerator: "the software CPU", reason });
        }
        let owner = Owner::Debugger;
        let mut list: Vec<Watch> = of_registers(&self.debug, self.cr4 & cr4::DE != 0).collect();
        list.extend(breakpoints.iter().map(|&at| Watch { at, len: 1, kind: WatchKind::Execute, owner }));
        list.extend(watchpoints.iter().map(|w| {
            let kind = match w.kind {
                terem_cpu::WatchKind::Read => WatchKind::Read,
                terem_cpu::WatchKind::Write => WatchKind::Write,
                terem_cpu::WatchKind::Access => WatchKind::Access,
            };
            Watch { at: w.address, len: u64::from(w.length), kind, owner }
        }));
        self.watches.step = *step;
        self.watches.stop = None;
        self.watches.passing = pass.then(|| self.linear_rip());
        self.set_watches(list);
        self.refresh_mode();
        // The last step may have held back interrupts.
        self.apic.look_again();
        Ok(())
    }

    /// What [`Cpu::run`] comes back with when the vCPU has come to rest for the debugger.
    pub(crate) fn debug_stop(&mut self) -> Stop {
        self.watches.stop.take().map_or(Stop::Kicked, Stop::Debug)
    }

    /// The debugger's step is over without an instruction's having been executed: an event came in its place.
    pub(crate) fn step_ended(&mut self) {
        if self.watches.step {
            self.watches.stop.get_or_insert(DebugEvent::Step);
            self.apic.look_again();
        }
    }

    fn linear_rip(&self) -> u64 {
        self.wrap(self.segment_base[terem_cpu::VcpuState::CS].wrapping_add(self.rip))
    }

    fn set_watches(&mut self, list: Vec<Watch>) {
        if list == self.watches.list {
            return;
        }
        let has = |f: fn(&Watch) -> bool| list.iter().any(f);
        self.watches.executes = has(|w| w.kind == WatchKind::Execute);
        self.watches.data = has(Watch::is_data);
        self.watches.ports = has(|w| w.kind == WatchKind::Port);
        self.watches.list = list;
        self.blocks.forget_places();
        self.flush_tlb();
    }

    /// An access to data on a watched page.
    pub(crate) fn data_accessed(&mut self, linear: u64, len: u64, write: bool) {
        const WRITES: &[WatchKind] = &[WatchKind::Write, WatchKind::Access];
        const READS: &[WatchKind] = &[WatchKind::Read, WatchKind::Access];
        self.watches.note(linear, len, if write { WRITES } else { READS });
        if self.watches.pending {
            self.end_block();
        }
    }

    /// An access to ports.
    #[inline]
    pub(crate) fn ports_accessed(&mut self, port: u16, len: u16) {
        if self.watches.ports {
            self.watches.note(u64::from(port), u64::from(len), &[WatchKind::Port]);
            self.end_block();
        }
    }

    /// Lets the block that runs end after the present instruction.
    fn end_block(&mut self) {
        self.op_end = std::ptr::null();
    }

    /// Before an instruction on a page with breakpoints: `#DB`, or a stop for the debugger, if there is one here.
    pub(crate) fn check_breakpoints(&mut self, linear: u64) -> Exec {
        let resumed = self.system_flags & rflags::RF != 0;
        self.system_flags &= !rflags::RF;
        let passing = self.watches.passing.take() == Some(linear);
        if self.in_stack_shadow() {
            return Ok(());
        }
        let mut hits = 0;
        for w in self.watches.list.iter().filter(|w| w.kind == WatchKind::Execute && w.at == linear) {
            match w.owner {
                Owner::Debugger if !passing => {
                    self.watches.stop = Some(w.event());
                    // Whatever is told instead of running has no effect: the loop looks at `stop` first.
                    return Err(Fault::UD);
                }
                Owner::Register(n) if !resumed => hits |= 1 << n,
                _ => {}
            }
        }
        if hits == 0 {
            return Ok(());
        }
        self.debug[dr6::INDEX] = self.debug[dr6::INDEX] & !dr6::BREAKPOINTS | hits;
        // The flags are pushed as they are: RF is the handler's to set.
        Err(Fault { kind: Kind::Trap, vector: vector::DB, has_code: false, code: 0 })
    }

    /// RF counts for one instruction: where no breakpoint looks at it, it need not be kept.
    pub(crate) fn settle_resume_flag(&mut self) {
        if self.system_flags & rflags::RF != 0 {
            let linear = self.segment_base[terem_cpu::VcpuState::CS].wrapping_add(self.rip);
            if !self.watches.execute_on(self.wrap(linear)) {
                self.system_flags &= !rflags::RF;
            }
        }
    }

    /// A string instruction goes on later: its breakpoint has been passed.
    pub(crate) fn resume_string(&mut self) {
        self.watches.repeats = self.watches.pending || self.mode.single;
        if self.watches.executes {
            self.watches.passing = Some(self.linear_rip());
            self.system_flags |= rflags::RF;
            self.settle_resume_flag();
        }
    }

    /// Whether the last instruction loaded SS: then no debug exception comes before the next is done.
    fn in_stack_shadow(&self) -> bool {
        self.interrupt_shadow && self.shadow_of_stack
    }

    /// An instruction has faulted: what it hit before was for nothing.
    pub(crate) fn discard_hits(&mut self) {
        if self.watches.pending {
            self.watches.forget_hits();
        }
    }

    /// After an instruction that hit something or ran alone (`stepping`: with which RFLAGS it began): traps, and stops.
    #[cold]
    pub(crate) fn trapped(&mut self, op: &Op, stepping: Option<u64>) -> Result<(), Shutdown> {
        let over = std::mem::take(&mut self.steps_over);
        let repeats = std::mem::take(&mut self.watches.repeats);
        if self.in_stack_shadow() {
            return Ok(());
        }
        let branched = self.rip != self.wrap_rip(self.next_rip(op));
        let steps = stepping.is_some_and(|flags| flags & rflags::TF != 0)
            && !over
            && (self.msrs.debugctl & BTF == 0 || branched);
        let mut conditions = self.watches.hits;
        if steps {
            conditions |= dr6::BS;
        }
        if let Some(w) = self.watches.hit {
            self.watches.stop = Some(w.event());
        } else if stepping.is_some() && self.watches.step {
            self.watches.stop = Some(DebugEvent::Step);
        }
        if self.watches.stop.is_some() {
            self.apic.look_again();
        }
        self.watches.forget_hits();
        if conditions == 0 {
            return Ok(());
        }
        if repeats {
            self.system_flags |= rflags::RF;
        }
        let own = self.wrap_rip(self.op_rip(op));
        self.debug_trap(conditions, own)
    }

    /// `#DB` after an instruction, for these conditions (bits of DR6).
    pub(crate) fn debug_trap(&mut self, conditions: u64, own: u64) -> Result<(), Shutdown> {
        if conditions & dr6::BREAKPOINTS != 0 {
            self.debug[dr6::INDEX] &= !dr6::BREAKPOINTS;
        }
        self.debug[dr6::INDEX] |= conditions;
        let next = self.rip;
        self.raise(Fault { kind: Kind::Trap, vector: vector::DB, has_code: false, code: 0 }, own, next)
    }

    /// What delivering `#DB` does to the debug registers: the handler may use them.
    pub(crate) fn debug_exception_taken(&mut self) {
        self.debug[dr7::INDEX] &= !dr7::GD;
        self.msrs.debugctl &= !BTF;
        self.watches.forget_hits();
    }

    /// `#DB` for `mov` to or from a debug register under DR7.GD.
    pub(crate) fn debug_registers_guarded(&mut self) -> Exec {
        if self.debug[dr7::INDEX] & dr7::GD == 0 {
            return Ok(());
        }
        self.debug[dr6::INDEX] |= dr6::BD;
        Err(Fault::new(vector::DB))
    }
}
