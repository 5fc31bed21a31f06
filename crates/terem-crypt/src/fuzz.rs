//! What the fuzz target plays: a header from anywhere is read, opened and changed.

use crate::luks2::Sealed;
use crate::memory::Memory;
use crate::{Cost, Limits, Luks, Passphrase};

/// Passphrase of the seeds.
const PASSPHRASE: &[u8] = b"one";
/// Little enough that an input takes milliseconds.
const LIMITS: Limits = Limits { iterations: 4000, memory: 256, memory_passes: 1024, slots: 2 };

/// Zeroes after an input.
const ROOM: usize = 384 << 10;

/// Reads `bytes` as an image's beginning. The first byte says whether LUKS 2 checksums are put right before, so that what
/// they cover is read at all.
///
/// # Panics
/// When a key slot that was added does not open with the same key, or one that was removed does: that is the finding.
#[allow(clippy::panic, clippy::expect_used, reason = "a panic is how a fuzz target fails")]
pub fn header(bytes: &[u8]) {
    let Some((&seal, bytes)) = bytes.split_first() else { return };
    let mut bytes = bytes.to_vec();
    // Room for another key slot, which would make seeds large.
    bytes.resize(bytes.len() + ROOM, 0);
    if seal & 1 == 1 {
        Sealed::seal(&mut bytes);
    }
    let area = Memory::new(bytes);
    let Ok(mut luks) = Luks::read(&area) else { return };
    let _ = luks.info();
    let passphrase = Passphrase::new(PASSPHRASE.to_vec());
    let Ok((key, slot)) = luks.unlock(&area, &passphrase, None, LIMITS) else { return };
    let _ = luks.cipher(&key);
    let second = Passphrase::new(b"two".to_vec());
    let Ok(added) = luks.add_key(&area, &key, &second, None, Cost::Iterations(1000)) else { return };
    let mut again = Luks::read(&area).expect("what was written is read");
    let (same, opened) = again.unlock(&area, &second, Some(added), LIMITS).expect("the new slot opens");
    assert!(same == key && opened == added);
    if again.remove_key(&area, slot).is_ok() {
        let last = Luks::read(&area).expect("what was written is read");
        assert!(last.unlock(&area, &passphrase, Some(slot), LIMITS).is_err());
        assert!(last.unlock(&area, &second, Some(added), LIMITS).expect("the other opens").0 == key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seeds of the fuzz target are opened and changed; so are they with any byte changed, or not at all.
    #[test]
    fn seeds() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/luks");
        let mut seen = 0;
        for seed in std::fs::read_dir(directory).unwrap() {
            let bytes = std::fs::read(seed.unwrap().path()).unwrap();
            header(&bytes);
            let len = bytes.len().min(6000);
            for i in (0..len).step_by(17) {
                let mut changed = bytes.clone();
                changed[i] = changed[i].wrapping_add(1 + i.to_le_bytes()[0]);
                header(&changed);
            }
            seen += 1;
        }
        assert!(seen >= 4);
    }
}
