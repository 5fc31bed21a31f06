//! Descriptor chains: what a driver made available, checked, as lists of guest ranges.

use terem_memory::GuestMemory;
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::{QueueError, RingConfig};

/// Most descriptors that one chain may have, direct and indirect together. The specification's bound is
/// the queue size (virtio 1.2, 2.7.5.3.1); drivers that go beyond it with indirect tables are known, so
/// the bound here is what the host's vectored I/O takes at once (`UIO_MAXIOV`).
pub const MAX_CHAIN: usize = 1024;

/// Bytes of a descriptor, of either ring.
pub(super) const DESCRIPTOR_BYTES: u64 = 16;

/// Names a chain that was taken from a queue, to give it back by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Split: index of the head descriptor. Packed: buffer ID.
    pub(super) id: u16,
    /// Ring slots that the chain takes (packed rings skip them when it is used).
    pub(super) slots: u16,
}

/// Guest ranges in order; each lies wholly in RAM and is not empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ranges(Vec<(GuestAddress, u32)>);

impl Ranges {
    /// Bytes in all ranges.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.iter().map(|&(_, len)| u64::from(len)).sum()
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges.
    #[must_use]
    pub fn as_slice(&self) -> &[(GuestAddress, u32)] {
        &self.0
    }

    /// Cuts off and returns what follows the first `bytes` bytes (nothing when there are no more).
    #[must_use]
    pub fn split_off(&mut self, bytes: u64) -> Self {
        let mut left = bytes;
        for (i, range) in self.0.iter_mut().enumerate() {
            if left < u64::from(range.1) {
                let keep = u32::try_from(left).unwrap_or(range.1);
                let mut tail = vec![(GuestAddress(range.0.0 + u64::from(keep)), range.1 - keep)];
                range.1 = keep;
                tail.extend(self.0.drain(i + 1..));
                if keep == 0 {
                    self.0.truncate(i);
                }
                return Self(tail);
            }
            left -= u64::from(range.1);
        }
        Self::default()
    }

    /// Copies guest bytes from `offset` on into `buf`; returns how many there were.
    ///
    /// # Errors
    /// [`QueueError::Memory`] cannot happen for ranges that were checked when they were taken.
    pub fn read(&self, memory: &GuestMemory, offset: u64, buf: &mut [u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        self.pieces(offset, buf.len(), |at, n| {
            memory.read_slice(&mut buf[done..done + n], at)?;
            done += n;
            Ok(())
        })?;
        Ok(done)
    }

    /// Copies `buf` into the guest's ranges from `offset` on; returns how many bytes had room.
    ///
    /// # Errors
    /// See [`Self::read`].
    pub fn write(&self, memory: &GuestMemory, offset: u64, buf: &[u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        self.pieces(offset, buf.len(), |at, n| {
            memory.write_slice(&buf[done..done + n], at)?;
            done += n;
            Ok(())
        })?;
        Ok(done)
    }

    /// Calls `f` for each piece of `len` bytes from `offset` on.
    fn pieces(
        &self,
        offset: u64,
        len: usize,
        mut f: impl FnMut(GuestAddress, usize) -> Result<(), QueueError>,
    ) -> Result<(), QueueError> {
        let (mut skip, mut left) = (offset, len);
        for &(addr, size) in &self.0 {
            if skip >= u64::from(size) {
                skip -= u64::from(size);
                continue;
            }
            let room = u64::from(size) - skip;
            let n = usize::try_from(room).map_or(left, |room| room.min(left));
            if n == 0 {
                break;
            }
            f(GuestAddress(addr.0 + skip), n)?;
            left -= n;
            skip = 0;
        }
        Ok(())
    }
}

/// One request of a driver: what the device may read, then what it may write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// To give the chain back by.
    pub token: Token,
    /// What the driver wrote for the device.
    pub readable: Ranges,
    /// What the device is to fill.
    pub writable: Ranges,
}

/// A descriptor as it lies in memory: split rings have flags and next in the last two fields, packed
/// rings buffer ID and flags.
#[derive(Debug, Clone, Copy)]
pub(super) struct RawDescriptor {
    pub addr: u64,
    pub len: u32,
    pub third: u16,
    pub fourth: u16,
}

impl RawDescriptor {
    pub(super) fn from_bytes(bytes: [u8; 16]) -> Self {
        let value = u128::from_le_bytes(bytes);
        // Each field is cut out of the 16 bytes at its place (virtio 1.2, 2.7.5 and 2.8.13).
        #[allow(clippy::cast_possible_truncation, reason = "the cut is meant")]
        Self {
            addr: value as u64,
            len: (value >> 64) as u32,
            third: (value >> 96) as u16,
            fourth: (value >> 112) as u16,
        }
    }

    pub(super) fn read(memory: &GuestMemory, at: u64) -> Result<Self, QueueError> {
        let mut bytes = [0; 16];
        memory.read_slice(&mut bytes, GuestAddress(at))?;
        Ok(Self::from_bytes(bytes))
    }
}

/// Gathers a chain descriptor by descriptor, checking each.
pub(super) struct Gather<'a> {
    memory: &'a GuestMemory,
    config: &'a RingConfig,
    readable: Vec<(GuestAddress, u32)>,
    writable: Vec<(GuestAddress, u32)>,
    bytes: u64,
}

impl<'a> Gather<'a> {
    pub(super) fn new(memory: &'a GuestMemory, config: &'a RingConfig) -> Self {
        Self { memory, config, readable: Vec::new(), writable: Vec::new(), bytes: 0 }
    }

    /// Takes one buffer.
    pub(super) fn add(&mut self, addr: u64, len: u32, writable: bool) -> Result<(), QueueError> {
        if self.readable.len() + self.writable.len() >= MAX_CHAIN {
            return Err(QueueError::ChainTooLong);
        }
        if len == 0 {
            return Err(QueueError::EmptyBuffer { addr });
        }
        if !self.memory.is_ram(addr, u64::from(len)) {
            return Err(QueueError::NotRam { addr, len: u64::from(len) });
        }
        if self.config.overlaps(addr, u64::from(len)) {
            return Err(QueueError::OverlapsRing { addr, len });
        }
        // The specification allows 2^32 bytes (2.7.4.3); a used length has only 32 bits to say so.
        self.bytes += u64::from(len);
        if self.bytes > u64::from(u32::MAX) {
            return Err(QueueError::ChainTooLarge);
        }
        if writable {
            self.writable.push((GuestAddress(addr), len));
        } else if self.writable.is_empty() {
            self.readable.push((GuestAddress(addr), len));
        } else {
            return Err(QueueError::ReadableAfterWritable);
        }
        Ok(())
    }

    /// Reads an indirect table.
    pub(super) fn table(&self, addr: u64, len: u32) -> Result<Vec<RawDescriptor>, QueueError> {
        if !self.config.indirect {
            return Err(QueueError::Indirect("was not negotiated"));
        }
        if len == 0 || !u64::from(len).is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(QueueError::Indirect("has a length that is no multiple of 16"));
        }
        let bytes = usize::try_from(len).map_err(|_| QueueError::ChainTooLong)?;
        if bytes / 16 > MAX_CHAIN {
            return Err(QueueError::ChainTooLong);
        }
        if !self.memory.is_ram(addr, u64::from(len)) {
            return Err(QueueError::NotRam { addr, len: u64::from(len) });
        }
        let mut raw = vec![0; bytes];
        self.memory.read_slice(&mut raw, GuestAddress(addr))?;
        Ok(raw.as_chunks::<16>().0.iter().map(|&d| RawDescriptor::from_bytes(d)).collect())
    }

    pub(super) fn finish(self, token: Token) -> Chain {
        Chain { token, readable: Ranges(self.readable), writable: Ranges(self.writable) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(list: &[(u64, u32)]) -> Ranges {
        Ranges(list.iter().map(|&(a, l)| (GuestAddress(a), l)).collect())
    }

    #[test]
    fn splitting_keeps_every_byte_in_order() {
        let all = [(0x1000, 3), (0x2000, 5), (0x3000, 2)];
        let flat = |r: &Ranges| -> Vec<u64> {
            r.as_slice().iter().flat_map(|&(a, l)| a.0..a.0 + u64::from(l)).collect()
        };
        for cut in 0..=12 {
            let mut head = ranges(&all);
            let tail = head.split_off(cut);
            assert_eq!(head.len(), cut.min(10));
            let joined: Vec<u64> = flat(&head).into_iter().chain(flat(&tail)).collect();
            assert_eq!(joined, flat(&ranges(&all)), "cut at {cut}");
            assert!(head.as_slice().iter().chain(tail.as_slice()).all(|r| r.1 > 0));
        }
    }

    #[test]
    fn copies_go_across_pieces() {
        let memory = GuestMemory::new(&[terem_memory::RamRange { base: 0, size: 0x4000 }]).unwrap();
        let r = ranges(&[(0x1000, 3), (0x2000, 5)]);
        assert_eq!(r.write(&memory, 1, &[1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap(), 7);
        let mut got = [0xff; 9];
        assert_eq!(r.read(&memory, 0, &mut got).unwrap(), 8);
        assert_eq!(got, [0, 1, 2, 3, 4, 5, 6, 7, 0xff]);
        assert_eq!(r.read(&memory, 8, &mut got).unwrap(), 0);
    }
}
