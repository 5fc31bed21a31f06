//! The entropy device (virtio 1.2, 5.4).
//!
//! Bytes come from the host's random number generator. A guest can ask for as much as it likes; it gets
//! at most [`MAX_REQUEST`] bytes a request and [`RATE`] bytes a second, so that it cannot keep a host CPU
//! busy with it.

use std::sync::{Arc, Mutex, OnceLock};

use serde::{Deserialize, Serialize};
use terem_bus::{Clock, SavedDevice, StateError, Timer, locked};

use super::device::{Kind, Queues, VirtioDevice};
use super::queue::{Queue, QueueError};

const KIND: Kind = Kind { id: 4, name: "virtio-rng", class: 0x00_ff00 };

const QUEUE_SIZE: u16 = 64;

/// Most bytes that one request gets; the driver asks again for more.
pub const MAX_REQUEST: usize = 16 << 10;
/// Bytes a second.
pub const RATE: u64 = 4 << 20;
/// Most bytes that can be had at once after a quiet time.
pub const BURST: u64 = 256 << 10;

/// How many bytes may be given out now.
#[derive(Debug, Clone, Copy)]
struct Budget {
    bytes: u64,
    /// Virtual time up to which `bytes` was filled up.
    filled: u64,
}

impl Budget {
    fn fill(&mut self, now: u64) {
        let elapsed = now.saturating_sub(self.filled);
        let earned = u64::try_from(u128::from(elapsed) * u128::from(RATE) / 1_000_000_000).unwrap_or(BURST);
        // Time too short for a byte is not lost: `filled` stays until it is worth one.
        if earned > 0 {
            self.bytes = self.bytes.saturating_add(earned).min(BURST);
            self.filled = now;
        }
    }
}

/// A virtio entropy device.
pub struct Rng(Arc<Shared>);

struct Shared {
    clock: Clock,
    budget: Mutex<Budget>,
    /// The driver's queues, while it runs.
    queues: Mutex<Option<Arc<Queues>>>,
    /// Goes on with a request that had to wait for budget.
    timer: OnceLock<Timer>,
}

impl Rng {
    /// An entropy device whose rate is counted on `clock`.
    #[must_use]
    pub fn new(clock: &Clock) -> Self {
        let budget = Budget { bytes: BURST, filled: clock.now() };
        let shared = Arc::new(Shared {
            clock: clock.clone(),
            budget: Mutex::new(budget),
            queues: Mutex::default(),
            timer: OnceLock::new(),
        });
        let weak = Arc::downgrade(&shared);
        let timer = clock.timer(move |_| {
            if let Some(shared) = weak.upgrade() {
                let queues = locked(&shared.queues).clone();
                if let Some(queues) = queues {
                    shared.serve(&queues);
                }
            }
        });
        // The cell is new.
        let _ = shared.timer.set(timer);
        Self(shared)
    }
}

impl Shared {
    fn serve(&self, queues: &Queues) {
        queues.with(0, |queue| self.fill_requests(queue));
    }

    fn fill_requests(&self, queue: &mut Queue) -> Result<(), QueueError> {
        loop {
            queue.disable_notifications()?;
            let mut budget = locked(&self.budget);
            budget.fill(self.clock.now());
            while budget.bytes > 0 {
                let Some(chain) = queue.pop()? else { break };
                let most = budget.bytes.min(MAX_REQUEST as u64).min(chain.writable.len());
                let mut bytes = vec![0; usize::try_from(most).unwrap_or(0)];
                if let Err(e) = getrandom::fill(&mut bytes) {
                    return Err(QueueError::Memory(format!("the host gives no random bytes: {e}")));
                }
                let written = chain.writable.write(queue.memory(), 0, &bytes)?;
                budget.bytes -= written as u64;
                queue.publish(&[(chain.token, u32::try_from(written).unwrap_or(0))])?;
            }
            if budget.bytes == 0 {
                // Notifications stay off: the timer looks again.
                if let Some(timer) = self.timer.get() {
                    timer.arm(self.clock.now().saturating_add(MAX_REQUEST as u64 * 1_000_000_000 / RATE));
                }
                return Ok(());
            }
            if !queue.enable_notifications()? {
                return Ok(());
            }
        }
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&self, _features: u64, queues: &Arc<Queues>) {
        *locked(&self.0.queues) = Some(Arc::clone(queues));
    }

    fn notify(&self, _index: u16, queues: &Arc<Queues>) {
        self.0.serve(queues);
    }

    fn reset(&self) {
        *locked(&self.0.queues) = None;
        if let Some(timer) = self.0.timer.get() {
            timer.cancel();
        }
    }

    fn save(&self) -> Result<SavedDevice, StateError> {
        let Shared { clock: _, budget: _, queues: _, timer: _ } = &*self.0;
        KIND.saved(VERSION, &RngState {})
    }

    fn restore(&self, saved: &SavedDevice) -> Result<(), StateError> {
        let RngState {} = KIND.loaded(VERSION, saved)?;
        Ok(())
    }
}

const VERSION: u32 = 1;

/// Saved state: nothing, for the budget is the host's business and a request that waits is in the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {}

#[cfg(test)]
mod tests;
