//! Where the image's own structures are, so that nothing else is ever written there.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;

use super::entry::OFFSET;
use super::tables::Tables;

/// What a write is about to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writing {
    Data,
    L2Table,
    RefcountBlock,
}

/// The clusters that hold metadata.
#[derive(Debug)]
pub(crate) struct MetadataMap {
    cluster_bits: u32,
    /// Structures of fixed size: name, host clusters.
    fixed: RefCell<Vec<(&'static str, Range<u64>)>>,
    l2_tables: RefCell<HashSet<u64>>,
    refcount_blocks: RefCell<HashSet<u64>>,
}

impl MetadataMap {
    pub(crate) fn new(tables: &Tables) -> Self {
        let bits = tables.header.cluster_bits;
        let map = Self {
            cluster_bits: bits,
            fixed: RefCell::new(vec![("header", 0..1)]),
            l2_tables: RefCell::default(),
            refcount_blocks: RefCell::default(),
        };
        let header = &tables.header;
        map.add_fixed("L1 table", header.l1_offset, tables.l1.len() as u64 * 8);
        map.add_fixed("refcount table", header.reftable_offset, tables.reftable.len() as u64 * 8);
        if let Some((offset, bytes)) = header.crypt_header {
            map.add_fixed("encryption header", offset, bytes);
        }
        map.add_fixed("snapshot table", header.snapshots_offset, tables.snapshot_bytes);
        for snapshot in &tables.snapshots {
            map.add_fixed("snapshot's L1 table", snapshot.l1_offset, u64::from(snapshot.l1_size) * 8);
        }
        let clusters = |table: &[u64]| -> HashSet<u64> {
            table.iter().map(|e| (e & OFFSET) >> bits).filter(|&c| c != 0).collect()
        };
        map.l2_tables.replace(clusters(&tables.l1));
        map.refcount_blocks.replace(clusters(&tables.reftable));
        map
    }

    pub(crate) fn add_fixed(&self, what: &'static str, offset: u64, bytes: u64) {
        if bytes > 0 {
            let end = offset.saturating_add(bytes - 1) >> self.cluster_bits;
            self.fixed.borrow_mut().push((what, offset >> self.cluster_bits..end + 1));
        }
    }

    pub(crate) fn remove_fixed(&self, offset: u64) {
        let cluster = offset >> self.cluster_bits;
        self.fixed.borrow_mut().retain(|(_, range)| range.start != cluster);
    }

    pub(crate) fn add_l2(&self, offset: u64) {
        self.l2_tables.borrow_mut().insert(offset >> self.cluster_bits);
    }

    pub(crate) fn remove_l2(&self, offset: u64) {
        self.l2_tables.borrow_mut().remove(&(offset >> self.cluster_bits));
    }

    pub(crate) fn add_refcount_block(&self, offset: u64) {
        self.refcount_blocks.borrow_mut().insert(offset >> self.cluster_bits);
    }

    /// Whether `bytes` at `offset` may be written as `writing`.
    ///
    /// # Errors
    /// What is there instead.
    pub(crate) fn check(&self, offset: u64, bytes: u64, writing: Writing) -> Result<(), &'static str> {
        if bytes == 0 {
            return Ok(());
        }
        let clusters = offset >> self.cluster_bits..=offset.saturating_add(bytes - 1) >> self.cluster_bits;
        let (first, last) = (*clusters.start(), *clusters.end());
        if let Some((what, _)) = self.fixed.borrow().iter().find(|(_, r)| r.start <= last && first < r.end) {
            return Err(what);
        }
        let (l2, blocks) = (self.l2_tables.borrow(), self.refcount_blocks.borrow());
        for cluster in clusters {
            if writing != Writing::L2Table && l2.contains(&cluster) {
                return Err("L2 table");
            }
            if writing != Writing::RefcountBlock && blocks.contains(&cluster) {
                return Err("refcount block");
            }
        }
        Ok(())
    }
}
