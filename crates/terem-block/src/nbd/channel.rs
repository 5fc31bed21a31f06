//! A stream socket during negotiation: blocking, with a deadline for the whole of it, plain or TLS.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags};

/// A plain stream socket. What is read and written must be done by the deadline, however slowly the peer goes.
pub(crate) struct Channel {
    fd: OwnedFd,
    deadline: Instant,
}

impl Channel {
    pub(crate) fn new(fd: impl Into<OwnedFd>, limit: Duration) -> Self {
        Self { fd: fd.into(), deadline: Instant::now() + limit }
    }

    fn wait(&self, events: PollFlags) -> io::Result<()> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it took too long"));
            }
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(&self.fd, events)], Some(&left)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The socket, with the time that was set for it.
    fn transfer(
        &self,
        events: PollFlags,
        mut f: impl FnMut(&OwnedFd) -> rustix::io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            match f(&self.fd) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => self.wait(events)?,
                other => return Ok(other?),
            }
        }
    }
}

impl Read for Channel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.transfer(PollFlags::IN, |fd| {
            rustix::net::recv(fd, &mut *buf, RecvFlags::DONTWAIT).map(|(n, _)| n)
        })
    }
}

impl Write for Channel {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.transfer(PollFlags::OUT, |fd| {
            rustix::net::send(fd, buf, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A [`Channel`], or TLS on one.
pub(crate) enum Secure {
    Plain(Channel),
    Tls(Box<rustls::Connection>, Channel),
}

impl Secure {
    /// Puts TLS on the channel: does the handshake.
    pub(crate) fn with_tls(channel: Channel, mut tls: rustls::Connection) -> io::Result<Self> {
        let mut channel = channel;
        while tls.is_handshaking() {
            tls.complete_io(&mut channel)?;
        }
        Ok(Self::Tls(Box::new(tls), channel))
    }

    /// The plain channel, if it is one.
    pub(crate) fn into_plain(self) -> Option<Channel> {
        match self {
            Self::Plain(channel) => Some(channel),
            Self::Tls(..) => None,
        }
    }

    /// The socket and the state of TLS, for the transmission phase.
    pub(crate) fn into_parts(self) -> (OwnedFd, Option<Box<rustls::Connection>>) {
        match self {
            Self::Plain(channel) => (channel.fd, None),
            Self::Tls(tls, channel) => (channel.fd, Some(tls)),
        }
    }
}

impl Read for Secure {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(channel) => channel.read(buf),
            Self::Tls(tls, channel) => loop {
                match tls.reader().read(buf) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
                if tls.complete_io(channel)? == (0, 0) {
                    return Ok(0);
                }
            },
        }
    }
}

impl Write for Secure {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(channel) => channel.write(buf),
            Self::Tls(tls, channel) => {
                let n = tls.writer().write(buf)?;
                while tls.wants_write() {
                    tls.write_tls(channel)?;
                }
                Ok(n)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
