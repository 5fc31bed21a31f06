//! Checking.

use std::ops::Range;

use super::descriptor::ExtentKind;
use super::grains::{MARKER, ZEROED};
use super::info::open_part;
use super::open::Head;
use super::sparse::{LENGTH, SECTOR, SparseHeader};
use crate::blocks::Regions;
use crate::bytes::{le32, le64};
use crate::chain::ImageFile;
use crate::{CheckReport, OpenError};

/// Finds grains and tables that lie over each other, or beyond the end.
pub(super) fn check_image(image: &ImageFile) -> Result<CheckReport, OpenError> {
    let head = Head::read(image)?;
    let mut report = CheckReport { image_end: image.len(), ..CheckReport::default() };
    if let Some(header) = &head.sparse {
        check_extent(image, header, &mut report)?;
    }
    for line in head.extents().iter().filter(|line| line.kind != ExtentKind::Zero) {
        let part = open_part(image, &line.name, true)?;
        if line.kind == ExtentKind::Sparse {
            let header = SparseHeader::read(&part)?;
            check_extent(&part, &header, &mut report)?;
        }
    }
    Ok(report)
}

fn check_extent(image: &ImageFile, header: &SparseHeader, report: &mut CheckReport) -> Result<(), OpenError> {
    let name = image.path().display();
    let (directory, redundant) = header.directories(image)?;
    let length = header.table_entries * 4;
    let directories = [Some(header.directory), header.redundant].into_iter().flatten();
    let mut used: Vec<Range<u64>> = directories.map(|at| at..at + header.tables() * 4).collect();
    used.push(0..LENGTH);
    used.extend(header.descriptor.clone());
    let tables = directory.iter().chain(redundant.iter().flatten()).filter(|&&sector| sector != 0);
    used.extend(tables.map(|&sector| u64::from(sector) * SECTOR).map(|at| at..at + length));
    used.sort_unstable_by_key(|range| range.start);
    let mut table_bytes = 0;
    for range in &used {
        if range.end > image.len() {
            report.error(format!("{name}: a table at {:#x} is beyond the end of the file", range.start));
        }
        if range.start >= header.overhead {
            table_bytes += range.end - range.start;
        }
    }
    for pair in used.windows(2) {
        if pair[1].start < pair[0].end {
            report.error(format!("{name}: two tables lie over each other at {:#x}", pair[1].start));
        }
    }
    if report.errors > 0 {
        // What such tables say would be looked at again and again.
        return Ok(());
    }
    report.total_clusters += header.size.div_ceil(header.grain);
    let mut grains = Regions::new(SECTOR, if header.compressed { SECTOR } else { header.grain });
    let mut last = header.overhead;
    let mut allocated = 0;
    for (index, &sector) in directory.iter().enumerate().filter(|(_, sector)| **sector != 0) {
        let bytes = image.read(u64::from(sector) * SECTOR, length, "a grain table")?;
        for (i, entry) in bytes.as_chunks::<4>().0.iter().enumerate() {
            let entry = u32::from_le_bytes(*entry);
            if entry == 0 || (entry == ZEROED && header.has_zero_grains()) {
                continue;
            }
            let grain = index as u64 * header.table_entries + i as u64;
            let at = u64::from(entry) * SECTOR;
            allocated += 1;
            // The last one may be cut where zeroes would follow.
            if at < header.overhead.max(LENGTH) || at >= image.len() {
                report.error(format!("{name}: grain {grain} is at {at:#x}, in the tables or beyond the end"));
                continue;
            }
            let end = if header.compressed { at + SECTOR } else { at + header.grain };
            let next = used.partition_point(|range| range.end <= at);
            if used.get(next).is_some_and(|range| range.start < end) {
                report.error(format!("{name}: grain {grain} at {at:#x} lies over a table"));
            }
            if header.compressed && header.has_markers() {
                check_marker(image, header, grain, at, report)?;
            }
            last = last.max(end);
            grains.add(at);
        }
    }
    for at in grains.overlaps() {
        report.error(format!("{name}: two grains lie over each other at {at:#x}"));
    }
    report.allocated_clusters += allocated;
    if header.compressed {
        report.compressed_clusters += allocated;
    } else {
        let room = image.len().saturating_sub(header.overhead).saturating_sub(table_bytes);
        report.leaks += (room / header.grain).saturating_sub(allocated);
    }
    Ok(())
}

/// A compressed grain says itself which one it is.
fn check_marker(
    image: &ImageFile,
    header: &SparseHeader,
    grain: u64,
    at: u64,
    report: &mut CheckReport,
) -> Result<(), OpenError> {
    let marker = image.read(at, MARKER as u64, "a grain's marker").unwrap_or_default();
    let (sector, length) = (le64(&marker, 0), u64::from(le32(&marker, 8)));
    if sector != grain * (header.grain / SECTOR) || length == 0 || length > 2 * header.grain {
        report.error(format!("{}: grain {grain} is not at {at:#x}", image.path().display()));
    }
    Ok(())
}
