//! The power fails at any moment: what a flush acknowledged is there, and the image has leaks at worst.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use terem_memory::AlignedBuffer;

use crate::power::{Allowed, INITIAL, Random, SECTOR, SIZE, cut_power, verify_contents};
use crate::{
    AioEngine, BackingFile, BlockBackend, CreateOptions, Disk, Format, Op, OpenOptions, Qcow2Options, create,
    journal,
};

fn verify(image: &Path, allowed: &Allowed, cut: usize, dirty_is_allowed: bool) {
    let mut report = crate::check(image, None).expect("checked");
    let info = crate::info(image, None).expect("info").qcow2.expect("qcow2");
    let options = OpenOptions { aio: AioEngine::Threads, ..OpenOptions::default() };
    if dirty_is_allowed && info.dirty {
        drop(Disk::open(image, &options).expect("rebuilt"));
        report = crate::check(image, None).expect("checked");
    }
    assert_eq!(report.errors, 0, "cut at {cut}: {:?}", report.messages);
    verify_contents(image, Format::Qcow2, allowed, INITIAL, cut);
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

fn with(seed: u64, cluster_size: u32, kind: Kind) {
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
    cut_power(seed, &image, Format::Qcow2, INITIAL, &cut_image, |image, allowed, cut| {
        verify(image, allowed, cut, lazy_refcounts);
    });
}

#[test]
fn with_small_clusters() {
    with(1, 512, Kind::Plain);
}

#[test]
fn with_common_clusters() {
    with(2, 4096, Kind::Plain);
    with(3, 65536, Kind::Plain);
}

#[test]
fn with_a_backing_file() {
    with(4, 4096, Kind::Backed);
    with(5, 512, Kind::Backed);
}

#[test]
fn with_lazy_refcounts() {
    with(6, 4096, Kind::Lazy);
}

#[test]
fn with_a_snapshot() {
    with(7, 4096, Kind::Snapshot);
    with(8, 512, Kind::Snapshot);
}

#[test]
fn with_subclusters() {
    with(9, 16384, Kind::Extended);
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

/// With a name of the backing file that has no room in the header's sector.
#[test]
fn with_long_names() {
    use crate::{BitmapAction, SnapshotAction, bitmap, set_backing, snapshot};
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("image.qcow2");
    for base in ["a.raw", "b.raw"] {
        fs::write(dir.path().join(base), vec![INITIAL; 4096]).expect("written");
    }
    let named = |base: &str, dots: usize| BackingFile {
        path: format!("{}{base}", "./".repeat(dots)).into(),
        format: Format::Raw,
    };
    for cluster_size in [4096, 65536] {
        let qcow2 = Qcow2Options { cluster_size, ..Qcow2Options::default() };
        let backing = Some(named("a.raw", 300));
        let options =
            CreateOptions { qcow2, backing, overwrite: true, ..CreateOptions::new(Format::Qcow2, SIZE) };
        create(&image, &options).expect("made");
        let has_names =
            || fs::read(&image).expect("read")[..4096].windows(9).any(|part| part == b"dirty bit");
        assert!(has_names());
        scribble(&image, 1);
        for (base, dots) in [("b.raw", 508), ("a.raw", 508), ("b.raw", 190), ("a.raw", 1), ("b.raw", 250)] {
            let set = |image: &Path| set_backing(image, None, Some(&named(base, dots))).expect("set");
            cut_power_of(&image, set);
            assert!(has_names(), "{base} {dots}");
        }
        cut_power_of(&image, |image| snapshot(image, None, SnapshotAction::Create("s1")).expect("done"));
        let add = BitmapAction::Add { granularity: 4096, enabled: true };
        cut_power_of(&image, |image| bitmap(image, None, "b", &[add]).expect("added"));
        cut_power_of(&image, |image| set_backing(image, None, Some(&named("a.raw", 400))).expect("set"));
        cut_power_of(&image, |image| bitmap(image, None, "b", &[BitmapAction::Remove]).expect("removed"));
        cut_power_of(&image, |image| set_backing(image, None, None).expect("set"));
        assert!(has_names());
        let seen = Command::new("qemu-img").args(["check", "-q"]).arg(&image).status();
        assert!(seen.expect("qemu-img is needed for this test").success());
    }
}
