//! `terem disk`: images that no machine is using.

use crate::arguments::DiskCommand;
use crate::exit::Exit;
use crate::failure::{Failure, chain};
use crate::{print, print_json};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::Path;
use terem_block::{
    BackingFile, CheckReport, CreateOptions, Format, ImageInfo, OpenError, OpenOptions, Qcow2Options,
};
use terem_config::ByteSize;

/// Carries out a command.
pub fn run(command: &DiskCommand) -> Result<Exit, Failure> {
    match command {
        DiskCommand::Create { format, backing, backing_format, cluster_size, overwrite, path, size } => {
            let backing =
                backing.clone().zip(*backing_format).map(|(path, format)| BackingFile { path, format });
            let size = size.map(ByteSize::bytes);
            let options = CreateOptions { size, backing, ..new_image(*format, *cluster_size, *overwrite)? };
            terem_block::create(path, &options).map_err(|error| failed("make", path, &error))?;
            Ok(Exit::Success)
        }
        DiskCommand::Info { format, json, path } => {
            let info = terem_block::info(path, *format).map_err(|error| failed("read", path, &error))?;
            if *json { print_json(&info) } else { print(&describe(&info)) }
        }
        DiskCommand::Check { format, json, path } => {
            let report = terem_block::check(path, *format).map_err(|error| failed("check", path, &error))?;
            if *json {
                print_json(&report)?;
            } else {
                print(&summary(path, &report))?;
            }
            Ok(if report.errors == 0 { Exit::Success } else { Exit::ImageDamaged })
        }
        DiskCommand::Convert { from, to, cluster_size, overwrite, json, source, target } => {
            let open = OpenOptions { format: *from, ..OpenOptions::read_only() };
            let options = new_image(*to, *cluster_size, *overwrite)?;
            let bar = progress_bar();
            let mut progress = |done, total| {
                bar.set_length(total);
                bar.set_position(done);
            };
            let result = terem_block::convert(source, &open, target, &options, &mut progress);
            bar.finish_and_clear();
            result.map_err(|error| {
                failed_text(&format!("convert {} to {}", source.display(), target.display()), &error)
            })?;
            if *json {
                let info = terem_block::info(target, Some(options.format));
                print_json(&info.map_err(|error| failed("read", target, &error))?)?;
            }
            Ok(Exit::Success)
        }
    }
}

fn new_image(format: Format, cluster_size: ByteSize, overwrite: bool) -> Result<CreateOptions, Failure> {
    let cluster_size = u32::try_from(cluster_size.bytes()).map_err(|_| {
        Failure::configuration(format!("--cluster-size {cluster_size}: it is too large"))
            .hint("a power of two from 512 to 2M")
    })?;
    let qcow2 = Qcow2Options { cluster_size, ..Qcow2Options::default() };
    Ok(CreateOptions { format, qcow2, overwrite, ..CreateOptions::default() })
}

fn failed(verb: &str, path: &Path, error: &OpenError) -> Failure {
    failed_text(&format!("{verb} {}", path.display()), error)
}

fn failed_text(what: &str, error: &OpenError) -> Failure {
    let failure = Failure::host(format!("cannot {what}: {}", chain(error)));
    match error {
        OpenError::Exists { .. } => failure.hint("--overwrite replaces it"),
        _ => failure,
    }
}

/// On standard error, and only on a terminal.
fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    if let Ok(style) =
        ProgressStyle::with_template("{bar:40} {percent:>3} %  {bytes} of {total_bytes}  {eta}")
    {
        bar.set_style(style);
    }
    bar
}

fn describe(info: &ImageInfo) -> String {
    let mut text = format!(
        "image         {}\nformat        {}\ndisk size     {} ({} bytes)\ntaken         {} ({} bytes)\n",
        info.filename.display(),
        info.format.name(),
        human(info.virtual_size),
        info.virtual_size,
        human(info.actual_size),
        info.actual_size
    );
    let Some(qcow2) = &info.qcow2 else { return text };
    text += &format!("version       {}\ncluster size  {}\n", qcow2.version, ByteSize(qcow2.cluster_size));
    text += &format!("compression   {}\n", qcow2.compression_type);
    if let Some(backing) = &qcow2.backing_filename {
        let format = qcow2.backing_format.as_deref().unwrap_or("not told");
        text += &format!("backing file  {backing} (format {format})\n");
    }
    for (set, name) in [
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
    text
}

/// A size to one decimal: `1.3 GiB`.
fn human(bytes: u64) -> String {
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

fn summary(path: &Path, report: &CheckReport) -> String {
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
