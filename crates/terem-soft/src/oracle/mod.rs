//! The host's processor as the oracle: random instructions with random state run on it and in the
//! interpreter and in translated code, and everything that comes out is compared bit for bit: registers, flags, memory, x87, MMX
//! and SSE state, and faults with their error codes and addresses.
//!
//! ```text
//!   generate.rs ─ Case ─┬─> native.rs (child process, signals) ─ Outcome ─┐
//!                       ├─> guest.rs (decode, op.run) ───────── Outcome ─┼─> compare.rs
//!                       └─> guest.rs (translation) ──────────── Outcome ─┘
//! ```
//!
//! By default some 200,000 cases from a fixed seed run. For more:
//! `ORACLE_CASES=5000000 ORACLE_SEED=7 cargo test -p terem-soft --release oracle -- --nocapture`.
//! `ORACLE_ONLY=shl,rcr` keeps to instructions whose iced code has one of the words in its name (`^adc_`
//! at its beginning); `ORACLE_STRICT=1` compares undefined flags as well. A failure prints its seed:
//! `ORACLE_SEED=<that> ORACLE_CASES=1`, with the same `ORACLE_ONLY`, does it again.

mod case;
mod compare;
mod generate;
pub(crate) mod guest;
mod native;
mod testable;
mod xsave;

use std::collections::BTreeMap;

use case::{BATCH, Case, Outcome};
pub(crate) use case::{CODE, DATA};

/// Failures shown in full.
const SHOWN: usize = 12;

fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn number(name: &str, default: u64) -> u64 {
    setting(name).map_or(default, |v| {
        let hex = v.strip_prefix("0x").map(|h| u64::from_str_radix(h, 16));
        hex.unwrap_or_else(|| v.parse()).unwrap()
    })
}

fn wanted(name: &str) -> bool {
    let Some(words) = setting("ORACLE_ONLY") else { return true };
    words.split(',').any(|w| w.strip_prefix('^').map_or(name.contains(w), |w| name.starts_with(w)))
}

#[test]
fn random_instructions_do_as_on_the_host() {
    let mut native = native::Native::new();
    let mut guest = guest::Guest::new();
    let generator = generate::Generator::new(&guest.cpu.instruction_set, wanted);
    let (seed, cases) = (number("ORACLE_SEED", 1), number("ORACLE_CASES", 200_000));
    let strict = setting("ORACLE_STRICT").is_some();
    let (mut bad, mut shown, mut skipped, mut faults) = (BTreeMap::<String, u64>::new(), 0, 0_u64, 0_u64);
    let mut at = 0;
    while at < cases {
        let n = (cases - at).min(BATCH as u64);
        let batch: Vec<Case> = (0..n).map(|i| generator.case(seed.wrapping_add(at + i))).collect();
        let theirs = native.run(&batch);
        for (case, host) in batch.iter().zip(&theirs) {
            if host.vector == u32::MAX {
                skipped += 1;
                continue;
            }
            faults += u64::from(host.vector != case::END);
            let ours: Outcome = guest.run(case);
            let mut differences = compare::differences(case, host, &ours, strict);
            let mut name = compare::name(case);
            if compare::reads_undefined(case) {
                continue;
            }
            if differences.is_empty() {
                differences = compare::differences(case, host, &guest.run_translated(case), strict);
                name += " (translated)";
            }
            if differences.is_empty() {
                continue;
            }
            let seen = bad.entry(name.clone()).or_default();
            *seen += 1;
            if (*seen == 1 || name.starts_with('(')) && shown < number("ORACLE_SHOW", SHOWN as u64) {
                shown += 1;
                println!("{}", compare::report(case, &differences));
            }
        }
        at += n;
    }
    println!(
        "{cases} cases of {} forms: {} differ, {faults} faulted, {skipped} not run on the host",
        generator.forms(),
        bad.values().sum::<u64>()
    );
    for (name, count) in &bad {
        println!("{count:8} {name}");
    }
    assert!(bad.is_empty(), "the interpreter or the translator differs from the host");
    assert!(skipped < cases / 100 + 2, "too many cases killed the host's process");
}
