//! What of the host a plan depends on.

use std::path::Path;

use serde::Serialize;
use terem_cpu::{FeatureSet, HostCpu};

/// What this host has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostInventory {
    /// Bytes of RAM; `None` where the host does not say.
    pub memory: Option<u64>,
    /// Why hardware virtualisation cannot be used; `None` where `/dev/kvm` can be opened.
    pub no_kvm: Option<String>,
    /// The processor, for machines that are to have the same; `None` where nobody has looked.
    pub cpu: Option<HostCpu>,
    /// The CPU features that the software CPU can give here.
    pub soft_features: FeatureSet,
}

impl Default for HostInventory {
    /// A host of which nothing is known but what runs this program.
    fn default() -> Self {
        Self { memory: None, no_kvm: None, cpu: None, soft_features: terem_soft::supported_features() }
    }
}

impl HostInventory {
    /// Looks at this host.
    #[must_use]
    pub fn here() -> Self {
        let memory = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_memory(&text));
        let cpu = Some(HostCpu::read(terem_host::cpuid));
        Self { memory, no_kvm: kvm_obstacle(Path::new("/dev/kvm")), cpu, ..Self::default() }
    }
}

/// `MemTotal` of `/proc/meminfo` (proc(5)), in bytes.
fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn kvm_obstacle(device: &Path) -> Option<String> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(device);
    opened.err().map(|e| match e.kind() {
        std::io::ErrorKind::NotFound => "this host has no /dev/kvm".into(),
        std::io::ErrorKind::PermissionDenied => "/dev/kvm may not be opened by this user".into(),
        _ => format!("/dev/kvm cannot be opened: {e}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read() {
        assert_eq!(total_memory("MemTotal:       24606532 kB\nMemFree: 1 kB\n"), Some(24_606_532 << 10));
        assert_eq!(total_memory("MemFree: 1 kB\n"), None);
        assert_eq!(total_memory("MemTotal: lots"), None);
    }

    #[test]
    fn a_missing_kvm_is_told() {
        assert_eq!(kvm_obstacle(Path::new("/nowhere/kvm")), Some("this host has no /dev/kvm".into()));
    }
}
