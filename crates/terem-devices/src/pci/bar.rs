//! Base address registers: their bits, and where they put a device.

use std::sync::Arc;

use terem_bus::{AddressSpace, Bus, Handler, RegionId};

use super::config_space::{ConfigSpace, register};
use super::{PciError, capability};

/// BARs of a type 0 header.
pub const BAR_COUNT: u8 = 6;

/// What a BAR decodes (PCI 3.0 section 6.2.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere; takes the next BAR too.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

impl BarKind {
    fn type_bits(self) -> u8 {
        match self {
            Self::Io => 0b0001,
            Self::Memory32 { prefetchable } => u8::from(prefetchable) << 3,
            Self::Memory64 { prefetchable } => 0b0100 | u8::from(prefetchable) << 3,
        }
    }
}

/// One BAR: its definition and what is mapped for it.
pub(super) struct Bar {
    index: u8,
    kind: BarKind,
    size: u64,
    name: String,
    pub(super) handler: Option<Arc<dyn Handler>>,
    mapped: Option<(u64, RegionId)>,
    /// The last address at which mapping failed, so that it is logged once and not at each write.
    refused: Option<u64>,
}

impl Bar {
    /// Checks the definition and lays down the registers.
    pub(super) fn define(
        config: &mut ConfigSpace,
        index: u8,
        kind: BarKind,
        size: u64,
        name: &str,
    ) -> Result<Self, PciError> {
        let wide = matches!(kind, BarKind::Memory64 { .. });
        let fits = match kind {
            BarKind::Io => (4..=256).contains(&size),
            BarKind::Memory32 { .. } => (16..=1 << 31).contains(&size),
            BarKind::Memory64 { .. } => (16..=1 << 62).contains(&size),
        };
        if index >= BAR_COUNT - u8::from(wide) || !fits || !size.is_power_of_two() {
            return Err(PciError::Bar { index, size });
        }
        let at = register::BAR0 + u16::from(index) * 4;
        let mut value = [0; 8];
        value[0] = kind.type_bits();
        let mut writable = (!(size - 1)).to_le_bytes();
        writable[0] &= if kind == BarKind::Io { 0xfc } else { 0xf0 };
        let bytes = if wide { 8 } else { 4 };
        config.define(at, &value[..bytes], &writable[..bytes]);
        Ok(Self { index, kind, size, name: name.into(), handler: None, mapped: None, refused: None })
    }

    /// Whether the BAR's registers include BAR `index`.
    pub(super) fn covers(&self, index: u8) -> bool {
        index == self.index || matches!(self.kind, BarKind::Memory64 { .. }) && index == self.index + 1
    }

    pub(super) fn index(&self) -> u8 {
        self.index
    }

    /// Where the registers say that the BAR answers; `None` when it is switched off or has no address
    /// yet: 0, or the all-ones pattern that sizing leaves behind for a moment.
    fn wanted(&self, config: &ConfigSpace, power_management: Option<u16>) -> Option<u64> {
        let asleep = power_management.is_some_and(|at| {
            config.read16(at + capability::PMCSR) & capability::POWER_STATE == capability::POWER_STATE
        });
        let command = config.read16(register::COMMAND);
        let enable = if self.kind == BarKind::Io { register::COMMAND_IO } else { register::COMMAND_MEMORY };
        if asleep || command & enable == 0 {
            return None;
        }
        let at = register::BAR0 + u16::from(self.index) * 4;
        let low = u64::from(config.read32(at));
        let (address, limit) = match self.kind {
            BarKind::Io => (low & !3, 0x1_0000),
            BarKind::Memory32 { .. } => (low & !0xf, u64::from(u32::MAX)),
            BarKind::Memory64 { .. } => (u64::from(config.read32(at + 4)) << 32 | low & !0xf, u64::MAX),
        };
        (address != 0 && address.checked_add(self.size).is_some_and(|end| end <= limit)).then_some(address)
    }

    /// Where the BAR answers now.
    pub(super) fn address(&self) -> Option<u64> {
        self.mapped.map(|(address, _)| address)
    }

    fn space<'a>(&self, bus: &'a Bus) -> &'a AddressSpace {
        if self.kind == BarKind::Io { &bus.ports } else { &bus.mmio }
    }

    pub(super) fn unmap(&mut self, bus: &Bus) {
        if let Some((_, id)) = self.mapped.take() {
            self.space(bus).unmap(id);
        }
    }

    /// Takes the mapping away when the registers no longer say so.
    pub(super) fn withdraw(&mut self, config: &ConfigSpace, power_management: Option<u16>, bus: &Bus) {
        if self.handler.is_none() || self.wanted(config, power_management) != self.address() {
            self.unmap(bus);
        }
    }

    /// Makes the mapping that the registers say; [`Self::withdraw`] comes first.
    pub(super) fn update(&mut self, config: &ConfigSpace, power_management: Option<u16>, bus: &Bus) {
        let wanted = self.wanted(config, power_management);
        let (Some(address), Some(handler)) = (wanted, &self.handler) else {
            self.refused = None;
            return;
        };
        if self.address() == wanted {
            return;
        }
        match self.space(bus).map(address, self.size, self.name.clone(), Arc::clone(handler)) {
            Ok(id) => {
                self.refused = None;
                self.mapped = Some((address, id));
            }
            Err(e) => {
                if self.refused.replace(address) != Some(address) {
                    tracing::warn!("BAR {} is not mapped: {e}", self.index);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{ConfigSize, Identity};

    fn sized(kind: BarKind, size: u64) -> (u32, u32) {
        let mut c = ConfigSpace::new(&Identity::default(), ConfigSize::Conventional);
        Bar::define(&mut c, 2, kind, size, "t").unwrap();
        c.write(0x18, 4, u32::MAX);
        c.write(0x1c, 4, u32::MAX);
        (c.read32(0x18), c.read32(0x1c))
    }

    #[test]
    fn sizing_gives_size_and_kind() {
        assert_eq!(sized(BarKind::Io, 0x20), (0xffff_ffe1, 0));
        assert_eq!(sized(BarKind::Memory32 { prefetchable: false }, 0x1000), (0xffff_f000, 0));
        assert_eq!(sized(BarKind::Memory64 { prefetchable: true }, 0x4000), (0xffff_c00c, 0xffff_ffff));
        assert_eq!(sized(BarKind::Memory64 { prefetchable: true }, 1 << 34), (0xc, 0xffff_fffc));
    }

    #[test]
    fn impossible_bars_are_refused() {
        let mut c = ConfigSpace::new(&Identity::default(), ConfigSize::Conventional);
        let mut bad = |index, kind, size| assert!(Bar::define(&mut c, index, kind, size, "t").is_err());
        bad(6, BarKind::Io, 16);
        bad(5, BarKind::Memory64 { prefetchable: false }, 4096);
        bad(0, BarKind::Io, 512);
        bad(0, BarKind::Memory32 { prefetchable: false }, 8);
        bad(0, BarKind::Memory32 { prefetchable: false }, 0x3000);
    }
}
