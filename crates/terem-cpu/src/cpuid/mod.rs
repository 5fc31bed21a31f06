//! What CPUID answers: leaves made from a model and a topology.
//!
//! Intel (SDM vol. 2, CPUID) and AMD (APM vol. 3, appendix E; Hygon's processors come from AMD's) have some leaves in common
//! and tell of caches and topology in leaves of their own. A guest that thinks it is on one of them gets that one's; the
//! other's are empty, or reserved.
//!
//! ```text
//!             Intel                         AMD, Hygon
//!   caches    4 (2 says: look there)        8000_0005h, 8000_0006h, 8000_001Dh
//!   topology  1, 4, 0Bh, 1Fh with dies      1, 0Bh, 8000_0008h, 8000_001Eh
//! ```

mod layout;
#[cfg(test)]
mod tests;

use crate::features::Place;
use crate::features::Register::{self, Eax, Ebx, Ecx, Edx};
use crate::model::CpuModel;
use crate::topology::{Level, Topology};
use crate::xstate::{self, HEADER_END};

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
    /// Highest basic and highest extended leaf, highest subleaf of leaf 7.
    highest: (u32, u32, u32),
}

/// The frequency (Hz) of the core crystal clock that leaf 15h states.
const CRYSTAL_HZ: u32 = 1_000_000;
/// The leaf where a hypervisor says that it is one.
const HYPERVISOR: u32 = 0x4000_0000;
/// Bits of leaf 1's EDX that AMD shows in leaf 8000_0001h's as well (APM vol. 3, E.4.2).
const MIRRORED: u32 = 0x0183_f3ff;
/// Leaf 1, EDX: several processors share the package.
const HTT: u32 = 1 << 28;
/// Leaf 8000_0001h, ECX: they do so although they are no threads of one core.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 1, EBX: CLFLUSH flushes 8 × 8 bytes.
const CLFLUSH_8: u32 = 8 << 8;

impl Cpuid {
    /// CPUID of processor `index` of `topology`; `tsc_khz` is the TSC's frequency, `phys_bits` the width
    /// of guest-physical addresses.
    #[must_use]
    pub fn new(model: CpuModel, topology: Topology, index: u32, tsc_khz: u32, phys_bits: u8) -> Self {
        let apic_id = topology.apic_id(index);
        let (mut basic, mut extended, seven) = model.features.highest_leaves();
        if topology.dies > 1 && !model.vendor.is_like_amd() {
            basic = basic.max(0x1f);
        }
        if model.features.has("topoext") {
            extended = extended.max(0x8000_001e);
        }
        if model.features.has("svm") {
            extended = extended.max(0x8000_000a);
        }
        let highest = (model.levels.0.max(basic), model.levels.1.max(extended), seven);
        Self { model, topology, apic_id, tsc_khz, phys_bits, highest }
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

    /// All leaves and subleaves that say something, in order.
    #[must_use]
    pub fn leaves(&self) -> Vec<(u32, u32, CpuidEntry)> {
        let (basic, extended, _) = self.highest;
        let all = (0..=basic).chain([HYPERVISOR]).chain(0x8000_0000..=extended);
        let subleaves = |leaf| if Self::has_subleaves(leaf) { 0..64 } else { 0..1 };
        let with_answers = all.flat_map(|leaf| subleaves(leaf).map(move |s| (leaf, s)));
        with_answers
            .map(|(leaf, s)| (leaf, s, self.query(leaf, s)))
            // A topology leaf's subleaves without a level repeat their number and the APIC id for ever.
            .filter(|(leaf, s, e)| match leaf {
                0xb | 0x1f => *s == 0 || e.registers[1] != 0,
                _ => e.registers != [0; 4],
            })
            .collect()
    }

    /// Whether the answer depends on ECX; elsewhere a guest may leave anything in it.
    fn has_subleaves(leaf: u32) -> bool {
        matches!(leaf, 4 | 7 | 0xb | 0xd | 0x1d | 0x1e | 0x1f | 0x24 | 0x8000_001d)
    }

    /// The leaf that answers: beyond the highest one, Intel's processors take the highest basic one, AMD's answer with
    /// zeroes (`None`).
    fn answering(&self, leaf: u32) -> Option<u32> {
        let (basic, extended, _) = self.highest;
        let there = match leaf {
            0x8000_0000.. => leaf <= extended,
            HYPERVISOR..=0x4fff_ffff => leaf == HYPERVISOR && self.model.features.has("hypervisor"),
            _ => leaf <= basic,
        };
        let otherwise = if self.model.vendor.is_like_amd() { None } else { Some(basic) };
        if there { Some(leaf) } else { otherwise }
    }

    /// The answer to `leaf`/`subleaf`.
    #[must_use]
    pub fn query(&self, leaf: u32, subleaf: u32) -> CpuidEntry {
        let Some(leaf) = self.answering(leaf) else { return CpuidEntry::default() };
        let subleaf = if Self::has_subleaves(leaf) { subleaf } else { 0 };
        let registers = if leaf < HYPERVISOR {
            self.basic(leaf, subleaf)
        } else if leaf < 0x8000_0000 {
            let [b, c, d] = [b"Tere", b"mok ", b"VMM "].map(|part| u32::from_le_bytes(*part));
            [HYPERVISOR, b, c, d]
        } else {
            self.extended(leaf, subleaf)
        };
        CpuidEntry { registers }
    }

    fn bits(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        self.model.features.bits(Place::Cpuid { leaf, subleaf, register })
    }

    fn all_bits(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        [Eax, Ebx, Ecx, Edx].map(|register| self.bits(leaf, subleaf, register))
    }

    /// Several processors in a package.
    fn several(&self) -> bool {
        self.topology.in_one(Level::Socket) > 1
    }

    fn vendor_words(&self) -> [u32; 3] {
        let v = &self.model.vendor.0;
        [&v[0..4], &v[4..8], &v[8..12]].map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn basic(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let [v0, v1, v2] = self.vendor_words();
        let like_amd = self.model.vendor.is_like_amd();
        match leaf {
            0 => [self.highest.0, v0, v2, v1],
            1 => {
                let htt = if self.several() { HTT } else { 0 };
                let ebx = (self.apic_id & 0xff) << 24 | self.logical_processors() << 16 | CLFLUSH_8;
                [self.model.signature.pack(), ebx, self.bits(1, 0, Ecx), self.bits(1, 0, Edx) | htt]
            }
            2 if !like_amd => layout::NO_DESCRIPTORS,
            4 if !like_amd => self.intel_cache(subleaf),
            // Lines of 64 bytes; interrupts end `mwait` (ECX bits 0 and 1).
            5 if self.model.features.has("monitor") => [64, 64, 3, 0],
            6 => self.all_bits(leaf, 0),
            7 => {
                let [eax, ebx, ecx, edx] = self.all_bits(leaf, subleaf);
                [if subleaf == 0 { self.highest.2 } else { eax }, ebx, ecx, edx]
            }
            0xb => self.core_topology(subleaf),
            0xd => self.xsave(subleaf),
            0x15 => {
                // TSC Hz = crystal Hz × EBX / EAX.
                [CRYSTAL_HZ / 1000, self.tsc_khz, CRYSTAL_HZ, 0]
            }
            0x16 => [self.tsc_khz / 1000, self.tsc_khz / 1000, 100, 0],
            0x1d | 0x1e if self.model.features.has("amx-tile") => layout::tiles(leaf, subleaf),
            0x1f if !like_amd => self.die_topology(subleaf),
            0x24 if self.model.features.has("avx10") && subleaf == 0 => {
                [0, self.bits(leaf, 0, Ebx) | u32::from(self.model.avx10), 0, 0]
            }
            _ => [0; 4],
        }
    }

    fn extended(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let [v0, v1, v2] = self.vendor_words();
        let like_amd = self.model.vendor.is_like_amd();
        match leaf {
            0x8000_0000 => [self.highest.1, v0, v2, v1],
            0x8000_0001 => {
                let [_, _, ecx, edx] = self.all_bits(leaf, 0);
                let signature = self.model.signature.pack();
                if !like_amd {
                    return [0, 0, ecx, edx];
                }
                let legacy = if self.several() { CMP_LEGACY } else { 0 };
                [signature, 0, ecx | legacy, edx | self.bits(1, 0, Edx) & MIRRORED]
            }
            0x8000_0002..=0x8000_0004 => self.brand(leaf - 0x8000_0002),
            0x8000_0005 if like_amd => layout::amd_level_1(&self.model.caches),
            0x8000_0006 if like_amd => layout::amd_levels_2_and_3(&self.model.caches),
            0x8000_0006 => layout::intel_level_2(&self.model.caches),
            0x8000_0007 => self.all_bits(leaf, 0),
            0x8000_0008 => {
                let linear = if self.model.features.has("la57") { 57 } else { 48 };
                let [_, ebx, ..] = self.all_bits(leaf, 0);
                let ecx = if like_amd { self.amd_core_count() } else { 0 };
                [linear << 8 | u32::from(self.phys_bits), ebx, ecx, 0]
            }
            // Revision 1, 16 address space ids.
            0x8000_000a if self.model.features.has("svm") => [1, 16, 0, self.bits(leaf, 0, Edx)],
            0x8000_001d if self.model.features.has("topoext") => self.amd_cache(subleaf),
            0x8000_001e if self.model.features.has("topoext") => self.amd_topology(),
            0x8000_0021 | 0x8000_0022 => self.all_bits(leaf, 0),
            _ => [0; 4],
        }
    }

    /// Leaf 0Dh, XSAVE. The sizes of what is enabled, EBX of the first two subleaves, are the accelerator's.
    fn xsave(&self, subleaf: u32) -> [u32; 4] {
        let all = xstate::components(&self.model.features);
        let bytes = |n: usize| u32::try_from(n).unwrap_or(0);
        let component = |c: &&xstate::Component| all & c.bit != 0 && c.bit.trailing_zeros() == subleaf;
        match subleaf {
            _ if all == 0 => [0; 4],
            0 => [u32::try_from(all).unwrap_or(0), bytes(HEADER_END), bytes(xstate::standard_size(all)), 0],
            1 => [self.bits(0xd, 1, Eax), 0, 0, 0],
            _ => xstate::COMPONENTS.iter().find(component).map_or([0; 4], |c| {
                let faults_on_first_use = c.bit == xstate::TILE_DATA && self.model.features.has("xfd");
                let ecx = u32::from(c.aligned) << 1 | u32::from(faults_on_first_use) << 2;
                [bytes(c.size), bytes(c.offset), ecx, 0]
            }),
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
