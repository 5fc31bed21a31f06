//! Tables that are read at opening and kept in memory.

use super::entry::OFFSET;
use super::header::Header;
use super::rebuild::rebuild_refcounts;
use super::snapshot::{Snapshot, read_snapshots};
use crate::OpenError;
use crate::chain::ImageFile;

/// The header and the top tables of an image.
pub(crate) struct Tables {
    pub(super) header: Header,
    pub(super) l1: Vec<u64>,
    pub(super) reftable: Vec<u64>,
    pub(super) snapshots: Vec<Snapshot>,
    /// Bytes of the snapshot table.
    pub(super) snapshot_bytes: u64,
}

impl Tables {
    /// Reads the tables. For writing, an image that was not closed properly with lazy refcounts gets its
    /// refcounts rebuilt first.
    ///
    /// # Errors
    /// [`OpenError`] when they are not in the file or contradict the specification, or when an image that
    /// is marked corrupt is to be written.
    pub(crate) fn load(image: &mut ImageFile, mut header: Header, writing: bool) -> Result<Self, OpenError> {
        if writing && header.is_corrupt() {
            return Err(OpenError::MarkedCorrupt { path: image.path().to_owned() });
        }
        if writing && header.is_dirty() {
            settle(image)?;
            header = Header::read(image)?;
        }
        let tables = Self::read(image, header)?;
        if writing {
            tables.check_blocks(image)?;
            tables.check_extent(image)?;
        }
        Ok(tables)
    }

    /// Each refcount block must be its own: writing through one would change what another says.
    fn check_blocks(&self, image: &ImageFile) -> Result<(), OpenError> {
        let mut blocks: Vec<u64> = self.reftable.iter().map(|e| e & OFFSET).filter(|&e| e != 0).collect();
        blocks.sort_unstable();
        match blocks.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => {
                Err(OpenError::corrupt(image.path(), format!("two refcount blocks at {:#x}", pair[0])))
            }
            None => Ok(()),
        }
    }

    /// The tables that these refer to were written before, so where they are beyond the end of the file, it has lost it.
    fn check_extent(&self, image: &ImageFile) -> Result<(), OpenError> {
        let (len, what) = (image.len(), [(&self.l1, "an L2 table"), (&self.reftable, "a refcount block")]);
        let lost = what.iter().find_map(|(table, what)| {
            table
                .iter()
                .map(|entry| entry & OFFSET)
                .find(|&offset| offset >= len && offset > 0)
                .map(|o| (what, o))
        });
        match lost {
            Some((what, offset)) => Err(OpenError::truncated(
                image.path(),
                format!("{what} at {offset:#x} is beyond the end of the file ({len:#x})"),
            )),
            None => Ok(()),
        }
    }

    pub(crate) fn read(image: &ImageFile, header: Header) -> Result<Self, OpenError> {
        let l1 = read_table(image, header.l1_offset, u64::from(header.l1_size) * 8, "the L1 table")?;
        let reftable_bytes = u64::from(header.reftable_clusters) * header.cluster_size();
        let reftable = read_table(image, header.reftable_offset, reftable_bytes, "the refcount table")?;
        let (snapshots, snapshot_bytes) = read_snapshots(image, &header)?;
        Ok(Self { header, l1, reftable, snapshots, snapshot_bytes })
    }

    /// Lets the disk be what it was at a snapshot (an id, or a name).
    pub(crate) fn go_to_snapshot(&mut self, image: &ImageFile, wanted: &str) -> Result<(), OpenError> {
        let by_id = self.snapshots.iter().find(|s| s.id == wanted);
        let found = by_id.or_else(|| self.snapshots.iter().find(|s| s.name == wanted));
        let snapshot = found.ok_or_else(|| OpenError::NoSuch {
            path: image.path().to_owned(),
            what: "snapshot",
            name: wanted.to_owned(),
        })?;
        let (bytes, size) = (u64::from(snapshot.l1_size) * 8, snapshot.disk_size);
        if self.header.l1_needed(size) > u64::from(snapshot.l1_size) || size > i64::MAX as u64 {
            return Err(OpenError::corrupt(image.path(), "a snapshot's L1 table is too small for its disk"));
        }
        self.l1 = read_table(image, snapshot.l1_offset, bytes, "a snapshot's L1 table")?;
        self.header.size = size;
        Ok(())
    }

    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    pub(crate) fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }
}

/// Rebuilds the refcounts of an image that was not closed properly with lazy refcounts.
pub(super) fn settle(image: &mut ImageFile) -> Result<(), OpenError> {
    let header = Header::read(image)?;
    if header.is_dirty() {
        tracing::warn!(path = %image.path().display(), "was not closed properly, rebuilding its refcounts");
        rebuild_refcounts(image, &Tables::read(image, header)?)?;
        image.refresh_len()?;
    }
    Ok(())
}

/// A table of big-endian 64-bit entries.
pub(super) fn read_table(
    image: &ImageFile,
    offset: u64,
    bytes: u64,
    what: &str,
) -> Result<Vec<u64>, OpenError> {
    if bytes == 0 {
        return Ok(Vec::new());
    }
    let bytes = image.read(offset, bytes, what)?;
    Ok(entries(&bytes))
}

/// The big-endian 64-bit entries in `bytes`.
pub(super) fn entries(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|&e| u64::from_be_bytes(e)).collect()
}
