//! How a running machine is seen and steered from outside: a Unix socket in the user's runtime directory.
//!
//! ```text
//! RUNTIME_DIR/NAME.lock   flock held as long as the machine lives; holds its process id     [`Claim`]
//! RUNTIME_DIR/NAME.sock   one JSON object a line, each request answered under its id        [`protocol`]
//! ```
//!
//! [`ControlServer`] knows of the machine no more than [`ControlTarget`]. Each connection has a thread of its own and bounded
//! buffers, and no thread of the guest ever waits for one: a client that does not read is cut off, an attached console that
//! falls behind loses the oldest output.

mod claim;
mod client;
mod console;
pub mod protocol;
mod server;
mod target;

pub use claim::{Claim, ClaimError, Running, running};
pub use client::{Client, ClientError};
pub use console::Console;
pub use protocol::{Command, ControlError, ErrorCode, MachineState, Stat, Status};
pub use server::{ControlServer, ServerError};
pub use target::{ConsoleEnd, MachineTarget};
pub use terem_cpu::Counters;

use std::sync::Arc;

/// What a machine does for its control socket. All of it is called from threads of the server, at any time, and returns
/// soon: what takes longer is only begun.
pub trait ControlTarget: Send + Sync {
    /// How the machine is.
    fn status(&self) -> Status;
    /// What its vCPUs have done.
    fn stat(&self) -> Stat;
    /// Everything there is to know about it: its plan and its devices' state, for people and programs.
    fn inspect(&self) -> serde_json::Value;
    /// Presses the power button.
    ///
    /// # Errors
    /// The machine cannot be asked now.
    fn power_button(&self) -> Result<(), ControlError>;
    /// Ends the machine as if its plug were pulled.
    fn kill(&self);
    /// Holds the vCPUs.
    ///
    /// # Errors
    /// The machine cannot be held now.
    fn pause(&self) -> Result<(), ControlError>;
    /// Lets them go on.
    ///
    /// # Errors
    /// The machine cannot go on.
    fn resume(&self) -> Result<(), ControlError>;
    /// The console to attach to; `None` where it goes elsewhere.
    fn console(&self) -> Option<Arc<Console>>;
}
