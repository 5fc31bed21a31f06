//! The network device (virtio 1.2, 5.1): one receive, one transmit and the control queue.
//!
//! A thread of the device ([`worker`]) moves frames both ways: it waits for the backend's descriptor and
//! for notifications, so that a vCPU which sends only has to wake it. What a guest may leave undone
//! (checksums, segmentation) is what the backend can take or finish.

mod filter;
mod worker;

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use terem_bus::{SavedDevice, StateError, locked};
use terem_net::{NetBackend, Offloads};

pub use filter::{Filter, Mac};

use super::device::{Kind, Queues, Ticket, VirtioDevice};
use super::queue::Chain;
use worker::Shared;

const KIND: Kind = Kind { id: 1, name: "virtio-net", class: 0x02_0000 };

/// Entries of the receive and the transmit queue, and of the control queue.
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;

/// Queue indices (5.1.2, without multiqueue).
const RX: u16 = 0;
const TX: u16 = 1;
const CONTROL: u16 = 2;

// Feature bits (5.1.3).
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_CTRL_RX: u64 = 1 << 18;
const F_CTRL_VLAN: u64 = 1 << 19;
const F_CTRL_RX_EXTRA: u64 = 1 << 20;
const F_GUEST_ANNOUNCE: u64 = 1 << 21;
const F_CTRL_MAC_ADDR: u64 = 1 << 23;

// Bits of the configuration's status (5.1.4).
const STATUS_LINK_UP: u16 = 1;
const STATUS_ANNOUNCE: u16 = 2;

// The control class handled here rather than by the filter (5.1.6.5.4), and the answers (5.1.6.5).
const CLASS_ANNOUNCE: u8 = 3;
const ANNOUNCE_ACK: u8 = 0;
const CONTROL_OK: u8 = 0;
const CONTROL_ERR: u8 = 1;

/// Pairs of features and the offload that each stands for.
const SENDING: [(u64, Offloads); 4] = [
    (F_CSUM, Offloads::CHECKSUM),
    (F_HOST_TSO4, Offloads::TSO4),
    (F_HOST_TSO6, Offloads::TSO6),
    (F_HOST_ECN, Offloads::TSO_ECN),
];
const RECEIVING: [(u64, Offloads); 4] = [
    (F_GUEST_CSUM, Offloads::CHECKSUM),
    (F_GUEST_TSO4, Offloads::TSO4),
    (F_GUEST_TSO6, Offloads::TSO6),
    (F_GUEST_ECN, Offloads::TSO_ECN),
];

fn features_of(table: &[(u64, Offloads)], offloads: Offloads) -> u64 {
    table.iter().filter(|(_, o)| offloads.contains(*o)).fold(0, |f, (bit, _)| f | bit)
}

/// What the driver has chosen and said.
#[derive(Debug, Clone)]
struct Driver {
    features: u64,
    filter: Filter,
    /// The driver is asked to announce itself, and has not acknowledged that.
    announce: bool,
}

impl Driver {
    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn accepts(&self, frame: &[u8]) -> bool {
        !self.has(F_CTRL_RX) || self.filter.accepts(frame, self.has(F_CTRL_VLAN))
    }
}

/// A virtio network device.
pub struct Net {
    shared: Arc<Shared>,
    mac: Mac,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl Net {
    /// A NIC with the address `mac` on `backend`.
    ///
    /// # Errors
    /// The host has no file descriptor left for waking the device's thread.
    pub fn new(backend: Arc<dyn NetBackend>, mac: Mac) -> std::io::Result<Self> {
        let driver = Driver { features: 0, filter: Filter::new(mac), announce: false };
        Ok(Self { shared: Arc::new(Shared::new(backend, driver)?), mac, worker: Mutex::default() })
    }

    /// Asks the guest to announce its addresses to the network, after it has moved to another host.
    /// Nothing happens when the driver knows no announcements.
    pub fn announce(&self) {
        let mut driver = locked(&self.shared.driver);
        if driver.has(F_GUEST_ANNOUNCE) {
            driver.announce = true;
            drop(driver);
            if let Some(queues) = self.shared.queues() {
                queues.config_changed();
            }
        }
    }

    /// A control command (5.1.6.5): class and command, data, and a byte for the answer.
    fn control(&self, chain: &Chain, ticket: Ticket) {
        let queues = ticket.queues();
        let mut command =
            vec![0; filter::MAX_COMMAND.min(usize::try_from(chain.readable.len()).unwrap_or(0))];
        let read = chain.readable.read(queues.memory(), 0, &mut command);
        let (Ok(_), &[class, number, ref data @ ..]) = (read, &command[..]) else {
            queues.fail("a control command of less than two bytes");
            return;
        };
        if chain.writable.is_empty() {
            queues.fail("a control command without room for an answer");
            return;
        }
        let done = chain.readable.len() <= filter::MAX_COMMAND as u64 && self.command(class, number, data);
        let answer = if done { CONTROL_OK } else { CONTROL_ERR };
        if chain.writable.write(queues.memory(), 0, &[answer]).is_ok() {
            ticket.complete(1);
        }
    }

    fn command(&self, class: u8, number: u8, data: &[u8]) -> bool {
        let mut driver = locked(&self.shared.driver);
        if class == CLASS_ANNOUNCE && number == ANNOUNCE_ACK && driver.has(F_GUEST_ANNOUNCE) {
            driver.announce = false;
            return true;
        }
        driver.filter.command(class, number, data)
    }

    fn start_worker(&self, queues: &Queues) {
        let mut worker = locked(&self.worker);
        if worker.is_none() {
            let shared = Arc::clone(&self.shared);
            match std::thread::Builder::new().name(KIND.name.into()).spawn(move || shared.run()) {
                Ok(handle) => *worker = Some(handle),
                Err(e) => queues.fail(format_args!("the device's thread cannot be started: {e}")),
            }
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(worker) = locked(&self.worker).take() {
            // A worker that panicked has said so already.
            let _ = worker.join();
        }
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        let backend = &self.shared.backend;
        let mut features = F_MAC
            | F_MRG_RXBUF
            | F_STATUS
            | F_CTRL_VQ
            | F_CTRL_RX
            | F_CTRL_VLAN
            | F_CTRL_RX_EXTRA
            | F_GUEST_ANNOUNCE
            | F_CTRL_MAC_ADDR;
        features |= features_of(&SENDING, backend.transmit_offloads());
        features |= features_of(&RECEIVING, backend.receive_offloads());
        if backend.mtu().is_some() {
            features |= F_MTU;
        }
        features
    }

    fn check_features(&self, features: u64) -> Result<(), &'static str> {
        // What requires what (5.1.3.1).
        let has = |bits: u64| features & bits != 0;
        let needs = |of: u64, all: u64| !has(of) || features & all == all;
        let tso = F_HOST_TSO4 | F_HOST_TSO6;
        let guest_tso = F_GUEST_TSO4 | F_GUEST_TSO6;
        let control = F_CTRL_RX | F_CTRL_VLAN | F_GUEST_ANNOUNCE | F_CTRL_MAC_ADDR;
        if !needs(tso, F_CSUM) {
            Err("VIRTIO_NET_F_HOST_TSO needs VIRTIO_NET_F_CSUM")
        } else if !needs(guest_tso, F_GUEST_CSUM) {
            Err("VIRTIO_NET_F_GUEST_TSO needs VIRTIO_NET_F_GUEST_CSUM")
        } else if has(F_HOST_ECN) && !has(tso) || has(F_GUEST_ECN) && !has(guest_tso) {
            Err("ECN needs segmentation")
        } else if !needs(control, F_CTRL_VQ) || !needs(F_CTRL_RX_EXTRA, F_CTRL_VQ | F_CTRL_RX) {
            Err("control commands need VIRTIO_NET_F_CTRL_VQ")
        } else {
            Ok(())
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE, QUEUE_SIZE, CONTROL_SIZE]
    }

    /// `struct virtio_net_config` (5.1.4) up to the MTU.
    fn config(&self) -> Vec<u8> {
        let driver = locked(&self.shared.driver);
        let mut status = if self.shared.backend.link_up() { STATUS_LINK_UP } else { 0 };
        if driver.announce {
            status |= STATUS_ANNOUNCE;
        }
        let mut config = driver.filter.mac.to_vec();
        config.extend(status.to_le_bytes());
        config.extend(1_u16.to_le_bytes()); // max_virtqueue_pairs: multiqueue is not offered.
        config.extend(self.shared.backend.mtu().unwrap_or(0).to_le_bytes());
        config
    }

    fn activate(&self, features: u64, queues: &Arc<Queues>) {
        locked(&self.shared.driver).features = features;
        let agreed = RECEIVING.iter().filter(|(bit, _)| features & bit != 0).map(|&(_, o)| o).collect();
        self.shared.set_receive_offloads(agreed);
        self.start_worker(queues);
        self.shared.set_queues(Some(Arc::clone(queues)));
    }

    fn notify(&self, index: u16, queues: &Arc<Queues>) {
        match index {
            RX | TX => self.shared.wake(),
            CONTROL => queues.serve(CONTROL, |chain, ticket| self.control(&chain, ticket)),
            _ => {}
        }
    }

    fn reset(&self) {
        self.shared.set_queues(None);
        self.shared.set_receive_offloads(Offloads::empty());
        let initial = Driver { features: 0, filter: Filter::new(self.mac), announce: false };
        *locked(&self.shared.driver) = initial;
    }

    fn save(&self) -> Result<SavedDevice, StateError> {
        let Self { shared, mac: _, worker: _ } = self;
        let Driver { features: _, filter, announce } = &*locked(&shared.driver);
        KIND.saved(VERSION, &NetState { filter: filter.clone(), announce: *announce })
    }

    fn restore(&self, saved: &SavedDevice) -> Result<(), StateError> {
        let NetState { filter, announce } = KIND.loaded(VERSION, saved)?;
        if !filter.is_valid() {
            return Err(KIND.invalid("a receive filter that is too large"));
        }
        let mut driver = locked(&self.shared.driver);
        driver.filter = filter;
        driver.announce = announce;
        Ok(())
    }
}

const VERSION: u32 = 1;

/// Saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    filter: Filter,
    announce: bool,
}

#[cfg(test)]
mod tests;
