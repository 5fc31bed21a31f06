//! What a PC has soldered on: interrupt controllers, timers, CMOS, serial ports, power management, and
//! the q35 chipset's own PCI functions.
//!
//! # Where a PC has them
//!
//! A device knows only offsets; the board maps it. These are the standard places:
//!
//! | ports | length | what |
//! | --- | --- | --- |
//! | `020h` | 2 | [`pic::PicPorts`], first |
//! | `040h` | 4 | [`pit::Pit`] |
//! | `060h` | 1 | [`i8042::I8042Ports`], data |
//! | `061h` | 1 | [`pit::Port61`] |
//! | `064h` | 1 | [`i8042::I8042Ports`], command |
//! | `070h` | 4 | [`rtc::Rtc`] |
//! | `092h` | 1 | [`i8042::Port92`] |
//! | `0A0h` | 2 | [`pic::PicPorts`], second |
//! | `0B2h` | 2 | [`acpi_pm::SmiPorts`] (SMI_CMD, status) |
//! | `0E9h` | 1 | [`debugcon::Debugcon`] |
//! | `2F8h`, `3F8h` | 8 | [`uart::Uart`] COM2 (IRQ 3), COM1 (IRQ 4) |
//! | `402h` | 1 | [`debugcon::Debugcon`], for firmware |
//! | `4D0h` | 2 | [`pic::PicPorts`], edge/level |
//! | `505h` | 1 | [`pvpanic::Pvpanic`] |
//! | `510h` | 12 | [`fw_cfg::FwCfg`] |
//! | `501h` | 4 | [`debug_exit::DebugExit`] |
//! | `600h` | 128 | [`acpi_pm::AcpiPm`], moved by the LPC bridge's PMBASE |
//! | `CF8h` | 8 | [`crate::pci::ConfigPorts`], with [`reset_control::ResetControl`] at `CF9h` |
//!
//! | address | length | what |
//! | --- | --- | --- |
//! | `B000_0000h` | 256 MiB | [`crate::pci::Ecam`], moved by the MCH's PCIEXBAR |
//! | `FEC0_0000h` | 4 KiB | [`ioapic::IoApic`] |
//! | `FED0_0000h` | 1 KiB | [`hpet::Hpet`] |
//! | `FED1_C000h` | 16 KiB | the LPC bridge's RCBA |
//!
//! # Interrupts
//!
//! [`router::InterruptRouter`] stands between devices and the PIC and I/O APIC. Locks are taken in this
//! order: device, router, PIC or I/O APIC; [`terem_bus::ApicBus`] is called with the latter held, so a
//! local APIC must not hold a lock of its own when it acknowledges or ends an interrupt.
//!
//! The i440fx's two functions (`pmc.rs`, `piix3.rs`) will stand beside [`mch`] and [`ich9_lpc`].

pub mod acpi_pm;
mod calendar;
mod counter;
pub mod debug_exit;
pub mod debugcon;
pub mod fw_cfg;
pub mod hpet;
pub mod i8042;
pub mod ich9_lpc;
pub mod ioapic;
pub mod mch;
pub mod pic;
pub mod pit;
mod ps2;
pub mod pvpanic;
pub mod reset_control;
pub mod router;
pub mod rtc;
pub mod uart;
mod window;

#[cfg(test)]
mod board_tests;
#[cfg(test)]
mod lab;

/// What a guest's kernel said about its own end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestPanic {
    /// It panicked and stays so.
    Panicked,
    /// It panicked and goes on in a crash kernel.
    CrashLoaded,
    /// It announces an orderly shutdown.
    Shutdown,
}

/// What happens to the whole board. Called from vCPU threads with the device locked: implementations
/// make a note of it (and stop the vCPUs), and act on another thread.
pub trait BoardEvents: Send + Sync {
    /// The power goes off: ACPI S5.
    fn power_off(&self);

    /// The CPUs and devices are reset.
    fn reset(&self);

    /// The guest's kernel panicked, or says so otherwise.
    fn guest_panicked(&self, kind: GuestPanic);

    /// A test asks for the machine's end with this value (isa-debug-exit).
    fn exit(&self, value: u32);
}
