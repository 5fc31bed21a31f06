//! Initialization vectors.

use aes::Aes256;
use cipher::KeyInit;
use serpent::Serpent;
use sha2::{Digest, Sha256};
use zeroize::Zeroize;

use super::{Algorithm, Block, CipherSpec, IvGenerator};

/// A generator with what it needs.
pub(super) enum Iv {
    Plain,
    Plain64,
    Plain64Be,
    Essiv(Box<dyn Essiv>),
}

/// Encrypts single blocks.
pub(super) trait Essiv: Send + Sync {
    fn encrypt(&self, blocks: &mut [Block]);
}

impl<C: super::BlockCipher> Essiv for C {
    fn encrypt(&self, blocks: &mut [Block]) {
        self.encrypt_blocks(blocks);
    }
}

impl Iv {
    pub(super) fn new(spec: CipherSpec, key: &[u8]) -> Option<Self> {
        Some(match spec.iv {
            IvGenerator::Plain => Self::Plain,
            IvGenerator::Plain64 => Self::Plain64,
            IvGenerator::Plain64Be => Self::Plain64Be,
            IvGenerator::EssivSha256 => {
                let mut salt = Sha256::digest(key);
                let essiv: Box<dyn Essiv> = match spec.algorithm {
                    Algorithm::Aes => Box::new(Aes256::new_from_slice(&salt).ok()?),
                    Algorithm::Serpent => Box::new(Serpent::new_from_slice(&salt).ok()?),
                };
                salt.zeroize();
                Self::Essiv(essiv)
            }
        })
    }

    /// The vectors of sectors `first`, `first + step` and so on.
    pub(super) fn fill(&self, first: u64, step: u64, ivs: &mut [Block]) {
        let mut sector = first;
        for iv in ivs.iter_mut() {
            let number = match self {
                Self::Plain => u128::from(sector & 0xffff_ffff),
                Self::Plain64 | Self::Essiv(_) => u128::from(sector),
                Self::Plain64Be => u128::from(sector.swap_bytes()) << 64,
            };
            iv.0 = number.to_le_bytes();
            sector = sector.wrapping_add(step);
        }
        if let Self::Essiv(essiv) = self {
            essiv.encrypt(ivs);
        }
    }
}
