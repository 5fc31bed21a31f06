//! Device models. A device is registers and state: it sees guest memory, an interrupt line or message,
//! and a backend; it knows no address, no accelerator, no file, no socket and no terminal.
//!
//! - [`chipset`]: what a PC has soldered on: interrupt controllers, timers, CMOS, UART, power management.
//! - [`pci`]: configuration space, BARs, MSI and MSI-X, the host bridges.
//! - [`virtio`]: queues, the PCI transport, and the devices behind it.

#![forbid(unsafe_code)]

pub mod chipset;
pub mod pci;
pub mod virtio;
