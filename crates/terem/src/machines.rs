//! Running machines, seen from outside: `ps`, `inspect`, `stop`, `console`.

use crate::escape::Wish;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::{print, print_json, stdio, terminal};
use serde::Serialize;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};
use signal_hook::iterator::Signals;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;
use terem_config::ByteSize;
use terem_machine::control::{Client, ClientError, Command, MachineState, Running, running};

/// How long a machine may take to end after it was killed.
const KILL: Duration = Duration::from_secs(10);

/// A line of `ps`.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    pid: Option<u32>,
    state: Option<MachineState>,
    cpus: Option<u32>,
    memory: Option<u64>,
    uptime_ms: Option<u64>,
}

fn directory() -> Result<PathBuf, Failure> {
    terem_host::runtime_dir().map_err(|error| Failure::host(error.to_string()))
}

fn all() -> Result<Vec<Running>, Failure> {
    let dir = directory()?;
    running(&dir)
        .map_err(|error| Failure::host(format!("cannot list the machines in {}: {error}", dir.display())))
}

/// Lists the running machines.
pub fn ps(json: bool) -> Result<Exit, Failure> {
    let rows: Vec<Row> = all()?
        .into_iter()
        .map(|running| {
            // One that is being built has no socket yet, one that hangs does not answer: it is listed all the same.
            let status = Client::connect(&running.socket).and_then(|mut client| client.status()).ok();
            let status = status.as_ref();
            Row {
                name: running.name,
                pid: running.pid,
                state: status.map(|s| s.state),
                cpus: status.map(|s| s.cpus),
                memory: status.map(|s| s.memory),
                uptime_ms: status.map(|s| s.uptime_ms),
            }
        })
        .collect();
    if json {
        return print_json(&rows);
    }
    let mut text = format!(
        "{:<24} {:>8} {:<9} {:>4} {:>7} {:>10}\n",
        "NAME", "PID", "STATE", "CPUS", "MEMORY", "UPTIME"
    );
    for row in rows {
        let state = match row.state {
            Some(MachineState::Starting) => "starting",
            Some(MachineState::Running) => "running",
            Some(MachineState::Paused) => "paused",
            Some(MachineState::Stopping) => "stopping",
            None => "silent",
        };
        text += &format!(
            "{:<24} {:>8} {state:<9} {:>4} {:>7} {:>10}\n",
            row.name,
            or_dash(row.pid),
            or_dash(row.cpus),
            or_dash(row.memory.map(ByteSize)),
            or_dash(row.uptime_ms.map(duration)),
        );
    }
    print(&text)
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h{minutes:02}m"),
    }
}

pub fn connect(verb: &str, name: &str) -> Result<Client, Failure> {
    let machines = all()?;
    let Some(machine) = machines.iter().find(|machine| machine.name == name) else {
        let names: Vec<_> = machines.iter().map(|machine| machine.name.as_str()).collect();
        let hint = if names.is_empty() {
            "no machine is running".into()
        } else {
            format!("running: {}", names.join(", "))
        };
        return Err(
            Failure::host(format!("cannot {verb} {name}: no machine of this name is running")).hint(hint)
        );
    };
    Client::connect(&machine.socket).map_err(|error| refused(verb, name, &error))
}

pub fn refused(verb: &str, name: &str, error: &ClientError) -> Failure {
    Failure::host(format!("cannot {verb} {name}: {error}"))
}

/// Shows everything about a machine.
pub fn inspect(name: &str) -> Result<Exit, Failure> {
    let answer = connect("inspect", name)?.call(Command::Inspect);
    print_json(&answer.map_err(|error| refused("inspect", name, &error))?)
}

/// Stops a machine and waits until it is gone.
pub fn stop(name: &str, seconds: u64, force: bool) -> Result<Exit, Failure> {
    let failed = |error: ClientError| refused("stop", name, &error);
    let mut client = connect("stop", name)?;
    if !force {
        if ask(&mut client, false).map_err(failed)?
            || client.wait_for_end(Duration::from_secs(seconds)).map_err(failed)?
        {
            return Ok(Exit::Success);
        }
        stdio::tell(&format!(
            "terem: {name} has not switched itself off within {seconds} s; it is stopped by force"
        ));
    }
    if ask(&mut client, true).map_err(failed)? {
        return Ok(Exit::Success);
    }
    if client.wait_for_end(KILL).map_err(failed)? {
        Ok(Exit::Success)
    } else {
        Err(Failure::host(format!("cannot stop {name}: it has not ended within {} s", KILL.as_secs()))
            .hint("`terem ps` shows its process id, which can be killed"))
    }
}

/// Asks a machine to stop. `true` if it was gone before it had answered.
fn ask(client: &mut Client, force: bool) -> Result<bool, ClientError> {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match client.call(Command::Stop { force }) {
        Ok(_) => Ok(false),
        Err(ClientError::Io(error))
            if matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof) =>
        {
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

/// Attaches this terminal to a machine's console.
pub fn console(name: &str) -> Result<Exit, Failure> {
    let failed = |error: std::io::Error| Failure::host(format!("cannot attach to {name}: {error}"));
    let client = connect("attach to", name)?;
    let (first, stream) = client.console().map_err(|error| refused("attach to", name, &error))?;
    watch_signals().map_err(failed)?;
    if stdio::on_terminal() {
        stdio::tell(&format!("terem: {name} is on this terminal; Ctrl-a x leaves it, and it goes on"));
    }
    let terminal = stdio::raw_terminal();
    let (mut input, closer) = (stream.try_clone().map_err(failed)?, stream.try_clone().map_err(failed)?);
    thread::Builder::new()
        .name("terminal input".into())
        .spawn(move || {
            let wish = |wish| match wish {
                Wish::Quit => {
                    let _ = closer.shutdown(Shutdown::Both);
                }
                Wish::Help => stdio::tell(
                    "\r\nCtrl-a x       leave the console; the machine goes on\r\nCtrl-a Ctrl-a  send Ctrl-a",
                ),
            };
            stdio::read_input(|keys| input.write_all(keys).is_ok(), wish);
        })
        .map_err(failed)?;
    let copied = copy(&first, stream);
    drop(terminal);
    if stdio::on_terminal() {
        stdio::tell("");
    }
    match copied {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(failed(error)),
        _ => Ok(Exit::Success),
    }
}

fn copy(first: &[u8], mut stream: impl Read) -> std::io::Result<()> {
    let mut stdout = std::io::stdout();
    let mut buffer = [0; 4096];
    stdout.write_all(first)?;
    loop {
        stdout.flush()?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => stdout.write_all(buffer.get(..count).unwrap_or_default())?,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Signals that end this process put the terminal back first.
fn watch_signals() -> std::io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGTSTP, SIGCONT])?;
    let watch = move || {
        for signal in signals.forever() {
            if matches!(signal, SIGTSTP | SIGCONT) {
                crate::run::on_job_control(signal);
            } else {
                terminal::restore();
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            }
        }
    };
    thread::Builder::new().name("signals".into()).spawn(watch).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(999), "0s");
        assert_eq!(duration(61_000), "1m01s");
        assert_eq!(duration(3_725_000), "1h02m");
    }
}
