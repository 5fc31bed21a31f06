//! `terem disk`: the commands that change an image.

use super::arguments::{BitmapCommand, DiskCommand, Image, Named, SnapshotCommand};
use super::describe::human;
use super::progress::Progress;
use super::{failed, tool_options};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::{print, print_json};
use terem_block::{
    BackingFile, BitmapAction, CommitOptions, OpenError, OpenOptions, Preallocation, Qcow2Info, Rebase,
    SnapshotAction, bitmap, snapshot,
};
use terem_config::ByteSize;

/// Carries out a command.
pub fn run(command: &DiskCommand) -> Result<Exit, Failure> {
    match command {
        DiskCommand::Resize { image, shrink, size } => resize(image, *shrink, size),
        DiskCommand::Snapshot(command) => snapshots(command),
        DiskCommand::Bitmap(command) => bitmaps(command),
        DiskCommand::Commit { image, base, keep } => {
            let progress = Progress::start();
            let mut tell = |done, total| progress.tell(done, total);
            let how = CommitOptions { empty: !keep, rate: None };
            let result = terem_block::commit(&image.path, &open(image), base.as_deref(), how, &mut tell);
            drop(progress);
            result.map_err(|error| match error {
                OpenError::Cancelled => {
                    let path = image.path.display();
                    Failure::host(format!(
                        "cannot commit {path}: stopped; the image still has everything, its backing file has a part of it"
                    ))
                    .exit(Exit::Stopped)
                }
                error => failed("commit", &image.path, &error),
            })?;
            Ok(Exit::Success)
        }
        DiskCommand::Rebase { image, backing, backing_format, r#unsafe } => {
            let backing =
                backing.clone().zip(*backing_format).map(|(path, format)| BackingFile { path, format });
            let how = if *r#unsafe { Rebase::Unsafe } else { Rebase::Safe { compress: false } };
            let progress = Progress::start();
            let mut tell = |done, total| progress.tell(done, total);
            let result = terem_block::rebase(&image.path, &open(image), backing.as_ref(), how, &mut tell);
            drop(progress);
            result.map_err(|error| failed("rebase", &image.path, &error))?;
            Ok(Exit::Success)
        }
        _ => Err(Failure::host("this command is not carried out here")),
    }
}

fn open(image: &Image) -> OpenOptions {
    OpenOptions { format: image.format, ..tool_options() }
}

fn resize(image: &Image, shrink: bool, size: &str) -> Result<Exit, Failure> {
    let wrong = || {
        Failure::configuration(format!("{size}: it is no size"))
            .hint("such as 20G, or +5G to add to what it has, or -5G to take away")
    };
    let number = |text: &str| text.parse::<ByteSize>().map(ByteSize::bytes).map_err(|_| wrong());
    let now = || {
        let info = terem_block::info(&image.path, image.format);
        info.map(|info| info.virtual_size).map_err(|error| failed("read", &image.path, &error))
    };
    let new = match (size.strip_prefix('+'), size.strip_prefix('-')) {
        (Some(more), _) => now()?.checked_add(number(more)?).ok_or_else(wrong)?,
        (_, Some(less)) => now()?.checked_sub(number(less)?).ok_or_else(wrong)?,
        _ => number(size)?,
    };
    terem_block::resize(&image.path, image.format, new, shrink, Preallocation::Off).map_err(|error| {
        let failure = failed("resize", &image.path, &error);
        match error {
            OpenError::WouldShrink { .. } => failure.hint("--shrink allows it to become smaller"),
            _ => failure,
        }
    })?;
    Ok(Exit::Success)
}

fn qcow2_info(image: &Image) -> Result<Option<Qcow2Info>, Failure> {
    let info = terem_block::info(&image.path, image.format);
    Ok(info.map_err(|error| failed("read", &image.path, &error))?.qcow2)
}

fn snapshots(command: &SnapshotCommand) -> Result<Exit, Failure> {
    let act = |named: &Named, action| {
        snapshot(&named.image.path, named.image.format, action)
            .map_err(|error| failed("change the snapshots of", &named.image.path, &error))?;
        Ok(Exit::Success)
    };
    match command {
        SnapshotCommand::Create(named) => act(named, SnapshotAction::Create(&named.name)),
        SnapshotCommand::Apply(named) => act(named, SnapshotAction::Apply(&named.name)),
        SnapshotCommand::Delete(named) => act(named, SnapshotAction::Delete(&named.name)),
        SnapshotCommand::List { image, json } => {
            let snapshots = qcow2_info(image)?.map(|info| info.snapshots).unwrap_or_default();
            if *json {
                return print_json(&snapshots);
            }
            let lines = snapshots
                .iter()
                .map(|s| format!("{:<6} {:<30} {:>12} {}\n", s.id, s.name, human(s.virtual_size), s.date));
            let head = format!("{:<6} {:<30} {:>12} taken (seconds since 1970)\n", "id", "name", "disk size");
            print(&(head + &lines.collect::<String>()))
        }
    }
}

fn bitmaps(command: &BitmapCommand) -> Result<Exit, Failure> {
    let act = |named: &Named, action| {
        bitmap(&named.image.path, named.image.format, &named.name, &[action])
            .map_err(|error| failed("change the bitmaps of", &named.image.path, &error))?;
        Ok(Exit::Success)
    };
    match command {
        BitmapCommand::List { image, json } => {
            let bitmaps = qcow2_info(image)?.map(|info| info.bitmaps).unwrap_or_default();
            if *json {
                return print_json(&bitmaps);
            }
            let lines = bitmaps.iter().map(|b| {
                let state = if b.in_use {
                    "not consistent"
                } else if b.enabled {
                    "on"
                } else {
                    "off"
                };
                format!("{:<30} {:>12} {state}\n", b.name, ByteSize(b.granularity))
            });
            print(&lines.collect::<String>())
        }
        BitmapCommand::Add { named, granularity, disabled } => {
            act(named, BitmapAction::Add { granularity: granularity.bytes(), enabled: !disabled })
        }
        BitmapCommand::Remove(named) => act(named, BitmapAction::Remove),
        BitmapCommand::Clear(named) => act(named, BitmapAction::Clear),
        BitmapCommand::Enable(named) => act(named, BitmapAction::Enable),
        BitmapCommand::Disable(named) => act(named, BitmapAction::Disable),
        BitmapCommand::Merge { named, from, other } => {
            act(named, BitmapAction::Merge { image: from.as_deref(), bitmap: other })
        }
    }
}
