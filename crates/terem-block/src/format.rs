//! The formats: a table with what each of them can do. A new format is a variant of [`Format`], a [`Driver`] in its
//! own module, and a line in `DRIVERS`.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::chain::{ImageFile, Opening};
use crate::node::Node;
use crate::{CheckReport, CreateOptions, ImageInfo, OpenError};

/// The format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Format {
    /// The bytes of the file are the bytes of the disk.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// VirtualBox's format.
    Vdi,
    /// The format of Virtual PC and Hyper-V, which QEMU calls `vpc`.
    #[serde(rename = "vpc", alias = "vhd")]
    Vhd,
    /// Hyper-V's format.
    Vhdx,
    /// VMware's format.
    Vmdk,
    /// Linux' encrypted format, versions 1 and 2.
    Luks,
}

/// All formats. Raw comes first: it is what a file is in which no other is found.
static DRIVERS: [&Driver; 7] = [
    &crate::raw::DRIVER,
    &crate::qcow2::DRIVER,
    &crate::vdi::DRIVER,
    &crate::vhd::DRIVER,
    &crate::vhdx::DRIVER,
    &crate::vmdk::DRIVER,
    &crate::luks::DRIVER,
];

/// Finds what is wrong with an image.
pub(crate) type Check = fn(&ImageFile) -> Result<CheckReport, OpenError>;

/// What there is to know of a format.
pub(crate) struct Driver {
    pub(crate) format: Format,
    /// Its names on the command line, in configurations and in images that have one as their backing file. The first
    /// is the one that is written.
    pub(crate) names: &'static [&'static str],
    /// Whether a file that begins with these bytes ([`crate::probe::HEAD`] of them, if there are so many) is one.
    pub(crate) probe: fn(&[u8]) -> bool,
    pub(crate) open: fn(Opening<'_>) -> Result<Node, OpenError>,
    /// Fills in what [`crate::info`] tells, at least the disk's size.
    pub(crate) describe: fn(&ImageFile, &mut ImageInfo) -> Result<(), OpenError>,
    /// Finds what is wrong. `None`: nothing can be.
    pub(crate) check: Option<Check>,
    /// Writes an empty disk into the new, empty file.
    pub(crate) create: fn(&NewImage<'_>) -> Result<(), OpenError>,
    /// What can be chosen when an image is made.
    pub(crate) options: &'static [CreateOption],
}

/// A new image, for [`Driver::create`].
pub(crate) struct NewImage<'a> {
    pub(crate) path: &'a Path,
    /// The path that it will have when it is complete.
    pub(crate) name: &'a Path,
    pub(crate) file: &'a fs::File,
    /// Bytes of the block device that `file` is; `None` for a regular file, which is empty.
    pub(crate) device: Option<u64>,
    /// Bytes of the disk, a multiple of 512.
    pub(crate) size: u64,
    pub(crate) options: &'a CreateOptions,
}

impl NewImage<'_> {
    fn failed(&self, e: std::io::Error) -> OpenError {
        OpenError::io(self.path, "writing the new image", e)
    }

    /// Makes the file so long; what is not written yet reads as zeroes. `reads`: of that, so much will be read before it
    /// is written, so that a device must be zeroed there.
    pub(crate) fn set_len(&self, len: u64, reads: u64) -> Result<(), OpenError> {
        let Some(device) = self.device else { return self.file.set_len(len).map_err(|e| self.failed(e)) };
        if len > device {
            let what = format!("it needs {len} bytes, and the device has {device}");
            return Err(OpenError::Limit { path: self.path.to_owned(), what });
        }
        self.write_zeroes(0, reads)
    }

    /// Writes zeroes.
    pub(crate) fn write_zeroes(&self, start: u64, end: u64) -> Result<(), OpenError> {
        use std::os::unix::fs::FileExt;
        let zeroes = vec![0; 1 << 20];
        let mut at = start;
        while at < end {
            let n = (end - at).min(zeroes.len() as u64);
            self.file.write_all_at(&zeroes[..crate::file::to_usize(n)], at).map_err(|e| self.failed(e))?;
            at += n;
        }
        Ok(())
    }
}

/// A setting of a new image that can be given as text, `name=value`.
#[derive(Clone, Copy)]
pub struct CreateOption {
    /// Its name, the same as QEMU's where it has it too.
    pub name: &'static str,
    /// What it is, for a list.
    pub help: &'static str,
    /// Sets it from text, or says what would be right.
    pub set: fn(&mut CreateOptions, &str) -> Result<(), String>,
}

/// What `on` and `off` say in a [`CreateOption`].
pub(crate) fn flag(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off".into()),
    }
}

/// What a [`CreateOption`] says in bytes: decimal or hexadecimal, perhaps with a suffix of `bkKMGTPE` that stands for a
/// power of 1024, and then perhaps with a fraction.
///
/// # Errors
/// What would be right.
pub fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text} is no number of bytes such as 65536, 64K or 2M");
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).map_err(|_| wrong());
    }
    let (number, shift) = match text.char_indices().last() {
        Some((at, suffix)) if suffix.is_ascii_alphabetic() => {
            let power = "bkmgtpe".find(suffix.to_ascii_lowercase()).ok_or_else(wrong)?;
            (&text[..at], 10 * power)
        }
        _ => (text, 0),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    let there = !whole.is_empty() && !number.ends_with('.') || !fraction.is_empty();
    if !there || !digits(whole) || !digits(fraction) {
        return Err(wrong());
    }
    let whole = if whole.is_empty() { 0 } else { whole.parse::<u64>().map_err(|_| wrong())? };
    let mut bytes = u128::from(whole) << shift;
    if !fraction.is_empty() {
        let digits = &fraction[..fraction.len().min(18)];
        let part: u64 = digits.parse().map_err(|_| wrong())?;
        bytes += (u128::from(part) << shift) / 10u128.pow(u32::try_from(digits.len()).unwrap_or(0));
    }
    u64::try_from(bytes).map_err(|_| wrong())
}

impl Format {
    /// All formats.
    pub fn all() -> impl Iterator<Item = Self> {
        DRIVERS.iter().map(|driver| driver.format)
    }

    /// The format of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        DRIVERS.iter().find(|driver| driver.names.contains(&name)).map(|driver| driver.format)
    }

    /// The name in configurations and in qcow2's backing format extension.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.driver().names[0]
    }

    /// What can be chosen when an image of this format is made.
    #[must_use]
    pub fn create_options(self) -> &'static [CreateOption] {
        self.driver().options
    }

    pub(crate) fn driver(self) -> &'static Driver {
        DRIVERS.iter().find(|driver| driver.format == self).unwrap_or(&DRIVERS[0])
    }

    /// The format that a file which begins so has, if it is one of ours; raw is never found.
    pub(crate) fn found_in(head: &[u8]) -> Option<Self> {
        DRIVERS.iter().find(|driver| (driver.probe)(head)).map(|driver| driver.format)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_one_line_and_its_own_names() {
        for format in Format::all() {
            assert_eq!(DRIVERS.iter().filter(|driver| driver.format == format).count(), 1, "{format:?}");
            assert_eq!(Format::from_name(format.name()), Some(format));
            assert!(!(format.driver().probe)(&[0; 512]), "{format:?}");
        }
        assert_eq!(Format::from_name("nothing"), None);
    }
}
