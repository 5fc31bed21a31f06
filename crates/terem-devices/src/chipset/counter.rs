//! One counter of an 8254: modes, counts and output as functions of time (Intel 8254 datasheet,
//! "Mode Definitions").
//!
//! A count that is written at tick T is loaded at the next clock pulse, T + 1; from there on the
//! counting element holds `count - elapsed`, wrapped as the mode says.

use serde::{Deserialize, Serialize};

/// Which bytes of the count a read or write goes to (control word bits 5:4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Access {
    Low,
    High,
    LowThenHigh,
}

impl Access {
    /// `None` is the counter latch command.
    pub(super) fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            1 => Some(Self::Low),
            2 => Some(Self::High),
            3 => Some(Self::LowThenHigh),
            _ => None,
        }
    }

    fn bits(self) -> u8 {
        match self {
            Self::Low => 1,
            Self::High => 2,
            Self::LowThenHigh => 3,
        }
    }
}

/// A counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Counter {
    access: Access,
    mode: u8,
    bcd: bool,
    /// The count, 1 to 65536 (10000 in BCD).
    count: u32,
    /// A count that modes 2 and 3 take when the present period ends, and that tick.
    next: Option<(u32, u64)>,
    /// The tick at which counting began; `None` before a count (or in modes 1 and 5 a trigger) came.
    start: Option<u64>,
    /// Ticks that had elapsed when a low gate stopped counting.
    stopped: Option<u64>,
    /// A count came since the mode was set.
    written: bool,
    gate: bool,
    /// The first byte of a two-byte write, and whether the next read gives the second byte.
    low: Option<u8>,
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    /// The next rising edge of the output that is waited for.
    edge: Option<u64>,
}

impl Counter {
    pub(super) fn new(gate: bool) -> Self {
        Self {
            access: Access::LowThenHigh,
            mode: 0,
            bcd: false,
            count: 0x1_0000,
            next: None,
            start: None,
            stopped: None,
            written: false,
            gate,
            low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
            edge: None,
        }
    }

    /// Whether a saved counter can be.
    pub(super) fn is_valid(&self) -> bool {
        let fits = |c: u32| (1..=0x1_0000).contains(&c);
        self.mode < 6 && fits(self.count) && self.next.is_none_or(|(c, _)| fits(c))
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Sets mode and format (control word): counting stops until a count is written.
    pub(super) fn program(&mut self, access: Access, mode: u8, bcd: bool) {
        // Modes 6 and 7 are 2 and 3 (the third bit is a "don't care" there).
        let mode = if mode > 5 { mode - 4 } else { mode };
        let Self { gate, count, .. } = *self;
        *self = Self { access, mode, bcd, count, ..Self::new(gate) };
    }

    /// Ticks since counting began, `None` while it has not.
    fn elapsed(&self, now: u64) -> Option<u64> {
        match (self.stopped, self.start) {
            (Some(e), _) => Some(e),
            (None, Some(start)) => now.checked_sub(start),
            (None, None) => None,
        }
    }

    /// The count and the ticks since it was loaded, with a waiting count taken into account.
    fn phase(&self, now: u64) -> Option<(u32, u64)> {
        match self.next {
            Some((count, at)) if now >= at && self.stopped.is_none() => Some((count, now - at)),
            _ => self.elapsed(now).map(|e| (self.count, e)),
        }
    }

    /// Takes a waiting count over once its time has come.
    fn settle(&mut self, now: u64) {
        if let Some((count, at)) = self.next
            && now >= at
        {
            (self.count, self.start, self.next) = (count, Some(at), None);
        }
    }

    pub(super) fn output(&self, now: u64) -> bool {
        let Some((count, elapsed)) = self.phase(now) else {
            // Before the count is loaded: low in mode 0, else high.
            return self.mode != 0;
        };
        let count = u64::from(count);
        match self.mode {
            0 | 1 => elapsed >= count,
            2 => !self.gate || elapsed % count != count - 1 || count == 1,
            3 => !self.gate || elapsed % count < count.div_ceil(2),
            _ => elapsed != count,
        }
    }

    /// What the counting element holds, as a guest reads it.
    fn value(&self, now: u64) -> u16 {
        let modulus: u64 = if self.bcd { 10_000 } else { 0x1_0000 };
        let value = match self.phase(now) {
            None => u64::from(self.count),
            Some((count, elapsed)) => {
                let count = u64::from(count);
                match self.mode {
                    2 => count - elapsed % count,
                    3 => {
                        // Counts down by two from the even part, twice in each period.
                        let (high, at) = (count.div_ceil(2), elapsed % count);
                        let half = if at < high { at } else { at - high };
                        (count & !1).saturating_sub(2 * half)
                    }
                    _ => (modulus + count % modulus - elapsed % modulus) % modulus,
                }
            }
        } % modulus;
        let value = u16::try_from(value).unwrap_or(0);
        if self.bcd { to_bcd(value) } else { value }
    }

    /// The first tick after `now` at which the output rises.
    fn next_edge(&self, now: u64) -> Option<u64> {
        if self.stopped.is_some() {
            return None;
        }
        let start = self.start?;
        let count = u64::from(self.count);
        if let Some((_, at)) = self.next.filter(|&(_, at)| at > now) {
            return Some(at);
        }
        let elapsed = now.saturating_sub(start);
        match self.mode {
            // Nothing rises at the start itself: the output is high already.
            2 | 3 => Some(start.saturating_add((elapsed / count + 1).saturating_mul(count))),
            0 | 1 => Some(start.saturating_add(count)).filter(|&t| t > now),
            _ => Some(start.saturating_add(count + 1)).filter(|&t| t > now),
        }
    }

    /// The rising edge to wait for from `now` on, which [`Self::take_edge`] will report.
    pub(super) fn watch_edge(&mut self, now: u64) -> Option<u64> {
        self.settle(now);
        self.edge = self.next_edge(now);
        self.edge
    }

    /// Whether the edge that was waited for has come at `now`.
    pub(super) fn take_edge(&mut self, now: u64) -> bool {
        let came = self.edge.is_some_and(|e| e <= now);
        if came {
            self.edge = None;
        }
        came
    }

    /// Writes a byte of the count; true when the count is complete.
    pub(super) fn write(&mut self, byte: u8, now: u64) -> bool {
        self.settle(now);
        let word = match (self.access, self.low) {
            (Access::Low, _) => u16::from(byte),
            (Access::High, _) => u16::from(byte) << 8,
            (Access::LowThenHigh, None) => {
                self.low = Some(byte);
                if self.mode == 0 {
                    // The first byte stops the counter and takes the output low.
                    (self.start, self.stopped) = (None, None);
                    return true;
                }
                return false;
            }
            (Access::LowThenHigh, Some(low)) => u16::from_le_bytes([low, byte]),
        };
        self.low = None;
        let count = self.decode(word);
        if self.periodic() && self.start.is_some() && self.stopped.is_none() {
            let period = u64::from(self.count);
            let elapsed = self.elapsed(now).unwrap_or(0);
            let end = now - elapsed.min(now) + (elapsed / period + 1) * period;
            // Before its first clock pulse the count is simply replaced.
            if self.elapsed(now).is_some() {
                self.next = Some((count, end));
                return true;
            }
        }
        self.count = count;
        self.written = true;
        if !self.triggered() {
            self.start = Some(now + 1);
            self.stopped = (!self.gate).then_some(0);
        }
        true
    }

    fn decode(&self, word: u16) -> u32 {
        if self.bcd {
            let digits = (0..4).rev().fold(0, |v, i| v * 10 + u32::from(word >> (4 * i) & 0xf));
            // Digits above nine are undefined; keep the count in range.
            if digits == 0 { 10_000 } else { digits.min(9_999) }
        } else if word == 0 {
            0x1_0000
        } else {
            u32::from(word)
        }
    }

    pub(super) fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.value(now)).to_le_bytes();
        let (byte, last) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::LowThenHigh => {
                self.read_high = !self.read_high;
                if self.read_high { (low, false) } else { (high, true) }
            }
        };
        if last {
            self.latched_count = None;
        }
        byte
    }

    /// Counter latch: the first one holds until it is read.
    pub(super) fn latch_count(&mut self, now: u64) {
        self.settle(now);
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(now));
        }
    }

    /// Status latch: output, null count, access, mode, BCD.
    pub(super) fn latch_status(&mut self, now: u64) {
        self.settle(now);
        if self.latched_status.is_none() {
            let loaded = self.next.is_none() && self.elapsed(now).is_some();
            let (output, null) = (u8::from(self.output(now)) << 7, u8::from(!loaded) << 6);
            self.latched_status =
                Some(output | null | self.access.bits() << 4 | self.mode << 1 | u8::from(self.bcd));
        }
    }

    /// Sets the gate input.
    pub(super) fn set_gate(&mut self, high: bool, now: u64) {
        self.settle(now);
        let rising = high && !self.gate;
        let falling = !high && self.gate;
        match self.mode {
            0 | 4 => {
                if falling && self.start.is_some() {
                    self.stopped = Some(self.elapsed(now).unwrap_or(0));
                } else if rising && let Some(elapsed) = self.stopped.take() {
                    self.start = Some(now.saturating_sub(elapsed));
                }
            }
            // A trigger reloads and starts over.
            1 | 5 if rising && self.written => self.start = Some(now + 1),
            2 | 3 if falling && self.start.is_some() => self.stopped = Some(0),
            2 | 3 if rising && self.stopped.take().is_some() => {
                if let Some((count, _)) = self.next.take() {
                    self.count = count;
                }
                self.start = Some(now + 1);
            }
            _ => {}
        }
        self.gate = high;
    }
}

fn to_bcd(value: u16) -> u16 {
    (value % 10) | (value / 10 % 10) << 4 | (value / 100 % 10) << 8 | (value / 1000 % 10) << 12
}

/// Saved state of a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CounterState {
    access: Access,
    mode: u8,
    bcd: bool,
    count: u32,
    next: Option<(u32, u64)>,
    start: Option<u64>,
    stopped: Option<u64>,
    written: bool,
    gate: bool,
    low: Option<u8>,
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    edge: Option<u64>,
}

impl Counter {
    pub(super) fn save(&self) -> CounterState {
        let Self {
            access,
            mode,
            bcd,
            count,
            next,
            start,
            stopped,
            written,
            gate,
            low,
            read_high,
            latched_count,
            latched_status,
            edge,
        } = self.clone();
        CounterState {
            access,
            mode,
            bcd,
            count,
            next,
            start,
            stopped,
            written,
            gate,
            low,
            read_high,
            latched_count,
            latched_status,
            edge,
        }
    }

    pub(super) fn from_saved(state: CounterState) -> Self {
        let CounterState {
            access,
            mode,
            bcd,
            count,
            next,
            start,
            stopped,
            written,
            gate,
            low,
            read_high,
            latched_count,
            latched_status,
            edge,
        } = state;
        Self {
            access,
            mode,
            bcd,
            count,
            next,
            start,
            stopped,
            written,
            gate,
            low,
            read_high,
            latched_count,
            latched_status,
            edge,
        }
    }
}
