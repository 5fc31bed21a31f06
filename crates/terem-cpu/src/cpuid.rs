//! What CPUID answers: leaves made from a model and a topology.

use crate::features::Register::{Eax, Ebx, Ecx, Edx};
use crate::model::CpuModel;
use crate::xstate::{self, HEADER_END};

/// How many processors there are and how they are grouped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Packages.
    pub sockets: u32,
    /// Cores in a package.
    pub cores: u32,
    /// Threads in a core.
    pub threads: u32,
}

impl Topology {
    /// One socket of `cpus` cores with one thread each.
    #[must_use]
    pub fn flat(cpus: u32) -> Self {
        Self { sockets: 1, cores: cpus.max(1), threads: 1 }
    }

    /// Bits of the APIC id for the thread, and for thread and core together.
    fn shifts(self) -> (u32, u32) {
        let bits = |n: u32| n.max(1).next_power_of_two().trailing_zeros();
        (bits(self.threads), bits(self.threads) + bits(self.cores))
    }

    /// The APIC id of the processor with this index: threads are numbered first, then cores, then sockets
    /// (Intel SDM vol. 3, 9.9 "hierarchical topology").
    #[must_use]
    pub fn apic_id(self, index: u32) -> u32 {
        let (thread, core) = (index % self.threads.max(1), index / self.threads.max(1));
        let (core, socket) = (core % self.cores.max(1), core / self.cores.max(1));
        let (core_shift, socket_shift) = self.shifts();
        thread | core << core_shift | socket << socket_shift
    }
}

/// One leaf's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuidEntry {
    /// EAX, EBX, ECX, EDX.
    pub registers: [u32; 4],
}

/// Everything that CPUID answers on one processor, apart from the bits that mirror its state (OSXSAVE,
/// APIC enabled, the size of enabled XSAVE components), which the accelerator fills in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpuid {
    model: CpuModel,
    topology: Topology,
    apic_id: u32,
    tsc_khz: u32,
    /// Physical address bits.
    phys_bits: u8,
}

/// Highest basic leaf.
const MAX_BASIC: u32 = 0x16;
/// Highest extended leaf.
const MAX_EXTENDED: u32 = 0x8000_001f;
/// The frequency (Hz) of the core crystal clock that leaf 15h states.
const CRYSTAL_HZ: u32 = 1_000_000;

impl Cpuid {
    /// CPUID of processor `index` of `topology`; `tsc_khz` is the TSC's frequency, `phys_bits` the width
    /// of guest-physical addresses.
    #[must_use]
    pub fn new(model: CpuModel, topology: Topology, index: u32, tsc_khz: u32, phys_bits: u8) -> Self {
        let apic_id = topology.apic_id(index);
        Self { model, topology, apic_id, tsc_khz, phys_bits }
    }

    /// The model.
    #[must_use]
    pub fn model(&self) -> &CpuModel {
        &self.model
    }

    /// The (x2)APIC id.
    #[must_use]
    pub fn apic_id(&self) -> u32 {
        self.apic_id
    }

    /// Physical address bits.
    #[must_use]
    pub fn phys_bits(&self) -> u8 {
        self.phys_bits
    }

    /// The answer to `leaf`/`subleaf`. Leaves above the highest answer like the highest basic leaf on
    /// Intel and zeroes on AMD (APM vol. 3); here zeroes.
    #[must_use]
    pub fn query(&self, leaf: u32, subleaf: u32) -> CpuidEntry {
        let m = &self.model;
        // Only these leaves look at ECX; elsewhere a guest may leave anything in it.
        let subleaf = if matches!(leaf, 4 | 7 | 0xb | 0xd) { subleaf } else { 0 };
        let bits = |register| m.features.bits(leaf, subleaf, register);
        let [v0, v1, v2] = [&m.vendor[0..4], &m.vendor[4..8], &m.vendor[8..12]]
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let registers = match leaf {
            0 => [MAX_BASIC, v0, v2, v1],
            1 => {
                let count = self.topology.threads * self.topology.cores;
                let logical = count.next_power_of_two().min(255);
                let htt = if count > 1 { 1 << 28 } else { 0 };
                let ebx = (self.apic_id & 0xff) << 24 | logical << 16 | 8 << 8; // CLFLUSH: 8 × 8 bytes
                [self.signature(), ebx, bits(Ecx), bits(Edx) | htt]
            }
            4 => self.intel_cache(subleaf),
            // Lines of 64 bytes; interrupts end `mwait` (ECX bits 0 and 1).
            5 if m.features.has("monitor") => [64, 64, 3, 0],
            6 | 7 if subleaf == 0 => [bits(Eax), bits(Ebx), bits(Ecx), bits(Edx)],
            0xb => self.extended_topology(subleaf),
            0xd => self.xsave(subleaf, bits(Eax)),
            0x15 => {
                // TSC Hz = crystal Hz × EBX / EAX.
                [CRYSTAL_HZ / 1000, self.tsc_khz, CRYSTAL_HZ, 0]
            }
            0x16 => [self.tsc_khz / 1000, self.tsc_khz / 1000, 100, 0],
            0x4000_0000 if m.features.has("hypervisor") => [
                0x4000_0000,
                u32::from_le_bytes(*b"Tere"),
                u32::from_le_bytes(*b"mok "),
                u32::from_le_bytes(*b"VMM "),
            ],
            0x8000_0000 => [MAX_EXTENDED, v0, v2, v1],
            0x8000_0001 => {
                // AMD mirrors bits of leaf 1 EDX here (APM vol. 3, E.4.2).
                let mirrored = 0x0183_f3ff;
                let legacy =
                    if m.vendor == *b"AuthenticAMD" { m.features.bits(1, 0, Edx) & mirrored } else { 0 };
                let several = self.topology.cores * self.topology.threads > 1;
                [self.signature(), 0, bits(Ecx) | if several { 1 << 1 } else { 0 }, bits(Edx) | legacy]
            }
            0x8000_0002..=0x8000_0004 => self.brand(leaf - 0x8000_0002),
            0x8000_0005 => [0x01ff_01ff, 0x01ff_01ff, 0x4002_0140, 0x4002_0140],
            0x8000_0006 => [0, 0x4200_4200, 0x0200_8140, 0x0080_9140],
            0x8000_0007 => [0, 0, 0, bits(Edx)],
            0x8000_0008 => {
                let cores = self.topology.cores * self.topology.threads;
                let width = cores.next_power_of_two().trailing_zeros();
                [0x3000 | u32::from(self.phys_bits), 0, (cores - 1).min(255) | width << 12, 0]
            }
            _ => [0; 4],
        };
        CpuidEntry { registers }
    }

    /// Family, model and stepping in leaf 1's packing.
    fn signature(&self) -> u32 {
        let (family, model, stepping) = self.model.signature;
        let (base, extended) = if family >= 15 { (15, family - 15) } else { (family, 0) };
        stepping & 15 | (model & 15) << 4 | base << 8 | (model >> 4) << 16 | extended << 20
    }

    /// Leaf 4, deterministic cache parameters: L1d 32K, L1i 32K, L2 512K per core, L3 16M shared.
    fn intel_cache(&self, subleaf: u32) -> [u32; 4] {
        let (kind, level, kib, ways, sharing) = match subleaf {
            0 => (1, 1, 32, 8, self.topology.threads),
            1 => (2, 1, 32, 8, self.topology.threads),
            2 => (3, 2, 512, 8, self.topology.threads),
            3 => (3, 3, 16384, 16, self.topology.threads * self.topology.cores),
            _ => return [0; 4],
        };
        let sharing = sharing.next_power_of_two() - 1;
        let cores = (self.topology.cores.next_power_of_two() - 1).min(63);
        let sets = kib * 1024 / 64 / ways;
        let eax = kind | level << 5 | 1 << 8 | (sharing & 0xfff) << 14 | cores << 26;
        [eax, (ways - 1) << 22 | 63, sets - 1, 0]
    }

    /// Leaf 0Bh, x2APIC topology.
    fn extended_topology(&self, subleaf: u32) -> [u32; 4] {
        let (core_shift, socket_shift) = self.topology.shifts();
        let (shift, count, kind) = match subleaf {
            0 => (core_shift, self.topology.threads, 1),
            1 => (socket_shift, self.topology.threads * self.topology.cores, 2),
            _ => return [0, 0, subleaf & 0xff, self.apic_id],
        };
        [shift, count, subleaf | kind << 8, self.apic_id]
    }

    /// Leaf 0Dh, XSAVE. The sizes of what is enabled, EBX of the first two subleaves, are the accelerator's.
    fn xsave(&self, subleaf: u32, eax: u32) -> [u32; 4] {
        let all = xstate::components(&self.model.features);
        let bytes = |n: usize| u32::try_from(n).unwrap_or(0);
        let component = |c: &&xstate::Component| all & c.bit != 0 && c.bit.trailing_zeros() == subleaf;
        match subleaf {
            _ if all == 0 => [0; 4],
            0 => [u32::try_from(all).unwrap_or(0), bytes(HEADER_END), bytes(xstate::standard_size(all)), 0],
            1 => [eax, 0, 0, 0],
            _ => xstate::COMPONENTS
                .iter()
                .find(component)
                .map_or([0; 4], |c| [bytes(c.size), bytes(c.offset), 0, 0]),
        }
    }

    /// A third of the brand string.
    fn brand(&self, part: u32) -> [u32; 4] {
        let mut text = [0; 48];
        for (to, from) in text.iter_mut().zip(self.model.brand.bytes().take(47)) {
            *to = from;
        }
        let at = (part as usize % 3) * 16;
        [0, 4, 8, 12].map(|i| {
            let b = &text[at + i..];
            u32::from_le_bytes([b[0], b[1], b[2], b[3]])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpuid(topology: Topology, index: u32) -> Cpuid {
        Cpuid::new(CpuModel::find("terem64", &[]).unwrap(), topology, index, 2_000_000, 40)
    }

    #[test]
    fn identification_is_packed_as_the_manuals_say() {
        let c = cpuid(Topology::flat(1), 0);
        let [max, b, d2, d1] = c.query(0, 0).registers;
        assert_eq!(max, MAX_BASIC);
        let text: Vec<u8> = [b, d1, d2].iter().flat_map(|r| r.to_le_bytes()).collect();
        assert_eq!(text, b"AuthenticAMD");
        let eax = c.query(1, 0).registers[0];
        assert_eq!(
            ((eax >> 8 & 15) + (eax >> 20 & 255), eax >> 4 & 15 | eax >> 12 & 0xf0, eax & 15),
            (15, 107, 1)
        );
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .flat_map(|l| c.query(l, 0).registers)
            .flat_map(u32::to_le_bytes)
            .take_while(|&b| b != 0)
            .collect();
        assert_eq!(brand, b"Teremok virtual CPU");
        assert_eq!(c.query(0x1234_5678, 0).registers, [0; 4]);
        assert_eq!(c.query(0x8000_0001, 77), c.query(0x8000_0001, 0), "ECX says nothing there");
        assert_ne!(c.query(7, 1), c.query(7, 0));
    }

    #[test]
    fn topology_numbers_threads_then_cores_then_sockets() {
        let t = Topology { sockets: 2, cores: 3, threads: 2 };
        let ids: Vec<u32> = (0..12).map(|i| t.apic_id(i)).collect();
        assert_eq!(ids, [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        let c = cpuid(t, 7);
        assert_eq!(c.query(0xb, 0).registers, [1, 2, 0x100, 9]);
        assert_eq!(c.query(0xb, 1).registers, [3, 6, 0x201, 9]);
        assert_eq!(c.query(1, 0).registers[1] >> 24, 9);
    }

    #[test]
    fn switched_off_features_are_not_shown() {
        let m = CpuModel::find("terem64", &["-aes".into(), "-xsave".into()]).unwrap();
        let c = Cpuid::new(m, Topology::flat(2), 0, 1, 40);
        assert_eq!(c.query(1, 0).registers[2] & (1 << 25 | 1 << 26), 0);
        assert_eq!(c.query(0xd, 0).registers, [0; 4]);
    }

    #[test]
    fn xsave_leaves_tell_of_each_component() {
        let c = |name| Cpuid::new(CpuModel::find(name, &[]).unwrap(), Topology::flat(1), 0, 1, 40);
        assert_eq!(c("terem64").query(0xd, 0).registers, [3, 576, 576, 0]);
        assert_eq!(c("terem64").query(0xd, 2).registers, [0; 4]);
        assert_eq!(c("x86-64-v3").query(0xd, 0).registers, [7, 576, 832, 0]);
        assert_eq!(c("max").query(0xd, 0).registers, [0x207, 576, 840, 0]);
        assert_eq!(c("max").query(0xd, 1).registers, [15, 0, 0, 0]);
        assert_eq!(c("max").query(0xd, 2).registers, [256, 576, 0, 0]);
        assert_eq!(c("max").query(0xd, 9).registers, [8, 832, 0, 0]);
        assert_eq!(c("max").query(0xd, 77).registers, [0; 4]);
    }
}
