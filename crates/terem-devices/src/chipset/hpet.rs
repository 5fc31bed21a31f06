//! High precision event timers (IA-PC HPET specification 1.0a), as ICH9 routes them (ICH9 datasheet
//! section 20.1).
//!
//! The main counter is virtual time in units of 10 ns, so it is computed and never stepped.

use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use terem_bus::{Clock, DeviceState, IrqLine, MsiMessage, MsiSink, Registers, StateError, Timer, locked};

/// Nanoseconds of a tick of the main counter.
const TICK_NS: u64 = 10;
/// Timers.
pub const TIMERS: usize = 3;
/// Bytes of registers.
pub const LENGTH: u64 = 0x400;

/// General capabilities (section 2.3.4): 10,000,000 fs, Intel, legacy replacement, 64-bit counter,
/// three timers, revision 1.
const CAPABILITIES: u64 = 10_000_000 << 32 | 0x8086_a201;

/// Registers (section 2.3.3).
const CAP_ID: u64 = 0x000;
const CONFIG: u64 = 0x010;
const STATUS: u64 = 0x020;
const COUNTER: u64 = 0x0f0;
const FIRST_TIMER: u64 = 0x100;
const TIMER_STRIDE: u64 = 0x20;

/// General configuration (section 2.3.5).
const ENABLE: u64 = 1 << 0;
const LEGACY: u64 = 1 << 1;

/// Timer configuration (section 2.3.8).
const LEVEL: u64 = 1 << 1;
const INTERRUPT: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const PERIODIC_CAPABLE: u64 = 1 << 4;
const SIZE_64: u64 = 1 << 5;
const VALUE_SET: u64 = 1 << 6;
const MODE_32: u64 = 1 << 8;
const FSB: u64 = 1 << 14;
const FSB_CAPABLE: u64 = 1 << 15;
/// Bits that keep what is written: the above and the route (13:9).
const WRITABLE: u64 = LEVEL | INTERRUPT | PERIODIC | MODE_32 | FSB | 0x3e00;

/// Inputs of the I/O APIC to which a timer can be routed (ICH9 section 20.1.5).
const ROUTES: [u64; TIMERS] = [0x00f0_0000, 0x00f0_0000, 0x00f0_0800];

/// Who takes the PIT's and RTC's interrupts away while the HPET stands in for them.
pub trait LegacyReplacement: Send + Sync {
    /// Whether IRQ 0 and IRQ 8 come from HPET timers 0 and 1.
    fn set_legacy_replacement(&self, on: bool);
}

/// What an HPET is connected to.
pub struct HpetWiring {
    /// Lines to the I/O APIC's inputs, by number; those that are missing cannot be routed to.
    pub gsi: Vec<IrqLine>,
    /// IRQ 0 and IRQ 8, for legacy replacement.
    pub legacy: [IrqLine; 2],
    /// Told of legacy replacement.
    pub replacement: Arc<dyn LegacyReplacement>,
    /// For timers that interrupt by message.
    pub msi: Arc<dyn MsiSink>,
}

/// One timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Comparator {
    config: u64,
    /// When it matches next, in ticks of the main counter.
    comparator: u64,
    /// The last value written, which a periodic timer adds.
    period: u64,
    /// Address (63:32) and data (31:0) of its message.
    fsb: u64,
    /// The comparator is ahead of the counter and will match.
    armed: bool,
}

impl Comparator {
    fn new(n: usize) -> Self {
        let routes = ROUTES.get(n).copied().unwrap_or(0) << 32;
        // All timers here can be periodic and 64 bits wide.
        let config = routes | PERIODIC_CAPABLE | SIZE_64 | FSB_CAPABLE;
        Self { config, comparator: u64::MAX, period: 0, fsb: 0, armed: false }
    }

    fn has(self, bit: u64) -> bool {
        self.config & bit != 0
    }

    fn mask(self) -> u64 {
        if self.has(MODE_32) { 0xffff_ffff } else { u64::MAX }
    }

    /// Ticks from `counter` to the next match.
    fn distance(self, counter: u64) -> u64 {
        self.comparator.wrapping_sub(counter) & self.mask()
    }

    /// Whether the counter has passed the comparator: by less than half a round, since a host timer
    /// comes late while hardware compares each tick.
    fn reached(self, counter: u64) -> bool {
        counter.wrapping_sub(self.comparator) & self.mask() <= self.mask() / 2
    }

    /// A comparator or the counter was set. A one-shot that is behind the counter does not match (on
    /// hardware: not before a whole round); a periodic timer goes on to its next match.
    fn rearm(&mut self, counter: u64) {
        let ahead = self.distance(counter) != 0 && !self.reached(counter);
        self.armed = ahead || self.has(PERIODIC);
        if self.has(PERIODIC) && !ahead {
            self.step(counter);
        }
    }

    /// Moves a periodic comparator past the counter.
    fn step(&mut self, counter: u64) {
        let late = counter.wrapping_sub(self.comparator) & self.mask();
        if let Some(periods) = late.checked_div(self.period) {
            let step = (periods.wrapping_add(1)).wrapping_mul(self.period);
            self.comparator = self.comparator.wrapping_add(step) & self.mask();
        } else {
            self.armed = false;
        }
    }
}

/// The timers.
pub struct Hpet {
    clock: Clock,
    timer: Timer,
    wiring: HpetWiring,

    config: u64,
    /// Level-triggered interrupts that are active (General Interrupt Status).
    status: u64,
    /// The counter while it stands; while it runs, the counter minus virtual ticks.
    base: u64,
    comparators: [Comparator; TIMERS],
}

impl fmt::Debug for Hpet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { clock: _, timer: _, wiring: _, config, status, base, comparators } = self;
        let mut s = f.debug_struct("Hpet");
        s.field("config", config).field("status", status).field("base", base);
        s.field("comparators", comparators).finish()
    }
}

impl Hpet {
    /// An HPET on `clock`.
    #[must_use]
    pub fn new(clock: Clock, wiring: HpetWiring) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|me: &Weak<Mutex<Self>>| {
            let me = me.clone();
            let timer = clock.timer(move |_| {
                if let Some(hpet) = me.upgrade() {
                    locked(&hpet).advance();
                }
            });
            let comparators = std::array::from_fn(Comparator::new);
            Mutex::new(Self { clock, timer, wiring, config: 0, status: 0, base: 0, comparators })
        })
    }

    fn running(&self) -> bool {
        self.config & ENABLE != 0
    }

    fn counter(&self) -> u64 {
        if self.running() { self.base.wrapping_add(self.clock.now() / TICK_NS) } else { self.base }
    }

    fn set_counter(&mut self, value: u64) {
        self.base = if self.running() { value.wrapping_sub(self.clock.now() / TICK_NS) } else { value };
    }

    /// Fires what the counter has reached, and arms the host timer for what comes next.
    fn advance(&mut self) {
        if !self.running() {
            self.timer.cancel();
            return;
        }
        let counter = self.counter();
        let mut next: Option<u64> = None;
        for n in 0..TIMERS {
            let c = &mut self.comparators[n];
            if c.armed && c.reached(counter) {
                if c.has(PERIODIC) {
                    // Periods that went by meanwhile are one interrupt.
                    c.step(counter);
                } else {
                    c.armed = false;
                }
                self.fire(n);
            }
            let c = self.comparators[n];
            if c.armed {
                let distance = c.distance(counter);
                next = Some(next.map_or(distance, |d| d.min(distance)));
            }
        }
        match next {
            Some(ticks) => {
                let at = (self.clock.now() / TICK_NS).saturating_add(ticks);
                self.timer.arm(at.saturating_mul(TICK_NS));
            }
            None => self.timer.cancel(),
        }
    }

    /// Whether timer `n` stands in for the PIT or RTC.
    fn replaces(&self, n: usize) -> bool {
        self.config & LEGACY != 0 && n < 2
    }

    /// The I/O APIC input that timer `n` is routed to.
    fn line(&self, n: usize) -> Option<&IrqLine> {
        let route = usize::try_from(self.comparators[n].config >> 9 & 0x1f).ok()?;
        let allowed = ROUTES[n] & 1 << route != 0;
        self.wiring.gsi.get(route).filter(|_| allowed)
    }

    fn fire(&mut self, n: usize) {
        let c = self.comparators[n];
        if c.has(LEVEL) {
            self.status |= 1 << n;
        }
        if !c.has(INTERRUPT) {
            return;
        }
        if c.has(FSB) {
            let message = MsiMessage { address: c.fsb >> 32, data: low32(c.fsb) };
            self.wiring.msi.send_msi(message);
        } else if c.has(LEVEL) {
            self.drive();
        } else if self.replaces(n) {
            // The PIC takes a request back when its input falls, so this one stays high, as the PIT's
            // does, until the next edge.
            self.wiring.legacy[n].set(false);
            self.wiring.legacy[n].set(true);
        } else if let Some(line) = self.line(n) {
            line.pulse();
        }
    }

    /// Sets the lines of level-triggered timers; timers may share one.
    fn drive(&self) {
        let mut levels = 0_u64;
        let mut legacy = [false; 2];
        for (n, c) in self.comparators.iter().enumerate() {
            let active = self.status & 1 << n != 0 && c.has(INTERRUPT) && c.has(LEVEL) && !c.has(FSB);
            if !active || !self.running() {
                continue;
            }
            if self.replaces(n) {
                legacy[n] = true;
            } else {
                levels |= 1 << (c.config >> 9 & 0x1f) & ROUTES[n];
            }
        }
        for (i, line) in self.wiring.gsi.iter().enumerate().filter(|&(i, _)| i < 24) {
            line.set(levels & 1 << i != 0);
        }
        for (n, (line, level)) in self.wiring.legacy.iter().zip(legacy).enumerate() {
            let edges = self.replaces(n) && self.running() && !self.comparators[n].has(LEVEL);
            if !edges {
                line.set(level);
            }
        }
    }

    fn write_config(&mut self, value: u64) {
        let counter = self.counter();
        let old = self.config;
        self.config = value & (ENABLE | LEGACY);
        self.set_counter(counter);
        if (old ^ self.config) & LEGACY != 0 {
            self.wiring.replacement.set_legacy_replacement(self.config & LEGACY != 0);
        }
        self.drive();
    }

    fn write_timer(&mut self, n: usize, register: u64, value: u64) {
        let counter = self.counter();
        let c = &mut self.comparators[n];
        match register {
            0x00 => {
                let route = value >> 9 & 0x1f;
                // A route that is not allowed does not stick (section 2.3.8, TN_INT_ROUTE_CNF).
                let allowed = ROUTES[n] & 1 << route != 0;
                let value = if allowed { value } else { value & !0x3e00 };
                c.config = c.config & !(WRITABLE | VALUE_SET) | value & (WRITABLE | VALUE_SET);
                if c.has(MODE_32) {
                    c.comparator &= 0xffff_ffff;
                    c.period &= 0xffff_ffff;
                }
                if !c.has(LEVEL) {
                    self.status &= !(1 << n);
                }
                self.drive();
            }
            0x08 => {
                let value = value & c.mask();
                // With Tn_VAL_SET_CNF the write sets the accumulator; the write after it is the
                // period (section 2.3.9.2.2). A one-shot timer has only the comparator.
                if !c.has(PERIODIC) || c.has(VALUE_SET) {
                    c.comparator = value;
                }
                if c.has(PERIODIC) {
                    c.period = value;
                }
                c.config &= !VALUE_SET;
                c.rearm(counter);
            }
            0x10 => c.fsb = value,
            _ => {}
        }
    }

    fn read64(&self, offset: u64) -> u64 {
        match offset {
            CAP_ID => CAPABILITIES,
            CONFIG => self.config,
            STATUS => self.status,
            COUNTER => self.counter(),
            _ => match timer_register(offset) {
                Some((n, 0x00)) => self.comparators[n].config,
                Some((n, 0x08)) => self.comparators[n].comparator,
                Some((n, 0x10)) => self.comparators[n].fsb,
                _ => 0,
            },
        }
    }

    fn write64(&mut self, offset: u64, value: u64) {
        match offset {
            CONFIG => self.write_config(value),
            STATUS => {
                self.status &= !value;
                self.drive();
            }
            // Software stops the counter first (section 2.3.7); this chip takes it at any time.
            COUNTER => {
                self.set_counter(value);
                for c in &mut self.comparators {
                    c.rearm(value);
                }
            }
            _ => {
                if let Some((n, register)) = timer_register(offset) {
                    self.write_timer(n, register, value);
                }
            }
        }
        self.advance();
    }
}

/// Timer number and register of an offset.
fn timer_register(offset: u64) -> Option<(usize, u64)> {
    let at = offset.checked_sub(FIRST_TIMER)?;
    let n = usize::try_from(at / TIMER_STRIDE).ok().filter(|&n| n < TIMERS)?;
    Some((n, at % TIMER_STRIDE))
}

fn low32(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

impl Registers for Hpet {
    fn read(&mut self, offset: u64, size: u8) -> Option<u64> {
        // Section 2.4: aligned dwords and qwords.
        if size < 4 || !offset.is_multiple_of(u64::from(size)) {
            return None;
        }
        let value = self.read64(offset & !7);
        Some(if size == 4 { value >> (8 * (offset & 4)) & 0xffff_ffff } else { value })
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) -> bool {
        if size < 4 || !offset.is_multiple_of(u64::from(size)) {
            return false;
        }
        if size == 8 {
            self.write64(offset, value);
            return true;
        }
        let shift = 8 * (offset & 4);
        // Half a register: the other half stays, but a half of zeroes clears no status bits.
        let old = if offset & !7 == STATUS { 0 } else { self.read64(offset & !7) };
        let merged = old & !(0xffff_ffff << shift) | value << shift;
        let comparator = timer_register(offset & !7).filter(|&(_, r)| r == 0x08);
        if let (Some((n, _)), 32) = (comparator, shift)
            && self.comparators[n].has(PERIODIC)
        {
            // The high half of a periodic comparator: the write of the low half was the one that
            // Tn_VAL_SET_CNF meant, and this one only completes the period.
            let c = &mut self.comparators[n];
            if !c.has(MODE_32) {
                c.period = c.period & 0xffff_ffff | value << 32;
            }
            self.advance();
            return true;
        }
        self.write64(offset & !7, merged);
        true
    }
}

/// Saved state of a timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ComparatorState {
    config: u64,
    comparator: u64,
    period: u64,
    fsb: u64,
    armed: bool,
}

impl Comparator {
    fn save(&self) -> ComparatorState {
        let Self { config, comparator, period, fsb, armed } = *self;
        ComparatorState { config, comparator, period, fsb, armed }
    }

    fn from_saved(state: ComparatorState) -> Self {
        let ComparatorState { config, comparator, period, fsb, armed } = state;
        Self { config, comparator, period, fsb, armed }
    }
}

/// Saved state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HpetState {
    config: u64,
    status: u64,
    counter: u64,
    comparators: [ComparatorState; TIMERS],
}

impl DeviceState for Hpet {
    const NAME: &'static str = "hpet";
    type State = HpetState;

    fn save(&self) -> HpetState {
        let Self { clock: _, timer: _, wiring: _, config, status, base: _, comparators } = self;
        let comparators = comparators.each_ref().map(Comparator::save);
        HpetState { config: *config, status: *status, counter: self.counter(), comparators }
    }

    fn restore(&mut self, state: HpetState) -> Result<(), StateError> {
        let HpetState { config, status, counter, comparators } = state;
        self.config = config & (ENABLE | LEGACY);
        self.status = status & ((1 << TIMERS) - 1);
        self.set_counter(counter);
        for (n, (mine, saved)) in self.comparators.iter_mut().zip(comparators).enumerate() {
            let saved = Comparator::from_saved(saved);
            let bits = WRITABLE | VALUE_SET;
            let config = Comparator::new(n).config | saved.config & bits;
            *mine = Comparator { config, ..saved };
            mine.comparator &= mine.mask();
            mine.period &= mine.mask();
        }
        self.wiring.replacement.set_legacy_replacement(self.config & LEGACY != 0);
        self.drive();
        self.advance();
        Ok(())
    }

    fn reset(&mut self) {
        self.config = 0;
        self.status = 0;
        self.base = 0;
        self.comparators = std::array::from_fn(Comparator::new);
        self.wiring.replacement.set_legacy_replacement(false);
        self.drive();
        self.advance();
    }
}

#[cfg(test)]
#[path = "hpet_tests.rs"]
mod tests;
