//! Buses, and the ways from the processor to configuration space.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use terem_bus::{DeviceState, Handler, Registers, StateError, locked};

use super::{PciDevice, PciError};

/// Device and function number on a bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(u8);

impl Address {
    /// Device 0–31, function 0–7; higher bits are cut off.
    #[must_use]
    pub fn new(device: u8, function: u8) -> Self {
        Self((device & 0x1f) << 3 | function & 7)
    }

    /// From the 8-bit form that registers use: device in bits 7:3, function in bits 2:0.
    #[must_use]
    pub fn from_devfn(devfn: u8) -> Self {
        Self(devfn)
    }

    /// Device number, 0–31.
    #[must_use]
    pub fn device(self) -> u8 {
        self.0 >> 3
    }

    /// Function number, 0–7.
    #[must_use]
    pub fn function(self) -> u8 {
        self.0 & 7
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.device(), self.function())
    }
}

/// The functions on one bus.
#[derive(Default)]
pub struct PciBus {
    functions: Mutex<BTreeMap<Address, Arc<dyn PciDevice>>>,
}

impl fmt::Debug for PciBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.addresses()).finish()
    }
}

impl PciBus {
    /// Plugs a function in.
    ///
    /// # Errors
    /// [`PciError::Taken`].
    pub fn attach(&self, at: Address, function: Arc<dyn PciDevice>) -> Result<(), PciError> {
        let mut functions = locked(&self.functions);
        if functions.contains_key(&at) {
            return Err(PciError::Taken(at));
        }
        functions.insert(at, function);
        Ok(())
    }

    /// Unplugs a function, which takes it out of the address spaces as well.
    pub fn detach(&self, at: Address) {
        let function = locked(&self.functions).remove(&at);
        if let Some(f) = function {
            f.unplug();
        }
    }

    /// Unplugs everything: before a machine is dropped, since functions and devices hold each other.
    pub fn detach_all(&self) {
        for at in self.addresses() {
            self.detach(at);
        }
    }

    /// Where there are functions.
    #[must_use]
    pub fn addresses(&self) -> Vec<Address> {
        locked(&self.functions).keys().copied().collect()
    }

    fn find(&self, at: Address) -> Option<Arc<dyn PciDevice>> {
        locked(&self.functions).get(&at).cloned()
    }
}

/// The top of the hierarchy: configuration accesses by bus number. Only bus 0 has functions so far;
/// bridges will claim the ranges between their secondary and subordinate bus numbers here.
#[derive(Debug, Default)]
pub struct RootComplex {
    bus: PciBus,
}

impl RootComplex {
    /// Bus 0.
    #[must_use]
    pub fn bus(&self) -> &PciBus {
        &self.bus
    }

    /// Reads configuration space: ones where there is no function. An access that crosses a dword is
    /// answered byte by byte, as the bus would split it.
    #[must_use]
    pub fn read(&self, bus: u8, at: Address, offset: u16, size: u8) -> u32 {
        let function = if bus == 0 { self.bus.find(at) } else { None };
        let Some(f) = function else { return u32::MAX };
        if whole(offset, size) {
            return f.read_config(offset & 0xfff, size);
        }
        let byte = |i: u8| f.read_config(offset.wrapping_add(u16::from(i)) & 0xfff, 1) & 0xff;
        (0..size.min(4)).fold(0, |v, i| v | byte(i) << (8 * u32::from(i)))
    }

    /// Writes configuration space; writes to absent functions are dropped.
    pub fn write(&self, bus: u8, at: Address, offset: u16, size: u8, value: u32) {
        let function = if bus == 0 { self.bus.find(at) } else { None };
        let Some(f) = function else { return };
        if whole(offset, size) {
            f.write_config(offset & 0xfff, size, value);
        } else {
            for (i, v) in (0..size.min(4)).zip(value.to_le_bytes()) {
                f.write_config(offset.wrapping_add(u16::from(i)) & 0xfff, 1, u32::from(v));
            }
        }
    }
}

/// Whether an access is 1, 2 or 4 bytes inside one dword.
fn whole(offset: u16, size: u8) -> bool {
    matches!(size, 1 | 2 | 4) && offset % 4 + u16::from(size) <= 4
}

/// CONFIG_ADDRESS bit 31: accesses to CONFIG_DATA are configuration accesses.
const ENABLE: u32 = 1 << 31;
/// Bits of CONFIG_ADDRESS that keep what is written: enable, bus, device, function, dword.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// Configuration mechanism #1 (PCI 3.0 section 3.2.2.3.2): CONFIG_ADDRESS at port `CF8h` and
/// CONFIG_DATA at `CFCh`, mapped as eight ports from `CF8h` on.
///
/// Only dword accesses reach CONFIG_ADDRESS; a byte at `CF9h` goes to the reset control register that
/// chipsets have there.
pub struct ConfigPorts {
    root: Arc<RootComplex>,
    reset_control: Option<Arc<dyn Handler>>,
    address: u32,
}

impl fmt::Debug for ConfigPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConfigPorts({:#010x})", self.address)
    }
}

impl ConfigPorts {
    /// The ports to `root`, with the register at `CF9h` if there is one.
    #[must_use]
    pub fn new(root: Arc<RootComplex>, reset_control: Option<Arc<dyn Handler>>) -> Self {
        Self { root, reset_control, address: 0 }
    }

    /// Bus, function and register that CONFIG_DATA means now.
    fn target(&self, offset: u64) -> Option<(u8, Address, u16)> {
        let [register, devfn, bus, _] = self.address.to_le_bytes();
        let byte = u16::from(offset.to_le_bytes()[0] & 3);
        let at = Address::from_devfn(devfn);
        (self.address & ENABLE != 0).then_some((bus, at, u16::from(register & 0xfc) + byte))
    }
}

impl Registers for ConfigPorts {
    fn read(&mut self, offset: u64, size: u8) -> Option<u64> {
        match (offset, size) {
            (0, 4) => Some(u64::from(self.address)),
            (1, 1) => self.reset_control.as_ref()?.read(0, 1),
            (4.., 1 | 2 | 4) => {
                let (bus, at, register) = self.target(offset)?;
                Some(u64::from(self.root.read(bus, at, register, size)))
            }
            _ => None,
        }
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) -> bool {
        let [a, b, c, d, ..] = value.to_le_bytes();
        let low = u32::from_le_bytes([a, b, c, d]);
        match (offset, size) {
            (0, 4) => self.address = low & ADDRESS_BITS,
            (1, 1) => return self.reset_control.as_ref().is_some_and(|r| r.write(0, 1, value)),
            (4.., 1 | 2 | 4) => match self.target(offset) {
                Some((bus, at, register)) => self.root.write(bus, at, register, size, low),
                None => return false,
            },
            _ => return false,
        }
        true
    }
}

/// Saved state of [`ConfigPorts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigPortsState {
    address: u32,
}

impl DeviceState for ConfigPorts {
    const NAME: &'static str = "pci-config-ports";
    type State = ConfigPortsState;

    fn save(&self) -> ConfigPortsState {
        let Self { root: _, reset_control: _, address } = self;
        ConfigPortsState { address: *address }
    }

    fn restore(&mut self, state: ConfigPortsState) -> Result<(), StateError> {
        self.address = state.address & ADDRESS_BITS;
        Ok(())
    }

    fn reset(&mut self) {
        self.address = 0;
    }
}

/// The enhanced configuration access mechanism (PCI Express Base section 7.2.2): a window of 1 MiB a
/// bus, in which address bits 27:20 are the bus, 19:12 device and function, 11:0 the register.
#[derive(Debug)]
pub struct Ecam {
    root: Arc<RootComplex>,
}

impl Ecam {
    /// Bytes of the window for each bus.
    pub const BYTES_PER_BUS: u64 = 1 << 20;

    /// A window to `root`.
    #[must_use]
    pub fn new(root: Arc<RootComplex>) -> Self {
        Self { root }
    }

    fn target(offset: u64) -> (u8, Address, u16) {
        let [a, b, c, d, ..] = offset.to_le_bytes();
        let bus = c >> 4 | d << 4;
        (bus, Address::from_devfn(b >> 4 | c << 4), u16::from_le_bytes([a, b & 0xf]))
    }
}

impl Handler for Ecam {
    fn read(&self, offset: u64, size: u8) -> Option<u64> {
        let (bus, at, register) = Self::target(offset);
        let low = u64::from(self.root.read(bus, at, register, size.min(4)));
        if size < 8 {
            return Some(low);
        }
        let (bus, at, register) = Self::target(offset + 4);
        Some(low | u64::from(self.root.read(bus, at, register, 4)) << 32)
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> bool {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        let (bus, at, register) = Self::target(offset);
        self.root.write(bus, at, register, size.min(4), u32::from_le_bytes([a, b, c, d]));
        if size == 8 {
            let (bus, at, register) = Self::target(offset + 4);
            self.root.write(bus, at, register, 4, u32::from_le_bytes([e, f, g, h]));
        }
        true
    }
}

#[cfg(test)]
#[path = "root_tests.rs"]
mod tests;
