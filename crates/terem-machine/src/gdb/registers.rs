//! The registers that gdb knows, where they are in a [`VcpuState`], and the description that tells gdb of them.
//!
//! One table: a register's number is its row, its place in the `g` packet follows from the sizes before it. The
//! features and their first registers are gdb's own (its manual, "Standard Target Features", "i386 Features"), the
//! last one is ours.

use std::fmt::Write;
use std::num::NonZeroUsize;
use std::sync::LazyLock;

use gdbstub::arch::{Arch, RegId, Registers};
use terem_cpu::VcpuState;

/// Where a register is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// General register, in the order of its encoding.
    Gpr(usize),
    Rip,
    Flags,
    /// Selector of a segment register.
    Selector(usize),
    /// Base of a segment register.
    Base(usize),
    KernelGsBase,
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Cr8,
    Efer,
    /// So many bytes of the XSAVE area from there on (Intel SDM vol. 1, 13.4): `(from, bytes)`. gdb may have more.
    Xsave(usize, usize),
    /// The x87 tag word, kept there in one bit a register.
    Tags,
}

#[derive(Debug, Clone)]
struct Register {
    #[cfg(test)]
    name: String,
    bytes: usize,
    /// From the first byte of the `g` packet.
    offset: usize,
    place: Place,
}

/// Features, each with its registers: name, gdb's type, bits, place.
type Row = (String, &'static str, usize, Place);

fn core() -> Vec<Row> {
    const ORDER: [(&str, usize); 16] = [
        ("rax", 0),
        ("rbx", 3),
        ("rcx", 1),
        ("rdx", 2),
        ("rsi", 6),
        ("rdi", 7),
        ("rbp", 5),
        ("rsp", 4),
        ("r8", 8),
        ("r9", 9),
        ("r10", 10),
        ("r11", 11),
        ("r12", 12),
        ("r13", 13),
        ("r14", 14),
        ("r15", 15),
    ];
    const X87: [(&str, Place); 8] = [
        ("fctrl", Place::Xsave(0, 2)),
        ("fstat", Place::Xsave(2, 2)),
        ("ftag", Place::Tags),
        ("fiseg", Place::Xsave(12, 2)),
        ("fioff", Place::Xsave(8, 4)),
        ("foseg", Place::Xsave(20, 2)),
        ("fooff", Place::Xsave(16, 4)),
        ("fop", Place::Xsave(6, 2)),
    ];
    let kind = |name: &str| if matches!(name, "rbp" | "rsp") { "data_ptr" } else { "int64" };
    let mut rows: Vec<Row> =
        ORDER.iter().map(|&(name, n)| (name.into(), kind(name), 64, Place::Gpr(n))).collect();
    rows.push(("rip".into(), "code_ptr", 64, Place::Rip));
    rows.push(("eflags".into(), "i386_eflags", 32, Place::Flags));
    let segments = [
        ("cs", VcpuState::CS),
        ("ss", VcpuState::SS),
        ("ds", VcpuState::DS),
        ("es", VcpuState::ES),
        ("fs", VcpuState::FS),
        ("gs", VcpuState::GS),
    ];
    rows.extend(segments.map(|(name, n)| (name.to_string(), "int32", 32, Place::Selector(n))));
    rows.extend((0..8).map(|n| (format!("st{n}"), "i387_ext", 80, Place::Xsave(32 + 16 * n, 10))));
    rows.extend(X87.map(|(name, place)| (name.to_string(), "int", 32, place)));
    rows
}

fn sse() -> Vec<Row> {
    let mut rows: Vec<Row> =
        (0..16).map(|n| (format!("xmm{n}"), "vec128", 128, Place::Xsave(160 + 16 * n, 16))).collect();
    rows.push(("mxcsr".into(), "i386_mxcsr", 32, Place::Xsave(24, 4)));
    rows
}

/// Upper halves of the YMM registers, of which gdb makes the whole ones. Models without AVX have zeros there.
fn avx() -> Vec<Row> {
    let row = |n: usize| (format!("ymm{n}h"), "uint128", 128, Place::Xsave(UPPERS + 16 * n, 16));
    (0..16).map(row).collect()
}

fn system() -> Vec<Row> {
    let rows = [
        ("k_gs_base", Place::KernelGsBase),
        ("cr0", Place::Cr0),
        ("cr2", Place::Cr2),
        ("cr3", Place::Cr3),
        ("cr4", Place::Cr4),
        ("cr8", Place::Cr8),
        ("efer", Place::Efer),
    ];
    rows.map(|(name, place)| (name.to_string(), "int64", 64, place)).to_vec()
}

fn segment_bases() -> Vec<Row> {
    [("fs_base", VcpuState::FS), ("gs_base", VcpuState::GS)]
        .map(|(name, n)| (name.to_string(), "int64", 64, Place::Base(n)))
        .to_vec()
}

/// Flags of a type: name and bit.
fn flags(xml: &mut String, id: &str, bits: &[(&str, u32)]) {
    let _ = write!(xml, "<flags id=\"{id}\" size=\"4\">");
    for (name, bit) in bits {
        let _ = write!(xml, "<field name=\"{name}\" start=\"{bit}\" end=\"{bit}\"/>");
    }
    xml.push_str("</flags>");
}

const EFLAGS: &[(&str, u32)] = &[
    ("CF", 0),
    ("PF", 2),
    ("AF", 4),
    ("ZF", 6),
    ("SF", 7),
    ("TF", 8),
    ("IF", 9),
    ("DF", 10),
    ("OF", 11),
    ("NT", 14),
    ("RF", 16),
    ("VM", 17),
    ("AC", 18),
    ("VIF", 19),
    ("VIP", 20),
    ("ID", 21),
];
const MXCSR: &[(&str, u32)] = &[
    ("IE", 0),
    ("DE", 1),
    ("ZE", 2),
    ("OE", 3),
    ("UE", 4),
    ("PE", 5),
    ("DAZ", 6),
    ("IM", 7),
    ("DM", 8),
    ("ZM", 9),
    ("OM", 10),
    ("UM", 11),
    ("PM", 12),
    ("FZ", 15),
];

/// The types that a feature's registers have.
fn types(xml: &mut String, feature: &str) {
    match feature {
        CORE => flags(xml, "i386_eflags", EFLAGS),
        SSE => {
            let vectors = [
                ("v4f", "ieee_single", 4),
                ("v2d", "ieee_double", 2),
                ("v16i8", "int8", 16),
                ("v8i16", "int16", 8),
            ];
            for (id, of, count) in vectors.into_iter().chain([("v4i32", "int32", 4), ("v2i64", "int64", 2)]) {
                let _ = write!(xml, "<vector id=\"{id}\" type=\"{of}\" count=\"{count}\"/>");
            }
            xml.push_str("<union id=\"vec128\">");
            for (name, of) in [
                ("v4_float", "v4f"),
                ("v2_double", "v2d"),
                ("v16_int8", "v16i8"),
                ("v8_int16", "v8i16"),
                ("v4_int32", "v4i32"),
                ("v2_int64", "v2i64"),
                ("uint128", "uint128"),
            ] {
                let _ = write!(xml, "<field name=\"{name}\" type=\"{of}\"/>");
            }
            xml.push_str("</union>");
            flags(xml, "i386_mxcsr", MXCSR);
        }
        _ => {}
    }
}

const CORE: &str = "org.gnu.gdb.i386.core";
const SSE: &str = "org.gnu.gdb.i386.sse";
const AVX: &str = "org.gnu.gdb.i386.avx";

/// All registers, and the description.
struct Table {
    registers: Vec<Register>,
    xml: String,
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let features = [
        (CORE, core()),
        (SSE, sse()),
        (AVX, avx()),
        ("org.gnu.gdb.i386.segments", segment_bases()),
        ("org.teremok.system", system()),
    ];
    let mut xml = String::from(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target version=\"1.0\">\
         <architecture>i386:x86-64</architecture>",
    );
    let (mut registers, mut offset): (Vec<Register>, usize) = (Vec::new(), 0);
    for (feature, rows) in features {
        let _ = write!(xml, "<feature name=\"{feature}\">");
        types(&mut xml, feature);
        for (name, kind, bits, place) in rows {
            let group = if kind == "i387_ext" || kind == "int" { " group=\"float\"" } else { "" };
            let number = registers.len();
            let _ = write!(
                xml,
                "<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\" regnum=\"{number}\"{group}/>"
            );
            registers.push(Register {
                #[cfg(test)]
                name,
                bytes: bits / 8,
                offset,
                place,
            });
            offset += bits / 8;
        }
        xml.push_str("</feature>");
    }
    xml.push_str("</target>");
    Table { registers, xml }
});

fn total() -> usize {
    TABLE.registers.last().map_or(0, |r| r.offset + r.bytes)
}

/// What the architecture is to `gdbstub`.
#[derive(Debug)]
pub(super) enum X86 {}

impl Arch for X86 {
    type Usize = u64;
    type Registers = Bytes;
    type BreakpointKind = usize;
    type RegId = Number;

    fn target_description_xml() -> Option<&'static str> {
        Some(&TABLE.xml)
    }
}

/// A register's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number(usize);

impl RegId for Number {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        TABLE.registers.get(id).map(|r| (Self(id), NonZeroUsize::new(r.bytes)))
    }

    fn to_raw_id(&self) -> Option<usize> {
        Some(self.0)
    }
}

/// The values of all registers, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bytes(Vec<u8>);

impl Default for Bytes {
    fn default() -> Self {
        Self(vec![0; total()])
    }
}

impl Registers for Bytes {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        let rip = TABLE.registers.iter().find(|r| r.place == Place::Rip);
        rip.and_then(|r| self.0.get(r.offset..r.offset + 8)).map_or(0, number)
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.0.iter().for_each(|&b| write_byte(Some(b)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        // gdb may leave out the last ones.
        let to = self.0.get_mut(..bytes.len()).ok_or(())?;
        to.copy_from_slice(bytes);
        Ok(())
    }
}

impl Bytes {
    pub(super) fn of(state: &VcpuState) -> Self {
        let mut all = Self::default();
        for r in &TABLE.registers {
            r.read(state, &mut all.0[r.offset..r.offset + r.bytes]);
        }
        all
    }

    pub(super) fn put(&self, state: &mut VcpuState) {
        for r in &TABLE.registers {
            r.write(state, &self.0[r.offset..r.offset + r.bytes]);
        }
    }
}

impl Number {
    /// Its value, as many bytes as `to` has.
    pub(super) fn read(self, state: &VcpuState, to: &mut [u8]) -> usize {
        let Some(r) = TABLE.registers.get(self.0) else { return 0 };
        let Some(to) = to.get_mut(..r.bytes) else { return 0 };
        r.read(state, to);
        r.bytes
    }

    /// Changes it; false if the value has not its size.
    pub(super) fn write(self, state: &mut VcpuState, from: &[u8]) -> bool {
        match TABLE.registers.get(self.0).filter(|r| r.bytes == from.len()) {
            Some(r) => {
                r.write(state, from);
                true
            }
            None => false,
        }
    }
}

/// Up to 8 little-endian bytes.
fn number(bytes: &[u8]) -> u64 {
    let mut eight = [0; 8];
    let n = bytes.len().min(8);
    eight[..n].copy_from_slice(&bytes[..n]);
    u64::from_le_bytes(eight)
}

/// XSTATE_BV of the XSAVE area, which says what components it has: x87 (bit 0), SSE (1), AVX (2) (Intel SDM vol. 1,
/// 13.4.2).
const XSTATE_BV: usize = 512;
/// The AVX component there.
const UPPERS: usize = 576;

impl Register {
    fn read(&self, s: &VcpuState, to: &mut [u8]) {
        let value = match self.place {
            Place::Xsave(at, len) => {
                if let Some(from) = s.xsave.get(at..at + len) {
                    to.fill(0);
                    to[..len].copy_from_slice(from);
                }
                return;
            }
            Place::Gpr(n) => s.gpr[n],
            Place::Rip => s.rip,
            Place::Flags => s.rflags,
            Place::Selector(n) => u64::from(s.segments[n].selector),
            Place::Base(n) => s.segments[n].base,
            Place::KernelGsBase => s.msrs.kernel_gs_base,
            Place::Cr0 => s.cr0,
            Place::Cr2 => s.cr2,
            Place::Cr3 => s.cr3,
            Place::Cr4 => s.cr4,
            // TPR bits 7:4 (Intel SDM vol. 3, "Task Priority Register").
            Place::Cr8 => u64::from(s.apic.registers.get(8).map_or(0, |tpr| tpr >> 4 & 15)),
            Place::Efer => s.msrs.efer,
            Place::Tags => u64::from(tags(&s.xsave)),
        };
        let bytes = value.to_le_bytes();
        to.copy_from_slice(&bytes[..self.bytes]);
    }

    fn write(&self, s: &mut VcpuState, from: &[u8]) {
        let value = number(from);
        match self.place {
            Place::Xsave(at, len) => {
                if let Some(to) = s.xsave.get_mut(at..at + len) {
                    to.copy_from_slice(&from[..len]);
                    s.xsave[XSTATE_BV] |= match at {
                        ..UPPERS => 3,
                        // Zeros are what is there without the component.
                        _ if from.iter().all(|b| *b == 0) => 0,
                        _ => 4,
                    };
                }
            }
            Place::Gpr(n) => s.gpr[n] = value,
            Place::Rip => s.rip = value,
            Place::Flags => s.rflags = value,
            Place::Selector(n) => s.segments[n].selector = u16::try_from(value & 0xffff).unwrap_or(0),
            Place::Base(n) => s.segments[n].base = value,
            Place::KernelGsBase => s.msrs.kernel_gs_base = value,
            Place::Cr0 => s.cr0 = value,
            Place::Cr2 => s.cr2 = value,
            Place::Cr3 => s.cr3 = value,
            Place::Cr4 => s.cr4 = value,
            // The local APIC is not written through a debugger.
            Place::Cr8 => {}
            Place::Efer => s.msrs.efer = value,
            Place::Tags => {
                let used = (0..8).fold(0_u8, |bits, n| bits | u8::from(value >> (2 * n) & 3 != 3) << n);
                s.xsave[4] = used;
                s.xsave[XSTATE_BV] |= 1;
            }
        }
    }
}

/// The x87 tag word, two bits a register, from the FXSAVE form of one bit (Intel SDM vol. 2, "FXSAVE").
fn tags(xsave: &[u8]) -> u16 {
    const EMPTY: u16 = 3;
    let top = usize::from(xsave[3] >> 3 & 7);
    (0..8).fold(0, |word, physical: usize| {
        let st = (physical + 8 - top) & 7;
        let at = 32 + 16 * st;
        let exponent = u16::from_le_bytes([xsave[at + 8], xsave[at + 9]]) & 0x7fff;
        let significand = number(&xsave[at..at + 8]);
        let tag = if xsave[4] >> physical & 1 == 0 {
            EMPTY
        } else if exponent == 0 && significand == 0 {
            1
        } else if exponent == 0 || exponent == 0x7fff || significand >> 63 == 0 {
            2
        } else {
            0
        };
        word | tag << (2 * physical)
    })
}

/// What gdb calls a register, for tests.
#[cfg(test)]
pub(super) fn names() -> Vec<(String, usize)> {
    TABLE.registers.iter().map(|r| (r.name.clone(), r.bytes)).collect()
}
