//! Images whose disk is cut into blocks of one size, each of which a table places in the file: VDI, VHD, VHDX and the
//! sparse extents of VMDK.
//!
//! A format is a [`BlockMap`]: it says where a block is, finds a place for a new one, and puts its tables on the
//! storage. [`Blocks`] does the I/O for all of them:
//!
//! ```text
//!  offset ─> block ─ BlockMap::place ─> Data: read, write, zero and punch in place
//!                                   └─> Absent, Zero: allocate, write the data, commit
//! ```
//!
//! What keeps them right (all runs on one thread, tasks interleave only where they await):
//!
//! * A block's place is committed to the table in memory only after its data was written, and it never changes while
//!   the image is open, except that compressed blocks are written anew elsewhere. So readers need no lock.
//! * Who gives a block its place holds the block's lock, and looks again once it has it.
//! * The tables go to the storage (`write_back`) only after a sync of all data and of what says how far the file is
//!   used. So a crash loses places that no table refers to, nothing else. The next opening finds the used places by
//!   looking through the table, and uses the lost ones again where it can.

mod read;
mod regions;
mod table;
mod write;

use std::cell::Cell;
use std::rc::Rc;

use crate::extent::{Extent, ExtentKind};
use crate::file::File;
use crate::node::{Answer, Image, Node};
use crate::range_lock::RangeLock;
use crate::{Format, IoError, OpenOptions};

pub(crate) use regions::Regions;
pub(crate) use table::{Entries, Table, check_table};

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Not in this image: what is below shows through.
    Absent,
    /// It is all zeroes.
    Zero,
    /// From this byte of the file on.
    Data(u64),
    /// Compressed, from this byte of the file on.
    Packed(u64),
}

/// How a format places blocks in its file.
pub(crate) trait BlockMap {
    fn format(&self) -> Format;

    fn file(&self) -> &File;

    /// Bytes of a block.
    fn block_size(&self) -> u64;

    /// Whether all blocks got their place when the image was made, so that holes of the file are worth a look.
    fn preallocated(&self) -> bool {
        false
    }

    /// Whether [`Self::commit`] can say that a block is all zeroes.
    fn has_zero_blocks(&self) -> bool {
        false
    }

    /// Whether new blocks are to be compressed, with [`Self::pack`].
    fn packs(&self) -> bool {
        false
    }

    /// Where a block of the disk is. Nothing that is returned lies in the image's own structures or beyond the file's
    /// end.
    async fn place(&self, block: u64) -> Result<Place, IoError>;

    /// To be called before anything is changed.
    async fn begin_write(&self) -> Result<(), IoError> {
        Ok(())
    }

    /// To be called before a block that has its place is written there.
    async fn before_write(&self, _block: u64, _host: u64) -> Result<(), IoError> {
        Ok(())
    }

    /// Finds room for up to `want` blocks in a row (at least one): the first byte of their data, and how many. Nothing
    /// refers to it yet.
    async fn allocate(&self, want: u64) -> Result<(u64, u64), IoError>;

    /// Takes back what [`Self::allocate`] gave last, if it can.
    fn give_back(&self, host: u64, count: u64);

    /// Notes in the table where a block is, or that it is zeroes.
    async fn commit(&self, block: u64, place: Place) -> Result<(), IoError>;

    /// Makes all data durable, then the tables.
    async fn write_back(&self) -> Result<(), IoError>;

    /// The contents of a compressed block.
    async fn unpack(&self, _host: u64) -> Result<Rc<Vec<u8>>, IoError> {
        Err(IoError::Os(libc::ENOTSUP))
    }

    /// Compresses a block and writes it to where there is room; where it is.
    async fn pack(&self, _block: u64, _bytes: &[u8]) -> Result<u64, IoError> {
        Err(IoError::Os(libc::ENOTSUP))
    }

    /// After the last write-back.
    async fn close(&self) -> Result<(), IoError> {
        Ok(())
    }
}

/// An image of blocks.
pub(crate) struct Blocks<M> {
    pub(crate) map: M,
    /// Bytes of the disk, or of this part of it.
    size: u64,
    /// Whether discards give storage back.
    discard: bool,
    /// By block: for who gives it a place.
    placing: RangeLock,
    flushing: RangeLock,
    /// Number of the flush that began last.
    flushes_begun: Cell<u64>,
    /// Number of the last flush that succeeded.
    last_flush: Cell<u64>,
}

/// What shows through where a part of a disk has nothing.
#[derive(Clone, Copy)]
pub(crate) struct Below<'a> {
    pub(crate) node: &'a Node,
    /// Where the part begins on the disk.
    pub(crate) start: u64,
}

/// Blocks of one kind that follow each other on the disk and in the file.
#[derive(Debug, Clone, Copy)]
struct Run {
    place: Place,
    offset: u64,
    length: u64,
}

impl<M: BlockMap> Blocks<M> {
    pub(crate) fn new(map: M, size: u64, options: &OpenOptions) -> Self {
        Self {
            map,
            size,
            discard: options.discard,
            placing: RangeLock::default(),
            flushing: RangeLock::default(),
            flushes_begun: Cell::new(0),
            last_flush: Cell::new(0),
        }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Makes all completed writes durable.
    pub(crate) async fn flush(&self) -> Result<(), IoError> {
        if self.map.file().is_read_only() {
            return Ok(());
        }
        let begun_before = self.flushes_begun.get();
        let _one = self.flushing.all().await;
        // Of several that waited here, the first did it for all.
        if self.last_flush.get() <= begun_before {
            let this = begun_before.max(self.flushes_begun.get()) + 1;
            self.flushes_begun.set(this);
            self.map.write_back().await?;
            self.last_flush.set(this);
        }
        Ok(())
    }

    pub(crate) async fn close(&self) -> Result<(), IoError> {
        self.flush().await?;
        if self.map.file().is_read_only() { Ok(()) } else { self.map.close().await }
    }

    /// The blocks that a range of bytes touches.
    fn blocks(&self, offset: u64, length: u64) -> std::ops::Range<u64> {
        let size = self.map.block_size();
        offset / size..(offset + length).div_ceil(size)
    }

    /// The run at `offset`, of at most `length` bytes.
    async fn run(&self, offset: u64, length: u64) -> Result<Run, IoError> {
        let size = self.map.block_size();
        let blocks = self.blocks(offset, length);
        let place = self.map.place(blocks.start).await?;
        let mut end = blocks.start + 1;
        while end < blocks.end {
            let goes_on = match place {
                Place::Data(host) => Some(Place::Data(host.saturating_add((end - blocks.start) * size))),
                Place::Packed(_) => None,
                same => Some(same),
            };
            if goes_on != Some(self.map.place(end).await?) {
                break;
            }
            end += 1;
        }
        let length = (end * size).min(offset + length) - offset;
        let place = match place {
            Place::Data(host) => Place::Data(host + offset % size),
            other => other,
        };
        Ok(Run { place, offset, length })
    }

    /// Block status, as [`Image::status`].
    pub(crate) async fn status(&self, offset: u64, length: u64) -> Result<Extent, IoError> {
        // An answer must not take forever: the caller asks on.
        const MOST: u64 = 1 << 16;
        let length = length.min(MOST.saturating_mul(self.map.block_size()));
        let run = self.run(offset, length).await?;
        Ok(match run.place {
            Place::Absent => Extent::new(offset, run.length, ExtentKind::Unallocated, None),
            Place::Zero => Extent::new(offset, run.length, ExtentKind::Zero, None),
            Place::Packed(_) => Extent::new(offset, run.length, ExtentKind::Compressed, None),
            Place::Data(host) if self.map.preallocated() => {
                let found = self.map.file().status(host, run.length);
                Extent::new(offset, found.length, found.kind, Some(host))
            }
            Place::Data(host) => Extent::new(offset, run.length, ExtentKind::Data, Some(host)),
        })
    }
}

impl<M: BlockMap + 'static> Image for Blocks<M> {
    fn format(&self) -> Format {
        self.map.format()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn file(&self) -> Option<&File> {
        Some(self.map.file())
    }

    fn unit(&self) -> u64 {
        // Of larger blocks, parts can be written as well: the rest of a new one is a hole.
        const MOST: u64 = 2 << 20;
        self.map.block_size().min(MOST)
    }

    fn plain_data(&self) -> Option<&File> {
        Some(self.map.file())
    }

    fn read(&self, offset: u64, view: crate::engine::View) -> Answer<'_> {
        Box::pin(self.read(offset, view, None))
    }

    fn write(&self, offset: u64, view: crate::engine::View) -> Answer<'_> {
        Box::pin(self.write(offset, view, None))
    }

    fn flush(&self) -> Answer<'_> {
        Box::pin(self.flush())
    }

    fn discard(&self, offset: u64, length: u64) -> Answer<'_> {
        Box::pin(self.discard(offset, length))
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Answer<'_> {
        Box::pin(self.write_zeroes(offset, length, unmap, None))
    }

    fn status(&self, offset: u64, length: u64) -> Answer<'_, Extent> {
        Box::pin(self.status(offset, length))
    }

    fn close(&self) -> Answer<'_> {
        Box::pin(self.close())
    }
}
