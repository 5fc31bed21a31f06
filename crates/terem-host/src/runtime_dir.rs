//! The user's own directory for what lives as long as a machine runs: sockets, locks, logs.

use std::fs::{DirBuilder, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Why there is no runtime directory.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeDirError {
    /// It cannot be made.
    #[error("cannot make the runtime directory {path}: {error}")]
    Make {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Somebody else could reach in.
    #[error("the runtime directory {path} is not safe: {why}; remove it, or set XDG_RUNTIME_DIR")]
    Unsafe {
        /// Which.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
}

/// The directory `terem` in `$XDG_RUNTIME_DIR`, else in `/run/user/UID`, else `/tmp/terem-UID`; made with mode 0700 if it
/// is not there.
///
/// # Errors
/// It cannot be made, or belongs to somebody else, or others may write to it.
pub fn runtime_dir() -> Result<PathBuf, RuntimeDirError> {
    let user = rustix::process::geteuid().as_raw();
    let given = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute());
    let usual = PathBuf::from(format!("/run/user/{user}"));
    let dir = match given.or_else(|| usual.is_dir().then_some(usual)) {
        Some(base) => base.join("terem"),
        None => PathBuf::from(format!("/tmp/terem-{user}")),
    };
    make_private(&dir, user)?;
    Ok(dir)
}

fn make_private(path: &Path, user: u32) -> Result<(), RuntimeDirError> {
    let make = |error| RuntimeDirError::Make { path: path.into(), error };
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(make(error)),
        _ => {}
    }
    // Not followed: a link that somebody else has put there is not our directory.
    let meta = std::fs::symlink_metadata(path).map_err(make)?;
    match why_unsafe(&meta, user) {
        Some(why) => Err(RuntimeDirError::Unsafe { path: path.into(), why }),
        None => Ok(()),
    }
}

fn why_unsafe(meta: &Metadata, user: u32) -> Option<&'static str> {
    if !meta.is_dir() {
        Some("it is no directory")
    } else if meta.uid() != user {
        Some("it belongs to another user")
    } else if meta.mode() & 0o077 != 0 {
        Some("other users may enter it")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn only_a_private_directory_will_do() {
        let dir = tempfile::tempdir().unwrap();
        let user = rustix::process::geteuid().as_raw();
        let path = dir.path().join("terem");
        make_private(&path, user).unwrap();
        make_private(&path, user).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        let other = make_private(&path, user + 1).unwrap_err().to_string();
        assert!(other.contains("belongs to another user"), "{other}");
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(make_private(&link, user).unwrap_err().to_string().contains("no directory"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(make_private(&path, user).unwrap_err().to_string().contains("other users"));
    }
}
