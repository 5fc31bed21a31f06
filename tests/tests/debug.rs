//! Seeing into a running Linux: gdb, traces, counters (docs/debugging.md).

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::Value;
use terem_tests::{Guest, PATIENCE, alone, succeed, terem};

/// The number that the guest's shell says is the address of a kernel function.
fn address(guest: &mut Guest, name: &str) -> u64 {
    guest.type_in(&format!("grep -w {name} /proc/kallsyms; echo found-$((40+2))\n"));
    let text = guest.wait_for("found-42");
    let line = text.lines().find(|l| l.ends_with(&format!(" T {name}"))).unwrap_or_else(|| panic!("{text}"));
    u64::from_str_radix(line.split(' ').next().unwrap(), 16).unwrap()
}

/// gdb, with what it prints line by line.
struct Gdb {
    child: std::process::Child,
    lines: Receiver<String>,
    seen: String,
}

impl Gdb {
    fn start(target: &str, commands: &[String]) -> Self {
        let mut command = Command::new("gdb");
        command.args(["-nx", "-batch", "-ex", "set pagination off", "-ex", "set confirm off"]);
        command.arg("-ex").arg(format!("target remote {target}"));
        for c in commands {
            command.args(["-ex", c]);
        }
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let (sender, lines) = channel();
        let out = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { child, lines, seen: String::new() }
    }

    fn wait_for(&mut self, text: &str) {
        while !self.seen.contains(text) {
            let line = self.lines.recv_timeout(PATIENCE);
            self.seen += &line.unwrap_or_else(|e| panic!("no {text:?} ({e}):\n{}", self.seen));
            self.seen += "\n";
        }
    }

    fn end(mut self) -> String {
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.seen += &line;
            self.seen += "\n";
        }
        assert!(self.child.wait().unwrap().success(), "{}", self.seen);
        self.seen
    }
}

#[test]
fn gdb_stops_two_vcpus_in_a_system_call_and_lets_them_go() {
    let _one = alone();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("gdb").display().to_string();
    let gdb_flag = format!("unix:{socket}");
    let more = ["--memory", "256M", "--cpus", "2", "--net", "none", "--gdb", &gdb_flag];
    let mut guest = Guest::minimal("6.12", "shell", "nokaslr", &more);
    guest.wait_for("/ #");
    let at = address(&mut guest, "__x64_sys_sethostname");
    let mut gdb = Gdb::start(
        &socket,
        &[
            "info threads".into(),
            format!("break *{at:#x}"),
            "printf \"ready\\n\"".into(),
            "continue".into(),
            "printf \"hit %lx in ring %d, efer %lx\\n\", $rip, $cs & 3, $efer & 0x500".into(),
            // The system call's argument: the user's registers are behind RDI, its pages are this process'.
            "printf \"name %s\\n\", *(char**)($rdi+112)".into(),
            "delete".into(),
            // What it returns is written to the user's RAX there.
            "watch -l *(long*)($rdi+80)".into(),
            "continue".into(),
            "stepi".into(),
            "info threads".into(),
            "delete".into(),
            "detach".into(),
        ],
    );
    gdb.wait_for("ready");
    guest.type_in("hostname gdb-$((6*7))\n");
    let text = gdb.end();
    for wanted in [
        "vCPU 0 [",
        "vCPU 1 [",
        &format!("hit {at:x} in ring 0, efer 500"),
        "name gdb-42",
        "New value = 0",
        "[Inferior 1 (process 1) detached]",
    ] {
        assert!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
    guest.type_in("hostname; cat /proc/uptime; nproc; poweroff -f\n");
    let ended = guest.finish();
    ended.assert_clean(0);
    assert!(ended.console.contains("\ngdb-42\n"), "{}", ended.console);
    assert!(!ended.console.contains("stall") && !ended.console.contains("lockup"), "{}", ended.console);
}

#[test]
fn counters_of_a_running_guest_are_told_without_stopping_it() {
    let _one = alone();
    let name = format!("stat-{}", std::process::id());
    let mut guest = Guest::minimal(
        "6.12",
        "shell",
        "",
        &["--memory", "256M", "--cpus", "2", "--net", "none", "--name", &name],
    );
    guest.wait_for("/ #");
    let stat = |more: &[&str]| -> Value {
        let text = succeed(Command::new(terem()).args(["stat", &name, "--json"]).args(more));
        serde_json::from_str(&text).unwrap()
    };
    let first = stat(&[]);
    for key in ["blocks_translated", "code_bytes", "page_walks", "interrupts", "exceptions", "port_accesses"]
    {
        assert!(first["vcpus"][0][key].as_u64().unwrap() > 0, "{key}: {first}");
    }
    // A guest that waits for its terminal sleeps.
    std::thread::sleep(Duration::from_millis(300));
    let second = stat(&["--interval", "1"]);
    let halted = second["per_second"][1]["halted_ns"].as_f64().unwrap();
    assert!(halted > 3e8, "{second}");
    assert!(second["interval_ns"].as_u64().unwrap() > 900_000_000, "{second}");
    assert!(second["time_ns"].as_u64() > first["time_ns"].as_u64());
    let table = succeed(Command::new(terem()).args(["stat", &name]));
    assert!(table.contains("page walks") && table.contains("vCPU 1"), "{table}");
    guest.type_in("poweroff -f\n");
    guest.finish().assert_clean(0);
}
