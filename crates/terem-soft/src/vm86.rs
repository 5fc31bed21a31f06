//! Virtual-8086 mode: who may touch IF, with and without the virtual-mode extensions
//! (Intel SDM vol. 3, chapter "8086 Emulation"; AMD APM vol. 2, 8.10 "Virtual Interrupts").
//!
//! Below IOPL 3 the instructions that see or change IF fault, so that a monitor can do their work. CR4.VME lets VIF
//! stand in for IF instead, and a bitmap in the TSS says which `int n` goes to the program's own interrupt vector
//! table. CR4.PVI does the same for `cli` and `sti` of protected-mode code at privilege 3.

use terem_cpu::{VcpuState, rflags};

use crate::cpu::{Cpu, cr0, cr4};
use crate::fault::{Exec, Fault};
use crate::op::Op;

/// Offset of the I/O map's base in a 32-bit TSS; the redirection bitmap's 32 bytes lie before the map.
const IO_MAP_BASE: u64 = 0x66;

/// Where an instruction finds the interrupt flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InterruptFlag {
    /// In IF.
    Real,
    /// In VIF.
    Virtual,
    /// It may not look.
    Denied,
}

impl Cpu {
    /// The I/O privilege level.
    #[inline]
    pub(crate) fn iopl(&self) -> u8 {
        ((self.system_flags & rflags::IOPL) >> 12) as u8
    }

    /// Whether virtual-8086 mode is on.
    #[inline]
    pub(crate) fn virtual_8086(&self) -> bool {
        self.system_flags & rflags::VM != 0
    }

    /// What `cli` and `sti` work on.
    pub(crate) fn interrupt_flag(&self) -> InterruptFlag {
        if self.cr0 & cr0::PE == 0 || self.cpl <= self.iopl() {
            return InterruptFlag::Real;
        }
        let extension = if self.virtual_8086() { cr4::VME } else { cr4::PVI };
        if self.cpl == 3 && self.cr4 & extension != 0 {
            InterruptFlag::Virtual
        } else {
            InterruptFlag::Denied
        }
    }

    /// What `pushf`, `popf` and `iret` with an operand of `size` bytes work on in virtual-8086 mode.
    pub(crate) fn interrupt_flag_on_stack(&self, size: u64) -> InterruptFlag {
        match self.interrupt_flag() {
            InterruptFlag::Virtual if size > 2 => InterruptFlag::Denied,
            flag => flag,
        }
    }

    /// The flags as VIF shows them on the stack: IF is VIF, IOPL is 3.
    fn virtual_image(&self) -> u64 {
        let flags = self.rflags() & !rflags::IF | rflags::IOPL;
        if flags & rflags::VIF != 0 { flags | rflags::IF } else { flags }
    }

    /// What `pushf` of `size` bytes pushes: RFLAGS without RF and VM (Intel SDM vol. 2, PUSHF).
    ///
    /// # Errors
    /// `#GP(0)` in virtual-8086 mode without the right to.
    pub(crate) fn flags_to_push(&self, size: u64) -> Exec<u64> {
        let flags = self.rflags() & !(rflags::RF | rflags::VM);
        if !self.virtual_8086() {
            return Ok(flags);
        }
        match self.interrupt_flag_on_stack(size) {
            InterruptFlag::Real => Ok(flags),
            InterruptFlag::Virtual => Ok(self.virtual_image()),
            InterruptFlag::Denied => Err(Fault::GP0),
        }
    }

    /// Loads the flags as `popf` with an operand of `size` bytes does: what the privilege does not allow
    /// stays as it was, silently (Intel SDM vol. 2, POPF).
    ///
    /// # Errors
    /// `#GP(0)` in virtual-8086 mode without the right to.
    pub(crate) fn flags_popped(&mut self, value: u64, size: u64) -> Exec {
        let vm = self.virtual_8086();
        if vm && self.interrupt_flag_on_stack(size) != InterruptFlag::Real {
            return self.virtual_flags_popped(value, size);
        }
        let mut may = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
        let mut kept = self.rflags();
        if size > 2 {
            may |= rflags::AC | rflags::ID;
            kept &= !rflags::RF;
            if !vm {
                kept &= !(rflags::VIF | rflags::VIP);
            }
        }
        if self.cpl == 0 {
            may |= rflags::IOPL;
        }
        if self.cpl <= self.iopl() {
            may |= rflags::IF;
        }
        self.set_rflags(kept & !may | value & may);
        Ok(())
    }

    /// Flags from the stack where VIF stands in for IF: also the end of `iret` in virtual-8086 mode.
    pub(crate) fn virtual_flags_popped(&mut self, value: u64, size: u64) -> Exec {
        let denied = self.interrupt_flag_on_stack(size) == InterruptFlag::Denied;
        let pending = value & rflags::IF != 0 && self.system_flags & rflags::VIP != 0;
        if denied || pending || value & rflags::TF != 0 {
            return Err(Fault::GP0);
        }
        let may = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
        let vif = if value & rflags::IF != 0 { rflags::VIF } else { 0 };
        self.set_rflags(self.rflags() & !(may | rflags::VIF) | value & may | vif);
        Ok(())
    }

    /// `int n` in virtual-8086 mode, as far as it does not go through the IDT; false: it does.
    ///
    /// # Errors
    /// `#GP(0)` where the monitor has to do it.
    pub(crate) fn software_interrupt_8086(&mut self, op: &Op, vector: u8) -> Exec<bool> {
        if self.cr4 & cr4::VME != 0 && !self.redirected(vector)? {
            self.through_vectors(op, vector)?;
            return Ok(true);
        }
        if self.iopl() == 3 { Ok(false) } else { Err(Fault::GP0) }
    }

    /// Whether the TSS' bitmap sends `int vector` to the protected-mode handler.
    fn redirected(&mut self, vector: u8) -> Exec<bool> {
        let inside = |cpu: &Self, at: u64| cpu.tr.kind() & 9 == 9 && at <= u64::from(cpu.tr.limit);
        if !inside(self, IO_MAP_BASE + 1) {
            return Err(Fault::GP0);
        }
        let map: u16 = self.load_system(self.tr.base.wrapping_add(IO_MAP_BASE))?;
        let at = u64::from(map).wrapping_sub(32).wrapping_add(u64::from(vector / 8));
        if !inside(self, at) {
            return Err(Fault::GP0);
        }
        let bits: u8 = self.load_system(self.tr.base.wrapping_add(at))?;
        Ok(bits >> (vector % 8) & 1 != 0)
    }

    /// Goes to the handler that the interrupt vector table at linear address 0 names, as an 8086 does.
    fn through_vectors(&mut self, op: &Op, vector: u8) -> Exec {
        let entry: u32 = self.load_system(u64::from(vector) * 4)?;
        let real = self.iopl() == 3;
        let flags = if real { self.rflags() } else { self.virtual_image() };
        let back = [flags, u64::from(self.segments[VcpuState::CS].selector), self.next_rip(op)];
        self.stack_push(op, 2, &back)?;
        self.segments[VcpuState::CS] = crate::segment::virtual_8086((entry >> 16) as u16);
        self.rip = u64::from(entry & 0xffff);
        let cleared = rflags::TF | if real { rflags::IF } else { rflags::VIF };
        self.set_rflags(self.rflags() & !cleared);
        self.refresh_mode();
        Ok(())
    }
}
