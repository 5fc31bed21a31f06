//! Delivering exceptions and interrupts (Intel SDM vol. 3, chapter "Interrupt and Exception Handling"; INT n in
//! vol. 2).

use terem_cpu::{Segment, VcpuState, rflags};

use crate::cpu::Cpu;
use crate::fault::{Exec, Fault, Kind, vector};
use crate::memory::Value;
use crate::mmu::Access;
use crate::segment::{null, null_stack};
use crate::task::Cause;

/// The machine check that no handler could take: the processor shuts down.
#[derive(Debug)]
pub(crate) struct Shutdown;

/// Whether an exception is "contributory" (SDM vol. 3, table 6-5).
fn contributory(vector: u8) -> bool {
    matches!(vector, vector::DE | vector::TS | vector::NP | vector::SS | vector::GP)
}

/// Gate types (SDM vol. 3, table 3-2).
mod gate {
    pub(super) const TASK: u8 = 5;
    pub(super) const INTERRUPT_16: u8 = 6;
    pub(super) const TRAP_16: u8 = 7;
    pub(super) const INTERRUPT: u8 = 14;
    pub(super) const TRAP: u8 = 15;
}

impl Cpu {
    /// Delivers `fault`; `own` and `next` are RIP of the instruction that raised it and of the one after.
    pub(crate) fn raise(&mut self, fault: Fault, own: u64, next: u64) -> Result<(), Shutdown> {
        if fault.kind == Kind::External { &self.stats.interrupts } else { &self.stats.exceptions }.add(1);
        // A trap's instruction is done, whatever comes of telling it.
        let own = if fault.kind == Kind::Trap { next } else { own };
        let mut current = fault;
        loop {
            self.trace_event(current, own);
            let rip = if current.kind == Kind::Fault { own } else { next };
            let cr2 = self.cr2;
            let Err(second) = self.deliver(current, rip) else {
                if current.vector == vector::DB {
                    self.debug_exception_taken();
                }
                return Ok(());
            };
            tracing::debug!(?current, ?second, rip, cr2, "fault while delivering");
            let first = current.vector;
            let (a, b) = (contributory(first), contributory(second.vector));
            let exception = matches!(current.kind, Kind::Fault | Kind::Trap);
            current = if exception && first == vector::DF {
                return Err(Shutdown);
            } else if exception && ((a && b) || (first == vector::PF && (b || second.vector == vector::PF))) {
                Fault::with_code(vector::DF, 0)
            } else {
                second
            };
        }
    }

    /// Delivers an external interrupt or NMI between instructions.
    pub(crate) fn interrupt(&mut self, vector: u8) -> Result<(), Shutdown> {
        let fault = Fault { kind: Kind::External, vector, has_code: false, code: 0 };
        self.raise(fault, self.rip, self.rip)
    }

    fn deliver(&mut self, fault: Fault, rip: u64) -> Exec {
        self.kernel_entries += u64::from(self.cpl == 3);
        if self.cr0 & crate::cpu::cr0::PE == 0 {
            return self.deliver_real(fault, rip);
        }
        let flags = match fault.kind {
            // A double fault is an abort, not a fault.
            Kind::Fault if fault.vector != vector::DF => self.rflags() | rflags::RF,
            _ => self.rflags(),
        };
        if self.long_mode() {
            self.deliver_long(fault, rip, flags)
        } else {
            self.deliver_32(fault, rip, flags)
        }
    }

    /// Through the interrupt vector table (SDM vol. 3, 20.1.4).
    fn deliver_real(&mut self, fault: Fault, rip: u64) -> Exec {
        let at = u64::from(fault.vector) * 4;
        if at + 3 > u64::from(self.idtr.limit) {
            return Err(Fault::GP0);
        }
        let entry: u32 = self.load_system(self.idtr.base + at)?;
        let flags = self.rflags() as u16;
        let cs = self.segments[VcpuState::CS].selector;
        let ss = self.segments[VcpuState::SS].base;
        let mut sp = self.gpr[4] as u16;
        for word in [flags, cs, rip as u16] {
            sp = sp.wrapping_sub(2);
            self.store_system(ss + u64::from(sp), word)?;
        }
        self.gpr[4] = self.gpr[4] & !0xffff | u64::from(sp);
        self.system_flags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        let selector = (entry >> 16) as u16;
        self.segments[VcpuState::CS] = Segment::real_mode(selector, true);
        self.rip = u64::from(entry & 0xffff);
        self.refresh_mode();
        Ok(())
    }

    /// EXT of error codes: what is delivered is not of the program's own making by `int n`, `int3` or `into`.
    fn external(fault: Fault) -> u32 {
        u32::from(fault.kind != Kind::Software)
    }

    /// An error code that names an IDT entry.
    fn idt_code(fault: Fault) -> u32 {
        u32::from(fault.vector) << 3 | 2 | Self::external(fault)
    }

    /// The code segment that a gate leads to, and the privilege it runs at.
    fn gate_target(&mut self, selector: u16, external: u32) -> Exec<(Segment, u8)> {
        if null(selector) {
            return Err(Fault::with_code(vector::GP, external));
        }
        let code = u32::from(selector & !3) | external;
        let d = self.descriptor(selector, external)?;
        let s = d.segment(selector);
        if !d.is_code() || s.dpl() > self.cpl {
            return Err(Fault::with_code(vector::GP, code));
        }
        if !d.present() {
            return Err(Fault::with_code(vector::NP, code));
        }
        let conforming = s.access & Segment::DOWN != 0;
        let cpl = if conforming { self.cpl } else { s.dpl() };
        Ok((Segment { selector: selector & !3 | u16::from(cpl), ..s }, cpl))
    }

    fn deliver_long(&mut self, fault: Fault, rip: u64, flags: u64) -> Exec {
        let external = Self::external(fault);
        let bad = Fault::with_code(vector::GP, Self::idt_code(fault));
        let at = u64::from(fault.vector) * 16;
        if at + 15 > u64::from(self.idtr.limit) {
            return Err(bad);
        }
        let low: u64 = self.load_system(self.idtr.base.wrapping_add(at))?;
        let high: u64 = self.load_system(self.idtr.base.wrapping_add(at + 8))?;
        let kind = (low >> 40 & 0x1f) as u8;
        if kind != gate::INTERRUPT && kind != gate::TRAP {
            return Err(bad);
        }
        if fault.kind == Kind::Software && (low >> 45 & 3) < u64::from(self.cpl) {
            return Err(bad);
        }
        if low & 1 << 47 == 0 {
            return Err(Fault::with_code(vector::NP, Self::idt_code(fault)));
        }
        let (cs, cpl) = self.gate_target((low >> 16) as u16, external)?;
        if cs.access & (Segment::LONG | Segment::BIG) != Segment::LONG {
            return Err(Fault::with_code(vector::GP, u32::from(cs.selector & !3) | external));
        }
        let target = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        let ist = low >> 32 & 7;
        let (was, old_rsp) = (self.cpl, self.gpr[4]);
        let rsp = if ist != 0 {
            self.tss_load::<u64>(0x24 + (ist - 1) * 8, external)?
        } else if cpl < was {
            self.inner_rsp(cpl, external)?
        } else {
            old_rsp
        };
        self.rip_within(&cs, target, external)?;
        let old_ss = u64::from(self.segments[VcpuState::SS].selector);
        let old_cs = u64::from(self.segments[VcpuState::CS].selector);
        let frame = [old_ss, old_rsp, flags, old_cs, rip, u64::from(fault.code)];
        let pushed = &frame[..if fault.has_code { 6 } else { 5 }];
        // The frame is written with the privilege of the handler.
        self.gpr[4] = self.push_frame(cpl, &null_stack(cpl), rsp & !15, 8, pushed, Fault::SS0)?;
        if cpl < was || ist != 0 {
            self.segments[VcpuState::SS] = null_stack(cpl);
        }
        self.enter_handler(cs, cpl, target, kind == gate::INTERRUPT);
        Ok(())
    }

    /// RSP that the 64-bit TSS has for privilege `cpl`.
    pub(crate) fn inner_rsp(&mut self, cpl: u8, external: u32) -> Exec<u64> {
        self.tss_load(4 + u64::from(cpl) * 8, external)
    }

    fn deliver_32(&mut self, fault: Fault, rip: u64, flags: u64) -> Exec {
        let external = Self::external(fault);
        let bad = Fault::with_code(vector::GP, Self::idt_code(fault));
        let at = u64::from(fault.vector) * 8;
        if at + 7 > u64::from(self.idtr.limit) {
            return Err(bad);
        }
        let entry: u64 = self.load_system(self.idtr.base.wrapping_add(at) & 0xffff_ffff)?;
        let kind = (entry >> 40 & 0x1f) as u8;
        let known =
            matches!(kind, gate::TASK | gate::INTERRUPT_16 | gate::TRAP_16 | gate::INTERRUPT | gate::TRAP);
        if !known || (fault.kind == Kind::Software && (entry >> 45 & 3) < u64::from(self.cpl)) {
            return Err(bad);
        }
        if entry & 1 << 47 == 0 {
            return Err(Fault::with_code(vector::NP, Self::idt_code(fault)));
        }
        if kind == gate::TASK {
            let code = fault.has_code.then_some(fault.code);
            return self.switch_task((entry >> 16) as u16, Cause::Call, (rip, flags), code, external);
        }
        let (cs, cpl) = self.gate_target((entry >> 16) as u16, external)?;
        let wide = kind >= gate::INTERRUPT;
        let target = entry & 0xffff | if wide { entry >> 32 & 0xffff_0000 } else { 0 };
        let from_vm = self.virtual_8086();
        if from_vm && cpl != 0 {
            return Err(Fault::with_code(vector::GP, u32::from(cs.selector & !3) | external));
        }
        let inner = cpl < self.cpl;
        let (ss, esp, overflow) = if inner {
            let (ss, esp) = self.inner_stack(cpl, external)?;
            (ss, esp, u32::from(ss.selector & !3) | external)
        } else {
            (self.segments[VcpuState::SS], self.gpr[4], external)
        };
        self.rip_within(&cs, target, external)?;
        let selector = |i: usize| u64::from(self.segments[i].selector);
        let mut frame: Vec<u64> = Vec::with_capacity(10);
        if from_vm {
            frame.extend([VcpuState::GS, VcpuState::FS, VcpuState::DS, VcpuState::ES].map(selector));
        }
        if inner {
            frame.extend([selector(VcpuState::SS), self.gpr[4]]);
        }
        frame.extend([flags, selector(VcpuState::CS), rip]);
        frame.extend(fault.has_code.then_some(u64::from(fault.code)));
        let size = if wide { 4 } else { 2 };
        let esp = self.push_frame(cpl, &ss, esp, size, &frame, Fault::with_code(vector::SS, overflow))?;
        self.segments[VcpuState::SS] = ss;
        self.set_sp_of(&ss, false, esp);
        if from_vm {
            for s in [VcpuState::GS, VcpuState::FS, VcpuState::DS, VcpuState::ES] {
                self.segments[s] = Segment { access: Segment::UNUSABLE, ..Segment::default() };
            }
        }
        self.enter_handler(cs, cpl, target, kind & 1 == 0);
        Ok(())
    }

    fn enter_handler(&mut self, cs: Segment, cpl: u8, target: u64, interrupt_gate: bool) {
        self.segments[VcpuState::CS] = cs;
        self.cpl = cpl;
        self.rip = target;
        self.system_flags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
        if interrupt_gate {
            self.system_flags &= !rflags::IF;
        }
        self.interrupt_shadow = false;
        self.refresh_mode();
    }

    /// The stack that the 32-bit TSS (or a 16-bit one) has for privilege `cpl`.
    pub(crate) fn inner_stack(&mut self, cpl: u8, external: u32) -> Exec<(Segment, u64)> {
        let (sp, ss) = if self.tr.kind() & 8 != 0 {
            let at = 4 + u64::from(cpl) * 8;
            (u64::from(self.tss_load::<u32>(at, external)?), self.tss_load::<u16>(at + 4, external)?)
        } else {
            let at = 2 + u64::from(cpl) * 4;
            (u64::from(self.tss_load::<u16>(at, external)?), self.tss_load::<u16>(at + 2, external)?)
        };
        let code = u32::from(ss & !3) | external;
        if null(ss) {
            return Err(Fault::with_code(vector::TS, external));
        }
        let bad = Fault::with_code(vector::TS, code);
        let d = self.descriptor(ss, external).map_err(|f| if f.vector == vector::GP { bad } else { f })?;
        let s = d.segment(ss);
        if (ss & 3) as u8 != cpl || s.dpl() != cpl || !d.is_writable_data() {
            return Err(bad);
        }
        if !d.present() {
            return Err(Fault::with_code(vector::SS, code));
        }
        Ok((s, sp))
    }

    fn tss_load<T: Value>(&mut self, at: u64, external: u32) -> Exec<T> {
        if at + T::SIZE - 1 > u64::from(self.tr.limit) {
            return Err(Fault::with_code(vector::TS, u32::from(self.tr.selector & !3) | external));
        }
        self.load_system(self.tr.base.wrapping_add(at))
    }

    /// Runs `f` with another privilege level for its memory accesses.
    pub(crate) fn with_privilege<R>(&mut self, cpl: u8, f: impl FnOnce(&mut Self) -> R) -> R {
        let was = std::mem::replace(&mut self.cpl, cpl);
        self.mode_changed();
        let result = f(self);
        self.cpl = was;
        self.mode_changed();
        result
    }

    /// Reads a value of the processor's own structures: privilege 0, linear address.
    pub(crate) fn load_system<T: Value>(&mut self, linear: u64) -> Exec<T> {
        let mut bytes = [0; 16];
        for (i, b) in bytes.iter_mut().enumerate().take(T::SIZE as usize) {
            // A value that crosses pages is rare, and one that does not is translated once.
            let at = self.wrap(linear.wrapping_add(i as u64));
            if i == 0 || at & 0xfff == 0 {
                let physical = self.translate_system(at, Access::Read)?;
                let whole = 0x1000 - (at & 0xfff) >= T::SIZE - i as u64;
                if i == 0 && whole {
                    self.physical_read(physical, &mut bytes[..T::SIZE as usize]);
                    break;
                }
                self.physical_read(physical, std::slice::from_mut(b));
            } else {
                let physical = self.translate_system(at, Access::Read)?;
                self.physical_read(physical, std::slice::from_mut(b));
            }
        }
        Ok(T::from_bytes(&bytes))
    }

    /// Writes a value of the processor's own structures.
    pub(crate) fn store_system<T: Value>(&mut self, linear: u64, value: T) -> Exec {
        self.with_privilege(0, |cpu| cpu.store(linear, value))
    }

    fn physical_read(&mut self, physical: u64, to: &mut [u8]) {
        use terem_memory::vm_memory::{Bytes, GuestAddress};
        if self.memory.read_slice(to, GuestAddress(physical)).is_err() {
            self.mmio_read(physical, to);
        }
    }
}
