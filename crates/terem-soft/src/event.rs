//! Delivering exceptions and interrupts, and coming back from them
//! (Intel SDM vol. 3, chapter 6; `iret` in vol. 2).

use terem_cpu::{Segment, VcpuState, rflags};

use crate::cpu::Cpu;
use crate::fault::{Exec, Fault, Kind, vector};
use crate::memory::Value;
use crate::mmu::Access;
use crate::op::Op;
use crate::segment::{Descriptor, null};

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
        self.stats.events += 1;
        // A trap's instruction is done, whatever comes of telling it.
        let own = if fault.kind == Kind::Trap { next } else { own };
        let mut current = fault;
        loop {
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
        if !self.protected() && self.cr0 & crate::cpu::cr0::PE == 0 {
            return self.deliver_real(fault, rip);
        }
        let flags = match fault.kind {
            Kind::Fault => self.rflags() | rflags::RF,
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

    /// An error code that names an IDT entry.
    fn idt_code(fault: Fault) -> u32 {
        u32::from(fault.vector) << 3 | 2 | u32::from(fault.kind == Kind::External)
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
        let external = u32::from(fault.kind == Kind::External);
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
        let old_ss = self.segments[VcpuState::SS].selector;
        let old_rsp = self.gpr[4];
        let mut rsp = if ist != 0 {
            self.tss_load::<u64>(0x24 + (ist - 1) * 8, external)?
        } else if cpl < self.cpl {
            self.tss_load::<u64>(4 + u64::from(cpl) * 8, external)?
        } else {
            old_rsp
        };
        rsp &= !15;
        let frame =
            [u64::from(old_ss), old_rsp, flags, u64::from(self.segments[VcpuState::CS].selector), rip];
        let was = self.cpl;
        // The frame is written with the privilege of the handler.
        let pushed = self.with_privilege(cpl, |cpu| {
            for value in frame.into_iter().chain(fault.has_code.then_some(u64::from(fault.code))) {
                rsp = rsp.wrapping_sub(8);
                cpu.store_in(rsp, value, VcpuState::SS as u8)?;
            }
            Ok(())
        });
        pushed?;
        self.gpr[4] = rsp;
        if cpl < was {
            self.segments[VcpuState::SS] = Segment {
                selector: u16::from(cpl),
                access: Segment::UNUSABLE | u32::from(cpl) << 5,
                ..Segment::default()
            };
        }
        self.enter_handler(cs, cpl, target, kind == gate::INTERRUPT);
        Ok(())
    }

    fn deliver_32(&mut self, fault: Fault, rip: u64, flags: u64) -> Exec {
        let external = u32::from(fault.kind == Kind::External);
        let bad = Fault::with_code(vector::GP, Self::idt_code(fault));
        let at = u64::from(fault.vector) * 8;
        if at + 7 > u64::from(self.idtr.limit) {
            return Err(bad);
        }
        let entry: u64 = self.load_system(self.idtr.base.wrapping_add(at) & 0xffff_ffff)?;
        let kind = (entry >> 40 & 0x1f) as u8;
        let known = matches!(kind, gate::INTERRUPT_16 | gate::TRAP_16 | gate::INTERRUPT | gate::TRAP);
        // Task gates need task switches, which this processor does not do: they fault like unknown types.
        if !known || (fault.kind == Kind::Software && (entry >> 45 & 3) < u64::from(self.cpl)) {
            if kind == gate::TASK {
                tracing::warn!(vector = fault.vector, "a task gate was met; task switches are not there");
            }
            return Err(bad);
        }
        if entry & 1 << 47 == 0 {
            return Err(Fault::with_code(vector::NP, Self::idt_code(fault)));
        }
        let (cs, cpl) = self.gate_target((entry >> 16) as u16, external)?;
        let wide = kind >= gate::INTERRUPT;
        let target = entry & 0xffff | if wide { entry >> 32 & 0xffff_0000 } else { 0 };
        let from_vm = self.system_flags & rflags::VM != 0;
        if from_vm && cpl != 0 {
            return Err(Fault::with_code(vector::GP, u32::from(cs.selector & !3) | external));
        }
        let old =
            [VcpuState::GS, VcpuState::FS, VcpuState::DS, VcpuState::ES].map(|s| self.segments[s].selector);
        let (old_ss, old_esp) = (self.segments[VcpuState::SS].selector, self.gpr[4]);
        let (ss, mut esp) = if cpl < self.cpl || from_vm {
            self.inner_stack(cpl, external)?
        } else {
            (self.segments[VcpuState::SS], old_esp)
        };
        let mut frame: Vec<u32> = Vec::with_capacity(10);
        if from_vm {
            frame.extend(old.iter().map(|s| u32::from(*s)));
        }
        if cpl < self.cpl || from_vm {
            frame.extend([u32::from(old_ss), old_esp as u32]);
        }
        frame.extend([flags as u32, u32::from(self.segments[VcpuState::CS].selector), rip as u32]);
        frame.extend(fault.has_code.then_some(fault.code));
        let mask = if ss.access & Segment::BIG != 0 { 0xffff_ffff } else { 0xffff };
        let was_vm = self.system_flags & rflags::VM;
        self.system_flags &= !rflags::VM;
        let pushed = self.with_privilege(cpl, |cpu| {
            for value in frame {
                esp = esp.wrapping_sub(if wide { 4 } else { 2 }) & mask;
                let linear = ss.base.wrapping_add(esp) & 0xffff_ffff;
                if esp > u64::from(ss.limit) && ss.access & Segment::DOWN == 0 {
                    return Err(Fault::with_code(vector::SS, u32::from(ss.selector & !3) | external));
                }
                if wide {
                    cpu.store(linear, value)?;
                } else {
                    cpu.store(linear, value as u16)?;
                }
            }
            Ok(())
        });
        if let Err(f) = pushed {
            self.system_flags |= was_vm;
            return Err(f);
        }
        self.gpr[4] = self.gpr[4] & !mask | esp;
        self.segments[VcpuState::SS] = ss;
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

    /// `iret` with operand size `size` bytes (2, 4 or 8).
    pub(crate) fn iret(&mut self, op: &Op, size: u64) -> Exec {
        if !self.protected() {
            return self.iret_real(op, size);
        }
        if self.system_flags & rflags::NT != 0 {
            // Returning from a nested task is a task switch; in long mode it is always #GP.
            return Err(Fault::GP0);
        }
        let mut at = 0;
        let mut pop = |cpu: &mut Self| -> Exec<u64> {
            let v = cpu.stack_load(op, at, size)?;
            at += size;
            Ok(v)
        };
        let rip = pop(self)?;
        let cs = pop(self)? as u16;
        let flags = pop(self)?;
        if !self.long_mode() && self.cpl == 0 && flags & rflags::VM != 0 && size == 4 {
            return self.iret_to_vm86(op, rip, cs, flags);
        }
        if null(cs) {
            return Err(Fault::GP0);
        }
        let d = self.descriptor(cs, 0)?;
        let rpl = (cs & 3) as u8;
        let target = d.segment(cs);
        let bad = Fault::with_code(vector::GP, u32::from(cs & !3));
        let conforming = target.access & Segment::DOWN != 0;
        if !d.is_code()
            || rpl < self.cpl
            || (conforming && target.dpl() > rpl)
            || (!conforming && target.dpl() != rpl)
        {
            return Err(bad);
        }
        if !d.present() {
            return Err(Fault::with_code(vector::NP, u32::from(cs & !3)));
        }
        let to64 = self.long_mode() && target.access & Segment::LONG != 0;
        if to64 && (rip as i64) << 16 >> 16 != rip as i64 {
            return Err(Fault::GP0);
        }
        let outer = rpl > self.cpl;
        let (rsp, ss) = if outer || size == 8 || self.code64() {
            (Some(pop(self)?), pop(self)? as u16)
        } else {
            (None, 0)
        };
        let new_ss = match rsp {
            Some(_) => Some(self.stack_segment_for(ss, rpl, to64)?),
            None => None,
        };
        // Everything is checked: change the state.
        let old_cpl = self.cpl;
        let mut mask = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
        if size > 2 {
            mask |= rflags::RF | rflags::AC | rflags::ID;
        }
        if old_cpl == 0 {
            mask |= rflags::IOPL;
            if size > 2 {
                mask |= rflags::VIF | rflags::VIP;
            }
        }
        if u64::from(old_cpl) <= (self.system_flags & rflags::IOPL) >> 12 {
            mask |= rflags::IF;
        }
        self.mark_accessed(cs, &d);
        self.segments[VcpuState::CS] = target;
        self.cpl = rpl;
        self.rip = if to64 { rip } else { rip & 0xffff_ffff };
        if let (Some(rsp), Some(new_ss)) = (rsp, new_ss) {
            self.segments[VcpuState::SS] = new_ss;
            if to64 || new_ss.access & Segment::BIG != 0 {
                self.gpr[4] = if size == 8 { rsp } else { rsp & 0xffff_ffff };
            } else {
                self.gpr[4] = self.gpr[4] & !0xffff | rsp & 0xffff;
            }
        } else {
            self.stack_release(op, at);
        }
        if outer {
            for s in [VcpuState::ES, VcpuState::DS, VcpuState::FS, VcpuState::GS] {
                self.drop_inner_segment(s);
            }
        }
        let merged = self.rflags() & !mask | flags & mask;
        self.set_rflags(merged);
        self.after_return();
        Ok(())
    }

    /// What every `iret` ends with.
    fn after_return(&mut self) {
        self.nmi_masked = false;
        self.refresh_mode();
        self.settle_resume_flag();
        self.apic.accepts_more();
    }

    fn iret_real(&mut self, op: &Op, size: u64) -> Exec {
        let vm = self.system_flags & rflags::VM != 0;
        if vm && (self.system_flags & rflags::IOPL) >> 12 != 3 {
            return Err(Fault::GP0);
        }
        let rip = self.stack_load(op, 0, size)?;
        let cs = self.stack_load(op, size, size)? as u16;
        let flags = self.stack_load(op, size * 2, size)?;
        if rip > 0xffff {
            return Err(Fault::GP0);
        }
        self.stack_release(op, size * 3);
        self.segments[VcpuState::CS] =
            Segment { selector: cs, base: u64::from(cs) << 4, ..self.segments[VcpuState::CS] };
        self.rip = rip;
        let mut mask = rflags::ARITHMETIC | rflags::TF | rflags::IF | rflags::DF | rflags::NT;
        if !vm {
            mask |= rflags::IOPL;
        }
        if size == 4 {
            mask |= rflags::AC | rflags::ID | rflags::RF;
        }
        let merged = self.rflags() & !mask | flags & mask;
        self.set_rflags(merged);
        self.after_return();
        Ok(())
    }

    /// Into virtual-8086 mode (SDM vol. 3, 20.2.5).
    fn iret_to_vm86(&mut self, op: &Op, rip: u64, cs: u16, flags: u64) -> Exec {
        let mut words = [0; 6];
        for (i, w) in words.iter_mut().enumerate() {
            *w = self.stack_load(op, 12 + i as u64 * 4, 4)?;
        }
        let [esp, ss, es, ds, fs, gs] = words;
        let order = [es as u16, cs, ss as u16, ds as u16, fs as u16, gs as u16];
        for (i, selector) in order.into_iter().enumerate() {
            let s = Segment::real_mode(selector, false);
            self.segments[i] = Segment { access: s.access | 3 << 5, ..s };
        }
        self.gpr[4] = esp;
        self.rip = rip & 0xffff;
        self.cpl = 3;
        self.set_rflags(flags & 0x003f_7fd7);
        self.after_return();
        Ok(())
    }

    /// Checks a stack segment that a return to privilege `cpl` loads.
    pub(crate) fn stack_segment_for(&mut self, ss: u16, cpl: u8, to64: bool) -> Exec<Segment> {
        if null(ss) {
            if to64 && cpl != 3 && (ss & 3) as u8 == cpl {
                return Ok(Segment {
                    selector: ss,
                    access: Segment::UNUSABLE | u32::from(cpl) << 5,
                    ..Segment::default()
                });
            }
            return Err(Fault::GP0);
        }
        let code = u32::from(ss & !3);
        let d: Descriptor = self.descriptor(ss, 0)?;
        let s = d.segment(ss);
        if (ss & 3) as u8 != cpl || s.dpl() != cpl || !d.is_writable_data() {
            return Err(Fault::with_code(vector::GP, code));
        }
        if !d.present() {
            return Err(Fault::with_code(vector::SS, code));
        }
        self.mark_accessed(ss, &d);
        Ok(s)
    }

    /// A data segment that is more privileged than the level returned to is taken away.
    pub(crate) fn drop_inner_segment(&mut self, s: usize) {
        let seg = self.segments[s];
        let conforming = seg.access & (Segment::CODE | Segment::DOWN) == Segment::CODE | Segment::DOWN;
        if null(seg.selector) || (seg.dpl() < self.cpl && !conforming) {
            // AMD keeps the base of a null FS or GS; guests write it anew in either case.
            let base = if self.long_mode() { seg.base } else { 0 };
            self.segments[s] = Segment { selector: 0, base, limit: 0, access: Segment::UNUSABLE };
        }
    }
}
