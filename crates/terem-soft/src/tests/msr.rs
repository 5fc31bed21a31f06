//! Model-specific registers that systems read without asking CPUID.

use iced_x86::code_asm::*;

use super::Rig;

/// The vector that reading an MSR ends with: #BP of the `int3` behind it where it can be read.
fn reading(number: u32) -> (u64, u64) {
    let mut rig = Rig::new();
    rig.run(|a| {
        a.mov(ecx, number)?;
        a.mov(rax, u64::MAX)?;
        a.mov(rdx, u64::MAX)?;
        a.rdmsr()?;
        a.mov(rbx, rdx)?;
        a.shl(rbx, 32)?;
        a.or(rbx, rax)?;
        a.int3()
    });
    (rig.vector(), rig.vcpu.save().gpr[3])
}

#[test]
fn what_linux_reads_of_an_amd_processor_is_there_and_nothing_is_set() {
    // Linux 6.1 reads 0xc0010055 (interrupt pending and CMP-halt) of a family fh processor to look for the C1E
    // erratum, and prints a call trace if it faults (arch_post_acpi_subsys_init).
    for number in [0xc001_0010, 0xc001_0015, 0xc001_001f, 0xc001_0055, 0xc001_0140, 0xc001_1029] {
        assert_eq!(reading(number), (3, 0), "{number:#x}");
    }
}

#[test]
fn an_unknown_one_faults() {
    assert_eq!(reading(0xc001_ffff).0, 13);
}
