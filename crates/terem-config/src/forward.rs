//! Ports of the host that lead into the guest.

use crate::text::{TextError, text_type};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;
use std::str::FromStr;

const EXPECTED: &str = "tcp:[HOSTADDR:]HOSTPORT:GUESTPORT or udp:…, such as tcp:2222:22 or tcp:[::1]:8080:80";

/// Transport protocol of a forwarded port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A forwarded port, written `tcp:[HOSTADDR:]HOSTPORT:GUESTPORT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Forward {
    /// Transport protocol.
    pub protocol: Protocol,
    /// The host's address to listen on; `None` is the loopback address: a guest is opened to the world only where that
    /// is asked for (`tcp:0.0.0.0:2222:22`).
    pub host_address: Option<IpAddr>,
    /// The host's port.
    pub host_port: NonZeroU16,
    /// The guest's port.
    pub guest_port: NonZeroU16,
}

impl Forward {
    /// The address that is listened on.
    pub fn listen_address(&self) -> IpAddr {
        self.host_address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
    }
}

impl FromStr for Forward {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        let wrong = |why: &str| TextError::new(why, EXPECTED);
        let (protocol, rest) = text.split_once(':').ok_or_else(|| wrong("it is no port forward"))?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(wrong("its protocol is neither tcp nor udp")),
        };
        let (rest, guest_port) = rest.rsplit_once(':').ok_or_else(|| wrong("it has no guest port"))?;
        let (address, host_port) = match rest.rsplit_once(':') {
            Some((address, port)) => (Some(address), port),
            None => (None, rest),
        };
        let port = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            text.parse().ok().filter(|_| digits).ok_or_else(|| wrong("a port is no number from 1 to 65535"))
        };
        let address = match address {
            None | Some("") => None,
            Some(text) => match text.strip_prefix('[').and_then(|t| t.strip_suffix(']')) {
                Some(v6) => {
                    Some(v6.parse().map(IpAddr::V6).map_err(|_| wrong("its IPv6 address can't be read"))?)
                }
                None => {
                    Some(text.parse().map(IpAddr::V4).map_err(|_| wrong("its host address can't be read"))?)
                }
            },
        };
        Ok(Self {
            protocol,
            host_address: address,
            host_port: port(host_port)?,
            guest_port: port(guest_port)?,
        })
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.protocol {
            Protocol::Tcp => "tcp:",
            Protocol::Udp => "udp:",
        })?;
        match self.host_address {
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            None => {}
        }
        write!(f, "{}:{}", self.host_port, self.guest_port)
    }
}

text_type!(
    Forward,
    "Forward",
    r"^(tcp|udp):(([0-9.]+|\[[0-9A-Fa-f:.]+\]):)?[0-9]+:[0-9]+$",
    "A forwarded port: `tcp:[HOSTADDR:]HOSTPORT:GUESTPORT` or `udp:…`; without HOSTADDR on the host's loopback address"
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn forms() {
        let f: Forward = "tcp:2222:22".parse().unwrap();
        assert_eq!(
            (f.host_port.get(), f.guest_port.get(), f.listen_address()),
            (2222, 22, Ipv4Addr::LOCALHOST.into())
        );
        let f: Forward = "udp:[::1]:53:5353".parse().unwrap();
        assert_eq!((f.protocol, f.listen_address().to_string().as_str()), (Protocol::Udp, "::1"));
        assert_eq!("tcp::80:80".parse::<Forward>().unwrap().host_address, None);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "tcp",
            "tcp:22",
            "sctp:1:1",
            "tcp:0:22",
            "tcp:70000:22",
            "tcp:+1:22",
            "tcp:::1:1:1",
            "tcp:host:1:1",
            "tcp:1:",
        ] {
            assert!(text.parse::<Forward>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn print_and_parse(tcp: bool, address: Option<IpAddr>, host_port: NonZeroU16, guest_port: NonZeroU16) {
            let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
            let forward = Forward { protocol, host_address: address, host_port, guest_port };
            prop_assert_eq!(forward.to_string().parse(), Ok(forward));
        }
    }
}
