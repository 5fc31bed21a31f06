//! The header and its extensions (specification, "Header" and "Header extensions").

use super::entry::L2Format;
use crate::chain::ImageFile;
use crate::file::to_usize;
use crate::{Compression, OpenError};

/// "QFI\xfb", the first bytes of a qcow2 image.
pub(crate) const QCOW_MAGIC: [u8; 4] = *b"QFI\xfb";

/// Header length of version 2.
const V2_LENGTH: u32 = 72;
/// Shortest header of version 3.
const V3_LENGTH: u32 = 104;
/// What storage writes whole or not at all.
pub(super) const SECTOR: usize = 512;
/// Longest backing file name, in bytes.
const MAX_BACKING_NAME: u32 = 1023;
/// Limits of tables that are kept in memory, in bytes or entries; the same as QEMU's, so that whatever it
/// makes can be opened.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFTABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;

/// Byte positions of header fields that change while an image is open.
pub(crate) const INCOMPATIBLE_AT: u64 = 72;
pub(crate) const AUTOCLEAR_AT: u64 = 88;
pub(crate) const REFTABLE_AT: u64 = 48;

/// Incompatible feature bits.
pub(crate) const DIRTY: u64 = 1 << 0;
pub(crate) const CORRUPT: u64 = 1 << 1;
pub(crate) const EXTERNAL_DATA: u64 = 1 << 2;
pub(crate) const COMPRESSION: u64 = 1 << 3;
pub(crate) const EXTENDED_L2: u64 = 1 << 4;
/// Compatible feature bits.
pub(crate) const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear feature bits.
pub(crate) const BITMAPS: u64 = 1 << 0;
pub(crate) const RAW_EXTERNAL: u64 = 1 << 1;

/// Extension types.
pub(crate) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
pub(crate) const EXT_DATA_FILE: u32 = 0x4441_5441;
const EXT_CRYPT_HEADER: u32 = 0x0537_be77;
pub(crate) const EXT_BITMAPS: u32 = 0x2385_2875;

/// A parsed and checked header.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    /// Bytes of the virtual disk.
    pub(crate) size: u64,
    /// Entries of the L1 table.
    pub(crate) l1_size: u32,
    pub(crate) l1_offset: u64,
    pub(crate) reftable_offset: u64,
    pub(crate) reftable_clusters: u32,
    pub(crate) snapshot_count: u32,
    pub(crate) snapshots_offset: u64,
    /// 0: none, 1: AES, 2: LUKS.
    pub(crate) crypt_method: u32,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    /// A refcount has 2^this bits.
    pub(crate) refcount_order: u32,
    pub(crate) compression: Compression,
    pub(crate) backing: Option<String>,
    pub(crate) backing_format: Option<String>,
    /// The external data file's name.
    pub(crate) data_file: Option<String>,
    /// The LUKS header: offset, bytes.
    pub(crate) crypt_header: Option<(u64, u64)>,
    /// The bitmap directory: offset, bytes, number of bitmaps.
    pub(crate) bitmaps: Option<(u64, u64, u32)>,
    /// Extensions that are only kept.
    other_extensions: Vec<(u32, Vec<u8>)>,
    /// What follows the known fields of the header, only kept.
    other_fields: Vec<u8>,
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

impl Header {
    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// How its L2 tables look.
    pub(crate) fn l2_format(&self) -> L2Format {
        L2Format {
            cluster_bits: self.cluster_bits,
            version: self.version,
            extended: self.incompatible & EXTENDED_L2 != 0,
            external: self.incompatible & EXTERNAL_DATA != 0,
        }
    }

    /// Entries that the L1 table needs for a disk of `size` bytes.
    pub(crate) fn l1_needed(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster_size() << self.l2_format().table_bits())
    }

    /// Whether refcounts may be behind while the image is open.
    pub(crate) fn has_lazy_refcounts(&self) -> bool {
        self.version >= 3 && self.compatible & LAZY_REFCOUNTS != 0
    }

    /// Whether refcounts are behind.
    pub(crate) fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    /// Whether damage was found.
    pub(crate) fn is_corrupt(&self) -> bool {
        self.incompatible & CORRUPT != 0
    }

    /// Reads and checks an image's header.
    ///
    /// # Errors
    /// [`OpenError`] when it is none, damaged, or needs something that is not supported.
    pub(crate) fn read(image: &ImageFile) -> Result<Self, OpenError> {
        let path = image.path();
        let corrupt = |what: String| OpenError::corrupt(path, what);
        let start = image.read(0, image.len().min(V3_LENGTH.into()), "the header")?;
        if !start.starts_with(&QCOW_MAGIC) {
            return Err(OpenError::NotQcow2 { path: path.to_owned() });
        }
        if start.len() < V2_LENGTH as usize {
            return Err(OpenError::truncated(path, format!("its header has only {} bytes", start.len())));
        }
        let version = be32(&start, 4);
        if !(2..=3).contains(&version) {
            return Err(unsupported(image, format!("qcow version {version}"), CONVERT));
        }
        let cluster_bits = be32(&start, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(corrupt(format!("cluster size 2^{cluster_bits} (2^9 to 2^21 are valid)")));
        }
        if version == 3 && start.len() < V3_LENGTH as usize {
            return Err(OpenError::truncated(path, format!("its header has only {} bytes", start.len())));
        }
        let length = if version == 3 { be32(&start, 100) } else { V2_LENGTH };
        let cluster = 1u64 << cluster_bits;
        if version == 3 && (length < V3_LENGTH || u64::from(length) > cluster) {
            return Err(corrupt(format!("a header of {length} bytes")));
        }
        let head = image.read(0, image.len().min(cluster), "the header")?;
        if (head.len() as u64) < length.into() {
            return Err(OpenError::truncated(path, format!("its header has only {} bytes", head.len())));
        }
        let v3 = |at| if version == 3 { be64(&start, at) } else { 0 };
        let mut header = Self {
            version,
            cluster_bits,
            size: be64(&head, 24),
            l1_size: be32(&head, 36),
            l1_offset: be64(&head, 40),
            reftable_offset: be64(&head, 48),
            reftable_clusters: be32(&head, 56),
            snapshot_count: be32(&head, 60),
            snapshots_offset: be64(&head, 64),
            crypt_method: be32(&head, 32),
            incompatible: v3(72),
            compatible: v3(80),
            autoclear: v3(88),
            refcount_order: if version == 3 { be32(&head, 96) } else { 4 },
            compression: Compression::Zlib,
            backing: None,
            backing_format: None,
            data_file: None,
            crypt_header: None,
            bitmaps: None,
            other_extensions: Vec::new(),
            other_fields: head.get(112..length as usize).unwrap_or_default().to_vec(),
        };
        header.check_features(image, &head, length)?;
        if header.crypt_method > 2 {
            let method = header.crypt_method;
            return Err(unsupported(image, format!("encryption of method {method}"), CONVERT));
        }
        // "If the incompatible bit "Compression type" is set, the compression type must not be zero", and the other way
        // round.
        let method = head.get(104).filter(|_| length > 104).copied();
        header.compression = match (method, header.incompatible & COMPRESSION != 0) {
            (None | Some(0), false) => Compression::Zlib,
            (Some(1), true) => Compression::Zstd,
            (Some(0 | 1), _) => {
                return Err(OpenError::corrupt(
                    image.path(),
                    "its compression type and its feature bit disagree",
                ));
            }
            (other, _) => return Err(unsupported(image, format!("compression type {other:?}"), CONVERT)),
        };
        header.read_backing_name(image, &head)?;
        header.read_extensions(image, &head, length)?;
        header.check_tables(image)?;
        Ok(header)
    }

    fn check_features(&self, image: &ImageFile, head: &[u8], length: u32) -> Result<(), OpenError> {
        if self.incompatible & EXTENDED_L2 != 0 && self.cluster_bits < 14 {
            let what = format!("subclusters in clusters of {} bytes", self.cluster_size());
            return Err(OpenError::corrupt(image.path(), what));
        }
        let unknown = self.incompatible & !(DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2);
        if unknown == 0 {
            return Ok(());
        }
        // The table's entries: type, bit, 46 bytes of name.
        let table = extensions(head, length).into_iter().find(|e| e.0 == EXT_FEATURE_NAMES).map(|e| e.1);
        let name_of = |bit: u32| {
            let entries = table.as_deref().unwrap_or_default().chunks_exact(48);
            let entry = entries.into_iter().find(|e| e[0] == 0 && u32::from(e[1]) == bit)?;
            let name: String =
                String::from_utf8_lossy(&entry[2..]).chars().take_while(|c| *c != '\0').collect();
            (!name.is_empty()).then(|| name.escape_debug().to_string())
        };
        let names = (0..64)
            .filter(|bit| unknown >> bit & 1 == 1)
            .map(|bit| name_of(bit).unwrap_or_else(|| format!("incompatible feature bit {bit}")))
            .collect();
        Err(OpenError::UnknownFeatures { path: image.path().to_owned(), names })
    }

    fn read_backing_name(&mut self, image: &ImageFile, head: &[u8]) -> Result<(), OpenError> {
        let (offset, length) = (be64(head, 8), be32(head, 16));
        if offset == 0 {
            return Ok(());
        }
        if length > MAX_BACKING_NAME {
            return Err(OpenError::corrupt(image.path(), format!("a backing file name of {length} bytes")));
        }
        let name = usize::try_from(offset)
            .ok()
            .and_then(|at| head.get(at..at.checked_add(length as usize)?))
            .ok_or_else(|| {
                OpenError::corrupt(image.path(), "its backing file name is outside of the first cluster")
            })?;
        let name = std::str::from_utf8(name)
            .map_err(|_| OpenError::corrupt(image.path(), "its backing file name is not UTF-8"))?;
        if name.contains('\0') {
            return Err(OpenError::corrupt(image.path(), "its backing file name has a NUL byte"));
        }
        self.backing = (!name.is_empty()).then(|| name.to_owned());
        Ok(())
    }

    fn read_extensions(&mut self, image: &ImageFile, head: &[u8], length: u32) -> Result<(), OpenError> {
        for (kind, data) in extensions(head, length) {
            match kind {
                EXT_BACKING_FORMAT => self.backing_format = Some(String::from_utf8_lossy(&data).into_owned()),
                EXT_BITMAPS if data.len() < 24 => {
                    return Err(OpenError::corrupt(image.path(), "its bitmaps extension is too short"));
                }
                EXT_BITMAPS => {
                    self.bitmaps = Some((be64(&data, 16), be64(&data, 8), be32(&data, 0)));
                }
                EXT_CRYPT_HEADER if data.len() < 16 => {
                    return Err(OpenError::corrupt(image.path(), "its encryption extension is too short"));
                }
                EXT_CRYPT_HEADER => self.crypt_header = Some((be64(&data, 0), be64(&data, 8))),
                EXT_DATA_FILE => self.data_file = Some(String::from_utf8_lossy(&data).into_owned()),
                _ => self.other_extensions.push((kind, data)),
            }
        }
        Ok(())
    }

    fn check_tables(&self, image: &ImageFile) -> Result<(), OpenError> {
        let (path, cluster) = (image.path(), self.cluster_size());
        let corrupt = |what: String| Err(OpenError::corrupt(path, what));
        if self.refcount_order > 6 {
            return corrupt(format!("refcounts of 2^{} bits (64 bits at most)", self.refcount_order));
        }
        let needed = self.l1_needed(self.size);
        if self.size > i64::MAX as u64 || needed * 8 > MAX_L1_BYTES {
            let what =
                format!("a virtual size of {} bytes is too large for clusters of {cluster}", self.size);
            return Err(OpenError::Limit { path: path.to_owned(), what });
        }
        if u64::from(self.l1_size) * 8 > MAX_L1_BYTES || u64::from(self.l1_size) < needed {
            return corrupt(format!("an L1 table of {} entries, where {needed} are needed", self.l1_size));
        }
        if self.l1_size > 0 && (self.l1_offset == 0 || !self.l1_offset.is_multiple_of(cluster)) {
            return corrupt(format!("its L1 table is at {:#x}", self.l1_offset));
        }
        if self.reftable_offset == 0 || !self.reftable_offset.is_multiple_of(cluster) {
            return corrupt(format!("its refcount table is at {:#x}", self.reftable_offset));
        }
        let reftable_bytes = u64::from(self.reftable_clusters) * cluster;
        if self.reftable_clusters == 0 || reftable_bytes > MAX_REFTABLE_BYTES.max(cluster) {
            return corrupt(format!("a refcount table of {} clusters", self.reftable_clusters));
        }
        if self.snapshot_count > MAX_SNAPSHOTS {
            return corrupt(format!("{} snapshots (65536 at most)", self.snapshot_count));
        }
        if self.snapshot_count > 0 && !self.snapshots_offset.is_multiple_of(cluster) {
            return corrupt(format!("its snapshot table is at {:#x}", self.snapshots_offset));
        }
        Ok(())
    }
}

impl Header {
    /// A header of version 3 for a new image, whose tables are nowhere yet.
    pub(crate) fn new(cluster_bits: u32, size: u64) -> Self {
        Self {
            version: 3,
            cluster_bits,
            size,
            l1_size: 0,
            l1_offset: 0,
            reftable_offset: 0,
            reftable_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: 0,
            crypt_method: 0,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            compression: Compression::Zlib,
            backing: None,
            backing_format: None,
            data_file: None,
            crypt_header: None,
            bitmaps: None,
            other_extensions: Vec::new(),
            other_fields: Vec::new(),
        }
    }

    /// The bytes of the first cluster's beginning: header, extensions, backing file name; for a new image.
    ///
    /// # Errors
    /// What does not fit into the first cluster.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, String> {
        self.check_name()?;
        let cluster = self.cluster_size();
        // The table of feature names, which is only for messages, gives way.
        let forms = [true, false].map(|names| self.encode_with(names, None));
        let fits = forms.into_iter().find(|bytes| bytes.len() as u64 <= cluster);
        fits.ok_or_else(|| format!("the backing file's name is too long for clusters of {cluster} bytes"))
    }

    pub(super) fn check_name(&self) -> Result<(), String> {
        let name = self.backing.as_ref().map_or(0, String::len);
        if name > MAX_BACKING_NAME as usize {
            return Err(format!("a backing file name of {name} bytes; {MAX_BACKING_NAME} are allowed"));
        }
        Ok(())
    }

    /// Whether it can have a table of feature names.
    pub(super) fn has_feature_names(&self) -> bool {
        self.version >= 3
    }

    /// Everything up to the end of the backing file's name, which is at `name_at`, or right behind the rest.
    /// `feature_names`: with the table of them.
    pub(super) fn encode_with(&self, feature_names: bool, name_at: Option<u64>) -> Vec<u8> {
        let mut bytes = self.fields_and_extensions(feature_names);
        if let Some(name) = &self.backing {
            let at = name_at.unwrap_or(bytes.len() as u64);
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes());
            bytes.resize(bytes.len().max(to_usize(at)), 0);
            bytes.extend(name.bytes());
        }
        bytes
    }

    /// Everything but the backing file's name. What changes while an image is in use comes first, the table of feature
    /// names last.
    pub(super) fn fields_and_extensions(&self, feature_names: bool) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SECTOR);
        bytes.extend(QCOW_MAGIC);
        bytes.extend(self.version.to_be_bytes());
        bytes.extend([0; 12]); // backing file name: filled in below
        bytes.extend(self.cluster_bits.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(self.crypt_method.to_be_bytes());
        bytes.extend(self.l1_size.to_be_bytes());
        bytes.extend(self.l1_offset.to_be_bytes());
        bytes.extend(self.reftable_offset.to_be_bytes());
        bytes.extend(self.reftable_clusters.to_be_bytes());
        bytes.extend(self.snapshot_count.to_be_bytes());
        bytes.extend(self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            bytes.extend(self.incompatible.to_be_bytes());
            bytes.extend(self.compatible.to_be_bytes());
            bytes.extend(self.autoclear.to_be_bytes());
            bytes.extend(self.refcount_order.to_be_bytes());
            let length = 112 + self.other_fields.len();
            bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
            bytes.push(match self.compression {
                Compression::Zlib => 0,
                Compression::Zstd => 1,
            });
            bytes.extend([0; 7]);
            bytes.extend(&self.other_fields);
        }
        let mut extend = |kind: u32, data: &[u8]| {
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
            bytes.extend(data);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            extend(EXT_BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            extend(EXT_DATA_FILE, name.as_bytes());
        }
        if let Some((offset, length)) = self.crypt_header {
            extend(EXT_CRYPT_HEADER, &[offset.to_be_bytes(), length.to_be_bytes()].concat());
        }
        if let Some((offset, length, number)) = self.bitmaps {
            let mut data = number.to_be_bytes().to_vec();
            data.extend([0; 4]);
            data.extend(length.to_be_bytes());
            data.extend(offset.to_be_bytes());
            extend(EXT_BITMAPS, &data);
        }
        for (kind, data) in self.other_extensions.iter().filter(|e| e.0 != EXT_FEATURE_NAMES) {
            extend(*kind, data);
        }
        if feature_names && self.has_feature_names() {
            let theirs = self.other_extensions.iter().find(|e| e.0 == EXT_FEATURE_NAMES);
            let table = theirs.map_or_else(feature_name_table, |(_, table)| table.clone());
            extend(EXT_FEATURE_NAMES, &table);
        }
        extend(0, &[]);
        bytes
    }
}

/// The table of feature names (specification, "Feature name table"): type, bit and 46 bytes of name each.
fn feature_name_table() -> Vec<u8> {
    const NAMES: [(u8, u64, &str); 8] = [
        (0, DIRTY, "dirty bit"),
        (0, CORRUPT, "corrupt bit"),
        (0, EXTERNAL_DATA, "external data file"),
        (0, COMPRESSION, "compression type"),
        (0, EXTENDED_L2, "extended L2 entries"),
        (1, LAZY_REFCOUNTS, "lazy refcounts"),
        (2, BITMAPS, "bitmaps"),
        (2, RAW_EXTERNAL, "raw external data"),
    ];
    let mut table = Vec::with_capacity(NAMES.len() * 48);
    for (kind, bit, name) in NAMES {
        table.extend([kind, u8::try_from(bit.trailing_zeros()).unwrap_or(u8::MAX)]);
        table.extend(name.as_bytes());
        table.resize(table.len().next_multiple_of(48), 0);
    }
    table
}

/// The extensions after a header of `length` bytes: type and data. Stops at the first that does not fit.
fn extensions(head: &[u8], length: u32) -> Vec<(u32, Vec<u8>)> {
    let mut found = Vec::new();
    let mut at = length as usize;
    // The backing file name, if any, ends the extensions' area.
    let backing = usize::try_from(be64(head, 8)).unwrap_or(0);
    let end = if backing > 0 { backing.min(head.len()) } else { head.len() };
    while at + 8 <= end {
        let (kind, len) = (be32(head, at), be32(head, at + 4) as usize);
        let Some(data) = head.get(at + 8..end).and_then(|rest| rest.get(..len)) else { break };
        if kind == 0 {
            break;
        }
        found.push((kind, data.to_vec()));
        at += 8 + len.next_multiple_of(8);
    }
    found
}

const CONVERT: &str = "convert it with `qemu-img convert -O qcow2`";

fn unsupported(image: &ImageFile, feature: String, hint: &'static str) -> OpenError {
    OpenError::Unsupported { path: image.path().to_owned(), feature, hint }
}
