//! Opening: headers, log, regions, metadata.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;

use super::guid;
use super::header::Header;
use super::log::{Change, MAX_ZERO, Replay};
use super::metadata::Metadata;
use super::region::Regions;
use crate::OpenError;
use crate::bytes::new_uuid;
use crate::chain::ImageFile;

/// What an image consists of.
pub(crate) struct Parts {
    pub(crate) header: Header,
    pub(super) regions: Regions,
    pub(crate) metadata: Metadata,
    /// What is only in the log so far: nothing, if the image was opened for writing.
    pub(super) replay: Replay,
    /// A sequence number for the next log entry.
    pub(super) next_entry: u64,
}

impl Parts {
    /// Reads the parts of an image, whose log stays as it is.
    pub(crate) fn read(image: &ImageFile) -> Result<Self, OpenError> {
        let header = Header::read(image)?;
        let replay = Replay::read(image, &header)?;
        let log = header.log_offset..header.log_offset + u64::from(header.log_length);
        let regions = Regions::read(image, &replay, &log)?;
        let metadata = Metadata::read(image, &replay, &regions)?;
        let next_entry = replay.sequence.saturating_add(1);
        Ok(Self { header, regions, metadata, replay, next_entry })
    }

    /// As [`Self::read`]; for writing, what is in the log is put to its place first.
    pub(crate) fn open(image: &mut ImageFile, writing: bool) -> Result<Self, OpenError> {
        let mut parts = Self::read(image)?;
        if !writing {
            let zeroed = |change: &Change| if let Change::Zero { length, .. } = change { *length } else { 0 };
            let zeroes = parts.replay.changes.iter().map(zeroed).fold(0, u64::saturating_add);
            if zeroes > MAX_ZERO {
                return Err(OpenError::Unsupported {
                    path: image.path().to_owned(),
                    feature: "reading an image whose log zeroes so much".into(),
                    hint: "open it once for writing, which puts the log's changes in their place",
                });
            }
            return Ok(parts);
        }
        if parts.header.log_length == 0 {
            return Err(OpenError::Unsupported {
                path: image.path().to_owned(),
                feature: "writing a VHDX image without a log".into(),
                hint: "open it with readonly=on, or convert it",
            });
        }
        if !parts.replay.is_empty() {
            tracing::warn!(path = %image.path().display(), "was not closed properly, replaying its log");
            apply(image.plain(), image.len(), &parts.replay, &mut parts.header)
                .map_err(|e| OpenError::io(image.path(), "replaying the image's log", e))?;
            image.refresh_len()?;
            parts.replay = Replay::default();
        }
        Ok(parts)
    }
}

/// Makes the changes, then says that there are none.
fn apply(file: &fs::File, length: u64, replay: &Replay, header: &mut Header) -> io::Result<()> {
    if replay.length > length {
        file.set_len(replay.length)?;
    }
    for change in &replay.changes {
        match change {
            Change::Page { at, bytes } => file.write_all_at(bytes, *at)?,
            Change::Zero { at, length } => zero(file, *at, *length)?,
        }
    }
    file.sync_all()?;
    header.log_guid = guid::NONE;
    header.file_write = new_uuid()?;
    // Twice, so that both say it (section 2.2.2.1).
    for _ in 0..2 {
        *header = header.next();
        file.write_all_at(&header.bytes(), header.offset())?;
        file.sync_all()?;
    }
    Ok(())
}

fn zero(file: &fs::File, at: u64, length: u64) -> io::Result<()> {
    use rustix::fs::FallocateFlags;
    if length == 0 {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if rustix::fs::fallocate(file, flags, at, length).is_ok() {
        return Ok(());
    }
    let zeroes = vec![0; 1 << 20];
    let mut done = 0;
    while done < length {
        let n = (length - done).min(zeroes.len() as u64);
        file.write_all_at(&zeroes[..crate::file::to_usize(n)], at + done)?;
        done += n;
    }
    Ok(())
}
