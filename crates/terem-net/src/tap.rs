//! Linux tap devices: frames go to and come from a network interface of the host (a bridge's port, or routed).
//!
//! The tap is told to carry the virtio header before each frame (`IFF_VNET_HDR`), so checksums and segmentation go
//! on to the host's kernel undone, and as far as a real NIC. A descriptor that somebody else made without that works
//! too: there the guest's work is finished in software.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use rustix::io::Errno;
use thiserror::Error;

use crate::complete::complete;
use crate::{NetBackend, Offloads, Received, Transmit, VNET_HEADER_LEN, VnetHeader};

mod ioctl;

use ioctl::{Flags, NAME_LEN};

/// The device that makes taps.
const TUN_DEVICE: &str = "/dev/net/tun";
/// The Ethernet payload that every network takes.
const DEFAULT_MTU: u16 = 1500;
/// An Ethernet header with a VLAN tag.
const HEADERS: usize = 18;

/// Why a tap cannot be had.
#[derive(Debug, Error)]
pub enum TapError {
    /// The name is none that an interface can have.
    #[error("{name:?} is no name for a network interface: it takes 1 to {} characters, without / and white space", NAME_LEN - 1)]
    Name {
        /// The name.
        name: String,
    },
    /// The device that makes taps cannot be opened.
    #[error(
        "cannot open {TUN_DEVICE}, which taps are made with: {source} (is the module `tun` loaded, and is the device there in this container?)"
    )]
    Device {
        /// The host kernel's reason.
        source: io::Error,
    },
    /// There is no such interface.
    #[error(
        "there is no network interface {name}. Make it, as root: ip tuntap add dev {name} mode tap user USER, then: ip \
         link set {name} up, and give it an address or a bridge"
    )]
    Missing {
        /// Its name.
        name: String,
    },
    /// It exists for another user or not at all.
    #[error(
        "no permission to use tap {name}: only root makes and takes any tap. Make one for yourself: ip tuntap add \
         dev {name} mode tap user $USER, then: ip link set {name} up"
    )]
    Permission {
        /// Its name.
        name: String,
    },
    /// Another process has it.
    #[error("tap {name} is in use by another process")]
    Busy {
        /// Its name.
        name: String,
    },
    /// The name belongs to an interface that is no tap, or to one with other settings.
    #[error("{name} is no single-queue tap: {source}")]
    Kind {
        /// Its name.
        name: String,
        /// The host kernel's reason.
        source: io::Error,
    },
    /// The inherited descriptor is no tap.
    #[error("the descriptor is no tap (Ethernet frames without packet information): {reason}")]
    Descriptor {
        /// What it is, or the host kernel's reason.
        reason: String,
    },
    /// A setting is refused.
    #[error("cannot set up tap {name}: {source}")]
    Setup {
        /// Its name.
        name: String,
        /// The host kernel's reason.
        source: io::Error,
    },
}

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    device: OwnedFd,
    name: String,
    mtu: u16,
    /// Does each frame have a [`VnetHeader`] before it?
    has_header: bool,
    agreed: AtomicU32,
    gone: AtomicBool,
}

impl Tap {
    /// Opens the tap of this name. If there is none, it is made (which takes CAP_NET_ADMIN) and vanishes again with
    /// this value; somebody has to bring it up then.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open(name: &str) -> Result<Self, TapError> {
        let raw = ioctl::name_bytes(name).ok_or_else(|| TapError::Name { name: name.to_owned() })?;
        let device = File::options().read(true).write(true).open(TUN_DEVICE);
        let device = OwnedFd::from(device.map_err(|source| TapError::Device { source })?);
        ioctl::set_interface(&device, raw, Flags::TAP | Flags::NO_PI | Flags::VNET_HDR).map_err(|error| {
            let name = name.to_owned();
            match error {
                Errno::PERM | Errno::ACCESS => TapError::Permission { name },
                Errno::BUSY => TapError::Busy { name },
                error => TapError::Kind { name, source: error.into() },
            }
        })?;
        Self::set_up(device, name.to_owned(), true)
    }

    /// Opens the tap of this name, which must be there: one that nobody has given an address or a bridge leads
    /// nowhere.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open_existing(name: &str) -> Result<Self, TapError> {
        let raw = ioctl::name_bytes(name).ok_or_else(|| TapError::Name { name: name.to_owned() })?;
        match ioctl::mtu(raw) {
            Err(Errno::NODEV) => Err(TapError::Missing { name: name.to_owned() }),
            _ => Self::open(name),
        }
    }

    /// Takes a tap that another program (libvirt, a container's network plug-in) has opened and passed on.
    ///
    /// # Errors
    /// [`TapError::Descriptor`], [`TapError::Setup`].
    pub fn from_fd(device: OwnedFd) -> Result<Self, TapError> {
        let (name, flags) = ioctl::interface(&device)
            .map_err(|error| TapError::Descriptor { reason: io::Error::from(error).to_string() })?;
        if !flags.contains(Flags::TAP | Flags::NO_PI) {
            return Err(TapError::Descriptor { reason: format!("{name} has the flags {flags:?}") });
        }
        Self::set_up(device, name, flags.contains(Flags::VNET_HDR))
    }

    fn set_up(device: OwnedFd, name: String, has_header: bool) -> Result<Self, TapError> {
        // An inherited tap may belong to another network namespace, where its name says nothing here.
        let mtu = ioctl::name_bytes(&name).and_then(|raw| ioctl::mtu(raw).ok()).unwrap_or(DEFAULT_MTU);
        let set = || -> Result<(), Errno> {
            let flags = rustix::fs::fcntl_getfl(&device)?;
            rustix::fs::fcntl_setfl(&device, flags | rustix::fs::OFlags::NONBLOCK)?;
            if has_header {
                ioctl::set_header_length(&device, VNET_HEADER_LEN)?;
                ioctl::set_little_endian(&device)?;
                ioctl::set_offloads(&device, Offloads::empty())?;
            }
            Ok(())
        };
        set().map_err(|error| TapError::Setup { name: name.clone(), source: error.into() })?;
        Ok(Self { device, name, mtu, has_header, agreed: AtomicU32::new(0), gone: AtomicBool::new(false) })
    }

    /// The interface's name on the host.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sorts out a failed read or write. Gives the error if it is for good.
    fn failed(&self, error: Errno) -> io::Result<()> {
        match error {
            // The interface was removed; or the descriptor is no more what it was.
            Errno::BADFD | Errno::NODEV | Errno::NXIO | Errno::BADF => {
                self.gone.store(true, Ordering::Relaxed);
                Err(io::Error::new(
                    io::Error::from(error).kind(),
                    format!("tap {} is gone: {error}", self.name),
                ))
            }
            // EIO: the interface is down. EINVAL: the guest's header made no sense to the kernel.
            _ => {
                tracing::debug!(tap = self.name, %error, "frame dropped");
                Ok(())
            }
        }
    }

    fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<Transmit> {
        loop {
            return match rustix::io::writev(&self.device, parts) {
                Ok(_) => Ok(Transmit::Taken),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => Ok(Transmit::Busy),
                Err(error) => self.failed(error).map(|()| Transmit::Taken),
            };
        }
    }

    /// On a tap without headers: every frame complete, in pieces as long as the guest asked for.
    fn transmit_completed(&self, header: &VnetHeader, frame: &[IoSlice<'_>]) -> io::Result<Transmit> {
        let Some(mut copy) = crate::gather(frame) else { return Ok(Transmit::Taken) };
        let mut result = Ok(Transmit::Taken);
        let limit = usize::from(self.mtu) + HEADERS;
        let done = complete(header, &mut copy, limit, |piece| {
            if let Ok(Transmit::Taken) = result {
                // A piece that finds no room is lost as on a wire: the first ones are out already.
                result = self.write(&[IoSlice::new(piece)]).map(|_| Transmit::Taken);
            }
        });
        if let Err(error) = done {
            tracing::debug!(%error, "dropping a malformed frame of the guest's");
        }
        result
    }
}

impl NetBackend for Tap {
    fn description(&self) -> String {
        format!("tap {}", self.name)
    }

    fn link_up(&self) -> bool {
        !self.gone.load(Ordering::Relaxed)
    }

    fn mtu(&self) -> Option<u16> {
        (self.mtu != DEFAULT_MTU).then_some(self.mtu)
    }

    fn transmit_offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn receive_offloads(&self) -> Offloads {
        if self.has_header { Offloads::all() } else { Offloads::empty() }
    }

    fn set_receive_offloads(&self, agreed: Offloads) -> io::Result<()> {
        let agreed = agreed & self.receive_offloads();
        if self.has_header {
            ioctl::set_offloads(&self.device, agreed)?;
        }
        self.agreed.store(agreed.bits(), Ordering::Relaxed);
        Ok(())
    }

    fn transmit(&self, header: &VnetHeader, frame: &[IoSlice<'_>]) -> io::Result<Transmit> {
        if !self.has_header {
            return self.transmit_completed(header, frame);
        }
        // What a device takes from a guest as "checksum valid" is for received frames only (virtio 1.2, 5.1.6.2).
        let header = VnetHeader { checksum_valid: false, ..*header }.to_bytes(0);
        let mut parts = Vec::with_capacity(frame.len() + 1);
        parts.push(IoSlice::new(&header));
        parts.extend(frame.iter().map(|part| IoSlice::new(part)));
        self.write(&parts)
    }

    fn has_unsent(&self) -> bool {
        false
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn receive(&self, frame: &mut [u8]) -> io::Result<Option<Received>> {
        let mut header = [0; VNET_HEADER_LEN];
        let skip = if self.has_header { VNET_HEADER_LEN } else { 0 };
        // A byte beyond the frame shows that it did not fit: reading a tap cuts frames silently.
        let mut beyond = [0; 1];
        loop {
            let room = frame.len();
            let mut parts =
                [IoSliceMut::new(&mut header[..skip]), IoSliceMut::new(frame), IoSliceMut::new(&mut beyond)];
            let length = match rustix::io::readv(&self.device, &mut parts) {
                Ok(length) => length,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return self.failed(error).map(|()| None),
            };
            let Some(length) = length.checked_sub(skip).filter(|&length| length <= room) else {
                tracing::debug!(tap = self.name, length, "dropping a frame that does not fit the buffer");
                continue;
            };
            match VnetHeader::from_bytes(&header) {
                Ok(header) => return Ok(Some(Received { header, length })),
                Err(error) => tracing::debug!(tap = self.name, %error, "dropping a frame of the host's"),
            }
        }
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.device.as_fd())
    }
}

#[cfg(test)]
mod tests;
