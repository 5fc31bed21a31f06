//! What `terem disk` prints.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;
use terem_block::{CheckReport, DiskFacts, Extent, ExtentKind, ImageInfo};
use terem_config::ByteSize;

pub fn describe(info: &ImageInfo) -> String {
    let mut text = format!(
        "image         {}\nformat        {}\ndisk size     {} ({} bytes)\ntaken         {} ({} bytes)\n",
        info.filename.display(),
        info.format.name(),
        human(info.virtual_size),
        info.virtual_size,
        human(info.actual_size),
        info.actual_size
    );
    if let Some(encryption) = &info.encryption {
        text += &match &encryption.luks {
            None => format!("encryption    {}\n", encryption.method),
            Some(luks) => {
                let slots: Vec<_> = luks.slots.iter().map(|slot| slot.slot.to_string()).collect();
                format!(
                    "encryption    LUKS {}, {}, {} bits, sectors of {}\nkey slots     {} in use: {}\n",
                    luks.version,
                    luks.cipher,
                    luks.key_bits,
                    luks.sector_size,
                    slots.len(),
                    slots.join(", ")
                )
            }
        };
    }
    let Some(qcow2) = &info.qcow2 else { return text };
    text += &format!("version       {}\ncluster size  {}\n", qcow2.version, ByteSize(qcow2.cluster_size));
    text += &format!("compression   {}\n", qcow2.compression_type);
    if let Some(backing) = &qcow2.backing_filename {
        let format = qcow2.backing_format.as_deref().unwrap_or("not told");
        text += &format!("backing file  {backing} (format {format})\n");
    }
    if let Some(data) = &qcow2.data_file {
        text += &format!("data file     {data}\n");
    }
    for (set, name) in [
        (qcow2.extended_l2, "subclusters"),
        (qcow2.data_file_raw, "its data file can be read as a raw image"),
        (qcow2.lazy_refcounts, "lazy reference counts"),
        (qcow2.dirty, "not closed properly"),
        (qcow2.corrupt, "marked as damaged: it can only be read"),
    ] {
        if set {
            text += &format!("note          {name}\n");
        }
    }
    for snapshot in &qcow2.snapshots {
        text +=
            &format!("snapshot      {} {} ({})\n", snapshot.id, snapshot.name, human(snapshot.virtual_size));
    }
    for bitmap in &qcow2.bitmaps {
        let state = match (bitmap.in_use, bitmap.enabled) {
            (true, _) => "in use or not consistent",
            (false, true) => "follows writes",
            (false, false) => "does not follow writes",
        };
        let granularity = ByteSize(bitmap.granularity);
        text += &format!("bitmap        {} ({granularity} a bit, {state})\n", bitmap.name);
    }
    text
}

/// The runs of a disk, in the form of `qemu-img map --output=json`.
pub fn map_json(extents: &[Extent]) -> String {
    let mut text = String::from("[");
    for (i, e) in extents.iter().enumerate() {
        let data = matches!(e.kind, ExtentKind::Data | ExtentKind::Compressed);
        let _ = write!(
            text,
            "{}{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {data}, \"compressed\": {}",
            if i == 0 { "" } else { ",\n" },
            e.offset,
            e.length,
            e.depth,
            e.kind != ExtentKind::Unallocated,
            e.is_zero(),
            e.kind == ExtentKind::Compressed,
        );
        if let Some(host) = e.host {
            let _ = write!(text, ", \"offset\": {host}");
        }
        text += "}";
    }
    text + "]\n"
}

/// The runs of a disk as a table.
pub fn map_text(extents: &[Extent], facts: &DiskFacts) -> String {
    let mut text = format!("{:<14} {:<14} {:<11} {:<14} file\n", "offset", "length", "what", "at");
    for e in extents {
        let what = match e.kind {
            ExtentKind::Data => "data",
            ExtentKind::Zero => "zero",
            ExtentKind::Compressed => "compressed",
            ExtentKind::Unallocated => continue,
        };
        let at = e.host.map_or_else(String::new, |host| format!("{host:#x}"));
        let file = match e.depth.checked_sub(1) {
            None => Some(&facts.path),
            Some(below) => facts.backing.get(below as usize),
        };
        let file = file.map_or_else(String::new, |path| path.display().to_string());
        let (offset, length) = (format!("{:#x}", e.offset), format!("{:#x}", e.length));
        let _ = writeln!(text, "{offset:<14} {length:<14} {what:<11} {at:<14} {file}");
    }
    text
}

/// How fast requests were.
pub fn duration(took: Duration, count: u64, size: u64) -> String {
    let micros = took.as_micros().max(1);
    let rate = |amount: u64| u64::try_from(u128::from(amount) * 1_000_000 / micros).unwrap_or(u64::MAX);
    let (requests, bytes) = (rate(count), human(rate(count.saturating_mul(size))));
    format!("{count} requests in {:.3} s: {requests} a second, {bytes} a second\n", took.as_secs_f64())
}

/// A size to one decimal: `1.3 GiB`.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut tenths, mut unit) = (u128::from(bytes) * 10 / 1024, 0);
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

pub fn summary(path: &Path, report: &CheckReport) -> String {
    let mut text: String = report.messages.iter().map(|message| format!("{message}\n")).collect();
    let path = path.display();
    text += &match (report.errors, report.leaks) {
        (0, 0) => format!("{path}: no errors\n"),
        (0, leaks) => format!("{path}: {leaks} clusters are lost space; nothing else is wrong\n"),
        (errors, leaks) => {
            format!("{path}: {errors} errors, {leaks} lost clusters; do not write to this image\n")
        }
    };
    if report.total_clusters > 0 {
        text += &format!("{} of {} clusters hold data\n", report.allocated_clusters, report.total_clusters);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 30, "1.0 GiB"), (u64::MAX, "15.9 EiB")]
        {
            assert_eq!(human(bytes), text);
        }
    }
}
