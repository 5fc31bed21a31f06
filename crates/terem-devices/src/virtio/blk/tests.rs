//! The block device behind a real transport, driven by a guest's driver.

use terem_bus::Device;

use super::super::testing::backends::MemoryDisk;
use super::super::testing::driver::Guest;
use super::super::testing::ring::Buffer;
use super::*;

const RINGS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];
const DISK: usize = 1 << 20;

fn guest(disk: &Arc<MemoryDisk>, queues: u16) -> Guest {
    Guest::new(Arc::new(Blk::new(Arc::clone(disk) as _, queues, "teremok-0001")))
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut h = kind.to_le_bytes().to_vec();
    h.extend([0; 4]);
    h.extend(sector.to_le_bytes());
    h
}

/// Makes a request available; returns its ID and the addresses of data and status.
fn submit(g: &mut Guest, queue: u16, kind: u32, sector: u64, out: &[u8], read: usize) -> (u16, u64, u64) {
    let head = g.put(&header(kind, sector));
    let data = if read > 0 { g.alloc(read) } else { g.put(out) };
    let status = g.put(&[0xee]);
    let mut buffers: Vec<Buffer> = vec![(head, 16, false)];
    let len = u32::try_from(out.len().max(read)).unwrap();
    if len > 1 {
        // Cut somewhere, for framing means nothing.
        let cut = len / 3 + 1;
        buffers.push((data, cut, read > 0));
        buffers.push((data + u64::from(cut), len - cut, read > 0));
    }
    buffers.push((status, 1, true));
    (g.submit(queue, &buffers), data, status)
}

/// A whole request: status, bytes written by the device, and data.
fn request(g: &mut Guest, queue: u16, kind: u32, sector: u64, out: &[u8], read: usize) -> (u8, u32, Vec<u8>) {
    let (id, data, status) = submit(g, queue, kind, sector, out, read);
    let (used, len) = g.wait_used(queue);
    assert_eq!(used, id);
    g.wait_vector(u32::from(queue) + 1);
    (g.get(status, 1)[0], len, g.get(data, read))
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i * 7 % 251).unwrap() ^ seed).collect()
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [sector.to_le_bytes().to_vec(), sectors.to_le_bytes().to_vec(), flags.to_le_bytes().to_vec()].concat()
}

#[test]
fn what_was_written_reads_back_over_every_ring() {
    for (packed, event_idx) in RINGS {
        let disk = Arc::new(MemoryDisk::new(DISK));
        let mut g = guest(&disk, 2);
        g.start(packed, event_idx, 16, 0);
        for round in 0..40_u8 {
            let (queue, sector) = (u16::from(round % 2), u64::from(round) * 8);
            let data = pattern(512 * (1 + usize::from(round % 5)), round);
            assert_eq!(request(&mut g, queue, T_OUT, sector, &data, 0).0, S_OK);
            let (status, len, read) = request(&mut g, 1 - queue, T_IN, sector, &[], data.len());
            assert_eq!((status, len as usize), (S_OK, data.len() + 1));
            assert_eq!(read, data);
        }
        assert_eq!(request(&mut g, 0, T_FLUSH, 0, &[], 0).0, S_OK);
        let zeroes = segment(8, 8, SEGMENT_UNMAP);
        assert_eq!(request(&mut g, 0, T_WRITE_ZEROES, 0, &zeroes, 0).0, S_OK);
        assert_eq!(request(&mut g, 0, T_IN, 8, &[], 512).2, [0; 512]);
        assert_eq!(request(&mut g, 0, T_DISCARD, 0, &segment(0, 8, 0), 0).0, S_OK);
        assert_eq!(request(&mut g, 1, T_GET_ID, 0, &[], 20).2, *b"teremok-0001\0\0\0\0\0\0\0\0");
    }
}

#[test]
fn many_requests_complete_out_of_order() {
    for (packed, event_idx) in RINGS {
        let disk = Arc::new(MemoryDisk::new(DISK));
        let mut g = guest(&disk, 1);
        g.start(packed, event_idx, 64, 0);
        disk.hold.store(true, Ordering::Release);
        let mut sent: Vec<_> =
            (0..60_u8).map(|i| submit(&mut g, 0, T_OUT, u64::from(i), &pattern(512, i), 0).0).collect();
        assert!(g.rings[0].take_used().is_none());
        assert!(g.vectors().is_empty());
        disk.release();
        while let Some(id) = sent.pop() {
            assert_eq!(g.rings[0].take_used(), Some((id, 1)), "the last one ended first");
        }
        disk.hold.store(false, Ordering::Release);
        g.rings[0].want_interrupt(Some(0));
        g.vectors();
        for i in 0..60_u8 {
            assert_eq!(request(&mut g, 0, T_IN, u64::from(i), &[], 512).2, pattern(512, i));
        }
    }
}

/// Name, request, data, expected status. The disk has 2048 sectors.
type Refused = (&'static str, u32, u64, Vec<u8>, usize, u8);

#[test]
fn bad_requests_are_answered_as_the_specification_says() {
    let cases: Vec<Refused> = vec![
        ("read at the end", T_IN, 2047, vec![], 512, S_OK),
        ("read past the end", T_IN, 2047, vec![], 1024, S_IOERR),
        ("sector far away", T_IN, u64::MAX, vec![], 512, S_IOERR),
        ("sector that overflows", T_OUT, u64::MAX / 512, vec![1; 512], 0, S_IOERR),
        ("no whole sector", T_IN, 0, vec![], 511, S_IOERR),
        ("read of nothing", T_IN, 0, vec![], 0, S_IOERR),
        ("write of nothing", T_OUT, 0, vec![], 0, S_IOERR),
        ("unknown type", 77, 0, vec![], 512, S_UNSUPP),
        ("SCSI command of the legacy interface", 2, 0, vec![], 0, S_UNSUPP),
        ("discard with unmap", T_DISCARD, 0, segment(0, 8, 1), 0, S_UNSUPP),
        ("reserved flags", T_WRITE_ZEROES, 0, segment(0, 8, 2), 0, S_UNSUPP),
        ("discard past the end", T_DISCARD, 0, segment(2047, 2, 0), 0, S_IOERR),
        ("discard that overflows", T_DISCARD, 0, segment(u64::MAX, u32::MAX, 0), 0, S_IOERR),
        ("write-zeroes of too much", T_WRITE_ZEROES, 0, segment(0, 4096, 0), 0, S_IOERR),
        ("two segments", T_DISCARD, 0, [segment(0, 8, 0), segment(8, 8, 0)].concat(), 0, S_IOERR),
        ("half a segment", T_DISCARD, 0, vec![0; 8], 0, S_IOERR),
    ];
    let disk = Arc::new(MemoryDisk::new(DISK));
    let mut g = guest(&disk, 1);
    g.start(true, true, 32, 0);
    for (name, kind, sector, out, read, expected) in cases {
        let (status, len, _) = request(&mut g, 0, kind, sector, &out, read);
        assert_eq!(status, expected, "{name}");
        let data = if expected == S_OK { read } else { 0 };
        assert_eq!(len as usize, data + 1, "{name}");
        assert!(!g.needs_reset(), "{name}");
    }
    disk.fail.store(true, Ordering::Release);
    assert_eq!(request(&mut g, 0, T_OUT, 0, &[0; 512], 0).0, S_IOERR);
    assert_eq!(request(&mut g, 0, T_FLUSH, 0, &[], 0).0, S_IOERR);
}

#[test]
fn requests_that_cannot_be_answered_stop_the_device() {
    type Case = (&'static str, fn(u64) -> Vec<Buffer>);
    let cases: [Case; 5] = [
        ("no status byte", |at| vec![(at, 16, false)]),
        ("no header", |at| vec![(at, 1, true)]),
        ("half a header", |at| vec![(at, 15, false), (at + 64, 1, true)]),
        ("outside RAM", |_| vec![(u64::MAX - 100, 16, false), (0x1000, 1, true)]),
        ("status before header", |at| vec![(at, 1, true), (at + 64, 16, false)]),
    ];
    for (packed, event_idx) in RINGS {
        for (name, buffers) in cases {
            let disk = Arc::new(MemoryDisk::new(DISK));
            let mut g = guest(&disk, 1);
            g.start(packed, event_idx, 8, 0);
            let at = g.alloc(128);
            g.add(0, &buffers(at));
            g.kick(0);
            assert!(g.needs_reset(), "{name}");
            assert_eq!(g.vectors(), [0], "{name}: one configuration interrupt");
            assert!(g.rings[0].take_used().is_none(), "{name}");
            // Nothing more is done until the reset, and everything after it.
            g.add(0, &[(at, 16, false), (at + 64, 1, true)]);
            g.kick(0);
            assert!(g.rings[0].take_used().is_none() && locked(&disk.log).is_empty(), "{name}");
            g.start(packed, event_idx, 8, 0);
            assert_eq!(request(&mut g, 0, T_FLUSH, 0, &[], 0).0, S_OK, "{name}");
        }
    }
}

#[test]
fn the_configuration_and_features_follow_the_disk() {
    let mut disk = MemoryDisk::new(DISK);
    let g = guest(&Arc::new(MemoryDisk::new(DISK)), 4);
    let at = |offset: u64, size| g.read(g.device.0 + offset, size);
    assert_eq!(g.device.1, 60);
    assert_eq!((at(0, 8), at(0, 4), at(12, 4)), (2048, 2048, 254));
    assert_eq!((at(20, 4), at(24, 1), at(26, 2), at(28, 4)), (512, 3, 8, 128));
    assert_eq!((at(34, 2), at(36, 4), at(40, 4), at(44, 4)), (4, 2048, 1, 8));
    assert_eq!((at(48, 4), at(52, 4), at(56, 1)), (2048, 1, 1));
    assert_eq!(at(60, 1), 0xff, "behind the structure is nothing");
    let all =
        F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE | F_MQ | F_DISCARD | F_WRITE_ZEROES;
    assert_eq!(g.offered() & 0xff_ffff, all);
    disk.geometry.read_only = true;
    let disk = Arc::new(disk);
    let mut g = guest(&disk, 1);
    assert_eq!(g.offered() & (F_RO | F_DISCARD | F_WRITE_ZEROES | F_MQ), F_RO);
    g.start(false, true, 8, 0);
    assert_eq!(request(&mut g, 0, T_OUT, 0, &[0; 512], 0).0, S_IOERR);
    assert_eq!(request(&mut g, 0, T_DISCARD, 0, &segment(0, 1, 0), 0).0, S_UNSUPP);
    assert!(locked(&disk.log).is_empty(), "nothing reached the read-only disk");
}

#[test]
fn writes_are_durable_when_the_driver_does_not_flush() {
    let disk = Arc::new(MemoryDisk::new(DISK));
    let mut g = guest(&disk, 1);
    let log = |disk: &MemoryDisk| std::mem::take(&mut *locked(&disk.log));
    let write = ["write 0x0+0x200", "flush 0x0+0x0"];
    g.start(false, true, 8, 0);
    request(&mut g, 0, T_OUT, 0, &[0; 512], 0);
    assert_eq!(log(&disk), write[..1], "the driver flushes when it needs to");
    g.write(g.device.0 + 32, 1, 0);
    request(&mut g, 0, T_OUT, 0, &[0; 512], 0);
    assert_eq!(log(&disk), write, "the driver has switched the cache off");
    assert_eq!(g.read(g.device.0 + 32, 1), 0);
    g.start(false, true, 8, F_FLUSH | F_CONFIG_WCE);
    request(&mut g, 0, T_OUT, 0, &[0; 512], 0);
    assert_eq!(log(&disk), write, "the driver knows no flush");
    assert_eq!(request(&mut g, 0, T_FLUSH, 0, &[], 0).0, S_UNSUPP);
}

#[test]
fn nothing_of_an_old_life_is_published_after_a_reset() {
    for (packed, event_idx) in RINGS {
        for one_queue in [false, true] {
            let disk = Arc::new(MemoryDisk::new(DISK));
            let mut g = guest(&disk, 2);
            g.start(packed, event_idx, 16, 0);
            disk.hold.store(true, Ordering::Release);
            for i in 0..5 {
                submit(&mut g, 1, T_IN, i, &[], 512);
            }
            let c = g.common.0;
            if one_queue {
                g.write(c + 0x16, 2, 1);
                g.write(c + 0x3a, 2, 1);
                assert_eq!((g.read(c + 0x3a, 2), g.read(c + 0x1c, 2)), (0, 0), "the reset is over");
                assert_eq!((g.read(c + 0x18, 2), g.read(c + 0x20, 8)), (256, 0), "defaults again");
            } else {
                g.set_status(0);
                assert_eq!(g.status(), 0);
            }
            assert!(g.rings[1].take_used().is_none(), "packed {packed}, one queue {one_queue}");
            assert!(g.vectors().is_empty());
            disk.hold.store(false, Ordering::Release);
            if one_queue {
                g.enable_queue(1, 16);
            } else {
                g.start(packed, event_idx, 16, 0);
            }
            for queue in [1, 0] {
                assert_eq!(request(&mut g, queue, T_FLUSH, 0, &[], 0).0, S_OK);
            }
        }
    }
}

#[test]
fn a_saved_disk_goes_on_in_another_process() {
    for (packed, event_idx) in RINGS {
        let disk = Arc::new(MemoryDisk::new(DISK));
        let mut g = guest(&disk, 1);
        g.start(packed, event_idx, 8, 0);
        for i in 0..11 {
            request(&mut g, 0, T_OUT, i, &pattern(512, 9), 0);
        }
        g.write(g.device.0 + 32, 1, 0);
        disk.hold.store(true, Ordering::Release);
        let (id, _, _) = submit(&mut g, 0, T_OUT, 11, &pattern(512, 8), 0);
        // Paused, with one request in flight and another one that was never taken.
        g.transport.pause();
        let late = submit(&mut g, 0, T_IN, 11, &[], 512);
        let saved = serde_json::to_string(&g.transport.save().unwrap()).unwrap();
        disk.hold.store(false, Ordering::Release);
        let mut fresh = Guest::with_memory(
            Arc::new(Blk::new(Arc::clone(&disk) as _, 1, "teremok-0001")),
            g.memory.clone(),
        );
        fresh.transport.pause();
        fresh.transport.restore(&serde_json::from_str(&saved).unwrap()).unwrap();
        std::mem::swap(&mut fresh.rings, &mut g.rings);
        fresh.features = g.features;
        assert_eq!(fresh.wait_used(0).0, id, "what was in flight ended before the save");
        assert!(fresh.rings[0].take_used().is_none());
        fresh.transport.resume();
        assert_eq!(fresh.wait_used(0), (late.0, 513));
        assert_eq!(fresh.get(late.1, 512), pattern(512, 8));
        assert_eq!(fresh.read(fresh.device.0 + 32, 1), 0, "the cache is still off");
        fresh.vectors();
        assert_eq!(request(&mut fresh, 0, T_FLUSH, 0, &[], 0).0, S_OK);
    }
}

#[test]
fn queues_work_at_the_same_time() {
    // Each queue is a vCPU of its own; completions come from the submitting threads.
    let disk = Arc::new(MemoryDisk::new(DISK));
    let mut g = guest(&disk, 4);
    g.start(true, true, 32, 0);
    let rings = std::mem::take(&mut g.rings);
    let g = &g;
    std::thread::scope(|scope| {
        for (queue, mut ring) in (0_u64..).zip(rings) {
            scope.spawn(move || {
                let base = 0xa0_0000 + queue * 0x1_0000;
                for round in 0..300_u64 {
                    let sector = queue * 512 + round % 512;
                    for kind in [T_OUT, T_IN] {
                        let mem = &ring.memory;
                        use terem_memory::vm_memory::{Bytes, GuestAddress};
                        mem.write_slice(&header(kind, sector), GuestAddress(base)).unwrap();
                        let fill = if kind == T_OUT { round ^ queue << 32 } else { 0 };
                        mem.write_obj(fill, GuestAddress(base + 0x100)).unwrap();
                        let buffers =
                            [(base, 16, false), (base + 0x100, 512, kind == T_IN), (base + 0x400, 1, true)];
                        let id = ring.add(&buffers, false);
                        if ring.must_notify() {
                            g.kick(u16::try_from(queue).unwrap());
                        }
                        assert_eq!(ring.take_used().unwrap().0, id);
                        ring.want_interrupt(Some(0));
                        let mem = &ring.memory;
                        let read: u64 = mem.read_obj(GuestAddress(base + 0x100)).unwrap();
                        assert_eq!(read, round ^ queue << 32);
                    }
                }
            });
        }
    });
    assert_eq!(g.vectors().len(), 4 * 600);
}

#[test]
fn two_vcpus_may_notify_the_same_queue() {
    for (packed, event_idx) in RINGS {
        let disk = Arc::new(MemoryDisk::new(DISK));
        let mut g = guest(&disk, 1);
        g.start(packed, event_idx, 16, 0);
        let mut ring = g.rings.remove(0);
        let (head, status) = (g.put(&header(T_FLUSH, 0)), g.alloc(1));
        let done = AtomicBool::new(false);
        let g = &g;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    g.kick(0);
                }
            });
            let mut served = 0;
            for _ in 0..2000 {
                while ring.room() < 2 {
                    served += usize::from(ring.take_used().is_some());
                }
                ring.add(&[(head, 16, false), (status, 1, true)], false);
                if ring.must_notify() {
                    g.kick(0);
                }
            }
            // Without the other one's notifications nothing may be left lying.
            done.store(true, Ordering::Release);
            super::super::testing::driver::wait_for("the rest", || {
                served += usize::from(ring.take_used().is_some());
                (served == 2000).then_some(())
            });
        });
        assert!(!g.needs_reset());
    }
}
