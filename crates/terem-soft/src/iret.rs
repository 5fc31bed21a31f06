//! Coming back: `iret` in all modes (Intel SDM vol. 2, IRET).

use terem_cpu::{Segment, VcpuState, rflags};

use crate::cpu::Cpu;
use crate::fault::{Exec, Fault, vector};
use crate::op::Op;
use crate::segment::{Descriptor, null, virtual_8086};
use crate::task::Cause;
use crate::vm86::InterruptFlag;

impl Cpu {
    /// `iret` with operand size `size` bytes (2, 4 or 8).
    pub(crate) fn iret(&mut self, op: &Op, size: u64) -> Exec {
        if !self.protected() {
            return self.iret_real(op, size);
        }
        if self.system_flags & rflags::NT != 0 {
            return self.return_to_task(op);
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
        let (d, target) = self.return_target(cs)?;
        let rpl = (cs & 3) as u8;
        let to64 = self.long_mode() && target.access & Segment::LONG != 0;
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
        self.rip_within(&target, rip, 0)?;
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
        if old_cpl <= self.iopl() {
            mask |= rflags::IF;
        }
        self.mark_accessed(cs, &d);
        self.segments[VcpuState::CS] = target;
        self.cpl = rpl;
        self.rip = rip;
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

    /// Back to the task that this one is nested in; in long mode there are none.
    fn return_to_task(&mut self, op: &Op) -> Exec {
        if self.long_mode() {
            return Err(Fault::GP0);
        }
        let link: u16 = self.load_system(self.tr.base)?;
        let old = (self.wrap_rip(self.next_rip(op)), self.rflags());
        self.switch_task(link, Cause::Return, old, None, 0)?;
        self.nmi_masked = false;
        Ok(())
    }

    /// In real and virtual-8086 mode.
    fn iret_real(&mut self, op: &Op, size: u64) -> Exec {
        let vm = self.virtual_8086();
        let virtual_if = vm && self.interrupt_flag_on_stack(size) == InterruptFlag::Virtual;
        if vm && self.interrupt_flag_on_stack(size) == InterruptFlag::Denied {
            return Err(Fault::GP0);
        }
        let rip = self.stack_load(op, 0, size)?;
        let cs = self.stack_load(op, size, size)? as u16;
        let flags = self.stack_load(op, size * 2, size)?;
        if rip > u64::from(self.segments[VcpuState::CS].limit) {
            return Err(Fault::GP0);
        }
        if virtual_if {
            self.virtual_flags_popped(flags, size)?;
        }
        self.stack_release(op, size * 3);
        self.segments[VcpuState::CS] =
            Segment { selector: cs, base: u64::from(cs) << 4, ..self.segments[VcpuState::CS] };
        self.rip = rip;
        if !virtual_if {
            let mut mask = rflags::ARITHMETIC | rflags::TF | rflags::IF | rflags::DF | rflags::NT;
            if !vm {
                mask |= rflags::IOPL;
            }
            if size == 4 {
                mask |= rflags::AC | rflags::ID | rflags::RF;
            }
            let merged = self.rflags() & !mask | flags & mask;
            self.set_rflags(merged);
        }
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
            self.segments[i] = virtual_8086(selector);
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
