//! Names of ciphers, as headers have them.

use std::fmt;

use crate::CryptError;

/// A block cipher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// AES (FIPS 197).
    Aes,
    /// Serpent.
    Serpent,
}

/// How blocks of a sector are chained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// XTS (IEEE 1619): two keys, one after the other.
    Xts,
    /// Cipher block chaining.
    Cbc,
}

impl Mode {
    /// Bytes of one of the keys in a key of `len` bytes.
    pub(super) fn part_of(self, len: usize) -> usize {
        match self {
            Self::Xts => len / 2,
            Self::Cbc => len,
        }
    }
}

/// Where a sector's initialization vector comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IvGenerator {
    /// The low 32 bits of the sector's number, little-endian.
    Plain,
    /// The sector's number, 64 bits little-endian.
    Plain64,
    /// The sector's number, 64 bits big-endian at the vector's end.
    Plain64Be,
    /// The sector's number, encrypted with the SHA-256 of the key.
    EssivSha256,
}

/// A cipher, a mode and an IV generator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CipherSpec {
    /// The block cipher.
    pub algorithm: Algorithm,
    /// The mode.
    pub mode: Mode,
    /// The IV generator.
    pub iv: IvGenerator,
}

impl CipherSpec {
    /// `aes-xts-plain64`, which everybody takes unless told otherwise.
    pub const DEFAULT: Self = Self { algorithm: Algorithm::Aes, mode: Mode::Xts, iv: IvGenerator::Plain64 };

    /// Parses a name as `aes-xts-plain64` (LUKS 2 and `dm-crypt`).
    ///
    /// # Errors
    /// [`CryptError::Unsupported`].
    pub fn parse(text: &str) -> Result<Self, CryptError> {
        let (name, mode) = text
            .split_once('-')
            .ok_or_else(|| CryptError::unsupported(format!("the cipher {}", text.escape_debug())))?;
        Self::from_parts(name, mode)
    }

    /// Parses cipher name and mode as LUKS 1 has them: `aes` and `xts-plain64`.
    ///
    /// # Errors
    /// [`CryptError::Unsupported`].
    pub fn from_parts(name: &str, mode: &str) -> Result<Self, CryptError> {
        let unsupported =
            || CryptError::unsupported(format!("the cipher {}-{}", name.escape_debug(), mode.escape_debug()));
        let (mode, iv) = mode.split_once('-').ok_or_else(unsupported)?;
        Ok(Self {
            algorithm: match name {
                "aes" => Algorithm::Aes,
                "serpent" => Algorithm::Serpent,
                _ => return Err(unsupported()),
            },
            mode: match mode {
                "xts" => Mode::Xts,
                "cbc" => Mode::Cbc,
                _ => return Err(unsupported()),
            },
            iv: match iv {
                "plain" => IvGenerator::Plain,
                "plain64" => IvGenerator::Plain64,
                "plain64be" => IvGenerator::Plain64Be,
                "essiv:sha256" => IvGenerator::EssivSha256,
                _ => return Err(unsupported()),
            },
        })
    }

    /// The block cipher's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.algorithm {
            Algorithm::Aes => "aes",
            Algorithm::Serpent => "serpent",
        }
    }

    /// Mode and IV generator as LUKS 1 has them: `xts-plain64`.
    #[must_use]
    pub fn mode_name(&self) -> String {
        let mode = match self.mode {
            Mode::Xts => "xts",
            Mode::Cbc => "cbc",
        };
        let iv = match self.iv {
            IvGenerator::Plain => "plain",
            IvGenerator::Plain64 => "plain64",
            IvGenerator::Plain64Be => "plain64be",
            IvGenerator::EssivSha256 => "essiv:sha256",
        };
        format!("{mode}-{iv}")
    }

    /// Bytes of the longest key: 32, and twice that for XTS.
    #[must_use]
    pub fn longest_key(&self) -> usize {
        match self.mode {
            Mode::Xts => 64,
            Mode::Cbc => 32,
        }
    }

    /// Whether there is such a key: of 128, 192 or 256 bits, twice that for XTS.
    ///
    /// # Errors
    /// [`CryptError::Unsupported`].
    pub fn check_key(&self, len: usize) -> Result<(), CryptError> {
        let whole = self.mode == Mode::Cbc || len.is_multiple_of(2);
        if whole && matches!(self.mode.part_of(len), 16 | 24 | 32) {
            return Ok(());
        }
        Err(CryptError::unsupported(format!("{self} with a key of {} bits", len.saturating_mul(8))))
    }
}

impl fmt::Display for CipherSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.name(), self.mode_name())
    }
}
