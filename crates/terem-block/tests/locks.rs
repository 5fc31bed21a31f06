//! Image locks and QEMU's keep each other out.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use peer::{Scratch, options, run, str, try_run};
use terem_block::{AioEngine, BackingFile, CreateOptions, Disk, Format, OpenError, OpenOptions};

/// A `qemu-io` that has an image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn open(image: &Path, read_only: bool) -> Self {
        let mut command = Command::new("qemu-io");
        if read_only {
            command.arg("-r");
        }
        let mut child = command
            .args(["-f", "qcow2", str(image)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io is needed for this test");
        child.stdin.as_mut().expect("piped").write_all(b"read 0 512\n").expect("written");
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.as_mut().expect("piped"));
        while !line.contains("read 512/512") {
            line.clear();
            assert_ne!(out.read_line(&mut line).expect("read"), 0, "qemu-io ended");
        }
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn new_image(scratch: &Scratch) -> std::path::PathBuf {
    let image = scratch.path("lock.qcow2");
    terem_block::create(&image, &CreateOptions::new(Format::Qcow2, 1 << 20)).expect("made");
    image
}

fn qemu_write(image: &Path) -> Result<(), String> {
    let out = try_run("qemu-io", &["-f", "qcow2", "-c", "write 0 512", str(image)]);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    if out.status.success() { Ok(()) } else { Err(text) }
}

#[test]
fn while_we_write_qemu_is_kept_out() {
    let scratch = Scratch::new();
    let image = new_image(&scratch);
    let disk = Disk::open(&image, &options(AioEngine::Auto)).expect("opened");
    let e = qemu_write(&image).expect_err("it is locked");
    assert!(e.contains("lock"), "{e}");
    let check = Command::new("qemu-img").args(["check", str(&image)]).output().expect("qemu-img runs");
    assert!(!check.status.success());
    // Another of us, too.
    assert!(matches!(Disk::open(&image, &OpenOptions::default()), Err(OpenError::Busy { .. })));
    assert!(matches!(Disk::open(&image, &OpenOptions::read_only()), Err(OpenError::Busy { .. })));
    terem_block::info(&image, None).expect("info needs no lock");
    let unlocked = OpenOptions { lock: false, ..OpenOptions::read_only() };
    drop(Disk::open(&image, &unlocked).expect("asked for"));
    assert!(qemu_write(&image).is_err(), "closing another handle gave the lock away");
    drop(disk);
    qemu_write(&image).expect("it is free");
}

#[test]
fn while_we_read_others_may_read() {
    let scratch = Scratch::new();
    let image = new_image(&scratch);
    let disk = Disk::open(&image, &OpenOptions::read_only()).expect("opened");
    let second = Disk::open(&image, &OpenOptions::read_only()).expect("shared");
    run("qemu-io", &["-r", "-f", "qcow2", "-c", "read 0 512", str(&image)]);
    assert!(qemu_write(&image).is_err());
    assert!(matches!(Disk::open(&image, &OpenOptions::default()), Err(OpenError::Busy { .. })));
    drop((disk, second));
    qemu_write(&image).expect("it is free");
}

#[test]
fn while_qemu_writes_we_are_kept_out_and_told_by_whom() {
    let scratch = Scratch::new();
    let image = new_image(&scratch);
    let holder = Holder::open(&image, false);
    for options in [OpenOptions::default(), OpenOptions::read_only()] {
        let e = Disk::open(&image, &options).expect_err("it is locked");
        let text = e.to_string();
        let OpenError::Busy { holders, .. } = e else { panic!("{text}") };
        assert_eq!(holders.len(), 1, "{text}");
        assert_eq!((holders[0].pid, holders[0].command.as_str()), (holder.0.id(), "qemu-io"));
        assert!(text.contains(str(&image)) && text.contains(&format!("process {} (qemu-io)", holder.0.id())));
    }
    drop(holder);
    Disk::open(&image, &OpenOptions::default()).expect("it is free");
}

#[test]
fn while_qemu_reads_we_may_read() {
    let scratch = Scratch::new();
    let image = new_image(&scratch);
    let _holder = Holder::open(&image, true);
    assert!(matches!(Disk::open(&image, &OpenOptions::default()), Err(OpenError::Busy { .. })));
    Disk::open(&image, &OpenOptions::read_only()).expect("shared");
}

#[test]
fn backing_files_are_shared_among_readers() {
    let scratch = Scratch::new();
    let base = new_image(&scratch);
    let overlay = |name: &str| {
        let image = scratch.path(name);
        let backing = Some(BackingFile { path: "lock.qcow2".into(), format: Format::Qcow2 });
        terem_block::create(&image, &CreateOptions { backing, ..CreateOptions::default() }).expect("made");
        Disk::open(&image, &OpenOptions::default()).expect("opened")
    };
    let (first, second) = (overlay("a.qcow2"), overlay("b.qcow2"));
    assert!(qemu_write(&base).is_err());
    assert!(matches!(Disk::open(&base, &OpenOptions::default()), Err(OpenError::Busy { .. })));
    drop(first);
    assert!(qemu_write(&base).is_err());
    drop(second);
    qemu_write(&base).expect("it is free");
}
