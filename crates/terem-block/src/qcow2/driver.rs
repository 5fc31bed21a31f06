//! qcow2's line in the table of formats.

use super::{Compression, Header, Layout, Qcow2, Tables, check_image, write_new};
use crate::chain::{Opening, Seen};
use crate::engine::{Engine, View};
use crate::executor::Executor;
use crate::extent::Extent;
use crate::file::File;
use crate::format::{CreateOption, Driver, NewImage};
use crate::node::{Answer, Image, Node};
use crate::{
    AioEngine, CreateOptions, Format, ImageInfo, OpenError, OpenOptions, Preallocation, Qcow2Info,
    SnapshotInfo,
};

pub(crate) static DRIVER: Driver = Driver {
    format: Format::Qcow2,
    names: &["qcow2"],
    probe: |head| head.starts_with(&super::header::QCOW_MAGIC),
    open: |opening| Qcow2::open(opening).map(Node::new),
    describe: |image, info| {
        let tables = Tables::read(image, Header::read(image)?)?;
        describe(&tables, info);
        Ok(())
    },
    check: Some(|image| {
        let header = Header::read(image)?;
        check_image(image, &Tables::read(image, header)?)
    }),
    create,
    options: &[CLUSTER_SIZE, LAZY_REFCOUNTS],
};

const CLUSTER_SIZE: CreateOption = CreateOption {
    name: "cluster_size",
    help: "bytes of a cluster, a power of two from 512 to 2M",
    set: |options: &mut CreateOptions, text| {
        let size = text.parse().map_err(|_| format!("{text} is no number of bytes"))?;
        options.cluster_size = size;
        Ok(())
    },
};

const LAZY_REFCOUNTS: CreateOption = CreateOption {
    name: "lazy_refcounts",
    help: "on: let reference counts be behind while the image is open",
    set: |options: &mut CreateOptions, text| {
        options.lazy_refcounts = match text {
            "on" => true,
            "off" => false,
            _ => return Err("on or off".into()),
        };
        Ok(())
    },
};

impl Qcow2 {
    pub(super) fn open(mut opening: Opening<'_>) -> Result<Self, OpenError> {
        let header = Header::read(&opening.image)?;
        let tables = Tables::load(&mut opening.image, header, opening.writing)?;
        let backing = match tables.header().backing.clone() {
            Some(name) => Some(opening.open_backing(&name, tables.header().backing_format.as_deref())?),
            None => None,
        };
        let options = opening.options;
        Ok(Self::new(opening.storage()?, tables, backing, options))
    }
}

impl Image for Qcow2 {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn size(&self) -> u64 {
        self.size()
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn backing(&self) -> Option<&Node> {
        self.backing.as_ref()
    }

    fn unit(&self) -> u64 {
        self.cluster_size()
    }

    fn read(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(self.read(offset, view))
    }

    fn write(&self, offset: u64, view: View) -> Answer<'_> {
        Box::pin(self.write(offset, view))
    }

    fn flush(&self) -> Answer<'_> {
        Box::pin(self.flush())
    }

    fn discard(&self, offset: u64, length: u64) -> Answer<'_> {
        Box::pin(self.discard(offset, length))
    }

    fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> Answer<'_> {
        Box::pin(self.write_zeroes(offset, length, unmap))
    }

    fn status(&self, offset: u64, length: u64) -> Answer<'_, Extent> {
        Box::pin(self.status(offset, length))
    }

    fn close(&self) -> Answer<'_> {
        Box::pin(self.close())
    }
}

fn create(new: &NewImage<'_>) -> Result<(), OpenError> {
    let &NewImage { path, file, size, options } = new;
    let fail = |e| OpenError::io(path, "writing the new image", e);
    let layout = Layout {
        size,
        cluster_bits: options.cluster_size.trailing_zeros(),
        lazy_refcounts: options.lazy_refcounts,
        backing: options
            .backing
            .as_ref()
            .map(|backing| (backing.path.to_string_lossy().into_owned(), backing.format.name().to_owned())),
    };
    write_new(file, &layout)
        .map_err(fail)?
        .map_err(|what| OpenError::Limit { path: path.to_owned(), what })?;
    if options.preallocation == Preallocation::Metadata {
        let len = preallocate(new)?;
        if len > file.metadata().map_err(fail)?.len() {
            file.set_len(len).map_err(fail)?;
        }
    }
    Ok(())
}

/// Gives every cluster its place; the length that the file must have.
fn preallocate(new: &NewImage<'_>) -> Result<u64, OpenError> {
    // The file is ours, and `create` may hold its lock already.
    let options = OpenOptions { lock: false, aio: AioEngine::Threads, ..OpenOptions::default() };
    let engine = Engine::new(options.aio)?;
    let seen = &mut Seen::default();
    let opening = Opening::new(&engine, new.path, Some(Format::Qcow2), true, &options, seen)?;
    let image = Qcow2::open(opening)?;
    let work = async {
        let end = image.preallocate().await?;
        image.close().await?;
        Ok(end)
    };
    let result = Executor::new(engine).block_on(work).unwrap_or_else(|e| Err(e.into()));
    result.map_err(|source| OpenError::Request {
        path: new.path.to_owned(),
        doing: "placing its clusters",
        source,
    })
}

fn describe(tables: &Tables, info: &mut ImageInfo) {
    let header = tables.header();
    info.virtual_size = header.size;
    info.qcow2 = Some(Qcow2Info {
        version: header.version,
        cluster_size: header.cluster_size(),
        refcount_bits: 1 << header.refcount_order,
        compression_type: match header.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        },
        lazy_refcounts: header.has_lazy_refcounts(),
        dirty: header.is_dirty(),
        corrupt: header.is_corrupt(),
        backing_filename: header.backing.clone(),
        backing_format: header.backing_format.clone(),
        snapshots: tables
            .snapshots()
            .iter()
            .map(|s| SnapshotInfo {
                id: s.id.clone(),
                name: s.name.clone(),
                date: s.date,
                vm_state_size: s.vm_state_size,
                virtual_size: s.disk_size,
            })
            .collect(),
    });
}
