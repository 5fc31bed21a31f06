//! qcow2 images, versions 2 and 3 ("The QCOW2 file format", `docs/interop/qcow2.txt` of QEMU, called "the
//! specification" below).
//!
//! A guest address goes through two tables to a cluster of the file; every cluster of the file has a
//! reference count in tables of its own:
//!
//! ```text
//!  guest offset ─> L1 table (in memory) ─> L2 table (cache) ─> cluster: data, zeroes, compressed, or none
//!                                                                       └─> backing file
//!  host cluster ─> refcount table (in memory) ─> refcount block (cache) ─> how often it is used
//! ```
//!
//! All runs on the disk's one thread; tasks interleave only where they await. What keeps them right:
//!
//! * A request holds a range lock on its guest clusters: shared to read or to overwrite in place,
//!   exclusive to change their mapping. So nobody sees a mapping whose data is not written, and a freed
//!   cluster has no reader.
//! * A write prepares (allocates clusters: their counts go up in the cache), writes the data, and commits
//!   (sets the L2 entries in the cache). Nothing awaits between looking at a table and changing it.
//! * Write-back (`writeback`) takes a snapshot of everything dirty at one moment and writes it in the order
//!   refcounts, L2, L1, with a flush between the levels. What a commit dropped is counted down only after
//!   the L2 or L1 entry that referred to it was overwritten on the storage. So at any moment the file's
//!   counts are at least as high as its references: a crash leaves leaked clusters at worst.

mod allocate;
mod bitmap;
mod cache;
mod check;
mod compressed;
mod create;
mod crypt;
mod driver;
mod edit;
mod entry;
mod header;
mod image;
mod mapping;
mod metadata;
mod operations;
mod options;
#[cfg(test)]
mod power_tests;
mod read;
mod rebuild;
mod refcount;
mod snapshot;
mod switch;
mod tables;
mod tracking;
mod unmap;
mod write;
mod writeback;

pub(crate) use cache::{DirtyPart, TableCache};
use check::check_image;
pub(crate) use check::file_map;
use create::write_new;
pub(crate) use crypt::luks_header;
pub(crate) use driver::{DRIVER, measure, preallocate_from};
use header::Header;
use image::Qcow2;
pub(crate) use operations::{bitmap_bits, check_file, disk_size, edit, repair, set_backing};
use tables::Tables;
