//! QEMU's tools as the peer, and a model of a disk as the oracle.
#![allow(dead_code, reason = "each test file uses its part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use terem_block::{AioEngine, AlignedBuffer, Disk, IoError, Op, OpenOptions};
use terem_memory::IoMemory;

/// Runs a tool of QEMU's that must be there.
///
/// A process that another test has just made holds copies of our open files, with their locks, until it runs its
/// program: then it is tried again.
pub fn try_run(tool: &str, args: &[&str]) -> Output {
    for _ in 0..100 {
        let out = Command::new(tool)
            .args(args)
            .output()
            .unwrap_or_else(|e| panic!("{tool} is needed for this test (Debian: qemu-utils): {e}"));
        if !String::from_utf8_lossy(&out.stderr).contains("Failed to get shared") {
            return out;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("{tool} {args:?}: the image stays locked");
}

/// Runs a tool that must succeed; its standard output.
pub fn run(tool: &str, args: &[&str]) -> String {
    let out = try_run(tool, args);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{tool} {args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

pub fn str(path: &Path) -> &str {
    path.to_str().expect("paths in tests are UTF-8")
}

/// `qemu-img check` must find neither errors nor leaks, and our own check the same.
pub fn assert_clean(image: &Path) {
    let text = run("qemu-img", &["check", "-f", "qcow2", str(image)]);
    assert!(text.contains("No errors were found"), "{text}");
    let report = terem_block::check(image, None).expect("checked");
    assert!(report.is_clean(), "{report:?}");
}

/// SplitMix64: numbers that look random and are the same in each run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// Bytes that are not zero, in part compressible.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        if self.below(3) == 0 {
            return vec![(self.below(255) + 1) as u8; len];
        }
        let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(len);
        bytes.iter_mut().for_each(|b| *b |= 1);
        bytes
    }
}

/// A directory for images, removed at the end.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a scratch directory"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).expect("written");
        path
    }
}

pub fn options(aio: AioEngine) -> OpenOptions {
    OpenOptions { aio, ..OpenOptions::default() }
}

pub fn read(disk: &Disk, offset: u64, len: usize) -> Result<Vec<u8>, IoError> {
    let memory = Arc::new(AlignedBuffer::from_slice(&vec![0xee; len]));
    disk.run(Op::Read { offset, memory: Arc::clone(&memory) as Arc<dyn IoMemory> })?;
    Ok(memory.to_vec())
}

pub fn write(disk: &Disk, offset: u64, bytes: &[u8]) -> Result<(), IoError> {
    disk.run(Op::Write { offset, memory: Arc::new(AlignedBuffer::from_slice(bytes)) })
}

/// What the disk must contain.
pub struct Model(pub Vec<u8>);

impl Model {
    fn slice(&mut self, offset: u64, length: u64) -> &mut [u8] {
        let at = offset as usize;
        &mut self.0[at..at + length as usize]
    }

    /// One random request to both.
    pub fn step(&mut self, disk: &Disk, random: &mut Random, unit: u64) {
        let size = self.0.len() as u64;
        let most = if random.below(4) == 0 { size / 4 } else { 3 * unit.min(64 << 10) };
        let mut length = 1 + random.below(most.min(size));
        let mut offset = random.below(size - length + 1);
        if random.below(2) == 0 {
            offset -= offset % 512;
            length = length.next_multiple_of(512).min(size - offset);
        }
        match random.below(10) {
            0..4 => {
                let bytes = random.bytes(length as usize);
                write(disk, offset, &bytes).expect("written");
                self.slice(offset, length).copy_from_slice(&bytes);
            }
            4..7 => {
                let got = read(disk, offset, length as usize).expect("read");
                assert!(got == self.slice(offset, length), "read {offset:#x}+{length:#x}");
            }
            7 => {
                let unmap = random.below(2) == 0;
                disk.run(Op::WriteZeroes { offset, length, unmap }).expect("zeroed");
                self.slice(offset, length).fill(0);
            }
            8 => {
                disk.run(Op::Discard { offset, length }).expect("discarded");
                let got = read(disk, offset, length as usize).expect("read");
                let was = self.slice(offset, length);
                if got != was {
                    let same = was.iter().zip(&got).all(|(was, is)| *is == 0 || is == was);
                    assert!(same, "a discard shows other data");
                    was.copy_from_slice(&got);
                }
            }
            _ => disk.run(Op::Flush).expect("flushed"),
        }
    }

    pub fn assert_equals(&mut self, disk: &Disk) {
        let got = read(disk, 0, self.0.len()).expect("read");
        if got != self.0 {
            let at = (0..got.len()).find(|&i| got[i] != self.0[i]).expect("they differ");
            panic!("byte {at:#x} is {:#x}, not {:#x}", got[at], self.0[at]);
        }
    }

    /// QEMU must read the same.
    pub fn assert_qemu_reads(&self, scratch: &Scratch, image: &Path) {
        let raw = scratch.write("model.raw", &self.0);
        run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", str(&raw), str(image)]);
    }
}
