//! Why an image could not be opened, created or checked.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use terem_crypt::CryptError;

use crate::IoError;
use crate::lock::Holder;

/// Why an image could not be opened, created or checked. The message names the file, the reason and, where
/// there is one, the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// There is no such file.
    #[error("{}: no such image; check the path, or make one with `terem disk create`", path.display())]
    NotFound {
        /// The image.
        path: PathBuf,
    },
    /// The path is a directory.
    #[error("{}: is a directory, not a disk image", path.display())]
    IsDirectory {
        /// The path.
        path: PathBuf,
    },
    /// Neither a regular file nor a block device.
    #[error("{}: is {kind}, not a disk image (a regular file or a block device)", path.display())]
    NotADisk {
        /// The path.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// The host refuses access.
    #[error("{}: permission denied; {}", path.display(), if *writing {
        "make it writable for this user, or open it with readonly=on"
    } else {
        "make it readable for this user"
    })]
    Permission {
        /// The image.
        path: PathBuf,
        /// Whether it was to be written.
        writing: bool,
    },
    /// Another process uses the image.
    #[error("{}: in use by {}; {}", path.display(), Holders(holders), if *writing {
        "stop it first, or give this machine an overlay of its own"
    } else {
        "it is being written: stop the writer first, or read a snapshot of it"
    })]
    Busy {
        /// The image.
        path: PathBuf,
        /// Who holds a lock on it, as far as can be seen.
        holders: Vec<Holder>,
        /// Whether it was to be written.
        writing: bool,
    },
    /// The disk would become smaller, and nobody allowed that.
    #[error("{}: {new} bytes are less than the {old} it has; data would be lost: allow it to shrink", path.display())]
    WouldShrink {
        /// The image.
        path: PathBuf,
        /// Bytes that the disk has.
        old: u64,
        /// Bytes that it was to have.
        new: u64,
    },
    /// The host itself uses the block device.
    #[error("{}: is in use by this host: mounted, swap, or part of another device; end that first", path.display())]
    UsedByHost {
        /// The device.
        path: PathBuf,
    },
    /// The image exists already.
    #[error("{}: exists already; choose another name, or allow it to be overwritten", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// `format=qcow2` was asked for.
    #[error("{}: is not a qcow2 image; open it with format=raw if it is a plain disk", path.display())]
    NotQcow2 {
        /// The image.
        path: PathBuf,
    },
    /// The file ends too early.
    #[error("{}: truncated: {what}; restore it from a copy", path.display())]
    Truncated {
        /// The image.
        path: PathBuf,
        /// What is missing.
        what: String,
    },
    /// The image contradicts its format's specification.
    #[error("{}: corrupt: {what}; restore it from a copy, or try `qemu-img check -r all`", path.display())]
    Corrupt {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The corrupt bit is set.
    #[error("{}: is marked corrupt and cannot be written; open it with readonly=on to copy its data out, \
             or repair it with `qemu-img check -r all`", path.display())]
    MarkedCorrupt {
        /// The image.
        path: PathBuf,
    },
    /// Something of the format that is not supported.
    #[error("{}: {feature} is not supported; {hint}", path.display())]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// What it is.
        feature: String,
        /// What can be done.
        hint: &'static str,
    },
    /// Incompatible features of a newer version of the format.
    #[error("{}: needs features this version does not know: {}", path.display(), names.join(", "))]
    UnknownFeatures {
        /// The image.
        path: PathBuf,
        /// Their names from the image's own table, or bit numbers.
        names: Vec<String>,
    },
    /// A size in a request or a header is beyond what is allowed.
    #[error("{}: {what}", path.display())]
    Limit {
        /// The image.
        path: PathBuf,
        /// The limit and what broke it.
        what: String,
    },
    /// A snapshot, bitmap or key slot that the image does not have.
    #[error("{}: it has no {what} {name:?}; `terem disk info` lists what there is", path.display())]
    NoSuch {
        /// The image.
        path: PathBuf,
        /// What kind of thing.
        what: &'static str,
        /// The name asked for.
        name: String,
    },
    /// The backing file is not allowed.
    #[error("{}: its backing file {backing:?} may not be opened: {reason}", path.display())]
    BackingRefused {
        /// The image that names it.
        path: PathBuf,
        /// The name as written in the image.
        backing: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The chain comes back to itself.
    #[error("{}: its chain of backing files comes back to {}", path.display(), again.display())]
    BackingCycle {
        /// The image that closes the circle.
        path: PathBuf,
        /// The file met again.
        again: PathBuf,
    },
    /// The chain is too long.
    #[error("{}: more than {max} backing files; merge some with `qemu-img convert`", path.display())]
    BackingTooDeep {
        /// The image at which it was given up.
        path: PathBuf,
        /// The limit.
        max: usize,
    },
    /// A backing file could not be opened.
    #[error("{}: cannot open its backing file: {source}", path.display())]
    Backing {
        /// The image that names it.
        path: PathBuf,
        /// Why.
        source: Box<OpenError>,
    },
    /// The image is encrypted, and nobody gave a passphrase.
    #[error("{}: is encrypted; give its passphrase", path.display())]
    NeedsPassphrase {
        /// The image.
        path: PathBuf,
    },
    /// Something about the encryption.
    #[error("{}: {source}", path.display())]
    Encryption {
        /// The image.
        path: PathBuf,
        /// What it is; a wrong passphrase is [`CryptError::WrongPassphrase`].
        source: CryptError,
    },
    /// A network address makes no sense.
    #[error("{}: {reason}", path.display())]
    Address {
        /// The address.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A server could not be reached, or did not give the disk.
    #[error("{}: {doing}: {reason}", path.display())]
    Server {
        /// The disk's address.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// Why it failed, and the way out where one is known.
        reason: String,
    },
    /// The I/O engine that was asked for is not available.
    #[error("io_uring is not available here ({0}); use aio=threads or aio=auto")]
    NoIoUring(io::Error),
    /// The disk's I/O thread cannot be started.
    #[error("cannot start the disk's I/O thread: {0}")]
    Thread(io::Error),
    /// Reading or writing the image failed.
    #[error("{}: {doing}: {source}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// It was to be stopped.
    #[error("stopped; what was there before is unchanged")]
    Cancelled,
    /// A request to an open disk failed.
    #[error("{}: {doing}: {source}", path.display())]
    Request {
        /// The image.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// Why.
        source: IoError,
    },
}

impl OpenError {
    /// The error for a host call on `path` that failed.
    pub(crate) fn io(path: &Path, doing: &'static str, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => Self::NotFound { path },
            io::ErrorKind::IsADirectory => Self::IsDirectory { path },
            io::ErrorKind::UnexpectedEof => Self::Truncated { path, what: format!("{doing}: it ends there") },
            _ => Self::Io { path, doing, source },
        }
    }

    pub(crate) fn corrupt(path: &Path, what: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_owned(), what: what.into() }
    }

    pub(crate) fn truncated(path: &Path, what: impl Into<String>) -> Self {
        Self::Truncated { path: path.to_owned(), what: what.into() }
    }
}

/// A list of processes in a sentence.
struct Holders<'a>(&'a [Holder]);

impl fmt::Display for Holders<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f
                .write_str("another process (which one cannot be seen from here: `lslocks` as root tells)");
        }
        for (i, holder) in self.0.iter().enumerate() {
            write!(f, "{}process {} ({})", if i == 0 { "" } else { ", " }, holder.pid, holder.command)?;
        }
        Ok(())
    }
}
