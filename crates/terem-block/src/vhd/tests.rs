//! Footers, geometries, and power cuts.

use proptest::prelude::*;

use super::create::Size;
use super::footer::{
    CHECKSUM_AT, Dynamic, Footer, MAX_GEOMETRY, MAX_SECTORS, TYPE_DYNAMIC, checksum, sectors_of,
};
use crate::bytes::put;
use crate::power::{cut_power, fill, verify_contents};
use crate::{CreateOptions, Format, VhdOptions, create};

#[test]
fn geometries_are_those_of_the_specification() {
    // Sizes in sectors, and what qemu-img makes of them.
    for (asked, sectors, geometry) in [
        (0, 0, (0, 4, 17)),
        (10240, 10268, (151, 4, 17)),
        (2 << 20, 2_097_648, (2081, 16, 63)),
        (65535 * 16 * 255, 65535 * 16 * 255, MAX_GEOMETRY),
        (MAX_SECTORS, MAX_SECTORS, MAX_GEOMETRY),
    ] {
        assert_eq!(Size::new(asked, false), Some(Size { sectors, geometry }), "{asked}");
    }
    assert_eq!(Size::new(10240, true), Some(Size { sectors: 10240, geometry: MAX_GEOMETRY }));
    assert_eq!(Size::new(MAX_SECTORS + 1, false), None);
}

fn image() -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.vhd");
    create(&image, &CreateOptions::new(Format::Vhd, 5 << 20)).expect("made");
    std::fs::read(&image).expect("read")
}

#[test]
fn footers_and_headers_are_checked() {
    let image = image();
    let (good, header) = (&image[..512], &image[512..1536]);
    let footer = Footer::parse(good).expect("good");
    assert_eq!((footer.sectors, footer.kind, footer.data_offset), (10268, TYPE_DYNAMIC, 512));
    assert_eq!(checksum(good, CHECKSUM_AT).to_be_bytes(), good[64..68]);
    let dynamic = Dynamic::parse(header, 10268).expect("good");
    assert_eq!(dynamic, Dynamic { table: 1536, entries: 3, block_size: 2 << 20 });
    assert_eq!((dynamic.bitmap_size(), dynamic.data_start()), (512, 2048));
    assert!(Dynamic::parse(header, 3 * 4096 + 1).is_err(), "the table is too small");
    for (at, value) in [(0, 0), (16, 1 << 31), (20, 1), (20, 0), (28, 2), (32, 256), (32, 3 << 20)] {
        let mut bad = header.to_vec();
        put(&mut bad, at, &u32::to_be_bytes(value));
        assert!(Dynamic::parse(&bad, 10268).is_err(), "{value:#x} at {at}");
    }
    for (maker, sectors) in [(b"vpc ", 10268), (b"win ", 77), (b"qem2", 77), (b"tap\0", 77), (b"CXS1", 77)] {
        let mut other = good.to_vec();
        put(&mut other, 28, maker);
        put(&mut other, 48, &(77u64 * 512 + 5).to_be_bytes());
        assert_eq!(Footer::parse(&other).expect("good").sectors, sectors, "{maker:?}");
    }
}

proptest! {
    /// A disk is never smaller than asked for, and hardly larger.
    #[test]
    fn sizes_reach_what_was_asked_for(sectors in 0..=MAX_SECTORS) {
        let size = Size::new(sectors, false).expect("there is one");
        prop_assert!(size.sectors >= sectors && size.sectors - sectors <= 16 * 255);
        prop_assert!(size.geometry == MAX_GEOMETRY || sectors_of(size.geometry) == size.sectors);
    }

    #[test]
    fn accepted_tables_are_within_limits(table: u64, entries: u32, order in 0u32..32, sectors in 0..=MAX_SECTORS) {
        let mut header = image()[512..1536].to_vec();
        put(&mut header, 16, &table.to_be_bytes());
        put(&mut header, 28, &entries.to_be_bytes());
        put(&mut header, 32, &(1u32 << order).to_be_bytes());
        if let Ok(dynamic) = Dynamic::parse(&header, sectors) {
            prop_assert!(dynamic.entries * dynamic.block_size >= sectors * 512);
            prop_assert!(dynamic.data_start() > dynamic.table || dynamic.entries == 0);
            prop_assert!(dynamic.bitmap_size() * 8 * 512 >= dynamic.block_size);
        }
    }
}

fn with(seed: u64, filled: bool) {
    let dir = tempfile::tempdir().expect("a directory");
    let (image, cut) = (dir.path().join("image.vhd"), dir.path().join("cut.vhd"));
    let options = CreateOptions {
        vhd: VhdOptions { force_size: true, ..VhdOptions::default() },
        ..CreateOptions::new(Format::Vhd, crate::power::SIZE)
    };
    create(&image, &options).expect("made");
    // Blocks of 64 KiB, so that many get their place.
    let mut bytes = std::fs::read(&image).expect("read");
    put(&mut bytes, 512 + 28, &16u32.to_be_bytes());
    put(&mut bytes, 512 + 32, &(64u32 << 10).to_be_bytes());
    std::fs::write(&image, bytes).expect("written");
    let initial = fill(&image, Format::Vhd, filled);
    cut_power(seed, &image, Format::Vhd, initial, &cut, |image, allowed, cut| {
        let report = crate::check(image, Some(Format::Vhd)).expect("checked");
        assert_eq!(report.errors, 0, "cut at {cut}: {:?}", report.messages);
        verify_contents(image, Format::Vhd, allowed, initial, cut);
    });
}

#[test]
fn the_power_may_fail() {
    for seed in 1..=3 {
        with(seed, false);
    }
    with(4, true);
}
