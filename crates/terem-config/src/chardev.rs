//! Where the bytes of a serial port or console go.

use crate::text::{TextError, text_type};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

const EXPECTED: &str = "stdio, none, pty, file:PATH or socket:PATH";

/// The other end of a serial port or console.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CharConfig {
    /// This terminal (with `--detach`: a buffer that `terem console` reads and writes).
    #[default]
    Stdio,
    /// Nothing: what the guest writes is dropped.
    None,
    /// A new pseudo-terminal, whose name is printed at the start.
    Pty,
    /// A file which takes what the guest writes.
    File(PathBuf),
    /// A Unix stream socket that is listened on, for one client at a time.
    Socket(PathBuf),
}

impl CharConfig {
    pub(crate) fn path_mut(&mut self) -> Option<&mut PathBuf> {
        match self {
            Self::File(path) | Self::Socket(path) => Some(path),
            Self::Stdio | Self::None | Self::Pty => None,
        }
    }
}

impl FromStr for CharConfig {
    type Err = TextError;

    fn from_str(text: &str) -> Result<Self, TextError> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            None if text == "pty" => Ok(Self::Pty),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            Some(("file" | "socket", _)) => Err(TextError::new("its path is empty", EXPECTED)),
            _ => Err(TextError::new("there is no such console", EXPECTED)),
        }
    }
}

impl fmt::Display for CharConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::None => f.write_str("none"),
            Self::Pty => f.write_str("pty"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Socket(path) => write!(f, "socket:{}", path.display()),
        }
    }
}

text_type!(
    CharConfig,
    "CharConfig",
    "^(stdio|none|pty|file:.+|socket:.+)$",
    "Where a console's bytes go: `stdio`, `none`, `pty`, `file:PATH` or `socket:PATH`"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn print_and_parse() {
        for text in ["stdio", "none", "pty", "file:/tmp/a:b", "socket:x.sock"] {
            assert_eq!(text.parse::<CharConfig>().unwrap().to_string(), text);
        }
        for text in ["", "file:", "file", "stdio:x", "tty"] {
            assert!(text.parse::<CharConfig>().is_err(), "{text}");
        }
    }
}
