//! Writing: in place where the cluster is ours alone, else into new clusters.

use super::Qcow2;
use super::entry::{Cluster, Entry, Mapping};
use super::metadata::Writing;
use crate::IoError;
use crate::engine::View;
use crate::executor::{LocalFuture, join_all};
use crate::file::to_usize;

/// Up to this many zeroes around new data are written with it; more get an operation of their own.
const INLINE_ZEROES: usize = 256 << 10;

/// References dropped that are kept in memory until a write-back is made on purpose.
const MAX_DROPPED: usize = 4096;

/// Data for a row of host clusters.
struct InPlace {
    host: u64,
    view: View,
}

/// Host clusters in a row that are to hold guest clusters in a row.
struct New<'a> {
    host: u64,
    /// What the guest clusters were so far.
    clusters: &'a [Cluster],
    /// Whether the host cluster was theirs already, and only has nothing where it is written.
    kept: bool,
}

impl Qcow2 {
    /// Writes `view` at `offset`.
    pub(crate) async fn write(&self, offset: u64, view: View) -> Result<(), IoError> {
        if view.len() == 0 {
            return Ok(());
        }
        self.begin_write().await?;
        self.mark_dirty(offset, view.len() as u64);
        let clusters = self.clusters(offset, view.len() as u64);
        {
            let _mapped = self.mapping_locks.shared(clusters.clone()).await;
            if let Some(parts) = self.in_place(offset, &view).await? {
                return self.write_in_place(parts).await;
            }
        }
        let _mapped = self.mapping_locks.exclusive(clusters).await;
        self.write_locked(offset, &view).await?;
        self.limit_dropped().await
    }

    /// Where to write if no mapping needs to change, else `None`.
    async fn in_place(&self, offset: u64, view: &View) -> Result<Option<Vec<InPlace>>, IoError> {
        let (end, cluster_size) = (offset + view.len() as u64, self.cluster_size());
        let mut parts: Vec<InPlace> = Vec::new();
        let mut at = offset;
        while at < end {
            let first = at >> self.bits();
            let count = self.clusters(at, end - at).end.min(self.table_end(first)) - first;
            let (mappings, own) = self.mappings(first, count).await?;
            for cluster in mappings {
                let next = end.min((at / cluster_size + 1) * cluster_size);
                if !own || !self.has_data(&cluster, at, next) {
                    return Ok(None);
                }
                let Some((host, _)) = cluster.host() else { return Ok(None) };
                let (host, length) = (host + at % cluster_size, to_usize(next - at));
                match parts.last_mut() {
                    Some(part) if part.host + part.view.len() as u64 == host => {
                        let start = to_usize(at - offset) - part.view.len();
                        part.view = view.part(start, part.view.len() + length);
                    }
                    _ => parts.push(InPlace { host, view: view.part(to_usize(at - offset), length) }),
                }
                at = next;
            }
        }
        Ok(Some(parts))
    }

    /// Whether the bytes `start..end` of a cluster are there, and in a host cluster that nobody else uses.
    fn has_data(&self, cluster: &Cluster, start: u64, end: u64) -> bool {
        let base = start - start % self.cluster_size();
        let mask = self.l2_format.unit_mask(start - base, end - base);
        matches!(cluster.mapping, Mapping::Data { copied: true, .. }) && cluster.bitmap & mask == mask
    }

    async fn write_in_place(&self, parts: Vec<InPlace>) -> Result<(), IoError> {
        for part in &parts {
            if let Err(what) = self.check_data(part.host, part.view.len() as u64) {
                return Err(self.found_corrupt(format!("a data cluster lies in the {what}")).await);
            }
        }
        if let [part] = parts.as_slice() {
            return self.data().write(part.host, std::slice::from_ref(&part.view)).await;
        }
        let writes = parts.into_iter().map(|part| {
            Box::pin(async move { self.data().write(part.host, &[part.view]).await }) as LocalFuture<'_, _>
        });
        join_all(writes.collect()).await
    }

    /// Whether data may be written there.
    pub(super) fn check_data(&self, host: u64, length: u64) -> Result<(), &'static str> {
        if self.l2_format.external { Ok(()) } else { self.metadata.check(host, length, Writing::Data) }
    }

    /// Writes `view` at `offset`, for who holds the clusters exclusively.
    pub(super) async fn write_locked(&self, offset: u64, view: &View) -> Result<(), IoError> {
        let end = offset + view.len() as u64;
        let mut at = offset;
        while at < end {
            let first = at >> self.bits();
            let last = self.clusters(at, end - at).end.min(self.table_end(first));
            let (clusters, own) = self.mappings(first, last - first).await?;
            let start_of = |number: u64| at.max(number << self.bits());
            let ours = |(cluster, number): (&Cluster, u64)| {
                own && self.has_data(cluster, start_of(number), end.min((number + 1) << self.bits()))
            };
            // A host cluster of our own that has nothing there yet.
            let kept = |cluster: &Cluster| own && cluster.host().is_some_and(|(_, copied)| copied);
            let in_place = clusters.iter().zip(first..).take_while(|&c| ours(c)).count() as u64;
            if in_place > 0 {
                let next = end.min((first + in_place) << self.bits());
                let part = view.part(to_usize(at - offset), to_usize(next - at));
                let parts = self.in_place(at, &part).await?;
                // The mappings were just seen, and nobody else may change them.
                let parts = parts.ok_or_else(|| IoError::Corrupt("a mapping changed by itself".into()))?;
                self.write_in_place(parts).await?;
                at = next;
                continue;
            }
            let (host, count, taken) = match clusters[0].host().filter(|_| kept(&clusters[0])) {
                Some((host, _)) => {
                    if let Err(what) = self.check_data(host, self.cluster_size()) {
                        return Err(self.found_corrupt(format!("a kept cluster lies in the {what}")).await);
                    }
                    (host, 1, false)
                }
                None => {
                    let new = clusters.iter().zip(first..).take_while(|&c| !ours(c) && !kept(c.0));
                    let (cluster, count) = self.allocate_data(first, new.count() as u64).await?;
                    (cluster << self.bits(), count, true)
                }
            };
            let next = end.min((first + count) << self.bits());
            let part = view.part(to_usize(at - offset), to_usize(next - at));
            let new = New { host, clusters: &clusters[..to_usize(count)], kept: !taken };
            let result = match self.write_new(&new, at, &part).await {
                Ok(entries) => self.commit(first, &entries).await,
                Err(e) => Err(e),
            };
            if let Err(e) = result {
                if taken && !self.l2_format.external {
                    self.give_back(host >> self.bits(), count).await?;
                }
                return Err(e);
            }
            at = next;
        }
        Ok(())
    }

    /// Lets host clusters from `host` on, which are taken and written, be the clusters at `offset`.
    pub(super) async fn map_clusters(&self, offset: u64, host: u64, length: u64) -> Result<(), IoError> {
        self.mark_dirty(offset, length);
        self.file.written_by_others(host + length);
        let clusters = self.clusters(offset, length);
        let _mapped = self.mapping_locks.exclusive(clusters.clone()).await;
        let format = self.l2_format;
        let mut at = clusters.start;
        while at < clusters.end {
            let next = self.table_end(at).min(clusters.end);
            let first = host + ((at - clusters.start) << self.bits());
            let entries = (0..next - at)
                .map(|i| Some(format.data(first + (i << self.bits()), format.all_units(), 0)))
                .collect::<Vec<_>>();
            self.commit(at, &entries).await?;
            at = next;
        }
        self.limit_dropped().await
    }

    /// Takes host clusters for up to `want` guest clusters from `first` on.
    pub(super) async fn allocate_data(&self, first: u64, want: u64) -> Result<(u64, u64), IoError> {
        // In an external file every cluster has the place that it has on the disk.
        if self.l2_format.external { Ok((first, want)) } else { self.allocate(want).await }
    }

    /// Writes `view`, which belongs at guest `offset`, into host clusters that hold nothing there yet, and fills the
    /// rest of what gets mapped with what the guest sees there now. Returns the clusters' new entries.
    async fn write_new(
        &self,
        new: &New<'_>,
        offset: u64,
        view: &View,
    ) -> Result<Vec<Option<Entry>>, IoError> {
        let (format, cluster_size) = (self.l2_format, self.cluster_size());
        let end = offset + view.len() as u64;
        let base = offset - offset % cluster_size;
        let ([first, ..], [.., last]) = (new.clusters, new.clusters) else { return Ok(Vec::new()) };
        let (start, until) = (self.filled(first, new.kept, offset).0, self.filled(last, new.kept, end - 1).1);
        let (head, tail) = (offset - start, until - end);
        // Beyond its end the file reads as zeroes, as long as nobody writes there.
        let fresh = new.host >= self.data().len() && !self.data().is_block_device();

        let mut views = Vec::with_capacity(3);
        let mut from = offset;
        if let Some(before) = self.surroundings(start, head).await? {
            from = start;
            views.push(before);
        } else if head > 0 && !fresh && self.add_zeroes(&mut views, new.host + (start - base), head).await? {
            from = start;
        }
        views.push(view.clone());
        if let Some(after) = self.surroundings(end, tail).await? {
            views.push(after);
        } else if tail > 0 && !fresh {
            self.add_zeroes(&mut views, new.host + (end - base), tail).await?;
        }
        self.data().write(new.host + (from - base), &views).await?;

        let entries = new.clusters.iter().zip(0..).map(|(cluster, i)| {
            let at = base + (i << self.bits());
            let mask = format.unit_mask(start.max(at) - at, until.min(at + cluster_size).max(at) - at);
            let before = if cluster.host().is_none() || new.kept { cluster.bitmap } else { 0 };
            Some(format.data(new.host + (i << self.bits()), mask, before))
        });
        Ok(entries.collect())
    }

    /// The part of a cluster that gets mapped when the byte at `at` is written into a host cluster that is new for it.
    fn filled(&self, cluster: &Cluster, kept: bool, at: u64) -> (u64, u64) {
        // What lies elsewhere moves as a whole.
        let moves =
            matches!(cluster.mapping, Mapping::Compressed { .. }) || cluster.host().is_some() && !kept;
        let unit = if moves { self.cluster_size() } else { self.unit() };
        let start = at - at % unit;
        let end = if self.l2_format.external { (start + unit).min(self.size()) } else { start + unit };
        (start, end.max(at + 1))
    }

    /// What the guest sees in a part of a cluster, or `None` where that is zeroes.
    async fn surroundings(&self, offset: u64, length: u64) -> Result<Option<View>, IoError> {
        if length == 0 {
            return Ok(None);
        }
        let runs = self.runs(offset, length).await?;
        let reads_as_zero = runs.iter().all(|run| match run.mapping {
            Mapping::Zero { .. } => true,
            Mapping::Unallocated => !self.backed(run.offset),
            _ => false,
        });
        if reads_as_zero {
            return Ok(None);
        }
        let view = View::zeroed(to_usize(length));
        self.read_locked(offset, view.clone()).await?;
        Ok(Some(view))
    }

    /// Adds zeroes to `views` (true), or if they are many, writes them at `at` (false).
    async fn add_zeroes(&self, views: &mut Vec<View>, at: u64, length: u64) -> Result<bool, IoError> {
        if to_usize(length) <= INLINE_ZEROES {
            views.push(View::zeroed(to_usize(length)));
            return Ok(true);
        }
        self.data().write_zeroes(at, length, false).await.map(|()| false)
    }

    /// Keeps the list of dropped references short.
    pub(super) async fn limit_dropped(&self) -> Result<(), IoError> {
        if self.dropped.borrow().len() > MAX_DROPPED {
            self.write_back(true, false).await?;
        }
        Ok(())
    }
}
