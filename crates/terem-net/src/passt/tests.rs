//! Against the real passt: raw frames as a guest would send them.

use super::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

fn start(forwards: Vec<Forward>) -> Passt {
    let passt = Passt::start(&PasstOptions { forwards, ..PasstOptions::default() }).unwrap();
    passt.wait_until_ready(Duration::from_secs(5)).unwrap();
    passt
}

/// The next frame that `wanted` likes.
fn expect(passt: &Passt, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut buffer = vec![0; MAX_FRAME];
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        while let Some(received) = passt.receive(&mut buffer).unwrap() {
            if wanted(&buffer[..received.length]) {
                return buffer[..received.length].to_vec();
            }
        }
        process::wait_readable(passt.poll_fd().unwrap(), Duration::from_millis(100)).unwrap();
    }
    panic!("no such frame arrived");
}

fn word(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

fn number(frame: &[u8], at: usize) -> u32 {
    u32::from(word(frame, at)) << 16 | u32::from(word(frame, at + 2))
}

/// An IPv4 frame; addresses, checksum and all.
fn ipv4(protocol: u8, source: Ipv4Addr, target: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let mut frame = GATEWAY_MAC.to_vec();
    frame.extend_from_slice(&GUEST_MAC);
    frame.extend_from_slice(&[8, 0, 0x45, 0]);
    frame.extend_from_slice(&u16::try_from(20 + payload.len()).unwrap().to_be_bytes());
    frame.extend_from_slice(&[0, 1, 0, 0, 64, protocol, 0, 0]);
    frame.extend_from_slice(&source.octets());
    frame.extend_from_slice(&target.octets());
    let sum = crate::checksum::Sum::default().add(&frame[14..34]).finish();
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// One end of a TCP connection, of just enough to talk over a wire that loses nothing.
struct Tcp<'a> {
    passt: &'a Passt,
    ports: (u16, u16),
    sequence: u32,
    acknowledged: u32,
}

impl Tcp<'_> {
    /// Sends a segment as a guest with offloads does: the checksum undone, and any length.
    fn send(&mut self, flags: u8, data: &[u8]) {
        let mut segment = Vec::new();
        segment.extend_from_slice(&self.ports.0.to_be_bytes());
        segment.extend_from_slice(&self.ports.1.to_be_bytes());
        segment.extend_from_slice(&self.sequence.to_be_bytes());
        segment.extend_from_slice(&self.acknowledged.to_be_bytes());
        segment.extend_from_slice(&[0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
        segment.extend_from_slice(data);
        let length = u16::try_from(segment.len()).unwrap();
        let pseudo =
            crate::checksum::Sum::default().add(&GUEST_ADDRESS.octets()).add(&GATEWAY_ADDRESS.octets());
        let sum = pseudo.add_word(6).add_word(length).fold();
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        let gso = (data.len() > 1460).then_some((crate::Gso::Tcp4, 1460));
        let header = VnetHeader { needs_checksum: Some((34, 16)), gso, ..VnetHeader::default() };
        let frame = ipv4(6, GUEST_ADDRESS, GATEWAY_ADDRESS, &segment);
        // Scattered, as descriptors are.
        let (a, b) = frame.split_at(31);
        assert_eq!(
            self.passt.transmit(&header, &[IoSlice::new(a), IoSlice::new(b)]).unwrap(),
            Transmit::Taken
        );
        let length = data.len() + usize::from(flags & 3 != 0);
        self.sequence = self.sequence.wrapping_add(u32::try_from(length).unwrap());
    }

    /// The next segment for us with any of these flags or with data: its flags and data.
    fn expect(&mut self, flags: u8) -> (u8, Vec<u8>) {
        let ports = self.ports;
        let frame = expect(self.passt, |frame| {
            frame.len() >= 54
                && word(frame, 12) == 0x0800
                && frame[23] == 6
                && (word(frame, 36), word(frame, 34)) == ports
                && (frame[47] & flags != 0
                    || usize::from(word(frame, 16)) > 20 + usize::from(frame[46] >> 4) * 4)
        });
        let ip_length = usize::from(word(&frame, 16));
        let tcp = &frame[34..14 + ip_length];
        let pseudo = crate::checksum::Sum::default().add(&frame[26..34]).add_word(6);
        let sum = pseudo.add_word(u16::try_from(tcp.len()).unwrap()).add(tcp).fold();
        assert_eq!(sum, 0xffff, "passt's TCP checksum");
        let data = tcp[usize::from(tcp[12] >> 4) * 4..].to_vec();
        let length = data.len() + usize::from(tcp[13] & 3 != 0);
        self.acknowledged = number(tcp, 4).wrapping_add(u32::try_from(length).unwrap());
        (tcp[13], data)
    }
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const PSH: u8 = 8;
const ACK: u8 = 16;

fn connect(passt: &Passt, port: u16) -> Tcp<'_> {
    let mut tcp = Tcp { passt, ports: (40_000, port), sequence: 1000, acknowledged: 0 };
    tcp.send(SYN, &[]);
    let (flags, _) = tcp.expect(SYN);
    assert_eq!(flags & (SYN | ACK), SYN | ACK);
    tcp.send(ACK, &[]);
    tcp
}

#[test]
fn dhcp_gives_the_documented_addresses() {
    let passt = start(Vec::new());
    assert!(passt.link_up());
    // RFC 2131, 2: op, htype, hlen, hops, xid, …, chaddr at 28, options from 236 on behind the magic cookie.
    let mut discover = vec![0; 236];
    discover[..8].copy_from_slice(&[1, 1, 6, 0, 1, 2, 3, 4]);
    discover[28..34].copy_from_slice(&GUEST_MAC);
    discover.extend_from_slice(&[0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255]);
    let mut udp = vec![0, 68, 0, 67];
    udp.extend_from_slice(&u16::try_from(8 + discover.len()).unwrap().to_be_bytes());
    udp.extend_from_slice(&[0, 0]);
    udp.extend_from_slice(&discover);
    let frame = ipv4(17, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, &udp);
    passt.transmit(&VnetHeader::default(), &[IoSlice::new(&frame)]).unwrap();
    let offer = expect(&passt, |frame| frame.len() > 282 && frame[23] == 17 && word(frame, 36) == 68);
    let bootp = &offer[42..];
    assert_eq!(bootp[4..8], [1, 2, 3, 4]);
    assert_eq!(bootp[16..20], GUEST_ADDRESS.octets());
    let options = &bootp[240..];
    assert!(options.windows(6).any(|option| option == [3, 4, 10, 0, 2, 2]), "router");
    assert!(options.windows(6).any(|option| option == [1, 4, 255, 255, 255, 0]), "netmask");
    assert_eq!(passt.mtu(), Some(65_520));
}

#[test]
fn the_gateway_is_the_hosts_loopback_in_both_directions() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let passt = start(Vec::new());
    let mut tcp = connect(&passt, server.local_addr().unwrap().port());
    let (mut host, _) = server.accept().unwrap();
    // A large segment that only leaves in pieces: more than 65,535 bytes of frame are too long for passt.
    let sent: Vec<u8> = (0..65_495u32).map(|index| index.to_le_bytes()[0] ^ index.to_le_bytes()[1]).collect();
    let (first, rest) = sent.split_at(60_000);
    tcp.send(PSH | ACK, first);
    let mut received = vec![0; 60_000];
    host.read_exact(&mut received).unwrap();
    assert_eq!(received, first);
    tcp.send(PSH | ACK, rest);
    let mut received = vec![0; rest.len()];
    host.read_exact(&mut received).unwrap();
    assert_eq!(received, rest);
    host.write_all(b"hello guest").unwrap();
    loop {
        let (_, data) = tcp.expect(PSH);
        if !data.is_empty() {
            assert_eq!(data, b"hello guest");
            break;
        }
    }
    tcp.send(FIN | ACK, &[]);
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_forwarded_port_reaches_the_guest() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let passt = start(vec![Forward {
        protocol: Protocol::Tcp,
        address: Some(Ipv4Addr::LOCALHOST.into()),
        host_port: free,
        guest_port: 22,
    }]);
    // passt learns where the guest is from its frames.
    let frame = ipv4(17, GUEST_ADDRESS, GATEWAY_ADDRESS, &[0, 9, 0, 9, 0, 8, 0, 0]);
    passt.transmit(&VnetHeader::default(), &[IoSlice::new(&frame)]).unwrap();
    let client = std::thread::spawn(move || TcpStream::connect(("127.0.0.1", free)));
    let syn = expect(&passt, |frame| frame.len() >= 54 && frame[23] == 6 && word(frame, 36) == 22);
    assert_eq!(syn[47] & (SYN | ACK), SYN);
    assert_eq!(syn[26..34], [GATEWAY_ADDRESS.octets(), GUEST_ADDRESS.octets()].concat());
    drop(passt);
    drop(client.join().unwrap());
}

#[test]
fn datagrams_go_both_ways() {
    let server = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let passt = start(vec![Forward {
        protocol: Protocol::Udp,
        address: Some(Ipv4Addr::LOCALHOST.into()),
        host_port: free,
        guest_port: 53,
    }]);
    let mut udp = vec![0x30, 0x39];
    udp.extend_from_slice(&server.local_addr().unwrap().port().to_be_bytes());
    udp.extend_from_slice(&[0, 12, 0, 0]);
    udp.extend_from_slice(b"ping");
    let frame = ipv4(17, GUEST_ADDRESS, GATEWAY_ADDRESS, &udp);
    passt.transmit(&VnetHeader::default(), &[IoSlice::new(&frame)]).unwrap();
    let mut buffer = [0; 16];
    let (length, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"ping");
    server.send_to(b"pong", from).unwrap();
    let answer = expect(&passt, |frame| frame.len() >= 46 && frame[23] == 17 && word(frame, 36) == 12_345);
    assert_eq!(&answer[42..46], b"pong");
    assert_eq!(answer[26..30], GATEWAY_ADDRESS.octets());
    // And by the forwarded port.
    server.send_to(b"host", ("127.0.0.1", free)).unwrap();
    let forwarded = expect(&passt, |frame| frame.len() >= 46 && frame[23] == 17 && word(frame, 36) == 53);
    assert_eq!(&forwarded[42..46], b"host");
}

#[test]
fn ipv6_is_there_where_the_host_has_it() {
    if !process::host_has_ipv6() {
        return;
    }
    let passt = start(Vec::new());
    // A router solicitation (RFC 4861, 4.1) to all routers, ff02::2.
    let source = "fe80::5054:ff:fe12:3456".parse::<std::net::Ipv6Addr>().unwrap().octets();
    let target = "ff02::2".parse::<std::net::Ipv6Addr>().unwrap().octets();
    let mut frame = vec![0x33, 0x33, 0, 0, 0, 2];
    frame.extend_from_slice(&GUEST_MAC);
    frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 8, 58, 255]);
    frame.extend_from_slice(&source);
    frame.extend_from_slice(&target);
    let sum = crate::checksum::Sum::default().add(&source).add(&target).add_word(58).add_word(8);
    let checksum = sum.add_word(133 << 8).finish().to_be_bytes();
    frame.extend_from_slice(&[133, 0, checksum[0], checksum[1], 0, 0, 0, 0]);
    passt.transmit(&VnetHeader::default(), &[IoSlice::new(&frame)]).unwrap();
    let advertisement = expect(&passt, |frame| {
        frame.len() > 70 && word(frame, 12) == 0x86dd && frame[20] == 58 && frame[54] == 134
    });
    // Prefix information (RFC 4861, 4.6.2): option 3, 4 units of 8 bytes, 64 bits of prefix.
    assert!(advertisement[70..].windows(3).any(|option| option == [3, 4, 64]));
}

#[test]
fn offloads_say_what_was_agreed() {
    let passt = start(Vec::new());
    assert_eq!(passt.receive_offloads(), Offloads::CHECKSUM);
    for (agreed, valid) in [(Offloads::CHECKSUM, true), (Offloads::empty(), false)] {
        passt.set_receive_offloads(agreed).unwrap();
        passt.send_probe().unwrap();
        let mut buffer = vec![0; MAX_FRAME];
        let received = loop {
            match passt.receive(&mut buffer).unwrap() {
                Some(received) if buffer.starts_with(&PROBE_MAC) => break received,
                Some(_) => {}
                None => process::wait_readable(passt.poll_fd().unwrap(), Duration::from_secs(5)).unwrap(),
            }
        };
        assert_eq!(received.header.checksum_valid, valid);
    }
}

#[test]
fn a_missing_program_says_how_to_get_it() {
    let options = PasstOptions { program: "/nonexistent/passt".into(), ..PasstOptions::default() };
    let error = Passt::start(&options).unwrap_err();
    assert!(matches!(error, PasstError::Missing { .. }));
    assert!(error.to_string().contains("apt-get install passt"), "{error}");
}

#[test]
fn a_failing_start_is_reported_with_passts_words() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("passt");
    std::fs::write(&program, "#!/bin/sh\necho 'External interface not usable' >&2\nexit 1\n").unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let options = PasstOptions { program, ..PasstOptions::default() };
    let passt = Passt::start(&options).unwrap();
    let error = passt.wait_until_ready(Duration::from_secs(5)).unwrap_err();
    assert!(matches!(error, PasstError::Failed { .. }), "{error}");
    assert!(error.to_string().contains("External interface not usable"), "{error}");
    assert!(error.to_string().contains("exit status: 1"), "{error}");
    assert!(!passt.link_up());
}

#[test]
fn a_silent_program_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("passt");
    std::fs::write(&program, "#!/bin/sh\nexec sleep 60\n").unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let passt = Passt::start(&PasstOptions { program, ..PasstOptions::default() }).unwrap();
    let error = passt.wait_until_ready(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, PasstError::Silent { .. }), "{error}");
    let id = passt.process.id();
    drop(passt);
    assert!(!std::path::Path::new(&format!("/proc/{id}")).exists(), "it was ended by force");
}

#[test]
fn passt_ends_with_us_and_its_end_takes_the_link_down() {
    let passt = start(Vec::new());
    let id = passt.process.id();
    let path = format!("/proc/{id}");
    assert!(std::path::Path::new(&path).exists());
    drop(passt);
    assert!(!std::path::Path::new(&path).exists());

    let passt = start(Vec::new());
    let pid = rustix::process::Pid::from_raw(i32::try_from(passt.process.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    process::wait_readable(passt.poll_fd().unwrap(), Duration::from_secs(5)).unwrap();
    let mut buffer = vec![0; MAX_FRAME];
    let error = loop {
        match passt.receive(&mut buffer) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(error.to_string().contains("signal: 9"), "{error}");
    assert!(!passt.link_up());
    assert!(passt.transmit(&VnetHeader::default(), &[IoSlice::new(&[0; 60])]).is_err());
}
