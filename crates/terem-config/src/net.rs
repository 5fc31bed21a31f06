//! Network interfaces.

use crate::error::{ConfigError, quote};
use crate::forward::Forward;
use crate::key_value::KeyValue;
use crate::mac::MacAddress;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Least maximum transmission unit of IPv4 (RFC 791, 3.1), in bytes.
const MIN_MTU: u16 = 68;

/// Longest name of a network interface (`IFNAMSIZ` less the final zero), in bytes.
const MAX_INTERFACE_NAME: usize = 15;

/// A network interface of the guest. `--net user,forward=tcp:2222:22` or `--net tap=tap0`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// What it is connected to (main key). Not given: `tap` where `tap` or `fd` is given, `user` otherwise.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<NetKind>,
    /// Name of the host's tap device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// An open file descriptor of a tap device, inherited from the caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
    /// A port of the host that leads into the guest; can be repeated; user-mode only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub forward: Vec<Forward>,
    /// The guest's Ethernet address. Not given: one made from the machine's name and the interface's place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// Maximum transmission unit told to the guest, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
}

/// What an interface is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NetKind {
    /// The host's own connections, without any privilege (user-mode networking).
    User,
    /// A tap device of the host.
    Tap,
    /// Nothing: the machine has no network interface at all.
    None,
}

/// The backend that an interface needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetBackendConfig {
    /// User-mode networking with these ports of the host leading into the guest.
    User {
        /// The ports.
        forwards: Vec<Forward>,
    },
    /// The tap device of this name.
    Tap {
        /// Its name.
        name: String,
    },
    /// An inherited file descriptor of a tap device.
    TapFd {
        /// The descriptor.
        fd: i32,
    },
}

impl NetConfig {
    /// The kind, given or implied.
    pub fn kind(&self) -> NetKind {
        let tap = self.tap.is_some() || self.fd.is_some();
        self.kind.unwrap_or(if tap { NetKind::Tap } else { NetKind::User })
    }

    /// The backend of a checked configuration; `None` for no interface.
    pub fn backend(&self) -> Option<NetBackendConfig> {
        match (self.kind(), &self.tap, self.fd) {
            (NetKind::None, ..) | (NetKind::Tap, None, None) => None,
            (NetKind::User, ..) => Some(NetBackendConfig::User { forwards: self.forward.clone() }),
            (NetKind::Tap, Some(name), _) => Some(NetBackendConfig::Tap { name: name.clone() }),
            (NetKind::Tap, None, Some(fd)) => Some(NetBackendConfig::TapFd { fd }),
        }
    }

    pub(crate) fn validate(&self, key: &str, errors: &mut Vec<ConfigError>) {
        self.validate_tap(key, errors);
        if self.kind() != NetKind::User && !self.forward.is_empty() {
            errors.push(ConfigError::value(
                format!("{key}.forward"),
                quote(self.forward[0]),
                "only user-mode networking forwards ports",
                "no forward here, or type = \"user\"",
            ));
        }
        if let Some(mac) = self.mac.filter(|mac| mac.is_multicast() || mac.0 == [0; 6]) {
            errors.push(ConfigError::value(
                format!("{key}.mac"),
                quote(mac),
                "no interface can have a group address or none",
                "an address whose first byte is even, such as 52:54:00:12:34:56",
            ));
        }
        if let Some(mtu) = self.mtu.filter(|mtu| *mtu < MIN_MTU) {
            errors.push(ConfigError::value(
                format!("{key}.mtu"),
                mtu,
                "IPv4 needs more",
                format!("{MIN_MTU} to 65535"),
            ));
        }
    }

    fn validate_tap(&self, key: &str, errors: &mut Vec<ConfigError>) {
        match (self.kind(), &self.tap, self.fd) {
            (NetKind::Tap, None, None) => errors.push(ConfigError::missing(
                format!("{key}.tap"),
                "it is needed and was not given",
                "the name of a tap device, or `fd`",
            )),
            (NetKind::Tap, Some(_), Some(fd)) => errors.push(ConfigError::value(
                format!("{key}.fd"),
                fd,
                "the tap device is named already",
                "either `tap` or `fd`",
            )),
            (NetKind::User | NetKind::None, Some(tap), _) => errors.push(ConfigError::value(
                format!("{key}.tap"),
                quote(tap),
                "this interface is not on a tap device",
                "type = \"tap\", or no `tap`",
            )),
            (NetKind::User | NetKind::None, None, Some(fd)) => errors.push(ConfigError::value(
                format!("{key}.fd"),
                fd,
                "this interface is not on a tap device",
                "type = \"tap\", or no `fd`",
            )),
            _ => {}
        }
        if let Some(tap) = &self.tap
            && (tap.is_empty() || tap.len() > MAX_INTERFACE_NAME || tap.contains(['/', ' ', '\0']))
        {
            errors.push(ConfigError::value(
                format!("{key}.tap"),
                quote(tap),
                "it is no name of a network interface",
                format!("1 to {MAX_INTERFACE_NAME} bytes without `/` and blanks"),
            ));
        }
        if let Some(fd) = self.fd.filter(|fd| *fd < 3) {
            errors.push(ConfigError::value(
                format!("{key}.fd"),
                fd,
                "it is no inherited file descriptor",
                "3 or more (0 to 2 are standard input, output and error)",
            ));
        }
    }
}

impl KeyValue for NetConfig {
    const MAIN_KEY: &'static str = "type";
}
