//! A register block that configuration registers switch on and move.

use std::sync::Arc;

use terem_bus::{AddressSpace, Handler, RegionId};

/// Where the block is mapped, if it is.
#[derive(Debug, Default)]
pub(super) struct Window {
    at: Option<(u64, u64, RegionId)>,
}

impl Window {
    /// Maps `handler` at `wanted` (address and length), and nowhere else. What does not fit is logged
    /// and left out: the address comes from a guest.
    pub(super) fn place(
        &mut self,
        space: &AddressSpace,
        name: &str,
        wanted: Option<(u64, u64)>,
        handler: &Arc<dyn Handler>,
    ) {
        if self.at.map(|(address, len, _)| (address, len)) == wanted {
            return;
        }
        if let Some((_, _, id)) = self.at.take() {
            space.unmap(id);
        }
        if let Some((address, len)) = wanted {
            match space.map(address, len, name, Arc::clone(handler)) {
                Ok(id) => self.at = Some((address, len, id)),
                Err(e) => tracing::warn!("{name} is not mapped: {e}"),
            }
        }
    }
}
