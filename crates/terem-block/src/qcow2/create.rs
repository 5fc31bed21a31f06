//! New, empty images of version 3.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;

use super::Qcow2;
use super::entry::COPIED;
use super::header::{EXT_BACKING_FORMAT, LAZY_REFCOUNTS, MAX_L1_BYTES, QCOW_MAGIC};
use crate::IoError;

/// Bytes of the header that is written: up to the compression type's padding.
const HEADER_LENGTH: u32 = 112;
/// Refcounts of 16 bits, as everybody uses.
const REFCOUNT_ORDER: u32 = 4;

/// What a new image is to be like.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    /// Bytes of the disk, a multiple of 512.
    pub(crate) size: u64,
    pub(crate) cluster_bits: u32,
    pub(crate) lazy_refcounts: bool,
    /// Name and format of the backing file.
    pub(crate) backing: Option<(String, String)>,
}

/// Writes an empty image into an empty file. `Err` with a text says what does not fit.
pub(crate) fn write_new(file: &fs::File, layout: &Layout) -> io::Result<Result<(), String>> {
    let cluster = 1u64 << layout.cluster_bits;
    let l1_entries = layout.size.div_ceil(cluster * (cluster / 8));
    if l1_entries * 8 > MAX_L1_BYTES {
        let max = MAX_L1_BYTES / 8 * (cluster / 8) * cluster;
        return Ok(Err(format!(
            "{} bytes are too much for clusters of {cluster} (at most {max})",
            layout.size
        )));
    }
    // Cluster 0 is the header; then the refcount table, its blocks, the L1 table.
    let l1_clusters = (l1_entries * 8).div_ceil(cluster);
    let per_block = (cluster * 8) >> REFCOUNT_ORDER;
    let (mut table, mut blocks) = (1, 1);
    while (1 + table + blocks + l1_clusters).div_ceil(per_block) > blocks
        || (blocks * 8).div_ceil(cluster) > table
    {
        blocks = (1 + table + blocks + l1_clusters).div_ceil(per_block);
        table = (blocks * 8).div_ceil(cluster);
    }
    let used = 1 + table + blocks + l1_clusters;

    let mut header = Vec::new();
    header.extend(QCOW_MAGIC);
    header.extend(3u32.to_be_bytes());
    // Backing file name: filled in below.
    header.extend([0; 12]);
    header.extend(layout.cluster_bits.to_be_bytes());
    header.extend(layout.size.to_be_bytes());
    header.extend(0u32.to_be_bytes()); // no encryption
    header.extend(u32::try_from(l1_entries).unwrap_or(u32::MAX).to_be_bytes());
    header.extend(((1 + table + blocks) * cluster).to_be_bytes());
    header.extend(cluster.to_be_bytes());
    header.extend(u32::try_from(table).unwrap_or(u32::MAX).to_be_bytes());
    header.extend([0; 12]); // no snapshots
    header.extend(0u64.to_be_bytes());
    header.extend(if layout.lazy_refcounts { LAZY_REFCOUNTS } else { 0 }.to_be_bytes());
    header.extend(0u64.to_be_bytes());
    header.extend(REFCOUNT_ORDER.to_be_bytes());
    header.extend(HEADER_LENGTH.to_be_bytes());
    header.extend([0; 8]); // compression type zlib, padding
    if let Some((name, format)) = &layout.backing {
        header.extend(EXT_BACKING_FORMAT.to_be_bytes());
        header.extend(u32::try_from(format.len()).unwrap_or(0).to_be_bytes());
        header.extend(format.bytes());
        header.resize(header.len().next_multiple_of(8), 0);
        header.extend([0; 8]); // end of the extensions
        let at = header.len() as u64;
        header[8..16].copy_from_slice(&at.to_be_bytes());
        header[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes());
        header.extend(name.bytes());
        if name.len() > 1023 || header.len() as u64 > cluster {
            return Ok(Err(format!("the backing file's name is too long for clusters of {cluster} bytes")));
        }
    } else {
        header.extend([0; 8]);
    }

    // Refcounts first, the header last: until then it is no image.
    file.set_len(used * cluster)?;
    let ones: Vec<u8> = (0..used).flat_map(|_| 1u16.to_be_bytes()).collect();
    file.write_all_at(&ones, (1 + table) * cluster)?;
    let entries: Vec<u8> = (0..blocks).flat_map(|i| ((1 + table + i) * cluster).to_be_bytes()).collect();
    file.write_all_at(&entries, cluster)?;
    file.write_all_at(&header, 0)?;
    Ok(Ok(()))
}

impl Qcow2 {
    /// Gives every cluster of an empty image its place in the file, without writing data. Returns the
    /// length that the file must have.
    pub(crate) async fn preallocate(&self) -> Result<u64, IoError> {
        let clusters = self.header.size.div_ceil(self.cluster_size());
        let (mut at, mut end) = (0, 0);
        while at < clusters {
            let (first, count) = self.allocate(self.table_end(at).min(clusters) - at).await?;
            let entries: Vec<_> = (first..first + count).map(|c| Some(c << self.bits() | COPIED)).collect();
            self.commit(at, &entries).await?;
            at += count;
            end = end.max((first + count) << self.bits());
        }
        Ok(end)
    }
}
