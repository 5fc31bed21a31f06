//! Block status: the same as `qemu-img map` tells.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::path::Path;

use peer::{Random, Scratch, run, str};
use terem_block::{Disk, Extent, ExtentKind, OpenOptions};

/// What QEMU tells of one run: data, zero, present, compressed, depth, offset.
type Facts = (bool, bool, bool, bool, u64, Option<u64>);

/// The facts of each 512-byte sector, as `qemu-img map` tells them.
fn qemu_map(image: &Path) -> Vec<Facts> {
    let json = run("qemu-img", &["map", "--output=json", str(image)]);
    let runs: Vec<serde_json::Value> = serde_json::from_str(&json).expect("JSON");
    let mut sectors = Vec::new();
    for run in runs {
        let (start, length) =
            (run["start"].as_u64().expect("start"), run["length"].as_u64().expect("length"));
        assert_eq!(start, sectors.len() as u64 * 512);
        let flag = |name: &str| run[name].as_bool().expect(name);
        for at in (0..length).step_by(512) {
            sectors.push((
                flag("data"),
                flag("zero"),
                flag("present"),
                flag("compressed"),
                run["depth"].as_u64().expect("depth"),
                run["offset"].as_u64().map(|offset| offset + at),
            ));
        }
    }
    sectors
}

fn our_map(extents: &[Extent]) -> Vec<Facts> {
    let mut sectors = Vec::new();
    for e in extents {
        assert_eq!(e.offset, sectors.len() as u64 * 512);
        for at in (0..e.length).step_by(512) {
            let data = matches!(e.kind, ExtentKind::Data | ExtentKind::Compressed);
            sectors.push((
                data,
                e.is_zero(),
                e.kind != ExtentKind::Unallocated,
                e.kind == ExtentKind::Compressed,
                e.depth.into(),
                e.host.map(|host| host + at),
            ));
        }
    }
    sectors
}

fn assert_same_map(image: &Path) {
    let disk = Disk::open(image, &OpenOptions::read_only()).expect("opened");
    let size = disk_size(&disk);
    let ours = our_map(&disk.block_status(0, size).expect("status"));
    let theirs = qemu_map(image);
    assert_eq!(ours.len(), theirs.len());
    for (sector, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
        assert_eq!(ours, theirs, "sector {sector:#x} of {}", image.display());
    }
    // A part tells the same as the whole.
    let part = disk.block_status(size / 3 / 512 * 512, size / 3 / 512 * 512).expect("status");
    let from = part[0].offset as usize / 512;
    let length: u64 = part.iter().map(|e| e.length).sum();
    assert_eq!(length, size / 3 / 512 * 512);
    assert_eq!(part[0].kind == ExtentKind::Compressed, ours[from].3);
}

fn disk_size(disk: &Disk) -> u64 {
    use terem_block::BlockBackend;
    disk.size()
}

#[test]
fn a_chain_is_told_as_qemu_tells_it() {
    let scratch = Scratch::new();
    let mut random = Random(3);
    let (base, mid, top) = (scratch.path("base.raw"), scratch.path("mid.qcow2"), scratch.path("top.qcow2"));
    let mut bytes = random.bytes(2 << 20);
    bytes[300 << 10..600 << 10].fill(0);
    run("qemu-img", &["create", "-q", "-f", "raw", str(&base), "3M"]);
    std::fs::write(&base, &bytes).expect("written");
    let file = std::fs::OpenOptions::new().write(true).open(&base).expect("opened");
    file.set_len(3 << 20).expect("grown");
    drop(file);
    assert_same_map(&base);
    let create = |image: &Path, below: &str, format: &str, options: &str, size: &str| {
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", options, "-b", below, "-F", format, str(image), size],
        );
    };
    create(&mid, "base.raw", "raw", "cluster_size=4k", "4M");
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 100k", "-c", "write -z 100k 64k", str(&mid)]);
    assert_same_map(&mid);
    create(&top, "mid.qcow2", "qcow2", "cluster_size=64k", "5M");
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 7 1500k 100k", "-c", "write -z -u 4100k 300k", str(&top)],
    );
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 2000k 100k", "-c", "write -z 2000k 64k", str(&top)]);
    assert_same_map(&top);
    let compressed = scratch.path("compressed.qcow2");
    run("qemu-img", &["convert", "-c", "-O", "qcow2", str(&mid), str(&compressed)]);
    assert_same_map(&compressed);
}
