//! What the metadata say (specification, 3): the part of the JSON that is used here.

use base64ct::{Base64, Encoding};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::af::MAX_STRIPES;
use crate::kdf::{Argon2Variant, Kdf};
use crate::{CipherSpec, CryptError, Hash, SECTOR, SlotInfo};

/// Most key slots (as cryptsetup).
pub(crate) const MAX_SLOTS: usize = 32;
/// Longest salt and digest, in bytes.
const MAX_SALT: usize = 1024;

/// A key slot that can be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Keyslot {
    /// 2: is tried first; 1: normally; 0: only when asked for.
    pub(crate) priority: u8,
    pub(crate) key_len: usize,
    pub(crate) stripes: u32,
    pub(crate) af_hash: Hash,
    /// First byte of its material.
    pub(crate) offset: u64,
    /// What encrypts the material, and bytes of its key.
    pub(crate) spec: CipherSpec,
    pub(crate) area_key_len: usize,
    pub(crate) kdf: Kdf,
}

impl Keyslot {
    /// Bytes of key material.
    pub(crate) fn material_len(&self) -> usize {
        self.key_len * self.stripes as usize
    }
}

/// Where the data are, and how they are encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) id: String,
    pub(crate) offset: u64,
    /// `None`: to the end.
    pub(crate) size: Option<u64>,
    pub(crate) iv_tweak: u64,
    pub(crate) spec: CipherSpec,
    pub(crate) sector_size: usize,
}

/// What shows that a volume key is the right one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Digest {
    pub(crate) id: String,
    pub(crate) slots: Vec<String>,
    pub(crate) hash: Hash,
    pub(crate) iterations: u32,
    pub(crate) salt: Vec<u8>,
    pub(crate) digest: Vec<u8>,
}

/// A parsed and checked header's contents.
#[derive(Debug)]
pub(crate) struct Metadata {
    /// By number: those that belong to the data's key, and why one cannot be used.
    pub(crate) keyslots: Vec<(usize, Result<Keyslot, CryptError>)>,
    pub(crate) segment: Segment,
    pub(crate) digest: Digest,
    /// First byte and end of the key slots' areas.
    pub(crate) areas: (u64, u64),
    /// First byte and end of each area in use, whatever uses it.
    pub(crate) taken: Vec<(u64, u64)>,
}

#[derive(Deserialize)]
struct RawSegment {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    #[serde(default)]
    size: String,
    #[serde(default)]
    iv_tweak: String,
    #[serde(default)]
    encryption: String,
    #[serde(default)]
    sector_size: u64,
    integrity: Option<Value>,
}

#[derive(Deserialize)]
struct RawDigest {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    segments: Vec<String>,
    #[serde(default)]
    hash: String,
    #[serde(default)]
    iterations: u32,
    #[serde(default)]
    salt: String,
    #[serde(default)]
    digest: String,
}

#[derive(Deserialize)]
struct RawKeyslot {
    key_size: usize,
    priority: Option<u8>,
    af: RawAf,
    area: RawArea,
    kdf: RawKdf,
}

#[derive(Deserialize)]
struct RawAf {
    #[serde(rename = "type")]
    kind: String,
    stripes: u32,
    hash: String,
}

#[derive(Deserialize)]
struct RawArea {
    #[serde(rename = "type")]
    kind: String,
    encryption: String,
    key_size: usize,
}

#[derive(Deserialize)]
struct RawKdf {
    #[serde(rename = "type")]
    kind: String,
    salt: String,
    #[serde(default)]
    hash: String,
    #[serde(default)]
    iterations: u32,
    #[serde(default)]
    time: u32,
    #[serde(default)]
    memory: u32,
    #[serde(default)]
    cpus: u32,
}

fn object<'a>(value: &'a Value, name: &str) -> Result<&'a Map<String, Value>, CryptError> {
    value.get(name).and_then(Value::as_object).ok_or_else(|| CryptError::corrupt(format!("it has no {name}")))
}

fn typed<'a, T: Deserialize<'a>>(value: &'a Value, what: &str) -> Result<T, CryptError> {
    T::deserialize(value).map_err(|e| CryptError::corrupt(format!("{what}: {e}")))
}

/// A 64-bit number, which JSON cannot be trusted with, is a text.
fn number(text: &str, what: &str) -> Result<u64, CryptError> {
    text.parse().map_err(|_| CryptError::corrupt(format!("{what} is {text:?}")))
}

fn base64(text: &str, what: &str) -> Result<Vec<u8>, CryptError> {
    let bytes = (text.len() <= MAX_SALT * 2).then(|| Base64::decode_vec(text).ok()).flatten();
    bytes.filter(|b| !b.is_empty()).ok_or_else(|| CryptError::corrupt(format!("{what} is not base64")))
}

impl Metadata {
    /// Reads `json`, that of a header whose copies have `header_size` bytes each, in an area of `len` bytes.
    pub(super) fn parse(json: &Value, header_size: u64, len: u64) -> Result<Self, CryptError> {
        check_requirements(json)?;
        let segment = segment(object(json, "segments")?)?;
        let digest = digest(object(json, "digests")?, &segment.id)?;
        let config = object(json, "config")?;
        let size = config.get("keyslots_size").and_then(Value::as_str).unwrap_or_default();
        let first = 2 * header_size;
        let end = first.checked_add(number(size, "the size of its key slots")?).filter(|&end| end <= len);
        let end = end.ok_or_else(|| CryptError::corrupt("its key slots reach beyond the end"))?;
        if segment.offset != 0 && segment.offset < end {
            return Err(CryptError::corrupt("its key slots reach into the data"));
        }
        let (mut keyslots, mut taken) = (Vec::new(), Vec::new());
        for (name, value) in object(json, "keyslots")? {
            let number: usize = number(name, "a key slot's number")?
                .try_into()
                .ok()
                .filter(|&n| n < MAX_SLOTS)
                .ok_or_else(|| CryptError::corrupt(format!("it has a key slot {name}")))?;
            let place = area(value, name)?;
            if place.0 < first || place.1 > end || place.0 >= place.1 {
                return Err(CryptError::corrupt(format!("key slot {name} is outside of its area")));
            }
            if taken.iter().any(|&(a, b)| place.0 < b && a < place.1) {
                return Err(CryptError::corrupt(format!("key slot {name} overlaps another")));
            }
            taken.push(place);
            if digest.slots.contains(name) {
                keyslots.push((number, keyslot(value, name, place)));
            }
        }
        keyslots.sort_by_key(|(number, _)| *number);
        Ok(Self { keyslots, segment, digest, areas: (first, end), taken })
    }

    /// Facts about the slots.
    pub(crate) fn slot_info(&self) -> Vec<SlotInfo> {
        let info = |(number, slot): &(usize, Result<Keyslot, CryptError>)| {
            let (kdf, iterations, memory, offset) = match slot {
                Err(error) => (error.to_string(), 0, None, 0),
                Ok(slot) => match &slot.kdf {
                    Kdf::Pbkdf2 { iterations, .. } => ("pbkdf2".into(), *iterations, None, slot.offset),
                    Kdf::Argon2 { variant, passes, memory, .. } => {
                        (variant.name().into(), *passes, Some(*memory), slot.offset)
                    }
                },
            };
            SlotInfo { slot: *number, kdf, iterations, memory, offset }
        };
        self.keyslots.iter().map(info).collect()
    }

    /// Where an area of `len` bytes can go that nothing uses.
    pub(super) fn room(&self, len: u64) -> Result<u64, CryptError> {
        let gap = self.gaps().into_iter().find(|(first, end)| end - first >= len);
        gap.map(|(first, _)| first).ok_or(CryptError::NoRoom(len))
    }

    /// What of the areas no slot uses: first byte and end.
    pub(super) fn gaps(&self) -> Vec<(u64, u64)> {
        let mut taken = self.taken.clone();
        taken.sort_unstable();
        let (mut at, mut gaps) = (self.areas.0, Vec::new());
        for (first, end) in taken.into_iter().chain([(self.areas.1, self.areas.1)]) {
            if first > at {
                gaps.push((at, first));
            }
            at = at.max(end);
        }
        gaps
    }
}

/// What must be understood to use the volume at all.
fn check_requirements(json: &Value) -> Result<(), CryptError> {
    let mandatory = json.pointer("/config/requirements/mandatory").and_then(Value::as_array);
    let names: Vec<_> = mandatory
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(|s| s.escape_debug().to_string())
        .collect();
    if names.is_empty() {
        return Ok(());
    }
    let reencrypt = names.iter().any(|name| name.contains("reencrypt"));
    Err(CryptError::unsupported(if reencrypt {
        "a re-encryption that is under way (finish it with `cryptsetup reencrypt --resume-only`)".to_owned()
    } else {
        format!("what its LUKS header requires ({})", names.join(", "))
    }))
}

fn segment(segments: &Map<String, Value>) -> Result<Segment, CryptError> {
    let mut segments = segments.iter();
    let (Some((id, value)), None) = (segments.next(), segments.next()) else {
        return Err(CryptError::unsupported("a LUKS volume of several segments or none"));
    };
    let raw: RawSegment = typed(value, "its data segment")?;
    if raw.kind != "crypt" {
        return Err(CryptError::unsupported(format!("a data segment of type {}", raw.kind.escape_debug())));
    }
    if raw.integrity.is_some() {
        return Err(CryptError::unsupported("authenticated encryption (dm-integrity)"));
    }
    let sector_size = usize::try_from(raw.sector_size).unwrap_or(usize::MAX);
    let size = match raw.size.as_str() {
        "dynamic" => None,
        size => Some(number(size, "the size of its data")?),
    };
    let offset = number(&raw.offset, "the offset of its data")?;
    if !offset.is_multiple_of(SECTOR as u64) || size.is_some_and(|s| !s.is_multiple_of(SECTOR as u64)) {
        return Err(CryptError::corrupt("its data do not begin and end with a sector"));
    }
    Ok(Segment {
        id: id.clone(),
        offset,
        size,
        iv_tweak: number(&raw.iv_tweak, "its IV tweak")?,
        spec: CipherSpec::parse(&raw.encryption)?,
        sector_size,
    })
}

fn digest(digests: &Map<String, Value>, segment: &str) -> Result<Digest, CryptError> {
    for (id, value) in digests {
        let raw: RawDigest = typed(value, "a digest")?;
        if !raw.segments.iter().any(|s| s == segment) {
            continue;
        }
        if raw.kind != "pbkdf2" {
            return Err(CryptError::unsupported(format!("a digest of type {}", raw.kind.escape_debug())));
        }
        return Ok(Digest {
            id: id.clone(),
            slots: raw.keyslots,
            hash: Hash::parse(&raw.hash)?,
            iterations: raw.iterations,
            salt: base64(&raw.salt, "a digest's salt")?,
            digest: base64(&raw.digest, "a digest")?,
        });
    }
    Err(CryptError::corrupt("its data have no digest"))
}

/// First byte and end of a key slot's area, whatever type it has.
fn area(keyslot: &Value, name: &str) -> Result<(u64, u64), CryptError> {
    let field = |field: &str| {
        let text = keyslot.pointer(&format!("/area/{field}")).and_then(Value::as_str).unwrap_or_default();
        number(text, &format!("the area's {field} of key slot {name}"))
    };
    let first = field("offset")?;
    let end = first.checked_add(field("size")?);
    Ok((first, end.ok_or_else(|| CryptError::corrupt(format!("key slot {name} has no end")))?))
}

fn keyslot(value: &Value, name: &str, place: (u64, u64)) -> Result<Keyslot, CryptError> {
    let kind = value.get("type").and_then(Value::as_str).unwrap_or_default();
    if kind != "luks2" {
        return Err(CryptError::unsupported(format!("a key slot of type {}", kind.escape_debug())));
    }
    let raw: RawKeyslot = typed(value, &format!("key slot {name}"))?;
    for (kind, known) in [(&raw.af.kind, "luks1"), (&raw.area.kind, "raw")] {
        if kind != known {
            return Err(CryptError::unsupported(format!("a key slot with {}", kind.escape_debug())));
        }
    }
    if raw.key_size == 0 || raw.key_size > 64 || raw.af.stripes == 0 || raw.af.stripes > MAX_STRIPES {
        let what = format!("a key of {} bytes in {} stripes", raw.key_size, raw.af.stripes);
        return Err(CryptError::corrupt(format!("key slot {name} has {what}")));
    }
    let salt = base64(&raw.kdf.salt, "a key slot's salt")?;
    let argon2 = |variant| Kdf::Argon2 {
        variant,
        passes: raw.kdf.time,
        memory: raw.kdf.memory,
        lanes: raw.kdf.cpus,
        salt: salt.clone(),
    };
    let slot = Keyslot {
        priority: raw.priority.unwrap_or(1),
        key_len: raw.key_size,
        stripes: raw.af.stripes,
        af_hash: Hash::parse(&raw.af.hash)?,
        offset: place.0,
        spec: CipherSpec::parse(&raw.area.encryption)?,
        area_key_len: raw.area.key_size,
        kdf: match raw.kdf.kind.as_str() {
            "pbkdf2" => Kdf::Pbkdf2 {
                hash: Hash::parse(&raw.kdf.hash)?,
                iterations: raw.kdf.iterations,
                salt: salt.clone(),
            },
            "argon2i" => argon2(Argon2Variant::Argon2i),
            "argon2id" => argon2(Argon2Variant::Argon2id),
            other => {
                let what = format!("the key derivation {}", other.escape_debug());
                return Err(CryptError::unsupported(what));
            }
        },
    };
    slot.spec.check_key(slot.area_key_len)?;
    if slot.material_len().next_multiple_of(SECTOR) as u64 > place.1 - place.0 {
        return Err(CryptError::corrupt(format!("key slot {name} is larger than its area")));
    }
    Ok(slot)
}
