//! The binary part of a header (specification, 2.1).

use crate::luks1::text;
use crate::secret::{random, same};
use crate::{CryptError, Hash};

/// Bytes of the binary part.
pub(super) const LENGTH: usize = 4096;
/// Valid sizes of a copy: powers of two from the first to the second.
pub(super) const MIN_SIZE: u64 = 16 << 10;
pub(super) const MAX_SIZE: u64 = 4 << 20;
/// What the copies begin with.
const MAGIC: [[u8; 6]; 2] = [*b"LUKS\xba\xbe", *b"SKUL\xba\xbe"];
/// Fields: first byte and length.
const SIZE_AT: usize = 8;
const SEQUENCE_AT: usize = 16;
const LABEL: (usize, usize) = (24, 48);
const CHECKSUM_NAME: (usize, usize) = (72, 32);
const SALT: (usize, usize) = (104, 64);
const UUID: (usize, usize) = (168, 40);
const OFFSET_AT: usize = 256;
const CHECKSUM: (usize, usize) = (448, 64);

/// A copy's binary part, as it is on the disk.
#[derive(Clone)]
pub(super) struct Binary([u8; LENGTH]);

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |n, &b| n << 8 | u64::from(b))
}

impl Binary {
    /// A new one.
    pub(super) fn new(size: u64, uuid: &str) -> Self {
        let mut bytes = [0; LENGTH];
        bytes[7] = 2;
        bytes[SIZE_AT..SIZE_AT + 8].copy_from_slice(&size.to_be_bytes());
        bytes[CHECKSUM_NAME.0..CHECKSUM_NAME.0 + 6].copy_from_slice(b"sha256");
        bytes[UUID.0..UUID.0 + uuid.len()].copy_from_slice(uuid.as_bytes());
        Self(bytes)
    }

    /// The binary part in `bytes` (of [`LENGTH`]) that was found at `offset`, if it can be one of copy `copy`.
    pub(super) fn parse(bytes: &[u8], copy: usize, offset: u64) -> Option<Self> {
        let this = Self(bytes.try_into().ok()?);
        let right = this.0.starts_with(&MAGIC[copy]) && this.0[6..8] == [0, 2];
        (right && valid_size(this.size()) && be64(&this.0, OFFSET_AT) == offset).then_some(this)
    }

    fn field(&self, (at, len): (usize, usize)) -> &[u8] {
        &self.0[at..at + len]
    }

    /// Bytes of a copy with its JSON.
    pub(super) fn size(&self) -> u64 {
        be64(&self.0, SIZE_AT)
    }

    pub(super) fn sequence(&self) -> u64 {
        be64(&self.0, SEQUENCE_AT)
    }

    pub(super) fn set_sequence(&mut self, sequence: u64) {
        self.0[SEQUENCE_AT..SEQUENCE_AT + 8].copy_from_slice(&sequence.to_be_bytes());
    }

    pub(super) fn uuid(&self) -> Result<String, CryptError> {
        text(self.field(UUID), "UUID")
    }

    pub(super) fn label(&self) -> Result<String, CryptError> {
        text(self.field(LABEL), "label")
    }

    fn checksum(&self, json: &[u8]) -> Option<Vec<u8>> {
        let name = text(self.field(CHECKSUM_NAME), "checksum's name").ok()?;
        let hash = Hash::parse(&name).ok()?;
        let mut sum = vec![0; hash.size()];
        // With zeroes in the checksum's place.
        let (before, after) = (&self.0[..CHECKSUM.0], &self.0[CHECKSUM.0 + CHECKSUM.1..]);
        hash.digest(&[before, &[0; CHECKSUM.1], after, json], &mut sum);
        Some(sum)
    }

    /// Whether the checksum is that of this and `json`, all of the copy's.
    pub(super) fn is_valid(&self, json: &[u8]) -> bool {
        self.checksum(json).is_some_and(|sum| same(&sum, &self.field(CHECKSUM)[..sum.len()]))
    }

    /// The bytes of copy `copy`, with a new salt and the checksum.
    pub(super) fn encode(&self, copy: usize, json: &[u8]) -> Result<Vec<u8>, CryptError> {
        let mut this = self.clone();
        this.0[..6].copy_from_slice(&MAGIC[copy]);
        let offset = this.size() * copy as u64;
        this.0[OFFSET_AT..OFFSET_AT + 8].copy_from_slice(&offset.to_be_bytes());
        random(&mut this.0[SALT.0..SALT.0 + SALT.1])?;
        this.0[CHECKSUM.0..CHECKSUM.0 + CHECKSUM.1].fill(0);
        // It was seen to be known when the header was read.
        let sum = this.checksum(json).ok_or_else(|| CryptError::unsupported("the header's checksum"))?;
        this.0[CHECKSUM.0..CHECKSUM.0 + sum.len()].copy_from_slice(&sum);
        Ok([&this.0[..], json].concat())
    }
}

/// Puts checksums right.
#[cfg(feature = "fuzzing")]
pub(crate) struct Sealed;

#[cfg(feature = "fuzzing")]
impl Sealed {
    /// In both copies that are in `bytes`, as far as they are there.
    pub(crate) fn seal(bytes: &mut [u8]) {
        let mut at = 0;
        for copy in 0..2 {
            let Some(head) = bytes.get(at..at + LENGTH) else { return };
            let Some(binary) = Binary::parse(head, copy, at as u64) else { return };
            let end = at + usize::try_from(binary.size()).unwrap_or(0);
            let Some(json) = bytes.get(at + LENGTH..end) else { return };
            let Some(sum) = binary.checksum(json) else { return };
            bytes[at + CHECKSUM.0..][..sum.len()].copy_from_slice(&sum);
            at = end;
        }
    }
}

pub(super) fn valid_size(size: u64) -> bool {
    size.is_power_of_two() && (MIN_SIZE..=MAX_SIZE).contains(&size)
}
