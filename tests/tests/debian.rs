//! A whole Debian: login, a reboot, and the power button, with its disk in order after them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::process::Command;

use terem_tests::{Guest, cached, run, succeed, terem};

/// The kernel's time stamps, in the order in which the lines were printed.
fn stamps(console: &str) -> Vec<f64> {
    let stamp = |line: &str| line.strip_prefix('[')?.split_once(']')?.0.trim().parse().ok();
    console.lines().filter_map(stamp).collect()
}

#[test]
fn debian_is_logged_in_to_rebooted_and_switched_off_by_its_button() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("debian.qcow2");
    succeed(Command::new("cp").arg("--sparse=always").arg(cached("debian/debian.qcow2")).arg(&image));
    let name = format!("debian-{}", std::process::id());
    let mut guest = Guest::start([
        "--name",
        &name,
        "--cpus",
        "2",
        "--memory",
        "1G",
        "--net",
        "user",
        "--kernel",
        &cached("kernel-6.1/vmlinuz").display().to_string(),
        "--initrd",
        &cached("debian/initramfs-6.1").display().to_string(),
        "--cmdline",
        "console=ttyS0 root=/dev/vda",
        "--disk",
        &image.display().to_string(),
    ]);
    let prompt = "root@teremok";
    let login = guest.wait_after(0, "teremok login: ");
    guest.type_in("root\n");
    let shell = guest.wait_after(login, prompt);
    guest.type_in("echo $((40 + 2)) kept >/root/kept && sync && reboot\n");
    let again = guest.wait_after(shell, "teremok login: ");
    guest.type_in("root\n");
    let shell = guest.wait_after(again, prompt);
    guest.type_in("cat /root/kept; echo failed: $(systemctl --failed --no-legend | wc -l)\n");
    let kept = guest.wait_after(shell, "42 kept");
    guest.wait_after(kept, "failed: 0");

    let listed = succeed(Command::new(terem()).arg("ps"));
    assert!(listed.contains(&name), "{listed}");
    let stopped = run(Command::new(terem()).args(["stop", &name, "--timeout", "200"]));
    assert!(stopped.status.success(), "{stopped:?}");
    let ended = guest.finish();
    ended.assert_clean(0);
    assert!(ended.console.contains("Power down"), "{}", ended.console);

    // The processors' time stamp counters agree after the reset as they did before it: the kernel takes its time from
    // whichever it runs on.
    for life in [&ended.console[..again], &ended.console[again..]] {
        let stamps = stamps(life);
        for pair in stamps.windows(2) {
            let back_to_the_start = pair[1] < 0.01;
            assert!(
                back_to_the_start || pair[1] > pair[0] - 1.0,
                "time went from {} to {}",
                pair[0],
                pair[1]
            );
        }
    }
    let text = succeed(Command::new("qemu-img").arg("check").arg(&image));
    assert!(text.contains("No errors were found"), "{text}");
    let raw = image.with_extension("raw");
    succeed(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(&image).arg(&raw));
    succeed(Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&raw));
}
