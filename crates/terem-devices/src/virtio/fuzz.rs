//! What fuzz targets call: a device driven by arbitrary bytes, as a guest may.

use std::collections::VecDeque;
use std::sync::Arc;

use terem_bus::{Bus, Clock, Device, IrqLine, MsiMessage, MsiSink, all_ones, locked};
use terem_memory::vm_memory::{Bytes, GuestAddress};
use terem_memory::{GuestMemory, RamRange};
use terem_net::{Offloads, VnetHeader};

use super::testing::backends::{Loopback, MemoryDisk, Terminal};
use super::{Blk, Console, Net, Rng, VirtioDevice, VirtioPci, feature};
use crate::pci::{PciDevice, Wiring};

const RAM: u64 = 1 << 20;
/// Rings and data lie here, so that bytes of the input often hit something.
const RING: u64 = 0x1000;
const RING_SPACE: u64 = 0x4000;

struct Nowhere;

impl MsiSink for Nowhere {
    fn send_msi(&self, _message: MsiMessage) {}
}

/// The input, from the front; zeroes when it has ended.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }

    fn word(&mut self) -> u64 {
        (0..8).fold(0, |v, _| v << 8 | u64::from(self.byte()))
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let len = len.min(self.0.len());
        self.0.split_off(..len).unwrap_or_default().to_vec()
    }
}

struct Machine {
    memory: GuestMemory,
    transport: Arc<VirtioPci>,
    device: Arc<dyn VirtioDevice>,
    disk: Arc<MemoryDisk>,
    network: Arc<Loopback>,
    terminal: Arc<Terminal>,
    clock: Clock,
    _bus: Arc<Bus>,
}

impl Machine {
    fn new(kind: u8) -> Option<Self> {
        let memory = GuestMemory::new(&[RamRange { base: 0, size: RAM }]).ok()?;
        let clock = Clock::manual();
        let disk = Arc::new(MemoryDisk::new(64 << 10));
        let network = Arc::new(Loopback::new(Offloads::all()).ok()?);
        let terminal = Arc::new(Terminal::default());
        let device: Arc<dyn VirtioDevice> = match kind % 4 {
            0 => Arc::new(Blk::new(Arc::clone(&disk) as _, 2, "fuzz")),
            1 => Arc::new(Net::new(Arc::clone(&network) as _, [2; 6]).ok()?),
            2 => Arc::new(Console::new(Arc::clone(&terminal) as _)),
            _ => Arc::new(Rng::new(&clock)),
        };
        let bus = Arc::new(Bus::new(clock.clone()));
        let wiring =
            Wiring { bus: Arc::downgrade(&bus), msi: Arc::new(Nowhere), intx: IrqLine::unconnected() };
        let transport = VirtioPci::new(Arc::clone(&device), memory.clone(), wiring).ok()?;
        Some(Self { memory, transport, device, disk, network, terminal, clock, _bus: bus })
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        self.transport.write_bar(offset, size, value & all_ones(size));
    }

    /// A driver that does everything right up to `DRIVER_OK`, with options from the input.
    fn start(&self, input: &mut Input<'_>) {
        let options = input.byte();
        self.write(0x14, 1, 0);
        let mut features = self.device.features() | feature::VERSION_1 | feature::RING_RESET;
        for (bit, feature) in
            [(1, feature::RING_PACKED), (2, feature::EVENT_IDX), (4, feature::INDIRECT_DESC)]
        {
            features |= if options & bit != 0 { feature } else { 0 };
        }
        for half in 0..2 {
            self.write(8, 4, half);
            self.write(0xc, 4, features >> (32 * half));
        }
        self.write(0x14, 1, 0xb);
        for queue in 0..4 {
            let base = RING + RING_SPACE * queue;
            self.write(0x16, 2, queue);
            self.write(0x18, 2, 8 << (options >> 3 & 3));
            for (at, address) in [(0x20, base), (0x28, base + 0x1000), (0x30, base + 0x2000)] {
                self.write(at, 8, address);
            }
            self.write(0x1c, 2, 1);
        }
        self.write(0x14, 1, 0xf);
    }

    fn step(&self, input: &mut Input<'_>) {
        match input.byte() % 12 {
            0 => self.start(input),
            1 => {
                let (offset, size) = (input.word() % 0x4000, 1 << (input.byte() % 4));
                self.write(offset, size, input.word());
            }
            2 => {
                let (offset, size) = (input.word() % 0x4000, 1 << (input.byte() % 4));
                let _ = self.transport.read_bar(offset, size);
            }
            // Bytes anywhere in a ring's space, or behind it.
            3..=5 => {
                let at = RING + (u64::from(input.byte()) << 8 | u64::from(input.byte())) % (5 * RING_SPACE);
                let len = usize::from(input.byte() % 64);
                let _ = self.memory.write_slice(&input.take(len), GuestAddress(at));
            }
            // A whole descriptor that makes some sense, at a place where the next one is looked for.
            6 => {
                let queue = u64::from(input.byte() % 4);
                let at = RING + RING_SPACE * queue + 16 * u64::from(input.byte() % 16);
                let mut bytes = (0x2_0000 + u64::from(input.byte()) * 64).to_le_bytes().to_vec();
                bytes.extend([input.byte(), input.byte() & 3, 0, 0]);
                bytes.extend([input.byte(), input.byte() & 0x80, input.byte(), input.byte() & 0x80]);
                let _ = self.memory.write_slice(&bytes, GuestAddress(at));
            }
            // The available index of a split ring goes on.
            7 => {
                let at = GuestAddress(RING + RING_SPACE * u64::from(input.byte() % 4) + 0x1002);
                let index: u16 = self.memory.read_obj(at).unwrap_or(0);
                let next = index.wrapping_add(u16::from(input.byte() % 4));
                let _ = self.memory.write_obj(next, at);
            }
            8 => self.write(0x3000 + 4 * u64::from(input.byte() % 5), 2, 0),
            9 => {
                let function = self.transport.function();
                let (offset, size) = (u16::from(input.byte()) & !3, 1 << (input.byte() % 3));
                let value = u32::try_from(input.word() & all_ones(size)).unwrap_or(0);
                function.write_config(offset, size, value);
                let _ = function.read_config(offset, size);
            }
            10 => {
                self.disk.hold.store(input.byte() & 1 != 0, std::sync::atomic::Ordering::Release);
                self.disk.release();
                let len = usize::from(input.byte());
                self.network.arrive(VnetHeader::default(), &input.take(len));
                locked(&self.terminal.typed).extend(input.take(8).into_iter().collect::<VecDeque<_>>());
                self.clock.advance(1_000_000);
            }
            _ => {
                // Every device can be saved at any time, and takes back what it saved.
                let saved = self.transport.save();
                let restored = saved.and_then(|saved| self.transport.restore(&saved));
                assert!(restored.is_ok(), "{restored:?}");
            }
        }
    }
}

/// Plays `bytes` as a guest's driver against a disk, NIC, console or entropy device (the first byte says
/// which): register accesses, ring contents, notifications, resets, saving and restoring.
///
/// # Panics
/// When a device cannot be saved, or does not take back its state; anything else that panics is a bug too.
pub fn play(bytes: &[u8]) {
    let mut input = Input(bytes);
    let Some(machine) = Machine::new(input.byte()) else { return };
    machine.start(&mut input);
    while !input.0.is_empty() {
        machine.step(&mut input);
    }
    Device::reset(&*machine.transport);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

        #[test]
        fn arbitrary_drivers_stop_nothing_but_their_device(
            kind: u8,
            bytes in proptest::collection::vec(any::<u8>(), 0..2000),
        ) {
            let mut input = vec![kind];
            input.extend(bytes);
            super::play(&input);
        }
    }
}
