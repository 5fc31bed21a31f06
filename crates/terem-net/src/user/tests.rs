//! Real sockets of the host against raw frames as a guest would send them, and against a TCP/IP stack as a guest.

use super::*;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use rustix::net::sockopt;

use crate::MAX_FRAME;

mod guest;

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

fn start(forwards: Vec<Forward>) -> UserNet {
    UserNet::start(&UserOptions { forwards, name_server: None }).unwrap()
}

fn wait_readable(net: &UserNet, limit: Duration) -> bool {
    let limit = Timespec::try_from(limit).unwrap();
    poll(&mut [PollFd::new(&net.poll_fd().unwrap(), PollFlags::IN)], Some(&limit)).unwrap() > 0
}

/// The next frame that `wanted` likes.
fn expect(net: &UserNet, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut buffer = vec![0; MAX_FRAME];
    let end = Instant::now() + Duration::from_secs(5);
    while Instant::now() < end {
        while let Some(received) = net.receive(&mut buffer).unwrap() {
            if wanted(&buffer[..received.length]) {
                return buffer[..received.length].to_vec();
            }
        }
        wait_readable(net, Duration::from_millis(100));
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
    net: &'a UserNet,
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
        assert_eq!(self.net.transmit(&header, &[IoSlice::new(a), IoSlice::new(b)]).unwrap(), Transmit::Taken);
        let length = data.len() + usize::from(flags & 3 != 0);
        self.sequence = self.sequence.wrapping_add(u32::try_from(length).unwrap());
    }

    /// The next segment for us with any of these flags or with data: its flags and data.
    fn expect(&mut self, flags: u8) -> (u8, Vec<u8>) {
        let ports = self.ports;
        let frame = expect(self.net, |frame| {
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
        assert_eq!(sum, 0xffff, "the TCP checksum");
        let data = tcp[usize::from(tcp[12] >> 4) * 4..].to_vec();
        let length = data.len() + usize::from(tcp[13] & 3 != 0);
        self.acknowledged = number(tcp, 4).wrapping_add(u32::try_from(length).unwrap());
        (tcp[13], data)
    }
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const PSH: u8 = 8;
const ACK: u8 = 16;

fn connect(net: &UserNet, port: u16) -> Tcp<'_> {
    let mut tcp = Tcp { net, ports: (40_000, port), sequence: 1000, acknowledged: 0 };
    tcp.send(SYN, &[]);
    let (flags, _) = tcp.expect(SYN);
    assert_eq!(flags & (SYN | ACK), SYN | ACK);
    tcp.send(ACK, &[]);
    tcp
}

#[test]
fn dhcp_gives_the_documented_addresses() {
    let net = start(Vec::new());
    assert!(net.link_up());
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
    net.transmit(&VnetHeader::default(), &[IoSlice::new(&frame)]).unwrap();
    let offer = expect(&net, |frame| frame.len() > 282 && frame[23] == 17 && word(frame, 36) == 68);
    let bootp = &offer[42..];
    assert_eq!(bootp[4..8], [1, 2, 3, 4]);
    assert_eq!(bootp[16..20], GUEST_ADDRESS.octets());
    let options = &bootp[240..];
    assert!(options.windows(6).any(|option| option == [3, 4, 10, 0, 2, 2]), "router");
    assert!(options.windows(6).any(|option| option == [1, 4, 255, 255, 255, 0]), "netmask");
    assert_eq!(net.mtu(), Some(65_520));
}

#[test]
fn the_gateway_is_the_hosts_loopback_in_both_directions() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let net = start(Vec::new());
    let mut tcp = connect(&net, server.local_addr().unwrap().port());
    let (mut host, _) = server.accept().unwrap();
    // Large segments, as they are.
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
    let net = start(vec![Forward {
        protocol: Protocol::Tcp,
        address: Some(Ipv4Addr::LOCALHOST.into()),
        host_port: free,
        guest_port: 22,
    }]);
    // Where the guest is, is known from its frames.
    let frame = ipv4(17, GUEST_ADDRESS, GATEWAY_ADDRESS, &[0, 9, 0, 9, 0, 8, 0, 0]);
    net.transmit(&VnetHeader::default(), &[IoSlice::new(&frame)]).unwrap();
    let client = std::thread::spawn(move || TcpStream::connect(("127.0.0.1", free)));
    let syn = expect(&net, |frame| frame.len() >= 54 && frame[23] == 6 && word(frame, 36) == 22);
    assert_eq!(syn[47] & (SYN | ACK), SYN);
    assert_eq!(syn[26..34], [GATEWAY_ADDRESS.octets(), GUEST_ADDRESS.octets()].concat());
    drop(net);
    drop(client.join().unwrap());
}

#[test]
fn datagrams_go_both_ways() {
    let server = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let net = start(vec![Forward {
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
    net.transmit(&VnetHeader::default(), &[IoSlice::new(&frame)]).unwrap();
    let mut buffer = [0; 16];
    let (length, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"ping");
    server.send_to(b"pong", from).unwrap();
    let answer = expect(&net, |frame| frame.len() >= 46 && frame[23] == 17 && word(frame, 36) == 12_345);
    assert_eq!(&answer[42..46], b"pong");
    assert_eq!(answer[26..30], GATEWAY_ADDRESS.octets());
    // And by the forwarded port.
    server.send_to(b"host", ("127.0.0.1", free)).unwrap();
    let forwarded = expect(&net, |frame| frame.len() >= 46 && frame[23] == 17 && word(frame, 36) == 53);
    assert_eq!(&forwarded[42..46], b"host");
}

/// A frame of the guest's to anybody.
fn send(net: &UserNet, frame: &[u8]) {
    assert_eq!(net.transmit(&VnetHeader::default(), &[IoSlice::new(frame)]).unwrap(), Transmit::Taken);
}

#[test]
fn arp_finds_the_router_and_nobody_else() {
    let net = start(Vec::new());
    let ask = |wanted: [u8; 4]| {
        let mut frame = vec![0xff; 6];
        frame.extend_from_slice(&GUEST_MAC);
        frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend_from_slice(&GUEST_MAC);
        frame.extend_from_slice(&GUEST_ADDRESS.octets());
        frame.extend_from_slice(&[0; 6]);
        frame.extend_from_slice(&wanted);
        send(&net, &frame);
        let mut buffer = vec![0; MAX_FRAME];
        net.receive(&mut buffer).unwrap().map(|got| buffer[..got.length].to_vec())
    };
    for wanted in [[10, 0, 2, 2], [10, 0, 2, 3]] {
        let reply = ask(wanted).unwrap();
        assert_eq!(reply[..6], GUEST_MAC);
        assert_eq!(reply[20..22], [0, 2]);
        assert_eq!((&reply[22..28], &reply[28..32]), (&GATEWAY_MAC[..], &wanted[..]));
    }
    assert_eq!(ask([10, 0, 2, 15]), None, "the guest's own probe");
    assert_eq!(ask([10, 0, 2, 99]), None);
}

/// An ICMPv6 message, with its checksum.
fn icmpv6(source: &str, target: &str, message: &[u8]) -> Vec<u8> {
    let addresses = (source.parse().unwrap(), target.parse().unwrap());
    ip_frame((GATEWAY_MAC, GUEST_MAC), addresses, ICMPV6, Some(255), message).unwrap()
}

#[test]
fn ipv6_is_configured_by_advertisements() {
    let net = start(Vec::new());
    send(&net, &icmpv6("fe80::1234", "ff02::2", &[133, 0, 0, 0, 0, 0, 0, 0]));
    let frame = expect(&net, |frame| word(frame, 12) == 0x86dd && frame[20] == 58 && frame[54] == 134);
    // RFC 4861, 4.2 and 4.6.2: the router's lifetime; option 3, 4 units of 8 bytes, 64 bits of prefix, on-link and
    // autonomous.
    assert_eq!(word(&frame, 60) != 0, host::has_ipv6());
    assert!(frame[70..].windows(4).any(|option| option == [3, 4, 64, 0xc0]));
    assert!(frame[70..].windows(8).any(|option| option == [25, 3, 0, 0, 0, 1, 0x51, 0x80]));
    let mut solicitation = vec![135, 0, 0, 0, 0, 0, 0, 0];
    solicitation.extend_from_slice(&GATEWAY6.octets());
    send(&net, &icmpv6("fe80::1234", "ff02::1:ff00:2", &solicitation));
    let frame = expect(&net, |frame| word(frame, 12) == 0x86dd && frame[20] == 58 && frame[54] == 136);
    assert_eq!(frame[62..78], GATEWAY6.octets());
    assert_eq!(frame[80..86], GATEWAY_MAC);
}

#[test]
fn the_router_answers_pings() {
    let net = start(Vec::new());
    let ping = [8, 0, 0, 0, 0x12, 0x34, 0, 1, b'h', b'i'];
    let addresses = (GUEST_ADDRESS.into(), GATEWAY_ADDRESS.into());
    send(&net, &ip_frame((GATEWAY_MAC, GUEST_MAC), addresses, ICMP, None, &ping).unwrap());
    let pong = expect(&net, |frame| frame[23] == ICMP);
    assert_eq!((pong[34], &pong[38..44]), (0, &ping[4..]));
    assert_eq!(crate::checksum::Sum::default().add(&pong[34..]).fold(), 0xffff);
}

#[test]
fn name_queries_go_to_the_hosts_server() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let name_server = Some(server.local_addr().unwrap());
    let net = UserNet::start(&UserOptions { forwards: Vec::new(), name_server }).unwrap();
    send(&net, &ipv4(UDP, GUEST_ADDRESS, DNS, &udp_payload(5000, 53, b"query")));
    let mut buffer = [0; 16];
    let (length, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"query");
    server.send_to(b"answer", from).unwrap();
    let answer = expect(&net, |frame| frame[23] == UDP && word(frame, 36) == 5000);
    assert_eq!((&answer[26..30], &answer[42..48]), (&DNS.octets()[..], &b"answer"[..]));
}

#[test]
fn a_forwarded_datagram_is_answered() {
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let free = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let net = start(vec![Forward {
        protocol: Protocol::Udp,
        address: Some(Ipv4Addr::LOCALHOST.into()),
        host_port: free,
        guest_port: 7,
    }]);
    client.send_to(b"question", ("127.0.0.1", free)).unwrap();
    let frame = expect(&net, |frame| frame[23] == UDP && word(frame, 36) == 7);
    send(&net, &ipv4(UDP, GUEST_ADDRESS, GATEWAY_ADDRESS, &udp_payload(7, word(&frame, 34), b"answer")));
    let mut buffer = [0; 16];
    let (length, from) = client.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from.port()), (&b"answer"[..], free));
}

#[test]
fn a_refused_connection_is_reset() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let net = start(Vec::new());
    let mut tcp = Tcp { net: &net, ports: (40_000, free), sequence: 1000, acknowledged: 0 };
    tcp.send(SYN, &[]);
    let (flags, _) = tcp.expect(RST);
    assert_eq!(flags, RST | ACK);
    // A segment of no connection.
    tcp.send(ACK, b"stray");
    assert_eq!(tcp.expect(RST).0, RST);
    assert_eq!(lock(&net.inner).connections.count(), 0);
}

#[test]
fn a_reset_goes_through_both_ways() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let net = start(Vec::new());
    let mut tcp = connect(&net, port);
    let (mut host, _) = server.accept().unwrap();
    tcp.send(RST | ACK, &[]);
    assert_eq!(host.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    let mut tcp = connect(&net, port);
    let (host, _) = server.accept().unwrap();
    sockopt::set_socket_linger(&host, Some(Duration::ZERO)).unwrap();
    drop(host);
    assert_ne!(tcp.expect(RST).0 & RST, 0);
    assert_eq!(lock(&net.inner).connections.count(), 0);
}

#[test]
fn offloads_say_what_was_agreed() {
    let net = start(Vec::new());
    assert_eq!(net.receive_offloads(), Offloads::CHECKSUM);
    for (agreed, valid) in [(Offloads::CHECKSUM, true), (Offloads::empty(), false)] {
        net.set_receive_offloads(agreed).unwrap();
        let ping = [8, 0, 0, 0, 0, 1, 0, 1];
        let addresses = (GUEST_ADDRESS.into(), GATEWAY_ADDRESS.into());
        send(&net, &ip_frame((GATEWAY_MAC, GUEST_MAC), addresses, ICMP, None, &ping).unwrap());
        let received = net.receive(&mut vec![0; MAX_FRAME]).unwrap().unwrap();
        assert_eq!(received.header.checksum_valid, valid);
    }
}

#[test]
fn nobody_opens_no_connection() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let name_server = Some(server.local_addr().unwrap());
    let net = UserNet::start(&UserOptions { forwards: Vec::new(), name_server }).unwrap();
    for source in
        [Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST, Ipv4Addr::LOCALHOST, Ipv4Addr::new(224, 0, 0, 1)]
    {
        let syn = [9, 0, 0, 53, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0];
        send(&net, &ipv4(TCP, source, DNS, &syn));
        std::thread::sleep(Duration::from_millis(5));
        assert!(net.receive(&mut vec![0; MAX_FRAME]).unwrap().is_none());
    }
    assert_eq!(lock(&net.inner).connections.count(), 0);
}

proptest::proptest! {
    /// Frames of all kinds, cut and garbled. Nothing may leave this host: they go to addresses that are answered
    /// here, or lead nowhere.
    #[test]
    fn garbled_frames_do_no_harm(
        kind in 0..5usize,
        cut in 14..200usize,
        garbage in proptest::collection::vec((14..120usize, proptest::prelude::any::<u8>()), 0..12),
    ) {
        static NET: std::sync::LazyLock<UserNet> = std::sync::LazyLock::new(|| start(Vec::new()));
        let addresses = (GUEST_ADDRESS.into(), IpAddr::from(DNS));
        let ip = |protocol, payload: &[u8]| {
            ip_frame((GATEWAY_MAC, GUEST_MAC), addresses, protocol, None, payload).unwrap()
        };
        let mut frame = match kind {
            0 => ip(TCP, &[9, 0, 9, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x60, SYN, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 5, 0xb4]),
            1 => ip(ICMP, &[8, 0, 0, 0, 1, 2, 3, 4]),
            2 => ip(UDP, &udp_payload(68, 67, &[1; 260])),
            3 => icmpv6("fe80::1", "ff02::2", &[133, 0, 0, 0, 0, 0, 0, 0]),
            _ => vec![0; 60],
        };
        frame.resize(cut.max(frame.len().min(100)), 0);
        frame.truncate(cut);
        for (at, byte) in garbage {
            // The addresses stay, so that no stranger gets mail.
            if !(26..=33).contains(&at) && at < frame.len() {
                frame[at] = byte;
            }
        }
        send(&NET, &frame);
        let mut buffer = vec![0; MAX_FRAME];
        while NET.receive(&mut buffer).unwrap().is_some() {}
    }
}
