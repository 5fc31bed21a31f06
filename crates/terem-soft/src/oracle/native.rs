//! The host's side: a child process that runs cases on the processor itself.
//!
//! The child lives in a signal handler. Returning from it loads all registers with a case's and runs the
//! case, whose end (`int3`) or fault is the next signal, with all registers in its frame. Under strict
//! seccomp the child can do nothing but read, write, exit and return from signals, so whatever a case
//! manages to do stays in there.

use std::io;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::case::{BATCH, CODE, Case, DATA, DATA_LEN, Outcome, READ_ONLY, fill};

/// Shared with the child.
#[repr(C)]
struct Shared {
    /// The case that runs.
    at: AtomicU32,
    count: AtomicU32,
    /// The host has AVX, so that signal frames hold the upper halves of YMM registers.
    avx: bool,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
}

/// The host's processor, ready to run cases.
pub(super) struct Native {
    shared: *mut Shared,
    child: Option<Child>,
    /// The pages of the experiments lie at fixed addresses.
    _one: MutexGuard<'static, ()>,
}

struct Child {
    pid: libc::pid_t,
    go: RawFd,
    done: RawFd,
}

/// What the signal handler needs (set before the child is made, so fixed in it).
static SHARED: AtomicPtr<Shared> = AtomicPtr::new(ptr::null_mut());
static WRITABLE: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());
static GO: AtomicU32 = AtomicU32::new(0);
static DONE: AtomicU32 = AtomicU32::new(0);
static RUNNING: AtomicBool = AtomicBool::new(false);

/// Where the signal frame's XSAVE area says what is in it, and where the upper halves are.
const PRESENT: usize = 512;
const UPPERS: usize = 576;

/// Flags of a signal frame that are the processor's own doing: RF.
const FRAME_FLAGS: u64 = 1 << 16;

fn map(at: u64, len: usize, prot: i32, flags: i32, fd: RawFd) -> *mut u8 {
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    // SAFETY: a new mapping that replaces none.
    let p = unsafe { libc::mmap(at as *mut _, len, prot, flags | fixed, fd, 0) };
    assert!(p != libc::MAP_FAILED, "mmap at {at:#x}: {}", io::Error::last_os_error());
    p.cast()
}

impl Native {
    /// Maps the pages of the experiments. One at a time in a process: others wait.
    pub(super) fn new() -> Self {
        static ONE: Mutex<()> = Mutex::new(());
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: plain system calls.
        let fd = unsafe { libc::memfd_create(c"oracle".as_ptr(), 0) };
        // SAFETY: as above.
        assert!(fd >= 0 && unsafe { libc::ftruncate(fd, 0x1000) } == 0);
        let writable = map(0, 0x1000, RW, libc::MAP_SHARED, fd);
        map(CODE, 0x1000, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED, fd);
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        map(DATA, DATA_LEN, RW, anonymous, -1);
        let read_only = map(READ_ONLY, 0x1000, RW, anonymous, -1);
        // SAFETY: just mapped; then made read-only.
        unsafe {
            fill(0, std::slice::from_raw_parts_mut(read_only, 0x1000));
            libc::mprotect(read_only.cast(), 0x1000, libc::PROT_READ);
        }
        let shared = map(0, size_of::<Shared>(), RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
        SHARED.store(shared.cast(), Ordering::Relaxed);
        WRITABLE.store(writable, Ordering::Relaxed);
        // SAFETY: just mapped.
        unsafe { (*shared.cast::<Shared>()).avx = is_x86_feature_detected!("avx") };
        // SAFETY: the mapping at CODE keeps the file.
        unsafe { libc::close(fd) };
        Self { shared: shared.cast(), child: None, _one: one }
    }

    /// Runs up to [`BATCH`] cases.
    pub(super) fn run(&mut self, cases: &[Case]) -> Vec<Outcome> {
        assert!(cases.len() <= BATCH);
        // SAFETY: the mapping lives as long as the process; the child waits, so nobody else uses it.
        let shared = unsafe { &mut *self.shared };
        shared.cases[..cases.len()].copy_from_slice(cases);
        shared.outcomes[..cases.len()].fill(Outcome::NONE);
        shared.at.store(0, Ordering::Relaxed);
        shared.count.store(cases.len() as u32, Ordering::Relaxed);
        while (shared.at.load(Ordering::Acquire) as usize) < cases.len() {
            if self.child.is_none() {
                self.child = Some(spawn());
            }
            if !self.child.as_ref().is_some_and(Child::finish) {
                // A case has killed it: go on after that one.
                if let Some(dead) = self.child.take() {
                    dead.bury();
                }
                shared.at.fetch_add(1, Ordering::Relaxed);
            }
        }
        shared.outcomes[..cases.len()].to_vec()
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            child.bury();
        }
        let writable = WRITABLE.load(Ordering::Relaxed);
        let maps = [
            (self.shared.cast(), size_of::<Shared>()),
            (writable, 0x1000),
            (CODE as *mut u8, 0x1000),
            (DATA as *mut u8, DATA_LEN),
            (READ_ONLY as *mut u8, 0x1000),
        ];
        // SAFETY: the mappings made in `new`; the next one's are made only after this.
        maps.iter().for_each(|&(at, len)| unsafe {
            libc::munmap(at.cast(), len);
        });
    }
}

impl Child {
    /// Lets it work; whether it came to the end of the batch within some seconds.
    fn finish(&self) -> bool {
        let mut byte = [1_u8];
        let mut poll = libc::pollfd { fd: self.done, events: libc::POLLIN, revents: 0 };
        // SAFETY: plain system calls on our own descriptors.
        unsafe {
            libc::write(self.go, byte.as_ptr().cast(), 1) == 1
                && libc::poll(&raw mut poll, 1, 5000) == 1
                && libc::read(self.done, byte.as_mut_ptr().cast(), 1) == 1
        }
    }

    fn bury(self) {
        // SAFETY: our own child and descriptors.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, ptr::null_mut(), 0);
            libc::close(self.go);
            libc::close(self.done);
        }
    }
}

fn spawn() -> Child {
    let (mut go, mut done) = ([0; 2], [0; 2]);
    // SAFETY: plain system calls; the child does only what is allowed after a fork of a threaded process.
    unsafe {
        assert!(libc::pipe(go.as_mut_ptr()) == 0 && libc::pipe(done.as_mut_ptr()) == 0);
        GO.store(go[0] as u32, Ordering::Relaxed);
        DONE.store(done[1] as u32, Ordering::Relaxed);
        let stack =
            map(0, 0x10000, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        let pid = libc::fork();
        assert!(pid >= 0);
        if pid == 0 {
            child(stack, go[1], done[0]);
        }
        libc::munmap(stack.cast(), 0x10000);
        libc::close(go[0]);
        libc::close(done[1]);
        Child { pid, go: go[1], done: done[0] }
    }
}

/// # Safety
/// Only in a fresh child; `stack` is 64 KiB.
unsafe fn child(stack: *mut u8, not_go: RawFd, not_done: RawFd) -> ! {
    // SAFETY: async-signal-safe system calls; the handler takes over with the first signal.
    unsafe {
        libc::close(not_go);
        libc::close(not_done);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        let alternate = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: 0x10000 };
        libc::sigaltstack(&raw const alternate, ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGBUS, libc::SIGTRAP] {
            libc::sigaction(signal, &raw const action, ptr::null_mut());
        }
        RUNNING.store(false, Ordering::Relaxed);
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT);
        std::arch::asm!("int3");
        libc::_exit(1)
    }
}

/// The order of general registers in a signal frame.
const FRAME_ORDER: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn on_signal(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel's frame, and the mappings made before the fork; this process has one thread.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let shared = &mut *SHARED.load(Ordering::Relaxed);
        let regs = &mut context.uc_mcontext.gregs;
        let fp = context.uc_mcontext.fpregs.cast::<u8>();
        let data = std::slice::from_raw_parts_mut(DATA as *mut u8, DATA_LEN);
        if RUNNING.load(Ordering::Relaxed) {
            let at = shared.at.load(Ordering::Relaxed) as usize;
            let outcome = &mut shared.outcomes[at % BATCH];
            outcome.vector = regs[libc::REG_TRAPNO as usize] as u32;
            outcome.code = regs[libc::REG_ERR as usize] as u32;
            outcome.cr2 = regs[libc::REG_CR2 as usize] as u64;
            outcome.rip = regs[libc::REG_RIP as usize] as u64;
            outcome.rflags = regs[libc::REG_EFL as usize] as u64 & !FRAME_FLAGS;
            for (to, from) in outcome.gpr.iter_mut().zip(FRAME_ORDER) {
                *to = regs[from as usize] as u64;
            }
            ptr::copy_nonoverlapping(fp, outcome.fx.0.as_mut_ptr(), 512);
            outcome.uppers.fill(0);
            if shared.avx && fp.add(PRESENT).cast::<u64>().read_unaligned() & 4 != 0 {
                ptr::copy_nonoverlapping(fp.add(UPPERS), outcome.uppers.as_mut_ptr(), 256);
            }
            outcome.data.copy_from_slice(data);
            shared.at.store(at as u32 + 1, Ordering::Release);
        }
        RUNNING.store(true, Ordering::Relaxed);
        while shared.at.load(Ordering::Acquire) >= shared.count.load(Ordering::Acquire) {
            let mut byte = [1_u8];
            libc::write(DONE.load(Ordering::Relaxed) as i32, byte.as_ptr().cast(), 1);
            if libc::read(GO.load(Ordering::Relaxed) as i32, byte.as_mut_ptr().cast(), 1) != 1 {
                libc::_exit(0);
            }
        }
        let case = &shared.cases[shared.at.load(Ordering::Relaxed) as usize % BATCH];
        fill(case.seed, data);
        let code = std::slice::from_raw_parts_mut(WRITABLE.load(Ordering::Relaxed), 0x1000);
        code.fill(0xcc);
        code[..case.len].copy_from_slice(&case.code[..case.len]);
        for (from, to) in case.gpr.iter().zip(FRAME_ORDER) {
            regs[to as usize] = *from as i64;
        }
        regs[libc::REG_EFL as usize] = case.rflags as i64;
        regs[libc::REG_RIP as usize] = CODE as i64;
        // The first 464 bytes are FXSAVE's; then come the kernel's marks and, at 512, XSAVE's header,
        // which says what of x87, SSE and AVX state is there.
        ptr::copy_nonoverlapping(case.fx.0.as_ptr(), fp, 24);
        ptr::copy_nonoverlapping(case.fx.0.as_ptr().add(24), fp.add(24), 4);
        ptr::copy_nonoverlapping(case.fx.0.as_ptr().add(32), fp.add(32), 384);
        let present = fp.add(PRESENT).cast::<u64>();
        if shared.avx {
            ptr::copy_nonoverlapping(case.uppers.as_ptr(), fp.add(UPPERS), 256);
        }
        let had = if shared.avx { 7 } else { 3 };
        present.write_unaligned(present.read_unaligned() & !had | case.present & had);
    }
}
