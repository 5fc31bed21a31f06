//! Config and host inventory in, placement out: pure data without side effects, shown by `--plan`.

mod cpus;
mod host;
pub mod memory;
mod numa;
pub mod pci;
mod show;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use terem_config::{
    AccelKind, CharConfig, DirectPrograms, DiskConfig, GdbConfig, MachineConfig, NetBackendConfig, NetConfig,
    ThrottleConfig, TraceConfig,
};
use terem_cpu::ModelError;

pub use cpus::CpuPlan;
pub use host::HostInventory;
pub use memory::{MemoryMap, MemoryMapError, Window};
pub use numa::NumaPlan;
use pci::{PciAddress, Slots};

/// Where everything of a machine goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The machine's name.
    pub name: String,
    /// The board.
    pub board: Board,
    /// Who runs the guest.
    pub accelerator: AcceleratorPlan,
    /// The processors.
    pub cpus: CpuPlan,
    /// The address map.
    pub memory: MemoryMap,
    /// NUMA nodes; none where the guest is told of none.
    pub numa: Vec<NumaPlan>,
    /// What is booted.
    pub boot: Option<BootPlan>,
    /// The first serial port's other end.
    #[serde(serialize_with = "as_text")]
    pub serial: CharConfig,
    /// The virtio console, if there is one.
    pub console: Option<ConsolePlan>,
    /// The entropy device, if there is one.
    pub rng: Option<PciAddress>,
    /// Disks, in the guest's order.
    pub disks: Vec<DiskPlan>,
    /// Network interfaces, in the guest's order.
    pub nets: Vec<NetPlan>,
    /// Whether the machine ends where the guest would reset it.
    pub no_reboot: bool,
    /// Where gdb connects.
    pub gdb: Option<GdbConfig>,
    /// What is written down of what the vCPUs do.
    pub traces: Vec<TraceConfig>,
}

/// A chipset with its devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Board {
    /// Intel's Q35: PCI Express, ICH9.
    Q35,
}

/// Who runs the guest, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AcceleratorPlan {
    /// Always the software CPU so far.
    pub kind: AccelKind,
    /// Why, where it was left to us.
    pub reason: Option<String>,
    /// Whether the software CPU translates hot code.
    pub translate: bool,
    /// Which programs run on the host's processor directly.
    pub direct: DirectPrograms,
}

/// What is booted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BootPlan {
    /// The kernel's file.
    pub kernel: PathBuf,
    /// The initrd's file.
    pub initrd: Option<PathBuf>,
    /// The command line.
    pub cmdline: String,
}

/// A virtio console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConsolePlan {
    /// Where it is plugged in.
    pub address: PciAddress,
    /// Its other end.
    #[serde(serialize_with = "as_text")]
    pub backend: CharConfig,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskPlan {
    /// Where it is plugged in.
    pub address: PciAddress,
    /// What Linux calls it.
    pub guest_name: String,
    /// Virtio queues.
    pub queues: u16,
    /// What it may do in a second; shared with its `throttle_group`.
    #[serde(skip_serializing_if = "ThrottleConfig::is_none")]
    pub throttle: ThrottleConfig,
    /// What was asked for.
    pub config: DiskConfig,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetPlan {
    /// Where it is plugged in.
    pub address: PciAddress,
    /// Its Ethernet address.
    #[serde(serialize_with = "as_text")]
    pub mac: terem_config::MacAddress,
    /// What was asked for.
    pub config: NetConfig,
}

fn as_text<T: fmt::Display, S: serde::Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// Why there is no such machine on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// See [`MemoryMapError`].
    #[error("memory: {0}")]
    Memory(#[from] MemoryMapError),
    /// The guest would be given more than there is.
    #[error(
        "memory: {} MiB were asked for and this host has {} MiB; ask for less (--memory)",
        asked >> 20,
        have >> 20
    )]
    HostMemory {
        /// Bytes asked for.
        asked: u64,
        /// Bytes of the host.
        have: u64,
    },
    /// See [`ModelError`].
    #[error("cpu: {0}")]
    Model(#[from] ModelError),
    /// The accelerator lacks something of the model.
    #[error(
        "cpu: {accelerator} on this host cannot give {model} {}; choose another model (`terem cpu models`), \
         switch them off (--cpu {model},-{} …), or leave out all of them (--cpu {model},enforce=off)",
        missing.join(", "),
        missing.first().map_or("", String::as_str),
    )]
    Features {
        /// The accelerator.
        accelerator: &'static str,
        /// The model.
        model: String,
        /// What it lacks.
        missing: Vec<String>,
    },
    /// The topology numbers processors beyond what interrupts reach.
    #[error(
        "cpus: in this topology the last vCPU has APIC id {last}, and {MAX_APIC_ID} is the highest there can be; \
         ids have gaps where dies, cores or threads are no power of two"
    )]
    ApicIds {
        /// The highest id.
        last: u32,
    },
    /// Hardware virtualisation is not built in.
    #[error(
        "accel: this version has no KVM accelerator; use --accel soft (the software CPU), or leave it out"
    )]
    Kvm,
    /// The bus is full.
    #[error("{count} devices were asked for and the PCI bus has {} free slots; leave some out", Slots::ROOM)]
    Slots {
        /// Devices asked for.
        count: usize,
    },
}

/// All that is wrong with a plan, at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanErrors(pub Vec<PlanError>);

impl fmt::Display for PlanErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, e) in self.0.iter().enumerate() {
            write!(f, "{}{e}", if i > 0 { "\n" } else { "" })?;
        }
        Ok(())
    }
}

impl std::error::Error for PlanErrors {}

/// The highest xAPIC id: 255 addresses all (Intel SDM vol. 3, 11.6.2).
const MAX_APIC_ID: u32 = 254;
/// A kernel that was given no command line at least shows what it does.
const DEFAULT_CMDLINE: &str = "console=ttyS0";
/// Queues beyond this bring nothing to a disk by default.
const DEFAULT_QUEUES: u32 = 8;

impl Plan {
    /// Places a validated configuration on a host.
    ///
    /// # Errors
    /// Everything that is in the way, not just the first.
    pub fn new(config: &MachineConfig, host: &HostInventory) -> Result<Self, PlanErrors> {
        let mut errors = Vec::new();
        let memory = MemoryMap::q35(config.memory.bytes()).map_err(|e| errors.push(e.into())).ok();
        if let Some(have) = host.memory.filter(|&have| have < config.memory.bytes()) {
            errors.push(PlanError::HostMemory { asked: config.memory.bytes(), have });
        }
        let accelerator = accelerator(config, host, &mut errors);
        let cpus = CpuPlan::new(config, host, &mut errors);
        let devices = Devices::place(config, config.cpus.count, &name(config), &mut errors);
        match (memory, cpus, devices) {
            (Some(memory), Some(cpus), Some(d)) if errors.is_empty() => Ok(Self {
                name: name(config),
                board: Board::Q35,
                accelerator,
                cpus,
                numa: numa::nodes(config, &memory),
                memory,
                boot: config.kernel.as_ref().map(|kernel| BootPlan {
                    kernel: kernel.clone(),
                    initrd: config.initrd.clone(),
                    cmdline: config.cmdline.clone().unwrap_or_else(|| DEFAULT_CMDLINE.into()),
                }),
                serial: config.serial.clone(),
                console: d.console,
                rng: d.rng,
                disks: d.disks,
                nets: d.nets,
                no_reboot: config.no_reboot,
                gdb: config.gdb.clone(),
                traces: config.traces.clone(),
            }),
            _ => Err(PlanErrors(errors)),
        }
    }
}

fn accelerator(config: &MachineConfig, host: &HostInventory, errors: &mut Vec<PlanError>) -> AcceleratorPlan {
    let reason = match config.accel.kind {
        AccelKind::Soft => None,
        AccelKind::Kvm => {
            errors.push(PlanError::Kvm);
            None
        }
        AccelKind::Auto => {
            Some(host.no_kvm.clone().unwrap_or_else(|| "this version does not use /dev/kvm yet".into()))
        }
    };
    let translate = config.accel.translate.unwrap_or(true);
    let direct = if translate { config.accel.direct.unwrap_or_default() } else { DirectPrograms::Off };
    AcceleratorPlan { kind: AccelKind::Soft, reason, translate, direct }
}

/// What is plugged into PCI.
struct Devices {
    console: Option<ConsolePlan>,
    rng: Option<PciAddress>,
    disks: Vec<DiskPlan>,
    nets: Vec<NetPlan>,
}

impl Devices {
    /// Slots in this order: console, entropy, interfaces, disks. The numbers are part of what a guest sees, so
    /// the order stays.
    fn place(config: &MachineConfig, cpus: u32, name: &str, errors: &mut Vec<PlanError>) -> Option<Self> {
        let has_console = config.virtio_console != CharConfig::None;
        let nics: Vec<&NetConfig> = config.nics().collect();
        let count = usize::from(has_console) + usize::from(config.rng) + nics.len() + config.disks.len();
        let mut slots = Slots::default();
        let placed = Self::fill(config, cpus, name, &nics, &mut slots);
        if placed.is_none() {
            errors.push(PlanError::Slots { count });
        }
        placed
    }

    fn fill(
        config: &MachineConfig,
        cpus: u32,
        name: &str,
        nics: &[&NetConfig],
        slots: &mut Slots,
    ) -> Option<Self> {
        let console = match &config.virtio_console {
            CharConfig::None => None,
            backend => Some(ConsolePlan { address: slots.take()?, backend: backend.clone() }),
        };
        let rng = if config.rng { Some(slots.take()?) } else { None };
        let mut nets = Vec::new();
        for (i, nic) in nics.iter().enumerate() {
            let mac = nic.mac.unwrap_or_else(|| generated_mac(name, i));
            nets.push(NetPlan { address: slots.take()?, mac, config: (*nic).clone() });
        }
        let mut disks = Vec::new();
        let queues = u16::try_from(cpus.clamp(1, DEFAULT_QUEUES)).unwrap_or(1);
        for (i, disk) in config.disks.iter().enumerate() {
            disks.push(DiskPlan {
                address: slots.take()?,
                guest_name: disk_name(i),
                queues: disk.queues.unwrap_or(queues),
                throttle: *config.throttle_of(disk),
                config: disk.clone(),
            });
        }
        Some(Self { console, rng, disks, nets })
    }
}

impl NetPlan {
    /// Where its frames go.
    #[must_use]
    pub fn backend(&self) -> Option<NetBackendConfig> {
        self.config.backend()
    }
}

/// `/dev/vda` … `/dev/vdz`, `/dev/vdaa` …
fn disk_name(index: usize) -> String {
    const LETTERS: &[u8; 26] = b"abcdefghijklmnopqrstuvwxyz";
    let letter = |i: usize| char::from(LETTERS[i % 26]);
    match index.checked_sub(26) {
        None => format!("/dev/vd{}", letter(index)),
        Some(more) => format!("/dev/vd{}{}", letter(more / 26), letter(more)),
    }
}

/// An address of the locally used range of QEMU's vendor prefix, the same each time for a machine's name.
fn generated_mac(name: &str, index: usize) -> terem_config::MacAddress {
    // FNV-1a.
    let hash = name
        .bytes()
        .chain(index.to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3));
    let [a, b, c, ..] = hash.to_be_bytes();
    terem_config::MacAddress([0x52, 0x54, 0x00, a, b, c])
}

/// The given name, or one made from the first disk's or the kernel's file.
fn name(config: &MachineConfig) -> String {
    let stem = |p: &Path| p.file_stem().map(|s| s.to_string_lossy().into_owned());
    let from_file =
        || config.disks.first().map(|d| d.path.as_path()).or(config.kernel.as_deref()).and_then(stem);
    let raw = config.name.clone().or_else(from_file).unwrap_or_default();
    let clean: String = raw
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' })
        .skip_while(|c| !c.is_ascii_alphanumeric())
        .take(64)
        .collect();
    if clean.is_empty() { "machine".into() } else { clean }
}

#[cfg(test)]
mod tests {
    use super::*;
    use terem_config::{ByteSize, CpusConfig};

    fn host() -> HostInventory {
        HostInventory {
            memory: Some(24 << 30),
            no_kvm: Some("this host has no /dev/kvm".into()),
            ..HostInventory::default()
        }
    }

    fn config() -> MachineConfig {
        MachineConfig { kernel: Some("/boot/vmlinuz".into()), ..MachineConfig::default() }
    }

    #[test]
    fn devices_get_their_slots_in_order() {
        let mut c = config();
        c.disks = vec![DiskConfig::new("/a/debian.qcow2"), DiskConfig::new("b.img")];
        c.cpus = CpusConfig::new(16);
        let p = Plan::new(&c, &host()).unwrap();
        assert_eq!(p.name, "debian");
        assert_eq!(p.rng.unwrap().to_string(), "0000:00:01.0");
        assert_eq!(p.nets[0].address.to_string(), "0000:00:02.0");
        let disks: Vec<_> =
            p.disks.iter().map(|d| (d.address.to_string(), d.guest_name.as_str(), d.queues)).collect();
        assert_eq!(disks, [("0000:00:03.0".into(), "/dev/vda", 8), ("0000:00:04.0".into(), "/dev/vdb", 8)]);
        assert_eq!(p.accelerator.reason.as_deref(), Some("this host has no /dev/kvm"));
        assert_eq!(p.cpus.model, "terem64");
        assert!(!p.nets[0].mac.is_multicast());
        assert_eq!(p, Plan::new(&c, &host()).unwrap(), "the same each time");
        let json = serde_json::to_value(&p).unwrap();
        assert_eq!(json["disks"][1]["address"], "0000:00:04.0");
        assert_eq!(json["serial"], "stdio");
    }

    #[test]
    fn all_obstacles_are_told_at_once() {
        let mut c = config();
        c.memory = ByteSize::gib(64);
        c.accel.kind = AccelKind::Kvm;
        c.cpu.model = "i386".into();
        c.disks = (0..40).map(|i| DiskConfig::new(format!("{i}.img"))).collect();
        let PlanErrors(errors) = Plan::new(&c, &host()).unwrap_err();
        assert_eq!(errors.len(), 4, "{errors:?}");
        let text = PlanErrors(errors).to_string();
        assert!(text.contains("65536 MiB were asked for and this host has 24576 MiB"), "{text}");
        assert!(text.contains("42 devices"), "{text}");
    }

    #[test]
    fn names_of_disks_go_on_after_z() {
        assert_eq!(
            (disk_name(25), disk_name(26), disk_name(52)),
            ("/dev/vdz".into(), "/dev/vdaa".into(), "/dev/vdba".into())
        );
    }
}
