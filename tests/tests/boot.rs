//! Linux boots, with few and many processors, little and much memory, from each kind of image.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use terem_tests::{Guest, alone, cached};

/// Boots and checks that every processor computes right and that the memory is there.
fn boots(series: &str, cpus: u32, memory: &str, mib: u64) {
    let _one = alone();
    let count = cpus.to_string();
    let guest = Guest::minimal(series, "show,cpus", "", &["--cpus", &count, "--memory", memory]);
    let ended = guest.finish();
    ended.assert_clean(0);
    assert_eq!(ended.value("cpus"), count);
    assert_eq!(ended.value("cpus-right"), count);
    let kib: u64 = ended.value("memory").trim_end_matches(" kB").trim().parse().unwrap();
    // The kernel keeps some for itself: its image, and 1/64 for page structures.
    assert!(kib > mib * 1024 * 9 / 10 - 80 * 1024 && kib <= mib * 1024, "{kib} KiB of {mib} MiB");
    // "tsc-early" in the kernel's first second, and "tsc" then; anything else: it found the TSC unstable.
    let clock = ended.value("clocksource");
    assert!(matches!(clock, "tsc" | "tsc-early"), "{clock}");
    let trouble: Vec<&str> =
        ended.console.lines().filter(|l| l.starts_with("TEREM: dmesg") && l.contains("BUG")).collect();
    assert!(trouble.is_empty(), "{trouble:?}");
}

#[test]
fn linux_6_1_with_1_cpu_and_256_mib() {
    boots("6.1", 1, "256M", 256);
}

#[test]
fn linux_6_1_with_2_cpus_and_1_gib() {
    boots("6.1", 2, "1G", 1024);
}

#[test]
fn linux_6_1_with_4_cpus_and_8_gib() {
    boots("6.1", 4, "8G", 8192);
}

#[test]
fn linux_6_12_with_1_cpu_and_8_gib() {
    boots("6.12", 1, "8G", 8192);
}

#[test]
fn linux_6_12_with_2_cpus_and_256_mib() {
    boots("6.12", 2, "256M", 256);
}

#[test]
fn linux_6_12_with_4_cpus_and_3_gib() {
    boots("6.12", 4, "3G", 3072);
}

#[test]
#[ignore = "a minute of processor time; run by hand"]
fn linux_6_12_with_64_cpus_and_1_gib() {
    boots("6.12", 64, "1G", 1024);
}

/// 32-bit kernels: their entry in protected mode, segments, `int 0x80` and both 32-bit page table formats.
fn boots_32_bit(series: &str, pae: bool) {
    let _one = alone();
    // Debian's 32-bit kernels test each of their ciphers, which takes a minute here and is not what this is about.
    let words = "cryptomgr.notests=1";
    let ended =
        Guest::minimal(series, "show,cpus", words, &["--cpus", "2", "--memory", "512M", "--net", "none"])
            .finish();
    ended.assert_clean(0);
    assert!(ended.value("kernel").contains("-686"), "{}", ended.value("kernel"));
    assert_eq!(ended.value("kernel").ends_with("-pae"), pae);
    assert_eq!(ended.value("online"), "0-1");
    assert_eq!(ended.value("cpus"), "2");
    assert_eq!(ended.value("cpus-right"), "2");
    let trouble: Vec<&str> = ended
        .console
        .lines()
        .filter(|l| l.starts_with("TEREM: dmesg") && (l.contains("BUG") || l.contains("unchecked MSR")))
        .collect();
    assert!(trouble.is_empty(), "{trouble:?}");
}

#[test]
fn linux_6_1_of_32_bits_with_pae_and_2_cpus() {
    boots_32_bit("6.1-686-pae", true);
}

#[test]
fn linux_6_1_of_32_bits_without_pae_and_2_cpus() {
    boots_32_bit("6.1-686", false);
}

#[test]
fn the_uncompressed_kernel_boots_by_its_pvh_entry() {
    let _one = alone();
    let kernel = cached("kernel-6.12/vmlinux").display().to_string();
    let initrd = cached("minimal-6.12/initramfs").display().to_string();
    let cmdline = "console=ttyS0 quiet panic=-1 terem.test=poweroff";
    let guest =
        Guest::start(["--kernel", &kernel, "--initrd", &initrd, "--cmdline", cmdline, "--memory", "512M"]);
    let ended = guest.finish();
    ended.assert_clean(0);
    assert!(ended.console.contains("TEREM: end poweroff"));
}

#[test]
fn clocks_and_entropy_and_the_virtio_console_work() {
    let _one = alone();
    let ended = Guest::minimal("6.1", "time,rng", "", &["--rng", "on"]).finish();
    ended.assert_clean(0);
    let slept: u64 = ended.value("slept-ms").parse().unwrap();
    assert!((950..60_000).contains(&slept), "slept {slept} ms");
    let seconds: u64 = ended.value("realtime-s").parse().unwrap();
    assert!((1..60).contains(&seconds), "two seconds took {seconds}");
    assert_eq!(ended.value("rng-bytes"), "64");
    assert_ne!(ended.value("rng"), "0".repeat(128));
}

#[test]
fn a_reboot_boots_again() {
    let _one = alone();
    let guest = Guest::minimal("6.1", "reboot", "", &[]);
    guest.wait_for("TEREM: end reboot");
    // The second life begins as the first did.
    let mut seen = 0;
    while seen < 2 {
        seen = guest.wait_for("TEREM: init").matches("TEREM: init").count();
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    guest.kill();
}
