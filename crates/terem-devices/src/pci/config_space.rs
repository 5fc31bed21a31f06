//! Configuration space as a table of bytes with a write mask for each bit.

/// Offsets of the type 0 header (PCI Local Bus 3.0 section 6.1) and its bits.
pub mod register {
    /// Vendor ID, 16 bits.
    pub const VENDOR_ID: u16 = 0x00;
    /// Device ID, 16 bits.
    pub const DEVICE_ID: u16 = 0x02;
    /// Command, 16 bits (section 6.2.2).
    pub const COMMAND: u16 = 0x04;
    /// Status, 16 bits (section 6.2.3).
    pub const STATUS: u16 = 0x06;
    /// Revision ID, 8 bits.
    pub const REVISION: u16 = 0x08;
    /// Programming interface, sub-class, class: 8 bits each.
    pub const CLASS: u16 = 0x09;
    /// Cache line size, 8 bits.
    pub const CACHE_LINE: u16 = 0x0c;
    /// Header type, 8 bits; bit 7 says that the device has several functions.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// First base address register.
    pub const BAR0: u16 = 0x10;
    /// Subsystem vendor ID, 16 bits.
    pub const SUBSYSTEM_VENDOR: u16 = 0x2c;
    /// Subsystem ID, 16 bits.
    pub const SUBSYSTEM: u16 = 0x2e;
    /// Offset of the first capability, 8 bits.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line: the firmware's scratch register, 8 bits.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt pin: 0 none, 1–4 INTA–INTD.
    pub const INTERRUPT_PIN: u16 = 0x3d;

    /// Command: answers at I/O BARs.
    pub const COMMAND_IO: u16 = 1 << 0;
    /// Command: answers at memory BARs.
    pub const COMMAND_MEMORY: u16 = 1 << 1;
    /// Command: may write memory, messages included.
    pub const COMMAND_MASTER: u16 = 1 << 2;
    /// Command: INTx is not asserted.
    pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
    /// Command bits that can be written: I/O, memory, master, parity, SERR#, INTx disable.
    pub const COMMAND_WRITABLE: u16 = 0x0547;
    /// Status: the device asks for INTx, whether or not that is disabled.
    pub const STATUS_INTX: u16 = 1 << 3;
    /// Status: there is a capability list.
    pub const STATUS_CAPABILITIES: u16 = 1 << 4;
    /// Status bits that a write of one clears: the error bits.
    pub const STATUS_CLEARED: u16 = 0xf900;
}

/// The first byte that capabilities may take: after the header.
const FIRST_CAPABILITY: u16 = 0x40;
/// The first extended capability (PCI Express Base section 7.6).
const FIRST_EXTENDED: u16 = 0x100;

/// How much configuration space a function has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigSize {
    /// 256 bytes: conventional PCI.
    Conventional,
    /// 4 KiB: PCI Express.
    Extended,
}

impl ConfigSize {
    /// Bytes.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Conventional => 256,
            Self::Extended => 4096,
        }
    }
}

/// What a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// Vendor ID.
    pub vendor_id: u16,
    /// Device ID.
    pub device_id: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, sub-class, programming interface, as `0xccsspp`.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor_id: u16,
    /// Subsystem ID.
    pub subsystem_id: u16,
}

/// The bytes of a function's configuration space, and which bits a guest may change.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    /// Bits that take what is written.
    writable: Vec<u8>,
    /// Bits that a written one clears.
    cleared: Vec<u8>,
    /// What [`Self::reset`] goes back to.
    initial: Vec<u8>,
    /// Where the next capability may go, and where the pointer to it is.
    capability_at: u16,
    capability_link: u16,
    /// The same for extended capabilities; the link is the header of the last one.
    extended_at: u16,
    extended_link: Option<u16>,
}

impl ConfigSpace {
    /// A type 0 header and nothing else.
    #[must_use]
    pub fn new(identity: &Identity, size: ConfigSize) -> Self {
        let zeroes = vec![0; size.bytes()];
        let mut c = Self {
            bytes: zeroes.clone(),
            writable: zeroes.clone(),
            cleared: zeroes.clone(),
            initial: zeroes,
            capability_at: FIRST_CAPABILITY,
            capability_link: register::CAPABILITIES,
            extended_at: FIRST_EXTENDED,
            extended_link: None,
        };
        let Identity { vendor_id, device_id, revision, class, subsystem_vendor_id, subsystem_id } = *identity;
        c.define16(register::VENDOR_ID, vendor_id, 0);
        c.define16(register::DEVICE_ID, device_id, 0);
        c.define16(register::COMMAND, 0, register::COMMAND_WRITABLE);
        c.define_cleared16(register::STATUS, register::STATUS_CLEARED);
        c.define32(register::REVISION, u32::from(revision) | class << 8, 0);
        c.define8(register::CACHE_LINE, 0, 0xff);
        c.define16(register::SUBSYSTEM_VENDOR, subsystem_vendor_id, 0);
        c.define16(register::SUBSYSTEM, subsystem_id, 0);
        c.define8(register::INTERRUPT_LINE, 0, 0xff);
        c
    }

    /// Bytes: 256 or 4096.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Lays down registers: their value after reset, and the bits that can be written. Bytes past the
    /// end are left out.
    pub fn define(&mut self, offset: u16, value: &[u8], writable: &[u8]) {
        for (i, at) in (usize::from(offset)..self.bytes.len()).enumerate().take(value.len()) {
            self.bytes[at] = value[i];
            self.initial[at] = value[i];
            self.writable[at] = writable.get(i).copied().unwrap_or(0);
        }
    }

    /// [`Self::define`] for one byte.
    pub fn define8(&mut self, offset: u16, value: u8, writable: u8) {
        self.define(offset, &[value], &[writable]);
    }

    /// [`Self::define`] for a 16-bit register.
    pub fn define16(&mut self, offset: u16, value: u16, writable: u16) {
        self.define(offset, &value.to_le_bytes(), &writable.to_le_bytes());
    }

    /// [`Self::define`] for a 32-bit register.
    pub fn define32(&mut self, offset: u16, value: u32, writable: u32) {
        self.define(offset, &value.to_le_bytes(), &writable.to_le_bytes());
    }

    /// Makes bits of a 16-bit register such that a written one clears them.
    pub fn define_cleared16(&mut self, offset: u16, bits: u16) {
        for (i, b) in bits.to_le_bytes().into_iter().enumerate() {
            if let Some(at) = self.cleared.get_mut(usize::from(offset) + i) {
                *at |= b;
            }
        }
    }

    /// Puts a capability at the head of free space and links it; `body` follows the two bytes of
    /// header. Gives its offset, or `None` when there is no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u16> {
        let at = self.capability_at;
        let end = usize::from(at) + 2 + body.len();
        if end > 256 {
            return None;
        }
        self.define(at, &[id, 0], &[]);
        self.define(at + 2, body, writable);
        self.define8(self.capability_link, at.to_le_bytes()[0], 0);
        self.capability_link = at + 1;
        self.capability_at = u16::try_from(end.next_multiple_of(4)).ok()?;
        let status = self.read16(register::STATUS) | register::STATUS_CAPABILITIES;
        self.define16(register::STATUS, status, 0);
        Some(at)
    }

    /// The same for an extended capability (PCI Express Base section 7.6.3); `body` follows the four
    /// bytes of header.
    pub fn add_extended_capability(
        &mut self,
        id: u16,
        version: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Option<u16> {
        let at = self.extended_at;
        let end = usize::from(at) + 4 + body.len();
        if end > self.bytes.len() {
            return None;
        }
        self.define32(at, u32::from(id) | u32::from(version & 0xf) << 16, 0);
        self.define(at + 4, body, writable);
        if let Some(previous) = self.extended_link {
            let header = self.read32(previous) | u32::from(at) << 20;
            self.define32(previous, header, 0);
        }
        self.extended_link = Some(at);
        self.extended_at = u16::try_from(end.next_multiple_of(4)).ok()?;
        Some(at)
    }

    /// Reads as a guest does: `size` bytes (at most 4), ones past the end.
    #[must_use]
    pub fn read(&self, offset: u16, size: u8) -> u32 {
        let byte = |i: u8| self.bytes.get(usize::from(offset) + usize::from(i)).copied().unwrap_or(0xff);
        (0..size.min(4)).fold(0, |v, i| v | u32::from(byte(i)) << (8 * u32::from(i)))
    }

    /// Writes as a guest does: only bits that it may change.
    pub fn write(&mut self, offset: u16, size: u8, value: u32) {
        for (i, v) in value.to_le_bytes().into_iter().enumerate().take(usize::from(size)) {
            let at = usize::from(offset) + i;
            if at < self.bytes.len() {
                let (keep, clear) = (!self.writable[at], self.cleared[at] & v);
                self.bytes[at] = (self.bytes[at] & keep | v & self.writable[at]) & !clear;
            }
        }
    }

    /// Sets `size` bytes as the device does, whether a guest could write them or not.
    pub fn set(&mut self, offset: u16, size: u8, value: u32) {
        for (i, v) in value.to_le_bytes().into_iter().enumerate().take(usize::from(size)) {
            if let Some(b) = self.bytes.get_mut(usize::from(offset) + i) {
                *b = v;
            }
        }
    }

    /// A byte.
    #[must_use]
    pub fn read8(&self, offset: u16) -> u8 {
        self.read(offset, 1).to_le_bytes()[0]
    }

    /// A 16-bit register.
    #[must_use]
    pub fn read16(&self, offset: u16) -> u16 {
        let [a, b, ..] = self.read(offset, 2).to_le_bytes();
        u16::from_le_bytes([a, b])
    }

    /// A 32-bit register.
    #[must_use]
    pub fn read32(&self, offset: u16) -> u32 {
        self.read(offset, 4)
    }

    /// Back to the values of the definitions.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.initial);
    }

    /// The registers that a guest (or an error) can change: offset and value of each aligned dword.
    #[must_use]
    pub fn changeable(&self) -> Vec<(u16, u32)> {
        let mask =
            |at: usize| self.writable[at..at + 4].iter().chain(&self.cleared[at..at + 4]).any(|&m| m != 0);
        (0..self.bytes.len())
            .step_by(4)
            .filter(|&at| mask(at))
            .filter_map(|at| u16::try_from(at).ok())
            .map(|at| (at, self.read32(at)))
            .collect()
    }

    /// Takes changeable bits from saved dwords; all others stay what the device made them.
    pub fn restore(&mut self, saved: &[(u16, u32)]) {
        self.reset();
        for &(offset, value) in saved {
            for (i, v) in value.to_le_bytes().into_iter().enumerate() {
                let at = usize::from(offset) + i;
                if at < self.bytes.len() {
                    let mask = self.writable[at] | self.cleared[at];
                    self.bytes[at] = self.bytes[at] & !mask | v & mask;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(size: ConfigSize) -> ConfigSpace {
        let id = Identity {
            vendor_id: 0x1af4,
            device_id: 0x1042,
            revision: 1,
            class: 0x01_8000,
            subsystem_vendor_id: 0x1af4,
            subsystem_id: 0x1100,
        };
        ConfigSpace::new(&id, size)
    }

    #[test]
    fn the_header_is_where_the_specification_has_it() {
        let c = space(ConfigSize::Conventional);
        assert_eq!(c.read32(0), 0x1042_1af4);
        assert_eq!(c.read32(8), 0x0180_0001);
        assert_eq!(c.read32(0x2c), 0x1100_1af4);
        assert_eq!(c.read(0xfe, 4), 0xffff_0000, "past the end floats");
    }

    #[test]
    fn only_the_mask_is_written_and_errors_are_cleared_by_ones() {
        let mut c = space(ConfigSize::Conventional);
        c.write(0, 4, 0);
        assert_eq!(c.read32(0), 0x1042_1af4);
        c.write(4, 2, 0xffff);
        assert_eq!(c.read16(4), register::COMMAND_WRITABLE);
        c.write(5, 1, 0);
        assert_eq!(c.read16(4), 0x47, "a byte write leaves its neighbour");
        c.set(register::STATUS, 2, 0xf908);
        c.write(register::STATUS, 2, 0x8000);
        assert_eq!(c.read16(register::STATUS), 0x7908);
        c.reset();
        assert_eq!(c.read32(4), 0);
    }

    #[test]
    fn capabilities_are_linked_in_order() {
        let mut c = space(ConfigSize::Extended);
        let a = c.add_capability(0x09, &[3, 1, 2], &[]).unwrap();
        let b = c.add_capability(0x05, &[0; 8], &[0xff; 8]).unwrap();
        assert_eq!((a, b), (0x40, 0x48));
        assert_eq!(c.read8(register::CAPABILITIES), 0x40);
        assert_eq!(c.read16(0x40), 0x4809);
        assert_eq!(c.read16(0x48), 0x0005);
        assert_eq!(c.read16(register::STATUS), register::STATUS_CAPABILITIES);
        assert_eq!(c.add_capability(9, &[0; 0xf0], &[]), None);
        let x = c.add_extended_capability(0x0b, 1, &[1, 2, 3, 4], &[]).unwrap();
        let y = c.add_extended_capability(0x03, 1, &[0; 8], &[]).unwrap();
        assert_eq!((x, y), (0x100, 0x108));
        assert_eq!(c.read32(0x100), 0x1081_000b);
        assert_eq!(c.read32(0x108), 0x0001_0003);
    }

    #[test]
    fn restoring_takes_only_what_a_guest_could_write() {
        let mut a = space(ConfigSize::Conventional);
        a.write(4, 2, 7);
        a.write(0x3c, 1, 11);
        let mut saved = a.changeable();
        saved.push((0, 0xdead_beef));
        saved.push((0xfffc, 1));
        let mut b = space(ConfigSize::Conventional);
        b.restore(&saved);
        assert_eq!((b.read32(0), b.read16(4), b.read8(0x3c)), (0x1042_1af4, 7, 11));
    }
}
