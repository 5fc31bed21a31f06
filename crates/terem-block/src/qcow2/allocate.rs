//! Host clusters: which are free, taking them and giving them back.

use super::Qcow2;
use super::entry::OFFSET;
use super::header::REFTABLE_AT;
use super::image::Dropped;
use super::metadata::Writing;
use crate::IoError;
use crate::file::to_usize;

/// End of the offsets that a table entry can hold.
const MAX_OFFSET: u64 = 1 << 56;
/// The refcount table's bytes are limited as in the header's check.
const MAX_REFTABLE_ENTRIES: u64 = (8 << 20) / 8;

impl Qcow2 {
    /// Takes up to `want` free clusters in a row (at least one): the first, and how many. Their refcounts
    /// are one from now on; nothing refers to them yet.
    pub(super) async fn allocate(&self, want: u64) -> Result<(u64, u64), IoError> {
        let _one = self.allocating.all().await;
        self.reclaim_locked().await?;
        self.take(want).await
    }

    /// Takes a cluster for metadata, with storage behind it, so that writing it back cannot fail for want of
    /// space. Returns its offset.
    pub(super) async fn allocate_metadata(&self) -> Result<u64, IoError> {
        let (cluster, _) = self.allocate(1).await?;
        let offset = cluster << self.bits();
        if let Err(e) = self.file.reserve(offset, self.cluster_size()).await {
            self.give_back(cluster, 1).await?;
            return Err(e);
        }
        Ok(offset)
    }

    /// No cluster can be at this offset of the file or beyond it.
    fn end(&self) -> u64 {
        if self.file.is_block_device() { self.file.len() } else { MAX_OFFSET }
    }

    pub(super) async fn take(&self, want: u64) -> Result<(u64, u64), IoError> {
        loop {
            let from = self.first_free.get();
            let (index, place) = self.counts.place(from);
            let Some(block) = self.present_block(index).await? else {
                self.make_block(index, from).await?;
                continue;
            };
            let (counts, per_block) = (self.counts, to_usize(self.counts.per_block()));
            let found = self.blocks.with(block, |b| {
                let first = (place..per_block).find(|&i| counts.get(b, i) == 0)?;
                let end = per_block.min(first.saturating_add(to_usize(want)));
                Some(first..(first + 1..end).find(|&i| counts.get(b, i) != 0).unwrap_or(end))
            });
            let base = index * self.counts.per_block();
            let Some(run) = found.flatten() else {
                self.first_free.set(base + self.counts.per_block());
                continue;
            };
            let first = base + run.start as u64;
            let room = (self.end() >> self.bits()).saturating_sub(first);
            let run = run.start..run.end.min(run.start.saturating_add(to_usize(room)));
            let count = run.len() as u64;
            if count == 0 {
                return Err(IoError::NoSpace);
            }
            let bytes = count << self.bits();
            if let Err(what) = self.metadata.check(first << self.bits(), bytes, Writing::Data) {
                let what =
                    format!("a cluster of the {what} at or after {:#x} counts as free", first << self.bits());
                return Err(self.found_corrupt(what).await);
            }
            let dirty = counts.bytes(run.start).start..counts.bytes(run.end - 1).end;
            self.blocks.change(block, dirty, |b| run.for_each(|i| counts.set(b, i, 1)));
            self.first_free.set(first + count);
            return Ok((first, count));
        }
    }

    /// Counts one more reference of a cluster in use; false where that cannot be. The caller holds `allocating`.
    pub(super) async fn count_up(&self, cluster: u64) -> Result<bool, IoError> {
        let (index, place) = self.counts.place(cluster);
        let counts = self.counts;
        let Some(block) = self.present_block(index).await? else { return Ok(false) };
        let count = self.blocks.with(block, |b| counts.get(b, place)).unwrap_or(0);
        if count == 0 || count == counts.max() {
            return Ok(false);
        }
        self.blocks.change(block, counts.bytes(place), |b| counts.set(b, place, count + 1));
        Ok(true)
    }

    /// Makes a refcount block present: its offset, or `None` where there is none.
    async fn present_block(&self, index: u64) -> Result<Option<u64>, IoError> {
        let offset = self.reftable.borrow().get(to_usize(index)).map_or(0, |entry| entry & OFFSET);
        if offset == 0 {
            return Ok(None);
        }
        if !offset.is_multiple_of(self.cluster_size()) {
            return Err(IoError::Corrupt(format!("a refcount table entry refers to {offset:#x}")));
        }
        if let Err(what) = self.metadata.check(offset, self.cluster_size(), Writing::RefcountBlock) {
            return Err(self.found_corrupt(format!("a refcount block lies in the {what}")).await);
        }
        // Only holders of `allocating` bring blocks in, so it stays while we hold that.
        while !self.blocks.contains(offset) {
            while !self.blocks.make_room() {
                self.write_back(true, false).await?;
            }
            self.blocks.load(&self.file, offset).await?;
        }
        Ok(Some(offset))
    }

    /// Makes a refcount block for a part of the file that has none (so nothing there is in use). The block
    /// itself becomes the part's cluster `at`.
    async fn make_block(&self, index: u64, at: u64) -> Result<(), IoError> {
        if index >= self.reftable.borrow().len() as u64 {
            return self.grow_reftable(index).await;
        }
        let offset = at << self.bits();
        if offset + self.cluster_size() > self.end() {
            return Err(IoError::NoSpace);
        }
        if let Err(what) = self.metadata.check(offset, self.cluster_size(), Writing::Data) {
            return Err(self.found_corrupt(format!("the {what} at {offset:#x} counts as free")).await);
        }
        while !self.blocks.make_room() {
            self.write_back(true, false).await?;
        }
        self.file.reserve(offset, self.cluster_size()).await?;
        let mut block = vec![0; to_usize(self.cluster_size())];
        self.counts.set(&mut block, self.counts.place(at).1, 1);
        self.add_block(index, offset, block);
        Ok(())
    }

    fn add_block(&self, index: u64, offset: u64, block: Vec<u8>) {
        self.blocks.insert_new(offset, block);
        self.metadata.add_refcount_block(offset);
        if let Some(entry) = self.reftable.borrow_mut().get_mut(to_usize(index)) {
            *entry = offset;
        }
        self.reftable_dirty.borrow_mut().insert(to_usize(index));
    }

    /// Moves the refcount table to a larger place: at the beginning of the first part of the file that it
    /// does not cover yet, so after all clusters in use. The blocks for that part come first, then the table.
    async fn grow_reftable(&self, index: u64) -> Result<(), IoError> {
        let (cluster, per_block) = (self.cluster_size(), self.counts.per_block());
        let old_len = self.reftable.borrow().len() as u64;
        let entries_per_cluster = cluster / 8;
        // Half as much again, so that growing stays rare.
        let wanted = (index + 1).max(old_len + old_len / 2 + 1);
        let mut blocks = 1;
        let (table_clusters, entries) = loop {
            let entries = wanted.max(index + blocks).next_multiple_of(entries_per_cluster);
            let clusters = entries / entries_per_cluster;
            if (blocks + clusters).div_ceil(per_block) <= blocks {
                break (clusters, entries);
            }
            blocks += 1;
        };
        let start = index * per_block;
        if entries > MAX_REFTABLE_ENTRIES || (start + blocks + table_clusters) << self.bits() > self.end() {
            return Err(IoError::NoSpace);
        }
        let used = blocks + table_clusters;
        if let Err(what) = self.metadata.check(start << self.bits(), used << self.bits(), Writing::Data) {
            return Err(self.found_corrupt(format!("a cluster of the {what} counts as free")).await);
        }
        self.file.reserve(start << self.bits(), used << self.bits()).await?;

        // Entries written below must not refer to blocks that are only in memory.
        let _one = self.writing_back.all().await;
        self.write_back_locked(true, false).await?;
        let old_offset = self.reftable_offset.get();
        let mut table = self.reftable.borrow().clone();
        table.resize(to_usize(entries), 0);
        for j in 0..blocks {
            let mut block = vec![0; to_usize(cluster)];
            for i in 0..used.saturating_sub(j * per_block).min(per_block) {
                self.counts.set(&mut block, to_usize(i), 1);
            }
            let offset = (start + j) << self.bits();
            self.file.write_bytes(offset, &block).await?;
            table[to_usize(index + j)] = offset;
        }
        let new_offset = (start + blocks) << self.bits();
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.file.write_bytes(new_offset, &bytes).await?;
        self.file.sync().await?;
        let clusters = u32::try_from(table_clusters).map_err(|_| IoError::NoSpace)?;
        let mut field = new_offset.to_be_bytes().to_vec();
        field.extend(clusters.to_be_bytes());
        self.file.write_bytes(REFTABLE_AT, &field).await?;
        self.file.sync().await?;

        for j in 0..blocks {
            self.metadata.add_refcount_block((start + j) << self.bits());
        }
        self.metadata.add_fixed("refcount table", new_offset, entries * 8);
        self.metadata.remove_fixed(old_offset);
        self.reftable.replace(table);
        self.reftable_offset.set(new_offset);
        let old_clusters = (old_len * 8).div_ceil(cluster);
        let old = Dropped { first: old_offset >> self.bits(), count: old_clusters };
        self.reclaimable.borrow_mut().push(old);
        self.first_free.set(start + used);
        Ok(())
    }

    /// Gives back clusters that nothing refers to, in memory or on the storage.
    pub(super) async fn give_back(&self, first: u64, count: u64) -> Result<(), IoError> {
        self.reclaimable.borrow_mut().push(Dropped { first, count });
        self.reclaim().await
    }

    /// Lets the file end with its last used cluster.
    pub(super) async fn trim(&self) -> Result<(), IoError> {
        self.reclaim().await?;
        if self.file.is_block_device() {
            return Ok(());
        }
        let _one = self.allocating.all().await;
        let there = self.file.len().div_ceil(self.cluster_size());
        let mut end = there;
        while end > 0 {
            let (index, place) = self.counts.place(end - 1);
            if let Some(block) = self.present_block(index).await? {
                let counts = self.counts;
                if self.blocks.with(block, |b| counts.get(b, place)).unwrap_or(1) > 0 {
                    break;
                }
            }
            end -= 1;
        }
        if end < there { self.file.cut(end << self.bits()) } else { Ok(()) }
    }

    /// Counts down what [`Qcow2::write_back`] found safe to count down.
    pub(super) async fn reclaim(&self) -> Result<(), IoError> {
        if self.reclaimable.borrow().is_empty() {
            return Ok(());
        }
        let _one = self.allocating.all().await;
        self.reclaim_locked().await
    }

    pub(super) async fn reclaim_locked(&self) -> Result<(), IoError> {
        let list = std::mem::take(&mut *self.reclaimable.borrow_mut());
        if list.is_empty() {
            return Ok(());
        }
        // A cluster may come to hold something else.
        self.decompressed.borrow_mut().clear();
        let mut holes: Vec<std::ops::Range<u64>> = Vec::new();
        let mut clusters: Vec<u64> = list.iter().flat_map(|d| d.first..d.first + d.count).collect();
        clusters.sort_unstable();
        for &cluster in &clusters {
            let (index, place) = self.counts.place(cluster);
            let counts = self.counts;
            let Some(block) = self.present_block(index).await? else {
                return Err(self
                    .found_corrupt(format!("cluster {cluster:#x} was in use but not counted"))
                    .await);
            };
            let count = self.blocks.with(block, |b| counts.get(b, place)).unwrap_or(0);
            if count == 0 {
                return Err(self
                    .found_corrupt(format!("cluster {cluster:#x} was in use but not counted"))
                    .await);
            }
            if count == 1 {
                match holes.last_mut() {
                    Some(hole) if hole.end == cluster => hole.end += 1,
                    _ => holes.push(cluster..cluster + 1),
                }
                continue;
            }
            self.blocks.change(block, counts.bytes(place), |b| counts.set(b, place, count - 1));
        }
        for hole in holes {
            if self.discard {
                let bytes = (hole.end - hole.start) << self.bits();
                // Only an economy: the clusters are free either way.
                if let Err(error) = self.file.discard(hole.start << self.bits(), bytes).await {
                    tracing::debug!(%error, "cannot give storage back");
                }
            }
            for cluster in hole {
                let (index, place) = self.counts.place(cluster);
                let counts = self.counts;
                if let Some(block) = self.present_block(index).await? {
                    self.blocks.change(block, counts.bytes(place), |b| counts.set(b, place, 0));
                }
                self.first_free.set(self.first_free.get().min(cluster));
                if self.packing.get() >> self.bits() == cluster {
                    self.packing.set(0);
                }
            }
        }
        Ok(())
    }
}
