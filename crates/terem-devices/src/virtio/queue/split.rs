//! Split virtqueues (virtio 1.2, 2.7).

use std::sync::atomic::{Ordering, fence};

use terem_memory::GuestMemory;
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, DESCRIPTOR_BYTES, Gather, RawDescriptor, Token};
use super::{QueueError, RingConfig, RingPosition};

// Descriptor flags (2.7.5).
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (2.7.6) and `VIRTQ_USED_F_NO_NOTIFY` (2.7.8) are the same bit.
const SUPPRESS: u16 = 1;

// Offsets in the available and the used ring: flags, index, entries.
const FLAGS: u64 = 0;
const INDEX: u64 = 2;
const ENTRIES: u64 = 4;

#[derive(Debug)]
pub(super) struct Split {
    /// Index of the next available entry to take.
    next_available: u16,
    /// The driver's available index as last seen, so that it is not loaded for every chain.
    seen_available: u16,
    /// Index of the next used entry to write.
    next_used: u16,
}

impl Split {
    pub(super) fn new(position: RingPosition) -> Self {
        let at = position.index;
        Self { next_available: at, seen_available: at, next_used: at }
    }

    pub(super) fn next_available(&self) -> RingPosition {
        RingPosition { index: self.next_available, wrap: true }
    }

    pub(super) fn set_next_available(&mut self, position: RingPosition) {
        self.next_available = position.index;
    }

    /// Loads the driver's index; returns how many entries there are to take.
    fn load_available(&mut self, memory: &GuestMemory, config: &RingConfig) -> Result<u16, QueueError> {
        let index: u16 = memory.load(GuestAddress(config.driver + INDEX), Ordering::Acquire)?;
        self.seen_available = u16::from_le(index);
        let ahead = self.seen_available.wrapping_sub(self.next_available);
        if ahead > config.size {
            return Err(QueueError::AvailableJump { ahead, size: config.size });
        }
        Ok(ahead)
    }

    pub(super) fn pop(
        &mut self,
        memory: &GuestMemory,
        config: &RingConfig,
        in_flight: &mut u16,
    ) -> Result<Option<Chain>, QueueError> {
        if self.seen_available == self.next_available && self.load_available(memory, config)? == 0 {
            return Ok(None);
        }
        if *in_flight >= config.size {
            return Err(QueueError::Overcommitted(config.size));
        }
        let slot = u64::from(self.next_available & (config.size - 1));
        let head: u16 = memory.load(GuestAddress(config.driver + ENTRIES + 2 * slot), Ordering::Relaxed)?;
        let chain = collect(memory, config, u16::from_le(head))?;
        self.next_available = self.next_available.wrapping_add(1);
        *in_flight += 1;
        Ok(Some(chain))
    }

    pub(super) fn publish(
        &mut self,
        memory: &GuestMemory,
        config: &RingConfig,
        used: &[(Token, u32)],
    ) -> Result<u16, QueueError> {
        let mut count = 0_u16;
        for &(token, written) in used {
            let slot = u64::from(self.next_used.wrapping_add(count) & (config.size - 1));
            let entry = u64::from(token.id) | u64::from(written) << 32;
            memory.write_obj(entry.to_le(), GuestAddress(config.device + ENTRIES + 8 * slot))?;
            count = count.saturating_add(1);
        }
        self.next_used = self.next_used.wrapping_add(count);
        memory.store(self.next_used.to_le(), GuestAddress(config.device + INDEX), Ordering::Release)?;
        Ok(count)
    }

    pub(super) fn needs_interrupt(
        &self,
        memory: &GuestMemory,
        config: &RingConfig,
        since: u32,
    ) -> Result<bool, QueueError> {
        fence(Ordering::SeqCst);
        if config.event_idx {
            // used_event stands behind the available ring's entries (2.7.6).
            let at = config.driver + ENTRIES + 2 * u64::from(config.size);
            let event = u16::from_le(memory.load(GuestAddress(at), Ordering::Relaxed)?);
            let passed = self.next_used.wrapping_sub(event).wrapping_sub(1);
            Ok(u32::from(passed) < since)
        } else {
            let flags: u16 = memory.load(GuestAddress(config.driver + FLAGS), Ordering::Relaxed)?;
            Ok(u16::from_le(flags) & SUPPRESS == 0)
        }
    }

    pub(super) fn enable_notifications(
        &mut self,
        memory: &GuestMemory,
        config: &RingConfig,
    ) -> Result<bool, QueueError> {
        if config.event_idx {
            // avail_event stands behind the used ring's entries (2.7.8).
            let at = config.device + ENTRIES + 8 * u64::from(config.size);
            memory.store(self.next_available.to_le(), GuestAddress(at), Ordering::Relaxed)?;
        } else {
            memory.store(0_u16, GuestAddress(config.device + FLAGS), Ordering::Relaxed)?;
        }
        fence(Ordering::SeqCst);
        Ok(self.load_available(memory, config)? > 0)
    }

    pub(super) fn disable_notifications(
        &self,
        memory: &GuestMemory,
        config: &RingConfig,
    ) -> Result<(), QueueError> {
        // With event indices the old one simply stays behind.
        if !config.event_idx {
            memory.store(SUPPRESS.to_le(), GuestAddress(config.device + FLAGS), Ordering::Relaxed)?;
        }
        Ok(())
    }
}

/// Walks the chain that starts at descriptor `head`.
fn collect(memory: &GuestMemory, config: &RingConfig, head: u16) -> Result<Chain, QueueError> {
    let mut gather = Gather::new(memory, config);
    let size = usize::from(config.size);
    let mut index = head;
    let mut slots = 0_u16;
    loop {
        if index >= config.size {
            return Err(QueueError::DescriptorIndex { index, size });
        }
        if slots >= config.size {
            return Err(QueueError::Loop);
        }
        slots += 1;
        let d = RawDescriptor::read(memory, config.descriptors + DESCRIPTOR_BYTES * u64::from(index))?;
        let (flags, next) = (d.third, d.fourth);
        if flags & DESC_INDIRECT != 0 {
            if flags & DESC_NEXT != 0 {
                return Err(QueueError::Indirect("is followed by another descriptor"));
            }
            walk_table(&mut gather, d)?;
            break;
        }
        gather.add(d.addr, d.len, flags & DESC_WRITE != 0)?;
        if flags & DESC_NEXT == 0 {
            break;
        }
        index = next;
    }
    Ok(gather.finish(Token { id: head, slots }))
}

/// Walks an indirect table from its first entry on (2.7.5.3).
fn walk_table(gather: &mut Gather<'_>, indirect: RawDescriptor) -> Result<(), QueueError> {
    let table = gather.table(indirect.addr, indirect.len)?;
    let mut index = 0_u16;
    for _ in 0..table.len() {
        let Some(d) = table.get(usize::from(index)) else {
            return Err(QueueError::DescriptorIndex { index, size: table.len() });
        };
        let (flags, next) = (d.third, d.fourth);
        if flags & DESC_INDIRECT != 0 {
            return Err(QueueError::Indirect("holds another indirect descriptor"));
        }
        gather.add(d.addr, d.len, flags & DESC_WRITE != 0)?;
        if flags & DESC_NEXT == 0 {
            return Ok(());
        }
        index = next;
    }
    Err(QueueError::Loop)
}
