//! How many processors there are, how they are grouped, and what their APIC ids are.

use serde::{Deserialize, Serialize};

/// Sockets of dies of cores of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Packages.
    pub sockets: u32,
    /// Dies in a package.
    pub dies: u32,
    /// Cores in a die.
    pub cores: u32,
    /// Threads in a core.
    pub threads: u32,
}

/// Where one processor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Its package.
    pub socket: u32,
    /// Its die in the package.
    pub die: u32,
    /// Its core in the die.
    pub core: u32,
    /// Its thread in the core.
    pub thread: u32,
}

/// A group of processors that has something in common: a cache, say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The threads of a core.
    Core,
    /// The cores of a die.
    Die,
    /// The dies of a package.
    Socket,
}

/// Bits that number `count` things.
fn bits(count: u32) -> u32 {
    count.max(1).next_power_of_two().trailing_zeros()
}

impl Topology {
    /// One socket of `cpus` cores with one thread each.
    #[must_use]
    pub fn flat(cpus: u32) -> Self {
        Self { sockets: 1, dies: 1, cores: cpus.max(1), threads: 1 }
    }

    /// Processors.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        self.sockets.max(1) * self.in_one(Level::Socket)
    }

    /// Processors in one such group.
    #[must_use]
    pub fn in_one(&self, level: Level) -> u32 {
        let (dies, cores, threads) = (self.dies.max(1), self.cores.max(1), self.threads.max(1));
        match level {
            Level::Core => threads,
            Level::Die => threads * cores,
            Level::Socket => threads * cores * dies,
        }
    }

    /// How far an APIC id is shifted right to leave the number of the group.
    #[must_use]
    pub fn shift(&self, level: Level) -> u32 {
        let core = bits(self.threads);
        match level {
            Level::Core => core,
            Level::Die => core + bits(self.cores),
            Level::Socket => core + bits(self.cores) + bits(self.dies),
        }
    }

    /// Where the processor with this index is: threads are numbered first, then cores, dies and sockets.
    #[must_use]
    pub fn position(&self, index: u32) -> Position {
        let (dies, cores, threads) = (self.dies.max(1), self.cores.max(1), self.threads.max(1));
        Position {
            thread: index % threads,
            core: index / threads % cores,
            die: index / (threads * cores) % dies,
            socket: index / (threads * cores * dies),
        }
    }

    /// The APIC id of the processor with this index (Intel SDM vol. 3, 9.9 "hierarchical topology"): each group has as
    /// many bits as number its members, so ids have gaps where that is no power of two.
    #[must_use]
    pub fn apic_id(&self, index: u32) -> u32 {
        let p = self.position(index);
        p.thread
            | p.core << self.shift(Level::Core)
            | p.die << self.shift(Level::Die)
            | p.socket << self.shift(Level::Socket)
    }

    /// The highest APIC id.
    #[must_use]
    pub fn last_apic_id(&self) -> u32 {
        self.apic_id(self.cpus() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn threads_are_numbered_first_then_cores_then_dies_then_sockets() {
        let t = Topology { sockets: 2, dies: 1, cores: 3, threads: 2 };
        let ids: Vec<u32> = (0..12).map(|i| t.apic_id(i)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        let t = Topology { sockets: 2, dies: 2, cores: 3, threads: 1 };
        let ids: Vec<u32> = (0..12).map(|i| t.apic_id(i)).collect();
        assert_eq!(ids, [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14]);
        assert_eq!(t.last_apic_id(), 14);
    }

    #[test]
    fn groups_are_told_by_their_shifts() {
        let t = Topology { sockets: 2, dies: 3, cores: 5, threads: 2 };
        for level in [Level::Core, Level::Die, Level::Socket] {
            let groups: BTreeSet<_> = (0..t.cpus()).map(|i| t.apic_id(i) >> t.shift(level)).collect();
            assert_eq!(groups.len(), (t.cpus() / t.in_one(level)) as usize, "{level:?}");
        }
        let ids: BTreeSet<_> = (0..t.cpus()).map(|i| t.apic_id(i)).collect();
        assert_eq!(ids.len(), t.cpus() as usize);
    }
}
