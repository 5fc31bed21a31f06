use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic};

use super::state::AreaError;
use crate::sse::oracle::{Oracle, Random, State, encodings};

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
    let missing: Vec<Code> = all()
        .iter()
        .map(|b| (decoded(b), b))
        .filter(|(i, b)| !oracle.has(i, b))
        .map(|(i, _)| i.code())
        .collect();
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
        against_host(100, 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
    }
}

const CONTROL: u16 = 0x37f;
const ONE: u128 = 0x3fff_8000_0000_0000_0000;
const INDEFINITE: u128 = 0xffff_c000_0000_0000_0000;
const NONE: u64 = 0xff;

fn with(control: u16, status: u16, valid: u8, stack: &[u128]) -> State {
    let mut state = State::new();
    state.set_fx(0, &control.to_le_bytes());
    state.set_fx(2, &status.to_le_bytes());
    state.fx[4] = valid;
    for (i, v) in stack.iter().enumerate() {
        state.set_fx(32 + 16 * i, &v.to_le_bytes());
    }
    state.gpr[7] = 64;
    state
}

fn status(state: &State) -> u16 {
    u16::from_le_bytes([state.fx[2], state.fx[3]])
}

fn st0(state: &State) -> u128 {
    u128::from_le_bytes(state.fx[32..48].try_into().unwrap())
}

#[test]
fn stack_faults_give_the_indefinite_and_say_which_way() {
    let mut oracle = Oracle::new();
    // fld1 with a full stack: overflow, IE, SF and C1.
    let got = oracle.interpreted(&[0xd9, 0xe8], &with(CONTROL, 0, 0xff, &[ONE]));
    assert_eq!((status(&got), st0(&got)), (0x3a41, INDEFINITE));
    // fadd on an empty stack: underflow, IE and SF without C1; the result marks ST(0) valid.
    let got = oracle.interpreted(&[0xd8, 0xc1], &with(CONTROL, 0, 0, &[]));
    assert_eq!((status(&got), st0(&got), got.fx[4]), (0x0041, INDEFINITE, 1));
    // Not masked: nothing is pushed, ES and B are set.
    let got = oracle.interpreted(&[0xd9, 0xe8], &with(CONTROL & !1, 0, 0xff, &[ONE]));
    assert_eq!((status(&got), st0(&got), got.vector), (0x82c1, ONE, NONE));
}

#[test]
fn unmasked_exceptions_come_at_the_next_waiting_instruction() {
    let mut oracle = Oracle::new();
    // fdiv st, st(1) by zero with ZM clear: operands stay, ZE and ES are set, no fault yet.
    let first = oracle.interpreted(&[0xd8, 0xf1], &with(CONTROL & !4, 0, 3, &[ONE, 0]));
    assert_eq!((status(&first), st0(&first), first.vector), (0x8084, ONE, NONE));
    let waiting: [&[u8]; 4] = [&[0x9b], &[0xd9, 0xe8], &[0xdd, 0x17], &[0x0f, 0xfe, 0xc1]];
    for bytes in waiting {
        let got = oracle.interpreted(bytes, &first);
        assert_eq!((got.vector, status(&got)), (16, 0x8084), "{bytes:02x?}");
    }
    // fnstsw ax sees it, fnclex drops it.
    let got = oracle.interpreted(&[0xdf, 0xe0], &first);
    assert_eq!((got.vector, got.gpr[0]), (NONE, 0x8084));
    assert_eq!(status(&oracle.interpreted(&[0xdb, 0xe2], &first)), 0);
}

#[test]
fn an_unmasked_underflow_stores_nothing() {
    let mut oracle = Oracle::new();
    // fstp dword [rdi] of 2^-200.
    let tiny = (0x3fff - 200) << 64 | 1 << 63;
    let mut state = with(CONTROL & !0x10, 0, 1, &[tiny]);
    state.buffer[64..68].fill(0xaa);
    let got = oracle.interpreted(&[0xd9, 0x1f], &state);
    assert_eq!((status(&got), st0(&got), &got.buffer[64..68]), (0x8090, tiny, &[0xaa; 4][..]));
    let state = State { fx: with(CONTROL, 0, 1, &[tiny]).fx, ..state };
    let got = oracle.interpreted(&[0xd9, 0x1f], &state);
    assert_eq!((status(&got), &got.buffer[64..68]), (0x0830, &[0; 4][..]));
}

#[test]
fn environment_formats() {
    let mut oracle = Oracle::new();
    // Physical registers 6 and 7 hold 0 and 1: tags 01 and 00.
    let state = with(0x27f, 6 << 11, 0xc0, &[0, ONE]);
    let got = oracle.interpreted(&[0xd9, 0x37], &state);
    let word = |at: usize| u32::from_le_bytes(got.buffer[64 + at..68 + at].try_into().unwrap());
    assert_eq!([word(0), word(4), word(8)], [0xffff_027f, 0xffff_3000, 0xffff_1fff]);
    let got = oracle.interpreted(&[0x66, 0xd9, 0x37], &state);
    assert_eq!(got.buffer[64..70], [0x7f, 0x02, 0x00, 0x30, 0xff, 0x1f]);
    // What fnsave stores, frstor takes; fnsave leaves the unit as after fninit.
    let saved = oracle.interpreted(&[0xdd, 0x37], &state);
    assert_eq!((&saved.fx[..2], status(&saved), saved.fx[4]), (&[0x7f, 3][..], 0, 0));
    let again = oracle.interpreted(&[0xdd, 0x27], &saved);
    assert_eq!((&again.fx[..5], &again.fx[32..64]), (&state.fx[..5], &state.fx[32..64]));
}

#[test]
fn fxsave_and_xsave_areas() {
    let mut oracle = Oracle::new();
    let mut random = Random(77);
    for wide in [false, true] {
        let rex: &[u8] = if wide { &[0x48] } else { &[] };
        for (save, load) in [(0x07_u8, 0x0f_u8), (0x27, 0x2f), (0x37, 0x2f)] {
            let mut state = random.state();
            state.gpr[7] = 64;
            (state.gpr[0], state.gpr[2]) = (3, 0);
            // The header's reserved fields are software's to clear.
            state.buffer.fill(0);
            let map: &[u8] = &[0x0f, 0xae];
            let saved = oracle.interpreted(&[rex, map, &[save]].concat(), &state);
            assert_eq!(saved.vector, NONE);
            let changed = State { fx: random.state().fx, ..saved };
            let again = oracle.interpreted(&[rex, map, &[load]].concat(), &changed);
            assert_eq!(again.vector, NONE, "{save:x}");
            let fsw = u16::from_le_bytes([state.fx[2], state.fx[3]]) & !0x8080;
            assert_eq!(status(&again) & !0x8080, fsw);
            assert_eq!(again.fx[24..28], state.fx[24..28]);
            assert_eq!((&again.fx[..2], again.fx[4]), (&state.fx[..2], state.fx[4]));
            assert_eq!(again.fx[32..416], state.fx[32..416]);
        }
    }
}

#[test]
fn bad_areas_fault() {
    let mut oracle = Oracle::new();
    let mut state = State::new();
    (state.gpr[0], state.gpr[7]) = (3, 64);
    let (fxrstor, xrstor): (&[u8], &[u8]) = (&[0x0f, 0xae, 0x0f], &[0x0f, 0xae, 0x2f]);
    let clean = state.clone();
    assert_eq!(oracle.interpreted(xrstor, &clean).vector, NONE);
    // MXCSR's reserved bits, unknown components, a dirty header, wrong alignment.
    for (at, value) in [(64 + 26, 1), (64 + 512, 8), (64 + 520, 1), (64 + 535, 1)] {
        state.buffer = clean.buffer;
        state.buffer[at] = value;
        assert_eq!(oracle.interpreted(xrstor, &state).vector, 13, "{at}");
    }
    state.buffer = clean.buffer;
    state.buffer[64 + 26] = 1;
    assert_eq!(oracle.interpreted(fxrstor, &state).vector, 13);
    state.buffer = clean.buffer;
    for offset in [8, 16, 32] {
        state.gpr[7] = 64 + offset;
        assert_eq!(oracle.interpreted(xrstor, &state).vector, 13, "{offset}");
        assert_eq!(oracle.interpreted(fxrstor, &state).vector, if offset == 8 { 13 } else { NONE });
    }
}

#[test]
fn initial_components_are_neither_saved_nor_kept() {
    let mut oracle = Oracle::new();
    let mut state = State::new();
    (state.gpr[0], state.gpr[7]) = (3, 64);
    state.buffer.fill(0x55);
    // xsaveopt: both components are initial, so XSTATE_BV loses their bits and the area stays.
    let got = oracle.interpreted(&[0x0f, 0xae, 0x37], &state);
    assert_eq!(
        (got.buffer[64 + 512], &got.buffer[64 + 32..64 + 512]),
        (0x54, &state.buffer[64 + 32..64 + 512])
    );
    // xrstor with nothing present puts both into their initial configuration.
    let mut state = Random(9).state();
    (state.gpr[0], state.gpr[2], state.gpr[7]) = (3, 0, 64);
    state.buffer.fill(0);
    state.set_fx(24, &0x1f80_u32.to_le_bytes());
    state.set_fx(2, &[0, 0]);
    state.buffer[64 + 24..64 + 26].copy_from_slice(&[0x80, 0x1f]);
    let got = oracle.interpreted(&[0x0f, 0xae, 0x2f], &state);
    assert_eq!((&got.fx[..2], status(&got), got.fx[4]), (&[0x7f, 3][..], 0, 0));
    assert!(got.fx[32..416].iter().all(|&b| b == 0));
}

#[test]
fn saved_areas_are_checked() {
    let mut oracle = Oracle::new();
    let cpu = oracle.cpu_after(&[], |cpu| cpu.ymm[3].low.0 = 0x1234);
    let area = cpu.save_xsave();
    assert_eq!(area.len(), terem_cpu::XSAVE_SIZE);
    let bad = |at: usize, value: u8| {
        let mut area = area.clone();
        area[at] = value;
        area
    };
    assert_eq!(cpu.load_xsave(&area[..400]), Err(AreaError::Size(400)));
    assert_eq!(cpu.load_xsave(&bad(27, 1)), Err(AreaError::Mxcsr(0x0100_1f80)));
    assert_eq!(cpu.load_xsave(&bad(513, 1)), Err(AreaError::Components(0x103)));
    assert_eq!(cpu.ymm[3].low.0, 0x1234);
    cpu.ymm[3].low.0 = 0;
    cpu.load_xsave(&area).unwrap();
    assert_eq!(cpu.ymm[3].low.0, 0x1234);
}
