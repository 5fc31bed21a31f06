//! LUKS headers and sector ciphers: what an encrypted disk image needs besides its storage.
//!
//! ```text
//!  passphrase ──KDF──> slot's key ──decrypts──> stripes ──AF merge──> volume key ──> SectorCipher
//!               (kdf)              (cipher)               (af)         checked against the header's digest
//! ```
//!
//! [`Luks`] reads a header of version 1 or 2 from an [`Area`] (a file, a part of one, memory), opens it with a
//! [`Passphrase`], and adds, changes and removes key slots. [`format_luks1`] and [`format_luks2`] write new ones.
//! [`SectorCipher`] encrypts data; nothing here reads or writes data itself.
//!
//! A header may come from anywhere: everything in it is checked before it is used, and [`Limits`] bounds the time and
//! the memory that it can make a key derivation take. Passphrases, keys, key schedules and decrypted key material are
//! wiped when they are dropped.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "sizes in tests are small"))]

mod af;
mod area;
mod cipher;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzz;
mod hash;
mod kdf;
mod luks;
mod luks1;
mod luks2;
#[cfg(any(test, feature = "fuzzing"))]
mod memory;
mod secret;
#[cfg(test)]
mod tests;

pub use area::{Area, FileArea};
pub use cipher::{Algorithm, CipherSpec, IvGenerator, MAX_SECTOR, Mode, SECTOR, SectorCipher};
pub use error::CryptError;
pub use hash::Hash;
pub use kdf::{Argon2Variant, Cost, Limits};
pub use luks::{Layout, Luks, Luks1Info, LuksInfo, SlotInfo};
pub use luks1::{FormatOptions as Luks1Options, format as format_luks1};
pub use luks2::{FormatOptions as Luks2Options, format as format_luks2};
pub use secret::{MAX_PASSPHRASE, Passphrase, VolumeKey};
