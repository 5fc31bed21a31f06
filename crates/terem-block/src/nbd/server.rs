//! The server: listens, negotiates, and hands connections over to the I/O thread of the disk they want.
//!
//! ```text
//!  listener's thread ──accept──> a thread for each client: negotiation, with a deadline
//!                                     │ Disk::host
//!                                     ▼
//!                                disk's I/O thread: Connection, until the client leaves
//! ```
//!
//! So whoever is slow in negotiation keeps a thread of its own for some seconds, and no one else.

pub(super) mod connection;
pub(super) mod negotiate;
mod outgoing;
mod perform;

use std::collections::HashMap;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};

use self::connection::Connection;
use self::negotiate::{Agreement, Negotiation, Offer, Security, Step};
use super::channel::{Channel, Secure};
use super::protocol::{BlockSize, MAX_PAYLOAD};
use super::socket::Socket;
use super::tls::ServerTls;
use crate::{BlockBackend, Disk};

/// Clients that may negotiate at the same time; when there are more, those that began first must go.
const MAX_NEGOTIATING: usize = 64;
/// How long clients may take for the last replies when the server stops.
const LAST_REPLIES: Duration = Duration::from_secs(2);

/// A disk to serve.
#[derive(Debug)]
pub struct NbdExport {
    /// The name that clients ask for. An only export is found by the empty name too.
    pub name: String,
    /// What it is, for people; may be empty.
    pub description: String,
    /// The disk. It stays open as long as the server.
    pub disk: Arc<Disk>,
}

/// Where clients come in.
#[derive(Debug)]
pub enum NbdListener {
    /// A Unix socket.
    Unix(UnixListener),
    /// A TCP port.
    Tcp(TcpListener),
}

/// How to serve.
#[derive(Debug, Clone)]
pub struct NbdServerOptions {
    /// Most connections to one export at a time.
    pub connections: usize,
    /// How long a client may take to negotiate.
    pub handshake: Duration,
    /// With certificates nobody gets anything without TLS.
    pub tls: Option<ServerTls>,
}

impl Default for NbdServerOptions {
    fn default() -> Self {
        Self { connections: 16, handshake: Duration::from_secs(10), tls: None }
    }
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct NbdServer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    offers: Vec<Offer>,
    /// One for each offer; none any more once the server has stopped.
    disks: Mutex<Vec<Arc<Disk>>>,
    options: NbdServerOptions,
    state: Mutex<State>,
    changed: Condvar,
    /// Readable when the server stops.
    stop: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    stopping: bool,
    /// Sockets of the connections, and the export each has.
    sockets: HashMap<u64, (Option<usize>, Arc<OwnedFd>)>,
    next: u64,
    /// Connections that came as far as transmission, ever.
    served: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disks(&self) -> MutexGuard<'_, Vec<Arc<Disk>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NbdServer {
    /// Starts to serve `exports` to whoever comes in at `listeners`.
    ///
    /// # Errors
    /// When the host has no threads or descriptors left.
    pub fn start(
        exports: Vec<NbdExport>,
        listeners: Vec<NbdListener>,
        options: NbdServerOptions,
    ) -> io::Result<Self> {
        let (mut offers, mut disks) = (Vec::new(), Vec::new());
        for NbdExport { name, description, disk } in exports {
            let geometry = disk.geometry();
            let block_size = BlockSize { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD };
            offers.push(Offer {
                name,
                description,
                size: geometry.size,
                read_only: geometry.read_only,
                multi: options.connections > 1,
                block_size,
            });
            disks.push(disk);
        }
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (state, changed) = Default::default();
        let shared = Arc::new(Shared { offers, disks: Mutex::new(disks), options, state, changed, stop });
        let mut server = Self { shared, threads: Vec::new() };
        for listener in listeners {
            let (fd, tcp) = match listener {
                NbdListener::Unix(listener) => (OwnedFd::from(listener), false),
                NbdListener::Tcp(listener) => (OwnedFd::from(listener), true),
            };
            rustix::io::ioctl_fionbio(&fd, true)?;
            let shared = Arc::clone(&server.shared);
            let thread = std::thread::Builder::new().name("nbd".into());
            server.threads.push(thread.spawn(move || listen(&fd, tcp, &shared))?);
        }
        Ok(server)
    }

    /// Number of connections in transmission now, and of all that there were.
    #[must_use]
    pub fn connections(&self) -> (usize, u64) {
        let state = self.shared.state();
        (state.sockets.values().filter(|(export, _)| export.is_some()).count(), state.served)
    }

    /// Waits until at least one client was served and none is left, or until `timeout` has passed; whether it is so.
    #[must_use]
    pub fn wait_for_last(&self, timeout: Duration) -> bool {
        let gone = |state: &State| state.served > 0 && state.sockets.is_empty();
        let end = Instant::now() + timeout;
        let mut state = self.shared.state();
        while !gone(&state) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Takes no more requests, lets those in flight end, and closes all connections.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let end = Instant::now() + LAST_REPLIES;
        let mut state = self.shared.state();
        state.stopping = true;
        for (_, socket) in state.sockets.values() {
            // The connection sees its client's end, and answers what it has.
            let _ = shutdown(socket, Shutdown::Read);
        }
        let _ = rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes());
        while !state.sockets.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                for (_, socket) in state.sockets.values() {
                    let _ = shutdown(socket, Shutdown::Both);
                }
            }
            let wait = if left.is_zero() { Duration::from_millis(100) } else { left };
            let waited = self.shared.changed.wait_timeout(state, wait);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        // Who still ends a thread of its own keeps none of them open.
        self.shared.disks().clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Accepts clients until the server stops.
fn listen(listener: &OwnedFd, tcp: bool, shared: &Arc<Shared>) {
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&shared.stop, PollFlags::IN)];
        if poll(&mut fds, None).is_err_and(|e| e != rustix::io::Errno::INTR) {
            return;
        }
        if shared.state().stopping {
            return;
        }
        match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(socket) => welcome(socket, tcp, shared),
            Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE | rustix::io::Errno::NOMEM) => {
                tracing::warn!("out of file descriptors; NBD clients wait");
                std::thread::sleep(Duration::from_millis(100));
            }
            // It went away again, or another's turn was first.
            Err(_) => {}
        }
    }
}

/// Starts the thread that negotiates with a client.
fn welcome(socket: OwnedFd, tcp: bool, shared: &Arc<Shared>) {
    if tcp {
        use rustix::net::sockopt::{set_socket_keepalive, set_tcp_nodelay};
        let _ = set_tcp_nodelay(&socket, true);
        // A client whose host is gone is noticed some time.
        let _ = set_socket_keepalive(&socket, true);
    }
    let mut state = shared.state();
    let negotiating = || state.sockets.iter().filter(|(_, (export, _))| export.is_none());
    if negotiating().count() >= MAX_NEGOTIATING
        && let Some(longest) = negotiating().map(|(id, _)| *id).min()
        && let Some((_, socket)) = state.sockets.remove(&longest)
    {
        // It has had its time: a client that means it is done in no time.
        let _ = shutdown(socket, Shutdown::Both);
    }
    let Ok(twin) = socket.try_clone() else { return };
    let id = state.next;
    state.next += 1;
    state.sockets.insert(id, (None, Arc::new(twin)));
    drop(state);
    let guest = Guest { shared: Arc::clone(shared), id };
    // Where there is no thread, the guest is dropped, and its socket closed.
    if let Err(error) =
        std::thread::Builder::new().name("nbd-client".into()).spawn(move || negotiate(socket, guest))
    {
        tracing::warn!(%error, "no thread for an NBD client");
    }
}

/// A client's place in the books, which is free again when this is dropped.
struct Guest {
    shared: Arc<Shared>,
    id: u64,
}

impl Guest {
    /// Whether one more connection to the export may be.
    fn admit(&self, export: usize) -> Result<(), String> {
        let mut state = self.shared.state();
        if state.stopping {
            return Err("the server is stopping".into());
        }
        let most = self.shared.options.connections;
        if state.sockets.values().filter(|(of, _)| *of == Some(export)).count() >= most {
            return Err(format!("all {most} connections to this export are taken"));
        }
        let Some((of, _)) = state.sockets.get_mut(&self.id) else {
            return Err("too many clients negotiate at once".into());
        };
        *of = Some(export);
        state.served += 1;
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.sockets.remove(&self.id);
        drop(state);
        self.shared.changed.notify_all();
    }
}

/// Negotiates with a client, and hands it over to the disk that it wants.
fn negotiate(socket: OwnedFd, guest: Guest) {
    let shared = Arc::clone(&guest.shared);
    let channel = Channel::new(socket, shared.options.handshake);
    match agree(channel, &shared, &guest) {
        Ok(Some((secure, agreement))) => {
            let (fd, session) = secure.into_parts();
            let disks = shared.disks();
            let Some(disk) = disks.get(agreement.export) else { return };
            let started = disk.host(move |local| {
                Box::pin(async move {
                    let socket = Socket::new(local.engine.clone(), Arc::new(fd), session);
                    let result = Connection::new(local, socket, agreement).serve().await;
                    if let Err(error) = result {
                        tracing::info!(%error, "an NBD connection broke");
                    }
                    drop(guest);
                })
            });
            if !started {
                tracing::warn!("an NBD client wants a disk that is closed");
            }
        }
        Ok(None) => {}
        Err(error) => tracing::info!(%error, "the negotiation with an NBD client failed"),
    }
}

/// The negotiation: `None` when the client left in good order.
fn agree(channel: Channel, shared: &Shared, guest: &Guest) -> io::Result<Option<(Secure, Agreement)>> {
    let security = if shared.options.tls.is_some() { Security::Required } else { Security::None };
    let mut negotiation = Negotiation::new(&shared.offers, security);
    let mut peer = Secure::Plain(channel);
    negotiation.greet(&mut peer)?;
    let mut admit = |export| guest.admit(export);
    loop {
        match negotiation.options(&mut peer, &mut admit)? {
            Step::Agreed(agreement) => return Ok(Some((peer, agreement))),
            Step::Ended => return Ok(None),
            Step::StartTls => {
                let (Some(tls), Some(channel)) = (&shared.options.tls, peer.into_plain()) else {
                    return Ok(None);
                };
                peer = Secure::with_tls(channel, tls.session()?)?;
                negotiation.secured();
            }
        }
    }
}
