//! CPU models as data.

use crate::features::{FEATURES, Feature, FeatureSet, feature};

/// What a guest is told its processor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuModel {
    /// Its name on the command line.
    pub name: &'static str,
    /// The 12 letters of CPUID leaf 0.
    pub vendor: [u8; 12],
    /// Display family, model and stepping.
    pub signature: (u32, u32, u32),
    /// Brand string, up to 47 bytes.
    pub brand: &'static str,
    /// What it has.
    pub features: FeatureSet,
    /// What it does without where the accelerator or the host lacks it; everything else must be there.
    pub optional: FeatureSet,
}

/// Why a model cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// No such model.
    #[error("there is no CPU model {0:?}; known are {known}", known = names())]
    Unknown(String),
    /// No such flag.
    #[error("there is no CPU feature {0:?}{hint}", hint = hint(.0))]
    UnknownFeature(String),
}

fn names() -> String {
    models().iter().map(|m| m.name).collect::<Vec<_>>().join(", ")
}

/// Features that have the word as a part, for errors.
fn hint(word: &str) -> String {
    let like: Vec<_> =
        FEATURES.iter().map(|f| f.name).filter(|n| n.contains(word) || word.contains(n)).collect();
    if like.is_empty() { String::new() } else { format!(" (perhaps {}?)", like.join(" or ")) }
}

/// What x86-64 begins with, and a PC's operating systems take for granted.
const BASELINE: &[&str] = &[
    "fpu",
    "vme",
    "de",
    "pse",
    "tsc",
    "msr",
    "pae",
    "mce",
    "cx8",
    "apic",
    "sep",
    "mtrr",
    "pge",
    "mca",
    "cmov",
    "pat",
    "pse36",
    "clflush",
    "mmx",
    "fxsr",
    "sse",
    "sse2",
    "syscall",
    "nx",
    "lm",
    "hypervisor",
];

/// x86-64-v2 beyond that (x86-64 psABI, "Micro-Architecture Levels").
const V2: &[&str] = &["cx16", "lahf-lm", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3"];

/// What the default model has beyond v2: everything that costs nothing in software and makes guests
/// safer or faster.
const TEREM: &[&str] = &[
    "aes",
    "pclmulqdq",
    "movbe",
    "rdrand",
    "rdseed",
    "xsave",
    "xsaveopt",
    "xgetbv1",
    "fsgsbase",
    "smep",
    "smap",
    "umip",
    "erms",
    "fsrm",
    "pcid",
    "invpcid",
    "pdpe1gb",
    "rdtscp",
    "rdpid",
    "x2apic",
    "tsc-deadline",
    "tsc-adjust",
    "arat",
    "clflushopt",
    "clwb",
    "invtsc",
    "3dnowprefetch",
];

/// x86-64-v3 beyond v2, and what operating systems need for it.
const V3: &[&str] =
    &["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave", "xsaveopt", "xsavec", "xgetbv1"];

/// What `max` has beyond v3 and the default model. MONITOR is left to those who ask for it: it can do no
/// better in software than look again and again.
const MAX: &[&str] = &["adx", "pku", "sha-ni", "vaes", "vpclmulqdq", "xsaves"];

/// The catalogue; the first is the default.
///
/// Family 15 is what other emulators show as their default as well: guests know it as a processor
/// without the speculation flaws of later ones, which is true of a software CPU.
#[must_use]
pub fn models() -> Vec<CpuModel> {
    let model = |name, brand, sets: &[&[&str]]| CpuModel {
        name,
        vendor: *b"AuthenticAMD",
        signature: (15, 107, 1),
        brand,
        features: FeatureSet::of(&sets.concat()),
        optional: FeatureSet::default(),
    };
    let max = model("max", "Teremok virtual CPU (max)", &[BASELINE, V2, V3, TEREM, MAX]);
    vec![
        model("terem64", "Teremok virtual CPU", &[BASELINE, V2, TEREM]),
        model("x86-64-v1", "Teremok virtual CPU (x86-64-v1)", &[BASELINE]),
        model("x86-64-v2", "Teremok virtual CPU (x86-64-v2)", &[BASELINE, V2]),
        model("x86-64-v3", "Teremok virtual CPU (x86-64-v3)", &[BASELINE, V2, V3]),
        CpuModel { optional: max.features.clone(), ..max },
    ]
}

impl CpuModel {
    /// Leaves out those optional features that `available` does not have.
    pub fn leave_out_what_is_not_in(&mut self, available: &FeatureSet) {
        let missing = FeatureSet::of(&self.optional.missing_from(available));
        self.features.remove(&missing);
    }

    /// The model `name` with `flags` (`+aes`, `-sse4.2`) applied in order.
    ///
    /// # Errors
    /// All unknown names, not just the first.
    pub fn find(name: &str, flags: &[String]) -> Result<Self, Vec<ModelError>> {
        let mut errors = Vec::new();
        let found = models().into_iter().find(|m| m.name == name);
        if found.is_none() {
            errors.push(ModelError::Unknown(name.into()));
        }
        let mut changes: Vec<(&'static Feature, bool)> = Vec::new();
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
        let Some(mut model) = found.filter(|_| errors.is_empty()) else { return Err(errors) };
        for (f, on) in changes {
            model.features.set(f, on);
            // What somebody asks for by name is not left out in silence.
            model.optional.set(f, false);
        }
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_in_the_catalogue_is_a_feature() {
        for name in [BASELINE, V2, V3, TEREM, MAX].concat() {
            assert!(feature(name).is_some(), "{name}");
        }
    }

    #[test]
    fn only_max_does_without_and_not_without_what_was_asked_for() {
        assert!(models().iter().all(|m| m.optional == FeatureSet::default() || m.name == "max"));
        let max = CpuModel::find("max", &["+avx2".into()]).unwrap();
        assert!(max.features.has("avx2") && !max.optional.has("avx2") && max.optional.has("fma"));
        let mut here = max.clone();
        here.leave_out_what_is_not_in(&FeatureSet::of(&["aes", "bmi1"]));
        assert!(here.features.has("bmi1") && !here.features.has("fma") && here.features.has("avx2"));
    }

    #[test]
    fn flags_are_applied_in_order_and_errors_come_together() {
        let m = CpuModel::find("terem64", &["-aes".into(), "+aes".into(), "-sse4_2".into()]).unwrap();
        assert!(m.features.has("aes") && !m.features.has("sse4.2"));
        let errors = CpuModel::find("i386", &["+warp".into(), "-avx99".into()]).unwrap_err();
        assert_eq!(errors.len(), 3);
        assert!(errors[0].to_string().contains("terem64, x86-64-v1"));
    }
}
