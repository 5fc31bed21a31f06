//! Taking a server's replies apart. The server may be hostile: a length or an offset that does not fit the request ends the
//! connection.

use super::link::{Answer, Link, Pending, Wanted};
use crate::IoError;
use crate::extent::{Extent, ExtentKind};
use crate::file::to_usize;
use crate::nbd::input::Input;
use crate::nbd::protocol::{self as wire, Fields, ReplyHeader, chunk};
use crate::nbd::socket::Socket;

/// Longest chunk that is not data, in bytes: extents or a message. 64 Ki extents with 64-bit lengths are 1 MiB.
const MAX_CHUNK: u64 = 4 << 20;

/// What a reply's chunk is for.
#[derive(Clone)]
struct Target {
    offset: u64,
    length: u64,
    wanted: Wanted,
}

impl Link {
    /// Receives replies until the connection breaks; why it did.
    pub(super) async fn receive_all(&self, socket: &Socket) -> String {
        let mut input = Input::new();
        loop {
            match self.receive_one(socket, &mut input).await {
                Ok(true) => {}
                Ok(false) => return "the server has gone".into(),
                Err(Broken::Io(error)) => return format!("the connection broke: {error}"),
                Err(Broken::Nonsense(what)) => {
                    return format!("the server does not follow the NBD protocol: {what}");
                }
            }
        }
    }

    /// Receives a simple reply or a chunk; false at the server's end.
    async fn receive_one(&self, socket: &Socket, input: &mut Input) -> Result<bool, Broken> {
        if !input.fill(socket, 4).await? {
            return Ok(false);
        }
        let mut magic = [0; 4];
        input.peek(&mut magic);
        let len =
            ReplyHeader::len(u32::from_be_bytes(magic)).ok_or(Broken::Nonsense("no reply's magic number"))?;
        input.fill(socket, len).await?;
        let mut bytes = [0; wire::EXTENDED_CHUNK_LEN];
        input.take(&mut bytes[..len]);
        let header = ReplyHeader::decode(&bytes[..len]).ok_or(Broken::Nonsense("no reply's magic number"))?;
        match header {
            ReplyHeader::Simple { error, cookie } => self.simple(socket, input, error, cookie).await?,
            ReplyHeader::Chunk { .. } if !self.terms().structured => {
                return Err(Broken::Nonsense("a structured reply that was not agreed"));
            }
            ReplyHeader::Chunk { flags, kind, cookie, length } => {
                let target = self.target(cookie)?;
                self.chunk(socket, input, &target, (kind, cookie, length)).await?;
                if flags & chunk::DONE != 0 {
                    let result = self.with_pending(cookie, conclude);
                    self.answered(cookie, result.unwrap_or(Ok(Answer::Done)));
                }
            }
        }
        Ok(true)
    }

    fn target(&self, cookie: u64) -> Result<Target, Broken> {
        let target = self.with_pending(cookie, |pending| Target {
            offset: pending.request.offset,
            length: pending.request.length,
            wanted: pending.wanted.clone(),
        });
        target.ok_or(Broken::Nonsense("a reply to no request"))
    }

    async fn simple(
        &self,
        socket: &Socket,
        input: &mut Input,
        error: u32,
        cookie: u64,
    ) -> Result<(), Broken> {
        let target = self.target(cookie)?;
        if self.terms().extended {
            return Err(Broken::Nonsense("a simple reply in spite of extended headers"));
        }
        let result = match target.wanted {
            Wanted::Data(_) | Wanted::Extents if self.terms().structured => {
                return Err(Broken::Nonsense("a simple reply where only structured ones may be"));
            }
            _ if error != 0 => Err(io_error(error)),
            Wanted::Data(view) => {
                input.read(socket, &view).await?;
                view.mark_written(view.len());
                Ok(Answer::Done)
            }
            Wanted::Done(_) | Wanted::Extents => Ok(Answer::Done),
        };
        self.answered(cookie, result);
        Ok(())
    }

    async fn chunk(
        &self,
        socket: &Socket,
        input: &mut Input,
        target: &Target,
        (kind, cookie, length): (u16, u64, u64),
    ) -> Result<(), Broken> {
        match (kind, &target.wanted) {
            (chunk::OFFSET_DATA, Wanted::Data(view)) => {
                let mut offset = [0; 8];
                let n = length.checked_sub(8).ok_or(Broken::Nonsense("a chunk is too short"))?;
                input.fill(socket, 8).await?;
                input.take(&mut offset);
                let at = place(target, u64::from_be_bytes(offset), n)?;
                let part = view.part(at, to_usize(n));
                input.read(socket, &part).await?;
                part.mark_written(part.len());
                self.with_pending(cookie, |pending| pending.got += n);
                Ok(())
            }
            (chunk::OFFSET_DATA | chunk::OFFSET_HOLE, Wanted::Done(_) | Wanted::Extents) => {
                Err(Broken::Nonsense("data that was not asked for"))
            }
            _ if length > MAX_CHUNK => Err(Broken::Nonsense("a chunk is too long")),
            _ => {
                let bytes = input.bytes(socket, to_usize(length)).await?;
                self.small_chunk(target, (kind, cookie), Fields(&bytes))
            }
        }
    }

    /// A chunk that is not data.
    fn small_chunk(
        &self,
        target: &Target,
        (kind, cookie): (u16, u64),
        mut fields: Fields<'_>,
    ) -> Result<(), Broken> {
        let cut = Broken::Nonsense("a chunk is cut off");
        match (kind, &target.wanted) {
            (chunk::OFFSET_HOLE, Wanted::Data(view)) => {
                let (Some(offset), Some(n)) = (fields.u64(), fields.u32()) else { return Err(cut) };
                let at = place(target, offset, n.into())?;
                view.part(at, n as usize).zero();
                self.with_pending(cookie, |pending| pending.got += u64::from(n));
            }
            (chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT, Wanted::Extents) => {
                let wide = kind == chunk::BLOCK_STATUS_EXT;
                let Some(id) = fields.u32() else { return Err(cut) };
                if Some(id) != self.terms().allocation {
                    return Err(Broken::Nonsense("block status of a context that was not agreed"));
                }
                let extents = extents(target, wide, fields)?;
                self.with_pending(cookie, |pending| pending.extents = extents);
            }
            (kind, _) if kind & chunk::IS_ERROR != 0 => {
                let error = fields.u32().ok_or(cut)?;
                self.with_pending(cookie, |pending| {
                    pending.error.get_or_insert_with(|| io_error(error));
                });
            }
            (chunk::NONE, _) => {}
            _ => return Err(Broken::Nonsense("a chunk of an unexpected type")),
        }
        Ok(())
    }
}

/// Where in the request's memory a chunk goes.
fn place(target: &Target, offset: u64, length: u64) -> Result<usize, Broken> {
    let at = offset.checked_sub(target.offset);
    let fits = |at: &u64| length > 0 && at.checked_add(length).is_some_and(|end| end <= target.length);
    at.filter(fits).map(to_usize).ok_or(Broken::Nonsense("data outside of what was asked for"))
}

/// The extents of an answer, from the request's offset on.
fn extents(target: &Target, wide: bool, mut fields: Fields<'_>) -> Result<Vec<Extent>, Broken> {
    let cut = || Broken::Nonsense("block status is cut off");
    if wide {
        // The number of extents, which their length tells too.
        fields.u32().ok_or_else(cut)?;
    }
    let (mut at, mut extents) = (target.offset, Vec::<Extent>::new());
    while !fields.0.is_empty() {
        let (length, flags) = if wide {
            (fields.u64().ok_or_else(cut)?, fields.u64().ok_or_else(cut)?)
        } else {
            (fields.u32().ok_or_else(cut)?.into(), fields.u32().ok_or_else(cut)?.into())
        };
        let end = at.checked_add(length).filter(|&end| length > 0 && end < i64::MAX as u64);
        let end = end.ok_or(Broken::Nonsense("block status of no or too many bytes"))?;
        let has = |flag: u32| flags & u64::from(flag) != 0;
        let kind = if has(wire::STATE_ZERO) { ExtentKind::Zero } else { ExtentKind::Data };
        // As for files: a hole has no place.
        let host = (kind == ExtentKind::Data || !has(wire::STATE_HOLE)).then_some(at);
        let extent = Extent::new(at, length, kind, host);
        if !extents.last_mut().is_some_and(|last| last.join(&extent)) {
            extents.push(extent);
        }
        at = end;
    }
    if extents.is_empty() {
        return Err(Broken::Nonsense("block status without an extent"));
    }
    Ok(extents)
}

/// The result of a request whose last chunk has come.
fn conclude(pending: &mut Pending) -> Result<Answer, IoError> {
    if let Some(error) = pending.error.take() {
        return Err(error);
    }
    match &pending.wanted {
        Wanted::Done(_) => Ok(Answer::Done),
        Wanted::Data(_) if pending.got == pending.request.length => Ok(Answer::Done),
        Wanted::Data(_) => Err(IoError::Server("the server's answer leaves out a part of the data".into())),
        Wanted::Extents if pending.extents.is_empty() => {
            Err(IoError::Server("the server's answer has no block status".into()))
        }
        Wanted::Extents => Ok(Answer::Extents(std::mem::take(&mut pending.extents))),
    }
}

fn io_error(error: u32) -> IoError {
    std::io::Error::from_raw_os_error(wire::errno(error)).into()
}

/// Why a connection cannot go on.
enum Broken {
    Io(std::io::Error),
    Nonsense(&'static str),
}

impl From<std::io::Error> for Broken {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}
