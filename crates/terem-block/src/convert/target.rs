//! What the target of a copy is, and how data gets there.

use super::{Copying, request};
use crate::file::PlainFile;
use crate::node::Packer;
use crate::{Extent, ExtentKind, IoError, OpenError};

/// What the target can do.
pub(super) struct Target {
    /// Bytes that are written, or left out as zeroes, together.
    pub(super) unit: u64,
    /// Bytes between two places in its file.
    pub(super) cluster: u64,
    pub(super) how: How,
    /// Whether zeroes must be written: what is there now may be something else.
    pub(super) zeroes: bool,
    /// Whether it has the source's backing files too.
    shares_backing: bool,
    /// Whether zeroes may be left out at all.
    pub(super) sparse: bool,
}

/// How data gets there.
pub(super) enum How {
    /// Its file is the disk.
    Plain(PlainFile),
    /// It gives out storage in its file.
    Place(PlainFile),
    /// Compressed clusters, and what cannot be compressed by requests.
    Compress(Packer),
    /// By requests.
    Requests,
}

impl Target {
    pub(super) fn look_at(copying: &Copying<'_>) -> Result<Self, OpenError> {
        let facts = copying.to.with_node(|node| {
            Box::pin(async move {
                let image = node.image();
                let plain = image.plain_data().and_then(crate::file::File::plain);
                Ok::<_, IoError>((
                    plain,
                    image.unit(),
                    image.places(),
                    image.compression(),
                    node.backing().is_some(),
                ))
            })
        });
        let facts = facts.map_err(|e| request(copying.target, "looking at the copy", e))?;
        let (plain, cluster, places, packer, backed) = facts;
        let options = copying.options;
        let how = match (packer, plain) {
            (Some(packer), _) if options.compress || packer.always => How::Compress(packer),
            _ if options.compress => {
                return Err(OpenError::Unsupported {
                    path: copying.target.to_owned(),
                    feature: "compression in this format".into(),
                    hint: "qcow2 has it",
                });
            }
            (_, Some(file)) if cluster == 0 && !options.existing => How::Plain(file),
            (_, Some(file)) if places && !options.existing && !backed => How::Place(file),
            _ => How::Requests,
        };
        // Of a cluster that holds data, nothing is saved by leaving parts out.
        let unit = cluster.max(options.sparse.next_power_of_two()).clamp(4096, 2 << 20);
        let unknown =
            if options.existing { !options.target_is_zero } else { !copying.to.facts().zero_when_new };
        let zeroes = unknown || backed;
        let (sparse, shares_backing) = (options.sparse > 0, backed && options.share_backing);
        Ok(Self { unit, cluster, how, zeroes, shares_backing, sparse })
    }

    /// Whether the target has this already, from its backing file.
    pub(super) fn skips(&self, extent: &Extent) -> bool {
        self.shares_backing && (extent.depth > 0 || extent.kind == ExtentKind::Unallocated)
    }

    /// Whether nothing needs to be written for it.
    pub(super) fn leaves_out(&self, extent: &Extent) -> bool {
        self.sparse && extent.is_zero() && !self.zeroes
    }
}
