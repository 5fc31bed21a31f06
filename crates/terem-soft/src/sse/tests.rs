use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic};

use super::oracle::{Oracle, Random, encodings, has_immediate};

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
        &[], &[0x66], &[0xf3], &[0xf2], &[0x48], &[0x66, 0x48], &[0xf3, 0x48], &[0xf2, 0x48], &[0x45],
        &[0x44], &[0x66, 0x44],        &[0x66, 0x45], &[0xf3, 0x4d], &[0xf2, 0x4d],
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
fn against_host(count: u32, seed: u64) {
    let mut oracle = Oracle::new();
    let mut random = Random(seed);
    let mut failures: Vec<(Code, String)> = Vec::new();
    let mut cases = 0_u64;
    for mut bytes in all() {
        let insn = decoded(&bytes);
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
    against_host(1, 0x1234_5678_9abc_def1);
}

#[test]
#[ignore = "minutes: for changes to this module"]
fn instructions_do_what_the_host_does_at_length() {
    for seed in 1..=20 {
        against_host(30, seed * 0x9e37_79b9_7f4a_7c15);
    }
}

#[test]
#[ignore = "bench"]
fn bench() {
    let mut o = Oracle::new();
    let mut random = Random(5);
    let mut state = random.state();
    state.fx = super::oracle::State::new().fx;
    state.fx[4] = 0xf0;
    for bytes in [&[0x0f_u8, 0xfe, 0xc1][..], &[0x66, 0x0f, 0xfe, 0xc1], &[0x66, 0x0f, 0xfe, 0x07], &[0xf2, 0x0f, 0x59, 0xc1], &[0xf2, 0x0f, 0x58, 0x07], &[0x66, 0x0f, 0x70, 0xc1, 0x1b],
        &[0xd8, 0xc1], &[0xdc, 0x07], &[0xd9, 0xc9], &[0xdd, 0x17]] {
        o.bench(bytes, &state);
    }
}
