//! Programs of our own for the processor's system side (`guests/cpu`): each runs under QEMU's TCG and under terem, with
//! the translator on and off, and says the same.
//!
//! Where QEMU is known not to do what the manuals say, the line that they ask for stands in `NAME.manual`, with the place
//! and the reason in a comment before it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use terem_tests::{Guest, alone, succeed};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guests/cpu")
}

/// A line's name: what comes before its outcome.
fn name_of(line: &str) -> &str {
    line.find(": v=").or_else(|| line.find(": nothing")).map_or(line, |at| &line[..at])
}

/// The lines that the manuals ask for where QEMU says something else.
fn manual(program: &str) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(folder().join(format!("{program}.manual"))).unwrap_or_default();
    let lines = text.lines().filter(|l| !l.is_empty() && !l.starts_with('#'));
    lines.map(|l| (name_of(l).to_owned(), l.to_owned())).collect()
}

fn under_qemu(kernel: &Path) -> Vec<String> {
    let mut command = Command::new("timeout");
    // With `smm=off` its firmware leaves system management mode to the program; the processor has it all the same.
    let machine = ["-machine", "q35,smm=off", "-cpu", "max", "-m", "16"];
    command.args(["60", "qemu-system-x86_64", "-accel", "tcg"]).args(machine);
    command.args(["-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot", "-serial", "stdio"]);
    succeed(command.arg("-kernel").arg(kernel)).lines().map(str::to_owned).collect()
}

fn under_terem(kernel: &Path, accel: &str) -> Vec<String> {
    let kernel = kernel.display().to_string();
    let ended =
        Guest::start(["--kernel", &kernel, "--memory", "16M", "--net", "none", "--accel", accel]).finish();
    assert_eq!(ended.code, 0, "{}\n{}", ended.console, ended.errors);
    ended.console.lines().map(str::to_owned).collect()
}

/// Runs a program everywhere and compares line by line.
fn same_everywhere(program: &str) {
    let _one = alone();
    let work = tempfile::tempdir().unwrap();
    let kernel = work.path().join(program);
    let source = format!("{program}.asm");
    succeed(Command::new("nasm").current_dir(folder()).args(["-f", "bin", "-o"]).arg(&kernel).arg(source));
    let mut expected = under_qemu(&kernel);
    assert!(expected.len() > 20, "QEMU said only {expected:?}");
    for (name, right) in manual(program) {
        let line = expected.iter_mut().find(|l| name_of(l) == name);
        let line =
            line.unwrap_or_else(|| panic!("{program}.manual has a line for {name:?}, which QEMU has not"));
        assert_ne!(*line, right, "{program}.manual has a line that QEMU has right");
        *line = right;
    }
    for accel in ["soft", "soft,translate=off"] {
        let ours = under_terem(&kernel, accel);
        let wrong: Vec<String> = expected
            .iter()
            .zip(&ours)
            .filter(|(right, line)| right != line)
            .map(|(right, line)| format!("expected {right}\n     got {line}"))
            .collect();
        assert!(wrong.is_empty(), "{program} with {accel}:\n{}", wrong.join("\n"));
        assert_eq!(ours.len(), expected.len(), "{program} with {accel} ended early, or late");
    }
}

#[test]
fn real_mode() {
    same_everywhere("real");
}

#[test]
fn virtual_8086_mode() {
    same_everywhere("vm86");
}

#[test]
fn protected_mode_and_gates() {
    same_everywhere("gates");
}

#[test]
fn hardware_task_switches() {
    same_everywhere("tasks");
}

#[test]
fn long_mode_transfers() {
    same_everywhere("long");
}

#[test]
fn debug_registers_and_alignment() {
    same_everywhere("debug");
}

#[test]
fn system_management_mode() {
    same_everywhere("smm");
}
