//! The listening side: one thread that accepts, one for each connection.

use super::protocol::{Command, ControlError, ErrorCode, MAX_LINE, Outcome, Request, Response};
use super::{Claim, Console, ControlTarget};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::socket_peercred;
use std::fs::{self, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tracing::{debug, warn};

/// Most connections at a time.
const MAX_CONNECTIONS: usize = 16;

/// How long a client may leave an answer unread before it is cut off.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often an attached console looks whether its client has gone.
const CONSOLE_WAIT: Duration = Duration::from_millis(250);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on the control socket {path}: {error}", path = path.display())]
pub struct ServerError {
    /// The socket.
    pub path: PathBuf,
    /// Why.
    pub error: io::Error,
}

/// The control socket of a machine; dropping it closes all connections and gives the name back.
#[derive(Debug)]
pub struct ControlServer {
    claim: Claim,
    /// Written to when the server is to end.
    end: UnixStream,
    thread: Option<JoinHandle<()>>,
    connections: Arc<Connections>,
}

impl ControlServer {
    /// Listens on the socket that belongs to `claim` and answers for `target`.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(claim: Claim, target: Arc<dyn ControlTarget>) -> Result<Self, ServerError> {
        let path = claim.socket_path();
        let failed = |error| ServerError { path: path.clone(), error };
        let listener = UnixListener::bind(&path).map_err(failed)?;
        // The directory keeps others out already; this also says so.
        fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(failed)?;
        let (end, ended) = UnixStream::pair().map_err(failed)?;
        let connections = Arc::new(Connections::default());
        let thread = {
            let connections = connections.clone();
            thread::Builder::new()
                .name("control".into())
                .spawn(move || accept(&listener, &ended, &connections, &target))
                .map_err(failed)?
        };
        Ok(Self { claim, end, thread: Some(thread), connections })
    }

    /// The machine's name.
    pub fn name(&self) -> &str {
        self.claim.name()
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        let _ = self.end.write_all(&[0]);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.connections.close();
    }
}

/// The open connections, so that they can be closed from outside.
#[derive(Debug, Default)]
struct Connections(Mutex<Vec<(u64, UnixStream)>>);

impl Connections {
    /// Keeps a handle to `stream`; `false` if there are too many.
    fn add(&self, id: u64, stream: &UnixStream) -> bool {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match stream.try_clone() {
            Ok(handle) if open.len() < MAX_CONNECTIONS => {
                open.push((id, handle));
                true
            }
            _ => false,
        }
    }

    fn remove(&self, id: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|(other, _)| *other != id);
    }

    fn close(&self) {
        for (_, stream) in self.0.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn accept(
    listener: &UnixListener,
    ended: &UnixStream,
    open: &Arc<Connections>,
    target: &Arc<dyn ControlTarget>,
) {
    for id in 0.. {
        let mut events = [PollFd::new(listener, PollFlags::IN), PollFd::new(ended, PollFlags::IN)];
        match poll(&mut events, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return warn!("the control socket is out of order: {error}"),
            Ok(_) if !events[1].revents().is_empty() => return,
            Ok(_) => {}
        }
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!("a control connection was not accepted: {error}");
                // Without descriptors or memory it would fail again at once.
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if let Err(refusal) = admit(&stream, id, open) {
            let _ = answer(&stream, 0, Outcome::Error(refusal));
            continue;
        }
        let (connections, target) = (open.clone(), target.clone());
        let serve = move || {
            if let Err(error) = serve(&stream, &*target) {
                debug!("a control connection ended: {error}");
            }
            connections.remove(id);
        };
        if thread::Builder::new().name("control client".into()).spawn(serve).is_err() {
            open.remove(id);
        }
    }
}

/// Only the machine's owner and root may speak to it.
fn admit(stream: &UnixStream, id: u64, open: &Connections) -> Result<(), ControlError> {
    let _ = stream.set_write_timeout(Some(WRITE_TIMEOUT));
    let owner = rustix::process::geteuid();
    let peer = socket_peercred(stream)
        .map_err(|error| ControlError::new(ErrorCode::Forbidden, format!("who are you? ({error})")))?;
    if peer.uid != owner && !peer.uid.is_root() {
        let why =
            format!("this machine belongs to user {}, not to user {}", owner.as_raw(), peer.uid.as_raw());
        return Err(ControlError::new(ErrorCode::Forbidden, why));
    }
    if open.add(id, stream) {
        Ok(())
    } else {
        let why = format!("{MAX_CONNECTIONS} clients are connected already");
        Err(ControlError::new(ErrorCode::Busy, why))
    }
}

fn answer(mut stream: &UnixStream, id: u64, outcome: Outcome) -> io::Result<()> {
    let mut line = serde_json::to_vec(&Response { id, outcome })?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn serve(stream: &UnixStream, target: &dyn ControlTarget) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        // One byte more than a line may have, to tell the longest from one that is too long.
        let limit = MAX_LINE as u64 + 1;
        if reader.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.len() > MAX_LINE {
            let why = format!("a request has at most {MAX_LINE} bytes");
            return answer(stream, 0, Outcome::Error(ControlError::new(ErrorCode::BadRequest, why)));
        }
        let request: Request = match serde_json::from_slice(&line) {
            Ok(request) => request,
            Err(error) => {
                let id = id_of(&line);
                let why = format!("this is no request: {error}");
                answer(stream, id, Outcome::Error(ControlError::new(ErrorCode::BadRequest, why)))?;
                continue;
            }
        };
        if request.command == Command::Console {
            let Some(console) = target.console() else {
                let why = "this machine's console is not here: its configuration sends it elsewhere";
                answer(stream, request.id, Outcome::Error(ControlError::new(ErrorCode::Unavailable, why)))?;
                continue;
            };
            answer(stream, request.id, Outcome::Result(serde_json::json!({})))?;
            let typed = reader.buffer().to_vec();
            return attach(stream, &typed, &console);
        }
        let outcome = carry_out(&request.command, target).map_or_else(Outcome::Error, Outcome::Result);
        answer(stream, request.id, outcome)?;
    }
}

/// The id of a line that is JSON but no request.
fn id_of(line: &[u8]) -> u64 {
    let value: serde_json::Value = serde_json::from_slice(line).unwrap_or_default();
    value.get("id").and_then(serde_json::Value::as_u64).unwrap_or(0)
}

fn carry_out(command: &Command, target: &dyn ControlTarget) -> Result<serde_json::Value, ControlError> {
    let done = serde_json::json!({});
    match command {
        Command::Status => serde_json::to_value(target.status())
            .map_err(|error| ControlError::new(ErrorCode::Unavailable, error.to_string())),
        Command::Stat => serde_json::to_value(target.stat())
            .map_err(|error| ControlError::new(ErrorCode::Unavailable, error.to_string())),
        Command::Inspect => Ok(target.inspect()),
        Command::Stop { force: false } => target.power_button().map(|()| done),
        Command::Stop { force: true } => {
            target.kill();
            Ok(done)
        }
        Command::Pause => target.pause().map(|()| done),
        Command::Resume => target.resume().map(|()| done),
        Command::Console => Ok(done),
    }
}

/// Carries the console's bytes both ways until the client or the machine ends.
fn attach(stream: &UnixStream, typed: &[u8], console: &Arc<Console>) -> io::Result<()> {
    let output = {
        let (mut stream, console) = (stream.try_clone()?, console.clone());
        thread::Builder::new().name("control output".into()).spawn(move || {
            let mut place = console.oldest();
            while let Some((bytes, next)) = console.output(place, CONSOLE_WAIT) {
                if is_gone(&stream) || stream.write_all(&bytes).is_err() {
                    break;
                }
                place = next;
            }
            let _ = stream.shutdown(Shutdown::Both);
        })?
    };
    let mut input = stream;
    let mut buffer = [0; 1024];
    let mut open = typed.is_empty() || console.send(typed);
    while open {
        match input.read(&mut buffer) {
            // A client may close its sending side and go on reading.
            Ok(0) => break,
            Ok(count) => open = console.send(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let _ = output.join();
    Ok(())
}

/// Whether the other end is closed altogether.
fn is_gone(stream: &UnixStream) -> bool {
    let mut event = [PollFd::new(stream, PollFlags::empty())];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut event, Some(&now)).is_err() || event[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
