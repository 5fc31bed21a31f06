//! An open image: its extents, and its content ID.

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

use super::grains::{Grains, compress};
use crate::blocks::{Below, BlockMap, Blocks, Place};
use crate::bytes::{le32, new_uuid};
use crate::engine::View;
use crate::extent::{Extent, ExtentKind};
use crate::file::{File, to_usize};
use crate::flat::Flat;
use crate::node::{Answer, Image, Node, Packer};
use crate::range_lock::RangeLock;
use crate::{Format, IoError};

/// What an extent is in.
pub(super) enum Part {
    Flat(Flat),
    Sparse(Box<Blocks<Grains>>),
    /// Zeroes, without a file.
    Zero {
        size: u64,
    },
}

impl Part {
    fn size(&self) -> u64 {
        match self {
            Self::Flat(flat) => flat.size(),
            Self::Sparse(blocks) => blocks.size(),
            Self::Zero { size } => *size,
        }
    }
}

/// An extent of the disk.
pub(super) struct Piece {
    /// Where it begins on the disk.
    pub(super) start: u64,
    pub(super) part: Part,
    pub(super) writable: bool,
}

/// The content ID of an open image.
pub(super) struct ContentId {
    pub(super) value: u32,
    /// Where its digits are in the file.
    pub(super) at: Range<u64>,
}

/// An open image.
pub(crate) struct Vmdk {
    /// The file with the descriptor.
    pub(super) file: Rc<File>,
    /// In order, without gaps.
    pub(super) pieces: Vec<Piece>,
    pub(super) backing: Option<Node>,
    /// `None`: an extent that was opened by itself.
    pub(super) cid: Option<ContentId>,
    /// Whether the content ID was changed.
    pub(super) started: Cell<bool>,
    pub(super) starting: RangeLock,
}

impl Vmdk {
    /// The content ID as it was at opening.
    pub(super) fn content_id(&self) -> Option<u32> {
        self.cid.as_ref().map(|cid| cid.value)
    }

    /// The extent at `offset`, the offset in it, and how much of `length` is in it.
    fn piece(&self, offset: u64, length: u64) -> Result<(&Piece, u64, u64), IoError> {
        let index = self.pieces.partition_point(|piece| piece.start <= offset);
        let piece = index.checked_sub(1).and_then(|i| self.pieces.get(i));
        let piece = piece.ok_or(IoError::OutOfRange { offset, length, size: self.size() })?;
        let within = offset - piece.start;
        Ok((piece, within, length.min(piece.part.size().saturating_sub(within)).max(1)))
    }

    fn below(&self, piece: &Piece) -> Option<Below<'_>> {
        self.backing.as_ref().map(|node| Below { node, start: piece.start })
    }

    /// To be called before anything is changed: gives the contents a new ID.
    async fn begin_write(&self) -> Result<(), IoError> {
        if self.started.get() {
            return Ok(());
        }
        let _one = self.starting.all().await;
        if let Some(cid) = self.cid.as_ref().filter(|_| !self.started.get()) {
            // As many digits as there are, so that the text around them stays.
            let width = to_usize(cid.at.end - cid.at.start);
            let mask = u32::MAX >> (32 - 4 * width.clamp(1, 8));
            let mut value = le32(&new_uuid()?, 0) & mask;
            while value == cid.value || value >= 0xffff_fffe {
                value = value.wrapping_add(1) & mask;
            }
            self.file.write_bytes(cid.at.start, format!("{value:0width$x}").as_bytes()).await?;
        }
        self.started.set(true);
        Ok(())
    }

    async fn read(&self, offset: u64, view: View) -> Result<(), IoError> {
        let mut done = 0;
        while done < view.len() as u64 {
            let (piece, within, length) = self.piece(offset + done, view.len() as u64 - done)?;
            let part = view.part(to_usize(done), to_usize(length));
            match &piece.part {
                Part::Flat(flat) => flat.read(within, part).await?,
                Part::Sparse(blocks) => blocks.read(within, part, self.below(piece)).await?,
                Part::Zero { .. } => part.zero(),
            }
            done += length;
        }
        Ok(())
    }

    async fn write(&self, offset: u64, view: View) -> Result<(), IoError> {
        self.begin_write().await?;
        let mut done = 0;
        while done < view.len() as u64 {
            let (piece, within, length) = self.piece(offset + done, view.len() as u64 - done)?;
            let part = view.part(to_usize(done), to_usize(length));
            match &piece.part {
                _ if !piece.writable => return Err(IoError::ReadOnly),
                Part::Flat(flat) => flat.write(within, part).await?,
                Part::Sparse(blocks) => blocks.write(within, part, self.below(piece)).await?,
                Part::Zero { .. } => return Err(IoError::ReadOnly),
            }
            done += length;
        }
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<(), IoError> {
        self.begin_write().await?;
        let mut done = 0;
        while done < length {
            let (piece, within, length) = self.piece(offset + done, length - done)?;
            match &piece.part {
                Part::Zero { .. } => {}
                _ if !piece.writable => return Err(IoError::ReadOnly),
                Part::Flat(flat) => flat.write_zeroes(within, length, unmap).await?,
                Part::Sparse(blocks) => blocks.write_zeroes(within, length, unmap, self.below(piece)).await?,
            }
            done += length;
        }
        Ok(())
    }

    async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        self.begin_write().await?;
        let mut done = 0;
        while done < length {
            let (piece, within, length) = self.piece(offset + done, length - done)?;
            match &piece.part {
                Part::Flat(flat) if piece.writable => flat.discard(within, length).await?,
                Part::Sparse(blocks) if piece.writable => blocks.discard(within, length).await?,
                _ => {}
            }
            done += length;
        }
        Ok(())
    }

    /// Flushes or closes all extents.
    async fn settle(&self, close: bool) -> Result<(), IoError> {
        for piece in &self.pieces {
            match &piece.part {
                Part::Flat(flat) => flat.flush().await?,
                Part::Sparse(blocks) if close => blocks.close().await?,
                Part::Sparse(blocks) => blocks.flush().await?,
                Part::Zero { .. } => {}
            }
        }
        if self.started.get() { self.file.sync().await } else { Ok(()) }
    }

    async fn status(&self, offset: u64, length: u64) -> Result<Extent, IoError> {
        let (piece, within, length) = self.piece(offset, length)?;
        let found = match &piece.part {
            Part::Flat(flat) => flat.status(within, length),
            Part::Sparse(blocks) => blocks.status(within, length).await?,
            Part::Zero { .. } => Extent::new(within, length, ExtentKind::Zero, None),
        };
        Ok(Extent { offset, ..found })
    }

    /// The only extent, if its grains are compressed.
    fn stream(&self) -> Option<&Blocks<Grains>> {
        match self.pieces.as_slice() {
            [Piece { part: Part::Sparse(blocks), .. }] if blocks.map.packs() => Some(blocks),
            _ => None,
        }
    }

    async fn write_compressed(&self, grains: Vec<(u64, Vec<u8>)>) -> Result<(), IoError> {
        let stream = self.stream().ok_or(IoError::Unsupported("compressed grains"))?;
        self.begin_write().await?;
        for (offset, packed) in grains {
            let block = offset / stream.map.block_size();
            let host = stream.map.put_packed(block, &packed).await?;
            stream.map.commit(block, Place::Packed(host)).await?;
        }
        Ok(())
    }
}

impl Image for Vmdk {
    fn format(&self) -> Format {
        Format::Vmdk
    }

    fn size(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.start + piece.part.size())
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn backing(&self) -> Option<&Node> {
        self.backing.as_ref()
    }

    fn unit(&self) -> u64 {
        let grain = |piece: &Piece| match &piece.part {
            Part::Sparse(blocks) => Some(blocks.map.block_size()),
            _ => None,
        };
        self.pieces.iter().find_map(grain).unwrap_or(0)
    }

    fn plain_data(&self) -> Option<&File> {
        match self.pieces.as_slice() {
            [Piece { part: Part::Sparse(blocks), .. }] => Some(blocks.map.file()),
            [Piece { part: Part::Flat(flat), .. }] if flat.start() == 0 => Some(flat.file()),
            _ => None,
        }
    }

    fn read(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(self.read(offset, view))
    }

    fn write(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(self.write(offset, view))
    }

    fn flush(&self) -> Answer<'_> {
        Box::pin(self.settle(false))
    }

    fn discard(&self, offset: u64, length: u64) -> Answer<'_> {
        Box::pin(self.discard(offset, length))
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Answer<'_> {
        Box::pin(self.write_zeroes(offset, length, unmap))
    }

    fn status(&self, offset: u64, length: u64) -> Answer<'_, Extent> {
        Box::pin(self.status(offset, length))
    }

    fn compression(&self) -> Option<Packer> {
        let unit = self.stream()?.map.block_size();
        Some(Packer { unit, always: true, compress: |bytes| compress(bytes).ok() })
    }

    fn write_compressed(&self, clusters: Vec<(u64, Vec<u8>)>) -> Answer<'_> {
        Box::pin(self.write_compressed(clusters))
    }

    fn close(&self) -> Answer<'_> {
        Box::pin(self.settle(true))
    }
}
