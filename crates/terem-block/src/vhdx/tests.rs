//! Headers, tables, the log, and power cuts.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;
use terem_memory::AlignedBuffer;

use super::guid;
use super::header::{Header, LENGTH, MIB, seal};
use super::log::{Change, Replay, SECTOR, entry, pages_in};
use super::metadata::Metadata;
use super::region::{Regions, Wrong};
use crate::bytes::put;
use crate::power::{cut_power, fill, verify_contents};
use crate::{AioEngine, CreateOptions, Disk, Format, Op, OpenOptions, VhdxOptions, create};

const NAME: [u8; 16] = [7; 16];

fn make(image: &Path, size: u64) {
    let vhdx = VhdxOptions { block_size: MIB, ..VhdxOptions::default() };
    create(image, &CreateOptions { vhdx, ..CreateOptions::new(Format::Vhdx, size) }).expect("made");
}

fn image() -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.vhdx");
    make(&image, 5 << 20);
    fs::read(image).expect("read")
}

#[test]
fn checksums_are_crc32c() {
    // "123456789" in the check position of the catalogue of CRCs, around a checksum's four bytes.
    let mut bytes = b"1234\0\0\0\0".to_vec();
    seal(&mut bytes);
    assert_eq!(bytes[4..8], crc32c::crc32c(b"1234\0\0\0\0").to_le_bytes());
    assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn the_newer_whole_header_counts() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk.vhdx");
    let good = image();
    let read = |bytes: &[u8]| {
        fs::write(&path, bytes).expect("written");
        let image = crate::chain::ImageFile::open(&path, false, false, &mut Vec::new()).expect("opened");
        Header::read(&image).map(|header| (header.place, header.sequence))
    };
    let (place, sequence) = read(&good).expect("good");
    let at = |place: usize| super::header::HEADERS_AT[place] as usize;
    let mut bad = good.clone();
    bad[at(place) + 100] ^= 1;
    assert_eq!(read(&bad).expect("the other one"), (1 - place, sequence - 1));
    bad[at(1 - place) + 200] ^= 1;
    assert!(read(&bad).is_err());
    for (field, value) in [(66, 2), (72, 4096), (68, 4096), (68, 0xfff0_0000u32)] {
        let mut bad = good.clone();
        for place in 0..2 {
            let header = &mut bad[at(place)..at(place) + LENGTH];
            put(header, field, &value.to_le_bytes());
            seal(header);
        }
        assert!(read(&bad).is_err(), "{value:#x} at {field}");
    }
}

#[test]
fn regions_and_metadata_are_checked() {
    let good = image();
    let (table, log) = (&good[192 << 10..256 << 10], MIB..2 * MIB);
    let regions = Regions::parse(table, &log).expect("good");
    assert_eq!((&regions.bat, &regions.metadata), (&(2 * MIB..3 * MIB), &(3 * MIB..4 * MIB)));
    assert!(regions.reach_into(&(0..1)) && regions.reach_into(&(3 * MIB..5 * MIB)));
    assert!(!regions.reach_into(&(4 * MIB..5 * MIB)));
    let with = |at: usize, value: u32| {
        let mut bad = table.to_vec();
        put(&mut bad, at, &value.to_le_bytes());
        seal(&mut bad);
        Regions::parse(&bad, &log)
    };
    for (at, value) in [(8, 1), (8, 2048), (32, 1 << 20), (32, 0), (32, 3 << 20), (36, 1 << 31), (40, 4096)] {
        assert!(matches!(with(at, value), Err(Wrong::Damaged(_))), "{value:#x} at {at}");
    }
    let mut unknown = table.to_vec();
    unknown[16] ^= 1;
    seal(&mut unknown);
    assert!(matches!(Regions::parse(&unknown, &log), Err(Wrong::Unknown(_))));

    let table = &good[3 << 20..][..64 << 10];
    let items = Metadata::items(table).expect("good");
    assert_eq!(items.len(), 5);
    assert!(items.contains(&(guid::VIRTUAL_DISK_SIZE, (64 << 10) + 8, 8)));
    let mut twice = table.to_vec();
    twice.copy_within(32..48, 64);
    assert!(Metadata::items(&twice).is_err());
    let mut unknown = table.to_vec();
    unknown[32] ^= 1;
    assert!(Metadata::items(&unknown).is_err(), "it is required");
    put(&mut unknown, 56, &0u32.to_le_bytes());
    assert_eq!(Metadata::items(&unknown).expect("it is not").len(), 4);
}

#[test]
fn the_table_has_bitmaps_in_between() {
    let metadata = Metadata { size: 64 << 40, block_size: 256 * MIB, logical_sector: 512, fixed: false };
    assert_eq!(metadata.chunk_ratio(), 16);
    assert_eq!([0, 15, 16, 31, 32].map(|block| metadata.index(block)), [0, 15, 17, 32, 34]);
    assert_eq!(metadata.entries(), 262_144 + 262_143 / 16);
    assert_eq!(Metadata { size: 0, ..metadata }.entries(), 0);
}

fn page(value: u8) -> Vec<u8> {
    (0..SECTOR).map(|i| value ^ i.to_le_bytes()[0]).collect()
}

/// A log with entries at some places; each writes one page at 2 MiB.
fn log(entries: &[(usize, u64, u32)]) -> Vec<u8> {
    let mut log = vec![0; 64 * SECTOR];
    for &(at, sequence, tail) in entries {
        let mut bytes = entry(&[(2 * MIB, page(sequence.to_le_bytes()[0]))], &NAME, sequence, 3 * MIB);
        put(&mut bytes, 12, &tail.to_le_bytes());
        seal(&mut bytes);
        for (i, byte) in bytes.into_iter().enumerate() {
            let at = (at * SECTOR + i) % log.len();
            log[at] = byte;
        }
    }
    log
}

fn pages(replay: &Replay) -> Vec<Vec<u8>> {
    let bytes = |change: &Change| match change {
        Change::Page { bytes, .. } => bytes.clone(),
        Change::Zero { .. } => Vec::new(),
    };
    replay.changes.iter().map(bytes).collect()
}

#[test]
fn the_active_sequence_is_found() {
    let sector = u32::try_from(SECTOR).expect("small");
    let find = |entries: &[_]| pages(&Replay::find(&log(entries), &NAME).expect("read"));
    assert!(find(&[]).is_empty());
    assert_eq!(find(&[(0, 5, 0)]), [page(5)]);
    // Two that belong together, from the one that the last one names on.
    assert_eq!(find(&[(4, 5, 4 * sector), (6, 6, 4 * sector)]), [page(5), page(6)]);
    assert_eq!(find(&[(4, 5, 4 * sector), (6, 6, 6 * sector)]), [page(6)]);
    // The newer of two; one that lost its beginning; one that goes around the end.
    assert_eq!(find(&[(4, 5, 4 * sector), (9, 8, 9 * sector)]), [page(8)]);
    assert_eq!(find(&[(4, 5, 4 * sector), (9, 8, 7 * sector)]), [page(5)]);
    assert_eq!(find(&[(63, 9, 63 * sector)]), [page(9)]);
    assert!(pages(&Replay::find(&log(&[(0, 5, 0)]), &[1; 16]).expect("read")).is_empty(), "another's");
}

#[test]
fn entries_hold_as_much_as_fits() {
    for length in [1u32 << 20, 2 << 20, 16 << 20] {
        let n = pages_in(length);
        let pages: Vec<_> =
            (0..n as u64).map(|i| (2 * MIB + i * SECTOR as u64, page(i.to_le_bytes()[0]))).collect();
        let mut log = entry(&pages, &NAME, 1, 2 * MIB);
        assert!(log.len() <= length as usize && log.len() + 3 * SECTOR > length as usize, "{n} of {length}");
        log.resize(length as usize, 0);
        let replay = Replay::find(&log, &NAME).expect("read");
        let found: Vec<_> = pages.into_iter().map(|(at, bytes)| Change::Page { at, bytes }).collect();
        assert!(replay.changes == found && replay.length == 2 * MIB && replay.sequence == 1);
    }
}

proptest! {
    /// An entry is taken whole or not at all.
    #[test]
    fn torn_entries_do_not_count(at in 0..3 * SECTOR, value: u8) {
        let mut log = log(&[(0, 5, 0)]);
        let was = log[at];
        log[at] = value;
        let found = pages(&Replay::find(&log, &NAME).expect("read"));
        let same = was == value || at >= 2 * SECTOR;
        prop_assert_eq!(found, if same { vec![page(5)] } else { vec![] });
    }

    /// Any bytes can be looked through, in bounded time.
    #[test]
    fn any_log_ends(seed: Vec<u8>, at in 0usize..16, length: u32, count: u32) {
        let mut log = vec![0; 16 * SECTOR];
        for at in [0, at * SECTOR] {
            put(&mut log, at, b"loge");
            put(&mut log, at + 8, &length.to_le_bytes());
            put(&mut log, at + 24, &count.to_le_bytes());
            put(&mut log, at + 32, &NAME);
        }
        for (i, byte) in seed.into_iter().enumerate() {
            log[(i * 97) % (16 * SECTOR)] ^= byte;
        }
        let _ = Replay::find(&log, &NAME);
    }
}

fn with(seed: u64, filled: bool) {
    let dir = tempfile::tempdir().expect("a directory");
    let (image, cut) = (dir.path().join("image.vhdx"), dir.path().join("cut.vhdx"));
    // Blocks cannot be smaller than 1 MiB.
    make(&image, 4 << 20);
    let initial = fill(&image, Format::Vhdx, filled);
    cut_power(seed, &image, Format::Vhdx, initial, &cut, |image, allowed, cut| {
        // As it was left, with what is in the log.
        let report = crate::check(image, None).expect("checked");
        assert_eq!(report.errors, 0, "cut at {cut}: {:?}", report.messages);
        verify_contents(image, Format::Vhdx, allowed, initial, cut);
        if cut % 5 == 0 {
            let copy = image.with_extension("copy");
            fs::copy(image, &copy).expect("copied");
            let done =
                Command::new("qemu-img").args(["check", "-q", "-f", "vhdx", "-r", "all"]).arg(&copy).status();
            assert!(done.expect("qemu-img is needed for this test").success(), "cut at {cut}");
            verify_contents(&copy, Format::Vhdx, allowed, initial, cut);
        }
        // And with the log in its place.
        drop(Disk::open(image, &OpenOptions::default()).expect("replayed"));
        verify_contents(image, Format::Vhdx, allowed, initial, cut);
    });
}

#[test]
fn the_power_may_fail() {
    with(1, false);
    with(2, true);
}

/// The table is lost between the log and its place: it comes back from the log, for us and for QEMU, whether the image is
/// read or written.
#[test]
fn the_log_is_replayed() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.vhdx");
    make(&image, 4 << 20);
    let options = OpenOptions { aio: AioEngine::Threads, ..OpenOptions::default() };
    let data = vec![0x5a; 2 << 20];
    let disk = Disk::open(&image, &options).expect("opened");
    let memory = Arc::new(AlignedBuffer::from_slice(&data));
    disk.run(Op::Write { offset: 1 << 20, memory }).expect("written");
    disk.run(Op::Flush).expect("flushed");
    disk.abandon();
    let mut bytes = fs::read(&image).expect("read");
    assert_ne!(bytes[2 << 20..][..4096], [0; 4096]);
    bytes[2 << 20..][..4096].fill(0);
    fs::write(&image, &bytes).expect("written");
    let raw = dir.path().join("model.raw");
    fs::write(&raw, [&vec![0; 1 << 20][..], &data, &vec![0; 1 << 20]].concat()).expect("written");
    let theirs = dir.path().join("theirs.vhdx");
    fs::copy(&image, &theirs).expect("copied");

    let contents = |image: &Path, options: &OpenOptions| {
        let memory = Arc::new(AlignedBuffer::new(4 << 20));
        let disk = Disk::open(image, options).expect("opened");
        disk.run(Op::Read { offset: 0, memory: Arc::clone(&memory) as _ }).expect("read");
        assert!(memory.to_vec() == fs::read(&raw).expect("read"));
    };
    contents(&image, &OpenOptions { read_only: true, ..options.clone() });
    assert_eq!(fs::read(&image).expect("read"), bytes, "reading changes nothing");
    contents(&image, &options);
    let qemu_img = |args: &[&str]| {
        let done = Command::new("qemu-img").args(args).status();
        assert!(done.expect("qemu-img is needed for this test").success(), "{args:?}");
    };
    let (raw, image, theirs) =
        (raw.to_str().expect("a name"), image.to_str().expect("a name"), theirs.to_str().expect("a name"));
    // Theirs refuses to be read as long as there is something in the log.
    qemu_img(&["compare", "-f", "raw", "-F", "vhdx", raw, image]);
    qemu_img(&["check", "-q", "-f", "vhdx", "-r", "all", theirs]);
    qemu_img(&["compare", "-f", "raw", "-F", "vhdx", raw, theirs]);
}
