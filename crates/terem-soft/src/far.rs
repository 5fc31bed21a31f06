//! Far jumps, calls and returns, and call gates (Intel SDM vol. 2, JMP, CALL and RET; vol. 3, 5.8).

use terem_cpu::{Segment, VcpuState};

use crate::cpu::Cpu;
use crate::fault::{Exec, Fault, vector};
use crate::op::Op;
use crate::segment::{Descriptor, null, null_stack};
use crate::task::Cause;

/// System descriptor types (SDM vol. 3, table 3-2).
pub(crate) mod system {
    pub(crate) const TSS_16: u8 = 1;
    pub(crate) const CALL_GATE_16: u8 = 4;
    pub(crate) const TASK_GATE: u8 = 5;
    pub(crate) const TSS_32: u8 = 9;
    /// The 64-bit one in long mode.
    pub(crate) const CALL_GATE: u8 = 12;
}

/// Whether a 64-bit RIP can be.
pub(crate) fn canonical(rip: u64) -> bool {
    (rip as i64) << 16 >> 16 == rip as i64
}

impl Cpu {
    /// CS:RIP of the instruction after `op`, to come back to.
    fn return_address(&self, op: &Op) -> [u64; 2] {
        [u64::from(self.segments[VcpuState::CS].selector), self.wrap_rip(self.next_rip(op))]
    }

    /// Whether code segments of this kind cannot be in long mode: L and D set.
    pub(crate) fn no_code_size(&self, code: &Segment) -> bool {
        let both = Segment::LONG | Segment::BIG;
        self.long_mode() && code.access & both == both
    }

    /// `#GP` with error code `external` unless `rip` is within a code segment.
    pub(crate) fn rip_within(&self, code: &Segment, rip: u64, external: u32) -> Exec {
        let to64 = self.long_mode() && code.access & Segment::LONG != 0;
        let inside = if to64 { canonical(rip) } else { rip <= u64::from(code.limit) };
        if inside { Ok(()) } else { Err(Fault::with_code(vector::GP, external)) }
    }

    /// `jmp far` and `call far` to `selector:offset`; `size` is the operand size in bytes.
    pub(crate) fn far_transfer(
        &mut self,
        op: &Op,
        selector: u16,
        offset: u64,
        size: u64,
        call: bool,
    ) -> Exec {
        if !self.protected() {
            return self.far_real(op, selector, offset, size, call);
        }
        if null(selector) {
            return Err(Fault::GP0);
        }
        let d = self.descriptor(selector, 0)?;
        let Some(kind) = d.system_type() else {
            return self.far_to_code(op, &d, selector, offset, size, call);
        };
        let bad = Fault::with_code(vector::GP, u32::from(selector & !3));
        let dpl = (d.access() >> 5 & 3) as u8;
        let long = self.long_mode();
        let known = match kind {
            system::CALL_GATE => true,
            system::CALL_GATE_16 | system::TASK_GATE | system::TSS_16 | system::TSS_32 => !long,
            _ => false,
        };
        if !known || dpl < self.cpl || dpl < (selector & 3) as u8 {
            return Err(bad);
        }
        let gate = matches!(kind, system::CALL_GATE | system::CALL_GATE_16 | system::TASK_GATE);
        if gate && !d.present() {
            return Err(Fault::with_code(vector::NP, u32::from(selector & !3)));
        }
        let cause = if call { Cause::Call } else { Cause::Jump };
        let old = (self.wrap_rip(self.next_rip(op)), self.rflags());
        match kind {
            system::TASK_GATE => self.switch_task((d.0 >> 16) as u16, cause, old, None, 0),
            system::TSS_16 | system::TSS_32 => self.switch_task(selector, cause, old, None, 0),
            _ => self.through_call_gate(op, d, kind, selector, call),
        }
    }

    fn far_real(&mut self, op: &Op, selector: u16, offset: u64, size: u64, call: bool) -> Exec {
        if offset > u64::from(self.segments[VcpuState::CS].limit) {
            return Err(Fault::GP0);
        }
        if call {
            self.stack_push(op, size, &self.return_address(op))?;
        }
        let cs = &mut self.segments[VcpuState::CS];
        (cs.selector, cs.base) = (selector, u64::from(selector) << 4);
        self.rip = offset;
        self.refresh_mode();
        Ok(())
    }

    fn far_to_code(
        &mut self,
        op: &Op,
        d: &Descriptor,
        selector: u16,
        offset: u64,
        size: u64,
        call: bool,
    ) -> Exec {
        let target = d.segment(selector);
        let rpl = (selector & 3) as u8;
        let allowed = if target.access & Segment::DOWN != 0 {
            target.dpl() <= self.cpl
        } else {
            rpl <= self.cpl && target.dpl() == self.cpl
        };
        let code = u32::from(selector & !3);
        if !d.is_code() || !allowed || self.no_code_size(&target) {
            return Err(Fault::with_code(vector::GP, code));
        }
        if !d.present() {
            return Err(Fault::with_code(vector::NP, code));
        }
        self.rip_within(&target, offset, 0)?;
        if call {
            self.stack_push(op, size, &self.return_address(op))?;
        }
        self.mark_accessed(selector, d);
        self.go_to_code(target, self.cpl, offset);
        Ok(())
    }

    /// Loads CS with privilege `cpl`, and RIP.
    fn go_to_code(&mut self, target: Segment, cpl: u8, rip: u64) {
        self.cpl = cpl;
        let selector = target.selector & !3 | u16::from(cpl);
        self.segments[VcpuState::CS] = Segment { selector, ..target };
        self.rip = rip;
        self.refresh_mode();
    }

    /// A call gate, whose own rights are checked already.
    fn through_call_gate(&mut self, op: &Op, gate: Descriptor, kind: u8, selector: u16, call: bool) -> Exec {
        let long = self.long_mode();
        let g = gate.0;
        let mut offset = g & 0xffff | if kind == system::CALL_GATE { g >> 32 & 0xffff_0000 } else { 0 };
        if long {
            offset |= self.upper_half(selector)? << 32;
        }
        let target_selector = (g >> 16) as u16;
        if null(target_selector) {
            return Err(Fault::GP0);
        }
        let d = self.descriptor(target_selector, 0)?;
        let target = d.segment(target_selector);
        let code = u32::from(target_selector & !3);
        let wrong_size = long && target.access & (Segment::LONG | Segment::BIG) != Segment::LONG;
        let conforming = target.access & Segment::DOWN != 0;
        let level = if call || conforming { target.dpl() <= self.cpl } else { target.dpl() == self.cpl };
        if !d.is_code() || !level || wrong_size {
            return Err(Fault::with_code(vector::GP, code));
        }
        if !d.present() {
            return Err(Fault::with_code(vector::NP, code));
        }
        let size = match kind {
            _ if long => 8,
            system::CALL_GATE => 4,
            _ => 2,
        };
        let back = self.return_address(op);
        let cpl = if conforming { self.cpl } else { target.dpl() };
        if cpl < self.cpl {
            self.call_inner(op, &target, offset, size, &back, (g >> 32 & 31) as u8)?;
        } else {
            self.rip_within(&target, offset, 0)?;
            if call {
                self.stack_push(op, size, &back)?;
            }
        }
        self.mark_accessed(target_selector, &d);
        self.go_to_code(target, cpl, offset);
        Ok(())
    }

    /// The second half of a 16-byte call gate, bits 63:32 of the offset; its type field must be 0.
    fn upper_half(&mut self, selector: u16) -> Exec<u64> {
        let bad = Fault::with_code(vector::GP, u32::from(selector & !3));
        let high = self.descriptor_half(u64::from(selector & !7) + 8, selector).ok_or(bad)?;
        let high: u64 = self.load_system(high)?;
        if high >> 40 & 0x1f != 0 { Err(bad) } else { Ok(high & 0xffff_ffff) }
    }

    /// Switches to the inner stack for a call gate: old SS:SP, parameters, return address.
    fn call_inner(
        &mut self,
        op: &Op,
        target: &Segment,
        offset: u64,
        size: u64,
        back: &[u64; 2],
        parameters: u8,
    ) -> Exec {
        let cpl = target.dpl();
        let mut values = vec![u64::from(self.segments[VcpuState::SS].selector), self.gpr[4]];
        let (ss, sp) = if self.long_mode() {
            (null_stack(cpl), self.inner_rsp(cpl, 0)?)
        } else {
            let inner = self.inner_stack(cpl, 0)?;
            for i in (0..u64::from(parameters)).rev() {
                values.push(self.stack_load(op, i * size, size)?);
            }
            inner
        };
        values.extend(back);
        self.rip_within(target, offset, 0)?;
        let overflow = Fault::with_code(vector::SS, u32::from(ss.selector & !3));
        let sp = self.push_frame(cpl, &ss, sp, size, &values, overflow)?;
        self.segments[VcpuState::SS] = ss;
        self.set_sp_of(&ss, self.long_mode(), sp);
        Ok(())
    }

    /// Checks the code segment that a return leads to.
    pub(crate) fn return_target(&mut self, selector: u16) -> Exec<(Descriptor, Segment)> {
        if null(selector) {
            return Err(Fault::GP0);
        }
        let d = self.descriptor(selector, 0)?;
        let target = d.segment(selector);
        let rpl = (selector & 3) as u8;
        let conforming = target.access & Segment::DOWN != 0;
        let level = if conforming { target.dpl() <= rpl } else { target.dpl() == rpl };
        let code = u32::from(selector & !3);
        if !d.is_code() || rpl < self.cpl || !level || self.no_code_size(&target) {
            return Err(Fault::with_code(vector::GP, code));
        }
        if !d.present() {
            return Err(Fault::with_code(vector::NP, code));
        }
        Ok((d, target))
    }

    /// `retf`, releasing `extra` bytes more.
    pub(crate) fn far_return(&mut self, op: &Op, size: u64, extra: u64) -> Exec {
        let rip = self.stack_load(op, 0, size)?;
        let cs = self.stack_load(op, size, size)? as u16;
        if !self.protected() {
            if rip > u64::from(self.segments[VcpuState::CS].limit) {
                return Err(Fault::GP0);
            }
            self.stack_release(op, size * 2 + extra);
            let s = &mut self.segments[VcpuState::CS];
            (s.selector, s.base) = (cs, u64::from(cs) << 4);
            self.rip = rip;
            self.refresh_mode();
            return Ok(());
        }
        let (d, target) = self.return_target(cs)?;
        let rpl = (cs & 3) as u8;
        let to64 = self.long_mode() && target.access & Segment::LONG != 0;
        if rpl > self.cpl {
            let sp = self.stack_load(op, size * 2 + extra, size)?;
            let ss = self.stack_load(op, size * 3 + extra, size)? as u16;
            let new_ss = self.stack_segment_for(ss, rpl, to64)?;
            self.rip_within(&target, rip, 0)?;
            self.cpl = rpl;
            self.segments[VcpuState::SS] = new_ss;
            self.set_sp_of(&new_ss, to64, sp.wrapping_add(extra));
            for s in [VcpuState::ES, VcpuState::DS, VcpuState::FS, VcpuState::GS] {
                self.drop_inner_segment(s);
            }
        } else {
            self.rip_within(&target, rip, 0)?;
            self.stack_release(op, size * 2 + extra);
        }
        self.mark_accessed(cs, &d);
        self.segments[VcpuState::CS] = target;
        self.rip = rip;
        self.refresh_mode();
        Ok(())
    }
}
