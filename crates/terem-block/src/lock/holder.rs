//! Who holds the locks on a file.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// A process that has an image locked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// Its command name.
    pub command: String,
}

/// The processes with image locks on `fd`'s file, as far as this user may see them.
///
/// Locks of open files carry no process id (`F_OFD_GETLK` says -1, as does `/proc/locks`), but `/proc/PID/fdinfo/N`
/// lists the locks of each open file.
pub(super) fn holders(fd: &OwnedFd) -> Vec<Holder> {
    let Ok(stat) = rustix::fs::fstat(fd.as_fd()) else { return Vec::new() };
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let file = format!(" {major:02x}:{minor:02x}:{} ", stat.st_ino);
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if holds(&process.path(), &file) {
            let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(Holder { pid, command: command.trim().to_owned() });
        }
    }
    found.sort_by_key(|holder| holder.pid);
    found
}

fn holds(process: &Path, file: &str) -> bool {
    let Ok(open_files) = fs::read_dir(process.join("fdinfo")) else { return false };
    open_files.flatten().any(|info| {
        fs::read_to_string(info.path())
            .is_ok_and(|text| text.lines().any(|line| line.starts_with("lock:") && line.contains(file)))
    })
}

impl Holder {
    /// Whether it is a process that we have just made, and that only has our open files until it runs its program.
    pub(crate) fn is_passing(&self) -> bool {
        let ours = std::process::id();
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        // "pid (command) state parent …"; the command can have anything in it. No such process: it is gone.
        let parent = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1)?.parse::<u32>().ok());
        stat.is_empty() || parent == Some(ours)
    }
}
