//! NUMA nodes of the guest: which vCPUs and how much memory each has, and how far they are from each other.

use crate::cpu::CpusConfig;
use crate::error::ConfigError;
use crate::key_value::KeyValue;
use crate::size::ByteSize;
use crate::text::{TextError, text_type};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The most nodes: a table of distances between more would be of no use to anybody.
const MAX_NODES: usize = 64;
/// A node's distance to itself (ACPI 6.5, 5.2.17).
pub const LOCAL_DISTANCE: u8 = 10;
/// Distance to another node where nothing is said.
pub const REMOTE_DISTANCE: u8 = 20;
/// Least size that a node's memory is a multiple of.
const UNIT: ByteSize = ByteSize::mib(1);

/// A NUMA node of the guest; the first is node 0. `--numa 0-3,memory=2G --numa 4-7,memory=2G,distance=0:21`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NumaConfig {
    /// Its vCPUs, such as `0-3` (main key). Can be repeated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<CpuRange>,
    /// Its memory. All nodes' together are the machine's.
    pub memory: ByteSize,
    /// Distance to another node and back, `NODE:DISTANCE`, where 10 is a node itself; 20 if not given. Can be repeated.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub distance: Vec<NumaDistance>,
}

impl KeyValue for NumaConfig {
    const MAIN_KEY: &'static str = "cpus";
}

/// vCPUs by their numbers, `3` or `0-3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuRange {
    /// The first.
    pub first: u32,
    /// The last, itself included.
    pub last: u32,
}

impl FromStr for CpuRange {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        const EXPECTED: &str = "a number or FIRST-LAST, such as 0-3";
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let number = |t: &str| t.parse().map_err(|_| TextError::new("it is no range of numbers", EXPECTED));
        let range = Self { first: number(first)?, last: number(last)? };
        if range.first > range.last {
            return Err(TextError::new("it runs backwards", EXPECTED));
        }
        Ok(range)
    }
}

impl fmt::Display for CpuRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

text_type!(CpuRange, "CpuRange", "^[0-9]+(-[0-9]+)?$", "vCPUs by number: `3` or `0-3`");

/// How far a node is, `NODE:DISTANCE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NumaDistance {
    /// The other node.
    pub node: u32,
    /// The distance: 10 is none, 20 twice as far, 255 out of reach.
    pub distance: u8,
}

impl FromStr for NumaDistance {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        const EXPECTED: &str = "NODE:DISTANCE with a distance from 11 to 255, such as 1:21";
        let parts = text.split_once(':').and_then(|(n, d)| Some((n.parse().ok()?, d.parse().ok()?)));
        match parts {
            Some((node, distance)) if distance > LOCAL_DISTANCE => Ok(Self { node, distance }),
            Some(_) => Err(TextError::new("no other node is as near as a node itself", EXPECTED)),
            None => Err(TextError::new("it is no node with a distance", EXPECTED)),
        }
    }
}

impl fmt::Display for NumaDistance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.node, self.distance)
    }
}

text_type!(
    NumaDistance,
    "NumaDistance",
    "^[0-9]+:[0-9]+$",
    "Distance to another node: NODE:DISTANCE, such as `1:21`"
);

/// The distances between all nodes, row by row. What one node says of another holds both ways unless that one says
/// otherwise.
pub fn distances(nodes: &[NumaConfig]) -> Vec<Vec<u8>> {
    let said = |from: usize, to: usize| {
        let to = u32::try_from(to).ok()?;
        nodes.get(from)?.distance.iter().find(|d| d.node == to).map(|d| d.distance)
    };
    let between = |from: usize, to: usize| {
        if from == to {
            LOCAL_DISTANCE
        } else {
            said(from, to).or_else(|| said(to, from)).unwrap_or(REMOTE_DISTANCE)
        }
    };
    (0..nodes.len()).map(|from| (0..nodes.len()).map(|to| between(from, to)).collect()).collect()
}

/// Checks all nodes against each other and against the machine.
pub(crate) fn validate(
    nodes: &[NumaConfig],
    cpus: &CpusConfig,
    memory: ByteSize,
    errors: &mut Vec<ConfigError>,
) {
    if nodes.is_empty() {
        return;
    }
    if nodes.len() > MAX_NODES {
        let why = format!("{} nodes are too many", nodes.len());
        errors.push(ConfigError::missing("numa", why, format!("up to {MAX_NODES}")));
        return;
    }
    let mut node_of: Vec<Option<usize>> = vec![None; cpus.count.min(crate::MAX_CPUS) as usize];
    for (i, node) in nodes.iter().enumerate() {
        let key = |name: &str| format!("numa[{i}].{name}");
        for range in &node.cpus {
            if range.last as usize >= node_of.len() {
                let last = cpus.count.saturating_sub(1);
                errors.push(ConfigError::value(
                    key("cpus"),
                    range,
                    "there is no such vCPU",
                    format!("0 to {last}"),
                ));
                continue;
            }
            let slots = &mut node_of[range.first as usize..=range.last as usize];
            if let Some(other) = slots.iter().find_map(|slot| *slot) {
                let why = format!("node {other} has some of them already");
                errors.push(ConfigError::value(key("cpus"), range, why, "each vCPU in one node"));
            }
            slots.fill(Some(i));
        }
        if !node.memory.0.is_multiple_of(UNIT.0) {
            errors.push(ConfigError::value(
                key("memory"),
                node.memory,
                "it is not whole mebibytes",
                "a multiple of 1M",
            ));
        }
        for d in &node.distance {
            if d.node as usize >= nodes.len() || d.node as usize == i {
                let why =
                    if d.node as usize == i { "it is the node itself" } else { "there is no such node" };
                errors.push(ConfigError::value(key("distance"), d, why, "the number of another node"));
            }
        }
    }
    if let Some(missing) = node_of.iter().position(Option::is_none) {
        let why = format!("vCPU {missing} is in none of the nodes");
        errors.push(ConfigError::missing("numa", why, "each vCPU in one node"));
    }
    let sum = nodes.iter().try_fold(0_u64, |sum, node| sum.checked_add(node.memory.0)).map(ByteSize);
    if sum != Some(memory) {
        let together = sum.map_or_else(|| "beyond 64 bits".into(), |sum| sum.to_string());
        let why = format!("the nodes' memory together is {together}, the machine's is {memory}");
        errors.push(ConfigError::missing("numa", why, "nodes that have all of the machine's memory"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::from_key_values;

    fn mistakes(nodes: &[&str]) -> Vec<String> {
        let nodes: Vec<NumaConfig> = nodes.iter().map(|n| from_key_values(n).unwrap()).collect();
        let mut errors = Vec::new();
        validate(&nodes, &CpusConfig::new(4), ByteSize::gib(2), &mut errors);
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn nodes_have_all_cpus_and_all_memory() {
        assert!(mistakes(&[]).is_empty());
        assert!(mistakes(&["0-1,memory=1G", "2,cpus=3,memory=1G,distance=0:21"]).is_empty());
        assert!(mistakes(&["0-3,memory=0", "memory=2G"]).is_empty(), "a node may be of memory only");
        let told = mistakes(&["0-2,memory=1G", "2-3,cpus=9,memory=512M,distance=1:30,distance=7:30"]);
        assert_eq!(told.len(), 5, "{told:?}");
        assert!(told[0].contains("node 0 has some of them already"), "{told:?}");
        assert!(told[4].contains("together is 1536M, the machine's is 2G"), "{told:?}");
        assert!(mistakes(&["0-2,memory=2G"])[0].contains("vCPU 3 is in none"));
        assert!(mistakes(&["0-3,memory=17179869183G", "memory=17179869183G"])[0].contains("beyond 64 bits"));
    }

    #[test]
    fn distances_hold_both_ways() {
        let nodes: Vec<NumaConfig> =
            ["0,distance=1:31", "1", "2,distance=1:12"].map(|n| from_key_values(n).unwrap()).into();
        assert_eq!(distances(&nodes), [[10, 31, 20], [31, 10, 12], [20, 12, 10]]);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["3-1", "a", "1-", "-1", ""] {
            assert!(text.parse::<CpuRange>().is_err(), "{text}");
        }
        for text in ["1", "1:10", "1:256", ":", "x:20"] {
            assert!(text.parse::<NumaDistance>().is_err(), "{text}");
        }
    }
}
