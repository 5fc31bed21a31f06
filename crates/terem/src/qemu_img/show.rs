//! The commands that tell of an image: check, map, measure.

use super::change::{New, snapshot_name};
use super::describe::{Described, chain};
use super::text::{format_name, json, option_items, size};
use super::{Failed, Named, Outcome, arguments, format_of, is_json, objects, out};
use serde_json::{Value, json as value};
use std::fmt::Write;
use terem_block::{
    BackingFile, CheckReport, Disk, Extent, ExtentKind, Format, OpenOptions, Qcow2Info, Repair, beside,
    is_address,
};

pub fn check(arguments: &arguments::Check) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let as_json = is_json(&arguments.output)?;
    super::copy::cache(arguments.cache.as_ref())?;
    let fail = |error| named.failed(&error);
    let repair = match arguments.repair.as_deref() {
        None => None,
        Some("leaks") => Some(Repair::Leaks),
        Some("all") => Some(Repair::All),
        Some(_) => return Err(Failed::new("--repair (-r) expects 'leaks' or 'all'")),
    };
    let format = terem_block::info_of_source(&named.source).map_err(fail)?.format;
    // The formats that QEMU has no check for; ours of VHD is with `terem disk check`.
    if matches!(format, Format::Raw | Format::Luks | Format::Vhd) {
        return Err(Failed::new("This image format does not support checks").code(63));
    }
    let (before, report) = match repair {
        None => {
            let report = terem_block::check_source(&named.source).map_err(fail)?;
            (report.clone(), report)
        }
        Some(what) => terem_block::repair(named.whole()?, Some(format), what).map_err(fail)?,
    };
    if as_json {
        out(&json(&check_facts(&named.text, format, &before, &report))?);
    } else if !arguments.common.quiet {
        out(&check_for_people(&before, &report));
    }
    Ok(match (report.errors, report.leaks) {
        (0, 0) => 0,
        (0, _) => 3,
        _ => 2,
    })
}

fn check_facts(name: &str, format: Format, before: &CheckReport, report: &CheckReport) -> Value {
    let mut facts = value!({
        "filename": name, "format": format_name(format), "check-errors": 0,
    });
    // QEMU counts clusters in qcow2 images only.
    if format == Format::Qcow2 {
        facts["image-end-offset"] = report.image_end.into();
        facts["total-clusters"] = report.total_clusters.into();
        for (name, number) in [
            ("allocated-clusters", report.allocated_clusters),
            ("fragmented-clusters", report.fragmented_clusters),
            ("compressed-clusters", report.compressed_clusters),
        ] {
            if number > 0 {
                facts[name] = number.into();
            }
        }
    }
    for (name, number) in [
        ("leaks", report.leaks),
        ("corruptions", report.errors),
        ("leaks-fixed", before.leaks.saturating_sub(report.leaks)),
        ("corruptions-fixed", before.errors.saturating_sub(report.errors)),
    ] {
        if number > 0 {
            facts[name] = number.into();
        }
    }
    facts
}

fn check_for_people(before: &CheckReport, report: &CheckReport) -> String {
    let mut text: String = report.messages.iter().map(|message| format!("ERROR {message}\n")).collect();
    let fixed = (before.leaks.saturating_sub(report.leaks), before.errors.saturating_sub(report.errors));
    if fixed != (0, 0) {
        let _ = write!(
            text,
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\nDouble checking the fixed image now...\n",
            fixed.0, fixed.1
        );
    }
    if report.is_clean() {
        text += "No errors were found on the image.\n";
    }
    if report.errors > 0 {
        let _ = write!(
            text,
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
            report.errors
        );
    }
    if report.leaks > 0 {
        let _ = write!(
            text,
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            report.leaks
        );
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        // Hundredths of a percent.
        let part = |n: u64, of: u64| {
            let of = u128::from(of.max(1));
            let part = (u128::from(n) * 10_000 + of / 2) / of;
            format!("{}.{:02}%", part / 100, part % 100)
        };
        let (all, used) = (report.total_clusters, report.allocated_clusters);
        let _ = writeln!(
            text,
            "{used}/{all} = {} allocated, {} fragmented, {} compressed clusters",
            part(used, all),
            part(report.fragmented_clusters, used),
            part(report.compressed_clusters, used)
        );
    }
    let _ = writeln!(text, "Image end offset: {}", report.image_end);
    text
}

pub fn map(arguments: &arguments::Map) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let as_json = is_json(&arguments.output)?;
    let number = |text: &Option<String>| text.as_deref().map(size).transpose();
    let start = number(&arguments.start_offset)?.unwrap_or(0);
    let length = number(&arguments.max_length)?.unwrap_or(u64::MAX);
    let disk = Disk::open(named.path(), &named.read_only()).map_err(|error| named.failed(&error))?;
    // A server may take one connection and no more.
    let chain = if is_address(named.path()) { Vec::new() } else { chain(&named)? };
    let extents = disk.block_status(start, length).map_err(Failed::new)?;
    // What is in a part of a file is told as places in the file by the format raw, which has such parts.
    let raw = disk.facts().format == Format::Raw;
    let first = named.options().part.filter(|_| raw).map_or(0, |part| part.offset);
    let mut seen: Vec<Seen> = Vec::new();
    for extent in extents {
        let image = chain.get(extent.depth as usize);
        let extent = Seen::of(extent, image.map(|image| image.info.format), first);
        if !seen.last_mut().is_some_and(|last| last.join(&extent)) {
            seen.push(extent);
        }
    }
    if seen.is_empty() && length > 0 {
        // Beyond the disk's end, or of a disk of no bytes.
        seen.push(Seen { start, ..Seen::default() });
    }
    if as_json {
        out(&map_json(&seen));
        return Ok(0);
    }
    let mut text = format!("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File");
    for extent in seen.iter().filter(|extent| extent.data && !extent.zero) {
        let Some(host) = extent.host.filter(|_| !extent.compressed) else {
            out(&text);
            return Err(Failed::new("File contains external, encrypted or compressed clusters."));
        };
        let image = chain.get(extent.depth as usize);
        let file = image.map_or_else(|| named.shown(), |image| data_file(image, extent.start));
        let [offset, length, host] = [extent.start, extent.length, host].map(hex);
        let _ = writeln!(text, "{offset:<16}{length:<16}{host:<16}{file}");
    }
    out(&text);
    Ok(0)
}

/// A run of a disk as `map` prints it.
#[derive(Default)]
#[allow(clippy::struct_excessive_bools, reason = "what is printed")]
struct Seen {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    host: Option<u64>,
}

impl Seen {
    /// What QEMU says of `extent` of an image of that format, whose file begins at byte `first`.
    fn of(extent: Extent, format: Option<Format>, first: u64) -> Self {
        let mut seen = Self {
            start: extent.offset,
            length: extent.length,
            depth: extent.depth,
            present: extent.kind != ExtentKind::Unallocated,
            zero: extent.is_zero(),
            data: matches!(extent.kind, ExtentKind::Data | ExtentKind::Compressed),
            compressed: extent.kind == ExtentKind::Compressed,
            host: extent.host,
        };
        if extent.depth == 0 {
            seen.host = seen.host.map(|host| host + first);
        }
        match format {
            // It knows nothing of where data is in those.
            Some(Format::Vhdx | Format::Luks) => {
                (seen.present, seen.zero, seen.data, seen.compressed) = (true, false, true, false);
                if format == Some(Format::Vhdx) {
                    seen.host = None;
                }
            }
            // Formats without backing files have everything, and holes of their files are data that is zero.
            Some(Format::Vdi | Format::Vhd) => {
                seen.present = true;
                seen.data |= seen.host.is_some();
            }
            Some(Format::Vmdk) => seen.data |= seen.host.is_some(),
            // An export: as a raw file.
            None => seen.host = Some(extent.offset),
            Some(_) => {}
        }
        seen
    }

    /// Takes `next` in, if it goes on in the same way.
    fn join(&mut self, next: &Self) -> bool {
        let facts = |seen: &Self| (seen.depth, seen.present, seen.zero, seen.data, seen.compressed);
        let host = match (self.host, next.host) {
            (None, None) => true,
            (Some(host), Some(next)) => host + self.length == next,
            _ => false,
        };
        let joins = facts(self) == facts(next) && host && self.start + self.length == next.start;
        if joins {
            self.length += next.length;
        }
        joins
    }
}

fn map_json(extents: &[Seen]) -> String {
    let mut text = String::from("[");
    for (i, e) in extents.iter().enumerate() {
        let _ = write!(
            text,
            "{}{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \"compressed\": {}",
            if i == 0 { "" } else { ",\n" },
            e.start,
            e.length,
            e.depth,
            e.present,
            e.zero,
            e.data,
            e.compressed,
        );
        if let Some(host) = e.host {
            let _ = write!(text, ", \"offset\": {host}");
        }
        text += "}";
    }
    text + "]\n"
}

/// The file in which an image has its data of this place.
fn data_file(image: &Described, offset: u64) -> String {
    let Described { name, info, .. } = image;
    let beside = |file: &str| beside(&info.filename, file).display().to_string();
    if let Some(file) = info.qcow2.as_ref().and_then(|qcow2| qcow2.data_file.as_ref()) {
        return beside(file);
    }
    let mut end = 0;
    for extent in info.vmdk.iter().flat_map(|vmdk| &vmdk.extents) {
        end += extent.virtual_size;
        if offset < end && !extent.filename.is_empty() {
            return beside(&extent.filename);
        }
    }
    // What is in a part of a file is in that file.
    if name.starts_with("json:") { info.filename.display().to_string() } else { name.clone() }
}

/// As C's `%#x`: 0 has no prefix.
fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}

pub fn measure(arguments: &arguments::Measure) -> Outcome {
    let as_json = is_json(&arguments.output)?;
    let keys = objects::keys(&arguments.common.object)?;
    let no = |text: &str| Err(Failed::new(text));
    if arguments.filename.is_none()
        && (arguments.common.image_opts || arguments.common.format.is_some() || arguments.snapshot.is_some())
    {
        return no("--image-opts, -f, and -l can only be used with a filename argument.");
    }
    let items = option_items(&arguments.options)?;
    let format = format_of(&arguments.target_format)?;
    let new = New { format, backing: None, backing_format: None, keys: &keys };
    let (mut target, backing) = new.read(&items)?;
    let encrypted = format == Format::Luks || target.qcow2.encrypted;
    if encrypted
        && !items.iter().any(|(name, _)| matches!(name.as_str(), "key-secret" | "encrypt.key-secret"))
    {
        return no("Parameter 'key-secret' is required for cipher");
    }
    // Which one it would be makes no difference.
    target.backing = backing.map(|(path, _)| BackingFile { path, format: Format::Raw });
    let mut bitmaps = None;
    let measured = match (&arguments.size, &arguments.filename) {
        (Some(bytes), None) => terem_block::measure_size(size(bytes)?, &target)?,
        (None, Some(filename)) => {
            let named = Named::new(filename, &arguments.common)?;
            let snapshot = arguments.snapshot.as_deref().map(snapshot_name);
            let open = OpenOptions { snapshot, ..named.read_only() };
            if target.format == Format::Qcow2 && !is_address(named.path()) {
                let info = terem_block::info_of_source(&named.source).map_err(|e| named.failed(&e))?;
                if target.qcow2.version >= 3 {
                    let (size, cluster) = (info.virtual_size, target.qcow2.cluster_size);
                    bitmaps = info
                        .qcow2
                        .filter(|qcow2| qcow2.version >= 3)
                        .map(|qcow2| bitmaps_size(&qcow2, size, cluster));
                }
            }
            target.size = None;
            terem_block::measure(named.path(), &open, &target).map_err(|error| named.failed(&error))?
        }
        (Some(_), Some(_)) => return no("--size N cannot be used together with a filename."),
        (None, None) => return no("Either --size N or one filename must be specified."),
    };
    if as_json {
        let mut facts = value!(measured);
        if let Some(bitmaps) = bitmaps {
            facts["bitmaps"] = bitmaps.into();
        }
        out(&json(&facts)?);
    } else {
        let mut text = format!(
            "required size: {}\nfully allocated size: {}\n",
            measured.required, measured.fully_allocated
        );
        if let Some(bitmaps) = bitmaps {
            let _ = writeln!(text, "bitmaps size: {bitmaps}");
        }
        out(&text);
    }
    Ok(0)
}

/// What a source's bitmaps would take in the copy.
fn bitmaps_size(qcow2: &Qcow2Info, disk: u64, cluster_size: u32) -> u64 {
    let cluster = u64::from(cluster_size);
    let (mut bytes, mut directory) = (0, 0);
    for bitmap in &qcow2.bitmaps {
        let clusters = disk.div_ceil(bitmap.granularity).div_ceil(8).div_ceil(cluster);
        bytes += clusters * cluster + (clusters * 8).next_multiple_of(cluster);
        directory += (24 + bitmap.name.len() as u64).next_multiple_of(8);
    }
    bytes + directory.next_multiple_of(cluster)
}
