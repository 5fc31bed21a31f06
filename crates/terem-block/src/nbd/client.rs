//! The client: an export as an image, which a disk or an overlay uses like a local file.
//!
//! ```text
//!  requests ──> Link: a cookie for each ──> writer task ──> socket ──> server
//!      ^──────────── results <──────────── reader task <──── socket <──┘
//! ```
//!
//! Opening blocks (with a deadline) on the disk's thread, which has nothing else to do then. Afterwards nothing blocks: a lost
//! connection is made again by a thread of its own, if the address says `reconnect-delay`; requests wait as long.

mod connect;
mod link;
pub(crate) mod negotiate;
mod receive;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use self::connect::connect;
use self::link::{Answer as Reply, Link, Wanted};
use super::protocol::{command, export, flag};
use super::tls::ClientTls;
use super::uri::NbdUri;
use crate::engine::{Engine, View};
use crate::executor::Executor;
use crate::extent::{Extent, ExtentKind};
use crate::file::{File, to_usize};
use crate::node::{Answer, Image, Node};
use crate::range_lock::RangeLock;
use crate::{Format, IoError, Op, OpenError, OpenOptions};

/// Most data in one request, in bytes.
const MAX_DATA: u64 = 32 << 20;
/// Most bytes of one trim or write-zeroes without extended headers: what all servers take.
const MAX_EFFECT: u64 = 1 << 30;

/// Whether a disk's name is an NBD address (`nbd://…` and its kin), not a file's.
#[must_use]
pub fn is_address(path: &Path) -> bool {
    NbdUri::is_meant(path)
}

/// Opens the export at the address `path`.
///
/// # Errors
/// [`OpenError`] when the address makes no sense, the server cannot be reached, refuses, or is read-only and is to be written.
pub(crate) fn open(
    engine: &Rc<Engine>,
    path: &Path,
    format: Option<Format>,
    writing: bool,
    options: &OpenOptions,
) -> Result<Node, OpenError> {
    let uri = NbdUri::parse(path)?;
    if options.snapshot.is_some() {
        let what = "an NBD export has no snapshots".into();
        return Err(OpenError::Limit { path: path.to_owned(), what });
    }
    if let Some(format) = format.filter(|&format| format != Format::Raw) {
        return Err(OpenError::Unsupported {
            path: path.to_owned(),
            feature: format!("the format {} over NBD", format.name()),
            hint: "serve the image's contents (`terem disk serve`, `qemu-nbd -f FORMAT`), not its file",
        });
    }
    let fail = |reason: String| OpenError::Server {
        path: path.to_owned(),
        doing: "cannot have TLS with the server",
        reason,
    };
    let tls = match uri.tls {
        true => Some(ClientTls::load(uri.certificates.as_deref()).map_err(|e| fail(e.to_string()))?),
        false => None,
    };
    let connected = connect(&uri, tls.as_ref())?;
    if writing && connected.terms.has(export::READ_ONLY) {
        return Err(OpenError::Server {
            path: path.to_owned(),
            doing: "cannot write to the export",
            reason: "the server gives it read-only; open it with readonly=on".into(),
        });
    }
    let link = Link::start(Rc::clone(engine), uri, tls, connected);
    Ok(Node::new(Remote {
        link,
        read_only: !writing,
        discard: options.discard,
        blocks: RangeLock::default(),
        known: RefCell::default(),
    }))
}

/// Bytes of the export at `path`.
///
/// # Errors
/// As [`open`]'s.
pub(crate) fn size(path: &Path, format: Option<Format>) -> Result<u64, OpenError> {
    let options = OpenOptions::read_only();
    Ok(open(&Engine::new(options.aio)?, path, format, false, &options)?.size())
}

/// Makes the export at `path` an empty disk, as a new image is.
///
/// # Errors
/// As [`open`]'s; when it has another size than `size` bytes; when zeroing fails.
pub(crate) fn empty(path: &Path, size: u64) -> Result<(), OpenError> {
    let options = OpenOptions::default();
    let engine = Engine::new(options.aio)?;
    let node = open(&engine, path, None, true, &options)?;
    if node.size() < size {
        let what = format!("the export has {} bytes, {size} are needed", node.size());
        return Err(OpenError::Limit { path: path.to_owned(), what });
    }
    let work = async {
        let (offset, length) = (0, node.size());
        node.execute(Op::WriteZeroes { offset, length, unmap: true }).await?;
        node.close().await
    };
    let result = Executor::new(Rc::clone(&engine)).block_on(work).unwrap_or_else(|e| Err(e.into()));
    let path = path.to_owned();
    result.map_err(|source| OpenError::Request { path, doing: "zeroing the export", source })
}

/// An export as an image.
struct Remote {
    link: Rc<Link>,
    read_only: bool,
    discard: bool,
    /// Where the server has a minimum block size: whole blocks are written shared, parts of blocks exclusively.
    blocks: RangeLock,
    /// The extents of the last answer, until something is written.
    known: RefCell<Vec<Extent>>,
}

impl Remote {
    fn minimum(&self) -> u64 {
        self.link.terms().block_size.minimum.into()
    }

    /// Most data in one request: a multiple of the minimum.
    fn most(&self) -> u64 {
        let most = MAX_DATA.min(self.link.terms().block_size.maximum.into());
        (most - most % self.minimum()).max(self.minimum())
    }

    /// Bytes at the server; the last sector of [`Image::size`] may go beyond.
    fn there(&self) -> u64 {
        self.link.terms().size
    }

    /// Reads what may have any offset and length.
    async fn read_any(&self, offset: u64, view: View) -> Result<(), IoError> {
        let there = to_usize(self.there().saturating_sub(offset).min(view.len() as u64));
        view.part(there, view.len()).zero();
        let (view, end, unit) = (view.part(0, there), offset + there as u64, self.minimum());
        if there == 0 {
            return Ok(());
        }
        if offset.is_multiple_of(unit) && end.is_multiple_of(unit) {
            return self.read_whole(offset, view).await;
        }
        let start = offset - offset % unit;
        let bounce = View::zeroed(to_usize(end.next_multiple_of(unit).min(self.there()) - start));
        self.read_whole(start, bounce.clone()).await?;
        view.copy_from(&bounce.part(to_usize(offset - start), there));
        Ok(())
    }

    /// Reads whole blocks.
    async fn read_whole(&self, offset: u64, view: View) -> Result<(), IoError> {
        for at in (0..view.len()).step_by(to_usize(self.most())) {
            let part = view.part(at, to_usize(self.most()));
            let length = part.len() as u64;
            let request = (command::READ, 0, offset + at as u64, length);
            self.link.ask(request, Wanted::Data(part)).await?;
        }
        Ok(())
    }

    async fn write_any(&self, offset: u64, view: View) -> Result<(), IoError> {
        self.known.borrow_mut().clear();
        let there = to_usize(self.there().saturating_sub(offset).min(view.len() as u64));
        if view.part(there, view.len()).to_vec().iter().any(|&b| b != 0) {
            return Err(IoError::NoSpace);
        }
        let (view, end, unit) = (view.part(0, there), offset + there as u64, self.minimum());
        if there == 0 {
            return Ok(());
        }
        if unit == 1 {
            return self.write_whole(offset, view).await;
        }
        let blocks = offset / unit..end.div_ceil(unit);
        if offset.is_multiple_of(unit) && (end.is_multiple_of(unit) || end == self.there()) {
            let _blocks = self.blocks.shared(blocks).await;
            return self.write_whole(offset, view).await;
        }
        let _blocks = self.blocks.exclusive(blocks).await;
        let start = offset - offset % unit;
        let bounce = View::zeroed(to_usize(end.next_multiple_of(unit).min(self.there()) - start));
        self.read_whole(start, bounce.clone()).await?;
        bounce.part(to_usize(offset - start), there).copy_from(&view);
        self.write_whole(start, bounce).await
    }

    async fn write_whole(&self, offset: u64, view: View) -> Result<(), IoError> {
        for at in (0..view.len()).step_by(to_usize(self.most())) {
            let part = view.part(at, to_usize(self.most()));
            let flags = if self.link.terms().extended { flag::PAYLOAD_LEN } else { 0 };
            let length = part.len() as u64;
            let request = (command::WRITE, flags, offset + at as u64, length);
            self.link.ask(request, Wanted::Done(Some(part))).await?;
        }
        Ok(())
    }

    /// Trims or zeroes whole blocks.
    async fn effect(&self, command: u16, flags: u16, offset: u64, length: u64) -> Result<(), IoError> {
        self.known.borrow_mut().clear();
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let n = MAX_EFFECT.min(end - at);
            self.link.ask((command, flags, at, n), Wanted::Done(None)).await?;
            at += n;
        }
        Ok(())
    }

    /// The whole blocks in a range; empty if there is none.
    fn whole(&self, offset: u64, length: u64) -> std::ops::Range<u64> {
        let (unit, end) = (self.minimum(), offset.saturating_add(length).min(self.there()));
        let last = if end == self.there() { end } else { end - end % unit };
        let first = offset.next_multiple_of(unit).min(last);
        first..last
    }

    async fn zero(&self, offset: u64, length: u64, unmap: bool) -> Result<(), IoError> {
        const STEP: u64 = 1 << 20;
        if self.link.terms().has(export::SEND_WRITE_ZEROES) {
            let whole = self.whole(offset, length);
            let end = offset + length;
            let (before, after) = (whole.start.min(end), whole.end.max(whole.start).min(end));
            self.write_any(offset, View::zeroed(to_usize(before.saturating_sub(offset)))).await?;
            self.write_any(after, View::zeroed(to_usize(end - after))).await?;
            let flags = if unmap { 0 } else { flag::NO_HOLE };
            let length = whole.end.saturating_sub(whole.start);
            return self.effect(command::WRITE_ZEROES, flags, whole.start, length).await;
        }
        let zeroes = View::zeroed(to_usize(STEP.min(length)));
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let n = STEP.min(end - at);
            self.write_any(at, zeroes.part(0, to_usize(n))).await?;
            at += n;
        }
        Ok(())
    }

    async fn flush_all(&self) -> Result<(), IoError> {
        if self.read_only || !self.link.terms().has(export::SEND_FLUSH) {
            return Ok(());
        }
        self.link.ask((command::FLUSH, 0, 0, 0), Wanted::Done(None)).await.map(drop)
    }

    async fn extent_at(&self, offset: u64, length: u64) -> Result<Extent, IoError> {
        let end = offset + length;
        let cut = |extent: &Extent| {
            let last = extent.end().min(end);
            let host = extent.host.map(|_| offset);
            Extent::new(offset, last - offset, extent.kind, host)
        };
        let within = |extent: &&Extent| extent.offset <= offset && offset < extent.end();
        if let Some(known) = self.known.borrow().iter().find(within) {
            return Ok(cut(known));
        }
        let there = self.there().saturating_sub(offset).min(length);
        if there == 0 {
            return Ok(Extent::new(offset, length, ExtentKind::Unallocated, None));
        }
        if self.link.terms().allocation.is_none() {
            return Ok(Extent::new(offset, there, ExtentKind::Data, Some(offset)));
        }
        let unit = self.minimum();
        let start = offset - offset % unit;
        // The server decides how much it answers; most of a disk may be one extent.
        let most = if self.link.terms().extended { u64::MAX } else { u64::from(u32::MAX) };
        let most = most - most % unit;
        let last = (offset + there).next_multiple_of(unit).min(self.there());
        let request = (command::BLOCK_STATUS, 0, start, most.min(last - start));
        let Reply::Extents(extents) = self.link.ask(request, Wanted::Extents).await? else {
            return Err(IoError::Server("the server did not answer with block status".into()));
        };
        let found = extents.iter().find(within).map(cut);
        *self.known.borrow_mut() = extents;
        found.ok_or_else(|| IoError::Server("the server's block status leaves out what was asked".into()))
    }
}

impl Image for Remote {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn size(&self) -> u64 {
        self.there().next_multiple_of(512)
    }

    fn file(&self) -> Option<&File> {
        None
    }

    fn path(&self) -> PathBuf {
        self.link.uri().text.clone().into()
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn unit(&self) -> u64 {
        0
    }

    fn read(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(self.read_any(offset, view))
    }

    fn write(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(self.write_any(offset, view))
    }

    fn flush(&self) -> Answer<'_> {
        Box::pin(self.flush_all())
    }

    fn discard(&self, offset: u64, length: u64) -> Answer<'_> {
        Box::pin(async move {
            if !self.discard || !self.link.terms().has(export::SEND_TRIM) {
                return Ok(());
            }
            let whole = self.whole(offset, length);
            self.effect(command::TRIM, 0, whole.start, whole.end.saturating_sub(whole.start)).await
        })
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Answer<'_> {
        Box::pin(self.zero(offset, length, unmap && self.discard))
    }

    fn zeroes_fast(&self, _offset: u64, _length: u64) -> bool {
        self.link.terms().has(export::SEND_WRITE_ZEROES)
    }

    fn status(&self, offset: u64, length: u64) -> Answer<'_, Extent> {
        Box::pin(self.extent_at(offset, length))
    }

    fn close(&self) -> Answer<'_> {
        Box::pin(async move {
            let flushed = self.flush_all().await;
            self.link.leave().await;
            flushed
        })
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.link.abandon();
    }
}

/// Asks a server that sends `bytes`, whatever it is asked. Whether a request got its answer.
#[allow(clippy::expect_used, reason = "for fuzzing, which has what it takes")]
pub(super) fn exercise_link(structured: bool, extended: bool, bytes: &[u8]) -> bool {
    use super::protocol::BlockSize;
    use std::io::Write as _;
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    let structured = structured || extended;
    let allocation = structured.then_some(1);
    let terms = negotiate::Terms {
        size: 1 << 20,
        flags: !export::READ_ONLY,
        block_size: BlockSize { minimum: 1, preferred: 4096, maximum: 1 << 20 },
        structured,
        extended,
        allocation,
    };
    let engine = Engine::new(crate::AioEngine::Threads).expect("an engine");
    let uri = NbdUri::parse(Path::new("nbd://fuzz/")).expect("an address");
    let connected = connect::Connected { fd: ours.into(), session: None, terms };
    let link = Link::start(Rc::clone(&engine), uri, None, connected);
    let known = RefCell::default();
    let remote = Remote { link, read_only: false, discard: true, blocks: RangeLock::default(), known };
    // What does not fit into the socket is not sent: nobody would take it here.
    theirs.set_nonblocking(true).expect("set");
    let _ = theirs.write(bytes);
    let _ = theirs.shutdown(std::net::Shutdown::Write);
    let answered = std::cell::Cell::new(false);
    let note = |ok: bool| -> Result<(), IoError> {
        answered.set(answered.get() | ok);
        Ok(())
    };
    let asked = async {
        let view = View::zeroed(512);
        crate::executor::join_all::<IoError>(vec![
            Box::pin(async { note(remote.read_any(0, view.clone()).await.is_ok()) }),
            Box::pin(async { note(remote.read_any(512, View::zeroed(4096)).await.is_ok()) }),
            Box::pin(async { note(remote.write_any(8192, View::zeroed(16)).await.is_ok()) }),
            Box::pin(async { note(remote.extent_at(0, 1 << 20).await.is_ok()) }),
            Box::pin(async { note(remote.flush_all().await.is_ok()) }),
        ])
        .await
    };
    let _ = Executor::new(engine).block_on(asked);
    answered.get()
}
