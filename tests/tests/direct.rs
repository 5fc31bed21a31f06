//! Programs that run on the host's processor directly: what user mode can do (`guests/programs/user.c`) comes out as it does
//! natively and in translated code, with one and two vCPUs.

#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code: a panic is how a test fails")]

use std::path::{Path, PathBuf};
use std::process::Command;

use terem_tests::{Guest, alone, cached, run, succeed};

/// Compiles the program; it and a minimal guest's initramfs that has it.
fn program(folder: &Path) -> (PathBuf, PathBuf) {
    let checks = folder.join("root/checks");
    std::fs::create_dir_all(&checks).unwrap();
    let (source, binary) =
        (format!("{}/guests/programs/user.c", env!("CARGO_MANIFEST_DIR")), checks.join("user"));
    let mut compiler = Command::new("cc");
    compiler.args(["-O2", "-static", "-pthread", "-o"]).arg(&binary).arg(source).arg("-lm");
    succeed(&mut compiler);
    let busybox = cached("busybox/bin/busybox");
    let pack = format!("find . | {} cpio -o -H newc -R 0:0", busybox.display());
    let more = run(Command::new("sh").args(["-c", &pack]).current_dir(folder.join("root")));
    assert!(more.status.success(), "{}", String::from_utf8_lossy(&more.stderr));
    let mut initramfs = std::fs::read(cached("minimal-6.1/initramfs")).unwrap();
    initramfs.extend(more.stdout);
    let path = folder.join("initramfs");
    std::fs::write(&path, initramfs).unwrap();
    (binary, path)
}

/// The lines that the program says.
fn said(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim_end).filter(|l| l.starts_with("TEREM: "));
    lines.filter(|l| l.ends_with(" ran") || l.contains("FAIL")).map(str::to_owned).collect()
}

#[test]
fn a_program_does_the_same_natively_translated_and_directly() {
    let _one = alone();
    let folder = tempfile::tempdir().unwrap();
    let (binary, initramfs) = program(folder.path());
    let natively = said(&succeed(&mut Command::new(binary)));
    assert!(natively.len() > 10 && natively.iter().all(|l| l.ends_with(" ran")), "{natively:?}");
    let kernel = cached("kernel-6.1/vmlinuz").display().to_string();
    let initramfs = initramfs.display().to_string();
    for (direct, cpus) in [("off", "1"), ("on", "1"), ("always", "1"), ("on", "2"), ("always", "2")] {
        let accel = format!("soft,direct={direct}");
        let ended = Guest::start([
            "--kernel",
            &kernel,
            "--initrd",
            &initramfs,
            "--cmdline",
            "console=ttyS0 quiet panic=-1 terem.test=user",
            "--memory",
            "512M",
            "--net",
            "none",
            "--cpus",
            cpus,
            "--accel",
            &accel,
        ])
        .finish();
        ended.assert_clean(0);
        assert_eq!(said(&ended.console), natively, "direct={direct}, {cpus} vCPUs");
    }
}
