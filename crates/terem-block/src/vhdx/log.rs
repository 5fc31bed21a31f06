//! The log (specification, section 2.3): finding the entries that count, what they change, and writing one.

use std::collections::HashMap;

use super::guid;
use super::header::{Header, KIB, MIB, is_sealed, seal};
use crate::OpenError;
use crate::bytes::{le32, le64, put};
use crate::chain::ImageFile;
use crate::file::to_usize;

/// Bytes of a sector of the log, and of a page that it changes.
pub(super) const SECTOR: usize = 4096;
pub(super) const ENTRY: &[u8] = b"loge";
const DESCRIPTOR: &[u8] = b"desc";
const ZERO: &[u8] = b"zero";
const DATA: &[u8] = b"data";
/// Bytes of an entry's header, and of a descriptor.
const HEADER_LENGTH: usize = 64;
const DESCRIPTOR_LENGTH: usize = 32;
/// Nothing before the region tables may be changed through the log.
const FIRST_CHANGE: u64 = 192 * KIB;

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    Page { at: u64, bytes: Vec<u8> },
    Zero { at: u64, length: u64 },
}

impl Change {
    fn range(&self) -> (u64, u64) {
        match self {
            Self::Page { at, bytes } => (*at, bytes.len() as u64),
            Self::Zero { at, length } => (*at, *length),
        }
    }
}

/// What the log changes, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Replay {
    pub(super) changes: Vec<Change>,
    /// Bytes that the file must have had when the log was written.
    pub(super) flushed: u64,
    /// Bytes that the file must have afterwards.
    pub(super) length: u64,
    /// The highest sequence number.
    pub(super) sequence: u64,
}

/// A valid entry.
#[derive(Debug, Clone, Copy)]
struct Entry {
    length: u64,
    tail: u64,
    sequence: u64,
}

impl Replay {
    /// Finds what is in the log and not yet in its place.
    pub(super) fn read(image: &ImageFile, header: &Header) -> Result<Self, OpenError> {
        if header.log_guid == guid::NONE || header.log_length == 0 {
            return Ok(Self::default());
        }
        let corrupt = |what: String| OpenError::corrupt(image.path(), what);
        let log = image.read(header.log_offset, header.log_length.into(), "the log")?;
        let mut replay = Self::find(&log, &header.log_guid).map_err(corrupt)?;
        if replay.flushed > image.len() {
            let what = format!("its log was written when it had {:#x} bytes", replay.flushed);
            return Err(OpenError::truncated(image.path(), what));
        }
        let end = replay.length.max(image.len());
        let log = header.log_offset..header.log_offset + u64::from(header.log_length);
        for change in &replay.changes {
            let (at, length) = change.range();
            let past = at.checked_add(length).is_none_or(|e| e > end || (at < log.end && log.start < e));
            if past || at < FIRST_CHANGE || end > i64::MAX as u64 {
                return Err(corrupt(format!("its log changes {length:#x} bytes at {at:#x}")));
            }
        }
        replay.length = end;
        Ok(replay)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Finds the active sequence (section 2.3.3) and what it changes.
    pub(super) fn find(log: &[u8], name: &[u8; 16]) -> Result<Self, String> {
        let size = log.len() as u64;
        // Entries can claim to lie over each other; looking at honest ones takes as long as the log is.
        let mut left = 4 * size;
        let mut known: HashMap<u64, Option<Entry>> = HashMap::new();
        let mut valid = |at: u64| -> Result<Option<Entry>, String> {
            if let Some(entry) = known.get(&at) {
                return Ok(*entry);
            }
            let entry = look_at(log, at, name, &mut left)?;
            known.insert(at, entry);
            Ok(entry)
        };
        let mut best: Option<Vec<(u64, Entry)>> = None;
        let mut tail = 0;
        while tail < size {
            let mut sequence: Vec<(u64, Entry)> = Vec::new();
            let (mut at, mut bytes) = (tail, 0);
            while let Some(entry) = valid(at)? {
                let follows = sequence
                    .last()
                    .is_none_or(|(_, last)| last.sequence.checked_add(1) == Some(entry.sequence));
                bytes += entry.length;
                if !follows || bytes > size {
                    break;
                }
                sequence.push((at, entry));
                at = (at + entry.length) % size;
            }
            let Some(&(_, head)) = sequence.last() else {
                tail += SECTOR as u64;
                continue;
            };
            // It ends where it was seen to, or where it went around.
            tail = if at > tail { at } else { size };
            let newer = best.as_ref().and_then(|b| b.last()).is_none_or(|(_, b)| b.sequence < head.sequence);
            if let Some(first) = sequence.iter().position(|(at, _)| *at == head.tail)
                && newer
            {
                best = Some(sequence.split_off(first));
            }
        }
        let mut replay = Self::default();
        for (at, entry) in best.unwrap_or_default() {
            replay.add(log, at, entry)?;
        }
        Ok(replay)
    }

    fn add(&mut self, log: &[u8], at: u64, entry: Entry) -> Result<(), String> {
        let bytes = around(log, at, entry.length);
        let count = le32(&bytes, 24) as usize;
        let mut data = descriptor_bytes(count);
        for i in 0..count {
            let descriptor = &bytes[HEADER_LENGTH + i * DESCRIPTOR_LENGTH..][..DESCRIPTOR_LENGTH];
            let at = le64(descriptor, 16);
            if !at.is_multiple_of(SECTOR as u64) {
                return Err(format!("its log changes {at:#x}"));
            }
            if descriptor.starts_with(ZERO) {
                self.changes.push(Change::Zero { at, length: le64(descriptor, 8) });
                continue;
            }
            let sector = bytes.get(data..data + SECTOR).ok_or("a log entry is cut short")?;
            data += SECTOR;
            // The first eight and the last four bytes are in the descriptor.
            let mut page = sector.to_vec();
            put(&mut page, 0, &descriptor[8..16]);
            put(&mut page, SECTOR - 4, &descriptor[4..8]);
            self.changes.push(Change::Page { at, bytes: page });
        }
        self.flushed = self.flushed.max(le64(&bytes, 48));
        self.length = self.length.max(le64(&bytes, 56));
        self.sequence = self.sequence.max(entry.sequence);
        Ok(())
    }

    /// Reads from the image as it is once the log is in its place.
    pub(super) fn read_over(&self, at: u64, bytes: &mut [u8]) {
        let end = at + bytes.len() as u64;
        for change in &self.changes {
            let (from, length) = change.range();
            let (start, stop) = (from.max(at), from.saturating_add(length).min(end));
            if start >= stop {
                continue;
            }
            let target = &mut bytes[to_usize(start - at)..to_usize(stop - at)];
            match change {
                Change::Page { bytes, .. } => {
                    target.copy_from_slice(&bytes[to_usize(start - from)..to_usize(stop - from)]);
                }
                Change::Zero { .. } => target.fill(0),
            }
        }
    }

    /// As [`ImageFile::read`], with the log in its place.
    pub(super) fn read_through(
        &self,
        image: &ImageFile,
        at: u64,
        length: u64,
        what: &str,
    ) -> Result<Vec<u8>, OpenError> {
        let mut bytes = image.read(at, length, what)?;
        self.read_over(at, &mut bytes);
        Ok(bytes)
    }
}

impl Replay {
    /// The pages of a range of the file that are changed, with all changes. Only for what is short enough to be kept in
    /// memory: see [`MAX_ZERO`].
    pub(super) fn pages_in(&self, range: std::ops::Range<u64>) -> Vec<(u64, Vec<u8>)> {
        let mut starts = std::collections::BTreeSet::new();
        for change in &self.changes {
            let (at, length) = change.range();
            let (from, to) = (at.max(range.start), at.saturating_add(length).min(range.end));
            starts.extend((from..to).step_by(SECTOR));
        }
        let page = |at: u64| {
            let mut bytes = vec![0; SECTOR];
            self.read_over(at, &mut bytes);
            (at, bytes)
        };
        starts.into_iter().map(page).collect()
    }
}

/// Bytes of an entry's header and `count` descriptors, in whole sectors.
fn descriptor_bytes(count: usize) -> usize {
    (HEADER_LENGTH + count.saturating_mul(DESCRIPTOR_LENGTH)).next_multiple_of(SECTOR)
}

/// `length` bytes at `at` of the log, which goes around.
fn around(log: &[u8], at: u64, length: u64) -> Vec<u8> {
    let (at, length) = (to_usize(at), to_usize(length));
    let first = log.len().saturating_sub(at).min(length);
    [&log[at..at + first], &log[..(length - first).min(log.len())]].concat()
}

/// The entry at `at`, if it is one and all of it is whole (section 2.3.1). `left` bytes may still be looked at.
fn look_at(log: &[u8], at: u64, name: &[u8; 16], left: &mut u64) -> Result<Option<Entry>, String> {
    let head = &log[to_usize(at)..][..SECTOR];
    let entry = Entry { length: le32(head, 8).into(), tail: le32(head, 12).into(), sequence: le64(head, 16) };
    let count = le32(head, 24) as usize;
    let whole = entry.length >= SECTOR as u64
        && entry.length.is_multiple_of(SECTOR as u64)
        && entry.length <= log.len() as u64
        && descriptor_bytes(count) as u64 <= entry.length;
    if !head.starts_with(ENTRY) || head[32..48] != *name || entry.sequence == 0 || !whole {
        return Ok(None);
    }
    *left = left.checked_sub(entry.length).ok_or("the entries of its log lie over each other")?;
    let bytes = around(log, at, entry.length);
    if !is_sealed(&bytes) {
        return Ok(None);
    }
    let mut data = descriptor_bytes(count);
    for i in 0..count {
        let descriptor = &bytes[HEADER_LENGTH + i * DESCRIPTOR_LENGTH..][..DESCRIPTOR_LENGTH];
        if le64(descriptor, 24) != entry.sequence {
            return Ok(None);
        }
        if descriptor.starts_with(DESCRIPTOR) {
            let Some(sector) = bytes.get(data..data + SECTOR) else { return Ok(None) };
            let sequence = u64::from(le32(sector, 4)) << 32 | u64::from(le32(sector, SECTOR - 4));
            if !sector.starts_with(DATA) || sequence != entry.sequence {
                return Ok(None);
            }
            data += SECTOR;
        } else if !descriptor.starts_with(ZERO) {
            return Ok(None);
        }
    }
    Ok(Some(entry))
}

/// Most pages that fit one entry of a log of `length` bytes.
pub(super) fn pages_in(length: u32) -> usize {
    let sectors = length as usize / SECTOR;
    sectors.saturating_sub(sectors / 128 + 2)
}

/// An entry at the log's beginning that writes `pages` (place in the file and [`SECTOR`] bytes). `file` is the number
/// of bytes that the file certainly has.
pub(super) fn entry(pages: &[(u64, Vec<u8>)], name: &[u8; 16], sequence: u64, file: u64) -> Vec<u8> {
    let word = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    let descriptors = descriptor_bytes(pages.len());
    let mut bytes = vec![0; descriptors + pages.len() * SECTOR];
    put(&mut bytes, 0, ENTRY);
    let length = bytes.len();
    put(&mut bytes, 8, &word(length));
    put(&mut bytes, 16, &sequence.to_le_bytes());
    put(&mut bytes, 24, &word(pages.len()));
    put(&mut bytes, 32, name);
    put(&mut bytes, 48, &file.to_le_bytes());
    put(&mut bytes, 56, &file.to_le_bytes());
    for (i, (at, page)) in pages.iter().enumerate() {
        let descriptor = HEADER_LENGTH + i * DESCRIPTOR_LENGTH;
        put(&mut bytes, descriptor, DESCRIPTOR);
        put(&mut bytes, descriptor + 4, &page[SECTOR - 4..]);
        put(&mut bytes, descriptor + 8, &page[..8]);
        put(&mut bytes, descriptor + 16, &at.to_le_bytes());
        put(&mut bytes, descriptor + 24, &sequence.to_le_bytes());
        let sector = descriptors + i * SECTOR;
        let [high, low] = [sequence >> 32, sequence & 0xffff_ffff].map(|n| word(to_usize(n)));
        put(&mut bytes, sector, DATA);
        put(&mut bytes, sector + 4, &high);
        put(&mut bytes, sector + 8, &page[8..SECTOR - 4]);
        put(&mut bytes, sector + SECTOR - 4, &low);
    }
    seal(&mut bytes);
    bytes
}

/// Most bytes that a log's zeroing may cover when an image is only read.
pub(super) const MAX_ZERO: u64 = 16 * MIB;
