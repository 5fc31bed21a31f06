//! ICH9's LPC bridge, function 1f.0 (ICH9 datasheet, order 316972, section 13.1): where power management
//! sits, how PIRQs reach the PIC, and the root complex register block.

use std::sync::{Arc, Mutex, Weak};

use terem_bus::{Bus, Handler, IrqLine, MsiSink, locked};

use super::acpi_pm;
use super::router::{InterruptRouter, PIRQS};
use super::window::Window;
use crate::pci::{ConfigHook, ConfigSize, FunctionBuilder, Identity, PciFunction, Wiring};

/// PMBASE: port in 15:7, bit 0 reads as one (section 13.1.13).
pub const PMBASE: u16 = 0x40;
/// ACPI control: bit 7 maps the power management block; 2:0 is the SCI's IRQ (0 is 9).
pub const ACPI_CNTL: u16 = 0x44;
/// ACPI_CNTL bit 7.
pub const ACPI_EN: u8 = 1 << 7;
/// GPIO base and control, kept.
const GPIOBASE: u16 = 0x48;
const GPIO_CNTL: u16 = 0x4c;
/// PIRQA_ROUT–PIRQD_ROUT, and PIRQE_ROUT–PIRQH_ROUT (section 13.1.17): bits 3:0 IRQ, 7 not routed.
pub const PIRQA_ROUT: u16 = 0x60;
/// See [`PIRQA_ROUT`].
pub const PIRQE_ROUT: u16 = 0x68;
/// Serial IRQ control, kept.
const SIRQ_CNTL: u16 = 0x64;
/// LPC I/O decode ranges and enables, and the generic decode ranges, kept: what is mapped is the
/// board's choice.
const LPC_IO_DEC: u16 = 0x80;
const LPC_EN: u16 = 0x82;
const GEN1_DEC: u16 = 0x84;
/// General power management configuration 1–3, kept.
const GEN_PMCON_1: u16 = 0xa0;
const GEN_PMCON_2: u16 = 0xa2;
const GEN_PMCON_3: u16 = 0xa4;
/// BIOS control, kept.
const BIOS_CNTL: u16 = 0xdc;
/// Root complex base address: 31:14, enable in bit 0 (section 13.1.35).
pub const RCBA: u16 = 0xf0;
/// Bytes of the root complex register block.
const RCRB_LENGTH: u64 = 16 << 10;

/// Where firmware puts power management.
pub const PM_BASE: u16 = 0x600;
/// Where firmware puts the root complex register block.
pub const RCRB_BASE: u32 = 0xfed1_c000;

/// The root complex register block, as far as anybody reads it: interrupt routes of the chip's own
/// devices (DxxIR, fixed at their reset value), and the HPET's place (HPTC: enabled, `FED0_0000h`).
struct RootComplexRegisters;

impl RootComplexRegisters {
    fn dword(offset: u64) -> u32 {
        match offset {
            // D31IR/D30IR, D29IR/D28IR, D27IR, D26IR, D25IR (section 10.1.33 and on).
            0x3140 | 0x3144 => 0x3210_3210,
            0x3148 | 0x314c | 0x3150 => 0x0000_3210,
            0x3404 => 0x80,
            _ => 0,
        }
    }
}

impl Handler for RootComplexRegisters {
    fn read(&self, offset: u64, size: u8) -> Option<u64> {
        let at = offset & !3;
        let wide = u64::from(Self::dword(at)) | u64::from(Self::dword(at + 4)) << 32;
        ((offset & 3) == 0 || size <= 4).then(|| wide >> (8 * (offset & 3)))
    }

    fn write(&self, _offset: u64, _size: u8, _value: u64) -> bool {
        true
    }
}

/// What the bridge moves about.
#[derive(Debug, Default)]
struct Windows {
    power_management: Window,
    root_complex: Window,
}

/// The LPC bridge.
pub struct Ich9Lpc {
    function: Arc<PciFunction>,
    bus: Weak<Bus>,
    router: Arc<InterruptRouter>,
    power_management: Arc<dyn Handler>,
    root_complex: Arc<dyn Handler>,
    windows: Mutex<Windows>,
}

impl std::fmt::Debug for Ich9Lpc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ich9Lpc({:?})", self.windows)
    }
}

impl Ich9Lpc {
    /// The bridge, to be attached at 1f.0. It maps `power_management` (an [`acpi_pm::AcpiPm`]) in the
    /// ports of `bus` and tells `router` the PIRQ routes, as its registers say.
    #[must_use]
    pub fn new(
        bus: &Arc<Bus>,
        msi: Arc<dyn MsiSink>,
        router: Arc<InterruptRouter>,
        power_management: Arc<dyn Handler>,
    ) -> Arc<Self> {
        let identity = Identity {
            vendor_id: 0x8086,
            device_id: 0x2918,
            revision: 2,
            class: 0x06_0100,
            subsystem_vendor_id: 0x1af4,
            subsystem_id: 0x1100,
        };
        let wiring = Wiring { bus: Arc::downgrade(bus), msi, intx: IrqLine::unconnected() };
        let mut b = FunctionBuilder::new(&identity, ConfigSize::Conventional, wiring);
        b.multi_function();
        let c = b.config();
        c.define32(PMBASE, 1, 0xff80);
        c.define8(ACPI_CNTL, 0, 0x87);
        c.define32(GPIOBASE, 1, 0xff80);
        c.define8(GPIO_CNTL, 0, 0x10);
        c.define32(PIRQA_ROUT, 0x8080_8080, 0x8f8f_8f8f);
        c.define8(SIRQ_CNTL, 0x10, 0xff);
        c.define32(PIRQE_ROUT, 0x8080_8080, 0x8f8f_8f8f);
        c.define16(LPC_IO_DEC, 0, 0x1377);
        c.define16(LPC_EN, 0, 0x3f0f);
        for n in 0..4 {
            c.define32(GEN1_DEC + 4 * n, 0, 0x00fc_fffd);
        }
        c.define16(GEN_PMCON_1, 0, 0x0c9f);
        c.define8(GEN_PMCON_2, 0, 0xff);
        c.define8(GEN_PMCON_3, 0, 0xff);
        c.define8(BIOS_CNTL, 0, 0x0f);
        c.define32(RCBA, 0, 0xffff_c001);
        let lpc = Arc::new(Self {
            function: b.build(),
            bus: Arc::downgrade(bus),
            router,
            power_management,
            root_complex: Arc::new(RootComplexRegisters),
            windows: Mutex::default(),
        });
        let hook: Weak<Self> = Arc::downgrade(&lpc);
        lpc.function.set_hook(hook);
        lpc
    }

    /// The PCI function.
    #[must_use]
    pub fn function(&self) -> &Arc<PciFunction> {
        &self.function
    }

    fn routes(function: &PciFunction) -> [u8; PIRQS as usize] {
        let [a, b, c, d] = function.read(PIRQA_ROUT, 4).to_le_bytes();
        let [e, f, g, h] = function.read(PIRQE_ROUT, 4).to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }
}

impl ConfigHook for Ich9Lpc {
    fn written(&self, function: &PciFunction, _offset: u16, _size: u16) {
        self.router.set_pirq_routes(Self::routes(function));
        let Some(bus) = self.bus.upgrade() else { return };
        let mut windows = locked(&self.windows);
        let port = u64::from(function.read(PMBASE, 4) & 0xff80);
        let enabled = function.read(ACPI_CNTL, 1) & u32::from(ACPI_EN) != 0 && port != 0;
        let block = enabled.then_some((port, acpi_pm::LENGTH));
        windows.power_management.place(&bus.ports, "ACPI PM", block, &self.power_management);
        let rcba = u64::from(function.read(RCBA, 4));
        let block = (rcba & 1 != 0).then_some((rcba & 0xffff_c000, RCRB_LENGTH));
        windows.root_complex.place(&bus.mmio, "RCRB", block, &self.root_complex);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chipset::lab::{Events, Lines, Messages};
    use crate::pci::{Address, PciDevice, Pin};
    use terem_bus::{Clock, Device};

    struct Lab {
        bus: Arc<Bus>,
        pic: Arc<Lines>,
        router: Arc<InterruptRouter>,
        lpc: Arc<Ich9Lpc>,
    }

    fn lab() -> Lab {
        let clock = Clock::manual();
        let bus = Arc::new(Bus::new(clock.clone()));
        let (pic, ioapic) = (Arc::new(Lines::default()), Arc::new(Lines::default()));
        let router = InterruptRouter::new(Arc::clone(&pic) as _, ioapic);
        let events = Arc::new(Events::default());
        let pm = acpi_pm::AcpiPm::new(clock, router.isa(9), events, acpi_pm::TimerWidth::Bits32);
        let lpc = Ich9Lpc::new(&bus, Arc::new(Messages::default()), Arc::clone(&router), pm);
        Lab { bus, pic, router, lpc }
    }

    #[test]
    fn power_management_goes_where_pmbase_says() {
        let Lab { bus, lpc, .. } = &lab();
        let f = lpc.function();
        assert_eq!(f.read_config(PMBASE, 4), 1);
        f.write_config(PMBASE, 4, 0x601);
        assert!(bus.ports.regions().is_empty());
        f.write_config(ACPI_CNTL, 1, 0x80);
        bus.clock.advance(1_000_000);
        assert_eq!(bus.ports.read(0x608, 4), 3_579);
        f.write_config(PMBASE, 4, 0xb07f);
        assert_eq!(bus.ports.regions(), [(0xb000, 0xb080, "ACPI PM".into())]);
        f.write_config(PMBASE, 4, 0);
        assert!(bus.ports.regions().is_empty());
        f.write_config(RCBA, 4, RCRB_BASE | 1);
        assert_eq!(bus.mmio.read(0xfed1_f404, 4), 0x80);
        assert_eq!(bus.mmio.read(0xfed1_f140, 8), 0x3210_3210_3210_3210);
        assert_eq!(bus.mmio.read(0xfed1_f142, 2), 0x3210);
    }

    #[test]
    fn pirqs_are_routed_saved_and_reset() {
        let a = lab();
        let line = a.router.intx(Address::new(0, 0), Pin::A);
        line.set(true);
        a.lpc.function().write_config(PIRQE_ROUT, 1, 0x0b);
        assert!(a.pic.level(11));
        a.lpc.function().write_config(PMBASE, 4, 0x600);
        a.lpc.function().write_config(ACPI_CNTL, 1, 0x80);
        let b = lab();
        b.router.intx(Address::new(4, 0), Pin::A).set(true);
        Device::restore(&**b.lpc.function(), &Device::save(&**a.lpc.function()).unwrap()).unwrap();
        assert!(b.pic.level(11));
        assert_eq!(b.bus.ports.regions().len(), 1);
        Device::reset(&**b.lpc.function());
        assert!(!b.pic.level(11) && b.bus.ports.regions().is_empty());
        assert_eq!(b.lpc.function().read_config(PIRQE_ROUT, 4), 0x8080_8080);
        assert_eq!(b.lpc.function().read_config(0, 4), 0x2918_8086);
        assert_eq!(b.lpc.function().read_config(0x0e, 1), 0x80);
    }
}
