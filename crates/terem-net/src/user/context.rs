//! What the protocols have at hand while they work: the time, the way to the guest, the host's addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::epoll;
use smoltcp::time::Instant;

use super::out::Out;
use super::packet::Mac;
use super::{DNS, DNS_PORT, DNS6, GATEWAY_ADDRESS, GATEWAY6, host};

/// What an event is about.
#[derive(Debug, Clone, Copy)]
pub(super) enum Token {
    Timer,
    Tcp(u64),
    Udp(u64),
    Listener(usize),
}

impl Token {
    pub(super) fn data(self) -> epoll::EventData {
        // Numbers are counted up from 1 and stay far below 2^62.
        epoll::EventData::new_u64(match self {
            Self::Timer => 0,
            Self::Tcp(id) => id << 2 | 1,
            Self::Udp(id) => id << 2 | 2,
            Self::Listener(index) => (index as u64) << 2 | 3,
        })
    }

    pub(super) fn from_data(data: epoll::EventData) -> Self {
        let number = data.u64();
        match number & 3 {
            0 => Self::Timer,
            1 => Self::Tcp(number >> 2),
            2 => Self::Udp(number >> 2),
            _ => Self::Listener(usize::try_from(number >> 2).unwrap_or(usize::MAX)),
        }
    }
}

/// What the protocols need while they work.
pub(super) struct Context<'a> {
    pub(super) now: Instant,
    pub(super) out: &'a mut Out,
    pub(super) guest: Mac,
    pub(super) checksum_agreed: bool,
    pub(super) name_server: Option<SocketAddr>,
    pub(super) epoll: BorrowedFd<'a>,
}

impl Context<'_> {
    /// Where a guest's packet goes on the host; `None` for what leads nowhere.
    pub(super) fn host_address(&self, guest_sees: SocketAddr) -> Option<SocketAddr> {
        let (ip, port) = (guest_sees.ip(), guest_sees.port());
        match ip {
            IpAddr::V4(GATEWAY_ADDRESS) => Some((Ipv4Addr::LOCALHOST, port).into()),
            IpAddr::V6(GATEWAY6) => Some((Ipv6Addr::LOCALHOST, port).into()),
            IpAddr::V4(DNS) | IpAddr::V6(DNS6) if port == DNS_PORT => {
                self.name_server.or_else(host::name_server)
            }
            IpAddr::V4(a) => {
                let ours = a.octets()[..3] == GATEWAY_ADDRESS.octets()[..3];
                (!ours && is_somebody(ip)).then_some(guest_sees)
            }
            IpAddr::V6(a) => {
                let ours = a.octets()[..8] == GATEWAY6.octets()[..8];
                let other = a.is_unicast_link_local() || a.to_ipv4_mapped().is_some();
                (!ours && !other && is_somebody(ip)).then_some(guest_sees)
            }
        }
    }

    pub(super) fn watch(&self, socket: &OwnedFd, token: Token) {
        let edges =
            epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        if let Err(error) = epoll::add(self.epoll, socket, token.data(), edges) {
            tracing::warn!(%error, ?token, "a socket cannot be watched");
        }
    }

    /// Not to be guessed by others than the peers: sequence numbers start from it.
    #[allow(clippy::unused_self, reason = "a part of what the host gives")]
    pub(super) fn random(&self) -> u64 {
        let mut bytes = [0; 8];
        let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
        u64::from_ne_bytes(bytes)
    }
}

/// Can one answer to this address?
pub(super) fn is_somebody(address: IpAddr) -> bool {
    let broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    !address.is_unspecified() && !address.is_multicast() && !address.is_loopback() && !broadcast
}
