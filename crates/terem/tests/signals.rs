//! SIGINT at random moments of long operations: what was there is as it was, or what was asked for is complete.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a panic is how a test fails, also in what the tests share"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// Exit code of an operation that a signal stopped.
const STOPPED: i32 = 6;

/// How often each operation is interrupted.
const ROUNDS: u32 = 6;

struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_terem"));
        command.arg("disk").args(words).current_dir(self.0.path()).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    fn expect(&self, words: &[&str]) {
        let out = self.command(words).output().unwrap();
        assert!(out.status.success(), "{words:?}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// Runs it to its end; how long that took.
    fn measure(&self, words: &[&str]) -> Duration {
        let begun = Instant::now();
        self.expect(words);
        begun.elapsed()
    }

    /// Starts it, and interrupts it after `delay`; whether it was done before.
    fn interrupt(&self, words: &[&str], delay: Duration) -> bool {
        let mut child = self.command(words).spawn().unwrap();
        std::thread::sleep(delay);
        signal(&mut child);
        let out = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        match out.status.code() {
            Some(0) => true,
            Some(STOPPED) => {
                assert!(text.contains("stopped"), "{text}");
                false
            }
            // It had not begun to listen.
            None => false,
            Some(code) => panic!("{words:?}: {code} {text}"),
        }
    }

    fn copy(&self, from: &str, to: &str) {
        fs::copy(self.path(from), self.path(to)).unwrap();
    }

    /// No file of a copy that was not finished is left.
    fn assert_no_parts(&self) {
        let names = fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let parts: Vec<_> =
            names.filter(|name| Path::new(name).extension().is_some_and(|e| e == "part")).collect();
        assert!(parts.is_empty(), "{parts:?}");
    }
}

fn signal(child: &mut Child) {
    if child.try_wait().unwrap().is_none() {
        let pid = Pid::from_child(child);
        // It may end just now.
        let _ = kill_process(pid, Signal::INT);
    }
}

/// Delays over all of an operation that takes `whole` when nobody interrupts it, and a little more.
fn delays(whole: Duration) -> impl Iterator<Item = Duration> {
    (0..ROUNDS).map(move |round| whole * (2 * round + 1) / (2 * ROUNDS - 4))
}

/// Bytes that cannot be compressed, and are the same in each run.
fn noise(length: usize, mut state: u64) -> Vec<u8> {
    let words = (0..length / 8).flat_map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state ^ state >> 29).to_le_bytes()
    });
    words.collect()
}

#[test]
fn convert() {
    let home = Home::new();
    fs::write(home.path("old.raw"), noise(MIB, 2)).unwrap();
    for (more, size) in [(&[][..], 32), (&["--compress"], 4)] {
        fs::write(home.path("a.raw"), noise(size * MIB, 1)).unwrap();
        let words =
            [&["convert", "--from", "raw", "--to", "qcow2"][..], more, &["a.raw", "b.qcow2"]].concat();
        let _ = fs::remove_file(home.path("b.qcow2"));
        let whole = home.measure(&words);
        let over = [&words[..words.len() - 2], &["--overwrite", "a.raw", "old.qcow2"]].concat();
        for delay in delays(whole) {
            let _ = fs::remove_file(home.path("b.qcow2"));
            if home.interrupt(&words, delay) {
                home.expect(&["compare", "--format", "raw", "a.raw", "b.qcow2"]);
            } else {
                assert!(!home.path("b.qcow2").exists());
            }
            // What was there stays until the new one is complete.
            home.expect(&[
                "convert",
                "--overwrite",
                "--from",
                "raw",
                "--to",
                "qcow2",
                "old.raw",
                "old.qcow2",
            ]);
            let expected = if home.interrupt(&over, delay) { "a.raw" } else { "old.raw" };
            home.expect(&["compare", "--format", "raw", expected, "old.qcow2"]);
            home.assert_no_parts();
        }
    }
}

#[test]
fn commit() {
    let home = Home::new();
    fs::write(home.path("base.raw"), noise(32 * MIB, 3)).unwrap();
    let mut expected = noise(32 * MIB, 3);
    expected[MIB..25 * MIB].copy_from_slice(&noise(24 * MIB, 4));
    fs::write(home.path("expected.raw"), &expected).unwrap();
    home.expect(&["convert", "--from", "raw", "--to", "qcow2", "base.raw", "base.orig"]);
    home.copy("base.orig", "base.qcow2");
    // What differs from the base is what the overlay gets.
    fs::write(home.path("x.raw"), &expected).unwrap();
    home.expect(&["convert", "--from", "raw", "--to", "qcow2", "x.raw", "x.qcow2"]);
    home.expect(&["rebase", "--unsafe", "--backing", "base.qcow2", "--backing-format", "qcow2", "x.qcow2"]);
    home.copy("x.qcow2", "top.orig");
    home.copy("top.orig", "top.qcow2");
    let whole = home.measure(&["commit", "top.qcow2"]);
    for delay in delays(whole) {
        home.copy("base.orig", "base.qcow2");
        home.copy("top.orig", "top.qcow2");
        let done = home.interrupt(&["commit", "top.qcow2"], delay);
        home.expect(&["compare", "--format", "raw", "expected.raw", "top.qcow2"]);
        home.expect(&["check", "top.qcow2"]);
        home.expect(&["check", "base.qcow2"]);
        if done {
            home.expect(&["compare", "--format", "raw", "expected.raw", "base.qcow2"]);
        } else {
            // Again, and to its end.
            home.expect(&["commit", "top.qcow2"]);
            home.expect(&["compare", "--format", "raw", "expected.raw", "base.qcow2"]);
        }
    }
}

#[test]
fn rebase() {
    let home = Home::new();
    fs::write(home.path("a.raw"), noise(24 * MIB, 5)).unwrap();
    fs::write(home.path("b.raw"), noise(24 * MIB, 6)).unwrap();
    home.expect(&["create", "--backing", "a.raw", "--backing-format", "raw", "top.orig"]);
    home.copy("top.orig", "top.qcow2");
    let words = ["rebase", "--backing", "b.raw", "--backing-format", "raw", "top.qcow2"];
    let whole = home.measure(&words);
    for delay in delays(whole) {
        home.copy("top.orig", "top.qcow2");
        let done = home.interrupt(&words, delay);
        home.expect(&["compare", "--format", "raw", "a.raw", "top.qcow2"]);
        home.expect(&["check", "top.qcow2"]);
        let out = home.command(&["info", "--json", "top.qcow2"]).stdout(Stdio::piped()).output().unwrap();
        let names_b = String::from_utf8_lossy(&out.stdout).contains("b.raw");
        assert!(names_b || !done);
    }
}

#[test]
fn resize() {
    let home = Home::new();
    fs::write(home.path("a.raw"), noise(16 * MIB, 7)).unwrap();
    home.expect(&["convert", "--from", "raw", "--to", "qcow2", "--cluster-size", "512", "a.raw", "a.orig"]);
    fs::write(home.path("half.raw"), &noise(16 * MIB, 7)[..8 * MIB]).unwrap();
    home.copy("a.orig", "a.qcow2");
    let words = ["resize", "--shrink", "a.qcow2", "8M"];
    let whole = home.measure(&words);
    for delay in delays(whole) {
        home.copy("a.orig", "a.qcow2");
        let done = home.interrupt(&words, delay);
        let compared = |with: &str| {
            home.command(&["compare", "--format", "raw", with, "a.qcow2"]).status().unwrap().success()
        };
        let (old, new) = (compared("a.raw"), compared("half.raw"));
        assert!(new || old && !done, "{done} {old} {new}");
        home.expect(&["check", "a.qcow2"]);
    }
}
