//! Who runs guest code.

use std::sync::Arc;

use terem_bus::{ApicBus, MsiSink};

use crate::{Counters, DebugControl, DebugEvent, VcpuState};

/// Why [`Vcpu::run`] returned: somebody above has to decide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// [`Accelerator::kick`] was called: look at what is wanted (pause, stop, reset), then maybe run on.
    Kicked,
    /// The processor shut down (triple fault): on a PC that resets the machine, or ends it.
    Shutdown,
    /// What a debugger waits for has come.
    Debug(DebugEvent),
    /// The accelerator itself cannot go on; the text says why.
    Error(String),
}

/// Why a vCPU could not be made or loaded.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The saved or wanted state cannot be a processor's.
    #[error("the vCPU state is damaged: {0}")]
    State(String),
    /// The accelerator cannot do what the model promises.
    #[error("{accelerator} cannot run this CPU model: {reason}")]
    Unsupported {
        /// Which accelerator.
        accelerator: &'static str,
        /// What it lacks.
        reason: String,
    },
    /// The host refused something.
    #[error("cannot {action}: {source}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
}

/// Makes and governs the vCPUs of one machine. vCPU ids are 0 … count - 1 and are their APIC ids unless the
/// topology says otherwise; 0 is the boot processor.
pub trait Accelerator: Send + Sync {
    /// Its name for people: "software CPU", "KVM".
    fn name(&self) -> &'static str;

    /// Makes vCPU `id`, in the state after power-on. Each id once.
    ///
    /// # Errors
    /// See [`CpuError`].
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, CpuError>;

    /// Where interrupt controllers deliver to.
    fn apic_bus(&self) -> Arc<dyn ApicBus>;

    /// Where message-signalled interrupts go.
    fn msi_sink(&self) -> Arc<dyn MsiSink>;

    /// Makes the [`Vcpu::run`] of vCPU `id` that is under way, or else the next one, return
    /// [`Stop::Kicked`] soon. Callable from any thread; unknown ids are ignored.
    fn kick(&self, id: u32);

    /// What vCPU `id` has done so far, without stopping it; `None` for unknown ids.
    fn counters(&self, id: u32) -> Option<Counters>;
}

/// One virtual processor. It is owned by the thread that runs it.
pub trait Vcpu: Send {
    /// Runs until somebody must decide. A halted vCPU sleeps in here.
    fn run(&mut self) -> Stop;

    /// Back to the state after power-on or RESET#: the boot processor at the reset vector, others
    /// waiting for a start-up IPI.
    fn reset(&mut self);

    /// The architectural state now.
    fn save(&self) -> VcpuState;

    /// Goes on from `state`.
    ///
    /// # Errors
    /// [`CpuError::State`] when no processor could be in that state.
    fn restore(&mut self, state: &VcpuState) -> Result<(), CpuError>;

    /// Takes over the registers of `state`: general, segment, control, debug, model-specific, x87 and vector ones.
    /// The local APIC, the time-stamp counter and what the vCPU is doing stay.
    ///
    /// # Errors
    /// [`CpuError::State`] when no processor could have these registers.
    fn set_registers(&mut self, state: &VcpuState) -> Result<(), CpuError>;

    /// The guest-physical address of a linear one by the vCPU's page tables, whatever they permit. Changes
    /// nothing, not even their accessed bits. `None` where nothing is mapped.
    fn translate(&self, linear: u64) -> Option<u64>;

    /// Does from now on what a debugger wants; [`DebugControl::default`] ends it.
    ///
    /// # Errors
    /// [`CpuError::Unsupported`] when the accelerator cannot watch so many or such addresses.
    fn debug(&mut self, control: &DebugControl) -> Result<(), CpuError>;
}
