//! Opening, adding, changing and removing key slots, and new headers.

use std::time::Duration;

use base64ct::{Base64, Encoding};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::binary::MIN_SIZE;
use super::metadata::{Keyslot, MAX_SLOTS};
use super::store::Header;
use crate::af::{STRIPES, merge, split};
use crate::area::{Area, read, sync, wipe, write};
use crate::kdf::{Argon2Variant, Budget, Kdf, MIN_ITERATIONS, measure_argon2, measure_pbkdf2};
use crate::secret::{random, random_uuid, same};
use crate::{CipherSpec, Cost, CryptError, Hash, Limits, Passphrase, SECTOR, SectorCipher, VolumeKey};

/// What areas are aligned to.
const ALIGN: u64 = 4096;
/// Bytes of salts.
const SALT: usize = 32;
/// What the check of a volume key takes (as cryptsetup).
const DIGEST_TIME: Duration = Duration::from_millis(125);
/// What encrypts key material in new slots: always this one, whatever encrypts the data (as cryptsetup).
const MATERIAL_KEY: usize = 64;

/// What a new LUKS 2 header is to be like.
#[derive(Debug, Clone)]
pub struct FormatOptions {
    /// The cipher.
    pub spec: CipherSpec,
    /// Bytes of the volume key.
    pub key_len: usize,
    /// Hash of the stripes, of the key's digest and of PBKDF2.
    pub hash: Hash,
    /// What a guess at the passphrase costs.
    pub cost: Cost,
    /// Bytes of an encrypted sector.
    pub sector_size: usize,
    /// Bytes before the data, headers and key slots among them; a multiple of 4096.
    pub data_offset: u64,
}

/// Writes a new header with one key slot to `area`, which must have room for it.
///
/// # Errors
/// [`CryptError`].
pub fn format(
    area: &dyn Area,
    options: &FormatOptions,
    passphrase: &Passphrase,
) -> Result<VolumeKey, CryptError> {
    options.spec.check_key(options.key_len)?;
    // Sector sizes are checked with the key; see there.
    SectorCipher::new(options.spec, &vec![0; options.key_len], options.sector_size)?;
    let slots =
        options.data_offset.checked_sub(2 * MIN_SIZE).filter(|&n| n >= material_area(options.key_len));
    let slots = slots.ok_or_else(|| CryptError::Options("there is no room for a key slot".into()))?;
    let key = VolumeKey::random(options.key_len)?;
    let mut salt = [0; SALT];
    random(&mut salt)?;
    let iterations = match options.cost {
        Cost::Time(time) => measure_pbkdf2(options.hash, options.hash.size(), time.min(DIGEST_TIME)),
        _ => MIN_ITERATIONS,
    };
    let mut digest = vec![0; options.hash.size()];
    options.hash.pbkdf2(key.bytes(), &salt, iterations, &mut digest);
    let metadata = json!({
        "keyslots": {},
        "tokens": {},
        "segments": { "0": {
            "type": "crypt",
            "offset": options.data_offset.to_string(),
            "size": "dynamic",
            "iv_tweak": "0",
            "encryption": options.spec.to_string(),
            "sector_size": options.sector_size,
        } },
        "digests": { "0": {
            "type": "pbkdf2",
            "keyslots": [],
            "segments": ["0"],
            "hash": options.hash.name(),
            "iterations": iterations,
            "salt": Base64::encode_string(&salt),
            "digest": Base64::encode_string(&digest),
        } },
        "config": { "json_size": (MIN_SIZE - 4096).to_string(), "keyslots_size": slots.to_string() },
    });
    let mut header = Header::new(MIN_SIZE, &random_uuid()?, metadata, area.len())?;
    header.put_slot(area, 0, &key, passphrase, (options.cost, options.hash))?;
    header.commit(area)?;
    Ok(key)
}

/// Bytes of an area for the material of a key.
fn material_area(key_len: usize) -> u64 {
    (key_len as u64 * u64::from(STRIPES)).next_multiple_of(ALIGN)
}

impl Header {
    /// The volume key and the slot that opens with `passphrase`; only `slot` is tried, if it is said.
    pub(crate) fn unlock(
        &self,
        area: &dyn Area,
        passphrase: &Passphrase,
        slot: Option<usize>,
        limits: Limits,
    ) -> Result<(VolumeKey, usize), CryptError> {
        let mut budget = Budget::new(limits);
        let mut slots: Vec<_> = self.metadata.keyslots.iter().collect();
        if let Some(slot) = slot {
            slots.retain(|(number, _)| *number == slot);
            if slots.is_empty() {
                return Err(CryptError::NoSuchSlot(slot));
            }
        }
        let priority = |keyslot: &Result<Keyslot, _>| keyslot.as_ref().map_or(1, |k| k.priority);
        slots.retain(|(_, keyslot)| slot.is_some() || priority(keyslot) > 0);
        slots.sort_by_key(|(number, keyslot)| (std::cmp::Reverse(priority(keyslot)), *number));
        // A slot that cannot be used is told of only when no other opens.
        let mut refused = None;
        for (number, keyslot) in slots {
            let opened = match keyslot {
                Ok(keyslot) => self.open_slot(area, keyslot, passphrase, &mut budget),
                Err(error) => Err(CryptError::Unsupported(format!("key slot {number}: {error}"))),
            };
            match opened {
                Ok(Some(key)) => return Ok((key, *number)),
                Ok(None) => {}
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        Err(refused.unwrap_or(CryptError::WrongPassphrase))
    }

    /// The volume key, if `passphrase` is the slot's.
    fn open_slot(
        &self,
        area: &dyn Area,
        slot: &Keyslot,
        passphrase: &Passphrase,
        budget: &mut Budget,
    ) -> Result<Option<VolumeKey>, CryptError> {
        let mut derived = Zeroizing::new(vec![0; slot.area_key_len]);
        slot.kdf.derive(passphrase.bytes(), budget, &mut derived)?;
        let cipher = SectorCipher::new(slot.spec, &derived, SECTOR)?;
        let len = slot.material_len();
        let mut material = read(area, slot.offset, len.next_multiple_of(SECTOR))?;
        cipher.decrypt(0, &mut material);
        let mut key = Zeroizing::new(vec![0; slot.key_len]);
        merge(&material[..len], slot.af_hash, &mut key);
        Ok(self.is_volume_key(&key, budget)?.then(|| VolumeKey::from_bytes(&key)))
    }

    fn is_volume_key(&self, key: &[u8], budget: &mut Budget) -> Result<bool, CryptError> {
        let expected = &self.metadata.digest;
        let mut digest = vec![0; expected.digest.len()];
        budget.pbkdf2(expected.hash, key, &expected.salt, expected.iterations, &mut digest)?;
        Ok(same(&digest, &expected.digest))
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
        let used = |n: usize| self.json["keyslots"].get(n.to_string()).is_some();
        let number = match slot {
            Some(n) if n >= MAX_SLOTS => return Err(CryptError::NoSuchSlot(n)),
            Some(n) if used(n) => return Err(CryptError::SlotInUse(n)),
            Some(n) => n,
            None => (0..MAX_SLOTS).find(|&n| !used(n)).ok_or(CryptError::NoFreeSlot(MAX_SLOTS))?,
        };
        self.repair(area)?;
        self.put_slot(area, number, key, passphrase, (cost, self.metadata.digest.hash))?;
        self.commit(area)?;
        Ok(number)
    }

    /// Gives a key slot another passphrase.
    pub(crate) fn change(
        &mut self,
        area: &dyn Area,
        key: &VolumeKey,
        passphrase: &Passphrase,
        number: usize,
        cost: Cost,
    ) -> Result<(), CryptError> {
        self.repair(area)?;
        self.put_slot(area, number, key, passphrase, (cost, self.metadata.digest.hash))?;
        self.commit(area)?;
        self.wipe_gaps(area)
    }

    /// Takes a key slot out of use and destroys what is in it.
    pub(crate) fn remove(&mut self, area: &dyn Area, number: usize) -> Result<(), CryptError> {
        if !self.metadata.keyslots.iter().any(|(n, _)| *n == number) {
            return Err(CryptError::NoSuchSlot(number));
        }
        // One that cannot be opened here does not count: its owner may not know that.
        let left = |(n, slot): &(usize, Result<Keyslot, _>)| *n != number && slot.is_ok();
        if !self.metadata.keyslots.iter().any(left) {
            return Err(CryptError::LastSlot(number));
        }
        self.repair(area)?;
        let name = number.to_string();
        if let Some(slots) = self.json["keyslots"].as_object_mut() {
            slots.remove(&name);
        }
        for users in ["digests", "tokens"] {
            let users = self.json.get_mut(users).and_then(Value::as_object_mut);
            for user in users.into_iter().flat_map(|users| users.values_mut()) {
                if let Some(slots) = user.get_mut("keyslots").and_then(Value::as_array_mut) {
                    slots.retain(|slot| *slot != name);
                }
            }
        }
        self.commit(area)?;
        self.wipe_gaps(area)
    }

    /// Destroys the material of slots that are not there any more, also of removals that were interrupted.
    fn wipe_gaps(&self, area: &dyn Area) -> Result<(), CryptError> {
        for (first, end) in self.metadata.gaps() {
            wipe(area, first, end - first)?;
        }
        sync(area)
    }

    /// Writes the volume key into an area that nothing uses, and into the metadata as slot `number`. What was in
    /// that slot stays where it is.
    fn put_slot(
        &mut self,
        area: &dyn Area,
        number: usize,
        key: &VolumeKey,
        passphrase: &Passphrase,
        (cost, hash): (Cost, Hash),
    ) -> Result<(), CryptError> {
        let key_len = key.bytes().len();
        let size = material_area(key_len);
        let offset = self.metadata.room(size)?;
        let kdf = new_kdf(cost, hash)?;
        let mut derived = Zeroizing::new(vec![0; MATERIAL_KEY]);
        let unlimited = Limits { iterations: u64::MAX, memory: u64::MAX, memory_passes: u64::MAX, slots: 1 };
        kdf.derive(passphrase.bytes(), &mut Budget::new(unlimited), &mut derived)?;
        let cipher = SectorCipher::new(CipherSpec::DEFAULT, &derived, SECTOR)?;
        let material = split(key.bytes(), STRIPES, hash)?;
        let mut whole = Zeroizing::new(vec![0; usize::try_from(size).unwrap_or(0)]);
        whole[..material.len()].copy_from_slice(&material);
        cipher.encrypt(0, &mut whole);
        write(area, offset, &whole)?;
        sync(area)?;

        let name = number.to_string();
        let mut slot = json!({
            "type": "luks2",
            "key_size": key_len,
            "af": { "type": "luks1", "stripes": STRIPES, "hash": hash.name() },
            "area": {
                "type": "raw",
                "offset": offset.to_string(),
                "size": size.to_string(),
                "encryption": CipherSpec::DEFAULT.to_string(),
                "key_size": MATERIAL_KEY,
            },
            "kdf": encode_kdf(&kdf),
        });
        if let Some(priority) = self.json["keyslots"].get(&name).and_then(|old| old.get("priority")) {
            slot["priority"] = priority.clone();
        }
        let digest = self.metadata.digest.id.clone();
        self.json["keyslots"][&name] = slot;
        if let Some(slots) = self.json["digests"][&digest]["keyslots"].as_array_mut()
            && !slots.iter().any(|slot| *slot == name)
        {
            slots.push(name.into());
        }
        Ok(())
    }
}

/// A key derivation for a new slot.
fn new_kdf(cost: Cost, hash: Hash) -> Result<Kdf, CryptError> {
    let mut salt = vec![0; SALT];
    random(&mut salt)?;
    Ok(match cost {
        Cost::Time(time) => {
            let (memory, passes, lanes) = measure_argon2(Argon2Variant::Argon2id, time)?;
            Kdf::Argon2 { variant: Argon2Variant::Argon2id, passes, memory, lanes, salt }
        }
        Cost::Argon2 { memory, passes, lanes } => {
            Kdf::Argon2 { variant: Argon2Variant::Argon2id, passes, memory, lanes, salt }
        }
        Cost::Iterations(iterations) if iterations >= MIN_ITERATIONS => {
            Kdf::Pbkdf2 { hash, iterations, salt }
        }
        Cost::Iterations(n) => {
            let what =
                format!("{n} iterations are too few to protect a passphrase; at least {MIN_ITERATIONS}");
            return Err(CryptError::Options(what));
        }
    })
}

fn encode_kdf(kdf: &Kdf) -> Value {
    match kdf {
        Kdf::Pbkdf2 { hash, iterations, salt } => json!({
            "type": "pbkdf2", "hash": hash.name(), "iterations": iterations, "salt": Base64::encode_string(salt),
        }),
        Kdf::Argon2 { variant, passes, memory, lanes, salt } => json!({
            "type": variant.name(), "time": passes, "memory": memory, "cpus": lanes,
            "salt": Base64::encode_string(salt),
        }),
    }
}
