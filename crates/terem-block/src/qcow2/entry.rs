//! L1 and L2 table entries (specification, "Cluster mapping" and "Extended L2 Entries").

/// Host offset bits of an L1, L2 or refcount table entry.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// "The refcount of the cluster is exactly one."
pub(crate) const COPIED: u64 = 1 << 63;
/// "Compressed cluster."
const COMPRESSED: u64 = 1 << 62;
/// "Reads as all zeroes" (version 3, not in extended entries).
const ZERO: u64 = 1;

/// log2 of the subclusters of a cluster with extended L2 entries.
const SUBCLUSTER_BITS: u32 = 5;
/// The bits of an extended entry's bitmap that say "allocated"; the upper half says "reads as zeroes".
const ALLOCATED: u64 = u32::MAX as u64;

/// An L2 entry. The bitmap is 0 in images without extended entries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) descriptor: u64,
    pub(crate) bitmap: u64,
}

/// What a cluster, or a subcluster, is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Nothing here: the backing file shines through, or zeroes.
    Unallocated,
    /// Zeroes, perhaps with a cluster kept for later.
    Zero { host: Option<u64>, copied: bool },
    /// An ordinary cluster. `copied`: nobody else uses it, so it can be overwritten.
    Data { host: u64, copied: bool },
    /// Compressed data of at most `length` bytes at any byte offset.
    Compressed { host: u64, length: u64 },
}

/// What an L2 entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cluster {
    /// Of the whole cluster. With extended entries `Data` only says that it has a host cluster, and `Unallocated` that
    /// it has none; the bitmap goes into detail.
    pub(crate) mapping: Mapping,
    pub(crate) bitmap: u64,
}

impl Cluster {
    pub(crate) const UNALLOCATED: Self = Self { mapping: Mapping::Unallocated, bitmap: 0 };

    /// The host cluster and whether nobody else uses it, if there is one that is not compressed.
    pub(crate) fn host(&self) -> Option<(u64, bool)> {
        match self.mapping {
            Mapping::Data { host, copied } | Mapping::Zero { host: Some(host), copied } => {
                Some((host, copied))
            }
            _ => None,
        }
    }

    /// The first host cluster and the number of host clusters that it uses.
    pub(crate) fn host_clusters(&self, cluster_bits: u32) -> (u64, u64) {
        match self.mapping {
            Mapping::Unallocated | Mapping::Zero { host: None, .. } => (0, 0),
            Mapping::Zero { host: Some(host), .. } | Mapping::Data { host, .. } => (host >> cluster_bits, 1),
            Mapping::Compressed { host, length } => {
                let (first, last) = (host >> cluster_bits, (host + length - 1) >> cluster_bits);
                (first, last - first + 1)
            }
        }
    }
}

/// How L2 tables of an image look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct L2Format {
    pub(crate) cluster_bits: u32,
    pub(crate) version: u32,
    /// Entries of 16 bytes, with subclusters.
    pub(crate) extended: bool,
    /// Data is in a file of its own, where it may begin at 0.
    pub(crate) external: bool,
}

impl L2Format {
    /// log2 of the entries in a table.
    pub(crate) fn table_bits(self) -> u32 {
        self.cluster_bits - 3 - u32::from(self.extended)
    }

    /// log2 of the bytes of the smallest unit with a mapping of its own: a cluster, or a subcluster.
    pub(crate) fn unit_bits(self) -> u32 {
        self.cluster_bits - if self.extended { SUBCLUSTER_BITS } else { 0 }
    }

    /// Bytes of an entry.
    pub(crate) fn entry_size(self) -> usize {
        if self.extended { 16 } else { 8 }
    }

    /// The entries in a table or a part of one.
    pub(crate) fn entries(self, table: &[u8]) -> impl Iterator<Item = Entry> + '_ {
        table.chunks_exact(self.entry_size()).map(move |bytes| {
            let words = bytes.as_chunks::<8>().0;
            let bitmap = if self.extended { u64::from_be_bytes(words[1]) } else { 0 };
            Entry { descriptor: u64::from_be_bytes(words[0]), bitmap }
        })
    }

    /// The bytes of a table that hold `count` entries from `index` on.
    pub(crate) fn bytes(self, index: usize, count: usize) -> std::ops::Range<usize> {
        index * self.entry_size()..(index + count) * self.entry_size()
    }

    /// Writes an entry into its bytes.
    pub(crate) fn put(self, bytes: &mut [u8], entry: Entry) {
        let words = bytes.as_chunks_mut::<8>().0;
        words[0] = entry.descriptor.to_be_bytes();
        if let Some(bitmap) = words.get_mut(1) {
            *bitmap = entry.bitmap.to_be_bytes();
        }
    }

    /// Decodes an entry.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(self, entry: Entry) -> Result<Cluster, String> {
        let Entry { descriptor, bitmap } = entry;
        if descriptor & COMPRESSED != 0 {
            if bitmap != 0 {
                return Err("a compressed cluster with subclusters".into());
            }
            // x = 62 - (cluster_bits - 8) bits of offset, then the number of further 512-byte sectors.
            let x = 62 - (self.cluster_bits - 8);
            let host = descriptor & ((1 << x) - 1) & ((1 << 56) - 1);
            let sectors = (descriptor & (COMPRESSED - 1)) >> x;
            let mapping = Mapping::Compressed { host, length: (sectors + 1) * 512 - host % 512 };
            return Ok(Cluster { mapping, bitmap });
        }
        let host = descriptor & OFFSET;
        if host & ((1 << self.cluster_bits) - 1) != 0 {
            return Err(format!("an L2 entry refers to {host:#x}, which is not the beginning of a cluster"));
        }
        let copied = descriptor & COPIED != 0;
        if descriptor & ZERO != 0 {
            if self.version < 3 || self.extended {
                return Err("a zero cluster where there can be none".into());
            }
            return Ok(Cluster {
                mapping: Mapping::Zero { host: (host != 0).then_some(host), copied },
                bitmap,
            });
        }
        if bitmap & ALLOCATED & bitmap >> 32 != 0 {
            return Err("a subcluster that is both allocated and zero".into());
        }
        let there = host != 0 || self.external && copied;
        if self.extended && !there && bitmap & ALLOCATED != 0 {
            return Err("subclusters without a cluster".into());
        }
        let mapping = if there { Mapping::Data { host, copied } } else { Mapping::Unallocated };
        Ok(Cluster { mapping, bitmap })
    }

    /// The mapping of unit `index` of a cluster.
    pub(crate) fn unit(self, cluster: &Cluster, index: u32) -> Mapping {
        if !self.extended {
            return cluster.mapping;
        }
        let at = u64::from(index) << self.unit_bits();
        let zero = cluster.bitmap >> 32 >> index & 1 == 1;
        match cluster.mapping {
            Mapping::Data { host, copied } if cluster.bitmap >> index & 1 == 1 => {
                Mapping::Data { host: host + at, copied }
            }
            Mapping::Data { host, copied } if zero => Mapping::Zero { host: Some(host + at), copied },
            Mapping::Unallocated if zero => Mapping::Zero { host: None, copied: false },
            Mapping::Data { .. } => Mapping::Unallocated,
            other => other,
        }
    }

    /// The bits of the units that hold a part of the bytes `start..end` of a cluster.
    pub(crate) fn unit_mask(self, start: u64, end: u64) -> u64 {
        if !self.extended || start >= end {
            return 0;
        }
        let (first, last) = (start >> self.unit_bits(), (end - 1) >> self.unit_bits());
        ALLOCATED >> (31 - (last - first).min(31)) << first & ALLOCATED
    }

    /// The entry of a cluster with data at `host` in the units of `mask`, that was `before` otherwise.
    pub(crate) fn data(self, host: u64, mask: u64, before: u64) -> Entry {
        let bitmap = if self.extended { (before | mask) & !(mask << 32) } else { 0 };
        Entry { descriptor: host | COPIED, bitmap }
    }

    /// The bits of all units.
    pub(crate) fn all_units(self) -> u64 {
        if self.extended { ALLOCATED } else { 0 }
    }

    /// The entry of a cluster that is zero, with a host cluster of its own (or a shared one) kept for later, or none.
    pub(crate) fn zero(self, kept: Option<(u64, bool)>) -> Entry {
        let host = kept.map_or(0, |(host, copied)| host | if copied { COPIED } else { 0 });
        if self.extended {
            Entry { descriptor: host, bitmap: ALLOCATED << 32 }
        } else {
            Entry { descriptor: host | ZERO, bitmap: 0 }
        }
    }

    /// The entry of a compressed cluster.
    pub(crate) fn compressed(self, host: u64, length: u64) -> Entry {
        let sectors = (host + length - 1) / 512 - host / 512;
        let x = 62 - (self.cluster_bits - 8);
        Entry { descriptor: COMPRESSED | sectors << x | host, bitmap: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: L2Format = L2Format { cluster_bits: 16, version: 3, extended: false, external: false };
    const EXTENDED: L2Format = L2Format { extended: true, ..PLAIN };

    fn mapping(descriptor: u64) -> Result<Mapping, String> {
        PLAIN.decode(Entry { descriptor, bitmap: 0 }).map(|c| c.mapping)
    }

    #[test]
    fn entries_mean_what_the_specification_says() {
        assert_eq!(mapping(0), Ok(Mapping::Unallocated));
        assert_eq!(mapping(COPIED | 0x50000), Ok(Mapping::Data { host: 0x50000, copied: true }));
        assert_eq!(mapping(1), Ok(Mapping::Zero { host: None, copied: false }));
        assert_eq!(mapping(0x50001), Ok(Mapping::Zero { host: Some(0x50000), copied: false }));
        assert!(mapping(0x50200).is_err());
        assert!(L2Format { version: 2, ..PLAIN }.decode(Entry { descriptor: 1, bitmap: 0 }).is_err());
        // 64 KiB clusters: 54 bits of offset, then sectors.
        let compressed = PLAIN.decode(Entry { descriptor: COMPRESSED | 3 << 54 | 0x5_ff10, bitmap: 0 });
        let compressed = compressed.expect("valid");
        assert_eq!(compressed.mapping, Mapping::Compressed { host: 0x5_ff10, length: 4 * 512 - 0x110 });
        assert_eq!(compressed.host_clusters(16), (5, 2));
        let again = PLAIN.compressed(0x5_ff10, 4 * 512 - 0x110);
        assert_eq!(PLAIN.decode(again).map(|c| c.mapping), Ok(compressed.mapping));
    }

    #[test]
    fn subclusters() {
        let entry = Entry { descriptor: COPIED | 0x50000, bitmap: 0b0110 | 0b1000 << 32 };
        let cluster = EXTENDED.decode(entry).expect("valid");
        let unit = |i| EXTENDED.unit(&cluster, i);
        assert_eq!(unit(0), Mapping::Unallocated);
        assert_eq!(unit(2), Mapping::Data { host: 0x50000 + 2 * 2048, copied: true });
        assert_eq!(unit(3), Mapping::Zero { host: Some(0x50000 + 3 * 2048), copied: true });
        for bad in [Entry { bitmap: 1 | 1 << 32, ..entry }, Entry { descriptor: 0, bitmap: 1 }] {
            assert!(EXTENDED.decode(bad).is_err());
        }
        assert_eq!(EXTENDED.unit_mask(2047, 4097), 0b111);
        assert_eq!(EXTENDED.unit_mask(0, 65536), ALLOCATED);
        assert_eq!(EXTENDED.data(0x50000, 0b1000, entry.bitmap).bitmap, 0b1110);
    }
}
