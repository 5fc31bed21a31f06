//! The table of registers.

use std::collections::HashSet;

use gdbstub::arch::{Arch, RegId, Registers};
use terem_cpu::VcpuState;

use super::registers::{Bytes, Number, X86, names};

/// A state in which no two registers have the same value.
fn state() -> VcpuState {
    let mut s = VcpuState::power_on(0, true);
    s.gpr = std::array::from_fn(|i| 0x1111_1111_1111_1111_u64.wrapping_mul(i as u64 + 1));
    (s.rip, s.rflags) = (0xffff_ffff_8100_0000, 0x246);
    for (i, segment) in (0_u16..).zip(&mut s.segments) {
        (segment.selector, segment.base) = (i * 8 + 8, u64::from(i) * 0x10_0000);
    }
    (s.cr0, s.cr2, s.cr3, s.cr4) = (0x8005_0033, 0x1234, 0x5000, 0x6f8);
    (s.msrs.efer, s.msrs.kernel_gs_base) = (0xd01, 0x7777);
    for (i, b) in s.xsave[..512].iter_mut().enumerate() {
        *b = i.to_le_bytes()[0];
    }
    for (i, b) in s.xsave[576..832].iter_mut().enumerate() {
        *b = 0xff ^ i.to_le_bytes()[0];
    }
    s.xsave[512] = 7;
    s
}

fn value(name: &str, s: &VcpuState) -> Vec<u8> {
    let number = names().iter().position(|(n, _)| n == name).unwrap();
    let (number, size) = Number::from_raw_id(number).unwrap();
    let mut bytes = [0; 64];
    let n = number.read(s, &mut bytes);
    assert_eq!(Some(n), size.map(Into::into));
    bytes[..n].to_vec()
}

#[test]
fn registers_are_where_gdb_looks_for_them() {
    let s = state();
    assert_eq!(value("rbx", &s), s.gpr[3].to_le_bytes());
    assert_eq!(value("rsp", &s), s.gpr[4].to_le_bytes());
    assert_eq!(value("cs", &s), [16, 0, 0, 0]);
    assert_eq!(value("gs_base", &s), 0x50_0000_u64.to_le_bytes());
    assert_eq!(value("st1", &s), s.xsave[48..58]);
    assert_eq!(value("fstat", &s), [2, 3, 0, 0], "16 bits, the rest zero");
    assert_eq!(value("xmm15", &s), s.xsave[400..416]);
    assert_eq!(value("mxcsr", &s), s.xsave[24..28]);
    assert_eq!(value("ymm15h", &s), s.xsave[816..832]);
    assert_eq!(Bytes::of(&s).pc(), s.rip);
}

#[test]
fn what_is_read_can_be_written_back() {
    let (s, mut other) = (state(), VcpuState::power_on(0, true));
    Bytes::of(&s).put(&mut other);
    // Hidden parts of segments are not gdb's, nor are the XSAVE header and the places between registers.
    for (to, from) in other.segments.iter_mut().zip(&s.segments) {
        assert_eq!(to.selector, from.selector);
        assert!(
            to.base == from.base
                || to.base == VcpuState::power_on(0, true).segments[0].base
                || to.selector == 16
        );
        *to = *from;
    }
    assert_eq!(other.xsave[32..42], s.xsave[32..42]);
    assert_eq!(other.xsave[160..416], s.xsave[160..416]);
    assert_eq!(other.xsave[576..832], s.xsave[576..832]);
    assert_eq!(other.xsave[512], 7, "the state counts from now on");
    let mut without = VcpuState::power_on(0, true);
    Bytes::of(&without.clone()).put(&mut without);
    assert_eq!(without.xsave[512], 3, "a model without AVX does not get it by a write of zeros");
    other.xsave.clone_from(&s.xsave);
    assert_eq!(other, VcpuState { tsc: other.tsc, ..s });
    let (rip, _) = Number::from_raw_id(16).unwrap();
    assert!(!rip.write(&mut other, &[0; 4]), "it has eight bytes");
    assert!(Number::from_raw_id(names().len()).is_none());
}

#[test]
fn the_tag_word_is_told_in_full() {
    let mut s = VcpuState::power_on(0, true);
    assert_eq!(value("ftag", &s), [0xff, 0xff, 0, 0], "all empty");
    // TOP is 6: ST(0) is register 6. It holds 1.0, ST(1) zero, ST(2) infinity.
    s.xsave[3] = 6 << 3;
    s.xsave[4] = 1 << 6 | 1 << 7 | 1;
    s.xsave[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    s.xsave[64..74].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x7f]);
    let word = 0b01_00_11_11_11_11_11_10_u16;
    assert_eq!(value("ftag", &s)[..2], word.to_le_bytes());
    let before = s.xsave[4];
    Bytes::of(&s).put(&mut s);
    assert_eq!(s.xsave[4], before);
}

#[test]
fn the_description_names_each_register_once() {
    let xml = X86::target_description_xml().unwrap();
    let all: HashSet<String> = names().into_iter().map(|(n, _)| n).collect();
    assert_eq!(all.len(), names().len());
    for (number, (name, bytes)) in names().iter().enumerate() {
        let element = format!("<reg name=\"{name}\" bitsize=\"{}\"", bytes * 8);
        let at = xml.find(&element).unwrap_or_else(|| panic!("{element}"));
        assert!(xml[at..].split("/>").next().unwrap().contains(&format!("regnum=\"{number}\"")), "{name}");
    }
}
