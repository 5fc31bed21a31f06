//! The other ends of serial ports and consoles: the caller's terminal, files, pseudo-terminals, sockets.
//!
//! ```text
//!   device ──write──> Line ──> dyn CharBackend (terminal, file, pty, socket)
//!   device <──read─── Line <── input queue <── a reading thread, or MachineHandle::send_input
//! ```
//!
//! Output never waits: what the other end does not take is dropped. Input waits in the queue until the guest
//! takes it; a client that sends more than the queue holds is made to wait itself.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use rustix::net::{SendFlags, send};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use terem_bus::locked;
use terem_config::CharConfig;
use terem_devices::chipset::uart::{CharBackend, Uart};
use terem_devices::virtio::console::ConsoleBackend;

/// Bytes of input that wait for the guest.
const INPUT_LIMIT: usize = 1 << 16;
/// How often a full serial port is offered its next bytes.
const RETRY: Duration = Duration::from_millis(1);

/// Why a console's other end cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {what}: {source}")]
pub struct ConsoleError {
    action: &'static str,
    what: String,
    source: std::io::Error,
}

/// One console's two directions.
pub(crate) struct Line {
    output: Mutex<Box<dyn CharBackend>>,
    input: Mutex<VecDeque<u8>>,
    changed: Condvar,
    /// Called when input has come.
    ready: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

/// Output that goes nowhere.
struct Nowhere;

impl CharBackend for Nowhere {
    fn write(&mut self, _bytes: &[u8]) {}
}

impl Line {
    fn new(output: Box<dyn CharBackend>) -> Arc<Self> {
        Arc::new(Self {
            output: Mutex::new(output),
            input: Mutex::default(),
            changed: Condvar::new(),
            ready: OnceLock::new(),
        })
    }

    /// Says who is to be told of input. The first call counts.
    pub(crate) fn set_ready(&self, ready: impl Fn() + Send + Sync + 'static) {
        let _ = self.ready.set(Box::new(ready));
    }

    /// Takes as much input as there is room for; how much that was.
    pub(crate) fn push(&self, bytes: &[u8]) -> usize {
        let mut input = locked(&self.input);
        let n = bytes.len().min(INPUT_LIMIT.saturating_sub(input.len()));
        input.extend(&bytes[..n]);
        drop(input);
        self.changed.notify_all();
        if let Some(ready) = self.ready.get() {
            ready();
        }
        n
    }

    /// Takes all of it, however long that takes.
    fn push_all(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let n = self.push(bytes);
            bytes = &bytes[n..];
            if n == 0 {
                std::thread::sleep(RETRY);
            }
        }
    }

    /// Moves input to a serial port, on a thread of its own that ends with the line.
    pub(crate) fn feed(self: &Arc<Self>, uart: &Arc<Mutex<Uart>>) -> std::io::Result<()> {
        let (line, uart) = (Arc::downgrade(self), Arc::downgrade(uart));
        spawn("serial-input", move || {
            while let (Some(line), Some(uart)) = (line.upgrade(), uart.upgrade()) {
                let mut input = locked(&line.input);
                if input.is_empty() {
                    // Wakes up now and then to see whether the machine is gone.
                    let waited = line.changed.wait_timeout(input, Duration::from_millis(500));
                    input = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                let (bytes, _) = input.as_slices();
                let taken = if bytes.is_empty() { 0 } else { locked(&uart).receive(bytes) };
                input.drain(..taken);
                let waiting = !input.is_empty();
                drop(input);
                if waiting {
                    std::thread::sleep(RETRY);
                }
            }
        })
    }
}

/// A line as a serial port's backend.
pub(crate) struct SerialEnd(pub(crate) Arc<Line>);

impl CharBackend for SerialEnd {
    fn write(&mut self, bytes: &[u8]) {
        locked(&self.0.output).write(bytes);
    }
}

impl ConsoleBackend for Line {
    fn write(&self, bytes: &[u8]) {
        locked(&self.output).write(bytes);
    }

    fn read(&self, buffer: &mut [u8]) -> usize {
        let mut input = locked(&self.input);
        let n = buffer.len().min(input.len());
        for (to, from) in buffer.iter_mut().zip(input.drain(..n)) {
            *to = from;
        }
        n
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(run).map(|_| ())
}

/// Opens consoles as configured.
pub(crate) struct Opener {
    /// The caller's terminal, until somebody takes it.
    pub(crate) stdio: Option<Box<dyn CharBackend>>,
    /// The line that took it.
    pub(crate) stdio_line: Option<Arc<Line>>,
    /// What the user should know: names of pseudo-terminals.
    pub(crate) notices: Vec<String>,
}

impl Opener {
    pub(crate) fn open(&mut self, what: &str, config: &CharConfig) -> Result<Arc<Line>, ConsoleError> {
        match config {
            CharConfig::None => Ok(Line::new(Box::new(Nowhere))),
            CharConfig::Stdio => {
                let line = Line::new(self.stdio.take().unwrap_or_else(|| Box::new(Nowhere)));
                self.stdio_line = Some(Arc::clone(&line));
                Ok(line)
            }
            CharConfig::File(path) => {
                let file = File::create(path).map_err(failed("create", path))?;
                Ok(Line::new(Box::new(FileEnd { file, broken: false })))
            }
            CharConfig::Pty => {
                let (line, name) = pty().map_err(|e| ConsoleError {
                    action: "open",
                    what: "a pseudo-terminal".into(),
                    source: e,
                })?;
                self.notices.push(format!("{what} is on {}", name.display()));
                Ok(line)
            }
            CharConfig::Socket(path) => socket(path).map_err(failed("listen on", path)),
        }
    }
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> ConsoleError + 'a {
    move |source| ConsoleError { action, what: path.display().to_string(), source }
}

/// A file that takes what the guest writes.
struct FileEnd {
    file: File,
    broken: bool,
}

impl CharBackend for FileEnd {
    fn write(&mut self, bytes: &[u8]) {
        if let Err(e) = self.file.write_all(bytes)
            && !self.broken
        {
            self.broken = true;
            tracing::warn!("console output is lost: {e}");
        }
    }
}

/// A pseudo-terminal's or client's descriptor; what it does not take at once is dropped.
struct PtyEnd(OwnedFd);

impl CharBackend for PtyEnd {
    fn write(&mut self, bytes: &[u8]) {
        // Non-blocking. Nobody has to be listening.
        let _ = rustix::io::write(&self.0, bytes);
    }
}

fn pty() -> std::io::Result<(Arc<Line>, PathBuf)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let host = openpt(flags)?;
    grantpt(&host)?;
    unlockpt(&host)?;
    let name = PathBuf::from(ptsname(&host, Vec::new())?.to_string_lossy().into_owned());
    // The guest's line discipline counts, not this one. Keeping the other side open keeps the setting, and reads
    // from failing while no client is there.
    let client = File::options().read(true).write(true).open(&name)?;
    let mut mode = rustix::termios::tcgetattr(&client)?;
    mode.make_raw();
    rustix::termios::tcsetattr(&client, rustix::termios::OptionalActions::Now, &mode)?;
    rustix::io::ioctl_fionbio(&host, true)?;
    let reader = File::from(host.try_clone()?);
    let line = Line::new(Box::new(PtyEnd(host)));
    read_from("pty", reader, &line, client)?;
    Ok((line, name))
}

/// Reads a descriptor into the line until either is gone. `keep` is held as long.
fn read_from(
    name: &str,
    mut from: impl Read + AsFd + Send + 'static,
    line: &Arc<Line>,
    keep: impl Send + 'static,
) -> std::io::Result<()> {
    let line: Weak<Line> = Arc::downgrade(line);
    spawn(name, move || {
        let _keep = keep;
        let mut buffer = [0; 4096];
        loop {
            let mut fds = [rustix::event::PollFd::new(&from, rustix::event::PollFlags::IN)];
            let timeout = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
            let polled = rustix::event::poll(&mut fds, Some(&timeout));
            let Some(line) = line.upgrade() else { return };
            match polled {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(_) => return,
            }
            match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(n) => line.push_all(&buffer[..n]),
                Err(e)
                    if matches!(
                        e.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(_) => return,
            }
        }
    })
}

/// The client of a socket, if there is one.
#[derive(Default)]
struct Client(Mutex<Option<UnixStream>>);

struct SocketEnd(Arc<Client>);

impl CharBackend for SocketEnd {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(client) = locked(&self.0.0).as_ref() {
            // A client that does not read loses output; one that is gone is noticed by the reading thread.
            let _ = send(client, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
    }
}

/// Removes a socket's name when the console is gone.
struct Name(PathBuf);

impl Drop for Name {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn socket(path: &Path) -> std::io::Result<Arc<Line>> {
    // A socket that nobody listens on is left over from a machine that was killed.
    if UnixStream::connect(path).is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused) {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    let client = Arc::new(Client::default());
    let line = Line::new(Box::new(SocketEnd(Arc::clone(&client))));
    let (weak, name) = (Arc::downgrade(&line), Name(path.into()));
    spawn("console-socket", move || {
        let _name = name;
        let mut buffer = [0; 4096];
        while let Some(line) = weak.upgrade() {
            let stream = locked(&client.0).as_ref().and_then(|s| s.try_clone().ok());
            match stream {
                None => match listener.accept() {
                    Ok((stream, _)) => {
                        let _ = stream.set_read_timeout(Some(Duration::from_millis(500)));
                        *locked(&client.0) = Some(stream);
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(50)),
                },
                Some(mut stream) => match stream.read(&mut buffer) {
                    Ok(n) if n > 0 => line.push_all(&buffer[..n]),
                    Err(e)
                        if matches!(
                            e.kind(),
                            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                        ) => {}
                    _ => *locked(&client.0) = None,
                },
            }
        }
    })?;
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn opener() -> Opener {
        Opener { stdio: None, stdio_line: None, notices: Vec::new() }
    }

    fn read_when_there(line: &Line) -> Vec<u8> {
        let end = Instant::now() + Duration::from_secs(20);
        let mut buffer = [0; 64];
        while Instant::now() < end {
            match line.read(&mut buffer) {
                0 => std::thread::sleep(Duration::from_millis(2)),
                n => return buffer[..n].to_vec(),
            }
        }
        panic!("nothing came");
    }

    #[test]
    fn a_socket_carries_both_directions_and_takes_the_next_client() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let line = opener().open("serial", &CharConfig::Socket(path.clone())).unwrap();
        for _ in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"in").unwrap();
            assert_eq!(read_when_there(&line), b"in");
            ConsoleBackend::write(line.as_ref(), b"out");
            let mut buffer = [0; 3];
            client.read_exact(&mut buffer).unwrap();
            assert_eq!(&buffer, b"out");
        }
        assert!(opener().open("serial", &CharConfig::Socket(path)).is_err(), "the name is taken");
    }

    #[test]
    fn a_pseudo_terminal_is_raw_and_named() {
        let mut o = opener();
        let line = o.open("serial", &CharConfig::Pty).unwrap();
        let name = o.notices[0].strip_prefix("serial is on ").unwrap();
        let mut client = File::options().read(true).write(true).open(name).unwrap();
        client.write_all(b"\x03a\r").unwrap();
        assert_eq!(read_when_there(&line), b"\x03a\r");
        ConsoleBackend::write(line.as_ref(), b"x\n");
        let mut buffer = [0; 2];
        client.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"x\n");
    }

    #[test]
    fn input_beyond_the_limit_is_not_taken() {
        let line = opener().open("serial", &CharConfig::None).unwrap();
        assert_eq!(line.push(&vec![1; INPUT_LIMIT + 5]), INPUT_LIMIT);
        assert_eq!(line.push(b"x"), 0);
    }
}
