//! A process whose address space is a guest program's: traced by the vCPU's thread, with nothing else in it.
//!
//! It is made from an executable of one page ([`Image`]) that has a loop of system calls, maps what it is told in place of
//! what the kernel gave it, and then locks itself in: a seccomp filter lets system calls through only from that loop, and only
//! those that change mappings. While a guest's code runs, no system call is executed at all (`PTRACE_SYSEMU`).
//!
//! ```text
//!   STUB          the loop; can be read and executed, nothing more
//!   STUB + 4 KiB  system calls to make, which the VMM writes; can be read
//!   all else      pages of guest memory, as far as they are mapped
//! ```

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use libc::{c_int, pid_t, user_regs_struct};

use super::stub::{
    CALLS, CALLS_FD, Call, Calls, Image, NEXT, SHARED_FIXED, STUB_END, SYSCALL, USER_END, filter,
    instruction_bytes,
};
use crate::x87::SHARED_SIZE;

/// Why a guest's code stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// A system call: RIP is behind its two bytes, RAX in `orig_rax`.
    SystemCall,
    /// A page fault at this address (0 for what is none).
    Fault(u64),
    /// A breakpoint, or a single step.
    Trap { step: bool },
    /// A call of the page of old system calls at this address, already returned from.
    OldCall(u64),
    /// Another exception, or somebody asked.
    Other,
}

/// The process. Everything but [`stop`] is the vCPU's thread's.
#[derive(Debug)]
pub(super) struct Child {
    process: std::process::Child,
    pid: pid_t,
    calls: Calls,
    /// It has ended and was waited for: its number may be another's.
    reaped: bool,
    /// General registers, as they are in the process while it stands.
    pub(super) registers: user_regs_struct,
    /// `registers` are to be put into it before it runs.
    pub(super) changed: bool,
    /// x87 and vector state in the host's standard format, as long as the host's.
    extended: Vec<u8>,
    /// The part of it that a guest has, as it is in the process.
    shared: [u8; SHARED_SIZE],
}

// SAFETY: the mapping is this value's own. (A process obeys only the thread that traces it; another one gets errors.)
unsafe impl Send for Child {}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Child {
    /// A process for guest memory `ram` and copies of its pages, traced by this thread.
    ///
    /// # Errors
    /// The host's, when it lets no such process be made or traced.
    pub(super) fn new(image: &Image, ram: BorrowedFd<'_>, copies: BorrowedFd<'_>) -> io::Result<Self> {
        let (calls, calls_fd) = Calls::new()?;
        let process = Command::new(image.path())
            .env_clear()
            .process_group(0)
            .stdin(Stdio::from(ram.try_clone_to_owned()?))
            .stdout(Stdio::from(calls_fd))
            .stderr(Stdio::from(copies.try_clone_to_owned()?))
            .spawn()?;
        let pid = pid_t::try_from(process.id()).map_err(io::Error::other)?;
        // SAFETY: all zeroes is a value of this plain structure.
        let registers: user_regs_struct = unsafe { std::mem::zeroed() };
        let mut child = Self {
            process,
            pid,
            calls,
            reaped: false,
            registers,
            changed: false,
            extended: Vec::new(),
            shared: [0; SHARED_SIZE],
        };
        child.take_over()?;
        Ok(child)
    }

    fn take_over(&mut self) -> io::Result<()> {
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
        // SAFETY: these requests take no pointer.
        check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, self.pid, 0, options) })?;
        // SAFETY: as above.
        check(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, self.pid, 0, 0) })?;
        self.wait()?;
        self.unblock_signals()?;
        self.get_registers()?;
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid))?;
        let mut calls: Vec<Call> =
            vec![[libc::SYS_mmap as u64, CALLS, 4096, libc::PROT_READ as u64, SHARED_FIXED, CALLS_FD, 0]];
        // The first call is made from registers, since there is no list before it.
        let call = calls[0];
        let r = &mut self.registers;
        [r.rax, r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9] = call;
        (r.rip, r.r12, r.rbx, r.orig_rax) = (SYSCALL, 1, 0, u64::MAX);
        self.run_stub()?;
        calls.clear();
        for (from, to) in
            maps.lines().filter_map(range_of).filter(|&(from, to)| from >= STUB_END && to <= USER_END)
        {
            calls.push([libc::SYS_munmap as u64, from, to - from, 0, 0, 0, 0]);
        }
        calls.push([libc::SYS_close as u64, CALLS_FD, 0, 0, 0, 0, 0]);
        let filter = filter();
        let bytes: Vec<u8> = filter.iter().flat_map(instruction_bytes).collect();
        let at = 4096 - 16 - bytes.len();
        self.calls.put_bytes(at, &bytes);
        let mut program = [0; 16];
        program[..2].copy_from_slice(&(filter.len() as u16).to_le_bytes());
        program[8..].copy_from_slice(&(CALLS + at as u64).to_le_bytes());
        self.calls.put_bytes(4096 - 16, &program);
        calls.push([libc::SYS_prctl as u64, libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0, 0]);
        let mode = u64::from(libc::SECCOMP_SET_MODE_FILTER);
        calls.push([libc::SYS_seccomp as u64, mode, 0, CALLS + 4096 - 16, 0, 0, 0]);
        self.call(&calls)?;
        self.extended = vec![0; 16384];
        let mut part = self.vector();
        self.regset(libc::PTRACE_GETREGSET, &mut part)?;
        let size = part.iov_len;
        if size < SHARED_SIZE {
            return Err(io::Error::other("the host has no AVX"));
        }
        self.extended.truncate(size);
        self.try_out()?;
        Ok(())
    }

    /// Sees that system calls stop without being executed.
    fn try_out(&mut self) -> io::Result<()> {
        let r = &mut self.registers;
        (r.rip, r.rax, r.orig_rax) = (SYSCALL, libc::SYS_getpid as u64, u64::MAX);
        self.changed = true;
        let why = self.run()?;
        let stopped = why == Why::SystemCall && self.registers.rax as i64 == -i64::from(libc::ENOSYS);
        if stopped { Ok(()) } else { Err(io::Error::other("the host does not stop system calls")) }
    }

    /// Makes system calls in the process, in order, up to the first that fails.
    ///
    /// # Errors
    /// That one's, or that the process is gone.
    pub(super) fn call(&mut self, calls: &[Call]) -> io::Result<()> {
        let mut rest = calls;
        while !rest.is_empty() {
            let count = self.calls.put(rest);
            let before = self.registers;
            // Nothing of the guest's: neither its flags nor its segments.
            // SAFETY: all zeroes is a value of this plain structure.
            self.registers = unsafe { std::mem::zeroed() };
            let r = &mut self.registers;
            (r.cs, r.ss, r.eflags) = (0x33, 0x2b, 0x202);
            (r.rip, r.rbx, r.r12, r.orig_rax) = (NEXT, CALLS, count as u64, u64::MAX);
            let done = self.run_stub();
            self.registers = before;
            done?;
            rest = &rest[count..];
        }
        Ok(())
    }

    /// Lets the stub run to its trap.
    fn run_stub(&mut self) -> io::Result<()> {
        self.put_registers()?;
        loop {
            // SAFETY: no pointer.
            check(unsafe { libc::ptrace(libc::PTRACE_CONT, self.pid, 0, 0) })?;
            match self.wait()? {
                libc::SIGTRAP => break,
                signal @ (libc::SIGSYS | libc::SIGSEGV | libc::SIGILL | libc::SIGBUS) => {
                    return Err(io::Error::other(format!("the stub got signal {signal}")));
                }
                // What others want of the vCPU has to wait, and is looked at before guest code runs.
                _ => {}
            }
        }
        self.changed = true;
        self.get_registers()?;
        let left = self.registers.r12;
        if left == 0 {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error((self.registers.rax as i64).wrapping_neg() as i32))
        }
    }

    /// Runs the guest's code to whatever stops it.
    ///
    /// # Errors
    /// The process is gone, or the host refuses.
    pub(super) fn run(&mut self) -> io::Result<Why> {
        if self.changed {
            if self.put_registers().is_err() {
                // The host does not take these values. They are still here.
                return Ok(Why::Other);
            }
            self.changed = false;
        }
        // SAFETY: no pointer.
        check(unsafe { libc::ptrace(libc::PTRACE_SYSEMU, self.pid, 0, 0) })?;
        let signal = self.wait()?;
        self.get_registers()?;
        Ok(match signal {
            SYSTEM_CALL => Why::SystemCall,
            libc::SIGSEGV => Why::Fault(self.fault_address()?),
            libc::SIGTRAP => Why::Trap { step: self.signal()?.si_code == libc::TRAP_TRACE },
            libc::SIGSYS => Why::OldCall(self.fault_address()?),
            _ => Why::Other,
        })
    }

    /// Waits until it stands; gives the signal.
    fn wait(&mut self) -> io::Result<c_int> {
        let mut status = 0;
        loop {
            // SAFETY: the pointer is to a local.
            if unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL) } == self.pid {
                break;
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        if !libc::WIFSTOPPED(status) {
            self.reaped = true;
            return Err(io::Error::other("it was killed"));
        }
        // Stops of ptrace's own, as after SIGSTOP and SIGCONT, are no signal to the program.
        Ok(if status >> 16 == 0 { libc::WSTOPSIG(status) } else { 0 })
    }

    fn get_registers(&mut self) -> io::Result<()> {
        // SAFETY: the kernel fills the structure that the pointer is to.
        check(unsafe { libc::ptrace(libc::PTRACE_GETREGS, self.pid, 0, &raw mut self.registers) })
    }

    fn put_registers(&mut self) -> io::Result<()> {
        // SAFETY: the kernel reads the structure that the pointer is to.
        check(unsafe { libc::ptrace(libc::PTRACE_SETREGS, self.pid, 0, &raw const self.registers) })
    }

    /// Whatever signals this program had blocked where it was started are not blocked there.
    fn unblock_signals(&mut self) -> io::Result<()> {
        let none = 0_u64;
        // SAFETY: the kernel reads a mask of 8 bytes.
        check(unsafe { libc::ptrace(SETSIGMASK, self.pid, size_of_val(&none), &raw const none) })
    }

    /// The next values are put in whatever they are.
    pub(super) fn forget_extended(&mut self) {
        self.shared.fill(0xff);
    }

    fn vector(&mut self) -> libc::iovec {
        libc::iovec { iov_base: self.extended.as_mut_ptr().cast(), iov_len: self.extended.len() }
    }

    fn regset(&mut self, request: libc::c_uint, part: &mut libc::iovec) -> io::Result<()> {
        // SAFETY: the kernel fills or reads at most what the vector says, which is `extended`.
        check(unsafe { libc::ptrace(request, self.pid, XSTATE, &raw mut *part) })
    }

    /// x87 and vector state as it was last put in or fetched.
    pub(super) fn extended(&self) -> &[u8; SHARED_SIZE] {
        &self.shared
    }

    /// Fetches it.
    pub(super) fn get_extended(&mut self) -> io::Result<&[u8; SHARED_SIZE]> {
        let mut part = self.vector();
        self.regset(libc::PTRACE_GETREGSET, &mut part)?;
        self.shared.copy_from_slice(&self.extended[..SHARED_SIZE]);
        Ok(&self.shared)
    }

    /// Puts it into the process. What a guest does not have goes to its initial state.
    pub(super) fn put_extended(&mut self, state: &[u8; SHARED_SIZE]) -> io::Result<()> {
        if parts(state).eq(parts(&self.shared)) {
            return Ok(());
        }
        self.shared = *state;
        self.extended[..SHARED_SIZE].copy_from_slice(state);
        self.extended[SHARED_SIZE..].fill(0);
        let mut part = self.vector();
        self.regset(libc::PTRACE_SETREGSET, &mut part)
    }

    /// `si_addr`, or `si_call_addr`.
    fn fault_address(&self) -> io::Result<u64> {
        let info = self.signal()?;
        // A general-protection fault has no address (si_code SI_KERNEL).
        if info.si_code == SI_KERNEL {
            return Ok(0);
        }
        // SAFETY: both kinds of information begin with an address.
        Ok(unsafe { info.si_addr() } as u64)
    }

    fn signal(&self) -> io::Result<libc::siginfo_t> {
        // SAFETY: all zeroes is a value of this plain structure.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills the structure that the pointer is to.
        check(unsafe { libc::ptrace(libc::PTRACE_GETSIGINFO, self.pid, 0, &raw mut info) })?;
        Ok(info)
    }

    pub(super) fn pid(&self) -> pid_t {
        self.pid
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// What of the extended state is registers: x87, MXCSR and XMM, the upper halves. The rest says which components are there (all
/// are, when the host gives them), and what the host can do.
fn parts(state: &[u8; SHARED_SIZE]) -> impl Iterator<Item = &[u8]> {
    [0..28, 32..416, 576..SHARED_SIZE].into_iter().map(|part| &state[part])
}

/// Asks the process to stop; from any thread.
pub(crate) fn stop(pid: pid_t) {
    // SAFETY: sends a signal. The caller knows that the process has not been waited for.
    unsafe { libc::kill(pid, libc::SIGUSR1) };
}

/// `PTRACE_O_TRACESYSGOOD`.
const SYSTEM_CALL: c_int = libc::SIGTRAP | 0x80;
const SI_KERNEL: c_int = 0x80;
/// `PTRACE_SETSIGMASK`.
const SETSIGMASK: libc::c_uint = 0x420b;
/// NT_X86_XSTATE.
const XSTATE: usize = 0x202;
/// First and last address of a line of `/proc/PID/maps`.
fn range_of(line: &str) -> Option<(u64, u64)> {
    let (from, rest) = line.split_once('-')?;
    let (to, _) = rest.split_once(' ')?;
    Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::super::stub::{STUB, Source, map};
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;

    use rustix::fs::{MemfdFlags, memfd_create};

    fn memory(bytes: &[u8]) -> File {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(bytes).unwrap();
        file.set_len(0x10000).unwrap();
        file
    }

    fn child(code: &[u8]) -> Child {
        let mut child =
            Child::new(&Image::new().unwrap(), memory(code).as_fd(), memory(&[]).as_fd()).unwrap();
        child.call(&[map(0x40_0000, 0x1000, libc::PROT_READ | libc::PROT_EXEC, Source::Ram, 0)]).unwrap();
        child.registers.rip = 0x40_0000;
        child.changed = true;
        child
    }

    #[test]
    fn nothing_is_there_but_the_stub() {
        let child = child(&[0xcc]);
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", child.pid())).unwrap();
        let ranges: Vec<_> = maps.lines().filter_map(range_of).filter(|r| r.1 <= USER_END).collect();
        assert_eq!(ranges, [(STUB, STUB + 0x1000), (CALLS, CALLS + 0x1000), (0x40_0000, 0x40_1000)]);
    }

    #[test]
    fn code_runs_to_what_stops_it() {
        // mov eax, 39; syscall; mov [5000h], al
        let mut child = child(&[0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0x88, 4, 0x25, 0, 0x50, 0, 0]);
        assert_eq!(child.run().unwrap(), Why::SystemCall);
        assert_eq!((child.registers.rip, child.registers.orig_rax), (0x40_0007, 39));
        assert_eq!(child.registers.rax as i64, i64::from(-libc::ENOSYS), "the call has not been made");
        assert_eq!(child.run().unwrap(), Why::Fault(0x5000));
        assert_eq!(child.registers.rip, 0x40_0007);
    }

    #[test]
    fn the_stub_makes_no_calls_for_guests() {
        // mov eax, SYS_mmap; mov ecx, SYSCALL; jmp rcx
        let target = (SYSCALL) as u32;
        let mut code = vec![0xb8, 9, 0, 0, 0, 0xb9];
        code.extend(target.to_le_bytes());
        code.extend([0xff, 0xe1]);
        let mut child = child(&code);
        assert_eq!(child.run().unwrap(), Why::SystemCall);
        assert_eq!(child.registers.rax as i64, i64::from(-libc::ENOSYS));
    }

    #[test]
    fn calls_are_few_and_only_the_stubs() {
        let mut child = child(&[0xcc]);
        let refused = child.call(&[[libc::SYS_getpid as u64, 0, 0, 0, 0, 0, 0]]);
        assert!(refused.is_err(), "the filter lets mappings through, nothing else");
        let bad = child.call(&[map(0x50_0000, 0x1000, libc::PROT_READ, Source::Ram, 1)]).unwrap_err();
        assert_eq!(bad.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn it_is_asked_to_stop() {
        let mut child = child(&[0xeb, 0xfe]);
        let pid = child.pid();
        let other = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            stop(pid);
        });
        assert_eq!(child.run().unwrap(), Why::Other);
        assert_eq!(child.registers.rip, 0x40_0000);
        other.join().unwrap();
    }

    #[test]
    fn vector_registers_go_in_and_come_out() {
        // paddd xmm0, xmm0; int3
        let mut child = child(&[0x66, 0x0f, 0xfe, 0xc0, 0xcc]);
        let mut state = [0; SHARED_SIZE];
        state[512] = 2;
        state[160..164].copy_from_slice(&21_u32.to_le_bytes());
        child.put_extended(&state).unwrap();
        assert_eq!(child.run().unwrap(), Why::Trap { step: false });
        let state = child.get_extended().unwrap();
        assert_eq!(state[160..164], 42_u32.to_le_bytes());
        assert_eq!((state[0], state[1]), (0x7f, 3), "x87 is as after fninit");
    }
}
