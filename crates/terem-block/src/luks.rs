//! LUKS images: a header, and after it the disk's bytes, encrypted. All of LUKS but its storage is in [`terem_crypt`].

use std::path::Path;

use terem_crypt::{CryptError, FileArea, Layout, Limits, Luks, SectorCipher};

use crate::chain::{ImageFile, Opening};
use crate::create::reserve_storage;
use crate::crypt::{Crypt, Place};
use crate::encryption::{self, OPTIONS};
use crate::engine::View;
use crate::extent::{Extent, ExtentKind};
use crate::file::File;
use crate::format::{Driver, NewImage};
use crate::node::{Answer, Image, Node};
use crate::{EncryptionInfo, Format, IoError, Keys, OpenError};

pub(crate) static DRIVER: Driver = Driver {
    format: Format::Luks,
    names: &["luks"],
    probe: Luks::probe,
    open: |opening| LuksImage::open(opening).map(Node::new),
    describe: |image, info| {
        let luks = read_header(image)?;
        info.virtual_size = data_size(image, &luks.layout())?;
        let facts = luks.info().map_err(|e| failed(image.path(), e))?;
        info.encryption = Some(EncryptionInfo { method: "luks", luks: Some(facts) });
        Ok(())
    },
    check: None,
    create,
    options: &OPTIONS,
};

/// An open LUKS image.
pub(crate) struct LuksImage {
    file: File,
    /// `None` without a passphrase.
    crypt: Option<Crypt>,
    /// First byte of the data.
    offset: u64,
    size: u64,
}

pub(crate) fn failed(path: &Path, source: CryptError) -> OpenError {
    OpenError::Encryption { path: path.to_owned(), source }
}

fn read_header(image: &ImageFile) -> Result<Luks, OpenError> {
    let area = image.area(0, image.len());
    Luks::read(&area).map_err(|e| failed(image.path(), e))
}

/// First byte of the data in `image`, which has its header, and how many there are.
pub(crate) fn disk_size(image: &ImageFile) -> Result<(u64, u64), OpenError> {
    let layout = read_header(image)?.layout();
    Ok((layout.offset, data_size(image, &layout)?))
}

fn data_size(image: &ImageFile, layout: &Layout) -> Result<u64, OpenError> {
    let there = image.len().checked_sub(layout.offset).ok_or_else(|| {
        let (offset, len) = (layout.offset, image.len());
        OpenError::truncated(image.path(), format!("its data begin at {offset:#x}, its end is at {len:#x}"))
    })?;
    let size = match layout.size {
        Some(size) if size > there => {
            let what = format!("its data have {size:#x} bytes, of which {there:#x} are there");
            return Err(OpenError::truncated(image.path(), what));
        }
        Some(size) => size,
        None => there,
    };
    // Sizes of sectors are checked with the cipher.
    let sector = (layout.sector_size as u64).max(1);
    Ok(size - size % sector)
}

/// The cipher for the data of the image at `path`, whose header is in `area`.
pub(crate) fn unlock(
    path: &Path,
    area: &FileArea<'_>,
    luks: &Luks,
    keys: &Keys,
) -> Result<SectorCipher, OpenError> {
    let passphrase = keys.of(path)?;
    let key = match keys.remembered(luks) {
        Some(key) => key,
        None => {
            let unlocked = luks.unlock(area, passphrase, None, Limits::default());
            let (key, slot) = unlocked.map_err(|e| failed(path, e))?;
            tracing::debug!(path = %path.display(), slot, "a key slot is open");
            keys.remember(luks, key.clone());
            key
        }
    };
    luks.cipher(&key).map_err(|e| failed(path, e))
}

impl LuksImage {
    fn open(opening: Opening<'_>) -> Result<Self, OpenError> {
        let (image, keys) = (&opening.image, &opening.options.keys);
        let detached = match keys.header_of(image.path()) {
            Some(path) => Some(ImageFile::open(path, false, opening.options.lock, &mut Vec::new())?),
            None => None,
        };
        let holder = detached.as_ref().unwrap_or(image);
        let luks = read_header(holder)?;
        let layout = luks.layout();
        let size = data_size(image, &layout)?;
        if luks.info().is_ok_and(|info| info.degraded) {
            tracing::warn!(
                path = %holder.path().display(),
                "one of the two copies of its LUKS header is damaged or old; \
                 `terem disk key` puts that right with the next change"
            );
        }
        let crypt = if keys.is_locked() {
            None
        } else {
            let area = holder.area(0, holder.len());
            let cipher = unlock(image.path(), &area, &luks, keys)?;
            Some(Crypt::new(cipher, layout.iv_tweak))
        };
        Ok(Self { file: opening.storage()?, crypt, offset: layout.offset, size })
    }

    fn crypt(&self) -> Result<&Crypt, IoError> {
        self.crypt.as_ref().ok_or(IoError::Locked)
    }

    fn place(&self, offset: u64) -> Place {
        Place { file: self.offset + offset, cipher: offset }
    }
}

impl Image for LuksImage {
    fn format(&self) -> Format {
        Format::Luks
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn unit(&self) -> u64 {
        0
    }

    fn reads_as_zero_when_new(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(async move { self.crypt()?.read(&self.file, self.place(offset), view).await })
    }

    fn write(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(async move { self.crypt()?.write(&self.file, self.place(offset), &[view]).await })
    }

    fn flush(&self) -> Answer<'_> {
        Box::pin(self.file.sync())
    }

    /// What was given back would read as anything.
    fn discard(&self, _offset: u64, _length: u64) -> Answer<'_> {
        Box::pin(async { Ok(()) })
    }

    fn write_zeroes(&self, offset: u64, length: u64, _unmap: bool) -> Answer<'_> {
        Box::pin(async move { self.crypt()?.write_zeroes(&self.file, self.place(offset), length).await })
    }

    fn status(&self, offset: u64, length: u64) -> Answer<'_, Extent> {
        // Holes of the file do not read as zeroes.
        Box::pin(async move { Ok(Extent::new(offset, length, ExtentKind::Data, None)) })
    }
}

/// Bytes before the data of a new image; `None` where there can be none.
pub(crate) fn data_offset(options: &crate::EncryptionOptions) -> Option<u64> {
    encryption::Header::new(options).ok().map(|header| header.data_offset())
}

fn create(new: &NewImage<'_>) -> Result<(), OpenError> {
    let &NewImage { path, file, size, options, .. } = new;
    let fail = |e| OpenError::io(path, "writing the new image", e);
    let passphrase = options.keys.of(path)?;
    let header = encryption::Header::new(&options.encryption).map_err(|e| failed(path, e))?;
    let sector = header.sector_size() as u64;
    let data = header.data_offset();
    if !size.is_multiple_of(sector) {
        let what = format!("{size} bytes are no whole number of sectors of {sector}");
        return Err(OpenError::Limit { path: path.to_owned(), what });
    }
    let end = data.checked_add(size).filter(|&end| i64::try_from(end).is_ok());
    let end = end.ok_or_else(|| OpenError::Limit {
        path: path.to_owned(),
        what: format!("{size} bytes are more than a file can have"),
    })?;
    // The header is written whole; what is behind it reads as anything.
    new.set_len(end, data)?;
    reserve_storage(file, 0, end, options.preallocation).map_err(fail)?;
    let area = FileArea::new(file, 0, end);
    let key = header.write(&area, passphrase).map_err(|e| failed(path, e))?;
    let luks = Luks::read(&area).map_err(|e| failed(path, e))?;
    options.keys.remember(&luks, key);
    Ok(())
}
