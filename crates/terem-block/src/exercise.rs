//! Runs an image from anywhere through the block layer: the entry of fuzz targets.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use terem_memory::AlignedBuffer;

use crate::{AioEngine, BackingPolicy, BlockBackend, Cache, Disk, Format, Op, OpenOptions};

/// Opens `bytes` as a qcow2 image in memory, and if it can be opened, reads, writes, zeroes, discards and
/// flushes at places that depend on `seed`, closes it, and checks it. Never panics and always ends,
/// whatever the bytes are.
///
/// Returns whether it could be opened for writing.
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
    let Ok(disk) = Disk::open(&path, &options) else {
        return Disk::open(&path, &OpenOptions { read_only: true, ..options }).is_ok_and(|disk| {
            touch(&disk, seed);
            false
        });
    };
    touch(&disk, seed);
    let _ = disk.close();
    let _ = crate::check(&path, Some(Format::Qcow2));
    true
}

/// A few requests of each kind.
fn touch(disk: &Disk, mut seed: u64) {
    let size = disk.size();
    let mut next = |below: u64| {
        // Steele and Vigna's SplitMix64: spreads any seed.
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (seed ^ seed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % below.max(1)
    };
    for round in 0..24u8 {
        let length = (1 + next(192 << 10)).min(size);
        let offset = next(size - length + 1);
        let memory = || Arc::new(AlignedBuffer::from_slice(&vec![round; crate::file::to_usize(length)]));
        // Their results depend on the image; that they end at all is what counts.
        let _ = disk.run(match next(8) {
            0..3 => Op::Read { offset, memory: memory() },
            3..5 => Op::Write { offset, memory: memory() },
            5 => Op::WriteZeroes { offset, length, unmap: next(2) == 0 },
            6 => Op::Discard { offset, length },
            _ => Op::Flush,
        });
    }
}
