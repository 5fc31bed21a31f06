//! Checking.

use super::map::{OFFSET, PARTLY_PRESENT, PRESENT, STATE};
use super::open::Parts;
use crate::blocks::{Entries, Regions};
use crate::chain::ImageFile;
use crate::{CheckReport, OpenError};

/// Finds blocks that lie over each other, over the image's structures, or beyond the end.
pub(super) fn check_image(image: &ImageFile) -> Result<CheckReport, OpenError> {
    const STEP: u64 = 1 << 18;
    let parts = Parts::read(image)?;
    let Parts { metadata, regions, replay, .. } = &parts;
    let (unit, ratio) = (metadata.block_size, metadata.chunk_ratio());
    let mut report = CheckReport { total_clusters: metadata.blocks(), ..CheckReport::default() };
    let mut places = Regions::new(1 << 20, unit);
    let mut end = regions.end();
    let (entries, mut index) = (metadata.entries(), 0);
    while index < entries {
        let count = (STEP / 8).min(entries - index);
        let bytes = replay.read_through(image, regions.bat.start + index * 8, count * 8, "the BAT")?;
        for entry in bytes.chunks_exact(8).map(|entry| Entries::Le64.decode(entry)) {
            let (block, is_bitmap) = (index - index / (ratio + 1), index % (ratio + 1) == ratio);
            index += 1;
            let (at, state) = (entry & OFFSET, entry & STATE);
            if is_bitmap {
                continue;
            }
            if matches!(state, PARTLY_PRESENT | 4) {
                report.error(format!("block {block} has state {state}, which has no meaning here"));
            }
            if state != PRESENT {
                continue;
            }
            report.allocated_clusters += 1;
            if regions.reach_into(&(at..at.saturating_add(unit))) {
                report.error(format!("block {block} is at {at:#x}, in the image's own structures"));
            } else if at.saturating_add(unit) > image.len() {
                report.error(format!("block {block} at {at:#x} reaches beyond the end of the file"));
            } else {
                places.add(at);
            }
            end = end.max(at.saturating_add(unit));
        }
    }
    for at in places.overlaps() {
        report.error(format!("two blocks lie over each other at {at:#x}"));
    }
    report.image_end = end;
    Ok(report)
}
