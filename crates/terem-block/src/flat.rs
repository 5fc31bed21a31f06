//! A part of a file that holds a part of a disk as it is: fixed VHD images and the flat extents of VMDK.

use crate::IoError;
use crate::engine::View;
use crate::extent::Extent;
use crate::file::{File, to_usize};

/// Bytes of a file as bytes of a disk.
pub(crate) struct Flat {
    file: File,
    /// Where they begin in the file.
    start: u64,
    size: u64,
    /// Whether discards give storage back.
    discard: bool,
}

impl Flat {
    pub(crate) fn new(file: File, start: u64, size: u64, discard: bool) -> Self {
        Self { file, start, size, discard }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Where they begin in the file.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) async fn read(&self, offset: u64, view: View) -> Result<(), IoError> {
        self.file.read(self.start + offset, &[view]).await
    }

    pub(crate) async fn write(&self, offset: u64, view: View) -> Result<(), IoError> {
        let view = view.part(0, to_usize(self.size.saturating_sub(offset)));
        self.file.write(self.start + offset, &[view]).await
    }

    pub(crate) async fn flush(&self) -> Result<(), IoError> {
        self.file.sync().await
    }

    pub(crate) async fn discard(&self, offset: u64, length: u64) -> Result<(), IoError> {
        if self.discard { self.file.discard(self.start + offset, length).await } else { Ok(()) }
    }

    pub(crate) async fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Result<(), IoError> {
        self.file.write_zeroes(self.start + offset, length, unmap && self.discard).await
    }

    /// The run at `offset`: data or a hole of the file.
    pub(crate) fn status(&self, offset: u64, length: u64) -> Extent {
        let found = self.file.status(self.start + offset, length);
        Extent::new(offset, found.length, found.kind, found.host)
    }
}
