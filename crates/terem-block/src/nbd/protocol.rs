//! The NBD protocol's numbers and messages as plain values: nothing here reads or writes a socket.
//!
//! Names and sections are those of the protocol's text (`doc/proto.md` of the NBD project). All numbers on the wire are
//! big-endian. Every parser takes what it is given and says `None` or an error for what makes no sense; none
//! takes memory by a length that a peer sent.

/// "NBDMAGIC", the first bytes of a server ("Newstyle negotiation").
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT", before each option and in the server's greeting.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before a request with extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Before a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Before a chunk of a reply with extended headers.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bytes of a request.
pub const REQUEST_LEN: usize = 28;
/// Bytes of a request with extended headers.
pub const EXTENDED_REQUEST_LEN: usize = 32;
/// Bytes of a simple reply without its data.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Bytes of a chunk's header.
pub const CHUNK_LEN: usize = 20;
/// Bytes of a chunk's extended header.
pub const EXTENDED_CHUNK_LEN: usize = 32;

/// The port that IANA gives to NBD.
pub const PORT: u16 = 10809;

/// Most data in one read or write, in bytes: what clients may count on by custom ("Size constraints").
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// Longest string, in bytes ("Strings": export names, queries, messages).
pub const MAX_STRING: usize = 4096;
/// Most data of an option that is looked at, in bytes: an export's name and some queries.
pub const MAX_OPTION: u32 = 64 << 10;

/// Handshake flags; the server's and the client's have the same values.
pub mod handshake {
    /// The fixed newstyle protocol is spoken.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zeroes after `OPT_EXPORT_NAME` are left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options of the negotiation.
pub mod option {
    /// Choose the export, and go to transmission without a reply in case of failure.
    pub const EXPORT_NAME: u32 = 1;
    /// End the negotiation.
    pub const ABORT: u32 = 2;
    /// Name all exports.
    pub const LIST: u32 = 3;
    /// Go on under TLS.
    pub const STARTTLS: u32 = 5;
    /// Tell about an export.
    pub const INFO: u32 = 6;
    /// Tell about an export, and go to transmission.
    pub const GO: u32 = 7;
    /// Structured replies are wanted.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts are there?
    pub const LIST_META_CONTEXT: u32 = 9;
    /// These metadata contexts are wanted.
    pub const SET_META_CONTEXT: u32 = 10;
    /// 64-bit lengths are wanted.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export of a list.
    pub const SERVER: u32 = 2;
    /// A fact about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// All errors have this bit.
    pub const ERROR: u32 = 1 << 31;
    /// The option is not known, or not now.
    pub const ERR_UNSUP: u32 = ERROR + 1;
    /// The server does not want to.
    pub const ERR_POLICY: u32 = ERROR + 2;
    /// The option's data makes no sense.
    pub const ERR_INVALID: u32 = ERROR + 3;
    /// TLS must come first.
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    /// The server is ending.
    pub const ERR_SHUTDOWN: u32 = ERROR + 7;
    /// Extended headers must come first.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;
}

/// Facts about an export (`NBD_INFO_*`).
pub mod info {
    /// Its size and flags.
    pub const EXPORT: u16 = 0;
    /// Its name.
    pub const NAME: u16 = 1;
    /// What it is, for people.
    pub const DESCRIPTION: u16 = 2;
    /// Which requests it takes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod export {
    /// There are flags.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// There is a flush.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// Writes can be durable at once.
    pub const SEND_FUA: u16 = 1 << 3;
    /// There is a trim.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// There is a write-zeroes.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// Reads can be asked for in one piece.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers all connections.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// There is a prefetch.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// Write-zeroes can be asked for only if it is fast.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// Good-bye.
    pub const DISC: u16 = 2;
    /// Make what was written durable.
    pub const FLUSH: u16 = 3;
    /// The contents are not needed any more.
    pub const TRIM: u16 = 4;
    /// Prefetch.
    pub const CACHE: u16 = 5;
    /// Make it read as zeroes.
    pub const WRITE_ZEROES: u16 = 6;
    /// What is there?
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub mod flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// Write-zeroes: keep the storage.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Read: answer in one piece.
    pub const DF: u16 = 1 << 2;
    /// Block status: one extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Write-zeroes: only if it is fast.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// Extended headers: the length is that of data which follows.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of chunks.
pub mod chunk {
    /// Nothing, an answer's end.
    pub const NONE: u16 = 0;
    /// Data of a read.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes of a read.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents, 32-bit.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents, 64-bit.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// All errors have this bit.
    pub const IS_ERROR: u16 = 1 << 15;
    /// An error.
    pub const ERROR: u16 = IS_ERROR + 1;
    /// Flag: the answer's last chunk.
    pub const DONE: u16 = 1;
}

/// Error numbers on the wire ("Error values"); they are Linux'.
pub mod error {
    /// Not permitted; also for writes to what is read-only.
    pub const EPERM: u32 = 1;
    /// Input or output failed.
    pub const EIO: u32 = 5;
    /// Out of memory.
    pub const ENOMEM: u32 = 12;
    /// The request makes no sense.
    pub const EINVAL: u32 = 22;
    /// No space left; also for writes beyond the end.
    pub const ENOSPC: u32 = 28;
    /// The answer would be too large.
    pub const EOVERFLOW: u32 = 75;
    /// Not supported; also for zeroes that would not be fast.
    pub const ENOTSUP: u32 = 95;
    /// The server is ending.
    pub const ESHUTDOWN: u32 = 108;
}

/// The metadata context of data and holes.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its number on our connections.
pub const BASE_ALLOCATION_ID: u32 = 1;
/// No storage is behind it.
pub const STATE_HOLE: u32 = 1 << 0;
/// It reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;

/// Takes fixed pieces off the front of a message.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `N` bytes.
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    /// A 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// A 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// A 64-bit number.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (first, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(first)
    }

    /// A string with its 32-bit length before it, [`MAX_STRING`] at most.
    pub fn string(&mut self) -> Option<&'a str> {
        let len = usize::try_from(self.u32()?).ok().filter(|&len| len <= MAX_STRING)?;
        std::str::from_utf8(self.bytes(len)?).ok()
    }

    /// All that is left, as a string.
    pub fn rest(self) -> Option<&'a str> {
        std::str::from_utf8(self.0).ok().filter(|text| text.len() <= MAX_STRING)
    }
}

/// A request, as the client sends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Command flags ([`flag`]).
    pub flags: u16,
    /// The command ([`command`]).
    pub command: u16,
    /// Chosen by the client; comes back in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl Request {
    /// Bytes of a request's header.
    #[must_use]
    pub fn len(extended: bool) -> usize {
        if extended { EXTENDED_REQUEST_LEN } else { REQUEST_LEN }
    }

    /// Reads a header, or `None` when its magic number is not there: then the peer is out of step.
    #[must_use]
    pub fn decode(bytes: &[u8], extended: bool) -> Option<Self> {
        let mut fields = Fields(bytes);
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        if fields.u32()? != magic {
            return None;
        }
        let (flags, command) = (fields.u16()?, fields.u16()?);
        let (cookie, offset) = (fields.u64()?, fields.u64()?);
        let length = if extended { fields.u64()? } else { fields.u32()?.into() };
        Some(Self { flags, command, cookie, offset, length })
    }

    /// Appends the header. A length that does not fit is the caller's mistake and is cut.
    pub fn encode(&self, extended: bool, to: &mut Vec<u8>) {
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        to.extend(magic.to_be_bytes());
        to.extend(self.flags.to_be_bytes());
        to.extend(self.command.to_be_bytes());
        to.extend(self.cookie.to_be_bytes());
        to.extend(self.offset.to_be_bytes());
        if extended {
            to.extend(self.length.to_be_bytes());
        } else {
            to.extend(u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes());
        }
    }

    /// Whether the flag is set.
    #[must_use]
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A reply's beginning, as the server sends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyHeader {
    /// A simple reply; a read's data follows if there is no error.
    Simple {
        /// Zero or an error number.
        error: u32,
        /// The request's.
        cookie: u64,
    },
    /// A chunk; `length` bytes follow.
    Chunk {
        /// [`chunk::DONE`] or nothing.
        flags: u16,
        /// Its type ([`chunk`]).
        kind: u16,
        /// The request's.
        cookie: u64,
        /// Bytes that follow.
        length: u64,
    },
}

impl ReplyHeader {
    /// Bytes of a reply's header that begins with this magic number, or `None` if none does.
    #[must_use]
    pub fn len(magic: u32) -> Option<usize> {
        match magic {
            SIMPLE_REPLY_MAGIC => Some(SIMPLE_REPLY_LEN),
            STRUCTURED_REPLY_MAGIC => Some(CHUNK_LEN),
            EXTENDED_REPLY_MAGIC => Some(EXTENDED_CHUNK_LEN),
            _ => None,
        }
    }

    /// Reads a header.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        match fields.u32()? {
            SIMPLE_REPLY_MAGIC => Some(Self::Simple { error: fields.u32()?, cookie: fields.u64()? }),
            STRUCTURED_REPLY_MAGIC => Some(Self::Chunk {
                flags: fields.u16()?,
                kind: fields.u16()?,
                cookie: fields.u64()?,
                length: fields.u32()?.into(),
            }),
            EXTENDED_REPLY_MAGIC => {
                let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
                // The request's offset, which we know.
                fields.u64()?;
                Some(Self::Chunk { flags, kind, cookie, length: fields.u64()? })
            }
            _ => None,
        }
    }

    /// Appends the header. `offset` is the request's and only part of extended headers.
    pub fn encode(&self, extended: bool, offset: u64, to: &mut Vec<u8>) {
        match *self {
            Self::Simple { error, cookie } => {
                to.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
                to.extend(error.to_be_bytes());
                to.extend(cookie.to_be_bytes());
            }
            Self::Chunk { flags, kind, cookie, length } => {
                let magic = if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
                to.extend(magic.to_be_bytes());
                to.extend(flags.to_be_bytes());
                to.extend(kind.to_be_bytes());
                to.extend(cookie.to_be_bytes());
                if extended {
                    to.extend(offset.to_be_bytes());
                    to.extend(length.to_be_bytes());
                } else {
                    to.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
                }
            }
        }
    }
}

/// An option's or its reply's header (without the magic number before it).
#[must_use]
pub fn option_header(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// A reply to an option.
#[must_use]
pub fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Appends a string with its length before it.
pub fn put_string(text: &str, to: &mut Vec<u8>) {
    to.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes());
    to.extend(text.as_bytes());
}

/// Which requests an export takes, in bytes (`NBD_INFO_BLOCK_SIZE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize {
    /// Offsets and lengths are multiples of it.
    pub minimum: u32,
    /// Best size.
    pub preferred: u32,
    /// Most data in one request.
    pub maximum: u32,
}

impl BlockSize {
    /// What may be counted on when a server says nothing ("Size constraints").
    pub const UNSAID: Self = Self { minimum: 512, preferred: 4096, maximum: MAX_PAYLOAD };

    /// Reads it, or `None` where it contradicts the protocol.
    #[must_use]
    pub fn decode(fields: &mut Fields<'_>) -> Option<Self> {
        let size = Self { minimum: fields.u32()?, preferred: fields.u32()?, maximum: fields.u32()? };
        let sensible = size.minimum.is_power_of_two()
            && size.minimum <= 64 << 10
            && size.preferred.is_power_of_two()
            && size.preferred >= size.minimum.max(512)
            && size.maximum >= size.minimum
            && (size.maximum == u32::MAX || size.maximum.is_multiple_of(size.minimum));
        sensible.then_some(size)
    }

    /// Appends it.
    pub fn encode(&self, to: &mut Vec<u8>) {
        to.extend(self.minimum.to_be_bytes());
        to.extend(self.preferred.to_be_bytes());
        to.extend(self.maximum.to_be_bytes());
    }
}

/// The number on the wire that is nearest to one of `errno.h`.
#[must_use]
pub fn wire_error(errno: i32) -> u32 {
    match errno {
        libc::EPERM | libc::EROFS | libc::EACCES => error::EPERM,
        libc::ENOMEM => error::ENOMEM,
        libc::EINVAL => error::EINVAL,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => error::ENOSPC,
        libc::EOVERFLOW => error::EOVERFLOW,
        libc::ENOTSUP => error::ENOTSUP,
        libc::ESHUTDOWN => error::ESHUTDOWN,
        _ => error::EIO,
    }
}

/// The number of `errno.h` for one on the wire; what is not known is an input/output error.
#[must_use]
pub fn errno(error: u32) -> i32 {
    match error {
        error::EPERM => libc::EPERM,
        error::ENOMEM => libc::ENOMEM,
        error::EINVAL => libc::EINVAL,
        error::ENOSPC => libc::ENOSPC,
        error::EOVERFLOW => libc::EOVERFLOW,
        error::ENOTSUP => libc::ENOTSUP,
        error::ESHUTDOWN => libc::ESHUTDOWN,
        _ => libc::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn requests_come_back(flags: u16, command: u16, cookie: u64, offset: u64, length: u64, extended: bool) {
            let length = if extended { length } else { length & 0xffff_ffff };
            let request = Request { flags, command, cookie, offset, length };
            let mut bytes = Vec::new();
            request.encode(extended, &mut bytes);
            prop_assert_eq!(bytes.len(), Request::len(extended));
            prop_assert_eq!(Request::decode(&bytes, extended), Some(request));
            prop_assert_eq!(Request::decode(&bytes, !extended), None);
            prop_assert_eq!(Request::decode(&bytes[..bytes.len() - 1], extended), None);
        }

        #[test]
        fn replies_come_back(kind: u16, cookie: u64, offset: u64, length: u32, extended: bool, simple: bool) {
            let reply = if simple {
                ReplyHeader::Simple { error: length, cookie }
            } else {
                ReplyHeader::Chunk { flags: chunk::DONE, kind, cookie, length: length.into() }
            };
            let mut bytes = Vec::new();
            reply.encode(extended, offset, &mut bytes);
            let magic = u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            prop_assert_eq!(ReplyHeader::len(magic), Some(bytes.len()));
            prop_assert_eq!(ReplyHeader::decode(&bytes), Some(reply));
        }
    }

    #[test]
    fn absurd_lengths_and_sizes_are_refused() {
        let mut long = u32::MAX.to_be_bytes().to_vec();
        long.extend(b"name");
        assert_eq!(Fields(&long).string(), None);
        let mut text = Vec::new();
        put_string("name", &mut text);
        assert_eq!(Fields(&text).string(), Some("name"));
        assert_eq!(Fields(&text[..6]).string(), None);
        for (minimum, preferred, maximum, good) in [
            (1, 4096, MAX_PAYLOAD, true),
            (512, 4096, u32::MAX, true),
            (0, 4096, MAX_PAYLOAD, false),
            (3, 4096, MAX_PAYLOAD, false),
            (4096, 512, MAX_PAYLOAD, false),
            (4096, 4096, 5000, false),
        ] {
            let size = BlockSize { minimum, preferred, maximum };
            let mut bytes = Vec::new();
            size.encode(&mut bytes);
            assert_eq!(BlockSize::decode(&mut Fields(&bytes)), good.then_some(size));
        }
    }

    #[test]
    fn error_numbers_come_back() {
        for n in [libc::EPERM, libc::EIO, libc::ENOMEM, libc::EINVAL, libc::ENOSPC, libc::EOVERFLOW] {
            assert_eq!(errno(wire_error(n)), n);
        }
        assert_eq!(errno(4711), libc::EIO);
    }
}
