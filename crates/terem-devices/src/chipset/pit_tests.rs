use super::*;
use crate::chipset::lab::Lines;
use proptest::prelude::*;

struct Lab {
    clock: Clock,
    lines: Arc<Lines>,
    pit: Arc<Mutex<Pit>>,
    port61: Port61,
}

impl Lab {
    fn new() -> Self {
        let (clock, lines) = (Clock::manual(), Arc::new(Lines::default()));
        let pit = Pit::new(clock.clone(), lines.line(0));
        Self { clock, lines, port61: Port61(Arc::clone(&pit)), pit }
    }

    fn out(&self, port: u64, value: u64) {
        assert!(Handler::write(&*self.pit, port, 1, value));
    }

    fn in_(&self, port: u64) -> u64 {
        Handler::read(&*self.pit, port, 1).unwrap()
    }

    fn count(&self, channel: u64) -> u64 {
        self.out(3, channel << 6);
        self.in_(channel) | self.in_(channel) << 8
    }

    /// To the first nanosecond of tick `t`.
    fn to_tick(&self, t: u64) {
        self.clock.advance(nanoseconds(t) - self.clock.now());
    }
}

#[test]
fn ticks_and_nanoseconds_agree() {
    assert_eq!(ticks(1_000_000_000), FREQUENCY);
    for t in [0, 1, 2, 1_193_181, 1_193_182, 987_654_321] {
        let ns = nanoseconds(t);
        assert_eq!(ticks(ns), t);
        assert!(ns == 0 || ticks(ns - 1) < t);
    }
}

#[test]
fn channel_0_gives_100_hz_in_mode_2() {
    let l = Lab::new();
    l.out(3, 0x34);
    l.out(0, 0x9c);
    l.out(0, 0x2e); // 11932 clocks: LATCH of HZ=100
    l.clock.advance(1_000_000_000);
    assert_eq!(l.lines.edges(0), 1 + 99, "high when the count was written, then 99 whole periods");
    l.clock.advance(1_000_000_000);
    assert_eq!(l.lines.edges(0), 1 + 199);
}

#[test]
fn mode_2_counts_down_and_round() {
    let l = Lab::new();
    l.out(3, 0x34);
    l.out(0, 5);
    l.out(0, 0);
    let seen: Vec<_> = (1..=11)
        .map(|t| {
            l.to_tick(t);
            l.count(0)
        })
        .collect();
    assert_eq!(seen, [5, 4, 3, 2, 1, 5, 4, 3, 2, 1, 5]);
    // A new count waits for the period's end.
    l.out(0, 3);
    l.out(0, 0);
    let seen: Vec<_> = (12..=18)
        .map(|t| {
            l.to_tick(t);
            l.count(0)
        })
        .collect();
    assert_eq!(seen, [4, 3, 2, 1, 3, 2, 1]);
}

#[test]
fn mode_3_is_a_square_wave() {
    for (n, expected) in [(4, "HHLLHH"), (5, "HHHLLHHH")] {
        let l = Lab::new();
        l.port61.write(0, 1, 1);
        l.out(3, 0xb6);
        l.out(2, n);
        l.out(2, 0);
        let seen: String = (1..=expected.len() as u64)
            .map(|t| {
                l.to_tick(t);
                if l.port61.read(0, 1).unwrap() & 0x20 != 0 { 'H' } else { 'L' }
            })
            .collect();
        assert_eq!(seen, expected);
    }
    let l = Lab::new();
    l.out(3, 0x36);
    l.out(0, 6);
    l.out(0, 0);
    let seen: Vec<_> = (1..=7)
        .map(|t| {
            l.to_tick(t);
            l.count(0)
        })
        .collect();
    assert_eq!(seen, [6, 4, 2, 6, 4, 2, 6], "by two");
}

/// Linux' pit_calibrate_tsc(): gate on, mode 0, a 50 ms count, wait for OUT.
#[test]
fn channel_2_calibrates_exactly() {
    let l = Lab::new();
    l.clock.advance(123_456_789);
    let old = l.port61.read(0, 1).unwrap();
    l.port61.write(0, 1, old & !2 | 1);
    l.out(3, 0xb0);
    let latch = FREQUENCY * 50 / 1000;
    l.out(2, latch & 0xff);
    l.out(2, latch >> 8);
    let start = l.clock.now();
    assert_eq!(l.port61.read(0, 1).unwrap() & 0x20, 0);
    let due = nanoseconds(ticks(start) + 1 + latch);
    l.clock.advance(due - 1 - start);
    assert_eq!(l.port61.read(0, 1).unwrap() & 0x20, 0);
    l.clock.advance(1);
    assert_eq!(l.port61.read(0, 1).unwrap() & 0x20, 0x20);
    assert!((due - start).abs_diff(50_000_000) < 1700, "within two clocks of 50 ms");
    // And pit_fast_calibrate: the high byte falls by one each 256 ticks.
    l.out(3, 0xb0);
    l.out(2, 0xff);
    l.out(2, 0xff);
    let t = ticks(l.clock.now());
    l.to_tick(t + 1 + 0x3ff);
    assert_eq!((l.in_(2), l.in_(2)), (0x00, 0xfc));
}

#[test]
fn the_gate_stops_and_triggers() {
    let l = Lab::new();
    l.port61.write(0, 1, 1);
    l.out(3, 0xb0);
    l.out(2, 100);
    l.out(2, 0);
    l.to_tick(11);
    l.port61.write(0, 1, 0);
    l.to_tick(500);
    assert_eq!(l.count(2), 90);
    l.port61.write(0, 1, 1);
    l.to_tick(505);
    assert_eq!(l.count(2), 85);
    // Mode 1: a pulse of 10 clocks for each trigger.
    l.out(3, 0xb2);
    l.out(2, 10);
    l.out(2, 0);
    assert_eq!(l.port61.read(0, 1).unwrap() & 0x20, 0x20, "waits for its trigger");
    l.port61.write(0, 1, 0);
    l.port61.write(0, 1, 1);
    let t = ticks(l.clock.now());
    l.to_tick(t + 1);
    assert_eq!(l.port61.read(0, 1).unwrap() & 0x20, 0);
    l.to_tick(t + 11);
    assert_eq!(l.port61.read(0, 1).unwrap() & 0x20, 0x20);
}

#[test]
fn one_shots_interrupt_once() {
    for mode in [0x30, 0x38] {
        let l = Lab::new();
        l.out(3, mode);
        for _ in 0..2 {
            let before = l.lines.edges(0);
            l.out(0, 0xe8);
            l.out(0, 3);
            let after = l.lines.edges(0);
            l.clock.advance(700_000);
            assert_eq!(l.lines.edges(0), after);
            l.clock.advance(300_000);
            assert_eq!(l.lines.edges(0), after + 1, "1000 clocks are 838 us");
            l.clock.advance(100_000_000);
            assert_eq!(l.lines.edges(0), after + 1);
            assert!(after - before <= 1);
        }
    }
}

#[test]
fn latches_status_and_bcd() {
    let l = Lab::new();
    l.out(3, 0x35); // channel 0, mode 2, BCD
    l.out(3, 0xe2); // status of channel 0
    assert_eq!(l.in_(0), 0xf5, "output high, no count yet");
    l.out(0, 0x00);
    l.out(0, 0x10); // 1000
    l.to_tick(2);
    assert_eq!(l.count(0), 0x0999);
    l.out(3, 0xc2); // status and count
    l.to_tick(300);
    assert_eq!((l.in_(0), l.in_(0), l.in_(0)), (0xb5, 0x99, 0x09));
    assert_eq!(Handler::read(&*l.pit, 3, 1), None);
    assert_eq!(Handler::read(&*l.pit, 0, 2), None);
}

#[test]
fn the_refresh_bit_toggles() {
    let l = Lab::new();
    let seen: Vec<_> = (0..4)
        .map(|_| {
            l.clock.advance(15_085);
            l.port61.read(0, 1).unwrap() & 0x10
        })
        .collect();
    assert_eq!(seen, [0x10, 0, 0x10, 0]);
}

#[test]
fn a_saved_pit_goes_on() {
    let a = Lab::new();
    a.out(3, 0x34);
    a.out(0, 0x9c);
    a.out(0, 0x2e);
    a.clock.advance(25_000_000);
    let b = Lab::new();
    b.clock.advance(25_000_000);
    locked(&b.pit).restore(locked(&a.pit).save()).unwrap();
    assert_eq!(a.count(0), b.count(0));
    let before = (a.lines.edges(0), b.lines.edges(0));
    a.clock.advance(50_000_000);
    b.clock.advance(50_000_000);
    assert_eq!((a.lines.edges(0) - before.0, b.lines.edges(0) - before.1), (5, 5));
    DeviceState::reset(&mut *locked(&b.pit));
    b.clock.advance(50_000_000);
    assert_eq!(b.lines.edges(0) - before.1, 5);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// Whatever is written and however time goes: counts stay in range, and a copy from the saved
    /// state reads and interrupts the same from there on.
    #[test]
    fn any_programme_can_be_saved(ops in prop::collection::vec((0_u8..7, any::<u8>(), 0_u64..200_000), 0..40)) {
        let a = Lab::new();
        for (op, value, ns) in ops {
            match op {
                0..=3 => a.out(u64::from(op), u64::from(value)),
                4 => { let _ = Handler::read(&*a.pit, u64::from(value & 3), 1); }
                5 => { a.port61.write(0, 1, u64::from(value)); }
                _ => a.clock.advance(ns),
            }
        }
        let b = Lab::new();
        b.clock.advance(a.clock.now());
        locked(&b.pit).restore(locked(&a.pit).save()).unwrap();
        let before = (a.lines.edges(0), b.lines.edges(0));
        for _ in 0..8 {
            for l in [&a, &b] { l.clock.advance(7_000_000); }
            for c in 0..3 { prop_assert_eq!(a.in_(c), b.in_(c)); }
            prop_assert_eq!(a.port61.read(0, 1), b.port61.read(0, 1));
        }
        prop_assert_eq!(a.lines.edges(0) - before.0, b.lines.edges(0) - before.1);
    }
}
