//! New images.

use std::fs::File;
use std::io::{self, BufWriter, Write};

use super::header::{
    BLOCK_SIZE, LENGTH, MAX_BLOCKS, SIGNATURE, TYPE_DYNAMIC, TYPE_STATIC, UNALLOCATED, VERSION,
};
use crate::OpenError;
use crate::bytes::{new_uuid, put};
use crate::format::NewImage;

/// What can be chosen for a new VDI image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VdiOptions {
    /// Whether every block gets its place at once (a "static" image).
    pub fixed: bool,
}

pub(super) fn create(new: &NewImage<'_>) -> Result<(), OpenError> {
    let blocks = new.size.div_ceil(BLOCK_SIZE.into());
    if blocks > MAX_BLOCKS {
        let what = format!("{} bytes are too much for a VDI image", new.size);
        return Err(OpenError::Limit { path: new.path.to_owned(), what });
    }
    write(new.file, new.size, blocks, new.options.vdi.fixed)
        .map_err(|e| OpenError::io(new.path, "writing the new image", e))
}

fn write(file: &File, size: u64, blocks: u64, fixed: bool) -> io::Result<()> {
    let word = |n: u64| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    let map_length = (blocks * 4).next_multiple_of(512);
    let data = LENGTH as u64 + map_length;
    let mut header = [0; LENGTH];
    put(&mut header, 0, b"<<< Teremok virtual disk image >>>\n");
    put(&mut header, 0x40, &SIGNATURE.to_le_bytes());
    put(&mut header, 0x44, &VERSION.to_le_bytes());
    put(&mut header, 0x48, &0x180u32.to_le_bytes()); // bytes of the header from here on
    put(&mut header, 0x4c, &if fixed { TYPE_STATIC } else { TYPE_DYNAMIC }.to_le_bytes());
    put(&mut header, 0x154, &word(LENGTH as u64));
    put(&mut header, 0x158, &word(data));
    put(&mut header, 0x168, &512u32.to_le_bytes());
    put(&mut header, 0x170, &size.to_le_bytes());
    put(&mut header, 0x178, &BLOCK_SIZE.to_le_bytes());
    put(&mut header, 0x180, &word(blocks));
    put(&mut header, 0x184, &word(if fixed { blocks } else { 0 }));
    put(&mut header, 0x188, &new_uuid()?);
    put(&mut header, 0x198, &new_uuid()?);

    let mut out = BufWriter::with_capacity(1 << 20, file);
    out.write_all(&header)?;
    for block in 0..blocks {
        out.write_all(&word(if fixed { block } else { UNALLOCATED }))?;
    }
    out.flush()?;
    drop(out);
    file.set_len(data + if fixed { blocks * u64::from(BLOCK_SIZE) } else { 0 })
}
