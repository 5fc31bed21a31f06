//! What is allowed.

/// Most of a rate, and of what a burst can hold: bytes or operations. QEMU's bound.
const MAX_VALUE: u64 = 1_000_000_000_000_000;

/// One limit: so many bytes or operations in a second, and more for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Units a second in the long run; 0 is no limit.
    pub average: u64,
    /// Units a second during a burst; 0: a tenth of a second's worth of `average` at once, and no burst beyond that.
    pub max: u64,
    /// Seconds that a burst at `max` can last, after enough rest. At 1, all of it may come at once.
    pub seconds: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self { average: 0, max: 0, seconds: 1 }
    }
}

impl Rate {
    /// So many units a second, without bursts.
    #[must_use]
    pub fn new(average: u64) -> Self {
        Self { average, ..Self::default() }
    }

    fn check(&self, name: &'static str) -> Result<(), ThrottleError> {
        let Self { average, max, seconds } = *self;
        let wrong = |why| Err(ThrottleError { name, why });
        if average > MAX_VALUE || max.checked_mul(seconds).is_none_or(|burst| burst > MAX_VALUE) {
            return wrong("the values are beyond 10^15");
        }
        if max > 0 && average == 0 {
            return wrong("a burst needs a limit besides");
        }
        if max > 0 && max < average {
            return wrong("a burst is slower than the limit");
        }
        if seconds == 0 {
            return wrong("a burst of no length");
        }
        if seconds > 1 && max == 0 {
            return wrong("a burst's length needs a burst");
        }
        Ok(())
    }
}

/// Limits on one kind of unit. Either on all requests together, or on reads and writes each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Reads and writes together.
    pub total: Rate,
    /// Reads.
    pub read: Rate,
    /// Writes, write-zeroes and discards.
    pub write: Rate,
}

impl Rates {
    fn check(&self, names: [&'static str; 3]) -> Result<(), ThrottleError> {
        let Self { total, read, write } = self;
        if total.average > 0 && (read.average > 0 || write.average > 0) {
            return Err(ThrottleError {
                name: names[0],
                why: "not besides a limit on reads or writes alone",
            });
        }
        total.check(names[0])?;
        read.check(names[1])?;
        write.check(names[2])
    }
}

/// What a disk, or a group of disks, may do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ThrottleLimits {
    /// Bytes.
    pub bytes: Rates,
    /// Operations.
    pub operations: Rates,
    /// A request of more bytes counts as the operations that it would be in pieces of this size; 0: as one.
    pub operation_size: u64,
}

impl ThrottleLimits {
    /// Whether nothing is limited.
    #[must_use]
    pub fn is_none(&self) -> bool {
        let none = |r: &Rates| [r.total, r.read, r.write].iter().all(|rate| rate.average == 0);
        none(&self.bytes) && none(&self.operations)
    }

    /// Looks for limits that contradict each other.
    ///
    /// # Errors
    /// [`ThrottleError`] names the first.
    pub fn check(&self) -> Result<(), ThrottleError> {
        self.bytes.check(["bps", "bps-read", "bps-write"])?;
        self.operations.check(["iops", "iops-read", "iops-write"])?;
        let Rates { total, read, write } = self.operations;
        if self.operation_size > 0 && [total, read, write].iter().all(|rate| rate.average == 0) {
            return Err(ThrottleError { name: "iops-size", why: "there is no limit on operations" });
        }
        Ok(())
    }
}

/// Limits that contradict each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{name}: {why}")]
pub struct ThrottleError {
    /// The limit, as it is called on the command line.
    pub name: &'static str,
    /// What is wrong with it.
    pub why: &'static str,
}
