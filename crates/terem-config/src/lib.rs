//! What the user asks for: one description of a machine, however it was written down.
//!
//! `--disk debian.qcow2,readonly`, `disk = ["debian.qcow2,readonly"]` and a `[[disk]]` table in a TOML file all become the
//! same [`DiskConfig`] through the same serde types, so that a key has one name, one help text and one check:
//!
//! ```text
//! key=value,key=value ──KeyValues──┐
//!                                  ├─serde─> MachineConfig ──validate──> every mistake at once
//! machine.toml ─────────toml───────┘                └──to_toml──> machine.toml
//! ```
//!
//! Nothing here touches the host: whether a file exists or memory suffices is the planner's question.
#![forbid(unsafe_code)]
// A mistake carries its whole story. It is made once, for a person: its size does not matter.
#![allow(clippy::result_large_err)]

mod accel;
mod chardev;
mod cpu;
mod disk;
mod error;
mod file;
mod forward;
mod gdb;
mod key_value;
mod mac;
mod machine;
mod net;
mod numa;
mod passphrase;
mod size;
mod text;
mod throttle;
mod trace;

pub use accel::{AccelConfig, AccelKind, DirectPrograms};
pub use chardev::CharConfig;
pub use cpu::{CacheSharing, CpuConfig, CpuFlag, CpusConfig, MAX_CPUS, Topology};
pub use disk::{AioMode, CacheMode, DiscardMode, DiskConfig, DiskFormat};
pub use error::{ConfigError, ConfigErrors, Place};
pub use file::{from_toml, load};
pub use forward::{Forward, Protocol};
pub use gdb::{GdbAddress, GdbConfig};
pub use key_value::{KeyValue, from_key_values};
pub use mac::MacAddress;
pub use machine::{MAX_MEMORY, MIN_MEMORY, MachineConfig, schema};
pub use net::{NetBackendConfig, NetConfig, NetKind};
pub use numa::{CpuRange, NumaConfig, NumaDistance, distances as numa_distances};
pub use passphrase::{ImagePassphrase, PassphraseSource};
pub use size::ByteSize;
pub use text::TextError;
pub use throttle::{Limit, ThrottleConfig};
pub use trace::{TraceConfig, TraceWhat};
