//! qemu-img's command line.

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Disk images, with the commands and options of qemu-img.
#[derive(Debug, Parser)]
#[command(name = "qemu-img", disable_version_flag = true, disable_help_subcommand = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Update format-specific options of the image.
    Amend(Amend),
    /// Run simple image benchmark.
    Bench(Bench),
    /// Perform modifications of the persistent bitmap in the image.
    Bitmap(Bitmap),
    /// Check basic image integrity.
    Check(Check),
    /// Commit image to its backing file.
    Commit(Commit),
    /// Check if two images have the same contents.
    Compare(Compare),
    /// Copy one image to another with optional format conversion.
    Convert(Box<Convert>),
    /// Create and format new image file.
    Create(Create),
    /// Copy input to output with optional format conversion.
    Dd(Dd),
    /// Display information about image.
    Info(Info),
    /// Dump image metadata.
    Map(Map),
    /// Calculate file size required for a new image.
    Measure(Measure),
    /// Change backing file of the image.
    Rebase(Rebase),
    /// Resize the image to the new size.
    Resize(Resize),
    /// List or manipulate snapshots within image.
    Snapshot(Snapshot),
}

/// What most commands take.
#[derive(Debug, Args)]
pub struct Common {
    #[arg(short = 'f', long)]
    pub format: Option<String>,
    #[arg(long, conflicts_with = "format")]
    pub image_opts: bool,
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[arg(short, long)]
    pub quiet: bool,
    #[arg(long)]
    pub object: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Amend {
    #[command(flatten)]
    pub common: Common,
    #[arg(short = 't', long)]
    pub cache: Option<String>,
    #[arg(short, long)]
    pub progress: bool,
    #[arg(long)]
    pub force: bool,
    #[arg(short, long, required = true)]
    pub options: Vec<String>,
    pub filename: Option<String>,
}

#[derive(Debug, Args)]
pub struct Bench {
    #[command(flatten)]
    pub common: Common,
    #[arg(short = 't', long)]
    pub cache: Option<String>,
    #[arg(short, long, default_value = "75000")]
    pub count: String,
    #[arg(short, long, default_value = "64")]
    pub depth: String,
    #[arg(short, long, default_value = "0")]
    pub offset: String,
    #[arg(short = 's', long, default_value = "4096")]
    pub buffer_size: String,
    #[arg(short = 'S', long, default_value = "0")]
    pub step_size: String,
    #[arg(short = 'i', long)]
    pub aio: Option<String>,
    #[arg(short, long)]
    pub native: bool,
    #[arg(short, long)]
    pub write: bool,
    #[arg(long, default_value = "0")]
    pub pattern: String,
    #[arg(long, default_value = "0")]
    pub flush_interval: String,
    #[arg(long)]
    pub no_drain: bool,
    pub filename: String,
}

#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools, reason = "qemu-img's flags")]
pub struct Bitmap {
    #[command(flatten)]
    pub common: Common,
    #[arg(long)]
    pub add: bool,
    #[arg(short, long)]
    pub granularity: Option<String>,
    #[arg(long)]
    pub remove: bool,
    #[arg(long)]
    pub clear: bool,
    #[arg(long)]
    pub enable: bool,
    #[arg(long)]
    pub disable: bool,
    #[arg(long)]
    pub merge: Vec<String>,
    #[arg(short = 'b', long)]
    pub source_file: Option<PathBuf>,
    #[arg(short = 'F', long)]
    pub source_format: Option<String>,
    pub filename: String,
    pub bitmap: String,
    /// What is to be done, in the order of the command line.
    #[arg(skip)]
    pub order: Vec<&'static str>,
}

impl Bitmap {
    /// Takes down the order of what was given.
    pub fn read_order(&mut self, matches: &clap::ArgMatches) {
        let given = |name| {
            let there = matches.value_source(name) == Some(clap::parser::ValueSource::CommandLine);
            let indices = matches.indices_of(name).into_iter().flatten();
            indices.filter(move |_| there).map(move |index| (index, name))
        };
        let mut order: Vec<(usize, &'static str)> =
            ["add", "remove", "clear", "enable", "disable", "merge"].into_iter().flat_map(given).collect();
        order.sort_unstable();
        self.order = order.into_iter().map(|(_, name)| name).collect();
    }
}

#[derive(Debug, Args)]
pub struct Check {
    #[command(flatten)]
    pub common: Common,
    #[arg(short = 'T', long)]
    pub cache: Option<String>,
    #[arg(short, long)]
    pub repair: Option<String>,
    #[arg(long, default_value = "human")]
    pub output: String,
    pub filename: String,
}

#[derive(Debug, Args)]
pub struct Commit {
    #[command(flatten)]
    pub common: Common,
    #[arg(short = 't', long)]
    pub cache: Option<String>,
    #[arg(short, long)]
    pub base: Option<PathBuf>,
    #[arg(short, long)]
    pub drop: bool,
    #[arg(short, long)]
    pub progress: bool,
    #[arg(short, long)]
    pub rate: Option<String>,
    pub filename: String,
}

#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools, reason = "qemu-img's flags")]
pub struct Compare {
    #[arg(short = 'f', long)]
    pub a_format: Option<String>,
    #[arg(short = 'F', long)]
    pub b_format: Option<String>,
    #[arg(long)]
    pub image_opts: bool,
    #[arg(short, long)]
    pub strict: bool,
    #[arg(short = 'T', long)]
    pub cache: Option<String>,
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[arg(short, long)]
    pub quiet: bool,
    #[arg(short, long)]
    pub progress: bool,
    #[arg(long)]
    pub object: Vec<String>,
    pub filename1: String,
    pub filename2: String,
}

#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools, reason = "qemu-img's flags")]
pub struct Convert {
    #[arg(short = 'f', long)]
    pub source_format: Option<String>,
    #[arg(long, alias = "source-image-opts")]
    pub image_opts: bool,
    #[arg(short = 'l', long)]
    pub source_snapshot: Option<String>,
    #[arg(short = 'T', long)]
    pub source_cache: Option<String>,
    #[arg(short = 'O', long)]
    pub target_format: Option<String>,
    #[arg(long)]
    pub target_image_opts: bool,
    #[arg(short = 'o', long)]
    pub target_options: Vec<String>,
    #[arg(short, long)]
    pub compress: bool,
    #[arg(short = 't', long)]
    pub target_cache: Option<String>,
    #[arg(short = 'B', long)]
    pub backing: Option<PathBuf>,
    #[arg(short = 'F', long)]
    pub backing_format: Option<String>,
    #[arg(short, long)]
    pub no_create: bool,
    #[arg(long)]
    pub target_is_zero: bool,
    #[arg(short = 'S', long)]
    pub sparse_size: Option<String>,
    #[arg(long)]
    pub bitmaps: bool,
    #[arg(long)]
    pub skip_broken_bitmaps: bool,
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[arg(short, long)]
    pub rate: Option<String>,
    #[arg(short = 'm', long)]
    pub parallel: Option<String>,
    #[arg(short = 'C', long)]
    pub copy_range_offloading: bool,
    #[arg(short = 'W', long)]
    pub oob_writes: bool,
    #[arg(long)]
    pub salvage: bool,
    #[arg(short, long)]
    pub quiet: bool,
    #[arg(short, long)]
    pub progress: bool,
    #[arg(long)]
    pub object: Vec<String>,
    #[arg(num_args = 0..)]
    pub filenames: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Create {
    #[command(flatten)]
    pub common: Common,
    #[arg(short, long)]
    pub options: Vec<String>,
    #[arg(short, long)]
    pub backing: Option<PathBuf>,
    #[arg(short = 'F', long)]
    pub backing_format: Option<String>,
    #[arg(short = 'u', long)]
    pub backing_unsafe: bool,
    pub filename: Option<String>,
    pub size: Option<String>,
}

#[derive(Debug, Args)]
pub struct Dd {
    #[arg(short = 'f', long)]
    pub format: Option<String>,
    #[arg(short = 'O', long, default_value = "raw")]
    pub output_format: String,
    #[arg(long)]
    pub image_opts: bool,
    #[arg(short = 'U', long)]
    pub force_share: bool,
    #[arg(long)]
    pub object: Vec<String>,
    pub operands: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Info {
    #[command(flatten)]
    pub common: Common,
    #[arg(short, long)]
    pub backing_chain: bool,
    #[arg(long, default_value = "human")]
    pub output: String,
    pub filename: String,
}

#[derive(Debug, Args)]
pub struct Map {
    #[command(flatten)]
    pub common: Common,
    #[arg(long, default_value = "human")]
    pub output: String,
    #[arg(short, long)]
    pub start_offset: Option<String>,
    #[arg(short = 'l', long)]
    pub max_length: Option<String>,
    pub filename: String,
}

#[derive(Debug, Args)]
pub struct Measure {
    #[command(flatten)]
    pub common: Common,
    #[arg(short = 'O', long, default_value = "raw")]
    pub target_format: String,
    #[arg(short, long)]
    pub options: Vec<String>,
    #[arg(short = 'l', long)]
    pub snapshot: Option<String>,
    #[arg(short, long)]
    pub size: Option<String>,
    #[arg(long, default_value = "human")]
    pub output: String,
    pub filename: Option<String>,
}

#[derive(Debug, Args)]
pub struct Rebase {
    #[command(flatten)]
    pub common: Common,
    #[arg(short = 't', long)]
    pub cache: Option<String>,
    #[arg(short = 'b', long)]
    pub backing: Option<String>,
    #[arg(short = 'F', long)]
    pub backing_format: Option<String>,
    #[arg(short = 'T', long)]
    pub backing_cache: Option<String>,
    #[arg(short = 'u', long)]
    pub backing_unsafe: bool,
    #[arg(short, long)]
    pub compress: bool,
    #[arg(short, long)]
    pub progress: bool,
    pub filename: String,
}

#[derive(Debug, Args)]
pub struct Resize {
    #[command(flatten)]
    pub common: Common,
    #[arg(long)]
    pub preallocation: Option<String>,
    #[arg(long)]
    pub shrink: bool,
    pub filename: String,
    #[arg(allow_hyphen_values = true)]
    pub size: String,
}

#[derive(Debug, Args)]
pub struct Snapshot {
    #[command(flatten)]
    pub common: Common,
    #[arg(short, long, group = "what")]
    pub list: bool,
    #[arg(short, long, group = "what")]
    pub create: Option<String>,
    #[arg(short, long, group = "what")]
    pub apply: Option<String>,
    #[arg(short, long, group = "what")]
    pub delete: Option<String>,
    pub filename: String,
}
