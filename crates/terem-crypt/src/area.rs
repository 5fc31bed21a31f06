//! Where a LUKS header is: a file, a part of one, or memory.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;

use zeroize::Zeroizing;

use crate::CryptError;

/// Bytes that can be read and written at once, wherever they are. Offset 0 is the header's first byte.
pub trait Area {
    /// Bytes there are.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// The host's; [`io::ErrorKind::UnexpectedEof`] beyond the end.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes `buf` at `offset`.
    ///
    /// # Errors
    /// The host's.
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;

    /// Makes everything written before durable.
    ///
    /// # Errors
    /// The host's.
    fn sync(&self) -> io::Result<()>;
}

/// `len` bytes of a file from `start` on.
#[derive(Debug)]
pub struct FileArea<'a> {
    file: &'a fs::File,
    start: u64,
    len: u64,
}

impl<'a> FileArea<'a> {
    /// A part of `file`, which the caller knows to be there.
    #[must_use]
    pub fn new(file: &'a fs::File, start: u64, len: u64) -> Self {
        Self { file, start, len }
    }

    fn place(&self, offset: u64, len: usize) -> io::Result<u64> {
        match offset.checked_add(len as u64) {
            Some(end) if end <= self.len => Ok(self.start + offset),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Area for FileArea<'_> {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, self.place(offset, buf.len())?)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.file.write_all_at(buf, self.place(offset, buf.len())?)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// `len` bytes from `offset` on. The caller has bounded `len`.
pub(crate) fn read(area: &dyn Area, offset: u64, len: usize) -> Result<Zeroizing<Vec<u8>>, CryptError> {
    if offset.checked_add(len as u64).is_none_or(|end| end > area.len()) {
        return Err(CryptError::corrupt(format!(
            "{len:#x} bytes at {offset:#x} are beyond the end ({:#x})",
            area.len()
        )));
    }
    let mut bytes = Zeroizing::new(vec![0; len]);
    let fail = |source| CryptError::Io { doing: "reading the LUKS header", source };
    area.read_at(offset, &mut bytes).map_err(fail)?;
    Ok(bytes)
}

pub(crate) fn write(area: &dyn Area, offset: u64, bytes: &[u8]) -> Result<(), CryptError> {
    area.write_at(offset, bytes).map_err(|source| CryptError::Io { doing: "writing the LUKS header", source })
}

pub(crate) fn sync(area: &dyn Area) -> Result<(), CryptError> {
    area.sync().map_err(|source| CryptError::Io { doing: "flushing the LUKS header", source })
}

/// Overwrites `len` bytes from `offset` on with zeroes, where they are something else; so holes stay holes.
pub(crate) fn wipe(area: &dyn Area, offset: u64, len: u64) -> Result<(), CryptError> {
    const STEP: u64 = 64 << 10;
    let end = offset.saturating_add(len).min(area.len());
    let mut at = offset;
    while at < end {
        let step = STEP.min(end - at);
        let n = usize::try_from(step).unwrap_or(0);
        if read(area, at, n)?.iter().any(|&b| b != 0) {
            write(area, at, &vec![0; n])?;
        }
        at += step;
    }
    Ok(())
}
