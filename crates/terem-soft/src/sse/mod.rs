//! MMX, SSE to SSE4.2, AES and PCLMULQDQ: the host's own instructions on the guest's values, so that
//! results are the hardware's bit for bit. A guest gets only what the host has
//! ([`crate::supported_features`]).
//!
//! Tables in the files below have a line for each instruction; `vector.rs` says where operands come from.

mod float;
mod integer;
mod mmx;
mod moves;
mod strings;
mod vector;

#[cfg(test)]
pub(crate) mod oracle;
#[cfg(test)]
mod tests;

use iced_x86::Instruction;

use crate::decode::Mode;
use crate::op::{Handler, Op};

pub(crate) use float::{MXCSR_DEFAULT, MXCSR_MASK, dot_product_exceptions};
pub(crate) use moves::{ldmxcsr, masked_store, stmxcsr};

/// The handler of a vector instruction.
pub(crate) fn handler(insn: &Instruction, _: Mode, _: &mut Op) -> Option<Handler> {
    // movsd and cmpsd are names of string instructions as well.
    if insn.is_string_instruction() {
        return None;
    }
    mmx::handler(insn)
        .or_else(|| moves::handler(insn))
        .or_else(|| integer::handler(insn))
        .or_else(|| float::handler(insn))
        .or_else(|| strings::handler(insn))
}
