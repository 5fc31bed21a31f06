//! The whole machine, and the checks that concern several of its parts.

use crate::accel::AccelConfig;
use crate::chardev::CharConfig;
use crate::cpu::{CpuConfig, CpusConfig};
use crate::disk::DiskConfig;
use crate::error::{ConfigError, ConfigErrors, quote};
use crate::gdb::{GdbAddress, GdbConfig};
use crate::key_value::{OrText, many, one, optional};
use crate::net::{NetConfig, NetKind};
use crate::numa::{self, NumaConfig};
use crate::passphrase::ImagePassphrase;
use crate::size::ByteSize;
use crate::throttle::ThrottleConfig;
use crate::trace::TraceConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Least memory of a machine: below 1 MiB there is no place for a kernel.
pub const MIN_MEMORY: ByteSize = ByteSize::mib(1);

/// Most memory of a machine: what 46 bits of physical address hold, less the half that PCI devices get.
pub const MAX_MEMORY: ByteSize = ByteSize(32 << 40);

/// Longest path of a Unix socket (`sun_path` less the final zero; unix(7)), in bytes.
pub(crate) const MAX_SOCKET_PATH: usize = 107;

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MachineConfig {
    /// Name of the machine, unique among the user's running machines. Not given: made from the disk or kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Memory of the guest, such as `512M` or `4G`.
    pub memory: ByteSize,
    /// A Linux bzImage, an ELF kernel (PVH), or a multiboot image, booted directly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Command line of the kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// The first serial port (COM1): `stdio`, `none`, `pty`, `file:PATH` or `socket:PATH`.
    pub serial: CharConfig,
    /// A virtio console (`hvc0` in Linux), none by default; the same places as for `serial`.
    pub virtio_console: CharConfig,
    /// Whether the guest gets a virtio entropy device.
    pub rng: bool,
    /// Whether the machine ends where the guest would reset it.
    pub no_reboot: bool,
    /// vCPUs: their number and topology.
    #[serde(deserialize_with = "one")]
    #[schemars(with = "OrText<CpusConfig>")]
    pub cpus: CpusConfig,
    /// NUMA nodes of the guest. Not given: it is told of none.
    #[serde(deserialize_with = "many", skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<OrText<NumaConfig>>")]
    pub numa: Vec<NumaConfig>,
    /// CPU model.
    #[serde(deserialize_with = "one")]
    #[schemars(with = "OrText<CpuConfig>")]
    pub cpu: CpuConfig,
    /// Accelerator.
    #[serde(deserialize_with = "one")]
    #[schemars(with = "OrText<AccelConfig>")]
    pub accel: AccelConfig,
    /// Disks, in the order in which the guest sees them.
    #[serde(rename = "disk", deserialize_with = "many")]
    #[schemars(with = "Vec<OrText<DiskConfig>>")]
    pub disks: Vec<DiskConfig>,
    /// Network interfaces, in the order in which the guest sees them. Not given: one with user-mode networking.
    #[serde(rename = "net", deserialize_with = "many")]
    #[schemars(with = "Vec<OrText<NetConfig>>")]
    pub nets: Vec<NetConfig>,
    /// Where gdb can connect.
    #[serde(deserialize_with = "optional", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<OrText<GdbConfig>>")]
    pub gdb: Option<GdbConfig>,
    /// What is written down of what the vCPUs do.
    #[serde(rename = "trace", deserialize_with = "many", skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<OrText<TraceConfig>>")]
    pub traces: Vec<TraceConfig>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            name: None,
            memory: ByteSize::gib(1),
            kernel: None,
            initrd: None,
            cmdline: None,
            serial: CharConfig::Stdio,
            virtio_console: CharConfig::None,
            rng: true,
            no_reboot: false,
            cpus: CpusConfig::default(),
            numa: Vec::new(),
            cpu: CpuConfig::default(),
            accel: AccelConfig::default(),
            disks: Vec::new(),
            nets: vec![NetConfig { kind: Some(NetKind::User), ..NetConfig::default() }],
            gdb: None,
            traces: Vec::new(),
        }
    }
}

impl MachineConfig {
    /// The interfaces that the guest gets: those which are not `none`.
    pub fn nics(&self) -> impl Iterator<Item = &NetConfig> {
        self.nets.iter().filter(|net| net.kind() != NetKind::None)
    }

    /// The configuration as a TOML file that reads back to the same.
    ///
    /// # Errors
    /// A path that is not UTF-8 cannot be written.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string(self)
            .map_err(|error| ConfigError::missing("", format!("it cannot be written as TOML: {error}"), ""))
    }

    /// Makes relative paths start at `base`.
    pub fn resolve_paths(&mut self, base: &Path) {
        let chars = [&mut self.serial, &mut self.virtio_console];
        let files = self
            .kernel
            .iter_mut()
            .chain(&mut self.initrd)
            .chain(chars.into_iter().filter_map(CharConfig::path_mut));
        let images = self.disks.iter_mut().flat_map(|disk| {
            let keys = disk.passphrase.iter_mut().flat_map(ImagePassphrase::paths_mut);
            std::iter::once(&mut disk.path).chain(&mut disk.backing).chain(&mut disk.luks_header).chain(keys)
        });
        let gdb = self.gdb.iter_mut().filter_map(|gdb| match &mut gdb.listen {
            GdbAddress::Unix(path) => Some(path),
            GdbAddress::Tcp { .. } => None,
        });
        let traces = self.traces.iter_mut().filter_map(|trace| trace.file.as_mut());
        for path in files.chain(images).chain(gdb).chain(traces) {
            // An empty path stays empty, so that it is told as such and not as a directory; an address (nbd://…) is no path.
            let address = path.to_str().is_some_and(|text| text.contains("://"));
            if !address && path.is_relative() && !path.as_os_str().is_empty() {
                *path = base.join(&*path);
            }
        }
    }

    /// Checks the configuration against itself.
    ///
    /// # Errors
    /// All mistakes at once.
    pub fn validate(&self) -> Result<(), ConfigErrors> {
        let mut errors = Vec::new();
        self.validate_name(&mut errors);
        self.validate_memory(&mut errors);
        self.validate_kernel(&mut errors);
        self.validate_consoles(&mut errors);
        self.cpus.validate(&mut errors);
        numa::validate(&self.numa, &self.cpus, self.memory, &mut errors);
        self.cpu.validate(&mut errors);
        self.validate_disks(&mut errors);
        self.validate_nets(&mut errors);
        if let Some(gdb) = &self.gdb {
            gdb.validate(&mut errors);
        }
        self.validate_traces(&mut errors);
        ConfigErrors::check(errors)
    }

    /// [`Self::validate`] for a machine of which not all could be read: adds its mistakes to those `found` by reading. What
    /// they are about is left out here, as it has no value to look at.
    pub fn validate_besides(&self, found: &mut Vec<ConfigError>) {
        let read = |key: &str| {
            let top = |key: &str| key.split(['.', '[']).next().unwrap_or_default().to_owned();
            !found.iter().any(|mistake| mistake.key.is_empty() || top(&mistake.key) == top(key))
        };
        if let Err(ConfigErrors(mistakes)) = self.validate() {
            let more: Vec<_> = mistakes.into_iter().filter(|mistake| read(&mistake.key)).collect();
            found.extend(more);
        }
    }

    fn validate_name(&self, errors: &mut Vec<ConfigError>) {
        const LONGEST: usize = 64;
        if let Some(name) = &self.name {
            let letters = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
            if !letters || name.len() > LONGEST || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
                errors.push(ConfigError::value(
                    "name",
                    quote(name),
                    "it cannot be the name of a machine",
                    format!("up to {LONGEST} letters, digits, `-`, `_` and `.`, the first a letter or digit"),
                ));
            }
        }
    }

    fn validate_memory(&self, errors: &mut Vec<ConfigError>) {
        let range = || format!("{MIN_MEMORY} to {MAX_MEMORY}, such as 512M");
        if self.memory < MIN_MEMORY {
            errors.push(ConfigError::value(
                "memory",
                quote(self.memory),
                "no kernel fits into so little",
                range(),
            ));
        } else if self.memory > MAX_MEMORY {
            errors.push(ConfigError::value(
                "memory",
                quote(self.memory),
                "it is beyond the machine's address space",
                range(),
            ));
        } else if !self.memory.bytes().is_multiple_of(MIN_MEMORY.bytes()) {
            errors.push(ConfigError::value(
                "memory",
                quote(self.memory),
                "it is not whole mebibytes",
                "a multiple of 1M",
            ));
        }
    }

    fn validate_kernel(&self, errors: &mut Vec<ConfigError>) {
        let Some(kernel) = &self.kernel else {
            errors.push(ConfigError::missing(
                "kernel",
                "it is needed: this version boots kernels directly, not yet through firmware from the disk",
                "the path of a Linux kernel, an ELF kernel with a PVH note, or a multiboot image",
            ));
            return;
        };
        for (key, path) in [("kernel", Some(kernel)), ("initrd", self.initrd.as_ref())] {
            if path.is_some_and(|path| path.as_os_str().is_empty()) {
                errors.push(ConfigError::value(key, "\"\"", "it is empty", "the path of a file"));
            }
        }
        if let Some(cmdline) = self.cmdline.as_ref().filter(|line| line.contains('\0')) {
            errors.push(ConfigError::value(
                "cmdline",
                quote(cmdline.escape_default()),
                "a zero byte would end it",
                "text without zero bytes",
            ));
        }
    }

    fn validate_consoles(&self, errors: &mut Vec<ConfigError>) {
        let consoles = [("serial", &self.serial), ("virtio_console", &self.virtio_console)];
        for (key, console) in consoles {
            if let CharConfig::Socket(path) = console
                && path.as_os_str().len() > MAX_SOCKET_PATH
            {
                errors.push(ConfigError::value(
                    key,
                    quote(console),
                    "the path is too long for a socket",
                    format!("up to {MAX_SOCKET_PATH} bytes"),
                ));
            }
        }
        let shared = matches!(self.serial, CharConfig::Stdio | CharConfig::File(_) | CharConfig::Socket(_));
        if shared && self.serial == self.virtio_console {
            errors.push(ConfigError::value(
                "virtio_console",
                quote(&self.virtio_console),
                "the serial port goes there already",
                "different places, such as serial = \"none\"",
            ));
        }
    }

    fn validate_disks(&self, errors: &mut Vec<ConfigError>) {
        for (index, disk) in self.disks.iter().enumerate() {
            disk.validate(&format!("disk[{index}]"), errors);
            let writes = |disk: &DiskConfig| !disk.readonly && !disk.snapshot;
            if let Some(first) = self.disks[..index].iter().position(|d| d.path == disk.path)
                && (writes(disk) || writes(&self.disks[first]))
                && !disk.path.as_os_str().is_empty()
            {
                errors.push(ConfigError::value(
                    format!("disk[{index}].path"),
                    quote(disk.path.display()),
                    format!("disk[{first}] is the same image, and one of them writes to it"),
                    "another image, or `readonly` on both",
                ));
            }
            self.validate_throttle_group(index, errors);
        }
    }

    /// The limits of a group are given once, or always the same.
    fn validate_throttle_group(&self, index: usize, errors: &mut Vec<ConfigError>) {
        let disk = &self.disks[index];
        let Some(group) = disk.throttle_group.as_deref().filter(|group| !group.is_empty()) else { return };
        let mut limits =
            self.disks.iter().enumerate().filter(|(_, other)| {
                other.throttle_group.as_deref() == Some(group) && !other.throttle.is_none()
            });
        let key = format!("disk[{index}].throttle_group");
        match limits.next() {
            None => errors.push(ConfigError::value(
                key,
                quote(group),
                "no disk of the group has limits",
                "limits such as bps=20M at one of them",
            )),
            Some((first, other)) if !disk.throttle.is_none() && disk.throttle != other.throttle => {
                errors.push(ConfigError::value(
                    key,
                    quote(group),
                    format!("disk[{first}] gives the group other limits"),
                    "limits at one disk of a group",
                ));
            }
            Some(_) => {}
        }
    }

    /// The limits of a disk: its own, or its group's.
    #[must_use]
    pub fn throttle_of<'a>(&'a self, disk: &'a DiskConfig) -> &'a ThrottleConfig {
        let group = |other: &&DiskConfig| {
            disk.throttle_group.is_some()
                && other.throttle_group == disk.throttle_group
                && !other.throttle.is_none()
        };
        if disk.throttle.is_none() {
            self.disks.iter().find(group).map_or(&disk.throttle, |other| &other.throttle)
        } else {
            &disk.throttle
        }
    }

    fn validate_traces(&self, errors: &mut Vec<ConfigError>) {
        for (index, trace) in self.traces.iter().enumerate() {
            if trace.file.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
                let key = format!("trace[{index}].file");
                errors.push(ConfigError::value(key, "\"\"", "it is empty", "the path of a file"));
            }
            if let Some(first) = self.traces[..index].iter().position(|t| t.what == trace.what) {
                errors.push(ConfigError::missing(
                    format!("trace[{index}].what"),
                    format!("trace[{first}] writes the same down already"),
                    "each of instructions, interrupts and exits once",
                ));
            }
        }
    }

    fn validate_nets(&self, errors: &mut Vec<ConfigError>) {
        let mut ports = Vec::new();
        for (index, net) in self.nets.iter().enumerate() {
            net.validate(&format!("net[{index}]"), errors);
            if net.kind() == NetKind::None && self.nets.len() > 1 {
                errors.push(ConfigError::value(
                    format!("net[{index}].type"),
                    "\"none\"",
                    "there are other network interfaces",
                    "`none` alone",
                ));
            }
            if let (Some(mac), Some(first)) =
                (net.mac, self.nets[..index].iter().position(|n| n.mac.is_some() && n.mac == net.mac))
            {
                errors.push(ConfigError::value(
                    format!("net[{index}].mac"),
                    quote(mac),
                    format!("net[{first}] has the same address"),
                    "an address of its own for each interface",
                ));
            }
            for (place, forward) in net.forward.iter().enumerate() {
                let port = (forward.protocol, forward.listen_address(), forward.host_port);
                if ports.contains(&port) {
                    errors.push(ConfigError::value(
                        format!("net[{index}].forward[{place}]"),
                        quote(forward),
                        "the host's port is forwarded already",
                        "each port of the host once",
                    ));
                }
                ports.push(port);
            }
        }
    }
}

/// The JSON schema (draft 2020-12) of a machine file.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(MachineConfig).to_value()
}
