//! Telling what the vCPU does to somebody who wants to read it ([`terem_cpu::Trace`]).
//!
//! [`Cpu::tracing`] is there only if somebody does. Without it the interpreter looks at one pointer a block and
//! translated code at nothing. A trace of instructions has all code interpreted; the others let it be translated, since
//! exits and events are done by Rust code anyway.

use terem_cpu::{
    Exit, InstructionBytes, Interruption, InterruptionKind, Trace, TraceEvent, TraceKind, VcpuState,
};

use crate::block::Block;
use crate::cpu::Cpu;
use crate::decode::CodeSize;
use crate::fault::{Fault, Kind, vector};
use crate::op::Op;

/// A trace that is going on.
#[derive(Debug)]
pub(crate) struct Tracing {
    trace: Trace,
    /// RIP of the instruction that is executed.
    rip: u64,
}

impl Tracing {
    pub(crate) fn new(trace: Trace) -> Box<Self> {
        Box::new(Self { trace, rip: 0 })
    }
}

impl Cpu {
    /// Whether each instruction is told, so that none may be translated.
    #[inline(always)]
    pub(crate) fn traces_instructions(&self) -> bool {
        self.tracing.as_ref().is_some_and(|t| t.trace.instructions)
    }

    /// The interpreter begins an instruction of `block`.
    pub(crate) fn trace_op(&mut self, block: &Block, op: &Op) {
        let rip = self.wrap_rip(self.op_rip(op));
        let bytes = self.traces_instructions().then(|| self.instruction(block, op, rip));
        let Some(tracing) = &mut self.tracing else { return };
        tracing.rip = rip;
        if let Some(bytes) = bytes {
            self.tell(TraceKind::Instruction(bytes), rip);
        }
    }

    fn instruction(&self, block: &Block, op: &Op, rip: u64) -> InstructionBytes {
        let linear = self.segment_base[VcpuState::CS].wrapping_add(rip);
        let mut bytes = [0; 15];
        let len = if self.bytes_of_op(block, op, linear, &mut bytes) { op.len } else { 0 };
        let bits = match self.mode.code {
            CodeSize::Code16 => 16,
            CodeSize::Code32 => 32,
            CodeSize::Code64 => 64,
        };
        InstructionBytes { bytes, len, bits }
    }

    /// Translated code has an instruction done by its handler.
    #[inline(always)]
    pub(crate) fn trace_handler(&mut self, op: &Op) {
        let rip = self.op_rip(op);
        if let Some(tracing) = &mut self.tracing {
            tracing.rip = rip;
        }
    }

    /// An exception or interrupt is on its way; `rip` is of the instruction that it comes from, or comes before.
    pub(crate) fn trace_event(&self, fault: Fault, rip: u64) {
        if self.tracing.as_ref().is_none_or(|t| !t.trace.interrupts) {
            return;
        }
        let interruption = Interruption {
            kind: match fault.kind {
                Kind::Fault | Kind::Trap => InterruptionKind::Exception,
                Kind::Software => InterruptionKind::Software,
                Kind::External => InterruptionKind::External,
            },
            vector: fault.vector,
            error: fault.has_code.then_some(fault.code),
            address: (fault.vector == vector::PF && fault.kind == Kind::Fault).then_some(self.cr2),
        };
        self.tell(TraceKind::Interruption(interruption), rip);
    }

    /// A port or a memory-mapped register was accessed.
    #[inline(always)]
    pub(crate) fn trace_exit(&self, exit: impl FnOnce() -> Exit) {
        if let Some(tracing) = &self.tracing
            && tracing.trace.exits
        {
            let exit = exit();
            let mask = if exit.size >= 8 { u64::MAX } else { (1 << (exit.size * 8)) - 1 };
            self.tell(TraceKind::Exit(Exit { value: exit.value & mask, ..exit }), tracing.rip);
        }
    }

    #[cold]
    fn tell(&self, kind: TraceKind, rip: u64) {
        if let Some(tracing) = &self.tracing {
            let selector = self.segments[VcpuState::CS].selector;
            tracing.trace.sink.event(self.id, TraceEvent { selector, rip, kind });
        }
    }
}
