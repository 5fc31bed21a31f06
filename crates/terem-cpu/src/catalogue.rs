//! The catalogue of models: our own, which are made of levels, and those of processors, which stand in `data/models.toml`.

use std::sync::OnceLock;

use serde::Deserialize;

use crate::cache::Caches;
use crate::features::FeatureSet;
use crate::model::{CpuModel, Signature, Vendor};

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
    "topoext",
];

/// x86-64-v2 beyond that (x86-64 psABI, "Micro-Architecture Levels").
const V2: &[&str] = &["cx16", "lahf-lm", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3"];

/// x86-64-v3 beyond v2, and what operating systems need for it.
const V3: &[&str] =
    &["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave", "xsaveopt", "xsavec", "xgetbv1"];

/// x86-64-v4 beyond v3.
const V4: &[&str] = &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];

/// What the default model has beyond v2, where it can be had: everything that costs nothing in software and makes guests
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

/// What every accelerator gives, whatever its host: it is about leaves that are made here, or about a local APIC that is
/// not the host's.
const GIVEN_TO_ALL: &[&str] =
    &["hypervisor", "topoext", "ht", "cmp-legacy", "x2apic", "tsc-deadline", "arat"];

/// What `max` and `host` leave out: nested virtualisation, enclaves, tracing and power management, of which a guest gets
/// nothing; what follows the topology and not the model; MONITOR, which is left to those who ask for it, because it halts
/// a host's processor, and can do no better in software than look again and again.
const NOT_FOR_GUESTS: &[&str] = &[
    "vmx",
    "svm",
    "smx",
    "skinit",
    "sgx",
    "sgxlc",
    "intel-pt",
    "ds",
    "dtes64",
    "ds-cpl",
    "acpi",
    "est",
    "tm",
    "tm2",
    "pbe",
    "pn",
    "xtpr",
    "pdcm",
    "dca",
    "cid",
    "ia64",
    "monitor",
    "waitpkg",
    "ht",
    "cmp-legacy",
    "extapic",
    "ibs",
    "wdt",
    "lwp",
    "nodeid-msr",
    "npt",
    "lbrv",
    "svm-lock",
    "nrip-save",
    "tsc-scale",
    "vmcb-clean",
    "flushbyasid",
    "decodeassists",
    "pause-filter",
    "pfthreshold",
    "avic",
    "v-vmsave-vmload",
    "vgif",
    "vnmi",
    "svme-addr-chk",
];

/// Highest leaves of our own models.
pub(crate) const OWN_LEVELS: (u32, u32) = (0x16, 0x8000_0021);

/// Features that every accelerator gives.
#[must_use]
pub fn given_to_all() -> FeatureSet {
    FeatureSet::of(GIVEN_TO_ALL)
}

pub(crate) fn not_for_guests() -> FeatureSet {
    FeatureSet::of(NOT_FOR_GUESTS)
}

/// Our own models; the first is the default.
///
/// Family 15 is what other emulators show as their default as well: guests know it as a processor
/// without the speculation flaws of later ones, which is true of a software CPU.
fn own() -> Vec<CpuModel> {
    let model = |name: &str, sets: &[&[&str]]| CpuModel {
        name: name.into(),
        aliases: Vec::new(),
        vendor: Vendor::AMD,
        signature: Signature { family: 15, model: 107, stepping: 1 },
        brand: if name == "terem64" {
            "Teremok virtual CPU".into()
        } else {
            format!("Teremok virtual CPU ({name})")
        },
        levels: OWN_LEVELS,
        caches: Caches::usual(),
        avx10: 0,
        features: FeatureSet::of(&sets.concat()),
        optional: FeatureSet::default(),
    };
    let terem64 = model("terem64", &[BASELINE, V2, TEREM]);
    let everything = FeatureSet::all().without(&not_for_guests());
    vec![
        CpuModel { optional: terem64.features.without(&FeatureSet::of(BASELINE)), ..terem64 },
        model("x86-64-v1", &[BASELINE]),
        model("x86-64-v2", &[BASELINE, V2]),
        model("x86-64-v3", &[BASELINE, V2, V3]),
        model("x86-64-v4", &[BASELINE, V2, V3, V4]),
        CpuModel { features: everything, optional: everything, ..model("max", &[]) },
    ]
}

/// `data/models.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    model: Vec<First>,
}

/// A name's first version.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct First {
    name: String,
    vendor: Vendor,
    signature: (u32, u32, u32),
    levels: (u32, u32),
    brand: String,
    caches: String,
    features: String,
    #[serde(default)]
    avx10: u8,
    #[serde(default)]
    version: Vec<Later>,
}

/// What a later version changes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Later {
    alias: Option<String>,
    signature: Option<(u32, u32, u32)>,
    levels: Option<(u32, u32)>,
    brand: Option<String>,
    #[serde(default)]
    changes: String,
    avx10: Option<u8>,
}

fn signature((family, model, stepping): (u32, u32, u32)) -> Signature {
    Signature { family, model, stepping }
}

/// All versions of a name.
fn versions(first: &First) -> Vec<CpuModel> {
    let numbered = |number: usize| format!("{}-v{number}", first.name);
    let mut all = vec![CpuModel {
        name: numbered(1),
        aliases: vec![first.name.clone()],
        vendor: first.vendor,
        signature: signature(first.signature),
        brand: first.brand.clone(),
        levels: first.levels,
        caches: Caches::named(&first.caches).unwrap_or(Caches::usual()),
        avx10: first.avx10,
        features: FeatureSet::of(&first.features.split_whitespace().collect::<Vec<_>>()),
        optional: FeatureSet::default(),
    }];
    for later in &first.version {
        let mut model = all[all.len() - 1].clone();
        model.name = numbered(all.len() + 1);
        model.aliases = later.alias.iter().cloned().collect();
        model.signature = later.signature.map_or(model.signature, signature);
        model.levels = later.levels.unwrap_or(model.levels);
        model.avx10 = later.avx10.unwrap_or(model.avx10);
        if let Some(brand) = &later.brand {
            model.brand.clone_from(brand);
        }
        for change in later.changes.split_whitespace() {
            if let Some(f) = crate::features::feature(&change[1..]) {
                model.features.set(f, change.starts_with('+'));
            }
        }
        all.push(model);
    }
    all
}

/// The models of processors. Read once, and only where one is asked for.
fn processors() -> &'static [CpuModel] {
    static ALL: OnceLock<Vec<CpuModel>> = OnceLock::new();
    ALL.get_or_init(|| {
        // A file that is compiled in and tested; were it damaged, its models would be unknown.
        let file: File =
            toml::from_str(include_str!("../data/models.toml")).unwrap_or(File { model: Vec::new() });
        file.model.iter().flat_map(versions).collect()
    })
}

/// All models but `host`; the first is the default.
#[must_use]
pub fn models() -> Vec<CpuModel> {
    let mut all = own();
    all.extend(processors().iter().cloned());
    all
}

/// The model of this name, or with this other name.
pub(crate) fn find(name: &str) -> Option<CpuModel> {
    let named = |m: &&CpuModel| m.name == name || m.aliases.iter().any(|a| a == name);
    own().into_iter().find(|m| named(&m)).or_else(|| processors().iter().find(named).cloned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::feature;
    use std::collections::BTreeSet;

    fn file() -> File {
        toml::from_str(include_str!("../data/models.toml")).unwrap()
    }

    #[test]
    fn every_word_in_the_catalogue_is_known() {
        let file = file();
        let in_file = file.model.iter().flat_map(|m| {
            let changes = m.version.iter().flat_map(|v| v.changes.split_whitespace().map(|c| &c[1..]));
            m.features.split_whitespace().chain(changes)
        });
        let sets = [BASELINE, V2, V3, V4, TEREM, GIVEN_TO_ALL, NOT_FOR_GUESTS].concat();
        for name in in_file.chain(sets.iter().copied()) {
            assert_eq!(feature(name).map(|f| f.name), Some(name));
        }
        for m in &file.model {
            assert!(Caches::named(&m.caches).is_some(), "{}", m.name);
        }
    }

    #[test]
    fn names_are_unique_and_versions_are_found_by_all_of_them() {
        let all = models();
        let names: Vec<&String> =
            all.iter().flat_map(|m| std::iter::once(&m.name).chain(&m.aliases)).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
        assert!(all.len() > 80, "{}", all.len());
        // One of them has 48 bytes and loses its last, the closing parenthesis, to the zero at the end.
        assert!(all.iter().all(|m| m.brand.len() <= 48));
        let found = |name| find(name).unwrap().name;
        assert_eq!(found("EPYC"), "EPYC-v1");
        assert_eq!(found("Skylake-Server-noTSX-IBRS"), "Skylake-Server-v3");
        assert_eq!(found("terem64"), "terem64");
        assert!(find("skylake").is_none());
    }

    #[test]
    fn later_versions_are_changes_of_the_one_before() {
        let (first, second) = (find("Haswell-v1").unwrap(), find("Haswell-v2").unwrap());
        assert_eq!(first.features.missing_from(&second.features), ["hle", "rtm"]);
        assert_eq!(second.brand, "Intel Core Processor (Haswell, no TSX)");
        assert_eq!(find("GraniteRapids-v2").unwrap().avx10, 1);
        assert_eq!(find("GraniteRapids-v1").unwrap().avx10, 0);
    }

    #[test]
    fn levels_hold_each_other() {
        let set = |name| find(name).unwrap().features;
        for pair in ["x86-64-v1", "x86-64-v2", "x86-64-v3", "x86-64-v4", "max"].windows(2) {
            assert_eq!(set(pair[0]).missing_from(&set(pair[1])), [""; 0], "{pair:?}");
        }
        assert!(set("terem64").without(&set("max")).is_empty());
        assert!(!set("max").has("monitor") && !set("max").has("svm"));
        // Processors of these generations have these levels.
        for (name, level) in
            [("Haswell", "x86-64-v3"), ("EPYC", "x86-64-v3"), ("Skylake-Server", "x86-64-v4")]
        {
            let lacks = set(level).without(&given_to_all()).missing_from(&set(name));
            assert!(lacks.iter().all(|f| matches!(*f, "xsavec" | "xgetbv1")), "{name} {lacks:?}");
        }
    }
}
