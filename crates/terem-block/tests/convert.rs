//! Copies hold what their source holds, in every format and shape, as QEMU reads them.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use peer::{Random, Scratch, assert_clean, run, str};
use terem_block::{
    BackingFile, BackingPolicy, Compression, ConvertOptions, CreateOptions, Format, OpenError, OpenOptions,
    Qcow2Options, convert, export, import, info,
};

/// Data, in part compressible, and holes of all sizes.
fn contents(size: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = Vec::new();
    while bytes.len() < size {
        let most = if random.below(3) == 0 { 900_000 } else { 40_000 };
        let length = 1 + random.below(most) as usize;
        if random.below(2) == 0 {
            bytes.resize(bytes.len() + length, 0);
        } else {
            bytes.extend(random.bytes(length));
        }
    }
    bytes.truncate(size);
    bytes
}

fn sparse_raw(scratch: &Scratch, name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch.write(name, bytes);
    run("fallocate", &["-d", str(&path)]);
    path
}

fn same(raw: &Path, image: &Path, format: &str) {
    run("qemu-img", &["compare", "-f", "raw", "-F", format, str(raw), str(image)]);
}

#[test]
fn all_shapes() {
    let scratch = Scratch::new();
    let size = (3 << 20) + 512 * 3;
    let raw = sparse_raw(&scratch, "source.raw", &contents(size, 1));
    let shapes: &[(bool, Qcow2Options)] = &[
        (false, Qcow2Options::default()),
        (true, Qcow2Options::default()),
        (true, Qcow2Options { compression: Compression::Zstd, cluster_size: 2 << 20, ..Default::default() }),
        (true, Qcow2Options { cluster_size: 512, version: 2, ..Default::default() }),
        (true, Qcow2Options { refcount_bits: 1, ..Default::default() }),
        (false, Qcow2Options { extended_l2: true, ..Default::default() }),
        (true, Qcow2Options { extended_l2: true, ..Default::default() }),
        (false, Qcow2Options { cluster_size: 512, refcount_bits: 64, ..Default::default() }),
        (false, Qcow2Options { cluster_size: 2 << 20, ..Default::default() }),
        (false, Qcow2Options { data_file: Some("data".into()), ..Default::default() }),
    ];
    for (i, (compress, qcow2)) in shapes.iter().enumerate() {
        let image = scratch.path(&format!("{i}.qcow2"));
        let target = CreateOptions { qcow2: qcow2.clone(), ..CreateOptions::default() };
        let options = ConvertOptions {
            compress: *compress,
            threads: Some(1 + i % 4),
            durable: i == 0,
            ..Default::default()
        };
        convert(&raw, &OpenOptions::default(), &image, &target, &options, &mut |_, _| true).expect("copied");
        if qcow2.data_file.is_none() {
            assert_clean(&image);
            same(&raw, &image, "qcow2");
        }
        let report = terem_block::check(&image, None).expect("checked");
        assert!(report.is_clean());
        assert_eq!(report.compressed_clusters > 0, *compress, "{qcow2:?}");
        // And on, into a raw image.
        let back = scratch.path("back.raw");
        let target = CreateOptions { format: Format::Raw, overwrite: true, ..CreateOptions::default() };
        let open = OpenOptions::default();
        let quick = ConvertOptions { durable: false, ..Default::default() };
        convert(&image, &open, &back, &target, &quick, &mut |_, _| true).expect("copied");
        assert!(fs::read(&back).expect("read") == fs::read(&raw).expect("read"), "{qcow2:?}");
        let blocks = fs::metadata(&back).expect("there").blocks() * 512;
        assert!(blocks < size as u64 * 3 / 4, "{blocks} bytes taken");
    }
}

#[test]
fn a_chain_becomes_one_image_or_an_overlay() {
    let scratch = Scratch::new();
    let base = sparse_raw(&scratch, "base.raw", &contents(3 << 20, 2));
    let (mid, top, flat) = (scratch.path("mid.qcow2"), scratch.path("top.qcow2"), scratch.path("flat.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", str(&base), "-F", "raw", str(&mid), "4M"]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 100k", "-c", "write -z 100k 64k", str(&mid)]);
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=4k",
            "-b",
            str(&mid),
            "-F",
            "qcow2",
            str(&top),
            "5M",
        ],
    );
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 3500k 900k", "-c", "write -z 1050k 3k", str(&top)]);
    let quick = ConvertOptions { durable: false, ..Default::default() };
    convert(&top, &OpenOptions::default(), &flat, &CreateOptions::default(), &quick, &mut |_, _| true)
        .expect("copied");
    assert_clean(&flat);
    run("qemu-img", &["compare", str(&top), str(&flat)]);
    // A compressed source.
    let (packed, again) = (scratch.path("packed.qcow2"), scratch.path("again.qcow2"));
    run("qemu-img", &["convert", "-c", "-O", "qcow2", str(&top), str(&packed)]);
    convert(&packed, &OpenOptions::default(), &again, &CreateOptions::default(), &quick, &mut |_, _| true)
        .expect("copied");
    run("qemu-img", &["compare", str(&top), str(&again)]);
    // Over the same backing file all is written.
    let backing = Some(BackingFile { path: base.clone(), format: Format::Raw });
    let overlay = scratch.path("overlay.qcow2");
    let target = CreateOptions { backing, ..CreateOptions::default() };
    let any = OpenOptions { backing: BackingPolicy::Any, ..OpenOptions::default() };
    convert(&top, &any, &overlay, &target, &quick, &mut |_, _| true).expect("copied");
    run("qemu-img", &["compare", str(&top), str(&overlay)]);
}

#[test]
fn compressed_clusters_in_a_backing_file() {
    let scratch = Scratch::new();
    let raw = sparse_raw(&scratch, "base.raw", &contents((6 << 20) + 512 * 5, 6));
    let quick = ConvertOptions { durable: false, ..Default::default() };
    for options in [
        "compression_type=zlib",
        "compression_type=zstd",
        "cluster_size=2M,compression_type=zstd",
        "cluster_size=4k",
        "cluster_size=512,compat=0.10",
    ] {
        let (base, top, back) =
            (scratch.path("base.qcow2"), scratch.path("top.qcow2"), scratch.path("back.raw"));
        run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, str(&raw), str(&base)]);
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", str(&base), "-F", "qcow2", str(&top), "7M"]);
        // Clusters of the overlay cut those below it anywhere.
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 100k", "-c", "write -z 3000k 64k", str(&top)]);
        let target = CreateOptions { format: Format::Raw, overwrite: true, ..CreateOptions::default() };
        let open = OpenOptions { backing: BackingPolicy::Any, ..OpenOptions::default() };
        convert(&top, &open, &back, &target, &quick, &mut |_, _| true).expect("copied");
        same(&back, &top, "qcow2");
    }
}

#[test]
fn into_an_image_that_is_there() {
    let scratch = Scratch::new();
    let raw = sparse_raw(&scratch, "source.raw", &contents(3 << 20, 3));
    let existing = ConvertOptions { existing: true, ..Default::default() };
    for format in ["raw", "qcow2"] {
        let image = scratch.path("there");
        let _ = fs::remove_file(&image);
        run("qemu-img", &["create", "-q", "-f", format, str(&image), "3M"]);
        run("qemu-io", &["-f", format, "-c", "write -P 9 0 3M", str(&image)]);
        let target =
            CreateOptions { format: Format::from_name(format).expect("known"), ..CreateOptions::default() };
        convert(&raw, &OpenOptions::default(), &image, &target, &existing, &mut |_, _| true).expect("copied");
        same(&raw, &image, format);
    }
    let small = scratch.path("small");
    run("qemu-img", &["create", "-q", "-f", "raw", str(&small), "1M"]);
    let target = CreateOptions { format: Format::Raw, ..CreateOptions::default() };
    let e = convert(&raw, &OpenOptions::default(), &small, &target, &existing, &mut |_, _| true);
    assert!(matches!(e, Err(OpenError::Limit { .. })), "{e:?}");
}

#[test]
fn what_is_stopped_leaves_what_was_there() {
    let scratch = Scratch::new();
    let raw = scratch.write("source.raw", &contents(4 << 20, 4));
    let image = scratch.path("target.qcow2");
    fs::write(&image, b"precious").expect("written");
    let target = CreateOptions { overwrite: true, ..CreateOptions::default() };
    let open = OpenOptions::default();
    let stopped = convert(&raw, &open, &image, &target, &ConvertOptions::default(), &mut |_, _| false);
    assert!(matches!(stopped, Err(OpenError::Cancelled)), "{stopped:?}");
    assert_eq!(fs::read(&image).expect("there"), b"precious");
    let refused =
        convert(&raw, &open, &image, &CreateOptions::default(), &ConvertOptions::default(), &mut |_, _| true);
    assert!(matches!(refused, Err(OpenError::Exists { .. })), "{refused:?}");
    convert(&raw, &open, &image, &target, &ConvertOptions::default(), &mut |_, _| true).expect("copied");
    same(&raw, &image, "qcow2");
    let left: Vec<_> = fs::read_dir(image.parent().expect("a directory")).expect("read").flatten().collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn streams() {
    let scratch = Scratch::new();
    let bytes = contents((3 << 20) + 512, 5);
    let image = scratch.path("imported.qcow2");
    import(&mut bytes.as_slice(), None, &image, &CreateOptions::default(), &mut |_, _| true)
        .expect("imported");
    assert_clean(&image);
    assert_eq!(info(&image, None).expect("info").virtual_size, bytes.len() as u64);
    let mut out = Vec::new();
    export(&image, &OpenOptions::default(), &mut out, &mut |_, _| true).expect("exported");
    assert!(out == bytes);
}
