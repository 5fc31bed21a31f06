//! The processors and the gate in front of them.
//!
//! ```text
//!   vcpu0, vcpu1, … threads:  enter gate ──> Vcpu::run ──> leave gate ──> tell the machine, enter again …
//!   machine:                  open ── … ── close (kick all, wait until nobody is inside)
//! ```
//!
//! A processor is behind a mutex that its thread holds while it runs, so that the machine can look at it
//! and change it while the gate is closed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use terem_bus::locked;
use terem_cpu::{Accelerator, CpuError, DebugControl, DebugEvent, Stop, Vcpu, VcpuState};

/// A kick that came between two instructions of our own is repeated after this time.
const KICK_AGAIN: Duration = Duration::from_millis(20);

#[derive(Default)]
struct State {
    open: bool,
    end: bool,
    inside: u32,
    /// Which processors an open gate lets in; all, if it does not say.
    only: Option<Vec<bool>>,
}

impl State {
    fn lets_in(&self, id: u32) -> bool {
        let named = |only: &Vec<bool>| only.get(id as usize) == Some(&true);
        self.open && self.only.as_ref().is_none_or(named)
    }
}

/// Lets vCPU threads run, or not.
pub(crate) struct Gate {
    accelerator: Arc<dyn Accelerator>,
    count: u32,
    state: Mutex<State>,
    changed: Condvar,
    /// Counts resets: what was reported before one does not concern the machine after it.
    epoch: AtomicU64,
}

impl Gate {
    /// Waits for the gate to be open for a processor; false when the machine has ended.
    fn enter(&self, id: u32) -> bool {
        let mut state = locked(&self.state);
        while !state.lets_in(id) && !state.end {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.inside += u32::from(!state.end);
        !state.end
    }

    fn leave(&self) {
        let mut state = locked(&self.state);
        state.inside -= 1;
        self.changed.notify_all();
    }

    /// Lets the processors run.
    pub(crate) fn open(&self) {
        locked(&self.state).open = true;
        self.changed.notify_all();
    }

    /// Says which processors it lets in when it is open: all, or those of a list by number.
    pub(crate) fn let_in(&self, only: Option<Vec<bool>>) {
        locked(&self.state).only = only;
        self.changed.notify_all();
    }

    /// Stops the processors soon, without waiting. Callable from a device on a vCPU's thread.
    pub(crate) fn shut(&self) {
        locked(&self.state).open = false;
        self.kick();
    }

    fn kick(&self) {
        for id in 0..self.count {
            self.accelerator.kick(id);
        }
    }

    /// Stops the processors; false when one of them did not come out in time.
    pub(crate) fn close(&self, within: Duration) -> bool {
        let until = Instant::now() + within;
        self.shut();
        let mut state = locked(&self.state);
        while state.inside > 0 {
            if Instant::now() >= until {
                return false;
            }
            let waited = self.changed.wait_timeout(state, KICK_AGAIN).unwrap_or_else(PoisonError::into_inner);
            state = waited.0;
            if waited.1.timed_out() {
                self.kick();
            }
        }
        true
    }

    /// The number of resets so far.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Begins another life of the machine.
    pub(crate) fn next_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }
}

/// Why a processor came out on its own.
#[derive(Debug)]
pub(crate) enum Halt {
    /// It shut down in this state.
    Shutdown(Box<VcpuState>),
    /// It came to what a debugger waits for.
    Debug(DebugEvent),
    /// Its accelerator cannot go on.
    Error(String),
}

/// Told by a vCPU's thread: epoch, processor, why.
pub(crate) type Report = dyn Fn(u64, u32, Halt) + Send + Sync;

/// All processors of a machine.
pub(crate) struct Vcpus {
    gate: Arc<Gate>,
    all: Vec<Arc<Mutex<Box<dyn Vcpu>>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Makes `count` processors.
    pub(crate) fn new(accelerator: Arc<dyn Accelerator>, count: u32) -> Result<Self, CpuError> {
        let make = |id| accelerator.create_vcpu(id).map(|v| Arc::new(Mutex::new(v)));
        let all = (0..count).map(make).collect::<Result<_, _>>()?;
        let gate = Gate {
            accelerator,
            count,
            state: Mutex::default(),
            changed: Condvar::new(),
            epoch: AtomicU64::new(0),
        };
        Ok(Self { gate: Arc::new(gate), all, threads: Vec::new() })
    }

    /// The gate.
    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// The processors; each can be locked while the gate is closed.
    pub(crate) fn all(&self) -> &[Arc<Mutex<Box<dyn Vcpu>>>] {
        &self.all
    }

    /// Does what a debugger wants; a control for each processor, nothing for those without. To be called while the gate
    /// is closed.
    pub(crate) fn debug(&self, controls: &[DebugControl]) -> Result<(), CpuError> {
        let nothing = DebugControl::default();
        for (id, vcpu) in self.all.iter().enumerate() {
            locked(vcpu).debug(controls.get(id).unwrap_or(&nothing))?;
        }
        Ok(())
    }

    /// Starts a thread for each processor, in front of the closed gate.
    pub(crate) fn start(&mut self, report: &Arc<Report>) -> std::io::Result<()> {
        for (id, vcpu) in (0_u32..).zip(&self.all) {
            let (gate, vcpu, report) = (Arc::clone(&self.gate), Arc::clone(vcpu), Arc::clone(report));
            let thread = std::thread::Builder::new().name(format!("vcpu{id}"));
            self.threads.push(thread.spawn(move || run(id, &gate, &vcpu, &report))?);
        }
        Ok(())
    }

    /// Ends the threads. Those that do not come out (a device waits for the host) are left to the end of
    /// the process; false then.
    pub(crate) fn end(&mut self, within: Duration) -> bool {
        let out = self.gate.close(within);
        locked(&self.gate.state).end = true;
        self.gate.changed.notify_all();
        if out {
            for thread in self.threads.drain(..) {
                let _ = thread.join();
            }
        }
        out
    }
}

fn run(id: u32, gate: &Gate, vcpu: &Mutex<Box<dyn Vcpu>>, report: &Arc<Report>) {
    /// Leaves the gate also when a vCPU panics: the machine must not wait for it.
    struct Inside<'a>(&'a Gate);
    impl Drop for Inside<'_> {
        fn drop(&mut self) {
            self.0.leave();
        }
    }
    while gate.enter(id) {
        let inside = Inside(gate);
        let epoch = gate.epoch();
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut vcpu = locked(vcpu);
            match vcpu.run() {
                Stop::Kicked => None,
                Stop::Shutdown => Some(Halt::Shutdown(Box::new(vcpu.save()))),
                Stop::Debug(event) => Some(Halt::Debug(event)),
                Stop::Error(text) => Some(Halt::Error(text)),
            }
        }));
        // A processor that has shut down, or is broken, must not run on before the machine has decided.
        let halt = ended.unwrap_or_else(|_| Some(Halt::Error(format!("vCPU {id}: internal error"))));
        if halt.is_some() {
            gate.shut();
        }
        // Before it leaves: who has closed the gate has been told everything.
        if let Some(halt) = halt {
            report(epoch, id, halt);
        }
        drop(inside);
    }
}
