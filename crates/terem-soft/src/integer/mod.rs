//! General instructions: handlers for each form and width, chosen once at decode time.

mod alu;
mod bits;
mod branch;
mod condition;
mod decimal;
mod exchange;
mod flags;
mod frames;
mod hints;
mod moves;
mod multiply;
mod operand;
mod strings;
#[cfg(test)]
mod tests;
mod width;

use iced_x86::Instruction;

use crate::decode::Mode;
use crate::op::{Handler, Op};

/// The handler of a general instruction; `op` gets its registers in the form that the handler takes them.
pub(crate) fn handler(insn: &Instruction, _: Mode, op: &mut Op) -> Option<Handler> {
    moves::handler(insn, op)
        .or_else(|| alu::handler(insn, op))
        .or_else(|| condition::handler(insn, op))
        .or_else(|| branch::handler(insn, op))
        .or_else(|| frames::handler(insn, op))
        .or_else(|| bits::handler(insn, op))
        .or_else(|| multiply::handler(insn, op))
        .or_else(|| exchange::handler(insn, op))
        .or_else(|| strings::handler(insn, op))
        .or_else(|| flags::handler(insn))
        .or_else(|| decimal::handler(insn, op))
        .or_else(|| hints::handler(insn, op))
}
