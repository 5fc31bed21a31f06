//! Runs an image from anywhere through the block layer: the entry of fuzz targets.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use terem_memory::AlignedBuffer;

use crate::file::to_usize;
use crate::{AioEngine, BackingPolicy, BlockBackend, Cache, Disk, Format, IoError, Op, OpenOptions};

/// Disks up to this many bytes are compared with what they should hold.
const MAX_MODEL: u64 = 1 << 20;

/// Opens `bytes` as a qcow2 image in memory, and if it can be opened, reads, writes, zeroes, discards and
/// flushes at places that depend on `seed`, closes it, and checks it. Always ends, whatever the bytes are.
///
/// Returns whether it could be opened for writing.
///
/// # Panics
/// When an image that had been found free of errors is damaged by what is done to it, or reads as
/// something else than was written.
#[must_use]
pub fn exercise_qcow2(bytes: &[u8], seed: u64) -> bool {
    let Ok(fd) = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC) else { return false };
    let mut file = std::fs::File::from(fd);
    if file.write_all(bytes).is_err() {
        return false;
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let options = OpenOptions {
        format: Some(Format::Qcow2),
        backing: BackingPolicy::None,
        cache: Cache::Unsafe,
        aio: AioEngine::Threads,
        table_cache: 64 << 10,
        ..OpenOptions::default()
    };
    let _ = crate::info(&path, None);
    let sound = crate::check(&path, Some(Format::Qcow2)).is_ok_and(|report| report.is_clean());
    let Ok(disk) = Disk::open(&path, &options) else {
        return Disk::open(&path, &OpenOptions { read_only: true, ..options }).is_ok_and(|disk| {
            Exercise::new(disk, seed, sound).run();
            false
        });
    };
    let disk = Exercise::new(disk, seed, sound).run();
    let closed = disk.close();
    let report = crate::check(&path, Some(Format::Qcow2));
    maintain(&path, seed, sound && closed.is_ok());
    if sound {
        assert!(closed.is_ok(), "a sound image cannot be closed: {closed:?}");
        // Leaks are not asked for: they lose space and no data.
        let errors = report.as_ref().map(|report| report.errors);
        assert!(matches!(errors, Ok(0)), "a sound image was damaged: {report:?}");
    }
    true
}

/// Changes the image as a tool would: of a sound one each must leave a sound one, or be refused.
fn maintain(path: &str, seed: u64, sound: bool) {
    use crate::{BitmapAction, Preallocation, Repair, SnapshotAction, bitmap, repair, resize, snapshot};
    let format = Some(Format::Qcow2);
    let assert_sound = |what: &str| {
        let report = crate::check(path, format);
        assert!(!sound || report.as_ref().is_ok_and(|report| report.errors == 0), "{what}: {report:?}");
    };
    let _ = snapshot(path, format, SnapshotAction::Create("fuzz"));
    assert_sound("taking a snapshot damaged it");
    let _ = bitmap(path, format, "fuzz", &[BitmapAction::Add { granularity: 65536, enabled: true }]);
    let _ = resize(path, format, seed % (4 << 20), true, Preallocation::Off);
    assert_sound("changing its size damaged it");
    let _ = snapshot(path, format, SnapshotAction::Apply("fuzz"));
    assert_sound("applying a snapshot damaged it");
    let _ = snapshot(path, format, SnapshotAction::Delete("fuzz"));
    if let Ok((_, after)) = repair(path, format, Repair::All) {
        assert!(after.is_clean(), "it was repaired, and is not sound: {after:?}");
    }
}

struct Exercise {
    disk: Disk,
    seed: u64,
    /// What the disk holds, if it is small and the image sound.
    model: Option<Vec<u8>>,
}

impl Exercise {
    fn new(disk: Disk, seed: u64, sound: bool) -> Self {
        let mut new = Self { disk, seed, model: None };
        if sound && new.disk.size() <= MAX_MODEL {
            new.model = new.read(0, new.disk.size()).ok();
        }
        new
    }

    /// A number below `below`, or 0.
    fn next(&mut self, below: u64) -> u64 {
        // Steele and Vigna's SplitMix64: spreads any seed.
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (self.seed ^ self.seed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % below.max(1)
    }

    fn read(&self, offset: u64, length: u64) -> Result<Vec<u8>, IoError> {
        let memory = Arc::new(AlignedBuffer::new(to_usize(length)));
        self.disk.run(Op::Read { offset, memory: Arc::clone(&memory) as _ })?;
        Ok(memory.to_vec())
    }

    /// A few requests of each kind. Of a damaged image nothing is expected but that they end.
    fn run(mut self) -> Disk {
        let size = self.disk.size();
        for round in 1..=24 {
            let length = (1 + self.next(192 << 10)).min(size);
            let offset = self.next(size - length + 1);
            let model = self.model.take();
            self.model = match self.next(8) {
                0..3 => self.read(offset, length).ok().and_then(|found| {
                    let model = model?;
                    let expected = &model[to_usize(offset)..to_usize(offset + length)];
                    assert!(
                        found == expected,
                        "{offset:#x}+{length:#x} reads as something else in round {round}"
                    );
                    Some(model)
                }),
                3..5 => {
                    let memory = Arc::new(AlignedBuffer::from_slice(&vec![round; to_usize(length)]));
                    let done = self.disk.run(Op::Write { offset, memory });
                    done.ok().and(model).map(|model| filled(model, offset, length, round))
                }
                5 => {
                    let unmap = self.next(2) == 0;
                    let done = self.disk.run(Op::WriteZeroes { offset, length, unmap });
                    done.ok().and(model).map(|model| filled(model, offset, length, 0))
                }
                6 => {
                    let done = self.disk.run(Op::Discard { offset, length });
                    // It may be discarded or not, but not become anything else.
                    done.and_then(|()| self.read(offset, length)).ok().zip(model).map(|(found, mut model)| {
                        let place = &mut model[to_usize(offset)..to_usize(offset + length)];
                        let kept = |(old, new): (&u8, &u8)| *new == 0 || old == new;
                        assert!(
                            place.iter().zip(&found).all(kept),
                            "discarding made up data in round {round}"
                        );
                        place.copy_from_slice(&found);
                        model
                    })
                }
                _ => self.disk.run(Op::Flush).ok().and(model),
            };
        }
        self.disk
    }
}

fn filled(mut model: Vec<u8>, offset: u64, length: u64, with: u8) -> Vec<u8> {
    model[to_usize(offset)..to_usize(offset + length)].fill(with);
    model
}
