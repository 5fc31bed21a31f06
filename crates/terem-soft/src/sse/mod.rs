//! MMX, SSE to SSE4.2, AES and PCLMULQDQ: the host's own instructions on the guest's values, so that
//! results are the hardware's bit for bit. A guest gets only what the host has
//! ([`supported_features`]).
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
use terem_cpu::FEATURES;
use terem_cpu::FeatureSet;

use crate::decode::Mode;
use crate::op::{Handler, Op};

pub(crate) use float::{MXCSR_DEFAULT, MXCSR_MASK, dot_product_exceptions};
pub(crate) use moves::{ldmxcsr, masked_store, stmxcsr};

/// The features that the interpreter can give to a guest on this host: all but the vector extensions that
/// the host's processor lacks.
#[must_use]
pub fn supported_features() -> FeatureSet {
    let vex = crate::vex::available();
    let lacking = [
        ("sse3", is_x86_feature_detected!("sse3")),
        ("ssse3", is_x86_feature_detected!("ssse3")),
        ("sse4.1", is_x86_feature_detected!("sse4.1")),
        ("sse4.2", is_x86_feature_detected!("sse4.2")),
        ("aes", is_x86_feature_detected!("aes")),
        ("pclmulqdq", is_x86_feature_detected!("pclmulqdq")),
        ("avx", vex),
        ("avx2", vex && is_x86_feature_detected!("avx2")),
        ("fma", vex && is_x86_feature_detected!("fma")),
        ("f16c", vex && is_x86_feature_detected!("f16c")),
        ("bmi1", vex && is_x86_feature_detected!("bmi1")),
        ("bmi2", vex && is_x86_feature_detected!("bmi2")),
        ("adx", vex && is_x86_feature_detected!("adx")),
        ("sha-ni", vex && is_x86_feature_detected!("sha")),
        ("vaes", vex && is_x86_feature_detected!("vaes")),
        ("vpclmulqdq", vex && is_x86_feature_detected!("vpclmulqdq")),
    ];
    let mut set = FeatureSet::default();
    for feature in FEATURES {
        set.set(feature, !lacking.contains(&(feature.name, false)));
    }
    set
}

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
