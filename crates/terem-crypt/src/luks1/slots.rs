//! Opening, adding and removing key slots, and new headers.

use zeroize::Zeroizing;

use super::header::{ACTIVE, DIGEST, DISABLED, Header, LENGTH, SALT, SLOT_LENGTH, SLOTS, SLOTS_AT, Slot};
use crate::af::{STRIPES, merge, split};
use crate::area::{Area, read, sync, wipe, write};
use crate::kdf::{Budget, MIN_ITERATIONS, measure_pbkdf2};
use crate::secret::{random, random_uuid, same};
use crate::{
    CipherSpec, Cost, CryptError, Hash, Limits, Passphrase, SECTOR, SectorCipher, SlotInfo, VolumeKey,
};

/// First byte of the first slot's material, and what slots and data are aligned to: a page, as cryptsetup and QEMU do.
const ALIGN: u64 = 4096;
/// Bytes of the volume key's digest take this part of a slot's work (as QEMU).
const DIGEST_SHARE: u32 = 8;

/// What a new LUKS 1 header is to be like.
#[derive(Debug, Clone)]
pub struct FormatOptions {
    /// The cipher.
    pub spec: CipherSpec,
    /// Bytes of the volume key.
    pub key_len: usize,
    /// Hash of PBKDF2 and of the stripes.
    pub hash: Hash,
    /// What a guess at the passphrase costs.
    pub cost: Cost,
    /// The data begin at a multiple of so many bytes.
    pub data_align: u64,
}

impl FormatOptions {
    fn iterations(&self) -> Result<u32, CryptError> {
        iterations(self.cost, self.hash, self.key_len)
    }

    /// Bytes before the data.
    #[must_use]
    pub fn data_offset(&self) -> u64 {
        let material = (self.key_len as u64 * u64::from(STRIPES)).next_multiple_of(ALIGN);
        (ALIGN + SLOTS as u64 * material).next_multiple_of(self.data_align.max(ALIGN))
    }
}

fn iterations(cost: Cost, hash: Hash, key_len: usize) -> Result<u32, CryptError> {
    match cost {
        Cost::Time(time) => Ok(measure_pbkdf2(hash, key_len, time)),
        Cost::Iterations(n) if n >= MIN_ITERATIONS => Ok(n),
        Cost::Iterations(n) => Err(CryptError::Options(format!(
            "{n} iterations are too few to protect a passphrase; at least {MIN_ITERATIONS}"
        ))),
        Cost::Argon2 { .. } => Err(CryptError::Options("LUKS 1 has no Argon2; use LUKS 2".into())),
    }
}

/// Writes a new header with one key slot to `area`, which must have room for it. Nothing else is in the area.
///
/// # Errors
/// [`CryptError`].
pub fn format(
    area: &dyn Area,
    options: &FormatOptions,
    passphrase: &Passphrase,
) -> Result<VolumeKey, CryptError> {
    options.spec.check_key(options.key_len)?;
    let key = VolumeKey::random(options.key_len)?;
    let iterations = options.iterations()?;
    let material = (options.key_len as u64 * u64::from(STRIPES)).next_multiple_of(ALIGN);
    let sector = |offset: u64| u32::try_from(offset / SECTOR as u64).unwrap_or(u32::MAX);
    let mut header = Header {
        spec: options.spec,
        hash: options.hash,
        payload: sector(options.data_offset()),
        key_len: options.key_len,
        digest: [0; DIGEST],
        digest_salt: [0; SALT],
        digest_iterations: (iterations / DIGEST_SHARE).max(MIN_ITERATIONS),
        uuid: random_uuid()?,
        slots: std::array::from_fn(|i| Slot {
            active: false,
            iterations: 0,
            salt: [0; SALT],
            offset: sector(ALIGN + i as u64 * material),
            stripes: STRIPES,
        }),
    };
    random(&mut header.digest_salt)?;
    header.digest = header.digest_of(key.bytes(), &mut Budget::new(Limits::default()))?;
    header.write_material(area, 0, iterations, &key, passphrase)?;
    // Last, so that half a header is none.
    sync(area)?;
    write(area, 0, &header.encode())?;
    sync(area)?;
    Ok(key)
}

impl Header {
    fn digest_of(&self, key: &[u8], budget: &mut Budget) -> Result<[u8; DIGEST], CryptError> {
        let mut digest = [0; DIGEST];
        budget.pbkdf2(self.hash, key, &self.digest_salt, self.digest_iterations, &mut digest)?;
        Ok(digest)
    }

    /// Numbers of the slots that are in use.
    pub(crate) fn active(&self) -> Vec<usize> {
        (0..SLOTS).filter(|&i| self.slots[i].active).collect()
    }

    /// The volume key and the slot that opens with `passphrase`; only `slot` is tried, if it is said.
    pub(crate) fn unlock(
        &self,
        area: &dyn Area,
        passphrase: &Passphrase,
        slot: Option<usize>,
        limits: Limits,
    ) -> Result<(VolumeKey, usize), CryptError> {
        let mut budget = Budget::new(limits);
        let slots = match slot {
            Some(slot) if self.slots.get(slot).is_some_and(|s| s.active) => vec![slot],
            Some(slot) => return Err(CryptError::NoSuchSlot(slot)),
            None => self.active(),
        };
        for slot in slots {
            let key = self.open_slot(area, slot, passphrase, &mut budget)?;
            if same(&self.digest_of(&key, &mut budget)?, &self.digest) {
                return Ok((VolumeKey::from_bytes(&key), slot));
            }
        }
        Err(CryptError::WrongPassphrase)
    }

    /// What is in a slot for who has `passphrase`.
    fn open_slot(
        &self,
        area: &dyn Area,
        number: usize,
        passphrase: &Passphrase,
        budget: &mut Budget,
    ) -> Result<Zeroizing<Vec<u8>>, CryptError> {
        let slot = &self.slots[number];
        let mut key = Zeroizing::new(vec![0; self.key_len]);
        budget.pbkdf2(self.hash, passphrase.bytes(), &slot.salt, slot.iterations, &mut key)?;
        let cipher = SectorCipher::new(self.spec, &key, SECTOR)?;
        let (first, end) = self.material(number);
        let mut material = read(area, first, usize::try_from(end - first).unwrap_or(usize::MAX))?;
        cipher.decrypt(0, &mut material);
        merge(&material[..self.material_len(slot.stripes)], self.hash, &mut key);
        Ok(key)
    }

    /// Writes the volume key into a slot that is not in use, and says in `self` that it is.
    fn write_material(
        &mut self,
        area: &dyn Area,
        number: usize,
        iterations: u32,
        key: &VolumeKey,
        passphrase: &Passphrase,
    ) -> Result<(), CryptError> {
        let mut salt = [0; SALT];
        random(&mut salt)?;
        let mut derived = Zeroizing::new(vec![0; self.key_len]);
        self.hash.pbkdf2(passphrase.bytes(), &salt, iterations, &mut derived);
        let cipher = SectorCipher::new(self.spec, &derived, SECTOR)?;
        let (first, end) = self.material(number);
        let stripes = self.slots[number].stripes;
        let material = split(key.bytes(), stripes, self.hash)?;
        // Not by growing the vector, which would leave a copy behind.
        let mut whole = Zeroizing::new(vec![0; usize::try_from(end - first).unwrap_or(0)]);
        whole[..material.len()].copy_from_slice(&material);
        cipher.encrypt(0, &mut whole);
        write(area, first, &whole)?;
        let slot = &mut self.slots[number];
        (slot.active, slot.iterations, slot.salt) = (true, iterations, salt);
        Ok(())
    }

    /// Adds a key slot: `slot`, or the first that is free. Returns its number.
    pub(crate) fn add(
        &mut self,
        area: &dyn Area,
        key: &VolumeKey,
        passphrase: &Passphrase,
        slot: Option<usize>,
        cost: Cost,
    ) -> Result<usize, CryptError> {
        self.finish_removals(area)?;
        let number = match slot {
            Some(n) if n >= SLOTS => return Err(CryptError::NoSuchSlot(n)),
            Some(n) if self.slots[n].active => return Err(CryptError::SlotInUse(n)),
            Some(n) => n,
            None => (0..SLOTS).find(|&i| !self.slots[i].active).ok_or(CryptError::NoFreeSlot(SLOTS))?,
        };
        let iterations = iterations(cost, self.hash, self.key_len)?;
        self.write_material(area, number, iterations, key, passphrase)?;
        sync(area)?;
        let at = (SLOTS_AT + number * SLOT_LENGTH) as u64;
        let slot = Self::encode_slot(&self.slots[number]);
        write(area, at + 4, &slot[4..])?;
        sync(area)?;
        write(area, at, &ACTIVE.to_be_bytes())?;
        sync(area)?;
        Ok(number)
    }

    /// Takes a key slot out of use and destroys what is in it.
    pub(crate) fn remove(&mut self, area: &dyn Area, number: usize) -> Result<(), CryptError> {
        if !self.slots.get(number).is_some_and(|slot| slot.active) {
            return Err(CryptError::NoSuchSlot(number));
        }
        if self.active() == [number] {
            return Err(CryptError::LastSlot(number));
        }
        self.slots[number].active = false;
        write(area, (SLOTS_AT + number * SLOT_LENGTH) as u64, &DISABLED.to_be_bytes())?;
        sync(area)?;
        self.finish_removals(area)
    }

    /// Wipes slots that are not in use any more but were not wiped yet.
    fn finish_removals(&mut self, area: &dyn Area) -> Result<(), CryptError> {
        for number in 0..SLOTS {
            if self.slots[number].active || self.slots[number].iterations == 0 {
                continue;
            }
            let (first, end) = self.material(number);
            wipe(area, first, end - first)?;
            sync(area)?;
            let slot = &mut self.slots[number];
            (slot.iterations, slot.salt) = (0, [0; SALT]);
            let at = (SLOTS_AT + number * SLOT_LENGTH) as u64;
            write(area, at + 4, &Self::encode_slot(&self.slots[number])[4..])?;
            sync(area)?;
        }
        Ok(())
    }

    /// Bytes of the header itself, without key material.
    pub(crate) const LENGTH: usize = LENGTH;

    /// Facts about the slots in use.
    pub(crate) fn slot_info(&self) -> Vec<SlotInfo> {
        let info = |slot: usize| SlotInfo {
            slot,
            kdf: "pbkdf2".into(),
            iterations: self.slots[slot].iterations,
            memory: None,
            offset: self.material(slot).0,
        };
        self.active().into_iter().map(info).collect()
    }
}
