use super::*;
use crate::pci::function::tests::{Level, Messages};
use crate::pci::{ConfigSize, FunctionBuilder, Identity, PciFunction, Wiring};
use proptest::prelude::*;
use std::sync::Weak;
use terem_bus::IrqLine;

fn function(device_id: u16) -> Arc<PciFunction> {
    let wiring = Wiring {
        bus: Weak::new(),
        msi: Arc::new(Messages::default()),
        intx: IrqLine::new(Arc::new(Level::default()), 0),
    };
    let id = Identity { vendor_id: 0x8086, device_id, ..Identity::default() };
    FunctionBuilder::new(&id, ConfigSize::Extended, wiring).build()
}

fn root() -> Arc<RootComplex> {
    let root = Arc::new(RootComplex::default());
    root.bus().attach(Address::new(0, 0), function(0x29c0)).unwrap();
    root.bus().attach(Address::new(31, 0), function(0x2918)).unwrap();
    root
}

#[test]
fn the_ports_reach_functions_in_all_widths() {
    let root = root();
    let mut p = ConfigPorts::new(Arc::clone(&root), None);
    assert_eq!(Registers::read(&mut p, 4, 4), None, "not enabled");
    assert!(Registers::write(&mut p, 0, 4, 0x8000_f803));
    assert_eq!(Registers::read(&mut p, 0, 4), Some(0x8000_f800), "bits 1:0 read as zero");
    assert_eq!(Registers::read(&mut p, 4, 4), Some(0x2918_8086));
    assert_eq!(Registers::read(&mut p, 6, 2), Some(0x2918));
    assert_eq!(Registers::read(&mut p, 7, 1), Some(0x29));
    assert_eq!(Registers::read(&mut p, 0, 1), None, "bytes do not reach the address");
    Registers::write(&mut p, 0, 4, 0x8000_0804);
    assert_eq!(Registers::read(&mut p, 4, 4), Some(0xffff_ffff), "nobody there");
    Registers::write(&mut p, 0, 4, 0x8001_0000);
    assert_eq!(Registers::read(&mut p, 4, 2), Some(0xffff_ffff), "no bus 1 (the bus cuts the width)");
    Registers::write(&mut p, 0, 4, 0x8000_003c);
    Registers::write(&mut p, 4, 1, 0x0b);
    assert_eq!(root.read(0, Address::new(0, 0), 0x3c, 1), 0x0b);
}

#[test]
fn a_byte_at_cf9_is_the_reset_register() {
    struct Reset(u8);
    impl Registers for Reset {
        fn read(&mut self, _offset: u64, _size: u8) -> Option<u64> {
            Some(u64::from(self.0))
        }
        fn write(&mut self, _offset: u64, _size: u8, value: u64) -> bool {
            self.0 = value.to_le_bytes()[0];
            true
        }
    }
    let reset = Arc::new(Mutex::new(Reset(0)));
    let mut p = ConfigPorts::new(root(), Some(Arc::clone(&reset) as _));
    assert!(Registers::write(&mut p, 1, 1, 6));
    assert_eq!(locked(&reset).0, 6);
    assert_eq!(Registers::read(&mut p, 1, 1), Some(6));
    assert_eq!(Registers::read(&mut p, 0, 4), Some(0));
}

#[test]
fn ecam_splits_its_address_as_the_specification_does() {
    let root = root();
    let e = Ecam::new(Arc::clone(&root));
    assert_eq!(e.read(0, 4), Some(0x29c0_8086));
    assert_eq!(e.read(0x1f << 15, 8), Some(0x2918_8086));
    assert_eq!(e.read(1 << 20, 4), Some(0xffff_ffff));
    assert_eq!(e.read(1 << 15, 8), Some(u64::MAX));
    assert!(e.write((0x1f << 15) + 0x3c, 4, 0x55));
    assert_eq!(root.read(0, Address::new(31, 0), 0x3c, 2), 0x55);
    assert_eq!(e.read(2, 4), Some(0x29c0), "an access across dwords is split; command is zero");
}

#[test]
fn addresses_are_unique_and_printable() {
    let root = root();
    let at = Address::new(31, 0);
    assert_eq!(root.bus().attach(at, function(1)), Err(PciError::Taken(at)));
    assert_eq!(PciError::Taken(at).to_string(), "PCI address 1f.0 is taken");
    root.bus().detach_all();
    assert!(root.bus().addresses().is_empty());
    assert_eq!(root.read(0, at, 0, 4), u32::MAX);
}

#[test]
fn the_address_latch_is_saved() {
    let mut a = ConfigPorts::new(root(), None);
    Registers::write(&mut a, 0, 4, 0x8000_f800);
    let mut b = ConfigPorts::new(root(), None);
    b.restore(a.save()).unwrap();
    assert_eq!(Registers::read(&mut b, 4, 4), Some(0x2918_8086));
    b.reset();
    assert_eq!(Registers::read(&mut b, 0, 4), Some(0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Any access through either window is answered, and ports and ECAM agree on the first 256 bytes.
    #[test]
    fn both_windows_show_the_same(
        accesses in prop::collection::vec((any::<u32>(), 0_u64..8, any::<u64>()), 0..40)
    ) {
        let root = root();
        let mut p = ConfigPorts::new(Arc::clone(&root), None);
        let e = Ecam::new(Arc::clone(&root));
        for (address, offset, value) in accesses {
            let size = [1, 2, 4, 8][usize::from(value.to_le_bytes()[0] & 3)];
            Registers::write(&mut p, 0, 4, u64::from(address | ENABLE));
            Registers::write(&mut p, offset, size, value);
            e.write(u64::from(address & 0xfff_ffff), size, value);
            Registers::write(&mut p, 0, 4, u64::from(0x8000_f800 | address & 0xfc));
            prop_assert_eq!(Registers::read(&mut p, 4, 4), e.read(0xf_8000 | u64::from(address & 0xfc), 4));
        }
        prop_assert_eq!(e.read(0, 4), Some(0x29c0_8086));
    }
}
