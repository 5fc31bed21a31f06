//! For fuzzing: makes the checksums of an image right, so that what it says is looked at.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::header::{HEADERS_AT, LENGTH, MIB, seal};
use super::{log, region};
use crate::bytes::{le32, le64};
use crate::file::to_usize;

/// Seals headers, region tables, and the entries in the first MiB of each header's log.
pub(crate) fn reseal(file: &File) -> io::Result<()> {
    let size = file.metadata()?.len();
    let fits = |at: u64, length: u64| at.checked_add(length).is_some_and(|end| end <= size);
    for at in region::TABLES_AT.into_iter().filter(|&at| fits(at, region::LENGTH)) {
        reseal_at(file, at, region::LENGTH)?;
    }
    for at in HEADERS_AT.into_iter().filter(|&at| fits(at, LENGTH as u64)) {
        let header = reseal_at(file, at, LENGTH as u64)?;
        let (start, length) = (le64(&header, 72), u64::from(le32(&header, 68)).min(MIB));
        if !fits(start, length) {
            continue;
        }
        let mut sectors = vec![0; to_usize(length)];
        file.read_exact_at(&mut sectors, start)?;
        let starts = sectors.chunks_exact(log::SECTOR).enumerate();
        for (i, head) in starts.filter(|(_, sector)| sector.starts_with(log::ENTRY)) {
            let (from, entry) = ((i * log::SECTOR) as u64, u64::from(le32(head, 8)));
            // Those that go around the end are left to the tests.
            if entry >= log::SECTOR as u64 && from + entry <= length {
                reseal_at(file, start + from, entry)?;
            }
        }
    }
    Ok(())
}

fn reseal_at(file: &File, at: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; to_usize(length)];
    file.read_exact_at(&mut bytes, at)?;
    seal(&mut bytes);
    file.write_all_at(&bytes, at)?;
    Ok(bytes)
}
