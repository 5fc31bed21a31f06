//! PPTT: how processors are grouped and which caches they share (ACPI 6.5, 5.2.30).
//!
//! ```text
//!   socket ──> die (where there are several) ──> core ──> thread (where there are several)
//!     └ caches of its level: each node names its own, each cache the next level's
//! ```

use acpi_tables::sdt::Sdt;
use terem_cpu::{Cache, CacheKind, Level};

use super::{Description, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

const REVISION: u8 = 3;
/// Bytes of the table's header: offsets count from its start.
const HEADER: u32 = 36;
/// Bytes of a processor node without the caches that it names, and of a cache.
const NODE: u8 = 20;
const CACHE: u8 = 28;

/// Node flags (table 5.143): a package; its processor ID counts; a thread; a leaf; all below are alike.
const PACKAGE: u32 = 1;
const ID_IS_VALID: u32 = 1 << 1;
const THREAD: u32 = 1 << 2;
const LEAF: u32 = 1 << 3;
const ALIKE: u32 = 1 << 4;
/// Cache flags (table 5.145): all fields count.
const ALL_VALID: u32 = 0xff;
/// Cache attributes (table 5.146): allocated for reads and writes; written back. What it holds stands in bits 3:2.
const READ_AND_WRITE: u8 = 2;
/// Bytes of a line.
const LINE: u16 = 64;

/// The table under construction.
struct Builder {
    body: Vec<u8>,
    caches: u32,
}

impl Builder {
    /// Where the next structure goes.
    fn offset(&self) -> u32 {
        HEADER + u32::try_from(self.body.len()).unwrap_or(u32::MAX)
    }

    /// Adds a cache, which leads to `next` (0: to memory). Its offset.
    fn cache(&mut self, kind: CacheKind, cache: &Cache, next: u32) -> u32 {
        let at = self.offset();
        self.caches += 1;
        let holds = match kind {
            CacheKind::Data => 0,
            CacheKind::Instruction => 1,
            CacheKind::Unified => 2,
        };
        self.body.extend([1, CACHE, 0, 0]);
        for field in [ALL_VALID, next, cache.kib.saturating_mul(1024), cache.sets()] {
            self.body.extend(field.to_le_bytes());
        }
        self.body.extend([u8::try_from(cache.ways).unwrap_or(0), READ_AND_WRITE | holds << 2]);
        self.body.extend(LINE.to_le_bytes());
        self.body.extend(self.caches.to_le_bytes());
        at
    }

    /// Adds a node below `parent` (0: a root) with caches of its own. Its offset.
    fn node(&mut self, flags: u32, parent: u32, id: u32, caches: &[u32]) -> u32 {
        let at = self.offset();
        let count = u8::try_from(caches.len()).unwrap_or(0);
        self.body.extend([0, NODE + 4 * count, 0, 0]);
        for field in [flags, parent, id, count.into()].iter().chain(caches) {
            self.body.extend(field.to_le_bytes());
        }
        at
    }
}

/// The caches of levels 2 and 3 that a node at `level` has, and what level 1 and 2 below it lead to.
struct Shared {
    l2: u32,
    l3: u32,
}

impl Shared {
    /// Adds this level's caches: `self` has what comes from the levels above.
    fn below(&self, d: &Description<'_>, level: Level, table: &mut Builder) -> (Self, Vec<u32>) {
        let mut own = Vec::new();
        let mut now = Self { l2: self.l2, l3: self.l3 };
        if let Some(l3) = d.caches.l3.filter(|l3| l3.sharing == level) {
            now.l3 = table.cache(CacheKind::Unified, &l3, 0);
            own.push(now.l3);
        }
        if d.caches.l2.sharing == level {
            now.l2 = table.cache(CacheKind::Unified, &d.caches.l2, now.l3);
            own.push(now.l2);
        }
        (now, own)
    }
}

pub(super) fn pptt(d: &Description<'_>) -> Sdt {
    let t = &d.topology;
    let mut table = Builder { body: Vec::new(), caches: 0 };
    let mut index = 0;
    for _ in 0..t.sockets {
        let (mut shared, mut own) = Shared { l2: 0, l3: 0 }.below(d, Level::Socket, &mut table);
        // A package of one die has no node for it.
        if t.dies <= 1 {
            let (with_die, more) = shared.below(d, Level::Die, &mut table);
            shared = with_die;
            own.extend(more);
        }
        let socket = table.node(PACKAGE | ALIKE, 0, 0, &own);
        for _ in 0..t.dies.max(1) {
            let (parent, shared) = if t.dies > 1 {
                let (shared, own) = shared.below(d, Level::Die, &mut table);
                (table.node(ALIKE, socket, 0, &own), shared)
            } else {
                (socket, Shared { l2: shared.l2, l3: shared.l3 })
            };
            for _ in 0..t.cores {
                index = core(d, &mut table, &shared, parent, index);
            }
        }
    }
    // Appended at once: each append sums up the whole table.
    let mut sdt = Sdt::new(*b"PPTT", HEADER, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.append_slice(&table.body);
    sdt
}

/// Adds a core with its threads, the first of which is processor `index`. The next core's first.
fn core(d: &Description<'_>, table: &mut Builder, above: &Shared, parent: u32, index: u32) -> u32 {
    let (shared, mut own) = above.below(d, Level::Core, table);
    own.push(table.cache(CacheKind::Data, &d.caches.l1d, shared.l2));
    own.push(table.cache(CacheKind::Instruction, &d.caches.l1i, shared.l2));
    if d.topology.threads <= 1 {
        table.node(ID_IS_VALID | LEAF, parent, index, &own);
        return index + 1;
    }
    let core = table.node(ALIKE, parent, 0, &own);
    for thread in 0..d.topology.threads {
        table.node(ID_IS_VALID | THREAD | LEAF, core, index + thread, &[]);
    }
    index + d.topology.threads
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::MemoryMap;
    use acpi_tables::Aml;
    use terem_cpu::{Caches, Topology};

    fn word(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn bytes(topology: Topology, caches: Caches) -> Vec<u8> {
        let map = MemoryMap::q35(1 << 30).unwrap();
        let d = Description { map: &map, topology, cpus: topology.cpus(), caches, numa: &[], pvpanic: false };
        let mut bytes = Vec::new();
        pptt(&d).to_aml_bytes(&mut bytes);
        bytes
    }

    /// Type and offset of each structure.
    fn walk(bytes: &[u8]) -> Vec<(u8, usize)> {
        let mut all = Vec::new();
        let mut at = HEADER as usize;
        while at < bytes.len() {
            all.push((bytes[at], at));
            at += usize::from(bytes[at + 1]);
        }
        all
    }

    /// The sizes of all caches between a processor and memory, by the table alone: those that its nodes name.
    fn caches_of(bytes: &[u8], mut node: usize) -> Vec<u32> {
        let mut sizes = Vec::new();
        while node != 0 {
            let count = word(bytes, node + 16) as usize;
            sizes.extend((0..count).map(|i| word(bytes, word(bytes, node + 20 + 4 * i) as usize + 12)));
            node = word(bytes, node + 8) as usize;
        }
        sizes.sort_unstable();
        sizes
    }

    #[test]
    fn every_processor_is_a_leaf_under_its_package_with_all_its_caches() {
        let usual = Caches::usual();
        let l2_of_die = Caches { l2: Cache { sharing: Level::Die, ..usual.l2 }, ..usual };
        let l3_of_socket = Caches { l3: usual.l3.map(|l3| Cache { sharing: Level::Socket, ..l3 }), ..usual };
        for caches in [usual, l2_of_die, l3_of_socket, Caches { l3: None, ..usual }] {
            for (dies, threads) in [(1, 1), (1, 2), (2, 1), (3, 2)] {
                let topology = Topology { sockets: 2, dies, cores: 3, threads };
                let table = bytes(topology, caches);
                let leaves: Vec<usize> = walk(&table)
                    .into_iter()
                    .filter(|(kind, at)| *kind == 0 && word(&table, at + 4) & LEAF != 0)
                    .map(|(_, at)| at)
                    .collect();
                let ids: Vec<u32> = leaves.iter().map(|at| word(&table, at + 12)).collect();
                assert_eq!(ids, (0..topology.cpus()).collect::<Vec<_>>());
                let mut wanted: Vec<u32> = caches.iter().map(|(_, _, c)| c.kib << 10).collect();
                wanted.sort_unstable();
                for leaf in leaves {
                    assert_eq!(caches_of(&table, leaf), wanted, "{dies} dies, {threads} threads");
                }
                let of_l3 = walk(&table)
                    .iter()
                    .filter(|(kind, at)| *kind == 1 && word(&table, at + 12) == 16 << 20)
                    .count();
                let domains = caches.l3.map_or(0, |l3| topology.cpus() / topology.in_one(l3.sharing));
                assert_eq!(of_l3, domains as usize);
            }
        }
    }

    #[test]
    fn level_1_leads_to_level_2_and_that_to_level_3() {
        let table = bytes(Topology::flat(2), Caches::usual());
        let size = |at: u32| if at == 0 { 0 } else { word(&table, at as usize + 12) };
        let next: Vec<(u32, u32)> = walk(&table)
            .into_iter()
            .filter(|(kind, _)| *kind == 1)
            .map(|(_, at)| (word(&table, at + 12) >> 10, size(word(&table, at + 8)) >> 10))
            .collect();
        assert_eq!(
            next,
            [(16384, 0), (512, 16384), (32, 512), (32, 512), (512, 16384), (32, 512), (32, 512)]
        );
    }
}
