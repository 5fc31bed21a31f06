//! Virtqueues: how a driver hands buffers to a device and gets them back (virtio 1.2, 2.6 to 2.8).
//!
//! ```text
//!                    ┌── split: descriptor table, available ring, used ring (2.7)
//!   Queue ── Ring ──┤
//!                    └── packed: one descriptor ring, two event areas (2.8)
//!
//!   pop ──> Chain (checked guest ranges) ──device──> publish(token, bytes written) ──> interrupt?
//! ```
//!
//! The driver is hostile: everything that it wrote is read once, checked, and then used. A ring that makes
//! no sense gives a [`QueueError`]; the device then stops with `DEVICE_NEEDS_RESET`. What a driver can make
//! the device hold is bounded: at most `size` chains in flight with at most [`MAX_CHAIN`] ranges each.
//!
//! Memory ordering: an index or flag that says "there is more" is loaded with `Acquire` before what it
//! covers; the used index or flags are stored with `Release` after what they cover; and between publishing
//! and looking at the other side's wish for notifications (both ways) stands a `SeqCst` fence, for
//! otherwise both sides could miss each other's last write.

mod chain;
mod packed;
mod split;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use terem_memory::GuestMemory;
use terem_memory::vm_memory::GuestMemoryError;

use chain::DESCRIPTOR_BYTES;
pub use chain::{Chain, MAX_CHAIN, Ranges, Token};

/// Largest queue size (virtio 1.2, 2.7 and 2.8: at most 2^15).
pub const MAX_QUEUE_SIZE: u16 = 1 << 15;

/// What is wrong with a ring. The driver's mistake or malice in each case.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is zero, too large, or no power of two for a split ring.
    #[error("queue size {0} is not possible")]
    Size(u16),
    /// A part of the ring is not aligned, or not in RAM.
    #[error("the {part} at {addr:#x} ({len} bytes) is not aligned or not RAM")]
    Placement {
        /// Which part.
        part: &'static str,
        /// Its guest-physical address.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The available index went further ahead than the ring has entries.
    #[error("the available index is {ahead} ahead in a ring of {size}")]
    AvailableJump {
        /// New entries according to the driver.
        ahead: u16,
        /// Queue size.
        size: u16,
    },
    /// The driver made more available than it got back and the ring can hold.
    #[error("more than {0} descriptors are in flight")]
    Overcommitted(u16),
    /// A descriptor index is not below the table's size.
    #[error("descriptor {index} of a table of {size}")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Entries of the table.
        size: usize,
    },
    /// A chain has more links than its table has entries.
    #[error("a chain of descriptors is a loop")]
    Loop,
    /// A chain has more than [`MAX_CHAIN`] descriptors.
    #[error("a chain has more than {MAX_CHAIN} descriptors")]
    ChainTooLong,
    /// A chain's buffers have more than 2^32 - 1 bytes.
    #[error("a chain's buffers have 4 GiB or more")]
    ChainTooLarge,
    /// A buffer of no bytes.
    #[error("an empty buffer at {addr:#x}")]
    EmptyBuffer {
        /// Its guest-physical address.
        addr: u64,
    },
    /// A buffer, or an indirect table, that is not wholly RAM.
    #[error("a buffer at {addr:#x}+{len:#x} is not RAM")]
    NotRam {
        /// Guest-physical address.
        addr: u64,
        /// Bytes.
        len: u64,
    },
    /// A buffer that lies over the ring itself.
    #[error("a buffer at {addr:#x}+{len:#x} lies over the ring")]
    OverlapsRing {
        /// Guest-physical address.
        addr: u64,
        /// Bytes.
        len: u32,
    },
    /// The driver's part of a chain must come first.
    #[error("a device-readable buffer after a device-writable one")]
    ReadableAfterWritable,
    /// An indirect table that is not as it must be.
    #[error("an indirect descriptor table {0}")]
    Indirect(&'static str),
    /// A ring access failed although the place was checked.
    #[error("guest memory: {0}")]
    Memory(String),
}

impl From<GuestMemoryError> for QueueError {
    fn from(error: GuestMemoryError) -> Self {
        Self::Memory(error.to_string())
    }
}

/// Where a ring lies and what was negotiated about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingConfig {
    /// Entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table or ring.
    pub descriptors: u64,
    /// Guest-physical address of the driver area: available ring, or driver event suppression.
    pub driver: u64,
    /// Guest-physical address of the device area: used ring, or device event suppression.
    pub device: u64,
    /// `VIRTIO_F_RING_PACKED`.
    pub packed: bool,
    /// `VIRTIO_F_EVENT_IDX`.
    pub event_idx: bool,
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub indirect: bool,
}

impl RingConfig {
    /// Name, address, bytes and alignment of the three parts (virtio 1.2, 2.7 and 2.8.10.1).
    fn parts(&self) -> [(&'static str, u64, u64, u64); 3] {
        let size = u64::from(self.size);
        let (driver, device) = if self.packed { (4, 4) } else { (6 + 2 * size, 6 + 8 * size) };
        let driver_align = if self.packed { 4 } else { 2 };
        [
            ("descriptor area", self.descriptors, DESCRIPTOR_BYTES * size, 16),
            ("driver area", self.driver, driver, driver_align),
            ("device area", self.device, device, 4),
        ]
    }

    fn validate(&self, memory: &GuestMemory) -> Result<(), QueueError> {
        if self.size == 0 || self.size > MAX_QUEUE_SIZE || (!self.packed && !self.size.is_power_of_two()) {
            return Err(QueueError::Size(self.size));
        }
        for (part, addr, len, align) in self.parts() {
            if !addr.is_multiple_of(align) || !memory.is_ram(addr, len) {
                return Err(QueueError::Placement { part, addr, len });
            }
        }
        Ok(())
    }

    /// Whether a range (in RAM, not empty) touches the ring.
    fn overlaps(&self, addr: u64, len: u64) -> bool {
        self.parts().iter().any(|&(_, part, bytes, _)| addr < part + bytes && part < addr + len)
    }
}

/// Where a ring stands while nothing is in flight: the same place for the next available and the next
/// used entry. This is all of a queue's state that is not in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RingPosition {
    /// Split: the free-running index. Packed: the ring slot.
    pub index: u16,
    /// The packed ring's wrap counter; true in split rings.
    pub wrap: bool,
}

impl Default for RingPosition {
    fn default() -> Self {
        Self { index: 0, wrap: true }
    }
}

/// A place in the available entries to [`Queue::rewind`] to.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    next: RingPosition,
    in_flight: u16,
}

#[derive(Debug)]
enum Ring {
    Split(split::Split),
    Packed(packed::Packed),
}

/// The device's side of one enabled virtqueue.
#[derive(Debug)]
pub struct Queue {
    memory: GuestMemory,
    config: RingConfig,
    ring: Ring,
    /// Split: chains, packed: ring slots that were popped and not yet published.
    in_flight: u16,
    /// Used entries (packed: slots) since [`Self::needs_interrupt`] last looked.
    since_looked: u32,
}

impl Queue {
    /// The queue at the place and with the options of `config`, going on from `position`.
    ///
    /// # Errors
    /// [`QueueError::Size`] and [`QueueError::Placement`]; a position that the ring cannot have is the
    /// former too.
    pub fn new(memory: GuestMemory, config: RingConfig, position: RingPosition) -> Result<Self, QueueError> {
        config.validate(&memory)?;
        let ring = if config.packed {
            if position.index >= config.size {
                return Err(QueueError::Size(position.index));
            }
            Ring::Packed(packed::Packed::new(position))
        } else {
            Ring::Split(split::Split::new(position))
        };
        Ok(Self { memory, config, ring, in_flight: 0, since_looked: 0 })
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Queue size in entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.config.size
    }

    /// Takes the next chain that the driver made available.
    ///
    /// # Errors
    /// What is wrong with the ring; the queue must not be used any further then.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let Self { memory, config, ring, in_flight, since_looked: _ } = self;
        match ring {
            Ring::Split(r) => r.pop(memory, config, in_flight),
            Ring::Packed(r) => r.pop(memory, config, in_flight),
        }
    }

    /// Gives chains back, in this order, with the number of bytes written from the start of each one's
    /// writable part on. The driver sees either all of them or none.
    ///
    /// # Errors
    /// [`QueueError::Memory`], which a checked ring does not give.
    pub fn publish(&mut self, used: &[(Token, u32)]) -> Result<(), QueueError> {
        let Self { memory, config, ring, in_flight, since_looked } = self;
        let slots = match ring {
            Ring::Split(r) => r.publish(memory, config, used)?,
            Ring::Packed(r) => r.publish(memory, config, used)?,
        };
        *in_flight = in_flight.saturating_sub(slots);
        *since_looked = since_looked.saturating_add(u32::from(slots));
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was published since this was last asked.
    ///
    /// # Errors
    /// See [`Self::publish`].
    pub fn needs_interrupt(&mut self) -> Result<bool, QueueError> {
        let Self { memory, config, ring, in_flight: _, since_looked } = self;
        let since = std::mem::take(since_looked);
        if since == 0 {
            return Ok(false);
        }
        match ring {
            Ring::Split(r) => r.needs_interrupt(memory, config, since),
            Ring::Packed(r) => r.needs_interrupt(memory, config, since),
        }
    }

    /// Asks the driver for notifications; true when something became available meanwhile, which must
    /// then be popped (a driver that was asked too late sends no notification).
    ///
    /// # Errors
    /// See [`Self::publish`].
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        let Self { memory, config, ring, in_flight: _, since_looked: _ } = self;
        match ring {
            Ring::Split(r) => r.enable_notifications(memory, config),
            Ring::Packed(r) => r.enable_notifications(memory, config),
        }
    }

    /// Tells the driver that notifications are not needed for now (a hint).
    ///
    /// # Errors
    /// See [`Self::publish`].
    pub fn disable_notifications(&mut self) -> Result<(), QueueError> {
        let Self { memory, config, ring, in_flight: _, since_looked: _ } = self;
        match ring {
            Ring::Split(r) => r.disable_notifications(memory, config),
            Ring::Packed(r) => r.disable_notifications(memory, config),
        }
    }

    /// The present place, to come back to if what is popped next turns out not to be needed.
    #[must_use]
    pub fn mark(&self) -> Mark {
        let next = match &self.ring {
            Ring::Split(r) => r.next_available(),
            Ring::Packed(r) => r.next_available(),
        };
        Mark { next, in_flight: self.in_flight }
    }

    /// Puts back all chains popped since `mark`; none of them may have been published.
    pub fn rewind(&mut self, mark: Mark) {
        match &mut self.ring {
            Ring::Split(r) => r.set_next_available(mark.next),
            Ring::Packed(r) => r.set_next_available(mark.next),
        }
        self.in_flight = mark.in_flight;
    }

    /// Where the ring stands; `None` while chains are in flight.
    #[must_use]
    pub fn position(&self) -> Option<RingPosition> {
        (self.in_flight == 0).then(|| self.mark().next)
    }

    /// Split: chains, packed: ring slots that were popped and not yet published.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }
}
