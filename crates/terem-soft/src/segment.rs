//! Segmentation: descriptors, loading segment registers, far transfers
//! (Intel SDM vol. 3, chapters 3 and 5).

use terem_cpu::{Segment, VcpuState, rflags};

use crate::cpu::{Cpu, cr0, cr4};
use crate::decode::{CodeSize, Mode, Unit};
use crate::fault::{Exec, Fault, vector};
use crate::op::{Op, STACK16, STACK32};

/// Whether a selector is null.
pub(crate) fn null(selector: u16) -> bool {
    selector & !3 == 0
}

/// An 8-byte segment descriptor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor(pub(crate) u64);

impl Descriptor {
    pub(crate) fn access(self) -> u32 {
        (self.0 >> 40) as u32 & 0xf0ff
    }

    pub(crate) fn present(self) -> bool {
        self.access() & Segment::PRESENT != 0
    }

    pub(crate) fn is_code(self) -> bool {
        let both = Segment::CODE_OR_DATA | Segment::CODE;
        self.access() & both == both
    }

    pub(crate) fn is_writable_data(self) -> bool {
        let all = Segment::CODE_OR_DATA | Segment::CODE | Segment::WRITABLE;
        self.access() & all == Segment::CODE_OR_DATA | Segment::WRITABLE
    }

    /// The system type, if it is a system descriptor.
    pub(crate) fn system_type(self) -> Option<u8> {
        (self.access() & Segment::CODE_OR_DATA == 0).then_some(self.access() as u8 & 15)
    }

    /// As a segment register holds it.
    pub(crate) fn segment(self, selector: u16) -> Segment {
        let d = self.0;
        let raw = (d & 0xffff | d >> 32 & 0xf_0000) as u32;
        let limit = if d & 1 << 55 != 0 { raw << 12 | 0xfff } else { raw };
        let base = d >> 16 & 0xff_ffff | d >> 32 & 0xff00_0000;
        let accessed = if self.access() & Segment::CODE_OR_DATA != 0 { Segment::ACCESSED } else { 0 };
        Segment { selector, base, limit, access: self.access() | accessed }
    }
}

impl Cpu {
    /// Brings everything that is derived from segments, control registers, flags and privilege in line.
    pub(crate) fn refresh_mode(&mut self) {
        let long64 = self.code64();
        for i in 0..6 {
            let flat = long64 && i < VcpuState::FS;
            self.segment_base[i] = if flat { 0 } else { self.segments[i].base };
        }
        let cs = self.segments[VcpuState::CS];
        let ss = self.segments[VcpuState::SS];
        let code = if long64 {
            CodeSize::Code64
        } else if cs.access & Segment::BIG != 0 && (self.cr0 & cr0::PE == 0 || self.protected()) {
            CodeSize::Code32
        } else {
            CodeSize::Code16
        };
        let has = |bit: u64| self.cr0 & bit != 0;
        let mode = Mode {
            code,
            stack32: ss.access & Segment::BIG != 0 && self.system_flags & rflags::VM == 0,
            sse: if has(cr0::EM) || self.cr4 & cr4::OSFXSR == 0 {
                Unit::Undefined
            } else if has(cr0::TS) {
                Unit::NotAvailable
            } else {
                Unit::On
            },
            x87: if has(cr0::EM) || has(cr0::TS) { Unit::NotAvailable } else { Unit::On },
            mmx: if has(cr0::EM) {
                Unit::Undefined
            } else if has(cr0::TS) {
                Unit::NotAvailable
            } else {
                Unit::On
            },
            wait: if has(cr0::MP) && has(cr0::TS) { Unit::NotAvailable } else { Unit::On },
            single: self.system_flags & rflags::TF != 0 || self.watches.stepping(),
        };
        if mode != self.mode {
            self.mode = mode;
            self.mode_key = mode.key();
        }
        self.mode_changed();
    }

    /// Reads the descriptor of a non-null selector. `external` is ORed into error codes.
    pub(crate) fn descriptor(&mut self, selector: u16, external: u32) -> Exec<Descriptor> {
        let (base, limit) = self.table_of(selector);
        let at = u64::from(selector & !7);
        if at + 7 > limit {
            return Err(Fault::with_code(vector::GP, u32::from(selector & !3) | external));
        }
        Ok(Descriptor(self.load_system(base.wrapping_add(at))?))
    }

    fn table_of(&self, selector: u16) -> (u64, u64) {
        if selector & 4 == 0 {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        } else if self.ldtr.access & Segment::UNUSABLE != 0 {
            (0, 0)
        } else {
            (self.ldtr.base, u64::from(self.ldtr.limit))
        }
    }

    /// Sets the accessed bit of a code or data descriptor in memory.
    pub(crate) fn mark_accessed(&mut self, selector: u16, d: &Descriptor) {
        if d.access() & (Segment::ACCESSED | Segment::CODE_OR_DATA) == Segment::CODE_OR_DATA {
            let (base, _) = self.table_of(selector);
            let at = base.wrapping_add(u64::from(selector & !7)).wrapping_add(5);
            let byte = (d.0 >> 40) as u8 | 1;
            // The descriptor was just read, so only a read-only table can refuse; then nothing is marked.
            let _ = self.store_system(at, byte);
        }
    }

    /// Loads ES, SS, DS, FS or GS.
    pub(crate) fn load_segment(&mut self, index: usize, selector: u16) -> Exec {
        if !self.protected() {
            let old = self.segments[index];
            self.segments[index] = Segment { selector, base: u64::from(selector) << 4, ..old };
            if self.system_flags & rflags::VM != 0 {
                self.segments[index] = Segment { access: 0xf3, ..Segment::real_mode(selector, false) };
            }
            self.refresh_mode();
            return Ok(());
        }
        let loaded = if index == VcpuState::SS {
            let cpl = self.cpl;
            let to64 = self.code64();
            self.stack_segment_for(selector, cpl, to64)?
        } else if null(selector) {
            // AMD keeps the old base, Intel clears it: guests that care write it afterwards.
            Segment { selector, base: 0, limit: 0, access: Segment::UNUSABLE }
        } else {
            let d = self.descriptor(selector, 0)?;
            let s = d.segment(selector);
            let bad = Fault::with_code(vector::GP, u32::from(selector & !3));
            let readable = d.system_type().is_none() && (!d.is_code() || s.access & Segment::WRITABLE != 0);
            let conforming = d.is_code() && s.access & Segment::DOWN != 0;
            let rpl = (selector & 3) as u8;
            if !readable || (!conforming && (rpl > s.dpl() || self.cpl > s.dpl())) {
                return Err(bad);
            }
            if !d.present() {
                return Err(Fault::with_code(vector::NP, u32::from(selector & !3)));
            }
            self.mark_accessed(selector, &d);
            s
        };
        self.segments[index] = loaded;
        self.refresh_mode();
        Ok(())
    }

    /// The linear address of an access outside 64-bit mode, with limit and rights checked.
    #[inline(never)]
    pub(crate) fn checked_linear(&self, index: u8, offset: u64, size: u64, write: bool) -> Exec<u64> {
        let i = usize::from(index);
        if i >= 6 {
            return Ok(offset);
        }
        let s = &self.segments[i];
        let linear = s.base.wrapping_add(offset) & 0xffff_ffff;
        let last = offset + (size - 1);
        // The usual flat segment first.
        let usual = Segment::UNUSABLE | Segment::DOWN | Segment::CODE | Segment::WRITABLE;
        if s.access & usual == Segment::WRITABLE && last <= u64::from(s.limit) {
            return Ok(linear);
        }
        let bad = Err(if i == VcpuState::SS { Fault::SS0 } else { Fault::GP0 });
        let code = s.access & Segment::CODE != 0;
        if s.access & Segment::UNUSABLE != 0 && self.protected() {
            return bad;
        }
        if self.protected()
            && if write {
                code || s.access & Segment::WRITABLE == 0
            } else {
                code && s.access & Segment::WRITABLE == 0
            }
        {
            return bad;
        }
        let inside = if !code && s.access & Segment::DOWN != 0 {
            let top = if s.access & Segment::BIG != 0 { 0xffff_ffff } else { 0xffff };
            offset > u64::from(s.limit) && last <= top
        } else {
            last <= u64::from(s.limit)
        };
        if inside { Ok(linear) } else { bad }
    }

    /// Reads `size` bytes at `at` bytes above the stack pointer.
    pub(crate) fn stack_load(&mut self, op: &Op, at: u64, size: u64) -> Exec<u64> {
        let offset = self.stack_pointer(op, at);
        let linear = if self.code64() {
            offset
        } else {
            self.checked_linear(VcpuState::SS as u8, offset, size, false)?
        };
        let ss = VcpuState::SS as u8;
        Ok(match size {
            2 => u64::from(self.load_in::<u16>(linear, ss)?),
            4 => u64::from(self.load_in::<u32>(linear, ss)?),
            _ => self.load_in::<u64>(linear, ss)?,
        })
    }

    fn stack_pointer(&self, op: &Op, at: u64) -> u64 {
        let sp = self.gpr[4].wrapping_add(at);
        match op.flags & (STACK16 | STACK32) {
            STACK16 => sp & 0xffff,
            STACK32 => sp & 0xffff_ffff,
            _ => sp,
        }
    }

    /// Moves the stack pointer up by `bytes`.
    pub(crate) fn stack_release(&mut self, op: &Op, bytes: u64) {
        let sp = self.gpr[4].wrapping_add(bytes);
        self.gpr[4] = match op.flags & (STACK16 | STACK32) {
            STACK16 => self.gpr[4] & !0xffff | sp & 0xffff,
            STACK32 => sp & 0xffff_ffff,
            _ => sp,
        };
    }

    /// Pushes values of `size` bytes, all or none.
    pub(crate) fn stack_push(&mut self, op: &Op, size: u64, values: &[u64]) -> Exec {
        let mut sp = self.gpr[4];
        for v in values {
            sp = sp.wrapping_sub(size);
            let offset = match op.flags & (STACK16 | STACK32) {
                STACK16 => sp & 0xffff,
                STACK32 => sp & 0xffff_ffff,
                _ => sp,
            };
            let ss = VcpuState::SS as u8;
            let linear = if self.code64() { offset } else { self.checked_linear(ss, offset, size, true)? };
            match size {
                2 => self.store_in(linear, *v as u16, ss)?,
                4 => self.store_in(linear, *v as u32, ss)?,
                _ => self.store_in(linear, *v, ss)?,
            }
        }
        self.stack_release(op, 0_u64.wrapping_sub(size * values.len() as u64));
        Ok(())
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
        let back = [u64::from(self.segments[VcpuState::CS].selector), self.next_rip(op)];
        if !self.protected() {
            if offset > 0xffff && self.segments[VcpuState::CS].limit == 0xffff {
                return Err(Fault::GP0);
            }
            if call {
                self.stack_push(op, size, &back)?;
            }
            let cs = &mut self.segments[VcpuState::CS];
            (cs.selector, cs.base) = (selector, u64::from(selector) << 4);
            self.rip = offset;
            self.refresh_mode();
            return Ok(());
        }
        if null(selector) {
            return Err(Fault::GP0);
        }
        let d = self.descriptor(selector, 0)?;
        let code = u32::from(selector & !3);
        let bad = Fault::with_code(vector::GP, code);
        if let Some(kind) = d.system_type() {
            return self.through_call_gate(op, d, kind, selector, call);
        }
        let target = d.segment(selector);
        let conforming = target.access & Segment::DOWN != 0;
        let rpl = (selector & 3) as u8;
        let allowed =
            if conforming { target.dpl() <= self.cpl } else { rpl <= self.cpl && target.dpl() == self.cpl };
        let both = Segment::LONG | Segment::BIG;
        if !d.is_code() || !allowed || (self.long_mode() && target.access & both == both) {
            return Err(bad);
        }
        if !d.present() {
            return Err(Fault::with_code(vector::NP, code));
        }
        let to64 = self.long_mode() && target.access & Segment::LONG != 0;
        if if to64 { (offset as i64) << 16 >> 16 != offset as i64 } else { offset > u64::from(target.limit) }
        {
            return Err(Fault::GP0);
        }
        if call {
            self.stack_push(op, size, &back)?;
        }
        self.mark_accessed(selector, &d);
        self.segments[VcpuState::CS] = Segment { selector: selector & !3 | u16::from(self.cpl), ..target };
        self.rip = offset;
        self.refresh_mode();
        Ok(())
    }

    /// A 64-bit call gate without change of privilege, or a 16-/32-bit one likewise. With a change of
    /// privilege the stack is switched through the TSS.
    fn through_call_gate(&mut self, op: &Op, gate: Descriptor, kind: u8, selector: u16, call: bool) -> Exec {
        let bad = Fault::with_code(vector::GP, u32::from(selector & !3));
        let long = self.long_mode();
        let known = kind == 12 || (kind == 4 && !long);
        let dpl = (gate.access() >> 5 & 3) as u8;
        if !known || dpl < self.cpl || dpl < (selector & 3) as u8 {
            return Err(bad);
        }
        if !gate.present() {
            return Err(Fault::with_code(vector::NP, u32::from(selector & !3)));
        }
        let g = gate.0;
        let mut offset = g & 0xffff | if kind == 12 { g >> 32 & 0xffff_0000 } else { 0 };
        if long {
            let (base, _) = self.table_of(selector);
            let high: u64 = self.load_system(base.wrapping_add(u64::from(selector & !7) + 8))?;
            offset |= high << 32;
        }
        let target_selector = (g >> 16) as u16;
        if null(target_selector) {
            return Err(Fault::GP0);
        }
        let d = self.descriptor(target_selector, 0)?;
        let target = d.segment(target_selector);
        let code = u32::from(target_selector & !3);
        let wrong_size = long && target.access & (Segment::LONG | Segment::BIG) != Segment::LONG;
        if !d.is_code() || target.dpl() > self.cpl || wrong_size {
            return Err(Fault::with_code(vector::GP, code));
        }
        if !d.present() {
            return Err(Fault::with_code(vector::NP, code));
        }
        let conforming = target.access & Segment::DOWN != 0;
        let size = if long {
            8
        } else if kind == 12 {
            4
        } else {
            2
        };
        let back = [u64::from(self.segments[VcpuState::CS].selector), self.next_rip(op)];
        let cpl = if conforming { self.cpl } else { target.dpl() };
        if cpl < self.cpl {
            if !call {
                return Err(Fault::with_code(vector::GP, code));
            }
            self.call_inner(op, cpl, size, &back, (g >> 32 & 31) as u8)?;
        } else if call {
            self.stack_push(op, size, &back)?;
        }
        self.cpl = cpl;
        self.segments[VcpuState::CS] = Segment { selector: target_selector & !3 | u16::from(cpl), ..target };
        self.rip = offset;
        self.refresh_mode();
        Ok(())
    }

    /// Switches to the inner stack for a call gate: old SS:SP, parameters, return address.
    fn call_inner(&mut self, op: &Op, cpl: u8, size: u64, back: &[u64; 2], parameters: u8) -> Exec {
        let old = [u64::from(self.segments[VcpuState::SS].selector), self.gpr[4]];
        let mut values = old.to_vec();
        let (ss, sp) = if self.long_mode() {
            let rsp: u64 = self.load_system(self.tr.base.wrapping_add(4 + u64::from(cpl) * 8))?;
            let null_ss = Segment {
                selector: u16::from(cpl),
                access: Segment::UNUSABLE | u32::from(cpl) << 5,
                ..Segment::default()
            };
            (null_ss, rsp)
        } else {
            for i in (0..u64::from(parameters)).rev() {
                values.push(self.stack_load(op, i * size, size)?);
            }
            self.inner_stack(cpl, 0)?
        };
        values.extend(back);
        let mut at = sp;
        self.with_privilege(cpl, |cpu| {
            for v in &values {
                at = at.wrapping_sub(size);
                let linear = cpu.wrap(ss.base.wrapping_add(at));
                match size {
                    2 => cpu.store(linear, *v as u16)?,
                    4 => cpu.store(linear, *v as u32)?,
                    _ => cpu.store(linear, *v)?,
                }
            }
            Ok(())
        })?;
        self.gpr[4] = at;
        self.segments[VcpuState::SS] = ss;
        Ok(())
    }

    /// `retf`, releasing `extra` bytes more.
    pub(crate) fn far_return(&mut self, op: &Op, size: u64, extra: u64) -> Exec {
        let rip = self.stack_load(op, 0, size)?;
        let cs = self.stack_load(op, size, size)? as u16;
        if !self.protected() {
            self.stack_release(op, size * 2 + extra);
            let s = &mut self.segments[VcpuState::CS];
            (s.selector, s.base) = (cs, u64::from(cs) << 4);
            self.rip = rip;
            self.refresh_mode();
            return Ok(());
        }
        if null(cs) {
            return Err(Fault::GP0);
        }
        let d = self.descriptor(cs, 0)?;
        let target = d.segment(cs);
        let rpl = (cs & 3) as u8;
        let code = u32::from(cs & !3);
        let conforming = target.access & Segment::DOWN != 0;
        if !d.is_code()
            || rpl < self.cpl
            || (conforming && target.dpl() > rpl)
            || (!conforming && target.dpl() != rpl)
        {
            return Err(Fault::with_code(vector::GP, code));
        }
        if !d.present() {
            return Err(Fault::with_code(vector::NP, code));
        }
        let to64 = self.long_mode() && target.access & Segment::LONG != 0;
        if to64 && (rip as i64) << 16 >> 16 != rip as i64 {
            return Err(Fault::GP0);
        }
        if rpl > self.cpl {
            let sp = self.stack_load(op, size * 2 + extra, size)?;
            let ss = self.stack_load(op, size * 3 + extra, size)? as u16;
            let new_ss = self.stack_segment_for(ss, rpl, to64)?;
            self.cpl = rpl;
            self.segments[VcpuState::SS] = new_ss;
            self.gpr[4] = if to64 || new_ss.access & Segment::BIG != 0 {
                sp.wrapping_add(extra)
            } else {
                self.gpr[4] & !0xffff | sp.wrapping_add(extra) & 0xffff
            };
            for s in [VcpuState::ES, VcpuState::DS, VcpuState::FS, VcpuState::GS] {
                self.drop_inner_segment(s);
            }
        } else {
            self.stack_release(op, size * 2 + extra);
        }
        self.mark_accessed(cs, &d);
        self.segments[VcpuState::CS] = target;
        self.rip = if to64 { rip } else { rip & 0xffff_ffff };
        self.refresh_mode();
        Ok(())
    }
}
