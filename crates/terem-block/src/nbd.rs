//! NBD, the network block device protocol: a disk's server, and a client that is an image. See docs/nbd.md.
//!
//! `protocol` has the messages as values; `server` and `client` negotiate over a blocking [`channel`] with a deadline,
//! and transmit over a [`socket`] on a disk's I/O thread. `tls` reads certificates.

mod buffers;
mod channel;
mod client;
mod exercise;
mod input;
mod pieces;
pub(crate) mod protocol;
mod server;
mod socket;
mod tls;
mod uri;

pub use client::is_address;
pub(crate) use client::{empty, open, size};
pub use exercise::{exercise_nbd_client, exercise_nbd_server};
pub use server::{NbdExport, NbdListener, NbdServer, NbdServerOptions};
pub use tls::{ServerTls, TlsError};
