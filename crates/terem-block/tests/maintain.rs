//! Snapshots, bitmaps, sizes, backing files and repair, each compared with what QEMU makes of it.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::path::Path;
use std::process::{Command, Stdio};

use peer::{Model, Random, Scratch, assert_clean, run, str};
use terem_block::{
    AioEngine, BackingFile, BitmapAction, BlockBackend, Cache, Disk, Format, Op, OpenError, OpenOptions,
    Preallocation, Repair, SnapshotAction, bitmap, info, repair, resize, set_backing, snapshot,
};

const SIZE: u64 = 3 << 20;

fn quick() -> OpenOptions {
    OpenOptions { cache: Cache::Unsafe, ..peer::options(AioEngine::Auto) }
}

fn new(scratch: &Scratch, name: &str, shape: &str) -> std::path::PathBuf {
    let image = scratch.path(name);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", shape, str(&image), &SIZE.to_string()]);
    image
}

/// Random requests, then the image is closed.
fn scribble(image: &Path, model: &mut Model, seed: u64) {
    let disk = Disk::open(image, &quick()).expect("opened");
    let mut random = Random(seed);
    for _ in 0..30 {
        model.step(&disk, &mut random, 65536);
    }
    model.assert_equals(&disk);
    disk.close().expect("closed");
}

const SHAPES: [&str; 5] = [
    "compat=1.1",
    "compat=0.10,cluster_size=4k",
    "cluster_size=512,refcount_bits=8",
    "extended_l2=on,cluster_size=16k",
    "lazy_refcounts=on,refcount_bits=64",
];

#[test]
fn snapshots_come_and_go() {
    let scratch = Scratch::new();
    for (i, shape) in SHAPES.iter().enumerate() {
        let image = new(&scratch, &format!("{i}.qcow2"), shape);
        let mut model = Model(vec![0; SIZE as usize]);
        let mut kept = Vec::new();
        for round in 0..3u64 {
            scribble(&image, &mut model, round + 10 * i as u64);
            let name = format!("s{round}");
            snapshot(&image, None, SnapshotAction::Create(&name)).expect("taken");
            assert_clean(&image);
            kept.push((name, model.0.clone()));
            let listed = run("qemu-img", &["snapshot", "-l", str(&image)]);
            assert!(listed.contains(&format!("s{round}")), "{listed}");
        }
        scribble(&image, &mut model, 99);
        for (name, bytes) in &kept {
            let options = OpenOptions { snapshot: Some(name.clone()), ..OpenOptions::read_only() };
            Model(bytes.clone()).assert_equals(&Disk::open(&image, &options).expect("opened"));
            let raw = scratch.path("snapshot.raw");
            run("qemu-img", &["convert", "-l", name, "-O", "raw", str(&image), str(&raw)]);
            assert!(std::fs::read(&raw).expect("read") == *bytes, "{name} in {shape}");
        }
        snapshot(&image, None, SnapshotAction::Delete("s1")).expect("deleted");
        assert_clean(&image);
        snapshot(&image, None, SnapshotAction::Apply("s0")).expect("applied");
        assert_clean(&image);
        model.0.clone_from(&kept[0].1);
        model.assert_qemu_reads(&scratch, &image);
        scribble(&image, &mut model, 100);
        run("qemu-img", &["snapshot", "-a", "s2", str(&image)]);
        model.0.clone_from(&kept[2].1);
        scribble(&image, &mut model, 101);
        for name in ["1", "s2"] {
            snapshot(&image, None, SnapshotAction::Delete(name)).expect("deleted");
            assert_clean(&image);
        }
        model.assert_qemu_reads(&scratch, &image);
        let missing = snapshot(&image, None, SnapshotAction::Apply("s0"));
        assert!(matches!(missing, Err(OpenError::NoSuch { .. })));
    }
}

#[test]
fn a_narrow_refcount_has_no_room_for_a_snapshot() {
    let scratch = Scratch::new();
    let image = new(&scratch, "narrow.qcow2", "refcount_bits=1");
    scribble(&image, &mut Model(vec![0; SIZE as usize]), 1);
    let before = std::fs::read(&image).expect("read")[..512].to_vec();
    let refused = snapshot(&image, None, SnapshotAction::Create("s"));
    assert!(matches!(refused, Err(OpenError::Limit { .. })), "{refused:?}");
    assert!(std::fs::read(&image).expect("read")[..512] == before);
    assert_eq!(terem_block::check(&image, None).expect("checked").errors, 0);
}

#[test]
fn sizes_change() {
    let scratch = Scratch::new();
    for (i, shape) in SHAPES.iter().enumerate() {
        let image = new(&scratch, &format!("{i}.qcow2"), shape);
        let mut model = Model(vec![0; SIZE as usize]);
        let mut random = Random(i as u64);
        scribble(&image, &mut model, i as u64);
        for _ in 0..4 {
            let size = (random.below(2 * SIZE) + 1).next_multiple_of(512);
            if size < model.0.len() as u64 {
                let e =
                    resize(&image, None, size, false, Preallocation::Off).expect_err("not asked to shrink");
                assert!(matches!(e, OpenError::WouldShrink { .. }), "{e}");
            }
            resize(&image, None, size, true, Preallocation::Off).expect("resized");
            model.0.resize(size as usize, 0);
            assert_clean(&image);
            model.assert_qemu_reads(&scratch, &image);
            scribble(&image, &mut model, size);
        }
    }
    let image = new(&scratch, "large.qcow2", "cluster_size=64k");
    resize(&image, None, 1 << 42, false, Preallocation::Off).expect("grown");
    assert_clean(&image);
    resize(&image, None, SIZE, true, Preallocation::Off).expect("shrunk");
    resize(&image, None, 2 * SIZE, false, Preallocation::Metadata).expect("grown");
    assert_clean(&image);
    let report = terem_block::check(&image, None).expect("checked");
    assert_eq!(report.allocated_clusters, SIZE / 65536);
    let raw = scratch.write("disk.raw", &[7; 4096]);
    resize(&raw, Some(Format::Raw), 8192, false, Preallocation::Full).expect("grown");
    assert!(std::fs::read(&raw).expect("read") == [[7; 4096], [0; 4096]].concat());
}

#[test]
fn what_is_added_does_not_show_the_backing_file() {
    let scratch = Scratch::new();
    scratch.write("base.raw", &vec![5; 2 << 20]);
    let image = scratch.path("overlay.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", str(&image), "1M"]);
    resize(&image, None, 3 << 20, false, Preallocation::Off).expect("grown");
    let mut model = Model(vec![0; 3 << 20]);
    model.0[..1 << 20].fill(5);
    model.assert_qemu_reads(&scratch, &image);
    assert_clean(&image);
}

/// The dirty parts that QEMU finds in a bitmap, as bytes of the disk.
fn qemu_bitmap(scratch: &Scratch, image: &Path, name: &str) -> Vec<bool> {
    let socket = scratch.path("nbd.socket");
    let mut server = Command::new("qemu-nbd")
        .args(["-r", "-f", "qcow2", "-B", name, "-k", str(&socket), str(image)])
        .stdout(Stdio::null())
        .spawn()
        .expect("qemu-nbd is needed for this test");
    while !socket.exists() {
        assert!(server.try_wait().expect("alive").is_none(), "qemu-nbd ended");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let source = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        str(&socket)
    );
    let json = run("qemu-img", &["map", "--output=json", "--image-opts", &source]);
    server.wait().expect("ended");
    let mut bytes = Vec::new();
    for run in serde_json::from_str::<Vec<serde_json::Value>>(&json).expect("JSON") {
        let length = run["length"].as_u64().expect("length") as usize;
        // With a bitmap in place of the allocation, dirty is told as no data.
        bytes.resize(bytes.len() + length, !run["data"].as_bool().expect("data"));
    }
    bytes
}

#[test]
fn bitmaps_follow_writes() {
    let scratch = Scratch::new();
    for (i, shape) in ["cluster_size=64k", "cluster_size=512", "extended_l2=on"].iter().enumerate() {
        let image = new(&scratch, &format!("{i}.qcow2"), shape);
        let enabled = BitmapAction::Add { granularity: 4096, enabled: true };
        bitmap(&image, None, "ours", &[enabled]).expect("added");
        run("qemu-img", &["bitmap", "--add", "-g", "64k", str(&image), "theirs"]);
        bitmap(&image, None, "off", &[BitmapAction::Add { granularity: 512, enabled: false }])
            .expect("added");
        assert_clean(&image);
        let (mut random, mut dirty) = (Random(i as u64), vec![false; SIZE as usize]);
        for _ in 0..3 {
            let disk = Disk::open(&image, &quick()).expect("opened");
            for _ in 0..4 {
                let length = 1 + random.below(200_000);
                let offset = random.below(SIZE - length);
                match random.below(3) {
                    0 => disk.run(Op::WriteZeroes { offset, length, unmap: true }).expect("zeroed"),
                    _ => peer::write(&disk, offset, &vec![1; length as usize]).expect("written"),
                }
                dirty[offset as usize..(offset + length) as usize].fill(true);
            }
            disk.close().expect("closed");
            assert_clean(&image);
        }
        for (name, granularity) in [("ours", 4096), ("theirs", 65536), ("off", 512)] {
            let expected: Vec<bool> = dirty
                .chunks(granularity)
                .flat_map(|part| vec![name != "off" && part.contains(&true); part.len()])
                .collect();
            assert!(qemu_bitmap(&scratch, &image, name) == expected, "{name} of {shape}");
        }
        // Through all that can be done to an image.
        snapshot(&image, None, SnapshotAction::Create("s")).expect("taken");
        bitmap(&image, None, "off", &[BitmapAction::Merge { image: None, bitmap: "ours" }]).expect("merged");
        let expected: Vec<bool> =
            dirty.chunks(4096).flat_map(|part| vec![part.contains(&true); part.len()]).collect();
        assert!(qemu_bitmap(&scratch, &image, "off") == expected, "merged, {shape}");
        snapshot(&image, None, SnapshotAction::Delete("s")).expect("deleted");
        resize(&image, None, 2 * SIZE, false, Preallocation::Off).expect("grown");
        resize(&image, None, SIZE / 2, true, Preallocation::Off).expect("shrunk");
        resize(&image, None, SIZE, true, Preallocation::Off).expect("grown");
        let mut cut = expected.clone();
        cut[SIZE as usize / 2..].fill(false);
        assert!(qemu_bitmap(&scratch, &image, "off") == cut, "cut, {shape}");
        bitmap(&image, None, "ours", &[BitmapAction::Clear, BitmapAction::Disable]).expect("cleared");
        assert!(!qemu_bitmap(&scratch, &image, "ours").contains(&true));
        bitmap(&image, None, "theirs", &[BitmapAction::Remove]).expect("removed");
        assert_clean(&image);
        let bitmaps = info(&image, None).expect("info").qcow2.expect("qcow2").bitmaps;
        let facts: Vec<_> = bitmaps.iter().map(|b| (b.name.as_str(), b.enabled, b.in_use)).collect();
        assert_eq!(facts, [("ours", false, false), ("off", false, false)]);
    }
}

#[test]
fn a_bitmap_that_was_not_stored_says_so() {
    let scratch = Scratch::new();
    let image = new(&scratch, "killed.qcow2", "cluster_size=64k");
    run("qemu-img", &["bitmap", "--add", str(&image), "b"]);
    // Opening alone changes nothing.
    let before = std::fs::read(&image).expect("read");
    drop(Disk::open(&image, &OpenOptions::default()).expect("opened"));
    assert!(std::fs::read(&image).expect("read") == before);
    let disk = Disk::open(&image, &OpenOptions::default()).expect("opened");
    peer::write(&disk, 0, b"x").expect("written");
    disk.run(Op::Flush).expect("flushed");
    disk.abandon();
    let json = run("qemu-img", &["info", "--output=json", str(&image)]);
    assert!(json.contains("\"in-use\""), "{json}");
    assert!(info(&image, None).expect("info").qcow2.expect("qcow2").bitmaps[0].in_use);
    assert!(bitmap(&image, None, "b", &[BitmapAction::Clear]).is_err());
    bitmap(&image, None, "b", &[BitmapAction::Remove]).expect("removed");
    assert_clean(&image);
}

#[test]
fn another_backing_file() {
    let scratch = Scratch::new();
    scratch.write("a.raw", &vec![1; 1 << 20]);
    scratch.write("b.raw", &vec![2; 1 << 20]);
    let image = scratch.path("overlay.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "a.raw", "-F", "raw", str(&image)]);
    set_backing(&image, None, Some(&BackingFile { path: "b.raw".into(), format: Format::Raw })).expect("set");
    assert_clean(&image);
    Model(vec![2; 1 << 20]).assert_qemu_reads(&scratch, &image);
    set_backing(&image, None, None).expect("set");
    Model(vec![0; 1 << 20]).assert_qemu_reads(&scratch, &image);
    let own = BackingFile { path: "overlay.qcow2".into(), format: Format::Qcow2 };
    assert!(matches!(set_backing(&image, None, Some(&own)), Err(OpenError::BackingCycle { .. })));
}

#[test]
fn damage_is_repaired() {
    let scratch = Scratch::new();
    let mut random = Random(1);
    for (i, shape) in SHAPES.iter().enumerate() {
        let image = new(&scratch, &format!("{i}.qcow2"), shape);
        scribble(&image, &mut Model(vec![0; SIZE as usize]), i as u64);
        let sound = std::fs::read(&image).expect("read");
        for _ in 0..6 {
            let mut bytes = sound.clone();
            // Behind the header: tables or data.
            let cluster = info(&image, None).expect("info").qcow2.expect("qcow2").cluster_size as usize;
            let places = bytes.len().min(cluster * 6) - cluster;
            for _ in 0..1 + random.below(6) {
                let at = cluster + random.below(places as u64) as usize / 8 * 8;
                let value = if random.below(2) == 0 { random.next() } else { random.below(1 << 22) };
                bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
            }
            std::fs::write(&image, &bytes).expect("written");
            let Ok((before, after)) = repair(&image, None, Repair::All) else { continue };
            assert!(after.is_clean(), "{shape}: {before:?} {after:?}");
            assert_clean(&image);
        }
    }
    // Leaks alone.
    let image = new(&scratch, "leaks.qcow2", "cluster_size=64k");
    let mut model = Model(vec![0; SIZE as usize]);
    scribble(&image, &mut model, 5);
    let mut bytes = std::fs::read(&image).expect("read");
    bytes.resize(bytes.len().next_multiple_of(65536) + 65536, 0);
    let cluster = bytes.len() / 65536 - 1;
    bytes[2 * 65536 + cluster * 2 + 1] = 1;
    std::fs::write(&image, &bytes).expect("written");
    let (before, after) = repair(&image, None, Repair::Leaks).expect("repaired");
    assert_eq!((before.leaks, before.errors), (1, 0), "{before:?}");
    assert!(after.is_clean());
    assert_clean(&image);
    model.assert_qemu_reads(&scratch, &image);
    assert_eq!(Disk::open(&image, &OpenOptions::read_only()).expect("opened").size(), SIZE);
}

/// An overlay with data of its own over another one over a raw image, and what the disk holds.
/// Lets the entry of guest cluster `index` of an image with one L2 table (or of its snapshot) point to `host`.
fn point(image: &Path, l1: u64, index: u64, host: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(image).expect("opened");
    let mut entry = [0; 8];
    file.read_exact_at(&mut entry, l1).expect("read");
    let l2 = u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00;
    file.write_all_at(&(1 << 63 | host).to_be_bytes(), l2 + index * 8).expect("written");
}

#[test]
fn clusters_beyond_the_end_of_the_file() {
    let scratch = Scratch::new();
    let base = scratch.path("base.raw");
    std::fs::write(&base, vec![9; SIZE as usize]).expect("written");
    for (compat, backed) in [("1.1", true), ("1.1", false), ("0.10", false)] {
        for beyond in [0, 1, 2, 5, 1 << 20] {
            let image = scratch.path(&format!("{compat}-{backed}-{beyond}.qcow2"));
            let shape = format!("compat={compat}");
            let mut words = vec!["create", "-q", "-f", "qcow2", "-o", &shape];
            if backed {
                words.extend(["-b", str(&base), "-F", "raw"]);
            }
            let size = SIZE.to_string();
            words.extend([str(&image), &size]);
            run("qemu-img", &words);
            run("qemu-io", &["-c", "write -P 7 0 64k", "-c", "write -P 8 64k 64k", str(&image)]);
            run("qemu-img", &["snapshot", "-c", "s", str(&image)]);
            run("qemu-io", &["-c", "write -P 5 0 64k", str(&image)]);
            let bytes = std::fs::read(&image).expect("read");
            let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight"));
            let end = (bytes.len() as u64).next_multiple_of(65536) + beyond * 65536;
            point(&image, be64(40), 1, end);
            point(&image, be64(be64(64) as usize), 1, end);
            let (before, after) = repair(&image, None, Repair::All).expect("repaired");
            assert!(before.errors >= 2 && after.is_clean(), "{before:?} {after:?}");
            assert_clean(&image);
            // What QEMU, and we, read there before; the rest is untouched.
            for read in ["read -P 5 0 64k", "read -P 0 64k 64k"] {
                run("qemu-io", &["-r", "-c", read, str(&image)]);
            }
            run("qemu-img", &["snapshot", "-a", "s", str(&image)]);
            for read in ["read -P 7 0 64k", "read -P 0 64k 64k"] {
                let text = run("qemu-io", &["-r", "-c", read, str(&image)]);
                assert!(!text.contains("verification failed"), "{text}");
            }
            assert_clean(&image);
        }
    }
}

fn chain(scratch: &Scratch) -> (std::path::PathBuf, std::path::PathBuf, Model) {
    let mut random = Random(77);
    scratch.write("base.raw", &random.bytes(2 << 20));
    let (mid, top) = (scratch.path("mid.qcow2"), scratch.path("top.qcow2"));
    for (image, below, format, size) in [(&mid, "base.raw", "raw", "2M"), (&top, "mid.qcow2", "qcow2", "3M")]
    {
        let _ = std::fs::remove_file(image);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", below, "-F", format, str(image), size]);
    }
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 100k", "-c", "write -z 100k 64k", str(&mid)]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 8 1060k 200k", "-c", "write -z 1300k 64k", str(&top)]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 8 2500k 20k", str(&top)]);
    let raw = scratch.path("expected.raw");
    run("qemu-img", &["convert", "-O", "raw", str(&top), str(&raw)]);
    let model = Model(std::fs::read(&raw).expect("read"));
    (mid, top, model)
}

#[test]
fn overlays_are_committed() {
    let scratch = Scratch::new();
    let options = OpenOptions::default();
    let emptied = terem_block::CommitOptions { empty: true, rate: None };
    let (mid, top, model) = chain(&scratch);
    terem_block::commit(&top, &options, None, emptied, &mut |_, _| true).expect("committed");
    model.assert_qemu_reads(&scratch, &mid);
    model.assert_qemu_reads(&scratch, &top);
    assert_clean(&mid);
    assert_clean(&top);
    assert_eq!(terem_block::check(&top, None).expect("checked").allocated_clusters, 0);
    // Past the one between.
    let (_, top, model) = chain(&scratch);
    let base = scratch.path("base.raw");
    terem_block::commit(&top, &options, Some(&base), emptied, &mut |_, _| true).expect("committed");
    assert!(std::fs::read(&base).expect("read") == model.0);
    model.assert_qemu_reads(&scratch, &top);
    let stranger =
        terem_block::commit(&top, &options, Some(&scratch.path("top.qcow2")), emptied, &mut |_, _| true);
    assert!(matches!(stranger, Err(OpenError::Limit { .. })), "{stranger:?}");
}

#[test]
fn overlays_are_rebased() {
    let scratch = Scratch::new();
    let options = OpenOptions::default();
    let other = scratch.write("other.raw", &vec![3; 1 << 20]);
    for backing in [
        Some(BackingFile { path: "base.raw".into(), format: Format::Raw }),
        Some(BackingFile { path: other, format: Format::Raw }),
        None,
    ] {
        let (_, top, model) = chain(&scratch);
        let how = terem_block::Rebase::Safe { compress: false };
        terem_block::rebase(&top, &options, backing.as_ref(), how, &mut |_, _| true).expect("rebased");
        assert_clean(&top);
        model.assert_qemu_reads(&scratch, &top);
        assert_eq!(
            info(&top, None).expect("info").qcow2.expect("qcow2").backing_format.as_deref(),
            backing.as_ref().map(|_| "raw")
        );
    }
}

#[test]
fn an_image_gets_its_first_backing_file() {
    let scratch = Scratch::new();
    scratch.write("base.raw", &vec![1; 2 << 20]);
    let image = scratch.path("image.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", str(&image), "2M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 100k", str(&image)]);
    let mut model = Model(vec![0; 2 << 20]);
    model.0[1 << 20..][..100 << 10].fill(7);
    let backing = BackingFile { path: "base.raw".into(), format: Format::Raw };
    let (options, how) = (OpenOptions::default(), terem_block::Rebase::Safe { compress: false });
    terem_block::rebase(&image, &options, Some(&backing), how, &mut |_, _| true).expect("rebased");
    assert_clean(&image);
    model.assert_qemu_reads(&scratch, &image);
}

#[test]
fn disks_are_compared() {
    use terem_block::{Comparison, Difference, compare};
    let scratch = Scratch::new();
    let options = OpenOptions::default();
    let (mid, top, model) = chain(&scratch);
    let mut raw = model.0.clone();
    raw.resize(raw.len() + 8192, 0);
    let same = scratch.write("same.raw", &raw);
    let compare = |a: &Path, b: &Path, strict| {
        compare(a, &options, b, &options, strict, &mut |_, _| true).expect("compared")
    };
    assert_eq!(compare(&top, &same, false), Comparison::Equal { same_size: false });
    assert!(matches!(compare(&top, &same, true), Comparison::Differ { what: Difference::Size, .. }));
    raw[(1 << 20) + 77] ^= 1;
    let changed = scratch.write("changed.raw", &raw);
    let offset = (1 << 20) + 77;
    assert_eq!(compare(&changed, &top, false), Comparison::Differ { offset, what: Difference::Contents });
    assert_eq!(compare(&same, &changed, false), Comparison::Differ { offset, what: Difference::Contents });
    assert!(matches!(compare(&mid, &top, false), Comparison::Differ { what: Difference::Contents, .. }));
}

#[test]
fn measures_are_qemus() {
    use terem_block::{CreateOptions, Qcow2Options, measure, measure_size};
    let scratch = Scratch::new();
    let (_, top, _) = chain(&scratch);
    for (shape, qcow2) in [
        ("cluster_size=64k", Qcow2Options::default()),
        (
            "cluster_size=4k,refcount_bits=64",
            Qcow2Options { cluster_size: 4096, refcount_bits: 64, ..Default::default() },
        ),
        ("extended_l2=on", Qcow2Options { extended_l2: true, ..Default::default() }),
    ] {
        let target = CreateOptions { qcow2, ..CreateOptions::default() };
        let theirs = |args: &[&str]| {
            let json =
                run("qemu-img", &[&["measure", "--output=json", "-O", "qcow2", "-o", shape], args].concat());
            let value: serde_json::Value = serde_json::from_str(&json).expect("JSON");
            (value["required"].as_u64(), value["fully-allocated"].as_u64())
        };
        for size in [0, 512, 1 << 30, 100 << 30, 1 << 40] {
            let ours = measure_size(size, &target).expect("measured");
            let size = size.to_string();
            assert_eq!(
                (Some(ours.required), Some(ours.fully_allocated)),
                theirs(&["--size", &size]),
                "{size} {shape}"
            );
        }
        let ours = measure(&top, &OpenOptions::default(), &target).expect("measured");
        assert_eq!((Some(ours.required), Some(ours.fully_allocated)), theirs(&[str(&top)]), "{shape}");
    }
}

#[test]
fn only_qcow2_is_committed() {
    let scratch = Scratch::new();
    let (base, top) = (scratch.path("base.vmdk"), scratch.path("top.vmdk"));
    run("qemu-img", &["create", "-q", "-f", "vmdk", str(&base), "1M"]);
    run("qemu-img", &["create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", str(&top)]);
    let disk = Disk::open(&top, &OpenOptions::read_only()).expect("opened");
    assert_eq!(disk.facts().backing_formats, [Format::Vmdk]);
    drop(disk);
    let how = terem_block::CommitOptions { empty: true, rate: None };
    let error = terem_block::commit(&top, &quick(), None, how, &mut |_, _| true).expect_err("no qcow2");
    assert!(error.to_string().contains("committing a vmdk image is not supported"), "{error}");
    let error = resize(&base, None, SIZE, false, Preallocation::Off).expect_err("not resized");
    assert!(!matches!(error, OpenError::WouldShrink { .. }), "{error}");
    let raw = scratch.path("a.raw");
    std::fs::write(&raw, vec![0; SIZE as usize]).expect("written");
    let error = resize(&raw, Some(Format::Raw), SIZE / 2, false, Preallocation::Off).expect_err("smaller");
    assert!(matches!(error, OpenError::WouldShrink { old: SIZE, .. }), "{error}");
}

/// The parts that several workers write follow each other in the file.
#[test]
fn a_copy_has_no_holes() {
    let scratch = Scratch::new();
    let raw = scratch.path("a.raw");
    let mut random = Random(5);
    std::fs::write(&raw, random.bytes(40 << 20)).expect("written");
    let open = OpenOptions { format: Some(Format::Raw), ..OpenOptions::read_only() };
    for threads in [1, 2, 7] {
        let image = scratch.path(&format!("{threads}.qcow2"));
        let options = terem_block::ConvertOptions { threads: Some(threads), ..Default::default() };
        terem_block::convert(
            &raw,
            &open,
            &image,
            &terem_block::CreateOptions::default(),
            &options,
            &mut |_, _| true,
        )
        .expect("copied");
        assert_clean(&image);
        let report = terem_block::check(&image, None).expect("checked");
        let length = std::fs::metadata(&image).expect("there").len();
        // 640 clusters of data; header, refcount table and block, L1 table, one L2 table.
        assert_eq!((report.image_end, length), (645 << 16, 645 << 16), "{threads} threads");
    }
}
