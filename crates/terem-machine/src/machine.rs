//! The running machine: its life from power-on to its end.
//!
//! ```text
//!            build            run             power-off, stop, panic, …
//!   (plan) ─────────> Built ───────> Running ──────────────────────────> Ended
//!                       │ restore     │   ^  reset: devices, kernel, again
//!                       └─────────>   v   │
//!                                    Paused
//! ```
//!
//! [`Machine::run`] is the only one who decides. Boards, vCPU threads and handles tell it what has happened
//! or is wanted, and it stops the processors before it does anything to the devices.

use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use terem_bus::locked;
use terem_cpu::DebugEvent;
use terem_devices::chipset::{BoardEvents, GuestPanic};
use terem_memory::GuestMemory;

use crate::acpi::Tables;
use crate::board::Board;
use crate::boot::{BootError, BootFiles, Loaded, firmware_defaults};
use crate::gdb;
use crate::handle::{
    BoardEvent, DebugRequest, Event, MachineHandle, Message, Phase, Request, RequestError, Shared,
};
use crate::outcome::{Outcome, TripleFault};
use crate::saved::{Parts, SaveError};
use crate::smbios::Smbios;
use crate::vcpus::{Gate, Halt, Report, Vcpus};

/// How long processors may take to come out of a device before the machine is given up.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// What the guest's memory is filled with at power-on.
pub(crate) struct Firmware {
    pub(crate) tables: Tables,
    pub(crate) smbios: Smbios,
    pub(crate) files: BootFiles,
}

/// A disk or network interface that must be brought in order when the machine ends.
pub(crate) type AtEnd = Box<dyn FnOnce() + Send>;

/// A machine.
pub struct Machine {
    pub(crate) shared: Arc<Shared>,
    pub(crate) sender: Sender<Message>,
    pub(crate) messages: Receiver<Message>,
    pub(crate) vcpus: Vcpus,
    pub(crate) board: Box<dyn Board>,
    pub(crate) memory: GuestMemory,
    pub(crate) firmware: Firmware,
    /// Whether the processors are where a saved state or the kernel's entry wants them.
    pub(crate) prepared: bool,
    /// Where gdb connects, until the machine runs; then who serves it.
    pub(crate) gdb_listener: Option<gdb::Listener>,
    pub(crate) gdb: Option<gdb::Server>,
    /// Somebody outside has paused it.
    pub(crate) paused: bool,
    /// A debugger has it stand still.
    pub(crate) held: bool,
    /// A debugger is there.
    pub(crate) debugged: bool,
    /// The number of the debugger's present or last run.
    pub(crate) debug_run: u64,
    /// When a guest that was asked to switch itself off is ended by force.
    pub(crate) force_at: Option<Instant>,
    pub(crate) at_end: Vec<AtEnd>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("status", &self.handle().status()).finish_non_exhaustive()
    }
}

/// Notes what the board says, and stops the processors. Called with devices locked.
pub(crate) struct Events {
    pub(crate) gate: Weak<Gate>,
    pub(crate) messages: Sender<Message>,
}

impl Events {
    fn tell(&self, event: BoardEvent) {
        let Some(gate) = self.gate.upgrade() else { return };
        gate.shut();
        // The machine may be over already.
        let _ = self.messages.send(Message::Board(gate.epoch(), event));
    }
}

impl BoardEvents for Events {
    fn power_off(&self) {
        self.tell(BoardEvent::PowerOff);
    }

    fn reset(&self) {
        self.tell(BoardEvent::Reset);
    }

    fn guest_panicked(&self, kind: GuestPanic) {
        self.tell(BoardEvent::Panic(kind));
    }

    fn exit(&self, value: u32) {
        self.tell(BoardEvent::Exit(value));
    }
}

impl Machine {
    /// The machine's remote control.
    #[must_use]
    pub fn handle(&self) -> MachineHandle {
        MachineHandle { shared: Arc::clone(&self.shared), messages: self.sender.clone() }
    }

    /// Loads the state of a machine of the same plan, saved by [`MachineHandle::save`]. To be called before
    /// [`Self::run`].
    ///
    /// # Errors
    /// See [`SaveError`]. The machine cannot run then.
    pub fn restore(&mut self, dir: &Path) -> Result<(), SaveError> {
        let saved = self.parts().read(dir)?;
        // Timers that come due on the way belong to the state that is replaced.
        self.shared.bus.clock.advance(saved.now.saturating_sub(self.shared.bus.clock.now()));
        self.parts().restore(dir, &saved)?;
        *locked(&self.shared.began) = saved.began;
        self.prepared = true;
        Ok(())
    }

    fn parts(&self) -> Parts<'_> {
        Parts {
            plan: &self.shared.plan,
            board: self.board.as_ref(),
            vcpus: self.vcpus.all().iter().map(AsRef::as_ref).collect(),
            memory: &self.memory,
        }
    }

    /// Puts tables and kernel into memory, and the processors where they begin: what firmware does.
    pub(crate) fn prepare(&mut self) -> Result<Loaded, PrepareError> {
        let map = &self.shared.plan.memory;
        self.board.set_up();
        self.firmware.tables.write(&self.memory)?;
        self.firmware.smbios.write(&self.memory)?;
        let loaded = self.firmware.files.load(&self.memory, map, crate::acpi::RSDP_ADDRESS)?;
        for (id, vcpu) in self.vcpus.all().iter().enumerate() {
            let mut vcpu = locked(vcpu);
            vcpu.reset();
            if id == 0 {
                vcpu.restore(&loaded.state)?;
            } else {
                let mut state = vcpu.save();
                firmware_defaults(&mut state, map, false);
                vcpu.restore(&state)?;
            }
        }
        self.prepared = true;
        Ok(loaded)
    }

    /// Runs the machine until its end, on this thread and one for each processor.
    pub fn run(&mut self) -> Outcome {
        let sender = self.sender.clone();
        let report: Arc<Report> = Arc::new(move |epoch, id, halt| {
            let _ = sender.send(Message::Vcpu(epoch, id, halt));
        });
        let outcome = match self.start(&report) {
            Ok(()) => self.serve(),
            Err(why) => Outcome::Failed(why),
        };
        self.finish(&outcome);
        outcome
    }

    fn start(&mut self, report: &Arc<Report>) -> Result<(), String> {
        if !self.prepared {
            self.prepare().map_err(|e| e.to_string())?;
        }
        self.vcpus.start(report).map_err(|e| format!("cannot start the threads of the vCPUs: {e}"))?;
        if let Some(listener) = self.gdb_listener.take() {
            let guest = gdb::Guest {
                handle: self.handle(),
                vcpus: self.vcpus.all().to_vec(),
                memory: self.memory.clone(),
            };
            let server = gdb::Server::start(listener, guest);
            self.gdb = Some(server.map_err(|e| format!("cannot start the thread for gdb: {e}"))?);
        }
        self.held = self.shared.plan.gdb.as_ref().is_some_and(|gdb| gdb.wait);
        if self.held {
            self.set_phase(Phase::Paused);
            self.shared.tell(&Event::Paused);
        } else {
            self.resume();
        }
        Ok(())
    }

    fn serve(&mut self) -> Outcome {
        loop {
            let message = match self.force_at {
                None => self.messages.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(at) => self.messages.recv_timeout(at.saturating_duration_since(Instant::now())),
            };
            let ended = match message {
                Ok(Message::Board(epoch, event)) => self.board_event(epoch, event),
                Ok(Message::Vcpu(epoch, id, halt)) => self.vcpu_halted(epoch, id, halt),
                Ok(Message::Request(request, answer)) => {
                    let (result, outcome) = self.request(request);
                    // Whoever asked may have gone.
                    let _ = answer.send(result);
                    outcome
                }
                // We hold a sender ourselves, so this is the time-out.
                Err(_) => Some(Outcome::Stopped),
            };
            if let Some(outcome) = ended {
                return outcome;
            }
        }
    }

    fn board_event(&mut self, epoch: u64, event: BoardEvent) -> Option<Outcome> {
        if epoch != self.vcpus.gate().epoch() {
            return None;
        }
        match event {
            BoardEvent::PowerOff => Some(Outcome::PoweredOff),
            BoardEvent::Exit(value) => Some(Outcome::DebugExit(value)),
            BoardEvent::Reset if self.shared.plan.no_reboot => Some(Outcome::Reset),
            BoardEvent::Reset => self.reset().err().map(Outcome::Failed),
            BoardEvent::Panic(kind) => {
                let word = match kind {
                    GuestPanic::Panicked => "panicked",
                    GuestPanic::CrashLoaded => "crash-loaded",
                    GuestPanic::Shutdown => "shutdown",
                };
                self.shared.tell(&Event::GuestPanic { kind: word });
                if kind == GuestPanic::Panicked {
                    return Some(Outcome::Panicked);
                }
                // The gate was shut when the guest said so.
                if self.phase() == Phase::Running {
                    self.vcpus.gate().open();
                }
                None
            }
        }
    }

    fn vcpu_halted(&mut self, epoch: u64, id: u32, halt: Halt) -> Option<Outcome> {
        if epoch != self.vcpus.gate().epoch() {
            return None;
        }
        match halt {
            Halt::Error(text) => Some(Outcome::Failed(text)),
            Halt::Debug(event) => {
                self.debug_stopped(id, event);
                None
            }
            Halt::Shutdown(state) => {
                let fault = TripleFault { vcpu: id, state: *state };
                if self.shared.plan.no_reboot {
                    return Some(Outcome::TripleFault(Box::new(fault)));
                }
                tracing::warn!("triple fault: {fault}");
                self.reset().err().map(Outcome::Failed)
            }
        }
    }

    fn request(&mut self, request: Request) -> (Result<(), RequestError>, Option<Outcome>) {
        let failed = |text: String| (Err(RequestError::Failed(text)), None);
        match request {
            Request::Pause => match self.pause() {
                Ok(()) => {
                    self.paused = true;
                    (Ok(()), None)
                }
                Err(text) => failed(text),
            },
            Request::Resume if self.held => {
                self.paused = false;
                failed("gdb has the machine stand still: continue there, or detach".into())
            }
            Request::Resume => {
                self.paused = false;
                self.go_on();
                (Ok(()), None)
            }
            Request::Debug(request) => match self.debug(request) {
                Ok(()) => (Ok(()), None),
                Err(text) => failed(text),
            },
            Request::Reset => match self.reset() {
                Ok(()) => (Ok(()), None),
                Err(text) => (Err(RequestError::Failed(text.clone())), Some(Outcome::Failed(text))),
            },
            Request::PowerButton => {
                self.press_power_button();
                (Ok(()), None)
            }
            Request::Stop { grace: None } => (Ok(()), Some(Outcome::Stopped)),
            Request::Stop { grace: Some(grace) } => {
                self.force_at = Some(Instant::now() + grace);
                self.press_power_button();
                (Ok(()), None)
            }
            Request::Save { path } => match self.save(&path) {
                Ok(()) => (Ok(()), None),
                Err(text) => failed(text),
            },
        }
    }

    /// A paused machine goes on first: its guest could not see the button. One that a debugger holds does not.
    fn press_power_button(&mut self) {
        self.paused = false;
        self.go_on();
        self.shared.tell(&Event::PowerButton);
        self.board.power_button();
    }

    /// Goes on, unless somebody wants it to stand still.
    fn go_on(&mut self) {
        if self.phase() == Phase::Paused && !self.paused && !self.held {
            self.resume();
        }
    }

    fn debug(&mut self, request: DebugRequest) -> Result<(), String> {
        match request {
            DebugRequest::Hold => {
                self.pause()?;
                (self.held, self.debugged) = (true, true);
            }
            DebugRequest::Run { run, controls, only } => {
                self.pause()?;
                self.vcpus.debug(&controls).map_err(|e| e.to_string())?;
                self.debug_run = run;
                self.vcpus.gate().let_in(only);
                self.held = false;
                self.go_on();
            }
            DebugRequest::LetGo => {
                (self.held, self.debugged) = (false, false);
                self.pause()?;
                self.vcpus.debug(&[]).map_err(|e| e.to_string())?;
                self.vcpus.gate().let_in(None);
                self.go_on();
            }
        }
        Ok(())
    }

    /// A vCPU has come to what a debugger waits for, and shut the gate.
    fn debug_stopped(&mut self, vcpu: u32, event: DebugEvent) {
        if self.debugged {
            match self.pause() {
                Ok(()) => {
                    self.held = true;
                    let notice = gdb::Notice::Stopped { run: self.debug_run, vcpu, event };
                    return self.gdb.iter().for_each(|gdb| gdb.tell(notice));
                }
                Err(e) => tracing::warn!("the machine does not stop for gdb: {e}"),
            }
        }
        // The debugger has gone meanwhile.
        if self.phase() == Phase::Running {
            self.vcpus.gate().open();
        }
    }

    fn phase(&self) -> Phase {
        locked(&self.shared.now).0
    }

    fn set_phase(&self, phase: Phase) {
        locked(&self.shared.now).0 = phase;
    }

    fn stop_processors(&self) -> Result<(), String> {
        if self.vcpus.gate().close(CLOSE_TIMEOUT) {
            Ok(())
        } else {
            Err("a vCPU does not stop: one of its devices waits for the host".into())
        }
    }

    fn pause(&mut self) -> Result<(), String> {
        if self.phase() == Phase::Running {
            self.stop_processors()?;
            self.shared.bus.clock.pause();
            self.board.pause();
            self.set_phase(Phase::Paused);
            self.shared.tell(&Event::Paused);
        }
        Ok(())
    }

    fn resume(&mut self) {
        self.set_phase(Phase::Running);
        self.board.resume();
        self.shared.bus.clock.resume();
        self.vcpus.gate().open();
        self.shared.tell(&Event::Running);
    }

    /// Devices, processors and memory as at power-on; a paused machine stays paused.
    fn reset(&mut self) -> Result<(), String> {
        let paused = self.phase() == Phase::Paused;
        self.stop_processors()?;
        // All time stamp counters start from 0 again at one and the same moment.
        self.shared.bus.clock.pause();
        // What was reported up to here is of the life that ends now.
        self.vcpus.gate().next_epoch();
        self.board.pause();
        for (_, device) in self.board.devices() {
            device.reset();
        }
        self.prepare().map_err(|e| e.to_string())?;
        locked(&self.shared.now).1 += 1;
        self.shared.tell(&Event::Reset);
        if !paused {
            self.resume();
        }
        Ok(())
    }

    fn save(&mut self, dir: &Path) -> Result<(), String> {
        let running = self.phase() == Phase::Running;
        self.pause()?;
        let (now, began) = (self.shared.bus.clock.now(), *locked(&self.shared.began));
        let saved = self.parts().save(dir, now, began).map_err(|e| e.to_string());
        if saved.is_ok() {
            self.shared.tell(&Event::Saved { path: dir.into() });
        }
        if running {
            self.resume();
        }
        saved
    }

    /// Stops everything in the order in which data flows: processors, devices, disks.
    fn finish(&mut self, outcome: &Outcome) {
        if !self.vcpus.end(CLOSE_TIMEOUT) {
            tracing::warn!("a vCPU does not stop: one of its devices waits for the host");
        }
        if let Some(gdb) = self.gdb.take() {
            gdb.end();
        }
        self.shared.bus.clock.pause();
        self.board.pause();
        for end in self.at_end.drain(..) {
            end();
        }
        {
            let mut now = locked(&self.shared.now);
            now.0 = Phase::Ended;
            now.2 = Some(outcome.clone());
        }
        self.shared.tell(&Event::Ended { outcome: outcome.clone() });
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Threads, if `run` was never called or panicked; and the circle of functions and devices.
        self.vcpus.end(CLOSE_TIMEOUT);
        for end in self.at_end.drain(..) {
            end();
        }
        self.board.take_down();
    }
}

/// Why a machine could not be brought to its kernel's entry.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The kernel or initrd.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The tables do not lie in RAM.
    #[error(transparent)]
    Memory(#[from] terem_memory::MemoryError),
    /// A processor cannot begin there.
    #[error(transparent)]
    Cpu(#[from] terem_cpu::CpuError),
}
