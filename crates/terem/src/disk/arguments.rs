//! The command line of `terem disk`.

use super::passphrase::Passphrases;
use clap::{Args, Subcommand, ValueEnum};
use std::path::PathBuf;
use terem_block::Format;
use terem_config::ByteSize;

const SERVE_EXAMPLES: &str = "\
Examples:
  terem disk serve --socket /run/disk.sock disk.qcow2
  terem disk serve --listen 0.0.0.0:10809 --tls /etc/pki/nbd --tls-verify --read-only a.qcow2 b.raw
  terem disk info 'nbd+unix:///?socket=/run/disk.sock'";

/// Disk images.
#[derive(Debug, Args)]
pub struct DiskArguments {
    #[command(flatten)]
    pub passphrases: Passphrases,
    /// What to do.
    #[command(subcommand)]
    pub command: DiskCommand,
}

/// Disk images.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Make an image.
    Create {
        #[command(flatten)]
        new: NewImage,
        /// Backing file, from which everything shows through that is not written.
        #[arg(long, value_name = "IMAGE", requires = "backing_format")]
        backing: Option<PathBuf>,
        /// Format of the backing file.
        #[arg(long, value_name = "FORMAT", requires = "backing", value_parser = image_format)]
        backing_format: Option<Format>,
        /// Its format.
        #[arg(long, default_value = "qcow2", value_parser = image_format)]
        format: Format,
        /// The image.
        path: PathBuf,
        /// Size of the disk, such as 20G. Not given: the backing file's.
        size: Option<ByteSize>,
    },
    /// Show what an image is.
    Info {
        #[command(flatten)]
        image: Image,
        /// Its backing files too.
        #[arg(long)]
        chain: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Check an image, and repair it if that is asked for.
    Check {
        #[command(flatten)]
        image: Image,
        /// What to repair. Not given: nothing is changed.
        #[arg(long, value_name = "WHAT")]
        repair: Option<RepairWhat>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Copy an image into another format. Zeroes take no space.
    ///
    /// Until the copy is complete the target does not exist, or is what it was before. `-` is standard input or output,
    /// as raw.
    Convert {
        /// Format of the source. Not given: read from the image.
        #[arg(long, value_name = "FORMAT", value_parser = image_format)]
        from: Option<Format>,
        /// Format of the target.
        #[arg(long, value_name = "FORMAT", default_value = "qcow2", value_parser = image_format)]
        to: Format,
        #[command(flatten)]
        new: NewImage,
        /// A snapshot inside the source, by id or name, in place of the disk as it is now.
        #[arg(long, value_name = "SNAPSHOT")]
        snapshot: Option<String>,
        /// Compress the data.
        #[arg(long)]
        compress: bool,
        /// Parts worked on at once.
        #[arg(long, value_name = "COUNT")]
        threads: Option<usize>,
        /// Open backing files wherever they are, not only beside the image.
        #[arg(long)]
        trust_backing: bool,
        /// Print what was made as JSON.
        #[arg(long)]
        json: bool,
        /// The image to copy.
        source: PathBuf,
        /// The image to make.
        target: PathBuf,
    },
    /// Make a disk larger or smaller.
    Resize {
        #[command(flatten)]
        image: Image,
        /// Allow it to become smaller: what is beyond the new size is lost.
        #[arg(long)]
        shrink: bool,
        /// The new size, such as 20G; or by how much it changes, such as +5G or -5G.
        #[arg(allow_hyphen_values = true, value_name = "[+|-]SIZE")]
        size: String,
    },
    /// Internal snapshots.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Persistent dirty bitmaps: what changed since a backup.
    #[command(subcommand)]
    Bitmap(BitmapCommand),
    /// Key slots of encrypted images.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Write what an image has of its own into its backing file.
    Commit {
        #[command(flatten)]
        image: Image,
        /// The image of its chain to write to. Not given: its backing file.
        #[arg(long, value_name = "IMAGE")]
        base: Option<PathBuf>,
        /// Let the image keep its data, too.
        #[arg(long)]
        keep: bool,
    },
    /// Let an image be continued by another backing file. The disk keeps its contents.
    Rebase {
        #[command(flatten)]
        image: Image,
        /// The new backing file. Not given: none.
        #[arg(long, value_name = "IMAGE", requires = "backing_format")]
        backing: Option<PathBuf>,
        /// Its format.
        #[arg(long, value_name = "FORMAT", requires = "backing", value_parser = image_format)]
        backing_format: Option<Format>,
        /// Only change the name, for a backing file that was moved: the contents change if it holds something else.
        #[arg(long)]
        r#unsafe: bool,
    },
    /// Show which parts of a disk hold data, and where.
    Map {
        #[command(flatten)]
        image: Image,
        /// As JSON, as `qemu-img map` prints it.
        #[arg(long)]
        json: bool,
        /// Draw it: into this SVG file, or on the terminal if none is named.
        #[arg(long, value_name = "FILE.svg", num_args = 0..=1, conflicts_with = "json")]
        picture: Option<Option<PathBuf>>,
    },
    /// Tell whether two disks hold the same.
    Compare {
        /// Format of the first. Not given: read from the image.
        #[arg(long, value_name = "FORMAT", value_parser = image_format)]
        format: Option<Format>,
        /// Format of the second.
        #[arg(long, value_name = "FORMAT", value_parser = image_format)]
        format2: Option<Format>,
        /// Their sizes and what has storage must be the same, too.
        #[arg(long)]
        strict: bool,
        /// One image.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// Tell how large a new image would become.
    Measure {
        /// Format of the new image.
        #[arg(long, value_name = "FORMAT", default_value = "qcow2", value_parser = image_format)]
        to: Format,
        /// A setting of the new image; can be repeated.
        #[arg(short, value_name = "NAME=VALUE")]
        options: Vec<String>,
        /// Size of an empty disk.
        #[arg(long, conflicts_with = "path")]
        size: Option<ByteSize>,
        /// Format of the source. Not given: read from the image.
        #[arg(long, value_parser = image_format)]
        format: Option<Format>,
        /// As JSON.
        #[arg(long)]
        json: bool,
        /// The image that it would be a copy of.
        #[arg(required_unless_present = "size")]
        path: Option<PathBuf>,
    },
    /// Tell how fast an image is: requests one place after the other.
    Bench {
        #[command(flatten)]
        image: Image,
        /// Requests.
        #[arg(long, default_value_t = 75_000)]
        count: u64,
        /// Requests under way at once.
        #[arg(long, default_value_t = 64)]
        depth: usize,
        /// Bytes of a request.
        #[arg(long, default_value = "4K")]
        size: ByteSize,
        /// From one request's beginning to the next's. Not given: a request's size.
        #[arg(long)]
        step: Option<ByteSize>,
        /// Write this byte, rather than read. Overwrites the disk.
        #[arg(long, value_name = "BYTE")]
        write: Option<u8>,
        /// Flush after so many writes.
        #[arg(long, default_value_t = 0)]
        flush_interval: u64,
        /// Past the host's page cache.
        #[arg(long)]
        direct: bool,
        /// Limits, as `terem run --disk` takes them: bps=20M,iops=500,iops-max=2000,iops-max-length=60 …
        #[arg(long, value_name = "LIMIT[,LIMIT…]")]
        throttle: Option<String>,
    },
    /// Serve images over NBD, the network block device protocol.
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(Box<super::serve::ServeArguments>),
}

/// Snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// List them.
    List {
        #[command(flatten)]
        image: Image,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Take one.
    Create(Named),
    /// Make the disk what it was then.
    Apply(Named),
    /// Forget one.
    Delete(Named),
}

/// Bitmaps.
#[derive(Debug, Subcommand)]
pub enum BitmapCommand {
    /// List them.
    List {
        #[command(flatten)]
        image: Image,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Add an empty one that follows writes.
    Add {
        #[command(flatten)]
        named: Named,
        /// Bytes that a bit stands for.
        #[arg(long, default_value = "64K", value_name = "SIZE")]
        granularity: ByteSize,
        /// Let it not follow writes.
        #[arg(long)]
        disabled: bool,
    },
    /// Remove one.
    Remove(Named),
    /// Clear all its bits.
    Clear(Named),
    /// Let it follow writes from now on.
    Enable(Named),
    /// Let it stay as it is from now on.
    Disable(Named),
    /// Add another one's bits to it.
    Merge {
        #[command(flatten)]
        named: Named,
        /// The image that has the other one, if it is not the same.
        #[arg(long, value_name = "IMAGE")]
        from: Option<PathBuf>,
        /// The other one.
        other: String,
    },
}

/// Key slots. Each has a passphrase, and each of them opens the image.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// List those in use.
    List {
        #[command(flatten)]
        image: Image,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Add one: --passphrase opens the image, --new-passphrase is added.
    Add {
        #[command(flatten)]
        image: Image,
        /// Its number. Not given: the first that is free.
        #[arg(long)]
        slot: Option<usize>,
        #[command(flatten)]
        cost: KeyCost,
    },
    /// Remove one: the one that --passphrase opens, or by its number where --passphrase opens another.
    Remove {
        #[command(flatten)]
        image: Image,
        /// Its number.
        #[arg(long)]
        slot: Option<usize>,
    },
    /// Give the one that --passphrase opens the --new-passphrase.
    Change {
        #[command(flatten)]
        image: Image,
        /// Its number, where several have that passphrase.
        #[arg(long)]
        slot: Option<usize>,
        #[command(flatten)]
        cost: KeyCost,
    },
}

/// What a guess at a new passphrase costs.
#[derive(Debug, Default, Args)]
pub struct KeyCost {
    /// Milliseconds on this machine. Not given: 2000.
    #[arg(long, value_name = "MILLISECONDS", conflicts_with = "iterations",
          value_parser = clap::value_parser!(u64).range(1..=600_000))]
    pub iter_time: Option<u64>,
    /// Iterations of PBKDF2.
    #[arg(long, value_name = "COUNT")]
    pub iterations: Option<u32>,
}

/// An image, and something in it.
#[derive(Debug, Args)]
pub struct Named {
    #[command(flatten)]
    pub image: Image,
    /// The name.
    pub name: String,
}

/// An image that is there.
#[derive(Debug, Args)]
pub struct Image {
    /// Its format. Not given: read from the image.
    #[arg(long, value_parser = image_format)]
    pub format: Option<Format>,
    /// The image.
    pub path: PathBuf,
}

/// Settings of an image that is made.
#[derive(Debug, Args)]
pub struct NewImage {
    /// A setting of the format; can be repeated. `-o help` lists them.
    #[arg(short, value_name = "NAME=VALUE")]
    pub options: Vec<String>,
    /// Size of a qcow2 cluster; the same as `-o cluster_size`.
    #[arg(long, value_name = "SIZE", default_value = "64K")]
    pub cluster_size: ByteSize,
    /// Replace a file that is there.
    #[arg(long)]
    pub overwrite: bool,
}

/// What to repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RepairWhat {
    /// Lost space.
    Leaks,
    /// Everything.
    All,
}

/// A format by one of its names.
pub fn image_format(name: &str) -> Result<Format, String> {
    Format::from_name(name).ok_or_else(|| {
        let names: Vec<_> = Format::all().map(Format::name).collect();
        format!("one of {}", names.join(", "))
    })
}
