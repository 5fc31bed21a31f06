//! The architectural state of a vCPU, in a form that no accelerator owns.

use serde::{Deserialize, Serialize};

use crate::xstate::XSAVE_SIZE;

/// Bits of RFLAGS (Intel SDM vol. 1, 3.4.3).
#[allow(missing_docs, reason = "the manual's own names")]
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    /// Always set.
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// CF, PF, AF, ZF, SF and OF.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// The last offset (already scaled by granularity).
    pub limit: u32,
    /// Bits 47:40 and 55:52 of the descriptor, packed as in VMX "access rights": type 3:0, S 4, DPL 6:5,
    /// P 7, AVL 12, L 13, D/B 14, G 15 (Intel SDM vol. 3, 24.4.1), and 16: unusable (null).
    pub access: u32,
}

impl Segment {
    /// Access bit: accessed (of code and data segments).
    pub const ACCESSED: u32 = 1;
    /// Access bit: writable data or readable code.
    pub const WRITABLE: u32 = 1 << 1;
    /// Access bit: expand-down data or conforming code.
    pub const DOWN: u32 = 1 << 2;
    /// Access bit: code.
    pub const CODE: u32 = 1 << 3;
    /// Access bit S: code or data, not system.
    pub const CODE_OR_DATA: u32 = 1 << 4;
    /// Access bit: present.
    pub const PRESENT: u32 = 1 << 7;
    /// Access bit L: 64-bit code.
    pub const LONG: u32 = 1 << 13;
    /// Access bit D/B: 32-bit default size, or 32-bit stack pointer.
    pub const BIG: u32 = 1 << 14;
    /// Access bit: limit was in 4 KiB pages.
    pub const PAGES: u32 = 1 << 15;
    /// Access bit: a null selector was loaded.
    pub const UNUSABLE: u32 = 1 << 16;

    /// Descriptor privilege level.
    #[must_use]
    pub fn dpl(&self) -> u8 {
        ((self.access >> 5) & 3).to_le_bytes()[0]
    }

    /// Type field (4 bits).
    #[must_use]
    pub fn kind(&self) -> u8 {
        (self.access & 15).to_le_bytes()[0]
    }

    /// A real-mode segment: base is selector × 16, limit 64 KiB.
    #[must_use]
    pub fn real_mode(selector: u16, code: bool) -> Self {
        let kind = if code { Self::CODE } else { 0 } | Self::WRITABLE | Self::ACCESSED;
        Self {
            selector,
            base: u64::from(selector) << 4,
            limit: 0xffff,
            access: kind | Self::CODE_OR_DATA | Self::PRESENT,
        }
    }

    /// A flat 4 GiB segment of privilege 0: 32-bit code or data, or 64-bit code.
    #[must_use]
    pub fn flat(selector: u16, code: bool, long: bool) -> Self {
        let kind = if code { Self::CODE } else { 0 } | Self::WRITABLE | Self::ACCESSED;
        let size = if long { Self::LONG } else { Self::BIG };
        Self {
            selector,
            base: 0,
            limit: u32::MAX,
            access: kind | Self::CODE_OR_DATA | Self::PRESENT | size | Self::PAGES,
        }
    }
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// The last byte's offset.
    pub limit: u16,
}

/// Model-specific registers that are plain storage or have an effect on execution. The local APIC's are
/// in [`ApicState`], segment bases in their [`Segment`]s. Names are the manuals'.
#[allow(missing_docs, reason = "the manual's own names")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Msrs {
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub misc_enable: u64,
    /// Absent in states saved before it was kept.
    #[serde(default)]
    pub debugctl: u64,
    pub mtrr_def_type: u64,
    /// 64K, 16K × 2, 4K × 8.
    pub mtrr_fixed: [u64; 11],
    /// Base and mask.
    pub mtrr_variable: [(u64, u64); 8],
}

impl Default for Msrs {
    /// Values after power-on.
    fn default() -> Self {
        Self {
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            pat: 0x0007_0406_0007_0406,
            tsc_aux: 0,
            tsc_adjust: 0,
            misc_enable: 1,
            debugctl: 0,
            mtrr_def_type: 0,
            mtrr_fixed: [0; 11],
            mtrr_variable: [(0, 0); 8],
        }
    }
}

/// What a processor is doing between instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MpState {
    /// Executing.
    Running,
    /// After `hlt`, until an interrupt.
    Halted,
    /// After INIT, until a start-up IPI.
    WaitForStartUp,
}

/// System management mode (Intel SDM vol. 3, chapter 31). Absent in states saved before it was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmmState {
    /// The processor is in it.
    pub active: bool,
    /// It came there from an NMI's handler: NMIs stay held back after `rsm`.
    pub inside_nmi: bool,
    /// An SMI waits.
    pub pending: bool,
    /// An INIT waits for the end of the mode.
    pub init_pending: bool,
    /// SMBASE: the handler is at 8000h from there.
    pub base: u32,
}

impl Default for SmmState {
    /// After power-on.
    fn default() -> Self {
        Self { active: false, inside_nmi: false, pending: false, init_pending: false, base: 0x3_0000 }
    }
}

/// A local APIC's registers (Intel SDM vol. 3, chapter "APIC").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApicState {
    /// `IA32_APIC_BASE`.
    pub base: u64,
    /// Registers by their xAPIC offset divided by 16 (ID in its xAPIC place and form; in x2APIC mode the
    /// ID and the logical ID are the vCPU's and not read from here).
    pub registers: Vec<u32>,
    /// Virtual time (ns) at which the current timer period or countdown began.
    pub timer_start: u64,
    /// `IA32_TSC_DEADLINE`.
    pub tsc_deadline: u64,
    /// Whether INTR from the PIC is high.
    pub intr: bool,
}

/// Everything that a vCPU holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 … R15.
    pub gpr: [u64; 16],
    /// Instruction pointer (offset in CS).
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// TR.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
    /// DR0 … DR3, DR6, DR7.
    pub debug: [u64; 6],
    /// Model-specific registers.
    pub msrs: Msrs,
    /// The time-stamp counter's value at the moment of saving.
    pub tsc: u64,
    /// x87, SSE and AVX state, and PKRU: an XSAVE area in standard format, [`XSAVE_SIZE`] bytes.
    pub xsave: Vec<u8>,
    /// The local APIC.
    pub apic: ApicState,
    /// Running, halted or waiting.
    pub mp_state: MpState,
    /// Interrupts are held back for one instruction after `sti` or a load of SS.
    pub interrupt_shadow: bool,
    /// NMIs are held back until `iret`.
    pub nmi_masked: bool,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// System management mode.
    #[serde(default)]
    pub smm: SmmState,
}

/// Index into [`VcpuState::segments`].
impl VcpuState {
    /// ES.
    pub const ES: usize = 0;
    /// CS.
    pub const CS: usize = 1;
    /// SS.
    pub const SS: usize = 2;
    /// DS.
    pub const DS: usize = 3;
    /// FS.
    pub const FS: usize = 4;
    /// GS.
    pub const GS: usize = 5;

    /// The state after power-on of the processor with this APIC id (Intel SDM vol. 3, table 10-1): the
    /// boot processor at the reset vector, others waiting.
    #[must_use]
    pub fn power_on(apic_id: u32, boot: bool) -> Self {
        let data = Segment::real_mode(0, false);
        let mut segments = [data; 6];
        segments[Self::CS] = Segment { base: 0xffff_0000, ..Segment::real_mode(0xf000, true) };
        let mut xsave = vec![0; XSAVE_SIZE];
        xsave[0..2].copy_from_slice(&0x037f_u16.to_le_bytes()); // FCW
        xsave[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes()); // MXCSR
        xsave[28..32].copy_from_slice(&0xffff_u32.to_le_bytes()); // MXCSR_MASK
        let mut registers = vec![0; 64];
        registers[0x02] = apic_id << 24;
        registers[0x03] = 0x0005_0014; // version 14h, 6 LVT entries
        registers[0x0e] = u32::MAX; // DFR: flat
        registers[0x0f] = 0xff; // SVR: disabled
        registers[0x32..=0x37].fill(1 << 16); // LVT entries: masked
        let base = 0xfee0_0000 | 1 << 11 | if boot { 1 << 8 } else { 0 };
        Self {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: rflags::FIXED,
            segments,
            ldtr: Segment { selector: 0, base: 0, limit: 0xffff, access: 0x82 },
            tr: Segment { selector: 0, base: 0, limit: 0xffff, access: 0x8b },
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            xcr0: 1,
            debug: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            msrs: Msrs::default(),
            tsc: 0,
            xsave,
            apic: ApicState { base, registers, timer_start: 0, tsc_deadline: 0, intr: false },
            mp_state: if boot { MpState::Running } else { MpState::WaitForStartUp },
            interrupt_shadow: false,
            nmi_masked: false,
            nmi_pending: false,
            smm: SmmState::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn power_on_is_at_the_reset_vector() {
        let s = VcpuState::power_on(0, true);
        let cs = s.segments[VcpuState::CS];
        assert_eq!(cs.base + s.rip, 0xffff_fff0);
        assert_eq!(s.apic.base, 0xfee0_0900);
        let ap = VcpuState::power_on(3, false);
        assert_eq!((ap.mp_state, ap.apic.registers[2] >> 24), (MpState::WaitForStartUp, 3));
        let json = serde_json::to_string(&ap).unwrap();
        assert_eq!(serde_json::from_str::<VcpuState>(&json).unwrap(), ap);
    }
}
