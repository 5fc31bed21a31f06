//! What went wrong, for people.

use crate::exit::Exit;
use std::fmt;
use terem_config::{ConfigError, ConfigErrors};

/// An error as the user sees it: what could not be done and why, then what to do about it.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// The exit code that goes with it.
    pub exit: Exit,
    /// One line for each mistake.
    lines: Vec<String>,
    /// What to do.
    hint: Option<String>,
}

impl Failure {
    /// The host cannot do something; `text` is "cannot … : …".
    pub fn host(text: impl Into<String>) -> Self {
        Self { exit: Exit::HostFailure, lines: vec![text.into()], hint: None }
    }

    /// The user asked for something that cannot be.
    pub fn configuration(text: impl Into<String>) -> Self {
        Self { exit: Exit::BadConfiguration, lines: vec![text.into()], hint: None }
    }

    /// The same with a line on what to do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same with another exit code.
    #[must_use]
    pub fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// Several mistakes, one to a line.
    pub fn configuration_lines(lines: Vec<String>) -> Self {
        Self { exit: Exit::BadConfiguration, lines, hint: None }
    }

    /// To standard error.
    pub fn print(&self) {
        eprint!("{self}");
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.lines {
            writeln!(f, "terem: {line}")?;
        }
        match &self.hint {
            Some(hint) => writeln!(f, "  hint: {hint}"),
            None => Ok(()),
        }
    }
}

impl From<ConfigErrors> for Failure {
    fn from(errors: ConfigErrors) -> Self {
        let lines = errors.0.iter().map(ToString::to_string).collect();
        Self::configuration_lines(lines)
            .hint("`terem run --help` and docs/run.md list every key with its values")
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        ConfigErrors::from(error).into()
    }
}

/// An error and its causes in one line, without saying twice what a message has taken over from its cause.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_a_hint() {
        let failure = Failure::host("cannot a: b").hint("do c");
        assert_eq!(failure.to_string(), "terem: cannot a: b\n  hint: do c\n");
    }

    #[test]
    fn causes_are_told_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer: inner")]
        struct Says(#[source] Inner);
        #[derive(Debug, thiserror::Error)]
        #[error("inner")]
        struct Inner(#[source] std::io::Error);
        assert_eq!(chain(&Says(Inner(std::io::Error::other("deep")))), "outer: inner: deep");
    }
}
