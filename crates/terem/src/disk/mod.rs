//! `terem disk`: images that no machine is using.

pub mod arguments;
mod change;
mod describe;
mod key;
pub mod passphrase;
mod picture;
mod progress;
mod serve;

use crate::exit::Exit;
use crate::failure::{Failure, chain};
use crate::{print, print_json};
use arguments::{DiskArguments, DiskCommand, Image, NewImage, RepairWhat};
pub use describe::map_json;
use describe::{describe, duration, human, map_text, summary};
use passphrase::{Passphrases, keys};
pub use progress::Progress;
use std::path::Path;
use terem_block::{
    BackingFile, BackingPolicy, BenchOptions, Cache, CheckReport, Comparison, ConvertOptions, CreateOptions,
    Difference, Disk, Format, ImageInfo, Keys, Measure, OpenError, OpenOptions, Repair, ThrottleLimits,
};
use terem_config::{ByteSize, ThrottleConfig, from_key_values};
use terem_machine::throttle_limits;

/// Carries out a command.
pub fn run(arguments: &DiskArguments) -> Result<Exit, Failure> {
    let DiskArguments { passphrases, command } = arguments;
    if let DiskCommand::Key(command) = command {
        // It reads only what it needs, in its order.
        return key::run(command, passphrases);
    }
    passphrases.load()?;
    match command {
        DiskCommand::Serve(arguments) => serve::run(arguments),
        DiskCommand::Create { new, backing, backing_format, format, path, size } => {
            let backing =
                backing.clone().zip(*backing_format).map(|(path, format)| BackingFile { path, format });
            let Some(options) = new_image(*format, new)? else { return list_options(*format) };
            let keys = new_keys(passphrases, path)?;
            let options = CreateOptions { size: size.map(ByteSize::bytes), backing, keys, ..options };
            terem_block::create(path, &options).map_err(|error| failed("make", path, &error))?;
            Ok(Exit::Success)
        }
        DiskCommand::Info { image, chain, json } => info(image, *chain, *json),
        DiskCommand::Check { image, repair, json } => check(image, *repair, *json),
        DiskCommand::Convert {
            from,
            to,
            new,
            snapshot,
            compress,
            threads,
            trust_backing,
            json,
            source,
            target,
        } => {
            let Some(create) = new_image(*to, new)? else { return list_options(*to) };
            let create = CreateOptions { keys: new_keys(passphrases, target)?, ..create };
            let backing = if *trust_backing { BackingPolicy::Any } else { BackingPolicy::SameDirectory };
            let open = OpenOptions {
                format: *from,
                snapshot: snapshot.clone(),
                backing,
                keys: keys(),
                ..OpenOptions::read_only()
            };
            let options =
                ConvertOptions { compress: *compress, threads: *threads, ..ConvertOptions::default() };
            convert(source, &open, target, &create, &options)?;
            if *json && target != Path::new("-") {
                let info = terem_block::info(target, Some(create.format));
                print_json(&info.map_err(|error| failed("read", target, &error))?)?;
            }
            Ok(Exit::Success)
        }
        DiskCommand::Map { image, json, picture } => map(image, *json, picture.as_ref()),
        DiskCommand::Compare { format, format2, strict, first, second } => {
            let open = |format: &Option<Format>| OpenOptions { format: *format, ..tool_options() };
            compare((first, &open(format)), (second, &open(format2)), *strict)
        }
        DiskCommand::Measure { to, options, size, format, json, path } => {
            let mut target = CreateOptions { format: *to, ..CreateOptions::default() };
            set_options(&mut target, options)?;
            let open = OpenOptions { format: *format, ..tool_options() };
            let measured = match (size, path) {
                (Some(size), _) => terem_block::measure_size(size.bytes(), &target),
                (None, Some(path)) => terem_block::measure(path, &open, &target),
                (None, None) => return Err(Failure::configuration("an image or --size is missing")),
            };
            let name = path.as_deref().unwrap_or(Path::new("a new image"));
            show_measure(&measured.map_err(|error| failed("measure", name, &error))?, *json)
        }
        DiskCommand::Bench { image, count, depth, size, step, write, flush_interval, direct, throttle } => {
            let length = usize::try_from(size.bytes()).unwrap_or(usize::MAX).min(1 << 30);
            let options = BenchOptions {
                count: *count,
                depth: *depth,
                size: length,
                offset: 0,
                step: step.map_or(length as u64, ByteSize::bytes),
                write: *write,
                flush_interval: *flush_interval,
                limits: limits(throttle.as_deref())?,
            };
            let cache = if *direct { Cache::Direct } else { Cache::Writeback };
            let open = OpenOptions { format: image.format, cache, ..tool_options() };
            let took = terem_block::bench(&image.path, &open, &options)
                .map_err(|error| failed("run requests on", &image.path, &error))?;
            print(&duration(took, *count, length as u64))
        }
        command => change::run(command),
    }
}

/// The limits that were given as text.
fn limits(text: Option<&str>) -> Result<ThrottleLimits, Failure> {
    let wrong = |error: &dyn std::fmt::Display| Failure::configuration(format!("--throttle: {error}"));
    let config = text.map(from_key_values::<ThrottleConfig>).transpose().map_err(|error| wrong(&error))?;
    let limits = throttle_limits(&config.unwrap_or_default());
    limits.check().map_err(|error| wrong(&error))?;
    Ok(limits)
}

/// How images are opened whose chains the user names on the command line.
fn tool_options() -> OpenOptions {
    OpenOptions { backing: BackingPolicy::Any, keys: keys(), ..OpenOptions::default() }
}

/// The passphrase of a new image.
fn new_keys(passphrases: &Passphrases, path: &Path) -> Result<Keys, Failure> {
    let passphrase = passphrases.new_passphrase(&path.display().to_string())?;
    Ok(passphrase.map_or_else(Keys::default, Keys::every))
}

/// The settings of a new image, or `None` when a list of them was asked for.
fn new_image(format: Format, new: &NewImage) -> Result<Option<CreateOptions>, Failure> {
    if new.options.iter().any(|option| matches!(option.as_str(), "help" | "?")) {
        return Ok(None);
    }
    let mut options = CreateOptions { format, overwrite: new.overwrite, ..CreateOptions::default() };
    options.qcow2.cluster_size = u32::try_from(new.cluster_size.bytes()).map_err(|_| {
        Failure::configuration(format!("--cluster-size {}: it is too large", new.cluster_size))
            .hint("a power of two from 512 to 2M")
    })?;
    set_options(&mut options, &new.options)?;
    Ok(Some(options))
}

/// Sets what is given as `name=value`, several in one with commas.
fn set_options(options: &mut CreateOptions, texts: &[String]) -> Result<(), Failure> {
    let known = options.format.create_options();
    for text in texts.iter().flat_map(|text| text.split(',')) {
        let (name, value) = text.split_once('=').unwrap_or((text, "on"));
        let wrong = |what: String| Failure::configuration(format!("-o {text}: {what}"));
        let option = known.iter().find(|option| option.name == name).ok_or_else(|| {
            let names: Vec<_> = known.iter().map(|option| option.name).collect();
            let format = options.format.name();
            wrong(format!("{format} has no setting of that name"))
                .hint(format!("one of {}", names.join(", ")))
        })?;
        (option.set)(options, value).map_err(wrong)?;
    }
    Ok(())
}

fn list_options(format: Format) -> Result<Exit, Failure> {
    let lines = format.create_options().iter();
    print(&lines.map(|option| format!("{:<18} {}\n", option.name, option.help)).collect::<String>())
}

fn info(image: &Image, chain: bool, json: bool) -> Result<Exit, Failure> {
    let mut infos: Vec<ImageInfo> = Vec::new();
    let read =
        |path: &Path, format| terem_block::info(path, format).map_err(|error| failed("read", path, &error));
    infos.push(read(&image.path, image.format)?);
    if chain {
        let open = OpenOptions { format: image.format, lock: false, read_only: true, ..tool_options() };
        let below = Disk::open(&image.path, &open).map_err(|error| failed("read", &image.path, &error))?;
        let facts = below.facts();
        for (path, format) in facts.backing.iter().zip(&facts.backing_formats) {
            infos.push(read(path, Some(*format))?);
        }
    }
    match (json, chain) {
        (true, true) => print_json(&infos),
        (true, false) => print_json(&infos[0]),
        _ => print(&infos.iter().map(describe).collect::<Vec<_>>().join("\n")),
    }
}

fn check(image: &Image, repair: Option<RepairWhat>, json: bool) -> Result<Exit, Failure> {
    let path = &image.path;
    let report: CheckReport = match repair {
        None => terem_block::check(path, image.format),
        Some(what) => {
            let what = if what == RepairWhat::All { Repair::All } else { Repair::Leaks };
            terem_block::repair(path, image.format, what).map(|(before, after)| {
                if !json && before != after {
                    eprintln!("before: {} errors, {} lost clusters", before.errors, before.leaks);
                }
                after
            })
        }
    }
    .map_err(|error| failed("check", path, &error))?;
    if json {
        print_json(&report)?;
    } else {
        print(&summary(path, &report))?;
    }
    Ok(if report.errors == 0 { Exit::Success } else { Exit::ImageDamaged })
}

fn convert(
    source: &Path,
    open: &OpenOptions,
    target: &Path,
    create: &CreateOptions,
    options: &ConvertOptions,
) -> Result<(), Failure> {
    let (stdin, stdout) = (source == Path::new("-"), target == Path::new("-"));
    let progress = Progress::start();
    let mut tell = |done, total| progress.tell(done, total);
    let result = if stdin && stdout {
        return Err(Failure::configuration("the source and the target cannot both be a stream"));
    } else if stdin {
        if options.compress {
            return Err(Failure::configuration("--compress takes a source that is an image"));
        }
        terem_block::import(&mut std::io::stdin().lock(), None, target, create, &mut tell)
    } else if stdout {
        if create.format != Format::Raw {
            return Err(Failure::configuration("only a raw image can go to standard output").hint("--to raw"));
        }
        terem_block::export(source, open, &mut std::io::stdout().lock(), &mut tell)
    } else {
        terem_block::convert(source, open, target, create, options, &mut tell)
    };
    drop(progress);
    result.map_err(|error| {
        failed_text(&format!("convert {} to {}", source.display(), target.display()), &error)
    })
}

fn map(image: &Image, json: bool, picture: Option<&Option<std::path::PathBuf>>) -> Result<Exit, Failure> {
    let open = OpenOptions { format: image.format, read_only: true, ..tool_options() };
    let read = |error| failed("read", &image.path, &error);
    let disk = Disk::open(&image.path, &open).map_err(read)?;
    if let Some(file) = picture {
        return picture::draw(&disk, image, file.as_deref());
    }
    let extents = disk
        .block_status(0, u64::MAX)
        .map_err(|error| Failure::host(format!("cannot read {}: {error}", image.path.display())))?;
    if json { print(&map_json(&extents)) } else { print(&map_text(&extents, &disk.facts().clone())) }
}

fn compare(
    a: (&std::path::PathBuf, &OpenOptions),
    b: (&std::path::PathBuf, &OpenOptions),
    strict: bool,
) -> Result<Exit, Failure> {
    let progress = Progress::start();
    let result =
        terem_block::compare(a.0, a.1, b.0, b.1, strict, &mut |done, total| progress.tell(done, total));
    drop(progress);
    let text = format!("compare {} with {}", a.0.display(), b.0.display());
    let (text, exit) = match result.map_err(|error| failed_text(&text, &error))? {
        Comparison::Equal { same_size: true } => ("the same\n".into(), Exit::Success),
        Comparison::Equal { same_size: false } => {
            ("the same; what the larger one has beyond the other's end is zero\n".into(), Exit::Success)
        }
        Comparison::Differ { offset, what } => {
            let how = match what {
                Difference::Contents => format!("they differ at byte {offset}\n"),
                Difference::Size => "their sizes differ\n".into(),
                Difference::Allocation => format!("at byte {offset} only one of them has storage\n"),
            };
            (how, Exit::Different)
        }
    };
    print(&text)?;
    Ok(exit)
}

fn show_measure(measure: &Measure, json: bool) -> Result<Exit, Failure> {
    if json {
        return print_json(measure);
    }
    let line = |name, bytes| format!("{name:<18} {} ({bytes} bytes)\n", human(bytes));
    print(&(line("required", measure.required) + &line("fully allocated", measure.fully_allocated)))
}

fn failed(verb: &str, path: &Path, error: &OpenError) -> Failure {
    let (what, reason) = (format!("{verb} {}", path.display()), chain(error));
    // Most errors begin with their file's name, which stands there already.
    let reason = reason.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&reason).to_owned();
    explained(&what, &reason, error)
}

fn failed_text(what: &str, error: &OpenError) -> Failure {
    explained(what, &chain(error), error)
}

fn explained(what: &str, reason: &str, error: &OpenError) -> Failure {
    let failure = Failure::host(format!("cannot {what}: {reason}"));
    match error {
        OpenError::Exists { .. } => failure.hint("--overwrite replaces it"),
        OpenError::NeedsPassphrase { .. } => {
            failure.hint("--passphrase file:PATH, fd:NUMBER or ask; for a new image --new-passphrase")
        }
        OpenError::Cancelled => failure.exit(Exit::Stopped),
        _ => failure,
    }
}
