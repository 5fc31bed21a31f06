//! Linux' boot protocol (Documentation/arch/x86/boot.rst): bzImage and plain ELF images.

use super::image::Fields;
use super::space::{CMDLINE, Space, ZERO_PAGE};
use super::{Image, Job, KernelKind, Loaded, Problem, Role, elf, start};
use crate::e820;

/// Offsets in the zero page, which are also those in a bzImage's first sector.
mod field {
    pub const ACPI_RSDP: u64 = 0x070;
    pub const E820_ENTRIES: u64 = 0x1e8;
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const SYSSIZE: usize = 0x1f4;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const JUMP: usize = 0x201;
    pub const HEADER: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const TYPE_OF_LOADER: u64 = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const RAMDISK_IMAGE: u64 = 0x218;
    pub const RAMDISK_SIZE: u64 = 0x21c;
    pub const CMD_LINE_PTR: u64 = 0x228;
    pub const INITRD_ADDR_MAX: usize = 0x22c;
    pub const KERNEL_ALIGNMENT: usize = 0x230;
    pub const RELOCATABLE: usize = 0x234;
    pub const XLOADFLAGS: usize = 0x236;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
    pub const E820_TABLE: u64 = 0x2d0;
}

const BOOT_FLAG: u16 = 0xaa55;
const HEADER: &[u8; 4] = b"HdrS";
/// `LOADED_HIGH`: the protected-mode code goes to 1 MiB or above.
const LOADED_HIGH: u8 = 1;
/// `CAN_USE_HEAP` is for real mode only; this one asks the kernel to be quiet while unpacking. Neither is set.
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point from the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;
/// "Undefined" boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// The oldest protocol that is spoken here: 2.02 brought the command line pointer, 2.03 `initrd_addr_max`.
const OLDEST: u16 = 0x203;
/// Where protected-mode code goes by default, and the lowest place for it.
const ONE_MIB: u64 = 0x10_0000;
/// Kernels before 2.06 take this much of a command line.
const OLD_CMDLINE: u32 = 255;
/// Bytes of the zero page.
const ZERO_PAGE_SIZE: u64 = 4096;
/// Entries that the zero page has room for.
const E820_MAX: usize = 128;

pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.u16_at(field::BOOT_FLAG) == BOOT_FLAG && head.get(field::HEADER..field::HEADER + 4) == Some(HEADER)
}

/// The setup header's fields, with the defaults of protocols that lack them.
#[derive(Debug)]
struct Setup {
    /// The header's bytes as they go into the zero page.
    bytes: Vec<u8>,
    code_offset: u64,
    code_size: u64,
    is_64: bool,
    relocatable: bool,
    alignment: u64,
    preferred: u64,
    init_size: u64,
    initrd_limit: u64,
    cmdline_size: u32,
}

impl Setup {
    fn parse(head: &[u8], file_len: u64) -> Result<Self, Problem> {
        // The header lies in the setup code, which ends later in any kernel.
        let needed = field::INIT_SIZE + 8;
        if head.len() < needed {
            let length = file_len.min(head.len() as u64);
            return Err(Problem::Truncated { what: "the setup header", needed: needed as u64, length });
        }
        let version = head.u16_at(field::VERSION);
        let since = |v: u16| version >= v;
        if !since(OLDEST) || head[field::LOADFLAGS] & LOADED_HIGH == 0 {
            return Err(Problem::Unsupported(format!(
                "it is a Linux kernel with boot protocol {}.{:02} (a zImage or before 2.4.18); newer ones are needed",
                version >> 8,
                version & 0xff
            )));
        }
        let sectors = match head[field::SETUP_SECTS] {
            0 => 4,
            n => u64::from(n),
        };
        let code_offset = (sectors + 1) * 512;
        // 2.04 made the size a 32-bit field; the file may be longer by a signature, or lack the padding.
        let syssize =
            if since(0x204) { head.u32_at(field::SYSSIZE) } else { head.u16_at(field::SYSSIZE).into() };
        let wanted = u64::from(syssize) * 16;
        let there = file_len.saturating_sub(code_offset);
        if there == 0 || there + 16 <= wanted {
            let needed = code_offset + wanted;
            return Err(Problem::Truncated { what: "the kernel", needed, length: file_len });
        }
        let code_size = if wanted == 0 { there } else { there.min(wanted) };
        let relocatable = since(0x205) && head[field::RELOCATABLE] != 0;
        let alignment = if since(0x205) { u64::from(head.u32_at(field::KERNEL_ALIGNMENT)) } else { 0 };
        if relocatable && !(1..=1 << 30).contains(&alignment.max(1).next_power_of_two()) {
            return Err(Problem::Damaged(format!("its alignment is {alignment:#x}")));
        }
        let init_size = if since(0x20a) { u64::from(head.u32_at(field::INIT_SIZE)) } else { 0 };
        let end = (field::HEADER + usize::from(head[field::JUMP])).min(head.len());
        Ok(Self {
            bytes: head.get(field::SETUP_SECTS..end).unwrap_or_default().to_vec(),
            code_offset,
            code_size,
            is_64: since(0x20c) && head.u16_at(field::XLOADFLAGS) & XLF_KERNEL_64 != 0,
            relocatable,
            alignment: alignment.max(1).next_power_of_two(),
            preferred: if since(0x20a) { head.u64_at(field::PREF_ADDRESS) } else { ONE_MIB },
            // Without the field nobody knows how far unpacking reaches; five times is generous.
            init_size: init_size.max(if init_size == 0 { code_size * 5 } else { code_size }),
            initrd_limit: u64::from(head.u32_at(field::INITRD_ADDR_MAX)) + 1,
            cmdline_size: if since(0x206) { head.u32_at(field::CMDLINE_SIZE) } else { OLD_CMDLINE },
        })
    }

    /// Where the code goes: as preferred, or where there is room for it.
    fn place(&self, space: &Space<'_>) -> Result<u64, Problem> {
        let preferred = if self.relocatable { self.preferred.max(ONE_MIB) } else { ONE_MIB };
        if space.find_low(preferred, self.init_size, 1) == Some(preferred) || !self.relocatable {
            return Ok(preferred);
        }
        let too_big = || space.too_big("the unpacked kernel", ONE_MIB, self.init_size);
        space.find_low(ONE_MIB, self.init_size, self.alignment).ok_or_else(too_big)
    }
}

pub(super) fn load_bzimage(mut job: Job<'_>, head: &[u8]) -> Result<Loaded, (Role, Problem)> {
    let in_kernel = |p| (Role::Kernel, p);
    let setup = Setup::parse(head, job.kernel.len()).map_err(in_kernel)?;
    let at = setup.place(&job.space).map_err(in_kernel)?;
    job.space.claim("the kernel", at, setup.init_size).map_err(in_kernel)?;
    job.space.copy(job.kernel, setup.code_offset, setup.code_size, at).map_err(in_kernel)?;
    job.space.cmdline(job.cmdline, setup.cmdline_size.into()).map_err(in_kernel)?;
    let initrd = initrd(&mut job.space, job.initrd, setup.initrd_limit).map_err(|p| (Role::Initrd, p))?;
    let fields = ZeroPage { header: &setup.bytes, initrd, rsdp: job.rsdp };
    fields.write(&job).map_err(in_kernel)?;
    let (entry, state) = if setup.is_64 {
        let entry = at + ENTRY_64;
        (entry, start::long_mode(&job.space, job.map, entry, ZERO_PAGE))
    } else {
        let entry =
            u32::try_from(at).map_err(|_| in_kernel(Problem::Damaged("it loads above 4 GiB".into())))?;
        let state = start::protected_mode(&job.space, job.map, entry, 0, 0).map(|mut s| {
            s.gpr[6] = ZERO_PAGE;
            s
        });
        (at, state)
    };
    Ok(Loaded { kind: KernelKind::LinuxBzImage, entry, state: state.map_err(in_kernel)? })
}

/// A 64-bit ELF image without a PVH note, which can only be entered as Linux is.
pub(super) fn load_elf(mut job: Job<'_>, elf: &elf::Elf) -> Result<Loaded, (Role, Problem)> {
    let in_kernel = |p| (Role::Kernel, p);
    if !elf.is_64 {
        return Err(in_kernel(Problem::Unsupported(
            "it is a 32-bit ELF image with neither a PVH note nor a multiboot header, so nobody knows how to \
             enter it"
                .into(),
        )));
    }
    if !elf.covers(elf.entry) {
        return Err(in_kernel(Problem::Unsupported(format!(
            "its entry point {:#x} is not in what it loads: it is a program for an operating system, or a \
             kernel linked for virtual addresses without a PVH note",
            elf.entry
        ))));
    }
    elf.load(job.kernel, &mut job.space).map_err(in_kernel)?;
    job.space.cmdline(job.cmdline, u64::MAX).map_err(in_kernel)?;
    let initrd = initrd(&mut job.space, job.initrd, u64::MAX).map_err(|p| (Role::Initrd, p))?;
    let mut header = vec![0; field::INIT_SIZE - field::SETUP_SECTS];
    let mut put = |at: usize, bytes: &[u8]| {
        let at = at - field::SETUP_SECTS;
        header[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(field::BOOT_FLAG, &BOOT_FLAG.to_le_bytes());
    put(field::HEADER, HEADER);
    put(field::VERSION, &0x20c_u16.to_le_bytes());
    put(field::LOADFLAGS, &[LOADED_HIGH]);
    put(field::KERNEL_ALIGNMENT, &0x0100_0000_u32.to_le_bytes());
    put(field::CMDLINE_SIZE, &u32::from(u16::MAX).to_le_bytes());
    ZeroPage { header: &header, initrd, rsdp: job.rsdp }.write(&job).map_err(in_kernel)?;
    let state = start::long_mode(&job.space, job.map, elf.entry, ZERO_PAGE).map_err(in_kernel)?;
    Ok(Loaded { kind: KernelKind::LinuxElf, entry: elf.entry, state })
}

/// Puts the initrd as high as allowed; address and size, zero where there is none.
fn initrd(space: &mut Space<'_>, image: Option<&dyn Image>, limit: u64) -> Result<(u64, u64), Problem> {
    let Some(image) = image else { return Ok((0, 0)) };
    let at = space.claim_top("the initrd", image.len(), terem_memory::PAGE_SIZE, limit)?;
    space.copy(image, 0, image.len(), at)?;
    Ok((at, image.len()))
}

/// `struct boot_params`.
struct ZeroPage<'a> {
    header: &'a [u8],
    initrd: (u64, u64),
    rsdp: u64,
}

impl ZeroPage<'_> {
    fn write(&self, job: &Job<'_>) -> Result<(), Problem> {
        let space = &job.space;
        let low = |v: u64| u32::try_from(v & 0xffff_ffff).unwrap_or(0).to_le_bytes();
        space.zero(ZERO_PAGE, ZERO_PAGE_SIZE)?;
        space.write(ZERO_PAGE + field::SETUP_SECTS as u64, self.header)?;
        // Both lie below 4 GiB: initrds go into low RAM.
        space.write(ZERO_PAGE + field::RAMDISK_IMAGE, &low(self.initrd.0))?;
        space.write(ZERO_PAGE + field::RAMDISK_SIZE, &low(self.initrd.1))?;
        space.write(ZERO_PAGE + field::CMD_LINE_PTR, &low(CMDLINE))?;
        space.write(ZERO_PAGE + field::TYPE_OF_LOADER, &[LOADER_UNDEFINED])?;
        space.write(ZERO_PAGE + field::ACPI_RSDP, &self.rsdp.to_le_bytes())?;
        let entries = e820::entries(job.map);
        let table: Vec<u8> = entries.iter().take(E820_MAX).flat_map(|e| e.to_bytes()).collect();
        space.write(ZERO_PAGE + field::E820_ENTRIES, &[u8::try_from(entries.len()).unwrap_or(0)])?;
        space.write(ZERO_PAGE + field::E820_TABLE, &table)
    }
}
