//! An open qcow2 image: its state, and what happens at the first write and at the end.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use super::cache::TableCache;
use super::compressed::Decompressed;
use super::crypt::DataCrypt;
use super::entry::L2Format;
use super::header::{AUTOCLEAR_AT, BITMAPS, CORRUPT, DIRTY, Header, INCOMPATIBLE_AT, RAW_EXTERNAL};
use super::metadata::MetadataMap;
use super::refcount::RefcountFormat;
use super::tables::Tables;
use super::tracking::Tracking;
use crate::IoError;
use crate::file::File;
use crate::node::Node;
use crate::range_lock::RangeLock;

/// Host clusters, each of which has one reference less.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dropped {
    pub(super) first: u64,
    pub(super) count: u64,
}

/// An open qcow2 image.
pub(crate) struct Qcow2 {
    pub(super) file: Rc<File>,
    /// Where the clusters' data is, if not in `file`.
    data_file: Option<File>,
    pub(super) header: Header,
    pub(super) l2_format: L2Format,
    pub(super) backing: Option<Node>,
    /// Whether guests' discards and dropped clusters give storage back.
    pub(super) discard: bool,

    pub(super) l1: RefCell<Vec<u64>>,
    pub(super) l1_dirty: RefCell<BTreeSet<usize>>,
    pub(super) l2: TableCache,

    pub(super) counts: RefcountFormat,
    pub(super) reftable: RefCell<Vec<u64>>,
    pub(super) reftable_dirty: RefCell<BTreeSet<usize>>,
    /// Where the refcount table is; it moves when it grows.
    pub(super) reftable_offset: Cell<u64>,
    pub(super) blocks: TableCache,
    /// No cluster below is free.
    pub(super) first_free: Cell<u64>,

    /// The end of the last compressed cluster, in a host cluster that more can share; or 0.
    pub(super) packing: Cell<u64>,

    /// References dropped by tables that are not written back yet.
    pub(super) dropped: RefCell<Vec<Dropped>>,
    /// References whose end is on the storage: their counts can go down.
    pub(super) reclaimable: RefCell<Vec<Dropped>>,

    /// How the data are encrypted, if they are.
    pub(super) crypt: Option<DataCrypt>,
    pub(super) tracking: Tracking,
    pub(super) metadata: MetadataMap,
    pub(super) decompressed: RefCell<Decompressed>,

    /// By guest cluster: shared to use a mapping, exclusive to change it.
    pub(super) mapping_locks: RangeLock,
    /// One L2 table is made or copied at a time. Taken before `allocating`.
    pub(super) making_l2: RangeLock,
    /// Refcounts are looked at and changed by one task at a time. Taken before `writing_back`.
    pub(super) allocating: RangeLock,
    /// One write-back at a time.
    pub(super) writing_back: RangeLock,
    starting: RangeLock,
    /// Number of the flush that began last.
    flushes_begun: Cell<u64>,
    /// Number of the last flush that succeeded.
    last_flush: Cell<u64>,

    /// Whether the first write has prepared the header.
    started: Cell<bool>,
    corrupt: Cell<bool>,
    incompatible: Cell<u64>,
}

impl Qcow2 {
    pub(crate) fn new(
        file: File,
        data_file: Option<File>,
        tables: Tables,
        backing: Option<Node>,
        tracking: Tracking,
        crypt: Option<DataCrypt>,
        (discard, table_cache): (bool, usize),
    ) -> Self {
        let metadata = MetadataMap::new(&tables);
        let Tables { header, l1, reftable, .. } = tables;
        let cluster = header.cluster_size();
        Self {
            discard,
            l1: RefCell::new(l1),
            l1_dirty: RefCell::default(),
            l2: TableCache::new(cluster, table_cache),
            counts: RefcountFormat::new(header.refcount_order, header.cluster_bits),
            reftable: RefCell::new(reftable),
            reftable_dirty: RefCell::default(),
            reftable_offset: Cell::new(header.reftable_offset),
            blocks: TableCache::new(cluster, table_cache / 4),
            first_free: Cell::new(0),
            packing: Cell::new(0),
            dropped: RefCell::default(),
            reclaimable: RefCell::default(),
            tracking,
            crypt,
            metadata,
            decompressed: RefCell::default(),
            mapping_locks: RangeLock::default(),
            making_l2: RangeLock::default(),
            allocating: RangeLock::default(),
            writing_back: RangeLock::default(),
            starting: RangeLock::default(),
            flushes_begun: Cell::new(0),
            last_flush: Cell::new(0),
            started: Cell::new(false),
            corrupt: Cell::new(false),
            incompatible: Cell::new(header.incompatible),
            file: Rc::new(file),
            data_file,
            l2_format: header.l2_format(),
            header,
            backing,
        }
    }

    /// Bytes of the disk: the header's, up to a whole sector.
    pub(crate) fn size(&self) -> u64 {
        self.header.size.next_multiple_of(512)
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    /// The file that holds the clusters' data.
    pub(super) fn data(&self) -> &File {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    /// Whether the external data file is to be a raw image of the same contents.
    pub(super) fn external_raw(&self) -> bool {
        self.data_file.is_some() && self.header.autoclear & RAW_EXTERNAL != 0 && self.crypt.is_none()
    }

    /// Bytes of the smallest part with a mapping of its own: a cluster or a subcluster.
    pub(super) fn unit(&self) -> u64 {
        1 << self.l2_format.unit_bits()
    }

    pub(super) fn bits(&self) -> u32 {
        self.header.cluster_bits
    }

    /// Guest clusters that a range of bytes touches.
    pub(super) fn clusters(&self, offset: u64, length: u64) -> std::ops::Range<u64> {
        offset >> self.bits()..(offset + length).div_ceil(self.cluster_size())
    }

    /// Whether refcounts may stay behind until the image is closed (specification, "Compatible features").
    pub(super) fn lazy_refcounts(&self) -> bool {
        self.header.has_lazy_refcounts()
    }

    /// To be called before anything is changed.
    pub(super) async fn begin_write(&self) -> Result<(), IoError> {
        if self.corrupt.get() {
            return Err(IoError::Corrupt("writing has stopped since damage was found".into()));
        }
        if self.started.get() {
            return Ok(());
        }
        let _one = self.starting.all().await;
        if self.started.get() {
            return Ok(());
        }
        if self.header.version < 3 {
            self.started.set(true);
            return Ok(());
        }
        let kept = self.header.autoclear & (RAW_EXTERNAL | if self.tracking.valid { BITMAPS } else { 0 });
        self.mark_bitmaps().await?;
        if self.header.autoclear != kept {
            // "Autoclear": what these features say ends with our writes, but for what we keep right.
            self.file.write_bytes(AUTOCLEAR_AT, &kept.to_be_bytes()).await?;
        }
        if self.lazy_refcounts() {
            self.set_incompatible(self.incompatible.get() | DIRTY).await?;
        }
        self.file.sync().await?;
        self.started.set(true);
        Ok(())
    }

    /// Makes the data durable, and what was written of the tables.
    pub(super) async fn sync(&self) -> Result<(), IoError> {
        if let Some(data) = &self.data_file {
            data.sync().await?;
        }
        self.file.sync().await
    }

    async fn set_incompatible(&self, bits: u64) -> Result<(), IoError> {
        self.file.write_bytes(INCOMPATIBLE_AT, &bits.to_be_bytes()).await?;
        self.incompatible.set(bits);
        Ok(())
    }

    /// Stops all writing, since the image's structures contradict each other, and marks it corrupt.
    pub(super) async fn found_corrupt(&self, what: String) -> IoError {
        if !self.corrupt.replace(true) {
            tracing::error!(path = %self.file.path().display(), what, "the image is corrupt; it can only be read now");
            if self.header.version >= 3 && !self.file.is_read_only() {
                let bits = self.incompatible.get() | CORRUPT;
                if let Err(error) = self.set_incompatible(bits).await {
                    tracing::error!(%error, "cannot mark the image corrupt");
                }
            }
        }
        IoError::Corrupt(what)
    }

    /// Makes all completed writes durable.
    pub(crate) async fn flush(&self) -> Result<(), IoError> {
        if self.file.is_read_only() {
            return Ok(());
        }
        let begun_before = self.flushes_begun.get();
        {
            let _one = self.writing_back.all().await;
            // Of several that waited here, the first did it for all.
            if self.last_flush.get() <= begun_before {
                let this = begun_before.max(self.flushes_begun.get()) + 1;
                self.flushes_begun.set(this);
                self.write_back_locked(!self.lazy_refcounts(), true).await?;
                self.last_flush.set(this);
            }
        }
        self.reclaim().await
    }

    /// Writes everything back and leaves the image clean.
    pub(crate) async fn close(&self) -> Result<(), IoError> {
        if self.file.is_read_only() {
            return Ok(());
        }
        if self.started.get() && !self.corrupt.get() {
            self.store_bitmaps().await?;
        }
        self.write_back(true, true).await?;
        self.reclaim().await?;
        self.write_back(true, true).await?;
        if self.started.get() && self.lazy_refcounts() && !self.corrupt.get() {
            self.set_incompatible(self.incompatible.get() & !DIRTY).await?;
            self.file.sync().await?;
        }
        Ok(())
    }
}
