//! The machine from outside: what the control socket, signals and tests hold.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};
use terem_bus::{Bus, locked};
use terem_cpu::{Accelerator, Counters, DebugControl};
use terem_devices::chipset::GuestPanic;

use crate::consoles::Line;
use crate::outcome::Outcome;
use crate::plan::Plan;
use crate::vcpus::Halt;

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Built, and not running yet.
    Built,
    /// Running.
    Running,
    /// Standing still, with time.
    Paused,
    /// Over.
    Ended,
}

/// What happened to a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Event {
    /// It runs for the first time, or again.
    Running,
    /// It was paused.
    Paused,
    /// The guest or somebody outside reset it.
    Reset,
    /// The power button was pressed.
    PowerButton,
    /// The guest said that its kernel panicked, or that it is about to go down.
    GuestPanic {
        /// What it said.
        kind: &'static str,
    },
    /// Its state was saved.
    Saved {
        /// Where.
        path: PathBuf,
    },
    /// It is over.
    Ended {
        /// How it ended.
        outcome: Outcome,
    },
}

/// What a machine is doing, with numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub phase: Phase,
    /// Milliseconds of the guest's time: without pauses.
    pub uptime_ms: u64,
    /// How often it was reset.
    pub resets: u64,
    /// How it ended, once it has.
    pub outcome: Option<Outcome>,
}

/// Why a request to a machine was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// There is nobody to carry it out.
    #[error("the machine has ended")]
    Ended,
    /// It failed; the text says why.
    #[error("{0}")]
    Failed(String),
}

/// What can be asked of a running machine.
#[derive(Debug)]
pub(crate) enum Request {
    Pause,
    Resume,
    Reset,
    PowerButton,
    Stop { grace: Option<Duration> },
    Save { path: PathBuf },
    Debug(DebugRequest),
}

/// What a debugger wants of the machine.
#[derive(Debug)]
pub(crate) enum DebugRequest {
    /// It stands still until the debugger says otherwise.
    Hold,
    /// It goes on, if nobody else has paused it.
    Run {
        /// A number larger than that of the run before.
        run: u64,
        /// What each vCPU does for the debugger.
        controls: Vec<DebugControl>,
        /// Which vCPUs run; all, if it does not say.
        only: Option<Vec<bool>>,
    },
    /// It goes on as if there had never been a debugger.
    LetGo,
}

/// What a machine's vCPUs have done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Nanoseconds of the guest's time: without pauses.
    pub time_ns: u64,
    /// For each vCPU.
    pub vcpus: Vec<Counters>,
}

/// What the board says about itself.
#[derive(Debug, Clone, Copy)]
pub(crate) enum BoardEvent {
    PowerOff,
    Reset,
    Panic(GuestPanic),
    Exit(u32),
}

/// What the machine's thread is told.
#[derive(Debug)]
pub(crate) enum Message {
    /// By the board, in this epoch.
    Board(u64, BoardEvent),
    /// By a vCPU's thread: epoch, processor, why it came out.
    Vcpu(u64, u32, Halt),
    /// By somebody outside.
    Request(Request, Sender<Result<(), RequestError>>),
}

/// What the machine and its handles share.
pub(crate) struct Shared {
    pub(crate) plan: Plan,
    pub(crate) bus: Arc<Bus>,
    pub(crate) accelerator: Arc<dyn Accelerator>,
    /// Virtual time at which the guest began.
    pub(crate) began: Mutex<u64>,
    pub(crate) now: Mutex<(Phase, u64, Option<Outcome>)>,
    pub(crate) listeners: Mutex<Vec<Sender<Event>>>,
    /// The console that is on the caller's terminal.
    pub(crate) input: Option<Arc<Line>>,
    /// What the user should know.
    pub(crate) notices: Vec<String>,
}

impl Shared {
    /// Tells all listeners, forgetting those that have gone.
    pub(crate) fn tell(&self, event: &Event) {
        locked(&self.listeners).retain(|l| l.send(event.clone()).is_ok());
    }
}

/// A machine's remote control. Cheap to clone; all calls come from any thread. [`Self::status`] and
/// [`Self::inspect`] never wait for the guest.
#[derive(Clone)]
pub struct MachineHandle {
    pub(crate) shared: Arc<Shared>,
    pub(crate) messages: Sender<Message>,
}

impl std::fmt::Debug for MachineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("MachineHandle").field(&self.status()).finish()
    }
}

impl MachineHandle {
    /// What the machine is doing.
    #[must_use]
    pub fn status(&self) -> Status {
        let (phase, resets, outcome) = locked(&self.shared.now).clone();
        let began = *locked(&self.shared.began);
        let uptime_ms = self.shared.bus.clock.now().saturating_sub(began) / 1_000_000;
        Status { name: self.shared.plan.name.clone(), phase, uptime_ms, resets, outcome }
    }

    /// What the vCPUs have done so far. Never waits for the guest.
    #[must_use]
    pub fn stat(&self) -> Stat {
        let began = *locked(&self.shared.began);
        let counters = |id| self.shared.accelerator.counters(id).unwrap_or_default();
        Stat {
            time_ns: self.shared.bus.clock.now().saturating_sub(began),
            vcpus: (0..self.shared.plan.cpus.count).map(counters).collect(),
        }
    }

    /// Everything about the machine: status, plan, counters, and what is mapped where now.
    #[must_use]
    pub fn inspect(&self) -> Value {
        let regions = |space: &terem_bus::AddressSpace| -> Vec<Value> {
            let row = |(start, end, name)| json!({ "start": start, "end": end, "name": name });
            space.regions().into_iter().map(row).collect()
        };
        json!({
            "status": self.status(),
            "plan": self.shared.plan,
            "vcpus": self.stat().vcpus,
            "ports": regions(&self.shared.bus.ports),
            "mmio": regions(&self.shared.bus.mmio),
        })
    }

    /// The plan that it was built from.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.shared.plan
    }

    /// Events from now on. The channel closes when the machine and all its handles are gone.
    #[must_use]
    pub fn subscribe(&self) -> Receiver<Event> {
        let (sender, receiver) = channel();
        locked(&self.shared.listeners).push(sender);
        receiver
    }

    /// Stops processors, devices and time. Does nothing to a paused machine.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn pause(&self) -> Result<(), RequestError> {
        self.request(Request::Pause)
    }

    /// Goes on after [`Self::pause`].
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn resume(&self) -> Result<(), RequestError> {
        self.request(Request::Resume)
    }

    /// Resets the machine as its reset button does.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn reset(&self) -> Result<(), RequestError> {
        self.request(Request::Reset)
    }

    /// Presses the power button; what happens is the guest's choice.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn power_button(&self) -> Result<(), RequestError> {
        self.request(Request::PowerButton)
    }

    /// Ends the machine: at once, or (`grace`) by the power button, and by force if the guest has not
    /// switched itself off after that time. Returns when the request was taken; [`Event::Ended`] follows.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn stop(&self, grace: Option<Duration>) -> Result<(), RequestError> {
        self.request(Request::Stop { grace })
    }

    /// Writes the state of the whole machine to the directory `path`, which is made. A running machine
    /// stands still meanwhile and goes on.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn save(&self, path: PathBuf) -> Result<(), RequestError> {
        self.request(Request::Save { path })
    }

    /// Types into the console that is on `stdio`. Returns how many bytes were taken: fewer than all when the
    /// guest does not read, 0 where there is no such console.
    #[must_use]
    pub fn send_input(&self, bytes: &[u8]) -> usize {
        self.shared.input.as_ref().map_or(0, |line| line.push(bytes))
    }

    /// What the user should know, such as the names of pseudo-terminals.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.shared.notices
    }

    /// Does what a debugger wants.
    pub(crate) fn debug(&self, request: DebugRequest) -> Result<(), RequestError> {
        self.request(Request::Debug(request))
    }

    fn request(&self, request: Request) -> Result<(), RequestError> {
        let (answer, answered) = channel();
        self.messages.send(Message::Request(request, answer)).map_err(|_| RequestError::Ended)?;
        answered.recv().map_err(|_| RequestError::Ended)?
    }
}
