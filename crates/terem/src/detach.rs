//! `terem run --detach`: the machine goes on in a process of its own session.
//!
//! The parent starts this program again with `--detached` in place of `--detach` and waits for one line on the child's
//! standard output: the guest runs. Until then the child's errors go to the user's own standard error; if it ends without
//! that line, its exit code becomes the parent's.

use crate::exit::Exit;
use crate::failure::Failure;
use crate::run::log_path;
use crate::{print, print_json};
use serde::{Deserialize, Serialize};
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use terem_machine::{Event, MachineHandle};

/// What the parent is told, and tells.
#[derive(Debug, Serialize, Deserialize)]
struct Started {
    name: String,
    pid: u32,
}

/// The parent's part.
pub fn start(json: bool) -> Result<Exit, Failure> {
    let failed = |error: io::Error| Failure::host(format!("cannot go into the background: {error}"));
    let arguments = std::env::args_os()
        .skip(1)
        .map(|argument| if argument == "--detach" { "--detached".into() } else { argument });
    let mut child = Command::new(std::env::current_exe().map_err(failed)?)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line).map_err(failed)?;
    }
    match serde_json::from_str::<Started>(&line) {
        Ok(started) if json => print_json(&started),
        Ok(started) => print(&format!("{}\n", started.name)),
        Err(_) => {
            let status = child.wait().map_err(failed)?;
            let code = status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0);
            match code {
                Some(code) => Ok(Exit::OfChild(code)),
                None => Err(Failure::host(format!(
                    "cannot run in the background: the machine's process ended: {status}"
                ))),
            }
        }
    }
}

/// The child's first step: signals of the user's terminal are no longer for it.
pub fn leave_session() -> Result<(), Failure> {
    match rustix::process::setsid() {
        Ok(_) => Ok(()),
        Err(error) => Err(Failure::host(format!("cannot leave the terminal's session: {error}"))),
    }
}

/// Waits for the guest to run, tells the parent, and lets go of the user's terminal.
pub fn tell_parent(handle: MachineHandle) -> io::Result<JoinHandle<()>> {
    let events = handle.subscribe();
    thread::Builder::new().name("parent".into()).spawn(move || {
        let name = handle.plan().name.clone();
        drop(handle);
        // A machine that waits for gdb is paused first.
        let known = |event: &Event| matches!(event, Event::Running | Event::Paused | Event::Ended { .. });
        if matches!(events.iter().find(known), Some(Event::Running | Event::Paused))
            && let Err(error) = turn_to_log(&name)
        {
            tracing::warn!("this machine has no log: {error}");
        }
    })
}

fn turn_to_log(name: &str) -> io::Result<()> {
    let dir = terem_host::runtime_dir().map_err(io::Error::other)?;
    let mut options = OpenOptions::new();
    let log = options.create(true).write(true).truncate(true).mode(0o600).open(log_path(&dir, name))?;
    rustix::stdio::dup2_stderr(&log)?;
    let started = Started { name: name.into(), pid: std::process::id() };
    let mut line = serde_json::to_vec(&started)?;
    line.push(b'\n');
    io::stdout().write_all(&line)?;
    io::stdout().flush()?;
    rustix::stdio::dup2_stdout(&log)?;
    Ok(())
}
