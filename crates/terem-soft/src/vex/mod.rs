//! AVX, AVX2, FMA, F16C, BMI1, BMI2, VAES, VPCLMULQDQ, which are encoded with VEX, and ADX and SHA, which are not.
//!
//! There are some 700 forms of these, most of them with a 128- and a 256-bit width, and what they compute is the
//! host's business: each is executed by the host's own instruction, which is made when a guest's code first has it.
//!
//! ```text
//!   guest:  vfmadd231ps ymm9, ymm2, [rbx + 8]          form.rs: registers by place, memory at [rdi]
//!   stub:   vfmadd231ps ymm1, ymm2, [rdi]; ret         one a form and immediate, kept for ever
//!
//!   run.rs: operands to a frame ──> host registers ──> stub ──> frame ──> destination
//!           memory operand to the frame's first bytes; MXCSR as in sse/float.rs
//! ```
//!
//! So an instruction's place in the tables is the disassembler's, and what is left to write by hand is what is not
//! plain computing: masked moves and gathers, which touch only the elements that are wanted (`elements.rs`).
//!
//! Operand *n* is in host register YMM*n* + 1 or R8 + *n*. Guest registers therefore make no difference to a stub, and
//! there are no more stubs than forms times immediates (256): what guests can make of them is bounded, and they are
//! shared by all vCPUs. Their memory is never writable where it is executed; a host that gives no such memory is one
//! that lacks these instructions ([`available`]).

mod elements;
mod form;
mod memory;
mod run;
#[cfg(test)]
mod tests;

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic};

use crate::cpu::{Cpu, Ymm};
use crate::decode::{CodeSize, Mode};
use crate::op::{Handler, Op};

pub(crate) use form::{available, must_align};

/// The features that are executed in this way, by their names in models. All need the host's AVX, since the frame
/// has YMM registers.
pub(crate) const FEATURES: [(&str, &[CpuidFeature]); 10] = {
    use CpuidFeature as F;
    [
        ("avx", &[F::AVX]),
        ("avx2", &[F::AVX2]),
        ("fma", &[F::FMA]),
        ("f16c", &[F::F16C]),
        ("bmi1", &[F::BMI1]),
        ("bmi2", &[F::BMI2]),
        ("adx", &[F::ADX]),
        ("sha-ni", &[F::SHA]),
        ("vaes", &[F::VAES]),
        ("vpclmulqdq", &[F::VPCLMULQDQ]),
    ]
};

/// Whether an instruction needs AVX state to be enabled.
pub(crate) fn uses_avx_state(insn: &Instruction) -> bool {
    is_vex(insn) && !on_general(insn)
}

/// Whether it is encoded with VEX.
pub(crate) fn is_vex(insn: &Instruction) -> bool {
    insn.code().encoding() == EncodingKind::VEX
}

/// Whether it is one of those (BMI1, BMI2, ADX) that work on general registers.
pub(crate) fn on_general(insn: &Instruction) -> bool {
    use CpuidFeature as F;
    insn.cpuid_features().iter().any(|f| matches!(f, F::BMI1 | F::BMI2 | F::ADX))
}

/// Whether it accesses memory, or all registers, in a way that a stub cannot.
pub(crate) fn by_hand(insn: &Instruction) -> bool {
    use Mnemonic as M;
    insn.is_vsib()
        || matches!(
            insn.mnemonic(),
            M::Vmaskmovps
                | M::Vmaskmovpd
                | M::Vpmaskmovd
                | M::Vpmaskmovq
                | M::Vmaskmovdqu
                | M::Vldmxcsr
                | M::Vstmxcsr
                | M::Vzeroall
                | M::Vzeroupper
        )
}

/// The handler of an instruction of this kind; the model is known to have it.
pub(crate) fn handler(insn: &Instruction, mode: Mode, op: &mut Op) -> Option<Handler> {
    let vex = is_vex(insn);
    let legacy = insn.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::SHA | CpuidFeature::ADX));
    if !vex && !legacy {
        return None;
    }
    if by_hand(insn) {
        return elements::handler(insn, op);
    }
    let form = form::of(insn)?;
    let number = |n: u32| match insn.op_count() {
        count if n < count && insn.op_kind(n) == iced_x86::OpKind::Register => {
            insn.op_register(n).number() as u8
        }
        _ => 0,
    };
    (op.reg, op.rm) = (number(0), number(1));
    op.extra = u16::from(number(2)) | u16::from(number(3)) << 4;
    op.imm = std::ptr::from_ref(form) as u64;
    // VEX is not there in real and virtual-8086 mode; what needs AVX state is known not to be.
    Some(if vex && mode.code == CodeSize::Code16 { run::in_protected_mode } else { run::run })
}

impl Cpu {
    /// Sets YMM register `n` (0–15).
    #[inline]
    pub(crate) fn set_ymm(&mut self, n: u8, value: Ymm) {
        self.uppers |= value.high.0 != 0;
        self.ymm[usize::from(n & 15)] = value;
    }
}
