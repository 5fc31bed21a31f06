//! How a disk is to be opened.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Format, Keys};

/// Which way the host's page cache is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Through the host's page cache; a flush makes it durable.
    #[default]
    Writeback,
    /// Around the host's page cache (`O_DIRECT`); a flush makes it durable.
    Direct,
    /// Through the host's page cache, and flushes do not reach the storage. The image stays right when the
    /// process is killed, but is lost when the host goes down. For throw-away guests.
    Unsafe,
}

/// What carries out file I/O.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AioEngine {
    /// `io_uring` where the host allows it, else threads.
    #[default]
    Auto,
    /// `io_uring`, or an error.
    IoUring,
    /// A pool of threads with blocking calls.
    Threads,
}

/// Which backing files named inside an image may be opened. They are always opened read-only.
///
/// The name comes from the image, which may come from anywhere: without a rule an image could make us read
/// any file of the host into a guest. An NBD address is opened only where the policy names that very address, or allows
/// everything.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum BackingPolicy {
    /// Files in the directory of the image that names them, or below it, with all symbolic links resolved.
    #[default]
    SameDirectory,
    /// As [`Self::SameDirectory`], and also these files, everything below these directories, and these addresses.
    Allow(Vec<PathBuf>),
    /// No restriction: every image of the chain is trusted.
    Any,
    /// Images with a backing file are refused.
    None,
}

/// A part of a file, as QEMU's raw format has it: `offset` and `size`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FilePart {
    /// Where it begins, a multiple of 512.
    pub offset: u64,
    /// Its bytes, a multiple of 512; `None`: up to the file's end.
    pub size: Option<u64>,
}

/// What shows through where an image has nothing.
#[derive(Debug, Clone, Default)]
pub enum Below {
    /// The backing file that the image names.
    #[default]
    AsWritten,
    /// Nothing: such places read as zeroes.
    Nothing,
    /// This image.
    Image(Box<Source>),
}

/// An image: where it is, and how it is to be opened.
#[derive(Debug, Clone, Default)]
pub struct Source {
    /// Its file, or an NBD address.
    pub path: PathBuf,
    /// How it is to be opened.
    pub options: OpenOptions,
}

/// How [`crate::Disk::open`] opens an image.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// The format, or `None` to look at the image itself. A file that is found to be raw this way is
    /// guarded: a write that would make its first sector look like another format is refused, so that a
    /// guest cannot turn its disk into an image that names the host's files.
    pub format: Option<Format>,
    /// Refuse all writes, and share the image with other readers.
    pub read_only: bool,
    /// A snapshot inside the image, by id or name, that is to be read in place of the disk as it is now. Only with
    /// `read_only`.
    pub snapshot: Option<String>,
    /// Use of the host's page cache.
    pub cache: Cache,
    /// Whether discards of the guest give storage back.
    pub discard: bool,
    /// Which backing files may be opened.
    pub backing: BackingPolicy,
    /// What carries out the I/O.
    pub aio: AioEngine,
    /// The passphrases of encrypted images.
    pub keys: Keys,
    /// Whether to take QEMU-compatible image locks. Switch it off only for file systems without locks.
    pub lock: bool,
    /// Most bytes of a qcow2 image's mapping tables kept in memory (at least four tables are). 4 MiB
    /// map 32 GiB at the default cluster size.
    pub table_cache: usize,
    /// The image is only this part of its file.
    pub part: Option<FilePart>,
    /// What is below it, if that is not to be what the image says.
    pub below: Below,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            format: None,
            read_only: false,
            snapshot: None,
            cache: Cache::Writeback,
            discard: true,
            backing: BackingPolicy::SameDirectory,
            aio: AioEngine::Auto,
            keys: Keys::default(),
            lock: true,
            table_cache: 4 << 20,
            part: None,
            below: Below::AsWritten,
        }
    }
}

impl OpenOptions {
    /// The defaults, read-only.
    #[must_use]
    pub fn read_only() -> Self {
        Self { read_only: true, ..Self::default() }
    }

    /// For the images below: what is said of one image is not said of them.
    pub(crate) fn of_below(&self) -> Self {
        Self { snapshot: None, part: None, below: Below::AsWritten, ..self.clone() }
    }
}
