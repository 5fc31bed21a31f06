//! How large a new image would become.

use std::path::Path;

use serde::Serialize;

use crate::convert::request;
use crate::encryption;
use crate::{BlockBackend, CreateOptions, Disk, Format, OpenError, OpenOptions, Preallocation};

/// The bytes of a new image's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Measure {
    /// When it holds what the source holds.
    pub required: u64,
    /// When every part of the disk was written.
    pub fully_allocated: u64,
}

/// How large an image of a disk of `size` bytes would be.
///
/// # Errors
/// [`OpenError::Unsupported`] for formats that cannot say.
pub fn measure_size(size: u64, target: &CreateOptions) -> Result<Measure, OpenError> {
    measured(size, 0, target)
}

/// How large a copy of `source` would be.
///
/// # Errors
/// [`OpenError`] when the source cannot be opened or read.
pub fn measure(
    source: impl AsRef<Path>,
    options: &OpenOptions,
    target: &CreateOptions,
) -> Result<Measure, OpenError> {
    const LOOK_AHEAD: u64 = 256 << 20;
    let source = source.as_ref();
    let disk = Disk::open(source, &OpenOptions { read_only: true, ..options.clone() })?;
    let (size, cluster) = (disk.size(), u64::from(target.qcow2.cluster_size));
    if target.backing.is_some() {
        // What of it the backing file has cannot be known.
        return measured(size, size.next_multiple_of(cluster), target);
    }
    let (mut at, mut bytes, mut counted_to) = (0, 0, 0);
    while at < size {
        let length = LOOK_AHEAD.min(size - at);
        let status = disk.block_status(at, length);
        let extents = status.map_err(|e| request(source, "asking where data is", e))?;
        for extent in extents.iter().filter(|extent| !extent.is_zero()) {
            let start = (extent.offset - extent.offset % cluster).max(counted_to);
            let end = extent.end().next_multiple_of(cluster);
            bytes += end.saturating_sub(start);
            counted_to = counted_to.max(end);
        }
        at += length;
    }
    measured(size, bytes, target)
}

fn measured(size: u64, data: u64, target: &CreateOptions) -> Result<Measure, OpenError> {
    let size = target.size.unwrap_or(size).next_multiple_of(512);
    match target.format {
        Format::Raw => Ok(Measure { required: size, fully_allocated: size }),
        Format::Qcow2 => {
            let tables = crate::qcow2::measure(size, target)?;
            let fully_allocated = tables + size.next_multiple_of(u64::from(target.qcow2.cluster_size));
            let required = match target.preallocation {
                Preallocation::Falloc | Preallocation::Full => fully_allocated,
                _ => tables + data,
            };
            Ok(Measure { required, fully_allocated })
        }
        Format::Luks => {
            let header = encryption::Header::new(&target.encryption)
                .map_err(|source| OpenError::Encryption { path: "the target".into(), source })?;
            let all = header.data_offset() + size;
            Ok(Measure { required: all, fully_allocated: all })
        }
        #[allow(unreachable_patterns, reason = "there may be more formats than these two")]
        _ => Err(OpenError::Unsupported {
            path: "the target".into(),
            feature: format!("measuring {}", target.format.name()),
            hint: "raw and qcow2 can be measured",
        }),
    }
}
