//! Reference counts in their blocks (specification, "Host cluster management").

/// How refcounts lie in a block: width and number.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RefcountFormat {
    /// A refcount has 2^this bits.
    order: u32,
    /// log2 of the refcounts in a block.
    block_bits: u32,
}

impl RefcountFormat {
    pub(crate) fn new(order: u32, cluster_bits: u32) -> Self {
        Self { order, block_bits: cluster_bits + 3 - order }
    }

    /// Number of refcounts in a block.
    pub(crate) fn per_block(self) -> u64 {
        1 << self.block_bits
    }

    /// Largest refcount.
    pub(crate) fn max(self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.order))
    }

    /// The block of a host cluster and the place in it.
    pub(crate) fn place(self, cluster: u64) -> (u64, usize) {
        let index = cluster & (self.per_block() - 1);
        (cluster >> self.block_bits, usize::try_from(index).unwrap_or(0))
    }

    /// The bytes of a block that hold the refcount at `index`.
    pub(crate) fn bytes(self, index: usize) -> std::ops::Range<usize> {
        if self.order < 3 {
            let at = index >> (3 - self.order);
            at..at + 1
        } else {
            let width = 1 << (self.order - 3);
            index * width..(index + 1) * width
        }
    }

    /// The refcount at `index` of `block`.
    pub(crate) fn get(self, block: &[u8], index: usize) -> u64 {
        let bytes = block.get(self.bytes(index)).unwrap_or_default();
        let value = bytes.iter().fold(0, |n, &byte| n << 8 | u64::from(byte));
        if self.order < 3 {
            // "Bit 0 means the least significant bit in this context."
            let shift = (index << self.order) & 7;
            value >> shift & self.max()
        } else {
            value
        }
    }

    /// Sets the refcount at `index` of `block` to `value`, which must not be more than [`Self::max`].
    pub(crate) fn set(self, block: &mut [u8], index: usize, value: u64) {
        let range = self.bytes(index);
        let Some(bytes) = block.get_mut(range) else { return };
        if self.order < 3 {
            let shift = (index << self.order) & 7;
            let mask = self.max() << shift;
            let [low, ..] = ((u64::from(bytes[0]) & !mask) | (value << shift & mask)).to_le_bytes();
            bytes[0] = low;
        } else {
            let value = value.to_be_bytes();
            bytes.copy_from_slice(&value[8 - bytes.len()..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_widths_keep_their_neighbours() {
        for order in 0..=6 {
            let format = RefcountFormat::new(order, 9);
            assert_eq!(format.per_block(), (512 * 8) >> order);
            let mut block = vec![0; 512];
            let value = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & format.max();
            for i in 0..usize::try_from(format.per_block()).expect("small") {
                format.set(&mut block, i, value(i));
            }
            for i in 0..usize::try_from(format.per_block()).expect("small") {
                assert_eq!(format.get(&block, i), value(i), "order {order}, index {i}");
            }
        }
    }

    #[test]
    fn narrow_refcounts_start_at_the_low_bit() {
        let format = RefcountFormat::new(0, 9);
        let mut block = vec![0; 512];
        format.set(&mut block, 1, 1);
        assert_eq!(block[0], 2);
        let wide = RefcountFormat::new(4, 9);
        wide.set(&mut block, 1, 0x102);
        assert_eq!(block[2..4], [1, 2]);
    }
}
