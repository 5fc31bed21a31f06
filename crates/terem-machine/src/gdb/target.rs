//! The machine as `gdbstub` sees it: threads, registers, memory, breakpoints, what is to run.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind as GdbWatch,
};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps, outputln};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use terem_cpu::{DebugControl, DebugEvent, MpState, Vcpu, VcpuState, WatchKind, Watchpoint};
use terem_memory::GuestMemory;
use terem_memory::vm_memory::{Bytes as _, GuestAddress};

use super::registers::{Bytes, Number, X86};
use super::{Notice, Notices};
use crate::handle::{DebugRequest, MachineHandle, RequestError};

/// `EFAULT`: nothing is mapped there.
const FAULT: u8 = 14;
/// `EBUSY`: the vCPU runs.
const BUSY: u8 = 16;
/// `EINVAL`.
const INVALID: u8 = 22;
/// `ESRCH`: no such vCPU.
const NO_THREAD: u8 = 3;
/// Most break- and watchpoints together.
const MOST_POINTS: usize = 1000;
const PAGE: u64 = 0x1000;

/// What the debugger is given of the machine.
#[derive(Clone)]
pub(crate) struct Guest {
    pub(crate) handle: MachineHandle,
    pub(crate) vcpus: Vec<Arc<Mutex<Box<dyn Vcpu>>>>,
    pub(crate) memory: GuestMemory,
}

/// What one vCPU is to do when the machine goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// What the others do that were not named.
    Default,
    Continue,
    Step,
}

/// The machine in one session.
pub(super) struct Debuggee {
    guest: Guest,
    notices: Arc<Notices>,
    /// Breakpoints, as gdb's kinds: in software, in hardware. Here they are the same.
    soft: Vec<u64>,
    hard: Vec<u64>,
    watchpoints: Vec<Watchpoint>,
    actions: Vec<Action>,
    /// vCPUs without an action stand still.
    locked: bool,
    /// Number of the present or last run.
    run: u64,
    /// Whether the machine was let run, and not stopped since.
    running: bool,
    /// What is still to be told of earlier runs: watchpoints of vCPUs that stopped at the same time as another.
    late: Vec<(u32, DebugEvent)>,
    /// The vCPU that stands at a breakpoint that gdb was told of, and its RIP.
    told: Option<(u32, u64)>,
    /// The machine has been stopped for the client, and must be let go of.
    attached: bool,
    /// The machine is over.
    ended: bool,
}

type Reason = MultiThreadStopReason<u64>;

fn tid(vcpu: u32) -> Tid {
    NonZeroUsize::MIN.saturating_add(vcpu as usize)
}

fn index(tid: Tid) -> usize {
    tid.get() - 1
}

impl Debuggee {
    pub(super) fn new(guest: Guest, notices: Arc<Notices>) -> Self {
        let actions = vec![Action::Default; guest.vcpus.len()];
        Self {
            guest,
            notices,
            soft: Vec::new(),
            hard: Vec::new(),
            watchpoints: Vec::new(),
            actions,
            locked: false,
            run: 0,
            running: true,
            late: Vec::new(),
            told: None,
            attached: false,
            ended: false,
        }
    }

    pub(super) fn notices(&self) -> Arc<Notices> {
        Arc::clone(&self.notices)
    }

    /// Whether the machine is over.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// Stops the machine, if it runs.
    ///
    /// # Errors
    /// It is over, or one of its vCPUs does not come out of a device.
    pub(super) fn hold(&mut self) -> Result<(), RequestError> {
        self.attached = true;
        self.guest.handle.debug(DebugRequest::Hold)?;
        self.running = false;
        Ok(())
    }

    /// Lets the machine go on as if there had been no debugger.
    pub(super) fn let_go(&mut self) {
        if std::mem::take(&mut self.attached)
            && let Err(e) = self.guest.handle.debug(DebugRequest::LetGo)
        {
            tracing::debug!("the machine does not go on without gdb: {e}");
        }
    }

    /// gdb wants the machine to stop: what it is told. Nothing if it stands still already.
    pub(super) fn interrupt(&mut self) -> Result<Option<Reason>, RequestError> {
        if !self.running {
            return Ok(None);
        }
        self.guest.handle.debug(DebugRequest::Hold)?;
        // Something may have stopped it just before.
        let reason = self.stopped();
        self.running = false;
        Ok(Some(reason.unwrap_or(Reason::SignalWithThread { tid: tid(0), signal: Signal::SIGINT })))
    }

    /// Takes the machine's notices that are not for this session.
    pub(super) fn forget_notices(&mut self) {
        while let Some(notice) = self.notices.next() {
            self.ended |= notice == Notice::Ended;
        }
    }

    /// Takes the machine's notices: why it stopped, if it ran and does not any more.
    pub(super) fn stopped(&mut self) -> Option<Reason> {
        let (mut first, ran) = (None, self.running);
        while let Some(notice) = self.notices.next() {
            match notice {
                Notice::Ended => self.ended = true,
                Notice::Stopped { run, vcpu, event } if ran && run == self.run && first.is_none() => {
                    self.running = false;
                    first = Some((vcpu, event));
                }
                // A breakpoint that is not told now is met again; a watchpoint is not.
                Notice::Stopped { vcpu, event: event @ DebugEvent::Watchpoint(_), .. } => {
                    self.late.push((vcpu, event));
                }
                Notice::Stopped { .. } => {}
            }
        }
        if self.ended {
            return Some(Reason::Exited(0));
        }
        first.map(|(vcpu, event)| self.reason(vcpu, event))
    }

    /// What is left to tell of the last run, in place of another one.
    pub(super) fn late(&mut self) -> Option<Reason> {
        let (vcpu, event) = self.late.pop()?;
        Some(self.reason(vcpu, event))
    }

    fn reason(&mut self, vcpu: u32, event: DebugEvent) -> Reason {
        let tid = tid(vcpu);
        self.told = None;
        match event {
            DebugEvent::Step => Reason::SignalWithThread { tid, signal: Signal::SIGTRAP },
            DebugEvent::Breakpoint(at) => {
                self.told = self.state(tid).ok().map(|state| (vcpu, state.rip));
                if self.soft.contains(&at) { Reason::SwBreak(tid) } else { Reason::HwBreak(tid) }
            }
            DebugEvent::Watchpoint(w) => {
                let kind = match w.kind {
                    WatchKind::Read => GdbWatch::Read,
                    WatchKind::Write => GdbWatch::Write,
                    WatchKind::Access => GdbWatch::ReadWrite,
                };
                Reason::Watch { tid, kind, addr: w.address }
            }
        }
    }

    /// A vCPU. It is free while the machine is held.
    fn vcpu(&self, tid: Tid) -> Result<MutexGuard<'_, Box<dyn Vcpu>>, TargetError<RequestError>> {
        let vcpu = self.guest.vcpus.get(index(tid)).ok_or(TargetError::Errno(NO_THREAD))?;
        if self.running {
            return Err(TargetError::Errno(BUSY));
        }
        match vcpu.try_lock() {
            Ok(vcpu) => Ok(vcpu),
            Err(TryLockError::Poisoned(p)) => Ok(p.into_inner()),
            Err(TryLockError::WouldBlock) => Err(TargetError::Errno(BUSY)),
        }
    }

    fn state(&self, tid: Tid) -> Result<VcpuState, TargetError<RequestError>> {
        Ok(self.vcpu(tid)?.save())
    }

    fn set(&self, tid: Tid, change: impl FnOnce(&mut VcpuState) -> bool) -> TargetResult<(), Self> {
        let mut vcpu = self.vcpu(tid)?;
        let mut state = vcpu.save();
        if !change(&mut state) {
            return Err(TargetError::Errno(INVALID));
        }
        vcpu.set_registers(&state).map_err(|_| TargetError::Errno(INVALID))
    }

    /// The pieces of RAM that a range of linear addresses lies in: physical address and bytes, up to the first byte
    /// that is not in RAM.
    fn pieces(
        &self,
        start: u64,
        len: usize,
        tid: Tid,
    ) -> Result<Vec<(u64, usize)>, TargetError<RequestError>> {
        let vcpu = self.vcpu(tid)?;
        let (mut pieces, mut done) = (Vec::new(), 0);
        while done < len {
            let at = start.wrapping_add(done as u64);
            let n = usize::try_from(PAGE - at % PAGE).unwrap_or(1).min(len - done);
            match vcpu.translate(at) {
                Some(physical) if self.guest.memory.is_ram(physical, n as u64) => pieces.push((physical, n)),
                _ => break,
            }
            done += n;
        }
        Ok(pieces)
    }

    /// What a vCPU is to do in the next run.
    fn control(&self, vcpu: usize) -> DebugControl {
        let step = self.actions.get(vcpu) == Some(&Action::Step);
        let told = self.told.is_some_and(|(told, rip)| {
            told as usize == vcpu && self.state(tid(told)).is_ok_and(|state| state.rip == rip)
        });
        DebugControl {
            breakpoints: self.soft.iter().chain(&self.hard).copied().collect(),
            watchpoints: self.watchpoints.clone(),
            step,
            pass: told || step,
        }
    }

    fn has_room(&self) -> bool {
        self.soft.len() + self.hard.len() + self.watchpoints.len() < MOST_POINTS
    }
}

impl Target for Debuggee {
    type Arch = X86;
    type Error = RequestError;

    fn base_ops(&mut self) -> BaseOps<'_, X86, RequestError> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debuggee {
    fn read_registers(&mut self, registers: &mut Bytes, tid: Tid) -> TargetResult<(), Self> {
        *registers = Bytes::of(&self.state(tid)?);
        Ok(())
    }

    fn write_registers(&mut self, registers: &Bytes, tid: Tid) -> TargetResult<(), Self> {
        self.set(tid, |state| {
            registers.put(state);
            true
        })
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let mut done = 0;
        for (physical, n) in self.pieces(start, data.len(), tid)? {
            let to = &mut data[done..done + n];
            self.guest
                .memory
                .read_slice(to, GuestAddress(physical))
                .map_err(|_| TargetError::Errno(FAULT))?;
            done += n;
        }
        if done == 0 && !data.is_empty() { Err(TargetError::Errno(FAULT)) } else { Ok(done) }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let pieces = self.pieces(start, data.len(), tid)?;
        if pieces.iter().map(|(_, n)| n).sum::<usize>() < data.len() {
            return Err(TargetError::Errno(FAULT));
        }
        let mut rest = data;
        for (physical, n) in pieces {
            let (now, later) = rest.split_at(n);
            self.guest
                .memory
                .write_slice(now, GuestAddress(physical))
                .map_err(|_| TargetError::Errno(FAULT))?;
            rest = later;
        }
        Ok(())
    }

    fn list_active_threads(&mut self, found: &mut dyn FnMut(Tid)) -> Result<(), RequestError> {
        (0_u32..).take(self.guest.vcpus.len()).for_each(|vcpu| found(tid(vcpu)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for Debuggee {
    fn read_register(&mut self, tid: Tid, register: Number, to: &mut [u8]) -> TargetResult<usize, Self> {
        Ok(register.read(&self.state(tid)?, to))
    }

    fn write_register(&mut self, tid: Tid, register: Number, value: &[u8]) -> TargetResult<(), Self> {
        self.set(tid, |state| register.write(state, value))
    }
}

impl ThreadExtraInfo for Debuggee {
    fn thread_extra_info(&self, tid: Tid, to: &mut [u8]) -> Result<usize, RequestError> {
        let doing = match self.state(tid).map(|state| state.mp_state) {
            Ok(MpState::Running) => "running",
            Ok(MpState::Halted) => "halted",
            Ok(MpState::WaitForStartUp) => "waits to be started",
            Err(_) => "busy",
        };
        let text = format!("vCPU {} [{doing}]", index(tid));
        let n = text.len().min(to.len());
        to[..n].copy_from_slice(&text.as_bytes()[..n]);
        Ok(n)
    }
}

impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), RequestError> {
        let watchpoints = &self.watchpoints;
        self.late.retain(|(_, e)| matches!(e, DebugEvent::Watchpoint(w) if watchpoints.contains(w)));
        if !self.late.is_empty() {
            // The session tells it at once.
            return Ok(());
        }
        self.run += 1;
        let controls = (0..self.guest.vcpus.len()).map(|vcpu| self.control(vcpu)).collect();
        let only = self.locked.then(|| self.actions.iter().map(|a| *a != Action::Default).collect());
        self.told = None;
        self.running = true;
        self.guest.handle.debug(DebugRequest::Run { run: self.run, controls, only })
    }

    fn clear_resume_actions(&mut self) -> Result<(), RequestError> {
        self.actions.fill(Action::Default);
        self.locked = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), RequestError> {
        if let Some(action) = self.actions.get_mut(index(tid)) {
            *action = Action::Continue;
        }
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), RequestError> {
        if let Some(action) = self.actions.get_mut(index(tid)) {
            *action = Action::Step;
        }
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Debuggee {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), RequestError> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

/// Adds what is not there yet.
fn add<T: PartialEq>(room: bool, list: &mut Vec<T>, item: T) -> bool {
    if !list.contains(&item) {
        if !room {
            return false;
        }
        list.push(item);
    }
    true
}

fn remove<T: PartialEq>(list: &mut Vec<T>, item: &T) {
    list.retain(|i| i != item);
}

impl SwBreakpoint for Debuggee {
    fn add_sw_breakpoint(&mut self, at: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(add(self.has_room(), &mut self.soft, at))
    }

    fn remove_sw_breakpoint(&mut self, at: u64, _: usize) -> TargetResult<bool, Self> {
        remove(&mut self.soft, &at);
        Ok(true)
    }
}

impl HwBreakpoint for Debuggee {
    fn add_hw_breakpoint(&mut self, at: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(add(self.has_room(), &mut self.hard, at))
    }

    fn remove_hw_breakpoint(&mut self, at: u64, _: usize) -> TargetResult<bool, Self> {
        remove(&mut self.hard, &at);
        Ok(true)
    }
}

fn watchpoint(address: u64, len: u64, kind: GdbWatch) -> Option<Watchpoint> {
    let length = u8::try_from(len).ok().filter(|len| (1..=Watchpoint::LONGEST).contains(len))?;
    let kind = match kind {
        GdbWatch::Read => WatchKind::Read,
        GdbWatch::Write => WatchKind::Write,
        GdbWatch::ReadWrite => WatchKind::Access,
    };
    Some(Watchpoint { address, length, kind })
}

impl HwWatchpoint for Debuggee {
    fn add_hw_watchpoint(&mut self, at: u64, len: u64, kind: GdbWatch) -> TargetResult<bool, Self> {
        let room = self.has_room();
        Ok(watchpoint(at, len, kind).is_some_and(|w| add(room, &mut self.watchpoints, w)))
    }

    fn remove_hw_watchpoint(&mut self, at: u64, len: u64, kind: GdbWatch) -> TargetResult<bool, Self> {
        if let Some(w) = watchpoint(at, len, kind) {
            remove(&mut self.watchpoints, &w);
        }
        Ok(true)
    }
}

impl MonitorCmd for Debuggee {
    /// `monitor physical ADDRESS [BYTES]`: guest-physical memory.
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), RequestError> {
        const MOST: u64 = 4096;
        let text = String::from_utf8_lossy(command);
        let words: Vec<&str> = text.split_whitespace().collect();
        let number = |word: &str| match word.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => word.parse().ok(),
        };
        let (at, len) = match words.as_slice() {
            ["physical", at] => (number(at), Some(64)),
            ["physical", at, len] => (number(at), number(len)),
            _ => (None, None),
        };
        let (Some(at), Some(len @ 1..=MOST)) = (at, len) else {
            outputln!(
                out,
                "monitor physical ADDRESS [BYTES]: shows guest-physical memory, up to {MOST} bytes"
            );
            return Ok(());
        };
        for line in (0..len).step_by(16) {
            let mut bytes = [0; 16];
            let n = usize::try_from(16.min(len - line)).unwrap_or(16);
            let address = at.wrapping_add(line);
            if self.guest.memory.read_slice(&mut bytes[..n], GuestAddress(address)).is_err() {
                outputln!(out, "{address:#x}: no RAM");
                break;
            }
            let hex: String = bytes[..n].iter().map(|b| format!(" {b:02x}")).collect();
            outputln!(out, "{address:#x}:{hex}");
        }
        Ok(())
    }
}
