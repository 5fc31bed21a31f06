//! The header that travels with a frame: `struct virtio_net_hdr` (virtio 1.2, 5.1.6), which Linux' tap speaks too.

use bitflags::bitflags;
use thiserror::Error;

/// Length of the header in guest memory, in bytes (virtio 1.2, 5.1.6: `num_buffers` is always there).
pub const VNET_HEADER_LEN: usize = 12;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum field holds the pseudo header's sum only.
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_F_DATA_VALID`: whoever made the header vouches for the checksum.
const DATA_VALID: u8 = 2;

/// `VIRTIO_NET_HDR_GSO_*`, without the ECN bit.
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP: u8 = 3;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`: the segments may carry ECN's CWR.
const GSO_ECN: u8 = 0x80;

bitflags! {
    /// Work on a frame that one side may leave to the other (virtio 1.2, 5.1.3; the same set serves both
    /// directions: `VIRTIO_NET_F_CSUM` and `HOST_*` when the guest sends, `GUEST_*` when it receives).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct Offloads: u32 {
        /// Transport checksums: `VIRTIO_NET_F_CSUM`, `VIRTIO_NET_F_GUEST_CSUM`.
        const CHECKSUM = 1;
        /// TCP segmentation over IPv4: `VIRTIO_NET_F_HOST_TSO4`, `VIRTIO_NET_F_GUEST_TSO4`.
        const TSO4 = 2;
        /// TCP segmentation over IPv6: `VIRTIO_NET_F_HOST_TSO6`, `VIRTIO_NET_F_GUEST_TSO6`.
        const TSO6 = 4;
        /// TCP segmentation of segments with ECN: `VIRTIO_NET_F_HOST_ECN`, `VIRTIO_NET_F_GUEST_ECN`.
        const TSO_ECN = 8;
    }
}

/// A frame that is to be cut into several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gso {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
}

/// Why a header cannot be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum VnetHeaderError {
    /// The segmentation type is none that was offered.
    #[error("unknown or never offered segmentation type {0:#x}")]
    GsoType(u8),
    /// Segmentation is asked for with segments of no bytes.
    #[error("segmentation into segments of 0 bytes")]
    GsoSize,
    /// Segmentation without leaving the checksum undone (virtio 1.2, 5.1.6.2: the driver MUST set both).
    #[error("segmentation without checksum offload")]
    GsoWithoutChecksum,
}

/// What is undone in, or known about, a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VnetHeader {
    /// The transport checksum is to be computed: from byte `.0` of the frame to its end, stored (big-endian) `.1`
    /// bytes after `.0`.
    pub needs_checksum: Option<(u16, u16)>,
    /// The checksum has been verified or never left this machine; only in received frames.
    pub checksum_valid: bool,
    /// The frame is a large segment: its kind, and how many payload bytes (never 0) each piece may have.
    pub gso: Option<(Gso, u16)>,
    /// The segments carry ECN's CWR flag.
    pub gso_ecn: bool,
    /// Length of the headers to repeat in every segment, in bytes: a hint only, never to be trusted (0: unknown).
    pub header_len: u16,
}

impl VnetHeader {
    /// Reads the little-endian header as it stands in guest memory (or as a tap gives it). `num_buffers`, in its
    /// last two bytes, is the device's business.
    ///
    /// # Errors
    /// [`VnetHeaderError`] for what no driver may send.
    pub fn from_bytes(bytes: &[u8; VNET_HEADER_LEN]) -> Result<Self, VnetHeaderError> {
        let [flags, gso_type, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = *bytes;
        let needs_checksum =
            (flags & NEEDS_CSUM != 0).then_some((u16::from_le_bytes([c0, c1]), u16::from_le_bytes([o0, o1])));
        let size = u16::from_le_bytes([s0, s1]);
        let gso = match gso_type & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCPV4 => Some((Gso::Tcp4, size)),
            GSO_TCPV6 => Some((Gso::Tcp6, size)),
            // Named because they exist: UDP fragmentation and UDP segmentation are never offered here.
            GSO_UDP | GSO_UDP_L4 => return Err(VnetHeaderError::GsoType(gso_type)),
            _ => return Err(VnetHeaderError::GsoType(gso_type)),
        };
        if gso.is_some() && size == 0 {
            return Err(VnetHeaderError::GsoSize);
        }
        if gso.is_some() && needs_checksum.is_none() {
            return Err(VnetHeaderError::GsoWithoutChecksum);
        }
        Ok(Self {
            needs_checksum,
            checksum_valid: flags & DATA_VALID != 0,
            gso,
            gso_ecn: gso.is_some() && gso_type & GSO_ECN != 0,
            header_len: u16::from_le_bytes([h0, h1]),
        })
    }

    /// The header as it goes into guest memory (or to a tap), little-endian, with `num_buffers` as its last field.
    #[must_use]
    pub fn to_bytes(&self, num_buffers: u16) -> [u8; VNET_HEADER_LEN] {
        let Self { needs_checksum, checksum_valid, gso, gso_ecn, header_len } = *self;
        let mut flags = if checksum_valid { DATA_VALID } else { 0 };
        let (start, offset) = needs_checksum.unwrap_or_default();
        if needs_checksum.is_some() {
            flags |= NEEDS_CSUM;
        }
        let (mut gso_type, gso_size) = match gso {
            None => (GSO_NONE, 0),
            Some((Gso::Tcp4, size)) => (GSO_TCPV4, size),
            Some((Gso::Tcp6, size)) => (GSO_TCPV6, size),
        };
        if gso.is_some() && gso_ecn {
            gso_type |= GSO_ECN;
        }
        let [h0, h1] = header_len.to_le_bytes();
        let [s0, s1] = gso_size.to_le_bytes();
        let [c0, c1] = start.to_le_bytes();
        let [o0, o1] = offset.to_le_bytes();
        let [n0, n1] = num_buffers.to_le_bytes();
        [flags, gso_type, h0, h1, s0, s1, c0, c1, o0, o1, n0, n1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_linux_writes_for_a_tso_segment() {
        // flags NEEDS_CSUM, TCPv4, hdr_len 54, gso_size 1448, csum_start 34, csum_offset 16.
        let bytes = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
        let header = VnetHeader::from_bytes(&bytes).unwrap();
        assert_eq!(
            header,
            VnetHeader {
                needs_checksum: Some((34, 16)),
                checksum_valid: false,
                gso: Some((Gso::Tcp4, 1448)),
                gso_ecn: false,
                header_len: 54
            }
        );
        assert_eq!(header.to_bytes(0), bytes);
    }

    #[test]
    fn refuses_what_was_never_offered() {
        let with = |flags, gso_type, size| {
            VnetHeader::from_bytes(&[flags, gso_type, 0, 0, size, 0, 34, 0, 16, 0, 0, 0])
        };
        assert_eq!(with(1, 3, 100), Err(VnetHeaderError::GsoType(3)));
        assert_eq!(with(1, 5, 100), Err(VnetHeaderError::GsoType(5)));
        assert_eq!(with(1, 0x7f, 100), Err(VnetHeaderError::GsoType(0x7f)));
        assert_eq!(with(1, 1, 0), Err(VnetHeaderError::GsoSize));
        assert_eq!(with(0, 1, 100), Err(VnetHeaderError::GsoWithoutChecksum));
    }

    #[test]
    fn round_trips() {
        for header in [
            VnetHeader::default(),
            VnetHeader { checksum_valid: true, ..VnetHeader::default() },
            VnetHeader {
                needs_checksum: Some((54, 16)),
                gso: Some((Gso::Tcp6, 9000)),
                gso_ecn: true,
                header_len: 74,
                ..VnetHeader::default()
            },
        ] {
            assert_eq!(VnetHeader::from_bytes(&header.to_bytes(3)), Ok(header));
        }
    }
}
