//! Intel's Q35 with its ICH9, as PCs and other virtual machines have it.
//!
//! ```text
//!   vCPUs ── Bus ─┬─ MCH 00.0 ── ECAM        PCI 01.0 … 1e.0: what is plugged in
//!                 ├─ ICH9 LPC 1f.0 ── ACPI PM, PIRQ routing
//!                 ├─ PIC, I/O APIC <── InterruptRouter <── IRQ lines, INTx pins
//!                 └─ PIT, HPET, RTC, COM1, i8042, fw_cfg, pvpanic, debug exit
//! ```

use std::sync::{Arc, Mutex};

use terem_bus::{ApicBus, Bus, Device, Handler, MapError, MsiSink, locked};
use terem_devices::chipset::BoardEvents;
use terem_devices::chipset::acpi_pm::{self, AcpiPm, SmiPorts, TimerWidth};
use terem_devices::chipset::debug_exit::DebugExit;
use terem_devices::chipset::fw_cfg::FwCfg;
use terem_devices::chipset::hpet::{Hpet, HpetWiring};
use terem_devices::chipset::i8042::{I8042, I8042Port, I8042Ports, Port92};
use terem_devices::chipset::ich9_lpc::{self, Ich9Lpc};
use terem_devices::chipset::ioapic::{IoApic, IoApicLines};
use terem_devices::chipset::mch::{self, Mch};
use terem_devices::chipset::pic::{Pic, PicBlock, PicLines, PicPorts};
use terem_devices::chipset::pit::{Pit, Port61};
use terem_devices::chipset::pvpanic::Pvpanic;
use terem_devices::chipset::reset_control::ResetControl;
use terem_devices::chipset::router::InterruptRouter;
use terem_devices::chipset::rtc::{Rtc, system_wall_clock};
use terem_devices::chipset::uart::{CharBackend, Uart};
use terem_devices::pci::{Address, ConfigPorts, Pin, RootComplex, Wiring};
use terem_devices::virtio::{VirtioDevice, VirtioPci};
use terem_memory::GuestMemory;

use super::bars::Windows;
use super::{Board, BoardError, ports};
use crate::plan::memory::{HPET_BASE, IOAPIC_BASE};
use crate::plan::pci::{self, PciAddress};
use crate::plan::{MemoryMap, Plan};

/// Bytes of the I/O APIC's and the HPET's register blocks.
const IOAPIC_LEN: u64 = 0x1000;
const HPET_LEN: u64 = 0x400;
/// PIC inputs that the PIRQ wires A to H share, as PC firmware has it.
pub(super) const PIC_LINES: [u8; 8] = [10, 10, 11, 11, 10, 10, 11, 11];

/// What a board is connected to.
pub struct Connections {
    /// Ports, addresses and time.
    pub bus: Arc<Bus>,
    /// Guest memory, for devices that access it themselves.
    pub memory: GuestMemory,
    /// The local APICs.
    pub apics: Arc<dyn ApicBus>,
    /// Where messages go.
    pub msi: Arc<dyn MsiSink>,
    /// Who is told of power-off and the like.
    pub events: Arc<dyn BoardEvents>,
    /// Where COM1 prints to.
    pub serial: Box<dyn CharBackend>,
}

impl std::fmt::Debug for Connections {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connections").field("bus", &self.bus).finish_non_exhaustive()
    }
}

/// The board.
pub struct Q35 {
    bus: Arc<Bus>,
    memory: GuestMemory,
    msi: Arc<dyn MsiSink>,
    map: MemoryMap,
    router: Arc<InterruptRouter>,
    root: Arc<RootComplex>,
    power: Arc<Mutex<AcpiPm>>,
    serial: Arc<Mutex<Uart>>,
    /// Kept because their functions hold them weakly.
    _bridges: (Arc<Mch>, Arc<Ich9Lpc>),
    virtio: Vec<Arc<VirtioPci>>,
    /// By name, in the order of restoring: interrupt controllers come last, so that lines which other devices
    /// drive while they are restored do not count as edges.
    devices: Vec<(String, Arc<dyn Device>)>,
    controllers: Vec<(String, Arc<dyn Device>)>,
}

impl std::fmt::Debug for Q35 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Q35").field("pci", self.root.bus()).finish_non_exhaustive()
    }
}

/// Collects devices while they are mapped.
struct Assembly<'a> {
    bus: &'a Bus,
    devices: Vec<(String, Arc<dyn Device>)>,
}

impl Assembly<'_> {
    fn keep(&mut self, name: &str, device: Arc<dyn Device>) {
        self.devices.push((name.into(), device));
    }

    fn port(&self, at: u16, len: u64, name: &str, handler: Arc<dyn Handler>) -> Result<(), MapError> {
        self.bus.ports.map(at.into(), len, name, handler).map(|_| ())
    }

    fn mmio(&self, at: u64, len: u64, name: &str, handler: Arc<dyn Handler>) -> Result<(), MapError> {
        self.bus.mmio.map(at, len, name, handler).map(|_| ())
    }
}

impl Q35 {
    /// The board with everything that is soldered on, in its state after power-on.
    ///
    /// # Errors
    /// [`BoardError`] when places overlap, which would be a mistake in here.
    pub fn new(plan: &Plan, c: Connections) -> Result<Self, BoardError> {
        let Connections { bus, memory, apics, msi, events, serial } = c;
        let mut a = Assembly { bus: &bus, devices: Vec::new() };
        let (router, controllers) = interrupts(&a, &apics)?;
        timers(&mut a, &router, &msi, &plan.memory)?;
        let power = power(&mut a, &router, &events)?;
        let serial = super_io(&mut a, &router, &events, serial)?;
        paravirtual(&mut a, &events, &memory)?;
        let root = Arc::new(RootComplex::default());
        let bridges = bridges(&mut a, &bus, &root, &router, &msi, &power, &events)?;
        let devices = a.devices;
        Ok(Self {
            bus,
            memory,
            msi,
            map: plan.memory.clone(),
            router,
            root,
            power,
            serial,
            _bridges: bridges,
            virtio: Vec::new(),
            devices,
            controllers,
        })
    }

    /// COM1.
    #[must_use]
    pub fn serial(&self) -> &Arc<Mutex<Uart>> {
        &self.serial
    }

    /// Plugs a virtio device into a slot.
    ///
    /// # Errors
    /// [`BoardError`] when the slot is taken or the device has too many queues.
    pub fn plug_in(&mut self, at: PciAddress, device: Arc<dyn VirtioDevice>) -> Result<(), BoardError> {
        let name = format!("{at}/{}", device.kind().name);
        let wiring = Wiring {
            bus: Arc::downgrade(&self.bus),
            msi: Arc::clone(&self.msi),
            intx: self.router.intx(at.0, Pin::A),
        };
        let function = VirtioPci::new(device, self.memory.clone(), wiring)?;
        self.root.bus().attach(at.0, Arc::clone(function.function()) as _)?;
        self.devices.push((name, Arc::clone(&function) as _));
        self.virtio.push(function);
        Ok(())
    }

    /// Registers of the bridges that say where things are, as firmware leaves them.
    fn set_up_bridges(&self) {
        let (mch, lpc) = (pci::host_bridge(), pci::lpc());
        let write = |at: Address, offset, size, value| self.root.write(0, at, offset, size, value);
        let word = |v: u64| u32::try_from(v & 0xffff_ffff).unwrap_or(0);
        write(mch, mch::PCIEXBAR + 4, 4, word(self.map.ecam.base >> 32));
        write(mch, mch::PCIEXBAR, 4, word(self.map.ecam.base) | 1);
        write(lpc, ich9_lpc::PMBASE, 4, u32::from(ports::PM_BASE) | 1);
        write(lpc, ich9_lpc::ACPI_CNTL, 1, ich9_lpc::ACPI_EN.into());
        write(lpc, ich9_lpc::RCBA, 4, ich9_lpc::RCRB_BASE | 1);
        let [a, b, c, d, e, f, g, h] = PIC_LINES;
        write(lpc, ich9_lpc::PIRQA_ROUT, 4, u32::from_le_bytes([a, b, c, d]));
        write(lpc, ich9_lpc::PIRQE_ROUT, 4, u32::from_le_bytes([e, f, g, h]));
    }
}

/// PIC pair and I/O APIC, and the wires in front of them.
type Interrupts = (Arc<InterruptRouter>, Vec<(String, Arc<dyn Device>)>);

fn interrupts(a: &Assembly<'_>, apics: &Arc<dyn ApicBus>) -> Result<Interrupts, MapError> {
    let pic = Arc::new(Mutex::new(Pic::new(Arc::clone(apics))));
    let ioapic = Arc::new(Mutex::new(IoApic::new(Arc::clone(apics))));
    for (at, block) in [(0x20, PicBlock::First), (0xa0, PicBlock::Second), (0x4d0, PicBlock::EdgeLevel)] {
        a.port(at, 2, "PIC", Arc::new(PicPorts::new(Arc::clone(&pic), block)))?;
    }
    a.mmio(IOAPIC_BASE, IOAPIC_LEN, "I/O APIC", Arc::clone(&ioapic) as _)?;
    a.bus.set_interrupt_acknowledge(Arc::new(PicLines(Arc::clone(&pic))));
    let inputs = IoApicLines(Arc::clone(&ioapic));
    a.bus.set_eoi_sink(Arc::new(inputs.clone()));
    let router = InterruptRouter::new(Arc::new(PicLines(Arc::clone(&pic))), Arc::new(inputs));
    Ok((router, vec![("pic".into(), pic as _), ("ioapic".into(), ioapic as _)]))
}

fn timers(
    a: &mut Assembly<'_>,
    router: &Arc<InterruptRouter>,
    msi: &Arc<dyn MsiSink>,
    map: &MemoryMap,
) -> Result<(), MapError> {
    let clock = &a.bus.clock;
    let pit = Pit::new(clock.clone(), router.pit());
    let rtc = Rtc::new(clock.clone(), router.rtc(), system_wall_clock());
    memory_in_cmos(&mut locked(&rtc), map);
    let wiring = HpetWiring {
        gsi: router.all_gsis(),
        legacy: [router.isa(0), router.isa(8)],
        replacement: Arc::clone(router) as _,
        msi: Arc::clone(msi),
    };
    let hpet = Hpet::new(clock.clone(), wiring);
    a.port(0x40, 4, "PIT", Arc::clone(&pit) as _)?;
    a.port(0x61, 1, "PIT, speaker", Arc::new(Port61(Arc::clone(&pit))))?;
    a.port(0x70, 4, "RTC", Arc::clone(&rtc) as _)?;
    a.mmio(HPET_BASE, HPET_LEN, "HPET", Arc::clone(&hpet) as _)?;
    a.keep("pit", pit);
    a.keep("rtc", rtc);
    a.keep("hpet", hpet);
    Ok(())
}

/// Memory sizes where firmware and old systems read them: KiB below 1 MiB, KiB above it, 64 KiB above 16 MiB, 64 KiB
/// above 4 GiB.
fn memory_in_cmos(rtc: &mut Rtc, map: &MemoryMap) {
    const KIB: u64 = 1 << 10;
    let above_1m = (map.low_end - 0x10_0000) / KIB;
    let above_16m = map.low_end.saturating_sub(16 << 20) / (64 * KIB);
    let high = (map.high_end - crate::plan::memory::HIGH_MEMORY) / (64 * KIB);
    let mut put = |index: u8, value: u64, bytes: usize| {
        for (i, byte) in (index..).zip(value.to_le_bytes()).take(bytes) {
            rtc.set_memory(i, byte);
        }
    };
    put(0x15, 640, 2);
    put(0x17, above_1m.min(0xffff), 2);
    put(0x30, above_1m.min(0xffff), 2);
    put(0x34, above_16m.min(0xffff), 2);
    put(0x5b, high.min(0xff_ffff), 3);
}

fn power(
    a: &mut Assembly<'_>,
    router: &Arc<InterruptRouter>,
    events: &Arc<dyn BoardEvents>,
) -> Result<Arc<Mutex<AcpiPm>>, MapError> {
    let sci = router.isa(ports::SCI_IRQ);
    let pm = AcpiPm::new(a.bus.clock.clone(), sci, Arc::clone(events), TimerWidth::Bits32);
    a.port(ports::SMI_COMMAND, 2, "SMI command", Arc::new(SmiPorts(Arc::clone(&pm))))?;
    debug_assert_eq!(acpi_pm::LENGTH, u64::from(ports::PM_LEN));
    a.keep("acpi-pm", Arc::clone(&pm) as _);
    Ok(pm)
}

/// Serial port, keyboard and mouse.
fn super_io(
    a: &mut Assembly<'_>,
    router: &Arc<InterruptRouter>,
    events: &Arc<dyn BoardEvents>,
    backend: Box<dyn CharBackend>,
) -> Result<Arc<Mutex<Uart>>, MapError> {
    let serial = Arc::new(Mutex::new(Uart::new(router.isa(ports::COM1_IRQ), backend)));
    a.port(ports::COM1, 8, "COM1", Arc::clone(&serial) as _)?;
    let keyboard = I8042::new(router.isa(1), router.isa(12), Arc::clone(events));
    let keyboard = Arc::new(Mutex::new(keyboard));
    for (at, port) in [(0x60, I8042Port::Data), (0x64, I8042Port::Command)] {
        a.port(at, 1, "i8042", Arc::new(I8042Ports::new(Arc::clone(&keyboard), port)))?;
    }
    a.port(0x92, 1, "A20, fast reset", Arc::new(Port92(Arc::clone(&keyboard))))?;
    a.keep("com1", Arc::clone(&serial) as _);
    a.keep("i8042", keyboard);
    Ok(serial)
}

/// What only virtual machines have.
fn paravirtual(
    a: &mut Assembly<'_>,
    events: &Arc<dyn BoardEvents>,
    memory: &GuestMemory,
) -> Result<(), MapError> {
    let fw_cfg = Arc::new(Mutex::new(FwCfg::new(memory.clone())));
    a.port(ports::FW_CFG, ports::FW_CFG_LEN.into(), "fw_cfg", Arc::clone(&fw_cfg) as _)?;
    a.port(ports::PVPANIC, 1, "pvpanic", Arc::new(Pvpanic::new(Arc::clone(events))))?;
    a.port(ports::DEBUG_EXIT, 4, "debug exit", Arc::new(DebugExit::new(Arc::clone(events))))?;
    a.keep("fw-cfg", fw_cfg);
    Ok(())
}

/// The host bridge, the LPC bridge, and the ways to configuration space.
fn bridges(
    a: &mut Assembly<'_>,
    bus: &Arc<Bus>,
    root: &Arc<RootComplex>,
    router: &Arc<InterruptRouter>,
    msi: &Arc<dyn MsiSink>,
    power: &Arc<Mutex<AcpiPm>>,
    events: &Arc<dyn BoardEvents>,
) -> Result<(Arc<Mch>, Arc<Ich9Lpc>), BoardError> {
    let reset = Arc::new(Mutex::new(ResetControl::new(Arc::clone(events))));
    let config = ConfigPorts::new(Arc::clone(root), Some(Arc::clone(&reset) as _));
    let config = Arc::new(Mutex::new(config));
    a.port(0xcf8, 8, "PCI configuration, reset", Arc::clone(&config) as _)?;
    let mch = Mch::new(root, bus, Arc::clone(msi));
    let lpc = Ich9Lpc::new(bus, Arc::clone(msi), Arc::clone(router), Arc::clone(power) as _);
    root.bus().attach(pci::host_bridge(), Arc::clone(mch.function()) as _)?;
    root.bus().attach(pci::lpc(), Arc::clone(lpc.function()) as _)?;
    a.keep("reset-control", reset);
    a.keep("pci-config-ports", config);
    a.keep("mch", Arc::clone(mch.function()) as _);
    a.keep("ich9-lpc", Arc::clone(lpc.function()) as _);
    Ok((mch, lpc))
}

impl Board for Q35 {
    fn devices(&self) -> Vec<(String, Arc<dyn Device>)> {
        self.devices.iter().chain(&self.controllers).cloned().collect()
    }

    fn set_up(&self) {
        self.set_up_bridges();
        Windows::new(self.map.pci32, self.map.pci64).assign(&self.root);
    }

    fn pause(&self) {
        for device in &self.virtio {
            device.pause();
        }
    }

    fn resume(&self) {
        for device in &self.virtio {
            device.resume();
        }
    }

    fn power_button(&self) {
        locked(&self.power).press_power_button();
    }

    fn take_down(&self) {
        self.root.bus().detach_all();
    }
}
