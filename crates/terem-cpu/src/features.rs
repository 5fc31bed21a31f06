//! CPU features by the names that QEMU and Linux use, and where the processor shows them.

use std::collections::HashMap;
use std::fmt;
use std::sync::OnceLock;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::feature_words::WORDS;

/// A result register of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the registers' own names")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Where a processor shows up to 32 of its features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A register of a CPUID leaf.
    Cpuid {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
        /// The register that shows it.
        register: Register,
    },
    /// The low half of a model-specific register that reports and takes no orders.
    Msr(u32),
}

/// One feature bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// The name on the command line (`+aes`).
    pub name: &'static str,
    /// Where it is shown.
    pub place: Place,
    /// The bit there.
    pub bit: u8,
    /// The place's number in [`WORDS`].
    word: usize,
}

/// Names that Linux, QEMU or a manual use besides, and what they are here. Spellings with other or no signs between letters
/// are known without an entry.
const OTHER_NAMES: &[(&str, &str)] = &[
    ("pni", "sse3"),
    ("xd", "nx"),
    ("i64", "lm"),
    ("ffxsr", "fxsr-opt"),
    ("pclmuldq", "pclmulqdq"),
    ("lzcnt", "abm"),
    ("sha", "sha-ni"),
    ("tsc-deadline-timer", "tsc-deadline"),
    ("htt", "ht"),
    ("hv", "hypervisor"),
];

/// All features, in the order of [`WORDS`] (Intel SDM vol. 2 "CPUID"; AMD APM vol. 3 appendix E).
pub fn features() -> impl Iterator<Item = Feature> {
    WORDS.iter().enumerate().flat_map(|(word, (place, names))| {
        let named = (0..).zip(names.split_whitespace()).filter(|(_, name)| *name != "-");
        named.map(move |(bit, name)| Feature { name, place: *place, bit, word })
    })
}

/// Features by their name without signs.
fn index() -> &'static HashMap<String, Feature> {
    static INDEX: OnceLock<HashMap<String, Feature>> = OnceLock::new();
    INDEX.get_or_init(|| {
        let mut index: HashMap<_, _> = features().map(|f| (plain(f.name), f)).collect();
        for (other, name) in OTHER_NAMES {
            if let Some(feature) = index.get(&plain(name)).copied() {
                index.insert(plain(other), feature);
            }
        }
        index
    })
}

/// A name as it is compared: in small letters, and without the signs that every list sets differently.
fn plain(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

/// The feature of this name (`sse4_1`, `sse4-1` and `SSE4.1` are the same).
#[must_use]
pub fn feature(name: &str) -> Option<Feature> {
    index().get(&plain(name)).copied()
}

/// The feature spelled just so: for what the program itself asks, often.
fn exact(name: &str) -> Option<Feature> {
    static INDEX: OnceLock<HashMap<&'static str, Feature>> = OnceLock::new();
    INDEX.get_or_init(|| features().map(|f| (f.name, f)).collect()).get(name).copied()
}

/// A set of features.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct FeatureSet([u32; WORDS.len()]);

impl fmt::Debug for FeatureSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

impl FeatureSet {
    /// The features of these names; names of no feature are left out.
    #[must_use]
    pub fn of(names: &[&str]) -> Self {
        let mut set = Self::default();
        names.iter().filter_map(|n| feature(n)).for_each(|f| set.set(f, true));
        set
    }

    /// What the registers show that `read` gives, bits without a name left out.
    #[must_use]
    pub fn read(mut read: impl FnMut(Place) -> u32) -> Self {
        let mut set = Self::default();
        for (word, (place, _)) in set.0.iter_mut().zip(WORDS) {
            *word = read(place);
        }
        set.and(&Self::all())
    }

    /// Every feature that has a name.
    #[must_use]
    pub fn all() -> Self {
        let mut set = Self::default();
        features().for_each(|f| set.set(f, true));
        set
    }

    /// Whether it has the feature of this name, spelled as [`features`] has it.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        exact(name).is_some_and(|f| self.contains(f))
    }

    /// Whether it has this feature.
    #[must_use]
    pub fn contains(&self, f: Feature) -> bool {
        self.0[f.word] >> f.bit & 1 != 0
    }

    /// Puts a feature in or takes it out.
    pub fn set(&mut self, f: Feature, on: bool) {
        self.0[f.word] = self.0[f.word] & !(1 << f.bit) | u32::from(on) << f.bit;
    }

    /// Its features.
    pub fn iter(&self) -> impl Iterator<Item = Feature> {
        features().filter(|f| self.contains(*f))
    }

    /// Their names in alphabetical order.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.iter().map(|f| f.name).collect();
        names.sort_unstable();
        names
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.0.iter().map(|w| w.count_ones()).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn zip(&self, other: &Self, with: impl Fn(u32, u32) -> u32) -> Self {
        let mut set = *self;
        set.0.iter_mut().zip(other.0).for_each(|(a, b)| *a = with(*a, b));
        set
    }

    /// Those that both have.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    /// Those that either has.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    /// Those that are not in `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    /// The names of those that are not in `other`, in alphabetical order.
    #[must_use]
    pub fn missing_from(&self, other: &Self) -> Vec<&'static str> {
        self.without(other).names()
    }

    /// The bits that this place shows.
    #[must_use]
    pub fn bits(&self, place: Place) -> u32 {
        WORDS.iter().position(|(p, _)| *p == place).map_or(0, |word| self.0[word])
    }

    /// The highest CPUID leaf of each range that shows one of them, and the highest subleaf of leaf 7.
    #[must_use]
    pub(crate) fn highest_leaves(&self) -> (u32, u32, u32) {
        let (mut basic, mut extended, mut seven) = (0, 0, 0);
        for ((place, _), bits) in WORDS.iter().zip(self.0) {
            if let Place::Cpuid { leaf, subleaf, .. } = *place
                && bits != 0
            {
                let range = if leaf < 0x4000_0000 { &mut basic } else { &mut extended };
                *range = leaf.max(*range);
                seven = if leaf == 7 { subleaf.max(seven) } else { seven };
            }
        }
        (basic, extended, seven)
    }
}

impl Serialize for FeatureSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

impl<'de> Deserialize<'de> for FeatureSet {
    /// Names of no feature are left out: a later version may have written them.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names = Vec::<String>::deserialize(deserializer)?;
        Ok(Self::of(&names.iter().map(String::as_str).collect::<Vec<_>>()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const fn ecx(leaf: u32) -> Place {
        Place::Cpuid { leaf, subleaf: 0, register: Register::Ecx }
    }

    #[test]
    fn names_and_places_are_unique_and_words_hold_32() {
        let names: BTreeSet<_> = features().map(|f| plain(f.name)).collect();
        let places: BTreeSet<_> = features().map(|f| (f.place, f.bit)).collect();
        assert_eq!((names.len(), places.len()), (features().count(), features().count()));
        assert!(features().all(|f| f.bit < 32));
        assert!(names.len() > 250, "{}", names.len());
        for (other, name) in OTHER_NAMES {
            assert!(exact(name).is_some() && !names.contains(&plain(other)), "{other} {name}");
        }
    }

    #[test]
    fn spellings_of_peers_are_known() {
        for (theirs, ours) in [
            ("sse4_1", "sse4.1"),
            ("SSE4-1", "sse4.1"),
            ("lahf_lm", "lahf-lm"),
            ("pni", "sse3"),
            ("avx512_vnni", "avx512vnni"),
            ("avx512_vpopcntdq", "avx512-vpopcntdq"),
            ("cr8_legacy", "cr8legacy"),
        ] {
            assert_eq!(feature(theirs).unwrap().name, ours);
        }
        assert_eq!(FeatureSet::of(&["sse2", "aes"]).bits(ecx(1)), 1 << 25);
    }

    #[test]
    fn registers_and_names_say_the_same() {
        let set = FeatureSet::of(&["aes", "topoext", "rdctl-no", "avx-vnni", "ht"]);
        assert_eq!(FeatureSet::read(|place| set.bits(place)), set);
        assert_eq!(FeatureSet::read(|_| u32::MAX), FeatureSet::all());
        let json = serde_json::to_string(&set).unwrap();
        assert_eq!(json, r#"["aes","avx-vnni","ht","rdctl-no","topoext"]"#);
        let later = json.replace("\"ht\"", "\"ht\",\"of-the-year-2050\"");
        assert_eq!(serde_json::from_str::<FeatureSet>(&later).unwrap(), set);
    }

    #[test]
    fn sets_are_combined() {
        let (a, b) = (FeatureSet::of(&["aes", "avx"]), FeatureSet::of(&["avx", "fma"]));
        assert_eq!(a.and(&b).names(), ["avx"]);
        assert_eq!(a.or(&b).names(), ["aes", "avx", "fma"]);
        assert_eq!(a.missing_from(&b), ["aes"]);
        assert_eq!((a.len(), a.is_empty()), (2, false));
    }

    #[test]
    fn features_say_which_leaves_they_need() {
        assert_eq!(FeatureSet::of(&["sse2", "lm"]).highest_leaves(), (1, 0x8000_0001, 0));
        assert_eq!(FeatureSet::of(&["mcdt-no", "clzero"]).highest_leaves(), (7, 0x8000_0008, 2));
    }
}
