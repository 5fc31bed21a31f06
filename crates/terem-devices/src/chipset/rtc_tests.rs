use super::*;
use crate::chipset::lab::Lines;
use proptest::prelude::*;
use std::sync::atomic::{AtomicI64, Ordering};
use terem_bus::Handler;

/// 2026-11-22 21:05:06.5 UTC, a Sunday.
const NOW: i64 = 1_795_381_506 * SECOND + SECOND / 2;

struct Lab {
    clock: Clock,
    wall: Arc<AtomicI64>,
    lines: Arc<Lines>,
    rtc: Arc<Mutex<Rtc>>,
}

impl Lab {
    fn new() -> Self {
        let (clock, lines) = (Clock::manual(), Arc::new(Lines::default()));
        let wall = Arc::new(AtomicI64::new(NOW));
        let w = Arc::clone(&wall);
        let rtc = Rtc::new(clock.clone(), lines.line(8), Box::new(move || w.load(Ordering::SeqCst)));
        Self { clock, wall, lines, rtc }
    }

    /// Both clocks go on, in steps of a millisecond.
    fn advance_ms(&self, ms: u32) {
        for _ in 0..ms {
            self.wall.fetch_add(1_000_000, Ordering::SeqCst);
            self.clock.advance(1_000_000);
        }
    }

    fn read(&self, index: u8) -> u8 {
        Handler::write(&*self.rtc, 0, 1, u64::from(index));
        Handler::read(&*self.rtc, 1, 1).unwrap().to_le_bytes()[0]
    }

    fn write(&self, index: u8, value: u8) {
        Handler::write(&*self.rtc, 0, 1, u64::from(index));
        assert!(Handler::write(&*self.rtc, 1, 1, u64::from(value)));
    }

    fn time(&self) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|r| self.read(r))
    }
}

#[test]
fn the_time_in_all_its_forms() {
    let l = Lab::new();
    assert_eq!(l.time(), [0x20, 0x26, 0x11, 0x22, 1, 0x21, 0x05, 0x06]);
    l.write(B, B_24_HOURS | B_BINARY);
    assert_eq!(l.time(), [20, 26, 11, 22, 1, 21, 5, 6]);
    l.write(B, B_BINARY);
    assert_eq!(l.read(HOURS), 0x89);
    l.write(B, 0);
    assert_eq!(l.read(HOURS), 0x89);
    l.wall.fetch_add(3 * 3_600 * SECOND, Ordering::SeqCst);
    assert_eq!(l.read(HOURS), 0x12, "midnight is 12 AM");
    assert_eq!(l.read(D), 0x80);
    assert_eq!(l.read(A), 0x26);
}

#[test]
fn setting_the_clock_is_an_offset() {
    let l = Lab::new();
    l.write(B, B_SET | B_24_HOURS);
    for (r, v) in [
        (CENTURY, 0x19),
        (YEAR, 0x99),
        (MONTH, 0x12),
        (DAY, 0x31),
        (HOURS, 0x23),
        (MINUTES, 0x59),
        (SECONDS, 0x58),
    ] {
        l.write(r, v);
    }
    l.advance_ms(700);
    assert_eq!(l.read(SECONDS), 0x58, "stopped while SET");
    l.write(B, B_24_HOURS);
    l.advance_ms(2_000);
    assert_eq!(l.time(), [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]);
    l.write(MINUTES, 0x30);
    assert_eq!(l.time(), [0x20, 0x00, 0x01, 0x01, 7, 0, 0x30, 0]);
    for r in [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS] {
        l.write(r, 0xff);
    }
    let _ = l.time();
}

#[test]
fn update_in_progress_precedes_the_second() {
    let l = Lab::new();
    assert_eq!(l.read(A) & A_UIP, 0);
    l.advance_ms(499);
    assert_eq!(l.read(A) & A_UIP, A_UIP);
    assert_eq!(l.read(SECONDS), 0x06);
    l.advance_ms(1);
    assert_eq!((l.read(A) & A_UIP, l.read(SECONDS)), (0, 0x07));
}

#[test]
fn update_alarm_and_periodic_interrupts() {
    let l = Lab::new();
    l.write(B, B_24_HOURS | B_UPDATE);
    l.advance_ms(499);
    assert!(!l.lines.level(8));
    l.advance_ms(1);
    assert!(l.lines.level(8));
    assert_eq!(l.read(C), C_IRQ | B_UPDATE);
    assert!(!l.lines.level(8));
    assert_eq!(l.read(C), 0);
    for (r, v) in [(SECONDS_ALARM, 0x09), (MINUTES_ALARM, 0x05), (HOURS_ALARM, 0xff)] {
        l.write(r, v);
    }
    l.write(B, B_24_HOURS | B_ALARM);
    l.advance_ms(1_999);
    assert!(!l.lines.level(8));
    l.advance_ms(1);
    assert_eq!(l.read(C) & (C_IRQ | B_ALARM), C_IRQ | B_ALARM);
    // Rate 6 is 976.5625 us, so 1024 Hz.
    l.write(B, B_24_HOURS | B_PERIODIC);
    let mut count = 0;
    for _ in 0..1_000 {
        l.advance_ms(1);
        count += u32::from(l.read(C) & B_PERIODIC != 0);
    }
    assert!((995..=1_000).contains(&count), "{count}: read once a millisecond");
    l.write(B, B_24_HOURS);
    let edges = l.lines.edges(8);
    l.advance_ms(100);
    assert_eq!(l.lines.edges(8), edges);
}

#[test]
fn memory_has_two_banks_and_survives_resets() {
    let l = Lab::new();
    l.write(0x40, 0x5a);
    locked(&l.rtc).set_memory(0x34, 0xff);
    locked(&l.rtc).set_memory(0x0a, 0xff);
    Handler::write(&*l.rtc, 2, 1, 0x05);
    Handler::write(&*l.rtc, 3, 1, 0x77);
    DeviceState::reset(&mut *locked(&l.rtc));
    assert_eq!((l.read(0x40), l.read(0x34), l.read(0x05), l.read(A)), (0x5a, 0xff, 0, 0x26));
    Handler::write(&*l.rtc, 2, 1, 0x85);
    assert_eq!(Handler::read(&*l.rtc, 3, 1), Some(0x77));
    assert_eq!(Handler::read(&*l.rtc, 0, 1), None);
}

#[test]
fn a_saved_clock_goes_on() {
    let a = Lab::new();
    a.write(YEAR, 0x30);
    a.write(0x50, 1);
    a.write(B, B_24_HOURS | B_PERIODIC | B_UPDATE);
    a.advance_ms(1);
    let b = Lab::new();
    b.wall.store(NOW + 1_000_000 + 10 * SECOND, Ordering::SeqCst);
    locked(&b.rtc).restore(locked(&a.rtc).save()).unwrap();
    assert_eq!(b.lines.level(8), a.lines.level(8));
    assert_eq!((b.read(YEAR), b.read(SECONDS), b.read(0x50)), (0x30, 0x16, 1));
    b.read(C);
    b.advance_ms(499);
    assert_eq!(b.read(C), C_IRQ | B_PERIODIC | B_UPDATE);
    let mut bad = locked(&a.rtc).save();
    bad.cmos.pop();
    assert!(locked(&b.rtc).restore(bad).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// The line is register C's top bit, and the time that is read is a time, whatever was written.
    #[test]
    fn any_writes_keep_it_a_clock(ops in prop::collection::vec((0_u8..6, any::<u8>(), any::<u8>()), 0..60)) {
        let l = Lab::new();
        for (op, index, value) in ops {
            match op {
                0 | 1 => { Handler::write(&*l.rtc, u64::from(index & 3), 1 + (index >> 7), u64::from(value)); }
                2 => l.write(index & 0xf, value),
                3 => { l.read(index); }
                _ => l.advance_ms(u32::from(value)),
            }
            let rtc = locked(&l.rtc);
            prop_assert_eq!(l.lines.level(8), rtc.register(C) & C_IRQ != 0);
            drop(rtc);
            if l.read(B) & B_SET == 0 {
                l.write(B, B_BINARY | B_24_HOURS);
                let [_, year, month, day, weekday, hour, minute, second] = l.time();
                prop_assert!(year < 100 && (1..=12).contains(&month) && (1..=31).contains(&day));
                prop_assert!((1..=7).contains(&weekday) && hour < 24 && minute < 60 && second < 60);
            }
        }
    }
}
