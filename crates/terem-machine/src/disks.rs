//! Disk images behind virtio-blk, opened as configured.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use terem_block::{
    AioEngine, BackingFile, BackingPolicy, Cache, CreateOptions, Disk, Format, OpenError, OpenOptions,
};
use terem_config::{AioMode, CacheMode, DiscardMode, DiskConfig, DiskFormat};

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
}

fn options(config: &DiskConfig) -> OpenOptions {
    OpenOptions {
        format: match config.format {
            DiskFormat::Probe => None,
            DiskFormat::Raw => Some(Format::Raw),
            DiskFormat::Qcow2 => Some(Format::Qcow2),
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
        ..OpenOptions::default()
    }
}

/// Opens a disk.
pub(crate) fn open(config: &DiskConfig) -> Result<Arc<Disk>, DiskError> {
    let failed = |source| DiskError::Open { path: config.path.clone(), source };
    if config.snapshot {
        overlay(config)
    } else {
        Disk::open(&config.path, &options(config)).map(Arc::new).map_err(failed)
    }
}

/// Opens a temporary qcow2 image on top of the disk. Its name is removed at once: the storage goes with the
/// last descriptor, however this process ends.
fn overlay(config: &DiskConfig) -> Result<Arc<Disk>, DiskError> {
    let path = || config.path.clone();
    let open = |source| DiskError::Open { path: path(), source };
    let host = |source| DiskError::Overlay { path: path(), source };
    let base = if terem_block::is_address(&config.path) {
        config.path.clone()
    } else {
        std::fs::canonicalize(&config.path).map_err(host)?
    };
    let below = OpenOptions { read_only: true, ..options(config) };
    // Opened once to learn the format by the same rules as always.
    let format = match below.format {
        Some(format) => format,
        None => Disk::open(&base, &below).map_err(open)?.facts().format,
    };
    let dir = OverlayDir::new().map_err(host)?;
    let file = dir.0.join("overlay.qcow2");
    let backing = Some(BackingFile { path: base.clone(), format });
    let create = CreateOptions { backing, ..CreateOptions::default() };
    terem_block::create(&file, &create).map_err(open)?;
    let mut allowed = config.backing.clone();
    allowed.push(base);
    let above = OpenOptions {
        format: Some(Format::Qcow2),
        read_only: false,
        backing: BackingPolicy::Allow(allowed),
        // Nothing of it is to outlive a crash.
        cache: Cache::Unsafe,
        ..options(config)
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
