//! Why a header could not be read, or a key not be used.

use std::io;

/// Why something about an encrypted image failed. Messages are the part after the image's name.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CryptError {
    /// There is no LUKS header.
    #[error("has no LUKS header")]
    NotLuks,
    /// The header contradicts its specification.
    #[error("its LUKS header is corrupt: {0}")]
    Corrupt(String),
    /// Something that is not supported.
    #[error("{0} is not supported")]
    Unsupported(String),
    /// The header asks for more work or memory than is allowed.
    #[error("its LUKS header asks for {0}")]
    Limit(String),
    /// No key slot that is in use opens with this passphrase.
    #[error("the passphrase opens none of its key slots; check the passphrase")]
    WrongPassphrase,
    /// All key slots are in use.
    #[error("all {0} key slots are in use; remove one first")]
    NoFreeSlot(usize),
    /// There is no such key slot, or it is not in use.
    #[error("key slot {0} is not in use")]
    NoSuchSlot(usize),
    /// The key slot is in use already.
    #[error("key slot {0} is in use already; choose another, or remove it first")]
    SlotInUse(usize),
    /// Without this key slot nobody could open the image.
    #[error("key slot {0} is the last one: without it nobody can open the image any more; add another first")]
    LastSlot(usize),
    /// There is no room for the key material of another key slot.
    #[error("there is no room for another key slot's {0} bytes of key material; remove a key slot first")]
    NoRoom(u64),
    /// What was asked for contradicts itself or the format.
    #[error("{0}")]
    Options(String),
    /// The host has no memory for the key derivation.
    #[error("the key derivation needs {0} KiB of memory, which this host does not have")]
    Memory(u64),
    /// The host gives no random numbers.
    #[error("the host gives no random numbers: {0}")]
    Random(getrandom::Error),
    /// Reading or writing the header failed.
    #[error("{doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The host's error.
        source: io::Error,
    },
}

impl CryptError {
    pub(crate) fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported(what.into())
    }

    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt(what.into())
    }
}
