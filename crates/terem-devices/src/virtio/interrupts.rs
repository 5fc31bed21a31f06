//! A virtio PCI function's interrupts: MSI-X vectors chosen by the driver, or INTx with the ISR register.

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use terem_bus::locked;

use super::device::Interrupts;
use crate::pci::{MsixVectors, PciFunction};

/// `VIRTIO_MSI_NO_VECTOR` (virtio 1.2, 4.1.4.3).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// ISR status bits (virtio 1.2, 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Interrupts of one function.
#[derive(Debug)]
pub(super) struct PciInterrupts {
    function: Arc<PciFunction>,
    msix: Arc<MsixVectors>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    /// The ISR status register. The lock also keeps the pin in step with it.
    isr: Mutex<u8>,
}

impl PciInterrupts {
    pub(super) fn new(function: Arc<PciFunction>, msix: Arc<MsixVectors>, queues: usize) -> Self {
        Self {
            function,
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: Mutex::new(0),
        }
    }

    /// A vector that the driver asks for: what there is none of becomes [`NO_VECTOR`], by which the
    /// driver sees that it was refused.
    fn possible(&self, vector: u16) -> u16 {
        if vector < self.msix.count() { vector } else { NO_VECTOR }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.possible(vector), Ordering::Release);
    }

    pub(super) fn queue_vector(&self, index: u16) -> u16 {
        self.queue_vectors.get(usize::from(index)).map_or(NO_VECTOR, |v| v.load(Ordering::Acquire))
    }

    pub(super) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(v) = self.queue_vectors.get(usize::from(index)) {
            v.store(self.possible(vector), Ordering::Release);
        }
    }

    /// No vectors, and nothing pending.
    pub(super) fn reset(&self) {
        self.set_config_vector(NO_VECTOR);
        for v in &self.queue_vectors {
            v.store(NO_VECTOR, Ordering::Release);
        }
        self.set_isr(0);
    }

    /// The driver reads the ISR status, which clears it and lowers the pin.
    pub(super) fn take_isr(&self) -> u8 {
        let mut isr = locked(&self.isr);
        self.function.set_intx(false);
        std::mem::take(&mut *isr)
    }

    pub(super) fn isr(&self) -> u8 {
        *locked(&self.isr)
    }

    pub(super) fn set_isr(&self, value: u8) {
        let mut isr = locked(&self.isr);
        *isr = value;
        self.function.set_intx(value != 0);
    }

    fn raise(&self, vector: u16, isr_bit: u8) {
        if self.msix.enabled() {
            self.msix.trigger(vector);
        } else {
            let mut isr = locked(&self.isr);
            *isr |= isr_bit;
            self.function.set_intx(true);
        }
    }
}

impl Interrupts for PciInterrupts {
    fn queue_used(&self, index: u16) {
        self.raise(self.queue_vector(index), ISR_QUEUE);
    }

    fn config_changed(&self) {
        self.raise(self.config_vector(), ISR_CONFIG);
    }
}
