//! Cipher block chaining, sector by sector.
//!
//! Within a sector each block is encrypted after the one before it. Sectors do not wait for each other, so the
//! same block of several sectors is encrypted at once; decrypting has no such order.

use cipher::array::{Array, ArraySize};
use cipher::consts::U16;
use cipher::{
    BlockCipherDecBackend, BlockCipherDecClosure, BlockCipherEncBackend, BlockCipherEncClosure, BlockSizeUser,
};

use super::{Block, BlockCipher, SectorMode};

/// A cipher in CBC mode.
pub(super) struct Cbc<C>(C);

impl<C: BlockCipher> Cbc<C> {
    pub(super) fn new(key: &[u8]) -> Option<Self> {
        C::new_from_slice(key).ok().map(Self)
    }
}

impl<C: BlockCipher> SectorMode for Cbc<C> {
    fn encrypt(&self, ivs: &mut [Block], blocks: &mut [Block], per_sector: usize) {
        self.0.encrypt_with_backend(Run { ivs, blocks, per_sector });
    }

    fn decrypt(&self, ivs: &mut [Block], blocks: &mut [Block], per_sector: usize) {
        self.0.decrypt_with_backend(Run { ivs, blocks, per_sector });
    }
}

struct Run<'a> {
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
        self.encrypt::<B::ParBlocksSize>(|blocks| backend.encrypt_par_blocks_inplace(blocks));
    }
}

impl BlockCipherDecClosure for Run<'_> {
    #[inline(always)]
    fn call<B: BlockCipherDecBackend<BlockSize = U16>>(self, backend: &B) {
        self.decrypt::<B::ParBlocksSize>(|blocks| backend.decrypt_par_blocks_inplace(blocks));
    }
}

impl Run<'_> {
    #[inline(always)]
    fn encrypt<N: ArraySize>(self, cipher: impl Fn(&mut Array<Block, N>)) {
        let sectors = self.blocks.chunks_mut(self.per_sector * N::USIZE);
        for (sectors, ivs) in sectors.zip(self.ivs.chunks(N::USIZE)) {
            let mut chain: Array<Block, N> = Array::default();
            chain[..ivs.len()].copy_from_slice(ivs);
            for i in 0..self.per_sector {
                let block = |sector: usize| sector * self.per_sector + i;
                for (sector, chained) in chain[..ivs.len()].iter_mut().enumerate() {
                    *chained = xor(*chained, sectors[block(sector)]);
                }
                cipher(&mut chain);
                for (sector, chained) in chain[..ivs.len()].iter().enumerate() {
                    sectors[block(sector)] = *chained;
                }
            }
        }
    }

    #[inline(always)]
    fn decrypt<N: ArraySize>(self, cipher: impl Fn(&mut Array<Block, N>)) {
        // The encrypted block before the first of a part.
        let mut before = Block::default();
        let mut number = 0;
        for part in self.blocks.chunks_mut(N::USIZE) {
            let mut encrypted: Array<Block, N> = Array::default();
            encrypted[..part.len()].copy_from_slice(part);
            let mut plain = encrypted.clone();
            cipher(&mut plain);
            for (i, block) in part.iter_mut().enumerate() {
                let first_of_sector = (number + i).is_multiple_of(self.per_sector);
                let chained = match i {
                    _ if first_of_sector => self.ivs[(number + i) / self.per_sector],
                    0 => before,
                    _ => encrypted[i - 1],
                };
                *block = xor(plain[i], chained);
            }
            number += part.len();
            before = encrypted[part.len() - 1];
        }
    }
}

#[inline(always)]
fn xor(a: Block, b: Block) -> Block {
    Array((u128::from_ne_bytes(a.0) ^ u128::from_ne_bytes(b.0)).to_ne_bytes())
}
