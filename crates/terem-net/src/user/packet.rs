//! Frames and packets: what is common to all protocols, read with care and written by hand.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::MIN_FRAME;
use crate::checksum::Sum;

pub(super) type Mac = [u8; 6];

pub(super) const ETHER_IPV4: u16 = 0x0800;
pub(super) const ETHER_ARP: u16 = 0x0806;
pub(super) const ETHER_IPV6: u16 = 0x86dd;

/// IANA protocol numbers.
pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;

const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
const HOP_LIMIT: u8 = 64;

/// Reads a big-endian 16-bit number.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]))
}

/// A packet of the guest's, its header taken apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packet<'a> {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    pub(super) protocol: u8,
    pub(super) hop_limit: u8,
    pub(super) payload: &'a [u8],
    /// The packet itself, without what an Ethernet frame may have behind it.
    pub(super) whole: &'a [u8],
}

impl<'a> Packet<'a> {
    /// RFC 791, 3.1. Fragments are left out: with our MTU a guest has no reason to send any.
    pub(super) fn ipv4(bytes: &'a [u8]) -> Option<Self> {
        let header = usize::from(bytes.first()? & 15) * 4;
        let total = usize::from(word(bytes, 2)?);
        let fragment = word(bytes, 6)? & 0x3fff;
        if bytes[0] >> 4 != 4 || header < IPV4_LEN || header > total || total > bytes.len() || fragment != 0 {
            return None;
        }
        let address = |at: usize| IpAddr::from([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Some(Self {
            from: address(12),
            to: address(16),
            protocol: bytes[9],
            hop_limit: bytes[8],
            payload: &bytes[header..total],
            whole: &bytes[..total],
        })
    }

    /// RFC 8200, 3. Packets with extension headers are left out.
    pub(super) fn ipv6(bytes: &'a [u8]) -> Option<Self> {
        let total = IPV6_LEN + usize::from(word(bytes, 4)?);
        if bytes[0] >> 4 != 6 || total > bytes.len() {
            return None;
        }
        let address = |at: usize| {
            <[u8; 16]>::try_from(&bytes[at..at + 16]).map_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::from)
        };
        Some(Self {
            from: address(8),
            to: address(24),
            protocol: bytes[6],
            hop_limit: bytes[7],
            payload: &bytes[IPV6_LEN..total],
            whole: &bytes[..total],
        })
    }
}

/// An Ethernet frame's head.
pub(super) fn ethernet(to: Mac, from: Mac, ether_type: u16, room: usize) -> Vec<u8> {
    let mut frame = Vec::with_capacity(MIN_FRAME + room);
    start_frame(&mut frame, to, from, ether_type);
    frame
}

/// Puts an Ethernet frame's head into an empty buffer.
pub(super) fn start_frame(frame: &mut Vec<u8>, to: Mac, from: Mac, ether_type: u16) {
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&from);
    frame.extend_from_slice(&ether_type.to_be_bytes());
}

/// The sum over a transport's pseudo header (RFC 9293, 3.1; RFC 8200, 8.1).
fn pseudo(from: IpAddr, to: IpAddr, protocol: u8, length: usize) -> Sum {
    let sum = match (from, to) {
        (IpAddr::V4(a), IpAddr::V4(b)) => Sum::default().add(&a.octets()).add(&b.octets()),
        (IpAddr::V6(a), IpAddr::V6(b)) => Sum::default().add(&a.octets()).add(&b.octets()),
        _ => Sum::default(),
    };
    sum.add_word(u16::from(protocol)).add_word(u16::try_from(length).unwrap_or(0))
}

/// Where a protocol has its checksum.
fn checksum_at(protocol: u8) -> Option<usize> {
    match protocol {
        TCP => Some(16),
        UDP => Some(6),
        ICMP | ICMPV6 => Some(2),
        _ => None,
    }
}

/// A whole frame with an IP packet, its checksums filled in; `None` for addresses of two kinds, and for what is too
/// long. Neighbour discovery takes a hop limit of 255, everything else 64.
pub(super) fn ip_frame(
    macs: (Mac, Mac),
    (from, to): (IpAddr, IpAddr),
    protocol: u8,
    hop_limit: Option<u8>,
    payload: &[u8],
) -> Option<Vec<u8>> {
    let hop_limit = hop_limit.unwrap_or(HOP_LIMIT);
    let length = u16::try_from(payload.len()).ok()?;
    let (mut frame, header) = match (from, to) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            let total = length.checked_add(u16::try_from(IPV4_LEN).ok()?)?;
            let mut frame = ethernet(macs.0, macs.1, ETHER_IPV4, usize::from(total));
            frame.extend_from_slice(&[0x45, 0]);
            frame.extend_from_slice(&total.to_be_bytes());
            frame.extend_from_slice(&[0, 0, 0x40, 0, hop_limit, protocol, 0, 0]);
            frame.extend_from_slice(&a.octets());
            frame.extend_from_slice(&b.octets());
            let sum = Sum::default().add(&frame[MIN_FRAME..]).finish();
            frame[MIN_FRAME + 10..MIN_FRAME + 12].copy_from_slice(&sum.to_be_bytes());
            (frame, IPV4_LEN)
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let mut frame = ethernet(macs.0, macs.1, ETHER_IPV6, IPV6_LEN + usize::from(length));
            frame.extend_from_slice(&[0x60, 0, 0, 0]);
            frame.extend_from_slice(&length.to_be_bytes());
            frame.extend_from_slice(&[protocol, hop_limit]);
            frame.extend_from_slice(&a.octets());
            frame.extend_from_slice(&b.octets());
            (frame, IPV6_LEN)
        }
        _ => return None,
    };
    frame.extend_from_slice(payload);
    let transport = MIN_FRAME + header;
    if let Some(field) = checksum_at(protocol).map(|at| transport + at)
        && frame.len() >= field + 2
    {
        frame[field..field + 2].fill(0);
        // ICMP for IPv4 has no pseudo header.
        let start = if protocol == ICMP { Sum::default() } else { pseudo(from, to, protocol, payload.len()) };
        // RFC 768: zero means "none" for UDP.
        let sum = match start.add(&frame[transport..]).finish() {
            0 if protocol == UDP => 0xffff,
            sum => sum,
        };
        frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    }
    Some(frame)
}

/// A UDP datagram (RFC 768) for [`ip_frame`].
pub(super) fn udp_payload(from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + data.len()).unwrap_or(u16::MAX);
    let mut payload = Vec::with_capacity(8 + data.len());
    for field in [from, to, length, 0] {
        payload.extend_from_slice(&field.to_be_bytes());
    }
    payload.extend_from_slice(data);
    payload
}

/// The Ethernet address of an IP multicast or broadcast address, or else `unicast` (RFC 1112, 6.4; RFC 2464, 7).
pub(super) fn mac_of(to: IpAddr, unicast: Mac) -> Mac {
    match to {
        IpAddr::V4(Ipv4Addr::BROADCAST) => [0xff; 6],
        IpAddr::V6(a) if a.is_multicast() => {
            let o = a.octets();
            [0x33, 0x33, o[12], o[13], o[14], o[15]]
        }
        _ => unicast,
    }
}
