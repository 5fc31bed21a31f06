//! Exit codes: one for each way in which a machine can end.

use std::process::ExitCode;
use terem_machine::Outcome;

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done; of `run`: the guest switched itself off.
    Success,
    /// The host failed: a file, a program, memory, a machine that does not answer.
    HostFailure,
    /// The configuration or the command line is wrong.
    BadConfiguration,
    /// The guest's kernel panicked.
    GuestPanicked,
    /// The guest reset the machine, which has `no_reboot`.
    GuestReset,
    /// A processor of the guest shut down (triple fault), and the machine has `no_reboot`.
    TripleFault,
    /// The machine was ended from outside: `Ctrl-a x`, `terem stop --force`, a signal.
    Stopped,
    /// `disk check` found mistakes.
    ImageDamaged,
    /// `disk compare` found a difference.
    Different,
    /// The guest wrote this value to the debug exit port.
    ByGuest(u32),
    /// What the machine's own process ended with.
    OfChild(u8),
}

/// What is told of each code in the help and the reference.
pub const DESCRIPTIONS: [(u8, &str); 10] = [
    (0, "the guest switched itself off, or the command did its work"),
    (1, "the host failed: a file, a program, memory, or a machine that does not answer"),
    (2, "the configuration or the command line is wrong"),
    (3, "the guest's kernel panicked"),
    (4, "the guest reset the machine, which was run with --no-reboot"),
    (5, "a processor of the guest shut down (triple fault) under --no-reboot"),
    (6, "the machine was ended from outside: Ctrl-a x, terem stop --force, a signal"),
    (7, "disk check found damage"),
    (8, "disk compare found a difference"),
    (64, "to 127: the guest wrote to the debug exit port; 64 + the value's low 6 bits"),
];

impl Exit {
    /// The number the caller sees.
    pub fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::HostFailure => 1,
            Self::BadConfiguration => 2,
            Self::GuestPanicked => 3,
            Self::GuestReset => 4,
            Self::TripleFault => 5,
            Self::Stopped => 6,
            Self::ImageDamaged => 7,
            Self::Different => 8,
            Self::OfChild(code) => code,
            Self::ByGuest(value) => 64 | (value.to_le_bytes()[0] & 0x3f),
        }
    }

    /// The exit for a machine's end.
    pub fn of(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::PoweredOff => Self::Success,
            Outcome::Panicked => Self::GuestPanicked,
            Outcome::DebugExit(value) => Self::ByGuest(*value),
            Outcome::Reset => Self::GuestReset,
            Outcome::TripleFault(_) => Self::TripleFault,
            Outcome::Stopped => Self::Stopped,
            Outcome::Failed(_) => Self::HostFailure,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_own_code() {
        let exits = [
            Exit::Success,
            Exit::HostFailure,
            Exit::BadConfiguration,
            Exit::GuestPanicked,
            Exit::GuestReset,
            Exit::TripleFault,
            Exit::Stopped,
            Exit::ImageDamaged,
            Exit::Different,
            Exit::ByGuest(0),
        ];
        assert_eq!(exits.map(Exit::code), DESCRIPTIONS.map(|(code, _)| code));
        assert_eq!(Exit::ByGuest(0xffff_ffff).code(), 127);
    }
}
