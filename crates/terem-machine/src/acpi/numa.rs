//! SRAT and SLIT: which processors and which memory are near each other (ACPI 6.5, 5.2.16 and 5.2.17).

use acpi_tables::sdt::Sdt;

use super::{Description, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::plan::NumaPlan;

const SRAT_REVISION: u8 = 3;
const SLIT_REVISION: u8 = 1;
/// What is described is there.
const ENABLED: u32 = 1;
/// Above these IDs a local APIC needs an x2APIC entry.
const LAST_XAPIC_ID: u32 = 254;

/// One structure of the SRAT: type, length, fields.
fn structure(body: &mut Vec<u8>, kind: u8, fields: &[&[u8]]) {
    let len = 2 + fields.iter().map(|f| f.len()).sum::<usize>();
    body.extend([kind, u8::try_from(len).unwrap_or(0)]);
    for field in fields {
        body.extend_from_slice(field);
    }
}

/// The SRAT: a node for each processor and each range of memory.
pub(super) fn srat(d: &Description<'_>, nodes: &[NumaPlan]) -> Sdt {
    // Reserved: 1, for what was here in revision 1; 8 bytes of zeroes.
    let mut t = [1_u32.to_le_bytes(), [0; 4], [0; 4]].concat();
    for (node, plan) in (0_u32..).zip(nodes) {
        let node = node.to_le_bytes();
        for cpu in &plan.cpus {
            let id = d.topology.apic_id(*cpu);
            match u8::try_from(id) {
                // Node 7:0, id, flags, no SAPIC, node 31:8, clock domain 0.
                Ok(xapic) if id <= LAST_XAPIC_ID => structure(
                    &mut t,
                    0,
                    &[&[node[0], xapic], &ENABLED.to_le_bytes(), &[0], &node[1..], &[0; 4]],
                ),
                _ => structure(
                    &mut t,
                    2,
                    &[&[0; 2], &node, &id.to_le_bytes(), &ENABLED.to_le_bytes(), &[0; 4], &[0; 4]],
                ),
            }
        }
        for window in &plan.memory {
            let (base, size) = (window.base.to_le_bytes(), window.size.to_le_bytes());
            let flags = ENABLED.to_le_bytes();
            structure(&mut t, 1, &[&node, &[0; 2], &base, &size, &[0; 4], &flags, &[0; 8]]);
        }
    }
    table(*b"SRAT", SRAT_REVISION, &t)
}

/// The SLIT: the distances, row by row.
pub(super) fn slit(nodes: &[NumaPlan]) -> Sdt {
    let mut t = (nodes.len() as u64).to_le_bytes().to_vec();
    nodes.iter().for_each(|node| t.extend_from_slice(&node.distances));
    table(*b"SLIT", SLIT_REVISION, &t)
}

/// Appended at once: each append sums up the whole table.
fn table(name: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut table = Sdt::new(name, 36, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table
}
