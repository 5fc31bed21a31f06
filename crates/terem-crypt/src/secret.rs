//! Bytes that are wiped when they are dropped.

use std::fmt;
use std::io::{self, Read};

use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// Longest passphrase, in bytes (as cryptsetup's key files).
pub const MAX_PASSPHRASE: usize = 8 << 20;

/// A passphrase, as it was read: any bytes, no end of line taken off.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct Passphrase(Vec<u8>);

impl Passphrase {
    /// Takes the bytes over; they are wiped with the value.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Everything in `source`, [`MAX_PASSPHRASE`] bytes at most. Nothing of it stays elsewhere in memory.
    ///
    /// # Errors
    /// The source's, or [`io::ErrorKind::InvalidData`] when it is longer.
    pub fn read(source: &mut dyn Read) -> io::Result<Self> {
        let mut bytes = Zeroizing::new(vec![0; 4096]);
        let mut len = 0;
        loop {
            if len == bytes.len() {
                if len >= MAX_PASSPHRASE {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "longer than 8 MiB"));
                }
                // Not by growing the vector, which would leave a copy behind.
                let mut longer = Zeroizing::new(vec![0; len * 2]);
                longer[..len].copy_from_slice(&bytes);
                bytes = longer;
            }
            match source.read(&mut bytes[len..]) {
                Ok(0) => return Ok(Self(bytes[..len].to_vec())),
                Ok(n) => len += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// A new one of 32 bytes that nobody knows, for something that is thrown away.
    ///
    /// # Errors
    /// The host has no random numbers.
    pub fn random() -> Result<Self, crate::CryptError> {
        let mut bytes = Self(vec![0; 32]);
        random(&mut bytes.0)?;
        Ok(bytes)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(…)")
    }
}

/// The key that encrypts an image's data.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct VolumeKey(Vec<u8>);

impl VolumeKey {
    /// A new one.
    pub(crate) fn random(len: usize) -> Result<Self, crate::CryptError> {
        let mut key = Self(vec![0; len]);
        random(&mut key.0)?;
        Ok(key)
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeKey({} bits)", self.0.len() * 8)
    }
}

/// Fills `bytes` from the host's random numbers.
pub(crate) fn random(bytes: &mut [u8]) -> Result<(), crate::CryptError> {
    getrandom::fill(bytes).map_err(crate::CryptError::Random)
}

/// A random (version 4) UUID as text (RFC 9562).
pub(crate) fn random_uuid() -> Result<String, crate::CryptError> {
    let mut b = [0; 16];
    random(&mut b)?;
    b[6] = b[6] & 0x0f | 0x40;
    b[8] = b[8] & 0x3f | 0x80;
    let hex: String = b.iter().map(|b| format!("{b:02x}")).collect();
    Ok(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
}

/// Whether two digests are equal; takes the same time wherever they differ.
pub(crate) fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (a, b)| all | std::hint::black_box(a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passphrases_are_read_whole_and_not_shown() {
        let long: Vec<u8> = (0..10_000u32).map(|i| i.to_le_bytes()[0]).collect();
        let read = Passphrase::read(&mut &long[..]).unwrap();
        assert_eq!(read.bytes(), long);
        assert_eq!(format!("{read:?}"), "Passphrase(…)");
        assert!(Passphrase::read(&mut io::repeat(1)).is_err());
    }

    #[test]
    fn uuids_have_their_shape() {
        let uuid = random_uuid().unwrap();
        assert_eq!(uuid.len(), 36);
        assert_eq!(uuid.as_bytes()[14], b'4');
        assert_ne!(uuid, random_uuid().unwrap());
        assert!(same(b"ab", b"ab") && !same(b"ab", b"aa") && !same(b"ab", b"a"));
    }
}
