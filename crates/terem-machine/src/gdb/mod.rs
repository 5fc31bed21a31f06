//! Where gdb looks into the machine (its remote serial protocol, by the crate `gdbstub`).
//!
//! ```text
//!   gdb ──TCP or Unix socket──> session (thread "gdb") ──Request::Debug──> machine: hold, run, let go
//!                                 │      ^──────Notice (a vCPU has stopped)──┘
//!                                 └─registers, memory: the vCPUs themselves, while the machine holds them
//! ```
//!
//! - Each vCPU is a thread to gdb, number 1 and up. When one stops, the machine holds all of them, with devices and
//!   time; a step or `continue` lets those run that gdb names.
//! - The machine never waits for a client. One that goes away, talks nonsense or does not read is let go of: its
//!   break- and watchpoints are taken away, and the machine goes on. One that only connects changes nothing.
//! - Breakpoints are addresses inside the vCPU: guest memory is not changed by them.

mod client;
mod notices;
mod registers;
mod server;
mod target;

#[cfg(test)]
mod tests;

pub(crate) use notices::{Notice, Notices};
pub use server::GdbError;
pub(crate) use server::{Listener, Server};
pub(crate) use target::Guest;
