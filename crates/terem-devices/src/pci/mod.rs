//! PCI: configuration space, BARs, MSI and MSI-X, INTx, and the ways in from the host (ports
//! `CF8h`/`CFCh` and ECAM).
//!
//! ```text
//!   vCPU ──CF8h/CFCh──> ConfigPorts ─┐
//!   vCPU ──ECAM───────> Ecam ────────┴─> RootComplex ──> PciBus ──> dyn PciDevice (a PciFunction)
//!   vCPU ──BAR────────> Bus::mmio / Bus::ports ─────────────────> the device's Handler
//!   device ──MsixVector::trigger / PciFunction::set_intx──> MsiSink / IrqLine
//! ```
//!
//! # How a device becomes a PCI function
//!
//! A [`FunctionBuilder`] collects the header, BARs and capabilities, and gives an `Arc<PciFunction>`:
//!
//! ```text
//! let mut b = FunctionBuilder::new(Identity { vendor_id, device_id, .. }, ConfigSize::Extended, wiring);
//! let vectors = b.msix_bar(1, 4)?;                 // BAR 1: table and PBA, nothing else to do
//! b.bar(4, BarKind::Memory64 { prefetchable: true }, 0x4000, "virtio-blk modern")?;
//! let at = b.capability(capability::VENDOR, &body, &writable)?;
//! b.interrupt_pin(Pin::A);
//! let function = b.build();
//! function.set_bar_handler(4, handler);             // any Arc<dyn Handler>, usually the device itself
//! function.set_hook(Arc::downgrade(&device) as _);  // only where registers act: see ConfigHook
//! bus.attach(Address::new(3, 0), function)?;
//! ```
//!
//! # Locks
//!
//! A configuration write holds a lock of the function that nothing else takes, so BAR handlers and
//! hooks may lock their device, and a device may raise interrupts ([`MsixVector::trigger`],
//! [`PciFunction::set_intx`]) and read registers while it is locked. It must not *write* its own
//! configuration space then.
//!
//! Bridges (type 1 headers) will be `PciDevice`s that own a [`PciBus`]; [`RootComplex`] is where their
//! bus numbers will be looked up.

pub mod capability;

mod bar;
mod config_space;
mod function;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod msi;
mod msix;
mod root;

pub use bar::{BAR_COUNT, BarKind};
pub use config_space::{ConfigSize, ConfigSpace, Identity, register};
pub use function::{ConfigHook, FunctionBuilder, FunctionState, PciFunction, Pin, Wiring};
pub use msi::MsiState;
pub use msix::{MsixState, MsixVector, MsixVectors};
pub use root::{Address, ConfigPorts, Ecam, PciBus, RootComplex};

/// What sits at a device and function number of a bus. [`PciFunction`] is the one for emulated devices.
///
/// Offsets and values come from the guest: implementations must not panic for any of them. `size` is
/// 1, 2 or 4 bytes and the access stays inside the configuration space's 4 KiB.
pub trait PciDevice: Send + Sync {
    /// Reads `size` bytes of configuration space, in the low bits of the result.
    fn read_config(&self, offset: u16, size: u8) -> u32;

    /// Writes the low `size` bytes of `value` to configuration space.
    fn write_config(&self, offset: u16, size: u8, value: u32);

    /// Takes the function off the guest's address spaces for good: it is being unplugged, or the
    /// machine taken down. Also lets go of the device's handlers, which usually hold the function.
    fn unplug(&self);
}

/// Why a function cannot be built or attached so: a mistake of the board or device, not the guest's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PciError {
    /// BAR sizes are powers of two: at least 16 bytes of memory, or 4 to 256 bytes of I/O ports; a
    /// 64-bit BAR takes two slots (PCI 3.0 section 6.2.5.1).
    #[error("BAR {index} cannot have {size:#x} bytes of this kind")]
    Bar {
        /// BAR number, 0–5.
        index: u8,
        /// Bytes asked for.
        size: u64,
    },
    /// The BAR (or the other half of a 64-bit one) is there already.
    #[error("BAR {0} is taken")]
    BarTaken(u8),
    /// The capability list is full.
    #[error("no room for a capability of {0} bytes")]
    NoRoom(usize),
    /// MSI-X has 1 to 2048 vectors, MSI 1 to 32 and a power of two.
    #[error("a function cannot have {0} message vectors")]
    Vectors(u16),
    /// Another function is there.
    #[error("PCI address {0} is taken")]
    Taken(Address),
}
