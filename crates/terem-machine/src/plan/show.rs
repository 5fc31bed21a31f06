//! A plan as people read it.

use std::fmt;

use super::memory::{HIGH_MEMORY, HPET_BASE, IOAPIC_BASE, LAPIC_BASE};
use terem_config::DirectPrograms;

use super::{MemoryMap, Plan};
use crate::board::ports;

/// `1 core`, `2 cores`.
fn counted(count: u32, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = self.accelerator.reason.as_ref().map(|r| format!(" ({r})")).unwrap_or_default();
        writeln!(f, "machine      {}", self.name)?;
        writeln!(f, "board        q35")?;
        let how = match (self.accelerator.translate, self.accelerator.direct) {
            (false, _) => ", interpreter only",
            (true, DirectPrograms::Off) => ", all code translated",
            (true, DirectPrograms::On) => "",
            (true, DirectPrograms::Always) => ", all programs run directly",
        };
        writeln!(f, "accelerator  software CPU{how}{reason}")?;
        self.processors(f)?;
        writeln!(f, "memory       {} MiB, {} address bits", self.memory.size >> 20, self.memory.phys_bits)?;
        for (number, node) in self.numa.iter().enumerate() {
            let mib = node.memory.iter().map(|w| w.size >> 20).sum::<u64>();
            let cpus: Vec<String> = node.cpus.iter().map(ToString::to_string).collect();
            let distances: Vec<String> = node.distances.iter().map(ToString::to_string).collect();
            let (cpus, distances) = (cpus.join(","), distances.join(" "));
            writeln!(f, "numa node {number}  vCPUs {cpus}; {mib} MiB; distances {distances}")?;
        }
        if let Some(boot) = &self.boot {
            writeln!(f, "kernel       {}", boot.kernel.display())?;
            if let Some(initrd) = &boot.initrd {
                writeln!(f, "initrd       {}", initrd.display())?;
            }
            writeln!(f, "cmdline      {}", boot.cmdline)?;
        }
        if let Some(gdb) = &self.gdb {
            let wait = if gdb.wait { ", which the guest waits for" } else { "" };
            writeln!(f, "gdb          {}{wait}", gdb.listen)?;
        }
        for trace in &self.traces {
            let what = format!("{:?}", trace.what).to_lowercase();
            let place =
                trace.file.as_ref().map_or("standard error".into(), |file| file.display().to_string());
            writeln!(f, "trace        {what} to {place}")?;
        }
        writeln!(f, "\naddresses\n{}", self.memory)?;
        self.devices(f)
    }
}

impl Plan {
    fn processors(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let c = &self.cpus;
        let flags: String = c.flags.iter().map(|flag| format!(",{flag}")).collect();
        let dies = if c.dies > 1 { format!("{} each, ", counted(c.dies, "die")) } else { String::new() };
        let (sockets, cores, threads) =
            (counted(c.sockets, "socket"), counted(c.cores, "core"), counted(c.threads, "thread"));
        writeln!(
            f,
            "cpus         {} × {}{flags}: {sockets}, {dies}{cores} each, {threads} each",
            c.count, c.model
        )?;
        if !c.left_out.is_empty() {
            writeln!(f, "left out     {}", c.left_out.join(", "))?;
        }
        Ok(())
    }

    fn devices(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |at: String, what: &str, text: String| writeln!(f, "  {at:<14}{what:<16}{text}");
        let port = |p: u16| format!("port {p:#x}");
        line("PCI 00:00.0".into(), "host bridge", "MCH".into())?;
        let pci = |a: &super::PciAddress| format!("PCI {}", a.to_string().trim_start_matches("0000:"));
        if let Some(c) = &self.console {
            line(pci(&c.address), "virtio-console", c.backend.to_string())?;
        }
        if let Some(address) = &self.rng {
            line(pci(address), "virtio-rng", "the host's entropy".into())?;
        }
        for n in &self.nets {
            let kind = match n.backend() {
                Some(terem_config::NetBackendConfig::Tap { name }) => format!("tap {name}"),
                Some(terem_config::NetBackendConfig::TapFd { fd }) => format!("tap, descriptor {fd}"),
                Some(terem_config::NetBackendConfig::User { .. }) => "user".into(),
                None => "none".into(),
            };
            line(pci(&n.address), "virtio-net", format!("{} {kind}", n.mac))?;
        }
        for d in &self.disks {
            let mode = if d.config.readonly { ", read-only" } else { "" };
            let text = format!("{} {} ({} queues{mode})", d.guest_name, d.config.path.display(), d.queues);
            line(pci(&d.address), "virtio-blk", text)?;
        }
        line("PCI 00:1f.0".into(), "ISA bridge", "ICH9 LPC".into())?;
        line(port(ports::COM1), "serial", format!("COM1, IRQ {}: {}", ports::COM1_IRQ, self.serial))?;
        line(port(ports::PM_BASE), "power", format!("ACPI PM, IRQ {}", ports::SCI_IRQ))?;
        line(port(ports::FW_CFG), "fw_cfg", String::new())?;
        line(port(ports::PVPANIC), "pvpanic", String::new())
    }
}

impl fmt::Display for MemoryMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows: Vec<(u64, u64, String)> =
            self.ram().iter().map(|r| (r.base, r.size, "RAM".into())).collect();
        rows.push((self.ecam.base, self.ecam.size, "PCI configuration space".into()));
        rows.push((self.pci32.base, self.pci32.size, "PCI, 32-bit BARs".into()));
        rows.push((IOAPIC_BASE, 0x1000, "I/O APIC".into()));
        rows.push((HPET_BASE, 0x1000, "HPET".into()));
        rows.push((LAPIC_BASE, 0x10_0000, "local APICs, messages".into()));
        rows.push((self.pci64.base, self.pci64.size, "PCI, 64-bit BARs".into()));
        rows.sort_by_key(|row| row.0);
        for (base, size, what) in rows {
            let (size, unit) = match size {
                s if s >= 1 << 30 && s.is_multiple_of(1 << 30) => (s >> 30, "GiB"),
                s if s >= 1 << 20 && s.is_multiple_of(1 << 20) => (s >> 20, "MiB"),
                s => (s >> 10, "KiB"),
            };
            let last =
                base + match unit {
                    "GiB" => size << 30,
                    "MiB" => size << 20,
                    _ => size << 10,
                } - 1;
            writeln!(f, "  {base:#014x}–{last:#014x} {size:>6} {unit}  {what}")?;
        }
        debug_assert!(self.high_end >= HIGH_MEMORY);
        Ok(())
    }
}
