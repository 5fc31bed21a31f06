//! The log: to standard error, and readable while the terminal is raw.

use crate::failure::Failure;
use crate::terminal;
use std::io::{self, Write};
use tracing_subscriber::EnvFilter;

/// Starts the log. `filter` is a level or a list of `module=level`.
pub fn start(filter: &str) -> Result<(), Failure> {
    let filter = EnvFilter::builder().parse(filter).map_err(|error| {
        Failure::configuration(format!("--log {filter}: it cannot be read: {error}"))
            .hint("error, warn, info, debug or trace; or a list such as info,terem_block=debug")
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Lines)
        .with_ansi(false)
        .without_time()
        .init();
    Ok(())
}

/// Standard error; in a raw terminal a new line needs a carriage return as well.
struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if terminal::is_raw() {
            for line in bytes.split_inclusive(|&byte| byte == b'\n') {
                io::stderr().write_all(line)?;
                if line.ends_with(b"\n") {
                    io::stderr().write_all(b"\r")?;
                }
            }
        } else {
            io::stderr().write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
