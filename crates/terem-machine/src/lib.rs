//! The machine, in the order in which it is made.
//!
//! ```text
//!   MachineConfig ──plan──> Plan ──Machine::build──> Machine ──Machine::run──> Outcome
//!                                  (backends, board,    └─ MachineHandle: status, pause, stop, save …
//!                                   tables, kernel)
//! ```
//!
//! - [`plan`]: where everything goes; pure data.
//! - [`boot`], [`acpi`], [`smbios`], [`e820`]: what a guest finds in its memory.
//! - [`board`]: the devices and their wires.
//! - [`Machine`]: built from a [`plan::Plan`], run to its [`Outcome`], steered by its [`MachineHandle`].

#![forbid(unsafe_code)]

pub mod acpi;
pub mod board;
pub mod boot;
pub mod control;
pub mod e820;
pub mod plan;
pub mod smbios;

mod build;
mod consoles;
mod disks;
mod gdb;
mod handle;
mod host_cpus;
mod machine;
mod nets;
mod outcome;
mod saved;
mod trace;
mod vcpus;

pub use build::{BuildError, Lent};
pub use consoles::ConsoleError;
pub use disks::{DiskError, throttle_limits};
pub use gdb::GdbError;
pub use handle::{Event, MachineHandle, Phase, RequestError, Stat, Status};
pub use host_cpus::{Accelerators, HostCpus};
pub use machine::{Machine, PrepareError};
pub use nets::NetError;
pub use outcome::{Outcome, TripleFault};
pub use saved::SaveError;
pub use trace::{Lines, TraceError};

/// Does what is much cheaper while the process has one thread only. Nothing depends on it: without it, a machine
/// starts some 15 ms later.
pub fn prepare_process() {
    terem_soft::announce_barriers();
}
