//! New refcounts for an image that was not closed properly ("dirty", with lazy refcounts).

use std::os::unix::fs::FileExt;

use super::check::References;
use super::header::{DIRTY, REFTABLE_AT};
use super::refcount::RefcountFormat;
use super::tables::Tables;
use crate::OpenError;
use crate::chain::ImageFile;

/// The refcount table's bytes are limited as in the header's check.
const MAX_REFTABLE_ENTRIES: u64 = (8 << 20) / 8;

/// Counts all references, writes refcounts for them after the end of all that is there, and then lets the
/// header refer to them, in one write that also clears the dirty bit. Until then the image is as it was.
///
/// # Errors
/// [`OpenError::Corrupt`] when the references make no sense; nothing is changed then.
pub(super) fn rebuild_refcounts(image: &ImageFile, tables: &Tables) -> Result<(), OpenError> {
    let header = &tables.header;
    let references = References::count(image, tables, 0)?;
    if let Some(first) = references.report.messages.first() {
        return Err(OpenError::corrupt(image.path(), first.clone()));
    }
    let format = RefcountFormat::new(header.refcount_order, header.cluster_bits);
    if references.counts.iter().any(|&count| u64::from(count) > format.max()) {
        return Err(OpenError::corrupt(image.path(), "a cluster has more references than can be counted"));
    }
    let (cluster, per_block) = (header.cluster_size(), format.per_block());
    let end = references.counts.len() as u64;
    let (mut blocks, mut table) = (1, 1);
    loop {
        let needed = (end + blocks + table).div_ceil(per_block);
        let table_needed = (needed * 8).div_ceil(cluster);
        if needed == blocks && table_needed == table {
            break;
        }
        (blocks, table) = (needed.max(blocks), table_needed.max(table));
    }
    let table_clusters = u32::try_from(table).ok().filter(|_| blocks <= MAX_REFTABLE_ENTRIES);
    let Some(table_clusters) = table_clusters else {
        let what = "it is too large for its refcounts to be rebuilt".into();
        return Err(OpenError::Limit { path: image.path().to_owned(), what });
    };

    let write = |bytes: &[u8], offset| {
        image
            .plain()
            .write_all_at(bytes, offset)
            .map_err(|e| OpenError::io(image.path(), "writing refcounts", e))
    };
    let sync = || image.plain().sync_data().map_err(|e| OpenError::io(image.path(), "writing refcounts", e));
    let mut entries = vec![0; usize::try_from(table * cluster).unwrap_or(0)];
    for block in 0..blocks {
        let mut bytes = vec![0; usize::try_from(cluster).unwrap_or(0)];
        for i in 0..per_block {
            let at = block * per_block + i;
            let index = usize::try_from(i).unwrap_or(usize::MAX);
            let counted = usize::try_from(at).ok().and_then(|at| references.counts.get(at).copied());
            let count = counted.unwrap_or(u32::from((end..end + blocks + table).contains(&at)));
            format.set(&mut bytes, index, count.into());
        }
        let offset = (end + block) * cluster;
        write(&bytes, offset)?;
        let at = usize::try_from(block * 8).unwrap_or(usize::MAX);
        entries[at..at + 8].copy_from_slice(&offset.to_be_bytes());
    }
    let table_offset = (end + blocks) * cluster;
    write(&entries, table_offset)?;
    sync()?;

    // Bytes 48 to 79: refcount table offset, clusters, snapshots (as they are), incompatible features.
    let mut fields = image.read(REFTABLE_AT, 32, "the header")?;
    fields[..8].copy_from_slice(&table_offset.to_be_bytes());
    fields[8..12].copy_from_slice(&table_clusters.to_be_bytes());
    fields[24..].copy_from_slice(&(header.incompatible & !DIRTY).to_be_bytes());
    write(&fields, REFTABLE_AT)?;
    sync()
}
