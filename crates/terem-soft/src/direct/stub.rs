//! What a guest program's process is made of: the executable of one page that it begins as, the list of system calls that it makes
//! for the VMM, and the filter that it locks itself in with.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use libc::c_int;
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create, open};

/// Where the stub lies: at the lowest address that Linux gives out by default, which programs hardly ever ask for.
pub(super) const STUB: u64 = 0x1_0000;
/// One past the stub's two pages.
pub(super) const STUB_END: u64 = STUB + 0x2000;
/// Where the stub's list of calls is.
pub(super) const CALLS: u64 = STUB + 0x1000;
/// One past the last address that a program may have.
pub(super) const USER_END: u64 = 0x7fff_ffff_f000;

/// The stub behind the headers of its executable: it waits; and it makes R12 calls of the list at RBX (number and six
/// arguments each), stops at the first that fails, and traps.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xb8, 34, 0, 0, 0,              // wait: mov eax, SYS_pause
    0x0f, 0x05,                     //       syscall
    0xeb, 0xf7,                     //       jmp wait
    0x48, 0x8b, 0x03,               // next: mov rax, [rbx]
    0x48, 0x8b, 0x7b, 8,            //       mov rdi, [rbx+8]
    0x48, 0x8b, 0x73, 16,           //       mov rsi, [rbx+16]
    0x48, 0x8b, 0x53, 24,           //       mov rdx, [rbx+24]
    0x4c, 0x8b, 0x53, 32,           //       mov r10, [rbx+32]
    0x4c, 0x8b, 0x43, 40,           //       mov r8, [rbx+40]
    0x4c, 0x8b, 0x4b, 48,           //       mov r9, [rbx+48]
    0x0f, 0x05,                     //       syscall
    0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff, //   cmp rax, -4095
    0x73, 9,                        //       jae done
    0x48, 0x83, 0xc3, 56,           //       add rbx, 56
    0x49, 0xff, 0xcc,               //       dec r12
    0x75, 0xd2,                     //       jnz next
    0xcc,                           // done: int3
];
/// Where in the executable's page the stub's code is: behind its two headers.
const CODE_AT: u64 = 0xb0;
pub(super) const WAIT: u64 = STUB + CODE_AT;
pub(super) const NEXT: u64 = WAIT + 9;
/// The system call in it, for one that is made from registers.
pub(super) const SYSCALL: u64 = NEXT + 27;

/// A system call: its number and arguments.
pub(super) type Call = [u64; 7];
/// Calls in the list, at most.
const MOST_CALLS: usize = 4096 / size_of::<Call>();

/// What the process's descriptors are.
const RAM_FD: u64 = 0;
pub(super) const CALLS_FD: u64 = 1;
const COPIES_FD: u64 = 2;

/// The executable, in memory.
#[derive(Debug)]
pub(super) struct Image(File);

impl Image {
    /// # Errors
    /// The host's, when it does not let programs be made so.
    pub(super) fn new() -> io::Result<Self> {
        let mut page = vec![0_u8; 4096];
        // ELF header and one program header (System V ABI, chapters 4 and 5).
        page[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        put(16, &2_u16.to_le_bytes()); // executable
        put(18, &62_u16.to_le_bytes()); // x86-64
        put(20, &1_u32.to_le_bytes());
        put(24, &WAIT.to_le_bytes());
        put(32, &64_u64.to_le_bytes());
        put(52, &64_u16.to_le_bytes());
        put(54, &56_u16.to_le_bytes());
        put(56, &2_u16.to_le_bytes());
        put(64, &1_u32.to_le_bytes()); // load
        put(68, &5_u32.to_le_bytes()); // read, execute
        put(80, &STUB.to_le_bytes());
        put(88, &STUB.to_le_bytes());
        put(96, &4096_u64.to_le_bytes());
        put(104, &4096_u64.to_le_bytes());
        put(112, &4096_u64.to_le_bytes());
        // A stack that is not executable: else Linux before 5.8 would make everything so that can be read.
        put(120, &0x6474_e551_u32.to_le_bytes());
        put(124, &6_u32.to_le_bytes());
        put(CODE_AT as usize, CODE);
        let writable = memfd_create("terem-program", MemfdFlags::CLOEXEC)?;
        let mut file = File::from(writable);
        file.write_all(&page)?;
        // What is open for writing cannot be executed.
        let read_only = open(path_of(&file), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self(File::from(read_only)))
    }

    /// Where it can be executed.
    pub(super) fn path(&self) -> String {
        path_of(&self.0)
    }
}

/// Where a file can be opened or executed again.
fn path_of(file: &File) -> String {
    format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file))
}

/// The list of calls, shared with the process.
#[derive(Debug)]
pub(super) struct Calls(NonNull<Call>);

impl Calls {
    /// An empty one, and the file that it is in.
    ///
    /// # Errors
    /// The host's, when it has no memory or descriptors.
    pub(super) fn new() -> io::Result<(Self, OwnedFd)> {
        let fd = memfd_create("terem-calls", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, 4096)?;
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let at = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                4096,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED,
                &fd,
                0,
            )
        }?;
        let at = NonNull::new(at.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok((Self(at), fd))
    }

    /// Writes calls to the list's start; as many as it takes.
    pub(super) fn put(&mut self, calls: &[Call]) -> usize {
        let count = calls.len().min(MOST_CALLS);
        // SAFETY: the mapping has room for that many, and the process only reads while it runs.
        unsafe { std::ptr::copy_nonoverlapping(calls.as_ptr(), self.0.as_ptr(), count) };
        count
    }

    /// Writes bytes to a place in its page.
    pub(super) fn put_bytes(&mut self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= 4096, "the list is a page");
        // SAFETY: inside the mapping.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.as_ptr().cast::<u8>().add(at), bytes.len());
        }
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`.
        let _ = unsafe { rustix::mm::munmap(self.0.as_ptr().cast(), 4096) };
    }
}

pub(super) const SHARED_FIXED: u64 = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;

/// Where mapped pages come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// Guest memory.
    Ram,
    /// The copies.
    Copies,
}

/// A mapping of what is at `offset` of a file.
pub(super) fn map(address: u64, len: u64, protection: c_int, source: Source, offset: u64) -> Call {
    // What is asked for is wanted soon.
    let flags = SHARED_FIXED | if len <= 1 << 18 { libc::MAP_POPULATE as u64 } else { 0 };
    let fd = if source == Source::Ram { RAM_FD } else { COPIES_FD };
    [libc::SYS_mmap as u64, address, len, protection as u64, flags, fd, offset]
}

/// The end of a mapping.
pub(super) fn unmap(address: u64, len: u64) -> Call {
    [libc::SYS_munmap as u64, address, len, 0, 0, 0, 0]
}

/// Lets `mmap` and `munmap` through from the stub's page; everything else gets SIGSYS (seccomp(2)).
pub(super) fn filter() -> [libc::sock_filter; 12] {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const X86_64: u32 = 0xc000_003e;
    let op = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    // Offsets in seccomp_data: number 0, architecture 4, instruction pointer 8.
    [
        op(LOAD, 4, 0, 0),
        op(EQUAL, X86_64, 0, 8),
        op(LOAD, 12, 0, 0),
        op(EQUAL, 0, 0, 6),
        op(LOAD, 8, 0, 0),
        op(AT_LEAST, STUB as u32, 0, 4),
        op(AT_LEAST, STUB as u32 + 0x1000, 3, 0),
        op(LOAD, 0, 0, 0),
        op(EQUAL, libc::SYS_mmap as u32, 2, 0),
        op(EQUAL, libc::SYS_munmap as u32, 1, 0),
        op(RETURN, libc::SECCOMP_RET_TRAP, 0, 0),
        op(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0),
    ]
}

/// An instruction of the filter as the kernel reads it.
pub(super) fn instruction_bytes(i: &libc::sock_filter) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..2].copy_from_slice(&i.code.to_le_bytes());
    (bytes[2], bytes[3]) = (i.jt, i.jf);
    bytes[4..].copy_from_slice(&i.k.to_le_bytes());
    bytes
}
