//! LUKS 2 ("LUKS2 On-Disk Format Specification", 1.1): two copies of a binary header with metadata in JSON.
//!
//! ```text
//!  0            hdr_size        2 · hdr_size                                 segment's offset
//!  | header 1   | header 2      | key slots' areas                            | data …
//!  4096 bytes, then JSON        keyslots_size bytes
//! ```
//!
//! Each copy has a sequence number and a checksum over all of it; the valid one with the higher number counts. What
//! is in the metadata that nobody here knows (tokens, flags, key slots of other types) is kept as it is.
//!
//! # Changes survive a kill
//!
//! | change | order of writes, each flushed before the next |
//! | --- | --- |
//! | any | the copy that is behind, if one is; then, with the next sequence number: copy 1; copy 2 |
//! | add | material, in an area that no slot uses; the headers |
//! | remove | the headers; zeroes over whatever no slot uses |
//! | change | material, in an area that no slot uses; the headers; zeroes over whatever no slot uses |

mod binary;
mod metadata;
mod slots;
mod store;

#[cfg(feature = "fuzzing")]
pub(crate) use binary::Sealed;
pub use slots::{FormatOptions, format};
pub(crate) use store::Header;

#[cfg(test)]
mod tests;
