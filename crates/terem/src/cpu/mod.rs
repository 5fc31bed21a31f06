//! `terem cpu`: models, what a guest sees of them, and which hosts can run them.

pub mod arguments;
mod text;

use std::path::Path;

use arguments::{Accelerator, CpuArguments, CpuCommand};
use serde::Serialize;
use terem_config::{ConfigErrors, CpuConfig, CpusConfig, MachineConfig, from_key_values};
use terem_cpu::{CpuModel, Cpuid, FeatureSet, HostCpu, baseline, models};
use terem_machine::{HostCpus, plan};

use crate::exit::Exit;
use crate::failure::Failure;
use crate::{print, print_json};

/// Runs the command.
pub fn run(arguments: &CpuArguments) -> Result<Exit, Failure> {
    match &arguments.command {
        CpuCommand::Models { json } => list(*json),
        CpuCommand::Show { model, cpus, leaves, json } => show(model, cpus, *leaves, *json),
        CpuCommand::Baseline { hosts, accel, json } => common(hosts, *accel, *json),
        CpuCommand::Compare { one, other, json } => compare(one, other, *json),
        CpuCommand::Host { json } => {
            let here = HostCpus::here();
            if *json { print_json(&here) } else { print(&text::host(&here)) }
        }
    }
}

/// A model, and what this host lacks of it.
#[derive(Serialize)]
struct Listed {
    #[serde(flatten)]
    model: CpuModel,
    /// Whether the guest does without what the host lacks, instead of an error.
    leaves_out: bool,
    missing: Missing,
}

/// Features that accelerators on this host cannot give.
#[derive(Serialize)]
struct Missing {
    soft: Vec<&'static str>,
    /// None where KVM does not answer.
    kvm: Option<Vec<&'static str>>,
}

impl Missing {
    fn of(features: &FeatureSet, here: &HostCpus) -> Self {
        let from = |given: &FeatureSet| features.missing_from(given);
        Self { soft: from(&here.accelerators.soft), kvm: here.accelerators.kvm.as_ref().map(from) }
    }
}

fn list(json: bool) -> Result<Exit, Failure> {
    let here = HostCpus::here();
    let host = CpuModel::find_on(Some(&here.cpu), "host", &[]).ok();
    let listed: Vec<Listed> = models()
        .into_iter()
        .chain(host)
        .map(|model| Listed {
            leaves_out: !model.optional.is_empty(),
            missing: Missing::of(&model.features, &here),
            model,
        })
        .collect();
    if json { print_json(&listed) } else { print(&text::models(&listed)) }
}

/// What somebody named: a model with flags, or a host's file.
enum Named {
    Model(Box<CpuModel>),
    Host(Box<HostCpus>),
}

impl Named {
    fn read(text: &str, here: &HostCpus) -> Result<Self, Failure> {
        if text.ends_with(".json") {
            return read_host(text).map(|host| Self::Host(Box::new(host)));
        }
        let config = cpu_config(text)?;
        let name = if config.model == "default" { "terem64" } else { &config.model };
        let flags: Vec<String> = config.flags.iter().map(ToString::to_string).collect();
        let found = CpuModel::find_on(Some(&here.cpu), name, &flags);
        found.map(|model| Self::Model(Box::new(model))).map_err(|errors| {
            Failure::configuration_lines(errors.iter().map(|e| format!("{text}: {e}")).collect())
        })
    }

    /// As a model: a host is what it is itself.
    fn model(&self) -> CpuModel {
        match self {
            Self::Model(model) => (**model).clone(),
            Self::Host(host) => as_model(&host.cpu),
        }
    }
}

/// A host's processor as it is, with what no guest gets.
fn as_model(host: &HostCpu) -> CpuModel {
    CpuModel {
        name: "host".into(),
        aliases: Vec::new(),
        vendor: host.vendor,
        signature: host.signature,
        brand: host.brand.clone(),
        levels: host.levels,
        caches: host.caches,
        avx10: host.avx10,
        features: host.features,
        optional: FeatureSet::default(),
    }
}

fn cpu_config(text: &str) -> Result<CpuConfig, Failure> {
    let config: CpuConfig = from_key_values(text).map_err(|e| Failure::from(e.within("cpu")))?;
    Ok(config)
}

fn read_host(path: &str) -> Result<HostCpus, Failure> {
    let cannot = |why: String| Failure::configuration(format!("cannot read {path}: {why}"));
    let text = std::fs::read_to_string(Path::new(path)).map_err(|e| cannot(e.to_string()))?;
    let mut value: serde_json::Value = serde_json::from_str(&text).map_err(|e| cannot(e.to_string()))?;
    // `terem host --json` says more than this.
    if let Some(cpu) = value.get_mut("cpu") {
        value = cpu.take();
    }
    serde_json::from_value(value)
        .map_err(|e| cannot(e.to_string()).hint("`terem cpu host --json` on that host writes such a file"))
}

/// What a guest sees.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    model: CpuModel,
    left_out: Vec<String>,
    missing: Missing,
    #[serde(skip_serializing_if = "Option::is_none")]
    leaves: Option<Vec<Leaf>>,
}

/// What CPUID answers: EAX, EBX, ECX, EDX.
#[derive(Serialize)]
struct Leaf {
    leaf: u32,
    subleaf: u32,
    registers: [u32; 4],
}

fn show(name: &str, cpus: &str, leaves: bool, json: bool) -> Result<Exit, Failure> {
    let here = HostCpus::here();
    let named = Named::read(name, &here)?;
    let asked = named.model();
    let mut cpu = if let Named::Model(_) = named { cpu_config(name)? } else { CpuConfig::default() };
    cpu.enforce = false;
    let config = MachineConfig {
        cpus: from_key_values::<CpusConfig>(cpus).map_err(|e| Failure::from(e.within("cpus")))?,
        cpu,
        kernel: Some("none".into()),
        ..MachineConfig::default()
    };
    let mut mistakes = Vec::new();
    config.validate_besides(&mut mistakes);
    ConfigErrors::check(mistakes)?;
    // A plan says what a guest here would get; of a model that stands for itself everything is shown.
    let host = plan::HostInventory {
        cpu: Some(here.cpu.clone()),
        soft_features: FeatureSet::all(),
        ..Default::default()
    };
    let planned = plan::Plan::new(&config, &host)
        .map_err(|e| Failure::configuration_lines(e.0.iter().map(ToString::to_string).collect()))?;
    let mut model = CpuModel { optional: asked.optional, ..planned.cpus.cpu.clone() };
    if let Named::Host(_) = named {
        model = asked.clone();
    }
    let missing = Missing::of(&model.features, &here);
    let left_out = model.leave_out_what_is_not_in(&here.accelerators.soft);
    let left_out = left_out.into_iter().map(String::from).collect();
    let cpuid = Cpuid::new(model.clone(), planned.cpus.topology(), 0, TSC_KHZ, planned.memory.phys_bits);
    let leaf = |(leaf, subleaf, entry): (u32, u32, terem_cpu::CpuidEntry)| Leaf {
        leaf,
        subleaf,
        registers: entry.registers,
    };
    let leaves = leaves.then(|| cpuid.leaves().into_iter().map(leaf).collect());
    let shown = Shown { model, left_out, missing, leaves };
    if json { print_json(&shown) } else { print(&text::shown(&shown)) }
}

/// The software CPU's time-stamp counter, in kHz.
const TSC_KHZ: u32 = 1_000_000;

fn common(files: &[String], accel: Option<Accelerator>, json: bool) -> Result<Exit, Failure> {
    let hosts = files.iter().map(|path| read_host(path)).collect::<Result<Vec<_>, _>>()?;
    let all_have_kvm = hosts.iter().all(|h| h.accelerators.kvm.is_some());
    let accel = accel.unwrap_or(if all_have_kvm { Accelerator::Kvm } else { Accelerator::Soft });
    let given = |(path, host): (&String, &HostCpus)| match accel {
        Accelerator::Soft => Ok(host.accelerators.soft),
        Accelerator::Kvm => host.accelerators.kvm.ok_or_else(|| {
            Failure::configuration(format!("{path}: this host has no KVM"))
                .hint("--accel soft: the software CPU runs everywhere")
        }),
    };
    let features = files.iter().zip(&hosts).map(given).collect::<Result<Vec<_>, _>>()?;
    let with_features: Vec<_> = hosts.iter().map(|h| &h.cpu).zip(features).collect();
    let found = baseline(&with_features).ok_or_else(|| {
        Failure::configuration("these hosts have no CPU model in common, not even x86-64-v1")
    })?;
    if json { print_json(&found) } else { print(&text::baseline(&found, accel)) }
}

/// In what two differ.
#[derive(Serialize)]
struct Difference {
    /// Properties that differ, with both values.
    properties: Vec<(&'static str, String, String)>,
    only_one: Vec<&'static str>,
    only_other: Vec<&'static str>,
}

fn compare(one: &str, other: &str, json: bool) -> Result<Exit, Failure> {
    let here = HostCpus::here();
    let (a, b) = (Named::read(one, &here)?.model(), Named::read(other, &here)?.model());
    let facts = [text::facts(&a), text::facts(&b)];
    let properties = facts[0]
        .iter()
        .zip(&facts[1])
        .filter(|(x, y)| x.1 != y.1)
        .map(|(x, y)| (x.0, x.1.clone(), y.1.clone()))
        .collect();
    let difference = Difference {
        properties,
        only_one: a.features.missing_from(&b.features),
        only_other: b.features.missing_from(&a.features),
    };
    if json { print_json(&difference) } else { print(&text::difference(one, other, &difference)) }
}
