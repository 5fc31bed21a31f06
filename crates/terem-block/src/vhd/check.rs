//! Checking.

use super::footer::{FOOTER, Footer, Layout, UNUSED};
use crate::blocks::{Entries, Regions, check_table};
use crate::chain::ImageFile;
use crate::{CheckReport, OpenError};

/// Finds blocks that lie over each other, over the tables, or beyond the end.
pub(super) fn check_image(image: &ImageFile) -> Result<CheckReport, OpenError> {
    let footer = Footer::read(image)?;
    let Layout::Dynamic(dynamic) = Layout::read(image, &footer)? else {
        return Ok(CheckReport { image_end: image.len(), ..CheckReport::default() });
    };
    let unit = dynamic.bitmap_size() + dynamic.block_size;
    let mut report = CheckReport { total_clusters: dynamic.entries, ..CheckReport::default() };
    let mut regions = Regions::new(512, unit);
    let mut end = dynamic.data_start();
    check_table(image, Entries::Be32, dynamic.table, dynamic.entries, |block, entry| {
        if entry == UNUSED {
            return;
        }
        let at = entry * 512;
        report.allocated_clusters += 1;
        if at < dynamic.data_start() {
            report.error(format!("block {block} is at {at:#x}, before the end of the tables"));
        } else if at + unit > image.len() {
            report.error(format!("block {block} at {at:#x} reaches beyond the end of the file"));
        } else {
            regions.add(at);
        }
        end = end.max(at + unit);
    })?;
    for at in regions.overlaps() {
        report.error(format!("two blocks lie over each other at {at:#x}"));
    }
    let room = image.len().saturating_sub(FOOTER).saturating_sub(dynamic.data_start());
    report.leaks = (room / unit).saturating_sub(report.allocated_clusters);
    report.image_end = end;
    Ok(report)
}
