//! SMBIOS 3.0 tables (DSP0134 3.0.0): what `dmidecode` shows, and how guests know that they are guests.

use terem_cpu::{Level, Place, Register};
use terem_memory::vm_memory::{Bytes, GuestAddress};
use terem_memory::{GuestMemory, MemoryError};

use crate::plan::Plan;

/// Where the entry point goes: in the area that is searched for it (5.2.2).
const ENTRY_POINT: u64 = 0xf_0000;
/// Bytes of the 64-bit entry point.
const ENTRY_LEN: u8 = 24;
/// Where the structures go.
const TABLE: u64 = ENTRY_POINT + 0x20;
/// One past the area.
const AREA_END: u64 = 0x10_0000;

const MANUFACTURER: &str = "Teremok";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Most memory that one memory device states: 2^31 - 1 MiB do not fit the extended size field, so keep
/// below it and state several (7.18.5).
const MAX_DEVICE_MIB: u64 = 1 << 20;

/// Handles, as QEMU's users know them from `dmidecode`.
mod handle {
    pub const BIOS: u16 = 0x0000;
    pub const SYSTEM: u16 = 0x0100;
    pub const CHASSIS: u16 = 0x0300;
    pub const PROCESSOR: u16 = 0x0400;
    pub const ARRAY: u16 = 0x1000;
    pub const DEVICE: u16 = 0x1100;
    pub const ARRAY_ADDRESS: u16 = 0x1300;
    pub const BOOT: u16 = 0x2000;
    pub const END: u16 = 0x7f00;
    pub const NONE: u16 = 0xfffe;
}

/// One structure under construction: the formatted area and its strings.
struct Structure {
    bytes: Vec<u8>,
    strings: Vec<String>,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Self {
        let [low, high] = handle.to_le_bytes();
        Self { bytes: vec![kind, 0, low, high], strings: Vec::new() }
    }

    fn byte(mut self, value: u8) -> Self {
        self.bytes.push(value);
        self
    }

    fn word(mut self, value: u16) -> Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn dword(mut self, value: u32) -> Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn qword(mut self, value: u64) -> Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// A string's number; zero bytes would end it early.
    fn text(mut self, text: &str) -> Self {
        self.strings.push(text.replace('\0', " "));
        let number = u8::try_from(self.strings.len()).unwrap_or(0);
        self.byte(number)
    }

    fn finish(mut self, table: &mut Vec<u8>) {
        self.bytes[1] = u8::try_from(self.bytes.len()).unwrap_or(0);
        table.append(&mut self.bytes);
        for s in &self.strings {
            table.extend_from_slice(s.as_bytes());
            table.push(0);
        }
        if self.strings.is_empty() {
            table.push(0);
        }
        table.push(0);
    }
}

/// The tables of a machine.
#[derive(Debug, Clone)]
pub struct Smbios {
    entry: Vec<u8>,
    table: Vec<u8>,
}

impl Smbios {
    /// Makes them.
    #[must_use]
    pub fn new(plan: &Plan) -> Self {
        let mut table = Vec::new();
        bios().finish(&mut table);
        system(plan).finish(&mut table);
        chassis().finish(&mut table);
        for socket in 0..plan.cpus.sockets.min(0xff) {
            processor(plan, socket).finish(&mut table);
        }
        memory(plan, &mut table);
        // System boot information: no error. End of table.
        Structure::new(32, handle::BOOT).raw(&[0; 7]).finish(&mut table);
        Structure::new(127, handle::END).finish(&mut table);
        Self { entry: entry_point(&table), table }
    }

    /// Puts them where they are looked for.
    ///
    /// # Errors
    /// That is not RAM.
    pub fn write(&self, memory: &GuestMemory) -> Result<(), MemoryError> {
        let len = self.table.len() as u64;
        let not_ram = |_| MemoryError::NotRam { addr: ENTRY_POINT, len };
        // The area has room for thousands of structures; were there more, a guest is better off without.
        if TABLE + len > AREA_END {
            return Ok(());
        }
        memory.write_slice(&self.entry, GuestAddress(ENTRY_POINT)).map_err(not_ram)?;
        memory.write_slice(&self.table, GuestAddress(TABLE)).map_err(not_ram)
    }
}

/// The 64-bit entry point (5.2.2).
fn entry_point(table: &[u8]) -> Vec<u8> {
    let mut e = b"_SM3_".to_vec();
    e.extend([0, ENTRY_LEN, 3, 0, 0, 1, 0]); // checksum, length, 3.0.0, revision 1, reserved
    e.extend(u32::try_from(table.len()).unwrap_or(0).to_le_bytes());
    e.extend(TABLE.to_le_bytes());
    let sum = e.iter().fold(0_u8, |s, b| s.wrapping_add(*b));
    e[5] = sum.wrapping_neg();
    e
}

/// Type 0 (7.1).
fn bios() -> Structure {
    // "BIOS characteristics not supported"; extension byte 2: the SMBIOS table describes a virtual machine.
    Structure::new(0, handle::BIOS)
        .text(MANUFACTURER)
        .text(VERSION)
        .word(0)
        .text("01/01/2026")
        .byte(0)
        .qword(1 << 3)
        .raw(&[0, 1 << 4])
        .raw(&[0xff, 0xff, 0xff, 0xff])
}

/// Type 1 (7.2). The UUID is made from the name, so that it stays the same.
fn system(plan: &Plan) -> Structure {
    let hash = |seed: u64| {
        plan.name.bytes().fold(seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
    };
    let mut uuid =
        [hash(0xcbf2_9ce4_8422_2325).to_le_bytes(), hash(0x9e37_79b9_7f4a_7c15).to_le_bytes()].concat();
    uuid[7] = uuid[7] & 0x0f | 0x80; // version 8: custom (RFC 9562, 5.8); the field is little-endian
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Structure::new(1, handle::SYSTEM)
        .text(MANUFACTURER)
        .text("Virtual Machine (q35)")
        .text(VERSION)
        .byte(0)
        .raw(&uuid)
        .byte(6) // woken by the power switch
        .byte(0)
        .text("Virtual Machine")
}

/// Type 3 (7.4).
fn chassis() -> Structure {
    Structure::new(3, handle::CHASSIS)
        .text(MANUFACTURER)
        .byte(1) // "other"
        .raw(&[0, 0, 0])
        .raw(&[3, 3, 3, 2]) // safe, safe, safe; security unknown
        .dword(0)
        .raw(&[0, 0, 0, 0, 0])
}

/// Type 4 (7.5). Its ID is EAX and EDX of CPUID leaf 1.
fn processor(plan: &Plan, socket: u32) -> Structure {
    let features = plan.cpus.cpu.features.bits(Place::Cpuid { leaf: 1, subleaf: 0, register: Register::Edx });
    let topology = plan.cpus.topology();
    let threads = topology.in_one(Level::Socket);
    let short = |n: u32| u8::try_from(n).unwrap_or(0xff);
    let long = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    let cores = threads / topology.threads.max(1);
    Structure::new(4, handle::PROCESSOR + u16::try_from(socket).unwrap_or(0))
        .text(&format!("CPU {socket}"))
        .byte(3) // central processor
        .byte(1) // family "other"
        .text(plan.cpus.cpu.vendor.to_string().as_str())
        .qword(u64::from(plan.cpus.cpu.signature.pack()) | u64::from(features) << 32)
        .text(&plan.cpus.cpu.brand)
        .raw(&[0, 0, 0, 0, 0, 0, 0]) // voltage, external clock, maximum and current speed: unknown
        .byte(0x41) // populated, enabled
        .byte(1) // "other" upgrade
        .raw(&[0xff; 6]) // no cache handles
        .raw(&[0, 0, 0])
        .raw(&[short(cores), short(cores), short(threads)])
        .word(1 << 2) // 64-bit capable
        .word(1)
        .word(long(cores))
        .word(long(cores))
        .word(long(threads))
}

/// Types 16, 17 and 19 (7.17, 7.18, 7.20).
fn memory(plan: &Plan, table: &mut Vec<u8>) {
    let mib = plan.memory.size >> 20;
    let count = mib.div_ceil(MAX_DEVICE_MIB);
    Structure::new(16, handle::ARRAY)
        .raw(&[1, 3, 6]) // other place, system memory, multi-bit ECC
        .dword(0x8000_0000) // see the extended capacity
        .word(handle::NONE)
        .word(u16::try_from(count).unwrap_or(u16::MAX))
        .qword(plan.memory.size)
        .finish(table);
    for (number, i) in (0_u16..0x1ff).zip(0..count) {
        let size = (mib - i * MAX_DEVICE_MIB).min(MAX_DEVICE_MIB);
        let (short, extended) = match u16::try_from(size) {
            Ok(size) if size < 0x7fff => (size, 0),
            _ => (0x7fff, u32::try_from(size).unwrap_or(0)),
        };
        Structure::new(17, handle::DEVICE + number)
            .word(handle::ARRAY)
            .word(handle::NONE)
            .raw(&[0xff, 0xff, 0xff, 0xff]) // widths unknown
            .word(short)
            .byte(9) // DIMM
            .byte(0)
            .text(&format!("DIMM {number}"))
            .byte(0)
            .byte(7) // RAM
            .word(1 << 1) // "other"
            .word(0)
            .text(MANUFACTURER)
            .raw(&[0, 0, 0])
            .byte(0)
            .dword(extended)
            .raw(&[0; 8])
            .finish(table);
    }
    for (number, range) in (0_u16..).zip(plan.memory.ram().into_iter().filter(|r| r.base != 0)) {
        // The first range of all begins at 0, below the VGA window.
        let base = if number == 0 { 0 } else { range.base };
        Structure::new(19, handle::ARRAY_ADDRESS + number)
            .dword(u32::MAX)
            .dword(u32::MAX)
            .word(handle::ARRAY)
            .byte(1)
            .qword(base)
            .qword(range.end() - 1)
            .finish(table);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::HostInventory;
    use terem_config::{ByteSize, MachineConfig};

    fn plan(memory: ByteSize) -> Plan {
        let config = MachineConfig { kernel: Some("vmlinuz".into()), memory, ..MachineConfig::default() };
        Plan::new(&config, &HostInventory::default()).unwrap()
    }

    /// Type, length and strings of each structure.
    fn walk(table: &[u8]) -> Vec<(u8, u8, Vec<String>)> {
        let (mut all, mut at) = (Vec::new(), 0);
        while at < table.len() {
            let (kind, len) = (table[at], table[at + 1]);
            at += usize::from(len);
            let mut strings = Vec::new();
            while table[at] != 0 {
                let end = at + table[at..].iter().position(|&b| b == 0).unwrap();
                strings.push(String::from_utf8(table[at..end].to_vec()).unwrap());
                at = end + 1;
            }
            at += if strings.is_empty() { 2 } else { 1 };
            all.push((kind, len, strings));
        }
        all
    }

    #[test]
    fn structures_have_the_lengths_of_their_version() {
        let s = Smbios::new(&plan(ByteSize::gib(4)));
        let kinds: Vec<_> = walk(&s.table).into_iter().map(|(k, l, _)| (k, l)).collect();
        let lengths =
            [(0, 24), (1, 27), (3, 22), (4, 48), (16, 23), (17, 40), (19, 31), (19, 31), (32, 11), (127, 4)];
        assert_eq!(kinds, lengths);
        assert_eq!(walk(&s.table)[1].2[0], "Teremok");
        assert_eq!(s.entry.iter().fold(0_u8, |a, b| a.wrapping_add(*b)), 0);
        assert_eq!(s.entry.len(), usize::from(ENTRY_LEN));
    }

    #[test]
    fn terabytes_are_stated_in_several_devices() {
        let s = Smbios::new(&plan(ByteSize(5 << 39)));
        let devices = walk(&s.table).into_iter().filter(|(k, ..)| *k == 17).count();
        assert_eq!(devices, 3);
        assert!(TABLE + (s.table.len() as u64) < AREA_END);
    }
}
