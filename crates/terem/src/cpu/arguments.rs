//! The command line of `terem cpu`.

use clap::{Args, Subcommand, ValueEnum};

/// Arguments of `terem cpu`.
#[derive(Debug, Args)]
pub struct CpuArguments {
    /// What to do.
    #[command(subcommand)]
    pub command: CpuCommand,
}

/// What there is to do with CPU models.
#[derive(Debug, Subcommand)]
pub enum CpuCommand {
    /// List the models, and which of them this host can run.
    Models {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what a guest sees of a model, and what of it this host can give.
    Show {
        /// The model, with features switched on and off as for `terem run --cpu`; or a file that `terem cpu host --json` has
        /// written.
        #[arg(value_name = "MODEL[,±FLAG…]|HOST.json")]
        model: String,
        /// The vCPUs and their topology, as for `terem run --cpus`.
        #[arg(long, value_name = "COUNT[,sockets=…]", default_value = "1")]
        cpus: String,
        /// The leaves that CPUID answers to the guest as well, on vCPU 0.
        #[arg(long)]
        leaves: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Find the largest CPU that all of these hosts can run, for guests that are moved between them.
    Baseline {
        /// Files that `terem cpu host --json` has written, one on each host.
        #[arg(required = true, value_name = "HOST.json")]
        hosts: Vec<String>,
        /// The accelerator that runs the guests. Not given: KVM if all hosts have it, else the software CPU.
        #[arg(long)]
        accel: Option<Accelerator>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show in what two CPUs differ.
    Compare {
        /// One: a model, or a file that `terem cpu host --json` has written.
        #[arg(value_name = "MODEL[,±FLAG…]|HOST.json")]
        one: String,
        /// The other.
        #[arg(value_name = "MODEL[,±FLAG…]|HOST.json")]
        other: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show this host's processor, and what each accelerator can give of it.
    Host {
        /// As JSON, for the other commands on this or another host.
        #[arg(long)]
        json: bool,
    },
}

/// An accelerator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Accelerator {
    /// KVM.
    Kvm,
    /// The software CPU.
    Soft,
}
