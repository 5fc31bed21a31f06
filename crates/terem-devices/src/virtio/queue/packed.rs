//! Packed virtqueues (virtio 1.2, 2.8).
//!
//! Driver and device go round the same ring of descriptors. Each lap has the other value of a wrap
//! counter: a slot is available when its AVAIL bit equals the lap's counter and its USED bit does not, and
//! used when both equal it.

use std::sync::atomic::{Ordering, fence};

use terem_memory::GuestMemory;
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, DESCRIPTOR_BYTES, Gather, RawDescriptor, Token};
use super::{QueueError, RingConfig, RingPosition};

// Descriptor flags (2.8.1, 2.8.2, 2.8.5, 2.8.7).
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const DESC_AVAIL: u16 = 1 << 7;
const DESC_USED: u16 = 1 << 15;

/// Offset of the flags in a descriptor.
const DESC_FLAGS: u64 = 14;

// Event suppression structures (2.8.14): descriptor event offset and wrap counter, then flags.
const EVENT_FLAGS: u64 = 2;
const EVENTS_ENABLED: u16 = 0;
const EVENTS_DISABLED: u16 = 1;
const EVENTS_AT_DESCRIPTOR: u16 = 2;
const EVENT_WRAP: u16 = 1 << 15;

#[derive(Debug)]
pub(super) struct Packed {
    next_available: RingPosition,
    next_used: RingPosition,
}

/// `position` and `slots` (at most a lap) more.
fn advance(position: RingPosition, slots: u16, size: u16) -> RingPosition {
    let index = u32::from(position.index) + u32::from(slots);
    match u16::try_from(index) {
        Ok(index) if index < size => RingPosition { index, wrap: position.wrap },
        // Below 2 * size, so below 2^16.
        _ => {
            RingPosition { index: u16::try_from(index - u32::from(size)).unwrap_or(0), wrap: !position.wrap }
        }
    }
}

impl Packed {
    pub(super) fn new(position: RingPosition) -> Self {
        Self { next_available: position, next_used: position }
    }

    pub(super) fn next_available(&self) -> RingPosition {
        self.next_available
    }

    pub(super) fn set_next_available(&mut self, position: RingPosition) {
        self.next_available = position;
    }

    fn slot(config: &RingConfig, index: u16) -> u64 {
        config.descriptors + DESCRIPTOR_BYTES * u64::from(index)
    }

    /// Whether the next slot is available.
    fn is_available(&self, memory: &GuestMemory, config: &RingConfig) -> Result<bool, QueueError> {
        let at = Self::slot(config, self.next_available.index) + DESC_FLAGS;
        let flags = u16::from_le(memory.load(GuestAddress(at), Ordering::Acquire)?);
        let (available, used) = (flags & DESC_AVAIL != 0, flags & DESC_USED != 0);
        Ok(available == self.next_available.wrap && used != self.next_available.wrap)
    }

    pub(super) fn pop(
        &mut self,
        memory: &GuestMemory,
        config: &RingConfig,
        in_flight: &mut u16,
    ) -> Result<Option<Chain>, QueueError> {
        if !self.is_available(memory, config)? {
            return Ok(None);
        }
        let mut gather = Gather::new(memory, config);
        let mut slots = 0_u16;
        let id = loop {
            // Slots that are in flight cannot be available again: this ends loops as well.
            if slots >= config.size.saturating_sub(*in_flight) {
                return Err(QueueError::Overcommitted(config.size));
            }
            let at = advance(self.next_available, slots, config.size);
            let d = RawDescriptor::read(memory, Self::slot(config, at.index))?;
            slots += 1;
            let (id, flags) = (d.third, d.fourth);
            if flags & DESC_INDIRECT != 0 {
                if flags & DESC_NEXT != 0 {
                    return Err(QueueError::Indirect("is followed by another descriptor"));
                }
                walk_table(&mut gather, d)?;
                break id;
            }
            gather.add(d.addr, d.len, flags & DESC_WRITE != 0)?;
            if flags & DESC_NEXT == 0 {
                break id;
            }
        };
        self.next_available = advance(self.next_available, slots, config.size);
        *in_flight += slots;
        Ok(Some(gather.finish(Token { id, slots })))
    }

    pub(super) fn publish(
        &mut self,
        memory: &GuestMemory,
        config: &RingConfig,
        used: &[(Token, u32)],
    ) -> Result<u16, QueueError> {
        // The first one's flags are written last: until then the driver, which looks at slots in order,
        // sees none of them.
        let mut first = None;
        let mut slots = 0_u16;
        for &(token, written) in used {
            let at = Self::slot(config, self.next_used.index);
            let body = u64::from(written) | u64::from(token.id) << 32;
            // Length and buffer ID only: the flags in the upper two bytes have their own store.
            memory.write_slice(&body.to_le_bytes()[..6], GuestAddress(at + 8))?;
            let mut flags = if self.next_used.wrap { DESC_AVAIL | DESC_USED } else { 0 };
            if written > 0 {
                flags |= DESC_WRITE;
            }
            if first.is_none() {
                first = Some((at, flags));
            } else {
                memory.store(flags.to_le(), GuestAddress(at + DESC_FLAGS), Ordering::Release)?;
            }
            self.next_used = advance(self.next_used, token.slots, config.size);
            slots = slots.saturating_add(token.slots);
        }
        if let Some((at, flags)) = first {
            memory.store(flags.to_le(), GuestAddress(at + DESC_FLAGS), Ordering::Release)?;
        }
        Ok(slots)
    }

    pub(super) fn needs_interrupt(
        &self,
        memory: &GuestMemory,
        config: &RingConfig,
        since: u32,
    ) -> Result<bool, QueueError> {
        fence(Ordering::SeqCst);
        let flags = u16::from_le(memory.load(GuestAddress(config.driver + EVENT_FLAGS), Ordering::Acquire)?);
        match flags & 3 {
            EVENTS_DISABLED => Ok(false),
            EVENTS_AT_DESCRIPTOR if config.event_idx => {
                let event = u16::from_le(memory.load(GuestAddress(config.driver), Ordering::Relaxed)?);
                // Places on a circle of two laps, one for each value of the wrap counter.
                let lap = u32::from(config.size);
                let place = |index: u16, wrap: bool| u32::from(index) % lap + if wrap { 0 } else { lap };
                let now = place(self.next_used.index, self.next_used.wrap);
                let wanted = place(event & !EVENT_WRAP, event & EVENT_WRAP != 0);
                let passed = (now + 2 * lap - wanted + 2 * lap - 1) % (2 * lap);
                Ok(passed < since)
            }
            // 3 is reserved: taken as enabled, an interrupt too many does no harm.
            _ => Ok(true),
        }
    }

    pub(super) fn enable_notifications(
        &self,
        memory: &GuestMemory,
        config: &RingConfig,
    ) -> Result<bool, QueueError> {
        let mut flags = EVENTS_ENABLED;
        if config.event_idx {
            let RingPosition { index, wrap } = self.next_available;
            let event = index | if wrap { EVENT_WRAP } else { 0 };
            memory.store(event.to_le(), GuestAddress(config.device), Ordering::Relaxed)?;
            flags = EVENTS_AT_DESCRIPTOR;
        }
        memory.store(flags.to_le(), GuestAddress(config.device + EVENT_FLAGS), Ordering::Release)?;
        fence(Ordering::SeqCst);
        self.is_available(memory, config)
    }

    pub(super) fn disable_notifications(
        &self,
        memory: &GuestMemory,
        config: &RingConfig,
    ) -> Result<(), QueueError> {
        let at = GuestAddress(config.device + EVENT_FLAGS);
        memory.store(EVENTS_DISABLED.to_le(), at, Ordering::Relaxed)?;
        Ok(())
    }
}

/// Walks an indirect table: all of its entries in order; only their WRITE flag means something (2.8.7).
fn walk_table(gather: &mut Gather<'_>, indirect: RawDescriptor) -> Result<(), QueueError> {
    for d in gather.table(indirect.addr, indirect.len)? {
        if d.fourth & DESC_INDIRECT != 0 {
            return Err(QueueError::Indirect("holds another indirect descriptor"));
        }
        gather.add(d.addr, d.len, d.fourth & DESC_WRITE != 0)?;
    }
    Ok(())
}
