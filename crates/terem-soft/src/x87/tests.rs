use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic};

use crate::sse::oracle::{Oracle, Random, encodings};

fn all() -> Vec<Vec<u8>> {
    let ours = |insn: &Instruction| {
        let first = insn.op_code().op_code();
        matches!(first, 0xd8..=0xdf | 0xd8c0..=0xdfff)
            && insn.op_code().table() == iced_x86::OpCodeTableKind::Normal
    };
    encodings(&[&[], &[0x66]], &[&[]], ours)
}

fn decoded(bytes: &[u8]) -> Instruction {
    Decoder::new(64, bytes, DecoderOptions::NONE).decode()
}

#[test]
fn every_instruction_has_a_handler() {
    let oracle = Oracle::new();
    let missing: Vec<Code> =
        all().iter().map(|b| (decoded(b), b)).filter(|(i, b)| !oracle.has(i, b)).map(|(i, _)| i.code()).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

fn against_host(count: u32, seed: u64) {
    let mut oracle = Oracle::new();
    let mut random = Random(seed);
    let mut failures: Vec<(Code, String)> = Vec::new();
    let mut cases = 0_u64;
    for bytes in all() {
        let insn = decoded(&bytes);
        // Environments hold the pointers to the last instruction, which processors keep as they like.
        if matches!(insn.mnemonic(), Mnemonic::Fnstenv | Mnemonic::Fnsave) {
            continue;
        }
        for _ in 0..count {
            let state = random.state();
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
    against_host(4, 0x1234_5678_9abc_def1);
}

#[test]
#[ignore = "minutes: for changes to this module"]
fn instructions_do_what_the_host_does_at_length() {
    for seed in 1..=20 {
        against_host(100, seed * 0x9e37_79b9_7f4a_7c15);
    }
}
