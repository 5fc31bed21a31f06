//! New, empty images.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;

use super::Qcow2;
use super::entry::Cluster;
use super::header::{Header, MAX_L1_BYTES};
use super::refcount::RefcountFormat;
use crate::IoError;
use crate::engine::View;
use crate::file::to_usize;

/// Writes an empty image into an empty file; `header` says everything but where the tables are. `Err` with a text says
/// what does not fit.
pub(crate) fn write_new(file: &fs::File, mut header: Header) -> io::Result<Result<(), String>> {
    let cluster = header.cluster_size();
    let l1_entries = header.l1_needed(header.size);
    if l1_entries * 8 > MAX_L1_BYTES {
        let max = u128::from(MAX_L1_BYTES / 8) << (header.l2_format().table_bits() + header.cluster_bits);
        let size = header.size;
        return Ok(Err(format!("{size} bytes are too much for clusters of {cluster} (at most {max})")));
    }
    // Cluster 0 is the header; then the refcount table, its blocks, the L1 table.
    let l1_clusters = (l1_entries * 8).div_ceil(cluster);
    let counts = RefcountFormat::new(header.refcount_order, header.cluster_bits);
    let (mut table, mut blocks) = (1, 1);
    while (1 + table + blocks + l1_clusters).div_ceil(counts.per_block()) > blocks
        || (blocks * 8).div_ceil(cluster) > table
    {
        blocks = (1 + table + blocks + l1_clusters).div_ceil(counts.per_block());
        table = (blocks * 8).div_ceil(cluster);
    }
    let used = 1 + table + blocks + l1_clusters;
    header.l1_size = u32::try_from(l1_entries).unwrap_or(u32::MAX);
    header.l1_offset = (1 + table + blocks) * cluster;
    header.reftable_offset = cluster;
    header.reftable_clusters = u32::try_from(table).unwrap_or(u32::MAX);
    let head = match header.encode() {
        Ok(head) => head,
        Err(what) => return Ok(Err(what)),
    };

    // Refcounts first, the header last: until then it is no image.
    file.set_len(used * cluster)?;
    let mut ones = vec![0; to_usize(blocks * cluster)];
    for i in 0..used {
        let (block, index) = counts.place(i);
        let at = to_usize(block * cluster);
        counts.set(&mut ones[at..at + to_usize(cluster)], index, 1);
    }
    file.write_all_at(&ones, (1 + table) * cluster)?;
    let entries: Vec<u8> = (0..blocks).flat_map(|i| ((1 + table + i) * cluster).to_be_bytes()).collect();
    file.write_all_at(&entries, cluster)?;
    file.write_all_at(&head, 0)?;
    Ok(Ok(()))
}

impl Qcow2 {
    /// Gives every cluster from byte `from` of the disk on that has none its place in the file, without writing data.
    /// Returns the length that the image's file must have.
    pub(crate) async fn preallocate(&self, from: u64) -> Result<u64, IoError> {
        self.begin_write().await?;
        let clusters = self.header.size.div_ceil(self.cluster_size());
        let (mut at, mut end) = (from >> self.bits(), 0);
        while at < clusters {
            let until = self.table_end(at).min(clusters);
            let mappings = self.mappings(at, until - at).await?.0;
            let there = |cluster: &Cluster| *cluster != Cluster::UNALLOCATED;
            if there(&mappings[0]) {
                at += 1;
                continue;
            }
            let want = mappings.iter().take_while(|cluster| !there(cluster)).count() as u64;
            let (first, count) = self.allocate_data(at, want).await?;
            let format = self.l2_format;
            let entries: Vec<_> = (first..first + count)
                .map(|host| Some(format.data(host << self.bits(), format.all_units(), 0)))
                .collect();
            self.commit(at, &entries).await?;
            self.limit_dropped().await?;
            at += count;
            end = end.max((first + count) << self.bits());
        }
        Ok(if self.l2_format.external { 0 } else { end })
    }

    /// Calls `each` with the host offset and length of all data from byte `from` of the disk on.
    async fn each_run(
        &self,
        from: u64,
        each: impl AsyncFn(u64, u64) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        const STEP: u64 = 1 << 20;
        let mut at = from;
        while at < self.size() {
            let extent = self.status(at, STEP.min(self.size() - at)).await?;
            if let Some(host) = extent.host {
                each(host, extent.length).await?;
            }
            at = extent.end();
        }
        Ok(())
    }

    /// Gives all clusters from byte `from` of the disk on storage.
    pub(crate) async fn reserve_clusters(&self, from: u64) -> Result<(), IoError> {
        self.each_run(from, async |host, length| self.data().reserve(host, length).await).await
    }

    /// Writes zeroes into all clusters from byte `from` of the disk on.
    pub(crate) async fn fill_with_zeroes(&self, from: u64) -> Result<(), IoError> {
        let zeroes = View::zeroed(1 << 20);
        self.each_run(from, async |host, length| {
            self.data().write(host, &[zeroes.part(0, to_usize(length))]).await
        })
        .await
    }
}

/// Bytes of all tables of an image with every cluster of its disk in use.
pub(crate) fn metadata_size(header: &Header) -> u64 {
    let (cluster, format) = (header.cluster_size(), header.l2_format());
    let entries = header.size.div_ceil(cluster).next_multiple_of(1 << format.table_bits());
    let l2 = entries << if format.extended { 4 } else { 3 };
    let l1 = (l2 / cluster * 8).next_multiple_of(cluster);
    let tables = cluster + l2 + l1;
    let clusters = (tables + header.size.next_multiple_of(cluster)) / cluster;
    let per_block = RefcountFormat::new(header.refcount_order, header.cluster_bits).per_block();
    let (mut blocks, mut table) = (0, 0);
    loop {
        let needed = (clusters + blocks + table).div_ceil(per_block);
        let table_needed = (needed * 8).div_ceil(cluster);
        if (needed, table_needed) == (blocks, table) {
            return tables + (blocks + table) * cluster;
        }
        (blocks, table) = (needed, table_needed);
    }
}
