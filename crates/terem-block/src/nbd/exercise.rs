//! Both sides of the protocol against a peer that sends anything, for fuzzing.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};

use super::client::exercise_link;
use super::client::negotiate::{choose, greet};
use super::protocol::{BlockSize, MAX_PAYLOAD, ReplyHeader, chunk};
use super::server::connection::Connection;
use super::server::negotiate::{Agreement, Negotiation, Offer, Security, Step};
use super::socket::Socket;
use crate::{AioEngine, BlockBackend, Disk, Format, OpenOptions};

/// A peer that says what is written down and takes everything.
struct Tape<'a> {
    says: &'a [u8],
    told: Vec<u8>,
}

impl Read for Tape<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.says.read(buf)
    }
}

impl Write for Tape<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.told.extend(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A disk in memory, the same for all inputs.
fn disk() -> Option<&'static Disk> {
    static DISK: OnceLock<Option<Disk>> = OnceLock::new();
    let open = || {
        let file = rustix::fs::memfd_create("nbd", rustix::fs::MemfdFlags::CLOEXEC).ok()?;
        rustix::fs::ftruncate(&file, 1 << 20).ok()?;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let options = OpenOptions {
            format: Some(Format::Raw),
            aio: AioEngine::Threads,
            lock: false,
            ..OpenOptions::default()
        };
        Disk::open(path, &options).ok()
    };
    DISK.get_or_init(open).as_ref()
}

/// Lets a client send `bytes` to a server, first in negotiation, and what is left of them in transmission. Returns how many replies
/// it got to requests.
///
/// # Panics
/// When the server's answers are not what the protocol allows.
#[doc(hidden)]
#[must_use]
pub fn exercise_nbd_server(bytes: &[u8]) -> usize {
    let Some(disk) = disk() else { return 0 };
    let offers = ["", "other"].map(|name| Offer {
        name: name.into(),
        description: "a disk".into(),
        size: disk.size(),
        read_only: false,
        multi: true,
        block_size: BlockSize { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD },
    });
    let mut tape = Tape { says: bytes, told: Vec::new() };
    let mut negotiation = Negotiation::new(&offers, Security::None);
    let step = negotiation.greet(&mut tape).and_then(|()| negotiation.options(&mut tape, &mut |_| Ok(())));
    assert!(tape.told.len() < 1 << 20, "{} bytes of answers", tape.told.len());
    let Ok(Step::Agreed(agreement)) = step else { return 0 };
    transmit(disk, agreement, tape.says)
}

#[allow(clippy::expect_used, clippy::unwrap_used, reason = "for fuzzing, which is to find it")]
fn transmit(disk: &Disk, agreement: Agreement, bytes: &[u8]) -> usize {
    let (mut client, server) = UnixStream::pair().expect("a pair of sockets");
    let host = disk.host(move |local| {
        Box::pin(async move {
            let socket = Socket::new(Rc::clone(&local.engine), Arc::new(server.into()), None);
            let _ = Connection::new(local, socket, agreement).serve().await;
        })
    });
    assert!(host, "the disk is closed");
    let answers = std::thread::scope(|scope| {
        let mut reader = client.try_clone().expect("another descriptor");
        let answers = scope.spawn(move || {
            let mut answers = Vec::new();
            let _ = reader.read_to_end(&mut answers);
            answers
        });
        // The server may hang up before the end.
        let _ = client.write_all(bytes);
        let _ = client.shutdown(std::net::Shutdown::Write);
        answers.join().expect("read")
    });
    let (mut rest, mut replies) = (answers.as_slice(), 0);
    while rest.len() >= 4 {
        let magic = u32::from_be_bytes([rest[0], rest[1], rest[2], rest[3]]);
        let len = ReplyHeader::len(magic).expect("a reply's magic number");
        let Some((header, after)) = rest.split_at_checked(len) else { break };
        rest = after;
        match ReplyHeader::decode(header).expect("a reply") {
            // With data of unknown length behind it.
            ReplyHeader::Simple { .. } if !agreement.structured => return replies + 1,
            ReplyHeader::Simple { .. } => {
                assert!(!agreement.extended, "a simple reply with extended headers");
                replies += 1;
            }
            ReplyHeader::Chunk { flags, length, .. } => {
                assert!(agreement.structured, "a chunk that was not agreed");
                replies += usize::from(flags & chunk::DONE != 0);
                rest = rest.get(usize::try_from(length).unwrap_or(usize::MAX)..).unwrap_or(&[]);
            }
        }
    }
    replies
}

/// Lets a server send `bytes` to a client: the first byte says whether in negotiation or in transmission (and then what was agreed).
/// Returns whether the client got anything out of it.
#[doc(hidden)]
#[must_use]
pub fn exercise_nbd_client(bytes: &[u8]) -> bool {
    let Some((&kind, rest)) = bytes.split_first() else { return false };
    if kind & 0x80 == 0 {
        let mut tape = Tape { says: rest, told: Vec::new() };
        return greet(&mut tape).and_then(|()| choose(&mut tape, "export")).is_ok();
    }
    exercise_link(kind & 1 != 0, kind & 2 != 0, rest)
}
