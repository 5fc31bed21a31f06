//! The client's side of the negotiation, over any stream. What the server says is checked; lengths that it sends are bounded
//! before memory is taken.

use std::io::{self, Read, Write};

use crate::nbd::protocol::{self as wire, BlockSize, Fields, export, handshake, info, option, reply};

/// Most replies to one option.
const MAX_REPLIES: u32 = 1024;

/// What the server said of the export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Bytes.
    pub(crate) size: u64,
    /// Transmission flags.
    pub(crate) flags: u16,
    pub(crate) block_size: BlockSize,
    pub(crate) structured: bool,
    pub(crate) extended: bool,
    /// The number of `base:allocation`, if the server has it.
    pub(crate) allocation: Option<u32>,
}

impl Terms {
    /// Whether the export has this transmission flag.
    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Why there is no agreement.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The stream broke.
    Io(io::Error),
    /// The server does not follow the protocol.
    Nonsense(&'static str),
    /// The server said no: the kind of its reply and its own words.
    Refused(u32, String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => f.write_str("it hung up"),
            Self::Io(error) => error.fmt(f),
            Self::Nonsense(what) => write!(f, "it does not follow the NBD protocol: {what}"),
            Self::Refused(kind, words) => {
                f.write_str(match *kind {
                    reply::ERR_TLS_REQD => "it wants TLS: use nbds:// or nbds+unix://",
                    reply::ERR_UNKNOWN => "it has no export of that name",
                    reply::ERR_POLICY => "it does not want to",
                    reply::ERR_SHUTDOWN => "it is shutting down",
                    reply::ERR_UNSUP => "it cannot do that",
                    _ => "it refused",
                })?;
                if words.is_empty() { Ok(()) } else { write!(f, " ({words})") }
            }
        }
    }
}

/// A reply to an option.
struct OptionReply {
    kind: u32,
    data: Vec<u8>,
}

/// Reads the greeting and answers it.
pub(crate) fn greet(peer: &mut (impl Read + Write)) -> Result<(), Failure> {
    let mut hello = [0; 18];
    peer.read_exact(&mut hello[..16])?;
    let mut fields = Fields(&hello);
    if fields.u64() != Some(wire::MAGIC) {
        return Err(Failure::Nonsense("its first bytes are not NBD's"));
    }
    if fields.u64() != Some(wire::OPTION_MAGIC) {
        return Err(Failure::Nonsense("it speaks the oldstyle protocol, from before 2011"));
    }
    peer.read_exact(&mut hello[16..])?;
    let flags = u16::from_be_bytes([hello[16], hello[17]]);
    if flags & handshake::FIXED_NEWSTYLE == 0 {
        return Err(Failure::Nonsense("it does not speak the fixed newstyle protocol"));
    }
    let ours = flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
    peer.write_all(&u32::from(ours).to_be_bytes())?;
    Ok(())
}

/// Asks for TLS. Afterwards the handshake comes.
pub(crate) fn start_tls(peer: &mut (impl Read + Write)) -> Result<(), Failure> {
    match simple(peer, option::STARTTLS)? {
        Ok(()) => Ok(()),
        Err((kind, words)) => Err(Failure::Refused(kind, words)),
    }
}

/// Agrees on all that the server can do, and on the export.
pub(crate) fn choose(peer: &mut (impl Read + Write), name: &str) -> Result<Terms, Failure> {
    let extended = simple(peer, option::EXTENDED_HEADERS)?.is_ok();
    let structured = extended || simple(peer, option::STRUCTURED_REPLY)?.is_ok();
    let allocation = if structured { allocation(peer, name)? } else { None };
    let mut data = Vec::new();
    wire::put_string(name, &mut data);
    data.extend(1u16.to_be_bytes());
    data.extend(info::BLOCK_SIZE.to_be_bytes());
    peer.write_all(&wire::option_header(option::GO, &data))?;
    let mut terms =
        Terms { size: 0, flags: 0, block_size: BlockSize::UNSAID, structured, extended, allocation };
    let mut told = false;
    for _ in 0..MAX_REPLIES {
        let OptionReply { kind, data } = read_reply(peer, option::GO)?;
        match kind {
            reply::ACK if told => return checked(terms),
            reply::ACK => return Err(Failure::Nonsense("it does not say how large the export is")),
            reply::INFO => {
                let mut fields = Fields(&data);
                let cut = Failure::Nonsense("a fact about the export is cut off");
                match fields.u16() {
                    Some(info::EXPORT) => {
                        let (Some(size), Some(flags)) = (fields.u64(), fields.u16()) else { return Err(cut) };
                        (terms.size, terms.flags, told) = (size, flags, true);
                    }
                    Some(info::BLOCK_SIZE) => {
                        terms.block_size = BlockSize::decode(&mut fields)
                            .ok_or(Failure::Nonsense("its block sizes make no sense"))?;
                    }
                    Some(_) => {}
                    None => return Err(cut),
                }
            }
            kind if kind & reply::ERROR != 0 => return Err(Failure::Refused(kind, words(&data))),
            _ => return Err(Failure::Nonsense("an unexpected reply to GO")),
        }
    }
    Err(Failure::Nonsense("its replies to GO have no end"))
}

fn checked(mut terms: Terms) -> Result<Terms, Failure> {
    // File offsets have 63 bits; the last sector must be countable too.
    if terms.size > (i64::MAX as u64) - 512 {
        return Err(Failure::Nonsense("its export is larger than any disk"));
    }
    if !terms.has(export::HAS_FLAGS) {
        terms.flags = 0;
    }
    Ok(terms)
}

/// Chooses `base:allocation`: its number, if the server has it.
fn allocation(peer: &mut (impl Read + Write), name: &str) -> Result<Option<u32>, Failure> {
    let code = option::SET_META_CONTEXT;
    let mut data = Vec::new();
    wire::put_string(name, &mut data);
    data.extend(1u32.to_be_bytes());
    wire::put_string(wire::BASE_ALLOCATION, &mut data);
    peer.write_all(&wire::option_header(code, &data))?;
    let mut id = None;
    for _ in 0..MAX_REPLIES {
        let OptionReply { kind, data } = read_reply(peer, code)?;
        match kind {
            reply::ACK => return Ok(id),
            reply::META_CONTEXT => {
                let mut fields = Fields(&data);
                let number = fields.u32().ok_or(Failure::Nonsense("a context's reply is cut off"))?;
                if fields.rest() == Some(wire::BASE_ALLOCATION) {
                    id = Some(number);
                }
            }
            kind if kind & reply::ERROR != 0 => return Ok(None),
            _ => return Err(Failure::Nonsense("an unexpected reply to SET_META_CONTEXT")),
        }
    }
    Err(Failure::Nonsense("its list of contexts has no end"))
}

/// An option without data: acknowledged, or refused with a kind and words.
#[allow(clippy::type_complexity, reason = "two ways to fail: the stream, and the server's no")]
fn simple(peer: &mut (impl Read + Write), code: u32) -> Result<Result<(), (u32, String)>, Failure> {
    peer.write_all(&wire::option_header(code, &[]))?;
    let OptionReply { kind, data } = read_reply(peer, code)?;
    match kind {
        reply::ACK => Ok(Ok(())),
        kind if kind & reply::ERROR != 0 => Ok(Err((kind, words(&data)))),
        _ => Err(Failure::Nonsense("an unexpected reply to an option")),
    }
}

fn read_reply(peer: &mut (impl Read + Write), code: u32) -> Result<OptionReply, Failure> {
    let mut header = [0; 20];
    peer.read_exact(&mut header)?;
    let mut fields = Fields(&header);
    if fields.u64() != Some(wire::OPTION_REPLY_MAGIC) || fields.u32() != Some(code) {
        return Err(Failure::Nonsense("a reply to an option that we did not send"));
    }
    let (kind, len) = (fields.u32().unwrap_or(0), fields.u32().unwrap_or(u32::MAX));
    if len > wire::MAX_OPTION {
        return Err(Failure::Nonsense("a reply to an option is too long"));
    }
    let mut data = vec![0; len as usize];
    peer.read_exact(&mut data)?;
    Ok(OptionReply { kind, data })
}

/// What a server says for people, in one line and not too long.
fn words(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(&data[..data.len().min(400)]);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim().to_owned()
}
