//! Address spaces: which device answers at which port or address.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;

/// A device's registers, by offset from where they are mapped.
///
/// Offsets, sizes and values come from the guest: implementations must not panic for any of them.
/// `size` is 1, 2, 4 or 8 bytes, the access lies wholly inside the mapped region, and it need not be
/// aligned. Answering `None` (`false`) says that there is no such register or that it cannot be
/// accessed so; the bus then decides what the guest sees.
pub trait Registers: Send {
    /// Reads `size` bytes at `offset`, little-endian, in the low bits of the result.
    fn read(&mut self, offset: u64, size: u8) -> Option<u64>;

    /// Writes the low `size` bytes of `value` at `offset`. The bits above are zero.
    fn write(&mut self, offset: u64, size: u8, value: u64) -> bool;
}

/// What is mapped: [`Registers`] that several threads may access at once. Usually a mutex around them.
pub trait Handler: Send + Sync {
    /// See [`Registers::read`].
    fn read(&self, offset: u64, size: u8) -> Option<u64>;

    /// See [`Registers::write`].
    fn write(&self, offset: u64, size: u8, value: u64) -> bool;
}

/// Locks a device. A thread that panicked while it held the lock has already brought the machine down;
/// those who still look at the device on the way out see its state as it was left.
pub fn locked<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T: Registers> Handler for Mutex<T> {
    fn read(&self, offset: u64, size: u8) -> Option<u64> {
        locked(self).read(offset, size)
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> bool {
        locked(self).write(offset, size, value)
    }
}

/// What a read of `size` bytes gives where nobody answers: the bus floats high.
#[must_use]
pub fn all_ones(size: u8) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (u32::from(size) * 8)) - 1 }
}

/// Names a mapped region, for unmapping it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RegionId(u64);

/// Why a region could not be mapped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Part of the range is taken.
    #[error("{space} range {start:#x}..{end:#x} for {name} overlaps {other}")]
    Overlap {
        /// The space's name.
        space: &'static str,
        /// First address.
        start: u64,
        /// One past the last.
        end: u64,
        /// The new region's name.
        name: String,
        /// Who is there already.
        other: String,
    },
    /// The range is empty or goes past the space's end.
    #[error("{space} range {start:#x}+{len:#x} for {name} does not fit the space")]
    Range {
        /// The space's name.
        space: &'static str,
        /// First address.
        start: u64,
        /// Length in bytes.
        len: u64,
        /// The new region's name.
        name: String,
    },
}

#[derive(Clone)]
struct Region {
    id: RegionId,
    range: Range<u64>,
    name: String,
    handler: Arc<dyn Handler>,
}

/// Regions by address. Look-ups take no lock; maps and unmaps replace the table.
pub struct AddressSpace {
    name: &'static str,
    end: u64,
    regions: ArcSwap<Vec<Region>>,
    changes: Mutex<()>,
    next_id: AtomicU64,
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let regions = self.regions.load();
        f.debug_map().entries(regions.iter().map(|r| (&r.range, &r.name))).finish()
    }
}

impl AddressSpace {
    /// An empty space of addresses below `end`, called `name` in errors.
    #[must_use]
    pub fn new(name: &'static str, end: u64) -> Self {
        Self { name, end, regions: ArcSwap::default(), changes: Mutex::new(()), next_id: AtomicU64::new(1) }
    }

    /// Maps `handler` at `start..start + len`; `name` is what errors and listings call it.
    ///
    /// # Errors
    /// [`MapError`] when the range is taken or outside the space.
    pub fn map(
        &self,
        start: u64,
        len: u64,
        name: impl Into<String>,
        handler: Arc<dyn Handler>,
    ) -> Result<RegionId, MapError> {
        let (space, name) = (self.name, name.into());
        let end = match start.checked_add(len) {
            Some(end) if len > 0 && end <= self.end => end,
            _ => return Err(MapError::Range { space, start, len, name }),
        };
        let _one_at_a_time = locked(&self.changes);
        let mut regions = Vec::clone(&self.regions.load());
        if let Some(r) = regions.iter().find(|r| r.range.start < end && start < r.range.end) {
            return Err(MapError::Overlap { space, start, end, name, other: r.name.clone() });
        }
        let id = RegionId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let at = regions.partition_point(|r| r.range.start < start);
        regions.insert(at, Region { id, range: start..end, name, handler });
        self.regions.store(Arc::new(regions));
        Ok(id)
    }

    /// Takes a region out. Accesses that are under way in other threads may still reach it.
    pub fn unmap(&self, id: RegionId) {
        let _one_at_a_time = locked(&self.changes);
        let mut regions = Vec::clone(&self.regions.load());
        regions.retain(|r| r.id != id);
        self.regions.store(Arc::new(regions));
    }

    /// The regions, ascending: first address, one past the last, name.
    #[must_use]
    pub fn regions(&self) -> Vec<(u64, u64, String)> {
        self.regions.load().iter().map(|r| (r.range.start, r.range.end, r.name.clone())).collect()
    }

    fn find(regions: &[Region], addr: u64) -> Option<&Region> {
        let after = regions.partition_point(|r| r.range.start <= addr);
        regions[..after].last().filter(|r| addr < r.range.end)
    }

    /// Reads `size` (1, 2, 4 or 8) bytes at `addr`. What nobody answers reads as ones; an access that
    /// straddles regions is done byte by byte.
    #[must_use]
    pub fn read(&self, addr: u64, size: u8) -> u64 {
        let regions = self.regions.load();
        match Self::find(&regions, addr) {
            Some(r) if r.range.end - addr >= u64::from(size) => {
                let offset = addr - r.range.start;
                let value = r.handler.read(offset, size).unwrap_or_else(|| {
                    tracing::debug!(region = r.name, offset, size, "read not answered");
                    u64::MAX
                });
                value & all_ones(size)
            }
            None if Self::nobody(&regions, addr, size) => {
                tracing::debug!(space = self.name, addr, size, "read of nothing");
                all_ones(size)
            }
            _ => (0..size)
                .fold(0, |v, i| v | self.read(addr.wrapping_add(u64::from(i)), 1) << (u32::from(i) * 8)),
        }
    }

    /// Writes the low `size` (1, 2, 4 or 8) bytes of `value` at `addr`. What nobody answers is dropped.
    pub fn write(&self, addr: u64, size: u8, value: u64) {
        let regions = self.regions.load();
        match Self::find(&regions, addr) {
            Some(r) if r.range.end - addr >= u64::from(size) => {
                let offset = addr - r.range.start;
                if !r.handler.write(offset, size, value & all_ones(size)) {
                    tracing::debug!(region = r.name, offset, size, value, "write not answered");
                }
            }
            None if Self::nobody(&regions, addr, size) => {
                tracing::debug!(space = self.name, addr, size, value, "write to nothing");
            }
            _ => {
                for i in 0..size {
                    self.write(addr.wrapping_add(u64::from(i)), 1, value >> (u32::from(i) * 8));
                }
            }
        }
    }

    /// Whether no region has any byte of the access (so that byte-wise splitting ends).
    fn nobody(regions: &[Region], addr: u64, size: u8) -> bool {
        size <= 1 || Self::find(regions, addr.wrapping_add(u64::from(size) - 1)).is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that can be read and written; offset 3 refuses.
    struct Ram([u8; 8]);

    impl Registers for Ram {
        fn read(&mut self, offset: u64, size: u8) -> Option<u64> {
            let at = usize::try_from(offset).ok()?;
            (at != 3).then(|| (0..usize::from(size)).fold(0, |v, i| v | u64::from(self.0[at + i]) << (8 * i)))
        }

        fn write(&mut self, offset: u64, size: u8, value: u64) -> bool {
            for i in 0..usize::from(size) {
                self.0[usize::try_from(offset).unwrap() + i] = value.to_le_bytes()[i];
            }
            offset != 3
        }
    }

    fn ram() -> Arc<Mutex<Ram>> {
        Arc::new(Mutex::new(Ram([1, 2, 3, 4, 5, 6, 7, 8])))
    }

    #[test]
    fn accesses_reach_the_right_region() {
        let space = AddressSpace::new("port", 0x1_0000);
        space.map(0x10, 8, "a", ram()).unwrap();
        let b = ram();
        space.map(0x18, 4, "b", Arc::clone(&b) as _).unwrap();
        assert_eq!(space.read(0x10, 4), 0x0403_0201);
        assert_eq!(space.read(0x13, 1), 0xff, "refused reads float");
        assert_eq!(space.read(0x16, 4), 0x0201_0807, "straddling reads are split");
        assert_eq!(space.read(0x1a, 4), 0xffff_ff03, "partly mapped, and offset 3 refuses");
        assert_eq!(space.read(0x0e, 4), 0x0201_ffff);
        assert_eq!(space.read(0x40, 8), u64::MAX);
        space.write(0x17, 2, 0xbbaa);
        assert_eq!(space.read(0x17, 2), 0xbbaa);
        assert_eq!(locked(&b).0[0], 0xbb);
    }

    #[test]
    fn overlaps_are_refused_and_unmapping_frees() {
        let space = AddressSpace::new("port", 0x1_0000);
        let id = space.map(0x10, 8, "a", ram()).unwrap();
        let err = space.map(0x17, 1, "b", ram()).unwrap_err();
        assert_eq!(err.to_string(), "port range 0x17..0x18 for b overlaps a");
        assert!(matches!(space.map(0xffff, 2, "c", ram()), Err(MapError::Range { .. })));
        assert!(matches!(space.map(u64::MAX, 2, "c", ram()), Err(MapError::Range { .. })));
        space.unmap(id);
        assert_eq!(space.read(0x10, 1), 0xff);
        space.map(0x17, 1, "b", ram()).unwrap();
    }
}
