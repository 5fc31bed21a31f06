//! Writing, zeroing and discarding.

use super::{Below, BlockMap, Blocks, Place};
use crate::IoError;
use crate::engine::View;
use crate::file::to_usize;

/// Up to this many zeroes at the end of the file are written with the data before them.
const INLINE_ZEROES: usize = 64 << 10;
/// For larger blocks only the last sector is: blocks lie in the file whole.
const SECTOR: u64 = 512;

impl<M: BlockMap> Blocks<M> {
    /// Writes `view` at `offset`.
    pub(crate) async fn write(
        &self,
        offset: u64,
        view: View,
        below: Option<Below<'_>>,
    ) -> Result<(), IoError> {
        let end = offset + view.len() as u64;
        if end == offset {
            return Ok(());
        }
        self.map.begin_write().await?;
        let mut at = offset;
        while at < end {
            let run = self.run(at, end - at).await?;
            let part = view.part(to_usize(at - offset), to_usize(run.length));
            match run.place {
                Place::Data(host) => self.write_in_place(host, at, part).await?,
                _ => {
                    let _mine = self.placing.exclusive(self.blocks(at, run.length)).await;
                    self.write_placing(at, &part, below).await?;
                }
            }
            at += run.length;
        }
        Ok(())
    }

    /// Writes `view`, which belongs at `offset` of the disk, to `host`.
    async fn write_in_place(&self, host: u64, offset: u64, view: View) -> Result<(), IoError> {
        let size = self.map.block_size();
        let blocks = self.blocks(offset, view.len() as u64);
        let first = host - offset % size;
        for block in blocks.clone() {
            self.map.before_write(block, first + (block - blocks.start) * size).await?;
        }
        self.map.file().write(host, &[view]).await
    }

    /// As [`Self::write`], for who may give these blocks a place.
    async fn write_placing(&self, offset: u64, view: &View, below: Option<Below<'_>>) -> Result<(), IoError> {
        let (end, size) = (offset + view.len() as u64, self.map.block_size());
        let mut at = offset;
        while at < end {
            let run = self.run(at, end - at).await?;
            let next = match run.place {
                Place::Data(host) => {
                    let part = view.part(to_usize(at - offset), to_usize(run.length));
                    self.write_in_place(host, at, part).await?;
                    at + run.length
                }
                _ if self.map.packs() => {
                    let next = end.min((at / size + 1) * size);
                    let part = view.part(to_usize(at - offset), to_usize(next - at));
                    self.write_packed(at, &part, below).await?;
                    next
                }
                _ => {
                    let blocks = self.blocks(at, run.length);
                    let (host, count) = self.map.allocate(blocks.end - blocks.start).await?;
                    let next = end.min((blocks.start + count) * size);
                    let part = view.part(to_usize(at - offset), to_usize(next - at));
                    let below = below.filter(|_| run.place == Place::Absent);
                    if let Err(error) = self.write_new(host, at, &part, below).await {
                        self.map.give_back(host, count);
                        return Err(error);
                    }
                    for i in 0..count {
                        self.map.commit(blocks.start + i, Place::Data(host + i * size)).await?;
                    }
                    next
                }
            };
            at = next;
        }
        Ok(())
    }

    /// Writes `view`, which belongs at `offset` of the disk, into new blocks at `host`, and fills the rest of the first
    /// and last one with what was there so far.
    async fn write_new(
        &self,
        host: u64,
        offset: u64,
        view: &View,
        below: Option<Below<'_>>,
    ) -> Result<(), IoError> {
        let (size, file) = (self.map.block_size(), self.map.file());
        let end = offset + view.len() as u64;
        let head = offset % size;
        let tail = end.next_multiple_of(size) - end;
        let (data, after) = (host + head, host + head + view.len() as u64);
        // Beyond its end the file reads as zeroes.
        let len = if file.is_block_device() { u64::MAX } else { file.len() };
        let mut views = vec![view.clone()];
        let mut start = data;
        if let Some(before) = self.surroundings(offset - head, head, below).await? {
            views.insert(0, before);
            start = host;
        } else if head > 0 && host < len {
            file.write_zeroes(host, head.min(len - host), true).await?;
        }
        if let Some(rest) = self.surroundings(end, tail, below).await? {
            views.push(rest);
        } else if tail > 0 {
            if after < len {
                file.write_zeroes(after, tail.min(len - after), true).await?;
            }
            if after + tail > len && to_usize(tail) <= INLINE_ZEROES {
                views.push(View::zeroed(to_usize(tail)));
            } else if after + tail > len {
                // Before anything refers to it: later, someone may be writing there.
                file.write_bytes(after + tail - SECTOR, &[0; 512]).await?;
            }
        }
        file.write(start, &views).await
    }

    /// What is below in a part of a block, or `None` where nothing is.
    async fn surroundings(
        &self,
        offset: u64,
        length: u64,
        below: Option<Below<'_>>,
    ) -> Result<Option<View>, IoError> {
        let Some(below) = below.filter(|_| length > 0) else { return Ok(None) };
        let view = View::zeroed(to_usize(length));
        let there = to_usize(self.size.saturating_sub(offset).min(length));
        if there > 0 {
            Box::pin(below.node.read(below.start + offset, view.part(0, there))).await?;
        }
        Ok(Some(view))
    }

    /// Compresses one block anew, with `view` at `offset` in it.
    async fn write_packed(&self, offset: u64, view: &View, below: Option<Below<'_>>) -> Result<(), IoError> {
        let size = self.map.block_size();
        let block = offset / size;
        let length = size.min(self.size - block * size);
        let bytes = if view.len() as u64 == length {
            view.to_vec()
        } else {
            let whole = View::zeroed(to_usize(length));
            Box::pin(self.read(block * size, whole.clone(), below)).await?;
            whole.part(to_usize(offset % size), view.len()).put(&view.to_vec());
            whole.to_vec()
        };
        let host = self.map.pack(block, &bytes).await?;
        self.map.commit(block, Place::Packed(host)).await
    }

    /// Gives back the storage of the range, which then reads as zeroes, or leaves it as it is.
    pub(crate) async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        if !self.discard || length == 0 {
            return Ok(());
        }
        self.map.begin_write().await?;
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let run = self.run(at, end - at).await?;
            if let Place::Data(host) = run.place {
                self.map.file().discard(host, run.length).await?;
            }
            at += run.length;
        }
        Ok(())
    }

    /// Makes the range read as zeroes. Blocks keep their place: what is given back is the storage behind it.
    pub(crate) async fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        unmap: bool,
        below: Option<Below<'_>>,
    ) -> Result<(), IoError> {
        if length == 0 {
            return Ok(());
        }
        self.map.begin_write().await?;
        let (end, size) = (offset + length, self.map.block_size());
        let mut at = offset;
        while at < end {
            let run = self.run(at, end - at).await?;
            match run.place {
                Place::Data(host) => {
                    self.map.file().write_zeroes(host, run.length, unmap && self.discard).await?;
                    at += run.length;
                }
                // Whoever gives the block a place fills what they do not write with zeroes.
                Place::Absent if below.is_none() => at += run.length,
                Place::Zero => at += run.length,
                Place::Absent | Place::Packed(_) => {
                    let next = end.min((at / size + 1) * size);
                    self.zero_block(at, next - at, below).await?;
                    at = next;
                }
            }
        }
        Ok(())
    }

    /// Zeroes a part of a block that is compressed, or hides what is below it.
    async fn zero_block(&self, offset: u64, length: u64, below: Option<Below<'_>>) -> Result<(), IoError> {
        let (size, block) = (self.map.block_size(), offset / self.map.block_size());
        let whole = offset.is_multiple_of(size) && (length == size || offset + length == self.size);
        let _mine = self.placing.exclusive(block..block + 1).await;
        let place = self.map.place(block).await?;
        if whole && self.map.has_zero_blocks() && !matches!(place, Place::Data(_)) {
            return self.map.commit(block, Place::Zero).await;
        }
        self.write_placing(offset, &View::zeroed(to_usize(length)), below).await
    }
}
