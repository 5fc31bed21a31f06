//! One host CPU for a vCPU's thread and the processes that it runs programs in.
//!
//! They take turns, and the scheduler does not know it: whoever is woken goes to another, idle CPU, which takes tens of
//! microseconds where both on one CPU take five. So they stay on one for a while; and now and then the thread may go where it likes,
//! so that a busy CPU is left.

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// Nanoseconds on one CPU.
const WHILE: u64 = 50_000_000;

/// Where they are.
#[derive(Debug, Default)]
pub(super) struct Pin {
    /// Where the thread may be at all, and the CPU that it is held on.
    held: Option<(CpuSet, usize)>,
    since: u64,
}

impl Pin {
    /// Holds the thread where it is, and gives the CPU for the process; nothing where there is no choice.
    pub(super) fn hold(&mut self, now: u64) -> Option<usize> {
        if self.held.is_some() && now.wrapping_sub(self.since) > WHILE {
            self.let_go();
        }
        if self.held.is_none() {
            let all = sched_getaffinity(None).ok().filter(|all| all.count() > 1)?;
            let cpu = sched_getcpu();
            if cpu >= CpuSet::MAX_CPU {
                return None;
            }
            sched_setaffinity(None, &one(cpu)).ok()?;
            (self.held, self.since) = (Some((all, cpu)), now);
        }
        self.held.as_ref().map(|held| held.1)
    }

    /// Lets the thread go if it has been held for long.
    pub(super) fn let_go_after_a_while(&mut self, now: u64) {
        if self.held.is_some() && now.wrapping_sub(self.since) > WHILE {
            self.let_go();
        }
    }

    /// Whether the thread is held.
    pub(super) fn holds(&self) -> bool {
        self.held.is_some()
    }

    /// Lets the thread go.
    pub(super) fn let_go(&mut self) {
        if let Some((all, _)) = self.held.take() {
            let _ = sched_setaffinity(None, &all);
        }
    }
}

/// Puts a process on a CPU.
pub(super) fn put(process: i32, cpu: usize) {
    if let Some(process) = Pid::from_raw(process) {
        let _ = sched_setaffinity(Some(process), &one(cpu));
    }
}

fn one(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu);
    set
}
