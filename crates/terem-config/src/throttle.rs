//! Limits on what a disk does.

use crate::error::ConfigError;
use crate::key_value::KeyValue;
use crate::size::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most of a rate, and of what a burst can hold: bytes or operations.
const MAX_VALUE: u64 = 1_000_000_000_000_000;

/// What a disk, or a group of disks, may do in a second, with QEMU's meanings. A flush never waits. `--disk a.qcow2,bps=20M,iops=500,iops-max=2000,iops-max-length=60`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ThrottleConfig {
    /// Bytes a second, reads and writes together, such as `20M` (main key).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps: Option<ByteSize>,
    /// Bytes a second during a burst. Not given: a tenth of a second's worth at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_max: Option<ByteSize>,
    /// Seconds that a burst can last. Not given: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_max_length: Option<u32>,
    /// Bytes a second of reads alone; not besides `bps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_read: Option<ByteSize>,
    /// As `bps_max`, for reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_read_max: Option<ByteSize>,
    /// As `bps_max_length`, for reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_read_max_length: Option<u32>,
    /// Bytes a second of writes, write-zeroes and discards alone; not besides `bps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_write: Option<ByteSize>,
    /// As `bps_max`, for writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_write_max: Option<ByteSize>,
    /// As `bps_max_length`, for writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_write_max_length: Option<u32>,
    /// Operations a second, reads and writes together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Operations a second during a burst. Not given: a tenth of a second's worth at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_max: Option<u64>,
    /// Seconds that a burst can last. Not given: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_max_length: Option<u32>,
    /// Reads a second; not besides `iops`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_read: Option<u64>,
    /// As `iops_max`, for reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_read_max: Option<u64>,
    /// As `iops_max_length`, for reads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_read_max_length: Option<u32>,
    /// Writes, write-zeroes and discards a second; not besides `iops`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_write: Option<u64>,
    /// As `iops_max`, for writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_write_max: Option<u64>,
    /// As `iops_max_length`, for writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_write_max_length: Option<u32>,
    /// A larger request counts as the operations that it would be in pieces of this size. Not given: as one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_size: Option<ByteSize>,
}

/// One limit: units a second, those of a burst, and its length in seconds.
pub type Limit = (Option<u64>, Option<u64>, Option<u32>);

impl ThrottleConfig {
    /// Whether nothing is given.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// The limits on bytes: together, reads, writes.
    pub fn bytes(&self) -> [Limit; 3] {
        let bytes = |size: Option<ByteSize>| size.map(ByteSize::bytes);
        [
            (bytes(self.bps), bytes(self.bps_max), self.bps_max_length),
            (bytes(self.bps_read), bytes(self.bps_read_max), self.bps_read_max_length),
            (bytes(self.bps_write), bytes(self.bps_write_max), self.bps_write_max_length),
        ]
    }

    /// The limits on operations: together, reads, writes.
    pub fn operations(&self) -> [Limit; 3] {
        [
            (self.iops, self.iops_max, self.iops_max_length),
            (self.iops_read, self.iops_read_max, self.iops_read_max_length),
            (self.iops_write, self.iops_write_max, self.iops_write_max_length),
        ]
    }

    pub(crate) fn validate(&self, key: &str, errors: &mut Vec<ConfigError>) {
        for (unit, limits) in [("bps", self.bytes()), ("iops", self.operations())] {
            let [(total, ..), (read, ..), (write, ..)] = limits;
            if let (Some(total), true) = (total, read.is_some() || write.is_some()) {
                errors.push(ConfigError::value(
                    format!("{key}.{unit}"),
                    total,
                    "reads or writes alone have a limit besides",
                    format!("either `{unit}`, or `{unit}_read` and `{unit}_write`"),
                ));
            }
            for (limit, suffix) in limits.into_iter().zip(["", "_read", "_write"]) {
                check(&format!("{key}.{unit}{suffix}"), limit, errors);
            }
        }
        let operations = self.operations().iter().any(|(average, ..)| average.is_some());
        if let (Some(size), false) = (self.iops_size, operations) {
            let expected = "a limit such as `iops` besides";
            errors.push(ConfigError::value(
                format!("{key}.iops_size"),
                size,
                "operations have no limit",
                expected,
            ));
        }
    }
}

fn check(key: &str, (average, max, length): Limit, errors: &mut Vec<ConfigError>) {
    let beyond = |value: u64| value == 0 || value > MAX_VALUE;
    let range = || format!("1 to {MAX_VALUE}");
    if let Some(average) = average.filter(|&value| beyond(value)) {
        errors.push(ConfigError::value(key, average, "it is no rate", range()));
    }
    if let Some(max) = max {
        let key = format!("{key}_max");
        match average {
            None => errors.push(ConfigError::value(key, max, "a burst needs a limit", "the limit besides")),
            Some(average) if max < average => {
                let why = "a burst would be slower than the limit";
                errors.push(ConfigError::value(key, max, why, format!("at least {average}")));
            }
            Some(_) if beyond(max) => errors.push(ConfigError::value(key, max, "it is no rate", range())),
            Some(_) => {}
        }
    }
    if let Some(length) = length {
        let (key, burst) = (format!("{key}_max_length"), u64::from(length).checked_mul(max.unwrap_or(1)));
        if length == 0 {
            errors.push(ConfigError::value(key, length, "a burst has a length", "seconds, at least 1"));
        } else if max.is_none() {
            errors.push(ConfigError::value(key, length, "there is no burst", "the burst's rate besides"));
        } else if burst.is_none_or(|burst| burst > MAX_VALUE) {
            let expected = format!("together with the rate at most {MAX_VALUE}");
            errors.push(ConfigError::value(key, length, "the burst would be too large", expected));
        }
    }
}

impl KeyValue for ThrottleConfig {
    const MAIN_KEY: &'static str = "bps";
}
