//! The console device with a single port (virtio 1.2, 5.3).
//!
//! Output goes to the backend on the thread that notified; input is pulled from the backend only as far
//! as the guest has room for it, so that nothing has to be kept here. Several ports
//! (`VIRTIO_CONSOLE_F_MULTIPORT`) are not offered.

use std::fmt;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use terem_bus::{SavedDevice, StateError, locked};

use super::device::{Kind, Queues, VirtioDevice};
use super::queue::{Chain, Queue, QueueError};

const KIND: Kind = Kind { id: 3, name: "virtio-console", class: 0x07_8000 };

const QUEUE_SIZE: u16 = 64;

/// Queue indices (5.3.2).
const RX: u16 = 0;
const TX: u16 = 1;

// Feature bits (5.3.3).
const F_SIZE: u64 = 1 << 0;
const F_EMERG_WRITE: u64 = 1 << 2;

/// Offset of `emerg_wr` in the configuration (5.3.4).
const CONFIG_EMERG_WRITE: u64 = 8;

/// Bytes moved between ring and backend at once.
const CHUNK: usize = 4096;

/// Bytes of one chain that are shown; drivers send some KiB. More would keep the vCPU's thread busy.
const MAX_OUTPUT: u64 = 1 << 20;

/// Where a console's bytes go to and come from.
pub trait ConsoleBackend: Send + Sync {
    /// Takes what the guest has written. Must not block: what there is no room for is dropped.
    fn write(&self, bytes: &[u8]);

    /// Fills `buffer` with input for the guest; returns how many bytes there were. Whoever has more later
    /// calls [`Console::input_ready`].
    fn read(&self, buffer: &mut [u8]) -> usize;
}

/// A virtio console.
pub struct Console {
    backend: Arc<dyn ConsoleBackend>,
    state: Mutex<Volatile>,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Console")
    }
}

struct Volatile {
    /// Size of the terminal in characters.
    columns: u16,
    rows: u16,
    /// The driver's queues, while it runs.
    queues: Option<Arc<Queues>>,
}

impl Console {
    /// A console on `backend` of a size that is not known yet.
    #[must_use]
    pub fn new(backend: Arc<dyn ConsoleBackend>) -> Self {
        Self { backend, state: Mutex::new(Volatile { columns: 0, rows: 0, queues: None }) }
    }

    /// The backend has input.
    pub fn input_ready(&self) {
        let queues = locked(&self.state).queues.clone();
        if let Some(queues) = queues {
            self.receive(&queues);
        }
    }

    /// The terminal has another size, in characters.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut state = locked(&self.state);
        if (state.columns, state.rows) != (columns, rows) {
            (state.columns, state.rows) = (columns, rows);
            let queues = state.queues.clone();
            drop(state);
            if let Some(queues) = queues {
                queues.config_changed();
            }
        }
    }

    fn receive(&self, queues: &Queues) {
        queues.with(RX, |queue| self.receive_into(queue));
    }

    fn receive_into(&self, queue: &mut Queue) -> Result<(), QueueError> {
        let mut buffer = [0; CHUNK];
        queue.disable_notifications()?;
        loop {
            let mark = queue.mark();
            let Some(chain) = queue.pop()? else {
                if queue.enable_notifications()? {
                    continue;
                }
                return Ok(());
            };
            let room = usize::try_from(chain.writable.len()).unwrap_or(CHUNK).min(CHUNK);
            // A buffer without room is given back as it came.
            let got = self.backend.read(&mut buffer[..room]).min(room);
            if got == 0 && room > 0 {
                // No input: the buffer stays the driver's, and nobody needs to hear of more of them.
                queue.rewind(mark);
                return Ok(());
            }
            let written = chain.writable.write(queue.memory(), 0, &buffer[..got])?;
            queue.publish(&[(chain.token, u32::try_from(written).unwrap_or(0))])?;
        }
    }

    fn transmit(&self, chain: &Chain, queues: &Queues) -> Result<(), QueueError> {
        let mut buffer = [0; CHUNK];
        let mut at = 0;
        while at < MAX_OUTPUT {
            let got = chain.readable.read(queues.memory(), at, &mut buffer)?;
            if got == 0 {
                break;
            }
            self.backend.write(&buffer[..got]);
            at += got as u64;
        }
        Ok(())
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        F_SIZE | F_EMERG_WRITE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE, QUEUE_SIZE]
    }

    /// `struct virtio_console_config` (5.3.4).
    fn config(&self) -> Vec<u8> {
        let state = locked(&self.state);
        let mut config = state.columns.to_le_bytes().to_vec();
        config.extend(state.rows.to_le_bytes());
        config.extend(1_u32.to_le_bytes()); // max_nr_ports
        config.extend(0_u32.to_le_bytes()); // emerg_wr
        config
    }

    /// The emergency write works before and without any negotiation (5.3.6.1).
    fn write_config(&self, offset: u64, bytes: &[u8]) {
        if let (CONFIG_EMERG_WRITE, Some(byte)) = (offset, bytes.first()) {
            self.backend.write(&[*byte]);
        }
    }

    fn activate(&self, _features: u64, queues: &Arc<Queues>) {
        locked(&self.state).queues = Some(Arc::clone(queues));
    }

    fn notify(&self, index: u16, queues: &Arc<Queues>) {
        match index {
            RX => self.receive(queues),
            TX => queues.serve(TX, |chain, ticket| match self.transmit(&chain, queues) {
                Ok(()) => ticket.complete(0),
                Err(e) => queues.fail(e),
            }),
            _ => {}
        }
    }

    fn reset(&self) {
        locked(&self.state).queues = None;
    }

    fn save(&self) -> Result<SavedDevice, StateError> {
        let Self { backend: _, state } = self;
        let Volatile { columns, rows, queues: _ } = *locked(state);
        KIND.saved(VERSION, &ConsoleState { columns, rows })
    }

    fn restore(&self, saved: &SavedDevice) -> Result<(), StateError> {
        let ConsoleState { columns, rows } = KIND.loaded(VERSION, saved)?;
        let mut state = locked(&self.state);
        (state.columns, state.rows) = (columns, rows);
        Ok(())
    }
}

const VERSION: u32 = 1;

/// Saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleState {
    columns: u16,
    rows: u16,
}

#[cfg(test)]
mod tests;
