//! User-mode networking by passt, which runs as its own process and needs no privileges.
//!
//! passt turns the guest's TCP and UDP into sockets of the host, and answers ARP, NDP, DHCP, DHCPv6 and router
//! solicitations itself. It inherits one end of a socket pair (`--fd N`), so nothing appears in a file system, nobody
//! else can connect, and it ends by itself when our end is closed, also when we are killed.
//!
//! The guest sees a network of its own, the same on every host (QEMU's user-mode addresses, which people know):
//! it is 10.0.2.15, its router is 10.0.2.2, and at the router's address are the host's own loopback services. IPv6
//! is passt's own choice, after the host's default route.

mod process;
mod stream;

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::process::Process;
use self::stream::FrameStream;
use crate::complete::complete;
use crate::{MAX_FRAME, NetBackend, Offloads, Received, Transmit, VnetHeader};

/// The guest's address by DHCP.
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The router's address, which is also the way to the host's own services.
pub const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The width of the guest's network in bits.
const PREFIX: u8 = 24;
/// The router's MAC address: locally administered, with its IP address in it.
const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];
/// Who asks whether passt is up ([`Passt::wait_until_ready`]); never seen by anybody else.
const PROBE_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 15];
/// passt drops longer frames (ETH_MAX_MTU in its tap.c).
const PASST_MAX_FRAME: usize = 65_535;
/// passt's own default, which it tells by DHCP as well: the largest MTU, rounded down to 32 bits.
const PASST_MTU: u16 = 65_520;

/// A transport protocol whose ports can be forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A port of the host that leads into the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Forward {
    /// What is forwarded.
    pub protocol: Protocol,
    /// The host's address to listen on; all of them, IPv4 and IPv6, when `None`.
    pub address: Option<IpAddr>,
    /// The host's port; never 0.
    pub host_port: u16,
    /// The guest's port; never 0.
    pub guest_port: u16,
}

/// How to start passt.
#[derive(Debug, Clone)]
pub struct PasstOptions {
    /// The program: a path, or a name that is looked for in `PATH`.
    pub program: PathBuf,
    /// Ports that lead into the guest.
    pub forwards: Vec<Forward>,
}

impl Default for PasstOptions {
    fn default() -> Self {
        Self { program: "passt".into(), forwards: Vec::new() }
    }
}

/// Why user-mode networking cannot be had.
#[derive(Debug, Error)]
pub enum PasstError {
    /// The program is not there.
    #[error(
        "user-mode networking needs the program `{}`, which is not installed: install it (Debian: apt-get install \
         passt), or choose another network (--net tap=NAME, --net none)",
        program.display()
    )]
    Missing {
        /// What was looked for.
        program: PathBuf,
    },
    /// It cannot be started.
    #[error("cannot start {}: {source}", program.display())]
    Start {
        /// What was to be started.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A port to forward is taken by another process.
    #[error(
        "cannot forward {protocol} port {port}: {address}:{port} is in use by another process; choose another host port"
    )]
    PortInUse {
        /// TCP or UDP.
        protocol: Protocol,
        /// The address on which it is in use.
        address: IpAddr,
        /// The host's port.
        port: u16,
    },
    /// A port to forward cannot be listened on.
    #[error("cannot forward {protocol} port {port} of {address}: {source}{hint}")]
    Port {
        /// TCP or UDP.
        protocol: Protocol,
        /// The host's address.
        address: IpAddr,
        /// The host's port.
        port: u16,
        /// The host kernel's reason.
        source: io::Error,
        /// What to do, or nothing.
        hint: &'static str,
    },
    /// It started and ended at once.
    #[error("passt does not start ({status}): {message}")]
    Failed {
        /// Its exit status.
        status: String,
        /// What it said.
        message: String,
    },
    /// It runs, but does not answer.
    #[error("passt does not answer after {} s", after.as_secs_f32())]
    Silent {
        /// How long it was waited for.
        after: Duration,
    },
}

/// A running passt with one guest.
#[derive(Debug)]
pub struct Passt {
    stream: FrameStream,
    process: Process,
    checksum_agreed: AtomicBool,
}

impl Passt {
    /// Checks the ports and starts the process; does not wait for it to be ready, so that the caller can go on with
    /// other things ([`Self::wait_until_ready`]).
    ///
    /// # Errors
    /// [`PasstError`], but failures that passt itself finds show only later.
    pub fn start(options: &PasstOptions) -> Result<Self, PasstError> {
        for forward in &options.forwards {
            process::check_port(forward)?;
        }
        let (socket, process) = Process::start(options)?;
        Ok(Self { stream: FrameStream::new(socket), process, checksum_agreed: AtomicBool::new(false) })
    }

    /// Waits until passt answers, as seen by an ARP request for the router. To be called before the guest runs: what
    /// else arrives until then is dropped.
    ///
    /// # Errors
    /// [`PasstError::Failed`] with what passt said, [`PasstError::Silent`] after `limit`.
    pub fn wait_until_ready(&self, limit: Duration) -> Result<(), PasstError> {
        let answered = self.send_probe().and_then(|()| self.await_probe(limit));
        match answered {
            Ok(true) => Ok(()),
            Ok(false) => Err(PasstError::Silent { after: limit }),
            Err(_) => {
                let (status, message) = self.process.last_words();
                Err(PasstError::Failed { status, message })
            }
        }
    }

    fn send_probe(&self) -> io::Result<()> {
        // RFC 826: hardware type 1 (Ethernet), protocol IPv4, lengths 6 and 4, operation 1 (request).
        let mut request = vec![0xff; 6];
        request.extend_from_slice(&PROBE_MAC);
        request.extend_from_slice(&[0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1]);
        request.extend_from_slice(&PROBE_MAC);
        request.extend_from_slice(&GUEST_ADDRESS.octets());
        request.extend_from_slice(&[0; 6]);
        request.extend_from_slice(&GATEWAY_ADDRESS.octets());
        self.stream.send(|frames| frames.push(&request)).map(drop)
    }

    fn await_probe(&self, limit: Duration) -> io::Result<bool> {
        let end = std::time::Instant::now() + limit;
        let mut frame = vec![0; MAX_FRAME];
        loop {
            while let Some(length) = self.stream.receive(&mut frame)? {
                if frame[..length].starts_with(&PROBE_MAC) && frame.get(12..14) == Some(&[0x08, 0x06]) {
                    return Ok(true);
                }
            }
            let left = end.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            process::wait_readable(self.stream.fd(), left)?;
        }
    }

    /// Adds to an error of the stream why it happened, which passt may have said.
    fn explain(&self, error: &io::Error) -> io::Error {
        let (status, message) = self.process.last_words();
        io::Error::new(
            error.kind(),
            format!("the connection to passt is lost ({error}); passt {status}: {message}"),
        )
    }
}

impl NetBackend for Passt {
    fn description(&self) -> String {
        format!("passt (process {})", self.process.id())
    }

    fn link_up(&self) -> bool {
        !self.stream.is_gone()
    }

    fn mtu(&self) -> Option<u16> {
        Some(PASST_MTU)
    }

    fn transmit_offloads(&self) -> Offloads {
        Offloads::all()
    }

    /// passt's frames are complete and no longer than the receiver's segments, so only the check is saved.
    fn receive_offloads(&self) -> Offloads {
        Offloads::CHECKSUM
    }

    fn set_receive_offloads(&self, agreed: Offloads) -> io::Result<()> {
        self.checksum_agreed.store(agreed.contains(Offloads::CHECKSUM), Ordering::Relaxed);
        Ok(())
    }

    fn transmit(&self, header: &VnetHeader, frame: &[IoSlice<'_>]) -> io::Result<Transmit> {
        let sent = self.stream.send(|frames| {
            let Some(mut copy) = crate::gather(frame) else {
                tracing::debug!("dropping a frame longer than {MAX_FRAME} bytes");
                return;
            };
            if let Err(error) = complete(header, &mut copy, PASST_MAX_FRAME, |frame| frames.push(frame)) {
                tracing::debug!(%error, "dropping a malformed frame of the guest's");
            }
        });
        sent.map_err(|error| self.explain(&error))
    }

    fn has_unsent(&self) -> bool {
        self.stream.has_unsent()
    }

    fn flush(&self) -> io::Result<()> {
        self.stream.flush().map_err(|error| self.explain(&error))
    }

    fn receive(&self, frame: &mut [u8]) -> io::Result<Option<Received>> {
        let length = self.stream.receive(frame).map_err(|error| self.explain(&error))?;
        let checksum_valid = self.checksum_agreed.load(Ordering::Relaxed);
        let header = VnetHeader { checksum_valid, ..VnetHeader::default() };
        Ok(length.map(|length| Received { header, length }))
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.stream.fd())
    }
}

#[cfg(test)]
mod tests;
