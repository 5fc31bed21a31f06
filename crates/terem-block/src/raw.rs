//! Raw images: the bytes of the file are the bytes of the disk.

use crate::chain::{ImageFile, Opening};
use crate::create::reserve_storage;
use crate::engine::View;
use crate::extent::Extent;
use crate::file::{File, to_usize};
use crate::format::{Driver, NewImage};
use crate::node::{Answer, Image, Node};
use crate::probe::{HEAD, probe};
use crate::range_lock::RangeLock;
use crate::{Format, ImageInfo, IoError, OpenError};

pub(crate) static DRIVER: Driver = Driver {
    format: Format::Raw,
    names: &["raw", "host_device", "file"],
    probe: |_| false,
    open: |opening| Raw::open(opening).map(Node::new),
    describe: |image: &ImageFile, info: &mut ImageInfo| {
        info.virtual_size = image.len();
        Ok(())
    },
    check: None,
    create: |new: &NewImage<'_>| {
        if new.device.is_some() {
            // Nobody shall take the disk for what was there before.
            return new.write_zeroes(0, new.size.min(4096));
        }
        let done = new.file.set_len(new.size);
        done.and_then(|()| reserve_storage(new.file, 0, new.size, new.options.preallocation))
            .map_err(|e| OpenError::io(new.path, "writing the new image", e))
    },
    options: &[],
};

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
    fn open(opening: Opening<'_>) -> Result<Self, OpenError> {
        let guard = (opening.probed && opening.writing).then(RangeLock::default);
        let discard = opening.options.discard;
        let file = opening.storage()?;
        // A last part of a sector is padded, as QEMU does.
        let size = file.len().checked_next_multiple_of(512).unwrap_or(file.len());
        Ok(Self { file, size, guard, discard })
    }

    async fn write(&self, offset: u64, view: View) -> Result<(), IoError> {
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
        if let Some(format) = probe(&sector).name() {
            tracing::warn!(
                path = %self.file.path().display(), format,
                "refused a write that would make this raw disk look like another format; \
                 open it with format=raw if that is wanted"
            );
            return Err(IoError::Os(libc::EPERM));
        }
        self.file.write(offset, &[head, view.part(covered, view.len())]).await
    }
}

impl Image for Raw {
    fn format(&self) -> Format {
        Format::Raw
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

    /// A device has what somebody wrote to it before.
    fn reads_as_zero_when_new(&self) -> bool {
        !self.file.is_block_device()
    }

    fn read(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(async move { self.file.read(offset, &[view]).await })
    }

    fn write(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(self.write(offset, view))
    }

    fn flush(&self) -> Answer<'_> {
        Box::pin(self.file.sync())
    }

    fn discard(&self, offset: u64, length: u64) -> Answer<'_> {
        Box::pin(async move { if self.discard { self.file.discard(offset, length).await } else { Ok(()) } })
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Answer<'_> {
        Box::pin(self.file.write_zeroes(offset, length, unmap && self.discard))
    }

    fn plain_data(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn zeroes_fast(&self, _offset: u64, _length: u64) -> bool {
        self.file.zeroes_fast()
    }

    fn status(&self, offset: u64, length: u64) -> Answer<'_, Extent> {
        Box::pin(async move { Ok(self.file.status(offset, length)) })
    }
}
