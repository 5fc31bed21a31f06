//! Passphrases of encrypted images, and their key slots.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use terem_crypt::{Cost, CryptError, FileArea, Limits, Luks, VolumeKey};

use crate::chain::ImageFile;
use crate::{Format, OpenError, Passphrase, qcow2};

/// The digest of a volume key in a header, and the key.
type Opened = (Vec<u8>, VolumeKey);

/// Which passphrase opens which image. What was derived from them is kept with them and wiped with the last clone, so
/// that an image that is opened again, by several readers or just after it was made, costs nothing.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    every: Option<Arc<Passphrase>>,
    images: Vec<(PathBuf, Arc<Passphrase>)>,
    headers: Vec<(PathBuf, PathBuf)>,
    /// Passphrases and directories of certificates by the ids that image names have for them.
    secrets: Vec<(String, Arc<Passphrase>)>,
    certificates: Vec<(String, PathBuf)>,
    locked: bool,
    /// Volume keys of images opened before, by the digest in their headers: opening again takes no time.
    opened: Arc<Mutex<Vec<Opened>>>,
}

impl Keys {
    /// One passphrase for every image that has none of its own.
    #[must_use]
    pub fn every(passphrase: Passphrase) -> Self {
        Self { every: Some(Arc::new(passphrase)), ..Self::default() }
    }

    /// None at all: encrypted images are opened without, and their data can be neither read nor written. For what needs
    /// tables and sizes only.
    #[must_use]
    pub fn locked() -> Self {
        Self { locked: true, ..Self::default() }
    }

    pub(crate) fn is_locked(&self) -> bool {
        self.locked
    }

    /// Whether there is no passphrase in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.every.is_none() && self.images.is_empty() && self.secrets.is_empty()
    }

    /// Sets the passphrase of the image at `path`.
    pub fn set(&mut self, path: impl Into<PathBuf>, passphrase: Passphrase) {
        self.images.push((path.into(), Arc::new(passphrase)));
    }

    /// Adds a passphrase that the names of images refer to by `id` ([`crate::Source::json`]).
    pub fn add_secret(&mut self, id: impl Into<String>, passphrase: Passphrase) {
        self.secrets.push((id.into(), Arc::new(passphrase)));
    }

    /// Adds a directory with certificates that the names of images refer to by `id`.
    pub fn add_certificates(&mut self, id: impl Into<String>, directory: impl Into<PathBuf>) {
        self.certificates.push((id.into(), directory.into()));
    }

    /// The passphrase with that id.
    #[must_use]
    pub fn secret(&self, id: &str) -> Option<&Passphrase> {
        self.secrets.iter().rev().find(|(known, _)| known == id).map(|(_, passphrase)| &**passphrase)
    }

    pub(crate) fn certificates(&self, id: &str) -> Option<&Path> {
        self.certificates.iter().rev().find(|(known, _)| known == id).map(|(_, directory)| &**directory)
    }

    /// The passphrase that was set for the image at `path`.
    #[must_use]
    pub fn of_image(&self, path: &Path) -> Option<&Passphrase> {
        self.images.iter().rev().find(|(p, _)| same_file(p, path)).map(|(_, key)| &**key)
    }

    /// Says that the LUKS header of the image at `path` is in a file of its own.
    pub fn set_header(&mut self, path: impl Into<PathBuf>, header: impl Into<PathBuf>) {
        self.headers.push((path.into(), header.into()));
    }

    /// The passphrase for the image at `path`.
    ///
    /// # Errors
    /// [`OpenError::NeedsPassphrase`].
    pub(crate) fn of(&self, path: &Path) -> Result<&Passphrase, OpenError> {
        let key = self.of_image(path).or(self.every.as_deref());
        key.ok_or_else(|| OpenError::NeedsPassphrase { path: path.to_owned() })
    }

    /// The volume key of an image that was opened with these keys before.
    pub(crate) fn remembered(&self, luks: &Luks) -> Option<VolumeKey> {
        let (opened, digest) = (self.opened.lock().unwrap_or_else(PoisonError::into_inner), luks.digest());
        opened.iter().find(|(of, _)| *of == digest).map(|(_, key)| key.clone())
    }

    pub(crate) fn remember(&self, luks: &Luks, key: VolumeKey) {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).push((luks.digest(), key));
    }

    /// The file with the LUKS header of the image at `path`, if it is not in the image.
    pub(crate) fn header_of(&self, path: &Path) -> Option<&Path> {
        self.headers.iter().rev().find(|(p, _)| same_file(p, path)).map(|(_, header)| &**header)
    }
}

/// Whether two paths lead to one file.
fn same_file(a: &Path, b: &Path) -> bool {
    a == b || a.canonicalize().ok().zip(b.canonicalize().ok()).is_some_and(|(a, b)| a == b)
}

/// How key slots are to be changed.
#[derive(Debug, Clone, Default)]
pub struct KeyOptions {
    /// The image's format, or `None` to look at it.
    pub format: Option<Format>,
    /// The slot to add, or to remove or change; `None`: the first that is free, or the one that the passphrase opens.
    pub slot: Option<usize>,
    /// What a guess at the new passphrase costs.
    pub cost: Cost,
}

/// Adds a key slot for `new` to the image at `path`, which `known` opens. Returns its number.
///
/// # Errors
/// [`OpenError`]; the image is in use, or the passphrase wrong, or there is no room.
pub fn add_key(
    path: impl AsRef<Path>,
    known: &Passphrase,
    new: &Passphrase,
    options: &KeyOptions,
) -> Result<usize, OpenError> {
    change(path.as_ref(), options.format, |luks, area| {
        let (key, _) = luks.unlock(area, known, None, Limits::default())?;
        luks.add_key(area, &key, new, options.slot, options.cost)
    })
}

/// Gives the key slot that `old` opens (or `options.slot`, if it does) the passphrase `new`. Returns the number that the
/// slot then has.
///
/// # Errors
/// As [`add_key`]; `old` opens the image then.
pub fn change_key(
    path: impl AsRef<Path>,
    old: &Passphrase,
    new: &Passphrase,
    options: &KeyOptions,
) -> Result<usize, OpenError> {
    change(path.as_ref(), options.format, |luks, area| {
        let (key, slot) = luks.unlock(area, old, options.slot, Limits::default())?;
        luks.change_key(area, &key, slot, new, options.cost)
    })
}

/// Removes a key slot: `options.slot`, where `passphrase` opens another one; or the one that `passphrase` opens. Returns
/// its number.
///
/// # Errors
/// As [`add_key`]; also when it is the last one.
pub fn remove_key(
    path: impl AsRef<Path>,
    passphrase: &Passphrase,
    options: &KeyOptions,
) -> Result<usize, OpenError> {
    change(path.as_ref(), options.format, |luks, area| {
        let slot = match options.slot {
            None => luks.unlock(area, passphrase, None, Limits::default())?.1,
            Some(slot) => {
                // Whoever removes a slot by its number shows that he can open the image without it.
                let others = luks.info()?.slots.into_iter().map(|s| s.slot).filter(|&s| s != slot);
                let others: Vec<_> = others.collect();
                if others.is_empty() {
                    return Err(CryptError::LastSlot(slot));
                }
                opens_one_of(luks, area, passphrase, &others)?;
                slot
            }
        };
        luks.remove_key(area, slot).map(|()| slot)
    })
}

/// A change of key slots as `qemu-img amend` has them.
#[derive(Debug, Clone, Copy)]
pub enum SlotChange<'a> {
    /// Takes a slot that is free for a new passphrase.
    Use {
        /// One that opens the image now.
        known: &'a Passphrase,
        /// The new one.
        new: &'a Passphrase,
        /// Take the slot with [`KeyOptions::slot`]'s number although it is in use.
        force: bool,
    },
    /// Destroys the slot with [`KeyOptions::slot`]'s number.
    Destroy,
    /// Destroys all slots that open with this passphrase.
    DestroyAll(&'a Passphrase),
}

/// Changes key slots of the image at `path`, asking for no more than `qemu-img amend` does: who can write the image can
/// destroy slots. The last one is left.
///
/// # Errors
/// As [`add_key`].
pub fn change_slots(
    path: impl AsRef<Path>,
    change_to: SlotChange<'_>,
    options: &KeyOptions,
) -> Result<(), OpenError> {
    change(path.as_ref(), options.format, |luks, area| match change_to {
        SlotChange::Use { known, new, force } => {
            let (key, _) = luks.unlock(area, known, None, Limits::default())?;
            let taken = options.slot.filter(|slot| {
                force && luks.info().is_ok_and(|info| info.slots.iter().any(|s| s.slot == *slot))
            });
            if let Some(slot) = taken {
                // A second one first, so that there is always one that opens the image.
                let spare = luks.add_key(area, &key, new, None, options.cost)?;
                luks.remove_key(area, slot)?;
                luks.add_key(area, &key, new, Some(slot), options.cost)?;
                return luks.remove_key(area, spare);
            }
            luks.add_key(area, &key, new, options.slot, options.cost).map(drop)
        }
        SlotChange::Destroy => luks.remove_key(area, options.slot.unwrap_or(0)),
        SlotChange::DestroyAll(old) => {
            let slots: Vec<usize> = luks.info()?.slots.into_iter().map(|slot| slot.slot).collect();
            let mut opened = Vec::new();
            for &slot in &slots {
                match luks.unlock(area, old, Some(slot), Limits::default()) {
                    Ok(_) => opened.push(slot),
                    Err(CryptError::WrongPassphrase) => {}
                    Err(error) => return Err(error),
                }
            }
            match opened.as_slice() {
                [] => Err(CryptError::WrongPassphrase),
                [first, ..] if opened.len() == slots.len() => Err(CryptError::LastSlot(*first)),
                opened => opened.iter().try_for_each(|&slot| luks.remove_key(area, slot)),
            }
        }
    })
}

fn opens_one_of(
    luks: &Luks,
    area: &FileArea<'_>,
    passphrase: &Passphrase,
    slots: &[usize],
) -> Result<VolumeKey, CryptError> {
    let mut failed = CryptError::WrongPassphrase;
    for &slot in slots {
        match luks.unlock(area, passphrase, Some(slot), Limits::default()) {
            Ok((key, _)) => return Ok(key),
            Err(CryptError::WrongPassphrase) => {}
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Lets `work` change the LUKS header of the image at `path`, which nobody else has open.
fn change<T>(
    path: &Path,
    format: Option<Format>,
    work: impl FnOnce(&mut Luks, &FileArea<'_>) -> Result<T, CryptError>,
) -> Result<T, OpenError> {
    let image = ImageFile::open(path, true, true, &mut Vec::new())?;
    let (start, len) = header_area(&image, format)?;
    let area = image.area(start, len);
    let fail = |source| OpenError::Encryption { path: path.to_owned(), source };
    let mut luks = Luks::read(&area).map_err(fail)?;
    work(&mut luks, &area).map_err(fail)
}

/// Where an image's LUKS header is: first byte and length.
fn header_area(image: &ImageFile, format: Option<Format>) -> Result<(u64, u64), OpenError> {
    let fail = |source| OpenError::Encryption { path: image.path().to_owned(), source };
    match image.format(format)? {
        Format::Luks => Ok((0, image.len())),
        Format::Qcow2 => qcow2::luks_header(image)?.ok_or_else(|| fail(CryptError::NotLuks)),
        _ => Err(fail(CryptError::NotLuks)),
    }
}
