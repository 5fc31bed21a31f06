//! `terem disk serve`: images served over NBD.

use super::passphrase::keys;
use crate::exit::Exit;
use crate::failure::{Failure, chain};
use crate::print;
use clap::Args;
use rustix::process::geteuid;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io;
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;
use terem_block::{
    Cache, Disk, Format, NbdExport, NbdListener, NbdServer, NbdServerOptions, NbdServerTls, OpenOptions,
};

/// NBD's port.
const PORT: u16 = 10809;

/// Arguments of `terem disk serve`.
#[derive(Debug, Args)]
pub struct ServeArguments {
    /// Serve on a Unix socket; can be repeated. Without --socket and --listen: on the sockets that systemd hands over.
    #[arg(long, value_name = "PATH")]
    socket: Vec<PathBuf>,
    /// Serve on TCP; can be repeated. Not given a host: on this host only.
    #[arg(long, value_name = "[HOST:]PORT")]
    listen: Vec<String>,
    /// Name of an export, in the order of the images. Not given: empty for an only image, else the images' file names.
    #[arg(long, value_name = "NAME")]
    name: Vec<String>,
    /// Format of the images. Not given: read from each.
    #[arg(long, value_parser = super::arguments::image_format)]
    format: Option<Format>,
    /// Refuse all writes.
    #[arg(long)]
    read_only: bool,
    /// How the host's page cache is used.
    #[arg(long, value_name = "writeback|direct|unsafe", default_value = "writeback", value_parser = cache)]
    cache: Cache,
    /// Most connections to an image at a time.
    #[arg(long, value_name = "COUNT", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,
    /// Only talk TLS, with server-cert.pem and server-key.pem in this directory.
    #[arg(long, value_name = "DIRECTORY")]
    tls: Option<PathBuf>,
    /// Only take clients with a certificate that ca-cert.pem in the TLS directory has signed.
    #[arg(long, requires = "tls")]
    tls_verify: bool,
    /// End when the last client has gone.
    #[arg(long)]
    once: bool,
    /// The images.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
}

fn cache(text: &str) -> Result<Cache, String> {
    match text {
        "writeback" => Ok(Cache::Writeback),
        "direct" => Ok(Cache::Direct),
        "unsafe" => Ok(Cache::Unsafe),
        _ => Err("writeback, direct or unsafe".into()),
    }
}

/// What ends the server.
enum End {
    Signal,
    LastClient,
}

/// Serves until a signal comes, or with `--once` the last client has gone.
pub fn run(arguments: &ServeArguments) -> Result<Exit, Failure> {
    let names = names(arguments)?;
    let tls = match &arguments.tls {
        Some(directory) => Some(NbdServerTls::load(directory, arguments.tls_verify).map_err(|error| {
            Failure::configuration(format!("--tls: {error}"))
                .hint("the directory has server-cert.pem, server-key.pem and, for --tls-verify, ca-cert.pem")
        })?),
        None => None,
    };
    // Before anything is opened: a signal must not leave an image unclosed.
    let (tell, told) = channel();
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM])
        .map_err(|error| Failure::host(format!("cannot wait for signals: {error}")))?;
    let signalled = tell.clone();
    std::thread::spawn(move || {
        for _ in signals.forever() {
            let _ = signalled.send(End::Signal);
        }
    });
    let open = OpenOptions {
        format: arguments.format,
        read_only: arguments.read_only,
        cache: arguments.cache,
        keys: keys(),
        ..OpenOptions::default()
    };
    let mut disks = Vec::new();
    for path in &arguments.images {
        let disk = Disk::open(path, &open)
            .map_err(|error| Failure::host(format!("cannot serve {}: {}", path.display(), chain(&error))))?;
        disks.push(Arc::new(disk));
    }
    let mut sockets = Sockets::default();
    let listeners = sockets.open(arguments)?;
    let exports = names.iter().zip(&arguments.images).zip(&disks).map(|((name, path), disk)| NbdExport {
        name: name.clone(),
        description: path.display().to_string(),
        disk: Arc::clone(disk),
    });
    let options =
        NbdServerOptions { connections: arguments.connections.into(), tls, ..NbdServerOptions::default() };
    let server = NbdServer::start(exports.collect(), listeners, options)
        .map_err(|error| Failure::host(format!("cannot start the server: {error}")))?;
    print(&sockets.addresses(&names, arguments.tls.is_some()))?;
    loop {
        match told.recv_timeout(if arguments.once { Duration::ZERO } else { Duration::MAX }) {
            Ok(End::Signal | End::LastClient) | Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if server.wait_for_last(Duration::from_millis(200)) => {
                let _ = tell.send(End::LastClient);
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
    server.stop();
    drop(sockets);
    for disk in disks.into_iter().filter_map(Arc::into_inner) {
        let path = disk.facts().path.clone();
        disk.close().map_err(|error| {
            Failure::host(format!("cannot write the last of {}: {error}", path.display()))
        })?;
    }
    Ok(Exit::Success)
}

fn names(arguments: &ServeArguments) -> Result<Vec<String>, Failure> {
    let (names, images) = (&arguments.name, &arguments.images);
    let names: Vec<String> = match (names.len(), images.len()) {
        (0, 1) => vec![String::new()],
        (0, _) => images
            .iter()
            .map(|path| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned())
            .collect(),
        (n, m) if n == m => names.clone(),
        (n, m) => {
            return Err(Failure::configuration(format!("--name: {n} names for {m} images"))
                .hint("give a --name for each image, in their order, or none"));
        }
    };
    if let Some(long) = names.iter().find(|name| name.len() > 4096) {
        return Err(Failure::configuration(format!(
            "--name: one has {} bytes, 4096 are allowed",
            long.len()
        )));
    }
    for (i, name) in names.iter().enumerate() {
        if names[..i].contains(name) {
            return Err(Failure::configuration(format!("two exports are called {name:?}"))
                .hint("give each a --name of its own"));
        }
    }
    Ok(names)
}

/// The sockets that are served; those in the file system are removed at the end.
#[derive(Default)]
struct Sockets {
    unix: Vec<PathBuf>,
    /// `HOST:PORT`.
    tcp: Vec<String>,
}

impl Sockets {
    fn open(&mut self, arguments: &ServeArguments) -> Result<Vec<NbdListener>, Failure> {
        let mut listeners = Vec::new();
        for path in &arguments.socket {
            let listener = unix_listener(path)
                .map_err(|error| Failure::host(format!("cannot listen on {}: {error}", path.display())))?;
            self.unix.push(path.clone());
            listeners.push(NbdListener::Unix(listener));
        }
        for address in &arguments.listen {
            let full = if address.parse::<u16>().is_ok() {
                format!("localhost:{address}")
            } else if address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) {
                address.clone()
            } else {
                format!("{address}:{PORT}")
            };
            let listener = TcpListener::bind(&full)
                .map_err(|error| Failure::host(format!("cannot listen on {full}: {error}")))?;
            let bound = listener.local_addr().map_or(full, |address| address.to_string());
            self.tcp.push(bound);
            listeners.push(NbdListener::Tcp(listener));
        }
        if listeners.is_empty() {
            listeners = handed_over()?;
        }
        Ok(listeners)
    }

    /// Where clients find the exports, one a line.
    fn addresses(&self, names: &[String], tls: bool) -> String {
        let s = if tls { "s" } else { "" };
        let mut text = String::new();
        for name in names {
            let name = encoded(name);
            for path in &self.unix {
                let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                text += &format!("nbd{s}+unix:///{name}?socket={}\n", encoded(&path.to_string_lossy()));
            }
            for address in &self.tcp {
                text += &format!("nbd{s}://{address}/{name}\n");
            }
        }
        text
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for path in &self.unix {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A socket at `path`, in place of one that nobody listens on any more.
fn unix_listener(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            match UnixStream::connect(path) {
                Err(gone) if gone.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
                _ => return Err(error),
            }
            UnixListener::bind(path)
        }
        other => other,
    }
}

/// The sockets that systemd (or whoever knows its protocol, `sd_listen_fds(3)`) has opened for us.
fn handed_over() -> Result<Vec<NbdListener>, Failure> {
    let mut listeners = Vec::new();
    let mut fds = listenfd::ListenFd::from_env();
    for index in 0..fds.len() {
        if let Ok(Some(unix)) = fds.take_unix_listener(index) {
            listeners.push(NbdListener::Unix(unix));
        } else if let Ok(Some(tcp)) = fds.take_tcp_listener(index) {
            listeners.push(NbdListener::Tcp(tcp));
        }
    }
    if listeners.is_empty() {
        let directory = if geteuid().is_root() { "/run" } else { "$XDG_RUNTIME_DIR" };
        return Err(Failure::configuration("there is no socket to serve on")
            .hint(format!("--socket {directory}/disk.sock, or --listen {PORT}")));
    }
    Ok(listeners)
}

/// With all that means something in an address as %XX.
fn encoded(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' => {
                char::from(b).to_string()
            }
            _ => format!("%{b:02X}"),
        })
        .collect()
}
