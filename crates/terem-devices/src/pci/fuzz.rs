//! What a fuzz target calls: configuration space driven by arbitrary bytes, as a guest may.

use std::sync::Arc;

use terem_bus::{Bus, Clock, Handler, IrqLine, MsiMessage, MsiSink, all_ones};

use super::{
    Address, BarKind, ConfigPorts, ConfigSize, Ecam, FunctionBuilder, Identity, PciError, PciFunction, Pin,
    RootComplex, Wiring, capability,
};

/// Where the ECAM window is.
const ECAM: u64 = 0xb000_0000;
/// Bytes of an operation: kind and width, function, offset (2), value (8).
const OPERATION: usize = 12;

struct Nowhere;

impl MsiSink for Nowhere {
    fn send_msi(&self, _message: MsiMessage) {}
}

struct Zeroes;

impl Handler for Zeroes {
    fn read(&self, _offset: u64, _size: u8) -> Option<u64> {
        Some(0)
    }

    fn write(&self, _offset: u64, _size: u8, _value: u64) -> bool {
        true
    }
}

fn function(bus: &Arc<Bus>, device_id: u16) -> Result<Arc<PciFunction>, PciError> {
    let wiring = Wiring { bus: Arc::downgrade(bus), msi: Arc::new(Nowhere), intx: IrqLine::unconnected() };
    let identity = Identity { vendor_id: 0x1af4, device_id, ..Identity::default() };
    let mut b = FunctionBuilder::new(&identity, ConfigSize::Extended, wiring);
    b.bar(0, BarKind::Io, 0x40, "ports")?;
    b.msix_bar(1, 3)?;
    b.bar(2, BarKind::Memory64 { prefetchable: true }, 0x10_0000, "memory")?;
    b.interrupt_pin(Pin::A);
    b.msi(4)?;
    b.power_management()?;
    b.pci_express(capability::ExpressType::RootComplexIntegrated)?;
    b.extended_capability(0x0b, 1, &[0; 8], &[0xff; 8])?;
    let f = b.build();
    for bar in [0, 2] {
        f.set_bar_handler(bar, Arc::new(Zeroes));
    }
    Ok(f)
}

/// Plays `bytes` as a guest: accesses through `CF8h`/`CFCh`, ECAM and BARs of two functions, interrupts,
/// saving and restoring.
///
/// # Panics
/// When an invariant breaks: identities change, mappings overlap, or a saved state is not taken back.
#[expect(clippy::expect_used, reason = "a fuzz target's finding is a panic")]
pub fn play(bytes: &[u8]) {
    let bus = Arc::new(Bus::new(Clock::manual()));
    let root = Arc::new(RootComplex::default());
    let functions = [0x1041, 0x1042].map(|id| function(&bus, id).expect("these functions can be built"));
    for (slot, f) in (1..).zip(&functions) {
        root.bus().attach(Address::new(slot, 0), Arc::clone(f) as _).expect("slots are free");
    }
    let ports = std::sync::Mutex::new(ConfigPorts::new(Arc::clone(&root), None));
    bus.ports.map(0xcf8, 8, "configuration", Arc::new(ports)).expect("ports are free");
    bus.mmio.map(ECAM, 256 << 20, "ECAM", Arc::new(Ecam::new(Arc::clone(&root)))).expect("it is free");
    for operation in bytes.chunks_exact(OPERATION) {
        let [kind, which, low, high, value @ ..] = operation else { continue };
        let value = value.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        step(&bus, &functions, *kind, *which, u16::from_le_bytes([*low, *high]), value);
        let regions = bus.mmio.regions();
        assert!(regions.windows(2).all(|w| w[0].1 <= w[1].0), "mappings overlap");
        assert_eq!(functions[0].read(0, 4), 0x1041_1af4);
        assert_eq!(functions[1].read(0, 4), 0x1042_1af4);
    }
    root.bus().detach_all();
    assert_eq!(bus.mmio.regions().len(), 1, "only ECAM is left");
}

#[expect(clippy::expect_used, reason = "a fuzz target's finding is a panic")]
fn step(bus: &Bus, functions: &[Arc<PciFunction>; 2], kind: u8, which: u8, offset: u16, value: u64) {
    let size = 1 << (kind >> 6);
    let f = &functions[usize::from(which & 1)];
    let slot = u64::from(which & 1) + 1;
    match kind & 7 {
        0 | 1 => {
            let address = 0x8000_0000 | slot << 11 | u64::from(offset & 0xfc);
            bus.ports.write(0xcf8, 4, address);
            bus.ports.write(0xcfc + u64::from(offset & 3), size, value & all_ones(size));
        }
        2 | 3 => {
            let at = ECAM + (slot << 15) + u64::from(offset & 0xfff);
            bus.mmio.write(at, size, value & all_ones(size));
            assert!(bus.mmio.read(at, size) <= all_ones(size));
        }
        4 => {
            if let Some(at) = f.bar_address(1) {
                bus.mmio.write(at + u64::from(offset & 0xfff), size, value & all_ones(size));
                let _ = bus.mmio.read(at + u64::from(offset & 0xfff), size);
            }
        }
        5 => {
            f.set_intx(value & 1 != 0);
            f.trigger_msi(offset);
            if let Some(v) = f.msix() {
                v.trigger(offset & 7);
            }
        }
        6 => {
            let state = f.save_state();
            f.restore_state(&state).expect("its own state");
            assert_eq!(f.save_state(), state);
        }
        _ if value & 0xff == 0 => f.reset_state(),
        _ => f.set(offset, 4, f.read(offset, 4)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn any_bytes_can_be_played(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            super::play(&bytes);
        }
    }
}
