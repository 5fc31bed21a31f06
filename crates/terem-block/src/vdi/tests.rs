//! Headers, and power cuts.

use std::path::Path;

use proptest::prelude::*;

use super::header::{Header, LENGTH, Wrong};
use crate::bytes::put;
use crate::power::{cut_power, fill, verify_contents};
use crate::{CreateOptions, Format, create};

fn header() -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.vdi");
    create(&image, &CreateOptions::new(Format::Vdi, 3 << 20 | 512)).expect("made");
    std::fs::read(&image).expect("read")[..LENGTH].to_vec()
}

#[test]
fn headers_are_checked() {
    let good = header();
    let parsed = Header::parse(&good).expect("good");
    assert_eq!(
        (parsed.size(), parsed.blocks, parsed.map_offset, parsed.data_offset),
        (3 << 20 | 512, 4, 512, 1024)
    );
    let damage: [(usize, u32, bool); 12] = [
        (0x40, 1, true),            // signature
        (0x44, 0x10002, false),     // version
        (0x4c, 4, false),           // differencing
        (0x1a8, 1, false),          // linked
        (0x1b8, 1, false),          // parent
        (0x17c, 512, false),        // extra data
        (0x154, 0x100, true),       // the map in the header
        (0x154, 0x201, true),       // not whole sectors
        (0x158, 512, true),         // blocks in the map
        (0x168, 4096, true),        // sector size
        (0x178, 3 << 20, true),     // block size
        (0x180, 0xffff_ffff, true), // blocks
    ];
    for (at, value, corrupt) in damage {
        let mut bad = good.clone();
        put(&mut bad, at, &value.to_le_bytes());
        let wrong = Header::parse(&bad).expect_err("bad");
        assert_eq!(matches!(wrong, Wrong::Corrupt(_)), corrupt, "{at:#x}: {wrong:?}");
    }
    assert!(Header::parse(&good[..511]).is_err());
}

proptest! {
    /// Whatever the numbers are, what is accepted can be calculated with.
    #[test]
    fn accepted_headers_are_within_limits(at in 0x140usize..0x1f8, value: u32, more: u32) {
        let mut bytes = header();
        put(&mut bytes, at, &value.to_le_bytes());
        put(&mut bytes, 0x180, &more.to_le_bytes());
        if let Ok(header) = Header::parse(&bytes) {
            prop_assert!(header.size() <= header.blocks * header.block_size);
            prop_assert!(header.map_offset + header.blocks * 4 <= header.data_offset);
        }
    }
}

fn with(seed: u64, filled: bool) {
    let dir = tempfile::tempdir().expect("a directory");
    let (image, cut) = (dir.path().join("image.vdi"), dir.path().join("cut.vdi"));
    // Small blocks, so that many get their place.
    create(&image, &CreateOptions::new(Format::Vdi, crate::power::SIZE)).expect("made");
    small_blocks(&image);
    let initial = fill(&image, Format::Vdi, filled);
    cut_power(seed, &image, Format::Vdi, initial, &cut, |image, allowed, cut| {
        let report = crate::check(image, None).expect("checked");
        assert_eq!(report.errors, 0, "cut at {cut}: {:?}", report.messages);
        verify_contents(image, Format::Vdi, allowed, initial, cut);
    });
}

/// Makes the new, empty image one of blocks of 64 KiB.
fn small_blocks(image: &Path) {
    let mut bytes = std::fs::read(image).expect("read");
    put(&mut bytes, 0x178, &(64u32 << 10).to_le_bytes());
    put(&mut bytes, 0x180, &16u32.to_le_bytes());
    bytes[512..576].fill(0xff);
    std::fs::write(image, bytes).expect("written");
}

#[test]
fn the_power_may_fail() {
    for seed in 1..=3 {
        with(seed, false);
    }
    with(4, true);
}

/// Found by fuzzing: one entry that names the last of all places made the search for free ones take minutes.
#[test]
fn an_entry_far_away_is_not_walked_to() {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("image.vdi");
    create(&image, &CreateOptions::new(Format::Vdi, 4 << 20)).expect("made");
    let mut bytes = std::fs::read(&image).expect("read");
    put(&mut bytes, 512 + 8, &0xffff_fffdu32.to_le_bytes());
    std::fs::write(&image, bytes).expect("written");
    let disk = crate::Disk::open(&image, &crate::OpenOptions::default()).expect("opened");
    let write = |offset| {
        let memory = std::sync::Arc::new(terem_memory::AlignedBuffer::from_slice(&[1; 512]));
        disk.run(crate::Op::Write { offset, memory })
    };
    assert_eq!(write(0), Ok(()), "the places before it are free");
    assert!(matches!(write(2 << 20), Err(crate::IoError::Corrupt(_))));
}
