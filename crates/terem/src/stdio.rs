//! Between a console and this program's standard input and output.

use crate::escape::{Escape, Wish};
use crate::terminal::RawTerminal;
use rustix::termios::isatty;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use terem_machine::control::Console;

/// Whether a person types.
pub fn on_terminal() -> bool {
    isatty(io::stdin())
}

/// Makes the terminal raw, if standard input is one.
pub fn raw_terminal() -> Option<RawTerminal> {
    if on_terminal() { RawTerminal::enter(io::stdin().as_fd()).ok() } else { None }
}

/// Reads standard input until it ends. `send` gets what is for the guest and says whether to go on; `wish` the rest. Without
/// a terminal every byte is for the guest.
pub fn read_input(mut send: impl FnMut(&[u8]) -> bool, mut wish: impl FnMut(Wish)) {
    let escapes = on_terminal();
    let (mut escape, mut keys) = (Escape::default(), Vec::new());
    let mut buffer = [0; 1024];
    loop {
        let typed = match io::stdin().read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if !escapes {
            if !send(typed) {
                return;
            }
            continue;
        }
        let mut rest = typed;
        while let Some((wished, more)) = escape.read(rest, &mut keys) {
            wish(wished);
            rest = more;
        }
        if !keys.is_empty() && !send(&keys) {
            return;
        }
        keys.clear();
    }
}

/// Copies a console's output to standard output until the console is closed, on a thread of its own.
pub fn copy_output(console: Arc<Console>) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name("terminal output".into()).spawn(move || {
        let (mut place, mut stdout) = (0, io::stdout());
        while let Some((bytes, next)) = console.drain(place, Duration::from_secs(60)) {
            if stdout.write_all(&bytes).and_then(|()| stdout.flush()).is_err() {
                // Nobody reads any more: the guest goes on without.
                return console.stop_waiting();
            }
            place = next;
        }
    })
}

/// Standard error for whole lines, also while the terminal is raw.
pub struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        if crate::terminal::is_raw() {
            stderr.write_all(&String::from_utf8_lossy(bytes).replace('\n', "\r\n").into_bytes())?;
        } else {
            stderr.write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// A line for the user, in between the guest's output.
pub fn tell(text: &str) {
    let end = if crate::terminal::is_raw() { "\r\n" } else { "\n" };
    let _ = write!(io::stderr(), "{text}{end}");
}
