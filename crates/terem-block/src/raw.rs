//! Raw images: the bytes of the file are the bytes of the disk.

use crate::IoError;
use crate::engine::View;
use crate::file::{File, to_usize};
use crate::probe::{HEAD, foreign_format};
use crate::range_lock::RangeLock;

/// A raw image.
pub(crate) struct Raw {
    file: File,
    size: u64,
    /// Whether nobody said that it is raw: then its first sector must not come to look like another format,
    /// or the next probe would find that format, with whatever file names the guest wrote into it.
    guard: Option<RangeLock>,
    discard: bool,
}

impl Raw {
    pub(crate) fn new(file: File, probed: bool, discard: bool) -> Self {
        // A last part of a sector is padded, as QEMU does.
        let size = file.len().checked_next_multiple_of(512).unwrap_or(file.len());
        Self { file, size, guard: probed.then(RangeLock::default), discard }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) async fn read(&self, offset: u64, view: View) -> Result<(), IoError> {
        self.file.read(offset, &[view]).await
    }

    pub(crate) async fn write(&self, offset: u64, view: View) -> Result<(), IoError> {
        let Some(guard) = self.guard.as_ref().filter(|_| offset < HEAD as u64) else {
            return self.file.write(offset, &[view]).await;
        };
        // One such write at a time, of a copy: the guest cannot change it between the look and the write.
        let _one = guard.all().await;
        let start = to_usize(offset);
        let covered = view.len().min(HEAD - start);
        let head = View::copy_of(&view.part(0, covered).to_vec());
        let mut sector = self.file.read_bytes(0, HEAD).await?;
        sector[start..start + covered].copy_from_slice(&head.to_vec());
        if let Some(format) = foreign_format(&sector) {
            tracing::warn!(
                path = %self.file.path().display(), format,
                "refused a write that would make this raw disk look like another format; \
                 open it with format=raw if that is wanted"
            );
            return Err(IoError::Os(libc::EPERM));
        }
        self.file.write(offset, &[head, view.part(covered, view.len())]).await
    }

    pub(crate) async fn flush(&self) -> Result<(), IoError> {
        self.file.sync().await
    }

    pub(crate) async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        if self.discard { self.file.discard(offset, length).await } else { Ok(()) }
    }

    pub(crate) async fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<(), IoError> {
        self.file.write_zeroes(offset, length, unmap && self.discard).await
    }
}
