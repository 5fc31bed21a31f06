//! Puts changed tables on the storage, in an order that leaves leaked clusters at worst if it is cut short.

use std::collections::BTreeSet;

use super::Qcow2;
use super::cache::DirtyPart;
use super::image::Dropped;
use crate::IoError;

/// Everything that was dirty at one moment.
struct Snapshot {
    blocks: Vec<DirtyPart>,
    reftable: Vec<(usize, u64)>,
    l2: Vec<DirtyPart>,
    l1: Vec<(usize, u64)>,
    dropped: Vec<Dropped>,
}

impl Qcow2 {
    /// Writes back the tables (with or without refcounts), and with `durable` makes them and all data
    /// durable.
    pub(super) async fn write_back(&self, refcounts: bool, durable: bool) -> Result<(), IoError> {
        let _one = self.writing_back.all().await;
        self.write_back_locked(refcounts, durable).await
    }

    /// As [`Self::write_back`], for who holds `writing_back`.
    pub(super) async fn write_back_locked(&self, refcounts: bool, durable: bool) -> Result<(), IoError> {
        let snapshot = Snapshot {
            blocks: if refcounts { self.blocks.take_dirty() } else { Vec::new() },
            reftable: take(refcounts, &self.reftable_dirty, &self.reftable),
            l2: self.l2.take_dirty(),
            l1: take(true, &self.l1_dirty, &self.l1),
            dropped: self.dropped.take(),
        };
        let result = self.write_levels(&snapshot, durable).await;
        self.blocks.written(&snapshot.blocks, result.is_ok());
        self.l2.written(&snapshot.l2, result.is_ok());
        if result.is_ok() {
            self.reclaimable.borrow_mut().extend(snapshot.dropped);
        } else {
            self.reftable_dirty.borrow_mut().extend(snapshot.reftable.iter().map(|e| e.0));
            self.l1_dirty.borrow_mut().extend(snapshot.l1.iter().map(|e| e.0));
            self.dropped.borrow_mut().extend(snapshot.dropped);
        }
        result
    }

    async fn write_levels(&self, snapshot: &Snapshot, durable: bool) -> Result<(), IoError> {
        self.write_parts(&snapshot.blocks).await?;
        if !snapshot.reftable.is_empty() {
            self.file.sync().await?;
            self.write_entries(self.reftable_offset.get(), &snapshot.reftable).await?;
        }
        if !snapshot.l2.is_empty() || !snapshot.l1.is_empty() {
            // The counts of what the entries refer to, and the data in it.
            self.sync().await?;
        }
        self.write_parts(&snapshot.l2).await?;
        if !snapshot.l1.is_empty() {
            self.file.sync().await?;
            self.write_entries(self.header.l1_offset, &snapshot.l1).await?;
        }
        if durable || !snapshot.dropped.is_empty() {
            self.sync().await?;
        }
        Ok(())
    }

    async fn write_parts(&self, parts: &[DirtyPart]) -> Result<(), IoError> {
        for part in parts {
            self.file.write_bytes(part.table + part.at as u64, &part.bytes).await?;
        }
        Ok(())
    }

    /// Writes entries of a table at `table`, neighbours together.
    async fn write_entries(&self, table: u64, entries: &[(usize, u64)]) -> Result<(), IoError> {
        for run in entries.chunk_by(|a, b| a.0 + 1 == b.0) {
            let bytes: Vec<u8> = run.iter().flat_map(|(_, entry)| entry.to_be_bytes()).collect();
            self.file.write_bytes(table + run[0].0 as u64 * 8, &bytes).await?;
        }
        Ok(())
    }
}

/// The changed entries of a table, which count as unchanged from now on.
fn take(
    really: bool,
    dirty: &std::cell::RefCell<BTreeSet<usize>>,
    table: &std::cell::RefCell<Vec<u64>>,
) -> Vec<(usize, u64)> {
    if !really {
        return Vec::new();
    }
    let table = table.borrow();
    dirty.take().into_iter().filter_map(|i| Some((i, *table.get(i)?))).collect()
}
