//! The header's fields.

use crate::af::MAX_STRIPES;
use crate::area::{Area, read};
use crate::{CipherSpec, CryptError, Hash, SECTOR};

/// "LUKS\xba\xbe".
pub(crate) const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Bytes of the header.
pub(super) const LENGTH: usize = 592;
/// Key slots.
pub(crate) const SLOTS: usize = 8;
/// First byte of the first key slot, and bytes of each.
pub(super) const SLOTS_AT: usize = 208;
pub(super) const SLOT_LENGTH: usize = 48;
/// A slot's states.
pub(super) const ACTIVE: u32 = 0x00ac_71f3;
pub(super) const DISABLED: u32 = 0x0000_dead;
/// Bytes of the key's digest and of salts.
pub(super) const DIGEST: usize = 20;
pub(super) const SALT: usize = 32;

/// A key slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) active: bool,
    pub(crate) iterations: u32,
    pub(crate) salt: [u8; SALT],
    /// Sector of its material.
    pub(crate) offset: u32,
    pub(crate) stripes: u32,
}

/// A parsed and checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) spec: CipherSpec,
    pub(crate) hash: Hash,
    /// Sector of the first byte of data; 0 when the data are in another file.
    pub(crate) payload: u32,
    /// Bytes of the volume key.
    pub(crate) key_len: usize,
    pub(crate) digest: [u8; DIGEST],
    pub(crate) digest_salt: [u8; SALT],
    pub(crate) digest_iterations: u32,
    pub(crate) uuid: String,
    pub(crate) slots: [Slot; SLOTS],
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

/// A text that ends with a NUL, or fills its field.
pub(crate) fn text(bytes: &[u8], what: &str) -> Result<String, CryptError> {
    let len = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    match std::str::from_utf8(&bytes[..len]) {
        Ok(text) if !text.chars().any(char::is_control) => Ok(text.to_owned()),
        _ => Err(CryptError::corrupt(format!("its {what} is not text"))),
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

impl Header {
    /// Reads the header at the beginning of `area`, whose magic and version were seen.
    pub(crate) fn read(area: &dyn Area) -> Result<Self, CryptError> {
        let bytes = read(area, 0, LENGTH)?;
        let header = Self::parse(&bytes)?;
        header.check(area.len())?;
        Ok(header)
    }

    fn parse(bytes: &[u8]) -> Result<Self, CryptError> {
        let name = text(&bytes[8..40], "cipher's name")?;
        let mode = text(&bytes[40..72], "cipher's mode")?;
        let slots = std::array::from_fn(|i| {
            let slot = &bytes[SLOTS_AT + i * SLOT_LENGTH..][..SLOT_LENGTH];
            (
                be32(slot, 0),
                Slot {
                    active: be32(slot, 0) == ACTIVE,
                    iterations: be32(slot, 4),
                    salt: array(slot, 8),
                    offset: be32(slot, 40),
                    stripes: be32(slot, 44),
                },
            )
        });
        if let Some(i) = slots.iter().position(|(state, _)| ![ACTIVE, DISABLED].contains(state)) {
            return Err(CryptError::corrupt(format!("key slot {i} is neither in use nor free")));
        }
        let key_len = be32(bytes, 108) as usize;
        let spec = CipherSpec::from_parts(&name, &mode)?;
        spec.check_key(key_len)?;
        Ok(Self {
            spec,
            hash: Hash::parse(&text(&bytes[72..104], "hash's name")?)?,
            payload: be32(bytes, 104),
            key_len,
            digest: array(bytes, 112),
            digest_salt: array(bytes, 132),
            digest_iterations: be32(bytes, 164),
            uuid: text(&bytes[168..208], "UUID")?,
            slots: slots.map(|(_, slot)| slot),
        })
    }

    /// Whether the slots lie where they may.
    fn check(&self, len: u64) -> Result<(), CryptError> {
        let mut taken = vec![(0, LENGTH as u64, "the header".to_owned())];
        let end = if self.payload == 0 { len } else { u64::from(self.payload) * SECTOR as u64 };
        for (i, slot) in self.slots.iter().enumerate() {
            if slot.stripes == 0 || slot.stripes > MAX_STRIPES {
                return Err(CryptError::corrupt(format!(
                    "key slot {i} has {} stripes (1 to {MAX_STRIPES} are valid)",
                    slot.stripes
                )));
            }
            let (first, last) = self.material(i);
            if last > end {
                return Err(CryptError::corrupt(format!("key slot {i} reaches into the data")));
            }
            if slot.active && last > len {
                return Err(CryptError::corrupt(format!("key slot {i} is beyond the end of the file")));
            }
            if let Some((_, _, what)) = taken.iter().find(|(a, b, _)| first < *b && *a < last) {
                return Err(CryptError::corrupt(format!("key slot {i} overlaps {what}")));
            }
            taken.push((first, last, format!("key slot {i}")));
        }
        Ok(())
    }

    /// First byte and end of a slot's material. It is a whole number of sectors.
    pub(super) fn material(&self, slot: usize) -> (u64, u64) {
        let slot = &self.slots[slot];
        let first = u64::from(slot.offset) * SECTOR as u64;
        (first, first + self.material_len(slot.stripes).next_multiple_of(SECTOR) as u64)
    }

    /// Bytes of key material in `stripes` stripes.
    pub(super) fn material_len(&self, stripes: u32) -> usize {
        self.key_len * stripes as usize
    }

    /// The bytes of a slot.
    pub(super) fn encode_slot(slot: &Slot) -> [u8; SLOT_LENGTH] {
        let mut bytes = [0; SLOT_LENGTH];
        bytes[..4].copy_from_slice(&if slot.active { ACTIVE } else { DISABLED }.to_be_bytes());
        bytes[4..8].copy_from_slice(&slot.iterations.to_be_bytes());
        bytes[8..40].copy_from_slice(&slot.salt);
        bytes[40..44].copy_from_slice(&slot.offset.to_be_bytes());
        bytes[44..48].copy_from_slice(&slot.stripes.to_be_bytes());
        bytes
    }

    /// The bytes of the header.
    pub(super) fn encode(&self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[..6].copy_from_slice(&MAGIC);
        bytes[7] = 1;
        for (at, text) in
            [(8, self.spec.name()), (40, &self.spec.mode_name()), (72, self.hash.name()), (168, &self.uuid)]
        {
            bytes[at..at + text.len()].copy_from_slice(text.as_bytes());
        }
        bytes[104..108].copy_from_slice(&self.payload.to_be_bytes());
        bytes[108..112].copy_from_slice(&u32::try_from(self.key_len).unwrap_or(0).to_be_bytes());
        bytes[112..132].copy_from_slice(&self.digest);
        bytes[132..164].copy_from_slice(&self.digest_salt);
        bytes[164..168].copy_from_slice(&self.digest_iterations.to_be_bytes());
        for (i, slot) in self.slots.iter().enumerate() {
            bytes[SLOTS_AT + i * SLOT_LENGTH..][..SLOT_LENGTH].copy_from_slice(&Self::encode_slot(slot));
        }
        bytes
    }
}
