//! Loading of real kernels (where they have been fetched), of hand-made images, and of nonsense.

use std::path::PathBuf;
use std::process::Command;

use proptest::prelude::*;
use terem_cpu::VcpuState;
use terem_memory::GuestMemory;
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::space::{CMDLINE, INFO, ZERO_PAGE};
use super::*;

const MIB: u64 = 1 << 20;

fn guest(size: u64) -> (GuestMemory, MemoryMap) {
    let map = MemoryMap::q35(size).unwrap();
    (GuestMemory::new(&map.ram()).unwrap(), map)
}

fn u32_at(memory: &GuestMemory, addr: u64) -> u32 {
    memory.read_obj(GuestAddress(addr)).unwrap()
}

fn text_at(memory: &GuestMemory, addr: u64, len: usize) -> String {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// A file of the guest scripts' cache, if they have been run here.
fn cached(name: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("TEREM_CACHE")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/terem")))?;
    let file = cache.join(name);
    if !file.exists() {
        eprintln!("{} is not there: not tested", file.display());
        return None;
    }
    Some(file)
}

fn problem(kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> String {
    let (memory, map) = guest(64 * MIB);
    let initrd = initrd.map(BytesImage);
    let initrd = initrd.as_ref().map(|i| i as &dyn Image);
    let (role, p) = load(&BytesImage(kernel), initrd, cmdline, &memory, &map, 0).unwrap_err();
    format!("{role}: {p}")
}

/// A bzImage of one setup sector and `code` bytes of protected-mode code.
fn bzimage(code: usize) -> Vec<u8> {
    let mut image = vec![0x90; 1024 + code];
    image[..1024].fill(0);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &u32::try_from(code / 16).unwrap().to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &255_u32.to_le_bytes());
    put(0x258, &0x100_0000_u64.to_le_bytes());
    put(0x260, &0x40_0000_u32.to_le_bytes());
    image
}

#[test]
fn a_bzimage_is_entered_in_64_bit_mode() {
    let (memory, map) = guest(64 * MIB);
    let image = bzimage(4096);
    let initrd = vec![7; 5000];
    let loaded =
        load(&BytesImage(&image), Some(&BytesImage(&initrd)), "console=ttyS0", &memory, &map, 0xe_0000)
            .unwrap();
    assert_eq!((loaded.kind, loaded.entry), (KernelKind::LinuxBzImage, 0x100_0200));
    let s = &loaded.state;
    assert_eq!((s.rip, s.gpr[6], s.msrs.efer), (0x100_0200, ZERO_PAGE, 0x500));
    assert_eq!(s.segments[VcpuState::CS].selector, 0x10);
    assert_eq!(u32_at(&memory, 0x100_0000), 0x9090_9090);
    assert_eq!(text_at(&memory, CMDLINE, 14), "console=ttyS0\0");
    let zero = |at: u64| u32_at(&memory, ZERO_PAGE + at);
    assert_eq!((zero(0x228), zero(0x21c), zero(0x210) & 0xff), (0x2_0000, 5000, 0xff));
    assert_eq!((zero(0x70), zero(0x202)), (0xe_0000, u32::from_le_bytes(*b"HdrS")));
    let initrd_at = u64::from(zero(0x218));
    assert!(initrd_at.is_multiple_of(4096) && initrd_at + 5000 <= map.tables.base);
    assert_eq!(u32_at(&memory, initrd_at + 4996), 0x0707_0707);
    let entries = zero(0x1e8) & 0xff;
    assert_eq!(entries as usize, crate::e820::entries(&map).len());
    // CR3 → PML4[0] → PDPT[3] → PD[511]: the last 2 MiB below 4 GiB map to themselves.
    let entry = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
    let pdpt = entry(s.cr3) & !0xfff;
    let pd = entry(pdpt + 3 * 8) & !0xfff;
    assert_eq!(entry(pd + 511 * 8), 0xffe0_0083);
}

#[test]
fn a_32_bit_bzimage_is_entered_in_protected_mode() {
    let (memory, map) = guest(64 * MIB);
    let mut image = bzimage(4096);
    image[0x236] = 0;
    let loaded = load(&BytesImage(&image), None, "", &memory, &map, 0).unwrap();
    assert_eq!((loaded.entry, loaded.state.cr0 & (1 << 31)), (0x100_0000, 0));
    assert_eq!(loaded.state.gpr[6], ZERO_PAGE);
}

#[test]
fn small_memory_takes_a_relocatable_kernel_lower() {
    let (memory, map) = guest(12 * MIB);
    let loaded = load(&BytesImage(&bzimage(4096)), None, "", &memory, &map, 0).unwrap();
    assert_eq!(loaded.entry, 0x20_0200);
}

#[test]
fn what_does_not_work_is_told_with_reason_and_way_out() {
    assert!(problem(b"#!/bin/sh\n", None, "").contains("no kernel (a script)"));
    assert!(problem(b"QFI\xfb....", None, "").contains("give it as --disk"));
    assert!(problem(&[0; 3], None, "").contains("begins with 00 00 00"));
    let image = bzimage(4096);
    assert!(problem(&image[..2000], None, "").contains("cut short"));
    assert!(problem(&image, None, &"x".repeat(256)).contains("256 bytes and this kernel takes 255"));
    assert!(problem(&image, None, "a\0b").contains("zero byte"));
    let big = vec![0; 70 << 20];
    let text = problem(&image, Some(&big), "");
    assert!(text.contains("initrd: the initrd needs 70 MiB") && text.contains("has 64 MiB"), "{text}");
    let mut huge = image.clone();
    huge[0x260..0x264].copy_from_slice(&0x1000_0000_u32.to_le_bytes());
    assert!(problem(&huge, None, "").contains("the unpacked kernel needs 256 MiB"));
    let mut old = image;
    old[0x206..0x208].copy_from_slice(&0x200_u16.to_le_bytes());
    assert!(problem(&old, None, "").contains("boot protocol 2.00"));
    let mut arm = b"\x7fELF\x02\x01\x01".to_vec();
    arm.resize(64, 0);
    arm[18] = 183;
    assert!(problem(&arm, None, "").contains("another processor (machine 183)"));
    assert!(problem(&arm[..40], None, "").contains("cut short"));

    let dir = tempfile::tempdir().unwrap();
    let open = |p: &std::path::Path| BootFiles::open(p, None, "").unwrap_err().to_string();
    assert!(open(dir.path()).contains("it is a directory"), "{}", open(dir.path()));
    assert!(open(&dir.path().join("none")).contains("there is no such file"));
    let empty = dir.path().join("empty");
    std::fs::write(&empty, b"").unwrap();
    assert!(open(&empty).contains("the file is empty"));
}

#[test]
fn debian_kernels_load() {
    for series in ["6.1", "6.12"] {
        for size in [256 * MIB, 8192 * MIB] {
            let (memory, map) = guest(size);
            if let Some(path) = cached(&format!("kernel-{series}/vmlinuz")) {
                let initrd = cached(&format!("minimal-{series}/initramfs"));
                let files = BootFiles::open(&path, initrd.as_deref(), "console=ttyS0").unwrap();
                let loaded = files.load(&memory, &map, 0xe_0000).unwrap();
                assert_eq!((loaded.kind, loaded.entry), (KernelKind::LinuxBzImage, 0x100_0200));
            }
            let (memory, map) = guest(size);
            if let Some(path) = cached(&format!("kernel-{series}/vmlinux")) {
                let files = BootFiles::open(&path, None, "console=ttyS0").unwrap();
                let loaded = files.load(&memory, &map, 0xe_0000).unwrap();
                assert_eq!(loaded.kind, KernelKind::Pvh);
                assert_eq!(loaded.state.gpr[3], INFO);
                assert_eq!(u32_at(&memory, INFO), 0x336e_c578);
                assert_eq!(text_at(&memory, CMDLINE, 7), "console");
                assert_ne!(u32_at(&memory, loaded.entry), 0);
            }
        }
    }
}

/// Assembles `source` with nasm; `None` where there is no nasm.
fn nasm(source: &str, format: &str) -> Option<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("a.asm"), dir.path().join("a.out"));
    std::fs::write(&from, source).unwrap();
    let Ok(out) = Command::new("nasm").args(["-f", format, "-o"]).arg(&to).arg(&from).output() else {
        eprintln!("no nasm here: not tested");
        return None;
    };
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Some(std::fs::read(&to).unwrap())
}

const MULTIBOOT_ADDRESSES: &str = "
bits 32
org 0x200000
        db 'some bytes before the header    '
header: dd 0x1badb002, 0x10003, -(0x1badb002 + 0x10003)
        dd header, 0x200000, end, end + 0x1000, start
start:  hlt
end:
";

#[test]
fn a_flat_multiboot_image_goes_where_its_header_says() {
    let Some(image) = nasm(MULTIBOOT_ADDRESSES, "bin") else { return };
    let (memory, map) = guest(16 * MIB);
    memory.write_slice(&[0xff; 256], GuestAddress(0x20_0000)).unwrap();
    let module = [1, 2, 3];
    let loaded = load(&BytesImage(&image), Some(&BytesImage(&module)), "a b", &memory, &map, 0).unwrap();
    assert_eq!(loaded.kind, KernelKind::Multiboot);
    assert_eq!((loaded.state.gpr[0], loaded.state.gpr[3]), (0x2bad_b002, INFO));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(loaded.entry)).unwrap(), 0xf4);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(loaded.entry + 1)).unwrap(), 0, "cleared");
    let info = |at: u64| u32_at(&memory, INFO + at);
    assert_eq!((info(0), info(4), info(20)), (0x24d, 639, 1));
    assert_eq!(info(8), u32::try_from((map.tables.base - MIB) / 1024).unwrap());
    let modules = u64::from(info(24));
    let (start, end) = (u32_at(&memory, modules), u32_at(&memory, modules + 4));
    assert_eq!((end - start, u32_at(&memory, start.into()) & 0xff_ffff), (3, 0x03_0201));
    assert_eq!(text_at(&memory, info(16).into(), 4), "a b\0");
    let map_at = u64::from(info(48));
    assert_eq!((u32_at(&memory, map_at), u32_at(&memory, map_at + 20)), (20, 1));
    assert_eq!(info(44) as usize, crate::e820::entries(&map).len() * 24);
}

#[test]
fn multiboot_images_that_want_a_display_are_refused() {
    let video = MULTIBOOT_ADDRESSES.replace("0x10003", "0x10007");
    let Some(image) = nasm(&video, "bin") else { return };
    assert!(problem(&image, None, "").contains("wants a video mode"));
    let strange = nasm(&MULTIBOOT_ADDRESSES.replace("0x10003", "0x10083"), "bin").unwrap();
    assert!(problem(&strange, None, "").contains("flags 0x83"));
    let low = nasm(&MULTIBOOT_ADDRESSES.replace("0x200000", "0x10000"), "bin").unwrap();
    assert!(problem(&low, None, "").contains("where the loader's own data is"));
}

/// `{tags}` stand before the end tag.
const MULTIBOOT2: &str = "
bits 32
org 0x100000
header: dd 0xe85250d6, 0, last - header, -(0xe85250d6 + last - header)
        {tags}
        align 8
        dw 2, 0
        dd 24, header, 0x100000, 0, 0
        align 8
        dw 3, 0
        dd 12, start
        align 8
        dw 0, 0
        dd 8
last:
start:  hlt
";

#[test]
fn a_multiboot_2_image_gets_its_tags() {
    let Some(image) = nasm(&MULTIBOOT2.replace("{tags}", "dw 1, 0\n dd 16, 4, 6"), "bin") else { return };
    let (memory, map) = guest(16 * MIB);
    memory.write_slice(b"RSD PTR ", GuestAddress(0xe_0000)).unwrap();
    let loaded = load(&BytesImage(&image), None, "hello", &memory, &map, 0xe_0000).unwrap();
    assert_eq!((loaded.kind, loaded.state.gpr[0]), (KernelKind::Multiboot2, 0x36d7_6289));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(loaded.entry)).unwrap(), 0xf4);
    let total = u64::from(u32_at(&memory, INFO));
    let (mut at, mut seen) = (8, Vec::new());
    while at < total {
        let (kind, size) = (u32_at(&memory, INFO + at), u32_at(&memory, INFO + at + 4));
        if kind == 1 {
            assert_eq!(text_at(&memory, INFO + at + 8, 6), "hello\0");
        }
        if kind == 15 {
            assert_eq!(text_at(&memory, INFO + at + 8, 8), "RSD PTR ");
        }
        seen.push(kind);
        at += u64::from(size.next_multiple_of(8));
    }
    assert_eq!(seen, [1, 2, 4, 6, 14, 15, 0]);
    let framebuffer = nasm(&MULTIBOOT2.replace("{tags}", "dw 5, 0\n dd 20, 0, 0, 0"), "bin").unwrap();
    assert!(problem(&framebuffer, None, "").contains("insists on a framebuffer"));
    let optional = nasm(&MULTIBOOT2.replace("{tags}", "dw 5, 1\n dd 20, 0, 0, 0"), "bin").unwrap();
    assert!(load(&BytesImage(&optional), None, "", &memory, &map, 0).is_ok());
}

/// Whatever is cut from it, the header is not read beyond the file's end.
#[test]
fn a_kernel_that_ends_in_its_header_is_an_error() {
    let (image, (memory, map)) = (bzimage(4096), guest(8 * MIB));
    for cut in 1..0x400 {
        assert!(load(&BytesImage(&image[..cut]), None, "", &memory, &map, 0).is_err(), "{cut}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Damaged headers of each kind are loaded or refused, and never read or write out of bounds.
    #[test]
    fn damaged_images_do_no_harm(kind in 0..4, cut in 0_usize..6000, changes in prop::collection::vec((0_usize..0x280, any::<u8>()), 0..12)) {
        let mut image = match kind {
            0 => bzimage(4096),
            1 => small_elf(),
            2 => words(&[0x1bad_b002, 0x1_0003, 0u32.wrapping_sub(0x1bad_b002 + 0x1_0003), 0x20_0000, 0x20_0000, 0, 0, 0x20_0020]),
            _ => words(&[0xe852_50d6, 0, 24, 0u32.wrapping_sub(0xe852_50d6 + 24), 0, 8]),
        };
        for (at, value) in changes {
            if let Some(byte) = image.get_mut(at) {
                *byte = value;
            }
        }
        image.truncate(cut.max(1));
        let (memory, map) = guest(8 * MIB);
        let _ = load(&BytesImage(&image), Some(&BytesImage(&[1; 100])), "x", &memory, &map, 0);
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    bytes.resize(4096, 0x90);
    bytes
}

/// A 64-bit ELF image with one segment at 1 MiB and a PVH note.
fn small_elf() -> Vec<u8> {
    let mut image = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1]);
    put(24, &0x10_0000_u64.to_le_bytes());
    put(32, &64_u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0]);
    put(64, &[1, 0, 0, 0, 7]);
    for (i, value) in [256_u64, 0x10_0000, 0x10_0000, 256, 0x2000].into_iter().enumerate() {
        put(72 + i * 8, &value.to_le_bytes());
    }
    put(120, &[4]);
    for (i, value) in [256_u64, 0, 0, 24, 24].into_iter().enumerate() {
        put(128 + i * 8, &value.to_le_bytes());
    }
    for (i, word) in [4_u32, 8, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0040, 0].into_iter().enumerate() {
        put(256 + i * 4, &word.to_le_bytes());
    }
    image
}

#[test]
fn a_multiboot_header_cannot_send_the_processor_out_of_memory() {
    let sum = 0u32.wrapping_sub(0x1bad_b002 + 0x1_0003);
    let header =
        |load: u32, end: u32, entry: u32| words(&[0x1bad_b002, 0x1_0003, sum, load, load, end, 0, entry]);
    let outside = header(0x20_0000, 0, 0xff00_0000);
    assert!(problem(&outside, None, "").contains("its entry point 0xff000000 is not in memory"));
    // Nothing, loaded to nowhere, and from a file as from memory.
    let nothing = header(0xff00_0000, 0xff00_0000, 0x20_0000);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    std::fs::write(&path, &nothing).unwrap();
    let (memory, map) = guest(8 * MIB);
    assert_eq!(load(&BytesImage(&nothing), None, "", &memory, &map, 0).unwrap().entry, 0x20_0000);
    let files = BootFiles::open(&path, None, "").unwrap();
    assert_eq!(files.load(&memory, &map, 0).unwrap().entry, 0x20_0000);
}

#[test]
fn an_elf_image_with_a_pvh_note_is_entered_there() {
    let (memory, map) = guest(8 * MIB);
    let loaded = load(&BytesImage(&small_elf()), None, "x", &memory, &map, 0xe_0000).unwrap();
    assert_eq!((loaded.kind, loaded.entry), (KernelKind::Pvh, 0x10_0040));
    let mut plain = small_elf();
    plain[256 + 8] = 3;
    let loaded = load(&BytesImage(&plain), None, "x", &memory, &map, 0xe_0000).unwrap();
    assert_eq!((loaded.kind, loaded.entry), (KernelKind::LinuxElf, 0x10_0000));
}

#[test]
fn a_piece_of_a_file_arrives_in_the_right_range() {
    let (memory, _) = guest(16 * MIB);
    let bytes: Vec<u8> = (0..100_000_u32).map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, &bytes).unwrap();
    let file = FileImage::open(&path).unwrap();
    let addr = 0xc_1007;
    memory.write_slice(&[0xaa; 90_002], GuestAddress(addr - 1)).unwrap();
    let page = addr / 4096 + 3;
    let word = memory.marks().mark_code(page);
    file.copy(1_234, 90_000, &memory, addr).unwrap();
    let mut read = vec![0; 90_002];
    memory.read_slice(&mut read, GuestAddress(addr - 1)).unwrap();
    assert_eq!((read[0], read[90_001]), (0xaa, 0xaa));
    assert!(read[1..90_001] == bytes[1_234..91_234]);
    assert_ne!(memory.marks().word(page), word, "decoded code is not valid any more");
    assert!(file.copy(0, 10, &memory, 0x9_ffff).is_err(), "no range holds it");
    assert!(file.copy(99_995, 10, &memory, addr).is_err(), "past the end of the file");
}
