//! What CPUID answers on this host, and what of it KVM can give to a guest.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm};

/// EAX, EBX, ECX and EDX of this host's CPUID.
#[must_use]
#[expect(unsafe_code, reason = "older compilers have this instruction as an unsafe function")]
#[allow(unused_unsafe, reason = "newer compilers do not")]
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    // SAFETY: every 64-bit processor has the instruction, and it touches nothing but its result.
    let r = unsafe { core::arch::x86_64::__cpuid_count(leaf, subleaf) };
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// What the kernel's KVM says that it can give to guests (`KVM_GET_SUPPORTED_CPUID` and the feature MSRs).
#[derive(Debug, Clone, Default)]
pub struct KvmCpuid {
    entries: Vec<kvm_cpuid_entry2>,
    msrs: Vec<(u32, u64)>,
    /// Whether its local APICs have the TSC-deadline timer, which no entry tells.
    pub tsc_deadline: bool,
}

impl KvmCpuid {
    /// Asks it; `msrs` are the feature MSRs to be read as well. `None` where `/dev/kvm` cannot be opened or does not answer.
    #[must_use]
    pub fn read(msrs: &[u32]) -> Option<Self> {
        let kvm = Kvm::new().ok()?;
        let entries = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).ok()?.as_slice().to_vec();
        let read = |&index: &u32| {
            let wanted = kvm_msr_entry { index, ..kvm_msr_entry::default() };
            let mut one = Msrs::from_entries(&[wanted]).ok()?;
            (kvm.get_msrs(&mut one).ok()? == 1).then(|| (index, one.as_slice()[0].data))
        };
        let msrs = msrs.iter().filter_map(read).collect();
        Some(Self { entries, msrs, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) })
    }

    /// EAX, EBX, ECX and EDX of a leaf; zeroes where KVM has nothing to give.
    #[must_use]
    pub fn query(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        /// `KVM_CPUID_FLAG_SIGNIFCANT_INDEX`: the leaf has subleaves.
        const HAS_SUBLEAVES: u32 = 1;
        let is_it = |e: &&kvm_cpuid_entry2| {
            e.function == leaf && (e.index == subleaf || e.flags & HAS_SUBLEAVES == 0)
        };
        self.entries.iter().find(is_it).map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    }

    /// The low half of a feature MSR; 0 where KVM does not know it.
    #[must_use]
    pub fn msr(&self, index: u32) -> u32 {
        let value = self.msrs.iter().find(|(i, _)| *i == index).map_or(0, |(_, value)| *value);
        (value & 0xffff_ffff) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_names_its_vendor() {
        let [highest, b, c, d] = cpuid(0, 0);
        assert!(highest >= 1);
        let letters: Vec<u8> = [b, d, c].iter().flat_map(|r| r.to_le_bytes()).collect();
        assert!(letters.is_ascii(), "{letters:?}");
    }

    #[test]
    fn kvm_gives_long_mode_where_it_answers() {
        let Some(kvm) = KvmCpuid::read(&[0x10a]) else { return };
        assert_ne!(kvm.query(0x8000_0001, 0)[3] & 1 << 29, 0);
        assert_eq!(kvm.query(0x7777_7777, 0), [0; 4]);
    }
}
