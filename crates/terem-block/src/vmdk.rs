//! VMDK images, VMware's format ("Virtual Disk Format 5.0", called "the specification" below).
//!
//! A descriptor, a small text, says what the disk consists of: extents one after the other, each in a file of its own
//! or, for one sparse extent, in the descriptor's file:
//!
//! ```text
//!  monolithicSparse, streamOptimized:  header │ descriptor │ directories and tables │ grains
//!  monolithicFlat, twoGbMaxExtentFlat: descriptor ─> files with the disk's bytes as they are
//!  twoGbMaxExtentSparse:               descriptor ─> files as above, without a descriptor in them
//!
//!  offset ─> grain directory (in memory) ─> grain table (cache) ─> grain: data, zeroes, or none ─> parent
//! ```
//!
//! All numbers are little-endian, places are counted in sectors of 512 bytes. Directory and tables are there twice; the
//! first is read, both are written. In a streamOptimized extent grains are compressed, each behind a marker that says
//! which one it is; writing one that is there puts it at the end anew.
//!
//! An image with a parent notes the parent's content ID, which changes whenever it is written.

mod check;
mod create;
mod descriptor;
mod grains;
mod image;
mod info;
mod open;
mod options;
mod sparse;
#[cfg(test)]
mod tests;

use crate::Format;
use crate::format::Driver;
use crate::node::Node;

pub(crate) use create::extent_files;
pub use info::{VmdkExtent, VmdkInfo};
pub use options::{VmdkOptions, VmdkSubformat};

pub(crate) static DRIVER: Driver = Driver {
    format: Format::Vmdk,
    names: &["vmdk"],
    probe: |head| head.starts_with(sparse::MAGIC) || head.starts_with(descriptor::FIRST_LINE),
    open: |opening| open::open(opening).map(Node::new),
    describe: info::describe,
    check: Some(check::check_image),
    create: create::create,
    options: options::OPTIONS,
};
