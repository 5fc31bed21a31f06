//! Debugging the guest from outside, with gdb.

use crate::error::{ConfigError, quote};
use crate::key_value::KeyValue;
use crate::machine::MAX_SOCKET_PATH;
use crate::text::{TextError, text_type};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

const EXPECTED: &str = "PORT, [tcp:][HOST]:PORT or unix:PATH, such as 1234 or unix:/run/user/1000/gdb.sock";

/// Lets gdb look into the guest and steer it. Who can connect can do all that the guest can. `--gdb 1234,wait`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GdbConfig {
    /// Where gdb connects (main key): `PORT`, `[tcp:][HOST]:PORT` or `unix:PATH`. Without HOST it is the host's
    /// loopback address; port 0 takes a free one, which is told.
    pub listen: GdbAddress,
    /// Whether the guest stands still at its first instruction until gdb lets it go on.
    #[serde(default)]
    pub wait: bool,
}

impl KeyValue for GdbConfig {
    const MAIN_KEY: &'static str = "listen";
}

impl GdbConfig {
    pub(crate) fn validate(&self, errors: &mut Vec<ConfigError>) {
        if let GdbAddress::Unix(path) = &self.listen
            && path.as_os_str().len() > MAX_SOCKET_PATH
        {
            errors.push(ConfigError::value(
                "gdb.listen",
                quote(&self.listen),
                "the path is too long for a socket",
                format!("up to {MAX_SOCKET_PATH} bytes"),
            ));
        }
    }
}

/// Where gdb connects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GdbAddress {
    /// A TCP port.
    Tcp {
        /// Name or address of a network interface of the host's.
        host: String,
        /// The port; 0 for a free one.
        port: u16,
    },
    /// A Unix stream socket.
    Unix(PathBuf),
}

impl FromStr for GdbAddress {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        const LOOPBACK: &str = "127.0.0.1";
        let wrong = |why: &str| TextError::new(why, EXPECTED);
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err(wrong("its path is empty"))
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        let rest = text.strip_prefix("tcp:").unwrap_or(text);
        let (host, port) = rest.rsplit_once(':').unwrap_or(("", rest));
        let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let port =
            port.parse().ok().filter(|_| digits).ok_or_else(|| wrong("its port is no number up to 65535"))?;
        let name = host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-'));
        let v6 = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let host = match v6 {
            Some(v6) if v6.parse::<std::net::Ipv6Addr>().is_ok() => v6,
            None if host.is_empty() => LOOPBACK,
            None if name => host,
            _ => return Err(wrong("its host can't be read")),
        };
        Ok(Self::Tcp { host: host.into(), port })
    }
}

impl fmt::Display for GdbAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

text_type!(
    GdbAddress,
    "GdbAddress",
    r"^(unix:.+|(tcp:)?(([0-9A-Za-z.-]*|\[[0-9A-Fa-f:.]+\]):)?[0-9]+)$",
    "Where gdb connects: `PORT`, `[tcp:][HOST]:PORT` or `unix:PATH`"
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::from_key_values;

    #[test]
    fn forms() {
        let cases = [
            ("1234", "127.0.0.1:1234"),
            ("tcp::1234", "127.0.0.1:1234"),
            ("localhost:0", "localhost:0"),
            ("tcp:0.0.0.0:99", "0.0.0.0:99"),
            ("[::1]:1234", "[::1]:1234"),
            ("unix:/tmp/a:b", "unix:/tmp/a:b"),
        ];
        for (text, canonical) in cases {
            let address: GdbAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), canonical);
            assert_eq!(canonical.parse(), Ok(address));
        }
        for text in ["", "unix:", "tcp:", ":", "70000", "+1", "::1:1", "[::1:1", "a b:1", "host:"] {
            assert!(text.parse::<GdbAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_flag_is_as_qemu_users_expect() {
        let gdb: GdbConfig = from_key_values("1234,wait").unwrap();
        assert_eq!((gdb.listen.to_string().as_str(), gdb.wait), ("127.0.0.1:1234", true));
        assert!(!from_key_values::<GdbConfig>("unix:/x").unwrap().wait);
        let mut errors = Vec::new();
        let long = format!("unix:/{}", "x".repeat(200));
        from_key_values::<GdbConfig>(&long).unwrap().validate(&mut errors);
        assert_eq!(errors.len(), 1);
    }
}
