//! Multiboot 2.0: 32-bit entry with EBX pointing at a list of tags.

use super::image::Fields;
use super::multiboot::{Addresses, LOADER_NAME, load_at_addresses, load_elf, low, memory_sizes};
use super::space::{INFO, INFO_SIZE};
use super::{Job, KernelKind, Loaded, Problem, Role, start};
use crate::e820;

/// Section 3.1.1.
const HEADER_MAGIC: u32 = 0xe852_50d6;
/// Section 3.3, in EAX.
const LOADER_MAGIC: u32 = 0x36d7_6289;
/// 32-bit protected mode of i386.
const ARCHITECTURE_I386: u32 = 0;
/// Bytes of the fixed part of a header.
const HEADER_LEN: usize = 16;

/// Tags of a header (section 3.1.3 and on).
mod wanted {
    pub const END: u16 = 0;
    pub const INFORMATION: u16 = 1;
    pub const ADDRESS: u16 = 2;
    pub const ENTRY: u16 = 3;
    pub const CONSOLE: u16 = 4;
    pub const FRAMEBUFFER: u16 = 5;
    pub const MODULE_ALIGNMENT: u16 = 6;
    pub const EFI_BOOT_SERVICES: u16 = 7;
    pub const EFI_ENTRY_I386: u16 = 8;
    pub const EFI_ENTRY_AMD64: u16 = 9;
    pub const RELOCATABLE: u16 = 10;
    /// Tag flag: may be ignored.
    pub const OPTIONAL: u16 = 1;
    /// Console flag: there must be one.
    pub const CONSOLE_REQUIRED: u32 = 1;
}

/// Tags of the information (section 3.6).
mod given {
    pub const END: u32 = 0;
    pub const CMDLINE: u32 = 1;
    pub const LOADER: u32 = 2;
    pub const MODULE: u32 = 3;
    pub const MEMORY: u32 = 4;
    pub const MEMORY_MAP: u32 = 6;
    pub const ACPI_OLD: u32 = 14;
    pub const ACPI_NEW: u32 = 15;
}

/// Bytes of an ACPI 1.0 and 2.0 RSDP.
const RSDP_OLD: usize = 20;
const RSDP_NEW: usize = 36;

/// What a header asks for.
#[derive(Debug, Default)]
pub(super) struct Header {
    offset: u64,
    addresses: Option<Addresses>,
    entry: Option<u32>,
}

/// Finds and reads the header; `Ok(None)` when there is none.
pub(super) fn find(head: &[u8]) -> Result<Option<Header>, Problem> {
    let is_header = |&at: &usize| {
        let word = |i: usize| head.u32_at(at + i * 4);
        let sum = (0..4).fold(0_u32, |sum, i| sum.wrapping_add(word(i)));
        word(0) == HEADER_MAGIC && word(1) == ARCHITECTURE_I386 && sum == 0
    };
    let found = (0..head.len().saturating_sub(HEADER_LEN - 1)).step_by(8).find(is_header);
    found.map(|at| Header::parse(head, at)).transpose()
}

impl Header {
    fn parse(head: &[u8], offset: usize) -> Result<Self, Problem> {
        let damaged = |text: &str| Problem::Damaged(format!("its multiboot 2 header {text}"));
        let len = usize::try_from(head.u32_at(offset + 8)).unwrap_or(usize::MAX);
        let end = offset.checked_add(len).filter(|&end| end <= head.len());
        let end = end.ok_or_else(|| damaged("does not lie in the first 32 KiB"))?;
        let mut header = Self { offset: offset as u64, ..Self::default() };
        let mut at = offset + HEADER_LEN;
        while at + 8 <= end {
            let (kind, flags) = (head.u16_at(at), head.u16_at(at + 2));
            let size = usize::try_from(head.u32_at(at + 4)).unwrap_or(usize::MAX);
            if kind == wanted::END {
                return Ok(header);
            }
            let tag_end = at.checked_add(size).filter(|&e| size >= 8 && e <= end);
            let tag = &head[at + 8..tag_end.ok_or_else(|| damaged("has a tag of a wrong size"))?];
            header.tag(kind, flags & wanted::OPTIONAL != 0, tag)?;
            at += size.next_multiple_of(8);
        }
        Err(damaged("has no end tag"))
    }

    fn tag(&mut self, kind: u16, optional: bool, tag: &[u8]) -> Result<(), Problem> {
        let refused = |what: String| {
            if optional {
                Ok(())
            } else {
                Err(Problem::Unsupported(format!(
                    "this multiboot 2 kernel insists on {what}; build it without"
                )))
            }
        };
        match kind {
            wanted::INFORMATION => {
                let known = [
                    given::CMDLINE,
                    given::LOADER,
                    given::MODULE,
                    given::MEMORY,
                    given::MEMORY_MAP,
                    given::ACPI_OLD,
                    given::ACPI_NEW,
                ];
                let asked = tag.chunks_exact(4).map(|c| c.u32_at(0));
                match asked.into_iter().find(|t| !known.contains(t)) {
                    Some(unknown) => {
                        refused(format!("information of type {unknown}, which this machine has not"))
                    }
                    None => Ok(()),
                }
            }
            wanted::ADDRESS if tag.len() >= 16 => {
                let [header, load, load_end, bss_end] = [0, 4, 8, 12].map(|i| tag.u32_at(i));
                self.addresses = Some(Addresses { header, load, load_end, bss_end });
                Ok(())
            }
            wanted::ENTRY if tag.len() >= 4 => {
                self.entry = Some(tag.u32_at(0));
                Ok(())
            }
            wanted::CONSOLE if tag.u32_at(0) & wanted::CONSOLE_REQUIRED == 0 => Ok(()),
            wanted::CONSOLE => refused("a text console, and the machine has no display".into()),
            wanted::FRAMEBUFFER => refused("a framebuffer, and the machine has no display".into()),
            // The entries for EFI count only where the loader was started by EFI, and an image that may be
            // relocated may also stay where it was linked.
            wanted::MODULE_ALIGNMENT
            | wanted::EFI_BOOT_SERVICES
            | wanted::EFI_ENTRY_I386
            | wanted::EFI_ENTRY_AMD64
            | wanted::RELOCATABLE => Ok(()),
            _ => refused(format!("a tag of type {kind}")),
        }
    }
}

pub(super) fn load(mut job: Job<'_>, header: &Header) -> Result<Loaded, (Role, Problem)> {
    let in_kernel = |p| (Role::Kernel, p);
    let entry = match header.addresses {
        Some(addresses) => {
            load_at_addresses(&mut job, header.offset, addresses).map_err(in_kernel)?;
            let none =
                || in_kernel(Problem::Damaged("its multiboot 2 header has addresses and no entry".into()));
            header.entry.ok_or_else(none)?
        }
        None => {
            let entry = load_elf(&mut job).map_err(in_kernel)?;
            header.entry.unwrap_or(entry)
        }
    };
    let module = job.module("the module").map_err(|p| (Role::Initrd, p))?;
    write_info(&job, module).map_err(in_kernel)?;
    let state =
        start::protected_mode(&job.space, job.map, entry, LOADER_MAGIC, low(INFO)).map_err(in_kernel)?;
    Ok(Loaded { kind: KernelKind::Multiboot2, entry: entry.into(), state })
}

/// The list of tags, as it grows.
struct Tags(Vec<u8>);

impl Tags {
    fn add(&mut self, kind: u32, parts: &[&[u8]]) {
        self.0.resize(self.0.len().next_multiple_of(8), 0);
        let size = 8 + parts.iter().map(|p| p.len()).sum::<usize>();
        self.0.extend(kind.to_le_bytes());
        self.0.extend(u32::try_from(size).unwrap_or(8).to_le_bytes());
        for part in parts {
            self.0.extend_from_slice(part);
        }
    }
}

fn write_info(job: &Job<'_>, module: Option<(u64, u64)>) -> Result<(), Problem> {
    if job.cmdline.contains('\0') {
        return Err(Problem::CmdlineZero);
    }
    let mut tags = Tags(vec![0; 8]);
    tags.add(given::CMDLINE, &[job.cmdline.as_bytes(), &[0]]);
    tags.add(given::LOADER, &[LOADER_NAME]);
    if let Some((at, len)) = module {
        tags.add(given::MODULE, &[&low(at).to_le_bytes(), &low(at + len).to_le_bytes(), &[0]]);
    }
    let (lower, upper) = memory_sizes(job);
    tags.add(given::MEMORY, &[&lower.to_le_bytes(), &upper.to_le_bytes()]);
    let entries = e820::entries(job.map);
    let map: Vec<u8> = entries.iter().flat_map(|e| e.to_bytes().into_iter().chain([0; 4])).collect();
    tags.add(given::MEMORY_MAP, &[&24_u32.to_le_bytes(), &0_u32.to_le_bytes(), &map]);
    if job.rsdp != 0 {
        let mut rsdp = [0; RSDP_NEW];
        job.space.read(job.rsdp, &mut rsdp)?;
        tags.add(given::ACPI_OLD, &[&rsdp[..RSDP_OLD]]);
        tags.add(given::ACPI_NEW, &[&rsdp]);
    }
    tags.add(given::END, &[]);
    let Tags(mut bytes) = tags;
    if bytes.len() as u64 > INFO_SIZE {
        let max = usize::try_from(INFO_SIZE).unwrap_or(0).saturating_sub(bytes.len() - job.cmdline.len());
        return Err(Problem::CmdlineTooLong { length: job.cmdline.len(), max });
    }
    let total = u32::try_from(bytes.len()).unwrap_or(0);
    bytes[..4].copy_from_slice(&total.to_le_bytes());
    job.space.write(INFO, &bytes)
}
