//! Reading.

use super::Qcow2;
use super::entry::Mapping;
use crate::IoError;
use crate::engine::View;
use crate::executor::{LocalFuture, join_all};
use crate::extent::{Extent, ExtentKind};
use crate::file::to_usize;
use crate::node::Packed;

/// Clusters that [`Qcow2::status`] looks at first.
const FIRST_LOOK: u64 = 16;

/// A part of a read that one operation serves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    /// Mapping of its first unit.
    pub(super) mapping: Mapping,
    pub(super) offset: u64,
    pub(super) length: u64,
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
    pub(super) async fn runs(&self, offset: u64, length: u64) -> Result<Vec<Run>, IoError> {
        let format = self.l2_format;
        let (end, unit) = (offset + length, self.unit());
        let mut runs: Vec<Run> = Vec::new();
        let mut at = offset;
        while at < end {
            let first = at >> self.bits();
            let count = self.clusters(at, end - at).end.min(self.table_end(first)) - first;
            for (cluster, number) in self.mappings(first, count).await?.0.iter().zip(first..) {
                let cluster_end = end.min((number + 1) << self.bits());
                while at < cluster_end {
                    let index = u32::try_from((at - (number << self.bits())) / unit).unwrap_or(0);
                    let (mapping, next) =
                        (format.unit(cluster, index), cluster_end.min((at / unit + 1) * unit));
                    match runs.last_mut() {
                        Some(run) if self.continues(run, at, mapping) => run.length += next - at,
                        _ => runs.push(Run { mapping, offset: at, length: next - at }),
                    }
                    at = next;
                }
            }
        }
        Ok(runs)
    }

    /// Whether the unit at `at`, after `run`, is read by the same operation.
    fn continues(&self, run: &Run, at: u64, next: Mapping) -> bool {
        match (run.mapping, next) {
            (Mapping::Data { host, .. }, Mapping::Data { host: next, .. }) => {
                host.checked_add(at - (run.offset - run.offset % self.unit())) == Some(next)
            }
            (Mapping::Compressed { host, .. }, Mapping::Compressed { host: next, .. }) => {
                host == next && run.offset >> self.bits() == at >> self.bits()
            }
            (Mapping::Zero { host: None, .. }, Mapping::Zero { host: None, .. })
            | (Mapping::Unallocated, Mapping::Unallocated) => true,
            _ => false,
        }
    }

    /// The run at `offset`, of at most `length` bytes.
    pub(crate) async fn status(&self, offset: u64, length: u64) -> Result<Extent, IoError> {
        let end = (offset + length).min(self.table_end(offset >> self.bits()) << self.bits());
        let clusters = self.clusters(offset, end - offset);
        let _mapped = self.mapping_locks.shared(clusters).await;
        let extent = |run: &Run| {
            let within = run.offset % self.unit();
            let (kind, host) = match run.mapping {
                Mapping::Data { host, .. } => (ExtentKind::Data, Some(host + within)),
                Mapping::Zero { host, .. } => (ExtentKind::Zero, host.map(|host| host + within)),
                Mapping::Compressed { .. } => (ExtentKind::Compressed, None),
                Mapping::Unallocated => (ExtentKind::Unallocated, None),
            };
            Extent::new(run.offset, run.length, kind, host)
        };
        // Only as far as it goes on, and with few clusters first: a table of many short runs is asked for each of them.
        let (mut at, mut look) = (offset, FIRST_LOOK);
        let mut first: Option<Extent> = None;
        while at < end {
            let next = end.min(((at >> self.bits()) + look) << self.bits());
            for run in self.runs(at, next - at).await? {
                let Some(first) = &mut first else {
                    first = Some(extent(&run));
                    continue;
                };
                if !first.join(&extent(&run)) {
                    return Ok(*first);
                }
            }
            (at, look) = (next, look * 4);
        }
        first.ok_or_else(|| IoError::Corrupt("an empty range".into()))
    }

    /// Where the compressed clusters of a range are.
    pub(super) async fn packed(&self, offset: u64, length: u64) -> Result<Vec<Packed>, IoError> {
        let clusters = self.clusters(offset, length);
        let _mapped = self.mapping_locks.shared(clusters.clone()).await;
        let mut packed = Vec::new();
        let mut at = clusters.start;
        while at < clusters.end {
            let next = self.table_end(at).min(clusters.end);
            for (cluster, number) in self.mappings(at, next - at).await?.0.iter().zip(at..) {
                if let Mapping::Compressed { host, length } = cluster.mapping {
                    self.check_compressed(host)?;
                    packed.push(Packed { offset: number << self.bits(), host, length });
                }
            }
            at = next;
        }
        Ok(packed)
    }

    async fn read_run(&self, run: Run, view: View) -> Result<(), IoError> {
        match run.mapping {
            Mapping::Data { host, .. } => {
                self.read_data(host + run.offset % self.unit(), run.offset, view).await
            }
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
                let within = to_usize(run.offset % self.cluster_size());
                view.put(&bytes[within.min(bytes.len())..(within + view.len()).min(bytes.len())]);
                Ok(())
            }
        }
    }
}
