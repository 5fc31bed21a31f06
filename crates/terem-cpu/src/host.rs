//! A host's processor, as read from its CPUID.

use serde::{Deserialize, Serialize};

use crate::cache::Caches;
use crate::features::{FeatureSet, Place, Register};
use crate::model::{Signature, Vendor};

/// What a host's processor is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCpu {
    /// Who made it.
    pub vendor: Vendor,
    /// Family, model and stepping.
    pub signature: Signature,
    /// Brand string.
    pub brand: String,
    /// Width of physical addresses, in bits.
    pub phys_bits: u8,
    /// Highest basic and highest extended CPUID leaf.
    pub levels: (u32, u32),
    /// Version of AVX10, 0 without.
    pub avx10: u8,
    /// Its caches.
    pub caches: Caches,
    /// What it has, of what has a name here.
    pub features: FeatureSet,
}

/// Leaf 8000_0008h's answer where there is no such leaf.
const PHYS_BITS: u8 = 36;

impl HostCpu {
    /// Reads it; `cpuid` answers EAX, EBX, ECX and EDX for a leaf and subleaf, all zeroes for leaves that there are not.
    pub fn read(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Self {
        let ([basic, b, c, d], [extended, ..]) = (cpuid(0, 0), cpuid(0x8000_0000, 0));
        let leaf = |leaf: u32, subleaf: u32| {
            let highest = if leaf < 0x8000_0000 { basic } else { extended };
            if leaf <= highest { cpuid(leaf, subleaf) } else { [0; 4] }
        };
        let mut letters = [0; 12];
        for (to, from) in letters.chunks_exact_mut(4).zip([b, d, c]) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        let vendor = Vendor(letters.map(|l| if l.is_ascii_graphic() || l == b' ' { l } else { b'?' }));
        let brand: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .flat_map(|l| leaf(l, 0))
            .flat_map(u32::to_le_bytes)
            .take_while(|b| *b != 0)
            .collect();
        let caches = Caches::read(|i| leaf(if vendor.is_like_amd() { 0x8000_001d } else { 4 }, i));
        let [address_bits, ..] = leaf(0x8000_0008, 0).map(|r| r.to_le_bytes()[0]);
        Self {
            vendor,
            signature: Signature::unpack(leaf(1, 0)[0]),
            brand: String::from_utf8_lossy(&brand).trim().to_owned(),
            phys_bits: if address_bits == 0 { PHYS_BITS } else { address_bits },
            levels: (basic, extended),
            avx10: leaf(0x24, 0)[1].to_le_bytes()[0],
            caches: caches.unwrap_or(Caches::usual()),
            features: read_features(leaf),
        }
    }
}

/// The features that CPUID shows; those in model-specific registers are not read.
pub fn read_features(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> FeatureSet {
    FeatureSet::read(|place| match place {
        Place::Cpuid { leaf, subleaf, register } => {
            let [eax, ebx, ecx, edx] = cpuid(leaf, subleaf);
            match register {
                Register::Eax => eax,
                Register::Ebx => ebx,
                Register::Ecx => ecx,
                Register::Edx => edx,
            }
        }
        Place::Msr(_) => 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CpuModel, Cpuid, Topology};

    #[test]
    fn a_model_reads_back_as_what_it_is() {
        for name in ["SapphireRapids-v2", "EPYC-Milan", "Dhyana", "terem64"] {
            let model = CpuModel::find(name, &[]).unwrap();
            let cpuid = Cpuid::new(model.clone(), Topology::flat(2), 0, 1_000_000, 46);
            let host = HostCpu::read(|l, s| cpuid.query(l, s).registers);
            assert_eq!(
                (host.vendor, host.signature, &host.brand),
                (model.vendor, model.signature, &model.brand)
            );
            assert_eq!((host.phys_bits, host.caches), (46, model.caches), "{name}");
            let more = host.features.missing_from(&model.features);
            assert!(more.iter().all(|f| matches!(*f, "ht" | "cmp-legacy")), "{more:?}");
            let fewer = model.features.without(&host.features);
            assert!(fewer.iter().all(|f| matches!(f.place, Place::Msr(_))), "{fewer:?}");
        }
    }

    #[test]
    fn a_processor_without_leaves_is_read() {
        let host = HostCpu::read(|_, _| [0; 4]);
        assert_eq!((host.vendor.to_string(), host.phys_bits), ("????????????".into(), 36));
        assert!(host.features.is_empty());
    }
}
