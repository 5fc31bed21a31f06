//! What `/dev/kvm` is worth.
//!
//! That it opens says little: on hosts without hardware virtualisation there are KVMs that emulate the guest's kernel mode
//! at a few million instructions a second, much slower than the software CPU. So a throw-away VM counts down a register in
//! 64-bit kernel mode, ten times as many rounds each time, until that takes long enough to tell the speed.

use crate::inventory::is_char_device;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::fs::{Access, access};
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};

/// What was found out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KvmProbe {
    /// The verdict.
    pub verdict: KvmVerdict,
    /// The reason in one line.
    pub reason: String,
    /// Guest instructions a second in kernel mode, where they could be counted.
    pub instructions_per_second: Option<u64>,
}

/// Whether a guest is to be run on KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KvmVerdict {
    /// There is none.
    Absent,
    /// This user may not open it.
    Forbidden,
    /// It opens and then fails.
    Broken,
    /// It runs, but without hardware virtualisation.
    Slow,
    /// It runs at the processor's speed.
    Fast,
}

/// Below this many instructions a second there is no hardware behind it: hardware does a thousand million and more, the
/// emulations that are known a few million.
const FAST: u64 = 200_000_000;

/// A round count that takes this long tells the speed.
const LONG_ENOUGH: Duration = Duration::from_micros(500);

/// Rounds of the first and of the last measurement: 0.5 ms at 4 million and at 4,000 million instructions a second.
const ROUNDS: std::ops::RangeInclusive<u64> = 1_000..=1_000_000;

impl KvmProbe {
    /// No `/dev/kvm`.
    pub(crate) fn absent() -> Self {
        Self::found(KvmVerdict::Absent, "there is no /dev/kvm".into())
    }

    fn found(verdict: KvmVerdict, reason: String) -> Self {
        Self { verdict, reason, instructions_per_second: None }
    }

    /// Tries KVM; takes a few milliseconds.
    pub fn run() -> Self {
        let device = Path::new("/dev/kvm");
        if !is_char_device(device) {
            return Self::absent();
        }
        if access(device, Access::READ_OK | Access::WRITE_OK).is_err() {
            let why = "this user may not open /dev/kvm (usually members of the group kvm may)";
            return Self::found(KvmVerdict::Forbidden, why.into());
        }
        match measure() {
            Ok(speed) => Self::of_speed(speed),
            Err(why) => Self::found(KvmVerdict::Broken, format!("/dev/kvm opens but {why}")),
        }
    }

    fn of_speed(speed: u64) -> Self {
        let millions = speed.div_ceil(1_000_000);
        let (verdict, reason) = if speed >= FAST {
            (KvmVerdict::Fast, format!("KVM runs {millions} million instructions a second"))
        } else {
            let why = "/dev/kvm has no hardware virtualisation behind it";
            (KvmVerdict::Slow, format!("{why} ({millions} million instructions a second)"))
        };
        Self { verdict, reason, instructions_per_second: Some(speed) }
    }

    /// Whether a guest is better run on KVM than on the software CPU.
    pub fn is_worth_using(&self) -> bool {
        self.verdict == KvmVerdict::Fast
    }
}

/// The guest's memory: page tables that map its first 2 MiB, and the program.
#[repr(C, align(4096))]
struct Memory {
    pml4: [u64; 512],
    pdpt: [u64; 512],
    directory: [u64; 512],
    code: [u8; 4096],
}

/// Guest-physical address of [`Memory::code`].
const CODE: u64 = 0x3000;

/// `1: dec rcx; jnz 1b; out 0x10, al; jmp 1b`
const PROGRAM: [u8; 9] = [0x48, 0xff, 0xc9, 0x75, 0xfb, 0xe6, 0x10, 0xeb, 0xf7];

impl Memory {
    fn new() -> Box<Self> {
        const PRESENT_WRITABLE: u64 = 0b11;
        const LARGE: u64 = 1 << 7;
        let mut memory =
            Box::new(Self { pml4: [0; 512], pdpt: [0; 512], directory: [0; 512], code: [0xf4; 4096] });
        memory.pml4[0] = 0x1000 | PRESENT_WRITABLE;
        memory.pdpt[0] = 0x2000 | PRESENT_WRITABLE;
        memory.directory[0] = PRESENT_WRITABLE | LARGE;
        memory.code[..PROGRAM.len()].copy_from_slice(&PROGRAM);
        memory
    }
}

/// Instructions a second; the error continues "/dev/kvm opens but".
fn measure() -> Result<u64, String> {
    let failed = |what: &'static str| move |error: kvm_ioctls::Error| format!("{what} fails: {error}");
    let kvm = Kvm::new().map_err(failed("opening"))?;
    let vm = kvm.create_vm().map_err(failed("making a VM"))?;
    let mut memory = Memory::new();
    give_memory(&vm, &mut memory).map_err(failed("giving memory to a VM"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(failed("making a vCPU"))?;
    enter_long_mode(&vcpu).map_err(failed("setting registers"))?;
    let speed = count(&mut vcpu);
    // In this order: the kernel lets go of the memory with the VM's last descriptor.
    drop((vcpu, vm));
    drop(memory);
    speed
}

#[expect(unsafe_code, reason = "the kernel is given memory of ours by address")]
fn give_memory(vm: &VmFd, memory: &mut Memory) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: size_of::<Memory>() as u64,
        userspace_addr: std::ptr::from_mut(memory).addr() as u64,
        flags: 0,
    };
    // SAFETY: the region is a whole, page-aligned allocation of ours which `measure` keeps until after the VM and its vCPU
    // are gone, and which nobody reads or writes from here on but the guest.
    unsafe { vm.set_user_memory_region(region) }
}

/// 64-bit kernel mode with flat segments (Intel SDM volume 3, 11.8.5 and 3.4.5).
fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    const CR0_PE_ET_PG: u64 = 1 | 1 << 4 | 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x10,
        type_: 0b0011,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let code = kvm_segment { selector: 0x08, type_: 0b1011, db: 0, l: 1, ..data };
    let sregs = vcpu.get_sregs()?;
    vcpu.set_sregs(&kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        gdt: kvm_dtable::default(),
        idt: kvm_dtable::default(),
        cr0: CR0_PE_ET_PG,
        cr3: 0,
        cr4: CR4_PAE,
        efer: EFER_LME_LMA,
        ..sregs
    })
}

fn count(vcpu: &mut VcpuFd) -> Result<u64, String> {
    // Once for the faults that first touches bring.
    run(vcpu, 1)?;
    let exit_cost = run(vcpu, 1)?;
    let mut rounds = *ROUNDS.start();
    loop {
        let taken = run(vcpu, rounds)?.saturating_sub(exit_cost).max(Duration::from_nanos(1));
        if taken >= LONG_ENOUGH || rounds >= *ROUNDS.end() {
            // Two instructions a round.
            let speed = u128::from(rounds * 2) * 1_000_000_000 / taken.as_nanos();
            return Ok(u64::try_from(speed).unwrap_or(u64::MAX));
        }
        rounds *= 10;
    }
}

/// Time for `rounds` rounds and one exit.
fn run(vcpu: &mut VcpuFd, rounds: u64) -> Result<Duration, String> {
    let registers = kvm_regs { rip: CODE, rcx: rounds, rflags: 2, ..kvm_regs::default() };
    vcpu.set_regs(&registers).map_err(|error| format!("setting registers fails: {error}"))?;
    let start = Instant::now();
    match vcpu.run() {
        Ok(VcpuExit::IoOut(0x10, _)) => Ok(start.elapsed()),
        Ok(exit) => Err(format!("runs a simple loop into {exit:?}")),
        Err(error) => Err(format!("running fails: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probe_is_quick_and_gives_a_reason() {
        let start = Instant::now();
        let probe = KvmProbe::run();
        println!("{probe:?} in {:?}", start.elapsed());
        assert!(!probe.reason.is_empty());
        assert_eq!(
            probe.instructions_per_second.is_some(),
            matches!(probe.verdict, KvmVerdict::Slow | KvmVerdict::Fast)
        );
        // Generous: the machine that runs tests may be busy.
        assert!(start.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn speed_decides() {
        assert_eq!(KvmProbe::of_speed(1_700_000).verdict, KvmVerdict::Slow);
        assert_eq!(
            KvmProbe::of_speed(1_700_000).reason,
            "/dev/kvm has no hardware virtualisation behind it (2 million instructions a second)"
        );
        assert!(KvmProbe::of_speed(4_000_000_000).is_worth_using());
    }

    #[test]
    fn program_lies_where_the_registers_point() {
        assert_eq!(std::mem::offset_of!(Memory, code) as u64, CODE);
    }
}
