//! Network backends behind virtio-net, opened as configured.

use std::sync::Arc;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use terem_config::NetBackendConfig;
use terem_net::{
    Forward, NetBackend, NoNetwork, Protocol, Tap, TapError, UserNet, UserNetError, UserOptions,
};

use crate::plan::NetPlan;

/// Why a network interface cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// User-mode networking.
    #[error("net: {0}")]
    User(#[from] UserNetError),
    /// A tap device.
    #[error("net: {0}")]
    Tap(#[from] TapError),
    /// An inherited descriptor.
    #[error(
        "net: descriptor {fd} cannot be taken over: {source}; it must be open in the process that starts the machine"
    )]
    Descriptor {
        /// Its number.
        fd: i32,
        /// Why not.
        source: std::io::Error,
    },
}

pub(crate) fn open(plan: &NetPlan) -> Result<Arc<dyn NetBackend>, NetError> {
    Ok(match plan.backend() {
        None => Arc::new(NoNetwork),
        Some(NetBackendConfig::Tap { name }) => Arc::new(Tap::open_existing(&name)?),
        Some(NetBackendConfig::TapFd { fd }) => Arc::new(inherited(fd)?),
        Some(NetBackendConfig::User { forwards }) => {
            let forwards = forwards.iter().map(forward).collect();
            Arc::new(UserNet::start(&UserOptions { forwards, name_server: None })?)
        }
    })
}

fn forward(f: &terem_config::Forward) -> Forward {
    Forward {
        protocol: match f.protocol {
            terem_config::Protocol::Tcp => Protocol::Tcp,
            terem_config::Protocol::Udp => Protocol::Udp,
        },
        address: Some(f.listen_address()),
        host_port: f.host_port.get(),
        guest_port: f.guest_port.get(),
    }
}

/// Takes a descriptor of this process by its number, which the kernel checks: there may be none of it.
fn inherited(fd: i32) -> Result<Tap, NetError> {
    let taken = pidfd_open(getpid(), PidfdFlags::empty())
        .and_then(|process| pidfd_getfd(process, fd, PidfdGetfdFlags::empty()));
    let device = taken.map_err(|e| NetError::Descriptor { fd, source: e.into() })?;
    Ok(Tap::from_fd(device)?)
}
