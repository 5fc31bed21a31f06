//! PVH: 32-bit entry with EBX pointing at a `hvm_start_info`
//! (Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h).

use super::space::{CMDLINE, INFO};
use super::{Job, KernelKind, Loaded, Problem, Role, elf::Elf, start};
use crate::e820;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// Version 1 brought the memory map.
const VERSION: u32 = 1;
/// Where the module list and the memory map lie after the start info.
const MODULES: u64 = INFO + 0x100;
const MEMORY_MAP: u64 = INFO + 0x200;

pub(super) fn load(mut job: Job<'_>, elf: &Elf, entry: u32) -> Result<Loaded, (Role, Problem)> {
    let in_kernel = |p| (Role::Kernel, p);
    if !elf.covers(entry.into()) {
        let text = format!("its PVH entry point {entry:#x} is not in what it loads");
        return Err(in_kernel(Problem::Damaged(text)));
    }
    elf.load(job.kernel, &mut job.space).map_err(in_kernel)?;
    job.space.cmdline(job.cmdline, u64::MAX).map_err(in_kernel)?;
    let module = job.module("the initrd").map_err(|p| (Role::Initrd, p))?;
    write_start_info(&job, module).map_err(in_kernel)?;
    let ebx = u32::try_from(INFO).unwrap_or(0);
    let state = start::protected_mode(&job.space, job.map, entry, 0, ebx).map_err(in_kernel)?;
    Ok(Loaded { kind: KernelKind::Pvh, entry: entry.into(), state })
}

fn write_start_info(job: &Job<'_>, module: Option<(u64, u64)>) -> Result<(), Problem> {
    let entries = e820::entries(job.map);
    // `hvm_memmap_table_entry`: address, size, type, reserved.
    let map: Vec<u8> = entries.iter().flat_map(|e| e.to_bytes().into_iter().chain([0; 4])).collect();
    job.space.write(MEMORY_MAP, &map)?;
    if let Some((at, len)) = module {
        // `hvm_modlist_entry`: address, size, command line, reserved.
        let list: Vec<u8> = [at, len, 0, 0].iter().flat_map(|v| v.to_le_bytes()).collect();
        job.space.write(MODULES, &list)?;
    }
    let mut info = Vec::with_capacity(56);
    let mut put = |bytes: &[u8]| info.extend_from_slice(bytes);
    put(&MAGIC.to_le_bytes());
    put(&VERSION.to_le_bytes());
    put(&0_u32.to_le_bytes()); // flags
    put(&u32::from(module.is_some()).to_le_bytes());
    put(&if module.is_some() { MODULES } else { 0 }.to_le_bytes());
    put(&CMDLINE.to_le_bytes());
    put(&job.rsdp.to_le_bytes());
    put(&MEMORY_MAP.to_le_bytes());
    put(&u32::try_from(entries.len()).unwrap_or(0).to_le_bytes());
    put(&0_u32.to_le_bytes());
    job.space.write(INFO, &info)
}
