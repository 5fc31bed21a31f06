//! LUKS 1 ("LUKS On-Disk Format Specification", 1.2.3): a header of 592 bytes with eight key slots.
//!
//! ```text
//!  0        592      4096                              payload offset
//!  | header |   …    | material of slot 0 | slot 1 | … | data …
//! ```
//!
//! A slot's material is the volume key, spread over stripes ([`crate::af`]) and encrypted with what PBKDF2 makes of the
//! passphrase. Numbers are big-endian, offsets in sectors of 512 bytes.
//!
//! # Changes survive a kill
//!
//! | change | order of writes, each flushed before the next |
//! | --- | --- |
//! | add | material of a slot that is not in use; its salt and iterations; its state |
//! | remove | state "not in use"; zeroes over its material; zeroes over its salt and iterations |
//!
//! The state is four bytes within one sector. A slot that is not in use but still has iterations is one whose removal was
//! interrupted: the next change wipes it.

mod header;
mod slots;

pub(crate) use header::{Header, MAGIC, text};
pub use slots::{FormatOptions, format};
