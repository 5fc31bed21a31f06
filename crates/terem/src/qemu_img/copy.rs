//! The commands that go through whole disks: convert, dd, compare, bench.

use super::change::{set_option, snapshot_name};
use super::text::{options, size};
use super::{Failed, Named, Outcome, arguments, format_of, out};
use crate::disk::Progress;
use std::path::PathBuf;
use std::sync::Arc;
use terem_block::{
    AlignedBuffer, BackingFile, BenchOptions, BitmapAction, BlockBackend, Cache, Comparison, ConvertOptions,
    CreateOptions, Difference, Disk, IoMemory, Op, OpenError, OpenOptions,
};

/// A cache mode by QEMU's name: the mode, and whether flushes matter.
fn cache(name: Option<&String>) -> Result<(Cache, bool), Failed> {
    match name.map_or("writeback", String::as_str) {
        "writeback" | "writethrough" => Ok((Cache::Writeback, true)),
        "none" | "off" | "directsync" => Ok((Cache::Direct, true)),
        "unsafe" => Ok((Cache::Unsafe, false)),
        other => Err(Failed::new(format!("Invalid cache option: {other}"))),
    }
}

pub fn convert(arguments: &arguments::Convert) -> Outcome {
    let [source, target] = arguments.filenames.as_slice() else {
        return Err(Failed::new("Joining several sources into one target is not supported"));
    };
    if !arguments.object.is_empty() || arguments.target_image_opts {
        return Err(Failed::new("--object and --target-image-opts are not supported yet"));
    }
    let source =
        Named::parse(source, arguments.source_format.as_ref(), arguments.image_opts, arguments.force_share)?;
    let target = PathBuf::from(target.strip_prefix("file:").unwrap_or(target));
    let mut create = CreateOptions {
        format: format_of(&arguments.target_format)?,
        overwrite: true,
        ..CreateOptions::default()
    };
    let (mut backing, mut backing_format) = (arguments.backing.clone(), arguments.backing_format.clone());
    for (name, value) in arguments.target_options.iter().flat_map(|text| options(text)) {
        match name.as_str() {
            "backing_file" => backing = Some(value.into()),
            "backing_fmt" => backing_format = Some(value),
            _ => set_option(&mut create, &name, &value)?,
        }
    }
    if let Some(path) = backing {
        let format =
            backing_format.ok_or_else(|| Failed::new("Backing file specified without backing format"))?;
        create.backing = Some(BackingFile { path, format: format_of(&format)? });
    }
    let snapshot = arguments.source_snapshot.as_deref().map(snapshot_name);
    let open =
        OpenOptions { snapshot, cache: cache(arguments.source_cache.as_ref())?.0, ..source.read_only() };
    let durable = arguments.target_cache.is_some() && cache(arguments.target_cache.as_ref())?.1;
    let how = ConvertOptions {
        threads: arguments.parallel.map(|parallel| parallel.clamp(1, 16)),
        compress: arguments.compress,
        sparse: arguments.sparse_size.as_deref().map(size).transpose()?.unwrap_or(4096),
        existing: arguments.no_create,
        target_is_zero: arguments.target_is_zero,
        share_backing: create.backing.is_some(),
        durable,
        // Who calls qemu-img may rely on the file staying the same one.
        replace: false,
    };
    let progress = Progress::start();
    let mut tell = |done, total| progress.tell_plainly(arguments.progress, done, total);
    let result = terem_block::convert(&source.path, &open, &target, &create, &how, &mut tell);
    progress.end_plainly(arguments.progress);
    result.map_err(|error| match error {
        error @ OpenError::NotFound { .. } => source.failed(&error),
        error => error.into(),
    })?;
    if arguments.bitmaps {
        copy_bitmaps(&source, &target, &create, arguments.skip_broken_bitmaps)?;
    }
    Ok(0)
}

fn copy_bitmaps(
    source: &Named,
    target: &std::path::Path,
    create: &CreateOptions,
    skip_broken: bool,
) -> Result<(), Failed> {
    let info = terem_block::info(&source.path, source.options.format)?;
    for bitmap in info.qcow2.map(|qcow2| qcow2.bitmaps).unwrap_or_default() {
        if bitmap.in_use {
            if skip_broken {
                eprintln!("qemu-img: warning: Skipping inconsistent bitmap '{}'", bitmap.name);
                continue;
            }
            return Err(Failed::new(format!("Cannot copy inconsistent bitmap '{}'", bitmap.name)));
        }
        let merge = BitmapAction::Merge { image: Some(&source.path), bitmap: &bitmap.name };
        let mut actions = vec![BitmapAction::Add { granularity: bitmap.granularity, enabled: false }, merge];
        if bitmap.enabled {
            actions.push(BitmapAction::Enable);
        }
        terem_block::bitmap(target, Some(create.format), &bitmap.name, &actions)?;
    }
    Ok(())
}

pub fn dd(arguments: &arguments::Dd) -> Outcome {
    let (mut input, mut output, mut block, mut count, mut skip) = (None, None, 512, None, 0);
    for operand in &arguments.operands {
        let (name, value) =
            operand.split_once('=').ok_or_else(|| Failed::new(format!("unrecognized operand {operand}")))?;
        match name {
            "if" => input = Some(value),
            "of" => output = Some(value),
            "bs" => block = size(value)?,
            "count" => count = Some(size(value)?),
            "skip" => skip = size(value)?,
            _ => return Err(Failed::new(format!("unrecognized operand {operand}"))),
        }
    }
    let (Some(input), Some(output)) = (input, output) else {
        return Err(Failed::new("Must specify both input and output file names"));
    };
    if block == 0 || block > 1 << 30 {
        return Err(Failed::new("Invalid block size"));
    }
    let source = Named::parse(input, arguments.format.as_ref(), arguments.image_opts, arguments.force_share)?;
    let from = Disk::open(&source.path, &source.read_only()).map_err(|error| source.failed(&error))?;
    // As qemu-img: what is skipped counts, too.
    let end = count.map_or(u64::MAX, |count| count.saturating_mul(block)).min(from.size());
    let start = skip.saturating_mul(block);
    if start > end {
        eprintln!("qemu-img: {input}: cannot skip to specified offset");
    }
    let length = end.saturating_sub(start);
    let format = format_of(&arguments.output_format)?;
    let create = CreateOptions { overwrite: true, ..CreateOptions::new(format, length) };
    terem_block::create(output, &create)?;
    let to = Disk::open(output, &OpenOptions { format: Some(format), ..OpenOptions::default() })?;
    let mut at = 0;
    while at < length {
        let n = (1 << 20).min(length - at);
        let memory = Arc::new(AlignedBuffer::new(usize::try_from(n).unwrap_or(0)));
        let run = |disk: &Disk, op| disk.run(op).map_err(Failed::new);
        run(&from, Op::Read { offset: start + at, memory: Arc::clone(&memory) as Arc<dyn IoMemory> })?;
        run(&to, Op::Write { offset: at, memory })?;
        at += n;
    }
    to.close().map_err(Failed::new)?;
    Ok(0)
}

pub fn compare(arguments: &arguments::Compare) -> Outcome {
    let named = |name: &str, format: Option<&String>| {
        Named::parse(name, format, arguments.image_opts, arguments.force_share)
            .map_err(|failed| failed.code(2))
    };
    let a = named(&arguments.filename1, arguments.a_format.as_ref())?;
    let b = named(&arguments.filename2, arguments.b_format.as_ref())?;
    for image in [&a, &b] {
        // Which of them cannot be opened.
        Disk::open(&image.path, &image.read_only()).map_err(|error| image.failed(&error).code(2))?;
    }
    let progress = Progress::start();
    let mut tell = |done, total| progress.tell_plainly(arguments.progress, done, total);
    let (open_a, open_b) = (a.read_only(), b.read_only());
    let result = terem_block::compare(&a.path, &open_a, &b.path, &open_b, arguments.strict, &mut tell);
    drop(progress);
    let found = result.map_err(|error| Failed::from(error).code(3))?;
    let (text, code) = match found {
        Comparison::Equal { same_size: true } => ("Images are identical.\n".to_owned(), 0),
        Comparison::Equal { same_size: false } => {
            ("Warning: Image size mismatch!\nImages are identical.\n".to_owned(), 0)
        }
        Comparison::Differ { offset, what } => {
            let text = match what {
                Difference::Contents => format!("Content mismatch at offset {offset}!\n"),
                Difference::Size => "Strict mode: Image size mismatch!\n".to_owned(),
                Difference::Allocation => {
                    format!("Strict mode: Offset {offset} block status mismatch!\n")
                }
            };
            (text, 1)
        }
    };
    if !arguments.quiet {
        out(&text);
    }
    Ok(code)
}

pub fn bench(arguments: &arguments::Bench) -> Outcome {
    let named = Named::new(&arguments.filename, &arguments.common)?;
    let buffer = size(&arguments.buffer_size)?;
    let (count, depth) = (size(&arguments.count)?, size(&arguments.depth)?);
    let step = match size(&arguments.step_size)? {
        0 => buffer,
        step => step,
    };
    let flush_interval = size(&arguments.flush_interval)?;
    if flush_interval > 0 && !arguments.write {
        return Err(Failed::new("--flush-interval is only available in write tests"));
    }
    if flush_interval > 0 && flush_interval < depth {
        return Err(Failed::new("Flush interval can't be smaller than depth"));
    }
    let pattern = u8::try_from(size(&arguments.pattern)?).map_err(Failed::new)?;
    let bench = BenchOptions {
        count,
        depth: usize::try_from(depth).unwrap_or(64).clamp(1, 4096),
        size: usize::try_from(buffer)
            .ok()
            .filter(|&n| n <= 1 << 30)
            .ok_or_else(|| Failed::new("Invalid buffer size"))?,
        offset: size(&arguments.offset)?,
        step,
        write: arguments.write.then_some(pattern),
        flush_interval,
        ..BenchOptions::default()
    };
    if !arguments.common.quiet {
        let verb = if arguments.write { "write" } else { "read" };
        out(&format!(
            "Sending {count} {verb} requests, {buffer} bytes each, {depth} in parallel (starting at offset {}, step size {step})\n",
            bench.offset
        ));
    }
    let open = OpenOptions { cache: cache(arguments.cache.as_ref())?.0, ..named.options.clone() };
    let took = terem_block::bench(&named.path, &open, &bench).map_err(|error| named.failed(&error))?;
    if !arguments.common.quiet {
        out(&format!("Run completed in {:.3} seconds.\n", took.as_secs_f64()));
    }
    Ok(0)
}
