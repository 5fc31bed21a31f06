//! The snapshot table (specification, "Snapshots"): read to keep away from what snapshots use.

use super::header::{Header, MAX_L1_BYTES, be32, be64};
use crate::OpenError;
use crate::chain::ImageFile;

/// Bytes of an entry before its extra data.
const FIXED: u64 = 40;
/// Most extra data; 24 bytes are specified so far.
const MAX_EXTRA: u32 = 1024;

/// One snapshot.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) l1_offset: u64,
    pub(crate) l1_size: u32,
    pub(crate) id: String,
    pub(crate) name: String,
    /// Seconds since 1970.
    pub(crate) date: u32,
    /// Bytes of saved machine state.
    pub(crate) vm_state_size: u64,
    /// Bytes of the disk.
    pub(crate) disk_size: u64,
}

/// The snapshots, and the bytes of their table.
pub(crate) fn read_snapshots(image: &ImageFile, header: &Header) -> Result<(Vec<Snapshot>, u64), OpenError> {
    let mut snapshots = Vec::new();
    let mut at = header.snapshots_offset;
    let corrupt = |what: String| Err(OpenError::corrupt(image.path(), what));
    for i in 0..header.snapshot_count {
        let fixed = image.read(at, FIXED, "the snapshot table")?;
        let id_len = u64::from(be32(&fixed, 12) >> 16);
        let name_len = u64::from(be32(&fixed, 12) & 0xffff);
        let extra_len = be32(&fixed, 36);
        if extra_len > MAX_EXTRA {
            return corrupt(format!("snapshot {i} has {extra_len} bytes of extra data"));
        }
        let rest = image.read(at + FIXED, u64::from(extra_len) + id_len + name_len, "the snapshot table")?;
        let (extra, strings) = rest.split_at(extra_len as usize);
        let (id, name) = strings.split_at(usize::try_from(id_len).unwrap_or(0).min(strings.len()));
        let snapshot = Snapshot {
            l1_offset: be64(&fixed, 0),
            l1_size: be32(&fixed, 8),
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            date: be32(&fixed, 16),
            vm_state_size: if extra.len() >= 8 { be64(extra, 0) } else { be32(&fixed, 32).into() },
            disk_size: if extra.len() >= 16 { be64(extra, 8) } else { header.size },
        };
        if u64::from(snapshot.l1_size) * 8 > MAX_L1_BYTES
            || !snapshot.l1_offset.is_multiple_of(header.cluster_size())
        {
            return corrupt(format!(
                "snapshot {i} has an L1 table of {} entries at {:#x}",
                snapshot.l1_size, snapshot.l1_offset
            ));
        }
        snapshots.push(snapshot);
        at = (at + FIXED + rest.len() as u64).next_multiple_of(8);
    }
    Ok((snapshots, at - header.snapshots_offset))
}
