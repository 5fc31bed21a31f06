//! A machine's state in a directory: `machine.json` (devices and processors) and `memory` (RAM, sparse).

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use terem_bus::{SavedDevice, StateError, locked};
use terem_cpu::{CpuError, Vcpu, VcpuState};
use terem_memory::GuestMemory;

use crate::board::Board;

/// The layout of `machine.json`.
const VERSION: u32 = 1;
/// Bytes of RAM copied at a time.
const PIECE: usize = 1 << 20;

/// `machine.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedMachine {
    version: u32,
    /// The plan, as a check that this is the same machine.
    plan: serde_json::Value,
    /// Virtual time (ns).
    pub(crate) now: u64,
    /// Virtual time (ns) at which the guest began.
    pub(crate) began: u64,
    devices: Vec<(String, SavedDevice)>,
    vcpus: Vec<VcpuState>,
}

/// Why a machine was not saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The host refused something.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// `machine.json` cannot be read or written as such.
    #[error("{} is damaged: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// It was saved by a newer program.
    #[error("the machine was saved in format {found}, and this program knows formats up to {VERSION}")]
    Version {
        /// Its format.
        found: u32,
    },
    /// It is another machine's.
    #[error(
        "the saved state is of a machine with another {0}; restore it with the configuration it was saved with"
    )]
    OtherMachine(String),
    /// A device refused its state.
    #[error("device {name}: {source}")]
    Device {
        /// Which.
        name: String,
        /// Why.
        source: StateError,
    },
    /// A processor refused its state.
    #[error("vCPU {id}: {source}")]
    Vcpu {
        /// Which.
        id: usize,
        /// Why.
        source: CpuError,
    },
}

fn io<'a>(action: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> SaveError + 'a {
    move |source| SaveError::Io { action, path: path.into(), source }
}

/// Everything that a machine's state is in.
pub(crate) struct Parts<'a> {
    pub(crate) plan: &'a crate::plan::Plan,
    pub(crate) board: &'a dyn Board,
    pub(crate) vcpus: Vec<&'a Mutex<Box<dyn Vcpu>>>,
    pub(crate) memory: &'a GuestMemory,
}

impl Parts<'_> {
    /// Writes the state of a machine that stands still. `machine.json` comes last: without it there is no
    /// saved machine.
    pub(crate) fn save(&self, dir: &Path, now: u64, began: u64) -> Result<(), SaveError> {
        std::fs::create_dir_all(dir).map_err(io("make the directory", dir))?;
        save_memory(self.memory, &dir.join("memory"))?;
        let mut devices = Vec::new();
        for (name, device) in self.board.devices() {
            let saved = device.save().map_err(|source| SaveError::Device { name: name.clone(), source })?;
            devices.push((name, saved));
        }
        let path = dir.join("machine.json");
        let json = |source| SaveError::Json { path: path.clone(), source };
        let plan = serde_json::to_value(self.plan).map_err(json)?;
        let vcpus = self.vcpus.iter().map(|v| locked(v).save()).collect();
        let saved = SavedMachine { version: VERSION, plan, now, began, devices, vcpus };
        let bytes = serde_json::to_vec(&saved).map_err(json)?;
        let temporary = dir.join("machine.json.new");
        let mut file = File::create(&temporary).map_err(io("create", &temporary))?;
        file.write_all(&bytes).and_then(|()| file.sync_all()).map_err(io("write", &temporary))?;
        std::fs::rename(&temporary, &path).map_err(io("write", &path))
    }

    /// Reads and checks `machine.json`.
    pub(crate) fn read(&self, dir: &Path) -> Result<SavedMachine, SaveError> {
        let path = dir.join("machine.json");
        let bytes = std::fs::read(&path).map_err(io("read", &path))?;
        let json = |source| SaveError::Json { path: path.clone(), source };
        let saved: SavedMachine = serde_json::from_slice(&bytes).map_err(json)?;
        if saved.version > VERSION {
            return Err(SaveError::Version { found: saved.version });
        }
        let plan = serde_json::to_value(self.plan).map_err(json)?;
        for part in ["board", "cpus", "memory", "numa", "console", "rng"] {
            if saved.plan.get(part) != plan.get(part) {
                return Err(SaveError::OtherMachine(part.into()));
            }
        }
        if saved.vcpus.len() != self.vcpus.len() {
            return Err(SaveError::OtherMachine("number of processors".into()));
        }
        Ok(saved)
    }

    /// Goes on from a state that [`Self::read`] gave. After an error the machine cannot run.
    pub(crate) fn restore(&self, dir: &Path, saved: &SavedMachine) -> Result<(), SaveError> {
        restore_memory(self.memory, &dir.join("memory"))?;
        let mut states: std::collections::HashMap<_, _> =
            saved.devices.iter().map(|(n, s)| (n.as_str(), s)).collect();
        for (name, device) in self.board.devices() {
            let state = states.remove(name.as_str());
            let state =
                state.ok_or_else(|| SaveError::OtherMachine(format!("set of devices (no {name})")))?;
            device.restore(state).map_err(|source| SaveError::Device { name, source })?;
        }
        if let Some(name) = states.keys().next() {
            return Err(SaveError::OtherMachine(format!("set of devices ({name})")));
        }
        for (id, (vcpu, state)) in self.vcpus.iter().zip(&saved.vcpus).enumerate() {
            locked(vcpu).restore(state).map_err(|source| SaveError::Vcpu { id, source })?;
        }
        Ok(())
    }
}

/// Copies the pages that exist to a file with the memfd's layout.
fn save_memory(memory: &GuestMemory, path: &Path) -> Result<(), SaveError> {
    let file = File::create(path).map_err(io("create", path))?;
    let failed = io("write", path);
    file.set_len(memory.total()).map_err(&failed)?;
    copy_data(&memfd(memory).map_err(&failed)?, &file, memory.total()).map_err(&failed)?;
    file.sync_all().map_err(&failed)
}

/// Replaces all of RAM by a saved file's contents.
fn restore_memory(memory: &GuestMemory, path: &Path) -> Result<(), SaveError> {
    let file = File::open(path).map_err(io("open", path))?;
    let failed = io("read", path);
    let len = file.metadata().map_err(&failed)?.len();
    if len != memory.total() {
        return Err(SaveError::OtherMachine(format!("size of memory ({len} bytes in {})", path.display())));
    }
    let ram = memfd(memory).map_err(&failed)?;
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(ram.as_fd(), hole, 0, len).map_err(|e| failed(e.into()))?;
    copy_data(&file, &ram, len).map_err(&failed)?;
    // The pages were changed behind everybody's back: decoded code of them is not valid any more.
    for range in memory.ram() {
        memory.marks().written_range(range.base, range.size);
    }
    Ok(())
}

fn memfd(memory: &GuestMemory) -> std::io::Result<File> {
    Ok(File::from(memory.memfd().try_clone_to_owned()?))
}

/// Copies the parts of `from` that are not holes to the same places of `to`, leaving out blocks of zeroes.
fn copy_data(from: &File, to: &File, len: u64) -> std::io::Result<()> {
    const BLOCK: usize = 4096;
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < len {
        let start = match seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let end = seek(from, SeekFrom::Hole(start))?.min(len);
        at = start;
        while at < end {
            let now = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            let piece = &mut buffer[..now];
            from.read_exact_at(piece, at)?;
            for (i, block) in piece.chunks(BLOCK).enumerate() {
                if block.iter().any(|&b| b != 0) {
                    to.write_all_at(block, at + (i * BLOCK) as u64)?;
                }
            }
            at += now as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use terem_memory::RamRange;
    use terem_memory::vm_memory::{Bytes, GuestAddress};

    #[test]
    fn memory_goes_through_a_sparse_file_and_back() {
        let ranges = [RamRange { base: 0, size: 1 << 20 }, RamRange { base: 4 << 30, size: 64 << 20 }];
        let memory = GuestMemory::new(&ranges).unwrap();
        memory.write_obj(0x1234_u64, GuestAddress(4096)).unwrap();
        memory.write_slice(&[7; 10_000], GuestAddress((4 << 30) + (5 << 20))).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("memory");
        save_memory(&memory, &path).unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(meta.len(), 65 << 20);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());

        let other = GuestMemory::new(&ranges).unwrap();
        other.write_obj(99_u64, GuestAddress(8192)).unwrap();
        let word = other.marks().mark_code(1);
        restore_memory(&other, &path).unwrap();
        let read = |at| other.read_obj::<u64>(GuestAddress(at)).unwrap();
        assert_eq!((read(4096), read(8192)), (0x1234, 0), "what was there before is gone");
        assert_eq!(read((4 << 30) + (5 << 20)), 0x0707_0707_0707_0707);
        assert_ne!(other.marks().word(1), word, "decoded code is not valid any more");

        let smaller = GuestMemory::new(&ranges[..1]).unwrap();
        assert!(restore_memory(&smaller, &path).unwrap_err().to_string().contains("size of memory"));
    }
}
