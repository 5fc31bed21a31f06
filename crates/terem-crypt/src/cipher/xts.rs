//! XTS (IEEE 1619-2007), for sectors of whole blocks: no ciphertext stealing.
//!
//! Block `i` of a sector is encrypted as `E(x ^ t·αⁱ) ^ t·αⁱ`, where `t` is the sector's vector encrypted with the
//! second key and α the generator of GF(2¹²⁸). Blocks are independent of each other, so as many are under way at
//! once as the cipher's implementation has room for, across the ends of sectors.

use cipher::array::{Array, ArraySize};
use cipher::consts::U16;
use cipher::{
    BlockCipherDecBackend, BlockCipherDecClosure, BlockCipherEncBackend, BlockCipherEncClosure, BlockSizeUser,
};

use super::{Block, BlockCipher, SectorMode};

/// A cipher in XTS mode.
pub(super) struct Xts<C> {
    data: C,
    tweak: C,
}

impl<C: BlockCipher> Xts<C> {
    pub(super) fn new(key: &[u8]) -> Option<Self> {
        let (data, tweak) = key.split_at_checked(key.len() / 2)?;
        Some(Self { data: C::new_from_slice(data).ok()?, tweak: C::new_from_slice(tweak).ok()? })
    }
}

impl<C: BlockCipher> SectorMode for Xts<C> {
    fn encrypt(&self, ivs: &mut [Block], blocks: &mut [Block], per_sector: usize) {
        self.tweak.encrypt_blocks(ivs);
        self.data.encrypt_with_backend(Run { ivs, blocks, per_sector });
    }

    fn decrypt(&self, ivs: &mut [Block], blocks: &mut [Block], per_sector: usize) {
        self.tweak.encrypt_blocks(ivs);
        self.data.decrypt_with_backend(Run { ivs, blocks, per_sector });
    }
}

/// What is to be done, as the cipher's implementation takes it. Compiled anew for each instruction set.
struct Run<'a> {
    /// The encrypted vectors.
    ivs: &'a [Block],
    blocks: &'a mut [Block],
    per_sector: usize,
}

impl BlockSizeUser for Run<'_> {
    type BlockSize = U16;
}

impl BlockCipherEncClosure for Run<'_> {
    #[inline(always)]
    fn call<B: BlockCipherEncBackend<BlockSize = U16>>(self, backend: &B) {
        self.run::<B::ParBlocksSize>(|blocks| backend.encrypt_par_blocks_inplace(blocks));
    }
}

impl BlockCipherDecClosure for Run<'_> {
    #[inline(always)]
    fn call<B: BlockCipherDecBackend<BlockSize = U16>>(self, backend: &B) {
        self.run::<B::ParBlocksSize>(|blocks| backend.decrypt_par_blocks_inplace(blocks));
    }
}

impl Run<'_> {
    #[inline(always)]
    fn run<N: ArraySize>(self, cipher: impl Fn(&mut Array<Block, N>)) {
        let mut tweaks = Tweaks::new(self.ivs, self.per_sector);
        let mut masks = [Block::default(); MASKS];
        for blocks in self.blocks.chunks_mut(MASKS) {
            for masks in masks[..blocks.len()].as_chunks_mut::<LANES>().0 {
                tweaks.fill(masks);
            }
            for (part, masks) in blocks.chunks_mut(N::USIZE).zip(masks.chunks(N::USIZE)) {
                if let Ok(whole) = <&mut Array<Block, N>>::try_from(&mut *part) {
                    xor(whole, masks);
                    cipher(whole);
                    xor(whole, masks);
                } else {
                    // The rest goes through a whole number of blocks too: that is faster than one by one.
                    let mut padded: Array<Block, N> = Array::default();
                    padded[..part.len()].copy_from_slice(part);
                    xor(&mut padded, masks);
                    cipher(&mut padded);
                    xor(&mut padded, masks);
                    part.copy_from_slice(&padded[..part.len()]);
                }
            }
        }
    }
}

#[inline(always)]
fn xor(blocks: &mut [Block], masks: &[Block]) {
    for (block, mask) in blocks.iter_mut().zip(masks) {
        block.0 = (u128::from_ne_bytes(block.0) ^ u128::from_ne_bytes(mask.0)).to_ne_bytes();
    }
}

/// Tweaks are made so many at once: lanes of vector registers, which do not wait for each other.
const LANES: usize = 8;
/// Tweaks kept for the cipher, a multiple of [`LANES`]; the widest implementation takes so many blocks at once.
const MASKS: usize = 64;

/// The tweaks of block after block. A sector has a multiple of [`LANES`] blocks.
struct Tweaks<'a> {
    ivs: std::slice::Iter<'a, Block>,
    /// Blocks left in this sector.
    left: usize,
    per_sector: usize,
    /// The last tweaks, in halves.
    low: [u64; LANES],
    high: [u64; LANES],
}

impl<'a> Tweaks<'a> {
    #[inline(always)]
    fn new(ivs: &'a [Block], per_sector: usize) -> Self {
        Self { ivs: ivs.iter(), left: 0, per_sector, low: [0; LANES], high: [0; LANES] }
    }

    /// The next tweaks.
    #[inline(always)]
    fn fill(&mut self, masks: &mut [Block; LANES]) {
        if self.left == 0 {
            self.left = self.per_sector;
            let (low, high) = self.ivs.next().map_or((0, 0), |iv| halves(u128::from_le_bytes(iv.0)));
            // t·α⁰ to t·α⁷.
            for lane in 0..LANES {
                let over = (high >> 1) >> (63 - lane);
                self.high[lane] = high << lane | (low >> 1) >> (63 - lane);
                self.low[lane] = low << lane ^ reduced(over);
            }
        } else {
            // Each times α⁸.
            for lane in 0..LANES {
                let (low, high) = (self.low[lane], self.high[lane]);
                self.high[lane] = high << 8 | low >> 56;
                self.low[lane] = low << 8 ^ reduced(high >> 56);
            }
        }
        for (mask, (high, low)) in masks.iter_mut().zip(self.high.iter().zip(&self.low)) {
            mask.0 = (u128::from(*high) << 64 | u128::from(*low)).to_le_bytes();
        }
        self.left -= LANES;
    }
}

/// What the bits that were shifted out of the top come back as: x¹²⁸ = x⁷ + x² + x + 1.
#[inline(always)]
fn reduced(over: u64) -> u64 {
    over ^ over << 1 ^ over << 2 ^ over << 7
}

/// Low and high half.
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "that is what halves are")]
fn halves(tweak: u128) -> (u64, u64) {
    (tweak as u64, (tweak >> 64) as u64)
}
