//! New, empty images.

use std::os::unix::fs::FileExt;

use terem_crypt::{FileArea, Luks1Options, format_luks1};

use super::Qcow2;
use super::crypt::LUKS;
use super::entry::Cluster;
use super::header::{Header, MAX_L1_BYTES};
use super::refcount::RefcountFormat;
use crate::engine::View;
use crate::extent::ExtentKind;
use crate::file::to_usize;
use crate::format::NewImage;
use crate::{IoError, OpenError, Passphrase};

/// Writes an empty image; `header` says everything but where the tables are. With `luks` its data will be encrypted.
///
/// # Errors
/// What does not fit, or could not be written.
pub(crate) fn write_new(
    new: &NewImage<'_>,
    mut header: Header,
    luks: Option<(Luks1Options, &Passphrase)>,
) -> Result<(), OpenError> {
    let limit = |what| OpenError::Limit { path: new.path.to_owned(), what };
    let write = |bytes: &[u8], at| {
        let written = new.file.write_all_at(bytes, at);
        written.map_err(|e| OpenError::io(new.path, "writing the new image", e))
    };
    let cluster = header.cluster_size();
    let l1_entries = header.l1_needed(header.size);
    if l1_entries * 8 > MAX_L1_BYTES {
        let max = u128::from(MAX_L1_BYTES / 8) << (header.l2_format().table_bits() + header.cluster_bits);
        let size = header.size;
        return Err(limit(format!("{size} bytes are too much for clusters of {cluster} (at most {max})")));
    }
    // Cluster 0 is the header; then the refcount table, its blocks, the L1 table, the LUKS header.
    let l1_clusters = (l1_entries * 8).div_ceil(cluster);
    let luks_length = luks.as_ref().map_or(0, |(options, _)| options.data_offset());
    let rest = 1 + l1_clusters + luks_length.div_ceil(cluster);
    let counts = RefcountFormat::new(header.refcount_order, header.cluster_bits);
    let (mut table, mut blocks) = (1, 1);
    while (rest + table + blocks).div_ceil(counts.per_block()) > blocks
        || (blocks * 8).div_ceil(cluster) > table
    {
        blocks = (rest + table + blocks).div_ceil(counts.per_block());
        table = (blocks * 8).div_ceil(cluster);
    }
    let used = rest + table + blocks;
    header.l1_size = u32::try_from(l1_entries).unwrap_or(u32::MAX);
    header.l1_offset = (1 + table + blocks) * cluster;
    header.reftable_offset = cluster;
    header.reftable_clusters = u32::try_from(table).unwrap_or(u32::MAX);
    if luks.is_some() {
        header.crypt_method = LUKS;
        header.crypt_header = Some(((1 + table + blocks + l1_clusters) * cluster, luks_length));
    }
    let head = header.encode().map_err(limit)?;

    // Refcounts first, the header last: until then it is no image.
    new.set_len(used * cluster, used * cluster)?;
    let mut ones = vec![0; to_usize(blocks * cluster)];
    for i in 0..used {
        let (block, index) = counts.place(i);
        let at = to_usize(block * cluster);
        counts.set(&mut ones[at..at + to_usize(cluster)], index, 1);
    }
    write(&ones, (1 + table) * cluster)?;
    let entries: Vec<u8> = (0..blocks).flat_map(|i| ((1 + table + i) * cluster).to_be_bytes()).collect();
    write(&entries, cluster)?;
    if let Some(((options, passphrase), (offset, length))) = luks.zip(header.crypt_header) {
        let area = FileArea::new(new.file, offset, length);
        if let Err(error) = format_luks1(&area, &options, passphrase) {
            return Err(limit(error.to_string()));
        }
    }
    write(&head, 0)
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
                .map(|host| host << self.bits())
                .map(|host| match self.crypt {
                    None => Some(format.data(host, format.all_units(), 0)),
                    // What is there would be decrypted to anything.
                    Some(_) => Some(format.zero(Some((host, true)))),
                })
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
            // Encrypted data are left alone: clusters that were given their place are none yet.
            let data = extent.kind == ExtentKind::Data && self.crypt.is_some();
            if let Some(host) = extent.host.filter(|_| !data) {
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
