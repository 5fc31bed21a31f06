//! No network: a NIC whose cable is not plugged in.

use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;

use crate::{NetBackend, Offloads, Received, Transmit, VnetHeader};

/// Drops every frame sent, delivers none, and reports no carrier.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoNetwork;

impl NetBackend for NoNetwork {
    fn description(&self) -> String {
        "none".to_owned()
    }

    fn link_up(&self) -> bool {
        false
    }

    fn mtu(&self) -> Option<u16> {
        None
    }

    fn transmit_offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn receive_offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn set_receive_offloads(&self, _agreed: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn transmit(&self, _header: &VnetHeader, _frame: &[IoSlice<'_>]) -> io::Result<Transmit> {
        Ok(Transmit::Taken)
    }

    fn has_unsent(&self) -> bool {
        false
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn receive(&self, _frame: &mut [u8]) -> io::Result<Option<Received>> {
        Ok(None)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swallows_frames_and_has_no_carrier() {
        let backend: &dyn NetBackend = &NoNetwork;
        let frame = [0u8; 64];
        assert_eq!(
            backend.transmit(&VnetHeader::default(), &[IoSlice::new(&frame)]).unwrap(),
            Transmit::Taken
        );
        assert_eq!(backend.receive(&mut [0; 64]).unwrap(), None);
        assert!(!backend.link_up());
        assert!(backend.poll_fd().is_none());
    }
}
