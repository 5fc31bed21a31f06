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
        loop {
            // Asked for first: what is used after the last look gives an interrupt.
            guest.rings[0].want_interrupt(Some(0));
            let Some((id, _)) = guest.rings[0].take_used() else { break };
            let e = in_flight.remove(&id).unwrap();
            assert_eq!(guest.get(e.status, 1), [S_OK]);
            if let Some(contents) = e.contents {
                assert_eq!(guest.get(e.data, contents.len()), contents);
            }
        }
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

#[test]
fn after_a_reset_the_disk_touches_nothing_any_more() {
    use terem_memory::vm_memory::{Bytes, GuestAddress};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    create(&path, &CreateOptions::new(Format::Raw, SIZE as u64)).unwrap();
    let options = OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() };
    let disk = Arc::new(terem_block::Disk::open(&path, &options).unwrap());
    let mut g = Guest::new(Arc::new(Blk::new(disk, 1, "image")));
    let (head, data) = (g.put(&[0; 16]), g.alloc(48 << 10));
    for round in 0..60 {
        g.start(round % 2 == 0, true, 64, 0);
        for i in 0..40_u64 {
            // Add first and notify at the end, so that the reset comes while the disk is at work.
            g.add(0, &[(head, 16, false), (data + i * 1024, 1024, true), (data - 8, 1, true)]);
        }
        let status = g.common.0 + 0x14;
        std::thread::scope(|scope| {
            let guest = &g;
            scope.spawn(move || guest.kick(0));
            if round % 3 > 0 {
                std::thread::sleep(std::time::Duration::from_micros(50 * (round % 7)));
            }
            g.write(status, 1, 0);
            assert_eq!(g.status(), 0);
            // The driver's again: whoever writes here or to the ring from now on is wrong.
            g.memory.write_slice(&[0xa5; 48 << 10], GuestAddress(data)).unwrap();
            let device_area = g.rings[0].config.device;
            let ring = g.get(device_area, 600);
            g.vectors();
            std::thread::sleep(std::time::Duration::from_millis(2));
            assert!(g.get(data, 48 << 10).iter().all(|&b| b == 0xa5), "round {round}");
            assert_eq!(g.get(device_area, 600), ring, "round {round}");
            assert!(g.vectors().is_empty(), "round {round}");
        });
    }
}
