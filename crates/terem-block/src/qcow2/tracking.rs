//! Bitmaps that follow writes while the image is open.
//!
//! At the first write they are marked as in use, which they stay if we do not get to the end; at closing their bits
//! are stored, and then the mark is taken away.

use std::cell::{Cell, RefCell};

use super::Qcow2;
use super::bitmap::{AUTO, Bitmap, IN_USE, encode_directory, read_bitmaps};
use super::entry::OFFSET;
use super::header::{BITMAPS, Header};
use crate::chain::ImageFile;
use crate::file::to_usize;
use crate::{IoError, OpenError};

/// Most bytes of the bits of all bitmaps that are followed; those that do not fit stay marked as in use.
const MAX_BYTES: u64 = 64 << 20;

/// The bits of one bitmap.
struct Tracked {
    /// Its number in the directory.
    index: usize,
    granularity_bits: u32,
    bits: Vec<u8>,
    /// The clusters of it that changed.
    changed: Vec<bool>,
}

/// The bitmaps of an open image.
#[derive(Default)]
pub(crate) struct Tracking {
    directory_offset: u64,
    bitmaps: RefCell<Vec<Bitmap>>,
    tracked: RefCell<Vec<Tracked>>,
    /// Whether the bitmaps stay valid.
    pub(super) valid: bool,
    marked: Cell<bool>,
}

impl Tracking {
    /// The bitmaps that are to follow writes. What cannot be understood is left to become invalid.
    pub(crate) fn load(image: &ImageFile, header: &Header) -> Result<Self, OpenError> {
        let Some((directory_offset, ..)) = header.bitmaps.filter(|_| header.autoclear & BITMAPS != 0) else {
            return Ok(Self::default());
        };
        let bitmaps = match read_bitmaps(image, header) {
            Ok(bitmaps) => bitmaps,
            Err(OpenError::Corrupt { what, .. }) => {
                tracing::warn!(path = %image.path().display(), what, "its bitmaps are damaged and get lost");
                return Ok(Self::default());
            }
            Err(e) => return Err(e),
        };
        let (mut tracked, mut total) = (Vec::new(), 0);
        for (index, bitmap) in bitmaps.iter().enumerate() {
            let follows = bitmap.flags & AUTO != 0 && bitmap.flags & IN_USE == 0;
            let bytes = bitmap.bits(header.size).div_ceil(8);
            let entries = bitmap.entries(header.size, header.cluster_size());
            if !follows || total + bytes > MAX_BYTES || entries != bitmap.table.len() as u64 {
                continue;
            }
            total += bytes;
            let bits = bitmap.load(image, header.size, header.cluster_size())?;
            let changed = vec![false; bitmap.table.len()];
            tracked.push(Tracked { index, granularity_bits: bitmap.granularity_bits, bits, changed });
        }
        let (bitmaps, tracked) = (RefCell::new(bitmaps), RefCell::new(tracked));
        Ok(Self { directory_offset, bitmaps, tracked, valid: true, marked: Cell::new(false) })
    }
}

impl Qcow2 {
    /// Notes that something changed there.
    pub(super) fn mark_dirty(&self, offset: u64, length: u64) {
        let mut tracked = self.tracking.tracked.borrow_mut();
        if length == 0 {
            return;
        }
        let bits_per_cluster = self.cluster_size() * 8;
        for bitmap in tracked.iter_mut() {
            let (first, last) =
                (offset >> bitmap.granularity_bits, (offset + length - 1) >> bitmap.granularity_bits);
            for bit in first..=last {
                if let Some(byte) = bitmap.bits.get_mut(to_usize(bit / 8)) {
                    *byte |= 1 << (bit % 8);
                }
            }
            let clusters = to_usize(first / bits_per_cluster)..to_usize(last / bits_per_cluster) + 1;
            if let Some(changed) = bitmap.changed.get_mut(clusters) {
                changed.fill(true);
            }
        }
    }

    /// Marks the bitmaps that follow writes as in use, before the first of them.
    pub(super) async fn mark_bitmaps(&self) -> Result<(), IoError> {
        let directory = {
            let mut bitmaps = self.tracking.bitmaps.borrow_mut();
            if !bitmaps.iter().any(|bitmap| bitmap.flags & AUTO != 0) {
                return Ok(());
            }
            bitmaps.iter_mut().filter(|b| b.flags & AUTO != 0).for_each(|b| b.flags |= IN_USE);
            encode_directory(&bitmaps)
        };
        self.file.write_bytes(self.tracking.directory_offset, &directory).await?;
        self.tracking.marked.set(true);
        Ok(())
    }

    /// Stores the bitmaps and takes the marks away. The image's tables are written back after that.
    pub(super) async fn store_bitmaps(&self) -> Result<(), IoError> {
        if !self.tracking.marked.get() {
            return Ok(());
        }
        let cluster = to_usize(self.cluster_size());
        let mut todo = Vec::new();
        for bitmap in self.tracking.tracked.borrow().iter() {
            for (part, _) in bitmap.changed.iter().enumerate().filter(|(_, changed)| **changed) {
                let start = (part * cluster).min(bitmap.bits.len());
                let mut bytes = bitmap.bits[start..(start + cluster).min(bitmap.bits.len())].to_vec();
                bytes.resize(cluster, 0);
                todo.push((bitmap.index, part, bytes));
            }
        }
        for (index, part, bytes) in todo {
            let entry = self.tracking.bitmaps.borrow()[index].table[part];
            let offset = match entry & OFFSET {
                0 => self.allocate_metadata().await?,
                offset => offset,
            };
            self.file.write_bytes(offset, &bytes).await?;
            self.tracking.bitmaps.borrow_mut()[index].table[part] = offset;
        }
        // The counts of the clusters, before anything refers to them.
        self.write_back(true, true).await?;
        let tracked: Vec<usize> = self.tracking.tracked.borrow().iter().map(|bitmap| bitmap.index).collect();
        for &index in &tracked {
            let (offset, table) = {
                let bitmap = &self.tracking.bitmaps.borrow()[index];
                (bitmap.table_offset, bitmap.table.iter().flat_map(|e| e.to_be_bytes()).collect::<Vec<u8>>())
            };
            if !table.is_empty() {
                self.file.write_bytes(offset, &table).await?;
            }
        }
        self.file.sync().await?;
        let directory = {
            let mut bitmaps = self.tracking.bitmaps.borrow_mut();
            tracked.iter().for_each(|&index| bitmaps[index].flags &= !IN_USE);
            encode_directory(&bitmaps)
        };
        self.file.write_bytes(self.tracking.directory_offset, &directory).await?;
        self.tracking.marked.set(false);
        self.file.sync().await
    }
}
