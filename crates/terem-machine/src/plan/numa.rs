//! NUMA nodes of a plan: which vCPUs each has and where its memory lies.

use serde::Serialize;
use terem_config::{MachineConfig, numa_distances};

use super::memory::{HIGH_MEMORY, MemoryMap, Window};

/// A NUMA node of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NumaPlan {
    /// Its vCPUs.
    pub cpus: Vec<u32>,
    /// Its memory, in guest-physical addresses. The first node's begins at 0 and takes no notice of the VGA hole.
    pub memory: Vec<Window>,
    /// Distances to all nodes.
    pub distances: Vec<u8>,
}

/// The nodes of a checked configuration.
pub(super) fn nodes(config: &MachineConfig, map: &MemoryMap) -> Vec<NumaPlan> {
    let distances = numa_distances(&config.numa);
    let mut given = 0;
    config
        .numa
        .iter()
        .zip(distances)
        .map(|(node, distances)| {
            let (first, end) = (given, given + node.memory.bytes());
            given = end;
            NumaPlan {
                cpus: node.cpus.iter().flat_map(|range| range.first..=range.last).collect(),
                memory: addresses(map, first, end),
                distances,
            }
        })
        .collect()
}

/// Where the bytes from `first` to `end` of all RAM lie: below the low end, and from 4 GiB on.
fn addresses(map: &MemoryMap, first: u64, end: u64) -> Vec<Window> {
    let low = Window::between(first.min(map.low_end), end.min(map.low_end));
    let above = |at: u64| HIGH_MEMORY + at.saturating_sub(map.low_end);
    let high = Window::between(above(first), above(end));
    [low, high].into_iter().filter(|window| window.size > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use terem_config::{ByteSize, CpusConfig, from_key_values};

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_goes_around_the_hole_below_four_gibibytes() {
        let config = MachineConfig {
            memory: ByteSize::gib(6),
            cpus: CpusConfig::new(4),
            numa: ["0-1,memory=3G", "2,memory=1G", "3,memory=2G"].map(|n| from_key_values(n).unwrap()).into(),
            ..MachineConfig::default()
        };
        let map = MemoryMap::q35(6 * GIB).unwrap();
        let nodes = nodes(&config, &map);
        let window = |base, size| Window { base: base * GIB, size: size * GIB };
        assert_eq!(nodes[0].memory, [window(0, 2), window(4, 1)]);
        assert_eq!(nodes[1].memory, [window(5, 1)]);
        assert_eq!(nodes[2].memory, [window(6, 2)]);
        assert_eq!((&nodes[0].cpus[..], &nodes[2].cpus[..]), (&[0, 1][..], &[3][..]));
        assert_eq!(nodes[1].distances, [20, 10, 20]);
    }
}
