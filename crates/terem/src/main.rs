//! `terem`: virtual machines with or without hardware virtualisation.
//!
//! The command line only: arguments in, text and exit codes out. [`arguments`] says what there is; each command has a module.
#![forbid(unsafe_code)]

mod arguments;
mod cpu;
mod detach;
mod disk;
mod escape;
mod exit;
mod failure;
mod host;
mod logging;
mod machines;
mod qemu_img;
mod reference;
mod run;
mod settings;
mod stat;
mod stdio;
mod terminal;

use arguments::{Arguments, Command, ConfigCommand};
use clap::{CommandFactory, FromArgMatches};
use exit::Exit;
use failure::Failure;
use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    terminal::restore_on_panic();
    let name = std::env::args_os().next().unwrap_or_default();
    if Path::new(&name).file_name().is_some_and(|name| name == "qemu-img") {
        return qemu_img::main(std::env::args_os());
    }
    let matches = reference::with_keys(Arguments::command()).get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    if let Err(failure) = logging::start(&arguments.log) {
        failure.print();
        return failure.exit.into();
    }
    let exit = match arguments.command {
        Command::Run(run) => {
            terem_machine::prepare_process();
            run::run(&run)
        }
        Command::Ps { json } => machines::ps(json),
        Command::Inspect { name } => machines::inspect(&name),
        Command::Stat { name, interval, json } => stat::show(&name, interval, json),
        Command::Stop { name, timeout, force } => machines::stop(&name, timeout, force),
        Command::Console { name } => machines::console(&name),
        Command::Config(ConfigCommand::Schema { control }) => print_schema(control),
        Command::Config(ConfigCommand::Check { file }) => check(&file),
        Command::Config(ConfigCommand::Reference) => print(&reference::markdown()),
        Command::Disk(arguments) => disk::run(&arguments),
        Command::QemuImg { arguments } => {
            return qemu_img::main([OsString::from("qemu-img")].into_iter().chain(arguments));
        }
        Command::Cpu(arguments) => cpu::run(&arguments),
        Command::Host { json } => host::show(json),
    };
    match exit {
        Ok(exit) => exit.into(),
        Err(failure) => {
            failure.print();
            failure.exit.into()
        }
    }
}

/// Writes to standard output. A reader that has gone away (`terem ps | head -1`) is no error.
fn print(text: &str) -> Result<Exit, Failure> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::host(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(Exit::Success),
    }
}

fn print_json(value: &impl serde::Serialize) -> Result<Exit, Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::host(format!("cannot write this as JSON: {error}")))?;
    print(&(text + "\n"))
}

fn print_schema(control: bool) -> Result<Exit, Failure> {
    print_json(&if control { terem_machine::control::protocol::schema() } else { terem_config::schema() })
}

fn check(file: &Path) -> Result<Exit, Failure> {
    let (config, mut mistakes) = terem_config::load(file);
    config.validate_besides(&mut mistakes);
    terem_config::ConfigErrors::check(mistakes)?;
    print(&format!("{}: a machine without mistakes\n", file.display()))
}
