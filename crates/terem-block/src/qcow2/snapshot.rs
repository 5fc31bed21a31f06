//! The snapshot table (specification, "Snapshots").

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
    /// Seconds since 1970, and nanoseconds.
    pub(crate) date: u32,
    pub(crate) date_nsec: u32,
    /// How long the machine had run, in nanoseconds.
    pub(crate) vm_clock: u64,
    /// Bytes of saved machine state.
    pub(crate) vm_state_size: u64,
    /// Bytes of the disk.
    pub(crate) disk_size: u64,
    /// Extra data after those two, only kept (the first 8 bytes count instructions).
    pub(crate) more: Vec<u8>,
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
            date_nsec: be32(&fixed, 20),
            vm_clock: be64(&fixed, 24),
            vm_state_size: if extra.len() >= 8 { be64(extra, 0) } else { be32(&fixed, 32).into() },
            disk_size: if extra.len() >= 16 { be64(extra, 8) } else { header.size },
            more: extra.get(16..).unwrap_or_default().to_vec(),
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

/// The bytes of the snapshot table.
pub(crate) fn encode_snapshots(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut table = Vec::new();
    let len16 = |text: &str| u16::try_from(text.len()).unwrap_or(u16::MAX);
    for s in snapshots {
        table.extend(s.l1_offset.to_be_bytes());
        table.extend(s.l1_size.to_be_bytes());
        table.extend(len16(&s.id).to_be_bytes());
        table.extend(len16(&s.name).to_be_bytes());
        table.extend(s.date.to_be_bytes());
        table.extend(s.date_nsec.to_be_bytes());
        table.extend(s.vm_clock.to_be_bytes());
        table.extend(u32::try_from(s.vm_state_size).unwrap_or(0).to_be_bytes());
        table.extend(u32::try_from(16 + s.more.len()).unwrap_or(16).to_be_bytes());
        table.extend(s.vm_state_size.to_be_bytes());
        table.extend(s.disk_size.to_be_bytes());
        table.extend(&s.more);
        table.extend(s.id.bytes().take(len16(&s.id).into()));
        table.extend(s.name.bytes().take(len16(&s.name).into()));
        table.resize(table.len().next_multiple_of(8), 0);
    }
    table
}
