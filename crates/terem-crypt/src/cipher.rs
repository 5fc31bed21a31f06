//! What encrypts sectors: a block cipher, a mode, and where the initialization vectors come from, as `dm-crypt`
//! and LUKS name them (`aes-xts-plain64`).
//!
//! ```text
//!  sector number ──IV generator──> 16 bytes ──┐
//!  key, 1 or 2 of them ───────────────────────┴── mode (XTS, CBC) over a sector of 512 to 4096 bytes
//! ```
//!
//! Sector numbers count units of 512 bytes even where sectors are larger, as `dm-crypt` without
//! `iv_large_sectors` does.

mod cbc;
mod iv;
mod spec;
mod xts;

use aes::{Aes128, Aes192, Aes256};
use cipher::array::Array;
use cipher::consts::U16;
use cipher::{BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use serpent::Serpent;

use cbc::Cbc;
use iv::Iv;
pub use spec::{Algorithm, CipherSpec, IvGenerator, Mode};
use xts::Xts;

use crate::CryptError;

/// A block of all the ciphers here (FIPS 197; Serpent was a candidate for it).
pub(crate) type Block = Array<u8, U16>;
/// Bytes of [`Block`].
const BLOCK: usize = 16;
/// Bytes of the unit in which sectors are counted, and of the smallest sector.
pub const SECTOR: usize = 512;
/// Bytes of the largest sector (`dm-crypt`'s limit, a page).
pub const MAX_SECTOR: usize = 4096;
/// Sectors whose vectors are made at once: 32 KiB of data at the least, which stay in the first-level cache.
const BATCH: usize = 64;

/// A block cipher that can be used here.
trait BlockCipher:
    BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt + KeyInit + Send + Sync + 'static
{
}

impl<T> BlockCipher for T where
    T: BlockSizeUser<BlockSize = U16>
        + BlockCipherEncrypt
        + BlockCipherDecrypt
        + KeyInit
        + Send
        + Sync
        + 'static
{
}

/// A mode with its keys. `ivs` has one entry for each sector of `per_sector` blocks; the mode may change it.
trait SectorMode: Send + Sync {
    fn encrypt(&self, ivs: &mut [Block], blocks: &mut [Block], per_sector: usize);
    fn decrypt(&self, ivs: &mut [Block], blocks: &mut [Block], per_sector: usize);
}

/// A cipher with its key, ready for sectors. The key schedule is wiped when it is dropped.
pub struct SectorCipher {
    mode: Box<dyn SectorMode>,
    iv: Iv,
    sector_size: usize,
}

impl std::fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SectorCipher").field("sector_size", &self.sector_size).finish_non_exhaustive()
    }
}

impl SectorCipher {
    /// A cipher for sectors of `sector_size` bytes: 512, 1024, 2048 or 4096.
    ///
    /// # Errors
    /// [`CryptError::Unsupported`] for a key length that the cipher does not have, or another sector size.
    pub fn new(spec: CipherSpec, key: &[u8], sector_size: usize) -> Result<Self, CryptError> {
        spec.check_key(key.len())?;
        if !sector_size.is_power_of_two() || !(SECTOR..=MAX_SECTOR).contains(&sector_size) {
            return Err(CryptError::unsupported(format!("sectors of {sector_size} bytes")));
        }
        let mode: Option<Box<dyn SectorMode>> = match (spec.algorithm, spec.mode.part_of(key.len())) {
            (Algorithm::Aes, 16) => mode::<Aes128>(spec.mode, key),
            (Algorithm::Aes, 24) => mode::<Aes192>(spec.mode, key),
            (Algorithm::Aes, 32) => mode::<Aes256>(spec.mode, key),
            (Algorithm::Serpent, _) => mode::<Serpent>(spec.mode, key),
            _ => None,
        };
        let mode = mode.ok_or_else(|| CryptError::unsupported(format!("{spec} with this key")))?;
        let iv =
            Iv::new(spec, key).ok_or_else(|| CryptError::unsupported(format!("{spec} with this key")))?;
        Ok(Self { mode, iv, sector_size })
    }

    /// Bytes of a sector.
    #[must_use]
    pub fn sector_size(&self) -> usize {
        self.sector_size
    }

    /// Encrypts whole sectors in place. `first` is the number of the first, in units of 512 bytes.
    ///
    /// # Panics
    /// When `data` is not a multiple of the sector size: a caller's mistake, which would leave plain text.
    pub fn encrypt(&self, first: u64, data: &mut [u8]) {
        self.batches(first, data, |ivs, blocks, n| self.mode.encrypt(ivs, blocks, n));
    }

    /// Decrypts whole sectors in place. `first` is the number of the first, in units of 512 bytes.
    ///
    /// # Panics
    /// When `data` is not a multiple of the sector size.
    pub fn decrypt(&self, first: u64, data: &mut [u8]) {
        self.batches(first, data, |ivs, blocks, n| self.mode.decrypt(ivs, blocks, n));
    }

    fn batches(&self, first: u64, data: &mut [u8], work: impl Fn(&mut [Block], &mut [Block], usize)) {
        assert!(data.len().is_multiple_of(self.sector_size), "a part of a sector");
        let step = (self.sector_size / SECTOR) as u64;
        let mut sector = first;
        for part in data.chunks_mut(BATCH * self.sector_size) {
            let mut ivs = [Block::default(); BATCH];
            let ivs = &mut ivs[..part.len() / self.sector_size];
            self.iv.fill(sector, step, ivs);
            let (blocks, _) = Array::slice_as_chunks_mut(part);
            work(ivs, blocks, self.sector_size / BLOCK);
            sector = sector.wrapping_add(step * ivs.len() as u64);
        }
    }
}

fn mode<C: BlockCipher>(mode: Mode, key: &[u8]) -> Option<Box<dyn SectorMode>> {
    Some(match mode {
        Mode::Xts => Box::new(Xts::<C>::new(key)?),
        Mode::Cbc => Box::new(Cbc::<C>::new(key)?),
    })
}

#[cfg(test)]
mod tests;
