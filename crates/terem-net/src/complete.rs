//! Finishing in software what the guest left undone: transport checksums, and the cutting of large TCP segments.
//!
//! The frame is a private copy, taken before anything in it is looked at, since the guest may go on writing to the
//! original. Every length in it is checked against the copy's own.

use thiserror::Error;

use crate::checksum::Sum;
use crate::{Gso, MAX_FRAME, MIN_FRAME, VnetHeader};

/// The type field's place in an Ethernet header, and its values.
const ETHER_TYPE: usize = 12;
const ETHER_IPV4: u16 = 0x0800;
const ETHER_IPV6: u16 = 0x86dd;
/// IEEE 802.1Q: four bytes of tag stand before the type.
const ETHER_VLAN: u16 = 0x8100;
const VLAN_LEN: usize = 4;
/// RFC 791, 3.1 and RFC 8200, 3: fixed header lengths and fields.
const IPV4_LEN: usize = 20;
const IPV4_TOTAL_LENGTH: usize = 2;
const IPV4_ID: usize = 4;
const IPV4_CHECKSUM: usize = 10;
const IPV4_SOURCE: usize = 12;
const IPV6_LEN: usize = 40;
const IPV6_PAYLOAD_LENGTH: usize = 4;
const IPV6_SOURCE: usize = 8;
const PROTOCOL_TCP: u16 = 6;
/// RFC 9293, 3.1.
const TCP_LEN: usize = 20;
const TCP_SEQUENCE: usize = 4;
const TCP_DATA_OFFSET: usize = 12;
const TCP_FLAGS: usize = 13;
const TCP_CHECKSUM: usize = 16;
const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
/// RFC 3168, 6.1.2: sent once for a congestion event, so in the first segment only.
const TCP_CWR: u8 = 0x80;

/// Why a frame is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(crate) enum Malformed {
    #[error("a frame of {0} bytes")]
    Length(usize),
    #[error("a checksum at byte {start} + {offset} of a frame of {length} bytes")]
    Checksum { start: u16, offset: u16, length: usize },
    #[error("segmentation of a frame that holds no such TCP segment")]
    NotTcp,
}

/// Where the headers of a large TCP segment are, in bytes from the frame's start.
#[derive(Debug, Clone, Copy)]
struct Layout {
    gso: Gso,
    ip: usize,
    tcp: usize,
    payload: usize,
}

/// Calls `emit` with each of the frames, complete and at most `limit` bytes long, that `frame` stands for. A large
/// segment that fits is not cut: the peer takes it as one.
///
/// # Errors
/// [`Malformed`]; nothing has been emitted then.
pub(crate) fn complete(
    header: &VnetHeader,
    frame: &mut [u8],
    limit: usize,
    mut emit: impl FnMut(&[u8]),
) -> Result<(), Malformed> {
    if frame.len() < MIN_FRAME || frame.len() > MAX_FRAME {
        return Err(Malformed::Length(frame.len()));
    }
    if let Some((gso, size)) = header.gso {
        let layout = Layout::of(gso, frame)?;
        return segment(layout, usize::from(size), frame, limit, emit);
    }
    if frame.len() > limit {
        return Err(Malformed::Length(frame.len()));
    }
    if let Some((start, offset)) = header.needs_checksum {
        fill_checksum(start, offset, frame)?;
    }
    emit(frame);
    Ok(())
}

/// virtio 1.2, 5.1.6.2: the sum over everything from `start`, complemented, goes to `offset` bytes after it. The
/// field holds the pseudo header's sum, so it is simply summed up with the rest.
fn fill_checksum(start: u16, offset: u16, frame: &mut [u8]) -> Result<(), Malformed> {
    let length = frame.len();
    let from = usize::from(start);
    let field = from + usize::from(offset);
    if from < MIN_FRAME || field + 2 > length {
        return Err(Malformed::Checksum { start, offset, length });
    }
    let sum = match Sum::default().add(&frame[from..]).finish() {
        // RFC 768: a UDP checksum of zero means none, so its other spelling is sent. TCP takes both as equal.
        0 => 0xffff,
        sum => sum,
    };
    put(frame, field, sum);
    Ok(())
}

impl Layout {
    fn of(gso: Gso, frame: &[u8]) -> Result<Self, Malformed> {
        let mut ether_type = get(frame, ETHER_TYPE)?;
        let mut ip = MIN_FRAME;
        if ether_type == ETHER_VLAN {
            ether_type = get(frame, ETHER_TYPE + VLAN_LEN)?;
            ip += VLAN_LEN;
        }
        let first = usize::from(*frame.get(ip).ok_or(Malformed::NotTcp)?);
        let (tcp, protocol) = match (gso, ether_type) {
            (Gso::Tcp4, ETHER_IPV4) if first >> 4 == 4 && (first & 15) * 4 >= IPV4_LEN => {
                (ip + (first & 15) * 4, get(frame, ip + 8)? & 0xff)
            }
            // Extension headers are not looked through: Linux segments such packets itself.
            (Gso::Tcp6, ETHER_IPV6) if first >> 4 == 6 => (ip + IPV6_LEN, get(frame, ip + 6)? >> 8),
            _ => return Err(Malformed::NotTcp),
        };
        let data_offset = usize::from(get(frame, tcp + TCP_DATA_OFFSET)? >> 12) * 4;
        let payload = tcp + data_offset;
        if protocol != PROTOCOL_TCP || data_offset < TCP_LEN || payload >= frame.len() {
            return Err(Malformed::NotTcp);
        }
        Ok(Self { gso, ip, tcp, payload })
    }

    /// Corrects lengths and checksums of a frame with these headers.
    fn finish(self, frame: &mut [u8]) {
        let Self { gso, ip, tcp, payload: _ } = self;
        // A segment is shorter than MAX_FRAME, and its headers make up for the difference to 64 KiB.
        let after_ip = u16::try_from(frame.len() - ip).unwrap_or(u16::MAX);
        let tcp_length = u16::try_from(frame.len() - tcp).unwrap_or(u16::MAX);
        let addresses = match gso {
            Gso::Tcp4 => {
                put(frame, ip + IPV4_TOTAL_LENGTH, after_ip);
                put(frame, ip + IPV4_CHECKSUM, 0);
                let sum = Sum::default().add(&frame[ip..tcp]).finish();
                put(frame, ip + IPV4_CHECKSUM, sum);
                ip + IPV4_SOURCE..ip + IPV4_SOURCE + 8
            }
            Gso::Tcp6 => {
                put(frame, ip + IPV6_PAYLOAD_LENGTH, tcp_length);
                ip + IPV6_SOURCE..ip + IPV6_SOURCE + 32
            }
        };
        put(frame, tcp + TCP_CHECKSUM, 0);
        let pseudo = Sum::default().add(&frame[addresses]).add_word(PROTOCOL_TCP).add_word(tcp_length);
        let sum = pseudo.add(&frame[tcp..]).finish();
        put(frame, tcp + TCP_CHECKSUM, sum);
    }
}

/// Cuts the segment into as few frames as `limit` allows, each with a multiple of `size` payload bytes, except the
/// last.
fn segment(
    layout: Layout,
    size: usize,
    frame: &mut [u8],
    limit: usize,
    mut emit: impl FnMut(&[u8]),
) -> Result<(), Malformed> {
    let Layout { gso, ip, tcp, payload } = layout;
    // The IP length fields are 16 bits wide: they bound a segment as well as the peer's limit does.
    let limit = limit.min(match gso {
        Gso::Tcp4 => ip + usize::from(u16::MAX),
        Gso::Tcp6 => tcp + usize::from(u16::MAX),
    });
    if frame.len() <= limit {
        layout.finish(frame);
        emit(frame);
        return Ok(());
    }
    let room = limit.saturating_sub(payload);
    let piece = room - room % size.max(1);
    if piece == 0 {
        return Err(Malformed::Length(frame.len()));
    }
    let sequence =
        u32::from(get(frame, tcp + TCP_SEQUENCE)?) << 16 | u32::from(get(frame, tcp + TCP_SEQUENCE + 2)?);
    let flags = frame[tcp + TCP_FLAGS];
    let id = get(frame, ip + IPV4_ID)?;
    let pieces = (frame.len() - payload).div_ceil(piece);
    let mut out = Vec::with_capacity(payload + piece);
    for (number, data) in frame[payload..].chunks(piece).enumerate() {
        out.clear();
        out.extend_from_slice(&frame[..payload]);
        out.extend_from_slice(data);
        // A frame has fewer than 2^16 pieces, of fewer than 2^16 bytes; sequence numbers wrap (RFC 9293, 3.4).
        let (index, offset) = (u16::try_from(number), u32::try_from(number * piece));
        let (Ok(index), Ok(offset)) = (index, offset) else { return Err(Malformed::Length(frame.len())) };
        let [a, b, c, d] = sequence.wrapping_add(offset).to_be_bytes();
        out[tcp + TCP_SEQUENCE..tcp + TCP_SEQUENCE + 4].copy_from_slice(&[a, b, c, d]);
        let mut keep = !0;
        if number > 0 {
            keep &= !TCP_CWR;
        }
        if number + 1 < pieces {
            keep &= !(TCP_FIN | TCP_PSH);
        }
        out[tcp + TCP_FLAGS] = flags & keep;
        if gso == Gso::Tcp4 {
            put(&mut out, ip + IPV4_ID, id.wrapping_add(index));
        }
        layout.finish(&mut out);
        emit(&out);
    }
    Ok(())
}

fn get(frame: &[u8], at: usize) -> Result<u16, Malformed> {
    match frame.get(at..at + 2) {
        Some(&[a, b]) => Ok(u16::from_be_bytes([a, b])),
        _ => Err(Malformed::NotTcp),
    }
}

/// The caller has checked the place.
fn put(frame: &mut [u8], at: usize, value: u16) {
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A TCP segment over IPv4 or IPv6 with `payload` bytes, its checksum as Linux leaves it for an offload.
    fn tcp_frame(gso: Gso, payload: usize, flags: u8) -> (VnetHeader, Vec<u8>) {
        let mut frame = vec![2; 12];
        let tcp_length = TCP_LEN + 12 + payload;
        match gso {
            Gso::Tcp4 => {
                frame.extend_from_slice(&[8, 0, 0x45, 0]);
                frame.extend_from_slice(&u16::try_from(IPV4_LEN + tcp_length).unwrap_or(0).to_be_bytes());
                frame.extend_from_slice(&[0x12, 0xff, 0x40, 0, 64, 6, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2]);
            }
            Gso::Tcp6 => {
                frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend_from_slice(&u16::try_from(tcp_length).unwrap_or(0).to_be_bytes());
                frame.extend_from_slice(&[6, 64]);
                frame.extend((0..32).map(|byte| byte * 3));
            }
        }
        let tcp = frame.len();
        frame.extend_from_slice(&[0x30, 0x39, 0, 80, 0xff, 0xff, 0xff, 0x00, 0, 0, 0, 9, 0x80, flags, 1, 2]);
        frame.extend_from_slice(&[0xab, 0xcd, 0, 0]);
        frame.extend_from_slice(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        frame.extend((0..payload).map(|index| u8::try_from(index % 251).unwrap()));
        let header = VnetHeader {
            needs_checksum: Some((u16::try_from(tcp).unwrap(), 16)),
            gso: Some((gso, 1448)),
            ..VnetHeader::default()
        };
        (header, frame)
    }

    /// The whole oracle: what a receiver checks. Gives the sequence number, the flags and the payload.
    fn receive(gso: Gso, frame: &[u8]) -> (u32, u8, Vec<u8>) {
        let ip = &frame[14..];
        let (tcp, pseudo) = match gso {
            Gso::Tcp4 => {
                assert_eq!(Sum::default().add(&ip[..20]).fold(), 0xffff, "IPv4 header checksum");
                assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len(), "IPv4 total length");
                (&ip[20..], Sum::default().add(&ip[12..20]))
            }
            Gso::Tcp6 => {
                assert_eq!(
                    usize::from(u16::from_be_bytes([ip[4], ip[5]])),
                    ip.len() - 40,
                    "IPv6 payload length"
                );
                (&ip[40..], Sum::default().add(&ip[8..40]))
            }
        };
        let length = u16::try_from(tcp.len()).unwrap();
        assert_eq!(pseudo.add_word(6).add_word(length).add(tcp).fold(), 0xffff, "TCP checksum");
        (u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]), tcp[13], tcp[32..].to_vec())
    }

    fn run(header: &VnetHeader, frame: &[u8], limit: usize) -> Result<Vec<Vec<u8>>, Malformed> {
        let mut frames = Vec::new();
        complete(header, &mut frame.to_vec(), limit, |frame| frames.push(frame.to_vec()))?;
        Ok(frames)
    }

    #[test]
    fn a_segment_that_fits_stays_whole() {
        for gso in [Gso::Tcp4, Gso::Tcp6] {
            let (header, frame) = tcp_frame(gso, 20_000, 0x18);
            let frames = run(&header, &frame, 65_535).unwrap();
            assert_eq!(frames.len(), 1);
            let (sequence, flags, payload) = receive(gso, &frames[0]);
            assert_eq!((sequence, flags), (0xffff_ff00, 0x18));
            assert_eq!(payload, frame[frame.len() - 20_000..]);
        }
    }

    #[test]
    fn cut_segments_are_what_a_receiver_expects() {
        for (gso, limit) in [(Gso::Tcp4, 1514), (Gso::Tcp6, 1534), (Gso::Tcp4, 9014), (Gso::Tcp6, 65_535)] {
            let size = 65_000;
            let (header, frame) = tcp_frame(gso, size, 0x80 | 0x19);
            let frames = run(&header, &frame, limit.min(60_000)).unwrap();
            assert!(frames.len() >= 2);
            let (mut next, mut all) = (0xffff_ff00u32, Vec::new());
            for (index, piece) in frames.iter().enumerate() {
                assert!(piece.len() <= limit);
                let (sequence, flags, payload) = receive(gso, piece);
                assert_eq!(sequence, next);
                let last = index + 1 == frames.len();
                assert_eq!(flags & 0x09 != 0, last, "FIN and PSH only at the end");
                assert_eq!(flags & 0x80 != 0, index == 0, "CWR only at the start");
                assert_eq!(flags & 0x10, 0x10, "ACK always");
                assert!(last || payload.len() % 1448 == 0);
                next = next.wrapping_add(u32::try_from(payload.len()).unwrap());
                all.extend_from_slice(&payload);
            }
            assert_eq!(all, frame[frame.len() - size..]);
        }
    }

    #[test]
    fn a_udp_checksum_is_never_zero() {
        // Start 14, field at 14 + 6; the words sum up to 0xffff, so that the plain result would be zero.
        let mut frame = vec![0u8; 24];
        frame[14..16].copy_from_slice(&[0xff, 0xff]);
        let header = VnetHeader { needs_checksum: Some((14, 6)), ..VnetHeader::default() };
        assert_eq!(run(&header, &frame, 1514).unwrap()[0][20..22], [0xff, 0xff]);
    }

    #[test]
    fn refuses_checksums_outside_of_the_frame() {
        for (start, offset) in [(0, 0), (13, 0), (60, 3), (64, 0), (0xffff, 0xffff), (14, 0xffff)] {
            let header = VnetHeader { needs_checksum: Some((start, offset)), ..VnetHeader::default() };
            assert!(
                matches!(run(&header, &[0; 64], 1514), Err(Malformed::Checksum { .. })),
                "{start} {offset}"
            );
        }
        assert_eq!(run(&VnetHeader::default(), &[0; 13], 1514), Err(Malformed::Length(13)));
        assert_eq!(run(&VnetHeader::default(), &[0; 1515], 1514), Err(Malformed::Length(1515)));
        assert_eq!(
            run(&VnetHeader::default(), &vec![0; MAX_FRAME + 1], usize::MAX),
            Err(Malformed::Length(65_551))
        );
    }

    proptest! {
        /// Whatever a guest sends, each frame that comes out is within the limit, and a plain frame is unchanged.
        #[test]
        fn any_frame_is_taken_or_refused(
            mut frame in prop::collection::vec(any::<u8>(), 0..3000),
            bytes in any::<[u8; 12]>(),
            kind in 0usize..3,
            limit in 60usize..2000,
        ) {
            // Most random frames are no IP at all: make some look like TCP.
            if kind > 0 && frame.len() > 80 {
                let (_, model) = tcp_frame(if kind == 1 { Gso::Tcp4 } else { Gso::Tcp6 }, 0, 0);
                frame[..24].copy_from_slice(&model[..24]);
            }
            if let Ok(header) = VnetHeader::from_bytes(&bytes)
                && let Ok(frames) = run(&header, &frame, limit)
            {
                prop_assert!(!frames.is_empty());
                prop_assert!(frames.iter().all(|piece| piece.len() <= limit));
                if header == VnetHeader::default() {
                    prop_assert_eq!(frames, vec![frame]);
                }
            }
        }

        /// Truncating a good segment anywhere never reads past its end.
        #[test]
        fn any_truncation_is_survived(length in 0usize..200, v6 in any::<bool>(), byte in 0usize..90, value in any::<u8>()) {
            let gso = if v6 { Gso::Tcp6 } else { Gso::Tcp4 };
            let (header, mut frame) = tcp_frame(gso, 110, 0x18);
            frame[byte] = value;
            frame.truncate(length);
            let _ = run(&header, &frame, 120);
        }
    }
}
