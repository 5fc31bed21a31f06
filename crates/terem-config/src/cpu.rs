//! Virtual CPUs: how many, in which topology, of which model.

use crate::error::ConfigError;
use crate::key_value::KeyValue;
use crate::size::ByteSize;
use crate::text::{TextError, text_type};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The most vCPUs a machine can have: xAPIC identifiers have 8 bits, and 255 addresses all of them
/// (Intel SDM volume 3, 11.6.2).
pub const MAX_CPUS: u32 = 254;

/// The number of vCPUs, how they are laid out, and the caches that the guest is told of.
/// `--cpus 8,sockets=2,cores=2,threads=2,l3=32M`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpusConfig {
    /// Number of vCPUs (main key).
    pub count: u32,
    /// Sockets of the machine. What is not given of the topology follows from the count: threads and dies are 1,
    /// then cores are filled up, then sockets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sockets: Option<u32>,
    /// Dies in a socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dies: Option<u32>,
    /// Cores in a die.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cores: Option<u32>,
    /// Threads in a core.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u32>,
    /// Size of each core's level 1 data cache. What is not given of the caches is the CPU model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub l1d: Option<ByteSize>,
    /// Size of each core's level 1 instruction cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub l1i: Option<ByteSize>,
    /// Size of a level 2 cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub l2: Option<ByteSize>,
    /// Size of a level 3 cache; 0 for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub l3: Option<ByteSize>,
    /// Who shares a level 2 cache; usually each core has its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub l2_sharing: Option<CacheSharing>,
    /// Who shares a level 3 cache; usually each die has its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub l3_sharing: Option<CacheSharing>,
}

/// Who shares a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CacheSharing {
    /// The threads of a core.
    Core,
    /// The cores of a die.
    Die,
    /// All cores of a socket.
    Socket,
}

/// A complete topology.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Topology {
    /// Sockets of the machine.
    pub sockets: u32,
    /// Dies in a socket.
    pub dies: u32,
    /// Cores in a die.
    pub cores: u32,
    /// Threads in a core.
    pub threads: u32,
}

impl Topology {
    /// How many vCPUs it has; `None` beyond 32 bits.
    pub fn cpus(&self) -> Option<u32> {
        self.sockets.checked_mul(self.dies)?.checked_mul(self.cores)?.checked_mul(self.threads)
    }
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self::new(1)
    }
}

impl CpusConfig {
    /// `count` vCPUs in the usual topology: one socket.
    pub const fn new(count: u32) -> Self {
        Self {
            count,
            sockets: None,
            dies: None,
            cores: None,
            threads: None,
            l1d: None,
            l1i: None,
            l2: None,
            l3: None,
            l2_sharing: None,
            l3_sharing: None,
        }
    }

    /// The whole topology. For a checked configuration its product is `count`.
    pub fn topology(&self) -> Topology {
        let dies = self.dies.unwrap_or(1);
        let threads = self.threads.unwrap_or(1);
        let rest = |known: u32| self.count.checked_div(known).unwrap_or(1).max(1);
        let per_core = dies.saturating_mul(threads);
        let (sockets, cores) = match (self.sockets, self.cores) {
            (Some(sockets), Some(cores)) => (sockets, cores),
            (None, Some(cores)) => (rest(per_core.saturating_mul(cores)), cores),
            (sockets, None) => {
                let sockets = sockets.unwrap_or(1);
                (sockets, rest(per_core.saturating_mul(sockets)))
            }
        };
        Topology { sockets, dies, cores, threads }
    }

    pub(crate) fn validate(&self, errors: &mut Vec<ConfigError>) {
        self.validate_caches(errors);
        if !(1..=MAX_CPUS).contains(&self.count) {
            let why = if self.count == 0 {
                "a machine needs a vCPU"
            } else {
                "the machine has no room for so many"
            };
            errors.push(ConfigError::value("cpus.count", self.count, why, format!("1 to {MAX_CPUS}")));
            return;
        }
        let parts = [
            ("sockets", self.sockets),
            ("dies", self.dies),
            ("cores", self.cores),
            ("threads", self.threads),
        ];
        let before = errors.len();
        for (name, part) in parts {
            if part == Some(0) {
                errors.push(ConfigError::value(
                    format!("cpus.{name}"),
                    0,
                    "a topology has at least one of each",
                    "1 or more",
                ));
            }
        }
        let Topology { sockets, dies, cores, threads } = self.topology();
        if errors.len() == before && self.topology().cpus() != Some(self.count) {
            errors.push(ConfigError::value(
                "cpus.count",
                self.count,
                format!(
                    "{sockets} sockets × {dies} dies × {cores} cores × {threads} threads do not make {} vCPUs",
                    self.count
                ),
                "a count that is the product of the topology",
            ));
        }
    }
}

impl CpusConfig {
    /// Sizes that CPUID's leaves can tell of, AMD's among them: 8 bits of KiB for level 1, 16 for level 2, 14 of 512 KiB
    /// for level 3 (AMD APM volume 3, E.4.4 and E.4.5).
    fn validate_caches(&self, errors: &mut Vec<ConfigError>) {
        let (kib, mib) = (ByteSize::kib, ByteSize::mib);
        let caches = [
            ("l1d", self.l1d, kib(4), kib(255), kib(1)),
            ("l1i", self.l1i, kib(4), kib(255), kib(1)),
            ("l2", self.l2, kib(16), mib(63), kib(4)),
            ("l3", self.l3.filter(|size| size.0 != 0), kib(512), mib(8191), kib(512)),
        ];
        for (name, size, least, most, unit) in caches {
            let Some(size) = size else { continue };
            if !(least..=most).contains(&size) || !size.0.is_multiple_of(unit.0) {
                errors.push(ConfigError::value(
                    format!("cpus.{name}"),
                    size,
                    "a guest cannot be told of a cache of this size",
                    format!("a multiple of {unit} from {least} to {most}"),
                ));
            }
        }
        if self.l3_sharing.is_some() && self.l3 == Some(ByteSize(0)) {
            let no_l3 = "there is no level 3 cache to share";
            errors.push(ConfigError::missing("cpus.l3_sharing", no_l3, "a size for l3"));
        }
    }
}

impl KeyValue for CpusConfig {
    const MAIN_KEY: &'static str = "count";
}

/// The CPU model the guest sees. `--cpu host,-avx2`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Name of the model (main key): `default`, `host`, `max`, or one of those that `terem cpu models` lists.
    #[serde(default = "default_model")]
    pub model: String,
    /// Features switched on (`+aes`) or off (`-avx2`) against the model. On the command line they stand alone: `host,-avx2`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub flags: Vec<CpuFlag>,
    /// Whether features that this host or the accelerator cannot give are an error; off: they are left out, and told.
    #[serde(default = "on", skip_serializing_if = "is_on")]
    pub enforce: bool,
}

fn on() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's form")]
fn is_on(switch: &bool) -> bool {
    *switch
}

fn default_model() -> String {
    "default".into()
}

impl Default for CpuConfig {
    fn default() -> Self {
        Self { model: default_model(), flags: Vec::new(), enforce: true }
    }
}

impl CpuConfig {
    pub(crate) fn validate(&self, errors: &mut Vec<ConfigError>) {
        if self.model.is_empty() {
            errors.push(ConfigError::value(
                "cpu.model",
                "\"\"",
                "it is empty",
                "the name of a CPU model, or `default`",
            ));
        }
        for (index, flag) in self.flags.iter().enumerate() {
            if let Some(first) = self.flags[..index].iter().find(|f| f.name == flag.name) {
                let why =
                    if first.on == flag.on { "it is given twice" } else { "it is switched both on and off" };
                errors.push(ConfigError::value(
                    format!("cpu.flags[{index}]"),
                    flag,
                    why,
                    "each feature once",
                ));
            }
        }
    }
}

impl KeyValue for CpuConfig {
    const MAIN_KEY: &'static str = "model";
    const SIGNED_KEY: Option<&'static str> = Some("flags");
}

/// A CPU feature switched on or off, written `+aes` or `-avx2`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuFlag {
    /// Name of the feature as in `/proc/cpuinfo`.
    pub name: String,
    /// Whether the guest is to have it.
    pub on: bool,
}

impl FromStr for CpuFlag {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        const EXPECTED: &str = "+FEATURE or -FEATURE, such as +aes or -avx2";
        let (on, name) = match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(name), _) => (true, name),
            (_, Some(name)) => (false, name),
            _ => return Err(TextError::new("it begins with neither + nor -", EXPECTED)),
        };
        if name.is_empty()
            || !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
        {
            return Err(TextError::new("it is no name of a feature", EXPECTED));
        }
        Ok(Self { name: name.to_ascii_lowercase(), on })
    }
}

impl fmt::Display for CpuFlag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.on { '+' } else { '-' }, self.name)
    }
}

text_type!(
    CpuFlag,
    "CpuFlag",
    "^[+-][A-Za-z0-9_.-]+$",
    "A CPU feature switched on (`+aes`) or off (`-avx2`)"
);

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(count: u32, parts: [Option<u32>; 4]) -> Topology {
        let [sockets, dies, cores, threads] = parts;
        CpusConfig { sockets, dies, cores, threads, ..CpusConfig::new(count) }.topology()
    }

    #[test]
    fn topology_is_filled_up() {
        assert_eq!(topology(4, [None; 4]), Topology { sockets: 1, dies: 1, cores: 4, threads: 1 });
        assert_eq!(
            topology(8, [Some(2), None, None, Some(2)]),
            Topology { sockets: 2, dies: 1, cores: 2, threads: 2 }
        );
        assert_eq!(
            topology(8, [None, None, Some(2), None]),
            Topology { sockets: 4, dies: 1, cores: 2, threads: 1 }
        );
    }

    #[test]
    fn wrong_product_is_told() {
        let mut errors = Vec::new();
        CpusConfig { threads: Some(2), ..CpusConfig::new(3) }.validate(&mut errors);
        assert_eq!(
            errors[0].to_string(),
            "cpus.count = 3: 1 sockets × 1 dies × 1 cores × 2 threads do not make 3 vCPUs; expected a count that is the product of the topology"
        );
        errors.clear();
        CpusConfig { sockets: Some(u32::MAX), cores: Some(u32::MAX), ..CpusConfig::new(4) }
            .validate(&mut errors);
        assert_eq!(errors.len(), 1);
        errors.clear();
        CpusConfig { sockets: Some(0), cores: Some(0), ..CpusConfig::new(4) }.validate(&mut errors);
        assert_eq!(errors.len(), 2);
    }

    #[test]
    fn caches_that_no_leaf_can_tell_of_are_told() {
        let told = |text: &str| {
            let mut errors = Vec::new();
            crate::from_key_values::<CpusConfig>(text).unwrap().validate(&mut errors);
            errors.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(told("4,l1d=48K,l1i=32K,l2=2M,l2_sharing=die,l3=33M,l3_sharing=socket").is_empty());
        assert!(told("4,l3=0").is_empty());
        let all = told("4,l1d=256K,l1i=1000,l2=1G,l3=100K");
        assert_eq!(all.len(), 4);
        assert_eq!(
            all[0],
            "cpus.l1d = 256K: a guest cannot be told of a cache of this size; expected a multiple of 1K from 4K to 255K"
        );
        assert!(told("4,l3=0,l3_sharing=die")[0].starts_with("cpus.l3_sharing"));
    }

    #[test]
    fn contradictory_flags_are_told() {
        let mut errors = Vec::new();
        let flag = |text: &str| text.parse::<CpuFlag>().unwrap();
        CpuConfig { flags: vec![flag("+aes"), flag("-aes")], ..CpuConfig::default() }.validate(&mut errors);
        assert_eq!(
            errors[0].to_string(),
            "cpu.flags[1] = -aes: it is switched both on and off; expected each feature once"
        );
    }
}
