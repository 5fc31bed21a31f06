//! User-mode networking: the guest's TCP and UDP become sockets of this process, which takes no privileges.
//!
//! ```text
//!  guest ──transmit──> frame ─┬─ ARP, NDP, DHCP, pings of the router ──> answered here       (local.rs)
//!                             ├─ TCP ──> smoltcp, one connection each ──> the host's sockets (tcp.rs)
//!                             └─ UDP, other pings ───────────────────────> the host's sockets (udp.rs)
//!        <──receive─── frames that wait (out.rs) <── what the host's sockets have, by epoll
//! ```
//!
//! The guest sees a network of its own, the same on every host (QEMU's user-mode addresses, which people know): it
//! is 10.0.2.15 in 10.0.2.0/24, its router is 10.0.2.2, its name server 10.0.2.3; for IPv6 it is in fd00::/64, with
//! the router fe80::2 and the name server fd00::3. At 10.0.2.2 and fd00::2 are the host's own loopback services.
//! Where the host has no way out for IPv6, the guest is offered none.
//!
//! There is no thread: all work is done in the calls of the device's own, under one lock. What wakes the device is
//! one epoll descriptor with all sockets in it. They are watched for edges, and what an edge said is remembered, so
//! that data which nobody has room for now wakes nobody again and again.
//!
//! IP fragments are dropped: with an MTU of 65,520 a guest has no reason to send any.

mod context;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
mod host;
mod local;
mod out;
mod packet;
mod tcp;
mod udp;
mod wire;

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recvfrom, sendto};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};
use smoltcp::time::Instant;
use thiserror::Error;

use self::context::{Context, Token, is_somebody};
use self::out::Out;
use self::packet::{
    ETHER_ARP, ETHER_IPV4, ETHER_IPV6, ICMP, ICMPV6, Mac, Packet, TCP, UDP, ip_frame, udp_payload,
};
use crate::{
    Forward, ForwardError, MIN_FRAME, NetBackend, Offloads, Protocol, Received, Transmit, VnetHeader,
};

/// The guest's address by DHCP.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The router's address, which is also the way to the host's own services.
pub const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server's address.
const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The router's link-local address.
const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// The host's own services, for IPv6.
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
/// The name server, for IPv6.
const DNS6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 3);
/// The router's MAC address: locally administered, with its IP address in it.
const GATEWAY_MAC: Mac = [0x52, 0x55, 10, 0, 2, 2];
/// The largest MTU, rounded down to 32 bits.
const MTU: u16 = 65_520;
const DNS_PORT: u16 = 53;
/// Events taken at once.
const EVENTS: usize = 64;
/// Peers of a forwarded UDP port that are remembered, to bring the guest's answers to them.
const UDP_PEERS: usize = 256;

/// What to set up besides the guest's way out.
#[derive(Debug, Clone, Default)]
pub struct UserOptions {
    /// Ports that lead into the guest.
    pub forwards: Vec<Forward>,
    /// Who answers the guest's name queries; the host's own first name server when `None`.
    pub name_server: Option<SocketAddr>,
}

/// Why user-mode networking cannot be had.
#[derive(Debug, Error)]
pub enum UserNetError {
    /// A port cannot be forwarded.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The host gives no descriptors.
    #[error("cannot set up user-mode networking: {0}")]
    Host(#[from] io::Error),
}

/// User-mode networking for one guest.
pub struct UserNet {
    epoll: OwnedFd,
    inner: Mutex<Inner>,
}

struct Inner {
    began: std::time::Instant,
    timer: OwnedFd,
    /// When the timer fires.
    armed: Option<Instant>,
    out: Out,
    /// The guest's address on the wire, from its last frame.
    guest: Mac,
    checksum_agreed: bool,
    way_out6: bool,
    name_server: Option<SocketAddr>,
    connections: tcp::Connections,
    flows: udp::Flows,
    listeners: Vec<Listener>,
    /// Ports of the router's behind which a forwarded datagram's sender stands.
    udp_peers: HashMap<u16, (usize, SocketAddr)>,
    next_udp_peer: u16,
}

struct Listener {
    socket: OwnedFd,
    protocol: Protocol,
    guest_port: u16,
}

/// Nothing that is done under the lock leaves things half done for the next one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl UserNet {
    /// Listens on the ports to forward; all else begins with the guest's frames.
    ///
    /// # Errors
    /// [`UserNetError`].
    pub fn start(options: &UserOptions) -> Result<Self, UserNetError> {
        let errors = io::Error::from;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(errors)?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags).map_err(errors)?;
        epoll::add(&epoll, &timer, Token::Timer.data(), epoll::EventFlags::IN).map_err(errors)?;
        let mut listeners = Vec::new();
        for forward in &options.forwards {
            for socket in forward.listen()? {
                let token = Token::Listener(listeners.len());
                let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
                epoll::add(&epoll, &socket, token.data(), edges).map_err(errors)?;
                listeners.push(Listener {
                    socket,
                    protocol: forward.protocol,
                    guest_port: forward.guest_port,
                });
            }
        }
        let inner = Inner {
            began: std::time::Instant::now(),
            timer,
            armed: None,
            out: Out::default(),
            guest: [0xff; 6],
            checksum_agreed: false,
            way_out6: host::has_ipv6(),
            name_server: options.name_server,
            connections: tcp::Connections::default(),
            flows: udp::Flows::default(),
            listeners,
            udp_peers: HashMap::new(),
            next_udp_peer: 0,
        };
        Ok(Self { epoll, inner: Mutex::new(inner) })
    }
}

impl std::fmt::Debug for UserNet {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("UserNet").finish_non_exhaustive()
    }
}

impl Inner {
    fn context<'a>(
        &'a mut self,
        epoll: &'a OwnedFd,
    ) -> (&'a mut tcp::Connections, &'a mut udp::Flows, Context<'a>) {
        let now = Instant::from_micros(i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX));
        let context = Context {
            now,
            out: &mut self.out,
            guest: self.guest,
            checksum_agreed: self.checksum_agreed,
            name_server: self.name_server,
            epoll: epoll.as_fd(),
        };
        (&mut self.connections, &mut self.flows, context)
    }

    fn take(&mut self, frame: &[u8], epoll: &OwnedFd) {
        let (Some(ether_type), Ok(source)) = (packet::word(frame, 12), frame[6..12].try_into()) else {
            return;
        };
        self.guest = source;
        let body = &frame[MIN_FRAME..];
        let packet = match ether_type {
            ETHER_ARP => {
                self.out_opt(local::arp(body));
                return;
            }
            ETHER_IPV4 => Packet::ipv4(body),
            ETHER_IPV6 => Packet::ipv6(body),
            _ => None,
        };
        let Some(packet) = packet else { return };
        match packet.protocol {
            TCP if is_somebody(packet.from) => {
                let (connections, _, mut context) = self.context(epoll);
                connections.take(&packet, &mut context);
            }
            UDP | ICMP | ICMPV6 => self.datagram(&packet, epoll),
            _ => {}
        }
        self.arm();
    }

    fn datagram(&mut self, packet: &Packet<'_>, epoll: &OwnedFd) {
        let here = match packet.protocol {
            UDP => local::dhcp(packet, self.guest),
            _ => local::echo(packet, self.guest)
                .or_else(|| local::neighbour(packet, self.guest, self.way_out6)),
        };
        if here.is_some() {
            self.out_opt(here);
        } else if is_somebody(packet.from) && !self.answers_forwarded(packet) {
            let (_, flows, mut context) = self.context(epoll);
            flows.take(packet, &mut context);
        }
    }

    fn out_opt(&mut self, frame: Option<Vec<u8>>) {
        if let Some(frame) = frame {
            self.out.push(frame);
        }
    }

    /// Takes what has happened on the host's side.
    fn host_events(&mut self, epoll: &OwnedFd) -> Result<(), Errno> {
        let mut events = Vec::with_capacity(EVENTS);
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        match epoll::wait(epoll, spare_capacity(&mut events), Some(&at_once)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        for event in &events {
            match Token::from_data(event.data) {
                Token::Timer => {
                    let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                    self.armed = None;
                    let (connections, _, mut context) = self.context(epoll);
                    connections.timers(&mut context);
                }
                Token::Tcp(id) => {
                    let (connections, _, mut context) = self.context(epoll);
                    connections.host_event(id, &mut context);
                }
                Token::Udp(id) => {
                    let (_, flows, mut context) = self.context(epoll);
                    flows.host_event(id, &mut context);
                }
                Token::Listener(index) => self.arrival(index, epoll),
            }
        }
        let (connections, flows, mut context) = self.context(epoll);
        connections.go_on(&mut context);
        flows.go_on(&mut context);
        self.arm();
        Ok(())
    }

    /// Somebody wants to reach the guest by a forwarded port.
    fn arrival(&mut self, index: usize, epoll: &OwnedFd) {
        let Some(listener) = self.listeners.get(index) else { return };
        let guest_port = listener.guest_port;
        if listener.protocol == Protocol::Tcp {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            // Those that this process has no descriptors for wait for the next one's arrival.
            while let Some(listener) = self.listeners.get(index)
                && let Ok(host) = accept_with(&listener.socket, flags)
            {
                let (connections, _, mut context) = self.context(epoll);
                connections.forward(host, guest_port, &mut context);
            }
            return;
        }
        let mut data = vec![0; usize::from(u16::MAX)];
        while let Some(listener) = self.listeners.get(index)
            && let Ok((length, _, from)) = recvfrom(&listener.socket, &mut data[..], RecvFlags::DONTWAIT)
        {
            let Some(Ok(from)) = from.map(SocketAddr::try_from) else { continue };
            let port = self.udp_peer(index, from);
            let payload = udp_payload(port, guest_port, &data[..length]);
            let addresses = (GATEWAY_ADDRESS.into(), GUEST_ADDRESS.into());
            if self.out.is_full() {
                // The rest is the network's loss, as everywhere.
                continue;
            }
            self.out_opt(ip_frame((self.guest, GATEWAY_MAC), addresses, UDP, None, &payload));
        }
    }

    /// The router's port behind which somebody who uses a forwarded port stands.
    fn udp_peer(&mut self, listener: usize, peer: SocketAddr) -> u16 {
        let known =
            self.udp_peers.iter().find(|(_, known)| **known == (listener, peer)).map(|(&port, _)| port);
        known.unwrap_or_else(|| {
            if self.udp_peers.len() >= UDP_PEERS {
                self.udp_peers.clear();
            }
            // The dynamic ports (RFC 6335, 6).
            self.next_udp_peer = self.next_udp_peer.wrapping_add(1) | 0xc000;
            self.udp_peers.insert(self.next_udp_peer, (listener, peer));
            self.next_udp_peer
        })
    }

    /// A datagram to the router that answers one of [`Self::arrival`]'s.
    fn answers_forwarded(&self, packet: &Packet<'_>) -> bool {
        if packet.protocol != UDP || packet.to != GATEWAY_ADDRESS {
            return false;
        }
        let ports = (packet::word(packet.payload, 0), packet::word(packet.payload, 2));
        let (Some(source), Some(target)) = ports else { return false };
        let Some((index, peer)) = self.udp_peers.get(&target) else { return false };
        let Some(listener) = self.listeners.get(*index).filter(|l| l.guest_port == source) else {
            return false;
        };
        let data = packet.payload.get(8..).unwrap_or_default();
        if let Err(error) = sendto(&listener.socket, data, SendFlags::NOSIGNAL | SendFlags::DONTWAIT, peer) {
            tracing::debug!(%error, %peer, "a datagram is dropped");
        }
        true
    }

    /// Sets the timer to the first deadline.
    fn arm(&mut self) {
        let deadline = self.connections.deadline();
        if deadline == self.armed || deadline.is_none() {
            return;
        }
        if let Some(deadline) = deadline
            && self.armed.is_none_or(|armed| deadline < armed)
        {
            let now = i64::try_from(self.began.elapsed().as_micros()).unwrap_or(i64::MAX);
            let wait = (deadline.total_micros() - now).max(1);
            let value = Timespec { tv_sec: wait / 1_000_000, tv_nsec: wait % 1_000_000 * 1000 };
            let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
            if timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once).is_ok() {
                self.armed = Some(deadline);
            }
        }
    }
}

impl NetBackend for UserNet {
    fn description(&self) -> String {
        "user-mode network".to_owned()
    }

    fn link_up(&self) -> bool {
        true
    }

    fn mtu(&self) -> Option<u16> {
        Some(MTU)
    }

    /// A large segment goes on as it is, and nobody looks at a checksum that came by memory.
    fn transmit_offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn receive_offloads(&self) -> Offloads {
        Offloads::CHECKSUM
    }

    fn set_receive_offloads(&self, agreed: Offloads) -> io::Result<()> {
        lock(&self.inner).checksum_agreed = agreed.contains(Offloads::CHECKSUM);
        Ok(())
    }

    fn transmit(&self, _: &VnetHeader, frame: &[IoSlice<'_>]) -> io::Result<Transmit> {
        match frame {
            [whole] if whole.len() >= MIN_FRAME => lock(&self.inner).take(whole, &self.epoll),
            _ => match crate::gather(frame) {
                Some(frame) if frame.len() >= MIN_FRAME => lock(&self.inner).take(&frame, &self.epoll),
                _ => tracing::debug!("dropping a frame of an impossible length"),
            },
        }
        Ok(Transmit::Taken)
    }

    fn has_unsent(&self) -> bool {
        false
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn receive(&self, frame: &mut [u8]) -> io::Result<Option<Received>> {
        let mut inner = lock(&self.inner);
        loop {
            if inner.out.is_empty() {
                inner.host_events(&self.epoll)?;
            }
            let Some(next) = inner.out.pop() else { return Ok(None) };
            let Some(target) = frame.get_mut(..next.len()) else {
                tracing::debug!(length = next.len(), "dropping a frame that does not fit the buffer");
                continue;
            };
            target.copy_from_slice(&next);
            let header = VnetHeader { checksum_valid: inner.checksum_agreed, ..VnetHeader::default() };
            let received = Received { header, length: next.len() };
            inner.out.recycle(next);
            return Ok(Some(received));
        }
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }
}

#[cfg(test)]
mod tests;
