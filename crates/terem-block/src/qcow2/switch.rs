//! Writing the header of an image that is there already, so that a power cut leaves the old one or the new one.
//!
//! Storage writes a sector whole or not at all, so everything that changes lies in the first one: fields and extensions.
//! What finds no room there goes behind it, where nothing that is in use is overwritten:
//!
//! ```text
//!  0        112            512                                            cluster's end
//!  │ fields │ extensions … │ … end of the table of feature names │ … │ backing file name │
//! ```
//!
//! 1. A new backing file name is written to a place that the old one does not have.
//! 2. The first sector switches to the new fields, extensions and name. If the table of feature names, which only serves
//!    messages, does not fit into it, it is left out.
//! 3. The table's end is written behind the first sector, and then the first sector with its beginning.

use std::ops::Range;

use super::header::{Header, SECTOR, be32, be64};
use crate::OpenError;
use crate::chain::ImageFile;
use crate::file::to_usize;

/// Writes `header` to `image`, durably.
///
/// # Errors
/// [`OpenError`]: it does not fit into the first cluster, or writing failed.
pub(super) fn write_header(image: &ImageFile, header: &Header) -> Result<(), OpenError> {
    let limit = |what| OpenError::Limit { path: image.path().to_owned(), what };
    header.check_name().map_err(limit)?;
    let name = header.backing.as_deref().unwrap_or_default().as_bytes();
    let cluster = header.cluster_size();
    let whole = header.encode_with(true, None);
    if whole.len() <= SECTOR {
        return write(image, 0, &whole);
    }
    let table_end = header.fields_and_extensions(true).len() as u64;
    let fields_end = header.fields_and_extensions(false).len();
    let without = header.encode_with(false, None);
    // Where the name is when the switch is done.
    let mut name_at = None;
    if without.len() <= SECTOR {
        write(image, 0, &without)?;
    } else if fields_end > SECTOR {
        // Only with a data file's name, or unknown extensions, of hundreds of bytes: one write must do.
        if without.len() as u64 > cluster {
            return Err(limit(format!(
                "the backing file's name is too long for clusters of {cluster} bytes"
            )));
        }
        return write(image, 0, &without);
    } else {
        let old = Old::read(image)?;
        let after = |start: u64| old.place(start.max(SECTOR as u64), name, cluster);
        let Some(at) = after(table_end).or_else(|| after(fields_end as u64)) else {
            // Small clusters, in which there is no room for two such names.
            let place = cluster.checked_sub(name.len() as u64).filter(|&at| at >= fields_end as u64);
            let at = place.ok_or_else(|| {
                limit(format!("the backing file's name is too long for clusters of {cluster} bytes"))
            })?;
            let mut bytes = header.encode_with(false, Some(at));
            bytes.truncate(fields_end);
            bytes.resize(to_usize(at), 0);
            bytes.extend(name);
            return write(image, 0, &bytes);
        };
        if old.name != name || old.range.start != at {
            write(image, at, name)?;
        }
        write(image, 0, &header.encode_with(false, Some(at))[..fields_end])?;
        name_at = Some(at);
    }
    // The table of feature names, if it is worth it: if there is room for it.
    let name_at = match name_at {
        Some(at) if at < table_end => return Ok(()),
        Some(at) => at,
        None => table_end.max(SECTOR as u64),
    };
    if name_at + name.len() as u64 > cluster || !header.has_feature_names() {
        return Ok(());
    }
    let bytes = header.encode_with(true, Some(name_at));
    let behind = bytes.get(SECTOR..to_usize(table_end)).unwrap_or_default();
    if without.len() <= SECTOR {
        // The name is still in the first sector: here is its second place.
        write(image, SECTOR as u64, &[behind, name].concat())?;
    } else {
        write(image, SECTOR as u64, behind)?;
    }
    write(image, 0, &bytes[..SECTOR])
}

fn write(image: &ImageFile, at: u64, bytes: &[u8]) -> Result<(), OpenError> {
    image.write(at, bytes)?;
    image.sync()
}

/// The backing file's name as it is in the image.
struct Old {
    range: Range<u64>,
    name: Vec<u8>,
}

impl Old {
    fn read(image: &ImageFile) -> Result<Self, OpenError> {
        let head = image.read(0, 20, "the header")?;
        let (start, length) = (be64(&head, 8), u64::from(be32(&head, 16)));
        if start == 0 || length == 0 {
            return Ok(Self { range: 0..0, name: Vec::new() });
        }
        let name = image.read(start, length, "the backing file's name")?;
        Ok(Self { range: start..start + length, name })
    }

    /// A place for a new name at `start` or behind it that does not touch the old one; or that one, for the same name.
    fn place(&self, start: u64, name: &[u8], cluster: u64) -> Option<u64> {
        let length = name.len() as u64;
        if self.name == name && self.range.start >= start && self.range.end <= cluster {
            return Some(self.range.start);
        }
        let free =
            |&at: &u64| at + length <= cluster && (at + length <= self.range.start || at >= self.range.end);
        [start, self.range.end.max(start)].into_iter().find(free)
    }
}
