//! Disk images: formats, locks and asynchronous I/O.
#![deny(unsafe_code)] // Only the I/O engine, where the kernel takes raw pointers, switches it on again.

mod backend;

pub use backend::{BlockBackend, Complete, Geometry, IoError, Op, Request};
pub use terem_memory::{AlignedBuffer, IoMemory};
