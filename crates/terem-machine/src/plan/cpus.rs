//! The processors of a plan: which model they are, what of it the guest gets, how they are laid out.

use serde::Serialize;
use terem_config::{ByteSize, CacheSharing, CpusConfig, MachineConfig};
use terem_cpu::{Caches, CpuModel, Level, Topology};

use super::{HostInventory, MAX_APIC_ID, PlanError};

/// The processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CpuPlan {
    /// How many.
    pub count: u32,
    /// Packages.
    pub sockets: u32,
    /// Dies in a package.
    pub dies: u32,
    /// Cores in a die.
    pub cores: u32,
    /// Threads in a core.
    pub threads: u32,
    /// The model's name as it was asked for.
    pub model: String,
    /// Changes to the model: `+aes`, `-avx2`.
    pub flags: Vec<String>,
    /// What the guest gets: the model with these changes, without what cannot be had, with the caches asked for.
    pub cpu: CpuModel,
    /// What was asked for and is left out because the accelerator on this host cannot give it.
    pub left_out: Vec<String>,
}

/// The model that `default` means.
const DEFAULT_MODEL: &str = "terem64";
/// The accelerator, for errors.
const ACCELERATOR: &str = "the software CPU";

impl CpuPlan {
    pub(super) fn new(
        config: &MachineConfig,
        host: &HostInventory,
        errors: &mut Vec<PlanError>,
    ) -> Option<Self> {
        let t = config.cpus.topology();
        let model = match config.cpu.model.as_str() {
            "default" => DEFAULT_MODEL,
            named => named,
        };
        let flags: Vec<String> = config.cpu.flags.iter().map(ToString::to_string).collect();
        let topology = Topology { sockets: t.sockets, dies: t.dies, cores: t.cores, threads: t.threads };
        if topology.last_apic_id() > MAX_APIC_ID {
            errors.push(PlanError::ApicIds { last: topology.last_apic_id() });
        }
        let found = CpuModel::find_on(host.cpu.as_ref(), model, &flags);
        let mut cpu = found.map_err(|wrong| errors.extend(wrong.into_iter().map(PlanError::from))).ok()?;
        let asked_for = cpu.features.without(&cpu.optional);
        if !config.cpu.enforce {
            cpu.optional = cpu.features;
        }
        cpu.leave_out_what_is_not_in(&host.soft_features);
        let missing = cpu.features.missing_from(&host.soft_features);
        if !missing.is_empty() {
            let missing = missing.into_iter().map(String::from).collect();
            errors.push(PlanError::Features { accelerator: ACCELERATOR, model: model.into(), missing });
            return None;
        }
        let left_out = asked_for.missing_from(&cpu.features).into_iter().map(String::from).collect();
        cpu.optional = terem_cpu::FeatureSet::default();
        cpu.caches = caches(&config.cpus, cpu.caches);
        Some(Self {
            count: config.cpus.count,
            sockets: t.sockets,
            dies: t.dies,
            cores: t.cores,
            threads: t.threads,
            model: model.into(),
            flags,
            cpu,
            left_out,
        })
    }

    /// The topology as CPUID and the firmware's tables show it.
    #[must_use]
    pub fn topology(&self) -> Topology {
        Topology { sockets: self.sockets, dies: self.dies, cores: self.cores, threads: self.threads }
    }
}

/// The model's caches, but for what was asked for.
fn caches(asked: &CpusConfig, of_model: Caches) -> Caches {
    let kib = |size: ByteSize| u32::try_from(size.bytes() >> 10).unwrap_or(u32::MAX);
    let level = |sharing: CacheSharing| match sharing {
        CacheSharing::Core => Level::Core,
        CacheSharing::Die => Level::Die,
        CacheSharing::Socket => Level::Socket,
    };
    let mut caches = of_model;
    let sizes = [(asked.l1d, &mut caches.l1d), (asked.l1i, &mut caches.l1i), (asked.l2, &mut caches.l2)];
    for (size, cache) in sizes {
        if let Some(size) = size {
            *cache = cache.resized(kib(size));
        }
    }
    if let Some(sharing) = asked.l2_sharing {
        caches.l2.sharing = level(sharing);
    }
    if let Some(size) = asked.l3 {
        let with_size = |l3: terem_cpu::Cache| l3.resized(kib(size));
        let usual = Caches::usual().l3;
        caches.l3 = if size.bytes() == 0 { None } else { caches.l3.or(usual).map(with_size) };
    }
    if let (Some(sharing), Some(l3)) = (asked.l3_sharing, &mut caches.l3) {
        l3.sharing = level(sharing);
    }
    caches
}

#[cfg(test)]
mod tests {
    use super::*;
    use terem_config::{CpuConfig, from_key_values};

    fn plan(cpus: &str, cpu: &str) -> Result<CpuPlan, Vec<PlanError>> {
        let config = MachineConfig {
            cpus: from_key_values(cpus).unwrap(),
            cpu: from_key_values::<CpuConfig>(cpu).unwrap(),
            ..MachineConfig::default()
        };
        let mut errors = Vec::new();
        let plan = CpuPlan::new(&config, &HostInventory::here(), &mut errors);
        plan.filter(|_| errors.is_empty()).ok_or(errors)
    }

    #[test]
    fn what_cannot_be_given_is_an_error_or_left_out_and_told() {
        let errors = plan("1", "Skylake-Server").unwrap_err();
        let text = errors[0].to_string();
        assert!(
            text.starts_with("cpu: the software CPU on this host cannot give Skylake-Server avx512bw, "),
            "{text}"
        );
        assert!(text.ends_with("(--cpu Skylake-Server,enforce=off)"), "{text}");
        let dropped = plan("1", "Skylake-Server,enforce=off,-aes").unwrap();
        assert!(dropped.left_out.contains(&"avx512f".into()) && !dropped.left_out.contains(&"aes".into()));
        assert!(!dropped.cpu.features.has("avx512f") && !dropped.cpu.features.has("aes"));
        assert!(dropped.cpu.features.has("sse4.2"));
        // What only may be there is left out in silence; what is asked for by name is not.
        assert!(plan("1", "max").unwrap().left_out.is_empty());
        assert!(
            matches!(&plan("1", "max,+svm").unwrap_err()[..], [PlanError::Features { missing, .. }] if missing == &["svm"])
        );
        assert_eq!(plan("1", "max,+svm,enforce=off").unwrap().left_out, ["svm"]);
    }

    #[test]
    fn host_is_the_hosts_own_processor() {
        let host = HostInventory::here().cpu.unwrap();
        let here = plan("1", "host,-pcid").unwrap().cpu;
        assert_eq!((here.vendor, here.signature, here.brand), (host.vendor, host.signature, host.brand));
        assert!(here.features.has("sse2") && !here.features.has("pcid"));
    }

    #[test]
    fn caches_are_the_models_but_for_what_was_asked_for() {
        let c = plan("4,l3=0,l2=1M,l2_sharing=die", "default").unwrap().cpu.caches;
        assert_eq!((c.l3, c.l2.kib, c.l2.sharing, c.l1d.kib), (None, 1024, Level::Die, 32));
        let c = plan("4,l3=33M,l3_sharing=socket,l1d=48K", "default").unwrap().cpu.caches;
        assert_eq!((c.l3.unwrap().kib, c.l3.unwrap().sharing, c.l1d.kib), (33 << 10, Level::Socket, 48));
    }

    #[test]
    fn ids_beyond_an_xapics_are_told() {
        assert!(plan("192,sockets=64,cores=3", "default").is_ok_and(|p| p.topology().last_apic_id() == 254));
        let errors = plan("195,sockets=65,cores=3", "default").unwrap_err();
        assert!(errors[0].to_string().contains("APIC id 258"), "{errors:?}");
    }
}
