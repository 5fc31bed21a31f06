//! Reaching a server: the socket, TLS and the negotiation, with a deadline.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::negotiate::{Terms, choose, greet, start_tls};
use crate::OpenError;
use crate::nbd::channel::{Channel, Secure};
use crate::nbd::tls::ClientTls;
use crate::nbd::uri::{NbdUri, Place};

/// How long a connection to one address may take, and then the negotiation.
const LIMIT: Duration = Duration::from_secs(10);

/// A connection that is ready for requests.
pub(super) struct Connected {
    pub(super) fd: OwnedFd,
    pub(super) session: Option<Box<rustls::Connection>>,
    pub(super) terms: Terms,
}

/// Connects to `uri` and negotiates; blocks.
pub(super) fn connect(uri: &NbdUri, tls: Option<&ClientTls>) -> Result<Connected, OpenError> {
    let fail = |doing: &'static str, reason: String| OpenError::Server {
        path: uri.text.clone().into(),
        doing,
        reason,
    };
    let socket = reach(&uri.place).map_err(|error| fail("cannot reach the server", reason(&error)))?;
    let mut peer = Secure::Plain(Channel::new(socket, LIMIT));
    let negotiating = "cannot agree with the server";
    greet(&mut peer).map_err(|e| fail(negotiating, e.to_string()))?;
    if let Some(tls) = tls {
        start_tls(&mut peer).map_err(|e| fail("cannot have TLS with the server", e.to_string()))?;
        let session = tls.session(uri.server_name());
        let secured = session.and_then(|session| match peer {
            Secure::Plain(channel) => Secure::with_tls(channel, session),
            secure @ Secure::Tls(..) => Ok(secure),
        });
        peer = secured.map_err(|error| fail("cannot have TLS with the server", tls_reason(&error)))?;
    }
    let terms = choose(&mut peer, &uri.export).map_err(|e| fail(negotiating, e.to_string()))?;
    let (fd, session) = peer.into_parts();
    Ok(Connected { fd, session, terms })
}

fn reach(place: &Place) -> io::Result<OwnedFd> {
    match place {
        Place::Unix(path) => Ok(UnixStream::connect(path)?.into()),
        Place::Tcp(host, port) => {
            let mut last = io::Error::from(io::ErrorKind::NotFound);
            for address in (host.as_str(), *port).to_socket_addrs()? {
                match TcpStream::connect_timeout(&address, LIMIT) {
                    Ok(stream) => {
                        stream.set_nodelay(true)?;
                        let fd = OwnedFd::from(stream);
                        rustix::net::sockopt::set_socket_keepalive(&fd, true)?;
                        return Ok(fd);
                    }
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such socket or host".into(),
        io::ErrorKind::ConnectionRefused => "nobody listens there".into(),
        _ => error.to_string(),
    }
}

fn tls_reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            "it hung up in the handshake; it may want a certificate of ours (client-cert.pem)".into()
        }
        _ => error.to_string(),
    }
}
