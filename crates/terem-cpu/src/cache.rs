//! The caches that a guest is told of.

use serde::{Deserialize, Serialize};

use crate::topology::Level;

/// Bytes of a cache line, of every cache here and of what CLFLUSH flushes.
pub const LINE: u32 = 64;

/// One cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    /// Its size in KiB.
    pub kib: u32,
    /// In how many places a line may lie.
    pub ways: u32,
    /// Who shares it.
    pub sharing: Level,
}

/// What a cache holds, with CPUID's numbers (Intel SDM vol. 2, CPUID leaf 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Data.
    Data = 1,
    /// Instructions.
    Instruction = 2,
    /// Both.
    Unified = 3,
}

/// All caches of a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caches {
    /// Level 1, data.
    pub l1d: Cache,
    /// Level 1, instructions.
    pub l1i: Cache,
    /// Level 2.
    pub l2: Cache,
    /// Level 3.
    pub l3: Option<Cache>,
}

const fn cache(kib: u32, ways: u32, sharing: Level) -> Cache {
    Cache { kib, ways, sharing }
}

const fn caches(l1d: (u32, u32), l1i: (u32, u32), l2: (u32, u32), l3: (u32, u32)) -> Caches {
    Caches {
        l1d: cache(l1d.0, l1d.1, Level::Core),
        l1i: cache(l1i.0, l1i.1, Level::Core),
        l2: cache(l2.0, l2.1, Level::Core),
        l3: Some(cache(l3.0, l3.1, Level::Die)),
    }
}

/// The catalogue's caches by name. Those of Intel's and of AMD's older models are no real processor's but those that QEMU
/// tells of; those of the EPYCs are the processors' own.
pub(crate) const NAMED: &[(&str, Caches)] = &[
    ("teremok", caches((32, 8), (32, 8), (512, 8), (16 << 10, 16))),
    ("intel", caches((32, 8), (32, 8), (4 << 10, 16), (16 << 10, 16))),
    ("amd", caches((64, 2), (64, 2), (512, 16), (16 << 10, 16))),
    ("epyc", caches((32, 8), (64, 4), (512, 8), (8 << 10, 16))),
    ("rome", caches((32, 8), (32, 8), (512, 8), (16 << 10, 16))),
    ("milan", caches((32, 8), (32, 8), (512, 8), (32 << 10, 16))),
    ("genoa", caches((32, 8), (32, 8), (1 << 10, 8), (32 << 10, 16))),
];

/// Ways that are tried for a size that does not go with the model's.
const OTHER_WAYS: [u32; 10] = [16, 8, 12, 20, 10, 11, 15, 24, 4, 2];

impl Cache {
    /// How many lines with the same address bits there are places for: size = line × ways × sets.
    #[must_use]
    pub fn sets(&self) -> u32 {
        (u64::from(self.kib) * 1024 / u64::from(LINE * self.ways.max(1))).try_into().unwrap_or(u32::MAX)
    }

    /// The same cache with another size: its ways stay if that size can have them.
    #[must_use]
    pub fn resized(&self, kib: u32) -> Self {
        let lines = u64::from(kib) * 1024 / u64::from(LINE);
        let fits = |ways: &u32| lines.is_multiple_of((*ways).into()) && lines > u64::from(*ways);
        let ways = std::iter::once(self.ways).chain(OTHER_WAYS).find(fits).unwrap_or(1);
        Self { kib, ways, ..*self }
    }

    /// Its associativity as AMD's leaf 8000_0006h has it; where that has no number, it says to look at leaf 8000_001Dh
    /// (AMD APM vol. 3, E.4.5, table E-4).
    #[must_use]
    pub(crate) fn amd_ways(&self) -> u32 {
        const SEE_LEAF_1D: u32 = 9;
        match self.ways {
            ways @ 1..=4 => ways,
            6 => 5,
            8 => 6,
            16 => 8,
            32 => 10,
            48 => 11,
            64 => 12,
            96 => 13,
            128 => 14,
            _ => SEE_LEAF_1D,
        }
    }
}

impl Caches {
    /// Those of our own models.
    #[must_use]
    pub fn usual() -> Self {
        NAMED[0].1
    }

    /// The caches of this name in the catalogue.
    #[must_use]
    pub(crate) fn named(name: &str) -> Option<Self> {
        NAMED.iter().find(|(n, _)| *n == name).map(|(_, caches)| *caches)
    }

    /// Level, kind and cache, in the order in which CPUID counts them.
    pub fn iter(&self) -> impl Iterator<Item = (u32, Kind, Cache)> {
        let l3 = self.l3.map(|l3| (3, Kind::Unified, l3));
        [(1, Kind::Data, self.l1d), (1, Kind::Instruction, self.l1i), (2, Kind::Unified, self.l2)]
            .into_iter()
            .chain(l3)
    }

    /// What a processor's leaf 4 (or AMD's 8000_001Dh, which looks the same) tells, subleaf by subleaf. `None` if it tells
    /// of no level 1 or 2. All cores that share a level 3 cache make a die.
    #[must_use]
    pub fn read(leaf: impl Fn(u32) -> [u32; 4]) -> Option<Self> {
        let mut found = [None; 4];
        for [eax, ebx, ecx, _] in (0..8).map(leaf).take_while(|r| r[0] & 31 != 0) {
            let (kind, level) = (eax & 31, eax >> 5 & 7);
            let (line, parts, ways) = ((ebx & 0xfff) + 1, (ebx >> 12 & 0x3ff) + 1, (ebx >> 22) + 1);
            let bytes =
                [line, parts, ways].into_iter().try_fold(u64::from(ecx) + 1, |n, f| n.checked_mul(f.into()));
            let Some(kib) = bytes.and_then(|b| u32::try_from(b >> 10).ok()) else { continue };
            let at = match (level, kind) {
                (1, 1) => 0,
                (1, 2) => 1,
                (2, _) => 2,
                (3, _) => 3,
                _ => continue,
            };
            let sharing = if level == 3 { Level::Die } else { Level::Core };
            found[at] = Some(cache(kib, ways, sharing).resized(kib));
        }
        let [l1d, l1i, l2, l3] = found;
        Some(Self { l1d: l1d?, l1i: l1i?, l2: l2?, l3 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_of_the_catalogue_are_whole() {
        for (name, caches) in NAMED {
            for (level, _, c) in caches.iter() {
                let size = u64::from(c.sets()) * u64::from(c.ways) * u64::from(LINE);
                assert_eq!(size, u64::from(c.kib) << 10, "{name} L{level}");
            }
        }
    }

    #[test]
    fn ways_follow_the_size() {
        let l3 = cache(16 << 10, 16, Level::Die);
        assert_eq!((l3.resized(32 << 10).ways, l3.resized(32 << 10).sets()), (16, 32768));
        assert_eq!(cache(32, 8, Level::Core).resized(48).ways, 8);
        assert_eq!(l3.resized(11).ways, 16);
        assert_eq!(l3.amd_ways(), 8);
        assert_eq!(cache(48, 12, Level::Core).amd_ways(), 9);
    }

    proptest! {
        #[test]
        fn every_size_has_its_sets(kib in 4_u32..1 << 23) {
            let c = cache(32, 8, Level::Core).resized(kib);
            prop_assert_eq!(u64::from(c.sets()) * u64::from(c.ways) * 64, u64::from(kib) << 10);
        }

        #[test]
        fn whatever_a_processor_says_is_read(all in proptest::collection::vec(any::<[u32; 4]>(), 8)) {
            let _ = Caches::read(|i| all[i as usize]);
        }
    }
}
