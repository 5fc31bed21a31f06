//! VHD images, the format of Virtual PC and of Hyper-V's first generation ("Virtual Hard Disk Image Format
//! Specification", version 1.0, called "the specification" below). QEMU calls it `vpc`.
//!
//! ```text
//!  fixed:    the disk │ footer
//!  dynamic:  footer's copy │ dynamic header │ block allocation table │ blocks: bitmap, data │ footer
//! ```
//!
//! All numbers are big-endian. A table entry is the sector where a block's bitmap begins, or all ones. The bitmap says
//! which of the block's sectors were written; as QEMU does, the rest is read as it lies there, and the first write to a
//! block marks all of it. A new block takes the place of the footer, which goes to the new end before the table's entry
//! is written; until then the footer's copy at the beginning keeps the image readable.

mod check;
mod create;
mod fixed;
mod footer;
mod map;
#[cfg(test)]
mod tests;

use crate::blocks::Blocks;
use crate::format::{CreateOption, Driver, flag};
use crate::node::Node;
use crate::{CreateOptions, Format};

pub use create::VhdOptions;
use footer::{Footer, Layout};

pub(crate) static DRIVER: Driver = Driver {
    format: Format::Vhd,
    names: &["vpc", "vhd"],
    // The beginning of a fixed image is its disk's, so it is only found when it is asked for; as QEMU does.
    probe: |head| head.starts_with(footer::COOKIE),
    open: |opening| {
        let footer = Footer::read(&opening.image)?;
        let (size, options) = (footer.size(), opening.options);
        match Layout::read(&opening.image, &footer)? {
            Layout::Fixed => Ok(Node::new(fixed::FixedVhd::new(opening.storage()?, size, options.discard))),
            Layout::Dynamic(dynamic) => {
                let file = opening.storage()?;
                Ok(Node::new(Blocks::new(map::VhdMap::new(file, &footer, dynamic, options), size, options)))
            }
        }
    },
    describe: |image, info| {
        let footer = Footer::read(image)?;
        info.virtual_size = footer.size();
        if let Layout::Dynamic(dynamic) = Layout::read(image, &footer)? {
            info.cluster_size = Some(dynamic.block_size);
        }
        Ok(())
    },
    check: Some(check::check_image),
    create: create::create,
    options: &[SUBFORMAT, FORCE_SIZE],
};

const SUBFORMAT: CreateOption = CreateOption {
    name: "subformat",
    help: "dynamic or fixed",
    set: |options: &mut CreateOptions, text| {
        options.vhd.fixed = match text {
            "dynamic" => false,
            "fixed" => true,
            _ => return Err("dynamic or fixed".into()),
        };
        Ok(())
    },
};

const FORCE_SIZE: CreateOption = CreateOption {
    name: "force_size",
    help: "on: exactly the size asked for, not rounded up to one that has a geometry",
    set: |options: &mut CreateOptions, text| {
        options.vhd.force_size = flag(text)?;
        Ok(())
    },
};
