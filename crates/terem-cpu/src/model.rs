//! CPU models: what a guest is told its processor is.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::cache::Caches;
use crate::catalogue;
use crate::features::{Feature, FeatureSet, feature, features};
use crate::host::HostCpu;

/// The 12 letters of CPUID leaf 0.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Vendor(pub [u8; 12]);

impl Vendor {
    /// Intel.
    pub const INTEL: Self = Self(*b"GenuineIntel");
    /// AMD.
    pub const AMD: Self = Self(*b"AuthenticAMD");
    /// Hygon, whose processors come from AMD's.
    pub const HYGON: Self = Self(*b"HygonGenuine");

    /// Whether its processors have CPUID leaves as AMD defines them, where those differ from Intel's.
    #[must_use]
    pub fn is_like_amd(self) -> bool {
        self == Self::AMD || self == Self::HYGON
    }
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{}", char::from(*b)))
    }
}

impl fmt::Debug for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Vendor> for String {
    fn from(vendor: Vendor) -> Self {
        vendor.to_string()
    }
}

impl TryFrom<String> for Vendor {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.as_bytes().try_into().map(Self).map_err(|_| format!("a vendor has 12 letters, not {text:?}"))
    }
}

/// Display family, model and stepping (Intel SDM vol. 2, CPUID leaf 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Signature {
    /// Family, extended family added.
    pub family: u32,
    /// Model, extended model before it.
    pub model: u32,
    /// Stepping.
    pub stepping: u32,
}

impl Signature {
    /// Leaf 1's packing.
    #[must_use]
    pub fn pack(self) -> u32 {
        let Self { family, model, stepping } = self;
        let (base, extended) = if family >= 15 { (15, family - 15) } else { (family, 0) };
        stepping & 15 | (model & 15) << 4 | base << 8 | (model >> 4 & 15) << 16 | (extended & 255) << 20
    }

    /// From leaf 1's packing.
    #[must_use]
    pub fn unpack(eax: u32) -> Self {
        let base = eax >> 8 & 15;
        let extended = if base == 15 { eax >> 20 & 255 } else { 0 };
        let high = if base == 6 || base == 15 { eax >> 16 & 15 } else { 0 };
        Self { family: base + extended, model: high << 4 | eax >> 4 & 15, stepping: eax & 15 }
    }
}

/// What a guest is told its processor is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CpuModel {
    /// Its name on the command line.
    pub name: String,
    /// Names that it has besides.
    pub aliases: Vec<String>,
    /// Who makes such processors; leaves look as this vendor has them.
    pub vendor: Vendor,
    /// Family, model and stepping.
    pub signature: Signature,
    /// Brand string, up to 47 bytes.
    pub brand: String,
    /// Highest basic and highest extended CPUID leaf; features that are shown in higher ones raise them.
    pub levels: (u32, u32),
    /// Its caches.
    pub caches: Caches,
    /// Version of AVX10, 0 without.
    pub avx10: u8,
    /// What it has.
    pub features: FeatureSet,
    /// What it does without where the accelerator or the host lacks it; everything else must be there.
    #[serde(skip)]
    pub optional: FeatureSet,
}

/// Why a model cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// No such model.
    #[error("there is no CPU model {0:?}{like}; `terem cpu models` lists them", like = models_like(.0))]
    Unknown(String),
    /// No such flag.
    #[error("there is no CPU feature {0:?}{hint}", hint = features_like(.0))]
    UnknownFeature(String),
    /// What `host` is has to be looked up, and has not been.
    #[error("the CPU model `host` needs a host")]
    NoHost,
}

fn perhaps(like: &[String]) -> String {
    if like.is_empty() { String::new() } else { format!(" (perhaps {}?)", like.join(" or ")) }
}

/// Models that have the word as a part, for errors.
fn models_like(word: &str) -> String {
    let word = word.to_lowercase();
    let all = catalogue::models();
    let names = all.iter().flat_map(|m| std::iter::once(&m.name).chain(&m.aliases));
    let like = |n: &&String| {
        let name = n.to_lowercase();
        name.contains(&word) || word.contains(&name)
    };
    perhaps(&names.filter(like).take(4).cloned().collect::<Vec<_>>())
}

/// Features that have the word as a part, for errors.
fn features_like(word: &str) -> String {
    let like = |n: &&str| n.contains(word) || n.len() > 2 && word.contains(n);
    perhaps(&features().map(|f| f.name).filter(like).take(4).map(String::from).collect::<Vec<_>>())
}

impl CpuModel {
    /// The model `name` with `flags` (`+aes`, `-sse4.2`) applied in order.
    ///
    /// # Errors
    /// All unknown names, not just the first.
    pub fn find(name: &str, flags: &[String]) -> Result<Self, Vec<ModelError>> {
        Self::find_on(None, name, flags)
    }

    /// The same, with `host` among the models.
    ///
    /// # Errors
    /// All unknown names, not just the first.
    pub fn find_on(host: Option<&HostCpu>, name: &str, flags: &[String]) -> Result<Self, Vec<ModelError>> {
        let found = match (name, host) {
            ("host", Some(host)) => Ok(Self::of_host(host)),
            ("host", None) => Err(ModelError::NoHost),
            _ => catalogue::find(name).ok_or_else(|| ModelError::Unknown(name.into())),
        };
        let mut errors = Vec::new();
        let mut changes: Vec<(Feature, bool)> = Vec::new();
        for flag in flags {
            let (on, word) = match flag.strip_prefix('-') {
                Some(word) => (false, word),
                None => (true, flag.strip_prefix('+').unwrap_or(flag)),
            };
            match feature(word) {
                Some(f) => changes.push((f, on)),
                None => errors.push(ModelError::UnknownFeature(word.into())),
            }
        }
        match found {
            Ok(mut model) if errors.is_empty() => {
                for (f, on) in changes {
                    model.features.set(f, on);
                    // What somebody asks for by name is not left out in silence.
                    model.optional.set(f, false);
                }
                Ok(model)
            }
            Ok(_) => Err(errors),
            Err(error) => {
                errors.insert(0, error);
                Err(errors)
            }
        }
    }

    /// A host's own processor: everything that it has and a guest may have, where the accelerator can give it.
    fn of_host(host: &HostCpu) -> Self {
        let features = host.features.or(&catalogue::given_to_all()).without(&catalogue::not_for_guests());
        let levels = catalogue::OWN_LEVELS;
        Self {
            name: "host".into(),
            aliases: Vec::new(),
            vendor: host.vendor,
            signature: host.signature,
            brand: host.brand.clone(),
            levels: (host.levels.0.min(levels.0), host.levels.1.min(levels.1)),
            caches: host.caches,
            avx10: host.avx10,
            features,
            optional: features,
        }
    }

    /// Leaves out those optional features that `available` does not have, and says which.
    pub fn leave_out_what_is_not_in(&mut self, available: &FeatureSet) -> Vec<&'static str> {
        let missing = self.features.and(&self.optional).without(available);
        self.features = self.features.without(&missing);
        missing.names()
    }

    /// Whether everything that it must have is in `available`.
    #[must_use]
    pub fn runs_with(&self, available: &FeatureSet) -> bool {
        self.features.without(&self.optional).without(available).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_models_do_without_what_they_can() {
        let optional = |name| CpuModel::find(name, &[]).unwrap().optional;
        assert!(optional("x86-64-v3").is_empty() && optional("EPYC-Rome").is_empty());
        assert!(!optional("terem64").has("sse2") && optional("terem64").has("aes"));
        let max = CpuModel::find("max", &["+avx2".into()]).unwrap();
        assert!(max.features.has("avx2") && !max.optional.has("avx2") && max.optional.has("fma"));
        let mut here = max.clone();
        let out = here.leave_out_what_is_not_in(&FeatureSet::of(&["aes", "bmi1"]));
        assert!(here.features.has("bmi1") && !here.features.has("fma") && here.features.has("avx2"));
        assert!(out.contains(&"fma") && !out.contains(&"avx2"));
        assert!(!max.runs_with(&FeatureSet::of(&["aes"])) && max.runs_with(&FeatureSet::of(&["avx2"])));
    }

    #[test]
    fn flags_are_applied_in_order_and_errors_come_together() {
        let m = CpuModel::find("terem64", &["-aes".into(), "+aes".into(), "-sse4_2".into()]).unwrap();
        assert!(m.features.has("aes") && !m.features.has("sse4.2"));
        let errors = CpuModel::find("i386", &["+warp".into(), "-avx99".into()]).unwrap_err();
        assert_eq!(errors.len(), 3);
        let text = |name: &str| CpuModel::find(name, &[]).unwrap_err()[0].to_string();
        assert!(text("rome").contains("perhaps EPYC-Rome-v1 or"), "{}", text("rome"));
        assert!(errors[2].to_string().contains("perhaps avx?"), "{}", errors[2]);
        assert_eq!(CpuModel::find("host", &[]).unwrap_err(), [ModelError::NoHost]);
    }

    #[test]
    fn signatures_are_packed_as_the_manuals_say() {
        let all = [(6, 143, 4), (15, 107, 1), (23, 49, 0), (25, 17, 0), (5, 2, 12)];
        for (family, model, stepping) in all {
            let s = Signature { family, model, stepping };
            assert_eq!(Signature::unpack(s.pack()), s);
        }
        assert_eq!(Signature { family: 25, model: 17, stepping: 0 }.pack(), 0x00a1_0f10);
    }
}
