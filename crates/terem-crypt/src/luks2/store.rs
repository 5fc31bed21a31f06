//! Reading and writing the two copies of the header.

use serde_json::Value;

use super::binary::{Binary, LENGTH, MAX_SIZE, MIN_SIZE, valid_size};
use super::metadata::Metadata;
use crate::CryptError;
use crate::area::{Area, read, sync, write};

/// A copy that is valid.
#[derive(Clone)]
struct Copy {
    binary: Binary,
    json: Value,
}

/// A header.
pub(crate) struct Header {
    binary: Binary,
    /// The metadata as they are; changes are made here.
    pub(super) json: Value,
    /// What they say.
    pub(crate) metadata: Metadata,
    /// Which of the two copies were as this one.
    good: [bool; 2],
}

impl Header {
    /// A header that is nowhere yet.
    pub(super) fn new(size: u64, uuid: &str, json: Value, len: u64) -> Result<Self, CryptError> {
        debug_assert!(valid_size(size));
        let metadata = Metadata::parse(&json, size, len)?;
        Ok(Self { binary: Binary::new(size, uuid), json, metadata, good: [true; 2] })
    }

    /// Reads the header from `area`, from whichever copy is valid and newer.
    pub(crate) fn read(area: &dyn Area) -> Result<Self, CryptError> {
        let first = read_copy(area, 0, 0)?;
        let second = match &first {
            Some(first) => read_copy(area, 1, first.binary.size())?,
            None => find_second(area)?,
        };
        let sequence = |copy: &Option<Copy>| copy.as_ref().map(|c| c.binary.sequence());
        let (one, two) = (sequence(&first), sequence(&second));
        let newest = if two > one { second } else { first };
        let Some(Copy { binary, json }) = newest else {
            return Err(CryptError::corrupt("neither of its two copies is whole"));
        };
        let metadata = Metadata::parse(&json, binary.size(), area.len())?;
        let good = [one, two].map(|n| n == Some(binary.sequence()));
        Ok(Self { binary, json, metadata, good })
    }

    /// Whether one of the copies is damaged or old. The next change puts that right.
    pub(crate) fn is_degraded(&self) -> bool {
        self.good != [true; 2]
    }

    pub(crate) fn uuid(&self) -> Result<String, CryptError> {
        self.binary.uuid()
    }

    pub(crate) fn label(&self) -> Result<String, CryptError> {
        self.binary.label()
    }

    /// Bytes of a copy.
    pub(super) fn size(&self) -> u64 {
        self.binary.size()
    }

    /// Makes both copies the same. To be called before anything is written that only one copy knows to be free.
    pub(super) fn repair(&mut self, area: &dyn Area) -> Result<(), CryptError> {
        for copy in 0..2 {
            if !self.good[copy] {
                self.write_copy(area, copy)?;
                self.good[copy] = true;
            }
        }
        Ok(())
    }

    /// Writes what `json` says now, with the next sequence number: one copy after the other, so that there is
    /// always one that is whole.
    pub(super) fn commit(&mut self, area: &dyn Area) -> Result<(), CryptError> {
        let sequence = self.binary.sequence().checked_add(1);
        let sequence = sequence.ok_or_else(|| CryptError::corrupt("its sequence number is at its end"))?;
        let metadata = Metadata::parse(&self.json, self.size(), area.len())?;
        self.encode_json()?;
        self.binary.set_sequence(sequence);
        self.write_copy(area, 0)?;
        self.write_copy(area, 1)?;
        self.metadata = metadata;
        Ok(())
    }

    fn encode_json(&self) -> Result<Vec<u8>, CryptError> {
        let room = usize::try_from(self.size()).unwrap_or(0).saturating_sub(LENGTH);
        let mut json = self.json.to_string().into_bytes();
        // It ends with a NUL.
        if json.len() >= room {
            return Err(CryptError::NoRoom(json.len() as u64));
        }
        json.resize(room, 0);
        Ok(json)
    }

    fn write_copy(&self, area: &dyn Area, copy: usize) -> Result<(), CryptError> {
        let bytes = self.binary.encode(copy, &self.encode_json()?)?;
        write(area, self.size() * copy as u64, &bytes)?;
        sync(area)
    }
}

/// Copy `copy` at `offset`, if it is whole there.
fn read_copy(area: &dyn Area, copy: usize, offset: u64) -> Result<Option<Copy>, CryptError> {
    if offset.saturating_add(LENGTH as u64) > area.len() {
        return Ok(None);
    }
    let Some(binary) = Binary::parse(&read(area, offset, LENGTH)?, copy, offset) else { return Ok(None) };
    if offset.saturating_add(binary.size()) > area.len() {
        return Ok(None);
    }
    let len = usize::try_from(binary.size()).unwrap_or(0).saturating_sub(LENGTH);
    let json = read(area, offset + LENGTH as u64, len)?;
    if !binary.is_valid(&json) {
        return Ok(None);
    }
    let text = json.split(|&b| b == 0).next().unwrap_or_default();
    Ok(serde_json::from_slice(text).ok().map(|json| Copy { binary, json }))
}

/// The second copy when the first does not say where it is.
fn find_second(area: &dyn Area) -> Result<Option<Copy>, CryptError> {
    let mut offset = MIN_SIZE;
    while offset <= MAX_SIZE {
        if let Some(copy) = read_copy(area, 1, offset)?.filter(|copy| copy.binary.size() == offset) {
            return Ok(Some(copy));
        }
        offset *= 2;
    }
    Ok(None)
}
