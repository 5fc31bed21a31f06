//! The processor as the machine sees it: what it is told to be ([`CpuModel`], [`Cpuid`]), what it holds
//! ([`VcpuState`]) and who runs it ([`Accelerator`], [`Vcpu`]).
//!
//! Both accelerators look the same from above: port and MMIO accesses are served inside
//! [`Vcpu::run`] through the [`terem_bus::Bus`], and both save and load the same architectural state.

#![forbid(unsafe_code)]

mod accelerator;
mod counters;
mod cpuid;
mod debug;
mod features;
mod model;
mod state;
mod trace;
pub mod xstate;

pub use accelerator::{Accelerator, CpuError, Stop, Vcpu};
pub use counters::Counters;
pub use cpuid::{Cpuid, CpuidEntry, Topology};
pub use debug::{DebugControl, DebugEvent, WatchKind, Watchpoint};
pub use features::{FEATURES, Feature, FeatureSet, Register, feature};
pub use model::{CpuModel, ModelError, models};
pub use state::{ApicState, DescriptorTable, MpState, Msrs, Segment, SmmState, VcpuState, rflags};
pub use trace::{
    Exit, InstructionBytes, Interruption, InterruptionKind, Trace, TraceEvent, TraceKind, TraceSink,
};
pub use xstate::XSAVE_SIZE;
