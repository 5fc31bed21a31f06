use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic};

use super::oracle::{Oracle, Random, State, encodings, has_immediate};

fn features(insn: &Instruction, of: &[CpuidFeature]) -> bool {
    insn.cpuid_features().iter().any(|f| of.contains(f))
}

/// What this module executes, but for instructions that are somebody else's: hints, fences, `crc32`.
fn ours(insn: &Instruction) -> bool {
    use CpuidFeature as F;
    let of = [F::SSE, F::SSE2, F::SSE3, F::SSSE3, F::SSE4_1, F::SSE4_2, F::AES, F::PCLMULQDQ, F::MMX];
    let general = matches!(
        insn.mnemonic(),
        Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Sfence
            | Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Pause
            | Mnemonic::Crc32
            | Mnemonic::Monitor
            | Mnemonic::Mwait
            | Mnemonic::Fisttp
    );
    features(insn, &of) && !general && insn.mnemonic() != Mnemonic::INVALID
}

fn all() -> Vec<Vec<u8>> {
    let prefixes: [&[u8]; 14] = [
        &[],
        &[0x66],
        &[0xf3],
        &[0xf2],
        &[0x48],
        &[0x66, 0x48],
        &[0xf3, 0x48],
        &[0xf2, 0x48],
        &[0x45],
        &[0x44],
        &[0x66, 0x44],
        &[0x66, 0x45],
        &[0xf3, 0x4d],
        &[0xf2, 0x4d],
    ];
    encodings(&prefixes, &[&[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]], ours)
}

fn decoded(bytes: &[u8]) -> Instruction {
    Decoder::new(64, bytes, DecoderOptions::NONE).decode()
}

#[test]
fn every_instruction_has_a_handler() {
    let oracle = Oracle::new();
    let mut missing: Vec<Code> = Vec::new();
    for bytes in all() {
        let insn = decoded(&bytes);
        if !oracle.has(&insn, &bytes) && !missing.contains(&insn.code()) {
            missing.push(insn.code());
        }
    }
    assert!(missing.is_empty(), "{missing:?}");
}

/// Runs `count` random cases of each encoding; fails with the first difference of each instruction.
fn against_host(count: u32, seed: u64, which: fn(&Instruction) -> bool) {
    let mut oracle = Oracle::new();
    let mut random = Random(seed);
    let mut failures: Vec<(Code, String)> = Vec::new();
    let mut cases = 0_u64;
    for mut bytes in all() {
        let insn = decoded(&bytes);
        if !which(&insn) {
            continue;
        }
        for _ in 0..count {
            let mut state = random.state();
            if has_immediate(&insn) {
                let last = bytes.len() - 1;
                bytes[last] = random.next() as u8;
            }
            if insn.mnemonic() == Mnemonic::Ldmxcsr {
                // Bit 17 exists on some hosts.
                let at = state.gpr[7] as usize;
                state.buffer[at + 2] &= !2;
                if random.below(2) == 0 {
                    state.buffer[at + 2..at + 4].fill(0);
                }
            }
            // With unmasked overflow or underflow, PE says whether the result would be exact if exponents had
            // no bounds, which is not known after the fact.
            state.loose_mxcsr = state.mxcsr() & 0xc00 != 0xc00;
            cases += 1;
            if let Err(text) = oracle.compare(&bytes, &state)
                && !failures.iter().any(|(code, _)| *code == insn.code())
            {
                failures.push((insn.code(), text));
            }
        }
    }
    let texts: Vec<_> = failures.into_iter().map(|(_, t)| t).collect();
    assert!(texts.is_empty(), "{} instructions of {cases} cases:\n{}", texts.len(), texts.join("\n"));
}

#[test]
fn instructions_do_what_the_host_does() {
    against_host(1, 0x1234_5678_9abc_def1, |_| true);
}

#[test]
fn dot_products_raise_exceptions_step_by_step() {
    against_host(50, 99, |i| matches!(i.mnemonic(), Mnemonic::Dppd | Mnemonic::Dpps));
}

#[test]
#[ignore = "minutes: for changes to this module"]
fn instructions_do_what_the_host_does_at_length() {
    for seed in 1..=20 {
        against_host(30, 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed), |_| true);
    }
}

/// One line: instruction on XMM0 and XMM1, MXCSR, both low halves, the exception, MXCSR after and XMM0 after.
type Line = (&'static [u8], u32, u64, u64, u64, u32, u64);

const ADDSD: &[u8] = &[0xf2, 0x0f, 0x58, 0xc1];
const MULSD: &[u8] = &[0xf2, 0x0f, 0x59, 0xc1];
const DIVSD: &[u8] = &[0xf2, 0x0f, 0x5e, 0xc1];
const ONE: u64 = 0x3ff0_0000_0000_0000;
const SNAN: u64 = 0x7ff0_0000_0000_0001;
const QNAN: u64 = 0x7ff8_0000_0000_0001;
const TINY: u64 = 1;
const MIN: u64 = 0x0010_0000_0000_0000;
const HALF: u64 = 0x3fe0_0000_0000_0000;
const MAX: u64 = 0x7fef_ffff_ffff_ffff;
const INFINITY: u64 = 0x7ff0_0000_0000_0000;
const NONE: u64 = 0xff;
const XM: u64 = 19;

/// Intel SDM vol. 1, 11.5.2: conditions, masked responses, and what is left alone when not masked.
const EXCEPTIONS: &[Line] = &[
    // Invalid: a signalling NaN becomes quiet; not masked, the destination stays.
    (ADDSD, 0x1f80, ONE, SNAN, NONE, 0x1f81, QNAN),
    (ADDSD, 0x1f00, ONE, SNAN, XM, 0x1f01, ONE),
    // The first operand's NaN is the result; a quiet one raises nothing.
    (ADDSD, 0x1f80, QNAN + 4, QNAN, NONE, 0x1f80, QNAN + 4),
    // Zero by zero: the default NaN.
    (DIVSD, 0x1f80, 0, 0, NONE, 0x1f81, 0xfff8_0000_0000_0000),
    // Denormal operand; as zero with DAZ.
    (ADDSD, 0x1f80, TINY, 0, NONE, 0x1f82, TINY),
    (ADDSD, 0x1e80, TINY, 0, XM, 0x1e82, TINY),
    (ADDSD, 0x1fc0, TINY, 0, NONE, 0x1fc0, 0),
    // Divide by zero.
    (DIVSD, 0x1f80, ONE, 0, NONE, 0x1f84, INFINITY),
    (DIVSD, 0x1d80, ONE, 0, XM, 0x1d84, ONE),
    // Overflow comes with precision, and goes by the rounding mode (towards zero: the largest number).
    (MULSD, 0x1f80, MAX, MAX, NONE, 0x1fa8, INFINITY),
    (MULSD, 0x7f80, MAX, MAX, NONE, 0x7fa8, MAX),
    (MULSD, 0x1b80, MAX, MAX, XM, 0x1ba8, MAX),
    // An exact denormal result is no underflow while that is masked, and one when it is not.
    (MULSD, 0x1f80, MIN, HALF, NONE, 0x1f80, MIN >> 1),
    (MULSD, 0x1780, MIN, HALF, XM, 0x1790, MIN),
    // Flushed to zero: underflow and precision. Without the mask there is no flushing.
    (MULSD, 0x9f80, MIN, HALF, NONE, 0x9fb0, 0),
    (MULSD, 0x9780, MIN, HALF, XM, 0x9790, MIN),
    // Precision.
    (DIVSD, 0x1f80, ONE, 0x4008_0000_0000_0000, NONE, 0x1fa0, 0x3fd5_5555_5555_5555),
    (DIVSD, 0x0f80, ONE, 0x4008_0000_0000_0000, XM, 0x0fa0, ONE),
    // What is unmasked before computing hides what would come after: no precision flag.
    (DIVSD, 0x1c80, TINY, 0x4008_0000_0000_0000, XM, 0x1c82, TINY),
];

#[test]
fn exceptions_are_as_the_manual_says() {
    let mut oracle = Oracle::new();
    for &(bytes, mxcsr, a, b, vector, after, result) in EXCEPTIONS {
        let mut state = State::new();
        state.set_fx(24, &mxcsr.to_le_bytes());
        state.set_fx(160, &a.to_le_bytes());
        state.set_fx(176, &b.to_le_bytes());
        let got = oracle.interpreted(bytes, &state);
        let low = u64::from_le_bytes(got.fx[160..168].try_into().unwrap());
        let line = format!("{bytes:02x?} {mxcsr:#x} {a:#x} {b:#x}");
        assert_eq!((got.vector, got.mxcsr(), low), (vector, after, result), "{line}");
    }
}

#[test]
fn aligned_accesses_fault_and_others_do_not() {
    let mut oracle = Oracle::new();
    let cases: [(&[u8], u64); 8] = [
        (&[0x0f, 0x28, 0x07], 13),                  // movaps xmm0, [rdi]
        (&[0x0f, 0x29, 0x07], 13),                  // movaps [rdi], xmm0
        (&[0x66, 0x0f, 0xe7, 0x07], 13),            // movntdq
        (&[0x66, 0x0f, 0xfe, 0x07], 13),            // paddd
        (&[0x0f, 0x10, 0x07], NONE),                // movups
        (&[0xf2, 0x0f, 0xf0, 0x07], NONE),          // lddqu
        (&[0xf2, 0x0f, 0x58, 0x07], NONE),          // addsd
        (&[0x66, 0x0f, 0x3a, 0x63, 0x07, 0], NONE), // pcmpistri
    ];
    for (bytes, vector) in cases {
        let mut state = State::new();
        state.gpr[7] = 65;
        let got = oracle.interpreted(bytes, &state);
        assert_eq!(got.vector, vector, "{bytes:02x?}");
        assert_eq!(got.buffer, state.buffer, "{bytes:02x?}");
        state.gpr[7] = 64;
        assert_eq!(oracle.interpreted(bytes, &state).vector, NONE, "{bytes:02x?}");
    }
}

#[test]
fn flags_gather_over_instructions_that_run_directly() {
    let mut oracle = Oracle::new();
    let cpu = oracle.cpu_after(&[ADDSD, DIVSD, MULSD], |cpu| {
        cpu.set_mxcsr(0x1f81);
        cpu.ymm[0].low.0 = ONE.into();
        cpu.ymm[1].low.0 = 0;
    });
    assert_eq!(cpu.ymm[0].low.0 as u64, 0xfff8_0000_0000_0000, "1 + 0, / 0, * 0");
    assert_eq!(cpu.guest_mxcsr(), 0x1f85);
    cpu.take_mxcsr();
    assert_eq!((cpu.mxcsr, cpu.mxcsr_on_host), (0x1f85, false));
}
