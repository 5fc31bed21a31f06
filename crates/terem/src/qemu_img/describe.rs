//! `info`: what there is to know of an image and its backing files.

use super::facts::{format_specific, people};
use super::text::{format_name, human, json};
use super::{Failed, Named, Naming, Outcome, arguments, change, is_json, objects, out};
use serde_json::{Map, Value, json as value};
use std::fmt::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use terem_block::{
    BackingPolicy, Below, Disk, FilePart, Format, ImageInfo, Keys, OpenOptions, SnapshotInfo, Source, beside,
    is_address,
};

pub fn info(arguments: &arguments::Info) -> Outcome {
    // Nothing of what is in an image is told, so no passphrase is wanted for it; secrets that are given must be good.
    objects::keys(&arguments.common.object)?;
    let named = Named::parse(&arguments.filename, &Naming::of(&arguments.common, &Keys::locked()))?;
    let as_json = is_json(&arguments.output)?;
    let infos = if arguments.backing_chain { chain(&named)? } else { vec![top(&named)?] };
    let text = match (as_json, arguments.backing_chain) {
        (true, true) => json(&infos.iter().map(describe).collect::<Vec<_>>())?,
        (true, false) => json(&describe(&infos[0]))?,
        (false, _) => infos.iter().map(for_people).collect::<Vec<_>>().join("\n"),
    };
    out(&text);
    Ok(0)
}

/// An image, and the name that is printed of it.
pub struct Described {
    pub name: String,
    /// Where it is, if it is not a whole file.
    part: Option<FilePart>,
    pub info: ImageInfo,
}

/// The name by which an image could be opened again: its file's, unless there is more to say than that.
pub fn name_of(source: &Source) -> String {
    let below = match &source.options.below {
        Below::Image(below) => Some(below),
        Below::Nothing | Below::AsWritten => None,
    };
    if is_address(&source.path) {
        return address_name(&source.path);
    }
    if source.options.part.is_none() && below.is_none() {
        let name = source.path.display().to_string();
        // What comes before a colon would be taken for a protocol.
        let protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
        return if protocol { format!("./{name}") } else { name };
    }
    format!("json:{}", tree(source))
}

/// An NBD address as QEMU writes it: without a slash where no export is named.
fn address_name(path: &Path) -> String {
    let name = path.display().to_string();
    match name.split_once("+unix:///?") {
        Some((scheme, query)) => format!("{scheme}+unix://?{query}"),
        None => name.strip_suffix('/').map_or(name.clone(), str::to_owned),
    }
}

fn file_tree(path: &Path) -> Value {
    value!({ "driver": "file", "filename": path })
}

fn raw_tree(path: &Path, part: &FilePart) -> Value {
    let mut raw = value!({ "driver": "raw", "offset": part.offset, "file": file_tree(path) });
    if let Some(size) = part.size {
        raw["size"] = size.into();
    }
    raw
}

fn tree(source: &Source) -> Value {
    let Source { path, options } = source;
    let format = options.format.map_or("raw", format_name);
    let mut tree = match &options.part {
        Some(part) if format == "raw" => raw_tree(path, part),
        Some(part) => value!({ "driver": format, "file": raw_tree(path, part) }),
        None => value!({ "driver": format, "file": file_tree(path) }),
    };
    if let Below::Image(below) = &options.below {
        tree["backing"] = self::tree(below);
    }
    tree
}

pub fn top(named: &Named) -> Result<Described, Failed> {
    let info = terem_block::info_of_source(&named.source).map_err(|error| named.failed(&error))?;
    Ok(Described { name: named.shown(), part: named.options().part, info })
}

/// An image and its backing files.
pub fn chain(named: &Named) -> Result<Vec<Described>, Failed> {
    let mut infos = vec![top(named)?];
    let mut source = named.source.clone();
    while infos.len() <= 200 {
        let Some(last) = infos.last() else { break };
        let next = match &source.options.below {
            Below::Image(image) => (**image).clone(),
            Below::Nothing => break,
            Below::AsWritten => {
                let Some((name, format)) = backing(&last.info) else { break };
                let full = beside(&source.path, &name).display().to_string();
                let base = OpenOptions {
                    backing: BackingPolicy::Any,
                    lock: named.options().lock,
                    ..OpenOptions::read_only()
                };
                let mut next = Source::named(&full, &base).map_err(|error| named.failed(&error))?;
                let known = format.as_deref().and_then(Format::from_name);
                next.options.format = next.options.format.or(known);
                next
            }
        };
        let info = terem_block::info_of_source(&next).map_err(|error| named.failed(&error))?;
        infos.push(Described { name: name_of(&next), part: next.options.part, info });
        source = next;
    }
    if infos.len() > 1 {
        // A chain that leads back to itself has been refused by nobody so far.
        let open = OpenOptions { lock: false, keys: Keys::locked(), ..named.read_only() };
        Disk::open(named.path(), &open).map_err(|error| named.failed(&error))?;
    }
    Ok(infos)
}

/// The backing file that is written in an image: its name and format.
pub fn backing(info: &ImageInfo) -> Option<(String, Option<String>)> {
    if let Some(vmdk) = &info.vmdk {
        return vmdk.parent.clone().map(|parent| (parent, Some("vmdk".to_owned())));
    }
    let qcow2 = info.qcow2.as_ref()?;
    Some((qcow2.backing_filename.clone()?, qcow2.backing_format.clone()))
}

/// What `--output=json` prints of an image.
fn describe(described: &Described) -> Value {
    let Described { name, info, part } = described;
    let mut text = Map::new();
    let mut put = |name: &str, value: Value| drop(text.insert(name.to_owned(), value));
    put("virtual-size", info.virtual_size.into());
    put("filename", name.clone().into());
    put("format", format_name(info.format).into());
    if !is_address(&info.filename) {
        put("actual-size", info.actual_size.into());
        put("dirty-flag", info.qcow2.as_ref().is_some_and(|qcow2| qcow2.dirty).into());
    }
    if info.encryption.is_some() {
        put("encrypted", true.into());
    }
    if let Some(size) = cluster_size(info) {
        put("cluster-size", size.into());
    }
    if let Some((name, format)) = backing(info) {
        put("full-backing-filename", value!(beside(Path::new(&described.name), &name)));
        put("backing-filename", name.into());
        if let Some(format) = format {
            put("backing-filename-format", format.into());
        }
    }
    if let Some(qcow2) = info.qcow2.as_ref().filter(|qcow2| !qcow2.snapshots.is_empty()) {
        put("snapshots", qcow2.snapshots.iter().map(snapshot).collect());
    }
    if let Some(facts) = format_specific(described) {
        put("format-specific", value!({ "type": format_name(info.format), "data": facts }));
    }
    let child = |(name, file): (String, PathBuf)| {
        let mut facts = file_facts(&file, info);
        // A format in a part of a file has a node of the format raw between.
        if let Some(part) = part.filter(|_| name == "file" && info.format != Format::Raw) {
            let length = facts["virtual-size"].as_u64().unwrap_or(0);
            let size = part.size.unwrap_or(length.saturating_sub(part.offset));
            facts = value!({
                "children": [{ "name": "file", "info": facts }], "virtual-size": size, "format": "raw",
                "filename": format!("json:{}", raw_tree(&file, &part)), "dirty-flag": false,
                "actual-size": info.actual_size,
            });
        }
        value!({ "name": name, "info": facts })
    };
    put("children", children(info).into_iter().map(child).collect());
    Value::Object(text)
}

fn cluster_size(info: &ImageInfo) -> Option<u64> {
    info.qcow2.as_ref().map(|qcow2| qcow2.cluster_size).or(info.cluster_size)
}

/// The files of an image by the names that they have in its graph.
fn children(info: &ImageInfo) -> Vec<(String, PathBuf)> {
    let mut children = Vec::new();
    for (i, extent) in info.vmdk.iter().flat_map(|vmdk| &vmdk.extents).enumerate() {
        if !extent.filename.is_empty() {
            children.push((format!("extents.{i}"), beside(&info.filename, &extent.filename)));
        }
    }
    // QEMU does not open a data file for this.
    children.push(("file".to_owned(), info.filename.clone()));
    children
}

/// A file's kind, length and bytes taken.
struct FileFacts {
    kind: &'static str,
    length: u64,
    taken: Option<u64>,
}

impl FileFacts {
    /// Of a file of the image that `info` is of.
    fn of(path: &Path, info: &ImageInfo) -> Self {
        if is_address(path) {
            return Self { kind: "nbd", length: info.virtual_size, taken: None };
        }
        match std::fs::metadata(path) {
            Ok(meta) if meta.file_type().is_block_device() => {
                let length = terem_block::info(path, Some(Format::Raw)).map_or(0, |info| info.virtual_size);
                Self { kind: "host_device", length, taken: Some(0) }
            }
            Ok(meta) => {
                let length = meta.len().next_multiple_of(512);
                Self { kind: "file", length, taken: Some(meta.blocks() * 512) }
            }
            Err(_) => Self { kind: "file", length: 0, taken: None },
        }
    }
}

fn file_facts(path: &Path, info: &ImageInfo) -> Value {
    let FileFacts { kind, length, taken } = FileFacts::of(path, info);
    let name = if kind == "nbd" { address_name(path) } else { path.display().to_string() };
    let mut facts = value!({ "children": [], "virtual-size": length, "filename": name, "format": kind });
    if kind != "nbd" {
        facts["dirty-flag"] = false.into();
    }
    if let Some(taken) = taken {
        facts["actual-size"] = taken.into();
    }
    if kind == "file" {
        facts["format-specific"] = value!({ "type": "file", "data": {} });
    }
    facts
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

fn for_people(described: &Described) -> String {
    let Described { name, info, .. } = described;
    let mut text = format!(
        "image: {name}\nfile format: {}\nvirtual size: {} ({} bytes)\n",
        format_name(info.format),
        human(info.virtual_size),
        info.virtual_size,
    );
    let _ = if is_address(&info.filename) {
        writeln!(text, "disk size: unavailable")
    } else {
        writeln!(text, "disk size: {}", human(info.actual_size))
    };
    if info.encryption.is_some() {
        text += "encrypted: yes\n";
    }
    if let Some(size) = cluster_size(info) {
        let _ = writeln!(text, "cluster_size: {size}");
    }
    if info.qcow2.as_ref().is_some_and(|qcow2| qcow2.dirty) {
        text += "cleanly shut down: no\n";
    }
    if let Some((backing, format)) = backing(info) {
        let full = beside(Path::new(name), &backing);
        let _ = write!(text, "backing file: {backing}");
        let _ = if full == Path::new(&backing) {
            writeln!(text)
        } else {
            writeln!(text, " (actual path: {})", full.display())
        };
        if let Some(format) = format {
            let _ = writeln!(text, "backing file format: {format}");
        }
    }
    if let Some(qcow2) = info.qcow2.as_ref().filter(|qcow2| !qcow2.snapshots.is_empty()) {
        text += &change::snapshot_table(&qcow2.snapshots);
    }
    if let Some(facts) = format_specific(described) {
        text += "Format specific information:\n";
        people(&mut text, &facts, 1);
    }
    for (name, file) in children(info) {
        let FileFacts { kind, length, taken } = FileFacts::of(&file, info);
        let _ = write!(
            text,
            "Child node '/{name}':\n    filename: {}\n    protocol type: {kind}\n    file length: {} ({length} bytes)\n    disk size: {}\n",
            file.display(),
            human(length),
            taken.map_or_else(|| "unavailable".to_owned(), human)
        );
    }
    text
}
