//! What a debugger wants of a vCPU, and what it is told when one stops for it.
//!
//! Nothing of it is part of the architecture: a guest cannot see it, a reset does not change it, a saved state
//! does not hold it. The guest's own debug registers are in [`crate::VcpuState::debug`].

/// Which accesses a [`Watchpoint`] stops at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchKind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Both.
    Access,
}

/// A range of linear addresses whose accesses stop the vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watchpoint {
    /// The first linear address.
    pub address: u64,
    /// Bytes: 1 to [`Watchpoint::LONGEST`].
    pub length: u8,
    /// Which accesses count.
    pub kind: WatchKind,
}

impl Watchpoint {
    /// The longest range, in bytes.
    pub const LONGEST: u8 = 8;
}

/// All that a debugger wants of one vCPU. The default is nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DebugControl {
    /// Linear addresses; the vCPU stops before it executes an instruction that begins at one.
    pub breakpoints: Vec<u64>,
    /// Data accesses after which the vCPU stops.
    pub watchpoints: Vec<Watchpoint>,
    /// It stops after one instruction. Interrupts wait meanwhile, unless the vCPU is halted.
    pub step: bool,
    /// A breakpoint where the vCPU stands now counts only from the second time on: it has been told of already.
    pub pass: bool,
}

/// Why a vCPU stopped for its debugger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugEvent {
    /// It is about to execute the instruction at this linear address, which has a breakpoint. Without
    /// [`DebugControl::pass`] it does not get past it.
    Breakpoint(u64),
    /// The instruction before RIP made such an access.
    Watchpoint(Watchpoint),
    /// It executed one instruction, or began to handle an exception or interrupt.
    Step,
}
