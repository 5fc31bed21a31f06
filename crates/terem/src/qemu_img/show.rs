//! The commands that change nothing: info, check, map, measure.

use super::text::{format_name, human, json, options, size};
use super::{Failed, Named, Outcome, arguments, change, format_of, is_json, out};
use crate::disk::map_json;
use serde_json::{Map, Value, json as value};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use terem_block::{
    CheckReport, CreateOptions, Disk, ExtentKind, Format, ImageInfo, OpenOptions, Qcow2Info, Repair,
    SnapshotInfo,
};

pub fn info(arguments: &arguments::Info) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let as_json = is_json(&arguments.output)?;
    let infos = if arguments.backing_chain {
        chain(&named)?
    } else {
        vec![terem_block::info(&named.path, named.options.format).map_err(|error| named.failed(&error))?]
    };
    // A chain that leads back to itself has been refused by nobody so far.
    if arguments.backing_chain && infos.len() > 1 {
        let open = OpenOptions { lock: false, ..named.read_only() };
        Disk::open(&named.path, &open).map_err(|error| named.failed(&error))?;
    }
    let text = match (as_json, arguments.backing_chain) {
        (true, true) => json(&infos.iter().map(describe).collect::<Vec<_>>())?,
        (true, false) => json(&describe(&infos[0]))?,
        (false, _) => infos.iter().map(describe_for_people).collect::<Vec<_>>().join("\n"),
    };
    out(&text);
    Ok(0)
}

/// An image and its backing files.
fn chain(named: &Named) -> Result<Vec<ImageInfo>, Failed> {
    let mut infos = Vec::new();
    let (mut path, mut format) = (named.path.clone(), named.options.format);
    loop {
        let info = terem_block::info(&path, format).map_err(|error| named.failed(&error))?;
        let below = backing(&info);
        infos.push(info);
        let Some((next, next_format)) = below.filter(|_| infos.len() <= 200) else { return Ok(infos) };
        (path, format) = (next, next_format);
    }
}

/// The backing file as its user would open it.
fn backing(info: &ImageInfo) -> Option<(PathBuf, Option<Format>)> {
    let qcow2 = info.qcow2.as_ref()?;
    let name = qcow2.backing_filename.as_ref()?;
    let format = qcow2.backing_format.as_deref().and_then(Format::from_name);
    Some((beside(&info.filename, name), format))
}

/// A name inside an image, from where the image's name is from.
pub fn beside(image: &Path, name: &str) -> PathBuf {
    match image.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory.join(name),
        _ => PathBuf::from(name),
    }
}

/// What `--output=json` prints of an image.
fn describe(info: &ImageInfo) -> Value {
    let mut text = Map::new();
    let mut put = |name: &str, value: Value| drop(text.insert(name.to_owned(), value));
    let file = |name: &str, path: &Path| {
        let (length, taken) = file_sizes(path);
        value!({ "name": name, "info": {
            "children": [], "virtual-size": length, "filename": path, "format": "file", "actual-size": taken,
            "format-specific": { "type": "file", "data": {} }, "dirty-flag": false,
        }})
    };
    let mut children = vec![file("file", &info.filename)];
    put("virtual-size", info.virtual_size.into());
    put("filename", value!(info.filename));
    put("format", format_name(info.format).into());
    put("actual-size", info.actual_size.into());
    put("dirty-flag", info.qcow2.as_ref().is_some_and(|qcow2| qcow2.dirty).into());
    if let Some(qcow2) = &info.qcow2 {
        put("cluster-size", qcow2.cluster_size.into());
        if let Some(name) = &qcow2.backing_filename {
            put("backing-filename", value!(name));
            put("full-backing-filename", value!(beside(&info.filename, name)));
        }
        if let Some(format) = &qcow2.backing_format {
            put("backing-filename-format", value!(format));
        }
        if !qcow2.snapshots.is_empty() {
            put("snapshots", qcow2.snapshots.iter().map(snapshot).collect());
        }
        put("format-specific", value!({ "type": "qcow2", "data": qcow2_facts(qcow2) }));
        if let Some(name) = &qcow2.data_file {
            children.push(file("data-file", &beside(&info.filename, name)));
        }
    }
    put("children", children.into());
    Value::Object(text)
}

fn file_sizes(path: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).map_or((0, 0), |meta| (meta.len().next_multiple_of(512), meta.blocks() * 512))
}

fn snapshot(s: &SnapshotInfo) -> Value {
    let mut facts = value!({
        "id": s.id, "name": s.name, "date-sec": s.date, "date-nsec": s.date_nsec, "vm-state-size": s.vm_state_size,
        "vm-clock-sec": s.vm_clock / 1_000_000_000, "vm-clock-nsec": s.vm_clock % 1_000_000_000,
    });
    if let Some(count) = s.icount {
        facts["icount"] = count.into();
    }
    facts
}

fn qcow2_facts(qcow2: &Qcow2Info) -> Value {
    if qcow2.version < 3 {
        return value!({ "compat": "0.10", "compression-type": qcow2.compression_type, "refcount-bits": qcow2.refcount_bits });
    }
    let mut facts = value!({
        "compat": "1.1", "compression-type": qcow2.compression_type, "lazy-refcounts": qcow2.lazy_refcounts,
        "refcount-bits": qcow2.refcount_bits, "corrupt": qcow2.corrupt, "extended-l2": qcow2.extended_l2,
    });
    if !qcow2.bitmaps.is_empty() {
        facts["bitmaps"] = qcow2
            .bitmaps
            .iter()
            .map(|bitmap| {
                let flags = [(bitmap.in_use, "in-use"), (bitmap.enabled, "auto")];
                let flags: Vec<_> = flags.iter().filter(|(set, _)| *set).map(|(_, name)| *name).collect();
                value!({ "name": bitmap.name, "granularity": bitmap.granularity, "flags": flags })
            })
            .collect();
    }
    if let Some(name) = &qcow2.data_file {
        facts["data-file"] = value!(name);
        facts["data-file-raw"] = qcow2.data_file_raw.into();
    }
    facts
}

fn describe_for_people(info: &ImageInfo) -> String {
    let name = info.filename.display();
    let mut text = format!(
        "image: {name}\nfile format: {}\nvirtual size: {} ({} bytes)\ndisk size: {}\n",
        format_name(info.format),
        human(info.virtual_size),
        info.virtual_size,
        human(info.actual_size)
    );
    if let Some(qcow2) = &info.qcow2 {
        let _ = writeln!(text, "cluster_size: {}", qcow2.cluster_size);
        if let Some(backing) = &qcow2.backing_filename {
            let full = beside(&info.filename, backing);
            let _ = write!(text, "backing file: {backing}");
            let _ = if full == Path::new(backing) {
                writeln!(text)
            } else {
                writeln!(text, " (actual path: {})", full.display())
            };
        }
        if let Some(format) = &qcow2.backing_format {
            let _ = writeln!(text, "backing file format: {format}");
        }
        if !qcow2.snapshots.is_empty() {
            text += &change::snapshot_table(&qcow2.snapshots);
        }
        text += "Format specific information:\n";
        if let Value::Object(facts) = qcow2_facts(qcow2) {
            // In the order in which qemu-img has them.
            const ORDER: [&str; 9] = [
                "compat",
                "compression-type",
                "lazy-refcounts",
                "bitmaps",
                "refcount-bits",
                "corrupt",
                "data-file",
                "data-file-raw",
                "extended-l2",
            ];
            for name in ORDER {
                if let Some(value) = facts.get(name) {
                    people(&mut text, &Map::from_iter([(name.to_owned(), value.clone())]), 1);
                }
            }
        }
    }
    let (length, taken) = file_sizes(&info.filename);
    let _ = write!(
        text,
        "Child node '/file':\n    filename: {name}\n    protocol type: file\n    file length: {} ({length} bytes)\n    disk size: {}\n",
        human(length),
        human(taken)
    );
    text
}

fn people(text: &mut String, facts: &Map<String, Value>, depth: usize) {
    for (name, value) in facts {
        let (indent, name) = ("    ".repeat(depth), name.replace('-', " "));
        let _ = match value {
            Value::String(value) => writeln!(text, "{indent}{name}: {value}"),
            Value::Array(items) => {
                let _ = writeln!(text, "{indent}{name}:");
                for (i, item) in items.iter().enumerate() {
                    match item {
                        Value::Object(item) => {
                            let _ = writeln!(text, "{indent}    [{i}]:");
                            people(text, item, depth + 2);
                        }
                        item => {
                            let _ =
                                writeln!(text, "{indent}    [{i}]: {}", item.as_str().unwrap_or_default());
                        }
                    }
                }
                Ok(())
            }
            value => writeln!(text, "{indent}{name}: {value}"),
        };
    }
}

pub fn check(arguments: &arguments::Check) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let as_json = is_json(&arguments.output)?;
    let fail = |error| named.failed(&error);
    let format = terem_block::info(&named.path, named.options.format).map_err(fail)?.format;
    if format == Format::Raw {
        return Err(Failed::new("This image format does not support checks").code(63));
    }
    let (before, report) = match arguments.repair.as_deref() {
        None if named.options.lock => {
            let report = terem_block::check(&named.path, Some(format)).map_err(fail)?;
            (report.clone(), report)
        }
        None => {
            let report = terem_block::check_unlocked(&named.path, Some(format)).map_err(fail)?;
            (report.clone(), report)
        }
        Some(what @ ("leaks" | "all")) => {
            let what = if what == "all" { Repair::All } else { Repair::Leaks };
            terem_block::repair(&named.path, Some(format), what).map_err(fail)?
        }
        Some(_) => return Err(Failed::new("--repair (-r) expects 'leaks' or 'all'")),
    };
    if as_json {
        out(&json(&check_facts(&named.path, format, &before, &report))?);
    } else if !arguments.common.quiet {
        out(&check_for_people(&before, &report));
    }
    Ok(match (report.errors, report.leaks) {
        (0, 0) => 0,
        (0, _) => 3,
        _ => 2,
    })
}

fn check_facts(path: &Path, format: Format, before: &CheckReport, report: &CheckReport) -> Value {
    let mut facts = value!({
        "filename": path, "format": format_name(format), "check-errors": 0,
        "image-end-offset": report.image_end, "total-clusters": report.total_clusters,
    });
    for (name, number) in [
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
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
    let disk = Disk::open(&named.path, &named.read_only()).map_err(|error| named.failed(&error))?;
    let extents = disk.block_status(start, length).map_err(Failed::new)?;
    if as_json {
        out(&map_json(&extents));
        return Ok(0);
    }
    let names: Vec<PathBuf> = chain(&named)?.into_iter().map(|info| info.filename).collect();
    let mut text = format!("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File");
    for extent in extents {
        match (extent.kind, extent.host) {
            (ExtentKind::Data, Some(host)) => {
                let file = names.get(extent.depth as usize);
                let file = file.map_or_else(String::new, |file: &PathBuf| file.display().to_string());
                let [offset, length, host] = [extent.offset, extent.length, host].map(hex);
                let _ = writeln!(text, "{offset:<16}{length:<16}{host:<16}{file}");
            }
            (ExtentKind::Data | ExtentKind::Compressed, _) => {
                out(&text);
                return Err(Failed::new("File contains external, encrypted or compressed clusters."));
            }
            _ => {}
        }
    }
    out(&text);
    Ok(0)
}

/// As C's `%#x`: 0 has no prefix.
fn hex(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}

pub fn measure(arguments: &arguments::Measure) -> Outcome {
    let as_json = is_json(&arguments.output)?;
    let mut target =
        CreateOptions { format: format_of(&arguments.target_format)?, ..CreateOptions::default() };
    for (name, text) in arguments.options.iter().flat_map(|text| options(text)) {
        change::set_option(&mut target, &name, &text)?;
    }
    let mut bitmaps = None;
    let measured = match (&arguments.size, &arguments.filename) {
        (Some(bytes), None) => terem_block::measure_size(size(bytes)?, &target)?,
        (None, Some(filename)) => {
            let named = Named::new(filename, &arguments.common)?;
            let snapshot = arguments.snapshot.as_deref().map(change::snapshot_name);
            let open = OpenOptions { snapshot, ..named.read_only() };
            if target.format == Format::Qcow2 && target.qcow2.version >= 3 {
                let info =
                    terem_block::info(&named.path, named.options.format).map_err(|e| named.failed(&e))?;
                bitmaps = info
                    .qcow2
                    .map(|qcow2| bitmaps_size(&qcow2, info.virtual_size, target.qcow2.cluster_size));
            }
            terem_block::measure(&named.path, &open, &target).map_err(|error| named.failed(&error))?
        }
        (Some(_), Some(_)) => return Err(Failed::new("--size N cannot be used together with a filename")),
        (None, None) => return Err(Failed::new("Either --size N or one filename must be specified")),
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
