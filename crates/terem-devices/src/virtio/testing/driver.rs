//! A guest driver: finds the device in PCI configuration space, negotiates, sets up rings in guest memory
//! and talks to the device through the bus, as a guest's own driver would.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use terem_bus::{Bus, Clock, IrqLine, LineSink, MsiMessage, MsiSink, locked};
use terem_memory::vm_memory::{Bytes, GuestAddress};
use terem_memory::{GuestMemory, RamRange};

use super::super::device::{VirtioDevice, feature};
use super::super::pci::VirtioPci;
use super::ring::{Buffer, DriverRing};
use crate::pci::{PciDevice, Wiring};

pub const ACKNOWLEDGE: u8 = 1;
pub const DRIVER: u8 = 2;
pub const DRIVER_OK: u8 = 4;
pub const FEATURES_OK: u8 = 8;
pub const NEEDS_RESET: u8 = 64;

pub const RAM: u64 = 16 << 20;
const RINGS: u64 = 0x10_0000;
const RING_SPACE: u64 = 0x8_0000;
const DATA: u64 = 0x90_0000;
const MSIX_AT: u64 = 0xc000_0000;
const BAR_AT: u64 = 0x1_e000_0000;

/// Vector `n` of the device sends this data plus `n`; vector 0 is the configuration's.
pub const VECTOR: u32 = 0x40;

/// Keeps what was sent.
#[derive(Default)]
pub struct Messages(Mutex<Vec<MsiMessage>>);

impl MsiSink for Messages {
    fn send_msi(&self, message: MsiMessage) {
        assert_eq!(message.address, 0xfee0_0000);
        locked(&self.0).push(message);
    }
}

/// The INTx pin's level.
#[derive(Default)]
pub struct Level(pub Mutex<bool>);

impl LineSink for Level {
    fn set_line(&self, _line: u32, high: bool) {
        *locked(&self.0) = high;
    }
}

/// Offset in the BAR and length of a structure.
pub type Structure = (u64, u64);

pub struct Guest {
    pub memory: GuestMemory,
    pub bus: Arc<Bus>,
    pub transport: Arc<VirtioPci>,
    pub line: Arc<Level>,
    messages: Arc<Messages>,
    pub common: Structure,
    pub isr: Structure,
    pub device: Structure,
    pub notify: Structure,
    notify_multiplier: u64,
    /// Where the PCI configuration access capability is.
    pub access: u16,
    pub rings: Vec<DriverRing>,
    pub features: u64,
    next_data: u64,
}

impl Guest {
    pub fn new(device: Arc<dyn VirtioDevice>) -> Self {
        let memory = GuestMemory::new(&[RamRange { base: 0, size: RAM }]).unwrap();
        Self::with_memory(device, memory)
    }

    /// Finds the device and maps its BARs.
    pub fn with_memory(device: Arc<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        let bus = Arc::new(Bus::new(Clock::manual()));
        let (messages, line) = (Arc::new(Messages::default()), Arc::new(Level::default()));
        let wiring = Wiring {
            bus: Arc::downgrade(&bus),
            msi: Arc::clone(&messages) as _,
            intx: IrqLine::new(Arc::clone(&line) as _, 0),
        };
        let transport = VirtioPci::new(device, memory.clone(), wiring).unwrap();
        let mut guest = Self {
            memory,
            bus,
            transport,
            line,
            messages,
            common: (0, 0),
            isr: (0, 0),
            device: (0, 0),
            notify: (0, 0),
            notify_multiplier: 0,
            access: 0,
            rings: Vec::new(),
            features: 0,
            next_data: DATA,
        };
        guest.discover();
        guest
    }

    pub fn config_read(&self, offset: u16, size: u8) -> u32 {
        self.transport.function().read_config(offset, size)
    }

    pub fn config_write(&self, offset: u16, size: u8, value: u32) {
        self.transport.function().write_config(offset, size, value);
    }

    fn discover(&mut self) {
        assert_eq!(self.config_read(0, 2), 0x1af4);
        assert!(self.config_read(2, 2) > 0x1040 && self.config_read(8, 1) == 1);
        self.config_write(0x14, 4, u32::try_from(MSIX_AT).unwrap());
        self.config_write(0x20, 4, u32::try_from(BAR_AT & 0xffff_ffff).unwrap());
        self.config_write(0x24, 4, u32::try_from(BAR_AT >> 32).unwrap());
        self.config_write(4, 2, 0x6);
        let mut at = u16::try_from(self.config_read(0x34, 1)).unwrap();
        while at != 0 {
            let structure = (u64::from(self.config_read(at + 8, 4)), u64::from(self.config_read(at + 12, 4)));
            match (self.config_read(at, 1), self.config_read(at + 3, 1)) {
                (9, 1) => self.common = structure,
                (9, 2) => {
                    self.notify = structure;
                    self.notify_multiplier = u64::from(self.config_read(at + 16, 4));
                }
                (9, 3) => self.isr = structure,
                (9, 4) => self.device = structure,
                (9, 5) => self.access = at,
                (0x11, _) => {
                    let vectors = u64::from(self.config_read(at + 2, 2) & 0x7ff) + 1;
                    for v in 0..vectors {
                        self.bus.mmio.write(MSIX_AT + 16 * v, 8, 0xfee0_0000);
                        self.bus.mmio.write(MSIX_AT + 16 * v + 8, 8, u64::from(VECTOR) + v);
                    }
                    self.config_write(at + 2, 2, 0x8000);
                }
                _ => {}
            }
            at = u16::try_from(self.config_read(at + 1, 1)).unwrap();
        }
        assert!(self.common.1 >= 0x38 && self.notify_multiplier > 0 && self.access > 0);
    }

    /// Switches MSI-X off again: the device then uses INTx.
    pub fn use_intx(&self) {
        let mut at = u16::try_from(self.config_read(0x34, 1)).unwrap();
        while self.config_read(at, 1) != 0x11 {
            at = u16::try_from(self.config_read(at + 1, 1)).unwrap();
        }
        self.config_write(at + 2, 2, 0);
    }

    pub fn read(&self, offset: u64, size: u8) -> u64 {
        self.bus.mmio.read(BAR_AT + offset, size)
    }

    pub fn write(&self, offset: u64, size: u8, value: u64) {
        self.bus.mmio.write(BAR_AT + offset, size, value);
    }

    pub fn status(&self) -> u8 {
        u8::try_from(self.read(self.common.0 + 0x14, 1)).unwrap()
    }

    pub fn set_status(&self, status: u8) {
        self.write(self.common.0 + 0x14, 1, status.into());
    }

    pub fn needs_reset(&self) -> bool {
        self.status() & NEEDS_RESET != 0
    }

    pub fn offered(&self) -> u64 {
        (0..2).fold(0, |f, half| {
            self.write(self.common.0, 4, half);
            f | self.read(self.common.0 + 4, 4) << (32 * half)
        })
    }

    pub fn choose(&self, features: u64) {
        for half in 0..2 {
            self.write(self.common.0 + 8, 4, half);
            self.write(self.common.0 + 0xc, 4, features >> (32 * half) & 0xffff_ffff);
        }
    }

    /// Resets and negotiates all of the offered features but `without`; the ring options are as asked for.
    pub fn negotiate(&mut self, packed: bool, event_idx: bool, without: u64) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(ACKNOWLEDGE | DRIVER);
        let mut features = self.offered() & !without;
        if !packed {
            features &= !feature::RING_PACKED;
        }
        if !event_idx {
            features &= !feature::EVENT_IDX;
        }
        self.choose(features);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK, "FEATURES_OK was refused");
        self.features = features;
    }

    /// Sets up queue `index` at its place, with vector `index + 1`.
    pub fn enable_queue(&mut self, index: u16, size: u16) {
        let c = self.common.0;
        let (packed, event_idx) =
            (self.features & feature::RING_PACKED != 0, self.features & feature::EVENT_IDX != 0);
        let base = RINGS + RING_SPACE * u64::from(index);
        assert!(DriverRing::bytes(size) <= RING_SPACE);
        let ring = DriverRing::new(self.memory.clone(), base, size, packed, event_idx);
        self.write(c + 0x16, 2, index.into());
        assert!(self.read(c + 0x18, 2) >= size.into());
        self.write(c + 0x18, 2, size.into());
        self.write(c + 0x1a, 2, u64::from(index) + 1);
        assert_eq!(self.read(c + 0x1a, 2), u64::from(index) + 1);
        for (at, address) in
            [(0x20, ring.config.descriptors), (0x28, ring.config.driver), (0x30, ring.config.device)]
        {
            self.write(c + at, 4, address & 0xffff_ffff);
            self.write(c + at + 4, 4, address >> 32);
        }
        self.write(c + 0x1c, 2, 1);
        assert_eq!(self.read(c + 0x1c, 2), 1);
        ring.want_interrupt(Some(0));
        let at = usize::from(index);
        if at < self.rings.len() {
            self.rings[at] = ring;
        } else {
            assert_eq!(at, self.rings.len());
            self.rings.push(ring);
        }
    }

    /// From nothing to `DRIVER_OK`, with queues of `size` entries.
    pub fn start(&mut self, packed: bool, event_idx: bool, size: u16, without: u64) {
        self.rings.clear();
        self.negotiate(packed, event_idx, without);
        let c = self.common.0;
        self.write(c + 0x10, 2, 0);
        assert_eq!(self.read(c + 0x10, 2), 0);
        for index in 0..u16::try_from(self.read(c + 0x12, 2)).unwrap() {
            self.enable_queue(index, size);
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Guest memory that nobody else uses.
    pub fn alloc(&mut self, len: usize) -> u64 {
        let at = self.next_data;
        self.next_data += len as u64 + 16;
        if self.next_data > RAM {
            self.next_data = DATA;
            return self.alloc(len);
        }
        at
    }

    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.alloc(bytes.len());
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        at
    }

    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Makes a chain available without saying so.
    pub fn add(&mut self, queue: u16, buffers: &[Buffer]) -> u16 {
        let indirect = buffers.len() > 1 && self.features & feature::INDIRECT_DESC != 0;
        self.rings[usize::from(queue)].add(buffers, indirect)
    }

    /// Writes the notification register.
    pub fn kick(&self, queue: u16) {
        let at = self.notify.0 + self.notify_multiplier * u64::from(queue);
        self.write(at, 2, queue.into());
    }

    /// Makes a chain available, and notifies if the device has asked for that.
    pub fn submit(&mut self, queue: u16, buffers: &[Buffer]) -> u16 {
        let id = self.add(queue, buffers);
        if self.rings[usize::from(queue)].must_notify() {
            self.kick(queue);
        }
        id
    }

    /// The vectors that were triggered since this was last asked: 0 is the configuration's, then the
    /// queues' in order.
    pub fn vectors(&self) -> Vec<u32> {
        std::mem::take(&mut *locked(&self.messages.0)).iter().map(|m| m.data - VECTOR).collect()
    }

    /// Waits for a used chain of queue `queue`, and for its interrupt.
    pub fn wait_used(&mut self, queue: u16) -> (u16, u32) {
        let ring = &mut self.rings[usize::from(queue)];
        let used = wait_for("a used chain", || ring.take_used());
        ring.want_interrupt(Some(0));
        used
    }

    /// Waits for a message of vector `vector`.
    pub fn wait_vector(&self, vector: u32) {
        wait_for("an interrupt", || {
            let mut messages = locked(&self.messages.0);
            let at = messages.iter().position(|m| m.data == VECTOR + vector)?;
            Some(messages.remove(at))
        });
    }
}

/// Asks until there is an answer.
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_micros(200));
    }
}
