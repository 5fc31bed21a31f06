//! The software CPU: runs unmodified x86-64 guests where there is no KVM, or none worth using.
//!
//! This is the interpreter, the reference that a translator is measured against: complete, plain, and
//! as fast as decoding only once makes it. The way of an instruction:
//!
//! ```text
//!   RIP ─ block.rs ─ known block? ──yes──> run.rs: op.run(cpu, op) for each op ─> handler in
//!           │ no                                      integer/, sse/, x87/, system/
//!           └ decode.rs (iced-x86, once) ─> ops                 │
//!                                       memory.rs (TLB hit: one add) ─ mmu.rs (walk) ─ bus (MMIO)
//!   pending interrupts: apic.rs ─ run.rs ─ event.rs (IDT)
//! ```

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "cutting and reinterpreting values is what an instruction set defines"
)]
#![allow(clippy::inline_always, reason = "the hot path is meant to be one function in the end")]

mod accelerator;
mod apic;
mod block;
mod cpu;
mod decode;
mod direct;
mod event;
mod far;
mod fault;
mod features;
mod integer;
mod iret;
mod low;
mod membarrier;
mod memory;
mod mmu;
mod op;
mod probe;
mod run;
mod segment;
mod smm;
mod sse;
mod stack;
mod stats;
mod system;
mod task;
#[cfg(test)]
mod tests;
mod trace;
mod translate;
mod vex;
mod vm86;
mod watch;
mod x87;

#[cfg(test)]
mod oracle;

pub use accelerator::{Directly, SoftAccelerator, SoftConfig, TSC_KHZ};
pub use features::supported_features;
pub use membarrier::announce_barriers;
