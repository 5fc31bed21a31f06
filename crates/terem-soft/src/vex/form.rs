//! Forms of instructions, and the host code that executes each.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use iced_x86::{Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::memory::StubMemory;

/// Operands that an instruction has, at most (immediates apart).
pub(super) const OPERANDS: usize = 4;
/// The longest stub: an instruction and `ret`.
const STUB: usize = 16;

/// Where a register operand comes from and goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operand {
    /// None, an immediate or memory.
    Other,
    Vector,
    General,
}

/// A memory operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) size: usize,
    pub(super) read: bool,
    pub(super) write: bool,
    /// It must lie at a multiple of its size.
    pub(super) aligned: bool,
}

/// Registers that are not operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Implicit {
    No,
    /// XMM0 is a source.
    SourceXmm0,
    /// The result is in XMM0.
    ResultXmm0,
    /// The result is in ECX.
    ResultEcx,
}

/// Elements of a result that may be tiny.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Floats {
    Whole,
    /// This many from the lowest on, of 2, 4 and 8 bytes.
    Half(usize),
    Single(usize),
    Double(usize),
}

/// What an instruction does, registers apart, and how.
#[derive(Debug)]
pub(super) struct Form {
    /// The stub's address.
    pub(super) code: u64,
    pub(super) operands: [Operand; OPERANDS],
    /// Operands that are written (a bit each).
    pub(super) written: u8,
    pub(super) memory: Option<Memory>,
    pub(super) implicit: Implicit,
    /// It works on vectors, so that it may be under MXCSR.
    pub(super) vectors: bool,
    pub(super) result: Floats,
    /// The width of its elements and the number of its 128-bit lanes if it is a dot product, whose steps raise
    /// exceptions one after the other.
    pub(super) dot_product: Option<(u32, usize)>,
    /// Its immediate.
    pub(super) immediate: u8,
}

/// All forms that guests have had so far, by the bytes of their stubs.
struct Forms {
    memory: StubMemory,
    known: HashMap<[u8; STUB], &'static Form>,
    encoder: Encoder,
    info: InstructionInfoFactory,
}

/// `None` where the host gives no executable memory.
fn forms() -> Option<&'static Mutex<Forms>> {
    static FORMS: OnceLock<Option<Mutex<Forms>>> = OnceLock::new();
    let new = || {
        let memory = StubMemory::new()
            .inspect_err(|e| tracing::warn!("no memory for vector instructions ({e}): there is no AVX"))
            .ok()?;
        let (known, encoder, info) = (HashMap::new(), Encoder::new(64), InstructionInfoFactory::new());
        Some(Mutex::new(Forms { memory, known, encoder, info }))
    };
    FORMS.get_or_init(new).as_ref()
}

/// Whether this host can execute such instructions: it has AVX, and memory for stubs.
pub(crate) fn available() -> bool {
    is_x86_feature_detected!("avx") && forms().is_some()
}

/// The form of an instruction; `None` if there is no such thing as its stub.
pub(super) fn of(insn: &Instruction) -> Option<&'static Form> {
    let stub = by_place(insn)?;
    let mut forms = forms()?.lock().unwrap_or_else(PoisonError::into_inner);
    let code = forms.encode(&stub)?;
    if let Some(known) = forms.known.get(&code) {
        return Some(known);
    }
    let at = forms.memory.add(&code)?;
    let form: &'static Form = Box::leak(Box::new(describe(insn, at, &mut forms.info)));
    forms.known.insert(code, form);
    Some(form)
}

impl Forms {
    fn encode(&mut self, stub: &Instruction) -> Option<[u8; STUB]> {
        let done = self.encoder.encode(stub, 0);
        let mut bytes = self.encoder.take_buffer();
        let mut code = [0xcc; STUB];
        let fits = done.is_ok() && bytes.len() < STUB;
        if fits {
            code[..bytes.len()].copy_from_slice(&bytes);
            code[bytes.len()] = 0xc3;
        }
        bytes.clear();
        self.encoder.set_buffer(bytes);
        fits.then_some(code)
    }
}

/// The instruction with its operands in the host registers of their places, and without prefixes.
fn by_place(insn: &Instruction) -> Option<Instruction> {
    let mut stub = *insn;
    stub.set_segment_prefix(Register::None);
    stub.set_has_lock_prefix(false);
    stub.set_has_rep_prefix(false);
    stub.set_has_repne_prefix(false);
    for n in 0..insn.op_count() {
        match insn.op_kind(n) {
            OpKind::Register => {
                let r = insn.op_register(n);
                let first = match r {
                    _ if r.is_xmm() => Register::XMM1,
                    _ if r.is_ymm() => Register::YMM1,
                    _ if r.is_gpr32() && n < 3 => Register::R8D,
                    _ if r.is_gpr64() && n < 3 => Register::R8,
                    _ => return None,
                };
                stub.set_op_register(n, first + n);
            }
            OpKind::Memory => {
                stub.set_memory_base(Register::RDI);
                stub.set_memory_index(Register::None);
                stub.set_memory_index_scale(1);
                stub.set_memory_displacement64(0);
                stub.set_memory_displ_size(0);
            }
            OpKind::Immediate8 => {}
            _ => return None,
        }
    }
    Some(stub)
}

fn describe(insn: &Instruction, code: u64, info: &mut InstructionInfoFactory) -> Form {
    let used = info.info(insn);
    let writes = |a: OpAccess| !matches!(a, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
    let (mut operands, mut written) = ([Operand::Other; OPERANDS], 0);
    let mut memory = None;
    for n in 0..insn.op_count().min(OPERANDS as u32) {
        let access = used.op_access(n);
        match insn.op_kind(n) {
            OpKind::Register => {
                let general = insn.op_register(n).is_gpr();
                operands[n as usize] = if general { Operand::General } else { Operand::Vector };
                written |= u8::from(writes(access)) << n;
            }
            OpKind::Memory => {
                memory = Some(Memory {
                    size: insn.memory_size().size(),
                    read: access != OpAccess::Write,
                    write: writes(access),
                    aligned: must_align(insn),
                });
            }
            _ => {}
        }
    }
    let name = format!("{:?}", insn.mnemonic()).to_lowercase();
    Form {
        code,
        operands,
        written,
        memory,
        implicit: implicit(insn.mnemonic()),
        vectors: !super::on_general(insn),
        result: floats(&name),
        dot_product: match insn.mnemonic() {
            Mnemonic::Vdpps => Some((32, if insn.op0_register().is_ymm() { 2 } else { 1 })),
            Mnemonic::Vdppd => Some((64, 1)),
            _ => None,
        },
        immediate: insn.immediate8(),
    }
}

fn implicit(mnemonic: Mnemonic) -> Implicit {
    match mnemonic {
        Mnemonic::Sha256rnds2 => Implicit::SourceXmm0,
        Mnemonic::Vpcmpistrm | Mnemonic::Vpcmpestrm | Mnemonic::Vpcmpestrm64 => Implicit::ResultXmm0,
        Mnemonic::Vpcmpistri | Mnemonic::Vpcmpestri | Mnemonic::Vpcmpestri64 => Implicit::ResultEcx,
        _ => Implicit::No,
    }
}

/// Only these moves, and what has no VEX, must be aligned (Intel SDM vol. 1, 14.9).
pub(crate) fn must_align(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let legacy = insn.cpuid_features().contains(&iced_x86::CpuidFeature::SHA);
    legacy
        || matches!(
            insn.mnemonic(),
            M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
        )
}

/// What the result of an instruction of this name consists of, if it can be tiny. Zeros, which are not, may be counted
/// in; comparisons, minima, roundings and roots give nothing tiny that they did not get.
fn floats(name: &str) -> Floats {
    const ARITHMETIC: [&str; 14] = [
        "vadd",
        "vsub",
        "vmul",
        "vdiv",
        "vhadd",
        "vhsub",
        "vfmadd",
        "vfmsub",
        "vfnmadd",
        "vfnmsub",
        "vdpp",
        "vcvtpd2ps",
        "vcvtsd2ss",
        "vcvtps2ph",
    ];
    if !ARITHMETIC.iter().any(|start| name.starts_with(start)) {
        return Floats::Whole;
    }
    match &name[name.len() - 2..] {
        "ps" => Floats::Single(8),
        "pd" => Floats::Double(4),
        "ss" => Floats::Single(1),
        "sd" => Floats::Double(1),
        "ph" => Floats::Half(8),
        _ => Floats::Whole,
    }
}
