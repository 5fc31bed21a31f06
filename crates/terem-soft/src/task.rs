//! Hardware task switches (Intel SDM vol. 3, chapter "Task Management").
//!
//! A switch has two halves. Up to the point where the new task's registers are there, everything is checked and read
//! in the old task, and what is wrong faults there with nothing changed. From then on a fault is the new task's: it is
//! kept in [`Cpu::deferred`] and raised before the new task's first instruction.

use terem_cpu::{Segment, VcpuState, rflags};

use crate::cpu::{Cpu, cr0};
use crate::fault::{Exec, Fault, Kind, vector};
use crate::mmu::Access;
use crate::segment::{Descriptor, null, virtual_8086};
use crate::watch::{dr6, dr7};

/// What brings a task switch about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// A far jump: the old task is left for good.
    Jump,
    /// A far call, or an interrupt or exception through a task gate: the new task is nested in the old one.
    Call,
    /// `iret` with NT set: back to the task that this one is nested in.
    Return,
}

/// How a task-state segment is laid out.
struct Layout {
    /// Bytes of a general register.
    word: u64,
    /// Offsets of EIP (EFLAGS and the general registers follow), of ES (the other segment registers follow, each in a
    /// `word`), of the LDT selector; how many segment registers there are.
    ip: u64,
    es: u64,
    ldt: u64,
    segments: u64,
    /// The lowest limit that has all of it.
    limit: u32,
}

const LAYOUT_16: Layout = Layout { word: 2, ip: 0x0e, es: 0x22, ldt: 0x2a, segments: 4, limit: 0x2b };
const LAYOUT_32: Layout = Layout { word: 4, ip: 0x20, es: 0x48, ldt: 0x60, segments: 6, limit: 0x67 };
/// Offsets in the 32-bit one only.
const CR3: u64 = 0x1c;
const TRAP: u64 = 0x64;

fn layout(tss: &Segment) -> &'static Layout {
    if tss.kind() & 8 != 0 { &LAYOUT_32 } else { &LAYOUT_16 }
}

/// A task's registers as its task-state segment has them.
struct Image {
    cr3: Option<u32>,
    rip: u64,
    flags: u64,
    gpr: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Cpu {
    /// Goes to the task of the TSS `selector`. `rip` and `flags` are kept of the old task; `code` is the error code of
    /// an exception, pushed in the new one; `external` is ORed into error codes.
    pub(crate) fn switch_task(
        &mut self,
        selector: u16,
        cause: Cause,
        (rip, flags): (u64, u64),
        code: Option<u32>,
        external: u32,
    ) -> Exec {
        let new = self.task_segment(selector, cause, external)?;
        let old = self.tr;
        self.task_memory(&old, &new)?;
        if cause != Cause::Call {
            self.set_busy(old.selector, false)?;
        }
        let nested = if cause == Cause::Return { flags & !rflags::NT } else { flags };
        self.save_task(&old, rip, nested)?;
        if cause == Cause::Call {
            self.store_system(new.base, old.selector)?;
        }
        let mut image = self.read_task(&new)?;
        if cause == Cause::Call {
            image.flags |= rflags::NT;
        }
        if cause != Cause::Return {
            self.set_busy(selector, true)?;
        }
        self.tr = Segment { access: new.access | 2, ..new };
        self.enter_task(&image, code, external);
        Ok(())
    }

    /// The segment of a TSS that may be switched to.
    fn task_segment(&mut self, selector: u16, cause: Cause, external: u32) -> Exec<Segment> {
        let error = |v| Fault::with_code(v, u32::from(selector & !3) | external);
        let returns = cause == Cause::Return;
        let bad = error(if returns { vector::TS } else { vector::GP });
        if null(selector) || selector & 4 != 0 {
            return Err(bad);
        }
        let d =
            self.descriptor(selector, external).map_err(|f| if f.vector == vector::GP { bad } else { f })?;
        let types: [u8; 2] = if returns { [3, 11] } else { [1, 9] };
        if !d.system_type().is_some_and(|t| types.contains(&t)) {
            return Err(bad);
        }
        if !d.present() {
            return Err(error(vector::NP));
        }
        let tss = d.segment(selector);
        if tss.limit < layout(&tss).limit {
            return Err(error(vector::TS));
        }
        Ok(tss)
    }

    /// Faults now where one of the places that a switch reads or writes cannot be.
    fn task_memory(&mut self, old: &Segment, new: &Segment) -> Exec {
        let descriptor = |cpu: &Self, s: &Segment| cpu.gdtr.base.wrapping_add(u64::from(s.selector & !7) + 5);
        let last = |s: &Segment| s.base.wrapping_add(u64::from(layout(s).limit));
        for (at, access) in [
            (old.base, Access::Write),
            (last(old), Access::Write),
            (new.base, Access::Write),
            (last(new), Access::Read),
            (descriptor(self, old), Access::Write),
            (descriptor(self, new), Access::Write),
        ] {
            self.translate_system(self.wrap(at), access)?;
        }
        Ok(())
    }

    /// Sets or clears the busy bit of a TSS descriptor in memory.
    fn set_busy(&mut self, selector: u16, busy: bool) -> Exec {
        let at = self.gdtr.base.wrapping_add(u64::from(selector & !7) + 5);
        let access: u8 = self.load_system(at)?;
        self.store_system(at, if busy { access | 2 } else { access & !2 })
    }

    fn save_task(&mut self, tss: &Segment, rip: u64, flags: u64) -> Exec {
        let l = layout(tss);
        let registers = self.gpr;
        for (i, value) in [rip, flags].iter().chain(&registers[..8]).enumerate() {
            let at = tss.base.wrapping_add(l.ip + i as u64 * l.word);
            if l.word == 4 {
                self.store_system(at, *value as u32)?;
            } else {
                self.store_system(at, *value as u16)?;
            }
        }
        for i in 0..l.segments {
            let selector = self.segments[i as usize].selector;
            self.store_system(tss.base.wrapping_add(l.es + i * l.word), selector)?;
        }
        Ok(())
    }

    fn read_task(&mut self, tss: &Segment) -> Exec<Image> {
        let l = layout(tss);
        let wide = l.word == 4;
        let mut words = [0; 10];
        for (i, value) in words.iter_mut().enumerate() {
            let at = tss.base.wrapping_add(l.ip + i as u64 * l.word);
            *value = if wide {
                u64::from(self.load_system::<u32>(at)?)
            } else {
                u64::from(self.load_system::<u16>(at)?)
            };
        }
        let [rip, flags, gpr @ ..] = words;
        let mut selectors = [0; 6];
        for i in 0..l.segments {
            selectors[i as usize] = self.load_system(tss.base.wrapping_add(l.es + i * l.word))?;
        }
        Ok(Image {
            cr3: if wide { Some(self.load_system(tss.base.wrapping_add(CR3))?) } else { None },
            rip,
            flags,
            gpr,
            selectors,
            ldt: self.load_system(tss.base.wrapping_add(l.ldt))?,
            trap: wide && self.load_system::<u8>(tss.base.wrapping_add(TRAP))? & 1 != 0,
        })
    }

    /// Loads a task's registers. What is wrong from here on is the new task's.
    fn enter_task(&mut self, image: &Image, code: Option<u32>, external: u32) {
        self.cr0 |= cr0::TS;
        if let Some(cr3) = image.cr3
            && self.cr0 & cr0::PG != 0
        {
            self.cr3 = u64::from(cr3);
            self.switch_context(false);
        }
        self.gpr[..8].copy_from_slice(&image.gpr);
        self.rip = image.rip;
        self.debug[dr7::INDEX] &= !dr7::LOCAL;
        self.refresh_watches();
        for (s, &selector) in self.segments.iter_mut().zip(&image.selectors) {
            *s = Segment { selector, access: Segment::UNUSABLE, ..Segment::default() };
        }
        self.ldtr = Segment { selector: image.ldt, access: Segment::UNUSABLE, ..Segment::default() };
        let vm = image.flags & rflags::VM != 0;
        self.cpl = if vm { 3 } else { (image.selectors[VcpuState::CS] & 3) as u8 };
        self.set_rflags(image.flags);
        self.interrupt_shadow = false;
        let entered = self.task_segments(image, vm, external).and_then(|()| match code {
            Some(code) => self.push_error_code(code, external),
            None => Ok(()),
        });
        self.refresh_mode();
        self.settle_resume_flag();
        self.deferred = match entered {
            Err(fault) => Some(fault),
            Ok(()) if image.trap => {
                self.debug[dr6::INDEX] |= dr6::BT;
                Some(Fault { kind: Kind::Trap, vector: vector::DB, has_code: false, code: 0 })
            }
            Ok(()) => None,
        };
        self.apic.look_again();
    }

    /// Loads LDTR and the segment registers (SDM vol. 3, table 7-1).
    fn task_segments(&mut self, image: &Image, vm: bool, external: u32) -> Exec {
        if !null(image.ldt) {
            let d = if image.ldt & 4 != 0 { None } else { Some(self.task_descriptor(image.ldt, external)?) };
            let ldt = d.filter(|d| d.system_type() == Some(2) && d.present());
            let bad = Fault::with_code(vector::TS, u32::from(image.ldt & !3) | external);
            self.ldtr = ldt.ok_or(bad)?.segment(image.ldt);
        }
        if vm {
            for (s, &selector) in self.segments.iter_mut().zip(&image.selectors) {
                *s = virtual_8086(selector);
            }
        } else {
            self.task_code(image.selectors[VcpuState::CS], external)?;
            self.task_stack(image.selectors[VcpuState::SS], external)?;
            for i in [VcpuState::DS, VcpuState::ES, VcpuState::FS, VcpuState::GS] {
                self.task_data(i, image.selectors[i], external)?;
            }
        }
        self.refresh_mode();
        if self.rip > u64::from(self.segments[VcpuState::CS].limit) {
            return Err(Fault::with_code(vector::GP, external));
        }
        Ok(())
    }

    /// A descriptor of the new task; one that is not there is `#TS`.
    fn task_descriptor(&mut self, selector: u16, external: u32) -> Exec<Descriptor> {
        let bad = Fault::with_code(vector::TS, u32::from(selector & !3) | external);
        if null(selector) {
            return Err(bad);
        }
        self.descriptor(selector, external).map_err(|f| if f.vector == vector::GP { bad } else { f })
    }

    fn task_code(&mut self, selector: u16, external: u32) -> Exec {
        let error = |v| Err(Fault::with_code(v, u32::from(selector & !3) | external));
        let d = self.task_descriptor(selector, external)?;
        let s = d.segment(selector);
        let conforming = s.access & Segment::DOWN != 0;
        let allowed = if conforming { s.dpl() <= self.cpl } else { s.dpl() == self.cpl };
        if !d.is_code() || !allowed {
            return error(vector::TS);
        }
        if !d.present() {
            return error(vector::NP);
        }
        self.mark_accessed(selector, &d);
        self.segments[VcpuState::CS] = s;
        Ok(())
    }

    fn task_stack(&mut self, selector: u16, external: u32) -> Exec {
        let error = |v| Err(Fault::with_code(v, u32::from(selector & !3) | external));
        let d = self.task_descriptor(selector, external)?;
        let s = d.segment(selector);
        if (selector & 3) as u8 != self.cpl || s.dpl() != self.cpl || !d.is_writable_data() {
            return error(vector::TS);
        }
        if !d.present() {
            return error(vector::SS);
        }
        self.mark_accessed(selector, &d);
        self.segments[VcpuState::SS] = s;
        Ok(())
    }

    fn task_data(&mut self, index: usize, selector: u16, external: u32) -> Exec {
        if null(selector) {
            return Ok(());
        }
        let error = |v| Err(Fault::with_code(v, u32::from(selector & !3) | external));
        let d = self.task_descriptor(selector, external)?;
        if !d.loadable(selector, self.cpl) {
            return error(vector::TS);
        }
        if !d.present() {
            return error(vector::NP);
        }
        self.mark_accessed(selector, &d);
        self.segments[index] = d.segment(selector);
        Ok(())
    }

    /// Pushes an exception's error code on the stack of the task that handles it, as wide as its TSS is.
    fn push_error_code(&mut self, code: u32, external: u32) -> Exec {
        let (cpl, ss) = (self.cpl, self.segments[VcpuState::SS]);
        let overflow = Fault::with_code(vector::SS, external);
        let size = layout(&self.tr).word;
        let sp = self.push_frame(cpl, &ss, self.gpr[4], size, &[u64::from(code)], overflow)?;
        self.set_sp_of(&ss, false, sp);
        Ok(())
    }
}
