//! `terem run`: from arguments to the guest's end.

use crate::arguments::RunArguments;
use crate::detach;
use crate::disk::passphrase::read_keys;
use crate::escape::Wish;
use crate::exit::Exit;
use crate::failure::{Failure, chain};
use crate::{print, print_json, settings, stdio, terminal};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use terem_block::{Keys, OpenError};
use terem_config::{AccelKind, CharConfig, MachineConfig};
use terem_host::KvmProbe;
use terem_machine::control::{
    Claim, ClaimError, Console, ConsoleEnd, ControlServer, ControlTarget, MachineTarget,
};
use terem_machine::plan::{DiskPlan, HostInventory, Plan};
use terem_machine::{BuildError, DiskError, Lent, Machine, MachineHandle, Outcome};

/// Output that a console keeps, in bytes: some thousands of lines.
const CONSOLE: usize = 1 << 20;

/// How long a guest may take to shut down when the VMM is told to terminate.
const TERMINATION: Duration = Duration::from_secs(10);

/// Most machines that get a name made from the same file.
const SAME_NAMES: u32 = 1000;

/// Runs the machine of the arguments.
pub fn run(arguments: &RunArguments) -> Result<Exit, Failure> {
    let mut config = settings::machine(arguments)?;
    if arguments.print_config {
        return if arguments.json { print_json(&config) } else { print(&config.to_toml()?) };
    }
    let host = host(&config);
    let mut plan = plan(&config, &host)?;
    if arguments.plan {
        return if arguments.json { print_json(&plan) } else { print(&format!("{plan}\n")) };
    }
    if arguments.detach {
        return detach::start(arguments.json);
    }
    let claim = claim(&plan.name, config.name.is_some())?;
    if let Some(claim) = claim.as_ref().filter(|claim| claim.name() != plan.name) {
        config.name = Some(claim.name().into());
        plan = self::plan(&config, &host)?;
    }
    // Before the terminal is let go: they may be asked for there.
    let keys = keys(&plan)?;
    if arguments.detached {
        detach::leave_session()?;
        if claim.is_none() {
            return Err(Failure::host("cannot run in the background without a control socket"));
        }
    }
    Session::new(plan, claim, arguments, keys)?.run()
}

/// The passphrases of the disks.
fn keys(plan: &Plan) -> Result<Vec<Keys>, Failure> {
    let read = |disk: &DiskPlan| read_keys(&disk.config.passphrase, &disk.config.path.display().to_string());
    plan.disks.iter().map(read).collect()
}

fn host(config: &MachineConfig) -> HostInventory {
    let mut host = HostInventory::here();
    if config.accel.kind == AccelKind::Auto {
        let probe = KvmProbe::run();
        host.no_kvm = (!probe.is_worth_using()).then_some(probe.reason);
    }
    host
}

fn plan(config: &MachineConfig, host: &HostInventory) -> Result<Plan, Failure> {
    Plan::new(config, host)
        .map_err(|errors| Failure::configuration_lines(errors.0.iter().map(ToString::to_string).collect()))
}

/// The machine's name. One that the user gave is taken or refused; one that was made up gets a number if need be. `None` where
/// the host has no place for control sockets: then the machine runs without.
fn claim(name: &str, given: bool) -> Result<Option<Claim>, Failure> {
    let dir = match terem_host::runtime_dir() {
        Ok(dir) => dir,
        Err(error) => {
            stdio::tell(&format!("terem: this machine runs without a control socket: {error}"));
            return Ok(None);
        }
    };
    let numbered = (2..SAME_NAMES).map(|number| format!("{name}-{number}"));
    for name in std::iter::once(name.to_string()).chain(numbered) {
        match Claim::new(&dir, &name) {
            Ok(claim) => return Ok(Some(claim)),
            Err(ClaimError::Taken { .. }) if !given => {}
            Err(error @ ClaimError::Taken { .. }) => {
                return Err(Failure::configuration(format!("cannot run {name}: {error}"))
                    .hint(format!("another --name, or `terem stop {name}`")));
            }
            Err(error) => return Err(Failure::host(format!("cannot run {name}: {error}"))),
        }
    }
    Err(Failure::host(format!("cannot run {name}: {SAME_NAMES} machines are named so"))
        .hint("give it a --name"))
}

/// A built machine with everything that belongs to this process.
struct Session {
    machine: Machine,
    handle: MachineHandle,
    console: Option<Arc<Console>>,
    target: Arc<MachineTarget>,
    server: Option<ControlServer>,
    detached: bool,
    json: bool,
}

impl Session {
    fn new(
        plan: Plan,
        claim: Option<Claim>,
        arguments: &RunArguments,
        keys: Vec<Keys>,
    ) -> Result<Self, Failure> {
        let detached = arguments.detached;
        let on_stdio = plan.serial == CharConfig::Stdio
            || plan.console.as_ref().is_some_and(|c| c.backend == CharConfig::Stdio);
        let console = on_stdio.then(|| Arc::new(Console::new(CONSOLE, !detached)));
        let lent = Lent {
            stdio: console.clone().map(|console| Box::new(ConsoleEnd(console)) as _),
            trace: Some(Box::new(stdio::Lines)),
            keys,
        };
        let name = plan.name.clone();
        let reason = plan.accelerator.reason.clone();
        let machine = Machine::build(plan, lent).map_err(|error| cannot_build(&name, &error))?;
        if let Some(reason) = reason {
            stdio::tell(&format!("terem: {name} runs on the software CPU: {reason}"));
        }
        let handle = machine.handle();
        if let Some(console) = &console {
            let handle = handle.clone();
            console.connect(Box::new(move |bytes| handle.send_input(bytes)));
        }
        for notice in handle.notices() {
            stdio::tell(&format!("terem: {notice}"));
        }
        let target = Arc::new(MachineTarget::new(handle.clone(), console.clone()));
        let server = claim
            .map(|claim| ControlServer::start(claim, target.clone()))
            .transpose()
            .map_err(|error| Failure::host(format!("cannot run {name}: {error}")))?;
        Ok(Self { machine, handle, console, target, server, detached, json: arguments.json })
    }

    fn run(mut self) -> Result<Exit, Failure> {
        let no_thread = |error| Failure::host(format!("cannot start a thread: {error}"));
        watch_signals(self.handle.clone(), self.target.clone()).map_err(no_thread)?;
        let told =
            self.detached.then(|| detach::tell_parent(self.handle.clone())).transpose().map_err(no_thread)?;
        let (terminal, output) = match self.console.clone().filter(|_| !self.detached) {
            Some(console) => {
                if stdio::on_terminal() {
                    stdio::tell(&format!(
                        "terem: {} is on this terminal; Ctrl-a h helps",
                        self.handle.plan().name
                    ));
                }
                let terminal = stdio::raw_terminal();
                let output = stdio::copy_output(console.clone()).map_err(no_thread)?;
                read_input(console, self.target.clone()).map_err(no_thread)?;
                (terminal, Some(output))
            }
            None => (None, None),
        };
        let outcome = self.machine.run();
        if let Some(console) = &self.console {
            console.close();
        }
        // The guest's last words, then the terminal, then ours.
        for thread in output.into_iter().chain(told) {
            let _ = thread.join();
        }
        drop(terminal);
        drop(self.server.take());
        Ok(self.tell_outcome(&outcome))
    }

    fn tell_outcome(&self, outcome: &Outcome) -> Exit {
        let exit = Exit::of(outcome);
        if self.json {
            let text = outcome.to_string();
            let line = serde_json::json!({"outcome": outcome, "exit_code": exit.code(), "text": text});
            stdio::tell(&line.to_string());
        } else if exit != Exit::Success || stdio::on_terminal() {
            stdio::tell(&format!("terem: {}: {outcome}", self.handle.plan().name));
        }
        exit
    }
}

fn cannot_build(name: &str, error: &BuildError) -> Failure {
    let text = format!("cannot run {name}: {}", chain(error));
    match error {
        BuildError::Disk(DiskError::Open { source: OpenError::NeedsPassphrase { .. }, .. }) => {
            Failure::host(text).hint("passphrase=file:PATH, fd:NUMBER or ask in its --disk")
        }
        BuildError::NoKernel => Failure::configuration(text),
        _ => Failure::host(text),
    }
}

fn read_input(console: Arc<Console>, target: Arc<MachineTarget>) -> std::io::Result<()> {
    const HELP: &str = "\r\nCtrl-a x       end the machine at once (`terem stop` lets it shut down)\r\n\
                        Ctrl-a h       this help\r\nCtrl-a Ctrl-a  send Ctrl-a";
    let wish = move |wish| match wish {
        Wish::Quit => target.kill(),
        Wish::Help => stdio::tell(HELP),
    };
    thread::Builder::new()
        .name("terminal input".into())
        .spawn(move || stdio::read_input(|keys| console.send(keys), wish))
        .map(drop)
}

/// SIGTERM presses the power button, and pulls the plug later or with the second; SIGINT, SIGHUP and SIGQUIT pull it at once.
fn watch_signals(handle: MachineHandle, target: Arc<MachineTarget>) -> std::io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT])?;
    let watch = move || {
        let mut asked = false;
        for signal in signals.forever() {
            match signal {
                SIGTSTP | SIGCONT => on_job_control(signal),
                SIGTERM if !std::mem::replace(&mut asked, true) => {
                    let _ = handle.stop(Some(TERMINATION));
                }
                _ => target.kill(),
            }
        }
    };
    thread::Builder::new().name("signals".into()).spawn(watch).map(drop)
}

/// The shell stops and continues us: meanwhile it gets its terminal back.
pub fn on_job_control(signal: i32) {
    if signal == SIGTSTP {
        terminal::suspend();
        let _ = signal_hook::low_level::emulate_default_handler(SIGTSTP);
    }
    terminal::resume();
}

/// The log of a machine in the background.
pub fn log_path(dir: &Path, name: &str) -> std::path::PathBuf {
    dir.join(format!("{name}.log"))
}
