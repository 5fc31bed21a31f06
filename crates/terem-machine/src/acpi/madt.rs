//! MADT: interrupt controllers (ACPI 6.5, 5.2.12).

use acpi_tables::sdt::Sdt;

use super::{Description, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::board::ports;
use crate::plan::memory::{IOAPIC_BASE, LAPIC_BASE};

const REVISION: u8 = 5;
/// Flag: there is a PIC pair, too.
const PCAT_COMPAT: u32 = 1;
/// Local APIC flag: the processor can be used.
const ENABLED: u32 = 1;
/// Above these IDs a local APIC needs an x2APIC entry.
const LAST_XAPIC_ID: u32 = 254;
/// The I/O APIC's ID. It has a number space of its own.
const IOAPIC_ID: u8 = 0;
/// Interrupt source override flags: level-triggered, active high (table 5.26).
const LEVEL_HIGH: u16 = 0b1101;
/// As the bus has it: for ISA edge-triggered, active high.
const CONFORMS: u16 = 0;
/// NMI comes in on LINT1.
const NMI_LINT: u8 = 1;

/// One structure: type, length, fields.
fn structure(body: &mut Vec<u8>, kind: u8, fields: &[&[u8]]) {
    let len = 2 + fields.iter().map(|f| f.len()).sum::<usize>();
    body.extend([kind, u8::try_from(len).unwrap_or(0)]);
    for field in fields {
        body.extend_from_slice(field);
    }
}

pub(super) fn madt(d: &Description<'_>) -> Sdt {
    let mut t = Vec::new();
    let lapic = u32::try_from(LAPIC_BASE).unwrap_or(0);
    let ioapic = u32::try_from(IOAPIC_BASE).unwrap_or(0);
    t.extend(lapic.to_le_bytes());
    t.extend(PCAT_COMPAT.to_le_bytes());
    for index in 0..d.cpus {
        let id = d.topology.apic_id(index);
        match (u8::try_from(id), u8::try_from(index)) {
            (Ok(id), Ok(uid)) if u32::from(id) <= LAST_XAPIC_ID => {
                structure(&mut t, 0, &[&[uid, id], &ENABLED.to_le_bytes()]);
            }
            _ => {
                let fields = [id, ENABLED, index].map(u32::to_le_bytes);
                structure(&mut t, 9, &[&[0, 0], &fields[0], &fields[1], &fields[2]]);
            }
        }
    }
    structure(&mut t, 1, &[&[IOAPIC_ID, 0], &ioapic.to_le_bytes(), &0_u32.to_le_bytes()]);
    // ISA interrupts that do not arrive at the input of their number, or not as ISA interrupts do.
    let mut source_override = |irq: u8, gsi: u32, flags: u16| {
        structure(&mut t, 2, &[&[0, irq], &gsi.to_le_bytes(), &flags.to_le_bytes()]);
    };
    source_override(0, 2, CONFORMS);
    source_override(ports::SCI_IRQ, ports::SCI_IRQ.into(), LEVEL_HIGH);
    structure(&mut t, 4, &[&[0xff], &CONFORMS.to_le_bytes(), &[NMI_LINT]]);
    if d.topology.apic_id(d.cpus.saturating_sub(1)) > LAST_XAPIC_ID {
        structure(&mut t, 10, &[&CONFORMS.to_le_bytes(), &u32::MAX.to_le_bytes(), &[NMI_LINT, 0, 0, 0]]);
    }
    // Appended at once: each append sums up the whole table.
    let mut table = Sdt::new(*b"APIC", 36, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&t);
    table
}
