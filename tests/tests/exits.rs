//! How a run ends, and the exit code that tells it (docs/run.md): by the guest, and by mistakes before it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use terem_tests::{Guest, alone, cached, run, succeed, terem};

/// The ways to reset that Linux has (its parameter `reboot=`), and the exit code of each under `--no-reboot`.
const RESETS: [(&str, i32); 4] = [
    ("t", 5), // a triple fault
    ("k", 4), // the keyboard controller
    ("p", 4), // port 0xcf9
    ("a", 4), // ACPI's reset register
];

/// The minimal guest on the uncompressed kernel: there are many boots here.
fn start(checks: &str, words: &str, more: &[&str]) -> Guest {
    let kernel = cached("kernel-6.12/vmlinux").display().to_string();
    let initrd = cached("minimal-6.12/initramfs").display().to_string();
    let cmdline = format!("console=ttyS0 quiet panic=-1 terem.test={checks} {words}");
    let fixed = ["--kernel", &kernel, "--initrd", &initrd, "--cmdline", &cmdline];
    Guest::start(fixed.into_iter().chain(["--memory", "512M", "--net", "none"]).chain(more.iter().copied()))
}

#[test]
fn a_panic_is_3() {
    let _one = alone();
    let ended = start("panic", "", &[]).finish();
    assert_eq!(ended.code, 3, "{}\n{}", ended.console, ended.errors);
    assert!(ended.console.contains("TEREM: end panic"), "{}", ended.console);
    assert!(ended.errors.contains("panic"), "{}", ended.errors);
}

#[test]
fn each_reset_ends_a_run_without_reboot() {
    let _one = alone();
    for (way, code) in RESETS {
        let ended = start("reset", &format!("reboot={way}"), &["--no-reboot", "--cpus", "2"]).finish();
        assert!(ended.console.contains("TEREM: end reset"), "reboot={way}: {}", ended.console);
        ended.assert_clean(code);
        assert_eq!(ended.console.matches("TEREM: init").count(), 1, "reboot={way}: {}", ended.console);
    }
}

#[test]
fn each_reset_boots_again() {
    let _one = alone();
    for (way, _) in RESETS {
        let guest = start("reset", &format!("reboot={way}"), &["--cpus", "2"]);
        let first = guest.wait_for("TEREM: end reset");
        assert_eq!(first.matches("TEREM: init").count(), 1, "reboot={way}: {first}");
        // The second life begins as the first did, and ends as it did: its reset works too.
        let mut resets = 1;
        while resets < 2 {
            std::thread::sleep(Duration::from_millis(50));
            resets = guest.wait_for("TEREM: end reset").matches("TEREM: end reset").count();
        }
        guest.kill();
    }
}

/// A multiboot image (Multiboot 0.6.96, 3.1.1) of two instructions: `lidt` of a table of no length, `ud2`.
fn shuts_down_at_once() -> Vec<u8> {
    // Magic, flags, checksum; then header, load, end of load, end of BSS, entry.
    let header: [u32; 8] =
        [0x1bad_b002, 0x1_0000, 0xe451_4ffe, 0x20_0000, 0x20_0000, 0x20_0040, 0x20_0040, 0x20_0020];
    let mut image: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    image.extend([0x0f, 0x01, 0x1d, 0x38, 0x00, 0x20, 0x00, 0x0f, 0x0b]);
    image.resize(64, 0);
    image
}

/// Thousands of resets a second: the log tells of the first ones only, or it would fill the host's disk.
#[test]
fn a_guest_that_only_resets_does_not_flood_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, shuts_down_at_once()).unwrap();
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "5"]).arg(terem()).args(["run", "--net", "none", "--kernel"]).arg(kernel);
    let text = String::from_utf8_lossy(&run(&mut command).stderr).into_owned();
    assert!(text.contains("more of these are not shown"), "{text}");
    assert_eq!(text.matches("triple fault").count(), 20, "{text}");
}

/// Runs terem with arguments that cannot work: it ends with `code` and one line that says each of `words`.
fn fails(code: i32, words: &[&str], prepare: impl FnOnce(&mut Command) -> &mut Command) {
    let mut command = Command::new(terem());
    let output = run(prepare(command.arg("run")));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{command:?}\n{text}");
    assert!(output.stdout.is_empty(), "{command:?}: nothing goes to the guest's console");
    // Before it a line may say what runs the guest, and after it a hint what to do.
    let is_note = |l: &&str| l.contains(" runs on the ") || l.starts_with("  hint: ");
    let lines: Vec<&str> = text.lines().filter(|l| !is_note(l)).collect();
    assert_eq!(lines.len(), 1, "{command:?}\n{text}");
    assert!(lines[0].starts_with("terem: ") && !lines[0].contains("panicked"), "{text}");
    for word in words {
        assert!(lines[0].contains(word), "{command:?} does not say {word:?}\n{text}");
    }
}

fn kernel() -> String {
    cached("kernel-6.12/vmlinuz").display().to_string()
}

#[test]
fn what_is_no_kernel_is_1() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("letter.txt");
    std::fs::write(&text, "Dear kernel, ".repeat(1000)).unwrap();
    let empty = folder.path().join("empty");
    std::fs::write(&empty, "").unwrap();
    let short = folder.path().join("short");
    let whole = std::fs::read(kernel()).unwrap();
    std::fs::write(&short, &whole[..whole.len() / 2]).unwrap();
    let missing = folder.path().join("missing");
    let cases: [(&Path, &str); 5] = [
        (&text, "no kernel"),
        (&empty, "empty"),
        (&short, "cut short"),
        (&missing, "there is no such file"),
        (folder.path(), "directory"),
    ];
    for (path, why) in cases {
        let name = path.display().to_string();
        fails(1, &[&name, why], |c| c.arg("--kernel").arg(path));
    }
    fails(1, &["initrd", "directory"], |c| c.args(["--kernel", &kernel(), "--initrd"]).arg(folder.path()));
}

#[test]
fn a_disk_that_cannot_be_used_is_1() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("short.qcow2");
    succeed(Command::new(terem()).args(["disk", "create"]).arg(&path).arg("64M"));
    // In the L1 table, then in the header.
    for length in [70_000, 100] {
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length).unwrap();
        fails(1, &["short.qcow2", "truncated"], |c| c.args(["--kernel", &kernel(), "--disk"]).arg(&path));
    }
    let missing = folder.path().join("missing.qcow2");
    fails(1, &["missing.qcow2", "no such image"], |c| {
        c.args(["--kernel", &kernel(), "--disk"]).arg(&missing)
    });
}

#[test]
fn more_memory_than_the_host_has_is_2() {
    fails(2, &["memory", "1048576 MiB"], |c| c.args(["--kernel", &kernel(), "--memory", "1T"]));
}

#[test]
fn a_tap_that_cannot_be_opened_is_1() {
    // The loopback interface is there on every host, and is no tap.
    fails(1, &["net: ", "lo "], |c| c.args(["--kernel", &kernel(), "--net", "tap=lo"]));
    fails(1, &["net: ", "terem-none", "ip tuntap add"], |c| {
        c.args(["--kernel", &kernel(), "--net", "tap=terem-none"])
    });
}

#[test]
fn a_port_that_is_taken_is_1() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let net = format!("user,forward=tcp:127.0.0.1:{port}:22");
    fails(1, &["net: ", &port.to_string(), "in use", "another host port"], |c| {
        c.args(["--kernel", &kernel(), "--net", &net])
    });
}
