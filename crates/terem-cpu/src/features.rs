//! CPU features by the names that QEMU and Linux use, and where CPUID shows them.

use std::collections::BTreeSet;
use std::fmt;

/// A result register of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the registers' own names")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One feature bit.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Feature {
    /// The name on the command line (`+aes`).
    pub name: &'static str,
    /// CPUID leaf.
    pub leaf: u32,
    /// CPUID subleaf.
    pub subleaf: u32,
    /// The register that shows it.
    pub register: Register,
    /// The bit there.
    pub bit: u8,
}

const fn f(name: &'static str, leaf: u32, subleaf: u32, register: Register, bit: u8) -> Feature {
    Feature { name, leaf, subleaf, register, bit }
}

use Register::{Eax, Ebx, Ecx, Edx};

/// All features that a model may name (Intel SDM vol. 2 "CPUID"; AMD APM vol. 3 appendix E).
pub const FEATURES: &[Feature] = &[
    f("fpu", 1, 0, Edx, 0),
    f("vme", 1, 0, Edx, 1),
    f("de", 1, 0, Edx, 2),
    f("pse", 1, 0, Edx, 3),
    f("tsc", 1, 0, Edx, 4),
    f("msr", 1, 0, Edx, 5),
    f("pae", 1, 0, Edx, 6),
    f("mce", 1, 0, Edx, 7),
    f("cx8", 1, 0, Edx, 8),
    f("apic", 1, 0, Edx, 9),
    f("sep", 1, 0, Edx, 11),
    f("mtrr", 1, 0, Edx, 12),
    f("pge", 1, 0, Edx, 13),
    f("mca", 1, 0, Edx, 14),
    f("cmov", 1, 0, Edx, 15),
    f("pat", 1, 0, Edx, 16),
    f("pse36", 1, 0, Edx, 17),
    f("clflush", 1, 0, Edx, 19),
    f("mmx", 1, 0, Edx, 23),
    f("fxsr", 1, 0, Edx, 24),
    f("sse", 1, 0, Edx, 25),
    f("sse2", 1, 0, Edx, 26),
    f("sse3", 1, 0, Ecx, 0),
    f("pclmulqdq", 1, 0, Ecx, 1),
    f("monitor", 1, 0, Ecx, 3),
    f("ssse3", 1, 0, Ecx, 9),
    f("fma", 1, 0, Ecx, 12),
    f("cx16", 1, 0, Ecx, 13),
    f("pcid", 1, 0, Ecx, 17),
    f("sse4.1", 1, 0, Ecx, 19),
    f("sse4.2", 1, 0, Ecx, 20),
    f("x2apic", 1, 0, Ecx, 21),
    f("movbe", 1, 0, Ecx, 22),
    f("popcnt", 1, 0, Ecx, 23),
    f("tsc-deadline", 1, 0, Ecx, 24),
    f("aes", 1, 0, Ecx, 25),
    f("xsave", 1, 0, Ecx, 26),
    f("avx", 1, 0, Ecx, 28),
    f("f16c", 1, 0, Ecx, 29),
    f("rdrand", 1, 0, Ecx, 30),
    f("hypervisor", 1, 0, Ecx, 31),
    f("arat", 6, 0, Eax, 2),
    f("fsgsbase", 7, 0, Ebx, 0),
    f("tsc-adjust", 7, 0, Ebx, 1),
    f("bmi1", 7, 0, Ebx, 3),
    f("avx2", 7, 0, Ebx, 5),
    f("smep", 7, 0, Ebx, 7),
    f("bmi2", 7, 0, Ebx, 8),
    f("erms", 7, 0, Ebx, 9),
    f("invpcid", 7, 0, Ebx, 10),
    f("rdseed", 7, 0, Ebx, 18),
    f("adx", 7, 0, Ebx, 19),
    f("smap", 7, 0, Ebx, 20),
    f("clflushopt", 7, 0, Ebx, 23),
    f("clwb", 7, 0, Ebx, 24),
    f("sha-ni", 7, 0, Ebx, 29),
    f("umip", 7, 0, Ecx, 2),
    f("pku", 7, 0, Ecx, 3),
    f("vaes", 7, 0, Ecx, 9),
    f("vpclmulqdq", 7, 0, Ecx, 10),
    f("rdpid", 7, 0, Ecx, 22),
    f("fsrm", 7, 0, Edx, 4),
    f("xsaveopt", 0xd, 1, Eax, 0),
    f("xsavec", 0xd, 1, Eax, 1),
    f("xgetbv1", 0xd, 1, Eax, 2),
    f("xsaves", 0xd, 1, Eax, 3),
    f("syscall", 0x8000_0001, 0, Edx, 11),
    f("nx", 0x8000_0001, 0, Edx, 20),
    f("pdpe1gb", 0x8000_0001, 0, Edx, 26),
    f("rdtscp", 0x8000_0001, 0, Edx, 27),
    f("lm", 0x8000_0001, 0, Edx, 29),
    f("lahf-lm", 0x8000_0001, 0, Ecx, 0),
    f("cmp-legacy", 0x8000_0001, 0, Ecx, 1),
    f("abm", 0x8000_0001, 0, Ecx, 5),
    f("3dnowprefetch", 0x8000_0001, 0, Ecx, 8),
    f("topoext", 0x8000_0001, 0, Ecx, 22),
    f("invtsc", 0x8000_0007, 0, Edx, 8),
];

/// The feature of this name (`_` and `-` are the same; `sse4_1` is `sse4.1`).
#[must_use]
pub fn feature(name: &str) -> Option<&'static Feature> {
    let plain = |s: &str| s.to_ascii_lowercase().replace(['_', '.'], "-");
    let name = plain(name);
    FEATURES.iter().find(|f| plain(f.name) == name)
}

/// A set of features.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct FeatureSet(BTreeSet<&'static str>);

impl fmt::Debug for FeatureSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(&self.0).finish()
    }
}

impl FeatureSet {
    /// The features of these names; names that [`FEATURES`] does not have are left out.
    #[must_use]
    pub fn of(names: &[&str]) -> Self {
        Self(names.iter().filter_map(|n| feature(n)).map(|f| f.name).collect())
    }

    /// Whether it has the feature of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        feature(name).is_some_and(|f| self.0.contains(f.name))
    }

    /// Puts a feature in or takes it out.
    pub fn set(&mut self, feature: &'static Feature, on: bool) {
        if on {
            self.0.insert(feature.name);
        } else {
            self.0.remove(feature.name);
        }
    }

    /// The features that are not in `other`.
    #[must_use]
    pub fn missing_from(&self, other: &Self) -> Vec<&'static str> {
        self.0.difference(&other.0).copied().collect()
    }

    /// Without those of `other`.
    pub fn remove(&mut self, other: &Self) {
        self.0.retain(|name| !other.0.contains(name));
    }

    /// The bits that CPUID shows in this register.
    #[must_use]
    pub fn bits(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        let shown = |f: &&Feature| f.leaf == leaf && f.subleaf == subleaf && f.register == register;
        FEATURES.iter().filter(shown).filter(|f| self.0.contains(f.name)).fold(0, |b, f| b | 1 << f.bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_places_are_unique() {
        let names: BTreeSet<_> = FEATURES.iter().map(|f| f.name).collect();
        let places: BTreeSet<_> = FEATURES.iter().map(|f| (f.leaf, f.subleaf, f.register, f.bit)).collect();
        assert_eq!((names.len(), places.len()), (FEATURES.len(), FEATURES.len()));
    }

    #[test]
    fn spellings_of_peers_are_known() {
        for n in ["sse4_1", "sse4.1", "SSE4-1", "lahf_lm", "tsc_adjust"] {
            assert!(feature(n).is_some(), "{n}");
        }
        assert_eq!(FeatureSet::of(&["sse2", "aes"]).bits(1, 0, Ecx), 1 << 25);
    }
}
