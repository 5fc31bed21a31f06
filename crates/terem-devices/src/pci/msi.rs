//! MSI: one message in configuration space, with consecutive data for up to 32 vectors
//! (PCI 3.0 section 6.8.1).

use serde::{Deserialize, Serialize};
use terem_bus::MsiMessage;

use super::capability::Body;
use super::config_space::ConfigSpace;

/// Offsets from the capability, in its form with 64-bit addresses and masks.
const CONTROL: u16 = 0x02;
const ADDRESS: u16 = 0x04;
const DATA: u16 = 0x0c;
const MASK: u16 = 0x10;
const PENDING: u16 = 0x14;

/// Message Control bit 0.
const ENABLE: u16 = 1;

/// The MSI capability of a function, which lives in its configuration space.
#[derive(Debug, Clone, Copy)]
pub(super) struct Msi {
    at: u16,
    count: u16,
}

/// Saved pending vectors (the rest is configuration space).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsiState {
    pending: u32,
}

impl Msi {
    /// The capability's registers for `count` vectors (a power of two, at most 32).
    pub(super) fn body(count: u16) -> Body {
        let log2 = u32::from(count).trailing_zeros();
        let control = 1 << 8 | 1 << 7 | log2 << 1;
        let mut value = vec![0; 22];
        value[..2].copy_from_slice(&control.to_le_bytes()[..2]);
        let mut writable = vec![0; 22];
        writable[0] = 0x71;
        writable[2..6].copy_from_slice(&0xffff_fffc_u32.to_le_bytes());
        writable[6..12].fill(0xff);
        let vectors = u32::MAX >> (32 - u32::from(count.clamp(1, 32)));
        writable[14..18].copy_from_slice(&vectors.to_le_bytes());
        Body { value, writable }
    }

    pub(super) fn new(at: u16, count: u16) -> Self {
        Self { at, count }
    }

    pub(super) fn enabled(self, config: &ConfigSpace) -> bool {
        config.read16(self.at + CONTROL) & ENABLE != 0
    }

    /// The message of `vector`, were it sent now. A function that was given fewer vectors than it has
    /// folds them onto those.
    fn message(self, config: &ConfigSpace, vector: u16) -> MsiMessage {
        let given = 1_u32 << (config.read16(self.at + CONTROL) >> 4 & 7).min(5);
        let address = u64::from(config.read32(self.at + ADDRESS + 4)) << 32
            | u64::from(config.read32(self.at + ADDRESS));
        let base = u32::from(config.read16(self.at + DATA));
        MsiMessage { address, data: base & !(given - 1) | u32::from(vector) & (given - 1) }
    }

    /// Asks for `vector`: the message to send, or none when it is masked (and now pending), held back,
    /// or MSI is off.
    pub(super) fn trigger(self, config: &mut ConfigSpace, vector: u16, master: bool) -> Option<MsiMessage> {
        if vector >= self.count || !self.enabled(config) {
            return None;
        }
        let bit = 1 << vector;
        if !master || config.read32(self.at + MASK) & bit != 0 {
            let pending = config.read32(self.at + PENDING) | bit;
            config.set(self.at + PENDING, 4, pending);
            return None;
        }
        Some(self.message(config, vector))
    }

    /// Takes the messages that are pending and no longer held back.
    pub(super) fn released(self, config: &mut ConfigSpace, master: bool) -> Vec<MsiMessage> {
        if !master || !self.enabled(config) {
            return Vec::new();
        }
        let pending = config.read32(self.at + PENDING);
        let ready = pending & !config.read32(self.at + MASK);
        config.set(self.at + PENDING, 4, pending & !ready);
        (0..self.count.min(32)).filter(|v| ready & 1 << v != 0).map(|v| self.message(config, v)).collect()
    }

    pub(super) fn save(self, config: &ConfigSpace) -> MsiState {
        MsiState { pending: config.read32(self.at + PENDING) }
    }

    pub(super) fn restore(self, config: &mut ConfigSpace, state: MsiState) {
        let vectors = u32::MAX >> (32 - u32::from(self.count.clamp(1, 32)));
        config.set(self.at + PENDING, 4, state.pending & vectors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{ConfigSize, Identity, capability};

    fn function(count: u16) -> (ConfigSpace, Msi) {
        let mut c = ConfigSpace::new(&Identity::default(), ConfigSize::Conventional);
        let b = Msi::body(count);
        let at = c.add_capability(capability::MSI, &b.value, &b.writable).unwrap();
        (c, Msi::new(at, count))
    }

    #[test]
    fn vectors_share_a_message_and_count_in_its_low_bits() {
        let (mut c, msi) = function(4);
        assert_eq!(c.read16(0x42), 0x0184);
        c.write(0x44, 4, 0xfee0_2003);
        c.write(0x4c, 2, 0x4050);
        assert_eq!(msi.trigger(&mut c, 1, true), None, "not enabled");
        c.write(0x42, 2, 0x0021);
        let m = msi.trigger(&mut c, 3, true).unwrap();
        assert_eq!(m, MsiMessage { address: 0xfee0_2000, data: 0x4053 });
        c.write(0x42, 2, 0x0001);
        assert_eq!(msi.trigger(&mut c, 3, true).unwrap().data, 0x4050, "folded onto one vector");
        assert_eq!(msi.trigger(&mut c, 4, true), None);
    }

    #[test]
    fn masked_vectors_wait() {
        let (mut c, msi) = function(4);
        c.write(0x42, 2, 0x0021);
        c.write(0x50, 4, 0xffff_ffff);
        assert_eq!(c.read32(0x50), 0xf);
        assert_eq!(msi.trigger(&mut c, 2, true), None);
        assert_eq!(c.read32(0x54), 4);
        let state = msi.save(&c);
        c.write(0x50, 4, 0);
        assert_eq!(msi.released(&mut c, false), []);
        assert_eq!(msi.released(&mut c, true).len(), 1);
        assert_eq!(msi.released(&mut c, true), []);
        msi.restore(&mut c, state);
        assert_eq!(c.read32(0x54), 4);
    }
}
