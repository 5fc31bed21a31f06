//! The host as data.

use crate::kvm::KvmProbe;
use serde::Serialize;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// What this host has.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HostInventory {
    /// Numbers of the CPUs that are online.
    pub cpus: Vec<u32>,
    /// The CPUs' model as the kernel tells it.
    pub cpu_model: String,
    /// All memory, in bytes.
    pub memory_total: u64,
    /// Memory that can be taken without swapping, by the kernel's estimate, in bytes.
    pub memory_available: u64,
    /// NUMA nodes.
    pub numa_nodes: Vec<NumaNode>,
    /// Huge pages by size.
    pub huge_pages: Vec<HugePages>,
    /// What `/dev/kvm` is worth.
    pub kvm: KvmProbe,
    /// Whether `io_uring` can be used.
    pub io_uring: IoUring,
    /// The directory for the control sockets of running machines.
    pub runtime_dir: Option<PathBuf>,
}

/// A NUMA node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NumaNode {
    /// Its number.
    pub id: u32,
    /// Its CPUs.
    pub cpus: Vec<u32>,
    /// Its memory, in bytes.
    pub memory_total: u64,
    /// Its free memory, in bytes.
    pub memory_free: u64,
    /// Distances to all nodes, itself first at 10 (ACPI 6.5, 5.2.17 SLIT).
    pub distances: Vec<u32>,
}

/// Huge pages of one size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HugePages {
    /// Size of a page in bytes.
    pub size: u64,
    /// Pages there are.
    pub total: u64,
    /// Pages that are free.
    pub free: u64,
}

/// Whether `io_uring` can be used, as far as the kernel's switch tells: a container's seccomp filter shows only on use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum IoUring {
    /// It can.
    Usable,
    /// `kernel.io_uring_disabled` forbids it to this user.
    Disabled,
}

impl HostInventory {
    /// Looks at this host, which takes a few milliseconds, most of them for trying KVM.
    pub fn read() -> Self {
        let kvm = KvmProbe::run();
        let runtime_dir = crate::runtime_dir().ok();
        Self { kvm, runtime_dir, ..Self::read_below(Path::new("/")) }
    }

    /// The part that stands in files, read below `root`; what is missing there is empty or zero.
    fn read_below(root: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let meminfo = text("proc/meminfo");
        Self {
            cpus: parse_list(&text("sys/devices/system/cpu/online")),
            cpu_model: field(&text("proc/cpuinfo"), "model name").unwrap_or("unknown").to_string(),
            memory_total: kilobytes(&meminfo, "MemTotal"),
            memory_available: kilobytes(&meminfo, "MemAvailable"),
            numa_nodes: numa_nodes(root),
            huge_pages: huge_pages(root),
            kvm: KvmProbe::absent(),
            io_uring: io_uring(
                &text("proc/sys/kernel/io_uring_disabled"),
                rustix::process::geteuid().is_root(),
            ),
            runtime_dir: None,
        }
    }
}

/// Reads the kernel's lists of numbers: `0-3,8`. What is no number, and ranges that run backwards, are left out.
pub fn parse_list(text: &str) -> Vec<u32> {
    /// More CPUs than any kernel is built for: a longer range is a damaged file.
    const MOST: u32 = 1 << 16;
    let mut numbers = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>())
            && last < MOST
        {
            numbers.extend(first..=last);
        }
    }
    numbers
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// A value of `/proc/meminfo` or of a node's `meminfo` (whose lines begin with `Node 0`), in bytes.
fn kilobytes(text: &str, name: &str) -> u64 {
    let value = text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.split_whitespace().last() == Some(name)).then(|| value.trim().trim_end_matches(" kB"))
    });
    value.and_then(|v| v.parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024)
}

/// Entries of a directory that begin with `prefix`, with the number after it, in order.
fn numbered(dir: &Path, prefix: &str) -> Vec<(u64, PathBuf)> {
    let mut found: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let number = name.to_str()?.strip_prefix(prefix)?.trim_end_matches("kB").parse().ok()?;
            Some((number, entry.path()))
        })
        .collect();
    found.sort();
    found
}

fn numa_nodes(root: &Path) -> Vec<NumaNode> {
    let nodes = numbered(&root.join("sys/devices/system/node"), "node");
    let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_default();
    nodes
        .into_iter()
        .filter_map(|(id, path)| {
            let meminfo = read(path.join("meminfo"));
            Some(NumaNode {
                id: u32::try_from(id).ok()?,
                cpus: parse_list(&read(path.join("cpulist"))),
                memory_total: kilobytes(&meminfo, "MemTotal"),
                memory_free: kilobytes(&meminfo, "MemFree"),
                distances: read(path.join("distance"))
                    .split_whitespace()
                    .filter_map(|d| d.parse().ok())
                    .collect(),
            })
        })
        .collect()
}

fn huge_pages(root: &Path) -> Vec<HugePages> {
    let number =
        |path: PathBuf| fs::read_to_string(path).ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0);
    numbered(&root.join("sys/kernel/mm/hugepages"), "hugepages-")
        .into_iter()
        .map(|(kib, path)| HugePages {
            size: kib.saturating_mul(1024),
            total: number(path.join("nr_hugepages")),
            free: number(path.join("free_hugepages")),
        })
        .collect()
}

/// `kernel.io_uring_disabled`: 0 allows all, 1 the privileged, 2 nobody. Kernels before 6.6 have no such switch.
fn io_uring(switch: &str, root: bool) -> IoUring {
    match switch.trim() {
        "2" => IoUring::Disabled,
        "1" if !root => IoUring::Disabled,
        _ => IoUring::Usable,
    }
}

/// Whether `path` is a character device.
pub(crate) fn is_char_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_char_device())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn two_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(
            root,
            "proc/meminfo",
            "MemTotal:       24658012 kB\nMemFree: 1 kB\nMemAvailable:   20000000 kB\n",
        );
        write(root, "proc/cpuinfo", "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n");
        write(root, "sys/devices/system/cpu/online", "0-2,5\n");
        for (node, cpus) in [("node1", "2,5"), ("node0", "0-1")] {
            write(root, &format!("sys/devices/system/node/{node}/cpulist"), cpus);
            write(
                root,
                &format!("sys/devices/system/node/{node}/meminfo"),
                "Node 0 MemTotal: 100 kB\nNode 0 MemFree: 50 kB\n",
            );
            write(root, &format!("sys/devices/system/node/{node}/distance"), "10 21\n");
        }
        write(root, "sys/devices/system/node/possible", "0-1");
        write(root, "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "8\n");
        write(root, "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "3\n");
        let host = HostInventory::read_below(root);
        assert_eq!(host.cpus, [0, 1, 2, 5]);
        assert_eq!(host.cpu_model, "Some CPU @ 2 GHz");
        assert_eq!((host.memory_total, host.memory_available), (24_658_012 << 10, 20_000_000 << 10));
        let node = |id, cpus: &[u32]| NumaNode {
            id,
            cpus: cpus.to_vec(),
            memory_total: 100 << 10,
            memory_free: 50 << 10,
            distances: vec![10, 21],
        };
        assert_eq!(host.numa_nodes, [node(0, &[0, 1]), node(1, &[2, 5])]);
        assert_eq!(host.huge_pages, [HugePages { size: 2 << 20, total: 8, free: 3 }]);
    }

    #[test]
    fn this_host() {
        let host = HostInventory::read();
        assert!(!host.cpus.is_empty());
        assert!(host.memory_total > 0 && host.memory_available <= host.memory_total);
    }

    #[test]
    fn io_uring_switch() {
        assert_eq!(io_uring("2\n", true), IoUring::Disabled);
        assert_eq!(io_uring("1\n", false), IoUring::Disabled);
        assert_eq!(io_uring("1\n", true), IoUring::Usable);
        assert_eq!(io_uring("", false), IoUring::Usable);
    }

    proptest! {
        #[test]
        fn lists_never_panic(text in "[0-9,-]{0,40}") {
            let _ = parse_list(&text);
        }
    }
}
