//! The block device on real images: what a guest writes reads back, and other tools agree with it.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use terem_block::{CreateOptions, Format, OpenOptions, check, create};

use super::super::testing::driver::Guest;
use super::*;

const SIZE: usize = 8 << 20;
/// Bytes of the largest request.
const LARGEST: u64 = 48 << 10;

/// Numbers without any order, the same in every run (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// A request in flight and what must come of it.
struct Expected {
    data: u64,
    status: u64,
    /// What a read must find.
    contents: Option<Vec<u8>>,
}

/// Plays random requests, many in flight but none overlapping another one, against a copy in memory.
fn exercise(guest: &mut Guest, model: &mut [u8], random: &mut Random) {
    let mut in_flight: HashMap<u16, Expected> = HashMap::new();
    let collect = |guest: &mut Guest, in_flight: &mut HashMap<u16, Expected>| {
        while let Some((id, _)) = guest.rings[0].take_used() {
            let e = in_flight.remove(&id).unwrap();
            assert_eq!(guest.get(e.status, 1), [S_OK]);
            if let Some(contents) = e.contents {
                assert_eq!(guest.get(e.data, contents.len()), contents);
            }
        }
        guest.rings[0].want_interrupt(Some(0));
    };
    // Disjoint stripes, so that the order of completion does not matter.
    let stripes = SIZE as u64 / LARGEST;
    for round in 0..30_u64 {
        for slot in 0..16 {
            let stripe = (round * 16 + slot * 11 + random.below(2)) % stripes;
            let offset = stripe * LARGEST + random.below(8) * 512;
            let len = usize::try_from((1 + random.below(64)) * 512).unwrap();
            let at = usize::try_from(offset).unwrap();
            let range = &mut model[at..at + len];
            let (kind, sector, mut readable, mut contents) =
                (random.below(4), offset / 512, Vec::new(), None);
            let kind = match kind {
                0 => {
                    contents = Some(range.to_vec());
                    T_IN
                }
                1 if slot % 2 == 0 => {
                    range.fill(0);
                    readable = sector.to_le_bytes().to_vec();
                    readable.extend(u32::try_from(len / 512).unwrap().to_le_bytes());
                    readable.extend(u32::try_from(random.below(2)).unwrap().to_le_bytes());
                    T_WRITE_ZEROES
                }
                _ => {
                    range.fill_with(|| random.below(256).to_le_bytes()[0]);
                    readable = range.to_vec();
                    T_OUT
                }
            };
            let mut header = kind.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(sector.to_le_bytes());
            let (head, status) = (guest.put(&header), guest.put(&[0xee]));
            let data = if contents.is_some() { guest.alloc(len) } else { guest.put(&readable) };
            let n = u32::try_from(contents.as_ref().map_or(readable.len(), Vec::len)).unwrap();
            let id = guest.submit(0, &[(head, 16, false), (data, n, contents.is_some()), (status, 1, true)]);
            in_flight.insert(id, Expected { data, status, contents });
            // The next round may come back to a stripe of this one.
            if slot == 15 {
                while !in_flight.is_empty() {
                    guest.wait_vector(1);
                    collect(guest, &mut in_flight);
                }
                guest.vectors();
            }
        }
    }
}

/// `qemu-img`, where there is one.
fn qemu_img(arguments: &[&str]) {
    match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => assert!(
            output.status.success(),
            "qemu-img {arguments:?}: {}",
            String::from_utf8_lossy(&output.stdout)
        ),
        Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::NotFound, "{e}"),
    }
}

fn through_a_guest(path: &Path, format: Format, packed: bool) -> Vec<u8> {
    create(path, &CreateOptions::new(format, SIZE as u64)).unwrap();
    let options = OpenOptions { format: Some(format), ..OpenOptions::default() };
    let mut model = vec![0; SIZE];
    let mut random = Random(0x7e4e_3011 + u64::from(packed));
    // Twice: the second guest finds what the first one left.
    for _ in 0..2 {
        let disk = Arc::new(terem_block::Disk::open(path, &options).unwrap());
        let mut guest = Guest::new(Arc::new(Blk::new(disk, 1, "image")));
        guest.start(packed, true, 64, 0);
        exercise(&mut guest, &mut model, &mut random);
    }
    model
}

#[test]
fn raw_images_hold_what_the_guest_wrote() {
    let dir = tempfile::tempdir().unwrap();
    for packed in [false, true] {
        let path = dir.path().join(format!("{packed}.raw"));
        let model = through_a_guest(&path, Format::Raw, packed);
        assert!(std::fs::read(&path).unwrap() == model);
    }
}

#[test]
fn qcow2_images_hold_what_the_guest_wrote_and_are_clean() {
    let dir = tempfile::tempdir().unwrap();
    for packed in [false, true] {
        let path = dir.path().join(format!("{packed}.qcow2"));
        let model = through_a_guest(&path, Format::Qcow2, packed);
        let report = check(&path, Some(Format::Qcow2)).unwrap();
        assert!(report.is_clean(), "{report:?}");
        let (image, raw) = (path.to_str().unwrap(), dir.path().join("model.raw"));
        qemu_img(&["check", image]);
        std::fs::write(&raw, &model).unwrap();
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", image, raw.to_str().unwrap()]);
    }
}
