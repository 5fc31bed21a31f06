//! A LUKS header of either version.

use serde::Serialize;

use crate::area::{Area, read};
use crate::{
    CipherSpec, Cost, CryptError, Limits, Passphrase, SECTOR, SectorCipher, VolumeKey, luks1, luks2,
};

/// Bytes after which a header's version is known.
const MAGIC_AND_VERSION: usize = 8;

/// A header that was read and checked.
pub struct Luks(Version);

enum Version {
    One(Box<luks1::Header>),
    Two(Box<luks2::Header>),
}

/// Where the data are and how they are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// First byte of the data.
    pub offset: u64,
    /// Bytes of data; `None`: all from the offset on.
    pub size: Option<u64>,
    /// The cipher.
    pub spec: CipherSpec,
    /// Bytes of a sector that is encrypted as a whole.
    pub sector_size: usize,
    /// What is added to the number of a sector (of 512 bytes).
    pub iv_tweak: u64,
}

/// Facts about a header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LuksInfo {
    /// 1 or 2.
    pub version: u32,
    /// UUID.
    pub uuid: String,
    /// Label; LUKS 2 only.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// Cipher, mode and IV generator: `aes-xts-plain64`.
    pub cipher: String,
    /// Bits of the volume key.
    pub key_bits: usize,
    /// Bytes of an encrypted sector.
    pub sector_size: usize,
    /// First byte of the data.
    pub payload_offset: u64,
    /// Hash of the key's digest.
    pub hash: String,
    /// Whether one of the two copies of a LUKS 2 header is damaged or old. The next change of a key puts that right.
    pub degraded: bool,
    /// The key slots in use.
    pub slots: Vec<SlotInfo>,
    /// All key slots of LUKS 1, as `qemu-img info` shows them.
    #[serde(skip)]
    pub luks1: Option<Luks1Info>,
}

/// What only LUKS 1 headers have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Luks1Info {
    /// Iterations of the volume key's digest.
    pub digest_iterations: u32,
    /// All key slots: iterations and stripes, if it is in use, and the first byte of its material.
    pub slots: Vec<(Option<(u32, u32)>, u64)>,
}

/// A key slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SlotInfo {
    /// Its number.
    pub slot: usize,
    /// Key derivation: `pbkdf2`, `argon2i`, `argon2id`; or why it cannot be used.
    pub kdf: String,
    /// Iterations of PBKDF2, or passes of Argon2.
    pub iterations: u32,
    /// KiB of memory of Argon2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u32>,
    /// First byte of its key material.
    pub offset: u64,
}

impl Luks {
    /// Whether `head`, a file's first bytes, is that of a LUKS header.
    #[must_use]
    pub fn probe(head: &[u8]) -> bool {
        head.starts_with(&luks1::MAGIC)
    }

    /// Reads the header in `area`.
    ///
    /// # Errors
    /// [`CryptError`].
    pub fn read(area: &dyn Area) -> Result<Self, CryptError> {
        if area.len() < luks1::Header::LENGTH as u64 {
            return Err(CryptError::NotLuks);
        }
        let head = read(area, 0, MAGIC_AND_VERSION)?;
        let version = u16::from_be_bytes([head[6], head[7]]);
        match (head.starts_with(&luks1::MAGIC), version) {
            (true, 1) => Ok(Self(Version::One(Box::new(luks1::Header::read(area)?)))),
            (true, version) if version != 2 => {
                Err(CryptError::unsupported(format!("LUKS version {version}")))
            }
            // Also where the first copy is gone: there may be a second.
            (begins, _) => match luks2::Header::read(area) {
                Ok(header) => Ok(Self(Version::Two(Box::new(header)))),
                Err(CryptError::Corrupt(_)) if !begins => Err(CryptError::NotLuks),
                Err(error) => Err(error),
            },
        }
    }

    /// The digest of the volume key with its salt: the same for the same key of the same image only.
    #[must_use]
    pub fn digest(&self) -> Vec<u8> {
        match &self.0 {
            Version::One(header) => [&header.digest[..], &header.digest_salt].concat(),
            Version::Two(header) => {
                [&header.metadata.digest.digest[..], &header.metadata.digest.salt].concat()
            }
        }
    }

    /// 1 or 2.
    #[must_use]
    pub fn version(&self) -> u32 {
        match self.0 {
            Version::One(_) => 1,
            Version::Two(_) => 2,
        }
    }

    /// Where the data are and how they are encrypted.
    #[must_use]
    pub fn layout(&self) -> Layout {
        match &self.0 {
            Version::One(header) => Layout {
                offset: u64::from(header.payload) * SECTOR as u64,
                size: None,
                spec: header.spec,
                sector_size: SECTOR,
                iv_tweak: 0,
            },
            Version::Two(header) => {
                let segment = &header.metadata.segment;
                Layout {
                    offset: segment.offset,
                    size: segment.size,
                    spec: segment.spec,
                    sector_size: segment.sector_size,
                    iv_tweak: segment.iv_tweak,
                }
            }
        }
    }

    /// The volume key, and the slot that opens with `passphrase`; only `slot` is tried, if it is said.
    ///
    /// # Errors
    /// [`CryptError::WrongPassphrase`] when none does; others when the header asks for what cannot be done.
    pub fn unlock(
        &self,
        area: &dyn Area,
        passphrase: &Passphrase,
        slot: Option<usize>,
        limits: Limits,
    ) -> Result<(VolumeKey, usize), CryptError> {
        match &self.0 {
            Version::One(header) => header.unlock(area, passphrase, slot, limits),
            Version::Two(header) => header.unlock(area, passphrase, slot, limits),
        }
    }

    /// What encrypts the data.
    ///
    /// # Errors
    /// [`CryptError::Unsupported`].
    pub fn cipher(&self, key: &VolumeKey) -> Result<SectorCipher, CryptError> {
        let layout = self.layout();
        SectorCipher::new(layout.spec, key.bytes(), layout.sector_size)
    }

    /// Adds a key slot for `passphrase`: `slot`, or the first that is free. Returns its number.
    ///
    /// # Errors
    /// [`CryptError`]; nothing is changed then, or a slot that is not in use.
    pub fn add_key(
        &mut self,
        area: &dyn Area,
        key: &VolumeKey,
        passphrase: &Passphrase,
        slot: Option<usize>,
        cost: Cost,
    ) -> Result<usize, CryptError> {
        match &mut self.0 {
            Version::One(header) => header.add(area, key, passphrase, slot, cost),
            Version::Two(header) => header.add(area, key, passphrase, slot, cost),
        }
    }

    /// Takes a key slot out of use and destroys what is in it.
    ///
    /// # Errors
    /// [`CryptError::LastSlot`], [`CryptError::NoSuchSlot`] and others.
    pub fn remove_key(&mut self, area: &dyn Area, slot: usize) -> Result<(), CryptError> {
        match &mut self.0 {
            Version::One(header) => header.remove(area, slot),
            Version::Two(header) => header.remove(area, slot),
        }
    }

    /// Gives slot `slot`, which `key` came from, another passphrase. Returns the number that it then has: LUKS 1 has to
    /// take another slot.
    ///
    /// # Errors
    /// [`CryptError`]; the old passphrase is good then.
    pub fn change_key(
        &mut self,
        area: &dyn Area,
        key: &VolumeKey,
        slot: usize,
        passphrase: &Passphrase,
        cost: Cost,
    ) -> Result<usize, CryptError> {
        match &mut self.0 {
            Version::One(header) => {
                let new = header.add(area, key, passphrase, None, cost)?;
                header.remove(area, slot)?;
                Ok(new)
            }
            Version::Two(header) => header.change(area, key, passphrase, slot, cost).map(|()| slot),
        }
    }

    /// Facts about it.
    ///
    /// # Errors
    /// [`CryptError::Corrupt`] when its texts are none.
    pub fn info(&self) -> Result<LuksInfo, CryptError> {
        let layout = self.layout();
        let (version, uuid, label, key_len, hash, degraded) = match &self.0 {
            Version::One(h) => (1, h.uuid.clone(), String::new(), h.key_len, h.hash, false),
            Version::Two(h) => {
                let slot = h.metadata.keyslots.iter().find_map(|(_, slot)| slot.as_ref().ok());
                let key_len = slot.map_or(0, |slot| slot.key_len);
                (2, h.uuid()?, h.label()?, key_len, h.metadata.digest.hash, h.is_degraded())
            }
        };
        Ok(LuksInfo {
            version,
            uuid,
            label,
            cipher: layout.spec.to_string(),
            key_bits: key_len * 8,
            sector_size: layout.sector_size,
            payload_offset: layout.offset,
            hash: hash.to_string(),
            degraded,
            luks1: match &self.0 {
                Version::One(header) => Some(Luks1Info {
                    digest_iterations: header.digest_iterations,
                    slots: header
                        .slots
                        .iter()
                        .map(|slot| {
                            let used = slot.active.then_some((slot.iterations, slot.stripes));
                            (used, u64::from(slot.offset) * SECTOR as u64)
                        })
                        .collect(),
                }),
                Version::Two(_) => None,
            },
            slots: match &self.0 {
                Version::One(header) => header.slot_info(),
                Version::Two(header) => header.metadata.slot_info(),
            },
        })
    }
}
