//! A connected gdb: bytes in, bytes out, neither for ever.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use gdbstub::conn::Connection;
use rustix::event::{PollFd, PollFlags, poll};

/// How long a client may leave an answer unread before it is cut off.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// A socket of either kind.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn prepare(&self) -> io::Result<()> {
        match self {
            Self::Tcp(s) => {
                s.set_nonblocking(false)?;
                s.set_nodelay(true)?;
                s.set_write_timeout(Some(WRITE_TIMEOUT))?;
                // A client whose host has gone away is noticed in the end.
                Ok(rustix::net::sockopt::set_socket_keepalive(s, true)?)
            }
            Self::Unix(s) => {
                s.set_nonblocking(false)?;
                s.set_write_timeout(Some(WRITE_TIMEOUT))
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(s) => s.as_fd(),
            Self::Unix(s) => s.as_fd(),
        }
    }
}

/// What can happen while a client is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Input {
    /// The client sent this.
    Byte(u8),
    /// Somebody else wants something.
    Woken,
}

/// A client.
#[derive(Debug)]
pub(super) struct Client {
    stream: Stream,
    input: Vec<u8>,
    /// What of the input has been taken.
    taken: usize,
    output: Vec<u8>,
}

impl Client {
    pub(super) fn new(stream: Stream) -> io::Result<Self> {
        stream.prepare()?;
        Ok(Self { stream, input: Vec::new(), taken: 0, output: Vec::new() })
    }

    /// The next byte, or a sign of life of `other`. Sends first what waits to be sent.
    ///
    /// # Errors
    /// The client has gone, or does not read.
    pub(super) fn next(&mut self, other: &impl AsFd) -> io::Result<Input> {
        self.flush()?;
        loop {
            if let Some(&byte) = self.input.get(self.taken) {
                self.taken += 1;
                return Ok(Input::Byte(byte));
            }
            let mut fds = [PollFd::new(&self.stream, PollFlags::IN), PollFd::new(other, PollFlags::IN)];
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
                Ok(_) if !fds[1].revents().is_empty() => return Ok(Input::Woken),
                Ok(_) => self.read()?,
            }
        }
    }

    /// Waits for the client's first word; false when `other` came first.
    ///
    /// # Errors
    /// The client has gone.
    pub(super) fn wait(&mut self, other: &impl AsFd) -> io::Result<bool> {
        let input = self.next(other)?;
        // Taken back.
        self.taken = 0;
        Ok(input != Input::Woken)
    }

    fn read(&mut self) -> io::Result<()> {
        self.input.resize(4096, 0);
        self.taken = 0;
        let read = match &mut self.stream {
            Stream::Tcp(s) => s.read(&mut self.input),
            Stream::Unix(s) => s.read(&mut self.input),
        };
        self.input.truncate(*read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Err(e) if e.kind() != io::ErrorKind::Interrupted => Err(e),
            _ => Ok(()),
        }
    }
}

impl Connection for Client {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.output.push(byte);
        if self.output.len() >= 1 << 16 { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.output.is_empty() {
            return Ok(());
        }
        let output = std::mem::take(&mut self.output);
        match &mut self.stream {
            Stream::Tcp(s) => Write::write_all(s, &output),
            Stream::Unix(s) => Write::write_all(s, &output),
        }
    }
}
