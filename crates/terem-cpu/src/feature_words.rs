//! Which feature stands where: the names of each place's bits, from bit 0 on.

use crate::features::{Place, Register};
use Register::{Eax, Ebx, Ecx, Edx};

/// What the processor is immune to, and which remedies it has (Intel SDM vol. 4, table 2-2).
pub const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
/// Which faults it can raise for accesses across lines (Intel SDM vol. 4, table 2-2).
pub const IA32_CORE_CAPABILITIES: u32 = 0xcf;

const fn cpuid(leaf: u32, subleaf: u32, register: Register) -> Place {
    Place::Cpuid { leaf, subleaf, register }
}

/// The places, each with the names of its bits from bit 0 on, eight to a line; `-` is a bit without a name.
#[rustfmt::skip]
pub(crate) const WORDS: [(Place, &str); 21] = [
    (cpuid(1, 0, Edx), "\
        fpu vme de pse tsc msr pae mce \
        cx8 apic - sep mtrr pge mca cmov \
        pat pse36 pn clflush - ds acpi mmx \
        fxsr sse sse2 ss ht tm ia64 pbe"),
    (cpuid(1, 0, Ecx), "\
        sse3 pclmulqdq dtes64 monitor ds-cpl vmx smx est \
        tm2 ssse3 cid - fma cx16 xtpr pdcm \
        - pcid dca sse4.1 sse4.2 x2apic movbe popcnt \
        tsc-deadline aes xsave - avx f16c rdrand hypervisor"),
    (cpuid(6, 0, Eax), "\
        - - arat"),
    (cpuid(7, 0, Ebx), "\
        fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep \
        bmi2 erms invpcid rtm - zero-fcs-fds mpx - \
        avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt \
        clwb intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl"),
    (cpuid(7, 0, Ecx), "\
        - avx512vbmi umip pku - waitpkg avx512vbmi2 - \
        gfni vaes vpclmulqdq avx512vnni avx512bitalg - avx512-vpopcntdq - \
        la57 - - - - - rdpid - \
        bus-lock-detect cldemote - movdiri movdir64b - sgxlc pks"),
    (cpuid(7, 0, Edx), "\
        - - avx512-4vnniw avx512-4fmaps fsrm - - - \
        avx512-vp2intersect - md-clear - - - serialize - \
        tsx-ldtrk - - arch-lbr - - amx-bf16 avx512-fp16 \
        amx-tile amx-int8 spec-ctrl stibp flush-l1d arch-capabilities core-capability ssbd"),
    (cpuid(7, 1, Eax), "\
        sha512 sm3 sm4 - avx-vnni avx512-bf16 - cmpccxadd \
        - - fzrm fsrs fsrc - - - \
        - fred lkgs wrmsrns - amx-fp16 - avx-ifma \
        - - lam"),
    (cpuid(7, 1, Edx), "\
        - - - - avx-vnni-int8 avx-ne-convert - - \
        amx-complex - avx-vnni-int16 - - - prefetchiti - \
        - - - avx10"),
    (cpuid(7, 2, Edx), "\
        intel-psfd ipred-ctrl rrsba-ctrl ddpd-u bhi-ctrl mcdt-no"),
    (cpuid(0xd, 1, Eax), "\
        xsaveopt xsavec xgetbv1 xsaves xfd"),
    // Bits 0 to 7 are the version.
    (cpuid(0x24, 0, Ebx), "\
        - - - - - - - - \
        - - - - - - - - \
        avx10-128 avx10-256 avx10-512"),
    (cpuid(0x8000_0001, 0, Ecx), "\
        lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse \
        3dnowprefetch osvw ibs xop skinit wdt - lwp \
        fma4 tce - nodeid-msr - tbm topoext perfctr-core \
        perfctr-nb"),
    // What AMD shows of leaf 1 here as well is not named again.
    (cpuid(0x8000_0001, 0, Edx), "\
        - - - - - - - - \
        - - - syscall - - - - \
        - - - - nx - mmxext - \
        - fxsr-opt pdpe1gb rdtscp - lm 3dnowext 3dnow"),
    (cpuid(0x8000_0007, 0, Ebx), "\
        overflow-recov succor"),
    (cpuid(0x8000_0007, 0, Edx), "\
        - - - - - - - - \
        invtsc"),
    (cpuid(0x8000_0008, 0, Ebx), "\
        clzero - xsaveerptr - - - - - \
        - wbnoinvd - - ibpb - ibrs amd-stibp \
        - stibp-always-on - - - - - - \
        amd-ssbd virt-ssbd amd-no-ssb - amd-psfd"),
    (cpuid(0x8000_000a, 0, Edx), "\
        npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists \
        - - pause-filter - pfthreshold avic - v-vmsave-vmload \
        vgif - - - - - - - \
        - vnmi - - svme-addr-chk"),
    (cpuid(0x8000_0021, 0, Eax), "\
        no-nested-data-bp - lfence-always-serializing - - - null-sel-clr-base - \
        auto-ibrs - - - - - - - \
        - - - - - - - - \
        eraps - - sbpb ibpb-brtype srso-no srso-user-kernel-no"),
    (cpuid(0x8000_0022, 0, Eax), "\
        perfmon-v2"),
    (Place::Msr(IA32_CORE_CAPABILITIES), "\
        - - - - - split-lock-detect"),
    (Place::Msr(IA32_ARCH_CAPABILITIES), "\
        rdctl-no ibrs-all rsba skip-l1dfl-vmentry ssb-no mds-no pschange-mc-no tsx-ctrl \
        taa-no - - - - sbdr-ssdp-no fbsdp-no psdp-no \
        - fb-clear - - bhi-no - - - \
        pbrsb-no - gds-no rfds-no rfds-clear"),
];
