//! The command line.

use crate::cpu::arguments::CpuArguments;
use crate::disk::arguments::DiskArguments;
use crate::exit;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Virtual machines with or without hardware virtualisation.
#[derive(Debug, Parser)]
#[command(name = "terem", version, after_help = EXAMPLES)]
pub struct Arguments {
    /// How much is logged to standard error: error, warn, info, debug, trace, or a list of module=level.
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL")]
    pub log: String,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  terem run --kernel vmlinuz --initrd initrd.img --cmdline 'root=/dev/vda console=ttyS0' debian.qcow2
  terem run --cpus 4 --memory 4G --net user,forward=tcp:2222:22 machine.toml
  terem run --name web --detach machine.toml && terem console web";

/// What there is to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a machine.
    #[command(after_long_help = exit_codes())]
    Run(Box<RunArguments>),
    /// List the running machines.
    Ps {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show everything about a running machine, as JSON.
    Inspect {
        /// The machine.
        name: String,
    },
    /// Stop a machine: by its power button, and by force if it is still there after a while.
    Stop {
        /// The machine.
        name: String,
        /// How long the guest may take to shut down, in seconds.
        #[arg(long, default_value_t = 30, value_name = "SECONDS")]
        timeout: u64,
        /// At once and by force, as if its plug were pulled.
        #[arg(long)]
        force: bool,
    },
    /// Show what a machine's vCPUs have done, in numbers.
    Stat {
        /// The machine.
        name: String,
        /// Count for so many seconds, and show how often in a second things happened.
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
        interval: Option<u64>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Attach this terminal to a machine's console; Ctrl-a x leaves it.
    Console {
        /// The machine.
        name: String,
    },
    /// Machine files.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Disk images.
    Disk(DiskArguments),
    /// Disk images, with qemu-img's own commands and options.
    #[command(name = "qemu-img", disable_help_flag = true)]
    QemuImg {
        /// As for qemu-img.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<std::ffi::OsString>,
    },
    /// CPU models: what guests see of them, and which hosts can run them.
    Cpu(CpuArguments),
    /// Show what this host can give to machines.
    Host {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Machine files.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the JSON schema of machine files.
    Schema {
        /// The schema of the control socket's protocol instead.
        #[arg(long)]
        control: bool,
    },
    /// Check a machine file, telling every mistake.
    Check {
        /// The file.
        file: PathBuf,
    },
    /// Print docs/run.md.
    #[command(hide = true)]
    Reference,
}

/// Arguments of `terem run`.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// A disk image, which becomes the first disk; or a machine file, if the name ends in .toml.
    ///
    /// Flags go before what a machine file says: single values replace the file's, --disk adds disks after the file's,
    /// --net replaces all network interfaces of the file.
    #[arg(value_name = "DISK|MACHINE.toml")]
    pub machine: Option<PathBuf>,
    /// Name of the machine, unique among the running ones.
    #[arg(long)]
    pub name: Option<String>,
    /// Number of vCPUs, and their topology.
    #[arg(long, value_name = "COUNT[,sockets=…]")]
    pub cpus: Option<String>,
    /// A NUMA node of the guest; repeated for each node.
    #[arg(long, value_name = "CPUS,memory=SIZE[,…]")]
    pub numa: Vec<String>,
    /// Memory, such as 512M or 4G.
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// CPU model, with features switched on and off.
    #[arg(long, value_name = "MODEL[,±FLAG…]")]
    pub cpu: Option<String>,
    /// What runs the guest's instructions.
    #[arg(long, value_name = "auto|kvm|soft[,…]")]
    pub accel: Option<String>,
    /// A disk; can be repeated.
    #[arg(long, value_name = "PATH[,format=…]")]
    pub disk: Vec<String>,
    /// A network interface; can be repeated.
    #[arg(long, value_name = "user|tap=NAME|none[,…]")]
    pub net: Vec<String>,
    /// A Linux, PVH or multiboot kernel, booted directly.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Command line of the kernel.
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// Where the first serial port goes: stdio, none, pty, file:PATH or socket:PATH.
    #[arg(long, value_name = "WHERE")]
    pub serial: Option<String>,
    /// Where a virtio console goes: stdio, none, pty, file:PATH or socket:PATH.
    #[arg(long, value_name = "WHERE")]
    pub virtio_console: Option<String>,
    /// Whether the guest gets an entropy device.
    #[arg(long, value_name = "on|off", num_args = 0..=1, default_missing_value = "on")]
    pub rng: Option<Switch>,
    /// Where gdb can connect; with `wait` the guest stands still until it lets it go on.
    #[arg(long, value_name = "[HOST:]PORT|unix:PATH[,wait]")]
    pub gdb: Option<String>,
    /// Write down what the vCPUs do; can be repeated.
    #[arg(long, value_name = "instructions|interrupts|exits[,file=…]")]
    pub trace: Vec<String>,
    /// End where the guest would reset the machine.
    #[arg(long)]
    pub no_reboot: bool,
    /// Print the machine as a machine file, and do not run it.
    #[arg(long)]
    pub print_config: bool,
    /// Print where everything of the machine goes, and do not run it.
    #[arg(long)]
    pub plan: bool,
    /// What is printed is JSON: the configuration, the plan, the detached machine, or (on standard error) how it ended.
    #[arg(long)]
    pub json: bool,
    /// Run in the background; returns when the guest runs.
    #[arg(long)]
    pub detach: bool,
    /// This process is the background one: standard output leads to the waiting parent.
    #[arg(long, hide = true)]
    pub detached: bool,
}

/// A switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

fn exit_codes() -> String {
    let lines = exit::DESCRIPTIONS.map(|(code, text)| format!("  {code:>3}  {text}\n"));
    format!(
        "Exit codes:\n{}\nOn a terminal: Ctrl-a x ends the machine, Ctrl-a h helps, Ctrl-a Ctrl-a sends Ctrl-a.",
        lines.concat()
    )
}
