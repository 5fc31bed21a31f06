//! What can be done to a qcow2 image that nobody uses, each as one [`Edit`].

use std::time::{SystemTime, UNIX_EPOCH};

use super::bitmap::{AUTO, Bitmap, IN_USE, read_bitmaps};
use super::check::check_image;
use super::edit::{Edit, read_l1};
use super::entry::{Entry, Mapping, OFFSET};
use super::header::{BITMAPS, DIRTY, EXTERNAL_DATA, Header, LAZY_REFCOUNTS, RAW_EXTERNAL};
use super::snapshot::Snapshot;
use super::tables::Tables;
use crate::chain::ImageFile;
use crate::file::to_usize;
use crate::{Amend, BackingFile, CheckReport, OpenError};

/// Most snapshots of an image.
const MAX_SNAPSHOTS: usize = 65536;
/// Longest names.
const MAX_NAME: usize = 1023;

impl Edit<'_> {
    /// The number of the snapshot that has this id, or else this name.
    fn find_snapshot(&self, wanted: &str) -> Result<usize, OpenError> {
        let by = |key: fn(&Snapshot) -> &str| self.snapshots.iter().position(|s| key(s) == wanted);
        by(|s| &s.id).or_else(|| by(|s| &s.name)).ok_or_else(|| {
            let path = self.image().path().to_owned();
            OpenError::NoSuch { path, what: "snapshot", name: wanted.to_owned() }
        })
    }

    /// Takes a snapshot.
    pub(crate) fn create_snapshot(&mut self, name: &str) -> Result<(), OpenError> {
        if self.header.l2_format().external {
            return Err(self.limit("an image with a data file cannot have snapshots"));
        }
        if name.len() > MAX_NAME || self.snapshots.len() >= MAX_SNAPSHOTS {
            return Err(self.limit("a name of more than 1023 bytes, or more than 65536 snapshots"));
        }
        let last = self.snapshots.iter().filter_map(|s| s.id.parse::<u64>().ok()).max().unwrap_or(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let table: Vec<u8> = self.l1.iter().flat_map(|entry| (entry & OFFSET).to_be_bytes()).collect();
        let l1_offset = self.put(&table)?;
        self.snapshots.push(Snapshot {
            l1_offset,
            l1_size: u32::try_from(self.l1.len()).unwrap_or(u32::MAX),
            id: (last + 1).to_string(),
            name: name.to_owned(),
            date: u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
            date_nsec: now.subsec_nanos(),
            vm_clock: 0,
            vm_state_size: 0,
            disk_size: self.header.size,
            more: vec![0; 8],
        });
        Ok(())
    }

    /// Makes the disk what it was at a snapshot.
    pub(crate) fn apply_snapshot(&mut self, wanted: &str) -> Result<(), OpenError> {
        let snapshot = self.snapshots[self.find_snapshot(wanted)?].clone();
        if snapshot.disk_size != self.header.size && self.header.version < 3 {
            return Err(self.limit("its disk had another size, which takes version 3"));
        }
        self.header.size = snapshot.disk_size;
        // With what lies beyond the disk's end: the saved machine state, which QEMU reads from there.
        self.l1 = read_l1(self.image(), snapshot.l1_offset, snapshot.l1_size)?;
        let needed = to_usize(self.header.l1_needed(self.header.size));
        self.l1.resize(needed.max(self.l1.len()), 0);
        let (size, cluster) = (self.header.size, self.header.cluster_size());
        for bitmap in self.bitmaps.iter_mut().filter(|bitmap| bitmap.flags & AUTO != 0) {
            bitmap.resize(size, cluster);
            // Anything may have changed.
            bitmap.fill(true);
        }
        Ok(())
    }

    /// Forgets a snapshot.
    pub(crate) fn delete_snapshot(&mut self, wanted: &str) -> Result<(), OpenError> {
        let index = self.find_snapshot(wanted)?;
        self.snapshots.remove(index);
        Ok(())
    }

    /// Changes what can be changed of the format.
    pub(crate) fn amend(&mut self, changes: &Amend) -> Result<(), OpenError> {
        if let Some(size) = changes.size {
            self.resize(size)?;
        }
        if changes.version == Some(3) {
            self.header.version = 3;
        }
        if let Some(bits) = changes.refcount_bits {
            if !bits.is_power_of_two() || bits > 64 || self.header.version < 3 && bits != 16 {
                return Err(self.limit(format!(
                    "refcounts of {bits} bits; a power of two up to 64, and 16 in version 2"
                )));
            }
            self.header.refcount_order = bits.trailing_zeros();
        }
        if let Some(lazy) = changes.lazy_refcounts {
            if lazy && self.header.version < 3 {
                return Err(self.limit("lazy refcounts take version 3"));
            }
            let others = self.header.compatible & !LAZY_REFCOUNTS;
            self.header.compatible = if lazy { others | LAZY_REFCOUNTS } else { others };
        }
        if let Some(name) = &changes.data_file {
            if self.header.incompatible & EXTERNAL_DATA == 0 {
                return Err(self.limit("it has no data file"));
            }
            self.header.data_file = Some(name.clone());
        }
        match changes.data_file_raw {
            Some(true) if self.header.autoclear & RAW_EXTERNAL == 0 => {
                return Err(self.limit("data_file_raw cannot be set on an image that is there"));
            }
            Some(false) => self.header.autoclear &= !RAW_EXTERNAL,
            _ => {}
        }
        if changes.version == Some(2) && self.header.version == 3 {
            self.downgrade()?;
        }
        Ok(())
    }

    /// Back to version 2, if nothing needs version 3 but zero clusters that need not be there.
    fn downgrade(&mut self) -> Result<(), OpenError> {
        let needs = if self.header.refcount_order != 4 {
            Some("refcounts of other than 16 bits")
        } else if self.header.incompatible & !DIRTY != 0 {
            Some("subclusters, a data file or its compression")
        } else if !self.bitmaps.is_empty() {
            Some("bitmaps")
        } else if self.snapshots.iter().any(|s| s.disk_size != self.header.size) {
            Some("snapshots of disks of other sizes")
        } else {
            None
        };
        if let Some(needs) = needs {
            return Err(self.limit(format!("it has {needs}, which takes version 3")));
        }
        let format = self.header.l2_format();
        let mut trees = vec![std::mem::take(&mut self.l1)];
        for snapshot in &self.snapshots {
            trees.push(read_l1(self.image(), snapshot.l1_offset, snapshot.l1_size)?);
        }
        for (number, mut l1) in trees.into_iter().enumerate() {
            let mut changed = false;
            for entry in &mut l1 {
                let offset = *entry & OFFSET;
                let table = if offset == 0 { Vec::new() } else { self.l2(offset)? };
                let zero = |entry: &Entry| {
                    matches!(format.decode(*entry).map(|c| c.mapping), Ok(Mapping::Zero { .. }))
                };
                if !table.iter().any(zero) {
                    continue;
                }
                if self.header.backing.is_some() {
                    return Err(self.limit("it has zero clusters over a backing file, which take version 3"));
                }
                let plain: Vec<_> =
                    table.iter().map(|e| if zero(e) { Entry::default() } else { *e }).collect();
                *entry = self.put_l2(&plain)?;
                changed = true;
            }
            if number == 0 {
                self.l1 = l1;
            } else if changed {
                let table: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
                self.snapshots[number - 1].l1_offset = self.put(&table)?;
            }
        }
        self.header.compatible = 0;
        self.header.version = 2;
        Ok(())
    }

    /// Lets everything show through from the backing file.
    pub(crate) fn empty(&mut self) {
        self.l1.fill(0);
    }

    /// Changes the disk's size. What is cut off is lost; what is added is zero as far as no backing file shows through.
    pub(crate) fn resize(&mut self, size: u64) -> Result<(), OpenError> {
        if self.header.version < 3 && !self.snapshots.is_empty() {
            return Err(
                self.limit("a version 2 image with snapshots cannot change its size; remove them first")
            );
        }
        if let Some(bitmap) = self.bitmaps.iter().find(|bitmap| bitmap.flags & IN_USE != 0) {
            return Err(
                self.limit(format!("the bitmap {:?} is not consistent; remove it first", bitmap.name))
            );
        }
        let format = self.header.l2_format();
        let needed = to_usize(self.header.l1_needed(size));
        let per_table = 1u64 << format.table_bits();
        let cluster = self.header.cluster_size();
        if size < self.header.size {
            self.l1.truncate(needed);
            let first_gone = size.div_ceil(cluster);
            let (index, within) = (to_usize(first_gone / per_table), to_usize(first_gone % per_table));
            let offset = self.l1.get(index).map_or(0, |entry| entry & OFFSET);
            if within > 0 && offset != 0 {
                let mut table = self.l2(offset)?;
                table[within..].fill(Entry::default());
                self.l1[index] = self.put_l2(&table)?;
            }
        }
        self.l1.resize(needed.max(self.l1.len()), 0);
        self.header.size = size;
        for bitmap in &mut self.bitmaps {
            bitmap.resize(size, cluster);
        }
        self.clear_bits_beyond(size)
    }

    /// Bits that stand for nothing must be 0, since the disk may grow again.
    fn clear_bits_beyond(&mut self, size: u64) -> Result<(), OpenError> {
        let cluster = self.header.cluster_size();
        for index in 0..self.bitmaps.len() {
            let bitmap = &self.bitmaps[index];
            let (Some(&last), bits) = (bitmap.table.last(), bitmap.bits(size)) else { continue };
            let per_cluster = cluster * 8;
            if last & OFFSET == 0 || bits % per_cluster == 0 {
                continue;
            }
            let mut bytes = self.image().read(last & OFFSET, cluster, "a bitmap")?;
            clear_from(&mut bytes, bits % per_cluster);
            let offset = self.put(&bytes)?;
            if let Some(entry) = self.bitmaps[index].table.last_mut() {
                *entry = offset;
            }
        }
        Ok(())
    }

    fn find_bitmap(&self, wanted: &str) -> Result<usize, OpenError> {
        self.bitmaps.iter().position(|bitmap| bitmap.name == wanted).ok_or_else(|| {
            let path = self.image().path().to_owned();
            OpenError::NoSuch { path, what: "bitmap", name: wanted.to_owned() }
        })
    }

    /// Adds an empty bitmap.
    pub(crate) fn add_bitmap(
        &mut self,
        name: &str,
        granularity: u64,
        enabled: bool,
    ) -> Result<(), OpenError> {
        if self.header.version < 3 {
            return Err(self.limit("bitmaps take version 3"));
        }
        if self.bitmaps.iter().any(|bitmap| bitmap.name == name) || name.is_empty() || name.len() > MAX_NAME {
            return Err(self.limit(format!("{name:?} is the name of a bitmap already, or no name for one")));
        }
        if !granularity.is_power_of_two() || !(9..=31).contains(&granularity.trailing_zeros()) {
            return Err(self.limit(format!("{granularity} bytes a bit; a power of two from 512 to 2G")));
        }
        let flags = if enabled { AUTO } else { 0 };
        let mut bitmap = Bitmap::new(name.to_owned(), granularity.trailing_zeros(), flags);
        bitmap.resize(self.header.size, self.header.cluster_size());
        self.bitmaps.push(bitmap);
        Ok(())
    }

    /// Removes a bitmap.
    pub(crate) fn remove_bitmap(&mut self, name: &str) -> Result<(), OpenError> {
        let index = self.find_bitmap(name)?;
        self.bitmaps.remove(index);
        Ok(())
    }

    /// A bitmap that is consistent.
    fn sound_bitmap(&mut self, name: &str) -> Result<&mut Bitmap, OpenError> {
        let index = self.find_bitmap(name)?;
        if self.bitmaps[index].flags & IN_USE != 0 {
            return Err(self.limit(format!("the bitmap {name:?} is not consistent; it can only be removed")));
        }
        Ok(&mut self.bitmaps[index])
    }

    /// Lets a bitmap follow writes from now on, or not any more.
    pub(crate) fn enable_bitmap(&mut self, name: &str, enabled: bool) -> Result<(), OpenError> {
        let bitmap = self.sound_bitmap(name)?;
        bitmap.flags = if enabled { bitmap.flags | AUTO } else { bitmap.flags & !AUTO };
        Ok(())
    }

    /// Clears all bits.
    pub(crate) fn clear_bitmap(&mut self, name: &str) -> Result<(), OpenError> {
        self.sound_bitmap(name)?.fill(false);
        Ok(())
    }

    /// The bits of a bitmap, one for each of its granules, and the granules' bytes.
    pub(crate) fn bitmap_bits(&mut self, name: &str) -> Result<(Vec<u8>, u64), OpenError> {
        let (size, cluster) = (self.header.size, self.header.cluster_size());
        let bitmap = self.sound_bitmap(name)?.clone();
        Ok((bitmap.load(self.image(), size, cluster)?, 1 << bitmap.granularity_bits))
    }

    /// Sets all bits in `name` that are set in `bits`, a bitmap of `granularity` bytes a bit.
    pub(crate) fn merge_bitmap(
        &mut self,
        name: &str,
        bits: &[u8],
        granularity: u64,
    ) -> Result<(), OpenError> {
        let (size, cluster) = (self.header.size, self.header.cluster_size());
        let bitmap = self.sound_bitmap(name)?.clone();
        let mut bytes = bitmap.load(self.image(), size, cluster)?;
        let own = 1u64 << bitmap.granularity_bits;
        for (i, _) in bits.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            for bit in (0..8).filter(|bit| bits[i] >> bit & 1 == 1) {
                let start = (i as u64 * 8 + bit) * granularity;
                for own_bit in start / own..(start + granularity).min(size).div_ceil(own) {
                    if let Some(byte) = bytes.get_mut(to_usize(own_bit / 8)) {
                        *byte |= 1 << (own_bit % 8);
                    }
                }
            }
        }
        let mut table = Vec::new();
        for part in bytes.chunks(to_usize(cluster)) {
            let mut part = part.to_vec();
            part.resize(to_usize(cluster), 0);
            table.push(if part.iter().all(|&byte| byte == 0) { 0 } else { self.put(&part)? });
        }
        self.sound_bitmap(name)?.table = table;
        Ok(())
    }
}

/// Clears all bits from number `from` on.
fn clear_from(bytes: &mut [u8], from: u64) {
    let at = to_usize(from / 8);
    if let Some(byte) = bytes.get_mut(at) {
        *byte &= (1u8 << (from % 8)).wrapping_sub(1);
    }
    if let Some(rest) = bytes.get_mut(at + 1..) {
        rest.fill(0);
    }
}

/// Opens an image for an [`Edit`], which `change` makes.
pub(crate) fn edit(
    image: &mut ImageFile,
    change: impl FnOnce(&mut Edit<'_>) -> Result<(), OpenError>,
) -> Result<(), OpenError> {
    super::tables::settle(image)?;
    let mut edit = Edit::begin(image, false)?;
    change(&mut edit)?;
    edit.commit()
}

/// Lets the image be continued by another backing file, or none.
pub(crate) fn set_backing(image: &mut ImageFile, backing: Option<&BackingFile>) -> Result<(), OpenError> {
    super::tables::settle(image)?;
    let mut edit = Edit::begin(image, false)?;
    edit.header.backing = backing.map(|backing| backing.path.to_string_lossy().into_owned());
    edit.header.backing_format = backing.map(|backing| backing.format.name().to_owned());
    edit.commit_header()
}

/// Repairs refcounts, and with `all` also tables with nonsense in them.
pub(crate) fn repair(image: &mut ImageFile, all: bool) -> Result<(), OpenError> {
    let mut edit = Edit::begin(image, all)?;
    if all {
        edit.drop_what_is_not_there()?;
    }
    edit.commit()
}

/// What is wrong with an image.
pub(crate) fn check_file(image: &ImageFile) -> Result<CheckReport, OpenError> {
    check_image(image, &Tables::read(image, Header::read(image)?)?)
}

/// Bytes of the disk.
pub(crate) fn disk_size(image: &ImageFile) -> Result<u64, OpenError> {
    Ok(Header::read(image)?.size)
}

/// The bits of a bitmap, one for each of its granules, and the granules' bytes.
pub(crate) fn bitmap_bits(image: &ImageFile, name: &str) -> Result<(Vec<u8>, u64), OpenError> {
    let header = Header::read(image)?;
    let bitmaps = if header.autoclear & BITMAPS != 0 { read_bitmaps(image, &header)? } else { Vec::new() };
    let bitmap = bitmaps.iter().find(|bitmap| bitmap.name == name && bitmap.flags & IN_USE == 0);
    let bitmap = bitmap.ok_or_else(|| OpenError::NoSuch {
        path: image.path().to_owned(),
        what: "consistent bitmap",
        name: name.to_owned(),
    })?;
    Ok((bitmap.load(image, header.size, header.cluster_size())?, 1 << bitmap.granularity_bits))
}
