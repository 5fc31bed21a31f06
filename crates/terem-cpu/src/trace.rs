//! What a vCPU tells of what it does, for people who want to read it.

use std::fmt;
use std::sync::Arc;

/// What is told, and to whom.
#[derive(Clone)]
pub struct Trace {
    /// Each instruction, before it is executed.
    pub instructions: bool,
    /// Each exception and interrupt that is delivered.
    pub interrupts: bool,
    /// Each access to a port or a memory-mapped register, after it.
    pub exits: bool,
    /// Who is told.
    pub sink: Arc<dyn TraceSink>,
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { instructions, interrupts, exits, sink: _ } = self;
        f.debug_struct("Trace")
            .field("instructions", instructions)
            .field("interrupts", interrupts)
            .field("exits", exits)
            .finish_non_exhaustive()
    }
}

/// Takes what vCPUs tell.
pub trait TraceSink: Send + Sync {
    /// Called on the vCPU's thread, which waits for it.
    fn event(&self, vcpu: u32, event: TraceEvent);
}

/// Something that a vCPU did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceEvent {
    /// The code segment's selector.
    pub selector: u16,
    /// RIP of the instruction that did it, or, for an interrupt, of the one that would have come next.
    pub rip: u64,
    /// What it was.
    pub kind: TraceKind,
}

/// What a vCPU did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceKind {
    /// It began to execute this instruction.
    Instruction(InstructionBytes),
    /// It delivered an exception or an interrupt.
    Interruption(Interruption),
    /// It accessed a port or a memory-mapped register.
    Exit(Exit),
}

/// The bytes of an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstructionBytes {
    /// The bytes; [`Self::len`] of them count.
    pub bytes: [u8; 15],
    /// How many. 0 where they cannot be read, outside RAM.
    pub len: u8,
    /// Default operand and address size of its code: 16, 32 or 64.
    pub bits: u8,
}

/// How an event of [`Interruption`] came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InterruptionKind {
    /// By an instruction's failing, or a debug trap.
    Exception,
    /// By `int`, `int3`, `into` or `int1`.
    Software,
    /// From outside: an interrupt or an NMI.
    External,
}

/// An exception or an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interruption {
    /// How it came about.
    pub kind: InterruptionKind,
    /// Its vector.
    pub vector: u8,
    /// Its error code, where it has one.
    pub error: Option<u32>,
    /// CR2, of a page fault.
    pub address: Option<u64>,
}

/// An access that left the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// A port, or else a memory-mapped register.
    pub port: bool,
    /// The port or the guest-physical address.
    pub address: u64,
    /// Bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// Written, or else read.
    pub write: bool,
    /// What was written or read.
    pub value: u64,
}
