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

/// SS after a switch to an inner stack in long mode: null, with the privilege.
pub(crate) fn null_stack(cpl: u8) -> Segment {
    Segment {
        selector: u16::from(cpl),
        access: Segment::UNUSABLE | u32::from(cpl) << 5,
        ..Segment::default()
    }
}

/// A segment of virtual-8086 mode (SDM vol. 3, 20.2.1): as in real mode, of privilege 3.
pub(crate) fn virtual_8086(selector: u16) -> Segment {
    let s = Segment::real_mode(selector, false);
    Segment { access: s.access | 3 << 5, ..s }
}

/// Whether `size` bytes at `offset` (32 bits) are within a segment's limit.
pub(crate) fn within(s: &Segment, offset: u64, size: u64) -> bool {
    let last = offset + (size - 1);
    if s.access & (Segment::CODE | Segment::DOWN) == Segment::DOWN {
        let top = if s.access & Segment::BIG != 0 { 0xffff_ffff } else { 0xffff };
        return offset > u64::from(s.limit) && last <= top;
    }
    last <= u64::from(s.limit)
}

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

    /// Whether code of privilege `cpl` may load it into DS, ES, FS or GS by `selector`, apart from presence.
    pub(crate) fn loadable(self, selector: u16, cpl: u8) -> bool {
        let access = self.access();
        let readable = self.system_type().is_none() && (!self.is_code() || access & Segment::WRITABLE != 0);
        let conforming = self.is_code() && access & Segment::DOWN != 0;
        let dpl = (access >> 5 & 3) as u8;
        readable && (conforming || ((selector & 3) as u8 <= dpl && cpl <= dpl))
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
            avx: if self.cr4 & cr4::OSXSAVE == 0 || self.xcr0 & 6 != 6 || !self.protected() {
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
        let bad = Fault::with_code(vector::GP, u32::from(selector & !3) | external);
        let at = self.descriptor_half(u64::from(selector & !7), selector).ok_or(bad)?;
        Ok(Descriptor(self.load_system(at)?))
    }

    /// Linear address of the 8 bytes at `at` in the table that a selector is of; `None`: they are not inside.
    pub(crate) fn descriptor_half(&self, at: u64, selector: u16) -> Option<u64> {
        let (base, limit) = self.table_of(selector);
        (at + 7 <= limit).then(|| self.wrap(base.wrapping_add(at)))
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
            if self.virtual_8086() {
                self.segments[index] = virtual_8086(selector);
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
            if !d.loadable(selector, self.cpl) {
                return Err(Fault::with_code(vector::GP, u32::from(selector & !3)));
            }
            if !d.present() {
                return Err(Fault::with_code(vector::NP, u32::from(selector & !3)));
            }
            self.mark_accessed(selector, &d);
            d.segment(selector)
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
        if within(s, offset, size) { Ok(linear) } else { bad }
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

    /// The bits of RSP that count with a stack segment; `to64`: in 64-bit mode.
    fn stack_width(ss: &Segment, to64: bool) -> u64 {
        match ss.access & Segment::BIG {
            _ if to64 => u64::MAX,
            0 => 0xffff,
            _ => 0xffff_ffff,
        }
    }

    /// Sets the stack pointer as far as it counts with a stack segment.
    pub(crate) fn set_sp_of(&mut self, ss: &Segment, to64: bool, sp: u64) {
        self.gpr[4] = match Self::stack_width(ss, to64) {
            0xffff => self.gpr[4] & !0xffff | sp & 0xffff,
            mask => sp & mask,
        };
    }

    /// Pushes values of `size` bytes below `sp` of a stack that a transfer switches to, with the privilege `cpl` that
    /// it goes to; where the stack pointer is then. `overflow` is the fault of a stack without room.
    pub(crate) fn push_frame(
        &mut self,
        cpl: u8,
        ss: &Segment,
        mut sp: u64,
        size: u64,
        values: &[u64],
        overflow: Fault,
    ) -> Exec<u64> {
        const SS: u8 = VcpuState::SS as u8;
        let long = self.long_mode();
        let mask = Self::stack_width(ss, long);
        self.with_privilege(cpl, |cpu| {
            for &v in values {
                sp = sp.wrapping_sub(size) & mask;
                if !long && !within(ss, sp, size) {
                    return Err(overflow);
                }
                let linear = if long { sp } else { ss.base.wrapping_add(sp) & 0xffff_ffff };
                match size {
                    2 => cpu.store_in(linear, v as u16, SS)?,
                    4 => cpu.store_in(linear, v as u32, SS)?,
                    _ => cpu.store_in(linear, v, SS)?,
                }
            }
            Ok(sp)
        })
    }
}
