//! All of the chipset on one bus, at the addresses of the module's table.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use terem_bus::{ApicBus, Bus, Clock, Device, Handler, LineSink, all_ones};
use terem_memory::{GuestMemory, RamRange};

use super::lab::{Apics, Events, Messages};
use super::*;
use crate::pci::{Address, ConfigPorts, RootComplex};

struct Screen;

impl uart::CharBackend for Screen {
    fn write(&mut self, _bytes: &[u8]) {}
}

struct Board {
    bus: Arc<Bus>,
    apics: Arc<Apics>,
    events: Arc<Events>,
    devices: Vec<Arc<dyn Device>>,
    _hooks: (Arc<mch::Mch>, Arc<ich9_lpc::Ich9Lpc>, Arc<RootComplex>),
}

fn shared<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

impl Board {
    fn new() -> Self {
        let clock = Clock::manual();
        let bus = Arc::new(Bus::new(clock.clone()));
        let (apics, events) = (Arc::new(Apics::default()), Arc::new(Events::default()));
        let apic: Arc<dyn ApicBus> = Arc::clone(&apics) as _;
        let board: Arc<dyn BoardEvents> = Arc::clone(&events) as _;
        let (pic, ioapic) = (shared(pic::Pic::new(Arc::clone(&apic))), shared(ioapic::IoApic::new(apic)));
        let to_pic: Arc<dyn LineSink> = Arc::new(pic::PicLines(Arc::clone(&pic)));
        let to_ioapic = Arc::new(ioapic::IoApicLines(Arc::clone(&ioapic)));
        let router = router::InterruptRouter::new(to_pic, Arc::clone(&to_ioapic) as _);
        bus.set_interrupt_acknowledge(Arc::new(pic::PicLines(Arc::clone(&pic))));
        bus.set_eoi_sink(to_ioapic);
        let pit = pit::Pit::new(clock.clone(), router.pit());
        let rtc = rtc::Rtc::new(clock.clone(), router.rtc(), Box::new(|| 0));
        let wiring = hpet::HpetWiring {
            gsi: router.all_gsis(),
            legacy: [router.isa(0), router.isa(8)],
            replacement: Arc::clone(&router) as _,
            msi: Arc::new(Messages::default()),
        };
        let hpet = hpet::Hpet::new(clock.clone(), wiring);
        let width = acpi_pm::TimerWidth::Bits32;
        let pm = acpi_pm::AcpiPm::new(clock, router.isa(9), Arc::clone(&board), width);
        let keyboard = shared(i8042::I8042::new(router.isa(1), router.isa(12), Arc::clone(&board)));
        let com1 = shared(uart::Uart::new(router.isa(4), Box::new(Screen)));
        let memory = GuestMemory::new(&[RamRange { base: 0, size: 1 << 20 }]).unwrap();
        let fw_cfg = shared(fw_cfg::FwCfg::new(memory));
        let reset = shared(reset_control::ResetControl::new(Arc::clone(&board)));
        let root = Arc::new(RootComplex::default());
        let config = shared(ConfigPorts::new(Arc::clone(&root), Some(Arc::clone(&reset) as _)));
        let mch = mch::Mch::new(&root, &bus, Arc::new(Messages::default()));
        let lpc = ich9_lpc::Ich9Lpc::new(&bus, Arc::new(Messages::default()), router, Arc::clone(&pm) as _);
        root.bus().attach(Address::new(0, 0), Arc::clone(mch.function()) as _).unwrap();
        root.bus().attach(Address::new(31, 0), Arc::clone(lpc.function()) as _).unwrap();
        let port = |p| Arc::new(i8042::I8042Ports::new(Arc::clone(&keyboard), p));
        let block = |b| Arc::new(pic::PicPorts::new(Arc::clone(&pic), b));
        let ports: [(u64, u64, Arc<dyn Handler>); 18] = [
            (0x20, 2, block(pic::PicBlock::First)),
            (0x40, 4, Arc::clone(&pit) as _),
            (0x60, 1, port(i8042::I8042Port::Data)),
            (0x61, 1, Arc::new(pit::Port61(Arc::clone(&pit)))),
            (0x64, 1, port(i8042::I8042Port::Command)),
            (0x70, 4, Arc::clone(&rtc) as _),
            (0x92, 1, Arc::new(i8042::Port92(Arc::clone(&keyboard)))),
            (0xa0, 2, block(pic::PicBlock::Second)),
            (0xb2, 2, Arc::new(acpi_pm::SmiPorts(Arc::clone(&pm)))),
            (0xe9, 1, Arc::new(debugcon::Debugcon::new(Box::new(Screen)))),
            (0x3f8, 8, Arc::clone(&com1) as _),
            (0x402, 1, Arc::new(debugcon::Debugcon::new(Box::new(Screen)))),
            (0x4d0, 2, block(pic::PicBlock::EdgeLevel)),
            (0x501, 4, Arc::new(debug_exit::DebugExit::new(Arc::clone(&board)))),
            (0x505, 1, Arc::new(pvpanic::Pvpanic::new(board))),
            (0x510, fw_cfg::LENGTH, Arc::clone(&fw_cfg) as _),
            (0xcf8, 8, Arc::clone(&config) as _),
            (0x2f8, 8, shared(uart::Uart::new(terem_bus::IrqLine::unconnected(), Box::new(Screen)))),
        ];
        for (at, len, handler) in ports {
            bus.ports.map(at, len, format!("{at:#x}"), handler).unwrap();
        }
        bus.mmio.map(0xfec0_0000, 0x1000, "I/O APIC", Arc::clone(&ioapic) as _).unwrap();
        bus.mmio.map(0xfed0_0000, hpet::LENGTH, "HPET", Arc::clone(&hpet) as _).unwrap();
        let devices: Vec<Arc<dyn Device>> = vec![
            pic,
            ioapic,
            pit,
            rtc,
            hpet,
            pm,
            keyboard,
            com1,
            fw_cfg,
            reset,
            config,
            Arc::clone(mch.function()) as _,
            Arc::clone(lpc.function()) as _,
        ];
        Self { bus, apics, events, devices, _hooks: (mch, lpc, root) }
    }

    fn out(&self, port: u64, value: u64) {
        self.bus.ports.write(port, 1, value);
    }

    fn config(&self, address: u64, value: u64) {
        self.bus.ports.write(0xcf8, 4, 0x8000_0000 | address);
        self.bus.ports.write(0xcfc, 4, value);
    }

    /// PIC at 30h and 38h; PIT at 1 kHz; PM at 600h; ECAM.
    fn set_up(&self) {
        for (port, icws) in [(0x20, [0x30, 4, 1]), (0xa0, [0x38, 2, 1])] {
            self.out(port, 0x11);
            for icw in icws {
                self.out(port + 1, icw);
            }
            self.out(port + 1, 0);
        }
        self.out(0x43, 0x34);
        self.out(0x40, 0xa9);
        self.out(0x40, 0x04);
        self.config(0xf840, 0x601);
        self.config(0xf844, 0x80);
        self.config(0x60, 0xb000_0001);
    }

    fn states(&self) -> Vec<terem_bus::SavedDevice> {
        self.devices.iter().map(|d| d.save().unwrap()).collect()
    }
}

#[test]
fn a_timer_tick_goes_all_the_way() {
    let b = Board::new();
    b.set_up();
    assert!(b.apics.intr());
    assert_eq!(b.bus.acknowledge_interrupt(), 0x30);
    b.out(0x20, 0x20);
    b.bus.clock.advance(1_001_000);
    assert!(b.apics.intr());
    assert_eq!(b.bus.acknowledge_interrupt(), 0x30);
    // The same through the I/O APIC's input 2.
    b.bus.mmio.write(0xfec0_0000, 4, 0x14);
    b.bus.mmio.write(0xfec0_0010, 4, 0x50);
    b.apics.take();
    b.bus.clock.advance(1_000_000);
    assert_eq!(b.apics.take()[0].vector, 0x50);
}

#[test]
fn the_hpet_stands_in_for_the_pit_at_the_pic() {
    let b = Board::new();
    b.set_up();
    let hpet = |offset: u64, value| b.bus.mmio.write(0xfed0_0000 + offset, 4, value);
    hpet(0x10, 3);
    assert!(!b.apics.intr(), "the PIT is off the line");
    hpet(0x100, 1 << 2 | 1 << 3 | 1 << 6 | 1 << 8);
    hpet(0x108, 100_000);
    hpet(0x108, 100_000);
    for _ in 0..3 {
        b.bus.clock.advance(1_000_000);
        assert!(b.apics.intr());
        assert_eq!(b.bus.acknowledge_interrupt(), 0x30);
        b.out(0x20, 0x20);
        assert!(!b.apics.intr());
    }
}

#[test]
fn the_sci_is_a_level_and_power_goes_off() {
    let b = Board::new();
    b.set_up();
    b.bus.mmio.write(0xfec0_0000, 4, 0x22);
    b.bus.mmio.write(0xfec0_0010, 4, 0x8049);
    b.out(0xb2, u64::from(acpi_pm::ACPI_ENABLE));
    b.bus.ports.write(0x602, 2, 1);
    b.out(0x43, 0x30); // the PIT is quiet: 700 s are long
    b.apics.take();
    b.bus.clock.advance(700_000_000_000);
    let first: Vec<_> = b.apics.take().into_iter().filter(|m| m.vector == 0x49).collect();
    assert_eq!((first.len(), first[0].level_triggered), (1, true));
    b.bus.end_of_interrupt(0x49);
    assert_eq!(b.apics.take().len(), 1, "the timer's overflow was not cleared");
    b.bus.ports.write(0x600, 2, 1);
    b.bus.end_of_interrupt(0x49);
    assert!(b.apics.take().is_empty());
    b.bus.ports.write(0x604, 2, 7 << 10 | 1 << 13);
    b.out(0x64, 0xfe);
    b.out(0xcf9, 6);
    b.out(0x505, 1);
    assert_eq!(b.events.take(), ["power off", "reset", "reset", "Panicked"]);
}

#[test]
fn everything_is_saved_restored_and_reset() {
    let a = Board::new();
    a.set_up();
    a.out(0x3fc, 0x08);
    a.out(0x3f9, 0x02);
    a.bus.clock.advance(3_300_000);
    let states = a.states();
    let b = Board::new();
    b.bus.clock.advance(3_300_000);
    for (device, state) in b.devices.iter().zip(&states) {
        device.restore(state).unwrap();
    }
    for (restored, saved) in b.states().iter().zip(&states) {
        assert_eq!(restored, saved);
    }
    assert_eq!(b.apics.intr(), a.apics.intr());
    assert_eq!(b.bus.mmio.read(0xb000_0000, 4), 0x29c0_8086);
    for board in [&a, &b] {
        board.bus.clock.advance(10_000_000);
    }
    assert!(b.states() == a.states(), "both went on in the same way");
    assert_eq!(b.bus.ports.read(0x608, 4), a.bus.ports.read(0x608, 4));
    for device in &b.devices {
        device.reset();
    }
    assert!(!b.apics.intr());
    assert_eq!((b.bus.ports.read(0x608, 4), b.bus.mmio.read(0xb000_0000, 4)), (0xffff_ffff, 0xffff_ffff));
    b.bus.clock.advance(1_000_000_000);
    assert!(!b.apics.intr(), "nothing ticks after a reset");
}

const PORTS: [u64; 19] = [
    0x20, 0x40, 0x60, 0x61, 0x64, 0x70, 0x92, 0xa0, 0xb2, 0xe9, 0x3f8, 0x402, 0x4d0, 0x501, 0x505, 0x510,
    0xcf8, 0x600, 0x2f8,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever a guest does to all of it together, its state can be saved and taken up by a copy,
    /// and reads are never wider than asked for.
    #[test]
    fn any_guest_leaves_a_state_that_can_be_restored(
        ops in prop::collection::vec((0_usize..24, 0_u64..16, 0_u8..3, any::<u64>()), 0..120)
    ) {
        let a = Board::new();
        a.set_up();
        for (place, offset, size, value) in ops {
            let size = 1 << size;
            let value = value & all_ones(size);
            match place {
                0..19 => {
                    a.bus.ports.write(PORTS[place] + offset, size, value);
                    prop_assert!(a.bus.ports.read(PORTS[place] + offset, size) <= all_ones(size));
                }
                19 => a.bus.mmio.write(0xfec0_0000 + (offset & 1) * 0x10, 4, value & 0x3f),
                20 => a.bus.mmio.write(0xfed0_0100 + offset * 8, 4, value),
                21 => a.bus.mmio.write(0xb000_0000 + offset * 16 + (value & 1) * 0xf_8000, 4, value),
                22 => { let _ = a.bus.acknowledge_interrupt(); }
                _ => a.bus.end_of_interrupt(value.to_le_bytes()[0]),
            }
        }
        let states = a.states();
        let b = Board::new();
        for (device, state) in b.devices.iter().zip(&states) {
            device.restore(state).unwrap();
        }
        for device in &b.devices {
            device.reset();
        }
        prop_assert!(!b.apics.intr());
    }
}
