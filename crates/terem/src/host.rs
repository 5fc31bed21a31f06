//! `terem host`: what this host can give.

use crate::exit::Exit;
use crate::failure::Failure;
use crate::{print, print_json};
use serde::Serialize;
use terem_config::ByteSize;
use terem_host::{HostInventory, IoUring, KvmVerdict};
use terem_machine::HostCpus;

/// The inventory, with what `terem cpu` wants to know of a host.
#[derive(Serialize)]
struct Host {
    #[serde(flatten)]
    inventory: HostInventory,
    cpu: HostCpus,
}

/// Shows the inventory.
pub fn show(json: bool) -> Result<Exit, Failure> {
    let inventory = HostInventory::read();
    if json { print_json(&Host { inventory, cpu: HostCpus::here() }) } else { print(&describe(&inventory)) }
}

fn describe(host: &HostInventory) -> String {
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let mut lines = vec![
        ("cpus", format!("{} × {}", host.cpus.len(), host.cpu_model)),
        ("memory", format!("{}, {} available", mib(host.memory_total), mib(host.memory_available))),
    ];
    for node in &host.numa_nodes {
        let (total, free) = (mib(node.memory_total), mib(node.memory_free));
        lines.push(("numa node", format!("{}: {} CPUs, {total}, {free} free", node.id, node.cpus.len())));
    }
    for pages in &host.huge_pages {
        lines.push((
            "huge pages",
            format!("{}: {} of {} free", ByteSize(pages.size), pages.free, pages.total),
        ));
    }
    let verdict = match host.kvm.verdict {
        KvmVerdict::Fast => "usable, but this version has no accelerator for it",
        KvmVerdict::Absent | KvmVerdict::Forbidden | KvmVerdict::Broken | KvmVerdict::Slow => "not used",
    };
    lines.push(("kvm", format!("{verdict}: {}", host.kvm.reason)));
    lines.push((
        "io_uring",
        match host.io_uring {
            IoUring::Usable => "usable".into(),
            IoUring::Disabled => "disabled by kernel.io_uring_disabled; disks use threads".into(),
        },
    ));
    let runtime = host.runtime_dir.as_ref().map_or_else(|| "none".into(), |dir| dir.display().to_string());
    lines.push(("runtime dir", runtime));
    lines.into_iter().map(|(name, text)| format!("{name:<12} {text}\n")).collect()
}
