//! 8254 programmable interval timer (Intel 8254 datasheet, order 231164) and port 61h (ICH9 datasheet
//! section 13.7.1).
//!
//! Counters are not stepped: what they hold follows from the virtual time at which they were loaded.
//! A host timer runs only for the rising edges of channel 0's output, which is IRQ 0. Its falling
//! edges are taken back together with the next rising one, since nothing in a PC sees them before.

use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use terem_bus::{Clock, DeviceState, Handler, IrqLine, Registers, StateError, Timer, locked};

use super::counter::{Access, Counter, CounterState};

/// The crystal's 14.31818 MHz divided by 12, in Hz.
pub const FREQUENCY: u64 = 1_193_182;
const NS: u128 = 1_000_000_000;

/// Whole clock ticks at virtual time `ns`.
fn ticks(ns: u64) -> u64 {
    u64::try_from(u128::from(ns) * u128::from(FREQUENCY) / NS).unwrap_or(u64::MAX)
}

/// The first nanosecond at which `tick` has come.
fn nanoseconds(tick: u64) -> u64 {
    u64::try_from((u128::from(tick) * NS).div_ceil(u128::from(FREQUENCY))).unwrap_or(u64::MAX)
}

/// The control word's address.
const CONTROL: u64 = 3;
/// Control word bits 7:6: read-back command (datasheet, "Read-Back Command").
const READ_BACK: u8 = 3;
/// Read-back: do not latch counts; do not latch status.
const NO_COUNT: u8 = 1 << 5;
const NO_STATUS: u8 = 1 << 4;

/// Port 61h bits: channel 2's gate, speaker data enable, and the two check enables that only keep
/// their values.
const GATE2: u8 = 1 << 0;
const PORT61_WRITABLE: u8 = 0x0f;
/// Refresh cycle toggle, and channel 2's output.
const REFRESH: u8 = 1 << 4;
const OUT2: u8 = 1 << 5;
/// The refresh toggle changes about every 15 µs (ns).
const REFRESH_PERIOD: u64 = 15_085;

/// The timer.
#[derive(Debug)]
pub struct Pit {
    irq: IrqLine,
    clock: Clock,
    timer: Timer,

    counters: [Counter; 3],
    port61: u8,
}

impl Pit {
    /// A PIT on `clock`, whose channel 0 drives `irq`.
    #[must_use]
    pub fn new(clock: Clock, irq: IrqLine) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|me: &Weak<Mutex<Self>>| {
            let me = me.clone();
            let timer = clock.timer(move |now| {
                if let Some(pit) = me.upgrade() {
                    locked(&pit).edge(now);
                }
            });
            Mutex::new(Self { irq, clock, timer, counters: Self::at_power_on(), port61: 0 })
        })
    }

    /// Channels 0 and 1 have their gates tied high; channel 2's is port 61h bit 0.
    fn at_power_on() -> [Counter; 3] {
        [Counter::new(true), Counter::new(true), Counter::new(false)]
    }

    /// The timer has fired: if channel 0's output rose at or before `now`, IRQ 0 has an edge.
    fn edge(&mut self, now: u64) {
        let now = ticks(now);
        if self.counters[0].take_edge(now) {
            self.irq.set(false);
            self.irq.set(true);
        }
        self.arm(now);
    }

    /// Arms the timer for channel 0's next rising edge.
    fn arm(&mut self, now: u64) {
        match self.counters[0].watch_edge(now) {
            Some(tick) => self.timer.arm(nanoseconds(tick)),
            None => self.timer.cancel(),
        }
    }

    /// After a write to channel 0: its output may have changed.
    fn follow(&mut self, now: u64) {
        self.irq.set(self.counters[0].output(now));
        self.arm(now);
    }

    fn write_control(&mut self, value: u8, now: u64) {
        let select = value >> 6;
        if select == READ_BACK {
            for (i, c) in self.counters.iter_mut().enumerate() {
                if value & 2 << i != 0 {
                    if value & NO_STATUS == 0 {
                        c.latch_status(now);
                    }
                    if value & NO_COUNT == 0 {
                        c.latch_count(now);
                    }
                }
            }
            return;
        }
        let counter = &mut self.counters[usize::from(select)];
        match Access::from_bits(value >> 4 & 3) {
            None => counter.latch_count(now),
            Some(access) => {
                counter.program(access, value >> 1 & 7, value & 1 != 0);
                if select == 0 {
                    self.follow(now);
                }
            }
        }
    }

    fn read_port61(&self) -> u8 {
        let now = self.clock.now();
        let refresh = if (now / REFRESH_PERIOD).is_multiple_of(2) { 0 } else { REFRESH };
        let out = if self.counters[2].output(ticks(now)) { OUT2 } else { 0 };
        self.port61 | refresh | out
    }

    fn write_port61(&mut self, value: u8) {
        self.port61 = value & PORT61_WRITABLE;
        self.counters[2].set_gate(value & GATE2 != 0, ticks(self.clock.now()));
    }
}

impl Registers for Pit {
    fn read(&mut self, offset: u64, size: u8) -> Option<u64> {
        let now = ticks(self.clock.now());
        match (offset, size) {
            (0..CONTROL, 1) => {
                let channel = usize::try_from(offset).ok()?;
                Some(u64::from(self.counters.get_mut(channel)?.read(now)))
            }
            // The control word cannot be read.
            _ => None,
        }
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) -> bool {
        if size != 1 || offset > CONTROL {
            return false;
        }
        let value = value.to_le_bytes()[0];
        let now = ticks(self.clock.now());
        if offset == CONTROL {
            self.write_control(value, now);
            return true;
        }
        let Some(c) = usize::try_from(offset).ok().and_then(|i| self.counters.get_mut(i)) else {
            return false;
        };
        if c.write(value, now) && offset == 0 {
            self.follow(now);
        }
        true
    }
}

/// Port 61h: channel 2's gate and output, the refresh toggle.
#[derive(Debug)]
pub struct Port61(pub Arc<Mutex<Pit>>);

impl Handler for Port61 {
    fn read(&self, _offset: u64, size: u8) -> Option<u64> {
        (size == 1).then(|| u64::from(locked(&self.0).read_port61()))
    }

    fn write(&self, _offset: u64, size: u8, value: u64) -> bool {
        if size == 1 {
            locked(&self.0).write_port61(value.to_le_bytes()[0]);
        }
        size == 1
    }
}

/// Saved state. Ticks count from virtual time 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PitState {
    counters: [CounterState; 3],
    port61: u8,
}

impl DeviceState for Pit {
    const NAME: &'static str = "pit";
    type State = PitState;

    fn save(&self) -> PitState {
        let Self { irq: _, clock: _, timer: _, counters, port61 } = self;
        PitState { counters: counters.each_ref().map(Counter::save), port61: *port61 }
    }

    fn restore(&mut self, state: PitState) -> Result<(), StateError> {
        let PitState { counters, port61 } = state;
        let counters = counters.map(Counter::from_saved);
        if !counters.iter().all(Counter::is_valid) {
            return Err(Self::invalid("a counter has an impossible mode or count"));
        }
        self.counters = counters;
        self.port61 = port61 & PORT61_WRITABLE;
        self.follow(ticks(self.clock.now()));
        Ok(())
    }

    fn reset(&mut self) {
        self.counters = Self::at_power_on();
        self.port61 = 0;
        self.irq.set(false);
        self.timer.cancel();
    }
}

#[cfg(test)]
#[path = "pit_tests.rs"]
mod tests;
