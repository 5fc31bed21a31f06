//! Descriptors, headers, footers, and power cuts.

use std::fs;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::descriptor::{Descriptor, ExtentKind, NO_PARENT, Wrong};
use super::grains::{compress, decompress};
use super::sparse::{HAS_MARKERS, SparseHeader};
use super::{VmdkOptions, VmdkSubformat};
use crate::bytes::{le64, put};
use crate::power::{SIZE, cut_power, fill, verify_contents};
use crate::{BackingFile, CreateOptions, Disk, Format, OpenOptions, create};

const TEXT: &str = "# Disk DescriptorFile
version=1
encoding=\"UTF-8\"
CID=fffe1234
parentCID=0badc0de
isNativeSnapshot=\"no\"
createType=\"twoGbMaxExtentSparse\"
parentFileNameHint=\"base image.vmdk\"

# Extent description
RW 4192256 SPARSE \"a b-s001.vmdk\"
RDONLY 63 FLAT \"c.vmdk\" 128
RW 100 ZERO
RW 2 VMFS \"d\"

ddb.adapterType = \"ide\"
";

#[test]
fn descriptors_are_understood() {
    let parsed = Descriptor::parse(TEXT.as_bytes()).expect("good");
    assert_eq!((parsed.cid, parsed.parent_cid), (0xfffe_1234, 0x0bad_c0de));
    assert_eq!(&TEXT[parsed.cid_at.clone()], "fffe1234");
    assert_eq!(parsed.create_type, "twoGbMaxExtentSparse");
    assert_eq!(parsed.parent.as_deref(), Some("base image.vmdk"));
    let extents: Vec<_> =
        parsed.extents.iter().map(|e| (e.writable, e.sectors, e.kind, e.name.as_str())).collect();
    assert_eq!(
        extents,
        [
            (true, 4_192_256, ExtentKind::Sparse, "a b-s001.vmdk"),
            (false, 63, ExtentKind::Flat { start: 128 }, "c.vmdk"),
            (true, 100, ExtentKind::Zero, ""),
            (true, 2, ExtentKind::Flat { start: 0 }, "d"),
        ]
    );
    let spaced = "CID = 1a \r\ncreateType = \"custom\"\r\n\0CID=2";
    let parsed = Descriptor::parse(spaced.as_bytes()).expect("good");
    assert_eq!((parsed.cid, parsed.parent_cid, parsed.parent), (0x1a, NO_PARENT, None));
    assert_eq!(&spaced[parsed.cid_at], "1a");
}

#[test]
fn bad_descriptors_are_refused() {
    let with = |line: &str| Descriptor::parse(format!("CID=1\ncreateType=\"x\"\n{line}\n").as_bytes());
    assert!(with("").is_ok());
    for line in [
        "RW",
        "RW 0 FLAT \"f\" 0",
        "RW -1 FLAT \"f\" 0",
        "RW 99999999999999999999 FLAT \"f\" 0",
        "RW 18446744073709551615 SPARSE \"f\"",
        "RW 1 FLAT \"f\"",
        "RW 1 FLAT \"f\" x",
        "RW 1 FLAT f 0",
        "RW 1 FLAT \"f",
        "RW 1 SPARSE \"\"",
        "RW 1 SPARSE \"f\" 3",
        "parentCID=",
        "parentCID=123456789",
        "parentCID=+1",
    ] {
        assert!(matches!(with(line), Err(Wrong::Corrupt(_))), "{line}");
    }
    for line in ["NOACCESS 1 FLAT \"f\" 0", "RW 1 SESPARSE \"f\"", "RW 1 VMFSSPARSE \"f\""] {
        assert!(matches!(with(line), Err(Wrong::Unsupported(_))), "{line}");
    }
    assert!(matches!(with(&"RW 1 ZERO\n".repeat(5000)), Err(Wrong::Unsupported(_))));
    assert!(Descriptor::parse(b"createType=\"x\"\n").is_err());
    assert!(Descriptor::parse(b"CID=1\n").is_err());
    assert!(Descriptor::parse(b"CID=1\ncreateType=\"\xff\"\n").is_err());
}

proptest! {
    #[test]
    fn any_text_can_be_parsed(text in "(RW|RDONLY|CID|createType|=|\"| |[0-9a-f]{1,9}|SPARSE|FLAT|\n|\r|\0|é){0,60}") {
        if let Ok(parsed) = Descriptor::parse(text.as_bytes()) {
            let digits = &text[parsed.cid_at];
            prop_assert_eq!(u32::from_str_radix(digits, 16), Ok(parsed.cid));
        }
    }

    #[test]
    fn accepted_headers_are_within_limits(at in 4usize..0x50, value: u64, capacity in 0u64..1 << 40) {
        let mut bytes = image(VmdkSubformat::MonolithicSparse)[..512].to_vec();
        put(&mut bytes, 0x0c, &capacity.to_le_bytes());
        put(&mut bytes, at, &value.to_le_bytes());
        if let Ok(header) = SparseHeader::parse(&bytes) {
            prop_assert!(header.tables() * header.table_entries * header.grain >= header.size);
            prop_assert!(header.tables() <= 8 << 20 && header.grain <= 16 << 20 && header.grain >= 512);
        }
    }
}

fn make(image: &Path, size: u64, subformat: VmdkSubformat) {
    let vmdk = VmdkOptions { subformat, ..VmdkOptions::default() };
    create(image, &CreateOptions { vmdk, ..CreateOptions::new(Format::Vmdk, size) }).expect("made");
}

fn image(subformat: VmdkSubformat) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a directory");
    let image = dir.path().join("disk.vmdk");
    make(&image, 1 << 20, subformat);
    fs::read(&image).expect("read")
}

#[test]
fn headers_are_checked() {
    let good = image(VmdkSubformat::StreamOptimized);
    let header = SparseHeader::parse(&good[..512]).expect("good");
    assert_eq!((header.size, header.grain, header.tables(), header.compressed), (1 << 20, 65536, 1, true));
    assert!(header.read_only_reason().is_none());
    for (at, value) in
        [(4, 4u32), (0x0c, 0), (0x10, 0x8000_0000), (0x14, 3), (0x14, 0), (0x14, 1 << 20), (0x2c, 0)]
    {
        let mut bad = good[..512].to_vec();
        put(&mut bad, at, &value.to_le_bytes());
        assert!(SparseHeader::parse(&bad).is_err(), "{value:#x} at {at:#x}");
    }
    let mut algorithm = good[..512].to_vec();
    put(&mut algorithm, 0x4d, &2u16.to_le_bytes());
    assert!(SparseHeader::parse(&algorithm).is_err());
    let mut unmarked = good[..512].to_vec();
    put(&mut unmarked, 8, &(3u32 | 1 << 16 & !HAS_MARKERS).to_le_bytes());
    assert!(SparseHeader::parse(&unmarked).expect("good").read_only_reason().is_some());
    put(&mut unmarked, 0x4d, &0u16.to_le_bytes());
    assert!(SparseHeader::parse(&unmarked).expect("good").read_only_reason().is_some(), "version 3");
}

#[test]
fn grains_are_compressed_and_bounded() {
    let grain: Vec<u8> = (0..65536u32).map(|i| (i / 9).to_le_bytes()[0]).collect();
    let packed = compress(&grain).expect("in memory");
    assert!(packed.len() < grain.len() / 4);
    assert_eq!(decompress(&packed, 65536).expect("whole"), grain);
    assert_eq!(decompress(&packed, 512).expect("a part"), grain[..512]);
    assert!(decompress(&packed[..100], 65536).is_err());
    assert!(decompress(b"no zlib at all", 65536).is_err());
}

/// As VMware writes a stream: the directory's place is in a footer. It can be read, by QEMU too, and not be written.
#[test]
fn streams_with_a_footer() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk.vmdk");
    make(&path, SIZE, VmdkSubformat::StreamOptimized);
    fill(&path, Format::Vmdk, true);
    let mut bytes = fs::read(&path).expect("read");
    let directory = le64(&bytes, 0x38);
    let mut footer = vec![0; 1536];
    footer[512..1024].copy_from_slice(&bytes[..512]);
    put(&mut footer, 12, &3u32.to_le_bytes());
    put(&mut bytes, 0x38, &u64::MAX.to_le_bytes());
    bytes.extend(&footer);
    fs::write(&path, &bytes).expect("written");
    verify_contents(&path, Format::Vmdk, &crate::power::Allowed::new(), crate::power::INITIAL, 0);
    let raw = dir.path().join("model.raw");
    fs::write(&raw, vec![crate::power::INITIAL; SIZE as usize]).expect("written");
    let same = Command::new("qemu-img")
        .args(["compare", "-q", "-f", "raw", "-F", "vmdk"])
        .args([&raw, &path])
        .status();
    assert!(same.expect("qemu-img is needed for this test").success());
    assert!(crate::check(&path, None).expect("checked").is_clean());
    let e = Disk::open(&path, &OpenOptions::default()).expect_err("not for writing");
    assert!(e.to_string().contains("footer"), "{e}");
    // Without its end it is not whole.
    fs::write(&path, &bytes[..bytes.len() - 512]).expect("written");
    assert!(Disk::open(&path, &OpenOptions::read_only()).is_err());
    assert_eq!(directory, 1 + 20 + 1 + 4, "after the redundant one and its table");
}

/// What the image is like in a power cut.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    /// Tables are made when they are needed.
    NoTables,
    Stream,
    Child,
}

fn with(seed: u64, kind: Kind, filled: bool) {
    let dir = tempfile::tempdir().expect("a directory");
    let (image, cut) = (dir.path().join("image.vmdk"), dir.path().join("cut.vmdk"));
    let mut initial = 0;
    if kind == Kind::Child {
        let parent = dir.path().join("parent.vmdk");
        make(&parent, SIZE, VmdkSubformat::MonolithicSparse);
        initial = fill(&parent, Format::Vmdk, true);
        let options = CreateOptions {
            backing: Some(BackingFile { path: "parent.vmdk".into(), format: Format::Vmdk }),
            vmdk: VmdkOptions { zeroed_grain: seed.is_multiple_of(2), ..VmdkOptions::default() },
            ..CreateOptions::new(Format::Vmdk, SIZE)
        };
        create(&image, &options).expect("made");
    } else {
        let stream = kind == Kind::Stream;
        let subformat = if stream { VmdkSubformat::StreamOptimized } else { VmdkSubformat::MonolithicSparse };
        make(&image, SIZE, subformat);
        if kind == Kind::NoTables {
            forget_tables(&image);
        }
        initial = initial.max(fill(&image, Format::Vmdk, filled));
    }
    cut_power(seed, &image, Format::Vmdk, initial, &cut, |image, allowed, cut| {
        let report = crate::check(image, None).expect("checked");
        assert_eq!(report.errors, 0, "cut at {cut}: {:?}", report.messages);
        verify_contents(image, Format::Vmdk, allowed, initial, cut);
        if cut % 5 == 0 {
            let done = Command::new("qemu-img").args(["check", "-q", "-f", "vmdk"]).arg(image).status();
            assert!(done.expect("qemu-img is needed for this test").success(), "cut at {cut}");
        }
    });
}

/// Makes a new, empty image one without grain tables, which have one grain each.
fn forget_tables(image: &Path) {
    let mut bytes = fs::read(image).expect("read");
    put(&mut bytes, 0x2c, &1u32.to_le_bytes());
    let directories = [0x30, 0x38].map(|at| usize::try_from(le64(&bytes, at) * 512).expect("small"));
    for at in directories {
        bytes[at..at + 64].fill(0);
    }
    fs::write(image, bytes).expect("written");
}

#[test]
fn the_power_may_fail() {
    with(1, Kind::Plain, false);
    with(2, Kind::Plain, true);
}

#[test]
fn the_power_may_fail_while_tables_are_made() {
    for seed in 10..12 {
        with(seed, Kind::NoTables, false);
    }
    with(4, Kind::NoTables, true);
}

#[test]
fn the_power_may_fail_in_a_stream() {
    with(5, Kind::Stream, false);
}

#[test]
fn the_power_may_fail_over_a_parent() {
    with(6, Kind::Child, false);
    with(7, Kind::Child, false);
}
