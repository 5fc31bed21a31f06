//! The block device (virtio 1.2, 5.2).
//!
//! Each queue's requests are parsed on the thread that notified it and go to the [`BlockBackend`] with the
//! guest's own memory; completions come on the backend's threads, in any order, and are published there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use terem_block::{BlockBackend, Geometry, IoError, Op, Request};
use terem_bus::{SavedDevice, StateError, locked};

use super::device::{Kind, Queues, Ticket, VirtioDevice};
use super::queue::{Chain, Ranges};

const KIND: Kind = Kind { id: 2, name: "virtio-blk", class: 0x01_0000 };

/// Entries of each queue.
const QUEUE_SIZE: u16 = 256;
/// Data segments of a request: with header and status they fill a queue.
const SEG_MAX: u32 = 254;

/// The unit of sector numbers and of the capacity, whatever the logical block size is (5.2.4).
const SECTOR: u64 = 512;

// Feature bits (5.2.3).
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

// Request types (5.2.6).
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

// Request status (5.2.6).
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

/// Bytes of a request's header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of a discard or write-zeroes segment: sector, number of sectors, flags.
const SEGMENT: usize = 16;
/// The flag of such a segment that lets the device deallocate.
const SEGMENT_UNMAP: u32 = 1;
/// Bytes of the device ID string (5.2.6).
const ID_BYTES: usize = 20;

/// Offset of `writeback` in the configuration (5.2.4).
const CONFIG_WRITEBACK: u64 = 32;

/// A virtio block device.
pub struct Blk {
    disk: Disk,
    queues: u16,
    id: [u8; ID_BYTES],
}

/// A disk and how its driver uses it.
struct Disk {
    backend: Arc<dyn BlockBackend>,
    geometry: Geometry,
    driver: Mutex<Driver>,
    /// Whether each write must be durable when it completes.
    write_through: AtomicBool,
}

/// What the driver has chosen.
#[derive(Debug, Clone, Copy)]
struct Driver {
    features: u64,
    writeback: bool,
}

const INITIAL: Driver = Driver { features: 0, writeback: true };

impl Blk {
    /// A disk on `backend` with `queues` request queues (at least one; one a vCPU is usual). `id` is what
    /// the guest sees as its serial number, at most 20 bytes of it.
    #[must_use]
    pub fn new(backend: Arc<dyn BlockBackend>, queues: u16, id: &str) -> Self {
        let mut bytes = [0; ID_BYTES];
        for (to, from) in bytes.iter_mut().zip(id.bytes()) {
            *to = from;
        }
        let disk = Disk {
            geometry: backend.geometry(),
            backend,
            driver: Mutex::new(INITIAL),
            write_through: AtomicBool::new(true),
        };
        Self { disk, queues: queues.max(1), id: bytes }
    }

    fn handle(&self, chain: Chain, ticket: Ticket) {
        let Some((request, ticket)) = InFlight::new(chain, ticket) else { return };
        self.disk.start(request, ticket, &self.id);
    }
}

/// A parsed request: where its data and status are.
struct InFlight {
    kind: u32,
    sector: u64,
    /// Data from the driver, after the header.
    from_driver: Ranges,
    /// Room for data to the driver, before the status byte.
    to_driver: Ranges,
    status: Ranges,
}

impl InFlight {
    /// Parses a request. One without room for a status cannot be answered: the device fails.
    fn new(mut chain: Chain, ticket: Ticket) -> Option<(Self, Ticket)> {
        let queues = ticket.queues();
        let mut header = [0; HEADER];
        let read = chain.readable.read(queues.memory(), 0, &mut header);
        let Some(data) = chain.writable.len().checked_sub(1) else {
            queues.fail("a block request without a status byte");
            return None;
        };
        if read != Ok(header.len()) {
            queues.fail("a block request without a whole header");
            return None;
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let status = chain.writable.split_off(data);
        let request = Self {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            sector: u64::from_le_bytes(sector),
            from_driver: chain.readable.split_off(HEADER as u64),
            to_driver: chain.writable,
            status,
        };
        Some((request, ticket))
    }
}

/// Writes the status and gives the chain back, with `data` bytes before the status.
fn finish(status: &Ranges, ticket: Ticket, outcome: u8, data: u64) {
    if status.write(ticket.queues().memory(), 0, &[outcome]).is_ok() {
        // A chain has less than 2^32 bytes.
        ticket.complete(u32::try_from(data + 1).unwrap_or(u32::MAX));
    }
}

/// The status for an outcome of the backend.
fn status_of(outcome: &Result<(), IoError>) -> u8 {
    match outcome {
        Ok(()) => S_OK,
        Err(e) => {
            tracing::debug!(device = KIND.name, "request failed: {e}");
            S_IOERR
        }
    }
}

impl Disk {
    fn has(&self, feature: u64) -> bool {
        locked(&self.driver).features & feature != 0
    }

    /// First byte and length of `sectors` sectors, if they are on the disk.
    fn range(&self, sector: u64, bytes: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        (offset.checked_add(bytes)? <= self.geometry.size).then_some(offset)
    }

    /// Answers a request at once, or gives it to the backend.
    fn start(&self, request: InFlight, ticket: Ticket, id: &[u8; ID_BYTES]) {
        let op = match request.kind {
            T_IN => self.transfer(&request, &ticket, false),
            T_OUT => self.transfer(&request, &ticket, true),
            T_FLUSH if self.has(F_FLUSH) => Ok(Op::Flush),
            T_DISCARD if self.has(F_DISCARD) => self.segment(&request, &ticket, false),
            T_WRITE_ZEROES if self.has(F_WRITE_ZEROES) => self.segment(&request, &ticket, true),
            T_GET_ID => {
                let written = request.to_driver.write(ticket.queues().memory(), 0, id).unwrap_or(0);
                finish(&request.status, ticket, S_OK, written as u64);
                return;
            }
            _ => Err(S_UNSUPP),
        };
        let op = match op {
            Ok(op) => op,
            Err(outcome) => {
                finish(&request.status, ticket, outcome, 0);
                return;
            }
        };
        let data = if request.kind == T_IN { request.to_driver.len() } else { 0 };
        let status = request.status;
        let durable = matches!(op, Op::Write { .. } | Op::WriteZeroes { .. })
            && self.write_through.load(Ordering::Acquire);
        let then_flush = durable.then(|| Arc::clone(&self.backend));
        self.backend.submit(Request::new(op, move |outcome| {
            if let (Some(backend), Ok(())) = (&then_flush, &outcome) {
                let flush = move |outcome| finish(&status, ticket, status_of(&outcome), 0);
                backend.submit(Request::new(Op::Flush, flush));
            } else {
                // What a failed read left in the guest's buffers is not to be relied on.
                let data = if outcome.is_ok() { data } else { 0 };
                finish(&status, ticket, status_of(&outcome), data);
            }
        }));
    }

    /// A read or write.
    fn transfer(&self, request: &InFlight, ticket: &Ticket, write: bool) -> Result<Op, u8> {
        let data = if write { &request.from_driver } else { &request.to_driver };
        if data.is_empty() || !data.len().is_multiple_of(SECTOR) || write && self.geometry.read_only {
            return Err(S_IOERR);
        }
        let offset = self.range(request.sector, data.len()).ok_or(S_IOERR)?;
        let memory = ticket.queues().memory().slices(data.as_slice()).map_err(|_| S_IOERR)?;
        let memory = Arc::new(memory);
        Ok(if write { Op::Write { offset, memory } } else { Op::Read { offset, memory } })
    }

    /// A discard or write-zeroes request of one segment, as the configuration allows (5.2.6.2).
    fn segment(&self, request: &InFlight, ticket: &Ticket, zero: bool) -> Result<Op, u8> {
        let mut bytes = [0; SEGMENT];
        let read = request.from_driver.read(ticket.queues().memory(), 0, &mut bytes);
        if request.from_driver.len() != SEGMENT as u64 || read != Ok(bytes.len()) || self.geometry.read_only {
            return Err(S_IOERR);
        }
        let (sector, rest) = bytes.split_at(8);
        let word = |b: &[u8]| b.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        let (sector, sectors, flags) = (word(sector), word(&rest[..4]), word(&rest[4..]));
        let unmap = flags & u64::from(SEGMENT_UNMAP) != 0;
        // Reserved flags, and unmap for discard, are answered as not supported.
        if flags & !u64::from(SEGMENT_UNMAP) != 0 || unmap && !zero {
            return Err(S_UNSUPP);
        }
        let length = sectors * SECTOR;
        if sectors > u64::from(max_sectors(&self.geometry)) {
            return Err(S_IOERR);
        }
        let offset = self.range(sector, length).ok_or(S_IOERR)?;
        Ok(if zero { Op::WriteZeroes { offset, length, unmap } } else { Op::Discard { offset, length } })
    }

    /// Waits for all requests.
    fn drain(&self) {
        // A write that has to be durable submits a flush when it ends, so one round is not enough.
        self.backend.drain();
        self.backend.drain();
    }

    /// Decides whether completed writes must be durable (5.2.6.2): they must unless the driver flushes,
    /// and has left the cache on.
    fn update_cache_mode(&self, driver: &Driver) {
        let flushes = driver.features & F_FLUSH != 0;
        let off = driver.features & F_CONFIG_WCE != 0 && !driver.writeback;
        let write_through = self.geometry.volatile_cache && (!flushes || off);
        self.write_through.store(write_through, Ordering::Release);
    }
}

/// Most sectors of a discard or write-zeroes request.
fn max_sectors(geometry: &Geometry) -> u32 {
    u32::try_from(geometry.max_discard / SECTOR).unwrap_or(u32::MAX)
}

impl Drop for Blk {
    /// Ends the requests, which may hold the backend: it must not go away on a thread of its own.
    fn drop(&mut self) {
        self.disk.drain();
    }
}

impl VirtioDevice for Blk {
    fn kind(&self) -> Kind {
        KIND
    }

    fn features(&self) -> u64 {
        let g = &self.disk.geometry;
        let mut features = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY;
        if g.read_only {
            features |= F_RO;
        } else if max_sectors(g) > 0 {
            features |= F_WRITE_ZEROES;
            if g.discard {
                features |= F_DISCARD;
            }
        }
        if g.volatile_cache {
            features |= F_FLUSH | F_CONFIG_WCE;
        }
        if self.queues > 1 {
            features |= F_MQ;
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.queues)]
    }

    /// `struct virtio_blk_config` (5.2.4).
    fn config(&self) -> Vec<u8> {
        let g = &self.disk.geometry;
        let logical = g.logical_block_size.max(512);
        let blocks = |bytes: u32| bytes / logical;
        // Powers of two both.
        let exponent = (g.physical_block_size.max(logical) / logical).ilog2();
        let discard = max_sectors(g);
        let alignment = (g.discard_granularity / 512).max(1);
        let mut c = Vec::with_capacity(60);
        c.extend((g.size / SECTOR).to_le_bytes());
        c.extend(0_u32.to_le_bytes()); // size_max: not offered.
        c.extend(SEG_MAX.to_le_bytes());
        c.extend([0; 4]); // Cylinders, heads, sectors: not offered.
        c.extend(logical.to_le_bytes());
        c.push(u8::try_from(exponent).unwrap_or(0));
        c.push(0); // The first physical block starts at sector 0.
        c.extend(u16::try_from(blocks(g.physical_block_size).max(1)).unwrap_or(1).to_le_bytes());
        c.extend(blocks(g.optimal_io_size).to_le_bytes());
        c.push(u8::from(locked(&self.disk.driver).writeback));
        c.push(0);
        c.extend(self.queues.to_le_bytes());
        c.extend(discard.to_le_bytes());
        c.extend(1_u32.to_le_bytes()); // Segments of a discard.
        c.extend(alignment.to_le_bytes());
        c.extend(discard.to_le_bytes());
        c.extend(1_u32.to_le_bytes()); // Segments of a write-zeroes.
        c.extend([u8::from(g.discard), 0, 0, 0]); // write_zeroes_may_unmap.
        c
    }

    fn write_config(&self, offset: u64, bytes: &[u8]) {
        if let (CONFIG_WRITEBACK, &[value]) = (offset, bytes) {
            let mut driver = locked(&self.disk.driver);
            driver.writeback = value & 1 != 0;
            self.disk.update_cache_mode(&driver);
        }
    }

    fn activate(&self, features: u64, _queues: &Arc<Queues>) {
        let mut driver = locked(&self.disk.driver);
        driver.features = features;
        self.disk.update_cache_mode(&driver);
    }

    fn notify(&self, index: u16, queues: &Arc<Queues>) {
        queues.serve(index, |chain, ticket| self.handle(chain, ticket));
    }

    fn quiesce(&self) {
        self.disk.drain();
    }

    fn reset(&self) {
        let mut driver = locked(&self.disk.driver);
        *driver = INITIAL;
        self.disk.update_cache_mode(&driver);
    }

    fn save(&self) -> Result<SavedDevice, StateError> {
        let Self { disk, queues: _, id: _ } = self;
        let Disk { backend: _, geometry: _, driver, write_through: _ } = disk;
        let Driver { features: _, writeback } = *locked(driver);
        KIND.saved(VERSION, &BlkState { writeback })
    }

    fn restore(&self, saved: &SavedDevice) -> Result<(), StateError> {
        let BlkState { writeback } = KIND.loaded(VERSION, saved)?;
        let mut driver = locked(&self.disk.driver);
        driver.writeback = writeback;
        self.disk.update_cache_mode(&driver);
        Ok(())
    }
}

const VERSION: u32 = 1;

/// Saved state: what is neither the transport's nor the backend's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkState {
    /// The driver has left the write-back cache on.
    writeback: bool,
}

#[cfg(test)]
mod image_tests;
#[cfg(test)]
mod tests;
