//! How a machine's run ends.

use std::fmt;

use serde::Serialize;
use terem_cpu::VcpuState;

/// Why [`crate::Machine::run`] returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched the power off.
    PoweredOff,
    /// The guest's kernel reported a panic.
    Panicked,
    /// The guest wrote this value to the debug exit port.
    DebugExit(u32),
    /// The guest reset the machine, which was to end then.
    Reset,
    /// A processor shut down, which would reset the machine, and the machine was to end then.
    TripleFault(Box<TripleFault>),
    /// Somebody outside ended it.
    Stopped,
    /// The machine cannot go on; the text says why.
    Failed(String),
}

/// Where a processor was when it shut down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TripleFault {
    /// The processor.
    pub vcpu: u32,
    /// Its state.
    pub state: VcpuState,
}

impl fmt::Display for TripleFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
            "r14", "r15",
        ];
        let s = &self.state;
        let cs = s.segments[VcpuState::CS];
        writeln!(
            f,
            "vCPU {} at {:04x}:{:016x} (base {:x}), rflags {:08x}",
            self.vcpu, cs.selector, s.rip, cs.base, s.rflags
        )?;
        for (i, (name, value)) in NAMES.iter().zip(s.gpr).enumerate() {
            write!(f, "{name:>4} {value:016x}{}", if i % 4 == 3 { "\n" } else { "" })?;
        }
        writeln!(
            f,
            " cr0 {:08x} cr2 {:016x} cr3 {:016x} cr4 {:08x} efer {:x}",
            s.cr0, s.cr2, s.cr3, s.cr4, s.msrs.efer
        )?;
        write!(f, " gdt {:016x}+{:x} idt {:016x}+{:x}", s.gdtr.base, s.gdtr.limit, s.idtr.base, s.idtr.limit)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest switched itself off"),
            Self::Panicked => f.write_str("the guest's kernel panicked"),
            Self::DebugExit(value) => write!(f, "the guest ended with debug exit value {value}"),
            Self::Reset => f.write_str("the guest reset the machine"),
            Self::TripleFault(fault) => write!(f, "the guest's processor shut down (triple fault)\n{fault}"),
            Self::Stopped => f.write_str("the machine was stopped"),
            Self::Failed(why) => write!(f, "the machine cannot go on: {why}"),
        }
    }
}

impl Serialize for Outcome {
    /// The variant's name, in kebab case.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Self::PoweredOff => "powered-off",
            Self::Panicked => "panicked",
            Self::DebugExit(_) => "debug-exit",
            Self::Reset => "reset",
            Self::TripleFault(_) => "triple-fault",
            Self::Stopped => "stopped",
            Self::Failed(_) => "failed",
        })
    }
}
