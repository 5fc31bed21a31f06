//! Network backends behind virtio-net, opened as configured.

use std::sync::Arc;
use std::time::Duration;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use terem_config::NetBackendConfig;
use terem_net::{Forward, NetBackend, NoNetwork, Passt, PasstError, PasstOptions, Protocol, Tap, TapError};

use crate::plan::NetPlan;

/// How long passt may take until it answers.
const PASST_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a network interface cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// User-mode networking.
    #[error("net: {0}")]
    User(#[from] PasstError),
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

/// A backend, and what is to be waited for before the guest runs.
pub(crate) struct OpenNet {
    pub(crate) backend: Arc<dyn NetBackend>,
    passt: Option<Arc<Passt>>,
}

impl OpenNet {
    /// Waits until frames will arrive.
    pub(crate) fn wait_until_ready(&self) -> Result<(), NetError> {
        self.passt.as_ref().map_or(Ok(()), |p| p.wait_until_ready(PASST_TIMEOUT)).map_err(NetError::from)
    }
}

pub(crate) fn open(plan: &NetPlan) -> Result<OpenNet, NetError> {
    let plain = |backend: Arc<dyn NetBackend>| OpenNet { backend, passt: None };
    Ok(match plan.backend() {
        None => plain(Arc::new(NoNetwork)),
        Some(NetBackendConfig::Tap { name }) => plain(Arc::new(Tap::open_existing(&name)?)),
        Some(NetBackendConfig::TapFd { fd }) => plain(Arc::new(inherited(fd)?)),
        Some(NetBackendConfig::User { forwards }) => {
            let forwards = forwards.iter().map(forward).collect();
            let passt = Arc::new(Passt::start(&PasstOptions { forwards, ..PasstOptions::default() })?);
            OpenNet { backend: Arc::clone(&passt) as _, passt: Some(passt) }
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
