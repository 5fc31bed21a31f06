//! What the guest's network itself answers: ARP, neighbour discovery, router advertisements, DHCP, and pings of the
//! router.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::packet::{ETHER_ARP, ICMP, ICMPV6, Mac, Packet, UDP, ethernet, ip_frame, udp_payload, word};
use super::{DNS, DNS6, GATEWAY_MAC, GATEWAY6, MTU, ROUTER6};
use crate::{GATEWAY_ADDRESS, GUEST_ADDRESS};

/// How long an address is lent, in seconds.
const LEASE: u32 = 86_400;
/// How long the guest may take us for its way out without hearing from us, in seconds.
const ROUTER_LIFETIME: u16 = 1800;
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// ARP (RFC 826): the router and the name server are at the router's address.
pub(super) fn arp(request: &[u8]) -> Option<Vec<u8>> {
    const ETHERNET_IPV4_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
    let fields = request.get(..28)?;
    let wanted = Ipv4Addr::new(fields[24], fields[25], fields[26], fields[27]);
    if !fields.starts_with(&ETHERNET_IPV4_REQUEST) || ![GATEWAY_ADDRESS, DNS].contains(&wanted) {
        return None;
    }
    let asking: Mac = fields[8..14].try_into().ok()?;
    let mut reply = ethernet(asking, GATEWAY_MAC, ETHER_ARP, 28);
    reply.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
    reply.extend_from_slice(&GATEWAY_MAC);
    reply.extend_from_slice(&wanted.octets());
    reply.extend_from_slice(&fields[8..18]);
    Some(reply)
}

/// Pings of the router and the name server (RFC 792, RFC 4443).
pub(super) fn echo(packet: &Packet<'_>, guest: Mac) -> Option<Vec<u8>> {
    let (request, reply) = match packet.protocol {
        ICMP => (8, 0),
        ICMPV6 => (128, 129),
        _ => return None,
    };
    let here: [IpAddr; 5] =
        [GATEWAY_ADDRESS.into(), DNS.into(), ROUTER6.into(), GATEWAY6.into(), DNS6.into()];
    if packet.payload.len() < 8 || packet.payload[0] != request || !here.contains(&packet.to) {
        return None;
    }
    let mut answer = packet.payload.to_vec();
    answer[0] = reply;
    ip_frame((guest, GATEWAY_MAC), (packet.to, packet.from), packet.protocol, None, &answer)
}

/// Neighbour discovery (RFC 4861): neighbour solicitations for our addresses, and router solicitations.
pub(super) fn neighbour(packet: &Packet<'_>, guest: Mac, way_out: bool) -> Option<Vec<u8>> {
    const ROUTER_SOLICITATION: u8 = 133;
    const NEIGHBOUR_SOLICITATION: u8 = 135;
    // RFC 4861, 6.1.1 and 7.1.1: another hop limit has come through a router.
    if packet.protocol != ICMPV6 || packet.hop_limit != 255 {
        return None;
    }
    let unspecified = packet.from == IpAddr::V6(Ipv6Addr::UNSPECIFIED);
    let to = if unspecified { ALL_NODES.into() } else { packet.from };
    let mac = super::packet::mac_of(to, guest);
    match *packet.payload.first()? {
        ROUTER_SOLICITATION => {
            let body = advertisement(way_out);
            ip_frame((mac, GATEWAY_MAC), (ROUTER6.into(), to), ICMPV6, Some(255), &body)
        }
        NEIGHBOUR_SOLICITATION => {
            let wanted = Ipv6Addr::from(<[u8; 16]>::try_from(packet.payload.get(8..24)?).ok()?);
            if ![ROUTER6, GATEWAY6, DNS6].contains(&wanted) {
                return None;
            }
            // RFC 4861, 4.4: router, solicited (not to nobody), override; then our link-layer address.
            let flags = if unspecified { 0xa0 } else { 0xe0 };
            let mut body = vec![136, 0, 0, 0, flags, 0, 0, 0];
            body.extend_from_slice(&wanted.octets());
            body.extend_from_slice(&[2, 1]);
            body.extend_from_slice(&GATEWAY_MAC);
            ip_frame((mac, GATEWAY_MAC), (wanted.into(), to), ICMPV6, Some(255), &body)
        }
        _ => None,
    }
}

/// A router advertisement (RFC 4861, 4.2) with our prefix, MTU and name server (RFC 8106, 5.1). Without a way out for
/// IPv6 it offers addresses, but no default route.
fn advertisement(way_out: bool) -> Vec<u8> {
    let lifetime = if way_out { ROUTER_LIFETIME } else { 0 };
    let mut body = vec![134, 0, 0, 0, 64, 0];
    body.extend_from_slice(&lifetime.to_be_bytes());
    body.extend_from_slice(&[0; 8]);
    body.extend_from_slice(&[1, 1]);
    body.extend_from_slice(&GATEWAY_MAC);
    body.extend_from_slice(&[5, 1, 0, 0]);
    body.extend_from_slice(&u32::from(MTU).to_be_bytes());
    // On-link, and for stateless addresses.
    body.extend_from_slice(&[3, 4, 64, 0xc0]);
    body.extend_from_slice(&LEASE.to_be_bytes());
    body.extend_from_slice(&LEASE.to_be_bytes());
    body.extend_from_slice(&[0; 4]);
    body.extend_from_slice(&GATEWAY6.octets()[..8]);
    body.extend_from_slice(&[0; 8]);
    body.extend_from_slice(&[25, 3, 0, 0]);
    body.extend_from_slice(&LEASE.to_be_bytes());
    body.extend_from_slice(&DNS6.octets());
    body
}

/// DHCP (RFC 2131): there is one address to be had.
pub(super) fn dhcp(packet: &Packet<'_>, guest: Mac) -> Option<Vec<u8>> {
    const COOKIE: [u8; 4] = [0x63, 0x82, 0x53, 0x63];
    const DISCOVER: u8 = 1;
    const OFFER: u8 = 2;
    const REQUEST: u8 = 3;
    const ACK: u8 = 5;
    const NAK: u8 = 6;
    const INFORM: u8 = 8;
    let ports = (word(packet.payload, 0)?, word(packet.payload, 2)?);
    let message = packet.payload.get(8..)?;
    if packet.protocol != UDP
        || ports != (68, 67)
        || message.get(..3)? != [1, 1, 6]
        || message.get(236..240)? != COOKIE
    {
        return None;
    }
    let options = Options(&message[240..]);
    let address = |at: &[u8]| <[u8; 4]>::try_from(at).ok().map(Ipv4Addr::from);
    // Requests for another server's offer are none of ours.
    if options.find(54).and_then(address).is_some_and(|server| server != GATEWAY_ADDRESS) {
        return None;
    }
    let client = address(message.get(12..16)?)?;
    let asked = options.find(50).and_then(address).or((!client.is_unspecified()).then_some(client));
    let kind = match *options.find(53)?.first()? {
        DISCOVER => OFFER,
        REQUEST if asked.is_some_and(|a| a != GUEST_ADDRESS) => NAK,
        REQUEST | INFORM => ACK,
        _ => return None,
    };
    let inform = options.find(53) == Some(&[INFORM]);
    let yours = if kind == NAK || inform { Ipv4Addr::UNSPECIFIED } else { GUEST_ADDRESS };
    let mut reply = vec![0; 236];
    reply[..4].copy_from_slice(&[2, 1, 6, 0]);
    reply[4..8].copy_from_slice(&message[4..8]);
    reply[10..12].copy_from_slice(&message[10..12]);
    reply[12..16].copy_from_slice(&message[12..16]);
    reply[16..20].copy_from_slice(&yours.octets());
    reply[28..44].copy_from_slice(&message[28..44]);
    reply.extend_from_slice(&COOKIE);
    let mut option = |code: u8, value: &[u8]| {
        reply.extend_from_slice(&[code, u8::try_from(value.len()).unwrap_or(0)]);
        reply.extend_from_slice(value);
    };
    option(53, &[kind]);
    option(54, &GATEWAY_ADDRESS.octets());
    if kind != NAK {
        if !inform {
            option(51, &LEASE.to_be_bytes());
        }
        option(1, &[255, 255, 255, 0]);
        option(3, &GATEWAY_ADDRESS.octets());
        option(6, &DNS.octets());
        option(26, &MTU.to_be_bytes());
    }
    reply.push(255);
    // RFC 2131, 4.1: to an address that the client has already, or else by broadcast; the frame goes to the client.
    let to = if client.is_unspecified() || kind == NAK { Ipv4Addr::BROADCAST } else { client };
    let mac = if kind == NAK { [0xff; 6] } else { guest };
    let payload = udp_payload(67, 68, &reply);
    ip_frame((mac, GATEWAY_MAC), (GATEWAY_ADDRESS.into(), to.into()), UDP, None, &payload)
}

/// DHCP's options (RFC 2132): code, length, value.
struct Options<'a>(&'a [u8]);

impl<'a> Options<'a> {
    fn find(&self, wanted: u8) -> Option<&'a [u8]> {
        let mut rest = self.0;
        loop {
            match *rest {
                [0, ref after @ ..] => rest = after,
                [255, ..] | [] | [_] => return None,
                [code, length, ref after @ ..] => {
                    let value = after.get(..usize::from(length))?;
                    if code == wanted {
                        return Some(value);
                    }
                    rest = &after[usize::from(length)..];
                }
            }
        }
    }
}
