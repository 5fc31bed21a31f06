//! Names of running machines: each is claimed by a lock that the kernel lets go of when the process ends, however it ends.

use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Longest path of a Unix socket (`sun_path` less the final zero; unix(7)), in bytes.
const MAX_SOCKET_PATH: usize = 107;

/// Why a name cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// A machine of this name is running.
    #[error("a machine named {name} is running{}", pid.map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    Taken {
        /// The name.
        name: String,
        /// Its process, if that can be told.
        pid: Option<u32>,
    },
    /// The path of its socket would be too long.
    #[error("the name {name} is too long for a socket in {dir}", dir = dir.display())]
    TooLong {
        /// The name.
        name: String,
        /// The runtime directory.
        dir: PathBuf,
    },
    /// The lock file cannot be made.
    #[error("cannot make {path}: {error}", path = path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// A name that belongs to this process as long as this value lives.
#[derive(Debug)]
pub struct Claim {
    name: String,
    dir: PathBuf,
    lock: File,
}

impl Claim {
    /// Claims `name` in the runtime directory `dir`, and clears away what a dead machine of this name has left.
    ///
    /// # Errors
    /// A running machine has it, or the lock file cannot be made.
    pub fn new(dir: &Path, name: &str) -> Result<Self, ClaimError> {
        let path = dir.join(format!("{name}.lock"));
        let failed = |error| ClaimError::Io { path: path.clone(), error };
        if socket_path(dir, name).as_os_str().len() > MAX_SOCKET_PATH {
            return Err(ClaimError::TooLong { name: name.into(), dir: dir.into() });
        }
        loop {
            let mut options = OpenOptions::new();
            let lock = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
            let mut lock = lock.map_err(failed)?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(ClaimError::Taken { name: name.into(), pid: read_pid(&mut lock) });
                }
                Err(error) => return Err(failed(error.into())),
            }
            // Its last owner may have removed the file between our opening and locking it.
            if !is_still_at(&lock, &path) {
                continue;
            }
            lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(failed)?;
            let _ = fs::remove_file(socket_path(dir, name));
            return Ok(Self { name: name.into(), dir: dir.into(), lock });
        }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the control socket belongs.
    pub fn socket_path(&self) -> PathBuf {
        socket_path(&self.dir, &self.name)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.socket_path());
        let path = self.dir.join(format!("{}.lock", self.name));
        // While the lock is held, so that nobody else's file is removed.
        if is_still_at(&self.lock, &path) {
            let _ = fs::remove_file(path);
        }
    }
}

/// A running machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// Its name.
    pub name: String,
    /// Its process, if that can be told.
    pub pid: Option<u32>,
    /// Its control socket.
    pub socket: PathBuf,
}

/// The machines that run in the runtime directory `dir`, by name. What dead ones have left there is removed.
///
/// # Errors
/// The directory cannot be read.
pub fn running(dir: &Path) -> io::Result<Vec<Running>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let file = entry?.file_name();
        let Some(name) = file.to_str().and_then(|file| file.strip_suffix(".lock")) else { continue };
        match Claim::new(dir, name) {
            // Nobody had it: dropping the claim removes the rest.
            Ok(claim) => drop(claim),
            Err(ClaimError::Taken { name, pid }) => {
                let socket = socket_path(dir, &name);
                found.push(Running { name, pid, socket });
            }
            Err(_) => {}
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn socket_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.sock"))
}

fn is_still_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => ours.ino() == there.ino() && ours.dev() == there.dev(),
        _ => false,
    }
}

fn read_pid(lock: &mut File) -> Option<u32> {
    let mut text = String::new();
    lock.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_while_claimed() {
        let dir = tempfile::tempdir().unwrap();
        let claim = Claim::new(dir.path(), "a").unwrap();
        let error = Claim::new(dir.path(), "a").unwrap_err().to_string();
        assert_eq!(error, format!("a machine named a is running (process {})", std::process::id()));
        let here = running(dir.path()).unwrap();
        assert_eq!(
            here.iter().map(|r| (r.name.as_str(), r.pid)).collect::<Vec<_>>(),
            [("a", Some(std::process::id()))]
        );
        drop(claim);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        drop(Claim::new(dir.path(), "a").unwrap());
    }

    #[test]
    fn leftovers_of_the_dead_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("dead.lock"), "999999\n").unwrap();
        drop(std::os::unix::net::UnixListener::bind(dir.path().join("dead.sock")).unwrap());
        assert_eq!(running(dir.path()).unwrap(), []);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn too_long_names_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let error = Claim::new(dir.path(), &"n".repeat(120)).unwrap_err();
        assert!(matches!(error, ClaimError::TooLong { .. }));
    }
}
