//! Changes of an image that nobody uses: snapshots, sizes, bitmaps, repair.
//!
//! The new tables are written beside the old ones, where nothing refers to; all references are counted anew, and new
//! refcounts are written for them; then one write of the header's first sector switches from the old tables to the
//! new (`switch.rs`). A power cut leaves the image as it was, or as it is to be. Data is never moved.
//!
//! "Copied" flags follow from the counts: an L2 table of the active image in which one is wrong gets a copy.

use super::bitmap::{Bitmap, encode_directory, read_bitmaps};
use super::check::References;
use super::entry::{COPIED, Entry, L2Format, Mapping, OFFSET};
use super::header::{BITMAPS, CORRUPT, DIRTY, Header, MAX_L1_BYTES, RAW_EXTERNAL};
use super::refcount::RefcountFormat;
use super::snapshot::{Snapshot, encode_snapshots};
use super::switch::write_header;
use super::tables::{Tables, entries};
use crate::OpenError;
use crate::chain::ImageFile;
use crate::file::to_usize;

/// Most bytes of a refcount table, as in the header's check.
const MAX_REFTABLE_BYTES: u64 = 8 << 20;

/// An image that is being changed: its tables as they are to be.
pub(crate) struct Edit<'a> {
    image: &'a mut ImageFile,
    pub(super) header: Header,
    pub(super) l1: Vec<u64>,
    pub(super) snapshots: Vec<Snapshot>,
    pub(super) bitmaps: Vec<Bitmap>,
    /// For each cluster whether something refers to it, before or from now on.
    used: Vec<bool>,
    /// The clusters that something referred to before.
    before: usize,
    /// No cluster below is free.
    first_free: usize,
    /// Entries that make no sense are dropped, rather than an error.
    repair: bool,
}

impl<'a> Edit<'a> {
    /// Begins, with the image as it is.
    ///
    /// # Errors
    /// [`OpenError`] when something is wrong with the image, and it is not to be repaired.
    pub(crate) fn begin(image: &'a mut ImageFile, repair: bool) -> Result<Self, OpenError> {
        let header = Header::read(image)?;
        if header.is_corrupt() && !repair {
            return Err(OpenError::MarkedCorrupt { path: image.path().to_owned() });
        }
        let tables = Tables::read(image, header)?;
        let mut references = References::count(image, &tables, 0)?;
        references.count_refcount_structures(image, &tables);
        if let Some(first) = references.report.messages.first().filter(|_| !repair) {
            return Err(OpenError::corrupt(image.path(), first.clone()));
        }
        let bitmaps = if tables.header.autoclear & BITMAPS == 0 {
            Vec::new()
        } else {
            match read_bitmaps(image, &tables.header) {
                Err(OpenError::Corrupt { .. }) if repair => Vec::new(),
                other => other?,
            }
        };
        let used: Vec<bool> = references.counts.iter().map(|&count| count > 0).collect();
        let Tables { header, l1, snapshots, .. } = tables;
        let before = used.len();
        Ok(Self { image, header, l1, snapshots, bitmaps, used, before, first_free: 0, repair })
    }

    pub(super) fn image(&self) -> &ImageFile {
        self.image
    }

    pub(super) fn limit(&self, what: impl Into<String>) -> OpenError {
        OpenError::Limit { path: self.image.path().to_owned(), what: what.into() }
    }

    fn bits(&self) -> u32 {
        self.header.cluster_bits
    }

    /// Free clusters in a row for `bytes`; their offset.
    fn take(&mut self, bytes: u64) -> u64 {
        let want = to_usize(bytes.div_ceil(self.header.cluster_size()));
        let free = |used: &[bool], at: usize| used.get(at).is_none_or(|used| !used);
        while !free(&self.used, self.first_free) {
            self.first_free += 1;
        }
        let mut at = self.first_free;
        while let Some(taken) = (at..at + want).rev().find(|&i| !free(&self.used, i)) {
            at = taken + 1;
        }
        if self.used.len() < at + want {
            self.used.resize(at + want, false);
        }
        self.used[at..at + want].fill(true);
        (at as u64) << self.bits()
    }

    /// Writes a table to where nothing is; its offset, 0 for an empty one.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<u64, OpenError> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let offset = self.take(bytes.len() as u64);
        self.image.write(offset, bytes)?;
        Ok(offset)
    }

    /// The entries of the L2 table at `offset`.
    pub(super) fn l2(&self, offset: u64) -> Result<Vec<Entry>, OpenError> {
        let bytes = self.image.read(offset, self.header.cluster_size(), "an L2 table")?;
        Ok(self.header.l2_format().entries(&bytes).collect())
    }

    pub(super) fn put_l2(&mut self, table: &[Entry]) -> Result<u64, OpenError> {
        let format = self.header.l2_format();
        let mut bytes = vec![0; to_usize(self.header.cluster_size())];
        for (place, entry) in bytes.chunks_exact_mut(format.entry_size()).zip(table) {
            format.put(place, *entry);
        }
        self.put(&bytes)
    }

    /// Writes what is missing, and switches to it.
    pub(crate) fn commit(mut self) -> Result<(), OpenError> {
        if self.l1.len() as u64 * 8 > MAX_L1_BYTES {
            return Err(self.limit("the L1 table would become too large"));
        }
        self.put_directories()?;
        self.header.l1_size = u32::try_from(self.l1.len()).unwrap_or(u32::MAX);
        let l1_bytes = self.l1.len() as u64 * 8;
        self.header.l1_offset = self.take(l1_bytes.max(1));
        self.image.refresh_len()?;
        let mut counts = self.count()?;
        self.set_copied_flags(&mut counts)?;
        let table: Vec<u8> = self.l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.image.write(self.header.l1_offset, &table)?;
        self.put_refcounts(&mut counts)?;
        let used_clusters = counts.iter().rposition(|&count| count > 0).map_or(1, |last| last + 1);
        let end = (used_clusters as u64) << self.bits();
        if self.image.len() < end {
            self.image.set_len(end)?;
        }
        self.image.sync()?;

        self.header.incompatible &= !(DIRTY | if self.repair { CORRUPT } else { 0 });
        let bitmaps = if self.bitmaps.is_empty() { 0 } else { BITMAPS };
        self.header.autoclear = self.header.autoclear & RAW_EXTERNAL | bitmaps;
        write_header(self.image, &self.header)?;
        self.give_back(&counts, end)
    }

    /// Changes the header only.
    pub(crate) fn commit_header(self) -> Result<(), OpenError> {
        write_header(self.image, &self.header)
    }

    /// Lets nothing refer to clusters that the file does not have. They read as zeroes, and do so from now on by their
    /// entries; in version 2, which has no such entries, as what is below.
    pub(super) fn drop_what_is_not_there(&mut self) -> Result<(), OpenError> {
        let mut trees = vec![std::mem::take(&mut self.l1)];
        for snapshot in &self.snapshots {
            trees.push(read_l1(self.image, snapshot.l1_offset, snapshot.l1_size)?);
        }
        for (number, mut l1) in trees.into_iter().enumerate() {
            let mut changed = false;
            for entry in &mut l1 {
                let offset = *entry & OFFSET;
                if offset == 0 {
                    continue;
                }
                let there = offset.is_multiple_of(self.header.cluster_size())
                    && offset + self.header.cluster_size() <= self.image.len();
                let right = if there { self.only_what_is_there(offset)? } else { Some(Vec::new()) };
                if let Some(table) = right {
                    *entry = if table.is_empty() { 0 } else { self.put_l2(&table)? };
                    changed = true;
                }
            }
            if number == 0 {
                self.l1 = l1;
            } else if changed {
                let table: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
                self.snapshots[number - 1].l1_offset = self.put(&table)?;
            }
        }
        Ok(())
    }

    /// The L2 table at `offset` without what is not in the file; `None` when all is.
    fn only_what_is_there(&self, offset: u64) -> Result<Option<Vec<Entry>>, OpenError> {
        let format = self.header.l2_format();
        let mut table = self.l2(offset)?;
        let mut changed = false;
        for entry in &mut table {
            let gone = match format.decode(*entry) {
                Ok(cluster) => {
                    let (first, count) = cluster.host_clusters(format.cluster_bits);
                    count > 0 && first + count > self.before as u64 && !format.external
                }
                // Nobody can say what was there.
                Err(_) => true,
            };
            if gone {
                let zero = self.header.version >= 3 && self.header.backing.is_some();
                *entry = if zero { format.zero(None) } else { Entry::default() };
                changed = true;
            }
        }
        Ok(changed.then_some(table))
    }

    fn put_directories(&mut self) -> Result<(), OpenError> {
        let table = encode_snapshots(&self.snapshots);
        self.header.snapshots_offset = self.put(&table)?;
        self.header.snapshot_count = u32::try_from(self.snapshots.len()).unwrap_or(u32::MAX);
        let mut bitmaps = std::mem::take(&mut self.bitmaps);
        for bitmap in &mut bitmaps {
            let table: Vec<u8> = bitmap.table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            bitmap.table_offset = self.put(&table)?;
        }
        let directory = encode_directory(&bitmaps);
        self.header.bitmaps = match u32::try_from(bitmaps.len()).unwrap_or(u32::MAX) {
            0 => None,
            number => Some((self.put(&directory)?, directory.len() as u64, number)),
        };
        self.header.autoclear = if bitmaps.is_empty() {
            self.header.autoclear & !BITMAPS
        } else {
            self.header.autoclear | BITMAPS
        };
        self.bitmaps = bitmaps;
        Ok(())
    }

    /// The references of each cluster as they are to be, but of refcount structures.
    fn count(&self) -> Result<Vec<u32>, OpenError> {
        let tables = Tables {
            header: self.header.clone(),
            l1: self.l1.clone(),
            reftable: Vec::new(),
            snapshots: self.snapshots.clone(),
            snapshot_bytes: encode_snapshots(&self.snapshots).len() as u64,
        };
        let references = References::count(self.image, &tables, self.used.len() as u64)?;
        match references.report.messages.first() {
            Some(first) if !self.repair => Err(OpenError::corrupt(self.image.path(), first.clone())),
            _ => Ok(references.counts),
        }
    }

    /// Makes the active tables' "copied" flags say what the counts say.
    fn set_copied_flags(&mut self, counts: &mut Vec<u32>) -> Result<(), OpenError> {
        let (bits, cluster, format) = (self.bits(), self.header.cluster_size(), self.header.l2_format());
        let mut seen = std::collections::HashSet::new();
        for i in 0..self.l1.len() {
            let offset = self.l1[i] & OFFSET;
            if offset == 0 {
                self.l1[i] = 0;
                continue;
            }
            if !offset.is_multiple_of(cluster) || offset + cluster > self.image.len() || !seen.insert(offset)
            {
                // Only when repairing: otherwise it was an error.
                self.l1[i] = 0;
                continue;
            }
            let table = self.l2(offset)?;
            let right: Vec<Entry> = table.iter().map(|&entry| right_entry(format, entry, counts)).collect();
            let count = counts.get_mut(to_usize(offset >> bits));
            if right == table {
                self.l1[i] = offset | if count.is_some_and(|count| *count == 1) { COPIED } else { 0 };
                continue;
            }
            if let Some(count) = count {
                *count -= 1;
            }
            let new = self.put_l2(&right)?;
            counts.resize(self.used.len(), 0);
            counts[to_usize(new >> bits)] = 1;
            self.l1[i] = new | COPIED;
        }
        Ok(())
    }

    /// Writes a refcount table and blocks for `counts` and for themselves.
    fn put_refcounts(&mut self, counts: &mut Vec<u32>) -> Result<(), OpenError> {
        let format = RefcountFormat::new(self.header.refcount_order, self.header.cluster_bits);
        let (cluster, per_block) = (self.header.cluster_size(), format.per_block());
        if counts.iter().any(|&count| u64::from(count) > format.max()) {
            let bits = 1 << self.header.refcount_order;
            return Err(self.limit(format!(
                "a cluster would have more references than its refcount of {bits} bits can count"
            )));
        }
        // What they take themselves can need more of them.
        let mut blocks = Vec::new();
        let (mut table, mut table_clusters) = (0, 0);
        loop {
            let needed = (self.used.len() as u64).div_ceil(per_block);
            let table_needed = (needed * 8).div_ceil(cluster);
            if table_needed > table_clusters {
                // Some room, so that the table need not move again at once.
                table_clusters = table_needed + table_needed / 2;
                table = self.take(table_clusters * cluster);
            } else if blocks.len() as u64 == needed {
                break;
            } else {
                blocks.push(self.take(cluster));
            }
        }
        if table_clusters * cluster > MAX_REFTABLE_BYTES.max(cluster) {
            return Err(self.limit("the image is too large for its refcounts"));
        }
        counts.resize(self.used.len(), 0);
        let places = blocks.iter().copied().chain((0..table_clusters).map(|i| table + i * cluster));
        for place in places {
            counts[to_usize(place >> self.bits())] = 1;
        }
        let mut entries = vec![0; to_usize(table_clusters * cluster)];
        for ((offset, part), entry) in
            blocks.iter().zip(counts.chunks(to_usize(per_block))).zip(entries.as_chunks_mut::<8>().0)
        {
            let mut block = vec![0; to_usize(cluster)];
            part.iter().enumerate().for_each(|(i, &count)| format.set(&mut block, i, count.into()));
            self.image.write(*offset, &block)?;
            *entry = offset.to_be_bytes();
        }
        self.image.write(table, &entries)?;
        self.header.reftable_offset = table;
        self.header.reftable_clusters = u32::try_from(table_clusters).unwrap_or(u32::MAX);
        Ok(())
    }

    /// Gives the storage back of what nothing refers to any more.
    fn give_back(self, counts: &[u32], end: u64) -> Result<(), OpenError> {
        let bits = self.bits();
        let freed = |i: &usize| self.used[*i] && counts[*i] == 0;
        let mut at = 0;
        let until = self.before.min(counts.len()).min(to_usize(end >> bits));
        while let Some(first) = (at..until).find(freed) {
            let last = (first..until).find(|i| !freed(i)).unwrap_or(until);
            self.image.punch_hole((first as u64) << bits, ((last - first) as u64) << bits);
            at = last;
        }
        if self.image.len() > end {
            self.image.set_len(end)?;
        }
        Ok(())
    }
}

/// What an entry must be, when its cluster has so many references.
fn right_entry(format: L2Format, entry: Entry, counts: &[u32]) -> Entry {
    let Ok(cluster) = format.decode(entry) else { return Entry::default() };
    let (first, number) = cluster.host_clusters(format.cluster_bits);
    let last = to_usize((first + number).saturating_sub(1));
    let copied = match cluster.host() {
        None if matches!(cluster.mapping, Mapping::Compressed { .. }) => {
            if number > 0 && last >= counts.len() {
                return Entry::default();
            }
            return Entry { descriptor: entry.descriptor & !COPIED, ..entry };
        }
        None => return entry,
        Some(_) if format.external => true,
        Some(_) => match counts.get(last) {
            None => return Entry::default(),
            Some(&count) => count == 1,
        },
    };
    let descriptor = if copied { entry.descriptor | COPIED } else { entry.descriptor & !COPIED };
    Entry { descriptor, ..entry }
}

/// An L1 table of the file, as its entries.
pub(super) fn read_l1(image: &ImageFile, offset: u64, size: u32) -> Result<Vec<u64>, OpenError> {
    if size == 0 {
        return Ok(Vec::new());
    }
    Ok(entries(&image.read(offset, u64::from(size) * 8, "an L1 table")?))
}
