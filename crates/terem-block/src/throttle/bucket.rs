//! A leaky bucket: what was done flows in, and leaks out at the rate that is allowed.

use super::Rate;

/// Nanoseconds of a second.
pub(super) const SECOND: u128 = 1_000_000_000;

/// A bucket of bytes or operations.
///
/// Levels are in units times nanoseconds: a rate of units a second lets out `rate` of them in a nanosecond, so nothing
/// is ever rounded.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Bucket {
    rate: Rate,
    level: u128,
    /// What is above the burst's rate, for bursts longer than a second.
    burst_level: u128,
}

impl Bucket {
    pub(super) fn new(rate: Rate) -> Self {
        Self { rate, level: 0, burst_level: 0 }
    }

    /// Lets out what may leave in `nanoseconds`.
    pub(super) fn leak(&mut self, nanoseconds: u64) {
        let out = |rate: u64| u128::from(rate) * u128::from(nanoseconds);
        self.level = self.level.saturating_sub(out(self.rate.average));
        self.burst_level = self.burst_level.saturating_sub(out(self.rate.max));
    }

    /// Puts in what is done now, in units times [`SECOND`].
    pub(super) fn fill(&mut self, amount: u128) {
        if self.rate.average > 0 {
            self.level = self.level.saturating_add(amount);
            if self.rate.seconds > 1 {
                self.burst_level = self.burst_level.saturating_add(amount);
            }
        }
    }

    /// Nanoseconds until something may be put in.
    pub(super) fn wait(&self) -> u64 {
        let Rate { average, max, seconds } = self.rate;
        if average == 0 {
            return 0;
        }
        let size = |rate: u64, seconds: u64| u128::from(rate) * u128::from(seconds) * SECOND;
        // A tenth of a second's worth can always be had at once: requests that come in twos and threes are not delayed
        // one by one.
        let (bucket, burst) =
            if max == 0 { (size(average, 1) / 10, 0) } else { (size(max, seconds), size(max, 1) / 10) };
        let above = self.level.saturating_sub(bucket);
        if above > 0 {
            return time(above, average);
        }
        if seconds > 1 { time(self.burst_level.saturating_sub(burst), max) } else { 0 }
    }
}

/// Nanoseconds in which `amount` leaks at `rate`.
fn time(amount: u128, rate: u64) -> u64 {
    u64::try_from(amount.div_ceil(u128::from(rate.max(1)))).unwrap_or(u64::MAX)
}
