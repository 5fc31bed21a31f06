//! What was acknowledged by a flush is there after the process was killed, and the image is consistent.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use peer::{Random, Scratch, options, run, str, try_run};
use terem_block::{AioEngine, Disk, Op, OpenOptions};

const SIZE: u64 = 4 << 20;
const SECTOR: u64 = 512;
/// A flush follows each of these.
const BATCH: u64 = 5;

/// Request `n` of the child: offset, length, value (0: write-zeroes).
fn request(n: u64) -> (u64, u64, u8) {
    let mut random = Random(n);
    let length = SECTOR * (1 + random.below(if n.is_multiple_of(4) { 300 } else { 10 }));
    let offset = SECTOR * random.below((SIZE - length) / SECTOR);
    (offset, length, if random.below(6) == 0 { 0 } else { (n % 250) as u8 + 1 })
}

/// Not a test by itself: what the killed process does.
#[test]
#[ignore = "run by the other tests as a process of its own"]
fn child() {
    let Ok(image) = std::env::var("TEREM_TEST_IMAGE") else { return };
    let disk = Disk::open(image, &options(AioEngine::Auto)).expect("opened");
    let mut out = std::io::stdout();
    for n in 0.. {
        let (offset, length, value) = request(n);
        if value == 0 {
            disk.run(Op::WriteZeroes { offset, length, unmap: true }).expect("zeroed");
        } else {
            peer::write(&disk, offset, &vec![value; length as usize]).expect("written");
        }
        if n % BATCH == BATCH - 1 {
            disk.run(Op::Flush).expect("flushed");
            writeln!(out, "\nflushed {n}").expect("told");
            out.flush().expect("told");
        }
    }
}

/// Kills the child after about `flushes`; the last request that was flushed.
fn kill_after(image: &Path, flushes: u64) -> u64 {
    let mut child = Command::new(std::env::current_exe().expect("known"))
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env("TEREM_TEST_IMAGE", image)
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let mut last = 0;
    let mut seen = 0;
    for line in BufReader::new(child.stdout.take().expect("piped")).lines().map_while(Result::ok) {
        if let Some(n) = line.strip_prefix("flushed ").and_then(|n| n.parse().ok()) {
            (last, seen) = (n, seen + 1);
            if seen == flushes {
                child.kill().expect("killed");
            }
        }
    }
    child.wait().expect("ended");
    assert!(seen >= flushes, "the child ended by itself");
    last
}

/// The image must hold, for each sector, the last flushed value or one written later.
fn verify(image: &Path, flushed: u64) {
    let mut last: HashMap<u64, u8> = HashMap::new();
    let mut later: HashMap<u64, Vec<u8>> = HashMap::new();
    // After a flush was told at most one more batch can be on its way, and its telling.
    for n in 0..=flushed + 2 * BATCH {
        let (offset, length, value) = request(n);
        for sector in offset / SECTOR..(offset + length) / SECTOR {
            if n <= flushed {
                last.insert(sector, value);
            } else {
                later.entry(sector).or_default().push(value);
            }
        }
    }
    let disk = Disk::open(image, &OpenOptions::default()).expect("opened");
    let bytes = peer::read(&disk, 0, SIZE as usize).expect("read");
    for (sector, bytes) in bytes.chunks(SECTOR as usize).enumerate() {
        let sector = sector as u64;
        let expected = last.get(&sector).copied().unwrap_or(0);
        let allowed = later.get(&sector).map_or(&[][..], Vec::as_slice);
        let ok = bytes.iter().all(|b| *b == expected || allowed.contains(b));
        assert!(ok, "sector {sector}: {:?} instead of {expected} or {allowed:?}", &bytes[..4]);
    }
    disk.close().expect("closed");
}

/// `qemu-img check` may find leaks, nothing else.
fn assert_no_errors(image: &Path) {
    let out = try_run("qemu-img", &["check", str(image)]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    // 0: clean, 3: leaks only.
    assert!(matches!(out.status.code(), Some(0 | 3)), "{}: {text}", out.status);
}

#[test]
fn flushed_data_survives_sigkill() {
    let scratch = Scratch::new();
    let shapes = [
        ("cluster_size=64k", false, 3),
        ("cluster_size=512", false, 40),
        ("cluster_size=4k", true, 25),
        ("compat=0.10,cluster_size=4k", false, 60),
        ("cluster_size=4k,lazy_refcounts=on", false, 17),
    ];
    for (shape, snapshot, flushes) in shapes {
        let image = scratch.path("crash.qcow2");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", shape, str(&image), &SIZE.to_string()]);
        if snapshot {
            run("qemu-io", &["-f", "qcow2", "-c", "write -P 0 0 4M", str(&image)]);
            run("qemu-img", &["snapshot", "-c", "s", str(&image)]);
        }
        let flushed = kill_after(&image, flushes);
        if !shape.contains("lazy") {
            // 0: clean, 3: leaks only.
            // Ours first: it waits until the kernel has closed the killed process's files.
            assert_eq!(terem_block::check(&image, None).expect("checked").errors, 0, "{shape}");
            assert_no_errors(&image);
        } else {
            assert!(terem_block::info(&image, None).expect("info").qcow2.expect("qcow2").dirty);
        }
        verify(&image, flushed);
        assert_no_errors(&image);
    }
}

/// Also in the formats of others, which QEMU reads the same afterwards.
#[test]
fn flushed_data_survives_sigkill_in_other_formats() {
    let scratch = Scratch::new();
    let shapes = [
        ("vdi", "static=off", 6),
        ("vpc", "force_size=on", 20),
        ("vhdx", "block_size=1M", 7),
        ("vmdk", "subformat=monolithicSparse", 30),
        ("vmdk", "subformat=twoGbMaxExtentSparse", 9),
        ("vmdk", "subformat=streamOptimized", 12),
    ];
    for (format, shape, flushes) in shapes {
        let image = scratch.path(&format!("crash.{format}"));
        run("qemu-img", &["create", "-q", "-f", format, "-o", shape, str(&image), &SIZE.to_string()]);
        let flushed = kill_after(&image, flushes);
        assert_eq!(terem_block::check(&image, None).expect("checked").errors, 0, "{format} {shape}");
        verify(&image, flushed);
        let disk = Disk::open(&image, &OpenOptions::read_only()).expect("opened");
        let bytes = peer::read(&disk, 0, SIZE as usize).expect("read");
        drop(disk);
        let raw = scratch.write("model.raw", &bytes);
        run("qemu-img", &["compare", "-f", "raw", "-F", format, str(&raw), str(&image)]);
    }
}

#[test]
fn an_image_left_dirty_by_qemu_gets_its_refcounts() {
    let scratch = Scratch::new();
    let image = scratch.path("dirty.qcow2");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", str(&image), "8M"],
    );
    let commands = ["-c", "write -P 5 1M 1M", "-c", "flush", "-c", "abort", str(&image)];
    try_run("qemu-io", &commands);
    assert!(terem_block::info(&image, None).expect("info").qcow2.expect("qcow2").dirty);
    assert!(terem_block::check(&image, None).expect("checked").errors > 0, "the refcounts are behind");
    // Reading needs no refcounts.
    let disk = Disk::open(&image, &OpenOptions::read_only()).expect("opened");
    assert_eq!(peer::read(&disk, 1 << 20, 1 << 20).expect("read"), vec![5; 1 << 20]);
    drop(disk);
    let disk = Disk::open(&image, &OpenOptions::default()).expect("rebuilt and opened");
    peer::write(&disk, 3 << 20, &[6; 100_000]).expect("written");
    assert_eq!(peer::read(&disk, 1 << 20, 1 << 20).expect("read"), vec![5; 1 << 20]);
    drop(disk);
    peer::assert_clean(&image);
    assert!(terem_block::info(&image, None).expect("info").qcow2.expect("qcow2").lazy_refcounts);
}
