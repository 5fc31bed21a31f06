//! The processor as the machine sees it: what it is told to be ([`CpuModel`], [`Cpuid`]), what it holds
//! ([`VcpuState`]) and who runs it ([`Accelerator`], [`Vcpu`]).
//!
//! Both accelerators look the same from above: port and MMIO accesses are served inside
//! [`Vcpu::run`] through the [`terem_bus::Bus`], and both save and load the same architectural state.

#![forbid(unsafe_code)]

mod accelerator;
mod baseline;
mod cache;
mod catalogue;
mod counters;
mod cpuid;
mod debug;
mod feature_words;
mod features;
mod host;
mod model;
mod state;
mod topology;
mod trace;
pub mod xstate;

pub use accelerator::{Accelerator, CpuError, Stop, Vcpu};
pub use baseline::{Baseline, baseline};
pub use cache::{Cache, Caches, Kind as CacheKind};
pub use catalogue::{given_to_all, models};
pub use counters::Counters;
pub use cpuid::{Cpuid, CpuidEntry};
pub use debug::{DebugControl, DebugEvent, WatchKind, Watchpoint};
pub use feature_words::{IA32_ARCH_CAPABILITIES, IA32_CORE_CAPABILITIES};
pub use features::{Feature, FeatureSet, Place, Register, feature, features};
pub use host::{HostCpu, read_features};
pub use model::{CpuModel, ModelError, Signature, Vendor};
pub use state::{ApicState, DescriptorTable, MpState, Msrs, Segment, SmmState, VcpuState, rflags};
pub use topology::{Level, Position, Topology};
pub use trace::{
    Exit, InstructionBytes, Interruption, InterruptionKind, Trace, TraceEvent, TraceKind, TraceSink,
};
pub use xstate::XSAVE_SIZE;
