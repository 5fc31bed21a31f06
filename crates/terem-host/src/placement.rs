//! Which part of the host a machine of this size would be given.

use crate::inventory::HostInventory;
use serde::Serialize;

/// Host CPUs and NUMA node for a machine: data only, nothing is pinned yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// The node that holds all of it, if one does.
    pub node: Option<u32>,
    /// The host's CPUs that its vCPUs run on.
    pub cpus: Vec<u32>,
}

impl Placement {
    /// The node with enough CPUs and the most free memory, if that memory suffices; all CPUs otherwise.
    pub fn choose(host: &HostInventory, vcpus: u32, memory: u64) -> Self {
        let wanted = usize::try_from(vcpus).unwrap_or(usize::MAX);
        let node = host
            .numa_nodes
            .iter()
            .filter(|node| node.cpus.len() >= wanted && node.memory_free >= memory)
            .max_by_key(|node| node.memory_free);
        match node {
            Some(node) => Self { node: Some(node.id), cpus: node.cpus.clone() },
            None => Self { node: None, cpus: host.cpus.clone() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NumaNode;

    #[test]
    fn the_emptier_node_that_suffices() {
        let node = |id: u32, memory_free| NumaNode {
            id,
            cpus: vec![id * 2, id * 2 + 1],
            memory_total: 100,
            memory_free,
            distances: vec![10, 20],
        };
        let mut host = HostInventory::read();
        host.cpus = vec![0, 1, 2, 3];
        host.numa_nodes = vec![node(0, 10), node(1, 50)];
        assert_eq!(Placement::choose(&host, 2, 20), Placement { node: Some(1), cpus: vec![2, 3] });
        assert_eq!(Placement::choose(&host, 3, 20), Placement { node: None, cpus: vec![0, 1, 2, 3] });
        assert_eq!(Placement::choose(&host, 1, 60).node, None);
    }
}
