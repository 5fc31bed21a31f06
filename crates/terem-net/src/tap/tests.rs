//! Against the host's own kernel, which takes root: the tests make taps that vanish again. Without the right to make
//! one they only check that the error says what to do.

use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::checksum::Sum;
use crate::{Gso, MAX_FRAME};

const OURS: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

/// A tap that is up, with 10.93.NET.1/24 on the host; 10.93.NET.2 is us, with a static neighbour entry.
fn tap(name: &str, net: u8) -> Option<Tap> {
    let tap = match Tap::open(name) {
        Ok(tap) => tap,
        Err(TapError::Permission { .. } | TapError::Device { .. }) => return None,
        Err(error) => panic!("{error}"),
    };
    // Quick failures of IPv6's duplicate address detection and the like are not of interest.
    run(&["link", "set", name, "mtu", "1500", "up"]);
    run(&["addr", "add", &format!("10.93.{net}.1/24"), "dev", name]);
    run(&["neigh", "replace", &format!("10.93.{net}.2"), "lladdr", "52:54:00:01:02:03", "dev", name]);
    Some(tap)
}

fn run(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn host_mac(name: &str) -> [u8; 6] {
    let output = Command::new("ip").args(["-o", "link", "show", "dev", name]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mac = text.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap();
    let bytes: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

fn expect(tap: &Tap, wanted: impl Fn(&[u8]) -> bool) -> (VnetHeader, Vec<u8>) {
    let mut buffer = vec![0; MAX_FRAME];
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        while let Some(Received { header, length }) = tap.receive(&mut buffer).unwrap() {
            if wanted(&buffer[..length]) {
                return (header, buffer[..length].to_vec());
            }
        }
        let limit = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        poll(&mut [PollFd::new(&tap.poll_fd().unwrap(), PollFlags::IN)], Some(&limit)).unwrap();
    }
    panic!("no such frame arrived");
}

/// A UDP datagram from us, its checksum left undone.
fn udp(tap: &Tap, net: u8, port: u16, data: &[u8]) -> (VnetHeader, Vec<u8>) {
    let mut frame = host_mac(tap.name()).to_vec();
    frame.extend_from_slice(&OURS);
    frame.extend_from_slice(&[8, 0, 0x45, 0]);
    frame.extend_from_slice(&u16::try_from(28 + data.len()).unwrap().to_be_bytes());
    frame.extend_from_slice(&[0, 1, 0, 0, 64, 17, 0, 0, 10, 93, net, 2, 10, 93, net, 1]);
    let sum = Sum::default().add(&frame[14..34]).finish();
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    let length = u16::try_from(8 + data.len()).unwrap();
    frame.extend_from_slice(&[0x12, 0x34]);
    frame.extend_from_slice(&port.to_be_bytes());
    frame.extend_from_slice(&length.to_be_bytes());
    let pseudo = Sum::default().add(&frame[26..34]).add_word(17).add_word(length).fold();
    frame.extend_from_slice(&pseudo.to_be_bytes());
    frame.extend_from_slice(data);
    (VnetHeader { needs_checksum: Some((34, 6)), ..VnetHeader::default() }, frame)
}

fn exchange(tap: &Tap, net: u8) {
    let socket = UdpSocket::bind((Ipv4Addr::new(10, 93, net, 1), 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let port = socket.local_addr().unwrap().port();
    let (header, frame) = udp(tap, net, port, b"from the guest");
    let (a, b) = frame.split_at(20);
    assert_eq!(tap.transmit(&header, &[IoSlice::new(a), IoSlice::new(b)]).unwrap(), Transmit::Taken);
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"from the guest");
    assert_eq!(from, (Ipv4Addr::new(10, 93, net, 2), 0x1234).into());

    // And back: without an agreement the frame is complete.
    socket.send_to(b"from the host", from).unwrap();
    let (header, frame) = expect(tap, |frame| frame.ends_with(b"from the host"));
    assert_eq!(header, VnetHeader::default());
    assert_eq!(frame[..6], OURS);
    let sum = Sum::default().add(&frame[26..34]).add_word(17).add_word(21).add(&frame[34..]).fold();
    assert_eq!(sum, 0xffff, "the host's UDP checksum");

    if tap.receive_offloads().contains(Offloads::CHECKSUM) {
        tap.set_receive_offloads(Offloads::all()).unwrap();
        socket.send_to(b"undone", from).unwrap();
        let (header, _) = expect(tap, |frame| frame.ends_with(b"undone"));
        assert_eq!(header.needs_checksum, Some((34, 6)));
        tap.set_receive_offloads(Offloads::empty()).unwrap();
    }
}

#[test]
fn frames_go_both_ways_with_headers() {
    let Some(tap) = tap("teremt1", 1) else { return };
    assert_eq!(tap.description(), "tap teremt1");
    assert_eq!(tap.mtu(), None);
    exchange(&tap, 1);
}

#[test]
fn an_inherited_tap_without_headers_is_completed_in_software() {
    // Opened as another program might: without virtio headers.
    let Ok(device) = File::options().read(true).write(true).open(TUN_DEVICE) else { return };
    let device = OwnedFd::from(device);
    match ioctl::set_interface(&device, ioctl::name_bytes("teremt2").unwrap(), Flags::TAP | Flags::NO_PI) {
        Err(Errno::PERM) => return,
        result => result.unwrap(),
    }
    run(&["link", "set", "teremt2", "mtu", "1400", "up"]);
    run(&["addr", "add", "10.93.2.1/24", "dev", "teremt2"]);
    run(&["neigh", "replace", "10.93.2.2", "lladdr", "52:54:00:01:02:03", "dev", "teremt2"]);
    let tap = Tap::from_fd(device).unwrap();
    assert_eq!(tap.name(), "teremt2");
    assert_eq!(tap.mtu(), Some(1400));
    assert_eq!(tap.receive_offloads(), Offloads::empty());
    exchange(&tap, 2);
}

#[test]
fn an_inherited_tap_with_headers_keeps_them() {
    let Some(first) = tap("teremt3", 3) else { return };
    let tap = Tap::from_fd(first.device.try_clone().unwrap()).unwrap();
    drop(first);
    assert!(tap.has_header);
    exchange(&tap, 3);
}

#[test]
fn errors_say_which_tap_and_what_to_do() {
    assert!(matches!(Tap::open(""), Err(TapError::Name { .. })));
    let missing = Tap::open_existing("teremt99").unwrap_err().to_string();
    assert!(
        missing.contains("no network interface teremt99") && missing.contains("ip tuntap add"),
        "{missing}"
    );
    assert!(matches!(Tap::open("a/b"), Err(TapError::Name { .. })));
    assert!(matches!(Tap::open("sixteen-long-nam"), Err(TapError::Name { .. })));
    let null = OwnedFd::from(File::open("/dev/null").unwrap());
    assert!(matches!(Tap::from_fd(null), Err(TapError::Descriptor { .. })));
    let Some(tap) = tap("teremt4", 4) else {
        let error = Tap::open("teremt4").unwrap_err();
        assert!(error.to_string().contains("ip tuntap add") || error.to_string().contains("/dev/net/tun"));
        return;
    };
    assert!(matches!(Tap::open("teremt4"), Err(TapError::Busy { .. })));
    assert!(matches!(Tap::open("lo"), Err(TapError::Kind { .. })));
    // Nonsense in the guest's header: the frame is dropped, the tap goes on.
    let nonsense = VnetHeader {
        needs_checksum: Some((0xffff, 0xffff)),
        gso: Some((Gso::Tcp6, 1)),
        header_len: 0xffff,
        ..VnetHeader::default()
    };
    assert_eq!(tap.transmit(&nonsense, &[IoSlice::new(&[0; 60])]).unwrap(), Transmit::Taken);
    assert_eq!(tap.transmit(&VnetHeader::default(), &[]).unwrap(), Transmit::Taken);
    exchange(&tap, 4);
    // Removed under us: the link goes down.
    run(&["link", "del", "teremt4"]);
    let frame = [0u8; 60];
    let error = tap.transmit(&VnetHeader::default(), &[IoSlice::new(&frame)]).unwrap_err();
    assert!(error.to_string().contains("teremt4 is gone"), "{error}");
    assert!(!tap.link_up());
}

#[test]
fn a_removed_tap_is_noticed_when_reading() {
    let Some(tap) = tap("teremt5", 5) else { return };
    run(&["link", "del", "teremt5"]);
    let mut buffer = vec![0; MAX_FRAME];
    let error = loop {
        match tap.receive(&mut buffer) {
            Ok(Some(_)) => {}
            Ok(None) => panic!("a removed tap has frames to come"),
            Err(error) => break error,
        }
    };
    assert!(error.to_string().contains("is gone"), "{error}");
    assert!(!tap.link_up());
}
