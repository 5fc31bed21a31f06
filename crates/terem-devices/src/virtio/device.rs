//! What a virtio device is to its transport, and the queues that both share.

use std::fmt::{self, Display};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::Serialize;
use serde::de::DeserializeOwned;
use terem_bus::{SavedDevice, StateError, locked};
use terem_memory::GuestMemory;

use super::queue::{Chain, Queue, QueueError, RingPosition, Token};

/// Feature bits that belong to no device type (virtio 1.2, 6).
pub mod feature {
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`: anything else is the legacy interface, which is not offered.
    pub const VERSION_1: u64 = 1 << 32;
    /// `VIRTIO_F_RING_PACKED`.
    pub const RING_PACKED: u64 = 1 << 34;
    /// `VIRTIO_F_RING_RESET`.
    pub const RING_RESET: u64 = 1 << 40;
}

/// A device type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// Virtio device ID (virtio 1.2, 5).
    pub id: u16,
    /// The name in logs, listings and saved states.
    pub name: &'static str,
    /// PCI class code, `0xccsspp`.
    pub class: u32,
}

impl Kind {
    /// A saved state of this device.
    ///
    /// # Errors
    /// [`StateError::Invalid`] when it cannot be written down.
    pub fn saved<T: Serialize>(&self, version: u32, state: &T) -> Result<SavedDevice, StateError> {
        let state = serde_json::to_value(state).map_err(|e| self.invalid(e))?;
        Ok(SavedDevice { device: self.name.into(), version, state })
    }

    /// The state in `saved`, if it is this device's and of a version up to `version`.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn loaded<T: DeserializeOwned>(&self, version: u32, saved: &SavedDevice) -> Result<T, StateError> {
        if saved.device != self.name {
            return Err(StateError::Device { expected: self.name, found: saved.device.clone() });
        }
        if saved.version > version {
            return Err(StateError::Version { device: self.name, found: saved.version, known: version });
        }
        T::deserialize(&saved.state).map_err(|e| self.invalid(e))
    }

    /// An error for a state that this device cannot have.
    #[must_use]
    pub fn invalid(&self, reason: impl Display) -> StateError {
        StateError::Invalid { device: self.name, reason: reason.to_string() }
    }
}

/// A virtio device behind a transport. Everything that comes in is the guest's: implementations must not
/// panic for any value. Calls come from any thread; the transport makes those that change the device's
/// life (`activate`, `reset`, `restore`) one at a time.
pub trait VirtioDevice: Send + Sync {
    /// Its type.
    fn kind(&self) -> Kind;

    /// Device-specific features offered (bits 0 to 23 and 50 to 63).
    fn features(&self) -> u64;

    /// Whether the driver may choose just these of the offered features.
    ///
    /// # Errors
    /// Names the dependency that is missing; the driver then does not get `FEATURES_OK`.
    fn check_features(&self, features: u64) -> Result<(), &'static str> {
        let _ = features;
        Ok(())
    }

    /// The largest size of each queue.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The device configuration space as it is now, given the features the driver has chosen so far.
    fn config(&self) -> Vec<u8>;

    /// The driver writes `bytes` at `offset` of the configuration space.
    fn write_config(&self, offset: u64, bytes: &[u8]) {
        let _ = (offset, bytes);
    }

    /// `DRIVER_OK`: the driver has chosen `features`, and its queues run. Also after a restore.
    fn activate(&self, features: u64, queues: &Arc<Queues>);

    /// Queue `index` may have something. Must return soon: it is called on the vCPU's thread.
    fn notify(&self, index: u16, queues: &Arc<Queues>);

    /// Waits until no request is in flight in the backend. New ones are not being taken meanwhile.
    fn quiesce(&self) {}

    /// Back to the state before `DRIVER_OK`. Requests in flight have ended.
    fn reset(&self);

    /// The device's own state. No request is in flight.
    ///
    /// # Errors
    /// [`StateError::Invalid`] when the state cannot be written down.
    fn save(&self) -> Result<SavedDevice, StateError>;

    /// Goes on from a saved state; comes after `activate`.
    ///
    /// # Errors
    /// See [`StateError`].
    fn restore(&self, saved: &SavedDevice) -> Result<(), StateError>;
}

/// The way of interrupts to the driver.
pub trait Interrupts: Send + Sync {
    /// Queue `index` has used buffers that the driver wants to hear of.
    fn queue_used(&self, index: u16);

    /// The configuration space, or the device's health, has changed.
    fn config_changed(&self);
}

#[derive(Debug, Default)]
struct Slot {
    ring: Mutex<Ring>,
    /// Held while chains are taken and handed to the backend, so that a reset can wait for whoever is
    /// between the two.
    serving: Mutex<()>,
}

#[derive(Debug, Default)]
struct Ring {
    queue: Option<Queue>,
    /// Counts how often the queue was taken from the driver: tickets of an earlier life are void.
    generation: u64,
}

/// The queues of one device: what its threads and its transport share. One lock a queue.
pub struct Queues {
    name: &'static str,
    memory: GuestMemory,
    slots: Vec<Slot>,
    interrupts: Arc<dyn Interrupts>,
    /// `DRIVER_OK` is set.
    live: AtomicBool,
    /// `DEVICE_NEEDS_RESET` is set.
    failed: AtomicBool,
    paused: AtomicBool,
    config_generation: AtomicU32,
}

impl fmt::Debug for Queues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Queues({}, {})", self.name, self.slots.len())
    }
}

/// How many chains are taken from a ring before they are handed on, so that completions get their turn at
/// the ring's lock.
const BATCH: usize = 32;

/// The duty to complete one chain. Dropping it without [`Self::complete`] leaves the chain in flight.
#[derive(Debug)]
pub struct Ticket {
    queues: Arc<Queues>,
    index: u16,
    generation: u64,
    token: Token,
}

impl Ticket {
    /// Gives the chain back with `written` bytes in its writable part, and interrupts the driver if it
    /// wants that. Does nothing when the queue was reset since the chain was taken.
    pub fn complete(self, written: u32) {
        let Self { queues, index, generation, token } = self;
        queues.complete(index, generation, token, written);
    }

    /// The queues that the chain came from.
    #[must_use]
    pub fn queues(&self) -> &Arc<Queues> {
        &self.queues
    }
}

impl Queues {
    pub(super) fn new(
        name: &'static str,
        memory: GuestMemory,
        count: usize,
        interrupts: Arc<dyn Interrupts>,
    ) -> Self {
        Self {
            name,
            memory,
            slots: (0..count).map(|_| Slot::default()).collect(),
            interrupts,
            live: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            config_generation: AtomicU32::new(0),
        }
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// How many queues there are.
    #[must_use]
    pub fn count(&self) -> u16 {
        u16::try_from(self.slots.len()).unwrap_or(u16::MAX)
    }

    fn runs(&self) -> bool {
        self.live.load(Ordering::Acquire)
            && !self.failed.load(Ordering::Acquire)
            && !self.paused.load(Ordering::Acquire)
    }

    /// Works on queue `index` under its lock, and interrupts the driver if that published something it
    /// wants to hear of. `None` when the queue does not run (it is not enabled, or the device is paused
    /// or has failed), or when `f` fails, which fails the device.
    pub fn with<R>(&self, index: u16, f: impl FnOnce(&mut Queue) -> Result<R, QueueError>) -> Option<R> {
        let ring = locked(&self.slots.get(usize::from(index))?.ring);
        // Under the lock: who pauses the device takes every lock once after saying so.
        if self.runs() { self.locked_with(index, ring, f) } else { None }
    }

    fn locked_with<R>(
        &self,
        index: u16,
        mut ring: MutexGuard<'_, Ring>,
        f: impl FnOnce(&mut Queue) -> Result<R, QueueError>,
    ) -> Option<R> {
        let queue = ring.queue.as_mut()?;
        let outcome = f(queue).and_then(|r| Ok((r, queue.needs_interrupt()?)));
        drop(ring);
        match outcome {
            Ok((r, interrupt)) => {
                if interrupt {
                    self.interrupts.queue_used(index);
                }
                Some(r)
            }
            Err(e) => {
                self.fail(format_args!("queue {index}: {e}"));
                None
            }
        }
    }

    /// Takes chains from queue `index` until there are none, and hands each to `handle`, without the
    /// ring's lock. It ends, since each round needs somebody else to make chains available.
    pub fn serve(self: &Arc<Self>, index: u16, mut handle: impl FnMut(Chain, Ticket)) {
        let Some(slot) = self.slots.get(usize::from(index)) else { return };
        let _serving = locked(&slot.serving);
        let mut chains = Vec::new();
        loop {
            let generation = locked(&slot.ring).generation;
            let taken = self.with(index, |queue| {
                queue.disable_notifications()?;
                loop {
                    while chains.len() < BATCH
                        && let Some(chain) = queue.pop()?
                    {
                        chains.push(chain);
                    }
                    if !chains.is_empty() || !queue.enable_notifications()? {
                        return Ok(());
                    }
                }
            });
            // A queue that broke half-way is handed on no further: the driver gets nothing back.
            if taken.is_none() || chains.is_empty() {
                return;
            }
            for chain in chains.drain(..) {
                let token = chain.token;
                handle(chain, Ticket { queues: Arc::clone(self), index, generation, token });
            }
        }
    }

    fn complete(&self, index: u16, generation: u64, token: Token, written: u32) {
        let Some(slot) = self.slots.get(usize::from(index)) else { return };
        let ring = locked(&slot.ring);
        // Requests in flight end while the device is paused, so that it can be saved; a failed device
        // says nothing any more.
        if ring.generation == generation && !self.failed.load(Ordering::Acquire) {
            self.locked_with(index, ring, |queue| queue.publish(&[(token, written)]));
        }
    }

    /// The device cannot go on: sets `DEVICE_NEEDS_RESET`, logs why, and tells the driver.
    pub fn fail(&self, reason: impl Display) {
        if !self.failed.swap(true, Ordering::AcqRel) {
            tracing::warn!(device = self.name, "{reason}; the device needs a reset");
            if self.live.load(Ordering::Acquire) {
                self.config_changed();
            }
        }
    }

    /// Tells the driver that the configuration space has changed.
    pub fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        if self.live.load(Ordering::Acquire) {
            self.interrupts.config_changed();
        }
    }

    // What follows is the transport's.

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    pub(super) fn set_config_generation(&self, generation: u32) {
        self.config_generation.store(generation, Ordering::Release);
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub(super) fn set_live(&self, live: bool) {
        self.live.store(live, Ordering::Release);
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    pub(super) fn enable(&self, index: u16, queue: Queue) {
        if let Some(slot) = self.slots.get(usize::from(index)) {
            locked(&slot.ring).queue = Some(queue);
        }
    }

    /// Takes queue `index` from the driver: nothing is published there from now on. Requests that were
    /// taken have reached the backend when this returns, and are then to be waited for.
    pub(super) fn disable(&self, index: u16) {
        if let Some(slot) = self.slots.get(usize::from(index)) {
            let mut ring = locked(&slot.ring);
            ring.queue = None;
            ring.generation += 1;
            drop(ring);
            drop(locked(&slot.serving));
        }
    }

    /// [`Self::disable`] for all.
    pub(super) fn disable_all(&self) {
        self.set_live(false);
        for index in 0..self.count() {
            self.disable(index);
        }
    }

    pub(super) fn set_failed(&self, failed: bool) {
        self.failed.store(failed, Ordering::Release);
    }

    /// Takes nothing more from the rings. Returns when nobody is taking.
    pub(super) fn pause(&self) {
        self.paused.store(true, Ordering::Release);
        for slot in &self.slots {
            drop(locked(&slot.serving));
            drop(locked(&slot.ring));
        }
    }

    pub(super) fn resume(&self) {
        self.paused.store(false, Ordering::Release);
    }

    /// Where queue `index` stands: `None` when it is not enabled, an error text when requests are in
    /// flight.
    pub(super) fn position(&self, index: u16) -> Option<Result<RingPosition, String>> {
        let ring = locked(&self.slots.get(usize::from(index))?.ring);
        let queue = ring.queue.as_ref()?;
        let in_flight = || format!("queue {index} has {} requests in flight", queue.in_flight());
        Some(queue.position().ok_or_else(in_flight))
    }
}
