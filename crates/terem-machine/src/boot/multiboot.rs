//! Multiboot 0.6.96 ("multiboot 1"): 32-bit entry with EBX pointing at an information structure.

use super::elf::{Elf, is_elf};
use super::image::Fields;
use super::space::{CMDLINE, INFO, INFO_SIZE};
use super::{Job, KernelKind, Loaded, Problem, Role, start};
use crate::e820::{self, BASE_MEMORY_END, FIRMWARE_AREA_END};

/// Section 3.1.2.
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// Section 3.2, in EAX.
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// The header lies in this many bytes from the start (section 3.1).
const SEARCH: usize = 8192;

/// Header flag 1: memory information wanted. Always given.
/// Header flag 2: video modes wanted.
const WANTS_VIDEO: u32 = 1 << 2;
/// Header flag 16: the address fields say where to load.
const HAS_ADDRESSES: u32 = 1 << 16;
/// Flags 0–15 that are known: modules on page boundaries, memory information, video.
const KNOWN_REQUIREMENTS: u32 = 7;

/// Information flags: memory sizes, command line, modules, memory map, loader name (section 3.3).
const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER: u32 = 1 << 9;

/// Bytes of the information structure up to the framebuffer fields.
const INFO_LEN: usize = 88;
/// Where what it points to goes.
const MODULE_LIST: u64 = INFO + 0x100;
const LOADER_NAME_AT: u64 = INFO + 0x120;
const MEMORY_MAP: u64 = INFO + 0x200;
/// What we call ourselves.
pub(super) const LOADER_NAME: &[u8] = b"Teremok\0";

/// A header and where it is in the file.
#[derive(Debug)]
pub(super) struct Header {
    offset: u64,
    flags: u32,
    addresses: Addresses,
    entry: u32,
}

/// Where an image that is no ELF file goes ("a.out kludge").
#[derive(Debug, Clone, Copy)]
pub(super) struct Addresses {
    pub(super) header: u32,
    pub(super) load: u32,
    /// One past the last byte to load; 0 for the whole file.
    pub(super) load_end: u32,
    /// One past the last byte to clear; 0 for none.
    pub(super) bss_end: u32,
}

pub(super) fn find(head: &[u8]) -> Option<Header> {
    let head = &head[..head.len().min(SEARCH)];
    (0..head.len().saturating_sub(11)).step_by(4).find_map(|at| {
        let word = |i: usize| head.u32_at(at + i * 4);
        let sum = word(0).wrapping_add(word(1)).wrapping_add(word(2));
        (word(0) == HEADER_MAGIC && sum == 0).then(|| Header {
            offset: at as u64,
            flags: word(1),
            addresses: Addresses { header: word(3), load: word(4), load_end: word(5), bss_end: word(6) },
            entry: word(7),
        })
    })
}

pub(super) fn load(mut job: Job<'_>, header: &Header) -> Result<Loaded, (Role, Problem)> {
    let in_kernel = |p| (Role::Kernel, p);
    if header.flags & WANTS_VIDEO != 0 {
        return Err(in_kernel(Problem::Unsupported(
            "this multiboot kernel wants a video mode, and the machine has no display; build it without one"
                .into(),
        )));
    }
    if header.flags & 0xffff & !KNOWN_REQUIREMENTS != 0 {
        let flags = header.flags & 0xffff;
        let text =
            format!("this multiboot kernel wants what multiboot 0.6.96 does not have (flags {flags:#x})");
        return Err(in_kernel(Problem::Unsupported(text)));
    }
    let entry = if header.flags & HAS_ADDRESSES != 0 {
        load_at_addresses(&mut job, header.offset, header.addresses).map_err(in_kernel)?;
        header.entry
    } else {
        load_elf(&mut job).map_err(in_kernel)?
    };
    job.space.cmdline(job.cmdline, u64::MAX).map_err(in_kernel)?;
    let module = job.module("the module").map_err(|p| (Role::Initrd, p))?;
    write_info(&job, module).map_err(in_kernel)?;
    let state =
        start::protected_mode(&job.space, job.map, entry, LOADER_MAGIC, low(INFO)).map_err(in_kernel)?;
    Ok(Loaded { kind: KernelKind::Multiboot, entry: entry.into(), state })
}

/// Loads the file's segments; the entry point.
pub(super) fn load_elf(job: &mut Job<'_>) -> Result<u32, Problem> {
    let head = job.kernel.read_vec(0, job.kernel.len().min(4))?;
    if !is_elf(&head) {
        return Err(Problem::Damaged("its multiboot header has no addresses, and it is no ELF image".into()));
    }
    let elf = Elf::parse(job.kernel)?;
    let entry = elf.physical_entry();
    elf.load(job.kernel, &mut job.space)?;
    u32::try_from(entry).map_err(|_| Problem::Damaged(format!("its entry point {entry:#x} is above 4 GiB")))
}

/// Loads an image whose header, `offset` bytes into the file, says where it goes.
pub(super) fn load_at_addresses(job: &mut Job<'_>, offset: u64, a: Addresses) -> Result<(), Problem> {
    let damaged =
        || Problem::Damaged(format!("the addresses in its multiboot header contradict each other: {a:x?}"));
    let before = u64::from(a.header.checked_sub(a.load).ok_or_else(damaged)?);
    let from = offset.checked_sub(before).ok_or_else(damaged)?;
    let len = match a.load_end {
        0 => job.kernel.len() - from,
        end => u64::from(end.checked_sub(a.load).ok_or_else(damaged)?),
    };
    let at = u64::from(a.load);
    let bss = match a.bss_end {
        0 => 0,
        end => u64::from(end).checked_sub(at + len).ok_or_else(damaged)?,
    };
    job.kernel.check("the kernel", from, len)?;
    job.space.claim("the kernel", at, len + bss)?;
    job.space.copy(job.kernel, from, len, at)?;
    job.space.zero(at + len, bss)
}

/// KiB of memory below 640 KiB, and from 1 MiB up to the first hole.
pub(super) fn memory_sizes(job: &Job<'_>) -> (u32, u32) {
    (low(BASE_MEMORY_END >> 10), low(job.map.tables.base.saturating_sub(FIRMWARE_AREA_END) >> 10))
}

/// The low half of an address that is below 4 GiB by construction.
pub(super) fn low(addr: u64) -> u32 {
    u32::try_from(addr & 0xffff_ffff).unwrap_or(0)
}

fn write_info(job: &Job<'_>, module: Option<(u64, u64)>) -> Result<(), Problem> {
    let mut info = [0; INFO_LEN];
    let mut put = |at: usize, value: u32| info[at..at + 4].copy_from_slice(&value.to_le_bytes());
    // Each entry is preceded by its size, which does not count itself.
    let entries = e820::entries(job.map);
    let map: Vec<u8> =
        entries.iter().flat_map(|e| 20_u32.to_le_bytes().into_iter().chain(e.to_bytes())).collect();
    debug_assert!(0x200 + (map.len() as u64) < INFO_SIZE);
    job.space.write(MEMORY_MAP, &map)?;
    job.space.write(LOADER_NAME_AT, LOADER_NAME)?;
    if let Some((at, len)) = module {
        let entry = [low(at), low(at + len), 0, 0].map(u32::to_le_bytes).concat();
        job.space.write(MODULE_LIST, &entry)?;
    }
    let (lower, upper) = memory_sizes(job);
    put(0, INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER);
    put(4, lower);
    put(8, upper);
    put(16, low(CMDLINE));
    put(20, u32::from(module.is_some()));
    put(24, low(MODULE_LIST));
    put(44, u32::try_from(map.len()).unwrap_or(0));
    put(48, low(MEMORY_MAP));
    put(64, low(LOADER_NAME_AT));
    job.space.write(INFO, &info)
}
