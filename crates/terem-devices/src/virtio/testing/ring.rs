//! The driver's side of a virtqueue, as the model that the device's side is tested against. It is written
//! from the driver's chapters of the specification and shares no code with [`super::super::queue`].

use std::collections::HashMap;
use std::sync::atomic::{Ordering, fence};

use terem_memory::GuestMemory;
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::super::queue::RingConfig;

/// Address, length, and whether the device writes it.
pub type Buffer = (u64, u32, bool);

/// Descriptors in an indirect table, at most.
pub const TABLE: u16 = 32;

#[derive(Debug, Clone)]
struct Outstanding {
    descriptors: Vec<u16>,
}

/// A driver's virtqueue in guest memory.
pub struct DriverRing {
    pub memory: GuestMemory,
    pub config: RingConfig,
    tables: u64,
    free: Vec<u16>,
    outstanding: HashMap<u16, Outstanding>,
    /// Split: next index of the available ring. Packed: next slot.
    next: u16,
    wrap: bool,
    /// Split: next index of the used ring. Packed: next slot.
    used: u16,
    used_wrap: bool,
    /// Chains (split) or slots (packed) made available since [`Self::must_notify`] was last asked.
    since: u32,
}

impl DriverRing {
    /// Bytes of guest memory that a ring takes from its base on.
    pub fn bytes(size: u16) -> u64 {
        64 * u64::from(size) + 4096 + u64::from(size) * u64::from(TABLE) * 16
    }

    /// A zeroed ring at `base`.
    pub fn new(memory: GuestMemory, base: u64, size: u16, packed: bool, event_idx: bool) -> Self {
        let n = u64::from(size);
        let driver = base + 16 * n;
        let device = (driver + 6 + 2 * n + 3) & !3;
        let tables = (device + 6 + 8 * n + 15) & !15;
        let zeroes = vec![0; usize::try_from(tables - base).unwrap()];
        memory.write_slice(&zeroes, GuestAddress(base)).unwrap();
        let config =
            RingConfig { size, descriptors: base, driver, device, packed, event_idx, indirect: true };
        Self {
            memory,
            config,
            tables,
            free: (0..size).rev().collect(),
            outstanding: HashMap::new(),
            next: 0,
            wrap: true,
            used: 0,
            used_wrap: true,
            since: 0,
        }
    }

    pub fn put16(&self, at: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub fn get16(&self, at: u64) -> u16 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub fn put_descriptor(&self, at: u64, addr: u64, len: u32, third: u16, fourth: u16) {
        let value =
            u128::from(addr) | u128::from(len) << 64 | u128::from(third) << 96 | u128::from(fourth) << 112;
        self.memory.write_obj(value.to_le_bytes(), GuestAddress(at)).unwrap();
    }

    /// How many descriptors are free.
    pub fn room(&self) -> usize {
        if self.config.packed {
            let taken: usize = self.outstanding.values().map(|o| o.descriptors.len()).sum();
            usize::from(self.config.size) - taken
        } else {
            self.free.len()
        }
    }

    /// Makes a chain available; returns its ID. The caller sees to it that there is [`Self::room`].
    pub fn add(&mut self, buffers: &[Buffer], indirect: bool) -> u16 {
        assert!(!buffers.is_empty() && self.room() >= if indirect { 1 } else { buffers.len() });
        if self.config.packed {
            self.add_packed(buffers, indirect)
        } else {
            self.add_split(buffers, indirect)
        }
    }

    fn add_split(&mut self, buffers: &[Buffer], indirect: bool) -> u16 {
        let base = self.config.descriptors;
        let descriptors: Vec<u16>;
        if indirect {
            descriptors = vec![self.free.pop().unwrap()];
            let head = descriptors[0];
            let table = self.tables + u64::from(head) * u64::from(TABLE) * 16;
            let last = buffers.len() - 1;
            // The entries are linked backwards, to see that links are followed.
            for (i, &(addr, len, write)) in buffers.iter().enumerate() {
                let place = |i: usize| if i == 0 { 0 } else { buffers.len() - i };
                let flags = u16::from(i < last) | u16::from(write) << 1;
                let next = if i < last { u16::try_from(place(i + 1)).unwrap() } else { 0 };
                self.put_descriptor(table + 16 * place(i) as u64, addr, len, flags, next);
            }
            let len = u32::try_from(16 * buffers.len()).unwrap();
            self.put_descriptor(base + 16 * u64::from(head), table, len, 4, 0);
        } else {
            descriptors = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
            for (i, &(addr, len, write)) in buffers.iter().enumerate() {
                let next = descriptors.get(i + 1).copied();
                let flags = u16::from(next.is_some()) | u16::from(write) << 1;
                let at = base + 16 * u64::from(descriptors[i]);
                self.put_descriptor(at, addr, len, flags, next.unwrap_or(0xdead));
            }
        }
        let head = descriptors[0];
        self.outstanding.insert(head, Outstanding { descriptors });
        self.make_available(head);
        head
    }

    /// Puts any head into a split ring's available ring.
    pub fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.next % self.config.size);
        self.put16(self.config.driver + 4 + 2 * slot, head);
        self.next = self.next.wrapping_add(1);
        self.put16(self.config.driver + 2, self.next);
        self.since += 1;
    }

    fn add_packed(&mut self, buffers: &[Buffer], indirect: bool) -> u16 {
        let id = self.free.pop().unwrap();
        let table = self.tables + u64::from(id) * u64::from(TABLE) * 16;
        let mut slots: Vec<(u64, u32, u16)> = Vec::new();
        if indirect {
            for (i, &(addr, len, write)) in buffers.iter().enumerate() {
                self.put_descriptor(table + 16 * i as u64, addr, len, 0xbeef, u16::from(write) << 1);
            }
            slots.push((table, u32::try_from(16 * buffers.len()).unwrap(), 4));
        } else {
            let last = buffers.len() - 1;
            for (i, &(addr, len, write)) in buffers.iter().enumerate() {
                slots.push((addr, len, u16::from(i < last) | u16::from(write) << 1));
            }
        }
        let mut writes = Vec::new();
        for &(addr, len, flags) in &slots {
            // Available: AVAIL is the lap's counter, USED is not.
            let lap = if self.wrap { 1 << 7 } else { 1 << 15 };
            writes.push((self.config.descriptors + 16 * u64::from(self.next), addr, len, flags | lap));
            self.next += 1;
            if self.next == self.config.size {
                self.next = 0;
                self.wrap = !self.wrap;
            }
        }
        // The first one last: from then on the device may look.
        for &(at, addr, len, flags) in writes.iter().rev() {
            self.put_descriptor(at, addr, len, id, flags);
        }
        self.since += u32::try_from(slots.len()).unwrap();
        self.outstanding.insert(id, Outstanding { descriptors: vec![0; slots.len()] });
        id
    }

    /// Takes the next used chain: ID and bytes written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let (id, len);
        if self.config.packed {
            let at = self.config.descriptors + 16 * u64::from(self.used);
            let raw: [u8; 16] = self.memory.read_obj(GuestAddress(at)).unwrap();
            let flags = u16::from_le_bytes([raw[14], raw[15]]);
            let want = if self.used_wrap { 0x8080 } else { 0 };
            if flags & 0x8080 != want {
                return None;
            }
            id = u16::from_le_bytes([raw[12], raw[13]]);
            len = u32::from_le_bytes([raw[8], raw[9], raw[10], raw[11]]);
            assert_eq!(flags & 2 != 0, len > 0, "WRITE says whether there is a length");
            let slots = u16::try_from(self.outstanding[&id].descriptors.len()).unwrap();
            self.used += slots;
            if self.used >= self.config.size {
                self.used -= self.config.size;
                self.used_wrap = !self.used_wrap;
            }
            self.free.push(id);
        } else {
            if self.get16(self.config.device + 2) == self.used {
                return None;
            }
            let at = self.config.device + 4 + 8 * u64::from(self.used % self.config.size);
            let entry: [u32; 2] = self.memory.read_obj(GuestAddress(at)).unwrap();
            id = u16::try_from(entry[0]).unwrap();
            len = entry[1];
            self.used = self.used.wrapping_add(1);
            self.free.extend(self.outstanding.get(&id).unwrap().descriptors.iter().rev());
        }
        self.outstanding.remove(&id).expect("a chain that was not outstanding");
        Some((id, len))
    }

    /// Whether the device has asked to be notified of what was added since this was last asked.
    pub fn must_notify(&mut self) -> bool {
        // After what was made available.
        fence(Ordering::SeqCst);
        let since = std::mem::take(&mut self.since);
        let n = u32::from(self.config.size);
        if self.config.packed {
            let (event, flags) = (self.get16(self.config.device), self.get16(self.config.device + 2));
            match flags {
                0 => true,
                1 => false,
                _ => {
                    let lap = |i: u16, w: bool| u32::from(i) + if w { 0 } else { n };
                    let behind = lap(self.next, self.wrap) + 4 * n - lap(event & 0x7fff, event & 0x8000 != 0);
                    (1..=since).contains(&((behind - 1) % (2 * n) + 1))
                }
            }
        } else if self.config.event_idx {
            let event = self.get16(self.config.device + 4 + 8 * u64::from(self.config.size));
            u32::from(self.next.wrapping_sub(event).wrapping_sub(1)) < since
        } else {
            self.get16(self.config.device) & 1 == 0
        }
    }

    /// Wants an interrupt once `after` more used entries (split) or slots (packed) than now were written;
    /// `None`: no interrupts.
    pub fn want_interrupt(&self, after: Option<u16>) {
        let c = &self.config;
        match (c.packed, after) {
            (true, None) => self.put16(c.driver + 2, 1),
            (true, Some(n)) if c.event_idx => {
                let at = self.used + n;
                let (index, wrap) =
                    if at >= c.size { (at - c.size, !self.used_wrap) } else { (at, self.used_wrap) };
                self.put16(c.driver, index | u16::from(wrap) << 15);
                self.put16(c.driver + 2, 2);
            }
            (true, Some(_)) => self.put16(c.driver + 2, 0),
            (false, after) if c.event_idx => {
                // Without interrupts: an event that was just passed.
                let at = after.map_or(self.used.wrapping_sub(1), |n| self.used.wrapping_add(n));
                self.put16(c.driver + 4 + 2 * u64::from(c.size), at);
            }
            (false, after) => self.put16(c.driver, u16::from(after.is_none())),
        }
        // Before the driver looks at the used entries again.
        fence(Ordering::SeqCst);
    }
}
