use super::*;
use proptest::prelude::*;
use terem_bus::{Clock, LineSink, MsiMessage, Registers};

/// Keeps what was sent.
#[derive(Default)]
pub struct Messages(Mutex<Vec<MsiMessage>>);

impl Messages {
    pub fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut locked(&self.0))
    }
}

impl MsiSink for Messages {
    fn send_msi(&self, message: MsiMessage) {
        locked(&self.0).push(message);
    }
}

#[derive(Default)]
pub struct Level(pub Mutex<bool>);

impl LineSink for Level {
    fn set_line(&self, _line: u32, high: bool) {
        *locked(&self.0) = high;
    }
}

struct Constant(u64);

impl Registers for Constant {
    fn read(&mut self, _offset: u64, _size: u8) -> Option<u64> {
        Some(self.0)
    }

    fn write(&mut self, _offset: u64, _size: u8, value: u64) -> bool {
        self.0 = value;
        true
    }
}

struct Lab {
    bus: Arc<Bus>,
    sent: Arc<Messages>,
    line: Arc<Level>,
    function: Arc<PciFunction>,
}

impl Lab {
    fn new() -> Self {
        let bus = Arc::new(Bus::new(Clock::manual()));
        let (sent, line) = (Arc::new(Messages::default()), Arc::new(Level::default()));
        let wiring = Wiring {
            bus: Arc::downgrade(&bus),
            msi: Arc::clone(&sent) as _,
            intx: IrqLine::new(Arc::clone(&line) as _, 0),
        };
        let id = Identity { vendor_id: 0x1af4, device_id: 0x1041, ..Identity::default() };
        let mut b = FunctionBuilder::new(&id, ConfigSize::Extended, wiring);
        b.bar(0, BarKind::Io, 0x20, "io").unwrap();
        b.msix_bar(1, 4).unwrap();
        b.bar(4, BarKind::Memory64 { prefetchable: true }, 0x4000, "regs").unwrap();
        assert_eq!(b.bar(5, BarKind::Io, 4, "x"), Err(PciError::BarTaken(5)));
        b.interrupt_pin(Pin::A);
        b.msi(2).unwrap();
        b.power_management().unwrap();
        b.pci_express(capability::ExpressType::RootComplexIntegrated).unwrap();
        let function = b.build();
        function.set_bar_handler(0, Arc::new(Mutex::new(Constant(0x11))));
        function.set_bar_handler(4, Arc::new(Mutex::new(Constant(0x44))));
        Self { bus, sent, line, function }
    }

    fn write(&self, offset: u16, size: u8, value: u32) {
        self.function.write_config(offset, size, value);
    }

    fn intx(&self) -> bool {
        *locked(&self.line.0)
    }
}

const MSIX: u16 = 0x40;
const MSI: u16 = 0x4c;
const PM: u16 = 0x64;

#[test]
fn bars_answer_where_and_when_the_registers_say() {
    let l = Lab::new();
    l.write(0x10, 4, 0xc000);
    l.write(0x20, 4, 0xe000_0000);
    l.write(0x24, 4, 0x1);
    assert_eq!(l.bus.mmio.read(0x1_e000_0000, 4), 0xffff_ffff, "memory is off");
    l.write(4, 2, 0x3);
    assert_eq!(l.bus.mmio.read(0x1_e000_3ffc, 4), 0x44);
    assert_eq!(l.bus.ports.read(0xc01f, 1), 0x11);
    assert_eq!(l.function.bar_address(4), Some(0x1_e000_0000));
    l.write(0x24, 4, 0x2);
    assert_eq!(l.bus.mmio.read(0x1_e000_0000, 4), 0xffff_ffff);
    assert_eq!(l.bus.mmio.read(0x2_e000_0000, 4), 0x44);
    l.write(PM + 4, 2, 3);
    assert_eq!(l.bus.mmio.read(0x2_e000_0000, 4), 0xffff_ffff, "asleep in D3hot");
    l.write(PM + 4, 2, 0);
    assert_eq!(l.bus.mmio.read(0x2_e000_0000, 4), 0x44);
    l.write(4, 2, 0);
    assert!(l.bus.mmio.regions().is_empty() && l.bus.ports.regions().is_empty());
}

#[test]
fn an_overlap_is_left_out_until_there_is_room() {
    let l = Lab::new();
    let id = l.bus.mmio.map(0xe000_1000, 0x1000, "other", Arc::new(Mutex::new(Constant(7)))).unwrap();
    l.write(4, 2, 2);
    l.write(0x20, 4, 0xe000_0000);
    assert_eq!((l.bus.mmio.read(0xe000_1000, 4), l.function.bar_address(4)), (7, None));
    l.bus.mmio.unmap(id);
    l.write(0x20, 4, 0xe000_0000);
    assert_eq!(l.bus.mmio.read(0xe000_1000, 4), 0x44);
}

#[test]
fn two_bars_may_swap_places() {
    let l = Lab::new();
    l.write(0x14, 4, 0xe000_0000);
    l.write(0x20, 4, 0xe000_4000);
    l.write(4, 2, 2);
    assert_eq!(l.bus.mmio.regions().len(), 2);
    l.write(0x14, 4, 0xe000_4000);
    l.write(0x20, 4, 0xe000_0000);
    let names: Vec<_> = l.bus.mmio.regions().into_iter().map(|(a, _, n)| (a, n)).collect();
    assert_eq!(names, [(0xe000_0000, "regs".into()), (0xe000_4000, "MSI-X".into())]);
}

#[test]
fn intx_obeys_disable_and_messages() {
    let l = Lab::new();
    l.function.set_intx(true);
    assert!(l.intx());
    assert_eq!(l.function.read(register::STATUS, 2) & 8, 8);
    l.write(4, 2, 0x400);
    assert!(!l.intx());
    assert_eq!(l.function.read(register::STATUS, 2) & 8, 8, "status shows it all the same");
    l.write(4, 2, 0);
    assert!(l.intx());
    l.write(MSIX + 2, 2, 0x8000);
    assert!(!l.intx(), "a function with messages does not use its pin");
    l.write(MSIX + 2, 2, 0);
    l.function.set_intx(false);
    assert!(!l.intx());
    assert_eq!(l.function.read(register::STATUS, 2) & 8, 0);
}

#[test]
fn messages_go_through_the_bar_and_the_capability() {
    let l = Lab::new();
    assert_eq!(l.function.read(MSIX, 4), 0x0003_4c11);
    assert_eq!((l.function.read(MSIX + 4, 4), l.function.read(MSIX + 8, 4)), (1, 0x801));
    l.write(0x14, 4, 0xe000_0000);
    l.write(4, 2, 6);
    l.bus.mmio.write(0xe000_0010, 8, 0xfee0_0000);
    l.bus.mmio.write(0xe000_0018, 8, 0x51);
    l.write(MSIX + 2, 2, 0x8000);
    l.function.msix().unwrap().trigger(1);
    assert_eq!(l.sent.take(), [MsiMessage { address: 0xfee0_0000, data: 0x51 }]);
    l.write(MSIX + 2, 2, 0);
    l.write(MSI + 4, 4, 0xfee0_4000);
    l.write(MSI + 2, 2, 0x11);
    l.function.trigger_msi(1);
    assert_eq!(l.sent.take(), [MsiMessage { address: 0xfee0_4000, data: 1 }]);
    l.write(4, 2, 2);
    l.function.trigger_msi(0);
    assert!(l.sent.take().is_empty(), "not a bus master");
    l.write(4, 2, 6);
    assert_eq!(l.sent.take().len(), 1);
}

#[test]
fn a_saved_function_goes_on_elsewhere() {
    let a = Lab::new();
    a.write(0x20, 4, 0xe000_0000);
    a.write(0x14, 4, 0xe001_0000);
    a.write(4, 2, 6);
    a.bus.mmio.write(0xe001_0000, 8, 0xfee0_0000);
    a.write(MSIX + 2, 2, 0x8000);
    a.function.msix().unwrap().trigger(0);
    a.function.set_intx(true);
    let saved = Device::save(&*a.function).unwrap();
    let text = serde_json::to_string(&saved).unwrap();
    let b = Lab::new();
    Device::restore(&*b.function, &serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(b.bus.mmio.read(0xe000_0000, 4), 0x44);
    assert!(!b.intx() && b.sent.take().is_empty());
    b.bus.mmio.write(0xe001_0008, 8, 0x51);
    assert_eq!(b.sent.take(), [MsiMessage { address: 0xfee0_0000, data: 0x51 }], "was pending");
    b.write(MSIX + 2, 2, 0);
    assert!(b.intx(), "the pin's level was saved");
    Device::reset(&*b.function);
    assert!(b.bus.mmio.regions().is_empty() && !b.intx());
    assert_eq!(b.function.read(4, 2), 0);
    let mut wrong = saved;
    wrong.device = "pit".into();
    assert!(Device::restore(&*b.function, &wrong).is_err());
}

#[test]
fn unplugging_takes_it_off_the_bus() {
    let l = Lab::new();
    l.write(0x20, 4, 0xe000_0000);
    l.write(4, 2, 2);
    l.function.set_intx(true);
    l.function.unplug();
    assert!(l.bus.mmio.regions().is_empty() && !l.intx());
    l.write(0x20, 4, 0xe100_0000);
    assert!(l.bus.mmio.regions().is_empty());
}

#[test]
fn hooks_see_new_values_and_may_answer_reads() {
    struct Hook(Mutex<Vec<(u16, u16, u32)>>);
    impl ConfigHook for Hook {
        fn read(&self, _function: &PciFunction, offset: u16, _size: u8) -> Option<u32> {
            (offset == 0x3c).then_some(99)
        }
        fn written(&self, function: &PciFunction, offset: u16, size: u16) {
            locked(&self.0).push((offset, size, function.read(offset, 1)));
        }
    }
    let l = Lab::new();
    let hook = Arc::new(Hook(Mutex::default()));
    let weak = Arc::downgrade(&hook);
    l.function.set_hook(weak);
    l.write(0x3c, 1, 5);
    assert_eq!(*locked(&hook.0), [(0x3c, 1, 5)]);
    assert_eq!(l.function.read_config(0x3c, 1), 99);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever is written: read-only registers stay, at most one mapping for each BAR, inside the
    /// spaces and apart from each other, and a restored copy reads the same.
    #[test]
    fn any_writes_leave_a_function_whole(
        writes in prop::collection::vec((0_u16..0x120, 1_u8..=4, any::<u32>()), 0..60)
    ) {
        let l = Lab::new();
        for (offset, size, value) in writes {
            l.write(offset, size, value);
            l.function.set_intx(value & 1 != 0);
        }
        prop_assert_eq!(l.function.read(0, 4), 0x1041_1af4);
        prop_assert_eq!(l.function.read(MSIX, 1), 0x11);
        let regions = l.bus.mmio.regions();
        prop_assert!(regions.len() <= 2);
        prop_assert!(regions.windows(2).all(|w| w[0].1 <= w[1].0));
        let other = Lab::new();
        other.function.restore_state(&l.function.save_state()).unwrap();
        for offset in (0..0x120).step_by(4) {
            prop_assert_eq!(other.function.read(offset, 4), l.function.read(offset, 4));
        }
        prop_assert_eq!(other.intx(), l.intx());
    }
}
