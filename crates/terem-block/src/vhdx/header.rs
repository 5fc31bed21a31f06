//! The two headers (specification, section 2.2.2).

use crate::OpenError;
use crate::bytes::{le16, le32, le64, put};
use crate::chain::ImageFile;

pub(super) const KIB: u64 = 1 << 10;
pub(super) const MIB: u64 = 1 << 20;
pub(super) const FILE_SIGNATURE: &[u8] = b"vhdxfile";
const SIGNATURE: &[u8] = b"head";
/// Where the headers are.
pub(super) const HEADERS_AT: [u64; 2] = [64 * KIB, 128 * KIB];
/// Bytes of a header.
pub(super) const LENGTH: usize = 4096;
/// Where the headers' and region tables' checksum is.
pub(super) const CHECKSUM_AT: usize = 4;
/// Most bytes of a log that are looked through.
const MAX_LOG: u32 = 256 << 20;

/// CRC-32C of `bytes`, those of the checksum itself taken as zeroes.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let head = crc32c::crc32c(bytes.get(..CHECKSUM_AT).unwrap_or_default());
    let middle = crc32c::crc32c_append(head, &[0; 4]);
    crc32c::crc32c_append(middle, bytes.get(CHECKSUM_AT + 4..).unwrap_or_default())
}

/// Puts the checksum in.
pub(super) fn seal(bytes: &mut [u8]) {
    let sum = checksum(bytes);
    put(bytes, CHECKSUM_AT, &sum.to_le_bytes());
}

/// Whether the checksum is right.
pub(super) fn is_sealed(bytes: &[u8]) -> bool {
    checksum(bytes) == le32(bytes, CHECKSUM_AT)
}

/// A header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) sequence: u64,
    /// Changes when the file is first written after it was opened.
    pub(crate) file_write: [u8; 16],
    /// Changes when the disk's contents do.
    pub(crate) data_write: [u8; 16],
    /// The log entries that count have the same; all zeroes: none do.
    pub(crate) log_guid: [u8; 16],
    pub(crate) log_offset: u64,
    pub(crate) log_length: u32,
    /// Which of the two places it is from.
    pub(crate) place: usize,
}

impl Header {
    /// Reads the header that counts.
    pub(crate) fn read(image: &ImageFile) -> Result<Self, OpenError> {
        let corrupt = |what: &str| OpenError::corrupt(image.path(), what);
        if image.read(0, 8.min(image.len()), "the identifier")? != FILE_SIGNATURE {
            return Err(corrupt("it has no VHDX identifier"));
        }
        let mut best: Option<Self> = None;
        for (place, at) in HEADERS_AT.into_iter().enumerate() {
            let bytes = image.read(at, LENGTH as u64, "a header")?;
            let Some(header) = Self::parse(&bytes, place) else { continue };
            if best.as_ref().is_none_or(|best| best.sequence < header.sequence) {
                best = Some(header);
            }
        }
        let header = best.ok_or_else(|| corrupt("both of its headers are damaged"))?;
        header.check().map_err(|what| OpenError::corrupt(image.path(), what))?;
        Ok(header)
    }

    /// `None`: damaged, or of another version.
    pub(super) fn parse(bytes: &[u8], place: usize) -> Option<Self> {
        if bytes.len() != LENGTH || !bytes.starts_with(SIGNATURE) || !is_sealed(bytes) || le16(bytes, 66) != 1
        {
            return None;
        }
        let guid = |at: usize| bytes.get(at..at + 16)?.try_into().ok();
        // "LogVersion": only 0 is known, unless there is no log.
        let log_guid = guid(48)?;
        if le16(bytes, 64) != 0 && log_guid != super::guid::NONE {
            return None;
        }
        Some(Self {
            sequence: le64(bytes, 8),
            file_write: guid(16)?,
            data_write: guid(32)?,
            log_guid,
            log_length: le32(bytes, 68),
            log_offset: le64(bytes, 72),
            place,
        })
    }

    fn check(&self) -> Result<(), String> {
        let (offset, length) = (self.log_offset, self.log_length);
        let aligned = offset.is_multiple_of(MIB) && u64::from(length).is_multiple_of(MIB);
        if !aligned || (length > 0 && offset < MIB) || offset > i64::MAX as u64 || length > MAX_LOG {
            return Err(format!("its log of {length:#x} bytes is at {offset:#x}"));
        }
        Ok(())
    }

    /// The header as it is written.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; LENGTH];
        put(&mut bytes, 0, SIGNATURE);
        put(&mut bytes, 8, &self.sequence.to_le_bytes());
        put(&mut bytes, 16, &self.file_write);
        put(&mut bytes, 32, &self.data_write);
        put(&mut bytes, 48, &self.log_guid);
        put(&mut bytes, 66, &1u16.to_le_bytes());
        put(&mut bytes, 68, &self.log_length.to_le_bytes());
        put(&mut bytes, 72, &self.log_offset.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    /// The same for the other place, newer.
    pub(crate) fn next(&self) -> Self {
        Self { sequence: self.sequence.wrapping_add(1), place: 1 - self.place, ..self.clone() }
    }

    /// Where it is written.
    pub(crate) fn offset(&self) -> u64 {
        HEADERS_AT[self.place]
    }
}
