//! The commands that go through whole disks: dd, compare, bench.

use super::text::size;
use super::{Failed, Named, Naming, Outcome, arguments, format_of, objects, out};
use crate::disk::Progress;
use std::sync::Arc;
use terem_block::{
    AlignedBuffer, BenchOptions, BlockBackend, Cache, Comparison, CreateOptions, Difference, Disk, IoMemory,
    Op, OpenOptions,
};

/// A cache mode by QEMU's name: the mode, and whether flushes matter.
pub fn cache(name: Option<&String>) -> Result<(Cache, bool), Failed> {
    match name.map_or("writeback", String::as_str) {
        "writeback" | "writethrough" => Ok((Cache::Writeback, true)),
        "none" | "off" | "directsync" => Ok((Cache::Direct, true)),
        "unsafe" => Ok((Cache::Unsafe, false)),
        other => Err(Failed::new(format!("Invalid cache option: {other}"))),
    }
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
    let keys = objects::keys(&arguments.object)?;
    let naming = Naming {
        format: arguments.format.as_ref(),
        image_opts: arguments.image_opts,
        force_share: arguments.force_share,
        keys: &keys,
    };
    let source = Named::parse(input, &naming)?;
    let from = Disk::open(source.path(), &source.read_only()).map_err(|error| source.failed(&error))?;
    // As qemu-img: what is skipped counts, too.
    let end = count.map_or(u64::MAX, |count: u64| count.saturating_mul(block)).min(from.size());
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
    let keys = objects::keys(&arguments.object).map_err(|failed| failed.code(2))?;
    let named = |name: &str, format: Option<&String>| {
        let (image_opts, force_share) = (arguments.image_opts, arguments.force_share);
        let naming = Naming { format, image_opts, force_share, keys: &keys };
        Named::parse(name, &naming).map_err(|failed| failed.code(2))
    };
    let a = named(&arguments.filename1, arguments.a_format.as_ref())?;
    let b = named(&arguments.filename2, arguments.b_format.as_ref())?;
    let cache = cache(arguments.cache.as_ref()).map_err(|failed| failed.code(2))?.0;
    for image in [&a, &b].into_iter().filter(|image| !terem_block::is_address(image.path())) {
        // Which of them cannot be opened. A server may take one connection and no more.
        Disk::open(image.path(), &image.read_only()).map_err(|error| image.failed(&error).code(2))?;
    }
    let progress = Progress::start();
    let mut tell = |done, total| progress.tell_plainly(arguments.progress, done, total);
    let (open_a, open_b) = (OpenOptions { cache, ..a.read_only() }, OpenOptions { cache, ..b.read_only() });
    let result = terem_block::compare(a.path(), &open_a, b.path(), &open_b, arguments.strict, &mut tell);
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
    if let Some(aio) =
        arguments.aio.as_deref().filter(|aio| !matches!(*aio, "threads" | "native" | "io_uring"))
    {
        return Err(Failed::new(format!("Invalid aio option: {aio}")));
    }
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
    let open = OpenOptions { cache: cache(arguments.cache.as_ref())?.0, ..named.options().clone() };
    let took = terem_block::bench(named.path(), &open, &bench).map_err(|error| named.failed(&error))?;
    if !arguments.common.quiet {
        out(&format!("Run completed in {:.3} seconds.\n", took.as_secs_f64()));
    }
    Ok(0)
}
