//! Images that cannot be opened: each is refused for the right reason, in words that help.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::fs;
use std::path::Path;

use peer::{Random, Scratch, run, str};
use terem_block::{
    BackingFile, BackingPolicy, CreateOptions, Disk, Format, IoError, OpenError, OpenOptions, exercise_qcow2,
};

fn refused(image: &Path, options: &OpenOptions) -> (OpenError, String) {
    let e = Disk::open(image, options).expect_err("it must be refused");
    let mut text = e.to_string();
    assert!(!text.contains("Os {") && !text.contains("Error("), "not for people: {text}");
    text = text.replace(str(image), "IMAGE");
    (e, text)
}

fn new_image(scratch: &Scratch, name: &str, options: &str) -> std::path::PathBuf {
    let image = scratch.path(name);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, str(&image), "1M"]);
    image
}

fn patch(image: &Path, at: usize, bytes: &[u8]) {
    let mut all = fs::read(image).expect("read");
    all[at..at + bytes.len()].copy_from_slice(bytes);
    fs::write(image, all).expect("written");
}

fn qcow2() -> OpenOptions {
    OpenOptions { format: Some(Format::Qcow2), table_cache: 1 << 20, ..OpenOptions::default() }
}

#[test]
fn what_is_no_image() {
    let scratch = Scratch::new();
    let any = OpenOptions::default();
    let missing = refused(&scratch.path("missing"), &any);
    assert!(matches!(missing.0, OpenError::NotFound { .. }) && missing.1.starts_with("IMAGE: no such image"));
    let dir = scratch.path("dir");
    fs::create_dir(&dir).expect("made");
    assert!(matches!(refused(&dir, &any).0, OpenError::IsDirectory { .. }));
    assert!(matches!(refused(Path::new("/dev/null"), &any).0, OpenError::NotADisk { .. }));
    // Nobody may write this one, not even root.
    let denied = refused(Path::new("/sys/kernel/uevent_seqnum"), &any);
    assert!(matches!(denied.0, OpenError::Permission { writing: true, .. }), "{}", denied.1);
    assert!(denied.1.contains("readonly=on"), "{}", denied.1);
    let text = scratch.write("text", &[b'x'; 4096]);
    assert!(matches!(refused(&text, &qcow2()).0, OpenError::NotQcow2 { .. }));
    let qed = scratch.write("qed", b"QED\0, and so on");
    let e = refused(&qed, &any);
    assert!(matches!(e.0, OpenError::Unsupported { .. }) && e.1.contains("qed"), "{}", e.1);
    let vmdk = scratch.write("vmdk", b"KDMV, and so on");
    assert!(matches!(refused(&vmdk, &any).0, OpenError::Truncated { .. }));
}

#[test]
fn truncated_images() {
    let scratch = Scratch::new();
    let image = new_image(&scratch, "whole.qcow2", "cluster_size=4096");
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 64k", str(&image)]);
    let whole = fs::read(&image).expect("read");
    for len in [0, 1, 3, 4, 8, 71, 72, 103, 104, 111, 112, 4095, 4096, 8191, 8192, 12288, 16384] {
        let cut = scratch.write("cut.qcow2", &whole[..len]);
        let e = refused(&cut, &qcow2());
        assert!(matches!(e.0, OpenError::Truncated { .. } | OpenError::NotQcow2 { .. }), "{len}: {}", e.1);
    }
    // Where only data is missing it opens; the data is not there, and nothing else is shown.
    let cut = scratch.write("cut.qcow2", &whole[..whole.len() - 4096]);
    let disk = Disk::open(&cut, &qcow2()).expect("opened");
    let got = peer::read(&disk, 0, 65536).expect("read");
    assert!(got.iter().all(|b| *b <= 1) && got[0] == 1);
}

#[test]
fn features_that_are_not_supported() {
    let scratch = Scratch::new();
    let secret = [
        "--object",
        "secret,id=s,data=x",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
    ];
    let encrypted = scratch.path("encrypted.qcow2");
    run("qemu-img", &[&["create", "-q", "-f", "qcow2"], &secret[..], &[str(&encrypted), "1M"]].concat());
    for options in [qcow2(), OpenOptions { read_only: true, ..qcow2() }] {
        let e = refused(&encrypted, &options);
        assert!(matches!(e.0, OpenError::NeedsPassphrase { .. }) && e.1.contains("passphrase"), "{}", e.1);
    }
    // Bit 10 is unknown; the image's own table names it.
    let image = new_image(&scratch, "unknown.qcow2", "cluster_size=64k");
    let bytes = fs::read(&image).expect("read");
    let name = b"corrupt bit";
    let at = bytes.windows(name.len()).position(|w| w == name).expect("QEMU writes a feature name table");
    patch(&image, at - 1, b"\x0afrobnicate\0");
    patch(&image, 72, &(1u64 << 10 | 1 << 11).to_be_bytes());
    let e = refused(&image, &qcow2());
    let OpenError::UnknownFeatures { names, .. } = e.0 else { panic!("{}", e.1) };
    assert_eq!(names, ["frobnicate", "incompatible feature bit 11"]);
    patch(&image, 4, &4u32.to_be_bytes());
    assert!(refused(&image, &qcow2()).1.contains("qcow version 4"));
}

#[test]
fn an_image_marked_corrupt_can_only_be_read() {
    let scratch = Scratch::new();
    let image = new_image(&scratch, "corrupt.qcow2", "cluster_size=64k");
    patch(&image, 72, &2u64.to_be_bytes());
    let e = refused(&image, &qcow2());
    assert!(matches!(e.0, OpenError::MarkedCorrupt { .. }) && e.1.contains("qemu-img check -r"), "{}", e.1);
    drop(Disk::open(&image, &OpenOptions::read_only()).expect("opened"));
}

#[test]
fn metadata_is_never_overwritten() {
    let scratch = Scratch::new();
    // The refcount of the L1 table's cluster says that it is free.
    let image = new_image(&scratch, "overlap.qcow2", "cluster_size=64k");
    let l1 = u64::from_be_bytes(fs::read(&image).expect("read")[40..48].try_into().expect("8 bytes"));
    patch(&image, 2 * 65536 + 2 * (l1 / 65536) as usize, &[0, 0]);
    let before = fs::read(&image).expect("read");
    let disk = Disk::open(&image, &qcow2()).expect("opened");
    let e = peer::write(&disk, 0, &[1; 512]).expect_err("it would overwrite the L1 table");
    assert!(matches!(e, IoError::Corrupt(_)), "{e}");
    assert!(matches!(peer::write(&disk, 0, &[1; 512]), Err(IoError::Corrupt(_))));
    assert_eq!(peer::read(&disk, 0, 512).expect("read"), [0; 512]);
    drop(disk);
    let after = fs::read(&image).expect("read");
    assert_eq!(after[79], 2, "marked corrupt");
    assert!(before[80..] == after[80..before.len()], "nothing else was written");
    assert!(matches!(refused(&image, &qcow2()).0, OpenError::MarkedCorrupt { .. }));
}

#[test]
fn backing_files_that_may_not_be_opened() {
    let scratch = Scratch::new();
    let outside = Scratch::new();
    let secret = outside.write("secret.raw", &[7; 4096]);
    let overlay = |name: &str, below: &Path, format| {
        let image = scratch.path(name);
        let backing = Some(BackingFile { path: below.to_owned(), format });
        let options =
            CreateOptions { backing, size: Some(4096), overwrite: true, ..CreateOptions::default() };
        terem_block::create(&image, &options).expect("made");
        image
    };
    let image = overlay("outside.qcow2", &secret, Format::Raw);
    let e = refused(&image, &qcow2());
    assert!(matches!(e.0, OpenError::BackingRefused { .. }) && e.1.contains("secret.raw"), "{}", e.1);
    let parent = secret.parent().expect("a directory").to_owned();
    let allowed = OpenOptions { backing: BackingPolicy::Allow(vec![parent]), ..qcow2() };
    let disk = Disk::open(&image, &allowed).expect("allowed");
    assert_eq!(peer::read(&disk, 0, 4096).expect("read"), [7; 4096]);
    drop(disk);
    fs::remove_file(&secret).expect("removed");
    let e = refused(&image, &allowed);
    assert!(matches!(e.0, OpenError::Backing { .. }) && e.1.contains("no such image"), "{}", e.1);

    // a <- b <- a
    let base = scratch.write("base.raw", &[1; 4096]);
    let a = overlay("a.qcow2", &base, Format::Raw);
    let b = overlay("b.qcow2", &a, Format::Qcow2);
    overlay("c.qcow2", &b, Format::Qcow2);
    fs::rename(scratch.path("c.qcow2"), &a).expect("renamed");
    let e = refused(&a, &qcow2());
    assert!(matches!(e.0, OpenError::BackingCycle { .. }), "{}", e.1);

    let mut below = overlay("0.qcow2", &base, Format::Raw);
    let mut last = None;
    for i in 1..201 {
        if i == 200 {
            last = Some(below.clone());
        }
        // Made by hand: creating opens the whole chain each time.
        let image = scratch.path(&format!("{i}.qcow2"));
        let name = format!("{}.qcow2", i - 1);
        run_create(&image, &name);
        below = image;
    }
    let deep = Disk::open(last.expect("there"), &qcow2()).expect("200 are allowed");
    assert_eq!(peer::read(&deep, 0, 4096).expect("read"), [1; 4096]);
    drop(deep);
    assert!(matches!(refused(&below, &qcow2()).0, OpenError::BackingTooDeep { .. }));
}

/// An overlay written without looking at what is below it.
fn run_create(image: &Path, below: &str) {
    let template = image.with_file_name("0.qcow2");
    fs::copy(&template, image).expect("copied");
    let bytes = fs::read(image).expect("read");
    let at = u64::from_be_bytes(bytes[8..16].try_into().expect("8 bytes")) as usize;
    patch(image, at, below.as_bytes());
    patch(image, 16, &(below.len() as u32).to_be_bytes());
    // The format extension comes right after the header of 112 bytes: "raw" becomes "qcow2".
    patch(image, 112 + 4, &5u32.to_be_bytes());
    patch(image, 112 + 8, b"qcow2");
}

#[test]
fn a_probed_raw_disk_stays_raw() {
    let scratch = Scratch::new();
    let image = scratch.write("disk.raw", &[0; 65536]);
    let disk = Disk::open(&image, &OpenOptions::default()).expect("opened");
    assert_eq!(disk.facts().format, Format::Raw);
    assert_eq!(peer::write(&disk, 0, b"QFI\xfb\0\0\0\x03"), Err(IoError::Os(1)));
    peer::write(&disk, 1, b"FI\xfb").expect("not yet a signature");
    assert_eq!(peer::write(&disk, 0, b"Q"), Err(IoError::Os(1)), "in parts neither");
    peer::write(&disk, 0, &[0x33; 4096]).expect("an ordinary boot sector");
    peer::write(&disk, 512, b"QFI\xfb").expect("elsewhere it means nothing");
    drop(disk);
    let disk = Disk::open(&image, &OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() })
        .expect("opened");
    peer::write(&disk, 0, b"QFI\xfb\0\0\0\x03").expect("it was said to be raw");
}

#[test]
fn an_l1_entry_that_claims_to_own_no_table_gets_one() {
    let scratch = Scratch::new();
    let image = new_image(&scratch, "owner.qcow2", "cluster_size=4096");
    let bytes = fs::read(&image).expect("read");
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().expect("8 bytes")) as usize;
    patch(&image, l1, &(1_u64 << 63).to_be_bytes());
    let disk = Disk::open(&image, &qcow2()).expect("opened");
    assert_eq!(peer::read(&disk, 0, 512).expect("read"), [0; 512]);
    peer::write(&disk, 1000, &[7; 5000]).expect("written");
    assert_eq!(peer::read(&disk, 1000, 5000).expect("read"), [7; 5000]);
    drop(disk);
    run("qemu-img", &["check", str(&image)]);
    run("qemu-io", &["-f", "qcow2", "-c", "read -P 7 1000 5000", str(&image)]);
}

#[test]
fn damaged_images_neither_panic_nor_hang() {
    let scratch = Scratch::new();
    let image = new_image(&scratch, "seed.qcow2", "cluster_size=4096");
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 64k", "-c", "write -z 100k 64k", str(&image)]);
    run("qemu-img", &["snapshot", "-c", "s", str(&image)]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 2 30k 64k", str(&image)]);
    let seed = fs::read(&image).expect("read");
    assert!(exercise_qcow2(&seed, 1));
    let mut random = Random(1);
    let mut opened = 0;
    for round in 0..150 {
        let mut bytes = seed.clone();
        for _ in 0..=random.below(4) {
            // Mostly where it matters: the header and the tables.
            let end = if random.below(2) == 0 { 112 } else { bytes.len() as u64 };
            let at = random.below(end) as usize;
            let len = (1 + random.below(8) as usize).min(bytes.len() - at);
            let values = [0, 0xff, 0x80, 1, random.next() as u8];
            bytes[at..at + len].fill(values[random.below(5) as usize]);
        }
        opened += u32::from(exercise_qcow2(&bytes, round));
    }
    assert!(opened > 20, "only {opened} could be opened at all");
}
