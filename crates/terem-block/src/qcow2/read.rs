//! Reading.

use super::Qcow2;
use super::entry::Mapping;
use crate::IoError;
use crate::engine::View;
use crate::executor::{LocalFuture, join_all};
use crate::extent::{Extent, ExtentKind};
use crate::file::to_usize;

/// A part of a read that one operation serves.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// Mapping of its first cluster.
    mapping: Mapping,
    offset: u64,
    length: u64,
}

impl Qcow2 {
    /// Fills `view` from `offset` on.
    pub(crate) async fn read(&self, offset: u64, view: View) -> Result<(), IoError> {
        let clusters = self.clusters(offset, view.len() as u64);
        let _mapped = self.mapping_locks.shared(clusters).await;
        self.read_locked(offset, view).await
    }

    /// As [`Self::read`], for who holds the clusters.
    pub(super) async fn read_locked(&self, offset: u64, view: View) -> Result<(), IoError> {
        let runs = self.runs(offset, view.len() as u64).await?;
        if let [run] = runs.as_slice() {
            return self.read_run(*run, view).await;
        }
        let parts = runs.into_iter().map(|run| {
            let part = view.part(to_usize(run.offset - offset), to_usize(run.length));
            Box::pin(self.read_run(run, part)) as LocalFuture<'_, _>
        });
        join_all(parts.collect()).await
    }

    /// Cuts a range into runs.
    async fn runs(&self, offset: u64, length: u64) -> Result<Vec<Run>, IoError> {
        let (end, cluster_size) = (offset + length, self.cluster_size());
        let mut runs: Vec<Run> = Vec::new();
        let mut at = offset;
        while at < end {
            let first = at >> self.bits();
            let count = self.clusters(at, end - at).end.min(self.table_end(first)) - first;
            for mapping in self.mappings(first, count).await?.0 {
                let next = end.min((at / cluster_size + 1) * cluster_size);
                match runs.last_mut() {
                    Some(run) if continues(run, mapping, cluster_size) => run.length += next - at,
                    _ => runs.push(Run { mapping, offset: at, length: next - at }),
                }
                at = next;
            }
        }
        Ok(runs)
    }

    /// The run at `offset`, of at most `length` bytes.
    pub(crate) async fn status(&self, offset: u64, length: u64) -> Result<Extent, IoError> {
        let end = (offset + length).min(self.table_end(offset >> self.bits()) << self.bits());
        let clusters = self.clusters(offset, end - offset);
        let _mapped = self.mapping_locks.shared(clusters).await;
        let runs = self.runs(offset, end - offset).await?;
        let extent = |run: &Run| {
            let within = run.offset % self.cluster_size();
            let (kind, host) = match run.mapping {
                Mapping::Data { host, .. } => (ExtentKind::Data, Some(host + within)),
                Mapping::Zero { host, .. } => (ExtentKind::Zero, host.map(|host| host + within)),
                Mapping::Compressed { .. } => (ExtentKind::Compressed, None),
                Mapping::Unallocated => (ExtentKind::Unallocated, None),
            };
            Extent::new(run.offset, run.length, kind, host)
        };
        let mut runs = runs.iter().map(extent);
        let mut first = runs.next().ok_or_else(|| IoError::Corrupt("an empty range".into()))?;
        // Only as far as it goes on.
        let _ = runs.all(|next| first.join(&next));
        Ok(first)
    }

    async fn read_run(&self, run: Run, view: View) -> Result<(), IoError> {
        let within = run.offset % self.cluster_size();
        match run.mapping {
            Mapping::Data { host, .. } => self.file.read(host + within, &[view]).await,
            Mapping::Zero { .. } => {
                view.zero();
                Ok(())
            }
            Mapping::Unallocated => match &self.backing {
                Some(backing) => backing.read(run.offset, view).await,
                None => {
                    view.zero();
                    Ok(())
                }
            },
            Mapping::Compressed { host, length } => {
                let bytes = self.read_compressed(host, length).await?;
                let within = to_usize(within);
                view.put(&bytes[within..(within + view.len()).min(bytes.len())]);
                Ok(())
            }
        }
    }
}

/// Whether the cluster after `run` is read by the same operation.
fn continues(run: &Run, next: Mapping, cluster_size: u64) -> bool {
    match (run.mapping, next) {
        (Mapping::Data { host, .. }, Mapping::Data { host: next, .. }) => {
            let clusters = (run.offset + run.length) / cluster_size - run.offset / cluster_size;
            host.checked_add(clusters * cluster_size) == Some(next)
        }
        (Mapping::Zero { host: None, .. }, Mapping::Zero { host: None, .. })
        | (Mapping::Unallocated, Mapping::Unallocated) => true,
        _ => false,
    }
}
