//! DSDT: the board's devices in AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, Or, Package, PackageBuilder, Path,
    ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{Description, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::board::ports;
use crate::plan::memory::{HPET_BASE, Window};
use crate::plan::pci::{self, INTX_PINS, SLOTS};

/// A piece of AML.
struct Code(Vec<u8>);

impl Aml for Code {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn code(aml: &dyn Aml) -> Code {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    Code(bytes)
}

fn join(parts: &[Code]) -> Code {
    Code(parts.iter().flat_map(|c| c.0.iter().copied()).collect())
}

/// The DSDT. Integers in it have 64 bits (revision 2 and up).
pub(super) fn dsdt(d: &Description<'_>) -> Sdt {
    let mut t = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let parts = [sleep_states(), system_bus(d)];
    t.append_slice(&join(&parts).0);
    t
}

/// Soft off is the only one.
fn sleep_states() -> Code {
    let kind = ports::SLEEP_TYPE_S5;
    code(&Name::new("_S5_".into(), &Package::new(vec![&kind, &kind, &ZERO, &ZERO])))
}

fn system_bus(d: &Description<'_>) -> Code {
    let mut parts = vec![motherboard(d), hpet()];
    parts.extend((0..d.cpus).map(processor));
    parts.push(host_bridge(d));
    code(&Scope::new("_SB_".into(), vec![&join(&parts)]))
}

/// A 32-bit address of a device below 4 GiB.
fn low(addr: u64) -> u32 {
    u32::try_from(addr).unwrap_or(u32::MAX)
}

/// Resources that are taken and belong to no device in here.
fn motherboard(d: &Description<'_>) -> Code {
    let ecam = Memory32Fixed::new(true, low(d.map.ecam.base), low(d.map.ecam.size));
    let pm = IO::new(ports::PM_BASE, ports::PM_BASE, 1, ports::PM_LEN);
    let smi = IO::new(ports::SMI_COMMAND, ports::SMI_COMMAND, 1, 2);
    let resources = ResourceTemplate::new(vec![&ecam, &pm, &smi]);
    let hid = EISAName::new("PNP0C02");
    let (id, uid, crs) = (
        Name::new("_HID".into(), &hid),
        Name::new("_UID".into(), &1_u8),
        Name::new("_CRS".into(), &resources),
    );
    code(&Device::new("MBRD".into(), vec![&id, &uid, &crs]))
}

fn hpet() -> Code {
    let resources = [code(&Memory32Fixed::new(false, low(HPET_BASE), 0x400))];
    device("HPET", "PNP0103", &resources)
}

/// A device with a name, a hardware ID and resources.
fn device(name: &str, hid: &str, resources: &[Code]) -> Code {
    let resources: Vec<&dyn Aml> = resources.iter().map(|r| r as &dyn Aml).collect();
    let template = ResourceTemplate::new(resources);
    let crs = Name::new("_CRS".into(), &template);
    let id = EISAName::new(hid);
    code(&Device::new(Path::new(name), vec![&Name::new("_HID".into(), &id), &crs]))
}

fn processor(index: u32) -> Code {
    // Three hexadecimal digits name 4096 processors.
    let name = format!("C{:03X}", index & 0xfff);
    let (hid, uid) = (Name::new("_HID".into(), &"ACPI0007"), Name::new("_UID".into(), &index));
    code(&Device::new(Path::new(&name), vec![&hid, &uid]))
}

fn host_bridge(d: &Description<'_>) -> Code {
    let (hid, cid) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    let ids = [
        code(&Name::new("_HID".into(), &hid)),
        code(&Name::new("_CID".into(), &cid)),
        code(&Name::new("_SEG".into(), &ZERO)),
        code(&Name::new("_BBN".into(), &ZERO)),
        code(&Name::new("_UID".into(), &ZERO)),
    ];
    let parts = [join(&ids), windows(d), routing(), capabilities(), isa(d)];
    code(&Device::new("PCI0".into(), vec![&join(&parts)]))
}

/// Buses, ports and addresses that the bridge passes on.
fn windows(d: &Description<'_>) -> Code {
    let buses = AddressSpace::new_bus_number(0_u16, 0xff);
    let config = IO::new(0xcf8, 0xcf8, 1, 8);
    let low_ports = AddressSpace::new_io(0_u16, 0x0cf7, None);
    let high_ports = AddressSpace::new_io(0x0d00_u16, 0xffff, None);
    let last = |w: Window| w.end() - 1;
    let (w32, w64) = (d.map.pci32, d.map.pci64);
    let not_cached = AddressSpaceCacheable::NotCacheable;
    let memory32 = AddressSpace::new_memory(not_cached, true, low(w32.base), low(last(w32)), None);
    let memory64 =
        AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, w64.base, last(w64), None);
    let all = ResourceTemplate::new(vec![&buses, &config, &low_ports, &high_ports, &memory32, &memory64]);
    code(&Name::new("_CRS".into(), &all))
}

/// `_PRT`: which I/O APIC input each slot's INTx pin arrives at.
fn routing() -> Code {
    let mut table = PackageBuilder::new();
    // Slot 0 is the host bridge itself. 255 entries are the most that a package may have.
    for slot in 1..SLOTS {
        for (number, pin) in (0_u8..).zip(INTX_PINS) {
            let address = u32::from(slot) << 16 | 0xffff;
            let entry: Vec<Code> =
                vec![code(&address), code(&number), code(&ZERO), code(&pci::gsi(slot, pin))];
            table.add_element(&Package::new(entry.iter().map(|e| e as &dyn Aml).collect()));
        }
    }
    code(&Name::new("_PRT".into(), &table))
}

/// `_OSC` (PCI Firmware 3.2, 4.5.1): the system gets all PCI Express features except the standard hot-plug
/// controller's, which is not there.
fn capabilities() -> Code {
    const PCI_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
    const GRANTED: u8 = 0x1d;
    let (cdw1, cdw2, cdw3) = (Path::new("CDW1"), Path::new("CDW2"), Path::new("CDW3"));
    let uuid = Uuid::new(PCI_UUID);
    let ours = [
        code(&CreateDWordField::new(&cdw2, &Arg(3), &4_u8)),
        code(&CreateDWordField::new(&cdw3, &Arg(3), &8_u8)),
        code(&Store::new(&Local(0), &cdw3)),
        code(&And::new(&Local(0), &Local(0), &GRANTED)),
        // An unknown revision, and bits that were not granted.
        code(&If::new(&NotEqual::new(&Arg(1), &1_u8), vec![&Or::new(&cdw1, &cdw1, &8_u8)])),
        code(&If::new(&NotEqual::new(&cdw3, &Local(0)), vec![&Or::new(&cdw1, &cdw1, &0x10_u8)])),
        code(&Store::new(&cdw3, &Local(0))),
    ];
    let body = [
        code(&CreateDWordField::new(&cdw1, &Arg(3), &0_u8)),
        code(&If::new(&Equal::new(&Arg(0), &uuid), vec![&join(&ours)])),
        code(&Else::new(vec![&Or::new(&cdw1, &cdw1, &4_u8)])), // unknown UUID
        code(&Return::new(&Arg(3))),
    ];
    code(&Method::new("_OSC".into(), 4, false, vec![&join(&body)]))
}

/// The LPC bridge and what is behind it.
fn isa(d: &Description<'_>) -> Code {
    let port = |at: u16, len: u8| code(&IO::new(at, at, 1, len));
    // Edge-triggered, active high, not shared: ISA.
    let irq = |n: u8| code(&Interrupt::new(true, true, false, false, n.into()));
    let address = u32::from(pci::lpc().device()) << 16 | u32::from(pci::lpc().function());
    let mut devices = vec![
        code(&Name::new("_ADR".into(), &address)),
        device("PIC_", "PNP0000", &[port(0x20, 2), port(0xa0, 2), port(0x4d0, 2), irq(2)]),
        device("PIT_", "PNP0100", &[port(0x40, 4), irq(0)]),
        device("SPKR", "PNP0800", &[port(0x61, 1)]),
        device("RTC_", "PNP0B00", &[port(0x70, 2), irq(8)]),
        device("KBD_", "PNP0303", &[port(0x60, 1), port(0x64, 1), irq(1)]),
        device("MOU_", "PNP0F13", &[irq(12)]),
        device("COM1", "PNP0501", &[port(ports::COM1, 8), irq(ports::COM1_IRQ)]),
        named("FWCF", "QEMU0002", &port(ports::FW_CFG, ports::FW_CFG_LEN)),
    ];
    if d.pvpanic {
        devices.push(named("PEVT", "QEMU0001", &port(ports::PVPANIC, 1)));
    }
    code(&Device::new("ISA_".into(), vec![&join(&devices)]))
}

/// A device with an ACPI ID that is present and not shown to the user.
fn named(name: &str, hid: &'static str, resource: &Code) -> Code {
    let template = ResourceTemplate::new(vec![resource]);
    let (hid, sta, crs) = (
        Name::new("_HID".into(), &hid),
        Name::new("_STA".into(), &0x0b_u8),
        Name::new("_CRS".into(), &template),
    );
    code(&Device::new(Path::new(name), vec![&hid, &sta, &crs]))
}
