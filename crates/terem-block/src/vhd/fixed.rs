//! Fixed images: the disk as it is, then the footer, which is never touched.

use crate::Format;
use crate::engine::View;
use crate::extent::Extent;
use crate::file::File;
use crate::flat::Flat;
use crate::node::{Answer, Image};

/// A fixed image.
pub(super) struct FixedVhd(Flat);

impl FixedVhd {
    pub(super) fn new(file: File, size: u64, discard: bool) -> Self {
        Self(Flat::new(file, 0, size, discard))
    }
}

impl Image for FixedVhd {
    fn format(&self) -> Format {
        Format::Vhd
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn file(&self) -> Option<&File> {
        Some(self.0.file())
    }

    fn unit(&self) -> u64 {
        0
    }

    fn plain_data(&self) -> Option<&File> {
        Some(self.0.file())
    }

    fn read(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(self.0.read(offset, view))
    }

    fn write(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(self.0.write(offset, view))
    }

    fn flush(&self) -> Answer<'_> {
        Box::pin(self.0.flush())
    }

    fn discard(&self, offset: u64, length: u64) -> Answer<'_> {
        Box::pin(self.0.discard(offset, length))
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Answer<'_> {
        Box::pin(self.0.write_zeroes(offset, length, unmap))
    }

    fn status(&self, offset: u64, length: u64) -> Answer<'_, Extent> {
        Box::pin(async move { Ok(self.0.status(offset, length)) })
    }
}
