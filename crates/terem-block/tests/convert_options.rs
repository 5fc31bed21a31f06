//! What copies can be told: several sources, salvage, no holes, copies by the file system, and into what is there.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use peer::{Random, Scratch, assert_clean, run, str};
use terem_block::{
    ConvertOptions, CreateOptions, Format, OpenOptions, Qcow2Options, Source, convert, convert_sources,
};

const CLUSTER: usize = 64 << 10;

/// Clusters of noise that compresses by half, with a hole of three in every eight.
fn contents(clusters: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = Vec::new();
    for cluster in 0..clusters {
        if cluster % 8 < 5 {
            bytes.extend(random.bytes(CLUSTER / 2));
            bytes.resize((cluster + 1) * CLUSTER, cluster as u8 | 1);
        } else {
            bytes.resize((cluster + 1) * CLUSTER, 0);
        }
    }
    bytes
}

fn raw(scratch: &Scratch, name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch.write(name, bytes);
    run("fallocate", &["-d", str(&path)]);
    path
}

fn target(format: Format) -> CreateOptions {
    CreateOptions { format, overwrite: true, ..CreateOptions::default() }
}

fn quick() -> ConvertOptions {
    ConvertOptions { durable: false, ..ConvertOptions::default() }
}

fn copy(from: &Path, format: Format, to: &Path, into: Format, options: &ConvertOptions) {
    let open = OpenOptions { format: Some(format), ..OpenOptions::default() };
    convert(from, &open, to, &target(into), options, &mut |_, _| true).expect("copied");
}

#[test]
fn several_sources() {
    let scratch = Scratch::new();
    let mut all = Vec::new();
    let mut sources = Vec::new();
    for (i, (size, words)) in [
        (20 * CLUSTER + 512 * 3, &[][..]),
        (17 * CLUSTER, &["-c", "-O", "qcow2"]),
        (33 * CLUSTER + 512, &["-O", "vmdk"]),
        (512, &["-O", "qcow2"]),
    ]
    .into_iter()
    .enumerate()
    {
        let mut bytes = contents(34, i as u64 + 1);
        bytes.truncate(size);
        let mut path = raw(&scratch, &format!("{i}.raw"), &bytes);
        if let [.., format] = words {
            let image = scratch.path(&format!("{i}.{format}"));
            run("qemu-img", &[&["convert", "-f", "raw"], words, &[str(&path), str(&image)]].concat());
            path = image;
        }
        let format = words.last().map_or(Some(Format::Raw), |name| Format::from_name(name));
        sources.push(Source { path, options: OpenOptions { format, ..OpenOptions::default() } });
        all.extend(bytes);
    }
    let back = scratch.path("back.raw");
    for options in [quick(), ConvertOptions { offload: true, ..quick() }] {
        convert_sources(&sources, &back, &target(Format::Raw), &options, &mut |_, _| true).expect("copied");
        assert!(fs::read(&back).expect("read") == all);
    }
    let image = scratch.path("all.qcow2");
    let compress = ConvertOptions { compress: true, ..quick() };
    convert_sources(&sources, &image, &target(Format::Qcow2), &compress, &mut |_, _| true).expect("copied");
    assert_clean(&image);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", str(&back), str(&image)]);
}

static WARNINGS: AtomicUsize = AtomicUsize::new(0);

#[test]
fn what_cannot_be_read_is_zeroes() {
    let scratch = Scratch::new();
    let mut bytes = contents(40, 9);
    let (source, image, back) =
        (raw(&scratch, "a.raw", &bytes), scratch.path("a.qcow2"), scratch.path("back"));
    let words = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd"];
    run("qemu-img", &[&words[..], &[str(&source), str(&image)]].concat());
    // The ninth cluster is no frame of zstd's any more.
    let damaged = 8;
    let file = fs::OpenOptions::new().read(true).write(true).open(&image).expect("opened");
    let be64 = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).expect("read");
        u64::from_be_bytes(bytes)
    };
    let l2 = be64(be64(40)) & 0x00ff_ffff_ffff_fe00;
    let entry = be64(l2 + damaged as u64 * 8);
    assert_eq!(entry >> 62, 1, "not compressed");
    file.write_all_at(&[0xff; 16], entry & ((1 << 54) - 1)).expect("written");
    let open = OpenOptions::default();
    let e = convert(&image, &open, &back, &target(Format::Raw), &quick(), &mut |_, _| true);
    assert!(e.is_err_and(|e| e.to_string().contains("reading")));
    let warn = |_: &str| {
        WARNINGS.fetch_add(1, Ordering::Relaxed);
    };
    let salvage = ConvertOptions { salvage: true, warn, ..quick() };
    copy(&image, Format::Qcow2, &back, Format::Raw, &salvage);
    bytes[damaged * CLUSTER..(damaged + 1) * CLUSTER].fill(0);
    assert!(fs::read(&back).expect("read") == bytes);
    // One for each sector.
    assert_eq!(WARNINGS.load(Ordering::Relaxed), CLUSTER / 512);
}

#[test]
fn holes_and_copies_by_the_file_system() {
    let scratch = Scratch::new();
    let bytes = contents(50, 3);
    let source = raw(&scratch, "a.raw", &bytes);
    let back = scratch.path("back.raw");
    let taken = || fs::metadata(&back).expect("there").blocks() * 512;
    let all = bytes.len() as u64;
    for (offload, rate) in [(false, None), (true, None), (true, Some(1 << 30))] {
        copy(&source, Format::Raw, &back, Format::Raw, &ConvertOptions { offload, rate, ..quick() });
        assert!(fs::read(&back).expect("read") == bytes);
        assert!(taken() < all, "it has no holes");
        copy(&source, Format::Raw, &back, Format::Raw, &ConvertOptions { offload, sparse: 0, ..quick() });
        assert!(fs::read(&back).expect("read") == bytes);
        assert!(taken() >= all, "it has holes");
    }
    let image = scratch.path("a.qcow2");
    for compress in [false, true] {
        let full = ConvertOptions { compress, sparse: 0, ..quick() };
        copy(&source, Format::Raw, &image, Format::Qcow2, &full);
        assert_clean(&image);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", str(&source), str(&image)]);
        let map = run("qemu-img", &["map", "--output=json", str(&image)]);
        assert!(!map.contains("\"zero\": true"), "{map}");
    }
}

#[test]
fn zeroes_in_what_is_there() {
    let scratch = Scratch::new();
    let source = raw(&scratch, "a.raw", &contents(37, 7)[..36 * CLUSTER + 512]);
    let image = scratch.path("there.qcow2");
    for (compress, sparse, cluster_size) in
        [(false, 4096, 65536), (false, 1 << 20, 65536), (true, 1 << 20, 65536), (true, 0, 512)]
    {
        let size = (36 * CLUSTER + 512) as u64;
        let qcow2 = Qcow2Options { cluster_size, ..Qcow2Options::default() };
        let new = CreateOptions { size: Some(size), qcow2, ..target(Format::Qcow2) };
        terem_block::create(&image, &new).expect("made");
        run("qemu-io", &["-c", &format!("write -P 9 0 {size}"), str(&image)]);
        let options = ConvertOptions { existing: true, compress, sparse, ..quick() };
        copy(&source, Format::Raw, &image, Format::Qcow2, &options);
        assert_clean(&image);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", str(&source), str(&image)]);
    }
}
