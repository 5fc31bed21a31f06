//! The commands that make or change an image: create, amend, bitmap, commit, rebase, resize, snapshot.

use super::copy::cache;
use super::keyslots::Slots;
use super::text::{format_name, human, option_items, size};
use super::{Failed, Named, Outcome, arguments, format_of, maybe_format, objects, out};
use crate::disk::Progress;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use terem_block::{
    Amend, BackingFile, BitmapAction, CommitOptions, CreateOptions, Format, Keys, OpenError, OpenOptions,
    Preallocation, Rebase, SnapshotAction, SnapshotInfo, beside,
};

/// A new image as a command line has it: what is said by options of its own.
pub struct New<'a> {
    pub format: Format,
    pub backing: Option<PathBuf>,
    pub backing_format: Option<String>,
    pub keys: &'a Keys,
}

/// A backing file's name and the name of its format.
type Backing = (PathBuf, Option<String>);

impl New<'_> {
    /// Reads the items of `-o`.
    pub fn read(self, items: &[(String, String)]) -> Result<(CreateOptions, Option<Backing>), Failed> {
        let mut target = CreateOptions { format: self.format, overwrite: true, ..CreateOptions::default() };
        let (mut backing, mut backing_format) = (self.backing, self.backing_format);
        for (name, value) in items {
            match name.as_str() {
                "backing_file" => backing = Some(value.into()),
                "backing_fmt" => backing_format = Some(value.clone()),
                "key-secret" if self.format == Format::Luks => target.keys = key(self.keys, value)?,
                "encrypt.key-secret" if self.format == Format::Qcow2 => target.keys = key(self.keys, value)?,
                _ => set_option(&mut target, name, value)?,
            }
        }
        if backing.as_ref().is_some_and(|name| name.as_os_str().is_empty()) {
            backing = None;
        }
        match backing {
            Some(backing) => Ok((target, Some((backing, backing_format)))),
            None if backing_format.is_some() => {
                Err(Failed::new("Backing format cannot be used without backing file"))
            }
            None => Ok((target, None)),
        }
    }
}

/// The passphrase of a new image.
fn key(keys: &Keys, id: &str) -> Result<Keys, Failed> {
    let passphrase = keys.secret(id).ok_or_else(|| Failed::new(format!("No secret with id '{id}'")))?;
    Ok(Keys::every(passphrase.clone()))
}

/// Sets an option of `-o`.
fn set_option(target: &mut CreateOptions, name: &str, value: &str) -> Result<(), Failed> {
    let mode = |value: &str| {
        Preallocation::from_name(value)
            .ok_or_else(|| Failed::new(format!("Invalid parameter '{value}' for preallocation")))
    };
    match name {
        "size" => target.size = Some(size(value)?),
        // Only a hint to some file systems.
        "nocow" | "extent_size_hint" => {}
        "preallocation" if matches!(target.format, Format::Raw | Format::Luks) => {
            target.preallocation = mode(value)?;
            if target.preallocation == Preallocation::Metadata {
                return Err(Failed::new("Unsupported preallocation mode 'metadata'"));
            }
        }
        "preallocation" if target.format == Format::Vdi => {
            target.vdi.fixed = mode(value)? != Preallocation::Off;
        }
        // What qcow2's `encrypt.format` was called.
        "encryption" if target.format == Format::Qcow2 && matches!(value, "off" | "no" | "false") => {}
        _ => {
            let known = target.format.create_options().iter().find(|option| option.name == name);
            let option = known.ok_or_else(|| Failed::new(format!("Invalid parameter '{name}'")))?;
            (option.set)(target, value)
                .map_err(|what| Failed::new(format!("Invalid value '{value}' of {name}: {what}")))?;
        }
    }
    Ok(())
}

/// The help for `-o help`.
pub fn list_options(format: Format) -> Outcome {
    let lines = format.create_options().iter().map(|o| format!("  {:<22} - {}\n", o.name, o.help));
    out(&format!("Supported {} options:\n{}", format_name(format), lines.collect::<String>()));
    Ok(0)
}

pub fn create(arguments: &arguments::Create) -> Outcome {
    let common = &arguments.common;
    let keys = objects::keys(&common.object)?;
    let format = maybe_format(common.format.as_ref())?.unwrap_or(Format::Raw);
    let items = option_items(&arguments.options)?;
    if items.iter().any(|(name, _)| matches!(name.as_str(), "help" | "?")) {
        return list_options(format);
    }
    let name = arguments.filename.as_deref().ok_or_else(|| Failed::new("Expecting image file name"))?;
    let path = name.strip_prefix("file:").unwrap_or(name);
    let named = |failed: Failed| Failed { text: format!("{name}: {}", failed.text), ..failed };
    let bytes = arguments.size.as_deref().map(size).transpose()?;
    let new = New {
        format,
        backing: arguments.backing.clone(),
        backing_format: arguments.backing_format.clone(),
        keys: &keys,
    };
    let (mut target, backing) = new.read(&items).map_err(named)?;
    target.size = bytes.or(target.size);
    if let Some((backing, format)) = backing {
        let format = format.ok_or_else(|| {
            let seen = terem_block::info(beside(Path::new(path), &backing.to_string_lossy()), None);
            let seen = seen.map_or_else(
                |_| String::new(),
                |info| format!("\nDetected format of {}.", format_name(info.format)),
            );
            Failed::new(format!("{name}: Backing file specified without backing format{seen}"))
        })?;
        target.backing = Some(BackingFile { path: backing, format: format_of(&format)? });
        target.backing_unchecked = arguments.backing_unsafe;
    }
    if target.size.is_none() && target.backing.is_none() {
        return Err(Failed::new(format!("{name}: Image creation needs a size parameter")));
    }
    terem_block::create(path, &target)?;
    if !common.quiet {
        out(&formatted(name, &target, &items));
    }
    Ok(0)
}

/// The line that says what was made.
fn formatted(path: &str, target: &CreateOptions, items: &[(String, String)]) -> String {
    let name = path.strip_prefix("file:").unwrap_or(path);
    // As asked for, although it may have been rounded up.
    let made = target
        .size
        .unwrap_or_else(|| terem_block::info(name, Some(target.format)).map_or(0, |info| info.virtual_size));
    let mut text = format!("Formatting '{path}', fmt={}", format_name(target.format));
    let on = |set| if set { "on" } else { "off" };
    let given = |name: &str| items.iter().rev().find(|(given, _)| given == name).map(|(_, value)| value);
    let qcow2 = &target.qcow2;
    if target.format == Format::Qcow2 {
        let _ = write!(
            text,
            " cluster_size={} extended_l2={}{} compression_type={}",
            qcow2.cluster_size,
            on(qcow2.extended_l2),
            given("preallocation").map_or_else(String::new, |mode| format!(" preallocation={mode}")),
            qcow2.compression.name()
        );
        for (name, value) in items.iter().filter(|(name, _)| name.starts_with("encrypt.")) {
            let _ = write!(text, " {name}={value}");
        }
    }
    let _ = write!(text, " size={made}");
    if let Some(file) = &qcow2.data_file {
        let _ = write!(text, " data_file={file}");
        if given("data_file_raw").is_some() {
            let _ = write!(text, " data_file_raw={}", on(qcow2.data_file_raw));
        }
    }
    if let Some(backing) = &target.backing {
        let _ = write!(
            text,
            " backing_file={} backing_fmt={}",
            backing.path.display().to_string().replace(',', ",,"),
            format_name(backing.format)
        );
    }
    if target.format == Format::Qcow2 {
        let (lazy, bits) = (on(qcow2.lazy_refcounts), qcow2.refcount_bits);
        let compat = given("compat").map_or_else(String::new, |compat| format!(" compat={compat}"));
        let _ = write!(text, "{compat} lazy_refcounts={lazy} refcount_bits={bits}");
    } else {
        for (name, value) in items.iter().filter(|(name, _)| name != "size" && !name.starts_with("backing_"))
        {
            let _ = write!(text, " {name}={value}");
        }
    }
    text + "\n"
}

pub fn amend(arguments: &arguments::Amend) -> Outcome {
    let items = option_items(&arguments.options)?;
    let amendable = |format| match format {
        Format::Qcow2 | Format::Luks => Ok(()),
        other => {
            let name = format_name(other);
            Err(Failed::new(format!("Format driver '{name}' does not support option amendment")))
        }
    };
    if items.iter().any(|(name, _)| matches!(name.as_str(), "help" | "?")) {
        maybe_format(arguments.common.format.as_ref())?.map_or(Ok(()), amendable)?;
        out(
            "Amend options: compat, lazy_refcounts, refcount_bits, size, backing_file, backing_fmt, data_file, \
             data_file_raw; of encrypted images state, new-secret, old-secret, keyslot, iter-time\n",
        );
        return Ok(0);
    }
    let filename =
        arguments.filename.as_deref().ok_or_else(|| Failed::new("Expecting one image file name"))?;
    cache(arguments.cache.as_ref())?;
    let keys = objects::keys(&arguments.common.object)?;
    let named = Named::new(filename, &arguments.common)?;
    let path = named.whole()?;
    let info = terem_block::info(path, named.format()).map_err(|error| named.failed(&error))?;
    amendable(info.format)?;
    let mut changes = Amend::default();
    let on = |value: &str| match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(Failed::new(format!("Invalid value '{value}'; on or off"))),
    };
    let mut slots = Slots::default();
    let (mut backing, mut backing_format) = (None, None);
    for (name, value) in items {
        if slots.take(info.format, &name, &value)? {
            continue;
        }
        if info.format == Format::Luks {
            return Err(Failed::new(format!("Invalid parameter '{name}'")));
        }
        match name.as_str() {
            "compat" => {
                changes.version = Some(match value.as_str() {
                    "v2" | "0.10" => 2,
                    "v3" | "1.1" => 3,
                    _ => return Err(Failed::new(format!("Invalid parameter '{value}' for compat"))),
                });
            }
            "lazy_refcounts" => changes.lazy_refcounts = Some(on(&value)?),
            "refcount_bits" => changes.refcount_bits = Some(value.parse().map_err(Failed::new)?),
            "size" => changes.size = Some(size(&value)?),
            "backing_file" => backing = Some(value),
            "backing_fmt" => backing_format = Some(value),
            "data_file" => {
                // Only where the data are is changed, not whether they are elsewhere.
                if info.qcow2.as_ref().is_none_or(|qcow2| qcow2.data_file.is_none()) {
                    return Err(Failed::new(
                        "data-file can only be set for images that use an external data file",
                    ));
                }
                changes.data_file = Some(value);
            }
            "data_file_raw" => changes.data_file_raw = Some(on(&value)?),
            _ => return Err(Failed::new(format!("Invalid parameter '{name}'"))),
        }
    }
    if changes != Amend::default() {
        terem_block::amend(path, named.format(), &changes).map_err(|error| named.failed(&error))?;
    }
    if slots.is_asked() {
        slots.apply(&named, &keys, arguments.force)?;
    }
    if let Some(backing) = backing {
        let backing = new_backing(&backing, backing_format.as_ref())?;
        terem_block::set_backing(path, named.format(), backing.as_ref())?;
    }
    Ok(0)
}

/// A backing file by name and format; an empty name is none.
fn new_backing(name: &str, format: Option<&String>) -> Result<Option<BackingFile>, Failed> {
    if name.is_empty() {
        return Ok(None);
    }
    let format = format.ok_or_else(|| {
        Failed::new("Could not change the backing file: backing format must be specified (-F)")
    })?;
    Ok(Some(BackingFile { path: name.into(), format: format_of(format)? }))
}

pub fn bitmap(arguments: &arguments::Bitmap) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let path = named.whole()?;
    let granularity = arguments.granularity.as_deref().map(size).transpose()?;
    // As QEMU: the cluster size, within bounds.
    let default = || {
        let info = terem_block::info(path, named.format()).ok();
        let cluster = info.and_then(|info| info.qcow2).map_or(65536, |qcow2| qcow2.cluster_size);
        cluster.clamp(4096, 65536)
    };
    if granularity.is_some() && !arguments.add {
        return Err(Failed::new("granularity only supported with --add"));
    }
    let source = arguments.source_file.as_deref();
    let mut merged = arguments.merge.iter();
    let mut actions = Vec::new();
    // In the order in which they were given.
    for action in &arguments.order {
        actions.push(match *action {
            "add" => BitmapAction::Add {
                granularity: granularity.unwrap_or_else(default),
                enabled: !arguments.disable,
            },
            "remove" => BitmapAction::Remove,
            "clear" => BitmapAction::Clear,
            "enable" => BitmapAction::Enable,
            // One that is added is added so.
            "disable" if arguments.add => continue,
            "disable" => BitmapAction::Disable,
            _ => match merged.next() {
                Some(bitmap) => BitmapAction::Merge { image: source, bitmap },
                None => continue,
            },
        });
    }
    if actions.is_empty() {
        return Err(Failed::new(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    if source.is_some() && arguments.merge.is_empty() {
        return Err(Failed::new("Merge bitmap source file only supported with --merge"));
    }
    terem_block::bitmap(path, named.format(), &arguments.bitmap, &actions).map_err(|error| match error {
        OpenError::NoSuch { name, .. } => {
            let verb = bitmap_verb(&actions);
            let bitmap = &arguments.bitmap;
            Failed::new(format!(
                "Operation {verb} on bitmap {bitmap} failed: Dirty bitmap '{name}' not found"
            ))
        }
        error => Failed::new(format!("Operation on bitmap {} failed: {error}", arguments.bitmap)),
    })?;
    Ok(0)
}

fn bitmap_verb(actions: &[BitmapAction<'_>]) -> &'static str {
    match actions.first() {
        Some(BitmapAction::Add { .. }) | None => "add",
        Some(BitmapAction::Remove) => "remove",
        Some(BitmapAction::Clear) => "clear",
        Some(BitmapAction::Enable) => "enable",
        Some(BitmapAction::Disable) => "disable",
        Some(BitmapAction::Merge { .. }) => "merge",
    }
}

pub fn commit(arguments: &arguments::Commit) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let path = named.whole()?;
    let how = CommitOptions {
        empty: !arguments.drop && arguments.base.is_none(),
        rate: arguments.rate.as_deref().map(size).transpose()?,
    };
    let open = OpenOptions { cache: cache(arguments.cache.as_ref())?.0, ..named.options().clone() };
    let progress = Progress::start();
    let show = arguments.progress && !arguments.common.quiet;
    let mut tell = |done, total| progress.tell_plainly(show, done, total);
    let result = terem_block::commit(path, &open, arguments.base.as_deref(), how, &mut tell);
    drop(progress);
    result.map_err(|error| named.failed(&error))?;
    if !arguments.common.quiet {
        out("Image committed.\n");
    }
    Ok(0)
}

pub fn rebase(arguments: &arguments::Rebase) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let path = named.whole()?;
    let name = arguments.backing.as_deref();
    let name =
        name.ok_or_else(|| Failed::new("Must specify backing file (-b) or use simple rebase mode (-u)"));
    let name = if arguments.backing_unsafe { name.unwrap_or_default() } else { name? };
    let backing = new_backing(name, arguments.backing_format.as_ref())?;
    cache(arguments.backing_cache.as_ref())?;
    let how = match arguments.backing_unsafe {
        true => Rebase::Unsafe,
        false => Rebase::Safe { compress: arguments.compress },
    };
    let open =
        OpenOptions { cache: cache(arguments.cache.as_ref())?.0, lock: true, ..named.options().clone() };
    let progress = Progress::start();
    let show = arguments.progress && !arguments.common.quiet;
    let mut tell = |done, total| progress.tell_plainly(show, done, total);
    let result = terem_block::rebase(path, &open, backing.as_ref(), how, &mut tell);
    drop(progress);
    result.map_err(|error| named.failed(&error))?;
    Ok(0)
}

pub fn resize(arguments: &arguments::Resize) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let path = named.whole()?;
    let preallocation = match &arguments.preallocation {
        None => Preallocation::Off,
        Some(name) => Preallocation::from_name(name)
            .ok_or_else(|| Failed::new(format!("Invalid preallocation mode '{name}'")))?,
    };
    let now = terem_block::info(path, named.format()).map_err(|error| named.failed(&error))?;
    let new = match (arguments.size.strip_prefix('+'), arguments.size.strip_prefix('-')) {
        (Some(more), _) => now.virtual_size.checked_add(size(more)?),
        (_, Some(less)) => now.virtual_size.checked_sub(size(less)?),
        _ => Some(size(&arguments.size)?),
    };
    if now.format == Format::Raw && preallocation == Preallocation::Metadata {
        return Err(Failed::new("Unsupported preallocation mode: metadata"));
    }
    let new = new.filter(|&new| new > 0).ok_or_else(|| Failed::new("New image size must be positive"))?;
    if new < now.virtual_size && !arguments.shrink {
        return Err(Failed::new(
            "Use the --shrink option to perform a shrink operation.\nqemu-img: warning: Shrinking an image will delete \
             all data beyond the shrunken image's end. Before performing such an operation, make sure there is no \
             important data there.",
        ));
    }
    if now.format == Format::Raw && named.format().is_none() {
        eprintln!(
            "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         Automatically \
             detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n         \
             Specify the 'raw' format explicitly to remove the restrictions.",
            path.display()
        );
    }
    terem_block::resize(path, Some(now.format), new, arguments.shrink, preallocation)
        .map_err(|error| named.failed(&error))?;
    if !arguments.common.quiet {
        out("Image resized.\n");
    }
    Ok(0)
}

/// `-l` of convert: `snapshot.id=…`, `snapshot.name=…`, or a name or id.
pub fn snapshot_name(text: &str) -> String {
    let plain = text.strip_prefix("snapshot.name=").or_else(|| text.strip_prefix("snapshot.id="));
    plain.unwrap_or(text).to_owned()
}

pub fn snapshot(arguments: &arguments::Snapshot) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let path = named.whole()?;
    let changes = [
        arguments.create.as_deref().map(|name| (SnapshotAction::Create(name), name, "create")),
        arguments.apply.as_deref().map(|name| (SnapshotAction::Apply(name), name, "apply")),
        arguments.delete.as_deref().map(|name| (SnapshotAction::Delete(name), name, "delete")),
    ];
    if let Some((action, name, verb)) = changes.into_iter().flatten().next() {
        terem_block::snapshot(path, named.format(), action).map_err(|error| match error {
            OpenError::NoSuch { .. } => {
                Failed::new(format!("Could not {verb} snapshot '{name}': snapshot not found"))
            }
            OpenError::Limit { .. } => Failed::new(format!("Could not {verb} snapshot '{name}': {error}")),
            error => named.failed(&error),
        })?;
        return Ok(0);
    }
    let info = terem_block::info(path, named.format()).map_err(|error| named.failed(&error))?;
    let snapshots = info.qcow2.map(|qcow2| qcow2.snapshots).unwrap_or_default();
    if !snapshots.is_empty() {
        out(&snapshot_table(&snapshots));
    }
    Ok(0)
}

/// The list of snapshots.
pub fn snapshot_table(snapshots: &[SnapshotInfo]) -> String {
    let mut text = String::from("Snapshot list:\n");
    let columns = ("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT");
    let _ = writeln!(
        text,
        "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
        columns.0, columns.1, columns.2, columns.3, columns.4, columns.5
    );
    for s in snapshots {
        let clock = s.vm_clock / 1_000_000;
        let (seconds, thousandths) = (clock / 1000, clock % 1000);
        let clock =
            format!("{:04}:{:02}:{:02}.{thousandths:03}", seconds / 3600, seconds / 60 % 60, seconds % 60);
        let count = s.icount.map_or_else(|| "--".to_owned(), |count| count.to_string());
        let (state, date) = (human(s.vm_state_size), date(s.date));
        let _ = writeln!(text, "{:<7} {:<16} {state:>8} {date:>19} {clock:>15} {count:>10}", s.id, s.name);
    }
    text
}

/// Seconds since 1970 as a date (UTC), by the days of the proleptic Gregorian calendar.
fn date(seconds: u32) -> String {
    let (days, rest) = (u64::from(seconds) / 86_400, seconds % 86_400);
    // Years begin in March here, so that a leap day is a year's last: H. Hinnant's algorithm.
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(1_795_842_086), "2026-11-28 05:01:26");
    }
}
