//! The thread that gdb talks to: one client after the other, each a session.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError};
use rustix::event::{PollFd, PollFlags, poll};
use terem_config::GdbAddress;

use super::client::{Client, Input, Stream};
use super::target::{Debuggee, Guest};
use super::{Notice, Notices};
use crate::handle::RequestError;

/// How long the end of the machine waits for the last word to gdb.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Why gdb cannot be listened for.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for gdb on {address}: {source}")]
pub struct GdbError {
    address: String,
    source: io::Error,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// A socket that gdb can connect to.
pub(crate) struct Listener {
    socket: Socket,
    /// As the user is told.
    address: String,
}

impl Listener {
    /// Listens.
    ///
    /// # Errors
    /// The host does not let us.
    pub(crate) fn bind(address: &GdbAddress) -> Result<Self, GdbError> {
        let failed = |source| GdbError { address: address.to_string(), source };
        match address {
            GdbAddress::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let address = listener.local_addr().map_err(failed)?.to_string();
                Ok(Self { socket: Socket::Tcp(listener), address })
            }
            GdbAddress::Unix(path) => {
                let listener = unix(path).map_err(failed)?;
                Ok(Self { socket: Socket::Unix(listener, path.clone()), address: path.display().to_string() })
            }
        }
    }

    /// What gdb is to be told to connect to.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Tcp(l) => l.accept().map(|(s, _)| Stream::Tcp(s)),
            Socket::Unix(l, _) => l.accept().map(|(s, _)| Stream::Unix(s)),
        }
    }
}

fn unix(path: &Path) -> io::Result<UnixListener> {
    // A socket that nobody listens on is left over from a machine that was killed.
    if UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix(_, path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(l) => l.as_fd(),
            Socket::Unix(l, _) => l.as_fd(),
        }
    }
}

/// The running thread.
#[derive(Debug)]
pub(crate) struct Server {
    notices: Arc<Notices>,
    /// Closed when the thread has ended.
    done: Receiver<()>,
}

impl Server {
    /// Serves clients of `listener` until [`Notice::Ended`].
    ///
    /// # Errors
    /// The host has no thread left.
    pub(crate) fn start(listener: Listener, guest: Guest) -> io::Result<Self> {
        let notices = Arc::new(Notices::new()?);
        let (held, done) = channel::<()>();
        let told = Arc::clone(&notices);
        std::thread::Builder::new().name("gdb".into()).spawn(move || {
            let _held = held;
            listen(&listener, &guest, &told);
        })?;
        Ok(Self { notices, done })
    }

    /// Tells the debugger something. Never waits.
    pub(crate) fn tell(&self, notice: Notice) {
        self.notices.tell(notice);
    }

    /// Ends it, with a last word to a client.
    pub(crate) fn end(self) {
        self.notices.tell(Notice::Ended);
        let _ = self.done.recv_timeout(LAST_WORD);
    }
}

fn listen(listener: &Listener, guest: &Guest, notices: &Arc<Notices>) {
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(notices, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return tracing::warn!("gdb is not listened for any more: {e}"),
            Ok(_) => {}
        }
        let connected = !fds[0].revents().is_empty();
        while let Some(notice) = notices.next() {
            if notice == Notice::Ended {
                return;
            }
        }
        if !connected {
            continue;
        }
        let client = match listener.accept().and_then(Client::new) {
            Ok(client) => client,
            Err(e) => {
                tracing::debug!("gdb was not let in: {e}");
                // Without descriptors or memory it would fail again at once.
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if session(client, guest, notices) {
            return;
        }
    }
}

/// Serves one client; true when the machine is over.
fn session(client: Client, guest: &Guest, notices: &Arc<Notices>) -> bool {
    let mut debuggee = Debuggee::new(guest.clone(), Arc::clone(notices));
    // What a client sends is parsed by somebody else's code; it must not take the machine down.
    let ended = catch_unwind(AssertUnwindSafe(|| serve(client, &mut debuggee)));
    match ended {
        Ok(Ok(DisconnectReason::Kill)) => {
            let _ = guest.handle.stop(None);
        }
        Ok(Ok(reason)) => tracing::debug!(?reason, "gdb has gone"),
        Ok(Err(e)) => tracing::debug!("gdb has gone: {e}"),
        Err(_) => tracing::warn!("gdb sent what could not be understood"),
    }
    debuggee.let_go();
    debuggee.ended()
}

type Ended = Result<DisconnectReason, GdbStubError<RequestError, io::Error>>;

fn serve(mut client: Client, debuggee: &mut Debuggee) -> Ended {
    let notices = debuggee.notices();
    // Who only connects, to see whether the port is open, does not stop the machine.
    loop {
        match client.wait(&notices) {
            Ok(true) => break,
            Ok(false) => debuggee.forget_notices(),
            Err(_) => return Ok(DisconnectReason::Disconnect),
        }
        if debuggee.ended() {
            return Ok(DisconnectReason::TargetExited(0));
        }
    }
    if let Err(e) = debuggee.hold() {
        tracing::warn!("gdb cannot stop the machine: {e}");
        return Ok(DisconnectReason::Disconnect);
    }
    let mut gdb = GdbStub::new(client).run_state_machine(debuggee)?;
    loop {
        gdb = match gdb {
            GdbStubStateMachine::Idle(mut idle) => match idle.borrow_conn().next(&notices) {
                Ok(Input::Byte(byte)) => idle.incoming_data(debuggee, byte)?,
                Ok(Input::Woken) => {
                    let _ = debuggee.stopped();
                    if debuggee.ended() {
                        return Ok(DisconnectReason::TargetExited(0));
                    }
                    idle.into()
                }
                Err(_) => return Ok(DisconnectReason::Disconnect),
            },
            GdbStubStateMachine::Running(mut running) => {
                if let Some(reason) = debuggee.late() {
                    running.report_stop(debuggee, reason)?
                } else {
                    match running.borrow_conn().next(&notices) {
                        Ok(Input::Byte(byte)) => running.incoming_data(debuggee, byte)?,
                        Ok(Input::Woken) => match debuggee.stopped() {
                            Some(reason) => running.report_stop(debuggee, reason)?,
                            None => running.into(),
                        },
                        Err(_) => return Ok(DisconnectReason::Disconnect),
                    }
                }
            }
            GdbStubStateMachine::CtrlCInterrupt(interrupt) => match debuggee.interrupt() {
                Ok(reason) => interrupt.interrupt_handled(debuggee, reason)?,
                Err(e) => {
                    tracing::warn!("gdb cannot stop the machine: {e}");
                    return Ok(DisconnectReason::Disconnect);
                }
            },
            GdbStubStateMachine::Disconnected(disconnected) => return Ok(disconnected.get_reason()),
        }
    }
}
