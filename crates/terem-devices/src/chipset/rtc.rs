//! MC146818A real-time clock and CMOS memory (Motorola MC146818A datasheet; banks as in ICH9 datasheet
//! section 13.6).
//!
//! The time is the host's plus an offset, which the guest changes by setting the clock; it goes on
//! while the machine is off or paused. Interrupts come with the virtual clock.

use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use terem_bus::{Clock, DeviceState, IrqLine, Registers, StateError, Timer, locked};

use super::calendar::DateTime;

/// CMOS bytes: two banks of 128.
const SIZE: usize = 256;

/// Time registers and their alarms.
const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;
const D: u8 = 0x0d;
/// Where PCs keep the century, by the FADT's CENTURY field.
pub const CENTURY: u8 = 0x32;

/// Register A: update in progress; divider 010 is the running oscillator.
const A_UIP: u8 = 1 << 7;
/// Register B.
const B_SET: u8 = 1 << 7;
const B_PERIODIC: u8 = 1 << 6;
const B_ALARM: u8 = 1 << 5;
const B_UPDATE: u8 = 1 << 4;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// Register C: the flags stand where B has their enables.
const C_IRQ: u8 = 1 << 7;
/// Register D: the battery is well.
const D_VALID: u8 = 1 << 7;
/// An alarm byte that matches always has its two top bits set.
const DONT_CARE: u8 = 0xc0;
/// PM, in 12-hour mode.
const PM: u8 = 0x80;

const SECOND: i64 = 1_000_000_000;
/// The update cycle: UIP is set this long before the second changes (datasheet, tBUC + tUC).
const UPDATE_NS: i64 = 244_000 + 1_984_000;

/// The second bank's index has its top bit set.
const INDEX_AT_RESET: [u8; 2] = [0, 0x80];

/// How far the virtual clock and the host's may part within a second (ns): an update interrupt that
/// comes this much before the second changes belongs to it.
const SLACK: i64 = 10_000_000;

/// The host's wall clock: nanoseconds since 1970-01-01 00:00:00 UTC.
pub type WallClock = Box<dyn Fn() -> i64 + Send>;

/// The system's wall clock.
#[must_use]
pub fn system_wall_clock() -> WallClock {
    Box::new(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
    })
}

/// The clock and its memory. Ports: index and data of the first bank, then of the second.
pub struct Rtc {
    irq: IrqLine,
    clock: Clock,
    timer: Timer,
    wall: WallClock,

    index: [u8; 2],
    /// Registers A–D and memory; the time is computed, except while SET stops it.
    cmos: [u8; SIZE],
    /// Guest time minus host time, ns.
    offset: i64,
    /// Virtual time of the next periodic interrupt, and of the next second.
    next_periodic: Option<u64>,
    next_second: Option<u64>,
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rtc").field("offset", &self.offset).finish_non_exhaustive()
    }
}

impl Rtc {
    /// An RTC that interrupts on `irq` (IRQ 8) and shows the time of `wall` in UTC.
    #[must_use]
    pub fn new(clock: Clock, irq: IrqLine, wall: WallClock) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|me: &Weak<Mutex<Self>>| {
            let me = me.clone();
            let timer = clock.timer(move |now| {
                if let Some(rtc) = me.upgrade() {
                    locked(&rtc).tick(now);
                }
            });
            let mut cmos = [0; SIZE];
            cmos[usize::from(A)] = 0x26;
            cmos[usize::from(B)] = B_24_HOURS;
            cmos[usize::from(D)] = D_VALID;
            let (next_periodic, next_second) = (None, None);
            Mutex::new(Self {
                irq,
                clock,
                timer,
                wall,
                index: INDEX_AT_RESET,
                cmos,
                offset: 0,
                next_periodic,
                next_second,
            })
        })
    }

    /// Sets a byte of memory, as firmware or the board does (memory sizes at 15h–18h, 30h–35h,
    /// 5Bh–5Dh; boot order). Clock registers are left alone.
    pub fn set_memory(&mut self, index: u8, value: u8) {
        if index > D && index != CENTURY {
            self.cmos[usize::from(index)] = value;
        }
    }

    /// Guest time, ns since 1970.
    fn guest_time(&self) -> i64 {
        (self.wall)().saturating_add(self.offset)
    }

    fn register(&self, r: u8) -> u8 {
        self.cmos[usize::from(r)]
    }

    fn binary(&self) -> bool {
        self.register(B) & B_BINARY != 0
    }

    fn encode(&self, value: u8) -> u8 {
        if self.binary() { value } else { (value / 10) << 4 | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.binary() { value } else { (value >> 4).saturating_mul(10).saturating_add(value & 0xf) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.register(B) & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.register(B) & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let hour = self.decode(value & !PM) % 12;
        if value & PM != 0 { hour + 12 } else { hour }
    }

    /// Writes guest time into the time registers.
    fn latch_time(&mut self) {
        self.latch(self.guest_time());
    }

    /// Writes `time` (ns) into the time registers.
    fn latch(&mut self, time: i64) {
        let t = DateTime::from_unix(time.div_euclid(SECOND));
        let century = u8::try_from(t.year / 100).unwrap_or(0);
        let year = u8::try_from(t.year % 100).unwrap_or(0);
        let registers = [
            (SECONDS, self.encode(t.second)),
            (MINUTES, self.encode(t.minute)),
            (HOURS, self.encode_hour(t.hour)),
            (WEEKDAY, self.encode(t.weekday)),
            (DAY, self.encode(t.day)),
            (MONTH, self.encode(t.month)),
            (YEAR, self.encode(year)),
            (CENTURY, self.encode(century)),
        ];
        for (r, value) in registers {
            self.cmos[usize::from(r)] = value;
        }
    }

    /// Makes guest time what the time registers say.
    fn take_time(&mut self) {
        let field = |r: u8| self.decode(self.register(r));
        let t = DateTime {
            year: u32::from(field(CENTURY)) * 100 + u32::from(field(YEAR)),
            month: field(MONTH),
            day: field(DAY),
            weekday: 0,
            hour: self.decode_hour(self.register(HOURS)),
            minute: field(MINUTES),
            second: field(SECONDS),
        };
        // Setting keeps the fraction of the second, as the datasheet's divider chain does.
        let fraction = self.guest_time().rem_euclid(SECOND);
        self.next_second = None;
        let guest = t.to_unix().saturating_mul(SECOND).saturating_add(fraction);
        self.offset = guest.saturating_sub((self.wall)());
    }

    fn set(&self) -> bool {
        self.register(B) & B_SET != 0
    }

    /// Whether the divider chain runs (register A bits 6:4 are 010).
    fn oscillating(&self) -> bool {
        self.register(A) & 0x70 == 0x20
    }

    /// Nanoseconds of the periodic interrupt's period (datasheet table 5), from the rate selection.
    fn period(&self) -> Option<u64> {
        let rate = match self.register(A) & 0xf {
            0 => return None,
            // Rates 1 and 2 repeat 8 and 9 with a 32 kHz crystal.
            r @ 1..=2 => r + 7,
            r => r,
        };
        (self.oscillating()).then(|| 1_000_000_000 * (1 << (rate - 1)) / 32_768)
    }

    /// Plans the next interrupts after registers changed.
    fn plan(&mut self) {
        let now = self.clock.now();
        let b = self.register(B);
        self.next_periodic = self.period().filter(|_| b & B_PERIODIC != 0).map(|p| {
            // Keep the phase of a period that runs already.
            self.next_periodic.filter(|&n| n > now && n - now <= p).unwrap_or(now / p * p + p)
        });
        let seconds = b & (B_ALARM | B_UPDATE) != 0 && !self.set() && self.oscillating();
        self.next_second = seconds.then(|| {
            // What is planned stays: when the second has just changed on the host's clock, the
            // interrupt for it is still to come.
            self.next_second.unwrap_or_else(|| {
                let left = SECOND - self.guest_time().rem_euclid(SECOND);
                let left = if left <= SLACK { left + SECOND } else { left };
                now.saturating_add(u64::try_from(left).unwrap_or(0))
            })
        });
        match self.next_periodic.into_iter().chain(self.next_second).min() {
            Some(at) => self.timer.arm(at),
            None => self.timer.cancel(),
        }
    }

    fn tick(&mut self, now: u64) {
        let mut flags = 0;
        if self.next_periodic.is_some_and(|at| at <= now) {
            flags |= B_PERIODIC;
            self.next_periodic = None;
        }
        if self.next_second.is_some_and(|at| at <= now) {
            flags |= B_UPDATE;
            self.next_second = None;
            if self.alarm_matches() {
                flags |= B_ALARM;
            }
        }
        self.cmos[usize::from(C)] |= flags;
        self.update_irq();
        self.plan();
    }

    fn alarm_matches(&mut self) -> bool {
        self.latch(self.guest_time().saturating_add(SLACK));
        let pairs = [(SECONDS_ALARM, SECONDS), (MINUTES_ALARM, MINUTES), (HOURS_ALARM, HOURS)];
        pairs.into_iter().all(|(alarm, time)| {
            let alarm = self.register(alarm);
            alarm & DONT_CARE == DONT_CARE || alarm == self.register(time)
        })
    }

    fn update_irq(&mut self) {
        let (b, c) = (self.register(B), self.register(C) & !C_IRQ);
        let irq = b & c & (B_PERIODIC | B_ALARM | B_UPDATE) != 0;
        self.cmos[usize::from(C)] = if irq { c | C_IRQ } else { c };
        self.irq.set(irq);
    }

    fn read_cmos(&mut self, index: u8) -> u8 {
        match index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY => {
                if !self.set() {
                    self.latch_time();
                }
                self.register(index)
            }
            A => {
                let left = SECOND - self.guest_time().rem_euclid(SECOND);
                let updating = left <= UPDATE_NS && !self.set() && self.oscillating();
                self.register(A) | if updating { A_UIP } else { 0 }
            }
            C => {
                let value = self.register(C);
                self.cmos[usize::from(C)] = 0;
                self.irq.set(false);
                value
            }
            _ => self.register(index),
        }
    }

    fn write_cmos(&mut self, index: u8, value: u8) {
        match index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY => {
                if !self.set() {
                    self.latch_time();
                }
                self.cmos[usize::from(index)] = value;
                if !self.set() {
                    self.take_time();
                    self.plan();
                }
            }
            A => {
                self.cmos[usize::from(A)] = value & !A_UIP;
                self.plan();
            }
            B => {
                if value & B_SET != 0 && !self.set() {
                    self.latch_time();
                }
                let ends = value & B_SET == 0 && self.set();
                // SET clears the update interrupt's enable (datasheet, register B).
                let value = if value & B_SET != 0 { value & !B_UPDATE } else { value };
                self.cmos[usize::from(B)] = value;
                if ends {
                    self.take_time();
                }
                self.update_irq();
                self.plan();
            }
            C | D => {}
            _ => self.cmos[usize::from(index)] = value,
        }
    }
}

impl Registers for Rtc {
    fn read(&mut self, offset: u64, size: u8) -> Option<u64> {
        match (offset, size) {
            (1, 1) => Some(u64::from(self.read_cmos(self.index[0]))),
            (3, 1) => Some(u64::from(self.read_cmos(self.index[1]))),
            // The index at 70h is write-only; 72h can be read (ICH9 section 13.6.1).
            (2, 1) => Some(u64::from(self.index[1])),
            _ => None,
        }
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) -> bool {
        let [value, data, ..] = value.to_le_bytes();
        match (offset, size) {
            // Bit 7 of port 70h is the NMI mask, which has nothing to mask here.
            (0, 1) => self.index[0] = value & 0x7f,
            (0, 2) => {
                self.index[0] = value & 0x7f;
                self.write_cmos(self.index[0], data);
            }
            (1, 1) => self.write_cmos(self.index[0], value),
            (2, 1) => self.index[1] = value | 0x80,
            (3, 1) => self.write_cmos(self.index[1], value),
            _ => return false,
        }
        true
    }
}

/// Saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RtcState {
    index: [u8; 2],
    cmos: Vec<u8>,
    /// Guest time minus wall clock, ns.
    offset: i64,
    /// Nanoseconds to the next periodic interrupt.
    periodic_in: Option<u64>,
}

impl DeviceState for Rtc {
    const NAME: &'static str = "rtc";
    type State = RtcState;

    fn save(&self) -> RtcState {
        let Self { irq: _, clock, timer: _, wall: _, index, cmos, offset, next_periodic, next_second: _ } =
            self;
        let periodic_in = next_periodic.map(|at| at.saturating_sub(clock.now()));
        RtcState { index: *index, cmos: cmos.to_vec(), offset: *offset, periodic_in }
    }

    fn restore(&mut self, state: RtcState) -> Result<(), StateError> {
        let RtcState { index, cmos, offset, periodic_in } = state;
        let cmos = <[u8; SIZE]>::try_from(cmos).map_err(|_| Self::invalid("CMOS is not 256 bytes"))?;
        self.index = [index[0] & 0x7f, index[1] | 0x80];
        self.cmos = cmos;
        self.offset = offset;
        self.cmos[usize::from(A)] &= !A_UIP;
        self.cmos[usize::from(D)] = D_VALID;
        self.next_second = None;
        self.next_periodic = periodic_in.map(|ns| self.clock.now().saturating_add(ns));
        self.update_irq();
        self.plan();
        Ok(())
    }

    /// A reset clears interrupt enables and flags and nothing else: the rest is on a battery
    /// (datasheet, "RESET").
    fn reset(&mut self) {
        self.index = INDEX_AT_RESET;
        self.cmos[usize::from(B)] &= !(B_PERIODIC | B_ALARM | B_UPDATE);
        self.cmos[usize::from(C)] = 0;
        self.update_irq();
        self.plan();
    }
}

#[cfg(test)]
#[path = "rtc_tests.rs"]
mod tests;
