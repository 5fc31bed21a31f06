//! Block devices of the host, as loop devices over files: images on them, copies to and from them, sectors of 512 and
//! 4096 bytes, direct I/O, discards and zeroes. Where there are no loop devices, nothing is tested and that is said.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails, also in what the tests share")]

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tempfile::TempDir;
use terem_block::{
    AioEngine, AlignedBuffer, BlockBackend, Cache, ConvertOptions, CreateOptions, Disk, EncryptionOptions,
    Format, IoMemory, Keys, Op, OpenError, OpenOptions, Passphrase, Preallocation, check, convert, create,
    import, info, resize,
};

const MIB: u64 = 1 << 20;

/// A loop device over a file.
struct Device {
    path: PathBuf,
    /// What it has.
    file: PathBuf,
    _dir: TempDir,
}

impl Device {
    /// A device whose bytes are all 0xaa; `None` if this host has none to give.
    fn new(size: u64, sector: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("device");
        fs::write(&file, vec![0xaa; usize::try_from(size).unwrap()]).unwrap();
        let made = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(&file)
            .output();
        match made {
            Ok(out) if out.status.success() => {
                let path = String::from_utf8(out.stdout).unwrap().trim().into();
                Some(Self { path, file, _dir: dir })
            }
            Ok(out) => {
                eprintln!(
                    "no loop devices here, not tested: {}",
                    String::from_utf8_lossy(&out.stderr).trim()
                );
                None
            }
            Err(error) => {
                eprintln!("no loop devices here, not tested: losetup: {error}");
                None
            }
        }
    }

    /// What is on it.
    fn contents(&self) -> Vec<u8> {
        // Whatever is still in the page cache of the device goes to the file.
        fs::File::open(&self.path).unwrap().sync_all().unwrap();
        fs::read(&self.file).unwrap()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.path).status();
    }
}

fn raw() -> OpenOptions {
    OpenOptions { format: Some(Format::Raw), ..OpenOptions::default() }
}

fn buffer(bytes: &[u8]) -> Arc<dyn IoMemory> {
    Arc::new(AlignedBuffer::from_slice(bytes))
}

fn read(disk: &Disk, offset: u64, length: usize) -> Vec<u8> {
    let memory = Arc::new(AlignedBuffer::from_slice(&vec![0; length]));
    disk.run(Op::Read { offset, memory: Arc::clone(&memory) as _ }).unwrap();
    memory.to_vec()
}

/// Bytes that differ from place to place.
fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|i| u8::try_from(i * 7 % 251).unwrap().wrapping_add(seed)).collect()
}

#[derive(Debug, Clone)]
enum Step {
    Read(u64, usize),
    Write(u64, usize, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
}

fn step(size: u64) -> impl Strategy<Value = Step> {
    // Whole sectors of either kind, and anything.
    let grain = prop::sample::select(vec![1_u64, 512, 4096]);
    let place = (grain, 0..size, 1..64_u64 << 10).prop_map(move |(grain, at, length)| {
        let at = at - at % grain;
        (at, length.next_multiple_of(grain).min(size - at).max(1))
    });
    (place, 0_u8..8, any::<u8>()).prop_map(|((at, length), what, byte)| {
        let bytes = usize::try_from(length).unwrap();
        match what {
            0 | 1 => Step::Read(at, bytes),
            2..=4 => Step::Write(at, bytes, byte),
            5 => Step::Zero(at, length, byte % 2 == 0),
            6 => Step::Discard(at, length),
            _ => Step::Flush,
        }
    })
}

/// What a device and a copy of its bytes in memory say to the same requests.
fn carry_out(disk: &Disk, model: &mut [u8], steps: &[Step]) {
    let part = |at: u64, length: usize| {
        let at = usize::try_from(at).unwrap();
        at..at + length
    };
    for step in steps {
        match *step {
            Step::Read(at, length) => assert_eq!(read(disk, at, length), model[part(at, length)], "{step:?}"),
            Step::Write(at, length, seed) => {
                let bytes = pattern(length, seed);
                disk.run(Op::Write { offset: at, memory: buffer(&bytes) }).unwrap();
                model[part(at, length)].copy_from_slice(&bytes);
            }
            Step::Zero(offset, length, unmap) => {
                disk.run(Op::WriteZeroes { offset, length, unmap }).unwrap();
                model[part(offset, usize::try_from(length).unwrap())].fill(0);
            }
            Step::Discard(offset, length) => {
                disk.run(Op::Discard { offset, length }).unwrap();
                // What was there or zeroes, byte by byte; neighbours stay.
                let range = part(offset, usize::try_from(length).unwrap());
                let now = read(disk, offset, range.len());
                for (now, before) in now.iter().zip(&mut model[range]) {
                    assert!(now == before || *now == 0, "{step:?}");
                    *before = *now;
                }
            }
            Step::Flush => disk.run(Op::Flush).unwrap(),
        }
    }
}

#[test]
fn random_requests() {
    // No whole number of 4096 bytes on devices with small sectors.
    for (sector, size) in [(512, MIB + 512 * 3), (4096, MIB)] {
        let Some(device) = Device::new(size, sector) else { return };
        for (cache, aio) in [
            (Cache::Writeback, AioEngine::Auto),
            (Cache::Direct, AioEngine::Auto),
            (Cache::Direct, AioEngine::Threads),
        ] {
            let mut model = device.contents();
            let options = OpenOptions { cache, aio, ..raw() };
            let steps = prop::collection::vec(step(size), 1..60);
            let mut runner =
                TestRunner::new(Config { cases: 12, failure_persistence: None, ..Config::default() });
            let model_cell = std::cell::RefCell::new(&mut model);
            runner
                .run(&steps, |steps| {
                    let disk = Disk::open(&device.path, &options).unwrap();
                    assert_eq!(disk.size(), size);
                    carry_out(&disk, &mut model_cell.borrow_mut(), &steps);
                    disk.close().unwrap();
                    Ok(())
                })
                .unwrap();
            assert!(device.contents() == model, "{sector} {cache:?}");
        }
    }
}

#[test]
fn discards_and_zeroes_give_storage_back() {
    use std::os::unix::fs::MetadataExt;
    let Some(device) = Device::new(8 * MIB, 512) else { return };
    let blocks = || fs::metadata(&device.file).unwrap().blocks() * 512;
    let disk = Disk::open(&device.path, &raw()).unwrap();
    assert!(disk.geometry().discard && !disk.facts().zero_when_new);
    let full = blocks();
    disk.run(Op::Discard { offset: MIB + 100, length: 2 * MIB }).unwrap();
    assert!(blocks() <= full - 2 * MIB + 8192, "{} of {full}", blocks());
    disk.run(Op::WriteZeroes { offset: 4 * MIB, length: 2 * MIB, unmap: true }).unwrap();
    assert!(blocks() <= full - 4 * MIB + 8192, "{} of {full}", blocks());
    assert_eq!(read(&disk, 4 * MIB - 1, 3), [0xaa, 0, 0]);
    // Without the discard feature nothing is given back.
    disk.close().unwrap();
    let disk = Disk::open(&device.path, &OpenOptions { discard: false, ..raw() }).unwrap();
    let before = blocks();
    disk.run(Op::Discard { offset: 6 * MIB, length: MIB }).unwrap();
    assert_eq!((blocks(), read(&disk, 6 * MIB, 2)), (before, vec![0xaa; 2]));
}

/// A raw file with data, zeroes and holes.
fn source(dir: &Path, size: u64) -> PathBuf {
    let path = dir.join("source.raw");
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    let data = pattern(usize::try_from(MIB).unwrap() + 777, 3);
    for at in [0, size / 2 + 4096] {
        let at = usize::try_from(at).unwrap();
        bytes[at..at + data.len()].copy_from_slice(&data);
    }
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn copies_to_and_from_a_device() {
    let dir = tempfile::tempdir().unwrap();
    let size = 6 * MIB;
    let source = source(dir.path(), size);
    let bytes = fs::read(&source).unwrap();
    for sector in [512, 4096] {
        for format in [Format::Raw, Format::Qcow2] {
            let Some(device) = Device::new(8 * MIB, sector) else { return };
            let new = CreateOptions { format, ..CreateOptions::default() };
            let copy = |new: &CreateOptions| {
                convert(&source, &raw(), &device.path, new, &ConvertOptions::default(), &mut |_, _| true)
            };
            // What is there is there, as with files.
            assert!(matches!(copy(&new), Err(OpenError::Exists { .. })));
            copy(&CreateOptions { overwrite: true, ..new }).unwrap();
            let facts = info(&device.path, Some(format)).unwrap();
            let expected = if format == Format::Raw { 8 * MIB } else { size };
            assert_eq!(facts.virtual_size, expected);
            if format == Format::Raw {
                let there = device.contents();
                assert!(there[..bytes.len()] == bytes && there[bytes.len()..].iter().all(|&b| b == 0xaa));
            } else {
                let report = check(&device.path, None).unwrap();
                assert_eq!((report.errors, report.leaks), (0, 0));
                if let Ok(out) = Command::new("qemu-img")
                    .args(["compare", "-f", "raw", "-F", "qcow2"])
                    .args([&source, &device.path])
                    .output()
                {
                    assert!(out.status.success(), "{out:?}");
                }
            }
            let back = dir.path().join(format!("back-{sector}"));
            let from = OpenOptions { format: Some(format), ..OpenOptions::default() };
            let to = CreateOptions { format: Format::Raw, overwrite: true, ..CreateOptions::default() };
            convert(&device.path, &from, &back, &to, &ConvertOptions::default(), &mut |_, _| true).unwrap();
            assert!(fs::read(&back).unwrap()[..bytes.len()] == bytes);
        }
    }
}

#[test]
fn a_stream_into_a_device() {
    let Some(device) = Device::new(4 * MIB, 512) else { return };
    let new = CreateOptions { format: Format::Raw, overwrite: true, ..CreateOptions::default() };
    let bytes = pattern(1_500_000, 9);
    import(&mut &bytes[..], None, &device.path, &new, &mut |_, _| true).unwrap();
    assert!(device.contents()[..bytes.len()] == bytes);
    let error = import(&mut std::io::repeat(1).take(4 * MIB + 1), None, &device.path, &new, &mut |_, _| true);
    assert!(error.unwrap_err().to_string().contains("has more than the 4194304 bytes of the device"));
    let qcow2 = CreateOptions { overwrite: true, ..CreateOptions::default() };
    import(&mut &bytes[..], None, &device.path, &qcow2, &mut |_, _| true).unwrap();
    let disk = Disk::open(&device.path, &OpenOptions::read_only()).unwrap();
    assert_eq!(disk.size(), 1_500_160);
    assert!(read(&disk, 0, bytes.len()) == bytes);
}

#[test]
fn qcow2_on_a_device_that_is_full() {
    let Some(device) = Device::new(2 * MIB, 512) else { return };
    let new = CreateOptions { overwrite: true, ..CreateOptions::new(Format::Qcow2, 16 * MIB) };
    create(&device.path, &new).unwrap();
    let disk = Disk::open(&device.path, &OpenOptions::default()).unwrap();
    let mut written = 0;
    let error = loop {
        let memory = buffer(&pattern(65536, 1));
        match disk.run(Op::Write { offset: written, memory }) {
            Ok(()) => written += 65536,
            Err(error) => break error,
        }
    };
    assert_eq!(error, terem_block::IoError::NoSpace);
    assert!(written >= MIB, "{written}");
    // What was written stays, and what is given back can be used again.
    disk.run(Op::Flush).unwrap();
    assert!(read(&disk, written - 65536, 65536) == pattern(65536, 1));
    disk.run(Op::Discard { offset: 0, length: 65536 }).unwrap();
    disk.run(Op::Flush).unwrap();
    disk.run(Op::Write { offset: 15 * MIB, memory: buffer(&pattern(65536, 5)) }).unwrap();
    disk.close().unwrap();
    assert_eq!(check(&device.path, None).unwrap().errors, 0);
}

#[test]
fn what_a_device_cannot_be() {
    let Some(device) = Device::new(4 * MIB, 512) else { return };
    let make = |options: CreateOptions| {
        create(&device.path, &CreateOptions { overwrite: true, ..options }).map_err(|e| e.to_string())
    };
    let error = make(CreateOptions::new(Format::Raw, 5 * MIB)).unwrap_err();
    assert!(error.contains("the disk has 5242880 bytes, and the device 4194304"), "{error}");
    let error = make(CreateOptions::new(Format::Vmdk, MIB)).unwrap_err();
    assert!(error.contains("the format vmdk on a block device is not supported"), "{error}");
    let full = CreateOptions { preallocation: Preallocation::Full, ..CreateOptions::new(Format::Raw, MIB) };
    assert!(make(full).unwrap_err().contains("without preallocation"));
    // 16 TiB need more tables than there is room for.
    let error = make(CreateOptions::new(Format::Qcow2, 1 << 48)).unwrap_err();
    assert!(error.contains("it needs ") && error.contains("and the device has 4194304"), "{error}");
    // Without a size: all of it.
    make(CreateOptions { format: Format::Raw, ..CreateOptions::default() }).unwrap();
    let error = resize(&device.path, Some(Format::Raw), 2 * MIB, true, Preallocation::Off).unwrap_err();
    assert!(error.to_string().contains("change the device's size"), "{error}");
    // One writer.
    let first = Disk::open(&device.path, &raw()).unwrap();
    let second = Disk::open(&device.path, &raw()).unwrap_err();
    assert!(matches!(second, OpenError::UsedByHost { .. } | OpenError::Busy { .. }), "{second}");
    drop(first);
    drop(Disk::open(&device.path, &raw()).unwrap());
}

#[test]
fn luks_fills_a_device() {
    let Some(device) = Device::new(4 * MIB, 4096) else { return };
    let keys = Keys::every(Passphrase::new(b"secret".to_vec()));
    let new = CreateOptions {
        format: Format::Luks,
        overwrite: true,
        encryption: EncryptionOptions::throw_away(),
        keys: keys.clone(),
        ..CreateOptions::default()
    };
    create(&device.path, &new).unwrap();
    let disk =
        Disk::open(&device.path, &OpenOptions { keys, cache: Cache::Direct, ..OpenOptions::default() });
    let disk = disk.unwrap();
    let offset = device.contents().len() as u64 - disk.size();
    assert!((1..3 * MIB).contains(&offset) && disk.facts().format == Format::Luks, "{offset}");
    disk.run(Op::Write { offset: disk.size() - 700, memory: buffer(&[5; 700]) }).unwrap();
    disk.run(Op::Write { offset: 1000, memory: buffer(&[6; 100]) }).unwrap();
    disk.run(Op::Flush).unwrap();
    assert_eq!(read(&disk, disk.size() - 700, 700), [5; 700]);
    assert_eq!(read(&disk, 1000, 100), [6; 100]);
    let there = device.contents();
    assert!(!there.windows(100).any(|part| part == [5; 100] || part == [6; 100]));
}

#[test]
fn a_mounted_device_is_left_alone() {
    let Some(device) = Device::new(4 * MIB, 512) else { return };
    let mount = tempfile::tempdir().unwrap();
    let made = Command::new("mke2fs").args(["-q", "-F"]).arg(&device.path).output();
    let mounted = made.is_ok_and(|out| out.status.success())
        && Command::new("mount")
            .args([&device.path, mount.path()])
            .output()
            .is_ok_and(|out| out.status.success());
    if !mounted {
        eprintln!("nothing can be mounted here: not tested");
        return;
    }
    let opened = Disk::open(&device.path, &raw());
    let made = create(
        &device.path,
        &CreateOptions { format: Format::Raw, overwrite: true, ..CreateOptions::default() },
    );
    let read_only = Disk::open(&device.path, &OpenOptions { read_only: true, ..raw() });
    assert!(Command::new("umount").arg(mount.path()).status().unwrap().success());
    assert!(matches!(opened, Err(OpenError::UsedByHost { .. })), "{opened:?}");
    assert!(matches!(made, Err(OpenError::UsedByHost { .. })), "{made:?}");
    read_only.unwrap().close().unwrap();
}
