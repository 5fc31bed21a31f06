//! Network backends: the way out for a guest's Ethernet frames.
//!
//! A network device (virtio-net, e1000) sees only [`NetBackend`]: it hands over whole Ethernet frames with a
//! [`VnetHeader`] that says what the guest left undone (checksum, segmentation), and takes frames the same way.
//! What a backend cannot pass on to its peer undone, it finishes in software, so that a device can offer the
//! same offloads with every backend.
//!
//! ```text
//!  virtio-net ──transmit(header, frame)──> NetBackend ──> user  (sockets of this process, no privileges)
//!             <──receive(frame)──────────             ──> tap   (by name, or an inherited descriptor)
//!             <──poll_fd() readable──────             ──> none  (no cable)
//! ```
//!
//! Frames have no frame check sequence. Everything in a frame comes from the guest or from the wire: no
//! implementation may panic, hang or read past its end for any content, length or header.

#![deny(unsafe_code)] // allowed for the tap's ioctls only

use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

mod checksum;
mod complete;
mod forward;
mod none;
mod tap;
mod user;
mod vnet;

pub use forward::{Forward, ForwardError, Protocol};
pub use none::NoNetwork;
pub use tap::{Tap, TapError};
#[cfg(feature = "fuzzing")]
pub use user::fuzz;
pub use user::{GATEWAY_ADDRESS, GUEST_ADDRESS, UserNet, UserNetError, UserOptions};
pub use vnet::{Gso, Offloads, VNET_HEADER_LEN, VnetHeader, VnetHeaderError};

/// The largest Ethernet frame that a backend takes or gives, in bytes: virtio 1.2, 5.1.6.3.1 (65,562 with the
/// 12-byte header), enough for a 64 KiB segment with its headers.
pub const MAX_FRAME: usize = 65_550;

/// The Ethernet header: destination, source, type. Shorter frames are refused.
pub const MIN_FRAME: usize = 14;

/// What became of a frame given to [`NetBackend::transmit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transmit {
    /// The backend has it (or has dropped it, as a wire may): the device may return the buffers to the guest.
    Taken,
    /// There is no room now and nothing was taken: offer the same frame again when [`NetBackend::poll_fd`] is
    /// writable.
    Busy,
}

/// A frame delivered by [`NetBackend::receive`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// What is known about the frame's checksum and segmentation. It never says more than the guest agreed to by
    /// [`NetBackend::set_receive_offloads`].
    pub header: VnetHeader,
    /// Length of the frame in bytes, at most the buffer's and [`MAX_FRAME`].
    pub length: usize,
}

/// What a network device needs from its backend.
///
/// All calls return at once: no implementation waits for its peer. Calls from several threads are serialised
/// inside, separately for the two directions.
pub trait NetBackend: Send + Sync + std::fmt::Debug {
    /// Where the frames go, for logs and `terem inspect`: `user-mode network`, `tap tap0`, `none`.
    fn description(&self) -> String;

    /// Is there a carrier? Goes from true to false when the peer is gone for good.
    fn link_up(&self) -> bool;

    /// The MTU to tell the guest (`VIRTIO_NET_F_MTU`), in bytes of Ethernet payload; `None` leaves it the default
    /// of 1500.
    fn mtu(&self) -> Option<u16>;

    /// What the guest may leave undone in the frames it sends. Needs no negotiation.
    fn transmit_offloads(&self) -> Offloads;

    /// What may be undone in received frames if the guest agrees to it.
    fn receive_offloads(&self) -> Offloads;

    /// Tells which of [`Self::receive_offloads`] the guest has agreed to; none of them before the first call and
    /// after a device reset (call it with an empty set then).
    ///
    /// # Errors
    /// The host kernel refused (tap only). The earlier setting stays.
    fn set_receive_offloads(&self, agreed: Offloads) -> io::Result<()>;

    /// Sends one Ethernet frame, its bytes scattered over `frame`.
    ///
    /// Header and frame are the guest's and may be nonsense: a frame that cannot be sent as its header asks is
    /// dropped, logged at debug level and counted as taken.
    ///
    /// # Errors
    /// The backend is gone (link down from now on); the frame was not sent.
    fn transmit(&self, header: &VnetHeader, frame: &[IoSlice<'_>]) -> io::Result<Transmit>;

    /// Is part of a taken frame still on this side? Then wait for [`Self::poll_fd`] to be writable and call
    /// [`Self::flush`].
    fn has_unsent(&self) -> bool;

    /// Goes on sending what [`Self::has_unsent`] speaks of, as far as there is room.
    ///
    /// # Errors
    /// The backend is gone.
    fn flush(&self) -> io::Result<()>;

    /// Takes the next frame into `frame`; `None` when there is none now. Use a buffer of [`MAX_FRAME`] bytes: a
    /// frame that does not fit is dropped.
    ///
    /// # Errors
    /// The backend is gone (link down from now on).
    fn receive(&self, frame: &mut [u8]) -> io::Result<Option<Received>>;

    /// The descriptor to poll, level-triggered: readable when [`Self::receive`] may have a frame, writable when
    /// [`Self::transmit`] and [`Self::flush`] may go on. Drain `receive` until it says `None` before polling
    /// again, and after each `transmit`, since frames may already be buffered on this side. `None`: nothing will ever arrive.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>>;
}

/// A private copy of a frame; `None` if it is longer than any may be.
fn gather(frame: &[IoSlice<'_>]) -> Option<Vec<u8>> {
    let length = frame.iter().try_fold(0usize, |sum, part| sum.checked_add(part.len()))?;
    if length > MAX_FRAME {
        return None;
    }
    let mut copy = Vec::with_capacity(length);
    for part in frame {
        copy.extend_from_slice(part);
    }
    Some(copy)
}
