//! Where the bytes of a kernel come from.

use std::fs::File;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, seek, sendfile};
use terem_memory::GuestMemory;
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::Problem;

/// A file's bytes, read where they are needed.
pub trait Image {
    /// Bytes in it.
    fn len(&self) -> u64;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buf` from `offset` on. The caller has checked that the range exists.
    ///
    /// # Errors
    /// The host's.
    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()>;

    /// Copies a range, which the caller has checked, into RAM.
    ///
    /// # Errors
    /// The host's, or `addr..addr + len` is not RAM.
    fn copy(&self, offset: u64, len: u64, memory: &GuestMemory, addr: u64) -> std::io::Result<()>;
}

impl dyn Image + '_ {
    /// Checks that `offset..offset + len` exists.
    pub(super) fn check(&self, what: &'static str, offset: u64, len: u64) -> Result<(), Problem> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len() => Ok(()),
            end => Err(Problem::Truncated { what, needed: end.unwrap_or(u64::MAX), length: self.len() }),
        }
    }

    /// Bytes of a checked and small range.
    pub(super) fn read_vec(&self, offset: u64, len: u64) -> Result<Vec<u8>, Problem> {
        self.check("a header", offset, len)?;
        let len = usize::try_from(len).map_err(|_| Problem::Damaged("a header is too large".into()))?;
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }
}

/// A regular file.
#[derive(Debug)]
pub struct FileImage {
    file: File,
    path: PathBuf,
    len: u64,
}

impl FileImage {
    /// Opens it.
    ///
    /// # Errors
    /// The host's, or it is not a regular file, or empty.
    pub fn open(path: &Path) -> Result<Self, Problem> {
        let kind = std::fs::metadata(path)?.file_type();
        let not = match () {
            () if kind.is_dir() => Some("directory"),
            () if kind.is_fifo() => Some("pipe"),
            () if kind.is_socket() => Some("socket"),
            () if kind.is_char_device() => Some("character device"),
            () if kind.is_block_device() => Some("block device"),
            () => None,
        };
        if let Some(not) = not {
            return Err(Problem::NotAFile(not));
        }
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        if len == 0 {
            return Err(Problem::Empty);
        }
        Ok(Self { file, path: path.into(), len })
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Image for FileImage {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// The kernel copies from the page cache straight into the memory's own pages. Through the mapping each page
    /// would cost a fault and be cleared first, which took longer than the copying.
    fn copy(&self, offset: u64, len: u64, memory: &GuestMemory, addr: u64) -> std::io::Result<()> {
        let place = memfd_offset(memory, addr, len).ok_or(std::io::ErrorKind::InvalidInput)?;
        // A file description of its own would be better than a shared position, but nobody else uses it.
        seek(memory.memfd(), SeekFrom::Start(place))?;
        let (mut from, end) = (offset, offset.saturating_add(len));
        while from < end {
            let left = usize::try_from(end - from).unwrap_or(usize::MAX);
            if sendfile(memory.memfd(), &self.file, Some(&mut from), left)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        memory.marks().written_range(addr, len);
        Ok(())
    }
}

/// Where `addr..addr + len` is in the memory's memfd: it holds range after range.
fn memfd_offset(memory: &GuestMemory, addr: u64, len: u64) -> Option<u64> {
    let mut start = 0;
    for range in memory.ram() {
        if addr >= range.base && addr.checked_add(len)? <= range.end() {
            return Some(start + (addr - range.base));
        }
        start += range.size;
    }
    None
}

/// Bytes in memory.
#[derive(Debug, Clone, Copy)]
pub struct BytesImage<'a>(pub &'a [u8]);

impl BytesImage<'_> {
    fn range(&self, offset: u64, len: usize) -> std::io::Result<&[u8]> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.checked_add(len);
        end.and_then(|end| self.0.get(start..end)).ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
    }
}

impl Image for BytesImage<'_> {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        buf.copy_from_slice(self.range(offset, buf.len())?);
        Ok(())
    }

    fn copy(&self, offset: u64, len: u64, memory: &GuestMemory, addr: u64) -> std::io::Result<()> {
        let bytes = self.range(offset, usize::try_from(len).unwrap_or(usize::MAX))?;
        memory.write_slice(bytes, GuestAddress(addr)).map_err(std::io::Error::other)
    }
}

/// Little-endian fields of a header; 0 past its end, so that parsers check lengths once and not per field.
pub(super) trait Fields {
    /// 16 bits at `offset`.
    fn u16_at(&self, offset: usize) -> u16;
    /// 32 bits at `offset`.
    fn u32_at(&self, offset: usize) -> u32;
    /// 64 bits at `offset`.
    fn u64_at(&self, offset: usize) -> u64;
}

impl Fields for [u8] {
    fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes(bytes_at(self, offset))
    }

    fn u32_at(&self, offset: usize) -> u32 {
        u32::from_le_bytes(bytes_at(self, offset))
    }

    fn u64_at(&self, offset: usize) -> u64 {
        u64::from_le_bytes(bytes_at(self, offset))
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut field = [0; N];
    if let Some(end) = offset.checked_add(N)
        && let Some(found) = bytes.get(offset..end)
    {
        field.copy_from_slice(found);
    }
    field
}
