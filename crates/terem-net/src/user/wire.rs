//! Between smoltcp and the frames.

use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use super::out::Out;
use super::packet::{ETHER_IPV4, ETHER_IPV6, start_frame};
use super::{GATEWAY_MAC, MTU};

/// What smoltcp takes for a network card: one packet in, frames for the guest out.
pub(super) struct Wire<'a> {
    pub(super) incoming: Option<&'a [u8]>,
    pub(super) out: &'a mut Out,
    pub(super) guest: [u8; 6],
    pub(super) checksum_agreed: bool,
}

pub(super) struct Incoming<'a>(&'a [u8]);

pub(super) struct Outgoing<'a> {
    out: &'a mut Out,
    guest: [u8; 6],
}

impl RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = self.out.buffer();
        start_frame(&mut frame, self.guest, GATEWAY_MAC, ETHER_IPV4);
        let start = frame.len();
        frame.resize(start + len, 0);
        let result = f(&mut frame[start..]);
        if frame[start] >> 4 == 6 {
            frame[start - 2..start].copy_from_slice(&ETHER_IPV6.to_be_bytes());
        }
        self.out.push(frame);
        result
    }
}

impl Device for Wire<'_> {
    type RxToken<'a>
        = Incoming<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Outgoing<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        let incoming = self.incoming.take()?;
        Some((Incoming(incoming), Outgoing { out: &mut *self.out, guest: self.guest }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        if self.out.is_full() { None } else { Some(Outgoing { out: &mut *self.out, guest: self.guest }) }
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(MTU);
        // The guest's frames come by memory: what it left undone is not missed.
        let mut checksum = ChecksumCapabilities::ignored();
        checksum.ipv4 = Checksum::Tx;
        checksum.tcp = if self.checksum_agreed { Checksum::None } else { Checksum::Tx };
        capabilities.checksum = checksum;
        capabilities
    }
}
