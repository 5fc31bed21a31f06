//! From guest clusters to mappings, and changes of mappings.

use super::Qcow2;
use super::entry::{COPIED, Cluster, Entry, OFFSET};
use super::image::Dropped;
use super::metadata::Writing;
use crate::IoError;
use crate::file::to_usize;

impl Qcow2 {
    /// log2 of the entries in an L2 table.
    fn l2_bits(&self) -> u32 {
        self.l2_format.table_bits()
    }

    /// Place of a guest cluster in the L1 table and in its L2 table.
    pub(super) fn place(&self, cluster: u64) -> (usize, usize) {
        (to_usize(cluster >> self.l2_bits()), to_usize(cluster & ((1 << self.l2_bits()) - 1)))
    }

    /// The end of the guest clusters that share `cluster`'s L2 table.
    pub(super) fn table_end(&self, cluster: u64) -> u64 {
        ((cluster >> self.l2_bits()) + 1) << self.l2_bits()
    }

    fn l1_entry(&self, l1_index: usize) -> u64 {
        self.l1.borrow().get(l1_index).copied().unwrap_or(0)
    }

    /// Whether there is no L2 table at all for `cluster`.
    pub(super) fn no_table(&self, cluster: u64) -> bool {
        self.l1_entry(self.place(cluster).0) & OFFSET == 0
    }

    /// Whether clusters that are not allocated here read as something else than zeroes.
    pub(super) fn backed(&self, offset: u64) -> bool {
        self.backing.as_ref().is_some_and(|backing| offset < backing.size())
    }

    /// Makes the L2 table present, or returns `None` where there is none. It stays until the next await.
    async fn present_l2(&self, l1_index: usize) -> Result<Option<u64>, IoError> {
        loop {
            let offset = self.l1_entry(l1_index) & OFFSET;
            if offset == 0 {
                return Ok(None);
            }
            if !offset.is_multiple_of(self.cluster_size()) {
                return Err(IoError::Corrupt(format!("an L1 entry refers to {offset:#x}")));
            }
            if !self.l2.contains(offset) {
                while !self.l2.make_room() {
                    self.write_back(true, false).await?;
                }
                self.l2.load(&self.file, offset).await?;
            }
            // It may have moved meanwhile.
            if self.l1_entry(l1_index) & OFFSET == offset && self.l2.contains(offset) {
                return Ok(Some(offset));
            }
        }
    }

    /// What `count` clusters from `first` on are, all of one L2 table, and whether that table is ours alone (if not,
    /// nothing it refers to may be overwritten).
    pub(super) async fn mappings(&self, first: u64, count: u64) -> Result<(Vec<Cluster>, bool), IoError> {
        let (l1_index, l2_index) = self.place(first);
        let count = to_usize(count);
        let Some(offset) = self.present_l2(l1_index).await? else {
            return Ok((vec![Cluster::UNALLOCATED; count], true));
        };
        let own = self.l1_entry(l1_index) & COPIED != 0;
        let format = self.l2_format;
        let decoded = self.l2.with(offset, |table| {
            let entries = table.get(format.bytes(l2_index, count)).unwrap_or_default();
            format.entries(entries).map(|entry| format.decode(entry)).collect()
        });
        let decoded: Result<Vec<_>, _> = decoded.unwrap_or_else(|| Err("a table has gone".into()));
        Ok((decoded.map_err(IoError::Corrupt)?, own))
    }

    /// Sets the entries of clusters from `first` on (of one L2 table) to `entries`, where it is not `None`.
    /// The references of what was there before are dropped. The caller holds the clusters exclusively.
    pub(super) async fn commit(&self, first: u64, entries: &[Option<Entry>]) -> Result<(), IoError> {
        let (l1_index, l2_index) = self.place(first);
        let offset = self.own_l2(l1_index).await?;
        let format = self.l2_format;
        let range = format.bytes(l2_index, entries.len());
        let mut dropped = self.dropped.borrow_mut();
        self.l2.change(offset, range.clone(), |table| {
            let places = table.get_mut(range).unwrap_or_default().chunks_exact_mut(format.entry_size());
            for (place, new) in places.zip(entries) {
                let Some(new) = new else { continue };
                let old = format.entries(place).next().unwrap_or_default();
                // What cannot be decoded was found before; nothing is lost by leaving its cluster alone.
                let cluster = format.decode(old).unwrap_or(Cluster::UNALLOCATED);
                let (first, count) = cluster.host_clusters(format.cluster_bits);
                let kept = cluster.host().is_some_and(|(host, _)| host == new.descriptor & OFFSET);
                // Clusters of an external file have no counts.
                if count > 0 && !kept && !(format.external && cluster.host().is_some()) {
                    dropped.push(Dropped { first, count });
                }
                format.put(place, *new);
            }
        });
        Ok(())
    }

    /// Whether there is an L2 table that only the active image uses. A damaged entry may say so of no table at all.
    fn has_own_l2(&self, l1_index: usize) -> bool {
        let entry = self.l1_entry(l1_index);
        entry & COPIED != 0 && entry & OFFSET != 0
    }

    /// Makes an L2 table present that may be changed: a new one where there was none, a copy where a
    /// snapshot uses it too.
    async fn own_l2(&self, l1_index: usize) -> Result<u64, IoError> {
        loop {
            if self.has_own_l2(l1_index)
                && let Some(offset) = self.present_l2(l1_index).await?
            {
                let cluster = self.cluster_size();
                if let Err(what) = self.metadata.check(offset, cluster, Writing::L2Table) {
                    return Err(self.found_corrupt(format!("an L2 table lies in the {what}")).await);
                }
                return Ok(offset);
            }
            let _one = self.making_l2.all().await;
            if !self.has_own_l2(l1_index) {
                self.make_l2(l1_index).await?;
            }
        }
    }

    async fn make_l2(&self, l1_index: usize) -> Result<(), IoError> {
        let old = self.present_l2(l1_index).await?;
        // A shared table is never changed, so the copy stays right while we wait.
        let bytes = match old {
            Some(old) => self.l2.with(old, <[u8]>::to_vec).unwrap_or_default(),
            None => vec![0; to_usize(self.cluster_size())],
        };
        while !self.l2.make_room() {
            self.write_back(true, false).await?;
        }
        let new = self.allocate_metadata().await?;
        self.l2.insert_new(new, bytes);
        self.metadata.add_l2(new);
        if let Some(entry) = self.l1.borrow_mut().get_mut(l1_index) {
            *entry = new | COPIED;
        }
        self.l1_dirty.borrow_mut().insert(l1_index);
        if let Some(old) = old {
            self.l2.remove(old);
            self.metadata.remove_l2(old);
            self.dropped.borrow_mut().push(Dropped { first: old >> self.bits(), count: 1 });
        }
        Ok(())
    }
}
