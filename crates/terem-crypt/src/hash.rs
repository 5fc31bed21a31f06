//! Hashes that LUKS headers name.

use std::fmt;

use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};

use crate::CryptError;

/// A hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1, as old LUKS 1 images have it.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// RIPEMD-160.
    Ripemd160,
}

impl Hash {
    /// The hash that a header calls `name`.
    ///
    /// # Errors
    /// [`CryptError::Unsupported`].
    pub fn parse(name: &str) -> Result<Self, CryptError> {
        Ok(match name {
            "sha1" => Self::Sha1,
            "sha224" => Self::Sha224,
            "sha256" => Self::Sha256,
            "sha384" => Self::Sha384,
            "sha512" => Self::Sha512,
            "ripemd160" => Self::Ripemd160,
            other => return Err(CryptError::unsupported(format!("the hash {}", other.escape_debug()))),
        })
    }

    /// Its name in headers.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
        }
    }

    /// Bytes of a digest.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The digest of `parts`, one after the other, cut to `out`'s length.
    pub(crate) fn digest(self, parts: &[&[u8]], out: &mut [u8]) {
        match self {
            Self::Sha1 => digest::<Sha1>(parts, out),
            Self::Sha224 => digest::<Sha224>(parts, out),
            Self::Sha256 => digest::<Sha256>(parts, out),
            Self::Sha384 => digest::<Sha384>(parts, out),
            Self::Sha512 => digest::<Sha512>(parts, out),
            Self::Ripemd160 => digest::<Ripemd160>(parts, out),
        }
    }

    /// PBKDF2 (RFC 8018, 5.2) with this hash's HMAC. The caller bounds `iterations`.
    pub(crate) fn pbkdf2(self, passphrase: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        match self {
            Self::Sha1 => pbkdf2::pbkdf2_hmac::<Sha1>(passphrase, salt, iterations, out),
            Self::Sha224 => pbkdf2::pbkdf2_hmac::<Sha224>(passphrase, salt, iterations, out),
            Self::Sha256 => pbkdf2::pbkdf2_hmac::<Sha256>(passphrase, salt, iterations, out),
            Self::Sha384 => pbkdf2::pbkdf2_hmac::<Sha384>(passphrase, salt, iterations, out),
            Self::Sha512 => pbkdf2::pbkdf2_hmac::<Sha512>(passphrase, salt, iterations, out),
            Self::Ripemd160 => pbkdf2::pbkdf2_hmac::<Ripemd160>(passphrase, salt, iterations, out),
        }
    }
}

fn digest<D: Digest>(parts: &[&[u8]], out: &mut [u8]) {
    let mut hash = D::new();
    for part in parts {
        hash.update(part);
    }
    let all = hash.finalize();
    let n = out.len().min(all.len());
    out[..n].copy_from_slice(&all[..n]);
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
