//! The XSAVE area: its components and where they lie (Intel SDM vol. 1, 13.4 and 13.5).

use crate::features::FeatureSet;

/// Component: x87, in the legacy region.
pub const X87: u64 = 1;
/// Component: XMM registers and MXCSR, in the legacy region.
pub const SSE: u64 = 1 << 1;
/// Component: the upper halves of YMM registers, which shares MXCSR with [`SSE`].
pub const AVX: u64 = 1 << 2;
/// Component: MPX, the bounds registers.
pub const BNDREGS: u64 = 1 << 3;
/// Component: MPX, its configuration and status.
pub const BNDCSR: u64 = 1 << 4;
/// Component: AVX-512, the mask registers.
pub const OPMASK: u64 = 1 << 5;
/// Component: AVX-512, the upper halves of ZMM0 to ZMM15.
pub const ZMM_UPPER: u64 = 1 << 6;
/// Component: AVX-512, ZMM16 to ZMM31.
pub const ZMM_HIGH: u64 = 1 << 7;
/// Component: the protection keys' rights.
pub const PKRU: u64 = 1 << 9;
/// Component: AMX, the tiles' configuration.
pub const TILE_CONFIG: u64 = 1 << 17;
/// Component: AMX, the tiles.
pub const TILE_DATA: u64 = 1 << 18;

/// Bytes of the legacy region and the header, which every area has.
pub const HEADER_END: usize = 512 + 64;
/// Bytes of the XSAVE area kept in the state: the components that the software CPU has, standard format.
pub const XSAVE_SIZE: usize = 832 + 8;

/// A component behind the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Component {
    /// Its bit in XCR0.
    pub bit: u64,
    /// Its first byte in the standard format.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
    /// Whether it begins at a multiple of 64 bytes in the compacted format, too.
    pub aligned: bool,
    /// Models with this feature have it.
    feature: &'static str,
}

const fn component(bit: u64, offset: usize, size: usize, feature: &'static str) -> Component {
    Component { bit, offset, size, aligned: bit >= TILE_CONFIG, feature }
}

/// The components behind the header, in the order of their bits. Offsets are a processor's own choice: these are Intel's,
/// but for PKRU, which lies where AMD has it (and where nothing else lies).
pub const COMPONENTS: [Component; 9] = [
    component(AVX, 576, 256, "avx"),
    component(BNDREGS, 960, 64, "mpx"),
    component(BNDCSR, 1024, 64, "mpx"),
    component(OPMASK, 1088, 64, "avx512f"),
    component(ZMM_UPPER, 1152, 512, "avx512f"),
    component(ZMM_HIGH, 1664, 1024, "avx512f"),
    component(PKRU, 832, 8, "pku"),
    component(TILE_CONFIG, 2752, 64, "amx-tile"),
    component(TILE_DATA, 2816, 8192, "amx-tile"),
];

/// The components that a model has: the bits that XCR0 may have. 0 without XSAVE.
#[must_use]
pub fn components(features: &FeatureSet) -> u64 {
    if !features.has("xsave") {
        return 0;
    }
    COMPONENTS.iter().filter(|c| features.has(c.feature)).fold(X87 | SSE, |all, c| all | c.bit)
}

/// Bytes of an area with these components, standard format.
#[must_use]
pub fn standard_size(components: u64) -> usize {
    let ends = COMPONENTS.iter().filter(|c| components & c.bit != 0).map(|c| c.offset + c.size);
    ends.fold(HEADER_END, usize::max)
}

/// Bytes of an area with these components, compacted format.
#[must_use]
pub fn compacted_size(components: u64) -> usize {
    places(components, true).last().map_or(HEADER_END, |(c, at)| at + c.size)
}

/// Where each of these components lies, in order: standard format, or compacted.
pub fn places(components: u64, compacted: bool) -> impl Iterator<Item = (Component, usize)> {
    let mut next = HEADER_END;
    COMPONENTS.into_iter().filter(move |c| components & c.bit != 0).map(move |c| {
        let packed = if c.aligned { next.next_multiple_of(64) } else { next };
        let at = if compacted { packed } else { c.offset };
        next = at + c.size;
        (c, at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_differ_where_components_are_left_out() {
        assert_eq!((standard_size(X87 | SSE), compacted_size(X87 | SSE)), (576, 576));
        assert_eq!((standard_size(X87 | PKRU), compacted_size(X87 | PKRU)), (840, 584));
        assert_eq!(standard_size(X87 | SSE | AVX | PKRU), XSAVE_SIZE);
        assert_eq!((standard_size(u64::MAX), standard_size(ZMM_HIGH | PKRU)), (2816 + 8192, 2688));
        assert_eq!(compacted_size(PKRU | TILE_DATA), 640 + 8192);
        let at = |compacted| places(SSE | PKRU, compacted).map(|(c, at)| (c.bit, at)).collect::<Vec<_>>();
        assert_eq!((at(false), at(true)), (vec![(PKRU, 832)], vec![(PKRU, 576)]));
    }

    #[test]
    fn components_do_not_overlap() {
        let mut all = COMPONENTS;
        all.sort_by_key(|c| c.offset);
        assert!(all.windows(2).all(|w| w[0].offset + w[0].size <= w[1].offset));
        assert!(COMPONENTS.is_sorted_by_key(|c| c.bit));
    }

    #[test]
    fn models_have_what_their_features_say() {
        assert_eq!(components(&FeatureSet::of(&["avx", "pku"])), 0);
        assert_eq!(components(&FeatureSet::of(&["xsave", "avx"])), X87 | SSE | AVX);
    }
}
