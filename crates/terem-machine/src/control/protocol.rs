//! The control protocol: one JSON object a line each way.
//!
//! ```text
//! > {"id":1,"command":"stop","arguments":{"force":false}}
//! < {"id":1,"result":{}}
//! > {"id":2,"command":"console"}
//! < {"id":2,"result":{}}          … from here on both ways carry the console's bytes
//! ```

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use terem_cpu::Counters;

/// Version of the protocol, told in [`Status`].
pub const VERSION: u32 = 1;

/// Longest line that is read, in bytes.
pub const MAX_LINE: usize = 64 << 10;

/// A request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Request {
    /// Any number; the answer carries it again.
    pub id: u64,
    /// What is to be done.
    #[serde(flatten)]
    pub command: Command,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "command", content = "arguments", rename_all = "snake_case")]
pub enum Command {
    /// How the machine is: answered by a `Status`.
    Status,
    /// What the machine's vCPUs have done: answered by a `Stat`.
    Stat,
    /// The machine's plan and state: answered by an object.
    Inspect,
    /// Ends the machine: by its power button, or at once.
    Stop {
        /// Whether to pull the plug instead of pressing the power button.
        force: bool,
    },
    /// Holds the vCPUs.
    Pause,
    /// Lets held vCPUs go on.
    Resume,
    /// Makes this connection the console: after the answer both ways carry its bytes.
    Console,
}

/// An answer: a `result`, or an `error`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Response {
    /// The request's id; 0 if that could not be read.
    pub id: u64,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was done.
    Result(serde_json::Value),
    /// It was not.
    Error(ControlError),
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// For programs.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
}

impl ControlError {
    /// An error with a text for people.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// The kinds of errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The line is no request.
    BadRequest,
    /// The caller may not.
    Forbidden,
    /// Too many connections.
    Busy,
    /// The machine cannot do that in its present state, or at all.
    Unavailable,
}

/// How a machine is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Status {
    /// Version of this protocol.
    pub protocol: u32,
    /// Its name.
    pub name: String,
    /// What it is doing.
    pub state: MachineState,
    /// Process id of its VMM.
    pub pid: u32,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Memory of the guest in bytes.
    pub memory: u64,
    /// Milliseconds since the guest began to run.
    pub uptime_ms: u64,
}

/// What a machine's vCPUs have done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Stat {
    /// Nanoseconds of the guest's time since it began to run, without pauses.
    pub time_ns: u64,
    /// The vCPUs, by their numbers.
    pub vcpus: Vec<Counters>,
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// Being built.
    Starting,
    /// Running.
    Running,
    /// Held.
    Paused,
    /// Ending.
    Stopping,
}

/// The JSON schema of the protocol: of requests, responses, and results.
pub fn schema() -> serde_json::Value {
    let mut generator = schemars::SchemaGenerator::default();
    let request = generator.subschema_for::<Request>();
    let response = generator.subschema_for::<Response>();
    let status = generator.subschema_for::<Status>();
    let stat = generator.subschema_for::<Stat>();
    serde_json::json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Control socket of a Teremok machine",
        "description": "Lines of JSON on a Unix stream socket: clients send requests, the machine sends responses.",
        "oneOf": [request, response],
        "properties": { "result": { "anyOf": [status, stat, { "type": "object" }] } },
        "$defs": generator.take_definitions(true),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_documented() {
        let line = r#"{"id":1,"command":"stop","arguments":{"force":false}}"#;
        let request: Request = serde_json::from_str(line).unwrap();
        assert_eq!(request, Request { id: 1, command: Command::Stop { force: false } });
        assert_eq!(serde_json::to_string(&request).unwrap(), line);
        let console: Request = serde_json::from_str(r#"{"id":2,"command":"console"}"#).unwrap();
        assert_eq!(console.command, Command::Console);
        let answer = Response { id: 2, outcome: Outcome::Result(serde_json::json!({})) };
        assert_eq!(serde_json::to_string(&answer).unwrap(), r#"{"id":2,"result":{}}"#);
        let error =
            Response { id: 3, outcome: Outcome::Error(ControlError::new(ErrorCode::BadRequest, "no")) };
        let line = r#"{"id":3,"error":{"code":"bad_request","message":"no"}}"#;
        assert_eq!(serde_json::to_string(&error).unwrap(), line);
        assert_eq!(serde_json::from_str::<Response>(line).unwrap(), error);
    }

    #[test]
    fn schema_describes_every_command() {
        let text = schema().to_string();
        for word in [
            "status",
            "stat",
            "inspect",
            "stop",
            "pause",
            "resume",
            "console",
            "force",
            "bad_request",
            "uptime_ms",
            "page_walks",
        ] {
            assert!(text.contains(&format!("\"{word}\"")), "{word}");
        }
    }
}
