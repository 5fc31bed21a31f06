//! Disks.

use crate::error::{ConfigError, quote};
use crate::key_value::{KeyValue, OrText, one};
use crate::passphrase::ImagePassphrase;
use crate::throttle::ThrottleConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Most virtio queues of one disk: more than any guest's CPUs use at a time, less than the MSI-X table holds.
const MAX_QUEUES: u16 = 64;

/// Length of the identification string of a virtio disk (virtio 1.2, 5.2.6.1: `VIRTIO_BLK_T_GET_ID`), in bytes.
const SERIAL_LENGTH: usize = 20;

/// A disk of the guest, in order `/dev/vda`, `/dev/vdb` … `--disk path,format=raw,readonly`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The image file or block device (main key).
    pub path: PathBuf,
    /// The image's format. `probe` reads it from the image; one found to be raw so is kept from becoming another format.
    #[serde(default)]
    pub format: DiskFormat,
    /// Whether the guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// How the host's page cache is used.
    #[serde(default)]
    pub cache: CacheMode,
    /// What becomes of blocks the guest discards.
    #[serde(default)]
    pub discard: DiscardMode,
    /// How I/O is done.
    #[serde(default)]
    pub aio: AioMode,
    /// Number of virtio queues. Not given: one for each vCPU, up to 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Serial number the guest reads, up to 20 characters (`/dev/disk/by-id/virtio-…`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Whether the image is locked against other programs, with the same locks that QEMU takes.
    #[serde(default = "on")]
    pub locking: bool,
    /// A directory in which backing files may be opened besides the image's own; can be repeated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<PathBuf>,
    /// Whether writes go to a temporary overlay which is thrown away at the end.
    #[serde(default)]
    pub snapshot: bool,
    /// Where the passphrase of an encrypted image comes from: `file:PATH` (all its bytes), `fd:NUMBER` (an inherited
    /// descriptor), or `ask` (the terminal); never the passphrase itself. With `IMAGE=` before it for that image of the
    /// chain only; can be repeated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passphrase: Vec<ImagePassphrase>,
    /// A file with the image's LUKS header, where that is not in the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub luks_header: Option<PathBuf>,
    /// What the disk may do in a second. In the flag's form its keys stand beside the others: `bps=20M,iops=500`.
    #[serde(default, deserialize_with = "one", skip_serializing_if = "ThrottleConfig::is_none")]
    #[schemars(with = "OrText<ThrottleConfig>")]
    pub throttle: ThrottleConfig,
    /// A name: disks with the same one share the limits, which are given at one of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle_group: Option<String>,
}

fn on() -> bool {
    true
}

/// Format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// Read from the image.
    #[default]
    Probe,
    /// The bytes of the disk as they are.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
    /// Linux' encrypted format, version 1 or 2.
    Luks,
    /// VMware's format.
    Vmdk,
    /// VirtualBox's format.
    Vdi,
    /// The format of Virtual PC and Hyper-V.
    #[serde(alias = "vhd")]
    Vpc,
    /// Hyper-V's format.
    Vhdx,
}

/// How the host's page cache is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// Through the page cache; the guest's flush reaches the disk.
    #[default]
    Writeback,
    /// Around the page cache (`O_DIRECT`); the guest's flush reaches the disk.
    None,
    /// Through the page cache; the guest's flush is ignored: fast, and lost when the host loses power.
    Unsafe,
}

/// What becomes of blocks that the guest discards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiscardMode {
    /// Their space is given back.
    #[default]
    Unmap,
    /// Nothing.
    Ignore,
}

/// How I/O is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AioMode {
    /// `io_uring` if the kernel lets us, threads otherwise.
    #[default]
    Auto,
    /// The kernel's `io_uring`.
    IoUring,
    /// A pool of threads.
    Threads,
}

impl DiskConfig {
    /// The disk in `path`, everything else as usual.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: DiskFormat::default(),
            readonly: false,
            cache: CacheMode::default(),
            discard: DiscardMode::default(),
            aio: AioMode::default(),
            queues: None,
            serial: None,
            locking: true,
            backing: Vec::new(),
            snapshot: false,
            passphrase: Vec::new(),
            luks_header: None,
            throttle: ThrottleConfig::default(),
            throttle_group: None,
        }
    }

    pub(crate) fn validate(&self, key: &str, errors: &mut Vec<ConfigError>) {
        if self.path.as_os_str().is_empty() {
            errors.push(ConfigError::value(
                format!("{key}.path"),
                "\"\"",
                "it is empty",
                "the path of an image",
            ));
        }
        if let Some(queues) = self.queues.filter(|queues| !(1..=MAX_QUEUES).contains(queues)) {
            errors.push(ConfigError::value(
                format!("{key}.queues"),
                queues,
                "a disk cannot have so many queues",
                format!("1 to {MAX_QUEUES}"),
            ));
        }
        if let Some(serial) = &self.serial
            && (serial.len() > SERIAL_LENGTH || !serial.bytes().all(|b| (b' '..0x7f).contains(&b)))
        {
            errors.push(ConfigError::value(
                format!("{key}.serial"),
                quote(serial),
                "the guest cannot be given such a serial number",
                format!("up to {SERIAL_LENGTH} printable ASCII characters"),
            ));
        }
        if self.snapshot && self.readonly {
            errors.push(ConfigError::value(
                format!("{key}.snapshot"),
                true,
                "a read-only disk has no writes to throw away",
                "either `snapshot` or `readonly`",
            ));
        }
        if self.throttle_group.as_ref().is_some_and(String::is_empty) {
            let key = format!("{key}.throttle_group");
            errors.push(ConfigError::value(key, "\"\"", "it is empty", "a name"));
        }
        self.throttle.validate(&format!("{key}.throttle"), errors);
    }
}

impl KeyValue for DiskConfig {
    const MAIN_KEY: &'static str = "path";
    const INNER: Option<(&'static str, &'static [&'static str])> = Some(("throttle", &["bps", "iops"]));
}
