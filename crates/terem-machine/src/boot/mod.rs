//! Loading a kernel without firmware: Linux (bzImage and ELF), PVH, and multiboot 1 and 2.
//!
//! ```text
//!   file ──detect──> Linux bzImage ──────> 64-bit entry, zero page      (linux.rs)
//!               ├──> multiboot 2, 1 ─────> 32-bit entry, EBX = info     (multiboot2.rs, multiboot.rs)
//!               ├──> ELF with PVH note ──> 32-bit entry, EBX = info     (pvh.rs)
//!               └──> 64-bit ELF ─────────> 64-bit entry, zero page      (linux.rs)
//! ```
//!
//! Everything in these files may be hostile. They are read in bounded pieces, straight into guest memory;
//! what does not fit is refused with a [`BootError`] that names the file, the reason and the way out.

mod elf;
mod error;
mod image;
mod linux;
mod multiboot;
mod multiboot2;
mod pvh;
mod space;
mod start;

use std::path::Path;

use serde::Serialize;
use terem_cpu::VcpuState;
use terem_memory::GuestMemory;

pub use error::{BootError, Problem, Role};
pub use image::{BytesImage, FileImage, Image};
pub use start::firmware_defaults;

use crate::plan::MemoryMap;
use space::Space;

/// What a kernel file turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelKind {
    /// Linux bzImage, started by its 64-bit boot protocol.
    LinuxBzImage,
    /// A 64-bit ELF image, started by Linux' 64-bit boot protocol.
    LinuxElf,
    /// An ELF image with a PVH entry point.
    Pvh,
    /// A multiboot 1 image.
    Multiboot,
    /// A multiboot 2 image.
    Multiboot2,
}

/// The files of a boot, open: a guest's reset loads them again, even if they have been renamed since.
#[derive(Debug)]
pub struct BootFiles {
    kernel: FileImage,
    initrd: Option<FileImage>,
    cmdline: String,
}

/// A kernel in guest memory.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What it is.
    pub kind: KernelKind,
    /// Guest-physical entry point.
    pub entry: u64,
    /// The boot processor as the kernel's boot protocol wants it.
    pub state: VcpuState,
}

impl BootFiles {
    /// Opens the files.
    ///
    /// # Errors
    /// A file is missing, cannot be read, or is a directory.
    pub fn open(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<Self, BootError> {
        let open = |role, path: &Path| FileImage::open(path).map_err(|p| p.in_file(role, path));
        Ok(Self {
            kernel: open(Role::Kernel, kernel)?,
            initrd: initrd.map(|path| open(Role::Initrd, path)).transpose()?,
            cmdline: cmdline.into(),
        })
    }

    /// Loads them into `memory`. `rsdp` is the guest-physical address of the ACPI RSDP.
    ///
    /// # Errors
    /// See [`Problem`].
    pub fn load(&self, memory: &GuestMemory, map: &MemoryMap, rsdp: u64) -> Result<Loaded, BootError> {
        let initrd = self.initrd.as_ref().map(|i| i as &dyn Image);
        load(&self.kernel, initrd, &self.cmdline, memory, map, rsdp).map_err(|(role, problem)| {
            let file = match (role, &self.initrd) {
                (Role::Initrd, Some(initrd)) => initrd,
                _ => &self.kernel,
            };
            problem.in_file(role, file.path())
        })
    }
}

/// What every loader gets.
struct Job<'a> {
    kernel: &'a dyn Image,
    initrd: Option<&'a dyn Image>,
    cmdline: &'a str,
    rsdp: u64,
    map: &'a MemoryMap,
    space: Space<'a>,
}

impl Job<'_> {
    /// Puts the initrd, if there is one, as high as possible below 4 GiB: its address and size.
    fn module(&mut self, what: &'static str) -> Result<Option<(u64, u64)>, Problem> {
        let Some(image) = self.initrd else { return Ok(None) };
        let at = self.space.claim_top(what, image.len(), terem_memory::PAGE_SIZE, u64::MAX)?;
        self.space.copy(image, 0, image.len(), at)?;
        Ok(Some((at, image.len())))
    }
}

/// Bytes from the start of a file in which each of the formats shows what it is (multiboot 2, 3.1.1).
const HEAD: u64 = 32768;

/// Loads images from anywhere: [`BootFiles::load`] without files, which is also what fuzzing calls.
///
/// # Errors
/// Which file, and what is wrong with it.
pub fn load(
    kernel: &dyn Image,
    initrd: Option<&dyn Image>,
    cmdline: &str,
    memory: &GuestMemory,
    map: &MemoryMap,
    rsdp: u64,
) -> Result<Loaded, (Role, Problem)> {
    let loaded = load_kind(Job { kernel, initrd, cmdline, rsdp, map, space: Space::new(memory, map) })?;
    if !memory.is_ram(loaded.entry, 1) {
        let text = format!("its entry point {:#x} is not in memory", loaded.entry);
        return Err((Role::Kernel, Problem::Damaged(text)));
    }
    Ok(loaded)
}

/// Finds out what the kernel is, and loads it as that.
fn load_kind(job: Job<'_>) -> Result<Loaded, (Role, Problem)> {
    let in_kernel = |p| (Role::Kernel, p);
    let kernel = job.kernel;
    let head = kernel.read_vec(0, kernel.len().min(HEAD)).map_err(in_kernel)?;
    if linux::is_bzimage(&head) {
        return linux::load_bzimage(job, &head);
    }
    if let Some(header) = multiboot2::find(&head).map_err(in_kernel)? {
        return multiboot2::load(job, &header);
    }
    if let Some(header) = multiboot::find(&head) {
        return multiboot::load(job, &header);
    }
    if !elf::is_elf(&head) {
        return Err(in_kernel(Problem::NotAKernel { found: error::describe(&head) }));
    }
    let elf = elf::Elf::parse(kernel).map_err(in_kernel)?;
    match elf.pvh_entry(kernel).map_err(in_kernel)? {
        Some(entry) => pvh::load(job, &elf, entry),
        None => linux::load_elf(job, &elf),
    }
}

#[cfg(test)]
mod tests;
