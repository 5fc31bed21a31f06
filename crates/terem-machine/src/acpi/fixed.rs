//! FADT and HPET: the fixed hardware.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;
use terem_devices::chipset::acpi_pm;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::board::ports;
use crate::plan::memory::HPET_BASE;

/// `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.11): legacy devices, an i8042, no VGA.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 1 | 1 << 2;
/// Latencies above these say that there is no C2 and no C3 (table 5.9).
const NO_C2: u16 = 0xfff;
const NO_C3: u16 = 0xfff;
/// CMOS index of the century.
const CENTURY: u8 = 0x32;
/// FADT revision 6.3.
const MINOR_VERSION: u8 = 3;

/// A register block in port space.
fn io(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, port.into())
}

/// The FADT, with the ICH9's power management block.
pub(super) fn fadt(dsdt: u64, facs: u64) -> FADT {
    let mut f = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton) // no fixed sleep button
        .flag(Flags::TmrValExt) // a 32-bit PM timer
        .flag(Flags::ResetRegSup);
    f.fadt_minor_version = MINOR_VERSION;
    // The 64-bit field counts where both are given, and older systems read the 32-bit one.
    f.dsdt = u32::try_from(dsdt).unwrap_or(0).into();
    f.x_dsdt = dsdt.into();
    // Of the FACS' two fields only one may be set (5.2.9); it lies below 4 GiB.
    f.firmware_ctrl = u32::try_from(facs).unwrap_or(0).into();
    f.sci_int = u16::from(ports::SCI_IRQ).into();
    f.smi_cmd = u32::from(ports::SMI_COMMAND).into();
    f.acpi_enable = acpi_pm::ACPI_ENABLE;
    f.acpi_disable = acpi_pm::ACPI_DISABLE;
    f.pm1a_evt_blk = u32::from(ports::PM1_EVENT).into();
    f.pm1_evt_len = 4;
    f.pm1a_cnt_blk = u32::from(ports::PM1_CONTROL).into();
    f.pm1_cnt_len = 2;
    f.pm_tmr_blk = u32::from(ports::PM_TIMER).into();
    f.pm_tmr_len = 4;
    f.gpe0_blk = u32::from(ports::GPE0).into();
    f.gpe0_blk_len = ports::GPE0_LEN;
    f.x_pm1a_evt_blk = io(ports::PM1_EVENT, 32, AccessSize::WordAccess);
    f.x_pm1a_cnt_blk = io(ports::PM1_CONTROL, 16, AccessSize::WordAccess);
    f.x_pm_tmr_blk = io(ports::PM_TIMER, 32, AccessSize::DwordAccess);
    f.x_gpe0_blk = io(ports::GPE0, ports::GPE0_LEN * 8, AccessSize::ByteAccess);
    f.p_lvl2_lat = NO_C2.into();
    f.p_lvl3_lat = NO_C3.into();
    f.century = CENTURY;
    f.iapc_boot_arch = BOOT_ARCH.into();
    f.reset_reg = io(ports::RESET_CONTROL, 8, AccessSize::ByteAccess);
    f.reset_value = ports::RESET_VALUE;
    f.finalize()
}

/// The HPET table (IA-PC HPET 1.0a, 3.2.4): one block of three comparators with a 64-bit counter.
pub(super) fn hpet() -> Sdt {
    // Hardware ID as the capabilities register's low half: revision 1, three comparators (2), 64-bit,
    // legacy replacement, vendor 8086h.
    const ID: u32 = 0x8086_a201;
    let mut t = Sdt::new(*b"HPET", 36, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut body = ID.to_le_bytes().to_vec();
    body.extend([0, 64, 0, 0]); // memory space, 64 bits wide
    body.extend(HPET_BASE.to_le_bytes());
    body.push(0); // number
    body.extend(0x80_u16.to_le_bytes()); // smallest period in ticks
    body.push(0); // no page protection
    t.append_slice(&body);
    t
}
