//! The leaves that tell of caches and of the topology.

use super::Cpuid;
use crate::cache::{Cache, Caches, Kind, LINE};
use crate::topology::Level;

/// Leaf 2, of one-byte descriptors: FFh says that leaf 4 has the caches (Intel SDM vol. 2, table 3-13); the lowest byte is
/// always 1.
pub(super) const NO_DESCRIPTORS: [u32; 4] = [0x0000_ff01, 0, 0, 0];

/// Leaf 4, EAX: a cache needs nothing done to it before use.
const SELF_INITIALIZING: u32 = 1 << 8;
/// Leaf 4, EDX: WBINVD on one processor does not act on the lower caches of those that share this one.
const WBINVD_IS_LOCAL: u32 = 1;
/// Leaf 4, EDX: what is in lower levels is in this one, too.
const INCLUSIVE: u32 = 1 << 1;
/// Leaf 4, EDX: sets are found by a hash and not by address bits.
const COMPLEX_INDEXING: u32 = 1 << 2;

/// Types of levels in leaves 0Bh and 1Fh (Intel SDM vol. 2, CPUID leaf 1Fh).
const TYPE_THREAD: u32 = 1;
const TYPE_CORE: u32 = 2;
const TYPE_DIE: u32 = 5;

/// Leaves 8000_0005h and 6: lines per tag, and bytes of a line.
const LINES: u32 = 1 << 8 | LINE;
/// Leaf 8000_0005h: TLBs of 255 entries each, directly mapped: what QEMU's guests are told, and nobody minds.
const TLB_LEVEL_1: u32 = 0x01ff_01ff;
/// Leaf 8000_0006h: for pages of 4 KiB 512 entries, 4 ways.
const TLB_LEVEL_2: u32 = 0x4200_4200;

/// AMX: what each model that has it has (Intel SDM vol. 2, CPUID leaves 1Dh and 1Eh): one palette of 8 tiles, each of 16
/// rows of 64 bytes; TMUL of 16 by 64.
pub(super) fn tiles(leaf: u32, subleaf: u32) -> [u32; 4] {
    match (leaf, subleaf) {
        (0x1d, 0) => [1, 0, 0, 0],
        (0x1d, 1) => [0x400 << 16 | 0x2000, 8 << 16 | 0x40, 16, 0],
        (0x1e, 0) => [0, 0x40 << 8 | 16, 0, 0],
        _ => [0; 4],
    }
}

/// Leaf 8000_0005h (AMD APM vol. 3, E.4.4).
pub(super) fn amd_level_1(caches: &Caches) -> [u32; 4] {
    let cache = |c: &Cache| c.kib.min(255) << 24 | c.ways.min(255) << 16 | LINES;
    [TLB_LEVEL_1, TLB_LEVEL_1, cache(&caches.l1d), cache(&caches.l1i)]
}

/// Leaf 8000_0006h (AMD APM vol. 3, E.4.5): level 2 in KiB, level 3 in 512 KiB.
pub(super) fn amd_levels_2_and_3(caches: &Caches) -> [u32; 4] {
    let l3 = caches.l3.map_or(0, |c| (c.kib / 512).min(0x3fff) << 18 | c.amd_ways() << 12 | LINES);
    [0, TLB_LEVEL_2, caches.l2.kib.min(0xffff) << 16 | caches.l2.amd_ways() << 12 | LINES, l3]
}

/// The same leaf on Intel, which has the size of level 2 there and nothing else (SDM vol. 2, CPUID).
pub(super) fn intel_level_2(caches: &Caches) -> [u32; 4] {
    [0, 0, caches.l2.kib.min(0xffff) << 16 | caches.l2.amd_ways() << 12 | LINE, 0]
}

impl Cpuid {
    /// Leaf 1, EBX 23:16: on AMD the number of processors in the package; on Intel the number of ids kept for them.
    pub(super) fn logical_processors(&self) -> u32 {
        let count = self.topology.in_one(Level::Socket);
        if count == 1 {
            // Means something only with HTT.
            0
        } else if self.model.vendor.is_like_amd() {
            count.min(255)
        } else {
            (1 << self.topology.shift(Level::Socket).min(8)).min(255)
        }
    }

    /// APIC ids that are kept for one group, less 1.
    fn ids_less_1(&self, level: Level) -> u32 {
        (1 << self.topology.shift(level)) - 1
    }

    /// What leaves 4 and 8000_001Dh have in common: the cache of this subleaf, its EAX to ECX.
    fn cache(&self, subleaf: u32) -> Option<(u32, Cache, [u32; 3])> {
        let (level, kind, cache) = self.model.caches.iter().nth(subleaf as usize)?;
        let kind = match kind {
            Kind::Data => 1,
            Kind::Instruction => 2,
            Kind::Unified => 3,
        };
        let sharing = self.ids_less_1(cache.sharing).min(0xfff);
        let eax = kind | level << 5 | SELF_INITIALIZING | sharing << 14;
        Some((level, cache, [eax, (cache.ways - 1) << 22 | (LINE - 1), cache.sets().saturating_sub(1)]))
    }

    /// Leaf 4, deterministic cache parameters.
    pub(super) fn intel_cache(&self, subleaf: u32) -> [u32; 4] {
        let Some((level, _, [eax, ebx, ecx])) = self.cache(subleaf) else { return [0; 4] };
        let cores = (1 << (self.topology.shift(Level::Socket) - self.topology.shift(Level::Core))) - 1;
        let edx = if level == 3 { INCLUSIVE | COMPLEX_INDEXING } else { WBINVD_IS_LOCAL };
        [eax | u32::min(cores, 63) << 26, ebx, ecx, edx]
    }

    /// Leaf 8000_001Dh (AMD APM vol. 3, E.4.15).
    pub(super) fn amd_cache(&self, subleaf: u32) -> [u32; 4] {
        let Some((level, _, [eax, ebx, ecx])) = self.cache(subleaf) else { return [0; 4] };
        let edx = match level {
            1 => WBINVD_IS_LOCAL,
            3 => INCLUSIVE,
            _ => 0,
        };
        [eax, ebx, ecx, edx]
    }

    /// Leaf 8000_0008h, ECX: width of the ids in a package, and the number of processors in it, less 1. (One processor
    /// says nothing.)
    pub(super) fn amd_core_count(&self) -> u32 {
        let count = self.topology.in_one(Level::Socket);
        if count > 1 { self.topology.shift(Level::Socket) << 12 | (count - 1).min(255) } else { 0 }
    }

    /// Leaf 8000_001Eh (AMD APM vol. 3, E.4.16): APIC id; the core in its package and the threads of it; the node and the
    /// nodes of a package. A die is a node.
    pub(super) fn amd_topology(&self) -> [u32; 4] {
        let t = &self.topology;
        let [core, die, socket] = [Level::Core, Level::Die, Level::Socket].map(|level| t.shift(level));
        let core_id = (self.apic_id & ((1 << socket) - 1)) >> core;
        let node =
            (self.apic_id >> socket) * t.dies.max(1) + (self.apic_id >> die & ((1 << (socket - die)) - 1));
        let nodes = (t.dies.max(1) - 1).min(7);
        [self.apic_id, (t.threads.max(1) - 1) << 8 | core_id & 0xff, nodes << 8 | node & 0xff, 0]
    }

    /// Leaf 0Bh, of threads and of cores, which fill the package whatever dies they are on.
    pub(super) fn core_topology(&self, subleaf: u32) -> [u32; 4] {
        let t = &self.topology;
        let levels = [(Level::Core, Level::Core, TYPE_THREAD), (Level::Socket, Level::Socket, TYPE_CORE)];
        self.level(
            levels.get(subleaf as usize).map(|(s, n, kind)| (t.shift(*s), t.in_one(*n), *kind)),
            subleaf,
        )
    }

    /// Leaf 1Fh: the same with dies.
    pub(super) fn die_topology(&self, subleaf: u32) -> [u32; 4] {
        let t = &self.topology;
        if t.dies <= 1 {
            return [0; 4];
        }
        let levels = [(Level::Core, TYPE_THREAD), (Level::Die, TYPE_CORE), (Level::Socket, TYPE_DIE)];
        self.level(levels.get(subleaf as usize).map(|(l, kind)| (t.shift(*l), t.in_one(*l), *kind)), subleaf)
    }

    /// A topology leaf: how far to shift an id for the next level's, how many processors are in one of those, the
    /// subleaf and its type, the id.
    fn level(&self, level: Option<(u32, u32, u32)>, subleaf: u32) -> [u32; 4] {
        let (shift, count, kind) = level.unwrap_or((0, 0, 0));
        [shift, count & 0xffff, subleaf & 0xff | kind << 8, self.apic_id]
    }
}
