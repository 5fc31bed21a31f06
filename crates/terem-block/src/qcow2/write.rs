//! Writing: in place where the cluster is ours alone, else into new clusters.

use super::Qcow2;
use super::entry::{COPIED, Mapping};
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

impl Qcow2 {
    /// Writes `view` at `offset`.
    pub(crate) async fn write(&self, offset: u64, view: View) -> Result<(), IoError> {
        if view.len() == 0 {
            return Ok(());
        }
        self.begin_write().await?;
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
            for mapping in mappings {
                let Mapping::Data { host, copied: true } = mapping else { return Ok(None) };
                if !own {
                    return Ok(None);
                }
                let next = end.min((at / cluster_size + 1) * cluster_size);
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

    async fn write_in_place(&self, parts: Vec<InPlace>) -> Result<(), IoError> {
        for part in &parts {
            if let Err(what) = self.metadata.check(part.host, part.view.len() as u64, Writing::Data) {
                return Err(self.found_corrupt(format!("a data cluster lies in the {what}")).await);
            }
        }
        if let [part] = parts.as_slice() {
            return self.file.write(part.host, std::slice::from_ref(&part.view)).await;
        }
        let writes = parts.into_iter().map(|part| {
            Box::pin(async move { self.file.write(part.host, &[part.view]).await }) as LocalFuture<'_, _>
        });
        join_all(writes.collect()).await
    }

    /// Writes `view` at `offset`, for who holds the clusters exclusively.
    pub(super) async fn write_locked(&self, offset: u64, view: &View) -> Result<(), IoError> {
        let end = offset + view.len() as u64;
        let mut at = offset;
        while at < end {
            let first = at >> self.bits();
            let last = self.clusters(at, end - at).end.min(self.table_end(first));
            let (mappings, own) = self.mappings(first, last - first).await?;
            let ours = |m: &Mapping| own && matches!(m, Mapping::Data { copied: true, .. });
            let kept = |m: &Mapping| own && matches!(m, Mapping::Zero { host: Some(_), copied: true });
            let in_place = mappings.iter().take_while(|m| ours(m)).count() as u64;
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
            let (host, count, taken) = match mappings[0] {
                Mapping::Zero { host: Some(host), .. } if kept(&mappings[0]) => {
                    if let Err(what) = self.metadata.check(host, self.cluster_size(), Writing::Data) {
                        return Err(self.found_corrupt(format!("a zero cluster lies in the {what}")).await);
                    }
                    (host, 1, false)
                }
                _ => {
                    let want = mappings.iter().take_while(|m| !ours(m) && !kept(m)).count() as u64;
                    let (cluster, count) = self.allocate(want).await?;
                    (cluster << self.bits(), count, true)
                }
            };
            let next = end.min((first + count) << self.bits());
            let part = view.part(to_usize(at - offset), to_usize(next - at));
            let result = self.write_new(host, at, &part).await;
            let result = match result {
                Ok(()) => {
                    let entries = (0..count).map(|i| Some((host + (i << self.bits())) | COPIED));
                    self.commit(first, &entries.collect::<Vec<_>>()).await
                }
                failed => failed,
            };
            if let Err(e) = result {
                if taken {
                    self.give_back(host >> self.bits(), count).await?;
                }
                return Err(e);
            }
            at = next;
        }
        Ok(())
    }

    /// Writes `view`, which belongs at guest `offset`, into host clusters from `host` on that nothing refers
    /// to yet, and fills the rest of the first and last cluster with what the guest sees there now.
    async fn write_new(&self, host: u64, offset: u64, view: &View) -> Result<(), IoError> {
        let cluster_size = self.cluster_size();
        let end = offset + view.len() as u64;
        let head = offset % cluster_size;
        let tail = end.next_multiple_of(cluster_size) - end;
        // Beyond its end the file reads as zeroes, as long as nobody writes there.
        let fresh = host >= self.file.len() && !self.file.is_block_device();

        let mut views = Vec::with_capacity(3);
        let mut start = host + head;
        if let Some(before) = self.surroundings(offset - head, head).await? {
            start = host;
            views.push(before);
        } else if head > 0 && !fresh && self.add_zeroes(&mut views, host, head).await? {
            start = host;
        }
        views.push(view.clone());
        if let Some(after) = self.surroundings(end, tail).await? {
            views.push(after);
        } else if tail > 0 && !fresh {
            let at = host + head + view.len() as u64;
            self.add_zeroes(&mut views, at, tail).await?;
        }
        self.file.write(start, &views).await
    }

    /// What the guest sees in a part of a cluster, or `None` where that is zeroes.
    async fn surroundings(&self, offset: u64, length: u64) -> Result<Option<View>, IoError> {
        if length == 0 {
            return Ok(None);
        }
        let mapping = self.mappings(offset >> self.bits(), 1).await?.0[0];
        match mapping {
            Mapping::Zero { .. } => return Ok(None),
            Mapping::Unallocated if !self.backed(offset) => return Ok(None),
            _ => {}
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
        self.file.write_zeroes(at, length, false).await.map(|()| false)
    }

    /// Keeps the list of dropped references short.
    pub(super) async fn limit_dropped(&self) -> Result<(), IoError> {
        if self.dropped.borrow().len() > MAX_DROPPED {
            self.write_back(true, false).await?;
        }
        Ok(())
    }
}
