//! A built machine behind its control socket.

use super::protocol::{ControlError, ErrorCode, MachineState, Stat, Status, VERSION};
use super::{Console, ControlTarget};
use crate::handle::{MachineHandle, Phase, RequestError};
use std::sync::Arc;
use terem_devices::chipset::uart::CharBackend;

/// A machine with the console that its caller lent it.
#[derive(Debug)]
pub struct MachineTarget {
    handle: MachineHandle,
    console: Option<Arc<Console>>,
}

impl MachineTarget {
    /// The machine of `handle`; `console` is what its `stdio` leads to, if anything does.
    pub fn new(handle: MachineHandle, console: Option<Arc<Console>>) -> Self {
        Self { handle, console }
    }
}

fn refused(error: &RequestError) -> ControlError {
    ControlError::new(ErrorCode::Unavailable, error.to_string())
}

impl ControlTarget for MachineTarget {
    fn status(&self) -> Status {
        let (status, plan) = (self.handle.status(), self.handle.plan());
        Status {
            protocol: VERSION,
            name: status.name,
            state: match status.phase {
                Phase::Built => MachineState::Starting,
                Phase::Running => MachineState::Running,
                Phase::Paused => MachineState::Paused,
                Phase::Ended => MachineState::Stopping,
            },
            pid: std::process::id(),
            cpus: plan.cpus.count,
            memory: plan.memory.size,
            uptime_ms: status.uptime_ms,
        }
    }

    fn stat(&self) -> Stat {
        let crate::handle::Stat { time_ns, vcpus } = self.handle.stat();
        Stat { time_ns, vcpus }
    }

    fn inspect(&self) -> serde_json::Value {
        self.handle.inspect()
    }

    fn power_button(&self) -> Result<(), ControlError> {
        self.handle.power_button().map_err(|e| refused(&e))
    }

    fn kill(&self) {
        // A guest that waits for its terminal could not be stopped.
        if let Some(console) = &self.console {
            console.close();
        }
        // The only failure is that it has ended.
        let _ = self.handle.stop(None);
    }

    fn pause(&self) -> Result<(), ControlError> {
        self.handle.pause().map_err(|e| refused(&e))
    }

    fn resume(&self) -> Result<(), ControlError> {
        self.handle.resume().map_err(|e| refused(&e))
    }

    fn console(&self) -> Option<Arc<Console>> {
        self.console.clone()
    }
}

/// The guest's end of a [`Console`].
#[derive(Debug)]
pub struct ConsoleEnd(pub Arc<Console>);

impl CharBackend for ConsoleEnd {
    /// Buffers. A lossless console waits for its reader when a whole ring is unread, as a terminal does.
    fn write(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }
}
