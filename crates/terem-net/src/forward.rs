//! Port forwards: ports of the host that lead into the guest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::{fmt, io};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// A transport protocol whose ports can be forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host that leads into the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Forward {
    /// What is forwarded.
    pub protocol: Protocol,
    /// The host's address to listen on; all of them, IPv4 and IPv6, when `None`.
    pub address: Option<IpAddr>,
    /// The host's port; never 0.
    pub host_port: u16,
    /// The guest's port; never 0.
    pub guest_port: u16,
}

/// Why a port cannot be forwarded.
#[derive(Debug, Error)]
pub enum ForwardError {
    /// It is taken by another process.
    #[error(
        "cannot forward {protocol} port {port}: {address}:{port} is in use by another process; choose another host port"
    )]
    InUse {
        /// TCP or UDP.
        protocol: Protocol,
        /// The address on which it is in use.
        address: IpAddr,
        /// The host's port.
        port: u16,
    },
    /// It cannot be listened on.
    #[error("cannot forward {protocol} port {port} of {address}: {source}{hint}")]
    Listen {
        /// TCP or UDP.
        protocol: Protocol,
        /// The host's address.
        address: IpAddr,
        /// The host's port.
        port: u16,
        /// The host kernel's reason.
        source: io::Error,
        /// What to do, or nothing.
        hint: &'static str,
    },
}

impl Forward {
    /// The sockets that listen: one for each address.
    pub(crate) fn listen(&self) -> Result<Vec<OwnedFd>, ForwardError> {
        let Self { protocol, host_port: port, .. } = *self;
        let addresses: Vec<IpAddr> = match self.address {
            Some(address) => vec![address],
            None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
        };
        let mut sockets = Vec::new();
        for address in addresses {
            match listening(protocol, SocketAddr::new(address, port)) {
                Ok(socket) => sockets.push(socket),
                Err(Errno::ADDRINUSE) => return Err(ForwardError::InUse { protocol, address, port }),
                // A host without IPv6 forwards IPv4 only.
                Err(_) if self.address.is_none() && address.is_ipv6() => {}
                Err(error) => {
                    let hint = match error {
                        Errno::ACCESS | Errno::PERM => "; choose a host port from 1024 on",
                        Errno::ADDRNOTAVAIL => "; this host has no such address",
                        _ => "",
                    };
                    return Err(ForwardError::Listen { protocol, address, port, source: error.into(), hint });
                }
            }
        }
        Ok(sockets)
    }
}

fn listening(protocol: Protocol, at: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if at.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let kind = match protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    if at.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    if protocol == Protocol::Tcp {
        // The port of a machine that has just ended can be had at once.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &at)?;
    if protocol == Protocol::Tcp {
        listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn names_the_port_that_is_in_use() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let forward = Forward {
            protocol: Protocol::Tcp,
            address: Some(Ipv4Addr::LOCALHOST.into()),
            host_port: port,
            guest_port: 22,
        };
        let error = forward.listen().unwrap_err();
        assert!(matches!(error, ForwardError::InUse { port: found, .. } if found == port));
        assert!(error.to_string().contains(&format!("127.0.0.1:{port} is in use")), "{error}");
        drop(taken);
        assert_eq!(forward.listen().unwrap().len(), 1);
        let everywhere = Forward { address: None, ..forward };
        assert!(!everywhere.listen().unwrap().is_empty());
        let elsewhere = Forward { address: Some("192.0.2.77".parse().unwrap()), ..forward };
        assert!(elsewhere.listen().unwrap_err().to_string().contains("no such address"));
    }
}
