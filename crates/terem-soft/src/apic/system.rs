//! All local APICs of a machine, as devices and other processors reach them.

use terem_bus::{MsiMessage, MsiSink};

use super::*;

/// All local APICs of a machine.
pub(crate) struct ApicSystem {
    pub(super) apics: Vec<Arc<Apic>>,
    pub(super) bus: Arc<Bus>,
}

impl ApicSystem {
    pub(crate) fn new(ids: &[u32], bus: Arc<Bus>) -> Arc<Self> {
        let apics = ids.iter().enumerate().map(|(i, &id)| Arc::new(Apic::new(id, i == 0))).collect();
        let system = Arc::new(Self { apics, bus });
        for apic in &system.apics {
            apic.connect(&system);
        }
        system
    }

    /// Asks all vCPUs that run to look up; wakes nobody.
    pub(crate) fn look_again(&self) {
        for apic in &self.apics {
            // In this order for all: it is seen, or there is nothing to stop.
            apic.attention.store(true, Ordering::SeqCst);
            apic.stop_direct_run();
        }
    }

    /// How many vCPUs there are.
    pub(crate) fn count(&self) -> usize {
        self.apics.len()
    }

    pub(crate) fn apic(&self, index: usize) -> Option<Arc<Apic>> {
        self.apics.get(index).cloned()
    }
}

impl ApicBus for ApicSystem {
    fn deliver(&self, message: ApicMessage) {
        let named = self.apics.iter().filter(|a| a.is_named_by(&message));
        if message.mode == DeliveryMode::LowestPriority {
            // The named one with the lowest task priority; the first of equals.
            let priority = |a: &&Arc<Apic>| locked(&a.registers).ppr();
            if let Some(apic) = named.min_by_key(priority) {
                apic.accept(message);
            }
            return;
        }
        for apic in named {
            apic.accept(message);
        }
    }

    fn set_intr(&self, high: bool) {
        for apic in &self.apics {
            let mut r = locked(&apic.registers);
            let news = r.intr != high;
            r.intr = high;
            drop(r);
            if news && high {
                apic.attend();
            }
        }
    }

    fn pulse_nmi(&self) {
        for apic in &self.apics {
            locked(&apic.registers).local(reg::LVT_LINT1);
            apic.attend();
        }
    }

    fn pulse_smi(&self) {
        for apic in &self.apics {
            locked(&apic.registers).smi = true;
            apic.attend();
        }
    }
}

impl MsiSink for ApicSystem {
    fn send_msi(&self, message: MsiMessage) {
        self.deliver(message.to_apic());
    }
}
