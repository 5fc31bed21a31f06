//! The passt process: its command line, what it says, and its end.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;

use super::{
    Forward, GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, PREFIX, PasstError, PasstOptions, Protocol,
};

/// How many of its last lines are kept for error messages.
const KEPT_LINES: usize = 8;
/// How long passt may take to end by itself after its socket is closed.
const END_WAIT: Duration = Duration::from_millis(500);

/// A child process that ends with this value.
#[derive(Debug)]
pub(super) struct Process {
    id: u32,
    child: Mutex<Child>,
    said: Arc<Mutex<VecDeque<String>>>,
    log: Mutex<Option<thread::JoinHandle<()>>>,
    /// The same socket as the stream's, to hang up before waiting for passt's end.
    socket: OwnedFd,
}

impl Process {
    /// Gives our end of its socket, which does not block, and the process.
    pub(super) fn start(options: &PasstOptions) -> Result<(OwnedFd, Self), PasstError> {
        let start_error = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => PasstError::Missing { program: options.program.clone() },
            _ => PasstError::Start { program: options.program.clone(), source },
        };
        let (ours, theirs) = UnixStream::pair().map_err(start_error)?;
        ours.set_nonblocking(true).map_err(start_error)?;
        let ours = OwnedFd::from(ours);
        let socket = ours.try_clone().map_err(start_error)?;
        let mut child = spawn(options, theirs.into()).map_err(start_error)?;
        let said = Arc::new(Mutex::new(VecDeque::new()));
        let log = child.stderr.take().map(|stderr| {
            let said = Arc::clone(&said);
            thread::Builder::new().name("passt-log".to_owned()).spawn(move || listen(stderr, &said))
        });
        let log = log.transpose().map_err(start_error)?;
        let process = Self { id: child.id(), child: Mutex::new(child), said, log: Mutex::new(log), socket };
        Ok((ours, process))
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// How it ended and what it said last, after its socket was lost. Waits a moment for both.
    pub(super) fn last_words(&self) -> (String, String) {
        let status = match self.wait() {
            Some(status) => status.to_string(),
            None => "still running".to_owned(),
        };
        // It has ended, so its standard error is at its end, too, and the thread with it.
        if let Some(log) = self.log.lock().unwrap_or_else(PoisonError::into_inner).take() {
            if status == "still running" {
                drop(log);
            } else {
                let _ = log.join();
            }
        }
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let message = said.iter().map(String::as_str).collect::<Vec<_>>().join("; ");
        (status, if message.is_empty() { "it said nothing".to_owned() } else { message })
    }

    fn wait(&self) -> Option<std::process::ExitStatus> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        let end = Instant::now() + END_WAIT;
        loop {
            match child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if Instant::now() < end => thread::sleep(Duration::from_millis(2)),
                _ => return None,
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        if self.wait().is_none() {
            let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts passt with its end of the socket, under the number that it has here. (As standard input it would do for
/// older versions, but newer ones close all descriptors after that one, standard error among them.)
fn spawn(options: &PasstOptions, socket: OwnedFd) -> io::Result<Child> {
    /// While a socket may be inherited, only the process that it is for may be started: another would keep it open
    /// and so hide the end of its passt.
    static STARTING: Mutex<()> = Mutex::new(());
    let _alone = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::empty())?;
    let child = Command::new(&options.program)
        .args(arguments(options, &HostRoutes::read(), &socket))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // The terminal's signals are ours to handle.
        .process_group(0)
        .spawn();
    drop(socket);
    child
}

/// Keeps and logs what passt says.
fn listen(stderr: ChildStderr, said: &Mutex<VecDeque<String>>) {
    for line in BufReader::new(stderr).lines() {
        let Ok(line) = line else { return };
        let line = line.trim();
        // It complains about missing system loggers, and announces that it gives root away, which is as it should be.
        if line.is_empty() || line.starts_with("Failed to send") || line.starts_with("Don't run as root") {
            continue;
        }
        tracing::debug!(target: "passt", "{line}");
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() == KEPT_LINES {
            said.pop_front();
        }
        said.push_back(line.to_owned());
    }
}

/// Waits until there is something to read, or the time is over.
pub(super) fn wait_readable(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<()> {
    let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
    match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// passt goes on when it can listen on some of a forward's addresses only, so all are tried before.
pub(super) fn check_port(forward: &Forward) -> Result<(), PasstError> {
    let Forward { protocol, address, host_port: port, guest_port: _ } = *forward;
    let addresses = match address {
        Some(address) => vec![address],
        None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
    };
    for address in addresses {
        let at = SocketAddr::new(address, port);
        let bound = match protocol {
            Protocol::Tcp => TcpListener::bind(at).map(drop),
            Protocol::Udp => UdpSocket::bind(at).map(drop),
        };
        match bound {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                return Err(PasstError::PortInUse { protocol, address, port });
            }
            // A host without IPv6 forwards IPv4 only.
            Err(_) if forward.address.is_none() && address.is_ipv6() => {}
            Err(source) => {
                let hint = match source.kind() {
                    io::ErrorKind::PermissionDenied => "; choose a host port from 1024 on",
                    io::ErrorKind::AddrNotAvailable => "; this host has no such address",
                    _ => "",
                };
                return Err(PasstError::Port { protocol, address, port, source, hint });
            }
        }
    }
    Ok(())
}

/// Over which interfaces the host reaches the world.
#[derive(Debug, Default, PartialEq, Eq)]
struct HostRoutes {
    ipv4: Option<String>,
    ipv6: Option<String>,
}

impl HostRoutes {
    fn read() -> Self {
        let text = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self::parse(&text("/proc/net/route"), &text("/proc/net/ipv6_route"))
    }

    /// The kernel's tables: columns Iface, Destination, Gateway, Flags, …, Mask; and destination, its length, …,
    /// flags, interface.
    fn parse(ipv4: &str, ipv6: &str) -> Self {
        /// RTF_REJECT of linux/route.h: a route that leads nowhere.
        const REJECT: u32 = 0x200;
        let usable = |flags: &str| u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & REJECT == 0);
        let ipv4 =
            ipv4.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|columns| {
                columns.len() > 7
                    && columns[1] == "00000000"
                    && columns[7] == "00000000"
                    && usable(columns[3])
            });
        let ipv6 = ipv6.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|columns| {
            columns.len() > 9
                && columns[0].bytes().all(|digit| digit == b'0')
                && columns[1] == "00"
                && columns[9] != "lo"
                && usable(columns[8])
        });
        Self {
            ipv4: ipv4.map(|columns| columns[0].to_owned()),
            ipv6: ipv6.map(|columns| columns[9].to_owned()),
        }
    }
}

/// Does the host have a default route for IPv6, so that passt offers it?
#[cfg(test)]
pub(super) fn host_has_ipv6() -> bool {
    HostRoutes::read().ipv6.is_some()
}

fn arguments(options: &PasstOptions, routes: &HostRoutes, socket: &impl AsRawFd) -> Vec<String> {
    let mut arguments: Vec<String> = ["--foreground", "--quiet"].map(str::to_owned).into();
    let mut add = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    add("--fd", socket.as_raw_fd().to_string());
    add("--address", GUEST_ADDRESS.to_string());
    add("--netmask", PREFIX.to_string());
    add("--gateway", GATEWAY_ADDRESS.to_string());
    add("--mac-addr", GATEWAY_MAC.map(|byte| format!("{byte:02x}")).join(":"));
    match routes {
        HostRoutes { ipv4: Some(_), .. } => {}
        // passt wants an interface for IPv4 even if nothing leads out of it: the host itself can still be reached.
        HostRoutes { ipv4: None, ipv6: Some(interface) } => add("--interface", interface.clone()),
        HostRoutes { ipv4: None, ipv6: None } => add("--interface", "lo".to_owned()),
    }
    for Forward { protocol, address, host_port, guest_port } in &options.forwards {
        let on = address.map(|address: IpAddr| format!("{address}/")).unwrap_or_default();
        let name = match protocol {
            Protocol::Tcp => "--tcp-ports",
            Protocol::Udp => "--udp-ports",
        };
        add(name, format!("{on}{host_port}:{guest_port}"));
    }
    if routes.ipv6.is_none() {
        arguments.push("--ipv4-only".to_owned());
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTE: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
        eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
    const ROUTE6: &str = "fd000000000000000000000000000000 40 00000000000000000000000000000000 00 \
        00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n\
        00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
        00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo\n\
        00000000000000000000000000000000 00 00000000000000000000000000000000 00 \
        fd000000000000000000000000000001 00000400 00000001 00000000 00000003    wlan0\n";

    #[test]
    fn finds_the_default_routes() {
        let (eth0, wlan0) = (Some("eth0".to_owned()), Some("wlan0".to_owned()));
        assert_eq!(HostRoutes::parse(ROUTE, ROUTE6), HostRoutes { ipv4: eth0, ipv6: wlan0 });
        let lo_only: String = ROUTE6.lines().take(2).map(|line| format!("{line}\n")).collect();
        assert_eq!(HostRoutes::parse("Iface\n", &lo_only), HostRoutes::default());
        assert_eq!(HostRoutes::parse("", "short line\n"), HostRoutes::default());
    }

    #[test]
    fn writes_the_command_line() {
        let forward = |protocol, address: Option<&str>, host_port, guest_port| Forward {
            protocol,
            address: address.map(|address| address.parse().unwrap()),
            host_port,
            guest_port,
        };
        let options = PasstOptions {
            forwards: vec![
                forward(Protocol::Tcp, None, 2222, 22),
                forward(Protocol::Udp, Some("127.0.0.1"), 5353, 53),
                forward(Protocol::Tcp, Some("::1"), 8080, 80),
            ],
            ..PasstOptions::default()
        };
        let line = |routes: &HostRoutes| arguments(&options, routes, &0).join(" ");
        let common = "--foreground --quiet --fd 0 --address 10.0.2.15 --netmask 24 --gateway 10.0.2.2 \
            --mac-addr 52:55:0a:00:02:02";
        let ports = "--tcp-ports 2222:22 --udp-ports 127.0.0.1/5353:53 --tcp-ports ::1/8080:80";
        let (v4, v6) = (Some("eth0".to_owned()), Some("eth1".to_owned()));
        assert_eq!(line(&HostRoutes { ipv4: v4.clone(), ipv6: v6.clone() }), format!("{common} {ports}"));
        assert_eq!(line(&HostRoutes { ipv4: v4, ipv6: None }), format!("{common} {ports} --ipv4-only"));
        assert_eq!(line(&HostRoutes { ipv4: None, ipv6: v6 }), format!("{common} --interface eth1 {ports}"));
        assert_eq!(line(&HostRoutes::default()), format!("{common} --interface lo {ports} --ipv4-only"));
    }

    #[test]
    fn names_the_port_that_is_in_use() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let forward = Forward {
            protocol: Protocol::Tcp,
            address: Some(Ipv4Addr::LOCALHOST.into()),
            host_port: port,
            guest_port: 22,
        };
        let error = check_port(&forward).unwrap_err();
        assert!(matches!(error, PasstError::PortInUse { port: found, .. } if found == port));
        assert!(error.to_string().contains(&format!("127.0.0.1:{port} is in use")), "{error}");
        drop(taken);
        check_port(&forward).unwrap();
        let elsewhere = Forward { address: Some("192.0.2.77".parse().unwrap()), ..forward };
        assert!(check_port(&elsewhere).unwrap_err().to_string().contains("no such address"));
    }
}
