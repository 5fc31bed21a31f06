//! Disk images: formats, locks and asynchronous I/O.
//!
//! A [`Disk`] is an open image with an I/O thread of its own; devices see it as a [`BlockBackend`].
//! [`create`], [`info`], [`check`] and [`convert`] work on images that no guest uses.
//!
//! Read on in this order: `backend` (what a device asks for), `disk` (the I/O thread), `node` (an opened
//! image of any format), `format` (the table of formats), `qcow2` and `raw` (formats), `file` (storage), `engine` (the
//! kernel). `docs/block.md` shows a request's way through them, and how to add a format.
//!
//! Nothing in an image can panic or hang the program: sizes are checked against the file and fixed limits
//! before memory is taken, and every offset against the format's rules before it is used.
#![deny(unsafe_code)] // Only the I/O engine, where the kernel takes raw pointers, switches it on again.
#![cfg_attr(test, allow(clippy::cast_possible_truncation, reason = "sizes in tests are small"))]

mod backend;
mod bench;
mod blocks;
mod bytes;
mod chain;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod crypt;
mod disk;
mod encryption;
mod engine;
mod error;
mod executor;
mod exercise;
mod extent;
mod file;
mod flat;
mod format;
mod info;
mod joined;
#[cfg(test)]
mod journal;
mod keys;
mod lock;
mod luks;
mod maintain;
mod measure;
mod nbd;
mod node;
mod options;
mod picture;
#[cfg(test)]
mod power;
mod probe;
mod qcow2;
mod range_lock;
mod raw;
mod source;
mod throttle;
mod vdi;
mod vhd;
mod vhdx;
mod vmdk;

pub use backend::{BlockBackend, Complete, Geometry, IoError, Op, Request};
pub use bench::{BenchOptions, bench};
pub use check::{CheckReport, check, check_source, check_unlocked};
pub use commit::{CommitOptions, Rebase, commit, rebase};
pub use compare::{Comparison, Difference, compare};
pub use convert::{ConvertOptions, Progress, convert, convert_sources, export, import};
pub use create::{BackingFile, Compression, CreateOptions, Preallocation, Qcow2Options, create};
pub use disk::{Disk, DiskFacts};
pub use encryption::{EncryptionInfo, EncryptionOptions};
pub use error::OpenError;
pub use exercise::{exercise_pieces, exercise_qcow2};
pub use extent::{Extent, ExtentKind};
pub use format::{CreateOption, Format, size as parse_size};
pub use info::{BitmapInfo, ImageInfo, Qcow2Info, SnapshotInfo, info, info_of_source};
pub use keys::{KeyOptions, Keys, SlotChange, add_key, change_key, change_slots, remove_key};
pub use lock::Holder;
pub use maintain::{
    Amend, BitmapAction, Repair, SnapshotAction, amend, bitmap, repair, resize, set_backing, snapshot,
};
pub use measure::{Measure, measure, measure_size};
pub use nbd::{
    NbdExport, NbdListener, NbdServer, NbdServerOptions, ServerTls as NbdServerTls, TlsError as NbdTlsError,
    exercise_nbd_client, exercise_nbd_server, is_address,
};
pub use options::{AioEngine, BackingPolicy, Below, Cache, FilePart, OpenOptions, Source};
pub use picture::{FileRun, FileUse, file_map};
pub use source::beside;
pub use terem_crypt::{
    Algorithm, Cost, CryptError, Hash, IvGenerator, Luks1Info, LuksInfo, MAX_PASSPHRASE, Mode, Passphrase,
    SlotInfo,
};
pub use terem_memory::{AlignedBuffer, IoMemory};
pub use throttle::{Rate, Rates, ThrottleError, ThrottleGroup, ThrottleLimits, Throttled};
pub use vdi::VdiOptions;
pub use vhd::VhdOptions;
pub use vhdx::VhdxOptions;
pub use vmdk::{VmdkExtent, VmdkInfo, VmdkOptions, VmdkSubformat};
