//! The power fails at any moment: what a flush acknowledged is there, and the image has leaks at worst.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use terem_memory::AlignedBuffer;

use crate::chain::open_chain;
use crate::engine::Engine;
use crate::executor::{Executor, LocalFuture, join_all};
use crate::node::Node;
use crate::{
    AioEngine, BackingFile, BlockBackend, CreateOptions, Disk, Format, IoError, Op, OpenOptions,
    Qcow2Options, create, journal,
};

const SIZE: u64 = 1 << 20;
const SECTOR: u64 = 512;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// What may be in each sector.
#[derive(Default)]
struct History {
    /// At the last flush.
    flushed: HashMap<u64, Vec<u8>>,
    /// Written since, with the moment.
    since: Vec<(usize, u64, u8)>,
    /// The moments of the flushes, with what each sector could hold then.
    flushes: Vec<(usize, HashMap<u64, Vec<u8>>)>,
}

impl History {
    fn wrote(&mut self, offset: u64, length: u64, value: u8) {
        let now = journal::now();
        self.since.extend((offset / SECTOR..(offset + length) / SECTOR).map(|sector| (now, sector, value)));
    }

    fn flush(&mut self) {
        for &(_, sector, value) in &self.since {
            self.flushed.insert(sector, vec![value]);
        }
        self.flushes.push((journal::now(), self.flushed.clone()));
    }

    /// The values that a sector may have after a cut at `cut`; `None` where nothing was ever written.
    fn allowed(&self, cut: usize) -> HashMap<u64, Vec<u8>> {
        let last = self.flushes.iter().rfind(|(at, _)| *at <= cut);
        let mut allowed = last.map(|(_, values)| values.clone()).unwrap_or_default();
        let from = last.map_or(0, |(at, _)| *at);
        for &(at, sector, value) in &self.since {
            if at >= from && at < cut {
                allowed.entry(sector).or_insert_with(|| vec![INITIAL]).push(value);
            }
        }
        allowed
    }
}

/// What is in the image before.
const INITIAL: u8 = 0x11;

/// Random requests, some of them side by side.
async fn work(node: &Node, random: &mut Random, history: &mut History) {
    for _ in 0..40 {
        let mut requests: Vec<LocalFuture<'_, Result<(), IoError>>> = Vec::new();
        let lanes = 1 + random.below(3);
        for lane in 0..lanes {
            // Side by side in their own parts of the disk, so that the outcome is known.
            let part = SIZE / lanes / SECTOR * SECTOR;
            let most = if random.below(3) == 0 { 200 } else { 8 };
            let length = SECTOR * (1 + random.below(most));
            let offset = lane * part + SECTOR * random.below((part - length) / SECTOR);
            let value = u8::try_from(1 + random.below(255)).expect("a byte");
            let op = if random.below(5) == 0 {
                history.wrote(offset, length, 0);
                Op::WriteZeroes { offset, length, unmap: value > 100 }
            } else {
                history.wrote(offset, length, value);
                let bytes = vec![value; usize::try_from(length).expect("small")];
                Op::Write { offset, memory: Arc::new(AlignedBuffer::from_slice(&bytes)) }
            };
            requests.push(Box::pin(node.execute(op)));
        }
        join_all(requests).await.expect("written");
        if random.below(3) == 0 {
            node.execute(Op::Flush).await.expect("flushed");
            history.flush();
        }
    }
    node.close().await.expect("closed");
    history.flush();
}

fn verify(image: &Path, allowed: &HashMap<u64, Vec<u8>>, cut: usize, dirty_is_allowed: bool) {
    let mut report = crate::check(image, None).expect("checked");
    let info = crate::info(image, None).expect("info").qcow2.expect("qcow2");
    let options = OpenOptions { aio: AioEngine::Threads, ..OpenOptions::default() };
    if dirty_is_allowed && info.dirty {
        drop(Disk::open(image, &options).expect("rebuilt"));
        report = crate::check(image, None).expect("checked");
    }
    assert_eq!(report.errors, 0, "cut at {cut}: {:?}", report.messages);
    let disk = Disk::open(image, &OpenOptions { read_only: true, ..options }).expect("opened");
    let memory = Arc::new(AlignedBuffer::new(usize::try_from(SIZE).expect("small")));
    disk.run(Op::Read { offset: 0, memory: Arc::clone(&memory) as Arc<dyn crate::IoMemory> }).expect("read");
    for (sector, bytes) in memory.to_vec().chunks(512).enumerate() {
        let initial = [INITIAL];
        let allowed = allowed.get(&(sector as u64)).map_or(&initial[..], Vec::as_slice);
        let first = bytes[0];
        assert!(
            allowed.contains(&first) && bytes.iter().all(|b| *b == first),
            "cut at {cut}: sector {sector:#x} is {first:#x}, not one of {allowed:x?}"
        );
    }
}

/// What the image is like.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Lazy,
    Backed,
    /// All clusters are shared with a snapshot.
    Snapshot,
    /// Subclusters over a backing file.
    Extended,
}

fn cut_power(seed: u64, cluster_size: u32, kind: Kind) {
    let (lazy_refcounts, backed) = (kind == Kind::Lazy, matches!(kind, Kind::Backed | Kind::Extended));
    let dir = tempfile::tempdir().expect("a directory");
    let (image, cut_image) = (dir.path().join("image.qcow2"), dir.path().join("cut.qcow2"));
    let initial = vec![INITIAL; usize::try_from(SIZE).expect("small")];
    fs::write(dir.path().join("base.raw"), &initial).expect("written");
    let backing = backed.then(|| BackingFile { path: "base.raw".into(), format: Format::Raw });
    let extended_l2 = kind == Kind::Extended;
    let qcow2 = Qcow2Options { cluster_size, lazy_refcounts, extended_l2, ..Qcow2Options::default() };
    let options = CreateOptions { qcow2, backing, ..CreateOptions::new(Format::Qcow2, SIZE) };
    create(&image, &options).expect("made");
    if !backed {
        let disk = Disk::open(&image, &OpenOptions::default()).expect("opened");
        disk.run(Op::Write { offset: 0, memory: Arc::new(AlignedBuffer::from_slice(&initial)) })
            .expect("written");
    }
    if kind == Kind::Snapshot {
        let snapshot = Command::new("qemu-img").args(["snapshot", "-c", "s"]).arg(&image).status();
        assert!(snapshot.expect("qemu-img is needed for this test").success());
    }
    let before = fs::read(&image).expect("read");

    let engine = Engine::new(AioEngine::Auto).expect("an engine");
    // A small table cache, so that tables are also written back for want of room.
    let open = OpenOptions { table_cache: 0, ..OpenOptions::default() };
    let node = open_chain(&engine, &image, &open).expect("opened");
    let (mut random, mut history) = (Random(seed), History::default());
    journal::begin();
    let executor = Executor::new(engine);
    executor.block_on(work(&node, &mut random, &mut history)).expect("waited");
    drop((node, executor));

    let end = journal::now();
    assert!(end > 50, "only {end} writes");
    for i in 0..=40 {
        // Most of them early, where most tables are made.
        let cut = end * i * i / 1600;
        // From "nothing without a sync" to "everything at once".
        let chance = random.below(5);
        let mut coin = Random(seed + i as u64);
        let file = journal::after_power_cut(before.clone(), cut, || coin.below(4) < chance);
        fs::write(&cut_image, file).expect("written");
        verify(&cut_image, &history.allowed(cut), cut, lazy_refcounts);
    }
}

#[test]
fn with_small_clusters() {
    cut_power(1, 512, Kind::Plain);
}

#[test]
fn with_common_clusters() {
    cut_power(2, 4096, Kind::Plain);
    cut_power(3, 65536, Kind::Plain);
}

#[test]
fn with_a_backing_file() {
    cut_power(4, 4096, Kind::Backed);
    cut_power(5, 512, Kind::Backed);
}

#[test]
fn with_lazy_refcounts() {
    cut_power(6, 4096, Kind::Lazy);
}

#[test]
fn with_a_snapshot() {
    cut_power(7, 4096, Kind::Snapshot);
    cut_power(8, 512, Kind::Snapshot);
}

#[test]
fn with_subclusters() {
    cut_power(9, 16384, Kind::Extended);
}

/// Everything on the disk.
fn contents(image: &Path, snapshot: Option<&str>) -> Vec<u8> {
    let options = OpenOptions { snapshot: snapshot.map(str::to_owned), ..OpenOptions::read_only() };
    let disk = Disk::open(image, &options).expect("opened");
    let length = usize::try_from(disk.size()).expect("small");
    let memory = Arc::new(AlignedBuffer::new(length));
    disk.run(Op::Read { offset: 0, memory: Arc::clone(&memory) as Arc<dyn crate::IoMemory> }).expect("read");
    memory.to_vec()
}

/// An operation is done whole or not at all.
fn cut_power_of(image: &Path, operation: impl FnOnce(&Path)) {
    let before = (fs::read(image).expect("read"), contents(image, None));
    let cut_image = image.with_extension("cut");
    let snapshots = |image: &Path| -> HashMap<String, Vec<u8>> {
        let names = names(image).into_iter().filter(|name| name.starts_with('s'));
        names.map(|name| (name.clone(), contents(image, Some(&name)))).collect()
    };
    let snapshots_before = snapshots(image);
    journal::begin();
    operation(image);
    let (end, after) = (journal::now(), contents(image, None));
    let names_after = names(image);
    let snapshots_after = snapshots(image);
    fs::write(&cut_image, &before.0).expect("written");
    let names_before = names(&cut_image);
    let (mut random, mut old, mut new) = (Random(end as u64), 0, 0);
    for cut in 0..=end {
        for chance in 0..4 {
            let file = journal::after_power_cut(before.0.clone(), cut, || random.below(3) < chance);
            fs::write(&cut_image, file).expect("written");
            let report = crate::check(&cut_image, None).expect("checked");
            assert_eq!(report.errors, 0, "cut at {cut}: {:?}", report.messages);
            let found = (contents(&cut_image, None), names(&cut_image));
            match (found.0 == before.1 && found.1 == names_before, found.0 == after && found.1 == names_after)
            {
                (true, _) => old += 1,
                (_, true) => new += 1,
                _ => panic!("cut at {cut}: neither the old nor the new state, but {:?}", found.1),
            }
            let kept = snapshots(&cut_image);
            assert!(
                kept == snapshots_before || kept == snapshots_after,
                "cut at {cut}: a snapshot is damaged"
            );
        }
    }
    assert!(old > 0 && new > 0, "{old} times the old state, {new} times the new one");
}

/// The snapshots' and bitmaps' names, and the disk's size.
fn names(image: &Path) -> Vec<String> {
    let info = crate::info(image, None).expect("info");
    let qcow2 = info.qcow2.expect("qcow2");
    let snapshots = qcow2.snapshots.into_iter().map(|s| s.name);
    let bitmaps = qcow2.bitmaps.into_iter().map(|b| format!("bitmap {} {}", b.name, b.enabled));
    let backing = qcow2.backing_filename.map(|name| format!("backing {name}"));
    snapshots.chain(bitmaps).chain(backing).chain([info.virtual_size.to_string()]).collect()
}

fn scribble(image: &Path, seed: u64) {
    let disk = Disk::open(image, &OpenOptions::default()).expect("opened");
    let mut random = Random(seed);
    for _ in 0..20 {
        let length = SECTOR * (1 + random.below(100));
        let offset = SECTOR * random.below((SIZE / 2 - length) / SECTOR);
        let bytes =
            vec![u8::try_from(random.below(256)).expect("a byte"); usize::try_from(length).expect("small")];
        disk.run(Op::Write { offset, memory: Arc::new(AlignedBuffer::from_slice(&bytes)) }).expect("written");
    }
    disk.close().expect("closed");
}

#[test]
fn with_changes_of_the_image() {
    use crate::{BitmapAction, Preallocation, SnapshotAction, bitmap, resize, set_backing, snapshot};
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("image.qcow2");
    fs::write(dir.path().join("base.raw"), vec![INITIAL; 4096]).expect("written");
    for (cluster_size, extended_l2) in [(512, false), (4096, false), (16384, true)] {
        let qcow2 = Qcow2Options { cluster_size, extended_l2, ..Qcow2Options::default() };
        let options = CreateOptions { qcow2, overwrite: true, ..CreateOptions::new(Format::Qcow2, SIZE) };
        create(&image, &options).expect("made");
        scribble(&image, 1);
        let act = |action| move |image: &Path| snapshot(image, None, action).expect("done");
        cut_power_of(&image, act(SnapshotAction::Create("s1")));
        scribble(&image, 2);
        cut_power_of(&image, act(SnapshotAction::Create("s2")));
        scribble(&image, 3);
        let enabled = BitmapAction::Add { granularity: 4096, enabled: true };
        cut_power_of(&image, |image| bitmap(image, None, "b", &[enabled]).expect("added"));
        cut_power_of(&image, |image| bitmap(image, None, "b", &[BitmapAction::Disable]).expect("disabled"));
        cut_power_of(&image, act(SnapshotAction::Apply("s1")));
        scribble(&image, 4);
        cut_power_of(&image, act(SnapshotAction::Delete("s1")));
        for size in [SIZE / 2 + 512, SIZE * 2] {
            cut_power_of(&image, |image| {
                resize(image, None, size, true, Preallocation::Off).expect("resized");
            });
        }
        let base = BackingFile { path: "base.raw".into(), format: Format::Raw };
        cut_power_of(&image, |image| set_backing(image, None, Some(&base)).expect("set"));
    }
}
