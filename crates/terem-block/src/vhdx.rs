//! VHDX images, Hyper-V's format ("\[MS-VHDX\]: Virtual Hard Disk v2 (VHDX) File Format", called "the specification"
//! below).
//!
//! ```text
//!  0     identifier, two headers, two region tables (1 MiB)
//!  1 MiB log, block allocation table (BAT), metadata: where the headers and region tables say
//!  ...   blocks, each at a multiple of 1 MiB
//! ```
//!
//! All numbers are little-endian. The header with the higher sequence number counts; the other one is overwritten next.
//! A BAT entry is a block's state and place; between them lie entries for bitmaps, which only differencing images use.
//!
//! Changes of the BAT go through the log: pages are written there and made durable, then to their place. The log holds
//! one entry at a time, always at its beginning, since the one before is out of date by then. Whoever opens an image
//! with a valid entry writes its pages to their place again; who only reads takes them from the log.

mod check;
mod create;
mod guid;
mod header;
mod log;
mod map;
mod metadata;
mod open;
mod region;
mod reseal;
#[cfg(test)]
mod tests;

use crate::blocks::Blocks;
use crate::format::{CreateOption, Driver, flag, size};
use crate::node::Node;
use crate::{CreateOptions, Format};

pub use create::VhdxOptions;
pub(crate) use reseal::reseal;

pub(crate) static DRIVER: Driver = Driver {
    format: Format::Vhdx,
    names: &["vhdx"],
    probe: |head| head.starts_with(header::FILE_SIGNATURE),
    open: |mut opening| {
        let parts = open::Parts::open(&mut opening.image, opening.writing)?;
        let (size, options) = (parts.metadata.size, opening.options);
        let file = opening.storage()?;
        Ok(Node::new(Blocks::new(map::VhdxMap::new(file, parts, options), size, options)))
    },
    describe: |image, info| {
        let parts = open::Parts::read(image)?;
        info.virtual_size = parts.metadata.size;
        info.cluster_size = Some(parts.metadata.block_size);
        Ok(())
    },
    check: Some(check::check_image),
    create: create::create,
    options: &[SUBFORMAT, BLOCK_SIZE, LOG_SIZE, BLOCK_STATE_ZERO],
};

const SUBFORMAT: CreateOption = CreateOption {
    name: "subformat",
    help: "dynamic or fixed",
    set: |options: &mut CreateOptions, text| {
        options.vhdx.fixed = match text {
            "dynamic" => false,
            "fixed" => true,
            _ => return Err("dynamic or fixed".into()),
        };
        Ok(())
    },
};

const BLOCK_SIZE: CreateOption = CreateOption {
    name: "block_size",
    help: "bytes of a block, a power of two from 1M to 256M; 0: by the disk's size",
    set: |options: &mut CreateOptions, text| {
        options.vhdx.block_size = size(text)?;
        Ok(())
    },
};

const LOG_SIZE: CreateOption = CreateOption {
    name: "log_size",
    help: "bytes of the log, at least 1M",
    set: |options: &mut CreateOptions, text| {
        options.vhdx.log_size = size(text)?;
        Ok(())
    },
};

const BLOCK_STATE_ZERO: CreateOption = CreateOption {
    name: "block_state_zero",
    help: "on: mark the blocks of a new dynamic image as zero, not as not present",
    set: |options: &mut CreateOptions, text| {
        options.vhdx.zero_blocks = flag(text)?;
        Ok(())
    },
};
