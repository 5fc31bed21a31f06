//! The commands that make or change an image: create, amend, bitmap, commit, rebase, resize, snapshot.

use super::show::beside;
use super::text::{format_name, human, options, size};
use super::{Failed, Named, Outcome, arguments, format_of, maybe_format, out};
use crate::disk::Progress;
use std::fmt::Write;
use std::path::Path;
use terem_block::{
    Amend, BackingFile, BitmapAction, CreateOptions, Format, OpenError, Preallocation, SnapshotAction,
    SnapshotInfo,
};

/// Sets an option of `-o`.
pub fn set_option(target: &mut CreateOptions, name: &str, value: &str) -> Result<(), Failed> {
    match name {
        "size" => target.size = Some(size(value)?),
        // Only a hint to some file systems.
        "nocow" | "extent_size_hint" => {}
        "preallocation" if target.format == Format::Raw => {
            target.preallocation = Preallocation::from_name(value)
                .ok_or_else(|| Failed::new(format!("Invalid parameter '{value}' for preallocation")))?;
        }
        _ => {
            let known = target.format.create_options().iter().find(|option| option.name == name);
            let option = known.ok_or_else(|| Failed::new(format!("Invalid parameter '{name}'")))?;
            (option.set)(target, value)
                .map_err(|what| Failed::new(format!("Invalid value '{value}' of {name}: {what}")))?;
        }
    }
    Ok(())
}

pub fn create(arguments: &arguments::Create) -> Outcome {
    let common = &arguments.common;
    if !common.object.is_empty() {
        return Err(Failed::new("--object: objects such as secrets are not supported yet"));
    }
    let format = maybe_format(common.format.as_ref())?.unwrap_or(Format::Raw);
    if arguments.options.iter().any(|text| matches!(text.as_str(), "help" | "?")) {
        let lines = format.create_options().iter().map(|o| format!("  {:<22} - {}\n", o.name, o.help));
        out(&format!("Supported {} options:\n{}", format_name(format), lines.collect::<String>()));
        return Ok(0);
    }
    let path = arguments.filename.strip_prefix("file:").unwrap_or(&arguments.filename);
    let named = |failed: Failed| Failed { text: format!("{path}: {}", failed.text), ..failed };
    let mut target = CreateOptions { format, overwrite: true, ..CreateOptions::default() };
    let (mut backing, mut backing_format) = (arguments.backing.clone(), arguments.backing_format.clone());
    for (name, value) in arguments.options.iter().flat_map(|text| options(text)) {
        match name.as_str() {
            "backing_file" => backing = Some(value.into()),
            "backing_fmt" => backing_format = Some(value),
            _ => set_option(&mut target, &name, &value).map_err(named)?,
        }
    }
    if let Some(bytes) = &arguments.size {
        target.size = Some(size(bytes)?);
    }
    if let Some(backing) = backing {
        let format = backing_format.as_deref().ok_or_else(|| {
            let seen = terem_block::info(beside(Path::new(path), &backing.to_string_lossy()), None);
            let seen = seen.map_or_else(
                |_| String::new(),
                |info| format!("\nDetected format of {}.", format_name(info.format)),
            );
            Failed::new(format!("{path}: Backing file specified without backing format{seen}"))
        })?;
        target.backing = Some(BackingFile { path: backing, format: format_of(format)? });
        target.backing_unchecked = arguments.backing_unsafe;
    } else if backing_format.is_some() {
        return Err(Failed::new(format!("{path}: Backing format cannot be used without backing file")));
    }
    if target.size.is_none() && target.backing.is_none() {
        return Err(Failed::new(format!("{path}: Image creation needs a size parameter")));
    }
    terem_block::create(path, &target)?;
    if !common.quiet {
        out(&formatted(path, &target));
    }
    Ok(0)
}

/// The line that says what was made.
fn formatted(path: &str, target: &CreateOptions) -> String {
    // As asked for, although it may have been rounded up.
    let made = target
        .size
        .unwrap_or_else(|| terem_block::info(path, Some(target.format)).map_or(0, |info| info.virtual_size));
    let mut text = format!("Formatting '{path}', fmt={}", format_name(target.format));
    let on = |set| if set { "on" } else { "off" };
    let qcow2 = &target.qcow2;
    if target.format == Format::Qcow2 {
        let _ = write!(
            text,
            " cluster_size={} extended_l2={}{} compression_type={}",
            qcow2.cluster_size,
            on(qcow2.extended_l2),
            match target.preallocation {
                Preallocation::Off => "",
                Preallocation::Metadata => " preallocation=metadata",
                Preallocation::Falloc => " preallocation=falloc",
                Preallocation::Full => " preallocation=full",
            },
            qcow2.compression.name()
        );
    }
    let _ = write!(text, " size={made}");
    if let Some(backing) = &target.backing {
        let _ = write!(
            text,
            " backing_file={} backing_fmt={}",
            backing.path.display(),
            format_name(backing.format)
        );
    }
    if target.format == Format::Qcow2 {
        let (lazy, bits) = (on(qcow2.lazy_refcounts), qcow2.refcount_bits);
        let compat = if qcow2.version < 3 { " compat=v2" } else { "" };
        let _ = write!(text, "{compat} lazy_refcounts={lazy} refcount_bits={bits}");
    }
    text + "\n"
}

pub fn amend(arguments: &arguments::Amend) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let mut changes = Amend::default();
    let on = |value: &str| match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(Failed::new(format!("Invalid value '{value}'; on or off"))),
    };
    let (mut backing, mut backing_format) = (None, None);
    for (name, value) in arguments.options.iter().flat_map(|text| options(text)) {
        match name.as_str() {
            "help" | "?" => {
                out(
                    "Amendable options: compat, lazy_refcounts, refcount_bits, size, backing_file, backing_fmt\n",
                );
                return Ok(0);
            }
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
            _ => return Err(Failed::new(format!("Invalid parameter '{name}', or it cannot be changed"))),
        }
    }
    terem_block::amend(&named.path, named.options.format, &changes).map_err(|error| named.failed(&error))?;
    if let Some(backing) = backing {
        let backing = new_backing(&backing, backing_format.as_ref())?;
        terem_block::set_backing(&named.path, named.options.format, backing.as_ref())?;
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
    let granularity = arguments.granularity.as_deref().map(size).transpose()?;
    let mut actions = Vec::new();
    if arguments.add {
        // As QEMU: the cluster size, within bounds.
        let default = || {
            let info = terem_block::info(&named.path, named.options.format).ok();
            let cluster = info.and_then(|info| info.qcow2).map_or(65536, |qcow2| qcow2.cluster_size);
            cluster.clamp(4096, 65536)
        };
        let granularity = granularity.unwrap_or_else(default);
        actions.push(BitmapAction::Add { granularity, enabled: !arguments.disable });
    } else if granularity.is_some() {
        return Err(Failed::new("granularity only supported with --add"));
    }
    for (set, action) in [
        (arguments.remove, BitmapAction::Remove),
        (arguments.clear, BitmapAction::Clear),
        (arguments.enable, BitmapAction::Enable),
        (arguments.disable && !arguments.add, BitmapAction::Disable),
    ] {
        if set {
            actions.push(action);
        }
    }
    let source = arguments.source_file.as_deref();
    actions.extend(arguments.merge.iter().map(|bitmap| BitmapAction::Merge { image: source, bitmap }));
    if actions.is_empty() {
        return Err(Failed::new(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    if source.is_some() && arguments.merge.is_empty() {
        return Err(Failed::new("Merge bitmap source file only supported with --merge"));
    }
    terem_block::bitmap(&named.path, named.options.format, &arguments.bitmap, &actions).map_err(|error| {
        match error {
            OpenError::NoSuch { name, .. } => {
                let verb = bitmap_verb(&actions);
                let bitmap = &arguments.bitmap;
                Failed::new(format!(
                    "Operation {verb} on bitmap {bitmap} failed: Dirty bitmap '{name}' not found"
                ))
            }
            error => Failed::new(format!("Operation on bitmap {} failed: {error}", arguments.bitmap)),
        }
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
    let empty = !arguments.drop && arguments.base.is_none();
    let progress = Progress::start();
    let mut tell = |done, total| progress.tell_plainly(arguments.progress, done, total);
    let result =
        terem_block::commit(&named.path, &named.options, arguments.base.as_deref(), empty, &mut tell);
    drop(progress);
    result.map_err(|error| named.failed(&error))?;
    if !arguments.common.quiet {
        out("Image committed.\n");
    }
    Ok(0)
}

pub fn rebase(arguments: &arguments::Rebase) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let name = arguments.backing.as_deref();
    let name =
        name.ok_or_else(|| Failed::new("Use backing_file (-b) option to specify the new backing file"))?;
    let backing = new_backing(name, arguments.backing_format.as_ref())?;
    let how = if arguments.backing_unsafe { terem_block::Rebase::Unsafe } else { terem_block::Rebase::Safe };
    let progress = Progress::start();
    let mut tell = |done, total| progress.tell_plainly(arguments.progress, done, total);
    let result = terem_block::rebase(&named.path, &named.options, backing.as_ref(), how, &mut tell);
    drop(progress);
    result.map_err(|error| named.failed(&error))?;
    Ok(0)
}

pub fn resize(arguments: &arguments::Resize) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let preallocation = match &arguments.preallocation {
        None => Preallocation::Off,
        Some(name) => Preallocation::from_name(name)
            .ok_or_else(|| Failed::new(format!("Invalid preallocation mode '{name}'")))?,
    };
    let now = terem_block::info(&named.path, named.options.format).map_err(|error| named.failed(&error))?;
    let new = match (arguments.size.strip_prefix('+'), arguments.size.strip_prefix('-')) {
        (Some(more), _) => now.virtual_size.checked_add(size(more)?),
        (_, Some(less)) => now.virtual_size.checked_sub(size(less)?),
        _ => Some(size(&arguments.size)?),
    };
    let new = new.filter(|&new| new > 0).ok_or_else(|| Failed::new("New image size must be positive"))?;
    if new < now.virtual_size && !arguments.shrink {
        return Err(Failed::new(
            "Use the --shrink option to perform a shrink operation.\nqemu-img: warning: Shrinking an image will delete \
             all data beyond the shrunken image's end. Before performing such an operation, make sure there is no \
             important data there.",
        ));
    }
    if now.format == Format::Raw && named.options.format.is_none() {
        eprintln!(
            "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         Automatically \
             detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n         \
             Specify the 'raw' format explicitly to remove the restrictions.",
            named.path.display()
        );
    }
    terem_block::resize(&named.path, Some(now.format), new, arguments.shrink, preallocation)
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
    let changes = [
        arguments.create.as_deref().map(|name| (SnapshotAction::Create(name), name, "create")),
        arguments.apply.as_deref().map(|name| (SnapshotAction::Apply(name), name, "apply")),
        arguments.delete.as_deref().map(|name| (SnapshotAction::Delete(name), name, "delete")),
    ];
    if let Some((action, name, verb)) = changes.into_iter().flatten().next() {
        terem_block::snapshot(&named.path, named.options.format, action).map_err(|error| match error {
            OpenError::NoSuch { .. } => {
                Failed::new(format!("Could not {verb} snapshot '{name}': snapshot not found"))
            }
            OpenError::Limit { .. } => Failed::new(format!("Could not {verb} snapshot '{name}': {error}")),
            error => named.failed(&error),
        })?;
        return Ok(0);
    }
    let info = terem_block::info(&named.path, named.options.format).map_err(|error| named.failed(&error))?;
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
