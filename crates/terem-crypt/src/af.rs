//! The anti-forensic splitter (LUKS 1 specification, 2.4): a key is spread over many stripes, all of which are needed to
//! get it back, so that overwriting any part of them destroys it.

use zeroize::{Zeroize, Zeroizing};

use crate::secret::random;
use crate::{CryptError, Hash};

/// Stripes of every key slot that is made here, and by everybody else.
pub(crate) const STRIPES: u32 = 4000;
/// Most stripes that are read: 2 MiB for the longest key.
pub(crate) const MAX_STRIPES: u32 = 16384;

/// Spreads `key` over `stripes` stripes of its length.
pub(crate) fn split(key: &[u8], stripes: u32, hash: Hash) -> Result<Zeroizing<Vec<u8>>, CryptError> {
    let mut material = Zeroizing::new(vec![0; key.len() * stripes as usize]);
    let last = material.len() - key.len();
    random(&mut material[..last])?;
    let mut block = Zeroizing::new(vec![0; key.len()]);
    let (random, last) = material.split_at_mut(last);
    for stripe in random.chunks(key.len()) {
        add(&mut block, stripe);
        diffuse(&mut block, hash);
    }
    last.copy_from_slice(&block);
    add(last, key);
    Ok(material)
}

/// The key that was spread over `material`, whose length is a multiple of `key`'s.
pub(crate) fn merge(material: &[u8], hash: Hash, key: &mut [u8]) {
    key.fill(0);
    let len = key.len();
    let mut stripes = material.chunks_exact(len).peekable();
    while let Some(stripe) = stripes.next() {
        add(key, stripe);
        if stripes.peek().is_some() {
            diffuse(key, hash);
        }
    }
}

fn add(block: &mut [u8], stripe: &[u8]) {
    for (a, b) in block.iter_mut().zip(stripe) {
        *a ^= *b;
    }
}

/// Each part of the hash's length is replaced by the hash of its number and itself.
fn diffuse(block: &mut [u8], hash: Hash) {
    let mut digest = [0; 64];
    for (number, part) in (0u32..).zip(block.chunks_mut(hash.size())) {
        hash.digest(&[&number.to_be_bytes(), part], &mut digest);
        part.copy_from_slice(&digest[..part.len()]);
    }
    digest.zeroize();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_split_is_merged_and_any_changed_bit_destroys_it() {
        for (hash, len, stripes) in
            [(Hash::Sha256, 64, 40), (Hash::Sha1, 32, 7), (Hash::Sha512, 16, 2), (Hash::Ripemd160, 32, 1)]
        {
            let key: Vec<u8> = (0..len).collect();
            let mut material = split(&key, stripes, hash).unwrap();
            assert_eq!(material.len(), key.len() * stripes as usize);
            let mut merged = vec![0xff; key.len()];
            merge(&material, hash, &mut merged);
            assert_eq!(merged, key);
            material[3] ^= 1;
            merge(&material, hash, &mut merged);
            assert_ne!(merged, key);
        }
    }
}
