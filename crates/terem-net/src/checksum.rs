//! The Internet checksum (RFC 1071), as IPv4, TCP and UDP use it.

/// A running ones' complement sum of big-endian 16-bit words.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// Adds `bytes`; an odd last byte counts as the high half of a word, so only the last piece may be odd.
    pub(crate) fn add(mut self, bytes: &[u8]) -> Self {
        // Words may be added in any size and then folded (RFC 1071, 2(B) and (C)): 32 bits at a time into 64 bits
        // cannot overflow for any frame. Native order would do as well, with a swap at the end; big-endian loads
        // cost next to nothing.
        let mut words = bytes.chunks_exact(4);
        for word in &mut words {
            self.0 += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
        }
        self.0 += match *words.remainder() {
            [a] => u64::from(a) << 8,
            [a, b] => u64::from(u16::from_be_bytes([a, b])),
            [a, b, c] => u64::from(u16::from_be_bytes([a, b])) + (u64::from(c) << 8),
            _ => 0,
        };
        self
    }

    /// Adds a 16-bit number.
    pub(crate) fn add_word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word))
    }

    /// The sum folded to 16 bits, not yet complemented: what a partial checksum field holds.
    pub(crate) fn fold(self) -> u16 {
        let mut sum = self.0;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap_or(u16::MAX)
    }

    /// The checksum: the complement of the sum.
    pub(crate) fn finish(self) -> u16 {
        !self.fold()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071, 3: the worked example sums to 0xddf2.
    #[test]
    fn agrees_with_the_rfc() {
        let sum = Sum::default().add(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.fold(), 0xddf2);
        assert_eq!(sum.finish(), 0x220d);
    }

    fn word_by_word(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::try_from(sum).unwrap()
    }

    proptest! {
        #[test]
        fn agrees_with_word_by_word(bytes in prop::collection::vec(any::<u8>(), 0..300), cut in 0usize..150) {
            let cut = (cut * 2).min(bytes.len() & !1);
            let sum = Sum::default().add(&bytes[..cut]).add(&bytes[cut..]);
            prop_assert_eq!(sum.fold(), word_by_word(&bytes));
        }
    }
}
