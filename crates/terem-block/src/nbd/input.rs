//! What a socket has received and nobody used yet.

use std::io;

use super::socket::Socket;
use crate::engine::View;

/// Bytes received at once.
const SIZE: usize = 128 << 10;

/// A buffer before a socket.
pub(crate) struct Input {
    view: View,
    start: usize,
    end: usize,
}

impl Input {
    pub(crate) fn new() -> Self {
        Self { view: View::zeroed(SIZE), start: 0, end: 0 }
    }

    /// Bytes that are there.
    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }

    /// Receives until there are `len` bytes (not more than a few); false when the peer ended before the first.
    pub(crate) async fn fill(&mut self, socket: &Socket, len: usize) -> io::Result<bool> {
        while self.len() < len {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
            } else if self.view.len() - self.start < len {
                let left = self.view.part(self.start, self.len()).to_vec();
                self.view.put(&left);
                (self.start, self.end) = (0, left.len());
            }
            match socket.receive(&self.view.part(self.end, self.view.len())).await? {
                0 if self.start == self.end => return Ok(false),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => self.end += n,
            }
        }
        Ok(true)
    }

    /// Copies the next bytes, which are there, without taking them.
    pub(crate) fn peek(&self, to: &mut [u8]) {
        self.view.get(self.start, to);
    }

    /// Takes the next bytes, which are there.
    pub(crate) fn take(&mut self, to: &mut [u8]) {
        self.peek(to);
        self.start += to.len().min(self.len());
    }

    /// Fills `view` with the next bytes; those that are not there yet are received right into it.
    pub(crate) async fn read(&mut self, socket: &Socket, view: &View) -> io::Result<()> {
        let mut done = self.len().min(view.len());
        view.copy_from(&self.view.part(self.start, done));
        self.start += done;
        while done < view.len() {
            match socket.receive(&view.part(done, view.len())).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => done += n,
            }
        }
        Ok(())
    }

    /// Takes the next `len` bytes, which the caller has bounded.
    pub(crate) async fn bytes(&mut self, socket: &Socket, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            if !self.fill(socket, 1).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let n = self.len().min(len - done);
            self.take(&mut bytes[done..done + n]);
            done += n;
        }
        Ok(bytes)
    }
}
