//! What each command does to the image, and how it is answered.

use std::rc::Rc;
use std::sync::Arc;

use terem_memory::{AlignedBuffer, IoMemory};

use super::connection::Connection;
use crate::engine::View;
use crate::executor::yield_now;
use crate::extent::ExtentKind;
use crate::file::to_usize;
use crate::nbd::protocol::{self as wire, Request, chunk, command, error, flag};
use crate::{Extent, IoError, Op};

/// Bytes read at once for `CACHE`.
pub(super) const CACHE_STEP: u64 = 256 << 10;
/// Bytes discarded or zeroed at once.
const STEP: u64 = 1 << 30;
/// Most looks into the image for one answer with extents.
const MAX_LOOKS: usize = 4096;
/// Most extents in an answer.
const MAX_EXTENTS: usize = 1024;
/// Bytes that an answer with extents takes.
pub(super) const STATUS_BYTES: u64 = MAX_EXTENTS as u64 * 16;
/// Reads of at least so many bytes look for holes first.
const LOOK_FOR_HOLES: u64 = 64 << 10;

fn number(error: &IoError) -> u32 {
    wire::wire_error(error.errno())
}

impl Connection {
    /// Carries out a request that makes sense. Answers of reads and block status are queued but for their end.
    pub(super) async fn execute(
        self: &Rc<Self>,
        request: &Request,
        payload: Option<&Arc<AlignedBuffer>>,
    ) -> Result<(), u32> {
        let (node, Request { offset, length, .. }) = (&self.local.node, *request);
        let done = match request.command {
            command::READ => return self.read(request).await,
            command::BLOCK_STATUS => return self.status(request).await,
            command::WRITE => match payload {
                Some(buffer) => {
                    let memory = Arc::clone(buffer) as Arc<dyn IoMemory>;
                    node.write(offset, View::new(memory).part(0, to_usize(length))).await
                }
                None => Ok(()),
            },
            command::FLUSH => node.execute(Op::Flush).await,
            command::TRIM => {
                self.in_steps(offset, length, |offset, length| Op::Discard { offset, length }).await
            }
            command::WRITE_ZEROES => {
                if request.has(flag::FAST_ZERO) && !node.zeroes_fast(offset, length) {
                    return Err(error::ENOTSUP);
                }
                let unmap = !request.has(flag::NO_HOLE);
                self.in_steps(offset, length, |offset, length| Op::WriteZeroes { offset, length, unmap })
                    .await
            }
            command::CACHE => self.prefetch(offset, length).await,
            _ => return Err(error::EINVAL),
        };
        done.map_err(|error| number(&error))?;
        let writes = matches!(request.command, command::WRITE | command::WRITE_ZEROES | command::TRIM);
        if writes && request.has(flag::FUA) {
            node.execute(Op::Flush).await.map_err(|error| number(&error))?;
        }
        Ok(())
    }

    /// Carries out a long operation so that other requests have their turn.
    async fn in_steps(&self, offset: u64, length: u64, op: impl Fn(u64, u64) -> Op) -> Result<(), IoError> {
        let (mut at, end) = (offset, offset + length);
        while at < end {
            // Ends at multiples, so that no cluster is cut where the request did not.
            let next = ((at / STEP + 1) * STEP).min(end);
            self.local.node.execute(op(at, next - at)).await?;
            at = next;
            if at < end {
                yield_now().await;
            }
        }
        Ok(())
    }

    /// Queues the end of the answer.
    pub(super) fn finish(self: &Rc<Self>, request: &Request, result: Result<(), u32>, held: usize) {
        let chunks = self.agreement.extended
            || (self.agreement.structured
                && matches!(request.command, command::READ | command::BLOCK_STATUS));
        match result {
            // Their last piece was the end.
            Ok(()) if matches!(request.command, command::READ | command::BLOCK_STATUS) => {}
            Ok(()) if chunks => self.chunk(request, (chunk::DONE, chunk::NONE), &[], None),
            Err(error) if chunks => {
                let mut head = error.to_be_bytes().to_vec();
                head.extend([0, 0]); // no message
                self.chunk(request, (chunk::DONE, chunk::ERROR), &head, None);
            }
            Ok(()) => self.simple(0, request.cookie, None),
            Err(error) => self.simple(error, request.cookie, None),
        }
        self.replied(held);
    }

    async fn read(self: &Rc<Self>, request: &Request) -> Result<(), u32> {
        let Request { offset, length, cookie, .. } = *request;
        if !self.agreement.structured {
            let data = self.read_data(offset, length).await?;
            self.simple(0, cookie, Some(data));
            return Ok(());
        }
        if length == 0 {
            self.chunk(request, (chunk::DONE, chunk::NONE), &[], None);
            return Ok(());
        }
        let whole = Extent::new(offset, length, ExtentKind::Data, None);
        let extents = if length >= LOOK_FOR_HOLES && !request.has(flag::DF) {
            let found = self.local.node.statuses(offset, length).await.map_err(|error| number(&error))?;
            data_and_holes(&found)
        } else {
            vec![whole]
        };
        for extent in extents {
            let flags = if extent.end() == offset + length { chunk::DONE } else { 0 };
            let mut head = extent.offset.to_be_bytes().to_vec();
            if extent.is_zero() {
                head.extend(u32::try_from(extent.length).unwrap_or(u32::MAX).to_be_bytes());
                self.chunk(request, (flags, chunk::OFFSET_HOLE), &head, None);
            } else {
                let data = self.read_data(extent.offset, extent.length).await?;
                self.chunk(request, (flags, chunk::OFFSET_DATA), &head, Some(data));
            }
        }
        Ok(())
    }

    async fn read_data(&self, offset: u64, length: u64) -> Result<(View, Arc<AlignedBuffer>), u32> {
        let buffer = self.buffers.take(to_usize(length));
        let memory = Arc::clone(&buffer) as Arc<dyn IoMemory>;
        let view = View::new(memory).part(0, to_usize(length));
        match self.local.node.read(offset, view.clone()).await {
            Ok(()) => Ok((view, buffer)),
            Err(error) => {
                self.buffers.give(buffer);
                Err(number(&error))
            }
        }
    }

    /// Reads a range for the page cache's sake.
    async fn prefetch(&self, offset: u64, length: u64) -> Result<(), IoError> {
        let buffer = self.buffers.take(to_usize(CACHE_STEP));
        let view = View::new(Arc::clone(&buffer) as Arc<dyn IoMemory>);
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let n = CACHE_STEP.min(end - at);
            self.local.node.read(at, view.part(0, to_usize(n))).await?;
            at += n;
        }
        self.buffers.give(buffer);
        Ok(())
    }

    async fn status(self: &Rc<Self>, request: &Request) -> Result<(), u32> {
        let (mut at, end) = (request.offset, request.offset + request.length);
        let mut extents: Vec<(u64, u32)> = Vec::new();
        let mut looks = 0;
        while at < end && looks < MAX_LOOKS {
            looks += 1;
            let found = self.local.node.status(at, end - at).await.map_err(|error| number(&error))?;
            at = found.end();
            let flags = state(&found);
            match extents.last_mut() {
                Some(last) if last.1 == flags => last.0 += found.length,
                Some(_) if request.has(flag::REQ_ONE) => break,
                _ => extents.push((found.length, flags)),
            }
            if extents.len() == MAX_EXTENTS {
                break;
            }
        }
        let mut body = wire::BASE_ALLOCATION_ID.to_be_bytes().to_vec();
        if self.agreement.extended {
            body.extend(u32::try_from(extents.len()).unwrap_or(0).to_be_bytes());
            for (length, flags) in extents {
                body.extend(length.to_be_bytes());
                body.extend(u64::from(flags).to_be_bytes());
            }
            self.chunk(request, (chunk::DONE, chunk::BLOCK_STATUS_EXT), &body, None);
        } else {
            for (length, flags) in extents {
                // The request's length, which bounds it, has 32 bits.
                body.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
                body.extend(flags.to_be_bytes());
            }
            self.chunk(request, (chunk::DONE, chunk::BLOCK_STATUS), &body, None);
        }
        Ok(())
    }
}

/// `base:allocation` of an extent.
fn state(extent: &Extent) -> u32 {
    match extent.kind {
        ExtentKind::Data | ExtentKind::Compressed => 0,
        ExtentKind::Zero if extent.host.is_some() => wire::STATE_ZERO,
        ExtentKind::Zero | ExtentKind::Unallocated => wire::STATE_ZERO | wire::STATE_HOLE,
    }
}

/// Neighbours that are read in the same way, together.
fn data_and_holes(extents: &[Extent]) -> Vec<Extent> {
    let mut parts: Vec<Extent> = Vec::new();
    for extent in extents {
        match parts.last_mut() {
            Some(last) if last.is_zero() == extent.is_zero() => last.length += extent.length,
            _ => parts.push(*extent),
        }
    }
    parts
}
