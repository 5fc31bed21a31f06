//! What a guest of the software CPU can be given.

use terem_cpu::{FeatureSet, given_to_all};

/// Features that are done here, whatever the host.
const EVERYWHERE: &[&str] = &[
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
    "mmxext",
    "fxsr",
    "sse",
    "sse2",
    "ss",
    "monitor",
    "cx16",
    "pcid",
    "movbe",
    "popcnt",
    "xsave",
    "rdrand",
    "fsgsbase",
    "tsc-adjust",
    "smep",
    "erms",
    "invpcid",
    "rdseed",
    "smap",
    "clflushopt",
    "clwb",
    "umip",
    "pku",
    "rdpid",
    "fsrm",
    "fzrm",
    "fsrs",
    "fsrc",
    "xsaveopt",
    "xsavec",
    "xgetbv1",
    "xsaves",
    "syscall",
    "nx",
    "pdpe1gb",
    "rdtscp",
    "lm",
    "lahf-lm",
    "abm",
    "3dnowprefetch",
    "invtsc",
];

/// The features that the software CPU can give to a guest on this host: what is done here, and those vector extensions
/// that the host's processor has.
#[must_use]
pub fn supported_features() -> FeatureSet {
    let vex = crate::vex::available();
    let of_the_host = [
        ("sse3", is_x86_feature_detected!("sse3")),
        ("ssse3", is_x86_feature_detected!("ssse3")),
        ("sse4.1", is_x86_feature_detected!("sse4.1")),
        ("sse4.2", is_x86_feature_detected!("sse4.2")),
        ("aes", is_x86_feature_detected!("aes")),
        ("pclmulqdq", is_x86_feature_detected!("pclmulqdq")),
        ("avx", vex),
        ("avx2", vex && is_x86_feature_detected!("avx2")),
        ("fma", vex && is_x86_feature_detected!("fma")),
        ("f16c", vex && is_x86_feature_detected!("f16c")),
        ("bmi1", vex && is_x86_feature_detected!("bmi1")),
        ("bmi2", vex && is_x86_feature_detected!("bmi2")),
        ("adx", vex && is_x86_feature_detected!("adx")),
        ("sha-ni", vex && is_x86_feature_detected!("sha")),
        ("vaes", vex && is_x86_feature_detected!("vaes")),
        ("vpclmulqdq", vex && is_x86_feature_detected!("vpclmulqdq")),
    ];
    let there: Vec<&str> = of_the_host.iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
    FeatureSet::of(EVERYWHERE).or(&FeatureSet::of(&there)).or(&given_to_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_feature() {
        assert_eq!(FeatureSet::of(EVERYWHERE).len() as usize, EVERYWHERE.len());
        assert!(supported_features().has("x2apic") && !supported_features().has("avx512f"));
    }
}
