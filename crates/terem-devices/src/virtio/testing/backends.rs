//! Backends in memory.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use terem_block::{BlockBackend, Geometry, IoError, Op, Request};
use terem_bus::locked;
use terem_net::{NetBackend, Offloads, Received, Transmit, VnetHeader};

use super::super::console::ConsoleBackend;

/// A disk in memory that can hold requests back, and keeps a record of what was asked.
pub struct MemoryDisk {
    bytes: Mutex<Vec<u8>>,
    pub geometry: Geometry,
    held: Mutex<Vec<Request>>,
    pub hold: AtomicBool,
    pub log: Mutex<Vec<String>>,
    pub fail: AtomicBool,
}

impl MemoryDisk {
    pub fn new(size: usize) -> Self {
        let geometry = Geometry {
            size: size as u64,
            read_only: false,
            logical_block_size: 512,
            physical_block_size: 4096,
            optimal_io_size: 65536,
            discard: true,
            discard_granularity: 4096,
            max_discard: 1 << 20,
            volatile_cache: true,
        };
        Self {
            bytes: Mutex::new(vec![0; size]),
            geometry,
            held: Mutex::default(),
            hold: AtomicBool::new(false),
            log: Mutex::default(),
            fail: AtomicBool::new(false),
        }
    }

    /// Ends the held requests, the last one first.
    pub fn release(&self) {
        loop {
            let Some(request) = locked(&self.held).pop() else { return };
            self.run(request);
        }
    }

    fn run(&self, request: Request) {
        let outcome =
            if self.fail.load(Ordering::Acquire) { Err(IoError::NoSpace) } else { self.apply(&request.op) };
        (request.complete)(outcome);
    }

    fn apply(&self, op: &Op) -> Result<(), IoError> {
        let (offset, length) = op.range();
        let size = self.geometry.size;
        let outside = IoError::OutOfRange { offset, length, size };
        let start = usize::try_from(offset).map_err(|_| outside.clone())?;
        let end = offset.checked_add(length).filter(|&e| e <= size).ok_or_else(|| outside.clone())?;
        let end = usize::try_from(end).map_err(|_| outside)?;
        let mut bytes = locked(&self.bytes);
        let range = &mut bytes[start..end];
        match op {
            Op::Read { memory, .. } => {
                memory.write_at(0, range);
            }
            Op::Write { memory, .. } => {
                memory.read_at(0, range);
            }
            Op::WriteZeroes { .. } => range.fill(0),
            Op::Discard { .. } | Op::Flush => {}
        }
        Ok(())
    }
}

impl BlockBackend for MemoryDisk {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&self, request: Request) {
        locked(&self.log).push(format!("{:?}", request.op));
        if self.hold.load(Ordering::Acquire) {
            locked(&self.held).push(request);
        } else {
            self.run(request);
        }
    }

    fn drain(&self) {
        self.release();
    }
}

/// A network in which each frame sent is recorded, and comes back if `echo` is set.
#[derive(Debug)]
pub struct Loopback {
    pub offloads: Offloads,
    pub agreed: Mutex<Offloads>,
    pub sent: Mutex<Vec<(VnetHeader, Vec<u8>)>>,
    arriving: Mutex<VecDeque<(VnetHeader, Vec<u8>)>>,
    pub echo: AtomicBool,
    pub busy: AtomicBool,
    pub down: AtomicBool,
    ready: OwnedFd,
}

impl Loopback {
    pub fn new(offloads: Offloads) -> io::Result<Self> {
        Ok(Self {
            offloads,
            agreed: Mutex::default(),
            sent: Mutex::default(),
            arriving: Mutex::default(),
            echo: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            down: AtomicBool::new(false),
            ready: eventfd(0, EventfdFlags::NONBLOCK)?,
        })
    }

    /// A frame from the network.
    pub fn arrive(&self, header: VnetHeader, frame: &[u8]) {
        locked(&self.arriving).push_back((header, frame.to_vec()));
        self.signal();
    }

    /// Makes the descriptor readable (it is always writable).
    pub fn signal(&self) {
        let _ = rustix::io::write(&self.ready, &1_u64.to_ne_bytes());
    }
}

impl NetBackend for Loopback {
    fn description(&self) -> String {
        "loop-back".into()
    }

    fn link_up(&self) -> bool {
        !self.down.load(Ordering::Acquire)
    }

    fn mtu(&self) -> Option<u16> {
        Some(9000)
    }

    fn transmit_offloads(&self) -> Offloads {
        self.offloads
    }

    fn receive_offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_receive_offloads(&self, agreed: Offloads) -> io::Result<()> {
        *locked(&self.agreed) = agreed;
        Ok(())
    }

    fn transmit(&self, header: &VnetHeader, frame: &[IoSlice<'_>]) -> io::Result<Transmit> {
        if self.busy.swap(false, Ordering::AcqRel) {
            return Ok(Transmit::Busy);
        }
        let frame: Vec<u8> = frame.iter().flat_map(|s| s.iter().copied()).collect();
        if self.echo.load(Ordering::Acquire) {
            self.arrive(*header, &frame);
        }
        locked(&self.sent).push((*header, frame));
        Ok(Transmit::Taken)
    }

    fn has_unsent(&self) -> bool {
        false
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn receive(&self, frame: &mut [u8]) -> io::Result<Option<Received>> {
        let mut arriving = locked(&self.arriving);
        let Some((header, bytes)) = arriving.pop_front() else {
            let _ = rustix::io::read(&self.ready, &mut [0; 8]);
            return Ok(None);
        };
        let length = bytes.len().min(frame.len());
        frame[..length].copy_from_slice(&bytes[..length]);
        Ok(Some(Received { header, length }))
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.ready.as_fd())
    }
}

/// A terminal in memory.
#[derive(Default)]
pub struct Terminal {
    pub shown: Mutex<Vec<u8>>,
    pub typed: Mutex<VecDeque<u8>>,
}

impl ConsoleBackend for Terminal {
    fn write(&self, bytes: &[u8]) {
        locked(&self.shown).extend(bytes);
    }

    fn read(&self, buffer: &mut [u8]) -> usize {
        let mut typed = locked(&self.typed);
        let count = typed.len().min(buffer.len());
        for (to, byte) in buffer.iter_mut().zip(typed.drain(..count)) {
            *to = byte;
        }
        count
    }
}
