//! What can be chosen for the encryption of a new image: LUKS by itself, or within qcow2.

use std::time::Duration;

use serde::Serialize;
use terem_crypt::{
    Algorithm, Area, CipherSpec, Cost, CryptError, Hash, IvGenerator, Luks1Options, Luks2Options, LuksInfo,
    Mode, VolumeKey, format_luks1, format_luks2,
};

use crate::format::CreateOption;
use crate::{CreateOptions, Passphrase};

/// What the data of a LUKS image are aligned to.
const DATA_ALIGN: u64 = 1 << 20;
/// Bytes before the data of a LUKS 2 image (as cryptsetup).
const LUKS2_DATA: u64 = 16 << 20;

/// How a new image is encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncryptionOptions {
    /// Version of LUKS: 1, which QEMU reads, or 2.
    pub version: u32,
    /// Block cipher.
    pub algorithm: Algorithm,
    /// Bits of one of the cipher's keys (XTS has two).
    pub key_bits: usize,
    /// Mode.
    pub mode: Mode,
    /// Where initialization vectors come from.
    pub iv: IvGenerator,
    /// Hash of the key derivation and of the stripes.
    pub hash: Hash,
    /// What a guess at the passphrase costs.
    pub cost: Cost,
    /// Bytes of an encrypted sector; other than 512 only in LUKS 2.
    pub sector_size: usize,
}

impl Default for EncryptionOptions {
    fn default() -> Self {
        Self {
            version: 1,
            algorithm: Algorithm::Aes,
            key_bits: 256,
            mode: Mode::Xts,
            iv: IvGenerator::Plain64,
            hash: Hash::Sha256,
            cost: Cost::default(),
            sector_size: 512,
        }
    }
}

impl EncryptionOptions {
    /// For an image that goes away with this process, with a [`Passphrase::random`] one: it costs no time.
    #[must_use]
    pub fn throw_away() -> Self {
        Self { cost: Cost::Iterations(1000), ..Self::default() }
    }

    fn spec(&self) -> CipherSpec {
        CipherSpec { algorithm: self.algorithm, mode: self.mode, iv: self.iv }
    }

    /// Bytes of the volume key.
    fn key_len(&self) -> usize {
        self.key_bits / 8 * if self.mode == Mode::Xts { 2 } else { 1 }
    }

    /// A LUKS 1 header as QEMU has it within qcow2, with its data wherever.
    pub(crate) fn luks1(&self, data_align: u64) -> Result<Luks1Options, CryptError> {
        if self.version != 1 || self.sector_size != 512 {
            return Err(CryptError::Options(
                "LUKS 2 and its sector sizes are for images of format luks".into(),
            ));
        }
        let (spec, key_len) = (self.spec(), self.key_len());
        spec.check_key(key_len)?;
        Ok(Luks1Options { spec, key_len, hash: self.hash, cost: self.cost, data_align })
    }
}

/// A header that is to be written.
pub(crate) enum Header {
    One(Luks1Options),
    Two(Luks2Options),
}

impl Header {
    pub(crate) fn new(options: &EncryptionOptions) -> Result<Self, CryptError> {
        if options.version == 1 {
            return options.luks1(DATA_ALIGN).map(Self::One);
        }
        let (spec, key_len) = (options.spec(), options.key_len());
        spec.check_key(key_len)?;
        Ok(Self::Two(Luks2Options {
            spec,
            key_len,
            hash: options.hash,
            cost: options.cost,
            sector_size: options.sector_size,
            data_offset: LUKS2_DATA,
        }))
    }

    pub(crate) fn sector_size(&self) -> usize {
        match self {
            Self::One(_) => terem_crypt::SECTOR,
            Self::Two(options) => options.sector_size,
        }
    }

    pub(crate) fn data_offset(&self) -> u64 {
        match self {
            Self::One(options) => options.data_offset(),
            Self::Two(options) => options.data_offset,
        }
    }

    pub(crate) fn write(&self, area: &dyn Area, passphrase: &Passphrase) -> Result<VolumeKey, CryptError> {
        match self {
            Self::One(options) => format_luks1(area, options, passphrase),
            Self::Two(options) => format_luks2(area, options, passphrase),
        }
    }
}

/// Facts about an image's encryption.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct EncryptionInfo {
    /// `luks`, or `aes` for the old encryption of qcow2.
    pub method: &'static str,
    /// The LUKS header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub luks: Option<LuksInfo>,
}

type Set = fn(&mut EncryptionOptions, &str) -> Result<(), String>;

fn set_algorithm(options: &mut EncryptionOptions, text: &str) -> Result<(), String> {
    let wrong = || "aes-128, aes-192, aes-256, serpent-128, serpent-192 or serpent-256".to_owned();
    let (name, bits) = text.split_once('-').ok_or_else(wrong)?;
    options.algorithm = match name {
        "aes" => Algorithm::Aes,
        "serpent" => Algorithm::Serpent,
        _ => return Err(wrong()),
    };
    options.key_bits = match bits {
        "128" => 128,
        "192" => 192,
        "256" => 256,
        _ => return Err(wrong()),
    };
    Ok(())
}

const SET_MODE: Set = |options, text| {
    options.mode = match text {
        "xts" => Mode::Xts,
        "cbc" => Mode::Cbc,
        _ => return Err("xts or cbc".into()),
    };
    Ok(())
};

const SET_IV: Set = |options, text| {
    options.iv = match text {
        "plain" => IvGenerator::Plain,
        "plain64" => IvGenerator::Plain64,
        "essiv" => IvGenerator::EssivSha256,
        _ => return Err("plain, plain64 or essiv".into()),
    };
    Ok(())
};

const SET_IV_HASH: Set = |_, text| if text == "sha256" { Ok(()) } else { Err("sha256".into()) };

const SET_HASH: Set = |options, text| {
    options.hash =
        Hash::parse(text).map_err(|_| "sha1, sha224, sha256, sha384, sha512 or ripemd160".to_owned())?;
    Ok(())
};

const SET_TIME: Set = |options, text| {
    let milliseconds = text.parse().ok().filter(|ms| (1..=600_000).contains(ms));
    options.cost = Cost::Time(Duration::from_millis(milliseconds.ok_or("milliseconds, 1 to 600000")?));
    Ok(())
};

macro_rules! option {
    ($name:literal, $help:literal, $set:expr) => {
        CreateOption {
            name: $name,
            help: $help,
            set: |options: &mut CreateOptions, text| ($set)(&mut options.encryption, text),
        }
    };
}

/// The options of LUKS images, by the names that QEMU gives them where it has them.
pub(crate) static OPTIONS: [CreateOption; 8] = [
    option!("cipher-alg", "cipher and bits of its key: aes-256, aes-128, serpent-256, …", set_algorithm),
    option!("cipher-mode", "mode of the cipher: xts or cbc", SET_MODE),
    option!("ivgen-alg", "initialization vectors: plain64, plain or essiv", SET_IV),
    option!("ivgen-hash-alg", "hash for essiv: sha256", SET_IV_HASH),
    option!("hash-alg", "hash of the key derivation: sha256, sha512, sha1, …", SET_HASH),
    option!("iter-time", "milliseconds that a guess at the passphrase takes on this machine", SET_TIME),
    CreateOption {
        name: "luks-version",
        help: "version of LUKS: 1, which QEMU reads, or 2 with Argon2",
        set: |options, text| {
            options.encryption.version = match text {
                "1" => 1,
                "2" => 2,
                _ => return Err("1 or 2".into()),
            };
            Ok(())
        },
    },
    CreateOption {
        name: "sector-size",
        help: "bytes of an encrypted sector: 512, 1024, 2048 or 4096 (LUKS 2)",
        set: |options, text| {
            let size = text.parse().ok().filter(|s| [512, 1024, 2048, 4096].contains(s));
            options.encryption.sector_size = size.ok_or("512, 1024, 2048 or 4096")?;
            Ok(())
        },
    },
];

/// The same for LUKS within qcow2.
pub(crate) const QCOW2_OPTIONS: [CreateOption; 7] = [
    CreateOption {
        name: "encrypt.format",
        help: "luks: encrypt the data",
        set: |options, text| match text {
            "luks" => {
                options.qcow2.encrypted = true;
                Ok(())
            }
            "aes" => Err("luks; new images cannot have the old aes, which is not safe".into()),
            _ => Err("luks".into()),
        },
    },
    option!(
        "encrypt.cipher-alg",
        "cipher and bits of its key: aes-256, aes-128, serpent-256, …",
        set_algorithm
    ),
    option!("encrypt.cipher-mode", "mode of the cipher: xts or cbc", SET_MODE),
    option!("encrypt.ivgen-alg", "initialization vectors: plain64, plain or essiv", SET_IV),
    option!("encrypt.ivgen-hash-alg", "hash for essiv: sha256", SET_IV_HASH),
    option!("encrypt.hash-alg", "hash of the key derivation: sha256, sha512, sha1, …", SET_HASH),
    option!(
        "encrypt.iter-time",
        "milliseconds that a guess at the passphrase takes on this machine",
        SET_TIME
    ),
];
