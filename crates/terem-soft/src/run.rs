//! The loop: look for what is pending, find a block, execute it.

use terem_cpu::{MpState, Segment, Stop, VcpuState, rflags};

use crate::apic::{Accepts, Next};
use crate::block::Block;
use crate::cpu::{Cpu, cr0};
use crate::event::Shutdown;
use crate::fault::{Fault, Kind, vector};
use crate::op::{IP_REG, Op};
use crate::translate::NO_LINK;

impl Cpu {
    /// Runs until somebody must decide.
    pub(crate) fn run(&mut self) -> Stop {
        loop {
            if self.shut_down {
                return self.shutdown();
            }
            if self.apic.wants_attention() {
                // Whatever comes now is not where the last translation wanted to go.
                self.native.link = NO_LINK;
                if let Some(stop) = self.attend() {
                    return stop;
                }
            }
            self.follow_changes();
            self.blocks.tidy();
            if self.runs_directly_here && self.cpl == 3 && !self.native.interpret && self.run_program() {
                self.native.link = NO_LINK;
                continue;
            }
            let result = match self.find_block() {
                Ok(block) => {
                    // SAFETY: blocks are dropped only by `find_block`, not while one runs.
                    let known = unsafe { &*block };
                    if !std::mem::take(&mut self.native.interpret)
                        && self.translates()
                        && let Some(code) = self.translation(known)
                    {
                        self.run_translated(known, code);
                        continue;
                    }
                    self.native.link = NO_LINK;
                    self.execute(known)
                }
                Err(_) if self.watches.stopped() => return self.debug_stop(),
                Err(fault) => {
                    let rip = self.rip;
                    self.native.link = NO_LINK;
                    self.step_ended();
                    self.raise(fault, rip, rip)
                }
            };
            if let Err(Shutdown) = result {
                self.shut_down = true;
                return self.shutdown();
            }
        }
    }

    fn shutdown(&self) -> Stop {
        Stop::Shutdown
    }

    /// Executes a block to its end or to its first fault.
    #[inline]
    pub(crate) fn execute(&mut self, block: &Block) -> Result<(), Shutdown> {
        if self.tracing.is_some() {
            return self.execute_traced(block);
        }
        self.execute_ops::<false>(block)
    }

    /// The same while somebody is told of it.
    #[cold]
    #[inline(never)]
    fn execute_traced(&mut self, block: &Block) -> Result<(), Shutdown> {
        self.execute_ops::<true>(block)
    }

    #[inline(always)]
    fn execute_ops<const TRACED: bool>(&mut self, block: &Block) -> Result<(), Shutdown> {
        let start = self.rip;
        if block.ops().is_empty()
            && let Err(fault) = self.decode_again(block)
        {
            return self.raise(fault, start, start);
        }
        let ops = block.ops();
        self.gpr[usize::from(IP_REG)] = start;
        self.rip = self.wrap_rip(start.wrapping_add(u64::from(block.len)));
        let mut at = ops.as_ptr();
        // SAFETY: one past the slice's last element.
        let end = unsafe { at.add(ops.len()) };
        let shadow = std::mem::take(&mut self.interrupt_shadow);
        let stepping = self.mode.single.then_some(self.system_flags);
        // What waits for the end of an interrupt shadow comes after one instruction, not after a block: a
        // guest may open its window for interrupts by `sti; nop; cli`.
        // SAFETY: a block has at least one instruction.
        self.op_end = if shadow { unsafe { at.add(1) } } else { end };
        while at < self.op_end {
            // SAFETY: between the slice's first and last element.
            let op = unsafe { &*at };
            if TRACED {
                self.trace_op(block, op);
            }
            if let Err(fault) = (op.run)(self, op) {
                return self.faulted(fault, op);
            }
            // SAFETY: at most one past the last element.
            at = unsafe { at.add(1) };
        }
        // SAFETY: as above; both pointers are into the slice or one past it.
        let done = unsafe { at.offset_from(ops.as_ptr()) } as usize;
        self.stats.instructions.add(done as u64);
        if at != end {
            // The block was cut: go on after the last instruction executed.
            self.rip = self.wrap_rip(self.next_rip(&ops[done - 1]));
        }
        if shadow && self.system_flags & rflags::IF != 0 {
            self.apic.accepts_more();
        }
        if stepping.is_some() || self.watches.pending() {
            self.trapped(&ops[done - 1], stepping)?;
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn faulted(&mut self, fault: Fault, op: &Op) -> Result<(), Shutdown> {
        self.faulted_at(fault, self.wrap_rip(self.op_rip(op)), self.wrap_rip(self.next_rip(op)))
    }

    /// The same for the instruction at `own`; the next one is at `next`.
    #[cold]
    pub(crate) fn faulted_at(&mut self, fault: Fault, own: u64, next: u64) -> Result<(), Shutdown> {
        self.rip = own;
        if fault.kind == Kind::Fault {
            self.discard_hits();
        }
        self.step_ended();
        #[cfg(test)]
        if self.catches {
            self.caught = Some((fault, own));
            return Err(Shutdown);
        }
        self.raise(fault, own, next)
    }

    /// RIP cut to what the code segment's size and mode have.
    #[inline(always)]
    pub(crate) fn wrap_rip(&self, rip: u64) -> u64 {
        match self.mode.code {
            crate::decode::CodeSize::Code64 => rip,
            crate::decode::CodeSize::Code32 => rip & 0xffff_ffff,
            crate::decode::CodeSize::Code16 => rip & 0xffff,
        }
    }

    /// Takes what is pending; sleeps while there is nothing to execute.
    #[cold]
    #[inline(never)]
    fn attend(&mut self) -> Option<Stop> {
        if self.watches.stopped() {
            return Some(self.debug_stop());
        }
        if let Some(fault) = self.deferred.take()
            && self.raise(fault, self.rip, self.rip).is_err()
        {
            self.shut_down = true;
            return Some(self.shutdown());
        }
        loop {
            // A single step is one of the program's own instructions, not of a handler that comes in between.
            let held = self.interrupt_shadow || (self.watches.stepping() && !self.halted);
            let accepts = Accepts {
                interrupts: self.system_flags & rflags::IF != 0 && !held,
                nmi: !self.nmi_masked && !held,
                smi: !self.smm.active && !held,
                init: !self.smm.active,
                waiting_for_start_up: self.waiting_for_start_up,
            };
            let taken = match self.apic.next(accepts) {
                Next::Kick => return Some(Stop::Kicked),
                Next::Init => {
                    self.init();
                    continue;
                }
                Next::StartUp(page) => {
                    self.start_up(page);
                    continue;
                }
                Next::Smi => {
                    self.enter_smm();
                    Ok(())
                }
                Next::Nmi => {
                    self.nmi_masked = true;
                    self.interrupt(vector::NMI)
                }
                Next::Vector(v) => {
                    self.interrupted_for_policy();
                    self.interrupt(v)
                }
                Next::External => {
                    let v = self.bus.acknowledge_interrupt();
                    self.interrupt(v)
                }
                Next::Nothing if self.waiting_for_start_up || (self.halted && !self.interrupt_shadow) => {
                    self.sleeps_for_policy();
                    self.stats.sleeps(self.bus.clock.now());
                    self.apic.sleep();
                    self.stats.wakes(self.bus.clock.now());
                    continue;
                }
                Next::Nothing if self.halted => {
                    // `sti; hlt`: the shadow ends with the `hlt`.
                    self.interrupt_shadow = false;
                    continue;
                }
                Next::Nothing => return None,
            };
            self.halted = false;
            self.step_ended();
            if taken.is_err() {
                self.shut_down = true;
                return Some(self.shutdown());
            }
        }
    }

    /// INIT (Intel SDM vol. 3, table 10-1): like a reset, but FPU, caches, MTRRs and most MSRs stay.
    fn init(&mut self) {
        let boot = self.id == 0;
        let fresh = VcpuState::power_on(self.cpuid.apic_id(), boot);
        self.gpr[..16].copy_from_slice(&fresh.gpr);
        self.gpr[2] = u64::from(self.cpuid.query(1, 0).registers[0]);
        self.segments = fresh.segments;
        (self.ldtr, self.tr, self.gdtr, self.idtr) = (fresh.ldtr, fresh.tr, fresh.gdtr, fresh.idtr);
        self.cr0 = fresh.cr0 & !(cr0::CD | cr0::NW) | self.cr0 & (cr0::CD | cr0::NW);
        (self.cr2, self.cr3, self.cr4) = (0, 0, 0);
        self.msrs.efer = 0;
        self.debug = fresh.debug;
        self.refresh_watches();
        self.rip = fresh.rip;
        self.cpl = 0;
        self.system_flags = 0;
        self.set_rflags(fresh.rflags);
        self.interrupt_shadow = false;
        self.deferred = None;
        self.nmi_masked = false;
        self.halted = false;
        self.waiting_for_start_up = !boot;
        self.apic.init();
        self.flush_tlb();
        self.refresh_mode();
    }

    /// A start-up IPI: real mode at `page << 12`.
    fn start_up(&mut self, page: u8) {
        let selector = u16::from(page) << 8;
        self.segments[VcpuState::CS] = Segment::real_mode(selector, true);
        self.rip = 0;
        self.waiting_for_start_up = false;
        self.refresh_mode();
    }

    /// What this vCPU is doing.
    pub(crate) fn mp_state(&self) -> MpState {
        if self.waiting_for_start_up {
            MpState::WaitForStartUp
        } else if self.halted {
            MpState::Halted
        } else {
            MpState::Running
        }
    }
}
