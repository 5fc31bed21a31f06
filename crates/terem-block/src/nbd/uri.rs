//! NBD addresses, as the NBD project's `doc/uri.md` describes them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::protocol::PORT;
use crate::OpenError;

/// Longest time for which a lost connection is tried again, in seconds.
const MAX_RECONNECT: u64 = 24 * 60 * 60;

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// Host name or address, and port.
    Tcp(String, u16),
    /// A Unix socket.
    Unix(PathBuf),
}

/// An NBD address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NbdUri {
    /// As it was given.
    pub(crate) text: String,
    pub(crate) place: Place,
    pub(crate) export: String,
    /// Whether TLS is wanted.
    pub(crate) tls: bool,
    /// Where `ca-cert.pem` (and `client-cert.pem`, `client-key.pem`) are.
    pub(crate) certificates: Option<PathBuf>,
    /// The name in the server's certificate, if it is not the host's.
    pub(crate) tls_hostname: Option<String>,
    /// How long a lost connection is tried again while requests wait; zero: not at all.
    pub(crate) reconnect: Duration,
}

impl NbdUri {
    /// Whether a disk's name is meant as an NBD address.
    pub(crate) fn is_meant(path: &Path) -> bool {
        path.to_str().is_some_and(|text| {
            ["nbd://", "nbds://", "nbd+unix://", "nbds+unix://"].iter().any(|scheme| text.starts_with(scheme))
        })
    }

    /// Reads an address.
    ///
    /// # Errors
    /// [`OpenError::Address`] says what is wrong with it.
    pub(crate) fn parse(path: &Path) -> Result<Self, OpenError> {
        let fail = |reason: &str| OpenError::Address { path: path.to_owned(), reason: reason.into() };
        let text = path.to_str().ok_or_else(|| fail("it is no text"))?;
        let (scheme, rest) = text.split_once("://").ok_or_else(|| fail("it has no ://"))?;
        let (tls, unix) = match scheme {
            "nbd" => (false, false),
            "nbds" => (true, false),
            "nbd+unix" => (false, true),
            "nbds+unix" => (true, true),
            _ => return Err(fail("it is none of nbd://, nbds://, nbd+unix:// and nbds+unix://")),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        let decode = |part: &str| percent_decoded(part).ok_or_else(|| fail("it has a % without two digits"));
        let mut uri = Self {
            text: text.to_owned(),
            place: Place::Unix(PathBuf::new()),
            export: decode(export)?,
            tls,
            certificates: None,
            tls_hostname: None,
            reconnect: Duration::ZERO,
        };
        let mut socket = None;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(value)?;
            match key {
                "socket" => socket = Some(PathBuf::from(value)),
                "tls-certificates" => uri.certificates = Some(PathBuf::from(value)),
                "tls-hostname" => uri.tls_hostname = Some(value),
                "reconnect-delay" => {
                    let seconds = value.parse().ok().filter(|&s| s <= MAX_RECONNECT);
                    let seconds =
                        seconds.ok_or_else(|| fail("reconnect-delay is a number of seconds, up to a day"))?;
                    uri.reconnect = Duration::from_secs(seconds);
                }
                _ => {
                    let reason = format!(
                        "{key} is not known; there are socket, tls-certificates, tls-hostname and reconnect-delay"
                    );
                    return Err(fail(&reason));
                }
            }
        }
        uri.place = match (unix, socket) {
            (true, Some(socket)) if !authority.is_empty() => {
                let socket = socket.display();
                return Err(fail(&format!("a Unix socket has no host: nbd+unix:///EXPORT?socket={socket}")));
            }
            (true, Some(socket)) => Place::Unix(socket),
            (true, None) => return Err(fail("it does not say which socket: nbd+unix:///EXPORT?socket=PATH")),
            (false, Some(_)) => return Err(fail("socket= goes with nbd+unix://")),
            (false, None) => {
                let (host, port) = host_and_port(authority)
                    .ok_or_else(|| fail("it has no host and port: nbd://HOST[:PORT]/EXPORT"))?;
                Place::Tcp(decode(host)?, port)
            }
        };
        Ok(uri)
    }

    /// The name that the server's certificate must have.
    pub(crate) fn server_name(&self) -> &str {
        match (&self.tls_hostname, &self.place) {
            (Some(name), _) => name,
            (None, Place::Tcp(host, _)) => host,
            (None, Place::Unix(_)) => "localhost",
        }
    }
}

/// `host`, `host:port`, `[address]` or `[address]:port`.
fn host_and_port(authority: &str) -> Option<(&str, u16)> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']')?;
            let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) };
            (host, port)
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let port = match port {
        None | Some("") => PORT,
        Some(port) => port.parse().ok()?,
    };
    (!host.is_empty()).then_some((host, port))
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first == b'%' {
            let digits = std::str::from_utf8(after.get(..2)?).ok()?;
            if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
                return None;
            }
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &after[2..];
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<NbdUri, String> {
        NbdUri::parse(Path::new(text)).map_err(|e| e.to_string())
    }

    #[test]
    fn addresses() {
        let tcp = |host: &str, port| Place::Tcp(host.into(), port);
        for (text, place, export, tls) in [
            ("nbd://host", tcp("host", PORT), "", false),
            ("nbd://host/", tcp("host", PORT), "", false),
            ("nbd://host:1234/a%20b/c", tcp("host", 1234), "a b/c", false),
            ("nbds://[::1]:7/x", tcp("::1", 7), "x", true),
            ("nbds://[::1]", tcp("::1", PORT), "", true),
            ("nbd+unix:///x?socket=/run/a", Place::Unix("/run/a".into()), "x", false),
            ("nbds+unix://?socket=a%3fb", Place::Unix("a?b".into()), "", true),
        ] {
            let uri = parse(text).expect(text);
            assert_eq!((uri.place, uri.export.as_str(), uri.tls), (place, export, tls), "{text}");
            assert!(NbdUri::is_meant(Path::new(text)));
        }
        let uri = parse("nbds://h/e?tls-certificates=/pki&tls-hostname=n&reconnect-delay=5").expect("good");
        assert_eq!(uri.certificates, Some("/pki".into()));
        assert_eq!((uri.server_name(), uri.reconnect), ("n", Duration::from_secs(5)));
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (text, part) in [
            ("nbd://", "no host"),
            ("nbd://h:99999/", "no host and port"),
            ("nbd://h/%zz", "two digits"),
            ("nbd+unix:///x", "which socket"),
            ("nbd+unix://h/x?socket=/a", "no host"),
            ("nbd://h/x?socket=/a", "nbd+unix"),
            ("nbd://h/x?frob=1", "frob"),
            ("nbd://h/x?reconnect-delay=long", "seconds"),
            ("nbd+vsock://1/x", "none of"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
