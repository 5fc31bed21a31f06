//! Checking an image's consistency.

use std::path::Path;

use serde::Serialize;

use crate::chain::ImageFile;
use crate::{FilePart, Format, OpenError, Source};

/// Most messages in a report; the number of errors goes on.
const MAX_MESSAGES: usize = 50;

/// What a check found. Numbers are of clusters unless said otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// Contradictions that can lose data. An image with one must not be written.
    pub errors: u64,
    /// Clusters that are counted as used more often than they are: lost space, nothing worse.
    pub leaks: u64,
    /// Clusters of the disk that have data in the image.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Those that do not lie right after the one before them on the disk.
    pub fragmented_clusters: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// End of the last used cluster, in bytes.
    pub image_end: u64,
    /// What the errors are, the first fifty.
    pub messages: Vec<String>,
}

impl CheckReport {
    pub(crate) fn error(&mut self, message: String) {
        self.errors += 1;
        if self.messages.len() < MAX_MESSAGES {
            self.messages.push(message);
        }
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.leaks == 0
    }
}

/// Checks the image at `path` without changing it. A raw image has nothing that could be wrong.
///
/// # Errors
/// [`OpenError`] when it cannot be opened or read, or is being written by another process.
pub fn check(path: impl AsRef<Path>, format: Option<Format>) -> Result<CheckReport, OpenError> {
    check_with(path.as_ref(), format, true, None)
}

/// As [`check`], for an image that may be only a part of a file; unlocked, if its options say so.
///
/// # Errors
/// As [`check`].
pub fn check_source(source: &Source) -> Result<CheckReport, OpenError> {
    let options = &source.options;
    check_with(&source.path, options.format, options.lock, options.part.as_ref())
}

/// As [`check`], for an image that may be in use: what it finds may be what was just being changed.
///
/// # Errors
/// [`OpenError`] when it cannot be opened or read.
pub fn check_unlocked(path: impl AsRef<Path>, format: Option<Format>) -> Result<CheckReport, OpenError> {
    check_with(path.as_ref(), format, false, None)
}

fn check_with(
    path: &Path,
    format: Option<Format>,
    lock: bool,
    part: Option<&FilePart>,
) -> Result<CheckReport, OpenError> {
    if crate::nbd::is_address(path) {
        // Whatever the image is, it is the server's.
        let image_end = crate::nbd::size(path, format)?;
        return Ok(CheckReport { image_end, ..CheckReport::default() });
    }
    let mut image = ImageFile::open(path, false, lock, &mut Vec::new())?;
    if let Some(part) = part {
        image.narrow(part)?;
    }
    match image.format(format)?.driver().check {
        None => Ok(CheckReport { image_end: image.len(), ..CheckReport::default() }),
        Some(check) => check(&image),
    }
}
