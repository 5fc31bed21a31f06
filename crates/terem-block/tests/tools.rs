//! Making, describing and copying images.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::fs;
use std::os::unix::fs::MetadataExt;

use peer::{Random, Scratch, assert_clean, run, str};
use terem_block::{
    AioEngine, BackingFile, BackingPolicy, BlockBackend, ConvertOptions, CreateOptions, Disk, Format, Op,
    OpenError, OpenOptions, Preallocation, Qcow2Options, convert, create, import, info,
};

#[test]
fn created_images_are_what_qemu_expects() {
    let scratch = Scratch::new();
    for (i, (cluster_size, size, lazy)) in [
        (512, 1 << 20, false),
        (65536, 10 << 30, true),
        (65536, 0, false),
        (2 << 20, 1 << 40, false),
        (4096, 3 << 30, true),
    ]
    .into_iter()
    .enumerate()
    {
        for preallocation in [Preallocation::Off, Preallocation::Metadata] {
            if preallocation == Preallocation::Metadata && size > 1 << 20 {
                continue;
            }
            let image = scratch.path(&format!("{i}{preallocation:?}.qcow2"));
            let qcow2 = Qcow2Options { cluster_size, lazy_refcounts: lazy, ..Qcow2Options::default() };
            let options = CreateOptions { qcow2, preallocation, ..CreateOptions::new(Format::Qcow2, size) };
            create(&image, &options).expect("made");
            assert_clean(&image);
            let json = run("qemu-img", &["info", "--output=json", str(&image)]);
            assert!(json.contains(&format!("\"virtual-size\": {size},")), "{json}");
            assert!(json.contains(&format!("\"cluster-size\": {cluster_size},")), "{json}");
            assert!(json.contains(&format!("\"lazy-refcounts\": {lazy}")), "{json}");
            let report = terem_block::check(&image, None).expect("checked");
            let expected = if preallocation == Preallocation::Off { 0 } else { report.total_clusters };
            assert_eq!(report.allocated_clusters, expected);
            let ours = info(&image, None).expect("info");
            assert_eq!((ours.format, ours.virtual_size), (Format::Qcow2, size));
        }
    }
}

fn clusters(cluster_size: u32) -> Qcow2Options {
    Qcow2Options { cluster_size, ..Qcow2Options::default() }
}

#[test]
fn create_refuses_what_makes_no_sense() {
    let scratch = Scratch::new();
    let image = scratch.path("new.qcow2");
    let plain = CreateOptions::new(Format::Qcow2, 1 << 20);
    for bad in [
        CreateOptions { qcow2: clusters(1000), ..plain.clone() },
        CreateOptions { qcow2: clusters(4 << 20), ..plain.clone() },
        CreateOptions { qcow2: Qcow2Options { refcount_bits: 3, ..clusters(512) }, ..plain.clone() },
        CreateOptions { qcow2: Qcow2Options { extended_l2: true, ..clusters(8192) }, ..plain.clone() },
        CreateOptions {
            qcow2: Qcow2Options { version: 2, refcount_bits: 8, ..clusters(512) },
            ..plain.clone()
        },
        CreateOptions { size: None, ..plain.clone() },
        CreateOptions { size: Some(u64::MAX), ..plain.clone() },
        CreateOptions { size: Some(1 << 50), qcow2: clusters(512), ..plain.clone() },
    ] {
        assert!(matches!(create(&image, &bad), Err(OpenError::Limit { .. })), "{bad:?}");
        assert!(!image.exists(), "{bad:?} left a file");
    }
    create(&image, &plain).expect("made");
    assert!(matches!(create(&image, &plain), Err(OpenError::Exists { .. })));
    let overwrite = CreateOptions { overwrite: true, ..plain };
    create(&image, &overwrite).expect("replaced");
    let _disk = Disk::open(&image, &OpenOptions::default()).expect("opened");
    assert!(matches!(create(&image, &overwrite), Err(OpenError::Busy { .. })), "in use");
}

#[test]
fn info_tells_what_qemu_tells() {
    let scratch = Scratch::new();
    scratch.write("base.raw", &[1; 1 << 20]);
    let image = scratch.path("overlay.qcow2");
    let backing = Some(BackingFile { path: "base.raw".into(), format: Format::Raw });
    create(&image, &CreateOptions { backing, ..CreateOptions::default() }).expect("made");
    let json = run("qemu-img", &["info", "--output=json", str(&image)]);
    assert!(
        json.contains("\"backing-filename\": \"base.raw\"")
            && json.contains("\"backing-filename-format\": \"raw\"")
    );
    run("qemu-img", &["snapshot", "-c", "one", str(&image)]);
    let told = info(&image, None).expect("info");
    let text = serde_json::to_string(&told).expect("serialised");
    let qcow2 = told.qcow2.expect("qcow2");
    assert_eq!(qcow2.backing_filename.as_deref(), Some("base.raw"));
    assert_eq!(qcow2.backing_format.as_deref(), Some("raw"));
    assert_eq!((qcow2.version, qcow2.refcount_bits, qcow2.compression_type), (3, 16, "zlib"));
    assert_eq!(qcow2.snapshots[0].name, "one");
    assert_eq!(told.virtual_size, 1 << 20);
    assert!(text.contains("\"virtual-size\":1048576") && text.contains("\"format\":\"qcow2\""), "{text}");
    let raw = info(scratch.path("base.raw"), None).expect("info");
    assert_eq!((raw.format, raw.virtual_size, raw.qcow2), (Format::Raw, 1 << 20, None));
}

#[test]
fn copies_are_equal_and_sparse() {
    let scratch = Scratch::new();
    let size = 48 << 20;
    let mut bytes = vec![0; size];
    for (i, at) in [0, 5 << 20, (9 << 20) + 77, 47 << 20].into_iter().enumerate() {
        let piece = Random(i as u64).bytes(300_000);
        bytes[at..at + piece.len()].copy_from_slice(&piece);
    }
    let raw = scratch.path("source.raw");
    let file = fs::File::create(&raw).expect("made");
    file.set_len(size as u64).expect("sized");
    for at in (0..size).step_by(4096) {
        if bytes[at..at + 4096].iter().any(|&b| b != 0) {
            std::os::unix::fs::FileExt::write_all_at(&file, &bytes[at..at + 4096], at as u64)
                .expect("written");
        }
    }
    let (qcow2, back) = (scratch.path("copy.qcow2"), scratch.path("back.raw"));
    let (mut last, mut calls) = (0, 0);
    let target = CreateOptions::default();
    convert(&raw, &OpenOptions::default(), &qcow2, &target, &ConvertOptions::default(), &mut |done, all| {
        assert!(done >= last && all == size as u64);
        (last, calls) = (done, calls + 1);
        true
    })
    .expect("copied");
    assert!(last == size as u64 && calls > 0);
    assert_clean(&qcow2);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", str(&raw), str(&qcow2)]);
    // (Each worker writes to a part of its own: between them the file has holes.)
    assert!(fs::metadata(&qcow2).expect("there").blocks() * 512 < 4 << 20, "zeroes take space");

    let target = CreateOptions { format: Format::Raw, ..CreateOptions::default() };
    convert(&qcow2, &OpenOptions::default(), &back, &target, &ConvertOptions::default(), &mut |_, _| true)
        .expect("copied");
    assert!(fs::read(&back).expect("read") == bytes);
    assert!(fs::metadata(&back).expect("there").blocks() * 512 < 4 << 20, "zeroes take space");

    let imported = scratch.path("imported.qcow2");
    let mut source = fs::File::open(&raw).expect("opened");
    import(&mut source, Some(size as u64 + 4096), &imported, &CreateOptions::default(), &mut |_, _| true)
        .expect("imported");
    assert_clean(&imported);
    bytes.extend([0; 4096]);
    peer::Model(bytes).assert_qemu_reads(&scratch, &imported);
}

#[test]
fn raw_disks_read_write_zero_and_discard() {
    let scratch = Scratch::new();
    for aio in [AioEngine::Auto, AioEngine::Threads] {
        let image = scratch.write("disk.raw", &[9; 1 << 20 | 100]);
        let options = OpenOptions { format: Some(Format::Raw), ..peer::options(aio) };
        let disk = Disk::open(&image, &options).expect("opened");
        assert_eq!(disk.size(), 1 << 20 | 512, "whole sectors");
        let mut model = peer::Model(vec![9; 1 << 20 | 512]);
        model.0[1 << 20 | 100..].fill(0);
        let mut random = Random(4);
        for _ in 0..100 {
            model.step(&disk, &mut random, 4096);
        }
        model.assert_equals(&disk);
        disk.run(Op::Flush).expect("flushed");
        disk.close().expect("closed");
        let file = fs::read(&image).expect("read");
        assert!(file[..] == model.0[..file.len()]);
    }
}

#[test]
fn backing_policies_reach_the_copy() {
    let scratch = Scratch::new();
    scratch.write("base.raw", &[3; 1 << 20]);
    let image = scratch.path("overlay.qcow2");
    let backing = Some(BackingFile { path: "base.raw".into(), format: Format::Raw });
    create(&image, &CreateOptions { backing, ..CreateOptions::default() }).expect("made");
    let flat = scratch.path("flat.qcow2");
    let none = OpenOptions { backing: BackingPolicy::None, ..OpenOptions::default() };
    let e =
        convert(&image, &none, &flat, &CreateOptions::default(), &ConvertOptions::default(), &mut |_, _| {
            true
        })
        .expect_err("refused");
    assert!(matches!(e, OpenError::BackingRefused { .. }) && !flat.exists());
    convert(
        &image,
        &OpenOptions::default(),
        &flat,
        &CreateOptions::default(),
        &ConvertOptions::default(),
        &mut |_, _| true,
    )
    .expect("flattened");
    run("qemu-img", &["compare", str(&image), str(&flat)]);
}
