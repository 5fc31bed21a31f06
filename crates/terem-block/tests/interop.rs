//! Images made by QEMU are read and written right, and QEMU finds nothing wrong with them afterwards.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use peer::{Model, Random, Scratch, assert_clean, run, str};
use terem_block::{AioEngine, BlockBackend, Cache, Disk, OpenOptions};

const SIZE: u64 = 5 << 20;

/// Nothing here depends on flushes reaching the storage, which takes most of the time otherwise.
fn options(aio: AioEngine) -> OpenOptions {
    OpenOptions { cache: Cache::Unsafe, ..peer::options(aio) }
}

/// Random requests with reopening in between; then both we and QEMU must read what the model says.
fn exercise(scratch: &Scratch, image: &std::path::Path, model: &mut Model, seed: u64, options: &OpenOptions) {
    let unit = terem_block::info(image, None).expect("info").qcow2.expect("qcow2").cluster_size;
    let mut random = Random(seed);
    for _ in 0..2 {
        let disk = Disk::open(image, options).expect("opened");
        assert_eq!(disk.size(), model.0.len() as u64);
        model.assert_equals(&disk);
        for _ in 0..50 {
            model.step(&disk, &mut random, unit);
        }
        model.assert_equals(&disk);
        disk.close().expect("closed");
        assert_clean(image);
        model.assert_qemu_reads(scratch, image);
    }
}

#[test]
fn empty_images_of_all_shapes() {
    let shapes: &[(&str, u64)] = &[
        ("compat=1.1,cluster_size=65536", SIZE),
        ("compat=0.10,cluster_size=65536", SIZE),
        ("compat=1.1,cluster_size=512", 1 << 20),
        ("compat=0.10,cluster_size=512", 1 << 20),
        ("compat=1.1,cluster_size=512,refcount_bits=64", 2 << 20),
        ("compat=1.1,cluster_size=512,refcount_bits=1", 1 << 20),
        ("compat=1.1,cluster_size=4096,refcount_bits=1", SIZE),
        ("compat=1.1,cluster_size=4096,refcount_bits=2", SIZE),
        ("compat=1.1,cluster_size=4096,refcount_bits=4", SIZE),
        ("compat=1.1,cluster_size=16384,refcount_bits=8", SIZE),
        ("compat=1.1,cluster_size=16384,refcount_bits=32", SIZE),
        ("compat=1.1,cluster_size=2097152,refcount_bits=64", 9 << 20),
        ("compat=1.1,cluster_size=65536,lazy_refcounts=on", SIZE),
        ("compat=1.1,cluster_size=65536,preallocation=metadata", SIZE),
        ("compat=1.1,cluster_size=65536,preallocation=falloc", SIZE),
        ("compat=1.1,cluster_size=65536,compression_type=zstd", SIZE),
        ("compat=1.1,cluster_size=65536", 3 << 19 | 512),
        ("extended_l2=on,cluster_size=65536", SIZE),
        ("extended_l2=on,cluster_size=16384", 3 << 19 | 512),
        ("extended_l2=on,cluster_size=2M,refcount_bits=1", 9 << 20),
        ("extended_l2=on,cluster_size=64k,preallocation=metadata", SIZE),
    ];
    let scratch = Scratch::new();
    for (i, (shape, size)) in shapes.iter().enumerate() {
        let image = scratch.path(&format!("{i}.qcow2"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", shape, str(&image), &size.to_string()]);
        let mut model = Model(vec![0; *size as usize]);
        let aio = if i % 2 == 0 { AioEngine::Auto } else { AioEngine::Threads };
        eprintln!("{shape}");
        exercise(&scratch, &image, &mut model, i as u64, &options(aio));
    }
}

/// Small clusters, so that each request allocates and frees many; our own check finds what QEMU's would, and faster.
#[test]
#[ignore = "minutes; run by hand"]
fn many_random_requests_lose_no_cluster() {
    let scratch = Scratch::new();
    for (i, shape) in ["compat=0.10,cluster_size=512", "compat=1.1,cluster_size=512"].iter().enumerate() {
        for seed in 0..1000 {
            let image = scratch.path(&format!("{i}.{seed}.qcow2"));
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", shape, str(&image), "1M"]);
            let mut model = Model(vec![0; 1 << 20]);
            let mut random = Random(seed);
            for _ in 0..3 {
                let disk = Disk::open(&image, &options(AioEngine::Threads)).expect("opened");
                for _ in 0..60 {
                    model.step(&disk, &mut random, 512);
                }
                model.assert_equals(&disk);
                disk.close().expect("closed");
                let report = terem_block::check(&image, None).expect("checked");
                assert!(report.is_clean(), "{shape}, seed {seed}: {report:?}");
            }
            std::fs::remove_file(&image).expect("removed");
        }
    }
}

#[test]
fn refcount_table_grows() {
    // 512-byte clusters with 64-bit refcounts: a block counts 64 clusters, a table cluster 64 blocks, 2 MiB.
    let scratch = Scratch::new();
    let image = scratch.path("grow.qcow2");
    let size = 12 << 20;
    let shape = "cluster_size=512,refcount_bits=64";
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", shape, str(&image), &size.to_string()]);
    let disk = Disk::open(&image, &options(AioEngine::Auto)).expect("opened");
    let model = Model(Random(7).bytes(size));
    for (i, piece) in model.0.chunks(1 << 20).enumerate() {
        peer::write(&disk, (i as u64) << 20, piece).expect("written");
    }
    disk.close().expect("closed");
    assert_clean(&image);
    model.assert_qemu_reads(&scratch, &image);
}

#[test]
fn backing_chains() {
    let scratch = Scratch::new();
    let mut random = Random(99);
    // raw (short) <- qcow2 (longer) <- qcow2 (longest)
    let base = scratch.write("base.raw", &random.bytes(3 << 19 | 512));
    let (mid, top) = (scratch.path("mid.qcow2"), scratch.path("top.qcow2"));
    let create = |image: &std::path::Path, below: &str, format: &str, options: &str, size: u64| {
        let size = size.to_string();
        let args =
            ["create", "-q", "-f", "qcow2", "-o", options, "-b", below, "-F", format, str(image), &size];
        run("qemu-img", &args);
    };
    for (seed, shape) in [
        (1, "compat=1.1,cluster_size=16k"),
        (2, "compat=0.10"),
        (3, "cluster_size=512"),
        (4, "extended_l2=on,cluster_size=64k"),
        (5, "extended_l2=on,cluster_size=2M"),
    ] {
        create(&mid, "base.raw", "raw", "compat=1.1,cluster_size=4096", 3 << 20);
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 100k", "-c", "write -z 100k 64k", str(&mid)]);
        create(&top, "mid.qcow2", "qcow2", shape, 4 << 20);
        let before = std::fs::read(&mid).expect("read");
        let raw = scratch.path("expected.raw");
        run("qemu-img", &["convert", "-O", "raw", str(&top), str(&raw)]);
        let mut model = Model(std::fs::read(&raw).expect("read"));
        exercise(&scratch, &top, &mut model, seed, &options(AioEngine::Auto));
        assert!(before == std::fs::read(&mid).expect("read"), "the backing file was changed");
    }
    let disk = Disk::open(&top, &OpenOptions::read_only()).expect("opened");
    let resolved = |p: &std::path::Path| p.canonicalize().expect("there");
    assert_eq!(disk.facts().backing, [resolved(&mid), resolved(&base)]);
}

#[test]
fn compressed_clusters() {
    let scratch = Scratch::new();
    let mut random = Random(5);
    for (i, shape) in [
        "compression_type=zlib",
        "compression_type=zstd,cluster_size=16k",
        "compat=0.10,cluster_size=512",
        "extended_l2=on",
    ]
    .iter()
    .enumerate()
    {
        let mut bytes = Vec::new();
        while bytes.len() < 2 << 20 {
            let len = 1 + random.below(100_000) as usize;
            let value = random.below(200) as u8;
            bytes.extend((0..len).map(|i| value.wrapping_add((i / 300) as u8)));
        }
        bytes.truncate(2 << 20);
        let raw = scratch.write("source.raw", &bytes);
        let image = scratch.path(&format!("compressed{i}.qcow2"));
        run("qemu-img", &["convert", "-c", "-O", "qcow2", "-o", shape, "-f", "raw", str(&raw), str(&image)]);
        assert!(terem_block::check(&image, None).expect("checked").compressed_clusters > 0);
        exercise(&scratch, &image, &mut Model(bytes), i as u64, &options(AioEngine::Auto));
    }
}

#[test]
fn snapshots_keep_what_they_hold() {
    let scratch = Scratch::new();
    for (i, shape) in
        ["compat=1.1", "compat=0.10,cluster_size=4k", "cluster_size=512,refcount_bits=8", "extended_l2=on"]
            .iter()
            .enumerate()
    {
        let image = scratch.path(&format!("snap{i}.qcow2"));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", shape, str(&image), "2M"]);
        let mut model = Model(vec![0; 2 << 20]);
        let seed = i as u64;
        exercise(&scratch, &image, &mut model, seed, &options(AioEngine::Auto));
        run("qemu-img", &["snapshot", "-c", "first", str(&image)]);
        let first = model.0.clone();
        exercise(&scratch, &image, &mut model, seed + 10, &options(AioEngine::Threads));
        run("qemu-img", &["snapshot", "-c", "second", str(&image)]);
        let second = model.0.clone();
        exercise(&scratch, &image, &mut model, seed + 20, &options(AioEngine::Auto));
        let info = terem_block::info(&image, None).expect("info").qcow2.expect("qcow2");
        assert_eq!(info.snapshots.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["first", "second"]);
        for (name, expected) in [("first", first), ("second", second)] {
            run("qemu-img", &["snapshot", "-a", name, str(&image)]);
            Model(expected).assert_qemu_reads(&scratch, &image);
        }
        assert_clean(&image);
    }
}

#[test]
fn data_in_a_file_of_its_own() {
    for (i, shape) in ["", ",data_file_raw=on", ",extended_l2=on"].iter().enumerate() {
        let scratch = Scratch::new();
        let (image, data) = (scratch.path("image.qcow2"), scratch.path("image.data"));
        // QEMU looks for the file from its own directory, and writes the name down as given.
        let shape = format!("data_file={}{shape}", str(&data));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &shape, str(&image), &SIZE.to_string()]);
        let mut model = Model(vec![0; SIZE as usize]);
        exercise(&scratch, &image, &mut model, i as u64, &options(AioEngine::Auto));
        if shape.contains("raw") {
            assert!(std::fs::read(&data).expect("read") == model.0, "the data file is not the disk");
        }
        let report = terem_block::check(&image, None).expect("checked");
        assert!(report.is_clean(), "{report:?}");
    }
}

#[test]
fn direct_and_buffered_io() {
    // Not in a tmpfs, which may refuse O_DIRECT.
    let scratch = Scratch::new();
    for (i, (cache, shape)) in [
        (Cache::Direct, "cluster_size=512"),
        (Cache::Direct, "cluster_size=64k"),
        (Cache::Writeback, "cluster_size=64k"),
    ]
    .into_iter()
    .enumerate()
    {
        let image = scratch.path("direct.qcow2");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", shape, str(&image), "2M"]);
        let options = OpenOptions { cache, ..OpenOptions::default() };
        exercise(&scratch, &image, &mut Model(vec![0; 2 << 20]), i as u64, &options);
    }
}

#[test]
fn a_small_table_cache_is_enough() {
    let scratch = Scratch::new();
    let image = scratch.path("small.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", str(&image), "4M"]);
    let options = OpenOptions { table_cache: 0, ..options(AioEngine::Auto) };
    exercise(&scratch, &image, &mut Model(vec![0; 4 << 20]), 3, &options);
}
