//! The common configuration structure: features, status, queues (virtio 1.2, 4.1.4.3 and 3.1).
//!
//! ```text
//!   0 ──ACKNOWLEDGE, DRIVER──> negotiating ──FEATURES_OK──> (refused: the bit does not stick)
//!                                             └──> features frozen, queues are enabled
//!                                                    └──DRIVER_OK──> live ──(failure)──> NEEDS_RESET
//!   any ──status = 0──> reset
//! ```

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::device::{Queues, VirtioDevice, feature};
use super::interrupts::PciInterrupts;
use super::queue::{MAX_QUEUE_SIZE, Queue, QueueError, RingConfig, RingPosition};

/// Device status bits (virtio 1.2, 2.1).
pub(super) mod status {
    pub const FEATURES_OK: u8 = 8;
    pub const DRIVER_OK: u8 = 4;
    pub const NEEDS_RESET: u8 = 64;
}

/// Offsets of the registers (`struct virtio_pci_common_cfg`).
pub(super) mod register {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
    pub const QUEUE_NOTIFY_DATA: u64 = 0x38;
    pub const QUEUE_RESET: u64 = 0x3a;
    /// Bytes of the structure.
    pub const END: u64 = 0x3c;
}

/// What the driver has set up of one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QueueRegisters {
    size: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// The registers that are state of their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// The structure, and all that its registers act on.
pub(super) struct CommonConfig {
    device: Arc<dyn VirtioDevice>,
    queues: Arc<Queues>,
    interrupts: Arc<PciInterrupts>,
    offered: u64,
    sizes: Vec<u16>,
    registers: Registers,
}

/// What the transport has to do once it has let go of the structure's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    Nothing,
    /// Look at all queues: chains may have been made available before the device looked.
    NotifyAll,
    /// Look at one.
    Notify(u16),
}

impl CommonConfig {
    pub(super) fn new(
        device: Arc<dyn VirtioDevice>,
        queues: Arc<Queues>,
        interrupts: Arc<PciInterrupts>,
        transport_features: u64,
    ) -> Self {
        let offered = device.features() | transport_features;
        let sizes = device.queue_sizes();
        let registers = Registers::initial(&sizes);
        Self { device, queues, interrupts, offered, sizes, registers }
    }

    fn selected(&mut self) -> Option<&mut QueueRegisters> {
        self.registers.queues.get_mut(usize::from(self.registers.queue_select))
    }

    fn status(&self) -> u8 {
        self.registers.status | if self.queues.has_failed() { status::NEEDS_RESET } else { 0 }
    }

    /// Half `select` of a 64-bit feature set; other halves are zero.
    fn feature_half(set: u64, select: u32) -> u64 {
        match select {
            0 => set & 0xffff_ffff,
            1 => set >> 32,
            _ => 0,
        }
    }

    /// Reads a register; `None` for what is none, or not with this size.
    pub(super) fn read(&mut self, offset: u64, size: u8) -> Option<u64> {
        let index = self.registers.queue_select;
        let r = &self.registers;
        let queue = r.queues.get(usize::from(index));
        let half = |address: Option<u64>, low: u64| {
            let address = address.unwrap_or(0);
            match (offset - low, size) {
                (0, 8) => Some(address),
                (0, 4) => Some(address & 0xffff_ffff),
                (4, 4) => Some(address >> 32),
                _ => None,
            }
        };
        Some(match (offset, size) {
            (register::DEVICE_FEATURE_SELECT, 4) => r.device_feature_select.into(),
            (register::DEVICE_FEATURE, 4) => Self::feature_half(self.offered, r.device_feature_select),
            (register::DRIVER_FEATURE_SELECT, 4) => r.driver_feature_select.into(),
            (register::DRIVER_FEATURE, 4) => Self::feature_half(r.driver_features, r.driver_feature_select),
            (register::CONFIG_MSIX_VECTOR, 2) => self.interrupts.config_vector().into(),
            (register::NUM_QUEUES, 2) => self.queues.count().into(),
            (register::DEVICE_STATUS, 1) => self.status().into(),
            (register::CONFIG_GENERATION, 1) => u64::from(self.queues.config_generation() & 0xff),
            (register::QUEUE_SELECT, 2) => index.into(),
            // Size 0 says that there is no such queue.
            (register::QUEUE_SIZE, 2) => queue.map_or(0, |q| q.size).into(),
            (register::QUEUE_MSIX_VECTOR, 2) => self.interrupts.queue_vector(index).into(),
            (register::QUEUE_ENABLE, 2) => u64::from(queue.is_some_and(|q| q.enabled)),
            (register::QUEUE_NOTIFY_OFF | register::QUEUE_NOTIFY_DATA, 2) => index.into(),
            // A queue's reset is over when the write that asked for it is.
            (register::QUEUE_RESET, 2) => 0,
            (register::QUEUE_DESC..register::QUEUE_DRIVER, _) => {
                half(queue.map(|q| q.descriptors), register::QUEUE_DESC)?
            }
            (register::QUEUE_DRIVER..register::QUEUE_DEVICE, _) => {
                half(queue.map(|q| q.driver), register::QUEUE_DRIVER)?
            }
            (register::QUEUE_DEVICE..register::QUEUE_NOTIFY_DATA, _) => {
                half(queue.map(|q| q.device), register::QUEUE_DEVICE)?
            }
            _ => return None,
        })
    }

    /// Writes a register; `None` for what is none, or cannot be written.
    pub(super) fn write(&mut self, offset: u64, size: u8, value: u64) -> Option<After> {
        // The bus gives no more bits than the size has.
        let value32 = u32::try_from(value).unwrap_or(u32::MAX);
        let value16 = u16::try_from(value).unwrap_or(u16::MAX);
        let index = self.registers.queue_select;
        match (offset, size) {
            (register::DEVICE_FEATURE_SELECT, 4) => self.registers.device_feature_select = value32,
            (register::DRIVER_FEATURE_SELECT, 4) => self.registers.driver_feature_select = value32,
            (register::DRIVER_FEATURE, 4) => self.write_features(value),
            (register::CONFIG_MSIX_VECTOR, 2) => self.interrupts.set_config_vector(value16),
            (register::DEVICE_STATUS, 1) => {
                return Some(self.write_status(u8::try_from(value).unwrap_or(u8::MAX)));
            }
            (register::QUEUE_SELECT, 2) => self.registers.queue_select = value16,
            (register::QUEUE_MSIX_VECTOR, 2) => self.interrupts.set_queue_vector(index, value16),
            (register::QUEUE_ENABLE, 2) => return Some(self.write_enable(value16)),
            (register::QUEUE_RESET, 2) => self.write_reset(value16),
            (register::QUEUE_SIZE, 2) => {
                let largest = self.sizes.get(usize::from(index)).copied().unwrap_or(0);
                // An impossible size is kept as one that enabling refuses.
                let size = if value16 <= largest { value16 } else { MAX_QUEUE_SIZE + 1 };
                self.change_queue(|q| q.size = size);
            }
            (register::QUEUE_DESC..register::QUEUE_NOTIFY_DATA, 4 | 8) => {
                return self.write_address(offset, size, value);
            }
            _ => return None,
        }
        Some(After::Nothing)
    }

    /// Changes the selected queue's registers, unless it is enabled: they are fixed then (4.1.4.3.2).
    fn change_queue(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        if let Some(q) = self.selected().filter(|q| !q.enabled) {
            change(q);
        }
    }

    fn write_address(&mut self, offset: u64, size: u8, value: u64) -> Option<After> {
        let (low, part) = (offset & !7, offset & 7);
        if part != 0 && (part, size) != (4, 4) {
            return None;
        }
        self.change_queue(|q| {
            let address = match low {
                register::QUEUE_DESC => &mut q.descriptors,
                register::QUEUE_DRIVER => &mut q.driver,
                _ => &mut q.device,
            };
            *address = match (part, size) {
                (_, 8) => value,
                (0, _) => *address & !0xffff_ffff | value,
                _ => *address & 0xffff_ffff | value << 32,
            };
        });
        Some(After::Nothing)
    }

    fn write_features(&mut self, value: u64) {
        let r = &mut self.registers;
        if r.status & status::FEATURES_OK != 0 {
            tracing::debug!(device = self.device.kind().name, "features written after FEATURES_OK: ignored");
            return;
        }
        match r.driver_feature_select {
            0 => r.driver_features = r.driver_features & !0xffff_ffff | value,
            1 => r.driver_features = r.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn acceptable(&self) -> Result<(), String> {
        let chosen = self.registers.driver_features;
        if chosen & !self.offered != 0 {
            return Err(format!("features {:#x} were not offered", chosen & !self.offered));
        }
        if chosen & feature::VERSION_1 == 0 {
            return Err("VIRTIO_F_VERSION_1 is required".into());
        }
        self.device.check_features(chosen).map_err(str::to_owned)
    }

    fn write_status(&mut self, value: u8) -> After {
        let old = self.registers.status;
        if value == 0 {
            self.reset();
            return After::Nothing;
        }
        // Bits are only ever added (2.1.1), and only the device sets NEEDS_RESET.
        let mut new = old | value & !status::NEEDS_RESET;
        let added = new & !old;
        let name = self.device.kind().name;
        if added & status::FEATURES_OK != 0
            && let Err(reason) = self.acceptable()
        {
            tracing::info!(device = name, "FEATURES_OK refused: {reason}");
            new &= !status::FEATURES_OK;
        }
        if added & status::DRIVER_OK != 0 && new & status::FEATURES_OK == 0 {
            tracing::info!(device = name, "DRIVER_OK without FEATURES_OK: ignored");
            new &= !status::DRIVER_OK;
        }
        self.registers.status = new;
        if new & !old & status::DRIVER_OK != 0 {
            self.go_live();
            return After::NotifyAll;
        }
        After::Nothing
    }

    fn go_live(&self) {
        self.device.activate(self.registers.driver_features, &self.queues);
        self.queues.set_live(true);
    }

    fn ring_config(&self, q: &QueueRegisters) -> RingConfig {
        let has = |bit| self.registers.driver_features & bit != 0;
        RingConfig {
            size: q.size,
            descriptors: q.descriptors,
            driver: q.driver,
            device: q.device,
            packed: has(feature::RING_PACKED),
            event_idx: has(feature::EVENT_IDX),
            indirect: has(feature::INDIRECT_DESC),
        }
    }

    fn start_queue(&self, index: u16, q: &QueueRegisters, at: RingPosition) -> Result<(), QueueError> {
        let queue = Queue::new(self.queues.memory().clone(), self.ring_config(q), at)?;
        self.queues.enable(index, queue);
        Ok(())
    }

    fn write_enable(&mut self, value: u16) -> After {
        let index = self.registers.queue_select;
        let ready = self.registers.status & status::FEATURES_OK != 0;
        let Some(q) = self.selected().filter(|q| ready && value == 1 && !q.enabled) else {
            return After::Nothing;
        };
        q.enabled = true;
        let q = *q;
        match self.start_queue(index, &q, RingPosition::default()) {
            Ok(()) => After::Notify(index),
            Err(e) => {
                self.queues.fail(format_args!("queue {index} cannot be enabled: {e}"));
                After::Nothing
            }
        }
    }

    /// Resets one queue (2.6.1).
    fn write_reset(&mut self, value: u16) {
        let index = self.registers.queue_select;
        let negotiated = self.registers.driver_features & feature::RING_RESET != 0
            && self.registers.status & status::FEATURES_OK != 0;
        if value == 1 && negotiated && self.selected().is_some_and(|q| q.enabled) {
            self.queues.disable(index);
            self.device.quiesce();
            let size = self.sizes.get(usize::from(index)).copied().unwrap_or(0);
            if let Some(q) = self.selected() {
                *q = QueueRegisters::initial(size);
            }
        }
    }

    /// Back to the state after power-on; returns when no request is in flight any more.
    pub(super) fn reset(&mut self) {
        self.queues.disable_all();
        self.device.quiesce();
        self.device.reset();
        // Last of all: requests that were in flight may still have failed the device.
        self.queues.set_failed(false);
        self.interrupts.reset();
        self.registers = Registers::initial(&self.sizes);
    }

    pub(super) fn registers(&self) -> &Registers {
        &self.registers
    }

    /// Whether [`Self::restore`] can take these.
    pub(super) fn check(&self, saved: &Registers) -> Result<(), String> {
        if saved.queues.len() != self.sizes.len() {
            return Err(format!("it has {} queues, and there are {}", saved.queues.len(), self.sizes.len()));
        }
        let missing = saved.driver_features & !self.offered;
        if saved.status & status::FEATURES_OK != 0 && missing != 0 {
            return Err(format!("features {missing:#x} are in use and not offered here"));
        }
        Ok(())
    }

    /// Goes on from saved registers, after a reset and [`Self::check`]. `positions` says where each
    /// enabled queue stands.
    pub(super) fn restore(
        &mut self,
        saved: &Registers,
        positions: &[Option<RingPosition>],
    ) -> Result<(), String> {
        self.registers = saved.clone();
        for (index, q) in (0..).zip(&saved.queues) {
            let position = positions.get(usize::from(index)).copied().flatten();
            // Those of a failed device have none.
            if let Some(position) = position.filter(|_| q.enabled) {
                self.start_queue(index, q, position).map_err(|e| format!("queue {index}: {e}"))?;
            }
        }
        if saved.status & status::DRIVER_OK != 0 {
            self.go_live();
        }
        Ok(())
    }
}

impl QueueRegisters {
    fn initial(size: u16) -> Self {
        Self { size, enabled: false, descriptors: 0, driver: 0, device: 0 }
    }
}

impl Registers {
    fn initial(sizes: &[u16]) -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: sizes.iter().map(|&size| QueueRegisters::initial(size)).collect(),
        }
    }
}
