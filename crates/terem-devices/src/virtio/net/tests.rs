//! A NIC behind a real transport, on a network in memory.

use std::sync::atomic::Ordering;

use terem_bus::Device;
use terem_net::{Gso, VNET_HEADER_LEN, VnetHeader};

use super::super::testing::backends::Loopback;
use super::super::testing::driver::{Guest, wait_for};
use super::super::testing::ring::Buffer;
use super::*;

const OWN: Mac = [0x52, 0x54, 0, 1, 2, 3];
const RINGS: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

fn guest() -> (Guest, Arc<Loopback>) {
    let network = Arc::new(Loopback::new(Offloads::all()).unwrap());
    (Guest::new(nic(&network)), network)
}

fn nic(network: &Arc<Loopback>) -> Arc<Net> {
    Arc::new(Net::new(Arc::clone(network) as _, OWN).unwrap())
}

fn frame(to: Mac, len: usize) -> Vec<u8> {
    let mut f = to.to_vec();
    f.extend([2; 6]);
    f.extend([0x08, 0x00]);
    f.extend((f.len()..len).map(|i| u8::try_from(i * 13 % 256).unwrap()));
    f
}

fn send(g: &mut Guest, header: &VnetHeader, frame: &[u8]) {
    let bytes = [header.to_bytes(0).to_vec(), frame.to_vec()].concat();
    let at = g.put(&bytes);
    let cut = 5;
    let rest = u32::try_from(bytes.len()).unwrap() - cut;
    let id = g.submit(TX, &[(at, cut, false), (at + u64::from(cut), rest, false)]);
    assert_eq!(g.wait_used(TX), (id, 0));
    g.wait_vector(2);
}

/// Offers receive buffers of these sizes; returns their addresses.
fn offer(g: &mut Guest, sizes: &[usize]) -> Vec<(u16, u64)> {
    sizes
        .iter()
        .map(|&size| {
            let at = g.alloc(size);
            (g.submit(RX, &[(at, u32::try_from(size).unwrap(), true)]), at)
        })
        .collect()
}

#[test]
fn frames_go_out_and_come_in_over_every_ring() {
    for (packed, event_idx) in RINGS {
        let (mut g, network) = guest();
        g.start(packed, event_idx, 16, 0);
        let offload = VnetHeader {
            needs_checksum: Some((34, 16)),
            gso: Some((Gso::Tcp4, 1448)),
            header_len: 54,
            ..VnetHeader::default()
        };
        for (header, len) in [(VnetHeader::default(), 14), (VnetHeader::default(), 1514), (offload, 65_000)] {
            send(&mut g, &header, &frame(OWN, len));
            assert_eq!(locked(&network.sent).pop(), Some((header, frame(OWN, len))));
        }
        for round in 0..50 {
            let buffer = offer(&mut g, &[2048])[0];
            let sent = frame(OWN, 60 + round * 7);
            let header = VnetHeader { checksum_valid: true, ..VnetHeader::default() };
            network.arrive(header, &sent);
            assert_eq!(g.wait_used(RX), (buffer.0, u32::try_from(sent.len() + VNET_HEADER_LEN).unwrap()));
            g.wait_vector(1);
            let expected = [header.to_bytes(1).to_vec(), sent].concat();
            assert_eq!(g.get(buffer.1, expected.len()), expected, "round {round}");
        }
        assert!(!g.needs_reset());
    }
}

#[test]
fn large_frames_fill_several_buffers_when_that_was_agreed() {
    for (packed, event_idx) in RINGS {
        let (mut g, network) = guest();
        g.start(packed, event_idx, 16, 0);
        let sent = frame(OWN, 3500);
        network.arrive(VnetHeader::default(), &sent);
        // Too few at first: nothing may be taken, and the rest must be noticed when it comes.
        let mut buffers = offer(&mut g, &[1500, 1000]);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(g.rings[0].take_used().is_none());
        buffers.extend(offer(&mut g, &[2000, 4000]));
        let mut got = Vec::new();
        for (i, len) in [1500, 1000, 1012].into_iter().enumerate() {
            assert_eq!(g.wait_used(RX), (buffers[i].0, len));
            got.extend(g.get(buffers[i].1, len as usize));
        }
        assert_eq!(got, [VnetHeader::default().to_bytes(3).to_vec(), sent].concat());
        // Without: a frame that does not fit is lost, and the buffer is there for the next.
        g.start(packed, event_idx, 16, F_MRG_RXBUF);
        let buffer = offer(&mut g, &[1526])[0];
        network.arrive(VnetHeader::default(), &frame(OWN, 1515));
        network.arrive(VnetHeader::default(), &frame(OWN, 1514));
        assert_eq!(g.wait_used(RX), (buffer.0, 1526));
    }
}

#[test]
fn a_busy_network_is_tried_again() {
    let (mut g, network) = guest();
    g.start(true, true, 8, 0);
    for _ in 0..10 {
        network.busy.store(true, Ordering::Release);
        send(&mut g, &VnetHeader::default(), &frame(OWN, 100));
    }
    assert_eq!(locked(&network.sent).len(), 10);
}

#[test]
fn the_control_queue_answers() {
    let (mut g, network) = guest();
    g.start(false, true, 8, 0);
    let command = |g: &mut Guest, bytes: &[u8]| {
        let (at, answer) = (g.put(bytes), g.put(&[0xee]));
        let len = u32::try_from(bytes.len()).unwrap();
        let id = g.submit(CONTROL, &[(at, 2, false), (at + 2, len - 2, false), (answer, 1, true)]);
        assert_eq!(g.wait_used(CONTROL), (id, 1));
        g.wait_vector(3);
        g.get(answer, 1)[0]
    };
    assert_eq!(command(&mut g, &[0, 0, 0]), CONTROL_OK, "promiscuous off");
    let buffer = offer(&mut g, &[2048])[0];
    network.arrive(VnetHeader::default(), &frame([2, 2, 2, 2, 2, 2], 99));
    network.arrive(VnetHeader::default(), &frame(OWN, 77));
    assert_eq!(g.wait_used(RX), (buffer.0, 77 + 12), "the other frame was not for us");
    assert_eq!(command(&mut g, &[1, 1, 2, 4, 6, 8, 10, 12]), CONTROL_OK, "MAC address set");
    assert_eq!((0..6).map(|i| g.read(g.device.0 + i, 1)).collect::<Vec<_>>(), [2, 4, 6, 8, 10, 12]);
    for bad in [&[4, 0, 2, 0][..], &[9, 9, 9], &[0, 99, 1], &[2, 0, 1], &[1, 0, 1, 0, 0, 0, 1]] {
        assert_eq!(command(&mut g, bad), CONTROL_ERR, "{bad:?}");
    }
    assert_eq!(command(&mut g, &[1; 20_000]), CONTROL_ERR, "longer than any command");
    assert!(!g.needs_reset());
}

#[test]
fn the_link_and_announcements_show_in_the_status() {
    let network = Arc::new(Loopback::new(Offloads::CHECKSUM).unwrap());
    let nic = nic(&network);
    let mut g = Guest::new(Arc::clone(&nic) as _);
    let offered = g.offered();
    assert_eq!(offered & (F_CSUM | F_GUEST_CSUM), F_CSUM | F_GUEST_CSUM);
    assert_eq!(offered & (F_HOST_TSO4 | F_GUEST_TSO4 | F_HOST_ECN), 0, "as the backend can");
    g.start(true, true, 8, 0);
    assert_eq!(*locked(&network.agreed), Offloads::CHECKSUM);
    let status = |g: &Guest| g.read(g.device.0 + 6, 2);
    assert_eq!((status(&g), g.read(g.device.0 + 10, 2)), (1, 9000));
    nic.announce();
    g.wait_vector(0);
    assert_eq!(status(&g), 3);
    let (at, answer) = (g.put(&[3, 0]), g.put(&[9]));
    g.submit(CONTROL, &[(at, 2, false), (answer, 1, true)]);
    g.wait_used(CONTROL);
    assert_eq!((status(&g), g.get(answer, 1)[0]), (1, CONTROL_OK));
    network.down.store(true, Ordering::Release);
    network.signal();
    g.kick(TX);
    g.wait_vector(0);
    assert_eq!(status(&g), 0);
    g.set_status(0);
    assert_eq!(*locked(&network.agreed), Offloads::empty());
}

#[test]
fn features_that_need_others_are_refused_without_them() {
    let (g, _) = guest();
    let version_1 = super::super::feature::VERSION_1;
    let refused = |features: u64| {
        g.set_status(0);
        g.set_status(3);
        g.choose(features | version_1);
        g.set_status(11);
        g.status() & 8 == 0
    };
    for bad in [F_HOST_TSO4, F_GUEST_TSO6, F_HOST_ECN | F_CSUM, F_CTRL_RX, F_CTRL_RX_EXTRA | F_CTRL_VQ] {
        assert!(refused(bad), "{bad:#x}");
    }
    assert!(!refused(F_HOST_TSO4 | F_CSUM | F_CTRL_VQ | F_CTRL_RX) && !refused(0));
}

/// Name, queue, buffers (at an address with 128 KiB behind it), and whether the device must stop; if it
/// need not, the chain comes back.
type Hostile = (&'static str, u16, fn(u64) -> Vec<Buffer>, bool);

const HOSTILE: &[Hostile] = &[
    ("a frame shorter than its header", TX, |a| vec![(a, 11, false)], false),
    ("a header without a frame", TX, |a| vec![(a, 12, false)], false),
    ("a frame of 13 bytes", TX, |a| vec![(a, 25, false)], false),
    ("a frame of 100 KiB", TX, |a| vec![(a, 100 << 10, false)], false),
    ("nothing to read", TX, |a| vec![(a, 100, true)], false),
    ("a frame outside RAM", TX, |_| vec![(1 << 40, 100, false)], true),
    ("a receive buffer outside RAM", RX, |_| vec![(1 << 40, 100, true)], true),
    ("a command without an answer", CONTROL, |a| vec![(a, 8, false)], true),
    ("a command of one byte", CONTROL, |a| vec![(a, 1, false), (a + 8, 1, true)], true),
    ("an empty command", CONTROL, |a| vec![(a, 8, true)], true),
];

#[test]
fn hostile_chains() {
    for (packed, event_idx) in [(false, false), (true, true)] {
        for &(name, queue, buffers, stops) in HOSTILE {
            let (mut g, network) = guest();
            g.start(packed, event_idx, 8, 0);
            let at = g.alloc(128 << 10);
            network.arrive(VnetHeader::default(), &frame(OWN, 100));
            let id = g.submit(queue, &buffers(at));
            if stops {
                wait_for(name, || g.needs_reset().then_some(()));
                g.wait_vector(0);
            } else {
                assert_eq!(g.wait_used(queue), (id, 0), "{name}");
                assert!(!g.needs_reset(), "{name}");
            }
            assert!(locked(&network.sent).is_empty(), "{name}");
            g.start(packed, event_idx, 8, 0);
            send(&mut g, &VnetHeader::default(), &frame(OWN, 60));
        }
    }
}

#[test]
fn header_nonsense_costs_the_frame_only() {
    let (mut g, network) = guest();
    g.start(false, true, 8, 0);
    for (flags, gso_type) in [(0, 1), (1, 0x55), (1, 3)] {
        let mut bytes = vec![flags, gso_type, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend(frame(OWN, 64));
        let at = g.put(&bytes);
        g.submit(TX, &[(at, 76, false)]);
        g.wait_used(TX);
    }
    // Receive buffers too small for even a header, all of them: the frame is lost, the device lives.
    offer(&mut g, &[1; 8]);
    network.arrive(VnetHeader::default(), &frame(OWN, 64));
    send(&mut g, &VnetHeader::default(), &frame(OWN, 64));
    assert_eq!(locked(&network.sent).len(), 1);
    assert!(!g.needs_reset());
}

#[test]
fn a_saved_nic_goes_on() {
    let (mut g, network) = guest();
    g.start(true, true, 8, 0);
    let (at, answer) = (g.put(&[0, 0, 0]), g.put(&[9]));
    g.submit(CONTROL, &[(at, 3, false), (answer, 1, true)]);
    g.wait_used(CONTROL);
    let buffers = offer(&mut g, &[100, 2048]);
    network.arrive(VnetHeader::default(), &frame(OWN, 60));
    assert_eq!(g.wait_used(RX).0, buffers[0].0);
    g.transport.pause();
    network.arrive(VnetHeader::default(), &frame(OWN, 61));
    let saved = g.transport.save().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(g.rings[0].take_used().is_none(), "paused");
    let second = Arc::new(Loopback::new(Offloads::all()).unwrap());
    let mut fresh = Guest::with_memory(nic(&second), g.memory.clone());
    fresh.transport.restore(&saved).unwrap();
    fresh.rings = std::mem::take(&mut g.rings);
    fresh.features = g.features;
    assert_eq!(*locked(&second.agreed), Offloads::all());
    second.arrive(VnetHeader::default(), &frame([2; 6], 62));
    second.arrive(VnetHeader::default(), &frame(OWN, 63));
    assert_eq!(fresh.wait_used(RX), (buffers[1].0, 63 + 12), "the filter is as it was");
    fresh.wait_vector(1);
    send(&mut fresh, &VnetHeader::default(), &frame(OWN, 64));
    assert_eq!(locked(&second.sent).len(), 1);
}
