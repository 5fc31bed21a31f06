//! The state of one software vCPU, laid out for execution.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use terem_bus::Bus;
use terem_cpu::{Cpuid, DescriptorTable, Msrs, Segment, rflags};
use terem_memory::GuestMemory;

use crate::apic::Apic;
use crate::block::BlockCache;
use crate::decode::{InstructionSet, Mode};
use crate::mmu::Tlb;
use crate::op::{IP_REG, Op};
use crate::stats::Stats;
use crate::trace::Tracing;
use crate::watch::Watches;
use crate::x87::Fpu;

/// A 128-bit vector register.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Xmm(pub u128);

/// A 256-bit vector register: the XMM register of the same number, and what lies above it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, align(32))]
pub struct Ymm {
    /// Bits 127:0.
    pub low: Xmm,
    /// Bits 255:128.
    pub high: Xmm,
}

/// CR0 bits (Intel SDM vol. 3, 2.5).
#[allow(missing_docs, reason = "the manual's own names")]
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits (Intel SDM vol. 3, 2.5).
#[allow(missing_docs, reason = "the manual's own names")]
pub mod cr4 {
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
}

/// EFER bits.
#[allow(missing_docs, reason = "the manual's own names")]
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// One vCPU. Handlers get it mutably; nobody else touches it while it runs.
#[repr(C)]
pub struct Cpu {
    /// RAX … R15; [`crate::op::NO_REG`]: zero; [`IP_REG`]: RIP of the block that runs.
    pub gpr: [u64; 18],
    /// Where to go on. Set to the block's end before a block runs, so only jumps need to set it. While a
    /// block runs, an instruction's own RIP is [`Self::op_rip`].
    pub rip: u64,
    /// OF, 0 or 1. Translated code stores it together with the next one, as AX.
    pub of: u8,
    /// SF, ZF, AF, PF and CF as `lahf` puts them (bit 1 set or not: ignored).
    pub ah: u8,
    /// RFLAGS without the arithmetic flags: [`Self::rflags`] puts both together.
    pub system_flags: u64,
    /// Bases of ES, CS, SS, DS, FS, GS as addressing uses them; 6 and 7 are zero (flat). In 64-bit mode
    /// those of ES, CS, SS and DS are zero here whatever the descriptors say.
    pub segment_base: [u64; 8],
    /// ES, CS, SS, DS, FS, GS with their hidden parts.
    pub segments: [Segment; 6],
    /// Present privilege level (0–3).
    pub cpl: u8,

    /// XMM registers, each with the upper half of its YMM register.
    pub ymm: [Ymm; 16],
    /// Whether upper halves may be other than zero; translated code uses it as a byte.
    pub(crate) uppers: bool,
    /// MXCSR; while [`Self::mxcsr_on_host`], without the flags raised since: [`Self::guest_mxcsr`].
    pub mxcsr: u32,
    /// The host's MXCSR collects the guest's flags.
    pub(crate) mxcsr_on_host: bool,
    /// x87 and MMX.
    pub fpu: Fpu,

    /// The block's end while it runs; null ends it after the present instruction.
    pub(crate) op_end: *const Op,
    /// First host address of guest memory.
    pub(crate) window: u64,
    /// The end of the RAM that begins at 0.
    pub(crate) low_ram: u64,
    /// The marks of guest memory's pages.
    pub(crate) marks: *const AtomicU32,
    pub(crate) tlb: Tlb,
    /// How code is decoded now, from segments and control registers.
    pub(crate) mode: Mode,
    /// The mode in a few bits, as part of what a block is found by.
    pub(crate) mode_key: u32,
    pub(crate) instruction_set: Arc<InstructionSet>,

    /// CR0, CR2, CR3, CR4, XCR0.
    pub cr0: u64,
    /// The faulting address.
    pub cr2: u64,
    /// Page-table base.
    pub cr3: u64,
    /// Control bits.
    pub cr4: u64,
    /// Enabled XSAVE components.
    pub xcr0: u64,
    /// What may be done with pages of each protection key: two bits a key, access-disable and write-disable.
    pub pkru: u32,
    /// DR0–DR3, DR6, DR7.
    pub debug: [u64; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// Model-specific registers.
    pub msrs: Msrs,
    /// TSC minus the virtual clock (ns).
    pub tsc_offset: u64,

    /// Break- and watchpoints.
    pub(crate) watches: Watches,
    /// Interrupts are held back until the next instruction is done.
    pub(crate) interrupt_shadow: bool,
    /// That shadow is of a load of SS, which holds back debug exceptions as well.
    pub(crate) shadow_of_stack: bool,
    /// `syscall` has cleared TF: it is not stepped over.
    pub(crate) steps_over: bool,
    /// An exception to be raised before the next instruction, in the context that the last one went to.
    pub(crate) deferred: Option<crate::fault::Fault>,
    pub(crate) nmi_masked: bool,
    /// System management mode; what waits is the APIC's.
    pub(crate) smm: terem_cpu::SmmState,
    pub(crate) halted: bool,
    /// The line that `mwait` is to wait for.
    pub(crate) monitored: Option<crate::system::Monitored>,
    pub(crate) waiting_for_start_up: bool,
    /// The vCPU shut down (triple fault).
    pub(crate) shut_down: bool,

    /// This vCPU's number.
    pub id: u32,
    /// Its CPUID.
    pub cpuid: Cpuid,
    /// The outside.
    pub bus: Arc<Bus>,
    /// Guest memory.
    pub memory: GuestMemory,
    pub(crate) apic: Arc<Apic>,
    pub(crate) blocks: BlockCache,
    pub(crate) native: crate::translate::Native,
    /// Programs that run directly, where that is on.
    pub(crate) direct: Option<Box<crate::direct::Direct>>,
    /// The present context's program does.
    pub(crate) runs_directly_here: bool,
    /// How often user code was left for a kernel.
    pub(crate) kernel_entries: u64,
    /// Counters.
    pub(crate) stats: Arc<Stats>,
    /// Who is told what it does; mostly nobody.
    pub(crate) tracing: Option<Box<Tracing>>,
    /// Faults are not delivered but left in [`Self::caught`], with RIP.
    #[cfg(test)]
    pub(crate) catches: bool,
    #[cfg(test)]
    pub(crate) caught: Option<(crate::fault::Fault, u64)>,
}

// SAFETY: the raw pointers point into `memory`, which the value owns a share of, and (op_end) into its own
// block cache, only while a block runs.
unsafe impl Send for Cpu {}

impl Cpu {
    /// A general register's slot, including the zero and RIP slots.
    #[inline(always)]
    #[must_use]
    pub fn slot(&self, index: u8) -> u64 {
        // SAFETY: slots come from the decoder, which gives 0–17 only.
        unsafe { *self.gpr.get_unchecked(usize::from(index)) }
    }

    /// RIP of the instruction `op` that is being executed.
    #[inline(always)]
    #[must_use]
    pub fn op_rip(&self, op: &Op) -> u64 {
        self.next_rip(op).wrapping_sub(u64::from(op.len))
    }

    /// RIP of the instruction after `op`, not cut to the code segment's size.
    #[inline(always)]
    #[must_use]
    pub fn next_rip(&self, op: &Op) -> u64 {
        self.gpr[usize::from(IP_REG)].wrapping_add(u64::from(op.next))
    }

    /// All of RFLAGS.
    #[inline]
    #[must_use]
    pub fn rflags(&self) -> u64 {
        self.system_flags | u64::from(self.ah & 0xd5) | u64::from(self.of) << 11 | rflags::FIXED
    }

    /// Sets all of RFLAGS, without any check of privilege.
    pub fn set_rflags(&mut self, value: u64) {
        self.ah = value as u8 & 0xd5;
        self.of = (value >> 11 & 1) as u8;
        let kept = value & !rflags::ARITHMETIC & 0x003f_7fd5 | rflags::FIXED;
        let changed = self.system_flags ^ kept;
        self.system_flags = kept;
        if changed & (rflags::AC | rflags::TF | rflags::VM) != 0 {
            self.refresh_mode();
        }
        if changed & kept & rflags::IF != 0 {
            self.apic.accepts_more();
        }
    }

    /// Whether the carry flag is set.
    #[inline(always)]
    #[must_use]
    pub fn carry(&self) -> bool {
        self.ah & 1 != 0
    }

    /// Whether long mode is active (64-bit or compatibility).
    #[inline(always)]
    #[must_use]
    pub fn long_mode(&self) -> bool {
        self.msrs.efer & efer::LMA != 0
    }

    /// Whether code is 64-bit.
    #[inline]
    #[must_use]
    pub fn code64(&self) -> bool {
        self.long_mode() && self.segments[terem_cpu::VcpuState::CS].access & Segment::LONG != 0
    }

    /// Whether protected mode (or long mode) is on, and virtual-8086 mode is not.
    #[inline]
    #[must_use]
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0 && self.system_flags & rflags::VM == 0
    }
}
