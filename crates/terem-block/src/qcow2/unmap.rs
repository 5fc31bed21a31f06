//! Discarding and zeroing: mostly changes of mappings.

use super::Qcow2;
use super::entry::{COPIED, Mapping, ZERO};
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
        // Without zero clusters there is no way to keep what is below from showing through.
        let (has_zero, backed) = (self.header.version >= 3, self.backing.is_some());
        if backed && !has_zero {
            return Ok(());
        }
        let cleared = if backed { ZERO } else { 0 };
        self.change_whole(offset, length, |mapping| match mapping {
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
            let backed = self.backing.is_some();
            self.change_whole(offset, length, |mapping| match mapping {
                Mapping::Unallocated => backed.then_some(ZERO),
                Mapping::Zero { host: None, .. } => None,
                Mapping::Zero { host: Some(_), .. } => unmap.then_some(ZERO),
                Mapping::Data { host, copied: true } if !unmap => Some(host | COPIED | ZERO),
                Mapping::Data { .. } | Mapping::Compressed { .. } => Some(ZERO),
            })
            .await
        } else if self.backing.is_none() {
            self.change_whole(offset, length, |mapping| (mapping != Mapping::Unallocated).then_some(0)).await
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

    /// Sets the entry of each whole cluster in the range to what `new` says for its mapping, if anything.
    async fn change_whole(
        &self,
        offset: u64,
        length: u64,
        new: impl Fn(Mapping) -> Option<u64>,
    ) -> Result<(), IoError> {
        let clusters = self.whole_clusters(offset, length);
        let nothing_there = new(Mapping::Unallocated).is_none();
        let mut at = clusters.start;
        while at < clusters.end {
            let table_end = self.table_end(at).min(clusters.end);
            if nothing_there && self.no_table(at) {
                at = table_end;
                continue;
            }
            let next = table_end.min(at + STEP);
            let _mapped = self.mapping_locks.exclusive(at..next).await;
            // In a table that a snapshot uses too, nothing may be kept to be overwritten later.
            let (mappings, own) = self.mappings(at, next - at).await?;
            let entries: Vec<Option<u64>> = mappings
                .into_iter()
                .map(|mapping| match mapping {
                    Mapping::Data { host, .. } if !own => new(Mapping::Data { host, copied: false }),
                    mapping => new(mapping),
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

    /// Writes zeroes to a part of one cluster, unless it reads as zeroes already.
    async fn zero_part(&self, start: u64, end: u64) -> Result<(), IoError> {
        if start >= end {
            return Ok(());
        }
        let _mapped = self.mapping_locks.exclusive(self.clusters(start, end - start)).await;
        match self.mappings(start >> self.bits(), 1).await?.0[0] {
            Mapping::Zero { .. } => Ok(()),
            Mapping::Unallocated if !self.backed(start) => Ok(()),
            _ => self.write_locked(start, &View::zeroed(to_usize(end - start))).await,
        }
    }
}
