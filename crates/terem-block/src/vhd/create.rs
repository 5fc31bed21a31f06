//! New images.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::footer::{
    CHECKSUM_AT, COOKIE, DYNAMIC_CHECKSUM_AT, DYNAMIC_COOKIE, DYNAMIC_HEADER, FOOTER, MAX_GEOMETRY,
    MAX_SECTORS, TYPE_DYNAMIC, TYPE_FIXED, checksum, sectors_of,
};
use crate::OpenError;
use crate::bytes::{new_uuid, put};
use crate::format::NewImage;

/// The specification's beginning of time, 2000-01-01, in seconds since 1970.
const EPOCH: u64 = 946_684_800;
const BLOCK_SIZE: u32 = 2 << 20;

/// What can be chosen for a new VHD image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VhdOptions {
    /// Whether the disk lies in the file as it is.
    pub fixed: bool,
    /// Whether it gets exactly the size that was asked for. Otherwise it is rounded up to one that has a geometry of
    /// cylinders, heads and sectors, which is what Virtual PC goes by.
    pub force_size: bool,
}

/// A disk's size in sectors and its geometry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub(super) sectors: u64,
    pub(super) geometry: (u16, u8, u8),
}

impl Size {
    /// For a disk of at least `sectors`, or of exactly as many. `None`: there is no such disk.
    pub(super) fn new(sectors: u64, exactly: bool) -> Option<Self> {
        if sectors > MAX_SECTORS {
            return None;
        }
        let limit = sectors_of(MAX_GEOMETRY);
        if exactly || sectors >= limit {
            return Some(Self { sectors, geometry: MAX_GEOMETRY });
        }
        let mut asked = sectors;
        loop {
            let geometry = geometry(asked);
            if sectors_of(geometry) >= sectors {
                let sectors = if geometry == MAX_GEOMETRY { sectors } else { sectors_of(geometry) };
                return Some(Self { sectors, geometry });
            }
            asked += 1;
        }
    }
}

/// The geometry for some sectors, which it may not all reach (specification, "Appendix: CHS Calculation").
fn geometry(sectors: u64) -> (u16, u8, u8) {
    let sectors = sectors.min(sectors_of(MAX_GEOMETRY));
    let (mut track, mut heads, mut cylinder_heads);
    if sectors >= 65535 * 16 * 63 {
        (track, heads) = (255, 16);
        cylinder_heads = sectors / track;
    } else {
        track = 17;
        cylinder_heads = sectors / track;
        heads = cylinder_heads.div_ceil(1024).max(4);
        if cylinder_heads >= heads * 1024 || heads > 16 {
            (track, heads) = (31, 16);
            cylinder_heads = sectors / track;
        }
        if cylinder_heads >= heads * 1024 {
            (track, heads) = (63, 16);
            cylinder_heads = sectors / track;
        }
    }
    let byte = |n: u64| u8::try_from(n).unwrap_or(u8::MAX);
    (u16::try_from(cylinder_heads / heads).unwrap_or(u16::MAX), byte(heads), byte(track))
}

pub(super) fn create(new: &NewImage<'_>) -> Result<(), OpenError> {
    let options = &new.options.vhd;
    let size = Size::new(new.size / 512, options.force_size).ok_or_else(|| OpenError::Limit {
        path: new.path.to_owned(),
        what: format!("{} bytes are too much for a VHD image (2040 GiB at most)", new.size),
    })?;
    write(new.file, size, options).map_err(|e| OpenError::io(new.path, "writing the new image", e))
}

fn write(file: &File, size: Size, options: &VhdOptions) -> io::Result<()> {
    let footer = footer(size, options)?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    if options.fixed {
        file.set_len(size.sectors * 512)?;
        return std::os::unix::fs::FileExt::write_all_at(file, &footer, size.sectors * 512);
    }
    let entries = (size.sectors * 512).div_ceil(BLOCK_SIZE.into());
    let mut header = vec![0; crate::file::to_usize(DYNAMIC_HEADER)];
    put(&mut header, 0, DYNAMIC_COOKIE);
    put(&mut header, 8, &u64::MAX.to_be_bytes());
    put(&mut header, 16, &(FOOTER + DYNAMIC_HEADER).to_be_bytes());
    put(&mut header, 24, &0x0001_0000u32.to_be_bytes());
    put(&mut header, 28, &u32::try_from(entries).unwrap_or(u32::MAX).to_be_bytes());
    put(&mut header, 32, &BLOCK_SIZE.to_be_bytes());
    let sum = checksum(&header, DYNAMIC_CHECKSUM_AT);
    put(&mut header, DYNAMIC_CHECKSUM_AT, &sum.to_be_bytes());

    out.write_all(&footer)?;
    out.write_all(&header)?;
    for _ in 0..(entries * 4).div_ceil(512) {
        out.write_all(&[0xff; 512])?;
    }
    out.write_all(&footer)?;
    out.flush()
}

fn footer(size: Size, options: &VhdOptions) -> io::Result<Vec<u8>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_secs(EPOCH));
    let seconds = u32::try_from(now.map_or(0, |d| d.as_secs())).unwrap_or(u32::MAX);
    let (kind, data_offset) = if options.fixed { (TYPE_FIXED, u64::MAX) } else { (TYPE_DYNAMIC, FOOTER) };
    let (cylinders, heads, sectors) = size.geometry;
    let mut footer = vec![0; crate::file::to_usize(FOOTER)];
    put(&mut footer, 0, COOKIE);
    put(&mut footer, 8, &2u32.to_be_bytes()); // "Reserved", always set
    put(&mut footer, 12, &0x0001_0000u32.to_be_bytes());
    put(&mut footer, 16, &data_offset.to_be_bytes());
    put(&mut footer, 24, &seconds.to_be_bytes());
    // The names by which QEMU and others know whether the size or the geometry is meant.
    put(&mut footer, 28, if options.force_size { b"qem2" } else { b"qemu" });
    put(&mut footer, 32, &0x0005_0003u32.to_be_bytes()); // as Virtual PC 2007
    put(&mut footer, 36, b"Wi2k");
    put(&mut footer, 40, &(size.sectors * 512).to_be_bytes());
    put(&mut footer, 48, &(size.sectors * 512).to_be_bytes());
    put(&mut footer, 56, &cylinders.to_be_bytes());
    put(&mut footer, 58, &[heads, sectors]);
    put(&mut footer, 60, &kind.to_be_bytes());
    put(&mut footer, 68, &new_uuid()?);
    let sum = checksum(&footer, CHECKSUM_AT);
    put(&mut footer, CHECKSUM_AT, &sum.to_be_bytes());
    Ok(footer)
}
