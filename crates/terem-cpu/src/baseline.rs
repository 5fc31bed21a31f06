//! The largest processor that several hosts can run, for guests that are moved between them.

use serde::Serialize;

use crate::catalogue::{given_to_all, models, not_for_guests};
use crate::features::FeatureSet;
use crate::host::HostCpu;
use crate::model::CpuModel;

/// A model with flags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Baseline {
    /// The largest model that all hosts can run.
    pub model: String,
    /// What they all have besides.
    pub flags: Vec<String>,
    /// What a guest has then.
    pub features: FeatureSet,
    /// Width of physical addresses that all have, in bits.
    pub phys_bits: u8,
}

/// What differs between hosts under the same name: a guest that has moved would find its TSC at another frequency.
const NOT_FOR_MOVING: &[&str] = &["invtsc"];

/// The largest processor that all of these hosts can run; with each host comes what its accelerator can give. `None` for no
/// hosts, and for hosts that do not even have x86-64 in common.
///
/// Where the hosts have one vendor, a model may be of that vendor; otherwise it is one of those that are of none.
#[must_use]
pub fn baseline(hosts: &[(&HostCpu, FeatureSet)]) -> Option<Baseline> {
    let (first, _) = hosts.first()?;
    let same_vendor = hosts.iter().all(|(host, _)| host.vendor == first.vendor);
    let common = hosts.iter().fold(FeatureSet::all(), |all, (_, features)| all.and(features));
    let common = common.without(&FeatureSet::of(NOT_FOR_MOVING)).or(&given_to_all());
    let can_be = |m: &CpuModel| {
        let of_none = m.name.starts_with("x86-64-");
        (of_none || same_vendor && m.vendor == first.vendor && m.optional.is_empty())
            && m.features.without(&common).is_empty()
    };
    let size = |m: &CpuModel| (m.features.len(), m.signature);
    let model = models().into_iter().filter(can_be).max_by_key(size)?;
    let besides = common.without(&model.features).without(&not_for_guests()).without(&given_to_all());
    Some(Baseline {
        flags: besides.names().into_iter().map(|name| format!("+{name}")).collect(),
        features: model.features.or(&besides),
        phys_bits: hosts.iter().map(|(host, _)| host.phys_bits).min()?,
        model: model.name,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cpuid, Topology};

    /// A host with this model's processor, whose accelerator gives all of it.
    fn host(name: &str, flags: &[&str]) -> (HostCpu, FeatureSet) {
        let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
        let model = CpuModel::find(name, &flags).unwrap();
        let features = model.features;
        let cpuid = Cpuid::new(model, Topology::flat(4), 0, 1_000_000, 46);
        (HostCpu::read(|l, s| cpuid.query(l, s).registers), features)
    }

    fn of(hosts: &[(HostCpu, FeatureSet)]) -> Baseline {
        baseline(&hosts.iter().map(|(h, f)| (h, *f)).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn one_host_can_run_itself() {
        // Of Skylake-Server, version 4 differs from 3 in what is no CPU feature.
        for (name, found) in [("Skylake-Server-v3", "Skylake-Server-v4"), ("EPYC-Rome-v4", "EPYC-Rome-v4")] {
            let b = of(&[host(name, &[])]);
            assert_eq!((b.model.as_str(), b.flags.len(), b.phys_bits), (found, 0, 46));
        }
        assert_eq!(of(&[host("Haswell-v4", &["+sha-ni", "+svm", "+invtsc"])]).flags, ["+sha-ni"]);
    }

    #[test]
    fn several_hosts_have_the_largest_in_common() {
        let b = of(&[host("SapphireRapids-v1", &[]), host("Cascadelake-Server-v3", &[])]);
        assert_eq!(b.model, "Cascadelake-Server-v4");
        let b = of(&[host("SapphireRapids-v1", &[]), host("Cascadelake-Server-v3", &["-avx512vnni"])]);
        assert!(b.model.starts_with("Skylake-Server-v") && !b.features.has("avx512vnni"), "{b:?}");
        assert!(b.flags.contains(&"+rdctl-no".into()), "{:?}", b.flags);
        for (_, features) in [host("SapphireRapids-v1", &[]), host("Cascadelake-Server-v3", &[])] {
            assert!(b.features.without(&features).without(&given_to_all()).is_empty());
        }
    }

    #[test]
    fn vendors_have_levels_in_common() {
        let b = of(&[host("SapphireRapids-v1", &["+invtsc"]), host("EPYC-Genoa-v1", &[])]);
        assert_eq!(b.model, "x86-64-v4");
        assert!(b.flags.contains(&"+aes".into()) && !b.flags.contains(&"+invtsc".into()));
        assert_eq!(of(&[host("Conroe", &[]), host("EPYC", &[])]).model, "x86-64-v1");
        assert_eq!(baseline(&[]), None);
    }
}
