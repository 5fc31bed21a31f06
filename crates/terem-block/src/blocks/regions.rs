//! For checks: whether blocks of one size lie over each other.

/// Places of blocks in a file.
pub(crate) struct Regions {
    /// In units, so that four bytes do for a block.
    starts: Vec<u32>,
    /// What all places are multiples of.
    unit: u64,
    /// Bytes of a block.
    length: u64,
}

impl Regions {
    pub(crate) fn new(unit: u64, length: u64) -> Self {
        Self { starts: Vec::new(), unit, length }
    }

    /// Adds a block at byte `at`, a multiple of the unit that fits 32 bits in units.
    pub(crate) fn add(&mut self, at: u64) {
        self.starts.push(u32::try_from(at / self.unit).unwrap_or(u32::MAX));
    }

    /// Where blocks begin that another one before reaches into.
    pub(crate) fn overlaps(mut self) -> Vec<u64> {
        self.starts.sort_unstable();
        let overlap = |pair: &&[u32]| u64::from(pair[1] - pair[0]) * self.unit < self.length;
        self.starts.windows(2).filter(overlap).map(|pair| u64::from(pair[1]) * self.unit).collect()
    }
}
