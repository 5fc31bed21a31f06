use super::*;
use crate::chipset::lab::{Lines, Messages};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use terem_bus::Handler;

#[derive(Default)]
struct Switch(AtomicBool);

impl LegacyReplacement for Switch {
    fn set_legacy_replacement(&self, on: bool) {
        self.0.store(on, Ordering::SeqCst);
    }
}

struct Lab {
    clock: Clock,
    lines: Arc<Lines>,
    switch: Arc<Switch>,
    sent: Arc<Messages>,
    hpet: Arc<Mutex<Hpet>>,
}

impl Lab {
    fn new() -> Self {
        let (clock, lines) = (Clock::manual(), Arc::new(Lines::default()));
        let (switch, sent) = (Arc::new(Switch::default()), Arc::new(Messages::default()));
        let wiring = HpetWiring {
            gsi: (0..24).map(|n| lines.line(n)).collect(),
            legacy: [lines.line(30), lines.line(31)],
            replacement: Arc::clone(&switch) as _,
            msi: Arc::clone(&sent) as _,
        };
        Self { hpet: Hpet::new(clock.clone(), wiring), clock, lines, switch, sent }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        assert!(Handler::write(&*self.hpet, offset, size, value));
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        Handler::read(&*self.hpet, offset, size).unwrap()
    }
}

#[test]
fn the_counter_counts_while_enabled() {
    let l = Lab::new();
    assert_eq!(l.read(0, 8), 0x0098_9680_8086_a201);
    assert_eq!(l.read(4, 4), 10_000_000);
    l.clock.advance(1_000);
    assert_eq!(l.read(COUNTER, 8), 0);
    l.write(COUNTER, 8, 0xffff_fff0);
    l.write(CONFIG, 4, 1);
    l.clock.advance(1_000);
    assert_eq!(l.read(COUNTER, 8), 0x1_0000_0054);
    assert_eq!((l.read(COUNTER, 4), l.read(COUNTER + 4, 4)), (0x54, 1));
    l.write(CONFIG, 4, 0);
    l.clock.advance(1_000);
    assert_eq!(l.read(COUNTER, 8), 0x1_0000_0054);
    assert_eq!(Handler::read(&*l.hpet, COUNTER, 2), None);
    assert_eq!(Handler::read(&*l.hpet, COUNTER + 4, 8), None);
}

/// Linux' hpet_clkevt_set_state_periodic(), with legacy replacement.
#[test]
fn timer_0_replaces_the_pit() {
    let l = Lab::new();
    l.write(CONFIG, 4, 3);
    assert!(l.switch.0.load(Ordering::SeqCst));
    let cfg = l.read(0x100, 4) & !2;
    l.write(0x100, 4, cfg | ENABLE_BITS);
    let now = l.read(COUNTER, 4);
    l.write(0x108, 4, now + 100_000);
    l.clock.advance(1_000);
    l.write(0x108, 4, 100_000);
    l.clock.advance(10_000_000);
    assert_eq!(l.lines.edges(30), 10);
    l.clock.advance(10_000_000);
    assert_eq!(l.lines.edges(30), 20);
    // One-shot: once, and not for a comparator that is behind.
    l.write(0x100, 4, cfg & !PERIODIC | INTERRUPT | MODE_32);
    l.write(0x108, 4, l.read(COUNTER, 4) + 500);
    l.clock.advance(4_990);
    assert_eq!(l.lines.edges(30), 20);
    l.clock.advance(10);
    assert_eq!(l.lines.edges(30), 21);
    l.write(0x108, 4, l.read(COUNTER, 4) - 10);
    l.clock.advance(1_000_000);
    assert_eq!(l.lines.edges(30), 21);
    l.write(CONFIG, 4, 1);
    assert!(!l.switch.0.load(Ordering::SeqCst));
}

const ENABLE_BITS: u64 = INTERRUPT | PERIODIC | VALUE_SET | MODE_32;

#[test]
fn routes_levels_and_messages() {
    let l = Lab::new();
    l.write(0x120, 4, INTERRUPT | LEVEL | 5 << 9);
    assert_eq!(l.read(0x120, 4) & 0x3e00, 0, "IRQ 5 is not to be had");
    l.write(0x120, 4, INTERRUPT | LEVEL | 21 << 9);
    assert_eq!(l.read(0x124, 4), 0x00f0_0000);
    l.write(CONFIG, 4, 1);
    l.write(0x128, 8, 100);
    l.clock.advance(1_000);
    assert!(l.lines.level(21));
    assert_eq!(l.read(STATUS, 4), 2);
    l.write(STATUS, 4, 1);
    assert!(l.lines.level(21));
    l.write(STATUS, 4, 2);
    assert!(!l.lines.level(21));
    l.write(0x140, 4, INTERRUPT | FSB);
    l.write(0x150, 8, 0xfee0_1000_0000_0042);
    l.write(0x148, 8, 300);
    l.clock.advance(10_000);
    assert_eq!(l.sent.take(), [MsiMessage { address: 0xfee0_1000, data: 0x42 }]);
}

#[test]
fn a_saved_hpet_goes_on() {
    let a = Lab::new();
    a.write(CONFIG, 4, 3);
    a.write(0x100, 4, ENABLE_BITS);
    a.write(0x108, 4, 100_000);
    a.write(0x108, 4, 100_000);
    a.clock.advance(2_500_000);
    let b = Lab::new();
    b.clock.advance(77_777);
    locked(&b.hpet).restore(locked(&a.hpet).save()).unwrap();
    assert!(b.switch.0.load(Ordering::SeqCst));
    assert_eq!(a.read(COUNTER, 8), b.read(COUNTER, 8));
    b.clock.advance(499_980);
    assert_eq!(b.lines.edges(30), 0);
    b.clock.advance(20);
    assert_eq!(b.lines.edges(30), 1);
    DeviceState::reset(&mut *locked(&b.hpet));
    assert_eq!((b.read(COUNTER, 8), b.read(CONFIG, 8)), (0, 0));
    assert!(!b.switch.0.load(Ordering::SeqCst));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// Read-only bits stay, interrupts never storm, and lines are low when no status bit is set.
    #[test]
    fn any_writes_keep_it_sane(ops in prop::collection::vec((0_u64..0x170, 0_u8..4, any::<u64>(), 0_u64..3_000_000), 0..60)) {
        let l = Lab::new();
        for (offset, size, value, ns) in ops {
            let size = [1, 2, 4, 8][usize::from(size)];
            let value = if size == 8 { value } else { value & 0xffff_ffff };
            Handler::write(&*l.hpet, offset & !3, size, value);
            let _ = Handler::read(&*l.hpet, offset, size);
            // Short periods are legal; keep the test's own time bounded.
            if locked(&l.hpet).comparators.iter().all(|c| c.period == 0 || c.period > 5_000) {
                l.clock.advance(ns);
            }
            let hpet = locked(&l.hpet);
            prop_assert!(hpet.status < 8 && hpet.config < 4);
            if hpet.status == 0 {
                prop_assert!((0..24).all(|n| !l.lines.level(n)));
            }
            for (n, c) in hpet.comparators.iter().enumerate() {
                prop_assert_eq!(c.config & !(WRITABLE | VALUE_SET), Comparator::new(n).config);
            }
        }
    }
}
