//! Which received frames the guest gets, and the control commands that say so (virtio 1.2, 5.1.6.5).

use serde::{Deserialize, Serialize};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Addresses kept of each kind; a guest that wants more gets all frames of that kind.
const MAX_ADDRESSES: usize = 64;

/// VLAN IDs (IEEE 802.1Q: 12 bits).
const VLANS: u16 = 4096;
const ETHER_TYPE: usize = 12;
const ETHER_VLAN: [u8; 2] = [0x81, 0x00];

// Control classes and commands (5.1.6.5.1 to 5.1.6.5.4).
const CLASS_RX: u8 = 0;
const RX_PROMISC: u8 = 0;
const RX_ALLMULTI: u8 = 1;
const RX_ALLUNI: u8 = 2;
const RX_NOMULTI: u8 = 3;
const RX_NOUNI: u8 = 4;
const RX_NOBCAST: u8 = 5;
const CLASS_MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const CLASS_VLAN: u8 = 2;
const VLAN_ADD: u8 = 0;
const VLAN_DEL: u8 = 1;

/// The receive filter. Part of the saved state as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// The station's own address.
    pub(super) mac: Mac,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: Addresses,
    multicast: Addresses,
    /// A bit for each VLAN ID.
    vlans: Vec<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Addresses {
    list: Vec<Mac>,
    /// There were more than are kept.
    overflow: bool,
}

impl Addresses {
    fn has(&self, mac: &Mac) -> bool {
        self.overflow || self.list.contains(mac)
    }

    /// Takes a table (a count and as many addresses) from the front of `data`.
    fn take(data: &mut &[u8]) -> Option<Self> {
        let (count, rest) = data.split_first_chunk()?;
        let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
        let (table, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
        *data = rest;
        if count > MAX_ADDRESSES {
            return Some(Self { list: Vec::new(), overflow: true });
        }
        Some(Self { list: table.as_chunks().0.to_vec(), overflow: false })
    }
}

/// Bytes of the largest command that is read: two tables that are larger than what is kept.
pub(super) const MAX_COMMAND: usize = 2 + 2 * (4 + 6 * 1024);

impl Filter {
    /// As after reset: everything is received until the driver says otherwise, except for VLANs.
    pub(super) fn new(mac: Mac) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Addresses::default(),
            multicast: Addresses::default(),
            vlans: vec![0; usize::from(VLANS / 64)],
        }
    }

    /// Whether it can have come from [`Self`], for restoring.
    pub(super) fn is_valid(&self) -> bool {
        self.vlans.len() == usize::from(VLANS / 64)
            && self.unicast.list.len() <= MAX_ADDRESSES
            && self.multicast.list.len() <= MAX_ADDRESSES
    }

    fn vlan(&mut self, id: u16) -> Option<(&mut u64, u64)> {
        let word = self.vlans.get_mut(usize::from(id / 64)).filter(|_| id < VLANS)?;
        Some((word, 1 << (id % 64)))
    }

    /// Whether the guest gets `frame`. `vlans` says whether the VLAN table counts.
    pub(super) fn accepts(&self, frame: &[u8], vlans: bool) -> bool {
        let Some(destination) = frame.first_chunk::<6>() else { return false };
        if self.promiscuous {
            return true;
        }
        if vlans && frame.get(ETHER_TYPE..ETHER_TYPE + 2) == Some(&ETHER_VLAN) {
            let Some(&[high, low]) = frame.get(ETHER_TYPE + 2..ETHER_TYPE + 4) else { return false };
            let id = u16::from_be_bytes([high, low]) % VLANS;
            let word = self.vlans.get(usize::from(id / 64)).copied().unwrap_or(0);
            if word & 1 << (id % 64) == 0 {
                return false;
            }
        }
        if *destination == [0xff; 6] {
            !self.no_broadcast
        } else if destination[0] & 1 != 0 {
            !self.no_multicast && (self.all_multicast || self.multicast.has(destination))
        } else {
            !self.no_unicast
                && (self.all_unicast || *destination == self.mac || self.unicast.has(destination))
        }
    }

    /// A command of class RX, MAC or VLAN; false when it is none or malformed, and nothing has changed.
    pub(super) fn command(&mut self, class: u8, command: u8, data: &[u8]) -> bool {
        self.try_command(class, command, data).is_some()
    }

    fn try_command(&mut self, class: u8, command: u8, mut data: &[u8]) -> Option<()> {
        match class {
            CLASS_RX => {
                let flag = match command {
                    RX_PROMISC => &mut self.promiscuous,
                    RX_ALLMULTI => &mut self.all_multicast,
                    RX_ALLUNI => &mut self.all_unicast,
                    RX_NOMULTI => &mut self.no_multicast,
                    RX_NOUNI => &mut self.no_unicast,
                    RX_NOBCAST => &mut self.no_broadcast,
                    _ => return None,
                };
                let &[on] = data else { return None };
                *flag = on != 0;
            }
            CLASS_MAC if command == MAC_TABLE_SET => {
                let unicast = Addresses::take(&mut data)?;
                let multicast = Addresses::take(&mut data)?;
                if !data.is_empty() {
                    return None;
                }
                (self.unicast, self.multicast) = (unicast, multicast);
            }
            CLASS_MAC if command == MAC_ADDR_SET => self.mac = data.try_into().ok()?,
            CLASS_VLAN if command == VLAN_ADD || command == VLAN_DEL => {
                let id = u16::from_le_bytes(data.try_into().ok()?);
                let (word, bit) = self.vlan(id)?;
                if command == VLAN_ADD {
                    *word |= bit;
                } else {
                    *word &= !bit;
                }
            }
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = [0x52, 0x54, 0, 1, 2, 3];
    const OTHER: Mac = [0x52, 0x54, 0, 9, 9, 9];
    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];

    fn to(mac: Mac) -> Vec<u8> {
        let mut frame = mac.to_vec();
        frame.extend([2; 6]);
        frame.extend([0x08, 0x00, 1, 2, 3]);
        frame
    }

    fn tagged(id: u16) -> Vec<u8> {
        let mut frame = OWN.to_vec();
        frame.extend([2; 6]);
        frame.extend([0x81, 0x00]);
        frame.extend((id | 0x6000).to_be_bytes());
        frame
    }

    #[test]
    fn receive_modes_select_frames() {
        let mut f = Filter::new(OWN);
        assert!(f.accepts(&to(OTHER), true) && f.accepts(&to(GROUP), true));
        assert!(f.command(CLASS_RX, RX_PROMISC, &[0]));
        assert!(f.accepts(&to(OWN), true) && f.accepts(&to([0xff; 6]), true));
        assert!(!f.accepts(&to(OTHER), true) && !f.accepts(&to(GROUP), true));
        assert!(f.command(CLASS_RX, RX_ALLMULTI, &[1]) && f.accepts(&to(GROUP), true));
        assert!(f.command(CLASS_RX, RX_NOMULTI, &[1]) && !f.accepts(&to(GROUP), true));
        assert!(f.command(CLASS_RX, RX_ALLUNI, &[1]) && f.accepts(&to(OTHER), true));
        assert!(f.command(CLASS_RX, RX_NOUNI, &[1]) && !f.accepts(&to(OWN), true));
        assert!(f.command(CLASS_RX, RX_NOBCAST, &[1]) && !f.accepts(&to([0xff; 6]), true));
        assert!(!f.accepts(&[1, 2, 3], true));
    }

    #[test]
    fn address_tables_are_taken_whole_or_not_at_all() {
        let mut f = Filter::new(OWN);
        f.command(CLASS_RX, RX_PROMISC, &[0]);
        let table = |macs: &[Mac]| -> Vec<u8> {
            u32::try_from(macs.len()).unwrap().to_le_bytes().into_iter().chain(macs.concat()).collect()
        };
        let both = [table(&[OTHER]), table(&[GROUP])].concat();
        assert!(f.command(CLASS_MAC, MAC_TABLE_SET, &both));
        assert!(f.accepts(&to(OTHER), true) && f.accepts(&to(GROUP), true));
        for bad in [&both[..both.len() - 1], &both[..3], &[both.clone(), vec![0]].concat()] {
            assert!(!f.command(CLASS_MAC, MAC_TABLE_SET, bad));
        }
        assert!(!f.command(CLASS_MAC, MAC_TABLE_SET, &[0xff; 8]));
        assert!(f.accepts(&to(OTHER), true), "unchanged by what was refused");
        let many = [table(&[]), table(&[[3; 6]; 65])].concat();
        assert!(f.command(CLASS_MAC, MAC_TABLE_SET, &many));
        assert!(f.accepts(&to(GROUP), true) && !f.accepts(&to(OTHER), true));
        assert!(f.command(CLASS_MAC, MAC_ADDR_SET, &OTHER));
        assert!(f.accepts(&to(OTHER), true) && !f.accepts(&to(OWN), true));
    }

    #[test]
    fn vlans_are_filtered_where_that_was_agreed() {
        let mut f = Filter::new(OWN);
        f.command(CLASS_RX, RX_PROMISC, &[0]);
        assert!(f.accepts(&tagged(7), false) && !f.accepts(&tagged(7), true));
        assert!(f.command(CLASS_VLAN, VLAN_ADD, &[7, 0]) && f.accepts(&tagged(7), true));
        assert!(f.command(CLASS_VLAN, VLAN_DEL, &[7, 0]) && !f.accepts(&tagged(7), true));
        assert!(f.command(CLASS_VLAN, VLAN_ADD, &[0xff, 0x0f]) && f.accepts(&tagged(4095), true));
        assert!(!f.command(CLASS_VLAN, VLAN_ADD, &[0, 0x10]), "VLAN 4096");
        assert!(!f.command(CLASS_VLAN, 2, &[7, 0]) && !f.command(9, 0, &[]) && !f.command(0, 6, &[1]));
        assert!(!f.accepts(&tagged(1)[..15], true));
    }
}
