//! The terminal in raw mode, and back, whatever happens.

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The terminal that is raw now, with what it was like before. One for the process, because the panic hook and signals have
/// to find it.
static RAW: Mutex<Option<Saved>> = Mutex::new(None);

struct Saved {
    terminal: OwnedFd,
    before: Termios,
    /// Whether it has been given back for a while (the process is stopped).
    suspended: bool,
}

fn raw() -> MutexGuard<'static, Option<Saved>> {
    RAW.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A raw terminal; put back when dropped.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes `terminal` raw: every key goes to the guest.
    ///
    /// # Errors
    /// It is no terminal.
    pub fn enter(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        let before = tcgetattr(terminal)?;
        let terminal = terminal.try_clone_to_owned()?;
        make_raw(terminal.as_fd(), &before)?;
        *raw() = Some(Saved { terminal, before, suspended: false });
        Ok(Self(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn make_raw(terminal: BorrowedFd<'_>, before: &Termios) -> io::Result<()> {
    let mut settings = before.clone();
    settings.make_raw();
    Ok(tcsetattr(terminal, OptionalActions::Now, &settings)?)
}

/// Puts the terminal back for good. Does nothing if it is not raw.
pub fn restore() {
    if let Some(saved) = raw().take() {
        let _ = tcsetattr(&saved.terminal, OptionalActions::Now, &saved.before);
    }
}

/// Puts the terminal back until [`resume`].
pub fn suspend() {
    if let Some(saved) = &mut *raw() {
        saved.suspended = true;
        let _ = tcsetattr(&saved.terminal, OptionalActions::Now, &saved.before);
    }
}

/// Makes the terminal raw again, also where somebody else has changed it while the process was stopped.
pub fn resume() {
    if let Some(saved) = &mut *raw() {
        saved.suspended = false;
        let _ = make_raw(saved.terminal.as_fd(), &saved.before);
    }
}

/// Whether new lines on the terminal need a carriage return.
pub fn is_raw() -> bool {
    raw().as_ref().is_some_and(|saved| !saved.suspended)
}

/// Has the terminal put back before a panic's message is printed.
pub fn restore_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        print(panic);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;

    #[test]
    fn put_back_after_drop_panic_and_suspension() {
        let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&control).unwrap();
        unlockpt(&control).unwrap();
        let name = ptsname(&control, Vec::new()).unwrap();
        let terminal = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let cooked =
            || tcgetattr(&terminal).unwrap().local_modes.contains(LocalModes::ICANON | LocalModes::ECHO);
        assert!(cooked());

        let guard = RawTerminal::enter(terminal.as_fd()).unwrap();
        assert!(!cooked() && is_raw());
        suspend();
        assert!(cooked() && !is_raw());
        resume();
        assert!(!cooked() && is_raw());
        drop(guard);
        assert!(cooked() && !is_raw());

        restore_on_panic();
        let guard = RawTerminal::enter(terminal.as_fd()).unwrap();
        // Another thread: nothing of this one is dropped, only the hook can have put the terminal back.
        std::thread::spawn(|| panic!("this panic is part of the test")).join().unwrap_err();
        assert!(cooked());
        drop(guard);
    }
}
