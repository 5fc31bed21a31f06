use super::*;
use crate::chipset::lab::{Events, Lines};
use proptest::prelude::*;

struct Lab {
    clock: Clock,
    lines: Arc<Lines>,
    events: Arc<Events>,
    pm: Arc<Mutex<AcpiPm>>,
}

impl Lab {
    fn new(width: TimerWidth) -> Self {
        let (clock, lines) = (Clock::manual(), Arc::new(Lines::default()));
        let events = Arc::new(Events::default());
        let pm = AcpiPm::new(clock.clone(), lines.line(9), Arc::clone(&events) as _, width);
        Self { clock, lines, events, pm }
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        Handler::read(&*self.pm, offset, size).unwrap() & terem_bus::all_ones(size)
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        assert!(Handler::write(&*self.pm, offset, size, value));
    }

    fn enable(&self) {
        assert!(SmiPorts(Arc::clone(&self.pm)).write(0, 1, u64::from(ACPI_ENABLE)));
    }
}

#[test]
fn the_timer_counts_at_its_frequency() {
    let l = Lab::new(TimerWidth::Bits32);
    l.clock.advance(1_000_000_000);
    assert_eq!(l.read(PM_TIMER, 4), TIMER_FREQUENCY);
    assert_eq!(l.read(PM_TIMER + 1, 1), TIMER_FREQUENCY >> 8 & 0xff);
    l.clock.advance(9_000_000_000);
    assert_eq!(l.read(PM_TIMER, 4), 10 * TIMER_FREQUENCY);
    let l = Lab::new(TimerWidth::Bits24);
    l.clock.advance(10_000_000_000);
    assert_eq!(l.read(PM_TIMER, 4), 10 * TIMER_FREQUENCY % (1 << 24));
    assert_eq!(Handler::read(&*l.pm, 2, 4), None);
}

#[test]
fn its_overflow_interrupts() {
    let l = Lab::new(TimerWidth::Bits24);
    l.enable();
    l.write(PM1_EVENT + 2, 2, 1);
    l.clock.advance(2_343_000_000);
    assert!(!l.lines.level(9), "2^23 ticks are 2.3435 s");
    l.clock.advance(1_000_000);
    assert!(l.lines.level(9));
    assert_eq!(l.read(PM1_EVENT, 2), 1);
    l.write(PM1_EVENT, 2, 1);
    assert!(!l.lines.level(9));
    l.clock.advance(2_344_000_000);
    assert!(l.lines.level(9));
}

#[test]
fn the_power_button_is_an_sci() {
    let l = Lab::new(TimerWidth::Bits32);
    l.write(PM1_EVENT, 4, 0x0100_0000);
    locked(&l.pm).press_power_button();
    assert!(!l.lines.level(9), "no SCI before ACPI is on");
    l.enable();
    assert!(l.lines.level(9));
    assert_eq!(l.read(PM1_CONTROL, 2), 1);
    assert_eq!(l.read(PM1_EVENT, 4), 0x0100_0100);
    l.write(PM1_EVENT, 2, 0x100);
    assert!(!l.lines.level(9));
    l.write(GPE0 + 8, 1, 4);
    locked(&l.pm).raise_gpe(2);
    locked(&l.pm).raise_gpe(99);
    assert!(l.lines.level(9));
    assert_eq!((l.read(GPE0, 4), l.read(GPE0 + 8, 4)), (4, 4));
    l.write(GPE0, 1, 4);
    assert!(!l.lines.level(9));
    SmiPorts(Arc::clone(&l.pm)).write(0, 2, 0x7700 | u64::from(ACPI_DISABLE));
    assert!(!locked(&l.pm).is_acpi_enabled());
    assert_eq!(SmiPorts(Arc::clone(&l.pm)).read(1, 1), Some(0x77));
}

#[test]
fn s5_powers_off() {
    let l = Lab::new(TimerWidth::Bits32);
    l.write(PM1_CONTROL, 2, 7 << 10);
    assert!(l.events.take().is_empty(), "not without SLP_EN");
    l.write(PM1_CONTROL, 2, 5 << 10 | 1 << 13);
    assert!(l.events.take().is_empty(), "S3 is not offered");
    l.write(PM1_CONTROL, 2, u64::from(SLEEP_TYPE_S5) << 10 | 1 << 13 | 1);
    assert_eq!(l.events.take(), ["power off"]);
    assert_eq!(l.read(PM1_CONTROL, 2), 7 << 10 | 1, "SLP_EN reads as zero");
}

#[test]
fn a_saved_block_goes_on() {
    let a = Lab::new(TimerWidth::Bits24);
    a.enable();
    a.write(PM1_EVENT + 2, 2, 0x101);
    locked(&a.pm).press_power_button();
    let b = Lab::new(TimerWidth::Bits24);
    locked(&b.pm).restore(locked(&a.pm).save()).unwrap();
    assert!(b.lines.level(9));
    b.write(PM1_EVENT, 2, 0x100);
    assert!(!b.lines.level(9));
    b.clock.advance(2_344_000_000);
    assert!(b.lines.level(9), "the overflow is still waited for");
    DeviceState::reset(&mut *locked(&b.pm));
    assert!(!b.lines.level(9));
    assert_eq!(b.read(PM1_EVENT, 4), 0);
}

proptest! {
    /// SCI is exactly an enabled event in ACPI mode.
    #[test]
    fn sci_follows_the_registers(ops in prop::collection::vec((0_u64..0x30, 0_u8..4, any::<u64>(), 0_u64..3_000_000_000), 0..50)) {
        let l = Lab::new(TimerWidth::Bits24);
        for (offset, size, value, ns) in ops {
            let size = [1, 2, 4, 8][usize::from(size)];
            Handler::write(&*l.pm, offset, size, value);
            let _ = Handler::read(&*l.pm, offset, size);
            l.clock.advance(ns);
            let (event, gpe) = (l.read(PM1_EVENT, 4), (l.read(GPE0, 4), l.read(GPE0 + 4, 4)));
            let on = gpe.0 & l.read(0x28, 4) != 0 || gpe.1 & l.read(0x2c, 4) != 0
                || event >> 16 & event & u64::from(ENABLE_BITS) != 0;
            prop_assert_eq!(l.lines.level(9), on && l.read(PM1_CONTROL, 1) & 1 != 0);
        }
    }
}
