//! Counts all references of an image, and compares them with what its refcounts say.

use std::collections::HashSet;

use super::bitmap::read_bitmaps;
use super::entry::{COPIED, Cluster, Mapping, OFFSET};
use super::header::BITMAPS;
use super::refcount::RefcountFormat;
use super::tables::{Tables, read_table};
use crate::chain::ImageFile;
use crate::check::CheckReport;
use crate::{FileRun, FileUse, OpenError};

/// Most clusters of a file that is checked; bounds memory to 1 GiB.
const MAX_CLUSTERS: u64 = 1 << 27;
/// References of each host cluster.
pub(super) struct References {
    cluster_bits: u32,
    /// Where the active disk's next cluster would go on.
    next_host: u64,
    pub(super) counts: Vec<u32>,
    pub(super) report: CheckReport,
}

/// Checks a qcow2 image's consistency without changing it.
pub(crate) fn check_image(image: &ImageFile, tables: &Tables) -> Result<CheckReport, OpenError> {
    let mut references = References::count(image, tables, 0)?;
    references.count_refcount_structures(image, tables);
    let stored = stored_counts(image, tables, references.counts.len())?;
    let mut report = references.report;
    for (cluster, (&stored, &counted)) in stored.iter().zip(&references.counts).enumerate() {
        if stored < counted {
            report.error(format!("cluster {cluster:#x} has refcount {stored}, and {counted} references"));
        } else if stored > counted {
            report.leaks += 1;
        }
        if counted > 0 || stored > 0 {
            report.image_end = (cluster as u64 + 1) << tables.header.cluster_bits;
        }
    }
    check_copied(image, tables, &stored, &mut report)?;
    Ok(report)
}

impl References {
    /// Counts the references of all structures but the refcounts' own, in the file or its first `clusters`.
    ///
    /// # Errors
    /// [`OpenError`] when the image cannot be read; what is wrong in it is in the report.
    pub(super) fn count(image: &ImageFile, tables: &Tables, clusters: u64) -> Result<Self, OpenError> {
        let header = &tables.header;
        let clusters = image.len().div_ceil(header.cluster_size()).max(clusters);
        if clusters > MAX_CLUSTERS {
            let what = format!("{clusters} clusters are too many to check");
            return Err(OpenError::Limit { path: image.path().to_owned(), what });
        }
        let report = CheckReport {
            total_clusters: header.size.div_ceil(header.cluster_size()),
            ..CheckReport::default()
        };
        let counts = vec![0; usize::try_from(clusters).unwrap_or(0)];
        let mut this = Self { cluster_bits: header.cluster_bits, next_host: 0, counts, report };
        this.add(0, header.cluster_size(), "the header");
        this.count_tree(image, tables, header.l1_offset, &tables.l1, true)?;
        for snapshot in &tables.snapshots {
            let bytes = u64::from(snapshot.l1_size) * 8;
            let l1 = read_table(image, snapshot.l1_offset, bytes, "a snapshot's L1 table")?;
            this.count_tree(image, tables, snapshot.l1_offset, &l1, false)?;
        }
        this.add(header.snapshots_offset, tables.snapshot_bytes, "the snapshot table");
        if let Some((offset, bytes)) = header.crypt_header {
            this.add(offset, bytes, "the encryption header");
        }
        if header.autoclear & BITMAPS != 0 {
            this.count_bitmaps(image, tables)?;
        }
        Ok(this)
    }

    fn add(&mut self, offset: u64, bytes: u64, what: &str) {
        if bytes == 0 {
            return;
        }
        let last = offset.saturating_add(bytes - 1) >> self.cluster_bits;
        for cluster in offset >> self.cluster_bits..=last {
            match usize::try_from(cluster).ok().and_then(|c| self.counts.get_mut(c)) {
                Some(count) => *count = count.saturating_add(1),
                None => {
                    self.report.error(format!("{what} at {offset:#x} is beyond the end of the file"));
                    return;
                }
            }
        }
    }

    /// Counts an L1 table, its L2 tables and what they refer to.
    fn count_tree(
        &mut self,
        image: &ImageFile,
        tables: &Tables,
        offset: u64,
        l1: &[u64],
        active: bool,
    ) -> Result<(), OpenError> {
        let (bits, cluster) = (self.cluster_bits, tables.header.cluster_size());
        self.add(offset, l1.len() as u64 * 8, "an L1 table");
        let mut seen = HashSet::new();
        for l2_offset in l1.iter().map(|e| e & OFFSET).filter(|&o| o != 0) {
            if !l2_offset.is_multiple_of(cluster) || l2_offset + cluster > image.len() {
                self.report.error(format!("an L1 entry refers to {l2_offset:#x}"));
                continue;
            }
            self.add(l2_offset, cluster, "an L2 table");
            // As QEMU: what is in a row is told table by table.
            self.next_host = 0;
            if !seen.insert(l2_offset) {
                self.report.error(format!("two L1 entries refer to {l2_offset:#x}"));
                continue;
            }
            let format = tables.header.l2_format();
            for entry in format.entries(&image.read(l2_offset, cluster, "an L2 table")?) {
                match format.decode(entry) {
                    Ok(found) => self.count_cluster(image, &found, bits, active, format.external),
                    Err(what) => self.report.error(what),
                }
            }
        }
        Ok(())
    }

    fn count_cluster(&mut self, image: &ImageFile, found: &Cluster, bits: u32, active: bool, external: bool) {
        match found.mapping {
            Mapping::Unallocated | Mapping::Zero { host: None, .. } => return,
            Mapping::Compressed { .. } if external => {
                self.report.error("a compressed cluster with an external data file".into());
            }
            Mapping::Compressed { host, length } => {
                self.report.compressed_clusters += u64::from(active);
                let there = image.len().saturating_sub(host).max(1);
                self.add(host, length.min(there), "a compressed cluster");
            }
            Mapping::Zero { host: Some(_), .. } | Mapping::Data { .. } if external => {}
            Mapping::Zero { host: Some(host), .. } | Mapping::Data { host, .. } => {
                self.add(host, 1 << bits, "a data cluster");
            }
        }
        if active {
            self.report.allocated_clusters += 1;
            let host = found.host().map(|(host, _)| host);
            // Compressed clusters never count as lying in a row.
            let fragmented = host.is_none_or(|host| self.next_host != 0 && host != self.next_host);
            self.report.fragmented_clusters += u64::from(fragmented);
            self.next_host = host.map_or(self.next_host, |host| host + (1 << bits));
        }
    }

    /// Counts the bitmaps (specification, "Bitmaps").
    fn count_bitmaps(&mut self, image: &ImageFile, tables: &Tables) -> Result<(), OpenError> {
        let Some((offset, bytes, _)) = tables.header.bitmaps else { return Ok(()) };
        let bitmaps = match read_bitmaps(image, &tables.header) {
            Ok(bitmaps) => bitmaps,
            Err(OpenError::Corrupt { what, .. }) => {
                self.report.error(what);
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        self.add(offset, bytes, "the bitmap directory");
        for bitmap in bitmaps {
            self.add(bitmap.table_offset, bitmap.table.len() as u64 * 8, "a bitmap table");
            for entry in bitmap.table.iter().map(|entry| entry & OFFSET).filter(|&offset| offset != 0) {
                self.add(entry, 1 << self.cluster_bits, "a bitmap's cluster");
            }
        }
        Ok(())
    }

    pub(super) fn count_refcount_structures(&mut self, image: &ImageFile, tables: &Tables) {
        let cluster = tables.header.cluster_size();
        self.add(tables.header.reftable_offset, tables.reftable.len() as u64 * 8, "the refcount table");
        for block in tables.reftable.iter().map(|e| e & OFFSET).filter(|&b| b != 0) {
            if !block.is_multiple_of(cluster) || block + cluster > image.len() {
                self.report.error(format!("a refcount table entry refers to {block:#x}"));
            } else {
                self.add(block, cluster, "a refcount block");
            }
        }
    }
}

/// The refcounts as stored, of `clusters` clusters.
fn stored_counts(image: &ImageFile, tables: &Tables, clusters: usize) -> Result<Vec<u32>, OpenError> {
    let cluster = tables.header.cluster_size();
    let format = RefcountFormat::new(tables.header.refcount_order, tables.header.cluster_bits);
    let per_block = usize::try_from(format.per_block()).unwrap_or(usize::MAX);
    let mut stored = vec![0; clusters];
    for (part, entry) in stored.chunks_mut(per_block).zip(&tables.reftable) {
        let offset = entry & OFFSET;
        if offset == 0 || !offset.is_multiple_of(cluster) || offset + cluster > image.len() {
            continue;
        }
        let block = image.read(offset, cluster, "a refcount block")?;
        for (i, count) in part.iter_mut().enumerate() {
            *count = u32::try_from(format.get(&block, i)).unwrap_or(u32::MAX);
        }
    }
    Ok(stored)
}

/// "Copied" must be set exactly where the refcount is one, in the active tables.
fn check_copied(
    image: &ImageFile,
    tables: &Tables,
    stored: &[u32],
    report: &mut CheckReport,
) -> Result<(), OpenError> {
    let bits = tables.header.cluster_bits;
    let cluster = tables.header.cluster_size();
    let count = |offset: u64| usize::try_from(offset >> bits).ok().and_then(|c| stored.get(c).copied());
    let mut seen = HashSet::new();
    for &entry in &tables.l1 {
        let l2 = entry & OFFSET;
        if l2 == 0 || !l2.is_multiple_of(cluster) || l2 + cluster > image.len() || !seen.insert(l2) {
            continue;
        }
        if (entry & COPIED != 0) != (count(l2) == Some(1)) {
            report.error(format!("an L1 entry's copied flag is wrong for {l2:#x}"));
        }
        let format = tables.header.l2_format();
        for entry in format.entries(&image.read(l2, cluster, "an L2 table")?) {
            let Ok(found) = format.decode(entry) else { continue };
            if matches!(found.mapping, Mapping::Compressed { .. }) && entry.descriptor & COPIED != 0 {
                report.error("a compressed cluster has the copied flag".into());
            }
            // Clusters of an external file are always ours alone.
            let Some((host, copied)) = found.host() else { continue };
            if copied != (format.external || count(host) == Some(1)) {
                report.error(format!("an L2 entry's copied flag is wrong for {host:#x}"));
            }
        }
    }
    Ok(())
}

/// What lies where in an image's file.
pub(crate) fn file_map(image: &ImageFile) -> Result<Vec<FileRun>, OpenError> {
    let tables = Tables::read(image, super::header::Header::read(image)?)?;
    let cluster = tables.header.cluster_size();
    let mut references = References::count(image, &tables, 0)?;
    references.count_refcount_structures(image, &tables);
    let stored = stored_counts(image, &tables, references.counts.len())?;
    // Whatever is counted and none of what follows belongs to snapshots or bitmaps.
    let mut uses: Vec<Option<FileUse>> = references
        .counts
        .iter()
        .zip(&stored)
        .map(|(&counted, &stored)| match (counted, stored) {
            (0, 0) => None,
            (0, _) => Some(FileUse::Leaked),
            _ => Some(FileUse::Snapshot),
        })
        .collect();
    let mut mark = |offset: u64, bytes: u64, what: FileUse| {
        if bytes == 0 {
            return;
        }
        for number in offset / cluster..=offset.saturating_add(bytes - 1) / cluster {
            match usize::try_from(number).ok().and_then(|number| uses.get_mut(number)) {
                Some(place) => *place = Some(what),
                None => break,
            }
        }
    };
    mark(0, cluster, FileUse::Table);
    mark(tables.header.l1_offset, tables.l1.len() as u64 * 8, FileUse::Table);
    mark(tables.header.snapshots_offset, tables.snapshot_bytes, FileUse::Table);
    if let Some((offset, bytes)) = tables.header.crypt_header {
        mark(offset, bytes, FileUse::Table);
    }
    mark(tables.header.reftable_offset, tables.reftable.len() as u64 * 8, FileUse::Refcounts);
    for block in tables.reftable.iter().map(|entry| entry & OFFSET).filter(|&offset| offset != 0) {
        mark(block, cluster, FileUse::Refcounts);
    }
    let format = tables.header.l2_format();
    let mut seen = HashSet::new();
    for offset in tables.l1.iter().map(|entry| entry & OFFSET).filter(|&offset| offset != 0) {
        if !offset.is_multiple_of(cluster) || offset + cluster > image.len() || !seen.insert(offset) {
            continue;
        }
        mark(offset, cluster, FileUse::Table);
        for entry in format.entries(&image.read(offset, cluster, "an L2 table")?) {
            let Ok(found) = format.decode(entry) else { continue };
            let (first, count) = found.host_clusters(tables.header.cluster_bits);
            if format.external && found.host().is_some() {
                continue;
            }
            let compressed = matches!(found.mapping, Mapping::Compressed { .. });
            mark(
                first * cluster,
                count * cluster,
                if compressed { FileUse::Compressed } else { FileUse::Data },
            );
        }
    }
    let mut runs: Vec<FileRun> = Vec::new();
    for (number, what) in uses.iter().enumerate() {
        let (offset, Some(what)) = (number as u64 * cluster, *what) else { continue };
        match runs.last_mut() {
            Some(run) if run.what == what && run.offset + run.length == offset => run.length += cluster,
            _ => runs.push(FileRun { offset, length: cluster, what }),
        }
    }
    Ok(runs)
}
