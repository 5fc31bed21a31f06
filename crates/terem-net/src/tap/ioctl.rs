//! The kernel's interface to taps (linux/if_tun.h, Documentation/networking/tuntap.rst). The only unsafe code of
//! this crate: ioctls, whose argument types the compiler cannot check.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use bitflags::bitflags;
use rustix::io::Errno;

use crate::Offloads;

/// IFNAMSIZ of linux/if.h, with the zero at the end.
pub(super) const NAME_LEN: usize = 16;

bitflags! {
    /// `IFF_*` of linux/if_tun.h.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) struct Flags: u16 {
        /// Ethernet frames rather than IP packets.
        const TAP = 0x0002;
        /// No packet information before each frame.
        const NO_PI = 0x1000;
        /// A virtio header before each frame.
        const VNET_HDR = 0x4000;
        const _ = !0;
    }
}

/// `TUN_F_*` of linux/if_tun.h.
const TUN_F_CSUM: libc::c_uint = 0x01;
const TUN_F_TSO4: libc::c_uint = 0x02;
const TUN_F_TSO6: libc::c_uint = 0x04;
const TUN_F_TSO_ECN: libc::c_uint = 0x08;

/// `struct ifreq` of linux/if.h: a name, and a union that begins with what is asked for or told.
#[repr(C, align(8))]
struct InterfaceRequest {
    name: [u8; NAME_LEN],
    value: [u8; 24],
}

impl InterfaceRequest {
    fn new(name: [u8; NAME_LEN]) -> Self {
        Self { name, value: [0; 24] }
    }
}

/// A name with zeros behind it, if an interface may be called so (dev_valid_name in Linux' net/core/dev.c).
pub(super) fn name_bytes(name: &str) -> Option<[u8; NAME_LEN]> {
    let bad =
        |byte: u8| byte == b'/' || byte == b':' || byte.is_ascii_whitespace() || byte == 0 || byte == b'%';
    if name.is_empty() || name.len() >= NAME_LEN || name == "." || name == ".." || name.bytes().any(bad) {
        return None;
    }
    let mut bytes = [0; NAME_LEN];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    Some(bytes)
}

fn check(result: libc::c_int) -> Result<(), Errno> {
    if result < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(())
}

/// Makes or takes the interface: TUNSETIFF.
pub(super) fn set_interface(device: &impl AsFd, name: [u8; NAME_LEN], flags: Flags) -> Result<(), Errno> {
    let mut request = InterfaceRequest::new(name);
    request.value[..2].copy_from_slice(&flags.bits().to_ne_bytes());
    // SAFETY: the descriptor is open as long as it is borrowed; the request is a whole `struct ifreq`, which the
    // kernel reads and writes during the call only.
    check(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

/// The name and flags of an open tap: TUNGETIFF.
pub(super) fn interface(device: &impl AsFd) -> Result<(String, Flags), Errno> {
    let mut request = InterfaceRequest::new([0; NAME_LEN]);
    // SAFETY: as in set_interface.
    check(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), libc::TUNGETIFF, &raw mut request) })?;
    let length = request.name.iter().position(|&byte| byte == 0).unwrap_or(NAME_LEN);
    let name = String::from_utf8_lossy(&request.name[..length]).into_owned();
    let [a, b, ..] = request.value;
    Ok((name, Flags::from_bits_retain(u16::from_ne_bytes([a, b]))))
}

/// The MTU of the interface of this name: SIOCGIFMTU.
pub(super) fn mtu(name: [u8; NAME_LEN]) -> Result<u16, Errno> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    let mut request = InterfaceRequest::new(name);
    // SAFETY: as in set_interface, with a socket that is ours.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) })?;
    let [a, b, c, d, ..] = request.value;
    Ok(u16::try_from(i32::from_ne_bytes([a, b, c, d])).unwrap_or(u16::MAX))
}

/// The virtio header's length: TUNSETVNETHDRSZ.
pub(super) fn set_header_length(device: &impl AsFd, length: usize) -> Result<(), Errno> {
    let length = libc::c_int::try_from(length).map_err(|_| Errno::INVAL)?;
    // SAFETY: the descriptor is open as long as it is borrowed; the kernel reads one int during the call.
    check(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) })
}

/// The virtio header's byte order, which matters for inherited taps: TUNSETVNETLE.
pub(super) fn set_little_endian(device: &impl AsFd) -> Result<(), Errno> {
    let yes: libc::c_int = 1;
    // SAFETY: the descriptor is open as long as it is borrowed; the kernel reads one int during the call.
    check(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), libc::TUNSETVNETLE, &raw const yes) })
}

/// What the reader can do, so what the host's kernel may leave undone: TUNSETOFFLOAD.
pub(super) fn set_offloads(device: &impl AsFd, offloads: Offloads) -> Result<(), Errno> {
    let bits = [
        (Offloads::CHECKSUM, TUN_F_CSUM),
        (Offloads::TSO4, TUN_F_TSO4),
        (Offloads::TSO6, TUN_F_TSO6),
        (Offloads::TSO_ECN, TUN_F_TSO_ECN),
    ];
    // Without checksums the kernel refuses segments, so they are not asked for either.
    let offloads = if offloads.contains(Offloads::CHECKSUM) { offloads } else { Offloads::empty() };
    let value =
        bits.iter().filter(|(ours, _)| offloads.contains(*ours)).fold(0, |sum, (_, theirs)| sum | theirs);
    // SAFETY: the descriptor is open as long as it is borrowed; the argument is a number, no pointer.
    check(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(value)) })
}
