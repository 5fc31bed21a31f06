//! A stream socket during transmission, on the engine of a disk's I/O thread: plain or TLS.

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use crate::engine::{Action, Engine, Job, Vectors, View, send_now};
use crate::range_lock::RangeLock;

/// Bytes of ciphertext received at once.
const CIPHER: usize = 64 << 10;
/// Bytes of plaintext encrypted at once.
const PLAIN: usize = 256 << 10;

/// A connected socket.
pub(crate) struct Socket {
    engine: Rc<Engine>,
    fd: Arc<OwnedFd>,
    tls: Option<Tls>,
}

struct Tls {
    session: RefCell<Box<rustls::Connection>>,
    received: View,
    /// Decrypted bytes that nobody took yet, and how many of them are taken.
    plain: RefCell<(Vec<u8>, usize)>,
    /// Records go out in the order in which they were encrypted.
    sending: RangeLock,
}

impl Socket {
    pub(crate) fn new(
        engine: Rc<Engine>,
        fd: Arc<OwnedFd>,
        session: Option<Box<rustls::Connection>>,
    ) -> Self {
        let tls = session.map(|mut session| {
            session.set_buffer_limit(None);
            Tls {
                session: RefCell::new(session),
                received: View::zeroed(CIPHER),
                plain: RefCell::default(),
                sending: RangeLock::default(),
            }
        });
        Self { engine, fd, tls }
    }

    /// Ends the connection: what waits for the peer ends too.
    pub(crate) fn hang_up(&self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    /// Receives some bytes into `view`, 0 at the peer's end.
    pub(crate) async fn receive(&self, view: &View) -> io::Result<usize> {
        match &self.tls {
            None => self.receive_plain(std::slice::from_ref(view)).await,
            Some(tls) => self.receive_tls(tls, view).await,
        }
    }

    async fn receive_plain(&self, views: &[View]) -> io::Result<usize> {
        loop {
            let (memory, _) = Vectors::new(views, 0);
            let job = Job { fd: Arc::clone(&self.fd), action: Action::Receive { memory } };
            match self.engine.run(job).await {
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                other => return other,
            }
        }
    }

    async fn receive_tls(&self, tls: &Tls, view: &View) -> io::Result<usize> {
        loop {
            if let Some(n) = tls.take_plain(view)? {
                return Ok(n);
            }
            let n = self.receive_plain(std::slice::from_ref(&tls.received)).await?;
            if n == 0 {
                return Ok(0);
            }
            tls.decrypt(n)?;
            if tls.session.borrow().wants_write() {
                let _one = tls.sending.all().await;
                self.send_records(tls).await?;
            }
        }
    }

    /// Sends all of `views`.
    pub(crate) async fn send(&self, views: &[View]) -> io::Result<()> {
        let Some(tls) = &self.tls else { return self.send_plain(views).await };
        let _one = tls.sending.all().await;
        for view in views {
            for at in (0..view.len()).step_by(PLAIN) {
                let bytes = view.part(at, PLAIN).to_vec();
                tls.session.borrow_mut().writer().write_all(&bytes)?;
                self.send_records(tls).await?;
            }
        }
        Ok(())
    }

    /// Sends what TLS has ready. The caller holds `sending`.
    async fn send_records(&self, tls: &Tls) -> io::Result<()> {
        let mut records = Vec::new();
        {
            let mut session = tls.session.borrow_mut();
            while session.wants_write() {
                session.write_tls(&mut records)?;
            }
        }
        self.send_plain(&[View::copy_of(&records)]).await
    }

    async fn send_plain(&self, views: &[View]) -> io::Result<()> {
        let total: usize = views.iter().map(View::len).sum();
        let mut done = 0;
        while done < total {
            let (memory, _) = Vectors::new(views, done);
            let action = Action::Send { memory };
            let sent = match send_now(&self.fd, &action) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.engine.run(Job { fd: Arc::clone(&self.fd), action }).await
                }
                sent => sent,
            };
            match sent {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => done += n,
                Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Tls {
    /// Decrypts the first `n` bytes received.
    fn decrypt(&self, n: usize) -> io::Result<()> {
        let bytes = self.received.part(0, n).to_vec();
        let (mut session, mut rest) = (self.session.borrow_mut(), bytes.as_slice());
        let mut plain = self.plain.borrow_mut();
        let (plain, taken) = &mut *plain;
        plain.drain(..std::mem::take(taken));
        while !rest.is_empty() {
            session.read_tls(&mut rest)?;
            let state =
                session.process_new_packets().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            let new = state.plaintext_bytes_to_read();
            let before = plain.len();
            plain.resize(before + new, 0);
            session.reader().read_exact(&mut plain[before..])?;
            if state.peer_has_closed() {
                break;
            }
        }
        Ok(())
    }

    /// Moves decrypted bytes to `view`, if there are any; 0 bytes when the peer has ended the session.
    fn take_plain(&self, view: &View) -> io::Result<Option<usize>> {
        let mut plain = self.plain.borrow_mut();
        let (plain, taken) = &mut *plain;
        if *taken == plain.len() {
            plain.clear();
            *taken = 0;
            // Some may have come along with the end of the handshake.
            let mut some = [0; 4096];
            match self.session.borrow_mut().reader().read(&mut some) {
                Ok(0) => return Ok(Some(0)),
                Ok(n) => {
                    plain.extend(&some[..n]);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        let n = view.len().min(plain.len() - *taken);
        view.put(&plain[*taken..*taken + n]);
        *taken += n;
        Ok(Some(n))
    }
}
