//! ACPI tables: what the guest's operating system reads about the board.
//!
//! ```text
//!   RSDP (0xE0000) ──> XSDT ──> FADT ──> DSDT
//!                        ├────> MADT    └─> FACS (last page of the tables' area)
//!                        ├────> MCFG
//!                        ├────> HPET
//!                        ├────> PPTT
//!                        └────> SRAT, SLIT (with NUMA nodes)
//! ```
//!
//! Without firmware the tables are put into guest memory here ([`Tables::write`]). Firmware will get the
//! same [`Tables`] over `fw_cfg` and place them itself.

mod dsdt;
mod fixed;
mod madt;
mod numa;
mod pptt;

use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, facs::FACS, mcfg::MCFG};
use terem_cpu::{Caches, Topology};
use terem_memory::vm_memory::{Bytes, GuestAddress};
use terem_memory::{GuestMemory, PAGE_SIZE};

use crate::e820::FIRMWARE_AREA;
use crate::plan::{MemoryMap, NumaPlan};

const OEM_ID: [u8; 6] = *b"TEREM ";
const OEM_TABLE_ID: [u8; 8] = *b"TEREMQ35";
const OEM_REVISION: u32 = 1;

/// Where the RSDP goes: the start of the area that is searched for it (ACPI 6.5, 5.2.5.1).
pub const RSDP_ADDRESS: u64 = FIRMWARE_AREA;
/// Tables begin at multiples of this.
const ALIGNMENT: u64 = 64;

/// What the tables describe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description<'a> {
    /// The address map.
    pub map: &'a MemoryMap,
    /// The processors.
    pub topology: Topology,
    /// Number of processors.
    pub cpus: u32,
    /// Their caches.
    pub caches: Caches,
    /// NUMA nodes, if the guest is told of any.
    pub numa: &'a [NumaPlan],
    /// Whether there is a pvpanic device.
    pub pvpanic: bool,
}

/// Tables with their addresses.
#[derive(Debug, Clone)]
pub struct Tables {
    tables: Vec<(&'static str, u64, Vec<u8>)>,
}

/// The tables do not fit: there are too many processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the ACPI tables need {needed} bytes and {room} are kept for them")]
pub struct TablesError {
    /// Bytes of tables.
    pub needed: u64,
    /// Bytes kept.
    pub room: u64,
}

impl Tables {
    /// Makes the tables.
    ///
    /// # Errors
    /// [`TablesError`] for more processors than there is room for.
    pub fn new(d: &Description<'_>) -> Result<Self, TablesError> {
        let area = d.map.tables;
        let facs = area.end() - PAGE_SIZE;
        let mut at = area.base;
        let mut tables = Vec::new();
        let mut put = |name: &'static str, table: &dyn Aml| {
            let mut bytes = Vec::new();
            table.to_aml_bytes(&mut bytes);
            let here = at;
            at = (at + bytes.len() as u64).next_multiple_of(ALIGNMENT);
            tables.push((name, here, bytes));
            here
        };
        let dsdt = put("DSDT", &dsdt::dsdt(d));
        let fadt = put("FACP", &fixed::fadt(dsdt, facs));
        let madt = put("APIC", &madt::madt(d));
        let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        let last_bus = (d.map.ecam.size >> 20).saturating_sub(1);
        mcfg.add_ecam(d.map.ecam.base, 0, 0, u8::try_from(last_bus).unwrap_or(u8::MAX));
        let mcfg = put("MCFG", &mcfg);
        let hpet = put("HPET", &fixed::hpet());
        let pptt = put("PPTT", &pptt::pptt(d));
        let mut all = vec![fadt, madt, mcfg, hpet, pptt];
        if !d.numa.is_empty() {
            all.push(put("SRAT", &numa::srat(d, d.numa)));
            all.push(put("SLIT", &numa::slit(d.numa)));
        }
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        for table in all {
            xsdt.add_entry(table);
        }
        let xsdt = put("XSDT", &xsdt);
        if at > facs {
            return Err(TablesError { needed: at - area.base, room: area.size - PAGE_SIZE });
        }
        let bytes = |table: &dyn Aml| {
            let mut bytes = Vec::new();
            table.to_aml_bytes(&mut bytes);
            bytes
        };
        tables.push(("FACS", facs, bytes(&FACS::new())));
        tables.push(("RSDP", RSDP_ADDRESS, bytes(&Rsdp::new(OEM_ID, xsdt))));
        Ok(Self { tables })
    }

    /// Name, guest-physical address and bytes of each.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64, &[u8])> {
        self.tables.iter().map(|(name, at, bytes)| (*name, *at, bytes.as_slice()))
    }

    /// Puts them into guest memory, as firmware would.
    ///
    /// # Errors
    /// The addresses are not RAM: the map is not of this memory.
    pub fn write(&self, memory: &GuestMemory) -> Result<(), terem_memory::MemoryError> {
        for (_, at, bytes) in self.iter() {
            let not_ram = |_| terem_memory::MemoryError::NotRam { addr: at, len: bytes.len() as u64 };
            memory.write_slice(bytes, GuestAddress(at)).map_err(not_ram)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Window;

    fn tables(size: u64, cpus: u32) -> Tables {
        let map = MemoryMap::q35(size).unwrap();
        let topology = Topology { sockets: 1, dies: 2, cores: cpus / 4, threads: 2 };
        let caches = Caches::usual();
        let node = |cpus, base, distances: [u8; 2]| NumaPlan {
            cpus,
            memory: vec![Window { base, size: 1 << 30 }],
            distances: distances.to_vec(),
        };
        let nodes =
            [node((0..cpus / 2).collect(), 0, [10, 21]), node((cpus / 2..cpus).collect(), 4 << 30, [21, 10])];
        let d = Description { map: &map, topology, cpus, caches, numa: &nodes, pvpanic: true };
        Tables::new(&d).unwrap()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |s, b| s.wrapping_add(*b))
    }

    #[test]
    fn checksums_lengths_and_pointers_are_right() {
        let t = tables(8 << 30, 4);
        let find = |name| t.iter().find(|(n, ..)| *n == name).unwrap();
        for (name, at, bytes) in t.iter() {
            assert_eq!(at % 16, 0);
            if name == "RSDP" {
                assert_eq!((sum(&bytes[..20]), sum(bytes), &bytes[..8]), (0, 0, &b"RSD PTR "[..]));
                continue;
            }
            assert_eq!(bytes[..4], *name.as_bytes());
            assert_eq!(u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize, bytes.len());
            if name != "FACS" {
                assert_eq!(sum(bytes), 0, "{name}");
            }
        }
        let u64_at = |b: &[u8], at: usize| u64::from_le_bytes(b[at..at + 8].try_into().unwrap());
        let (_, xsdt_at, xsdt) = find("XSDT");
        assert_eq!(u64_at(find("RSDP").2, 24), xsdt_at);
        for (i, name) in ["FACP", "APIC", "MCFG", "HPET", "PPTT", "SRAT", "SLIT"].into_iter().enumerate() {
            assert_eq!(u64_at(xsdt, 36 + i * 8), find(name).1, "{name}");
        }
        let fadt = find("FACP").2;
        assert_eq!(u64_at(fadt, 140), find("DSDT").1);
        assert_eq!(u64::from(u32::from_le_bytes(fadt[36..40].try_into().unwrap())), find("FACS").1);
        assert_eq!(u64_at(find("MCFG").2, 44), 0xb000_0000);
    }

    #[test]
    fn a_thousand_processors_fit_and_too_many_are_refused() {
        let map = MemoryMap::q35(64 << 30).unwrap();
        let with = |cpus| {
            let topology = Topology::flat(cpus);
            let caches = Caches::usual();
            let d = Description { map: &map, topology, cpus, caches, numa: &[], pvpanic: false };
            Tables::new(&d).map(|_| ())
        };
        assert_eq!(with(1024), Ok(()));
        assert!(matches!(with(8_000), Err(TablesError { .. })));
    }

    /// Debian's `iasl` reads each table and compiles what it read again.
    #[test]
    fn iasl_finds_nothing_wrong() {
        use std::process::Command;
        if Command::new("iasl").arg("-v").output().is_err() {
            eprintln!("no iasl here (package acpica-tools): not checked");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for (name, _, bytes) in tables(8 << 30, 300).iter().filter(|(n, ..)| *n != "RSDP") {
            let binary = dir.path().join(format!("{name}.aml"));
            std::fs::write(&binary, bytes).unwrap();
            let run = |args: &[&str]| {
                let out = Command::new("iasl").args(args).current_dir(dir.path()).output().unwrap();
                let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
                assert!(out.status.success(), "{name}: {text}");
                text
            };
            let text = run(&["-d", &format!("{name}.aml")]);
            for bad in ["Error", "Warning", "Invalid", "Incorrect"] {
                assert!(!text.contains(bad), "{name}: {text}");
            }
            let text = run(&["-p", "again", &format!("{name}.dsl")]);
            if name == "DSDT" {
                assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
            }
        }
    }
}
