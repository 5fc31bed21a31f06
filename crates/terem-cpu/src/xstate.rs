//! The XSAVE area: its components and where they lie (Intel SDM vol. 1, 13.4 and 13.5).

use crate::features::FeatureSet;

/// Component: x87, in the legacy region.
pub const X87: u64 = 1;
/// Component: XMM registers and MXCSR, in the legacy region.
pub const SSE: u64 = 1 << 1;
/// Component: the upper halves of YMM registers, which shares MXCSR with [`SSE`].
pub const AVX: u64 = 1 << 2;
/// Component: the protection keys' rights.
pub const PKRU: u64 = 1 << 9;

/// Bytes of the legacy region and the header, which every area has.
pub const HEADER_END: usize = 512 + 64;
/// Bytes of the XSAVE area kept in the state: all components, standard format.
pub const XSAVE_SIZE: usize = 832 + 8;

/// A component behind the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Component {
    /// Its bit in XCR0.
    pub bit: u64,
    /// Its first byte in the standard format. (None needs an alignment of its own in the compacted one.)
    pub offset: usize,
    /// Bytes.
    pub size: usize,
    /// Models with this feature have it.
    feature: &'static str,
}

/// The components behind the header, in order.
pub const COMPONENTS: [Component; 2] = [
    Component { bit: AVX, offset: 576, size: 256, feature: "avx" },
    Component { bit: PKRU, offset: 832, size: 8, feature: "pku" },
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
    COMPONENTS.iter().filter(|c| components & c.bit != 0).fold(HEADER_END, |_, c| c.offset + c.size)
}

/// Bytes of an area with these components, compacted format.
#[must_use]
pub fn compacted_size(components: u64) -> usize {
    COMPONENTS.iter().filter(|c| components & c.bit != 0).fold(HEADER_END, |at, c| at + c.size)
}

/// Where each of these components lies, in order: standard format, or compacted.
pub fn places(components: u64, compacted: bool) -> impl Iterator<Item = (Component, usize)> {
    let mut next = HEADER_END;
    COMPONENTS.into_iter().filter(move |c| components & c.bit != 0).map(move |c| {
        let at = if compacted { next } else { c.offset };
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
        assert_eq!(standard_size(u64::MAX), XSAVE_SIZE);
        let at = |compacted| places(SSE | PKRU, compacted).map(|(c, at)| (c.bit, at)).collect::<Vec<_>>();
        assert_eq!((at(false), at(true)), (vec![(PKRU, 832)], vec![(PKRU, 576)]));
    }

    #[test]
    fn models_have_what_their_features_say() {
        assert_eq!(components(&FeatureSet::of(&["avx", "pku"])), 0);
        assert_eq!(components(&FeatureSet::of(&["xsave", "avx"])), X87 | SSE | AVX);
    }
}
