//! A guest that does anything to the devices of a q35 board: ports, MMIO, configuration space, interrupts, time.
//!
//! At any moment the board can be saved; another one that takes the state up is the same and stays the same while
//! time passes. Reads are never wider than asked for, mappings never overlap, and after a reset the PIC asks for
//! nothing.

#![no_main]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use terem_bus::{ApicBus, ApicMessage, Bus, Clock, MsiMessage, MsiSink, SavedDevice, all_ones};
use terem_config::{ByteSize, MachineConfig};
use terem_devices::chipset::uart::CharBackend;
use terem_devices::chipset::{BoardEvents, GuestPanic};
use terem_devices::virtio::Rng;
use terem_machine::board::Board;
use terem_machine::board::q35::{Connections, Q35};
use terem_machine::plan::{HostInventory, Plan};
use terem_memory::GuestMemory;

/// What is at the other end of all wires.
#[derive(Default)]
struct Apics {
    intr: AtomicBool,
}

impl ApicBus for Apics {
    fn deliver(&self, _message: ApicMessage) {}

    fn set_intr(&self, high: bool) {
        self.intr.store(high, Ordering::Release);
    }

    fn pulse_nmi(&self) {}

    fn pulse_smi(&self) {}
}

impl MsiSink for Apics {
    fn send_msi(&self, _message: MsiMessage) {}
}

impl BoardEvents for Apics {
    fn power_off(&self) {}

    fn reset(&self) {}

    fn guest_panicked(&self, _kind: GuestPanic) {}

    fn exit(&self, _value: u32) {}
}

struct Nobody;

impl CharBackend for Nobody {
    fn write(&mut self, _bytes: &[u8]) {}
}

static PLAN: LazyLock<Plan> = LazyLock::new(|| {
    let config =
        MachineConfig { kernel: Some("kernel".into()), memory: ByteSize::mib(4), ..MachineConfig::default() };
    Plan::new(&config, &HostInventory { no_kvm: Some("it is not needed".into()), ..HostInventory::default() })
        .unwrap()
});

struct Machine {
    bus: Arc<Bus>,
    apics: Arc<Apics>,
    board: Q35,
}

impl Machine {
    /// A board in its state after power-on, with a device in a slot, at `now` ns of virtual time.
    fn new(now: u64) -> Self {
        let clock = Clock::manual();
        let bus = Arc::new(Bus::new(clock.clone()));
        let apics = Arc::new(Apics::default());
        let connections = Connections {
            bus: Arc::clone(&bus),
            memory: GuestMemory::new(&PLAN.memory.ram()).unwrap(),
            apics: Arc::clone(&apics) as _,
            msi: Arc::clone(&apics) as _,
            events: Arc::clone(&apics) as _,
            serial: Box::new(Nobody),
        };
        let mut board = Q35::new(&PLAN, connections).unwrap();
        if let Some(slot) = PLAN.rng {
            board.plug_in(slot, Arc::new(Rng::new(&clock))).unwrap();
        }
        clock.advance(now);
        Self { bus, apics, board }
    }

    fn save(&self) -> Vec<(String, SavedDevice)> {
        self.board.devices().into_iter().map(|(name, device)| (name, device.save().unwrap())).collect()
    }

    /// A board that goes on where this one is.
    fn twin(&self) -> Self {
        let twin = Self::new(self.bus.clock.now());
        let saved = self.save();
        for ((name, device), (_, state)) in twin.board.devices().iter().zip(&saved) {
            device.restore(state).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        self.assert_same(&twin);
        twin
    }

    fn assert_same(&self, other: &Self) {
        for ((name, mine), (_, theirs)) in self.save().iter().zip(&other.save()) {
            assert_eq!(mine, theirs, "{name}");
        }
        let intr = |m: &Self| m.apics.intr.load(Ordering::Acquire);
        assert_eq!(intr(self), intr(other), "INTR");
        assert_eq!(self.bus.mmio.regions(), other.bus.mmio.regions());
        assert_eq!(self.bus.ports.regions(), other.bus.ports.regions());
    }

    fn step(&self, kind: u8, place: u8, value: u64) {
        let size = 1 << (kind >> 6);
        let space = if kind & 1 == 0 { &self.bus.ports } else { &self.bus.mmio };
        let regions = space.regions();
        assert!(regions.windows(2).all(|w| w[0].1 <= w[1].0), "mappings overlap: {regions:x?}");
        match kind >> 1 & 7 {
            // Somewhere in a region; the value's upper half says where.
            0..=3 => {
                let (start, end, _) = &regions[usize::from(place) % regions.len()];
                let at = start + (value >> 32) % (end - start);
                if kind & 2 == 0 {
                    space.write(at, size, value & all_ones(size));
                } else {
                    assert!(space.read(at, size) <= all_ones(size));
                }
            }
            // A register of the bridges or of the device in the slot.
            4 | 5 => {
                let slot = [0, 1, 2, 31][usize::from(place & 3)];
                let register = u64::from(place & 0xfc);
                self.bus.ports.write(0xcf8, 4, 0x8000_0000 | slot << 11 | register);
                self.bus.ports.write(0xcfc, 4, value & 0xffff_ffff);
            }
            6 => match kind & 1 {
                0 => drop(self.bus.acknowledge_interrupt()),
                _ => self.bus.end_of_interrupt(place),
            },
            _ => self.bus.clock.advance(value % [1_000, 1_000_000, 1_000_000_000][usize::from(place) % 3]),
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut machine = Machine::new(0);
    machine.board.set_up();
    // An operation: kind and width, place, value (8).
    for operation in bytes.chunks_exact(10) {
        let [kind, place, value @ ..] = operation else { continue };
        let value = value.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        if *kind == 0xff {
            // The twin goes on in its place.
            let twin = machine.twin();
            machine.board.take_down();
            machine = twin;
        } else {
            machine.step(*kind, *place, value);
        }
    }
    let twin = machine.twin();
    for ns in [1_000, 1_000_000, 100_000_000] {
        machine.bus.clock.advance(ns);
        twin.bus.clock.advance(ns);
        machine.assert_same(&twin);
    }
    for (_, device) in machine.board.devices() {
        device.reset();
    }
    assert!(!machine.apics.intr.load(Ordering::Acquire), "the PIC interrupts after a reset");
    machine.board.take_down();
    twin.board.take_down();
});
