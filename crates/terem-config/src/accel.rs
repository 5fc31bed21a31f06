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
    /// Software CPU only: whether programs that compute for long run on the host's processor directly, in a process of
    /// their own (on), or are translated as everything else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
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

impl KeyValue for AccelConfig {
    const MAIN_KEY: &'static str = "type";
}
