//! The PCI transport, modern only (virtio 1.2, 4.1).
//!
//! BAR 1 is MSI-X (a vector for each queue and one for the configuration), BAR 4 holds the structures:
//!
//! | offset | what                                                              |
//! | ------ | ----------------------------------------------------------------- |
//! | 0x0000 | common configuration                                              |
//! | 0x1000 | ISR status                                                        |
//! | 0x2000 | device configuration                                              |
//! | 0x3000 | notifications, 4 bytes a queue                                    |
//!
//! Notifications take no lock of the transport: two queues' drivers do not wait for each other.

use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use terem_bus::{Device, Handler, SavedDevice, StateError, locked};
use terem_memory::GuestMemory;

use super::common_config::{After, CommonConfig, Registers, register};
use super::device::{Kind, Queues, VirtioDevice, feature};
use super::interrupts::PciInterrupts;
use super::queue::RingPosition;
use crate::pci::{
    BarKind, ConfigHook, ConfigSize, FunctionBuilder, FunctionState, Identity, PciError, PciFunction, Pin,
    Wiring, capability,
};

/// Red Hat's vendor ID, which virtio devices have (virtio 1.2, 4.1.2).
const VENDOR: u16 = 0x1af4;
/// PCI device ID of virtio device ID 0; modern devices count from here.
const FIRST_DEVICE: u16 = 0x1040;

const MSIX_BAR: u8 = 1;
const BAR: u8 = 4;
const BAR_SIZE: u64 = 0x4000;

// Places of the structures in the BAR; each has a page.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const PAGE: u64 = 0x1000;

/// Bytes between the notification registers of two queues (`notify_off_multiplier`).
const NOTIFY_MULTIPLIER: u32 = 4;

/// `cfg_type` of the capabilities (virtio 1.2, 4.1.4).
mod cfg_type {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const PCI: u8 = 5;
}

// Fields of `struct virtio_pci_cap`, from the capability's start.
const CAP_BAR: u16 = 4;
const CAP_OFFSET: u16 = 8;
const CAP_LENGTH: u16 = 12;
const CAP_DATA: u16 = 16;

/// The body (from byte 2 on) of a virtio structure's capability.
fn capability_body(cfg_type: u8, offset: u64, length: u64, extra: Option<u32>) -> Vec<u8> {
    let word = |v: u64| u32::try_from(v).unwrap_or(0).to_le_bytes();
    let mut body = vec![if extra.is_some() { 20 } else { 16 }, cfg_type, BAR, 0, 0, 0];
    body.extend(word(offset));
    body.extend(word(length));
    body.extend(extra.map(u32::to_le_bytes).into_iter().flatten());
    body
}

/// A virtio device as a PCI function.
///
/// Attach [`Self::function`] to a bus, and keep the value: the function holds it weakly.
pub struct VirtioPci {
    device: Arc<dyn VirtioDevice>,
    kind: Kind,
    queues: Arc<Queues>,
    interrupts: Arc<PciInterrupts>,
    function: Arc<PciFunction>,
    common: Mutex<CommonConfig>,
    /// Where the configuration access capability is (4.1.4.9).
    access_capability: u16,
}

impl fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VirtioPci({})", self.kind.name)
    }
}

/// The BAR's handler. Weak, for the transport holds the function.
struct Structures(Weak<VirtioPci>);

impl Handler for Structures {
    fn read(&self, offset: u64, size: u8) -> Option<u64> {
        self.0.upgrade()?.read_bar(offset, size)
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> bool {
        self.0.upgrade().is_some_and(|t| t.write_bar(offset, size, value))
    }
}

impl VirtioPci {
    /// `device` as a PCI function connected by `wiring`, with its rings in `memory`.
    ///
    /// # Errors
    /// [`PciError`] when the device has more queues than a function can have vectors.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        memory: GuestMemory,
        wiring: Wiring,
    ) -> Result<Arc<Self>, PciError> {
        let kind = device.kind();
        let count = device.queue_sizes().len();
        let identity = Identity {
            vendor_id: VENDOR,
            device_id: FIRST_DEVICE + kind.id,
            revision: 1,
            class: kind.class,
            subsystem_vendor_id: VENDOR,
            subsystem_id: FIRST_DEVICE + kind.id,
        };
        let mut builder = FunctionBuilder::new(&identity, ConfigSize::Extended, wiring);
        let vectors = u16::try_from(count + 1).map_err(|_| PciError::Vectors(u16::MAX))?;
        let msix = builder.msix_bar(MSIX_BAR, vectors)?;
        builder.bar(BAR, BarKind::Memory64 { prefetchable: false }, BAR_SIZE, kind.name)?;
        let config_length = device.config().len() as u64;
        let notify_length = u64::from(NOTIFY_MULTIPLIER) * count as u64;
        let mut add = |cfg_type, offset, length, extra| {
            let body = capability_body(cfg_type, offset, length, extra);
            let mut writable = vec![0; body.len()];
            if cfg_type == cfg_type::PCI {
                // BAR, offset, length and data of the access are the driver's (4.1.4.9).
                for at in [2, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17] {
                    writable[at] = 0xff;
                }
            }
            builder.capability(capability::VENDOR, &body, &writable)
        };
        add(cfg_type::COMMON, COMMON, register::END, None)?;
        add(cfg_type::ISR, ISR, 1, None)?;
        if config_length > 0 {
            add(cfg_type::DEVICE, DEVICE, config_length, None)?;
        }
        add(cfg_type::NOTIFY, NOTIFY, notify_length, Some(NOTIFY_MULTIPLIER))?;
        let access_capability = add(cfg_type::PCI, 0, 0, Some(0))?;
        builder.pci_express(capability::ExpressType::RootComplexIntegrated)?;
        builder.power_management()?;
        builder.interrupt_pin(Pin::A);
        let function = builder.build();
        let interrupts = Arc::new(PciInterrupts::new(Arc::clone(&function), msix, count));
        let queues = Arc::new(Queues::new(kind.name, memory, count, Arc::clone(&interrupts) as _));
        let transport_features = feature::VERSION_1
            | feature::INDIRECT_DESC
            | feature::EVENT_IDX
            | feature::RING_PACKED
            | feature::RING_RESET;
        let common = CommonConfig::new(
            Arc::clone(&device),
            Arc::clone(&queues),
            Arc::clone(&interrupts),
            transport_features,
        );
        let common = Mutex::new(common);
        let transport =
            Arc::new(Self { device, kind, queues, interrupts, function, common, access_capability });
        transport.function.set_bar_handler(BAR, Arc::new(Structures(Arc::downgrade(&transport))));
        transport.function.set_hook(Arc::downgrade(&transport) as _);
        Ok(transport)
    }

    /// The PCI function, to be attached to a bus.
    #[must_use]
    pub fn function(&self) -> &Arc<PciFunction> {
        &self.function
    }

    /// Stops taking requests and waits for those in flight: guest memory and the device's state stay as
    /// they are until [`Self::resume`]. To be called with the vCPUs stopped, before saving.
    pub fn pause(&self) {
        self.queues.pause();
        self.device.quiesce();
    }

    /// Goes on after [`Self::pause`], with what was made available meanwhile first.
    pub fn resume(&self) {
        self.queues.resume();
        self.act(After::NotifyAll);
    }

    fn act(&self, after: After) {
        match after {
            After::Nothing => {}
            After::Notify(index) => self.device.notify(index, &self.queues),
            After::NotifyAll => {
                for index in 0..self.queues.count() {
                    self.device.notify(index, &self.queues);
                }
            }
        }
    }

    /// Reads the structures in the BAR.
    pub(super) fn read_bar(&self, offset: u64, size: u8) -> Option<u64> {
        match offset / PAGE * PAGE {
            COMMON => locked(&self.common).read(offset, size),
            ISR if offset == ISR && size == 1 => Some(self.interrupts.take_isr().into()),
            DEVICE => {
                let config = self.device.config();
                let start = usize::try_from(offset - DEVICE).ok()?;
                let bytes = config.get(start..start.checked_add(usize::from(size))?)?;
                Some(bytes.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b)))
            }
            // Nothing says what a notification register reads as.
            NOTIFY => Some(0),
            _ => None,
        }
    }

    /// Writes the structures in the BAR.
    pub(super) fn write_bar(&self, offset: u64, size: u8, value: u64) -> bool {
        match offset / PAGE * PAGE {
            NOTIFY => {
                let index = (offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
                let Ok(index) = u16::try_from(index) else { return false };
                if index < self.queues.count() {
                    self.device.notify(index, &self.queues);
                }
                index < self.queues.count()
            }
            COMMON => {
                let after = locked(&self.common).write(offset, size, value);
                if let Some(after) = after {
                    self.act(after);
                }
                after.is_some()
            }
            DEVICE => {
                let end = (offset - DEVICE).saturating_add(u64::from(size));
                let fits = end <= self.device.config().len() as u64;
                if fits {
                    let bytes = value.to_le_bytes();
                    self.device.write_config(offset - DEVICE, &bytes[..usize::from(size).min(8)]);
                }
                fits
            }
            _ => false,
        }
    }

    /// What the configuration access capability points at: offset and size in BAR 4.
    fn access(&self, function: &PciFunction) -> Option<(u64, u8)> {
        let at = self.access_capability;
        let length = function.read(at + CAP_LENGTH, 4);
        let offset = u64::from(function.read(at + CAP_OFFSET, 4));
        let size = u8::try_from(length).ok().filter(|s| [1, 2, 4].contains(s))?;
        let inside = function.read(at + CAP_BAR, 1) == u32::from(BAR) && offset < BAR_SIZE;
        (inside && offset.is_multiple_of(size.into())).then_some((offset, size))
    }

    fn saved_state(&self) -> Result<State, StateError> {
        let common = locked(&self.common);
        let Self { device, kind, queues, interrupts, function, common: _, access_capability: _ } = self;
        // A failed device's queues stand nowhere, and do not go on before a reset.
        let positions = (0..queues.count())
            .map(|i| queues.position(i).filter(|_| !queues.has_failed()).transpose())
            .collect::<Result<_, _>>()
            .map_err(|reason| kind.invalid(reason))?;
        let state = State {
            registers: common.registers().clone(),
            positions,
            failed: queues.has_failed(),
            config_generation: queues.config_generation(),
            config_vector: interrupts.config_vector(),
            queue_vectors: (0..queues.count()).map(|i| interrupts.queue_vector(i)).collect(),
            isr: interrupts.isr(),
            function: function.save_state(),
            device: device.save()?,
        };
        Ok(state)
    }
}

impl ConfigHook for VirtioPci {
    fn read(&self, function: &PciFunction, offset: u16, size: u8) -> Option<u32> {
        let skip = offset.checked_sub(self.access_capability + CAP_DATA).filter(|&skip| skip < 4)?;
        let (at, width) = self.access(function)?;
        let value = self.read_bar(at, width).unwrap_or(u64::MAX) >> (8 * skip);
        let mask = terem_bus::all_ones(width) >> (8 * skip) & terem_bus::all_ones(size);
        u32::try_from(value & mask).ok()
    }

    fn written(&self, function: &PciFunction, offset: u16, size: u16) {
        let data = self.access_capability + CAP_DATA;
        // A longer range is the whole space, restored or reset: not an access.
        if size <= 4
            && offset < data + 4
            && offset + size > data
            && let Some((at, width)) = self.access(function)
        {
            let value = u64::from(function.read(data, 4)) & terem_bus::all_ones(width);
            self.write_bar(at, width, value);
        }
    }
}

const VERSION: u32 = 1;

/// Saved state of a transport with its device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    registers: Registers,
    /// Where each queue stands, if it runs and the device has not failed.
    positions: Vec<Option<RingPosition>>,
    failed: bool,
    config_generation: u32,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
    function: FunctionState,
    device: SavedDevice,
}

impl Device for VirtioPci {
    fn name(&self) -> &'static str {
        self.kind.name
    }

    /// Waits for the requests in flight. Unless the device was paused before, it goes on afterwards.
    fn save(&self) -> Result<SavedDevice, StateError> {
        let was_paused = self.queues.is_paused();
        self.pause();
        let state = self.saved_state().and_then(|s| self.kind.saved(VERSION, &s));
        if !was_paused {
            self.resume();
        }
        state
    }

    /// A device that was paused stays so until [`VirtioPci::resume`].
    fn restore(&self, saved: &SavedDevice) -> Result<(), StateError> {
        let state: State = self.kind.loaded(VERSION, saved)?;
        let State {
            registers,
            positions,
            failed,
            config_generation,
            config_vector,
            queue_vectors,
            isr,
            function,
            device,
        } = state;
        let invalid = |reason| self.kind.invalid(reason);
        let was_paused = self.queues.is_paused();
        locked(&self.common).check(&registers).map_err(invalid)?;
        self.pause();
        locked(&self.common).reset();
        // The function's own lock comes before the structure's, as when a driver gets at the structures
        // through configuration space.
        let taken = self.function.restore_state(&function).and_then(|()| {
            locked(&self.common).restore(&registers, &positions).map_err(invalid)?;
            self.device.restore(&device)
        });
        if taken.is_err() {
            Device::reset(self);
        } else {
            self.interrupts.set_config_vector(config_vector);
            for (index, &vector) in (0..).zip(&queue_vectors) {
                self.interrupts.set_queue_vector(index, vector);
            }
            self.interrupts.set_isr(isr);
            self.queues.set_config_generation(config_generation);
            self.queues.set_failed(failed);
        }
        if !was_paused {
            self.resume();
        }
        taken
    }

    fn reset(&self) {
        locked(&self.common).reset();
        self.queues.set_config_generation(0);
        self.function.reset_state();
    }
}

#[cfg(test)]
mod tests;
