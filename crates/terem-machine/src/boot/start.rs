//! Processor states at a kernel's entry point.

use terem_cpu::{DescriptorTable, Segment, VcpuState, rflags};

use super::Problem;
use super::space::{GDT, PAGE_TABLES, STACK_TOP, Space};
use crate::plan::MemoryMap;
use crate::plan::memory::LOW_MEMORY_LIMIT;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// Present, writable.
const PTE_TABLE: u64 = 3;
/// Present, writable, 2 MiB page.
const PTE_LARGE: u64 = 3 | 1 << 7;

/// Local APIC registers by number (Intel SDM vol. 3, table "Local APIC Register Address Map").
const SVR: usize = 0x0f;
const LVT_LINT0: usize = 0x35;
const LVT_LINT1: usize = 0x36;

/// Does what firmware does to each processor before an operating system starts: switches on the MTRRs
/// (write-back RAM, uncached device windows), and on the boot processor the local APIC in virtual wire
/// mode (Intel `MultiProcessor` Specification 1.4, 3.6.2.2).
pub fn firmware_defaults(state: &mut VcpuState, map: &MemoryMap, boot: bool) {
    const WB: u64 = 0x0606_0606_0606_0606;
    let m = &mut state.msrs;
    // MTRRs and fixed ranges enabled, write-back by default.
    m.mtrr_def_type = 0xc06;
    m.mtrr_fixed = [WB; 11];
    m.mtrr_fixed[2] = 0; // A0000–BFFFF: the VGA window
    // 2–4 GiB uncached: the PCI window and the APICs.
    let mask = ((1_u64 << map.phys_bits) - 1) & !(LOW_MEMORY_LIMIT - 1);
    m.mtrr_variable[0] = (LOW_MEMORY_LIMIT, mask | 1 << 11);
    if boot && let Some(last) = state.apic.registers.get_mut(..=LVT_LINT1) {
        last[SVR] = 0x1ff; // software-enabled, spurious vector FFh
        last[LVT_LINT0] = 0x700; // ExtINT: the PIC
        last[LVT_LINT1] = 0x400; // NMI
    }
}

/// The boot processor in 64-bit mode, with the first 4 GiB identity-mapped and RSI set: Linux' 64-bit boot
/// protocol (Documentation/arch/x86/boot.rst). Writes page tables and GDT.
pub(super) fn long_mode(
    space: &Space<'_>,
    map: &MemoryMap,
    entry: u64,
    rsi: u64,
) -> Result<VcpuState, Problem> {
    page_tables(space)?;
    let code = Segment::flat(0x10, true, true);
    let data = Segment::flat(0x18, false, false);
    let mut state = flat(space, map, [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff], code, data)?;
    state.cr0 = CR0_PE | CR0_ET | CR0_PG;
    state.cr3 = PAGE_TABLES;
    state.cr4 = CR4_PAE;
    state.msrs.efer = EFER_LME_LMA;
    state.rip = entry;
    state.gpr[6] = rsi;
    Ok(state)
}

/// The boot processor in 32-bit protected mode without paging: PVH (xen/include/public/arch-x86/hvm/start_info.h)
/// and multiboot (3.2). Writes the GDT.
pub(super) fn protected_mode(
    space: &Space<'_>,
    map: &MemoryMap,
    entry: u32,
    eax: u32,
    ebx: u32,
) -> Result<VcpuState, Problem> {
    let code = Segment::flat(0x10, true, false);
    let data = Segment::flat(0x18, false, false);
    let mut state = flat(space, map, [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff], code, data)?;
    state.cr0 = CR0_PE | CR0_ET;
    state.rip = entry.into();
    state.gpr[0] = eax.into();
    state.gpr[3] = ebx.into();
    Ok(state)
}

/// Flat segments out of a GDT, interrupts off.
fn flat(
    space: &Space<'_>,
    map: &MemoryMap,
    gdt: [u64; 4],
    code: Segment,
    data: Segment,
) -> Result<VcpuState, Problem> {
    let mut state = VcpuState::power_on(0, true);
    firmware_defaults(&mut state, map, true);
    // A TSS of 104 bytes at 0, as PVH wants one; nothing uses it before the kernel sets its own.
    let table: Vec<u64> = gdt.into_iter().chain([0x0000_8b00_0000_0067, 0]).collect();
    let bytes: Vec<u8> = table.iter().flat_map(|d| d.to_le_bytes()).collect();
    space.write(GDT, &bytes)?;
    state.segments = [data; 6];
    state.segments[VcpuState::CS] = code;
    state.tr = Segment { selector: 0x20, base: 0, limit: 0x67, access: 0x8b };
    state.ldtr = Segment { access: Segment::UNUSABLE | 0x82, ..state.ldtr };
    state.gdtr = DescriptorTable { base: GDT, limit: u16::try_from(bytes.len() - 1).unwrap_or(0) };
    state.idtr = DescriptorTable { base: 0, limit: 0 };
    state.rflags = rflags::FIXED;
    state.gpr[4] = STACK_TOP;
    Ok(state)
}

/// PML4 → PDPT → four page directories of 2 MiB pages.
fn page_tables(space: &Space<'_>) -> Result<(), Problem> {
    const PAGE: u64 = 4096;
    let (pdpt, directories) = (PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
    space.zero(PAGE_TABLES, 2 * PAGE)?;
    space.write(PAGE_TABLES, &(pdpt | PTE_TABLE).to_le_bytes())?;
    for i in 0..4 {
        space.write(pdpt + i * 8, &((directories + i * PAGE) | PTE_TABLE).to_le_bytes())?;
    }
    let large: Vec<u8> = (0..2048_u64).flat_map(|i| (i << 21 | PTE_LARGE).to_le_bytes()).collect();
    space.write(directories, &large)
}
