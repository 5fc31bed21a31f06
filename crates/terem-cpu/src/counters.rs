//! What a vCPU has done, in numbers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a vCPU has done since the machine was built. Read while it runs, so that the numbers need not be of one
/// and the same moment. What an accelerator does not have stays 0.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Counters {
    /// Whether it waits now: after `hlt` for an interrupt, or for another vCPU to start it.
    pub halted: bool,
    /// Nanoseconds that it waited so.
    pub halted_ns: u64,
    /// Instructions that the software CPU interpreted. Those in translated code are not counted.
    pub instructions_interpreted: u64,
    /// Blocks of instructions that it decoded.
    pub blocks_decoded: u64,
    /// Blocks that it translated to host code.
    pub blocks_translated: u64,
    /// Bytes of host code that it keeps now.
    pub code_bytes: u64,
    /// Bytes of host code that it can keep.
    pub code_capacity: u64,
    /// How often all host code was dropped because there was no more room.
    pub code_flushes: u64,
    /// Stores to pages that hold decoded code.
    pub code_writes: u64,
    /// Page tables walked to fill the TLB, or for an access of the processor's own.
    pub page_walks: u64,
    /// How often the whole TLB, or one context of it, was flushed.
    pub tlb_flushes: u64,
    /// Single pages flushed from the TLB.
    pub tlb_page_flushes: u64,
    /// Interrupts delivered.
    pub interrupts: u64,
    /// Exceptions delivered, software interrupts among them.
    pub exceptions: u64,
    /// Port accesses.
    pub port_accesses: u64,
    /// Accesses to memory-mapped device registers, the local APIC's among them.
    pub mmio_accesses: u64,
    /// How often a guest's program was run on the host's processor directly, until something stopped it.
    pub direct_runs: u64,
    /// Pages mapped for such programs when they touched them, beyond those known before a run.
    pub direct_pages: u64,
}
