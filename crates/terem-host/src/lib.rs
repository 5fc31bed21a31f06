//! This host: what it is and what a machine can be given of it.
//!
//! [`HostInventory::read`] looks once, at the files of `/proc` and `/sys`, and gives plain data; [`KvmProbe::run`] tries
//! what `/dev/kvm` is worth. Reading changes nothing.
#![deny(unsafe_code)] // one block in `kvm` hands memory to the kernel, one in `cpuid` is the instruction; nothing else needs any

mod cpuid;
mod inventory;
mod kvm;
mod placement;
mod runtime_dir;

pub use cpuid::{KvmCpuid, cpuid};
pub use inventory::{HostInventory, HugePages, IoUring, NumaNode, parse_list};
pub use kvm::{KvmProbe, KvmVerdict};
pub use placement::Placement;
pub use runtime_dir::{RuntimeDirError, runtime_dir};
