//! virtio 1.2 devices on PCI.
//!
//! ```text
//!   driver ──registers──> VirtioPci ──features, DRIVER_OK, notify──> dyn VirtioDevice ──> backend
//!      │                      │ enables, resets                          │
//!      └────rings in RAM────> Queues (one lock a queue) <──pop, complete─┘
//!                             └──> Interrupts (MSI-X or INTx)
//! ```
//!
//! [`queue`] knows rings and nothing else; [`Queues`] is what a device's threads and its transport share;
//! [`VirtioPci`] is the transport. A device ([`Blk`], [`Net`], [`Console`], [`Rng`]) sees chains of
//! checked guest ranges and its backend.
//!
//! The driver is hostile. What it writes in registers and rings can stop its own device
//! (`DEVICE_NEEDS_RESET`, with the reason in the log), and nothing else.

pub mod blk;
pub mod console;
pub mod net;
pub mod queue;
pub mod rng;

mod common_config;
mod device;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod interrupts;
mod pci;
#[cfg(any(test, feature = "fuzzing"))]
mod testing;

pub use blk::Blk;
pub use console::Console;
pub use device::{Interrupts, Kind, Queues, Ticket, VirtioDevice, feature};
pub use net::Net;
pub use pci::VirtioPci;
pub use rng::Rng;
