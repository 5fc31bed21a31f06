//! System instructions: control registers, descriptor tables, segments, interrupts, far transfers,
//! `syscall` and `sysenter`, MSRs, CPUID, ports, and everything privileged.

mod control;
mod monitor;
mod msr;
mod ports;
mod segments;
mod transfer;

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::decode::Mode;
use crate::fault::{Exec, Fault};
use crate::op::{Handler, Op};

/// Chooses the handler of a system instruction.
pub(crate) fn handler(insn: &Instruction, mode: Mode, op: &mut Op) -> Option<Handler> {
    if insn.mnemonic() == Mnemonic::Rsm {
        return Some(crate::smm::rsm);
    }
    control::handler(insn, mode, op)
        .or_else(|| monitor::handler(insn, op))
        .or_else(|| segments::handler(insn, mode, op))
        .or_else(|| transfer::handler(insn, mode, op))
        .or_else(|| msr::handler(insn))
        .or_else(|| ports::handler(insn, mode, op))
}

pub(crate) use monitor::Monitored;

impl Cpu {
    /// `#GP(0)` unless at privilege 0.
    #[inline]
    pub(crate) fn privileged(&self) -> Exec {
        if self.cpl == 0 { Ok(()) } else { Err(Fault::GP0) }
    }

    /// `#GP(0)` under UMIP outside privilege 0.
    fn not_under_umip(&self) -> Exec {
        if self.cr4 & crate::cpu::cr4::UMIP != 0 && self.cpl != 0 { Err(Fault::GP0) } else { Ok(()) }
    }

    /// Writes a general register as an operand of `bytes`.
    pub(crate) fn set_gpr(&mut self, index: u8, bytes: u64, value: u64) {
        let r = &mut self.gpr[usize::from(index & 15)];
        *r = match bytes {
            2 => *r & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }
}
