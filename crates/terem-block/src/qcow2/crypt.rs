//! Encrypted data (specification, "Full disk encryption header pointer" and "Data encryption").
//!
//! Only clusters of data are encrypted: not the tables, and not compressed clusters, which QEMU does not encrypt either;
//! so nobody writes compressed clusters into an encrypted image. With LUKS (method 2) sectors are counted by their place
//! in the file that holds the data, with the old AES (method 1) by their place on the disk.

use terem_crypt::{CipherSpec, CryptError, FileArea, IvGenerator, Luks, SECTOR, SectorCipher};
use zeroize::Zeroizing;

use super::Qcow2;
use super::header::Header;
use crate::chain::{ImageFile, Opening};
use crate::crypt::{Crypt, Place};
use crate::engine::View;
use crate::luks::{failed, unlock};
use crate::{EncryptionInfo, IoError, OpenError};

/// Encryption methods.
const AES: u32 = 1;
pub(super) const LUKS: u32 = 2;
/// Bytes of the old encryption's key: the passphrase, cut or filled with zeroes.
const AES_KEY: usize = 16;

/// How the data are encrypted.
pub(super) struct DataCrypt {
    /// `None` without a passphrase.
    crypt: Option<Crypt>,
    /// Whether sectors are counted by their place in the file.
    physical: bool,
}

impl DataCrypt {
    /// What the image's data need, if they are encrypted.
    pub(super) fn open(opening: &Opening<'_>, header: &Header) -> Result<Option<Self>, OpenError> {
        let (image, keys) = (&opening.image, &opening.options.keys);
        let path = image.path();
        if header.crypt_method == 0 {
            return Ok(None);
        }
        let physical = header.crypt_method == LUKS;
        if !physical {
            if opening.writing {
                return Err(OpenError::Unsupported {
                    path: path.to_owned(),
                    feature: "writing with the old AES encryption, which is not safe,".into(),
                    hint: "open it with readonly=on, or copy it with `terem disk convert`",
                });
            }
            tracing::warn!(
                path = %path.display(),
                "the image has the old AES encryption, which is not safe; copy it with `terem disk convert`"
            );
        }
        if keys.is_locked() {
            return Ok(Some(Self { crypt: None, physical }));
        }
        let cipher = if physical {
            let (offset, length) = area(image, header)?;
            let area = image.area(offset, length);
            let luks = read_luks(image, &area)?;
            unlock(path, &area, &luks, keys)?
        } else {
            let mut key = Zeroizing::new([0; AES_KEY]);
            for (to, from) in key.iter_mut().zip(keys.of(path)?.bytes()) {
                *to = *from;
            }
            let spec =
                CipherSpec { mode: terem_crypt::Mode::Cbc, iv: IvGenerator::Plain64, ..CipherSpec::DEFAULT };
            SectorCipher::new(spec, &*key, SECTOR).map_err(|e| failed(path, e))?
        };
        Ok(Some(Self { crypt: Some(Crypt::new(cipher, 0)), physical }))
    }

    fn crypt(&self) -> Result<&Crypt, IoError> {
        self.crypt.as_ref().ok_or(IoError::Locked)
    }
}

/// Where the LUKS header is.
fn area(image: &ImageFile, header: &Header) -> Result<(u64, u64), OpenError> {
    let corrupt = |what: &str| OpenError::corrupt(image.path(), what);
    let (offset, length) =
        header.crypt_header.ok_or_else(|| corrupt("it is encrypted with LUKS, and has no LUKS header"))?;
    let inside = offset.checked_add(length).is_some_and(|end| end <= image.len());
    if offset == 0 || !offset.is_multiple_of(header.cluster_size()) || !inside {
        return Err(corrupt(&format!("its LUKS header is at {offset:#x}, {length:#x} bytes")));
    }
    Ok((offset, length))
}

/// Where the LUKS header of the image is: first byte and length. `None` when it is not encrypted with LUKS.
pub(crate) fn luks_header(image: &ImageFile) -> Result<Option<(u64, u64)>, OpenError> {
    let header = Header::read(image)?;
    if header.crypt_method == LUKS { area(image, &header).map(Some) } else { Ok(None) }
}

fn read_luks(image: &ImageFile, area: &FileArea<'_>) -> Result<Luks, OpenError> {
    let luks = Luks::read(area).map_err(|e| failed(image.path(), e))?;
    if luks.version() != 1 {
        let source = CryptError::Unsupported("LUKS 2 within qcow2".into());
        return Err(failed(image.path(), source));
    }
    Ok(luks)
}

/// Facts for [`crate::info`].
pub(super) fn describe(image: &ImageFile, header: &Header) -> Result<Option<EncryptionInfo>, OpenError> {
    Ok(match header.crypt_method {
        0 => None,
        AES => Some(EncryptionInfo { method: "aes", luks: None }),
        _ => {
            let (offset, length) = area(image, header)?;
            let luks = read_luks(image, &image.area(offset, length))?;
            let facts = luks.info().map_err(|e| failed(image.path(), e))?;
            Some(EncryptionInfo { method: "luks", luks: Some(facts) })
        }
    })
}

impl Qcow2 {
    /// Reads data at `host` that belong at `guest`.
    pub(super) async fn read_data(&self, host: u64, guest: u64, view: View) -> Result<(), IoError> {
        let Some(data) = &self.crypt else { return self.data().read(host, &[view]).await };
        let place = Place { file: host, cipher: if data.physical { host } else { guest } };
        data.crypt()?.read(self.data(), place, view).await
    }

    /// Writes `views`, one after the other, to `host`.
    pub(super) async fn write_data(&self, host: u64, views: &[View]) -> Result<(), IoError> {
        let Some(data) = &self.crypt else { return self.data().write(host, views).await };
        data.crypt()?.write(self.data(), Place { file: host, cipher: host }, views).await
    }

    /// Writes what reads as zeroes.
    pub(super) async fn write_zero_data(&self, host: u64, length: u64) -> Result<(), IoError> {
        let Some(data) = &self.crypt else { return self.data().write_zeroes(host, length, false).await };
        data.crypt()?.write_zeroes(self.data(), Place { file: host, cipher: host }, length).await
    }
}
