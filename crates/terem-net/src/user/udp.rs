//! UDP and pings: each pair of ends is a connected socket of the host, as long as it is used.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{connect, ipproto, recv, send, socket_with};
use smoltcp::time::{Duration, Instant};

use super::GATEWAY_MAC;
use super::context::{Context, Token};
use super::packet::{ICMP, ICMPV6, Packet, UDP, ip_frame, udp_payload, word};

/// Flows at the same time.
const MAX_FLOWS: usize = 1024;
/// A flow that was not used for so long may be forgotten (RFC 4787, 4.3 asks for two minutes at least).
const IDLE: Duration = Duration::from_secs(300);
/// How often idle flows are looked for.
const SWEEP: Duration = Duration::from_secs(60);
/// Datagrams taken from a socket before others get their turn.
const BATCH: usize = 64;
/// The largest datagram.
const MAX_DATAGRAM: usize = 65_535;

/// Who talks to whom, as the guest sees it. For a ping the guest's "port" is its identifier, the other's is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ends {
    protocol: u8,
    guest: SocketAddr,
    peer: SocketAddr,
}

struct Flow {
    ends: Ends,
    host: OwnedFd,
    used: Instant,
}

/// All flows.
#[derive(Default)]
pub(super) struct Flows {
    all: HashMap<u64, Flow>,
    by_ends: HashMap<Ends, u64>,
    next: u64,
    /// Those with more datagrams than were taken at once.
    waiting: VecDeque<u64>,
    swept: Option<Instant>,
}

impl Flows {
    /// A packet of the guest's: UDP, or a ping of somebody outside.
    pub(super) fn take(&mut self, packet: &Packet<'_>, context: &mut Context<'_>) {
        let Some((ends, data)) = Self::ends(packet) else { return };
        let id = match self.by_ends.get(&ends) {
            Some(&id) => id,
            None => match self.open(ends, context) {
                Ok(id) => id,
                Err(error) => {
                    tracing::debug!(%error, peer = %ends.peer, "a datagram is dropped");
                    return;
                }
            },
        };
        let Some(flow) = self.all.get_mut(&id) else { return };
        flow.used = context.now;
        if let Err(error) = send(&flow.host, data, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            tracing::debug!(%error, peer = %ends.peer, "a datagram is dropped");
        }
    }

    fn ends<'a>(packet: &Packet<'a>) -> Option<(Ends, &'a [u8])> {
        let payload = packet.payload;
        let ends = |guest, peer| Ends {
            protocol: packet.protocol,
            guest: SocketAddr::new(packet.from, guest),
            peer: SocketAddr::new(packet.to, peer),
        };
        match packet.protocol {
            UDP => {
                let length = usize::from(word(payload, 4)?);
                let data = payload.get(8..length)?;
                Some((ends(word(payload, 0)?, word(payload, 2)?), data))
            }
            // Echo requests only; the host's kernel puts in an identifier of its own.
            ICMP if payload.starts_with(&[8, 0]) => Some((ends(word(payload, 4)?, 0), payload)),
            ICMPV6 if payload.starts_with(&[128, 0]) => Some((ends(word(payload, 4)?, 0), payload)),
            _ => None,
        }
    }

    fn open(&mut self, ends: Ends, context: &mut Context<'_>) -> Result<u64, Errno> {
        let address = context.host_address(ends.peer).ok_or(Errno::HOSTUNREACH)?;
        if self.all.len() >= MAX_FLOWS || self.swept.is_none_or(|swept| swept + SWEEP < context.now) {
            self.forget(context.now);
        }
        let v4 = address.is_ipv4();
        let family = if v4 { AddressFamily::INET } else { AddressFamily::INET6 };
        let protocol: Option<Protocol> = match ends.protocol {
            UDP => None,
            _ if v4 => Some(ipproto::ICMP),
            _ => Some(ipproto::ICMPV6),
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let host = socket_with(family, SocketType::DGRAM, flags, protocol)?;
        connect(&host, &address)?;
        self.next += 1;
        let id = self.next;
        context.watch(&host, Token::Udp(id));
        self.all.insert(id, Flow { ends, host, used: context.now });
        self.by_ends.insert(ends, id);
        Ok(id)
    }

    /// Forgets the idle ones; if there are none and no room either, then the one that was not used for the longest time.
    fn forget(&mut self, now: Instant) {
        self.swept = Some(now);
        let idle: Vec<u64> =
            self.all.iter().filter(|(_, f)| f.used + IDLE < now).map(|(&id, _)| id).collect();
        let oldest = || self.all.iter().min_by_key(|(_, f)| f.used).map(|(&id, _)| id);
        let gone = if idle.is_empty() && self.all.len() >= MAX_FLOWS {
            oldest().into_iter().collect()
        } else {
            idle
        };
        for id in gone {
            if let Some(flow) = self.all.remove(&id) {
                self.by_ends.remove(&flow.ends);
            }
        }
    }

    /// Datagrams have arrived at a host's socket.
    pub(super) fn host_event(&mut self, id: u64, context: &mut Context<'_>) {
        let Some(flow) = self.all.get_mut(&id) else { return };
        flow.used = context.now;
        let mut data = vec![0; MAX_DATAGRAM];
        for _ in 0..BATCH {
            match recv(&flow.host, &mut data[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => deliver(&flow.ends, &mut data[..length], context),
                // Refused: said once, and the next one may arrive.
                Err(Errno::INTR | Errno::CONNREFUSED) => {}
                Err(_) => return,
            }
        }
        self.waiting.push_back(id);
    }

    /// There is room for frames to the guest again.
    pub(super) fn go_on(&mut self, context: &mut Context<'_>) {
        for _ in 0..self.waiting.len() {
            if context.out.is_full() {
                return;
            }
            if let Some(id) = self.waiting.pop_front() {
                self.host_event(id, context);
            }
        }
    }
}

fn deliver(ends: &Ends, data: &mut [u8], context: &mut Context<'_>) {
    let datagram;
    let payload: &[u8] = if ends.protocol == UDP {
        datagram = udp_payload(ends.peer.port(), ends.guest.port(), data);
        &datagram
    } else {
        if data.len() < 8 {
            return;
        }
        data[4..6].copy_from_slice(&ends.guest.port().to_be_bytes());
        data
    };
    let addresses: (IpAddr, IpAddr) = (ends.peer.ip(), ends.guest.ip());
    let frame = ip_frame((context.guest, GATEWAY_MAC), addresses, ends.protocol, None, payload);
    if let Some(frame) = frame {
        context.out.push(frame);
    }
}
