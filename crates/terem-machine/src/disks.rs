//! Disk images behind virtio-blk, opened as configured.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use terem_block::{
    AioEngine, BackingFile, BackingPolicy, BlockBackend, Cache, CreateOptions, Disk, EncryptionOptions,
    Format, Keys, OpenError, OpenOptions, Passphrase, Rate, Rates, ThrottleError, ThrottleGroup,
    ThrottleLimits, Throttled,
};
use terem_config::{AioMode, CacheMode, DiscardMode, DiskConfig, DiskFormat, ThrottleConfig};

use crate::plan::DiskPlan;

/// The reason with the disk's path before it, unless it begins with that itself.
fn named(path: &Path, source: &OpenError) -> String {
    let (path, reason) = (path.display().to_string(), source.to_string());
    if reason.starts_with(&format!("{path}: ")) { reason } else { format!("{path}: {reason}") }
}

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image.
    #[error("disk {}", named(path, source))]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why not.
        source: OpenError,
    },
    /// The overlay of a disk whose changes are thrown away.
    #[error("disk {}: cannot make a temporary overlay: {source}", path.display())]
    Overlay {
        /// The image's path.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Its limits.
    #[error("disk {}: {source}", path.display())]
    Limits {
        /// The image's path.
        path: PathBuf,
        /// What is wrong with them.
        source: ThrottleError,
    },
}

/// An open disk.
pub(crate) struct OpenDisk {
    /// The image.
    pub(crate) disk: Arc<Disk>,
    /// What its device talks to: the image, behind its limits if it has some.
    pub(crate) backend: Arc<dyn BlockBackend>,
}

/// Opens the disks of a plan. `keys` has the passphrases of each, as far as it goes.
pub(crate) fn open_all(plans: &[DiskPlan], keys: Vec<Keys>) -> Result<Vec<OpenDisk>, DiskError> {
    let (mut groups, mut keys) = (HashMap::new(), keys.into_iter());
    let mut open = |plan: &DiskPlan| {
        let disk = open(&plan.config, keys.next().unwrap_or_default())?;
        let limits = throttle_limits(&plan.throttle);
        if limits.is_none() {
            return Ok(OpenDisk { backend: Arc::clone(&disk) as _, disk });
        }
        let new = || {
            let failed = |source| DiskError::Limits { path: plan.config.path.clone(), source };
            ThrottleGroup::new(limits).map_err(failed)
        };
        let group = match &plan.config.throttle_group {
            None => new()?,
            Some(name) => match groups.get(name) {
                Some(group) => ThrottleGroup::clone(group),
                None => groups.entry(name.clone()).or_insert(new()?).clone(),
            },
        };
        Ok(OpenDisk { backend: Arc::new(Throttled::new(Arc::clone(&disk) as _, &group)), disk })
    };
    plans.iter().map(&mut open).collect()
}

/// The limits of a configuration, as the block layer has them.
#[must_use]
pub fn throttle_limits(config: &ThrottleConfig) -> ThrottleLimits {
    let rates = |limits: [terem_config::Limit; 3]| {
        let [total, read, write] = limits.map(|(average, max, seconds)| Rate {
            average: average.unwrap_or(0),
            max: max.unwrap_or(0),
            seconds: seconds.map_or(1, u64::from),
        });
        Rates { total, read, write }
    };
    ThrottleLimits {
        bytes: rates(config.bytes()),
        operations: rates(config.operations()),
        operation_size: config.iops_size.map_or(0, terem_config::ByteSize::bytes),
    }
}

fn options(config: &DiskConfig, keys: Keys) -> OpenOptions {
    OpenOptions {
        format: match config.format {
            DiskFormat::Probe => None,
            DiskFormat::Raw => Some(Format::Raw),
            DiskFormat::Qcow2 => Some(Format::Qcow2),
            DiskFormat::Luks => Some(Format::Luks),
            DiskFormat::Vmdk => Some(Format::Vmdk),
            DiskFormat::Vdi => Some(Format::Vdi),
            DiskFormat::Vpc => Some(Format::Vhd),
            DiskFormat::Vhdx => Some(Format::Vhdx),
        },
        read_only: config.readonly,
        cache: match config.cache {
            CacheMode::Writeback => Cache::Writeback,
            CacheMode::None => Cache::Direct,
            CacheMode::Unsafe => Cache::Unsafe,
        },
        discard: config.discard == DiscardMode::Unmap,
        backing: match config.backing.as_slice() {
            [] => BackingPolicy::SameDirectory,
            allowed => BackingPolicy::Allow(allowed.to_vec()),
        },
        aio: match config.aio {
            AioMode::Auto => AioEngine::Auto,
            AioMode::IoUring => AioEngine::IoUring,
            AioMode::Threads => AioEngine::Threads,
        },
        lock: config.locking,
        keys,
        ..OpenOptions::default()
    }
}

/// Opens a disk.
fn open(config: &DiskConfig, mut keys: Keys) -> Result<Arc<Disk>, DiskError> {
    let failed = |source| DiskError::Open { path: config.path.clone(), source };
    if let Some(header) = &config.luks_header {
        keys.set_header(&config.path, header);
    }
    if config.snapshot {
        overlay(config, keys)
    } else {
        Disk::open(&config.path, &options(config, keys)).map(Arc::new).map_err(failed)
    }
}

/// Opens a temporary qcow2 image on top of the disk. Its name is removed at once: the storage goes with the
/// last descriptor, however this process ends. What is written over an encrypted disk is encrypted there too.
fn overlay(config: &DiskConfig, mut keys: Keys) -> Result<Arc<Disk>, DiskError> {
    let path = || config.path.clone();
    let open = |source| DiskError::Open { path: path(), source };
    let host = |source| DiskError::Overlay { path: path(), source };
    let base = if terem_block::is_address(&config.path) {
        config.path.clone()
    } else {
        std::fs::canonicalize(&config.path).map_err(host)?
    };
    let below = OpenOptions { read_only: true, ..options(config, keys.clone()) };
    // Opened once to learn the format by the same rules as always.
    let format = match below.format {
        Some(format) => format,
        None => Disk::open(&base, &below).map_err(open)?.facts().format,
    };
    let dir = OverlayDir::new().map_err(host)?;
    let file = dir.0.join("overlay.qcow2");
    let backing = Some(BackingFile { path: base.clone(), format });
    let mut create = CreateOptions { backing, ..CreateOptions::default() };
    if !keys.is_empty() {
        let random = Passphrase::random().map_err(|e| host(std::io::Error::other(e)))?;
        create.keys = Keys::every(random.clone());
        create.qcow2.encrypted = true;
        create.encryption = EncryptionOptions::throw_away();
        keys.set(&file, random);
    }
    terem_block::create(&file, &create).map_err(open)?;
    let mut allowed = config.backing.clone();
    allowed.push(base);
    let above = OpenOptions {
        format: Some(Format::Qcow2),
        read_only: false,
        backing: BackingPolicy::Allow(allowed),
        // Nothing of it is to outlive a crash.
        cache: Cache::Unsafe,
        ..options(config, keys)
    };
    Disk::open(&file, &above).map(Arc::new).map_err(open)
}

/// A directory of this process' own, removed when dropped.
struct OverlayDir(PathBuf);

impl OverlayDir {
    fn new() -> std::io::Result<Self> {
        // Overlays may become large, and /tmp may be memory.
        let base = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let base: &Path = if base.is_dir() { &base } else { Path::new("/tmp") };
        for attempt in 0..1000 {
            let path = base.join(format!("terem-{}-{attempt}", std::process::id()));
            let made =
                std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&path);
            match made {
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                made => return made.map(|()| Self(path)),
            }
        }
        Err(std::io::ErrorKind::AlreadyExists.into())
    }
}

impl Drop for OverlayDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{HostInventory, Plan};
    use terem_block::{AlignedBuffer, IoMemory, Op, Request};
    use terem_config::{MachineConfig, from_key_values};

    /// The disks of a machine with these `--disk` flags.
    fn plan(disks: &[&str]) -> Vec<DiskPlan> {
        let config = MachineConfig {
            kernel: Some("k".into()),
            disks: disks.iter().map(|text| from_key_values(text).unwrap()).collect(),
            ..MachineConfig::default()
        };
        config.validate().unwrap();
        Plan::new(&config, &HostInventory::here()).unwrap().disks
    }

    fn secret(text: &str) -> Passphrase {
        Passphrase::new(text.as_bytes().to_vec())
    }

    /// An encrypted image of 1 MiB; its data are zeroes.
    fn encrypted(path: &Path, format: Format, passphrase: &str) {
        let mut create = CreateOptions { format, size: Some(1 << 20), ..CreateOptions::default() };
        create.keys = Keys::every(secret(passphrase));
        create.encryption = EncryptionOptions::throw_away();
        create.qcow2.encrypted = format == Format::Qcow2;
        terem_block::create(path, &create).unwrap();
        let options = OpenOptions { keys: create.keys, ..OpenOptions::default() };
        let disk = Disk::open(path, &options).unwrap();
        disk.run(Op::WriteZeroes { offset: 0, length: 1 << 20, unmap: false }).unwrap();
        disk.close().unwrap();
    }

    fn open_one(flag: &str, keys: Keys) -> Result<OpenDisk, DiskError> {
        open_all(&plan(&[flag]), vec![keys]).map(|mut disks| disks.remove(0))
    }

    fn write(disk: &OpenDisk, byte: u8) {
        disk.disk
            .run(Op::Write { offset: 4096, memory: Arc::new(AlignedBuffer::from_slice(&[byte; 4096])) })
            .unwrap();
    }

    fn read(disk: &OpenDisk) -> Vec<u8> {
        let memory = Arc::new(AlignedBuffer::from_slice(&[1; 4096]));
        disk.disk.run(Op::Read { offset: 4096, memory: Arc::clone(&memory) as Arc<dyn IoMemory> }).unwrap();
        memory.to_vec()
    }

    #[test]
    fn encrypted_images_are_opened_with_their_passphrases_and_only_so() {
        let dir = tempfile::tempdir().unwrap();
        for (name, format) in [("a.luks", Format::Luks), ("a.qcow2", Format::Qcow2)] {
            let path = dir.path().join(name);
            let flag = path.display().to_string();
            encrypted(&path, format, "right");
            let disk = open_one(&flag, Keys::every(secret("right"))).unwrap();
            assert_eq!((read(&disk), disk.disk.facts().format), (vec![0; 4096], format));
            write(&disk, 7);
            drop(disk);
            let disk = open_one(&flag, Keys::every(secret("right"))).unwrap();
            assert_eq!(read(&disk), [7; 4096]);
            drop(disk);
            let Err(error) = open_one(&flag, Keys::default()) else { panic!("{name} needs no passphrase") };
            let needs = OpenError::NeedsPassphrase { path: path.clone() };
            assert_eq!(error.to_string(), format!("disk {needs}"));
            let Err(error) = open_one(&flag, Keys::every(secret("wrong"))) else {
                panic!("{name}: any opens it")
            };
            assert!(error.to_string().contains("opens none of its key slots"), "{error}");
        }
    }

    #[test]
    fn each_disk_and_each_image_of_a_chain_has_its_own_passphrase() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        encrypted(&at("base.luks"), Format::Luks, "base");
        encrypted(&at("second.luks"), Format::Luks, "second");
        let backing = Some(BackingFile { path: "base.luks".into(), format: Format::Luks });
        let mut create = CreateOptions { backing, size: Some(1 << 20), ..CreateOptions::default() };
        create.keys = Keys::every(secret("top"));
        create.qcow2.encrypted = true;
        create.encryption = EncryptionOptions::throw_away();
        terem_block::create(at("top.qcow2"), &create).unwrap();
        let flags = [at("top.qcow2").display().to_string(), at("second.luks").display().to_string()];
        let plans = plan(&[&flags[0], &flags[1]]);
        let mut first = Keys::every(secret("top"));
        first.set(at("base.luks"), secret("base"));
        let disks = open_all(&plans, vec![first, Keys::every(secret("second"))]).unwrap();
        assert!(disks.iter().all(|disk| read(disk) == [0; 4096]));
        drop(disks);
        let swapped = vec![Keys::every(secret("second")), Keys::every(secret("top"))];
        assert!(open_all(&plans, swapped).is_err());
    }

    #[test]
    fn what_is_thrown_away_of_an_encrypted_disk_is_encrypted_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.luks");
        encrypted(&path, Format::Luks, "right");
        let flag = format!("{},snapshot", path.display());
        let disk = open_one(&flag, Keys::every(secret("right"))).unwrap();
        write(&disk, 7);
        disk.disk.run(Op::Flush).unwrap();
        assert_eq!((read(&disk), disk.disk.facts().format), (vec![7; 4096], Format::Qcow2));
        // The overlay has no name any more, but this process has it open.
        let overlay = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .map(|fd| fd.unwrap().path())
            .find(|fd| {
                std::fs::read_link(fd).is_ok_and(|to| {
                    let to = to.display().to_string();
                    to.contains(&format!("terem-{}-", std::process::id())) && to.contains("overlay.qcow2")
                })
            })
            .unwrap();
        let bytes = std::fs::read(overlay).unwrap();
        assert!(bytes.len() > 64 << 10 && !bytes.windows(512).any(|part| part == [7; 512]));
        drop(disk);
        let disk = open_one(&path.display().to_string(), Keys::every(secret("right"))).unwrap();
        assert_eq!(read(&disk), [0; 4096]);
    }

    #[test]
    fn disks_of_a_group_share_its_limits() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["a", "b", "c", "d"].map(|name| dir.path().join(name));
        for path in &names {
            std::fs::write(path, vec![0; 1 << 20]).unwrap();
        }
        let [a, b, c, d] = names.map(|path| format!("{},format=raw", path.display()));
        let flags =
            [format!("{a},bps=4,throttle-group=g"), format!("{b},throttle-group=g"), format!("{c},bps=4"), d];
        let disks = open_all(&plan(&flags.each_ref().map(String::as_str)), Vec::new()).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let submit = |number: usize| {
            let (tell, memory) = (tell.clone(), Arc::new(AlignedBuffer::from_slice(&[3; 512])));
            let op = Op::Write { offset: 0, memory };
            disks[number].backend.submit(Request::new(op, move |result| drop(tell.send((number, result)))));
        };
        // The first one goes, the others wait for two minutes: those of its own disk, and those of the group.
        submit(0);
        assert_eq!(told.recv().unwrap(), (0, Ok(())));
        submit(1);
        submit(0);
        for number in [2, 3, 3] {
            submit(number);
            assert_eq!(told.recv().unwrap(), (number, Ok(())));
        }
        disks[1].backend.drain();
        assert_eq!(told.try_recv().unwrap(), (1, Ok(())));
        assert!(told.try_recv().is_err());
        disks[0].backend.drain();
        assert_eq!(told.try_recv().unwrap(), (0, Ok(())));
    }
}
