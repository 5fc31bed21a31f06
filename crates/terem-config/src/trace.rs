//! What a machine writes down of what its vCPUs do.

use crate::key_value::KeyValue;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Writes down what the vCPUs do, a line each. `--trace interrupts --trace exits,file=exits.txt`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TraceConfig {
    /// What is written down (main key).
    pub what: TraceWhat,
    /// The file, which is replaced; traces with the same file share it. Not given: standard error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// What is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TraceWhat {
    /// Each instruction, with its disassembly. All code is interpreted, none translated, meanwhile.
    Instructions,
    /// Each exception and interrupt, with vector and error code.
    Interrupts,
    /// Each access to a port or memory-mapped register, with size and value.
    Exits,
}

impl KeyValue for TraceConfig {
    const MAIN_KEY: &'static str = "what";
}
