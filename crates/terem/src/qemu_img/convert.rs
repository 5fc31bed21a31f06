//! `convert`: images into another one.

use super::change::{New, snapshot_name};
use super::copy::cache;
use super::text::{option_items, size};
use super::{Failed, Named, Naming, Outcome, arguments, format_of, objects};
use crate::disk::Progress;
use std::path::{Path, PathBuf};
use terem_block::{
    BackingPolicy, BitmapAction, ConvertOptions, CreateOptions, Format, OpenError, OpenOptions, Source,
    is_address,
};

/// Most bytes for `-S`.
const MAX_SPARSE: u64 = 16 << 20;
/// Most for `-m`.
const MAX_PARALLEL: u64 = 16;

/// What contradicts itself on a command line.
fn check(arguments: &arguments::Convert) -> Result<(), Failed> {
    let no = |text: &str| Err(Failed::new(text));
    if arguments.skip_broken_bitmaps && !arguments.bitmaps {
        return no("Use of --skip-broken-bitmaps requires --bitmaps");
    }
    if arguments.compress && arguments.copy_range_offloading {
        return no("Cannot enable copy offloading when -c is used");
    }
    if arguments.sparse_size.is_some() && arguments.copy_range_offloading {
        return no("Cannot enable copy offloading when -S is used");
    }
    if arguments.copy_range_offloading && arguments.salvage {
        return no("Cannot use copy offloading in salvaging mode");
    }
    if arguments.target_image_opts && !arguments.no_create {
        return no("--target-image-opts requires use of -n flag");
    }
    if arguments.no_create && !arguments.target_options.is_empty() {
        return no("-o has no effect when skipping image creation");
    }
    if arguments.target_image_opts && arguments.target_format.is_some() {
        return no("--image-opts and --format are mutually exclusive");
    }
    if arguments.target_is_zero && !arguments.no_create {
        return no("--target-is-zero requires use of -n flag");
    }
    Ok(())
}

/// `-S` and `-m`.
fn sparse_and_parallel(arguments: &arguments::Convert) -> Result<(u64, Option<usize>), Failed> {
    let sparse = arguments.sparse_size.as_deref().map(size).transpose()?.unwrap_or(4096);
    if !sparse.is_multiple_of(512) || sparse > MAX_SPARSE {
        return Err(Failed::new(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {MAX_SPARSE}. \
             Select 0 to disable sparse detection (fully allocates output)."
        )));
    }
    let parallel = arguments.parallel.as_deref().map(|text| {
        let number = text.parse().ok().filter(|n| (1..=MAX_PARALLEL).contains(n));
        number.and_then(|n| usize::try_from(n).ok()).ok_or_else(|| {
            Failed::new(format!(
                "Invalid number of coroutines specified. Must be between 1 and {MAX_PARALLEL}."
            ))
        })
    });
    Ok((sparse, parallel.transpose()?))
}

/// A target that is there already.
fn existing(arguments: &arguments::Convert, naming: &Naming<'_>, target: &str) -> Result<Named, Failed> {
    let named = Named::parse(
        target,
        &Naming {
            image_opts: arguments.target_image_opts,
            force_share: false,
            format: arguments.target_format.as_ref(),
            ..*naming
        },
    )?;
    if named.options().format.is_none() && !arguments.target_image_opts {
        let named = Named { source: with_format(named.source, Format::Raw), ..named };
        return Ok(named);
    }
    Ok(named)
}

fn with_format(source: Source, format: Format) -> Source {
    Source { options: OpenOptions { format: Some(format), ..source.options }, ..source }
}

pub fn convert(arguments: &arguments::Convert) -> Outcome {
    check(arguments)?;
    let (sparse, parallel) = sparse_and_parallel(arguments)?;
    let keys = objects::keys(&arguments.object)?;
    let options = option_items(&arguments.target_options)?;
    let target_format = arguments.target_format.as_deref().unwrap_or("raw");
    if options.iter().any(|(name, _)| matches!(name.as_str(), "help" | "?")) {
        return super::change::list_options(format_of(target_format)?);
    }
    let [names @ .., target] = arguments.filenames.as_slice() else {
        return Err(Failed::new("Must specify image file name"));
    };
    if names.is_empty() {
        return Err(Failed::new("Must specify image file name"));
    }
    let naming = Naming {
        format: arguments.source_format.as_ref(),
        image_opts: arguments.image_opts,
        force_share: arguments.force_share,
        keys: &keys,
    };
    let source_cache = cache(arguments.source_cache.as_ref())?.0;
    let snapshot = arguments.source_snapshot.as_deref().map(snapshot_name);
    if snapshot.is_some() && names.len() > 1 {
        return Err(Failed::new("No support for concatenating multiple snapshot"));
    }
    let mut sources = Vec::new();
    for name in names {
        let named = Named::parse(name, &naming)?;
        let open = OpenOptions { snapshot: snapshot.clone(), cache: source_cache, ..named.read_only() };
        sources.push((named, open));
    }
    // Which of them cannot be opened. A server may take one connection and no more.
    for (named, open) in sources.iter().filter(|(named, _)| !is_address(named.path())) {
        terem_block::Disk::open(named.path(), open).map_err(|error| named.failed(&error))?;
    }

    let new = New {
        format: format_of(target_format)?,
        backing: arguments.backing.clone(),
        backing_format: arguments.backing_format.clone(),
        keys: &keys,
    };
    let (mut create, backing) = new.read(&options)?;
    let path = PathBuf::from(target.strip_prefix("file:").unwrap_or(target));
    if let Some((name, format)) = backing {
        if names.len() > 1 {
            return Err(Failed::new(
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            ));
        }
        if arguments.target_is_zero {
            return Err(Failed::new(
                "Cannot use --target-is-zero when the destination image has a backing file",
            ));
        }
        let format =
            format.ok_or_else(|| Failed::new("Use of backing file requires explicit backing format"))?;
        create.backing = Some(terem_block::BackingFile { path: name, format: format_of(&format)? });
    }
    check_compression(arguments, &create)?;
    if arguments.bitmaps {
        if names.len() > 1 {
            return Err(Failed::new("Copying bitmaps only possible with single source"));
        }
        check_bitmaps(&sources[0].0, arguments.skip_broken_bitmaps)?;
        if create.format != Format::Qcow2 {
            let name = super::text::format_name(create.format);
            return Err(Failed::new(format!("Format driver '{name}' does not support bitmaps")));
        }
    }
    let (target_cache, durable) = cache(arguments.target_cache.as_ref().or(Some(&"unsafe".to_owned())))?;
    let mut how = ConvertOptions {
        threads: parallel,
        compress: arguments.compress,
        sparse,
        existing: arguments.no_create,
        target_is_zero: arguments.target_is_zero,
        share_backing: create.backing.is_some(),
        durable,
        // Who calls qemu-img may rely on the file staying the same one.
        replace: false,
        existing_open: None,
        salvage: arguments.salvage,
        offload: arguments.copy_range_offloading,
        rate: arguments.rate.as_deref().map(size).transpose()?,
        warn: |text| eprintln!("qemu-img: warning: {text}"),
    };
    let mut path = path;
    if arguments.no_create {
        let named = existing(arguments, &naming, target)?;
        create.format = named.options().format.unwrap_or(create.format);
        path = named.path().to_owned();
        let open =
            OpenOptions { cache: target_cache, backing: BackingPolicy::Any, ..named.options().clone() };
        if !is_address(&path) {
            let disk = terem_block::Disk::open(&path, &open).map_err(|error| named.failed(&error))?;
            create.format = disk.facts().format;
        }
        how.existing_open = Some(open);
    }
    let sources: Vec<(Named, Source)> = sources
        .into_iter()
        .map(|(named, options)| {
            let source = Source { path: named.path().to_owned(), options };
            (named, source)
        })
        .collect();
    let images: Vec<Source> = sources.iter().map(|(_, source)| source.clone()).collect();
    let progress = Progress::start();
    let show = arguments.progress && !arguments.quiet;
    let mut tell = |done, total| progress.tell_plainly(show, done, total);
    let result = terem_block::convert_sources(&images, &path, &create, &how, &mut tell);
    progress.end_plainly(show);
    result.map_err(|error| match error {
        error @ OpenError::NotFound { .. } => sources[0].0.failed(&error),
        error => error.into(),
    })?;
    if arguments.bitmaps {
        copy_bitmaps(&sources[0].0, &path, &create, arguments.skip_broken_bitmaps)?;
    }
    Ok(0)
}

fn check_compression(arguments: &arguments::Convert, create: &CreateOptions) -> Result<(), Failed> {
    if !arguments.compress {
        return Ok(());
    }
    if !matches!(create.format, Format::Qcow2 | Format::Vmdk) {
        return Err(Failed::new("Compression not supported for this file format"));
    }
    if create.qcow2.encrypted {
        return Err(Failed::new("Compression and encryption not supported at the same time"));
    }
    if create.preallocation != terem_block::Preallocation::Off {
        return Err(Failed::new("Compression and preallocation not supported at the same time"));
    }
    Ok(())
}

fn check_bitmaps(source: &Named, skip_broken: bool) -> Result<(), Failed> {
    let info = terem_block::info_of_source(&source.source).map_err(|error| source.failed(&error))?;
    let Some(qcow2) = info.qcow2 else {
        return Err(Failed::new("This will continue to be an error: the source has no persistent bitmaps"));
    };
    match qcow2.bitmaps.iter().find(|bitmap| bitmap.in_use) {
        Some(bitmap) if !skip_broken => Err(Failed::new(format!(
            "Cannot copy inconsistent bitmap '{}'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap --remove'",
            bitmap.name
        ))),
        _ => Ok(()),
    }
}

fn copy_bitmaps(
    source: &Named,
    target: &Path,
    create: &CreateOptions,
    skip_broken: bool,
) -> Result<(), Failed> {
    let info = terem_block::info_of_source(&source.source)?;
    for bitmap in info.qcow2.map(|qcow2| qcow2.bitmaps).unwrap_or_default() {
        if bitmap.in_use && skip_broken {
            eprintln!("qemu-img: warning: Skipping inconsistent bitmap '{}'", bitmap.name);
            continue;
        }
        let merge = BitmapAction::Merge { image: Some(source.path()), bitmap: &bitmap.name };
        let mut actions = vec![BitmapAction::Add { granularity: bitmap.granularity, enabled: false }, merge];
        if bitmap.enabled {
            actions.push(BitmapAction::Enable);
        }
        terem_block::bitmap(target, Some(create.format), &bitmap.name, &actions)?;
    }
    Ok(())
}
