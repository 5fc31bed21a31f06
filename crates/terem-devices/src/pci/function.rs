//! An emulated PCI function: configuration space, BARs and interrupts of one device.

use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use terem_bus::{Bus, Device, Handler, IrqLine, MsiSink, SavedDevice, StateError, locked};

use super::bar::{Bar, BarKind};
use super::capability::{self, Body};
use super::config_space::{ConfigSize, ConfigSpace, Identity, register};
use super::msi::{Msi, MsiState};
use super::msix::{self, MsixState, MsixVectors};
use super::{PciDevice, PciError};

/// An INTx pin (PCI 3.0 section 2.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pin {
    /// INTA#, the pin of single-function devices.
    A = 1,
    /// INTB#.
    B,
    /// INTC#.
    C,
    /// INTD#.
    D,
}

/// Where a function is connected.
#[derive(Clone)]
pub struct Wiring {
    /// The address spaces that its BARs go to. Weak, since they hold the function's handlers.
    pub bus: Weak<Bus>,
    /// Where its messages go.
    pub msi: Arc<dyn MsiSink>,
    /// Where its INTx pin leads, after the board's routing.
    pub intx: IrqLine,
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Wiring({:?})", self.intx)
    }
}

/// What a device adds where configuration registers do something. Called without the function's
/// register lock held, one call at a time for writes.
pub trait ConfigHook: Send + Sync {
    /// Answers a read instead of the stored bytes, or `None` to let those answer.
    fn read(&self, function: &PciFunction, offset: u16, size: u8) -> Option<u32> {
        let _ = (function, offset, size);
        None
    }

    /// Something in `offset..offset + size` was written, or (with the whole space) restored or reset;
    /// `function`'s registers have their new values.
    fn written(&self, function: &PciFunction, offset: u16, size: u16);
}

/// Collects what a function is made of.
pub struct FunctionBuilder {
    config: ConfigSpace,
    bars: Vec<Bar>,
    wiring: Wiring,
    msix: Option<(u16, Arc<MsixVectors>)>,
    msi: Option<Msi>,
    power_management: Option<u16>,
}

impl FunctionBuilder {
    /// A function without BARs and capabilities.
    #[must_use]
    pub fn new(identity: &Identity, size: ConfigSize, wiring: Wiring) -> Self {
        let config = ConfigSpace::new(identity, size);
        Self { config, bars: Vec::new(), wiring, msix: None, msi: None, power_management: None }
    }

    /// The registers, for definitions of the device's own.
    pub fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    /// Says that the device has several functions (on each of them).
    pub fn multi_function(&mut self) {
        self.config.define8(register::HEADER_TYPE, 0x80, 0);
    }

    /// Says which INTx pin it uses.
    pub fn interrupt_pin(&mut self, pin: Pin) {
        self.config.define8(register::INTERRUPT_PIN, pin as u8, 0);
    }

    /// Adds a BAR of `size` bytes; its handler comes with [`PciFunction::set_bar_handler`]. `name` is
    /// what the address space calls it.
    ///
    /// # Errors
    /// [`PciError::Bar`] and [`PciError::BarTaken`].
    pub fn bar(&mut self, index: u8, kind: BarKind, size: u64, name: &str) -> Result<(), PciError> {
        let second = if matches!(kind, BarKind::Memory64 { .. }) { index.saturating_add(1) } else { index };
        for i in [index, second] {
            if self.bars.iter().any(|b| b.covers(i)) {
                return Err(PciError::BarTaken(i));
            }
        }
        self.bars.push(Bar::define(&mut self.config, index, kind, size, name)?);
        Ok(())
    }

    /// Adds a capability; `body` and the mask of its writable bits start after the two header bytes.
    /// Returns its offset.
    ///
    /// # Errors
    /// [`PciError::NoRoom`].
    pub fn capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, PciError> {
        self.config.add_capability(id, body, writable).ok_or(PciError::NoRoom(body.len()))
    }

    /// Adds an extended capability; `body` starts after the four header bytes. Returns its offset.
    ///
    /// # Errors
    /// [`PciError::NoRoom`].
    pub fn extended_capability(
        &mut self,
        id: u16,
        version: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, PciError> {
        let at = self.config.add_extended_capability(id, version, body, writable);
        at.ok_or(PciError::NoRoom(body.len()))
    }

    /// Adds the PCI Express capability.
    ///
    /// # Errors
    /// [`PciError::NoRoom`].
    pub fn pci_express(&mut self, kind: capability::ExpressType) -> Result<u16, PciError> {
        let Body { value, writable } = capability::pci_express(kind);
        self.capability(capability::PCI_EXPRESS, &value, &writable)
    }

    /// Adds power management (D0 and D3hot; in D3hot the BARs do not answer).
    ///
    /// # Errors
    /// [`PciError::NoRoom`].
    pub fn power_management(&mut self) -> Result<u16, PciError> {
        let Body { value, writable } = capability::power_management();
        let at = self.capability(capability::POWER_MANAGEMENT, &value, &writable)?;
        self.power_management = Some(at);
        Ok(at)
    }

    /// Adds MSI with `count` vectors (1, 2, 4 … 32), sent with [`PciFunction::trigger_msi`].
    ///
    /// # Errors
    /// [`PciError::Vectors`] and [`PciError::NoRoom`].
    pub fn msi(&mut self, count: u16) -> Result<(), PciError> {
        if !count.is_power_of_two() || count > 32 {
            return Err(PciError::Vectors(count));
        }
        let Body { value, writable } = Msi::body(count);
        let at = self.capability(capability::MSI, &value, &writable)?;
        self.msi = Some(Msi::new(at, count));
        Ok(())
    }

    /// Adds MSI-X with `count` vectors, with table and pending bits in the 32-bit memory BAR `index`,
    /// which is used for nothing else and needs no handler.
    ///
    /// # Errors
    /// [`PciError::Vectors`], [`PciError::NoRoom`], [`PciError::Bar`] and [`PciError::BarTaken`].
    pub fn msix_bar(&mut self, index: u8, count: u16) -> Result<Arc<MsixVectors>, PciError> {
        if count == 0 || count > msix::MAX_VECTORS {
            return Err(PciError::Vectors(count));
        }
        let vectors = Arc::new(MsixVectors::new(count, Arc::clone(&self.wiring.msi)));
        self.bar(index, BarKind::Memory32 { prefetchable: false }, vectors.bar_size(), "MSI-X")?;
        if let Some(bar) = self.bars.last_mut() {
            bar.handler = Some(Arc::clone(&vectors) as _);
        }
        let pba = u32::try_from(vectors.pba_offset()).unwrap_or(0) | u32::from(index);
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(count - 1).to_le_bytes());
        body[2..6].copy_from_slice(&u32::from(index).to_le_bytes());
        body[6..].copy_from_slice(&pba.to_le_bytes());
        let mut writable = [0; 10];
        writable[..2].copy_from_slice(&(msix::ENABLE | msix::FUNCTION_MASK).to_le_bytes());
        let at = self.capability(capability::MSIX, &body, &writable)?;
        self.msix = Some((at, Arc::clone(&vectors)));
        Ok(vectors)
    }

    /// The function, in its state after reset.
    #[must_use]
    pub fn build(self) -> Arc<PciFunction> {
        let Self { config, bars, wiring, msix, msi, power_management } = self;
        let Wiring { bus, msi: sink, intx } = wiring;
        let core = Core { config, bars, msi, intx: false, driven: false };
        Arc::new(PciFunction {
            core: Mutex::new(core),
            changes: Mutex::new(()),
            hook: Mutex::new(None),
            msix,
            power_management,
            bus,
            sink,
            intx,
        })
    }
}

struct Core {
    config: ConfigSpace,
    bars: Vec<Bar>,
    msi: Option<Msi>,
    /// What the device wants its pin to be, and what the pin is.
    intx: bool,
    driven: bool,
}

/// A PCI function of an emulated device.
pub struct PciFunction {
    core: Mutex<Core>,
    /// Held while a write takes effect, so that two of them take effect one after the other.
    changes: Mutex<()>,
    hook: Mutex<Option<Weak<dyn ConfigHook>>>,
    msix: Option<(u16, Arc<MsixVectors>)>,
    power_management: Option<u16>,
    bus: Weak<Bus>,
    sink: Arc<dyn MsiSink>,
    intx: IrqLine,
}

impl fmt::Debug for PciFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PciFunction({:08x})", self.read(register::VENDOR_ID, 4))
    }
}

impl PciFunction {
    /// Says who answers at BAR `index` (offsets count from its start). A BAR without a handler is
    /// sized but never mapped.
    pub fn set_bar_handler(&self, index: u8, handler: Arc<dyn Handler>) {
        let _one_at_a_time = locked(&self.changes);
        let mut core = locked(&self.core);
        if let Some(bar) = core.bars.iter_mut().find(|b| b.index() == index) {
            bar.handler = Some(handler);
        }
        self.map_bars(&mut core);
    }

    /// Says who hears of register accesses.
    pub fn set_hook(&self, hook: Weak<dyn ConfigHook>) {
        *locked(&self.hook) = Some(hook);
    }

    /// The MSI-X vectors, if it has any.
    #[must_use]
    pub fn msix(&self) -> Option<&Arc<MsixVectors>> {
        self.msix.as_ref().map(|(_, v)| v)
    }

    /// Stored register bytes, without the hook. May be called with the device locked.
    #[must_use]
    pub fn read(&self, offset: u16, size: u8) -> u32 {
        locked(&self.core).config.read(offset, size)
    }

    /// Changes registers as the device does (status bits, say). May be called with the device locked.
    pub fn set(&self, offset: u16, size: u8, value: u32) {
        locked(&self.core).config.set(offset, size, value);
    }

    /// Where BAR `index` answers now, if it does.
    #[must_use]
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        locked(&self.core).bars.iter().find(|b| b.index() == index).and_then(Bar::address)
    }

    /// Whether the function may write memory (bus master).
    #[must_use]
    pub fn is_master(&self) -> bool {
        locked(&self.core).config.read16(register::COMMAND) & register::COMMAND_MASTER != 0
    }

    /// Drives the INTx pin: asserted unless it is disabled or the guest uses messages. The level is
    /// kept, and seen once that changes.
    pub fn set_intx(&self, high: bool) {
        let mut core = locked(&self.core);
        core.intx = high;
        self.drive_intx(&mut core);
    }

    /// Sends MSI `vector`; without effect while MSI is not enabled.
    pub fn trigger_msi(&self, vector: u16) {
        let mut core = locked(&self.core);
        let Core { config, msi, .. } = &mut *core;
        let master = config.read16(register::COMMAND) & register::COMMAND_MASTER != 0;
        let message = msi.and_then(|m| m.trigger(config, vector, master));
        drop(core);
        if let Some(m) = message {
            self.sink.send_msi(m);
        }
    }

    /// Whether the guest uses MSI.
    #[must_use]
    pub fn msi_enabled(&self) -> bool {
        let core = locked(&self.core);
        core.msi.is_some_and(|m| m.enabled(&core.config))
    }

    /// Under the lock, so that levels reach the line in the order in which they were set.
    fn drive_intx(&self, core: &mut Core) {
        let status = core.config.read16(register::STATUS) & !register::STATUS_INTX;
        let pending = if core.intx { register::STATUS_INTX } else { 0 };
        core.config.set(register::STATUS, 2, u32::from(status | pending));
        let disabled = core.config.read16(register::COMMAND) & register::COMMAND_INTX_DISABLE != 0;
        let messages = core.msi.is_some_and(|m| m.enabled(&core.config))
            || self.msix.as_ref().is_some_and(|(at, _)| core.config.read16(at + 2) & msix::ENABLE != 0);
        let level = core.intx && !disabled && !messages;
        if level != core.driven {
            core.driven = level;
            self.intx.set(level);
        }
    }

    fn map_bars(&self, core: &mut Core) {
        let Core { config, bars, .. } = core;
        let Some(bus) = self.bus.upgrade() else { return };
        // Those that go away first: another BAR may be moving to where they were.
        for bar in bars.iter_mut() {
            bar.withdraw(config, self.power_management, &bus);
        }
        for bar in bars {
            bar.update(config, self.power_management, &bus);
        }
    }

    /// Lets changed registers take effect. `changes` is held.
    fn apply(&self, offset: u16, size: u16) {
        let mut core = locked(&self.core);
        self.map_bars(&mut core);
        let Core { config, msi, .. } = &mut *core;
        let master = config.read16(register::COMMAND) & register::COMMAND_MASTER != 0;
        let messages = msi.map(|m| m.released(config, master)).unwrap_or_default();
        let control = self.msix.as_ref().map(|(at, v)| (config.read16(at + 2), v));
        self.drive_intx(&mut core);
        drop(core);
        if let Some((control, vectors)) = control {
            vectors.control(control, master);
        }
        for m in messages {
            self.sink.send_msi(m);
        }
        if let Some(hook) = self.hook() {
            hook.written(self, offset, size);
        }
    }

    fn hook(&self) -> Option<Arc<dyn ConfigHook>> {
        locked(&self.hook).as_ref().and_then(Weak::upgrade)
    }

    fn whole(&self) -> u16 {
        // 256 or 4096 bytes.
        u16::try_from(locked(&self.core).config.len()).unwrap_or(u16::MAX)
    }

    /// What is to be saved.
    #[must_use]
    pub fn save_state(&self) -> FunctionState {
        let core = locked(&self.core);
        let Core { config, bars: _, msi, intx, driven: _ } = &*core;
        FunctionState {
            registers: config.changeable(),
            intx: *intx,
            msi: msi.map(|m| m.save(config)),
            msix: self.msix.as_ref().map(|(_, v)| v.save()),
        }
    }

    /// Goes on from a saved state: registers, BAR mappings, interrupts. Like a write, it calls the hook,
    /// so not while the device is locked.
    ///
    /// # Errors
    /// [`StateError::Invalid`] when it is of a function with other interrupts.
    pub fn restore_state(&self, state: &FunctionState) -> Result<(), StateError> {
        let FunctionState { registers, intx, msi, msix } = state;
        let _one_at_a_time = locked(&self.changes);
        {
            let mut core = locked(&self.core);
            let msix_fits = match (&self.msix, msix) {
                (Some((_, v)), Some(s)) => v.restore(s),
                (None, None) => true,
                _ => false,
            };
            if !msix_fits || core.msi.is_some() != msi.is_some() {
                let reason = "it has other interrupt vectors".into();
                return Err(StateError::Invalid { device: NAME, reason });
            }
            core.config.restore(registers);
            core.intx = *intx;
            let Core { config, msi: capability, .. } = &mut *core;
            if let (Some(m), Some(s)) = (*capability, *msi) {
                m.restore(config, s);
            }
        }
        self.apply(0, self.whole());
        Ok(())
    }

    /// Back to after power-on: BARs unmapped, interrupts off, INTx low. Like a write, it calls the hook,
    /// so not while the device is locked.
    pub fn reset_state(&self) {
        let _one_at_a_time = locked(&self.changes);
        {
            let mut core = locked(&self.core);
            core.config.reset();
            core.intx = false;
            if let Some((_, v)) = &self.msix {
                v.reset();
            }
        }
        self.apply(0, self.whole());
    }
}

impl PciDevice for PciFunction {
    fn read_config(&self, offset: u16, size: u8) -> u32 {
        let hooked = self.hook().and_then(|h| h.read(self, offset, size));
        hooked.unwrap_or_else(|| self.read(offset, size))
    }

    fn write_config(&self, offset: u16, size: u8, value: u32) {
        let _one_at_a_time = locked(&self.changes);
        locked(&self.core).config.write(offset, size, value);
        self.apply(offset, u16::from(size));
    }

    fn unplug(&self) {
        let _one_at_a_time = locked(&self.changes);
        let mut core = locked(&self.core);
        for bar in &mut core.bars {
            if let Some(bus) = self.bus.upgrade() {
                bar.unmap(&bus);
            }
            bar.handler = None;
        }
        core.intx = false;
        self.drive_intx(&mut core);
    }
}

/// Saved state of a function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionState {
    /// Offset and value of the dwords that a guest can change.
    registers: Vec<(u16, u32)>,
    intx: bool,
    msi: Option<MsiState>,
    msix: Option<MsixState>,
}

const NAME: &str = "pci-function";
const VERSION: u32 = 1;

impl Device for PciFunction {
    fn name(&self) -> &'static str {
        NAME
    }

    fn save(&self) -> Result<SavedDevice, StateError> {
        let invalid = |e: serde_json::Error| StateError::Invalid { device: NAME, reason: e.to_string() };
        let state = serde_json::to_value(self.save_state()).map_err(invalid)?;
        Ok(SavedDevice { device: NAME.into(), version: VERSION, state })
    }

    fn restore(&self, saved: &SavedDevice) -> Result<(), StateError> {
        if saved.device != NAME {
            return Err(StateError::Device { expected: NAME, found: saved.device.clone() });
        }
        if saved.version > VERSION {
            return Err(StateError::Version { device: NAME, found: saved.version, known: VERSION });
        }
        let invalid = |e: serde_json::Error| StateError::Invalid { device: NAME, reason: e.to_string() };
        self.restore_state(&FunctionState::deserialize(&saved.state).map_err(invalid)?)
    }

    fn reset(&self) {
        self.reset_state();
    }
}

#[cfg(test)]
#[path = "function_tests.rs"]
pub(super) mod tests;
