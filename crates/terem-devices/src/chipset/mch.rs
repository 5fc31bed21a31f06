//! The q35's memory controller hub, function 00.0 (Intel 3 Series Express Chipset Family datasheet,
//! order 316966, section 5.1): the ECAM window, and the registers of RAM shadowing and SMRAM.

use std::sync::{Arc, Mutex, Weak};

use terem_bus::{Bus, Handler, IrqLine, MsiSink, locked};

use super::window::Window;
use crate::pci::{ConfigHook, ConfigSize, Ecam, FunctionBuilder, Identity, PciFunction, RootComplex, Wiring};

/// PCIEXBAR, 64 bits: base in 35:26, length in 2:1, enable in bit 0.
pub const PCIEXBAR: u16 = 0x60;
/// PAM0–PAM6: what of `C0000h`–`FFFFFh` is RAM. Kept; shadowing comes with firmware.
const PAM0: u16 = 0x90;
/// SMRAM and extended SMRAM control. Kept; there is no system management mode.
const SMRAM: u16 = 0x9d;
const ESMRAMC: u16 = 0x9e;

/// Where firmware puts the ECAM window.
pub const ECAM_BASE: u64 = 0xb000_0000;
/// Its length there: 256 buses.
pub const ECAM_LENGTH: u64 = 256 * Ecam::BYTES_PER_BUS;

/// The host bridge.
#[derive(Debug)]
pub struct Mch {
    function: Arc<PciFunction>,
    bus: Weak<Bus>,
    ecam: Mutex<Window>,
    root: Weak<RootComplex>,
}

impl Mch {
    /// The host bridge of `root`, to be attached at 00.0. It maps ECAM in `bus` as PCIEXBAR says, so
    /// not before firmware (or a board that does firmware's work) has programmed it.
    #[must_use]
    pub fn new(root: &Arc<RootComplex>, bus: &Arc<Bus>, msi: Arc<dyn MsiSink>) -> Arc<Self> {
        let identity = Identity {
            vendor_id: 0x8086,
            device_id: 0x29c0,
            revision: 2,
            class: 0x06_0000,
            subsystem_vendor_id: 0x1af4,
            subsystem_id: 0x1100,
        };
        let wiring = Wiring { bus: Arc::downgrade(bus), msi, intx: IrqLine::unconnected() };
        let mut b = FunctionBuilder::new(&identity, ConfigSize::Conventional, wiring);
        let c = b.config();
        c.define32(PCIEXBAR, 0xe000_0000, 0xfc00_0007);
        c.define32(PCIEXBAR + 4, 0, 0xf);
        for i in 0..7 {
            // PAM0 has only its upper half: F0000h–FFFFFh.
            c.define8(PAM0 + i, 0, if i == 0 { 0x30 } else { 0x33 });
        }
        c.define8(SMRAM, 0x02, 0x78);
        c.define8(ESMRAMC, 0x38, 0x87);
        let mch = Arc::new(Self {
            function: b.build(),
            bus: Arc::downgrade(bus),
            ecam: Mutex::default(),
            root: Arc::downgrade(root),
        });
        let hook: Weak<Self> = Arc::downgrade(&mch);
        mch.function.set_hook(hook);
        mch
    }

    /// The PCI function.
    #[must_use]
    pub fn function(&self) -> &Arc<PciFunction> {
        &self.function
    }

    /// Address and length of the window that PCIEXBAR asks for.
    fn wanted(register: u64) -> Option<(u64, u64)> {
        let buses = match register >> 1 & 3 {
            0 => 256,
            1 => 128,
            2 => 64,
            _ => return None,
        };
        let len = buses * Ecam::BYTES_PER_BUS;
        let base = register & 0xf_fc00_0000 & !(len - 1);
        (register & 1 != 0).then_some((base, len))
    }
}

impl ConfigHook for Mch {
    fn written(&self, function: &PciFunction, offset: u16, size: u16) {
        if offset >= PCIEXBAR + 8 || offset.saturating_add(size) <= PCIEXBAR {
            return;
        }
        let register =
            u64::from(function.read(PCIEXBAR, 4)) | u64::from(function.read(PCIEXBAR + 4, 4)) << 32;
        if let (Some(bus), Some(root)) = (self.bus.upgrade(), self.root.upgrade()) {
            let ecam: Arc<dyn Handler> = Arc::new(Ecam::new(root));
            locked(&self.ecam).place(&bus.mmio, "ECAM", Self::wanted(register), &ecam);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::lab::Messages;
    use crate::pci::{Address, PciDevice};
    use terem_bus::{Clock, Device};

    struct Lab {
        bus: Arc<Bus>,
        _root: Arc<RootComplex>,
        mch: Arc<Mch>,
    }

    fn lab() -> Lab {
        let (bus, root) = (Arc::new(Bus::new(Clock::manual())), Arc::new(RootComplex::default()));
        let mch = Mch::new(&root, &bus, Arc::new(Messages::default()));
        root.bus().attach(Address::new(0, 0), Arc::clone(mch.function()) as _).unwrap();
        Lab { bus, _root: root, mch }
    }

    #[test]
    fn pciexbar_maps_and_moves_ecam() {
        let Lab { bus, mch, .. } = &lab();
        assert!(bus.mmio.regions().is_empty());
        let write = |offset, value| mch.function().write_config(offset, 4, value);
        write(PCIEXBAR, 0xb000_0001);
        assert_eq!(bus.mmio.regions(), [(ECAM_BASE, ECAM_BASE + ECAM_LENGTH, "ECAM".into())]);
        assert_eq!(bus.mmio.read(ECAM_BASE, 4), 0x29c0_8086);
        // A write through the window that moves the window.
        bus.mmio.write(ECAM_BASE + 0x60, 4, 0xc400_0005);
        assert_eq!(bus.mmio.regions(), [(0xc400_0000, 0xc800_0000, "ECAM".into())]);
        write(PCIEXBAR + 4, 0xffff_ffff);
        assert_eq!(bus.mmio.regions()[0].0, 0xf_c400_0000);
        write(PCIEXBAR, 0xc400_0007);
        assert!(bus.mmio.regions().is_empty(), "a reserved length");
        write(PCIEXBAR, 0xc400_0004);
        assert!(bus.mmio.regions().is_empty());
    }

    #[test]
    fn shadow_registers_are_kept_saved_and_reset() {
        let a = lab();
        for i in 0..7 {
            a.mch.function().write_config(0x90 + i, 1, 0xff);
        }
        assert_eq!(a.mch.function().read_config(0x90, 4), 0x3333_3330);
        a.mch.function().write_config(PCIEXBAR, 4, 0xb000_0001);
        let b = lab();
        Device::restore(&**b.mch.function(), &Device::save(&**a.mch.function()).unwrap()).unwrap();
        assert_eq!(b.mch.function().read_config(0x93, 4), 0x3333_3333);
        assert_eq!(b.bus.mmio.read(ECAM_BASE, 2), 0x8086);
        Device::reset(&**b.mch.function());
        assert!(b.bus.mmio.regions().is_empty());
        assert_eq!(b.mch.function().read_config(PCIEXBAR, 4), 0xe000_0000);
    }
}
