//! Many requests at once, from several threads.
#![allow(clippy::cast_possible_truncation, reason = "sizes in tests are small")]
#![allow(clippy::panic, reason = "a panic is how a test fails")]

mod peer;

use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};

use peer::{Model, Random, Scratch, assert_clean, options, run, str};
use terem_block::{AioEngine, AlignedBuffer, BlockBackend, Disk, IoError, Op, Request};
use terem_memory::IoMemory;

const SECTOR: u64 = 4096;
const THREADS: u64 = 4;
const SIZE: u64 = 4 << 20;

/// Each thread owns every fourth sector, so that all share all clusters; many requests of each in flight.
fn stripes(disk: &Arc<Disk>, seed: u64) -> Vec<u8> {
    let workers: Vec<_> = (0..THREADS)
        .map(|thread| {
            let disk = Arc::clone(disk);
            std::thread::spawn(move || stripe(&disk, thread, seed))
        })
        .collect();
    let mut all = vec![0; SIZE as usize];
    for (thread, worker) in workers.into_iter().enumerate() {
        let sectors = worker.join().expect("no worker failed");
        for (i, byte) in sectors.into_iter().enumerate() {
            let at = (i as u64 * THREADS + thread as u64) * SECTOR;
            all[at as usize..(at + SECTOR) as usize].fill(byte);
        }
    }
    all
}

/// Random requests on the sectors of one thread; what is in them at the end.
fn stripe(disk: &Disk, thread: u64, seed: u64) -> Vec<u8> {
    let count = SIZE / SECTOR / THREADS;
    let mut random = Random(seed * 100 + thread);
    let mut model = vec![0u8; count as usize];
    for _ in 0..25 {
        let (tell, told) = channel::<(Option<(Arc<AlignedBuffer>, u8)>, Result<(), IoError>)>();
        let mut busy = Vec::new();
        for _ in 0..16 {
            let index = random.below(count);
            if busy.contains(&index) {
                continue;
            }
            busy.push(index);
            let offset = (index * THREADS + thread) * SECTOR;
            let value = (random.below(255) + 1) as u8;
            let buffer = |byte| Arc::new(AlignedBuffer::from_slice(&[byte; SECTOR as usize]));
            let old = &mut model[index as usize];
            let (op, expect) = match random.below(8) {
                0..4 => {
                    *old = value;
                    (Op::Write { offset, memory: buffer(value) }, None)
                }
                4 => {
                    *old = 0;
                    (Op::WriteZeroes { offset, length: SECTOR, unmap: value.is_multiple_of(2) }, None)
                }
                5 if value < 64 => (Op::Flush, None),
                _ => {
                    let memory = buffer(0xaa);
                    (
                        Op::Read { offset, memory: Arc::clone(&memory) as Arc<dyn IoMemory> },
                        Some((memory, *old)),
                    )
                }
            };
            let tell = tell.clone();
            disk.submit(Request::new(op, move |result| tell.send((expect, result)).expect("awaited")));
        }
        drop(tell);
        for (expect, result) in told {
            result.expect("the request succeeded");
            if let Some((memory, byte)) = expect {
                assert!(memory.to_vec().iter().all(|&b| b == byte), "thread {thread} reads its own data");
            }
        }
    }
    model
}

#[test]
fn threads_share_clusters() {
    let scratch = Scratch::new();
    for (i, shape) in
        ["cluster_size=64k", "cluster_size=512", "compat=0.10,cluster_size=2M"].iter().enumerate()
    {
        for aio in [AioEngine::Auto, AioEngine::Threads] {
            let image = scratch.path("threads.qcow2");
            run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", shape, str(&image), "4M"]);
            let disk = Arc::new(Disk::open(&image, &options(aio)).expect("opened"));
            let mut model = Model(stripes(&disk, i as u64));
            model.assert_equals(&disk);
            drop(disk);
            assert_clean(&image);
            model.assert_qemu_reads(&scratch, &image);
        }
    }
}

#[test]
fn overlapping_writes_leave_one_of_them() {
    let scratch = Scratch::new();
    let image = scratch.path("overlap.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", str(&image), "4M"]);
    let disk = Arc::new(Disk::open(&image, &options(AioEngine::Auto)).expect("opened"));
    for round in 0..8u64 {
        let start = Arc::new(Barrier::new(4));
        let offset = round * 300_000;
        let writers: Vec<_> = (1..=4u8)
            .map(|value| {
                let (disk, start) = (Arc::clone(&disk), Arc::clone(&start));
                std::thread::spawn(move || {
                    start.wait();
                    peer::write(&disk, offset, &vec![value; 200_000]).expect("written");
                })
            })
            .collect();
        let discarding = (round % 2 == 1).then(|| disk.run(Op::Discard { offset, length: 200_000 }));
        writers.into_iter().for_each(|w| w.join().expect("no writer failed"));
        let got = peer::read(&disk, offset, 200_000).expect("read");
        for block in got.chunks(512) {
            let values = if discarding.is_some() { 0..=4 } else { 1..=4 };
            assert!(block.iter().all(|b| values.contains(b)), "nothing else in there");
        }
    }
    drop(disk);
    assert_clean(&image);
}

#[test]
fn drain_and_drop_wait_for_requests() {
    let scratch = Scratch::new();
    let image = scratch.path("drain.qcow2");
    terem_block::create(&image, &terem_block::CreateOptions::new(terem_block::Format::Qcow2, 8 << 20))
        .expect("made");
    let disk = Disk::open(&image, &options(AioEngine::Threads)).expect("opened");
    let ended = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let submit = |i: u64| {
        let ended = Arc::clone(&ended);
        let memory = Arc::new(AlignedBuffer::from_slice(&[7; 65536]));
        disk.submit(Request::new(Op::Write { offset: i << 16, memory }, move |result| {
            result.expect("written");
            ended.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }));
    };
    (0..50).for_each(submit);
    disk.drain();
    assert_eq!(ended.load(std::sync::atomic::Ordering::SeqCst), 50);
    (50..100).for_each(submit);
    drop(disk);
    assert_eq!(ended.load(std::sync::atomic::Ordering::SeqCst), 100);
    assert_clean(&image);
}

#[test]
fn requests_outside_of_the_disk_are_refused() {
    let scratch = Scratch::new();
    let image = scratch.path("range.qcow2");
    terem_block::create(&image, &terem_block::CreateOptions::new(terem_block::Format::Qcow2, 1 << 20))
        .expect("made");
    let disk = Disk::open(&image, &options(AioEngine::Auto)).expect("opened");
    for (offset, length) in [(1 << 20, 1), (u64::MAX, 2), ((1 << 20) - 1, 2), (u64::MAX - 511, 512)] {
        let memory = || Arc::new(AlignedBuffer::new(length as usize));
        for op in [
            Op::Read { offset, memory: memory() },
            Op::Write { offset, memory: memory() },
            Op::Discard { offset, length },
            Op::WriteZeroes { offset, length, unmap: true },
        ] {
            assert!(matches!(disk.run(op), Err(IoError::OutOfRange { .. })), "{offset:#x}+{length}");
        }
    }
    peer::write(&disk, 1 << 20, &[]).expect("nothing is to be done");
    let read_only = {
        drop(disk);
        Disk::open(&image, &terem_block::OpenOptions::read_only()).expect("opened")
    };
    assert_eq!(peer::write(&read_only, 0, &[1]), Err(IoError::ReadOnly));
    assert_eq!(read_only.run(Op::Discard { offset: 0, length: 512 }), Err(IoError::ReadOnly));
    read_only.run(Op::Flush).expect("nothing to flush");
}
