//! Discarding and zeroing: mostly changes of mappings.

use super::Qcow2;
use super::entry::{Cluster, Entry, Mapping};
use crate::IoError;
use crate::engine::View;
use crate::file::to_usize;

/// Most clusters changed under one lock, so that others get their turn.
const STEP: u64 = 4096;

impl Qcow2 {
    /// Gives back the clusters that lie within the range.
    pub(crate) async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        if !self.discard {
            return Ok(());
        }
        self.begin_write().await?;
        self.mark_dirty(offset, length);
        // Without zero clusters there is no way to keep what is below from showing through.
        let (has_zero, backed) = (self.header.version >= 3, self.backing.is_some());
        if backed && !has_zero {
            return Ok(());
        }
        let cleared = if backed { self.l2_format.zero(None) } else { Entry::default() };
        self.change_whole(offset, length, true, |cluster| match cluster.mapping {
            Mapping::Unallocated | Mapping::Zero { host: None, .. } => None,
            _ => Some(cleared),
        })
        .await
    }

    /// Makes the range read as zeroes.
    pub(crate) async fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<(), IoError> {
        if length == 0 {
            return Ok(());
        }
        self.begin_write().await?;
        self.mark_dirty(offset, length);
        let (end, cluster_size) = (offset + length, self.cluster_size());
        let whole = self.whole_clusters(offset, length);
        let (first, last) = (whole.start * cluster_size, (whole.end * cluster_size).min(end));
        if whole.is_empty() {
            let middle = end.min(offset.next_multiple_of(cluster_size));
            self.zero_part(offset, middle).await?;
            return self.zero_part(middle, end).await;
        }
        self.zero_part(offset, first).await?;
        self.zero_part(last, end).await?;
        let unmap = unmap && self.discard;
        if self.header.version >= 3 {
            let (backed, zero) = (self.backing.is_some(), self.l2_format.zero(None));
            let extended = self.l2_format.extended;
            self.change_whole(offset, length, unmap, |cluster| match cluster.mapping {
                Mapping::Unallocated => {
                    (backed && (!extended || cluster.bitmap != zero.bitmap)).then_some(zero)
                }
                Mapping::Zero { host: None, .. } => None,
                Mapping::Zero { host: Some(_), .. } => unmap.then_some(zero),
                Mapping::Data { host, copied: true } if !unmap => {
                    Some(self.l2_format.zero(Some((host, true))))
                }
                Mapping::Data { .. } | Mapping::Compressed { .. } => Some(zero),
            })
            .await
        } else if self.backing.is_none() {
            let there = |cluster: Cluster| cluster.mapping != Mapping::Unallocated;
            self.change_whole(offset, length, unmap, |c| there(c).then_some(Entry::default())).await
        } else {
            for cluster in whole {
                self.zero_part(cluster * cluster_size, ((cluster + 1) * cluster_size).min(end)).await?;
            }
            Ok(())
        }
    }

    /// The clusters that lie wholly within a range; the disk's last one may be cut by the disk's end.
    fn whole_clusters(&self, offset: u64, length: u64) -> std::ops::Range<u64> {
        let end = offset + length;
        let last = if end == self.size() { end.div_ceil(self.cluster_size()) } else { end >> self.bits() };
        offset.div_ceil(self.cluster_size())..last
    }

    /// Sets the entry of each whole cluster in the range to what `new` says for what it is, if anything.
    async fn change_whole(
        &self,
        offset: u64,
        length: u64,
        unmap: bool,
        new: impl Fn(Cluster) -> Option<Entry>,
    ) -> Result<(), IoError> {
        let clusters = self.whole_clusters(offset, length);
        let nothing_there = new(Cluster::UNALLOCATED).is_none();
        let mut at = clusters.start;
        while at < clusters.end {
            let table_end = self.table_end(at).min(clusters.end);
            let next = table_end.min(at + STEP);
            if nothing_there && self.no_table(at) && !self.external_raw() {
                at = table_end;
                continue;
            }
            let _mapped = self.mapping_locks.exclusive(at..next).await;
            if self.l2_format.external {
                self.clear_external(at << self.bits(), (next << self.bits()).min(offset + length), unmap)
                    .await?;
            }
            // In a table that a snapshot uses too, nothing may be kept to be overwritten later.
            let (clusters, own) = self.mappings(at, next - at).await?;
            let entries: Vec<Option<Entry>> = clusters
                .into_iter()
                .map(|cluster| match cluster.mapping {
                    Mapping::Data { host, .. } if !own => {
                        new(Cluster { mapping: Mapping::Data { host, copied: false }, ..cluster })
                    }
                    _ => new(cluster),
                })
                .collect();
            if entries.iter().any(Option::is_some) {
                self.commit(at, &entries).await?;
                self.limit_dropped().await?;
            }
            at = next;
        }
        Ok(())
    }

    /// The same in the external data file: its storage is given back, and one that is to be readable by itself has to
    /// hold the zeroes.
    async fn clear_external(&self, start: u64, end: u64, unmap: bool) -> Result<(), IoError> {
        if start >= end {
            return Ok(());
        }
        if self.external_raw() {
            return self.data().write_zeroes(start, end - start, unmap).await;
        }
        if unmap { self.data().discard(start, end - start).await } else { Ok(()) }
    }

    /// Writes zeroes to a part of one cluster, unless it reads as zeroes already.
    async fn zero_part(&self, start: u64, end: u64) -> Result<(), IoError> {
        if start >= end {
            return Ok(());
        }
        let _mapped = self.mapping_locks.exclusive(self.clusters(start, end - start)).await;
        let unit = self.unit();
        let (first, last) = (start.next_multiple_of(unit).min(end), (end - end % unit).max(start));
        if self.l2_format.extended && first < last {
            let (clusters, _) = self.mappings(start >> self.bits(), 1).await?;
            if !matches!(clusters[0].mapping, Mapping::Compressed { .. }) {
                self.zero_piece(start, first).await?;
                self.zero_units(first, last).await?;
                return self.zero_piece(last, end).await;
            }
        }
        self.zero_piece(start, end).await
    }

    async fn zero_piece(&self, start: u64, end: u64) -> Result<(), IoError> {
        if start >= end {
            return Ok(());
        }
        let runs = self.runs(start, end - start).await?;
        let zero_already = runs.iter().all(|run| match run.mapping {
            Mapping::Zero { .. } => true,
            Mapping::Unallocated => !self.backed(run.offset),
            _ => false,
        });
        if zero_already && !self.external_raw() {
            return Ok(());
        }
        self.write_locked(start, &View::zeroed(to_usize(end - start))).await
    }

    /// Marks whole subclusters of one cluster as zeroes.
    async fn zero_units(&self, start: u64, end: u64) -> Result<(), IoError> {
        if self.external_raw() {
            self.data().write_zeroes(start, end - start, false).await?;
        }
        let number = start >> self.bits();
        let base = number << self.bits();
        let cluster = self.mappings(number, 1).await?.0[0];
        let mask = self.l2_format.unit_mask(start - base, end - base);
        let bitmap = cluster.bitmap & !mask | mask << 32;
        let host = cluster.host();
        let entry = Entry { bitmap, ..self.l2_format.zero(host) };
        self.commit(number, &[Some(entry)]).await
    }
}
