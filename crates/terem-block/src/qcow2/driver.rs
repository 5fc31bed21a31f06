//! qcow2's line in the table of formats.

use std::fs;
use std::path::Path;

use super::bitmap::{AUTO, Bitmap, IN_USE, read_bitmaps};
use super::compressed::{compress, decompress};
use super::create::metadata_size;
use super::crypt::{self, DataCrypt};
use super::header::{BITMAPS, COMPRESSION, EXTENDED_L2, EXTERNAL_DATA, LAZY_REFCOUNTS, RAW_EXTERNAL};
use super::tracking::Tracking;
use super::{Header, Qcow2, Tables, check_image, write_new};
use crate::chain::{Opening, Seen};
use crate::engine::{Engine, View};
use crate::executor::Executor;
use crate::extent::Extent;
use crate::file::File;
use crate::format::{Driver, NewImage};
use crate::luks::failed;
use crate::node::{Answer, Image, Node, Packed, Packer, Unpacker, directory_of};
use crate::{
    AioEngine, BackingPolicy, BitmapInfo, Compression, CreateOptions, Format, ImageInfo, Keys, OpenError,
    OpenOptions, Preallocation, Qcow2Info, SnapshotInfo,
};

pub(crate) static DRIVER: Driver = Driver {
    format: Format::Qcow2,
    names: &["qcow2"],
    probe: |head| head.starts_with(&super::header::QCOW_MAGIC),
    open: |opening| Qcow2::open(opening).map(Node::new),
    describe: |image, info| {
        let tables = Tables::read(image, Header::read(image)?)?;
        let valid = tables.header().autoclear & BITMAPS != 0;
        let bitmaps = if valid { read_bitmaps(image, tables.header())? } else { Vec::new() };
        info.encryption = crypt::describe(image, tables.header())?;
        describe(&tables, &bitmaps, info);
        Ok(())
    },
    check: Some(|image| {
        let header = Header::read(image)?;
        check_image(image, &Tables::read(image, header)?)
    }),
    create,
    options: &super::options::OPTIONS,
};

impl Qcow2 {
    pub(super) fn open(mut opening: Opening<'_>) -> Result<Self, OpenError> {
        let header = Header::read(&opening.image)?;
        let mut tables = Tables::load(&mut opening.image, header, opening.writing)?;
        if let Some(snapshot) = opening.options.snapshot.as_deref().filter(|_| opening.is_top()) {
            if opening.writing {
                let what = format!("its snapshot {snapshot:?} can only be read; open it with readonly=on");
                return Err(OpenError::Limit { path: opening.image.path().to_owned(), what });
            }
            tables.go_to_snapshot(&opening.image, snapshot)?;
        }
        let tracking = if opening.writing {
            Tracking::load(&opening.image, tables.header())?
        } else {
            Tracking::default()
        };
        let header = tables.header();
        let written = header.backing.as_deref().map(|name| (name, header.backing_format.as_deref()));
        let backing = opening.open_below(written)?;
        let crypt = DataCrypt::open(&opening, tables.header())?;
        let (discard, cache) = (opening.options.discard, opening.table_cache());
        let data = opening.data_file(tables.header())?;
        Ok(Self::new(opening.storage()?, data, tables, backing, tracking, crypt, (discard, cache)))
    }
}

impl Opening<'_> {
    /// The file that holds the data, if that is not the image itself.
    fn data_file(&mut self, header: &Header) -> Result<Option<File>, OpenError> {
        if header.incompatible & EXTERNAL_DATA == 0 {
            return Ok(None);
        }
        let path = self.image.path();
        let name = header.data_file.as_ref();
        let name = name.ok_or_else(|| OpenError::corrupt(path, "its data file has no name"))?;
        let data = self.open_part(name)?;
        data.into_storage(self.engine, self.options.cache).map(Some)
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

    fn zeroes_fast(&self, offset: u64, length: u64) -> bool {
        // Whole clusters only get another entry; version 2 has no such entry, and lets what is below show through.
        let cluster = self.cluster_size();
        let whole = offset.is_multiple_of(cluster)
            && (length.is_multiple_of(cluster) || offset + length == self.size());
        whole && (self.header.version >= 3 || self.backing.is_none())
    }

    fn status(&self, offset: u64, length: u64) -> Answer<'_, Extent> {
        Box::pin(async move {
            let extent = self.status(offset, length).await?;
            // Encrypted data do not lie there as they are.
            Ok(Extent { host: extent.host.filter(|_| self.crypt.is_none()), ..extent })
        })
    }

    fn plain_data(&self) -> Option<&File> {
        self.crypt.is_none().then(|| self.data())
    }

    fn places(&self) -> bool {
        !self.l2_format.external && self.crypt.is_none()
    }

    fn place(&self, length: u64) -> Answer<'_, (u64, u64)> {
        Box::pin(async move {
            self.begin_write().await?;
            let (first, count) = self.allocate((length >> self.bits()).max(1)).await?;
            Ok((first << self.bits(), count << self.bits()))
        })
    }

    fn map_placed(&self, runs: Vec<(u64, u64, u64)>) -> Answer<'_> {
        Box::pin(async move {
            for (offset, host, length) in runs {
                self.map_clusters(offset, host, length).await?;
            }
            Ok(())
        })
    }

    fn unplace(&self, host: u64, length: u64) -> Answer<'_> {
        Box::pin(self.give_back(host >> self.bits(), length >> self.bits()))
    }

    fn trim(&self) -> Answer<'_> {
        Box::pin(self.trim())
    }

    fn compression(&self) -> Option<Packer> {
        let compress: fn(&[u8]) -> Option<Vec<u8>> = match self.header.compression {
            Compression::Zlib => |data| compress(Compression::Zlib, data),
            Compression::Zstd => |data| compress(Compression::Zstd, data),
        };
        (!self.l2_format.external && self.crypt.is_none()).then_some(Packer {
            unit: self.cluster_size(),
            always: false,
            compress,
        })
    }

    fn unpacking(&self) -> Option<(&File, Unpacker)> {
        let decompress: fn(&[u8], &mut [u8]) -> std::io::Result<()> = match self.header.compression {
            Compression::Zlib => |data, bytes| decompress(Compression::Zlib, data, bytes),
            Compression::Zstd => |data, bytes| decompress(Compression::Zstd, data, bytes),
        };
        Some((&self.file, Unpacker { unit: self.cluster_size(), decompress }))
    }

    fn packed(&self, offset: u64, length: u64) -> Answer<'_, Vec<Packed>> {
        Box::pin(self.packed(offset, length))
    }

    fn write_compressed(&self, mut clusters: Vec<(u64, Vec<u8>)>) -> Answer<'_> {
        clusters.iter_mut().for_each(|(offset, _)| *offset >>= self.bits());
        Box::pin(async move { self.write_compressed(&clusters).await })
    }

    fn close(&self) -> Answer<'_> {
        Box::pin(self.close())
    }
}

fn create(new: &NewImage<'_>) -> Result<(), OpenError> {
    let &NewImage { path, file, size, options, .. } = new;
    let fail = |e| OpenError::io(path, "writing the new image", e);
    let limit = |what| OpenError::Limit { path: path.to_owned(), what };
    let header = new_header(size, options).map_err(limit)?;
    if let Some(name) = &options.qcow2.data_file {
        let data = directory_of(path).join(name);
        let mut open = fs::OpenOptions::new();
        let open = open.write(true).create(true).truncate(options.overwrite).create_new(!options.overwrite);
        let made = open.open(&data).and_then(|data| data.set_len(size));
        made.map_err(|e| OpenError::io(&data, "making the data file", e))?;
    }
    let luks = match options.qcow2.encrypted {
        true => {
            let luks = options.encryption.luks1(header.cluster_size()).map_err(|e| failed(path, e))?;
            Some((luks, options.keys.of(path)?))
        }
        false => None,
    };
    write_new(new, header, luks)?;
    if options.preallocation == Preallocation::Off && !options.qcow2.data_file_raw {
        return Ok(());
    }
    let len = preallocate(new)?;
    if options.qcow2.data_file.is_none() && len > file.metadata().map_err(fail)?.len() {
        file.set_len(len).map_err(fail)?;
    }
    Ok(())
}

/// Bytes of the file of a new image with so many bytes of clusters with data, beside those.
pub(crate) fn measure(size: u64, options: &CreateOptions) -> Result<u64, OpenError> {
    let header = new_header(size, options);
    let header = header.map_err(|what| OpenError::Limit { path: "a new image".into(), what })?;
    let luks = match options.qcow2.encrypted {
        true => options
            .encryption
            .luks1(header.cluster_size())
            .map_err(|e| failed("a new image".as_ref(), e))?
            .data_offset(),
        false => 0,
    };
    Ok(metadata_size(&header) + luks)
}

/// The header that the options ask for.
fn new_header(size: u64, options: &CreateOptions) -> Result<Header, String> {
    let chosen = &options.qcow2;
    if !(512..=2 << 20).contains(&chosen.cluster_size) || !chosen.cluster_size.is_power_of_two() {
        let size = chosen.cluster_size;
        return Err(format!("a cluster size of {size} bytes; it must be a power of two from 512 to 2097152"));
    }
    if !(1..=64).contains(&chosen.refcount_bits) || !chosen.refcount_bits.is_power_of_two() {
        return Err(format!("refcounts of {} bits; a power of two from 1 to 64", chosen.refcount_bits));
    }
    if !(2..=3).contains(&chosen.version) {
        return Err(format!("version {}; 2 or 3", chosen.version));
    }
    let special = [
        (chosen.refcount_bits != 16, "refcounts of other than 16 bits"),
        (chosen.lazy_refcounts, "lazy refcounts"),
        (chosen.extended_l2, "subclusters"),
        (chosen.compression != Compression::Zlib, "compression other than zlib"),
        (chosen.data_file.is_some(), "a data file"),
    ];
    if let Some((_, what)) = special.iter().find(|(set, _)| *set && chosen.version < 3) {
        return Err(format!("{what} in version 2; it takes version 3"));
    }
    if chosen.extended_l2 && chosen.cluster_size < 16384 {
        return Err(format!("subclusters in clusters of {} bytes; 16384 at least", chosen.cluster_size));
    }
    if chosen.data_file_raw && (chosen.data_file.is_none() || options.backing.is_some()) {
        return Err("a raw data file takes data_file, and no backing file".into());
    }
    if chosen.encrypted && chosen.data_file_raw {
        return Err("an encrypted data file is no raw image".into());
    }
    if chosen.encrypted && chosen.version < 3 && options.preallocation != Preallocation::Off {
        return Err("preallocated clusters would not read as zeroes: it takes version 3".into());
    }
    let mut header = Header::new(chosen.cluster_size.trailing_zeros(), size);
    header.version = chosen.version;
    header.refcount_order = chosen.refcount_bits.trailing_zeros();
    header.compression = chosen.compression;
    header.compatible = if chosen.lazy_refcounts { LAZY_REFCOUNTS } else { 0 };
    for (set, bit) in [
        (chosen.compression != Compression::Zlib, COMPRESSION),
        (chosen.extended_l2, EXTENDED_L2),
        (chosen.data_file.is_some(), EXTERNAL_DATA),
    ] {
        header.incompatible |= if set { bit } else { 0 };
    }
    header.autoclear = if chosen.data_file_raw { RAW_EXTERNAL } else { 0 };
    header.data_file.clone_from(&chosen.data_file);
    if let Some(backing) = &options.backing {
        header.backing = Some(backing.path.to_string_lossy().into_owned());
        header.backing_format = Some(backing.format.name().to_owned());
    }
    Ok(header)
}

/// Gives every cluster of a new image its place, and what storage is asked for; the length that the data's file must
/// have.
fn preallocate(new: &NewImage<'_>) -> Result<u64, OpenError> {
    place_clusters(new.path, 0, new.options.preallocation)
}

/// The same for the clusters from byte `from` of the disk on.
pub(crate) fn preallocate_from(
    path: &Path,
    from: u64,
    preallocation: Preallocation,
) -> Result<(), OpenError> {
    let len = place_clusters(path, from, preallocation)?;
    let fail = |e| OpenError::io(path, "changing the file's length", e);
    let file = fs::OpenOptions::new().write(true).open(path).map_err(fail)?;
    if len > file.metadata().map_err(fail)?.len() { file.set_len(len).map_err(fail) } else { Ok(()) }
}

fn place_clusters(path: &Path, from: u64, preallocation: Preallocation) -> Result<u64, OpenError> {
    // The file is ours, and `create` may hold its lock already.
    let options = OpenOptions {
        lock: false,
        keys: Keys::locked(),
        aio: AioEngine::Threads,
        backing: BackingPolicy::Any,
        ..OpenOptions::default()
    };
    let engine = Engine::new(options.aio)?;
    let seen = &mut Seen::default();
    let opening = Opening::new(&engine, path, Some(Format::Qcow2), true, &options, seen)?;
    let image = Qcow2::open(opening)?;
    let work = async {
        let end = image.preallocate(from).await?;
        match preallocation {
            Preallocation::Off | Preallocation::Metadata => {}
            Preallocation::Falloc => image.reserve_clusters(from).await?,
            Preallocation::Full => image.fill_with_zeroes(from).await?,
        }
        image.close().await?;
        Ok(end)
    };
    let result = Executor::new(engine).block_on(work).unwrap_or_else(|e| Err(e.into()));
    result.map_err(|source| OpenError::Request {
        path: path.to_owned(),
        doing: "placing its clusters",
        source,
    })
}

fn describe(tables: &Tables, bitmaps: &[Bitmap], info: &mut ImageInfo) {
    let header = tables.header();
    info.virtual_size = header.size;
    info.cluster_size = Some(header.cluster_size());
    info.qcow2 = Some(Qcow2Info {
        version: header.version,
        cluster_size: header.cluster_size(),
        refcount_bits: 1 << header.refcount_order,
        compression_type: header.compression.name(),
        extended_l2: header.incompatible & EXTENDED_L2 != 0,
        data_file: header.data_file.clone(),
        data_file_raw: header.autoclear & RAW_EXTERNAL != 0,
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
                date_nsec: s.date_nsec,
                vm_clock: s.vm_clock,
                icount: s.more.first_chunk().map(|b| u64::from_be_bytes(*b)).filter(|&n| n != u64::MAX),
                vm_state_size: s.vm_state_size,
                virtual_size: s.disk_size,
            })
            .collect(),
        bitmaps: bitmaps.iter().map(bitmap_info).collect(),
    });
}

fn bitmap_info(bitmap: &Bitmap) -> BitmapInfo {
    BitmapInfo {
        name: bitmap.name.clone(),
        granularity: 1 << bitmap.granularity_bits,
        enabled: bitmap.flags & AUTO != 0,
        in_use: bitmap.flags & IN_USE != 0,
    }
}
