//! A guest that works hard for long: a 4-vCPU Debian builds programs from their sources and runs stress-ng with its own
//! checks (`guests/lasting/run`): no wrong result, no warning of the kernel's, and no memory of ours that only grows.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::path::Path;
use std::process::Command;

use terem_tests::{Guest, cached, succeed};

/// What the process may have beyond the guest's memory, in KiB, with four vCPUs that have translated all that they may
/// keep: 192 MiB of code and as much data beside it, less an eighth (360 MiB), and some 60 MiB of blocks for each.
const MOST_OWN_MEMORY: u64 = 640 << 10;

/// KiB resident that are not the guest's memory, which is a memfd of this name.
fn own_memory(pid: u32) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut guest = false;
    let mut sum = 0;
    for line in smaps.lines() {
        if let Some(kib) = line.strip_prefix("Rss:").filter(|_| !guest) {
            sum += kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        } else if line.split_once(' ').is_some_and(|(range, _)| range.contains('-')) {
            guest = line.contains("memfd:guest-ram");
        }
    }
    sum
}

/// Runs the guest with these arguments for its script; prints each of its steps with our own memory after it.
fn last(arguments: &str) {
    let dir = tempfile::tempdir().unwrap();
    let task = dir.path().join("task.tar");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests/lasting");
    succeed(Command::new("tar").arg("-cf").arg(&task).arg("-C").arg(folder).arg("."));
    let cmdline =
        format!("console=ttyS0 root=/dev/vda quiet panic=-1 terem.task terem.arguments={arguments}");
    let guest = Guest::start([
        "--name",
        &format!("lasting-{}", std::process::id()),
        "--cpus",
        "4",
        "--memory",
        "2G",
        "--net",
        "none",
        "--kernel",
        &cached("kernel-6.1/vmlinuz").display().to_string(),
        "--initrd",
        &cached("debian-tools/initramfs-6.1").display().to_string(),
        "--cmdline",
        &cmdline,
        "--disk",
        &format!("{},snapshot", cached("debian-tools/debian.qcow2").display()),
        "--disk",
        &format!("{},format=raw,readonly", task.display()),
    ]);
    let (mut at, mut most) = (0, 0);
    loop {
        let begin = guest.wait_after(at, "TEREM: ");
        at = guest.wait_after(begin, "\n");
        let own = own_memory(guest.pid());
        most = most.max(own);
        let step = guest.wait_for("TEREM: ")[begin..at].trim().to_owned();
        eprintln!("{step} (own memory {} MiB)", own >> 10);
        if step == "end" {
            break;
        }
    }
    let ended = guest.finish();
    ended.assert_clean(0);
    assert!(most < MOST_OWN_MEMORY, "{most} KiB of our own");
}

#[test]
fn a_minute_of_work() {
    last("4,lua,cpu,matrix,vm,memcpy,atomic,fork,futex,switch,mmap");
}

#[test]
#[ignore = "half an hour and more; run by hand"]
fn half_an_hour_of_work() {
    last("9,lua+gzip,all");
}
