//! Boards: which devices there are and how they are wired.
//!
//! There is the [`q35`]; the i440fx will stand beside it behind the same [`Board`].

mod bars;
pub mod ports;
pub mod q35;

use std::sync::Arc;

use terem_bus::Device;

/// What the machine's life needs of a board. The processors stand still during all calls but
/// [`Self::power_button`].
pub trait Board: Send + Sync {
    /// All devices by their names on this board, in the order in which they are reset and restored.
    fn devices(&self) -> Vec<(String, Arc<dyn Device>)>;

    /// Does what firmware does before it starts an operating system: gives PCI devices their addresses.
    fn set_up(&self);

    /// Stops devices that work on their own, and waits for what they have in flight.
    fn pause(&self);

    /// Goes on after [`Self::pause`].
    fn resume(&self);

    /// Presses the power button.
    fn power_button(&self);

    /// Takes devices apart at the end: those that hold each other let go.
    fn take_down(&self);
}

/// Why a board cannot be put together: places are taken or missing.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// Ports or addresses.
    #[error(transparent)]
    Map(#[from] terem_bus::MapError),
    /// PCI functions.
    #[error(transparent)]
    Pci(#[from] terem_devices::pci::PciError),
}
