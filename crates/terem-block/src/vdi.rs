//! VDI images, VirtualBox's own format, version 1.1 (its `VDICore.h`; there is no specification).
//!
//! ```text
//!  header (512 bytes) │ block map: 32 bits a block, where it is among ... │ ... the blocks, 1 MiB each
//! ```
//!
//! An entry is a block's number in the file; all ones is "not there", which reads as zeroes, as does all ones but the
//! last bit ("discarded"). In a static image every block has its place from the beginning. The header counts the blocks
//! that have a place, and VirtualBox and QEMU put the next one there: so the count is on the storage before an entry
//! that it covers, and what a crash left unused is filled first.

mod check;
mod create;
mod header;
mod map;
#[cfg(test)]
mod tests;

use header::Header;
use map::VdiMap;

use crate::blocks::Blocks;
use crate::format::{CreateOption, Driver, flag};
use crate::node::Node;
use crate::{CreateOptions, Format};

pub use create::VdiOptions;

pub(crate) static DRIVER: Driver = Driver {
    format: Format::Vdi,
    names: &["vdi"],
    probe: |head| head.get(0x40..).is_some_and(|rest| rest.starts_with(&header::SIGNATURE.to_le_bytes())),
    open: |opening| {
        let header = Header::read(&opening.image)?;
        let (size, options) = (header.size(), opening.options);
        let file = opening.storage()?;
        Ok(Node::new(Blocks::new(VdiMap::new(file, &header, options), size, options)))
    },
    describe: |image, info| {
        let header = Header::read(image)?;
        info.virtual_size = header.size();
        info.cluster_size = Some(header.block_size);
        Ok(())
    },
    check: Some(check::check_image),
    create: create::create,
    options: &[STATIC],
};

const STATIC: CreateOption = CreateOption {
    name: "static",
    help: "on: give every block its place at once",
    set: |options: &mut CreateOptions, text| {
        options.vdi.fixed = flag(text)?;
        Ok(())
    },
};
