//! Runs an image from anywhere through the block layer: the entry of fuzz targets.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use terem_memory::AlignedBuffer;

use crate::bytes::le16;
use crate::file::to_usize;
use crate::{AioEngine, BackingPolicy, BlockBackend, Cache, Disk, Format, IoError, Op, OpenOptions};

/// Disks up to this many bytes are compared with what they should hold.
const MAX_MODEL: u64 = 1 << 20;

/// Opens `bytes` as a qcow2 image in memory and works on it, as [`exercise`] says. Returns whether it could be opened for
/// writing.
///
/// # Panics
/// As [`exercise`].
#[must_use]
pub fn exercise_qcow2(bytes: &[u8], seed: u64) -> bool {
    let Some(file) = memory_file() else { return false };
    file.write_all_at(bytes, 0).is_ok() && exercise(&file, Format::Qcow2, seed)
}

/// Most sectors of an image that [`exercise_pieces`] makes: 16 MiB.
const MAX_SECTORS: u16 = 1 << 15;

/// Works on an image that is described by its parts, so that images whose structures lie far apart are short inputs:
///
/// ```text
///  format (0 vdi, 1 vpc, 2 vhdx, 3 vmdk) │ sectors of the file: 2 bytes │ part: sector, length: 2 bytes each; data │ part ...
/// ```
///
/// Checksums of VHDX structures are made right, or nothing behind them would ever be reached. Returns whether the image
/// could be opened for writing.
///
/// # Panics
/// As [`exercise`].
#[must_use]
pub fn exercise_pieces(input: &[u8], seed: u64) -> bool {
    let [format, rest @ ..] = input else { return false };
    let format = [Format::Vdi, Format::Vhd, Format::Vhdx, Format::Vmdk][usize::from(format % 4)];
    let Some(file) = memory_file() else { return false };
    if file.set_len(u64::from(le16(rest, 0).min(MAX_SECTORS)) * 512).is_err() {
        return false;
    }
    let mut rest = rest.get(2..).unwrap_or_default();
    while rest.len() > 4 {
        let (at, length) = (u64::from(le16(rest, 0).min(MAX_SECTORS)) * 512, usize::from(le16(rest, 2)));
        let (data, more) = rest[4..].split_at(length.min(rest.len() - 4));
        if file.write_all_at(data, at).is_err() {
            return false;
        }
        rest = more;
    }
    if format == Format::Vhdx && crate::vhdx::reseal(&file).is_err() {
        return false;
    }
    exercise(&file, format, seed)
}

fn memory_file() -> Option<File> {
    rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).ok().map(File::from)
}

/// Opens an image in memory, and if it can be opened, reads, writes, zeroes, discards and flushes at places that depend
/// on `seed`, closes it, and checks it. Always ends, whatever the bytes are. Returns whether it could be opened for
/// writing.
///
/// # Panics
/// When an image that had been found free of errors is damaged by what is done to it, or reads as
/// something else than was written.
fn exercise(file: &File, format: Format, seed: u64) -> bool {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let options = OpenOptions {
        format: Some(format),
        backing: BackingPolicy::None,
        cache: Cache::Unsafe,
        aio: AioEngine::Threads,
        table_cache: 64 << 10,
        ..OpenOptions::default()
    };
    let _ = crate::info(&path, None);
    let sound = crate::check(&path, Some(format)).is_ok_and(|report| report.is_clean());
    let Ok(disk) = Disk::open(&path, &options) else {
        return Disk::open(&path, &OpenOptions { read_only: true, ..options }).is_ok_and(|disk| {
            Exercise::new(disk, seed, sound).run();
            false
        });
    };
    let disk = Exercise::new(disk, seed, sound).run();
    let closed = disk.close();
    let report = crate::check(&path, Some(format));
    if format == Format::Qcow2 {
        maintain(&path, seed, sound && closed.is_ok());
    }
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
    if let Ok((before, after)) = repair(path, format, Repair::All) {
        // What lies beyond the file's end stays an error, for example: but none is made.
        assert!(after.errors <= before.errors, "repairing it did harm: {before:?}, {after:?}");
        assert!(!sound || after.is_clean(), "it was repaired, and is not sound: {after:?}");
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
