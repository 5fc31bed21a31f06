//! What runs the guest's instructions.

use crate::key_value::KeyValue;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The accelerator: what runs the guest's instructions. `--accel soft,translate=off`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AccelConfig {
    /// Which accelerator (main key).
    #[serde(rename = "type", default)]
    pub kind: AccelKind,
    /// Software CPU only: whether hot code is translated to host code (on), or all of it interpreted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub translate: Option<bool>,
    /// Software CPU only: which programs run on the host's processor directly, in a process of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct: Option<DirectPrograms>,
}

/// Which accelerator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccelKind {
    /// The fastest that works on this host.
    #[default]
    Auto,
    /// The kernel's virtual machine monitor with hardware virtualisation.
    Kvm,
    /// The built-in software CPU: works everywhere.
    Soft,
}

/// Which of a guest's programs run on the host's processor directly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DirectPrograms {
    /// None: they are translated as all other code.
    Off,
    /// Those that compute for long.
    #[default]
    On,
    /// All, which is slow for those that often call their kernel: for tests.
    Always,
}

impl KeyValue for AccelConfig {
    const MAIN_KEY: &'static str = "type";
}
