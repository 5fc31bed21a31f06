//! Checking.

use super::header::{DISCARDED, Header};
use crate::blocks::Entries;
use crate::blocks::check_table;
use crate::chain::ImageFile;
use crate::file::to_usize;
use crate::{CheckReport, OpenError};

/// Finds blocks that share a place, and counts that are wrong.
pub(super) fn check_image(image: &ImageFile) -> Result<CheckReport, OpenError> {
    let header = Header::read(image)?;
    let mut report = CheckReport { total_clusters: header.blocks, ..CheckReport::default() };
    let mut taken = vec![0u64; to_usize(header.blocks.div_ceil(64))];
    let mut used = 0;
    check_table(image, Entries::Le32, header.map_offset, header.blocks, |block, entry| {
        if entry >= DISCARDED {
            return;
        }
        report.allocated_clusters += 1;
        let host = header.data_offset + entry * header.block_size;
        match taken.get_mut(to_usize(entry / 64)) {
            Some(word) if *word >> (entry % 64) & 1 == 0 => *word |= 1 << (entry % 64),
            Some(_) => report.error(format!("block {block} is where another one is, at {host:#x}")),
            None => report.error(format!("block {block} is at {host:#x}, more places than there are blocks")),
        }
        if host >= image.len() {
            report.error(format!("block {block} is at {host:#x}, beyond the end of the file"));
        }
        used = used.max(entry + 1);
    })?;
    if header.allocated < used {
        let what = "the next new block would overwrite one";
        report.error(format!("{} blocks are counted, {used} are used: {what}", header.allocated));
    }
    report.leaks += header.allocated.max(used).saturating_sub(report.allocated_clusters);
    report.image_end = header.data_offset + used * header.block_size;
    Ok(report)
}
