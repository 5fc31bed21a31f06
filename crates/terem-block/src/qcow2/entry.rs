//! L1 and L2 table entries (specification, "Cluster mapping").

/// Host offset bits of an L1, L2 or refcount table entry.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// "The refcount of the cluster is exactly one."
pub(crate) const COPIED: u64 = 1 << 63;
/// "Compressed cluster."
const COMPRESSED: u64 = 1 << 62;
/// "Reads as all zeroes" (version 3).
pub(crate) const ZERO: u64 = 1;

/// What an L2 entry says.
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

impl Mapping {
    /// Decodes `entry`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn decode(entry: u64, cluster_bits: u32, version: u32) -> Result<Self, String> {
        if entry & COMPRESSED != 0 {
            // x = 62 - (cluster_bits - 8) bits of offset, then the number of further 512-byte sectors.
            let x = 62 - (cluster_bits - 8);
            let host = entry & ((1 << x) - 1) & ((1 << 56) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> x;
            return Ok(Self::Compressed { host, length: (sectors + 1) * 512 - host % 512 });
        }
        let host = entry & OFFSET;
        if host & ((1 << cluster_bits) - 1) != 0 {
            return Err(format!("an L2 entry refers to {host:#x}, which is not the beginning of a cluster"));
        }
        let copied = entry & COPIED != 0;
        if entry & ZERO != 0 {
            if version < 3 {
                return Err("a zero cluster in a version 2 image".into());
            }
            return Ok(Self::Zero { host: (host != 0).then_some(host), copied });
        }
        Ok(if host == 0 { Self::Unallocated } else { Self::Data { host, copied } })
    }

    /// The first host cluster and the number of host clusters that the mapping uses.
    pub(crate) fn host_clusters(&self, cluster_bits: u32) -> (u64, u64) {
        match *self {
            Self::Unallocated | Self::Zero { host: None, .. } => (0, 0),
            Self::Zero { host: Some(host), .. } | Self::Data { host, .. } => (host >> cluster_bits, 1),
            Self::Compressed { host, length } => {
                let (first, last) = (host >> cluster_bits, (host + length - 1) >> cluster_bits);
                (first, last - first + 1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_mean_what_the_specification_says() {
        let decode = |e| Mapping::decode(e, 16, 3);
        assert_eq!(decode(0), Ok(Mapping::Unallocated));
        assert_eq!(decode(COPIED | 0x50000), Ok(Mapping::Data { host: 0x50000, copied: true }));
        assert_eq!(decode(1), Ok(Mapping::Zero { host: None, copied: false }));
        assert_eq!(decode(0x50001), Ok(Mapping::Zero { host: Some(0x50000), copied: false }));
        assert!(decode(0x50200).is_err());
        assert!(Mapping::decode(1, 16, 2).is_err());
        // 64 KiB clusters: 54 bits of offset, then sectors.
        let compressed = Mapping::decode(COMPRESSED | 3 << 54 | 0x5_ff10, 16, 3);
        assert_eq!(compressed, Ok(Mapping::Compressed { host: 0x5_ff10, length: 4 * 512 - 0x110 }));
        assert_eq!(compressed.map(|m| m.host_clusters(16)), Ok((5, 2)));
    }
}
