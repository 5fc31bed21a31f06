//! A disk of 16 TiB over a chain of 100 backing files: right, opened quickly, and in bounded memory.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, also in what the tests share")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use terem_block::{
    AlignedBuffer, BackingFile, BlockBackend, Cache, CreateOptions, Disk, Format, IoMemory, Op, OpenOptions,
    create,
};

const SIZE: u64 = 16 << 40;
const BELOW: u64 = 100;
const CLUSTER: u64 = 65536;
/// Bytes of the disk that one L2 table maps.
const TABLE: u64 = CLUSTER / 8 * CLUSTER;
/// L2 tables in each image.
const TABLES: u64 = 24;
/// What tables the test allows to be kept, in bytes: one at the top, none below; so two each.
const CACHE: usize = 65536;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

fn options() -> OpenOptions {
    OpenOptions {
        format: Some(Format::Qcow2),
        cache: Cache::Unsafe,
        table_cache: CACHE,
        ..OpenOptions::default()
    }
}

fn name(dir: &Path, layer: u64) -> PathBuf {
    dir.join(format!("{layer}.qcow2"))
}

/// Where each layer writes, and what byte: the same in each run. Some places are written by many layers, some by one.
fn writes(layer: u64) -> Vec<(u64, u8)> {
    let mut random = Random(layer);
    let byte = u8::try_from(layer + 1).unwrap();
    (0..TABLES)
        .map(|i| {
            let table = if i % 2 == 0 { i } else { random.below(SIZE / TABLE) };
            (table * TABLE + random.below(4) * CLUSTER, byte)
        })
        .collect()
}

/// The byte of each place that was written, as seen from the top.
fn model() -> HashMap<u64, u8> {
    (0..=BELOW).flat_map(writes).collect()
}

fn chain(dir: &Path) {
    // Each is written over an empty disk that has the name of the one below it: so only two images are open.
    let place = dir.join("place");
    std::fs::create_dir(&place).unwrap();
    create(place.join("empty"), &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    for layer in 0..=BELOW {
        let below = layer.checked_sub(1);
        let backing = below.map(|n| BackingFile { path: format!("{n}.qcow2").into(), format: Format::Qcow2 });
        let new =
            CreateOptions { backing, backing_unchecked: true, ..CreateOptions::new(Format::Qcow2, SIZE) };
        if let Some(below) = below {
            std::fs::copy(place.join("empty"), name(&place, below)).unwrap();
        }
        create(name(&place, layer), &new).unwrap();
        let disk = Disk::open(name(&place, layer), &options()).unwrap();
        for (offset, byte) in writes(layer) {
            let mut bytes = vec![0; usize::try_from(CLUSTER).unwrap()];
            bytes[..512].fill(byte);
            disk.run(Op::Write { offset, memory: Arc::new(AlignedBuffer::from_slice(&bytes)) }).unwrap();
        }
        disk.close().unwrap();
        std::fs::rename(name(&place, layer), name(dir, layer)).unwrap();
    }
}

/// The most memory that this process had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Reads some of what was written, and as much beside it.
fn read_all(dir: &Path) {
    let begun = Instant::now();
    let disk = Disk::open(name(dir, BELOW), &options()).unwrap();
    println!("opened in {:?}", begun.elapsed());
    assert_eq!((disk.size(), disk.facts().backing.len() as u64), (SIZE, BELOW));
    let model = model();
    let mut random = Random(77);
    let mut places: Vec<u64> = model.keys().copied().collect();
    places.sort_unstable();
    for _ in 0..400 {
        let beside = random.below(SIZE / CLUSTER) * CLUSTER;
        let written = places[usize::try_from(random.below(places.len() as u64)).unwrap()];
        for offset in [written, beside] {
            let memory = Arc::new(AlignedBuffer::from_slice(&[0xff; 1024]));
            disk.run(Op::Read { offset, memory: Arc::clone(&memory) as Arc<dyn IoMemory> }).unwrap();
            let byte = model.get(&offset).copied().unwrap_or(0);
            let mut expected = vec![byte; 512];
            expected.resize(1024, 0);
            assert!(memory.to_vec() == expected, "{offset:#x}");
        }
    }
    disk.close().unwrap();
}

/// The part that has a process of its own: only with a chain in this directory.
const DIRECTORY: &str = "TEREM_TEST_CHAIN";

#[test]
fn in_a_process_of_its_own() {
    let Some(dir) = std::env::var_os(DIRECTORY) else { return };
    let before = peak();
    read_all(Path::new(&dir));
    println!("memory {}", peak() - before);
}

#[test]
fn a_long_chain_of_large_disks() {
    let dir = tempfile::tempdir().unwrap();
    chain(dir.path());
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "in_a_process_of_its_own", "--nocapture"])
        .env(DIRECTORY, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    let memory = text.lines().find_map(|line| line.strip_prefix("memory ")).unwrap().parse::<u64>().unwrap();
    println!("{text}");
    let images = BELOW + 1;
    // Of each image the L1 table, which stays, and two L2 tables; and some MiB for all else. All tables that there are
    // would be 12 times as much.
    let bound = images * (SIZE / TABLE * 8 + 2 * CLUSTER) + (24 << 20);
    assert!(images * TABLES * CLUSTER > 2 * bound);
    assert!(memory <= bound, "{memory} bytes, {bound} are allowed");
}
