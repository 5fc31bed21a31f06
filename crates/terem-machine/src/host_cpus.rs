//! A host's processor and what each accelerator can give of it: what `terem cpu` compares, and what hosts tell each other.

use serde::{Deserialize, Serialize};
use terem_cpu::{
    FeatureSet, HostCpu, IA32_ARCH_CAPABILITIES, IA32_CORE_CAPABILITIES, Place, Register, given_to_all,
};
use terem_host::KvmCpuid;

/// A host's processor with its accelerators.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCpus {
    /// The processor.
    #[serde(flatten)]
    pub cpu: HostCpu,
    /// What each accelerator can give to a guest.
    pub accelerators: Accelerators,
}

/// CPU features by the accelerator that can give them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accelerators {
    /// The software CPU.
    pub soft: FeatureSet,
    /// KVM, where it answers.
    pub kvm: Option<FeatureSet>,
}

impl HostCpus {
    /// Looks at this host.
    #[must_use]
    pub fn here() -> Self {
        let kvm =
            KvmCpuid::read(&[IA32_ARCH_CAPABILITIES, IA32_CORE_CAPABILITIES]).map(|kvm| kvm_features(&kvm));
        let accelerators = Accelerators { soft: terem_soft::supported_features(), kvm };
        Self { cpu: HostCpu::read(terem_host::cpuid), accelerators }
    }
}

/// The features that KVM can give: what it says, and what it emulates without saying so.
fn kvm_features(kvm: &KvmCpuid) -> FeatureSet {
    let said = FeatureSet::read(|place| match place {
        Place::Cpuid { leaf, subleaf, register } => {
            let [eax, ebx, ecx, edx] = kvm.query(leaf, subleaf);
            match register {
                Register::Eax => eax,
                Register::Ebx => ebx,
                Register::Ecx => ecx,
                Register::Edx => edx,
            }
        }
        Place::Msr(index) => kvm.msr(index),
    });
    let deadline = FeatureSet::of(&["tsc-deadline"]);
    let emulated = if kvm.tsc_deadline { given_to_all() } else { given_to_all().without(&deadline) };
    said.or(&emulated)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_host_says_is_read_by_another() {
        let here = HostCpus::here();
        let json = serde_json::to_string(&here).unwrap();
        assert_eq!(serde_json::from_str::<HostCpus>(&json).unwrap(), here);
        assert!(here.accelerators.soft.has("sse2"));
        // What KVM can give are features of the processor, or emulated.
        if let Some(kvm) = here.accelerators.kvm {
            assert!(kvm.has("sse2") && kvm.has("lm"), "{kvm:?}");
        }
    }
}
