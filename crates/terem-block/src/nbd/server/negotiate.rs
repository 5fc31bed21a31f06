//! The server's side of the negotiation ("Fixed newstyle negotiation"), over any stream.
//!
//! ```text
//!  greet ──> options ──STARTTLS──> (the caller wraps the stream) ──> options ──GO──> Agreement
//!              │  ^  │
//!              └──┘  └── ABORT, nonsense ──> the end
//! ```

use std::io::{self, Read, Write};

use crate::nbd::protocol::{self as wire, BlockSize, Fields, export, handshake, info, option, reply};

/// Most options of one negotiation: each costs us work.
const MAX_OPTIONS: u32 = 256;

/// What is told about an export.
#[derive(Debug, Clone)]
pub(crate) struct Offer {
    pub(crate) name: String,
    pub(crate) description: String,
    /// Bytes.
    pub(crate) size: u64,
    pub(crate) read_only: bool,
    /// Whether it makes sense to open several connections.
    pub(crate) multi: bool,
    pub(crate) block_size: BlockSize,
}

impl Offer {
    /// Transmission flags; `structured` replies have one of their own.
    fn flags(&self, structured: bool) -> u16 {
        let mut flags = export::HAS_FLAGS | export::SEND_FLUSH | export::SEND_FUA | export::SEND_CACHE;
        flags |= if self.read_only {
            export::READ_ONLY
        } else {
            export::SEND_TRIM | export::SEND_WRITE_ZEROES | export::SEND_FAST_ZERO
        };
        if structured {
            flags |= export::SEND_DF;
        }
        if self.multi {
            flags |= export::CAN_MULTI_CONN;
        }
        flags
    }
}

/// How far a negotiation has come.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Transmission can begin.
    Agreed(Agreement),
    /// The acknowledgement is sent; the TLS handshake comes next, then [`Negotiation::options`] again.
    StartTls,
    /// The client said good-bye.
    Ended,
}

/// What was negotiated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Agreement {
    /// Index of the offer.
    pub(crate) export: usize,
    pub(crate) structured: bool,
    pub(crate) extended: bool,
    /// Whether `base:allocation` was chosen.
    pub(crate) allocation: bool,
}

/// How TLS stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Security {
    /// There is none.
    None,
    /// Nothing is told before it.
    Required,
    /// This stream has it.
    Done,
}

/// A negotiation's state.
pub(crate) struct Negotiation<'a> {
    offers: &'a [Offer],
    security: Security,
    no_zeroes: bool,
    structured: bool,
    extended: bool,
    /// The export for which `base:allocation` was chosen.
    allocation: Option<String>,
    options: u32,
}

fn nonsense(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl<'a> Negotiation<'a> {
    pub(crate) fn new(offers: &'a [Offer], security: Security) -> Self {
        Self {
            offers,
            security,
            no_zeroes: false,
            structured: false,
            extended: false,
            allocation: None,
            options: 0,
        }
    }

    /// The server speaks first.
    pub(crate) fn greet(&mut self, peer: &mut (impl Read + Write)) -> io::Result<()> {
        let mut hello = wire::MAGIC.to_be_bytes().to_vec();
        hello.extend(wire::OPTION_MAGIC.to_be_bytes());
        hello.extend((handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
        peer.write_all(&hello)?;
        let mut flags = [0; 4];
        peer.read_exact(&mut flags)?;
        let flags = u32::from_be_bytes(flags);
        let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        if flags & u32::from(handshake::FIXED_NEWSTYLE) == 0 || flags & !known != 0 {
            return Err(nonsense("the client's flags are not those of the fixed newstyle protocol"));
        }
        self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        Ok(())
    }

    /// The stream is a TLS one from here on; what was agreed before counts no more ("NBD_OPT_STARTTLS").
    pub(crate) fn secured(&mut self) {
        (self.structured, self.extended, self.allocation) = (false, false, None);
        self.security = Security::Done;
    }

    /// Answers options until something is decided. `admit` says whether one more connection to an export may be, or why not.
    pub(crate) fn options(
        &mut self,
        peer: &mut (impl Read + Write),
        admit: &mut dyn FnMut(usize) -> Result<(), String>,
    ) -> io::Result<Step> {
        loop {
            self.options += 1;
            if self.options > MAX_OPTIONS {
                return Err(nonsense("the client sends options without end"));
            }
            let mut header = [0; 16];
            peer.read_exact(&mut header)?;
            let mut fields = Fields(&header);
            if fields.u64() != Some(wire::OPTION_MAGIC) {
                return Err(nonsense("an option has no magic number"));
            }
            let (code, len) = (fields.u32().unwrap_or(0), fields.u32().unwrap_or(u32::MAX));
            if len > wire::MAX_OPTION {
                return Err(nonsense("an option is too long"));
            }
            let mut data = vec![0; len as usize];
            peer.read_exact(&mut data)?;
            if let Some(step) = self.answer(code, &data, peer, admit)? {
                return Ok(step);
            }
        }
    }

    fn answer(
        &mut self,
        code: u32,
        data: &[u8],
        peer: &mut impl Write,
        admit: &mut dyn FnMut(usize) -> Result<(), String>,
    ) -> io::Result<Option<Step>> {
        let mut say = |kind: u32, data: &[u8]| peer.write_all(&wire::option_reply(code, kind, data));
        match code {
            option::ABORT => {
                // The client may be gone already.
                let _ = say(reply::ACK, &[]);
                return Ok(Some(Step::Ended));
            }
            option::STARTTLS => {
                let refusal = match self.security {
                    _ if !data.is_empty() => Some((reply::ERR_INVALID, "STARTTLS has no data")),
                    Security::None => Some((reply::ERR_POLICY, "this server was started without TLS")),
                    Security::Done => Some((reply::ERR_INVALID, "this is TLS already")),
                    Security::Required => None,
                };
                return match refusal {
                    Some((kind, why)) => say(kind, why.as_bytes()).map(|()| None),
                    None => say(reply::ACK, &[]).map(|()| Some(Step::StartTls)),
                };
            }
            option::EXPORT_NAME => return self.export_name(data, peer, admit).map(Some),
            _ if self.security == Security::Required => {
                say(reply::ERR_TLS_REQD, b"this server speaks TLS only: use nbds://, or tls-creds")?;
            }
            option::LIST if !data.is_empty() => say(reply::ERR_INVALID, b"LIST has no data")?,
            option::LIST => {
                let mut replies = Vec::new();
                for offer in self.offers {
                    let mut data = Vec::new();
                    wire::put_string(&offer.name, &mut data);
                    data.extend(offer.description.as_bytes());
                    replies.extend(wire::option_reply(code, reply::SERVER, &data));
                }
                replies.extend(wire::option_reply(code, reply::ACK, &[]));
                peer.write_all(&replies)?;
            }
            option::INFO | option::GO => return self.info(code, data, peer, admit),
            option::STRUCTURED_REPLY if data.is_empty() => {
                if self.extended {
                    say(reply::ERR_EXT_HEADER_REQD, b"extended headers have more than that")?;
                } else {
                    self.structured = true;
                    say(reply::ACK, &[])?;
                }
            }
            option::EXTENDED_HEADERS if data.is_empty() => {
                (self.structured, self.extended) = (true, true);
                say(reply::ACK, &[])?;
            }
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => {
                say(reply::ERR_INVALID, b"this option has no data")?;
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(code, data, peer)?,
            _ => say(reply::ERR_UNSUP, b"this option is not known")?,
        }
        Ok(None)
    }

    /// The export of a name; the empty name stands for the only one.
    fn find(&self, name: &str) -> Option<usize> {
        let found = self.offers.iter().position(|offer| offer.name == name);
        found.or_else(|| (name.is_empty() && self.offers.len() == 1).then_some(0))
    }

    fn agreement(&self, export: usize, name: &str) -> Agreement {
        Agreement {
            export,
            structured: self.structured,
            extended: self.extended,
            allocation: self.allocation.as_deref() == Some(name),
        }
    }

    /// The old way, in which a failure can only be told by hanging up.
    fn export_name(
        &self,
        data: &[u8],
        peer: &mut impl Write,
        admit: &mut dyn FnMut(usize) -> Result<(), String>,
    ) -> io::Result<Step> {
        if self.security == Security::Required {
            return Err(nonsense("the client wants an export without TLS"));
        }
        let name = Fields(data).rest().ok_or_else(|| nonsense("an export's name is no text"))?;
        let Some(index) = self.find(name) else { return Err(nonsense("the client wants an unknown export")) };
        admit(index).map_err(io::Error::other)?;
        let offer = &self.offers[index];
        let mut answer = offer.size.to_be_bytes().to_vec();
        answer.extend(offer.flags(self.structured).to_be_bytes());
        if !self.no_zeroes {
            answer.extend([0; 124]);
        }
        peer.write_all(&answer)?;
        Ok(Step::Agreed(self.agreement(index, name)))
    }

    fn info(
        &self,
        code: u32,
        data: &[u8],
        peer: &mut impl Write,
        admit: &mut dyn FnMut(usize) -> Result<(), String>,
    ) -> io::Result<Option<Step>> {
        let mut say = |kind: u32, data: &[u8]| peer.write_all(&wire::option_reply(code, kind, data));
        let mut fields = Fields(data);
        let (Some(name), Some(count)) = (fields.string(), fields.u16()) else {
            return say(reply::ERR_INVALID, b"the name or the list is cut off").map(|()| None);
        };
        let wanted: Vec<u16> = std::iter::from_fn(|| fields.u16()).collect();
        if wanted.len() != usize::from(count) {
            return say(reply::ERR_INVALID, b"the list has another length than it says").map(|()| None);
        }
        let Some(index) = self.find(name) else {
            let why = format!("there is no export {name:?} here");
            return say(reply::ERR_UNKNOWN, why.as_bytes()).map(|()| None);
        };
        if code == option::GO
            && let Err(why) = admit(index)
        {
            return say(reply::ERR_POLICY, why.as_bytes()).map(|()| None);
        }
        let offer = &self.offers[index];
        let mut replies = Vec::new();
        let mut fact = |kind: u16, value: &[u8]| {
            let data = [&kind.to_be_bytes()[..], value].concat();
            replies.extend(wire::option_reply(code, reply::INFO, &data));
        };
        let flags = offer.flags(self.structured);
        fact(info::EXPORT, &[&offer.size.to_be_bytes()[..], &flags.to_be_bytes()].concat());
        if wanted.contains(&info::NAME) {
            fact(info::NAME, offer.name.as_bytes());
        }
        if wanted.contains(&info::DESCRIPTION) {
            fact(info::DESCRIPTION, offer.description.as_bytes());
        }
        let mut sizes = Vec::new();
        offer.block_size.encode(&mut sizes);
        fact(info::BLOCK_SIZE, &sizes);
        replies.extend(wire::option_reply(code, reply::ACK, &[]));
        peer.write_all(&replies)?;
        Ok((code == option::GO).then(|| Step::Agreed(self.agreement(index, name))))
    }

    /// Lists or chooses metadata contexts. We have one.
    fn contexts(&mut self, code: u32, data: &[u8], peer: &mut impl Write) -> io::Result<()> {
        let mut say = |kind: u32, data: &[u8]| peer.write_all(&wire::option_reply(code, kind, data));
        let setting = code == option::SET_META_CONTEXT;
        if setting {
            // "the last one wins", also where it fails
            self.allocation = None;
        }
        if !self.structured {
            return say(reply::ERR_INVALID, b"structured replies must be agreed first");
        }
        let mut fields = Fields(data);
        let (Some(name), Some(count)) = (fields.string(), fields.u32()) else {
            return say(reply::ERR_INVALID, b"the name or the queries are cut off");
        };
        let mut matched = count == 0 && !setting;
        for _ in 0..count {
            let Some(query) = fields.string() else {
                return say(reply::ERR_INVALID, b"the queries are cut off");
            };
            matched |= query == wire::BASE_ALLOCATION || (!setting && query == "base:");
        }
        if self.find(name).is_none() {
            let why = format!("there is no export {name:?} here");
            return say(reply::ERR_UNKNOWN, why.as_bytes());
        }
        let mut replies = Vec::new();
        if matched {
            let id = if setting { wire::BASE_ALLOCATION_ID } else { 0 };
            let data = [&id.to_be_bytes()[..], wire::BASE_ALLOCATION.as_bytes()].concat();
            replies.extend(wire::option_reply(code, reply::META_CONTEXT, &data));
            if setting {
                self.allocation = Some(name.to_owned());
            }
        }
        replies.extend(wire::option_reply(code, reply::ACK, &[]));
        peer.write_all(&replies)
    }
}
