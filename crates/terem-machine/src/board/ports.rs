//! Fixed ports and interrupts of the q35, where PC firmware puts them.

use terem_devices::chipset::acpi_pm;

/// The power management block (ICH9 datasheet, PMBASE).
pub const PM_BASE: u16 = 0x600;
/// Bytes of it.
pub const PM_LEN: u8 = 0x80;
/// PM1 status and enable.
pub const PM1_EVENT: u16 = PM_BASE;
/// PM1 control.
pub const PM1_CONTROL: u16 = PM_BASE + 4;
/// PM timer.
pub const PM_TIMER: u16 = PM_BASE + 8;
/// General purpose event 0 status and enable.
pub const GPE0: u16 = PM_BASE + 0x20;
/// Bytes of GPE0.
pub const GPE0_LEN: u8 = 16;
/// Switches ACPI on and off.
pub const SMI_COMMAND: u16 = 0xb2;
/// The system control interrupt.
pub const SCI_IRQ: u8 = 9;
/// `SLP_TYP` of soft off (ICH9 datasheet, `PM1_CNT`).
pub const SLEEP_TYPE_S5: u8 = acpi_pm::SLEEP_TYPE_S5;
/// Reset control register.
pub const RESET_CONTROL: u16 = 0xcf9;
/// What resets everything there: system reset and CPU reset.
pub const RESET_VALUE: u8 = 0x06;
/// First serial port.
pub const COM1: u16 = 0x3f8;
/// Its interrupt.
pub const COM1_IRQ: u8 = 4;
/// `fw_cfg` selector, data and DMA.
pub const FW_CFG: u16 = 0x510;
/// Bytes of it.
pub const FW_CFG_LEN: u8 = 12;
/// pvpanic.
pub const PVPANIC: u16 = 0x505;
/// The debug exit port.
pub const DEBUG_EXIT: u16 = 0x501;
