//! A kernel from anywhere: bzImage, ELF, PVH, multiboot 1 and 2. The input's last byte says what else there is.
//!
//! What is expected of a kernel that was loaded: its entry point is in RAM, and nobody has written where firmware's
//! tables are. What is expected of all: from a file everything is as from memory, errors included, and loading again,
//! as a reset does, changes nothing.

#![no_main]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use terem_machine::boot::{BootFiles, BytesImage, Image, Loaded, load};
use terem_machine::e820::{FIRMWARE_AREA, FIRMWARE_AREA_END};
use terem_machine::plan::MemoryMap;
use terem_memory::vm_memory::{Bytes, GuestAddress};
use terem_memory::{GuestMemory, PAGE_SIZE};

const MIB: u64 = 1 << 20;
/// What stands where tables are.
const TABLES: [u8; 64] = *b"RSD PTR what the firmware has made before a kernel was loaded   ";

fuzz_target!(|bytes: &[u8]| {
    let Some((&options, kernel)) = bytes.split_last() else { return };
    if kernel.is_empty() {
        return; // an empty file has an error of its own, before anything is loaded
    }
    let map = MemoryMap::q35([4, 5, 8, 24][usize::from(options & 3)] * MIB).unwrap();
    let initrd = (options & 4 != 0).then(|| vec![options; usize::from(options >> 4) * 3000 + 1]);
    let cmdline = if options & 8 != 0 { "console=ttyS0 root=/dev/vda" } else { "" };

    let from_memory = guest(&map);
    let image = initrd.as_deref().map(BytesImage);
    let image = image.as_ref().map(|i| i as &dyn Image);
    let first = load(&BytesImage(kernel), image, cmdline, &from_memory, &map, FIRMWARE_AREA)
        .map_err(|(_, problem)| problem.to_string());

    let (kernel, initrd) = (Scratch::new(kernel), initrd.as_deref().map(Scratch::new));
    let initrd_path = initrd.as_ref().map(Scratch::path);
    let files = BootFiles::open(&kernel.path(), initrd_path.as_deref(), cmdline).unwrap();
    let from_files = guest(&map);
    for _ in 0..2 {
        let again = files.load(&from_files, &map, FIRMWARE_AREA).map_err(|e| e.problem.to_string());
        assert_same(&first, &again);
        if again.is_ok() {
            assert!(pages(&from_memory) == pages(&from_files), "file and memory were loaded differently");
        }
    }
    if let Ok(loaded) = first {
        assert!(from_memory.is_ram(loaded.entry, 1), "enters {:#x}, where no RAM is", loaded.entry);
        assert_eq!(loaded.state.rip, loaded.entry);
    }
    check_tables(&from_memory, &map);
    check_tables(&from_files, &map);
});

fn assert_same(a: &Result<Loaded, String>, b: &Result<Loaded, String>) {
    match (a, b) {
        (Ok(a), Ok(b)) => assert_eq!((a.kind, a.entry, &a.state), (b.kind, b.entry, &b.state)),
        (Err(a), Err(b)) => assert_eq!(a, b),
        (a, b) => panic!("{a:?} from memory, {b:?} from a file"),
    }
}

/// A file without a name.
struct Scratch(File);

impl Scratch {
    fn new(bytes: &[u8]) -> Self {
        let mut file =
            File::from(rustix::fs::memfd_create("kernel", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.write_all(bytes).unwrap();
        Self(file)
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

fn table_pages(map: &MemoryMap) -> impl Iterator<Item = u64> {
    let step = usize::try_from(PAGE_SIZE).unwrap();
    (FIRMWARE_AREA..FIRMWARE_AREA_END).chain(map.tables.base..map.tables.end()).step_by(step)
}

fn guest(map: &MemoryMap) -> GuestMemory {
    let memory = GuestMemory::new(&map.ram()).unwrap();
    for page in table_pages(map) {
        memory.write_slice(&TABLES, GuestAddress(page)).unwrap();
    }
    memory
}

fn check_tables(memory: &GuestMemory, map: &MemoryMap) {
    for page in table_pages(map) {
        let mut found = [0; TABLES.len()];
        memory.read_slice(&mut found, GuestAddress(page)).unwrap();
        assert_eq!(found, TABLES, "tables at {page:#x} were written over");
    }
}

/// The pages that are not all zeroes, by their places in the memory's file, holes left out.
fn pages(memory: &GuestMemory) -> BTreeMap<u64, Vec<u8>> {
    let file = File::from(memory.memfd().try_clone_to_owned().unwrap());
    let (mut all, mut at) = (BTreeMap::new(), 0);
    while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        at = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data)).unwrap();
        let mut bytes = vec![0; usize::try_from(at - data).unwrap()];
        file.read_exact_at(&mut bytes, data).unwrap();
        let page_size = usize::try_from(PAGE_SIZE).unwrap();
        for (place, page) in (data..).step_by(page_size).zip(bytes.chunks(page_size)) {
            if page.iter().any(|&b| b != 0) {
                all.insert(place, page.to_vec());
            }
        }
    }
    all
}
