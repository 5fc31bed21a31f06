//! The asking side.

use super::protocol::{Command, ControlError, Outcome, Request, Response, Stat, Status};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long an answer may take: the machine answers from a thread that waits for nothing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket is not there, or the connection broke.
    #[error("the machine does not answer: {0}")]
    Io(#[from] io::Error),
    /// What came was no answer.
    #[error("the machine's answer cannot be read: {0}")]
    Answer(#[from] serde_json::Error),
    /// The machine says no.
    #[error("{0}")]
    Refused(#[from] ControlError),
}

/// A connection to a running machine.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    next_id: u64,
}

impl Client {
    /// Connects to the control socket at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Self { stream: BufReader::new(stream), next_id: 1 })
    }

    /// Has `command` done and returns its result.
    ///
    /// # Errors
    /// The machine says no, or the connection breaks.
    pub fn call(&mut self, command: Command) -> Result<serde_json::Value, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = serde_json::to_vec(&Request { id, command })?;
        line.push(b'\n');
        // A refusal may have been sent before anything was asked; then writing fails, and reading tells why.
        let sent = self.stream.get_mut().write_all(&line);
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line)? == 0 {
                sent?;
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let response: Response = serde_json::from_str(&line)?;
            if response.id == id || response.id == 0 {
                return match response.outcome {
                    Outcome::Result(value) => Ok(value),
                    Outcome::Error(error) => Err(error.into()),
                };
            }
        }
    }

    /// How the machine is.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn status(&mut self) -> Result<Status, ClientError> {
        Ok(serde_json::from_value(self.call(Command::Status)?)?)
    }

    /// What its vCPUs have done.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn stat(&mut self) -> Result<Stat, ClientError> {
        Ok(serde_json::from_value(self.call(Command::Stat)?)?)
    }

    /// Waits until the machine has ended, up to `timeout`. `false` if it has not.
    ///
    /// # Errors
    /// The connection cannot be waited on.
    pub fn wait_for_end(&mut self, timeout: Duration) -> Result<bool, ClientError> {
        let until = Instant::now() + timeout;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.stream.get_ref().set_read_timeout(Some(left))?;
            let mut line = String::new();
            match self.stream.read_line(&mut line) {
                Ok(0) => return Ok(true),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(true),
                Err(error) => return Err(error.into()),
            }
            self.stream.get_ref().set_read_timeout(Some(ANSWER_TIMEOUT))?;
        }
    }

    /// Makes this connection the machine's console: returns output that has come already, and the stream for the rest.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn console(mut self) -> Result<(Vec<u8>, UnixStream), ClientError> {
        self.call(Command::Console)?;
        let first = self.stream.buffer().to_vec();
        let stream = self.stream.into_inner();
        stream.set_read_timeout(None)?;
        Ok((first, stream))
    }
}
