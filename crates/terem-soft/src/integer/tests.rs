//! Instructions as the manuals have them: edge cases, and what exists in 16- and 32-bit code only.
//!
//! A line is bytes, state before, state after. State is written `register=hex`, `flag=0|1`,
//! `[address]=bytes`, `fault=name`, `rip=hex` (relative to the code's start); what a line does not name is
//! zero before and not looked at after, except that a fault must be named.

use crate::cpu::Cpu;
use crate::decode::{CodeSize, InstructionSet, Mode, decode};
use crate::oracle::guest::Guest;

/// Mode, bytes, before, after.
type Line = (u32, &'static str, &'static str, &'static str);

/// Where the code lies, as an offset in CS.
const START: u64 = 0x7000;
/// Memory of 64-bit lines begins here; see [`crate::oracle`].
const DATA_PHYSICAL: u64 = 0x11000;
const DATA: u64 = 0x2000_0000;

const NAMES: [&str; 8] = ["ax", "cx", "dx", "bx", "sp", "bp", "si", "di"];
const FLAGS: [(&str, u32); 9] =
    [("cf", 0), ("pf", 2), ("af", 4), ("zf", 6), ("sf", 7), ("if", 9), ("df", 10), ("of", 11), ("ac", 18)];
const FAULTS: [(&str, u8); 6] = [("de", 0), ("br", 5), ("ud", 6), ("ss", 12), ("gp", 13), ("pf", 14)];

/// A register's number, shift and mask.
fn register(name: &str) -> Option<(usize, u32, u64)> {
    if let Some(n) = name.strip_prefix('r').and_then(|n| n.parse().ok()) {
        return Some((n, 0, u64::MAX));
    }
    let find = |n: &str| NAMES.iter().position(|x| *x == n);
    if let Some(n) = find(name) {
        return Some((n, 0, 0xffff));
    }
    let mask = match name.get(..1)? {
        "e" => 0xffff_ffff,
        "r" => u64::MAX,
        low => {
            let n = find(&format!("{low}x"))?;
            return Some((n, if name.ends_with('h') { 8 } else { 0 }, 0xff));
        }
    };
    Some((find(&name[1..])?, 0, mask))
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text, 16).unwrap_or_else(|_| panic!("{text:?} is not hexadecimal"))
}

fn bytes(text: &str) -> Vec<u8> {
    let digits: String = text.split_whitespace().collect();
    (0..digits.len()).step_by(2).map(|i| hex(&digits[i..i + 2]) as u8).collect()
}

fn physical(address: u64) -> usize {
    (if address >= DATA { address - DATA + DATA_PHYSICAL } else { address }) as usize
}

fn guest(mode: u32) -> Guest {
    match mode {
        16 => Guest::unpaged(CodeSize::Code16),
        32 => Guest::unpaged(CodeSize::Code32),
        _ => Guest::new(),
    }
}

fn flag(cpu: &mut Cpu, bit: u32, on: bool) {
    let flags = cpu.rflags() & !(1 << bit) | u64::from(on) << bit;
    cpu.set_rflags(flags);
}

fn check(line: &Line) {
    let (mode, code, before, after) = *line;
    let mut g = guest(mode);
    for (key, value) in before.split_whitespace().map(|w| w.split_once('=').unwrap()) {
        if let Some(address) = key.strip_prefix('[') {
            let at = physical(hex(address.trim_end_matches(']')));
            let value = bytes(value);
            g.ram()[at..at + value.len()].copy_from_slice(&value);
        } else if let Some((_, bit)) = FLAGS.iter().find(|f| f.0 == key) {
            flag(&mut g.cpu, *bit, value == "1");
        } else {
            let (n, shift, _) = register(key).unwrap_or_else(|| panic!("{line:?}: {key}"));
            g.cpu.gpr[n] |= hex(value) << shift;
        }
    }
    let (rip, fault) = g.execute(START, &bytes(code));
    let mut named = None;
    for (key, value) in after.split_whitespace().map(|w| w.split_once('=').unwrap()) {
        if let Some(address) = key.strip_prefix('[') {
            let at = physical(hex(address.trim_end_matches(']')));
            let value = bytes(value);
            assert_eq!(g.ram()[at..at + value.len()], value, "{line:?}: {key}");
        } else if let Some((_, bit)) = FLAGS.iter().find(|f| f.0 == key) {
            assert_eq!(g.cpu.rflags() >> bit & 1, hex(value), "{line:?}: {key}");
        } else if key == "fault" {
            named = FAULTS.iter().find(|f| f.0 == value).map(|f| f.1);
        } else if key == "cr2" {
            assert_eq!(g.cpu.cr2, hex(value), "{line:?}: {key}");
        } else if key == "rip" {
            assert_eq!(rip.wrapping_sub(START) & 0xffff, hex(value), "{line:?}: {key}");
        } else {
            let (n, shift, mask) = register(key).unwrap_or_else(|| panic!("{line:?}: {key}"));
            let found = g.cpu.gpr[n] >> shift & mask;
            assert_eq!(found, hex(value), "{line:?}: {key} is {found:x}");
        }
    }
    assert_eq!(fault.map(|f| f.vector), named, "{line:?}: fault");
}

fn all(lines: &[Line]) {
    lines.iter().for_each(check);
}

#[test]
fn decimal_adjustments() {
    all(&[
        (32, "27", "al=ae", "al=14 cf=1 af=1 pf=1 sf=0 zf=0"), // 79h + 35h (SDM, DAA)
        (32, "27", "al=2e", "al=34 cf=0 af=1"),
        (32, "27", "al=9a", "al=00 cf=1 af=1 zf=1"),
        (32, "2f", "al=ee cf=1 af=1", "al=88 cf=1 af=1 sf=1"), // 35h - 47h (SDM, DAS)
        (32, "37", "eax=fffe000b", "eax=fffe0101 cf=1 af=1"),
        (32, "37", "eax=0005", "eax=0005 cf=0 af=0"),
        (32, "3f", "ax=02fe", "ax=0108 cf=1 af=1"),
        (32, "d4 0a", "ax=004f", "ax=0709 zf=0 pf=1"),
        (32, "d4 00", "ax=004f", "ax=004f fault=de"),
        (32, "d5 0a", "ax=0709", "ax=004f"),
        (32, "d5 10", "ax=0709", "ax=0079"),
        (32, "d6", "cf=1 eax=1234", "eax=12ff cf=1"),
        (32, "d6", "eax=1234", "eax=1200"),
        (64, "27 90", "", "fault=ud"),
    ]);
}

#[test]
fn first_processors_only() {
    all(&[
        (32, "63 c8", "ax=0010 cx=0003", "ax=0013 zf=1"),
        (32, "63 c8", "ax=0013 cx=0001 zf=1", "ax=0013 zf=0"),
        (32, "63 0d 00 20 00 00", "cx=2 [2000]=0000", "[2000]=0200 zf=1"),
        (16, "63 c8", "", "fault=ud"),
        (32, "62 05 00 20 00 00", "eax=a [2000]=ffffffff0a000000", ""),
        (32, "62 05 00 20 00 00", "eax=b [2000]=ffffffff0a000000", "fault=br"),
        (32, "62 05 00 20 00 00", "eax=fffffffe [2000]=ffffffff0a000000", "fault=br"),
        (16, "62 06 00 20", "ax=8000 [2000]=0080ff7f", ""),
    ]);
}

#[test]
fn shifts_and_rotates() {
    all(&[
        (32, "c1 e0 00", "eax=80000000 cf=1 of=1 zf=1 af=1", "eax=80000000 cf=1 of=1 zf=1 af=1"),
        (32, "d3 e0", "eax=1 ecx=20 cf=1 zf=1", "eax=1 cf=1 zf=1"),
        (64, "48 d3 e0", "rax=1 rcx=3f", "rax=8000000000000000 sf=1"),
        (64, "48 d3 e0", "rax=3 rcx=40 cf=1", "rax=3 cf=1"),
        (64, "d3 e0", "rax=ffffffff00000001 rcx=0", "rax=1"), // a 32-bit result clears the upper half even so
        (32, "d2 e0", "al=ff cl=1f", "al=0 zf=1"),
        (32, "d2 d0", "al=81 cl=9 cf=1", "al=81 cf=1"), // nine bits all the way round
        (32, "d2 d0", "al=81 cl=a cf=0", "al=02 cf=1"), // and one more
        (32, "66 d3 d8", "ax=1 cl=11 cf=1", "ax=1 cf=1"),
        (32, "66 d3 d8", "ax=1 cl=12 cf=1", "ax=8000 cf=1"),
        (32, "d1 d8", "eax=1 cf=0", "eax=0 cf=1"),
        (32, "d0 f8", "al=81", "al=c0 cf=1 of=0"),
        (32, "d1 e0", "eax=40000000", "eax=80000000 of=1 cf=0"),
        (32, "0f a4 d0 04", "eax=12345678 edx=9abcdef0", "eax=23456789 cf=1"),
        (32, "0f ad d0", "eax=12345678 edx=9abcdef0 cl=8", "eax=f0123456 cf=0"),
        (32, "0f ad d0", "eax=12345678 edx=9abcdef0 cl=20 cf=1", "eax=12345678 cf=1"),
        (32, "c0 3d 00 20 00 00 07", "[2000]=80", "[2000]=ff"),
    ]);
}

#[test]
fn multiplication_and_division() {
    all(&[
        (32, "f6 f1", "ax=0100 cl=1", "ax=0100 fault=de"),
        (32, "f6 f1", "ax=00ff cl=1", "ax=00ff"),
        (32, "f6 f1", "ax=00ff cl=0", "fault=de"),
        (32, "f6 f1", "ax=1234 cl=56", "ax=1036"),
        (32, "f6 f9", "ax=ff80 cl=ff", "fault=de"),
        (32, "f6 f9", "ax=ff81 cl=ff", "ax=007f"),
        (32, "f6 f9", "ax=8000 cl=ff", "fault=de"),
        (32, "f7 f1", "edx=1 eax=0 ecx=1", "fault=de edx=1"),
        (32, "f7 f1", "edx=1 eax=5 ecx=2", "eax=80000002 edx=1"),
        (32, "f7 f9", "edx=ffffffff eax=80000000 ecx=ffffffff", "fault=de"),
        (32, "f7 f9", "edx=ffffffff eax=80000000 ecx=1", "eax=80000000 edx=0"),
        (32, "f7 f9", "edx=ffffffff eax=fffffff9 ecx=2", "eax=fffffffd edx=ffffffff"),
        (64, "48 f7 f9", "rdx=ffffffffffffffff rax=8000000000000000 rcx=ffffffffffffffff", "fault=de"),
        (64, "48 f7 f9", "rdx=c000000000000000 rax=0 rcx=7fffffffffffffff", "fault=de"),
        (
            64,
            "48 f7 f9",
            "rdx=ffffffffffffffff rax=fffffffffffffff6 rcx=3",
            "rax=fffffffffffffffd rdx=ffffffffffffffff",
        ),
        (64, "48 f7 f1", "rdx=1 rax=0 rcx=2", "rax=8000000000000000 rdx=0"),
        (64, "48 f7 e1", "rax=ffffffffffffffff rcx=ffffffffffffffff", "rax=1 rdx=fffffffffffffffe cf=1 of=1"),
        (64, "f7 e1", "rax=ffffffff00000002 rcx=3 rdx=ffffffffffffffff", "rax=6 rdx=0 cf=0 of=0"),
        (32, "f6 e9", "al=80 cl=ff", "ax=0080 cf=1 of=1"),
        (32, "6b c1 fe", "ecx=3", "eax=fffffffa cf=0 of=0"),
        (32, "69 c1 00 00 00 40", "ecx=4", "eax=0 cf=1 of=1"),
    ]);
}

#[test]
fn bit_strings() {
    all(&[
        (32, "0f ab 05 10 20 00 00", "eax=ffffffff", "[200f]=80 cf=0"),
        (32, "0f b3 05 10 20 00 00", "eax=47 [2018]=ff", "[2018]=7f cf=1"),
        (16, "0f ab 06 00 20", "ax=fff0", "[1ffe]=0100"),
        (16, "0f a3 06 00 00", "ax=ffff [fffe]=0080", "cf=1"), // the offset wraps at 64 KiB
        (32, "0f ba 2d 00 20 00 00 25", "", "[2000]=20 cf=0"), // an immediate is cut to the operand
        (64, "48 0f ab 07", "rdi=20000100 rax=ffffffffffffffc0", "[200000f8]=01"),
        (64, "f0 48 0f bb 07", "rdi=20000100 rax=41 [20000108]=02", "[20000108]=00 cf=1"),
        (64, "0f bc c1", "rax=ffffffffffffffff rcx=0", "rax=ffffffffffffffff zf=1"),
        (64, "0f bd c1", "rax=ffffffffffffffff rcx=80000000", "rax=1f zf=0"),
        (64, "f3 48 0f b8 c1", "rcx=f0f0 cf=1 of=1", "rax=8 cf=0 of=0 zf=0"),
        (64, "f2 0f 38 f0 c1", "rax=ffffffff00000000 rcx=80", "rax=82f63b78"),
    ]);
}

#[test]
fn counts_of_zeros_are_scans_to_models_without_them() {
    let mut guest = Guest::unpaged(CodeSize::Code32);
    let mode = Mode { code: CodeSize::Code64, ..Mode::REAL };
    for (features, expected) in [(&["lm"][..], 0xffff), (&["lm", "bmi1"], 32)] {
        let set = InstructionSet::new(&terem_cpu::FeatureSet::of(features));
        let (op, _) = decode(&[0xf3, 0x0f, 0xbc, 0xc1], 0, mode, &set).unwrap();
        (guest.cpu.gpr[0], guest.cpu.gpr[1]) = (0xffff, 0);
        (op.run)(&mut guest.cpu, &op).unwrap();
        assert_eq!(guest.cpu.gpr[0], expected);
    }
}

#[test]
fn strings() {
    all(&[
        (
            32,
            "f3 a4",
            "esi=2000 edi=2001 ecx=4 [2000]=aabbccddee",
            "[2000]=aaaaaaaaaa ecx=0 esi=2004 edi=2005",
        ),
        (32, "f3 a5", "esi=2000 edi=2002 ecx=2 [2000]=0102030405060708", "[2000]=0102010203040304 edi=200a"),
        (32, "f3 a4", "esi=2001 edi=2000 ecx=4 [2000]=aabbccddee", "[2000]=bbccddeeee"),
        (32, "f3 a4", "esi=2000 edi=3000 ecx=0 [2000]=aa", "[3000]=00 esi=2000 edi=3000"),
        (32, "f3 a4", "df=1 esi=2003 edi=2004 ecx=4 [2000]=aabbccdd", "[2000]=aaaabbccdd esi=1fff"),
        (32, "f3 aa", "al=5a edi=1ffe ecx=4", "[1ffd]=005a5a5a5a00 edi=2002 ecx=0"),
        (32, "f3 ab", "eax=11223344 edi=2000 ecx=2", "[2000]=4433221144332211"),
        (16, "a4", "si=ffff di=2000 [ffff]=77", "[2000]=77 si=0 di=2001"),
        (16, "f3 a4", "si=fffe di=2000 cx=4 [fffe]=0102 [0]=0304", "[2000]=01020304 si=2 cx=0"),
        (16, "a5", "si=ffff di=2000", "fault=gp si=ffff di=2000"), // a word across the segment's end
        (16, "f3 a5", "si=2000 di=fffe cx=2 [2000]=01020304", "[fffe]=0102 cx=0 di=2 [0]=0304"),
        (32, "f3 a6", "esi=2000 edi=3000 ecx=8 [2000]=010203 [3000]=010204", "ecx=5 zf=0 cf=1 esi=2003"),
        (32, "f3 a6", "esi=2000 edi=3000 ecx=3 [2000]=010203 [3000]=010203", "ecx=0 zf=1 esi=2003"),
        (32, "f2 ae", "edi=2000 ecx=ffffffff [2000]=61626300", "ecx=fffffffb edi=2004 zf=1"),
        (32, "f3 a6", "ecx=0 zf=0 cf=1", "zf=0 cf=1"), // no comparison, no flags
        (32, "f3 ac", "esi=2000 ecx=3 [2000]=010203", "al=3 ecx=0 esi=2003"),
        (64, "f3 aa", "al=1 rdi=20001ffe rcx=4", "fault=pf rcx=2 rdi=20002000 [20001ffe]=0101"),
        (
            64,
            "67 f3 aa",
            "al=1 rdi=ffffffff20000000 rcx=ffffffff00000002",
            "[20000000]=0101 rcx=0 rdi=20000002",
        ),
        (
            64,
            "f3 48 a5",
            "rsi=20000ff8 rdi=20001000 rcx=2 [20000ff8]=1122334455667788",
            "[20001000]=11223344556677881122334455667788",
        ),
    ]);
}

#[test]
fn exchanges() {
    all(&[
        (
            32,
            "0f c7 0d 04 20 00 00",
            "eax=1 edx=2 ebx=3 ecx=4 [2004]=0100000002000000",
            "[2004]=0300000004000000 zf=1",
        ),
        (32, "f0 0f c7 0d fd 1f 00 00", "eax=1 edx=2 cf=1", "eax=0 edx=0 zf=0 cf=1"),
        (64, "48 0f c7 0f", "rdi=20000108", "fault=gp"),
        (
            64,
            "f0 48 0f c7 0f",
            "rdi=20000100 rbx=5 rcx=6",
            "[20000100]=05000000000000000600000000000000 zf=1",
        ),
        (64, "48 0f c7 0f", "rdi=20000100 [20000108]=07", "rax=0 rdx=7 zf=0"),
        (32, "0f c1 c0", "eax=3", "eax=6"),
        (32, "f0 0f c1 0d ff 1f 00 00", "ecx=1 [1fff]=ff000000", "[1fff]=00010000 ecx=ff"),
        (32, "0f b1 0d 00 20 00 00", "eax=7 ecx=9 [2000]=07000000", "[2000]=09000000 eax=7 zf=1"),
        (32, "f0 0f b1 0d 00 20 00 00", "eax=7 ecx=9 [2000]=08000000", "[2000]=08000000 eax=8 zf=0 cf=1"),
        (32, "86 e0", "ax=1234", "ax=3412"),
        (32, "87 05 00 20 00 00", "eax=1 [2000]=02000000", "eax=2 [2000]=01000000"),
        (64, "87 c0", "rax=ffffffff00000001", "rax=1"),
        (64, "90", "rax=ffffffff00000001", "rax=ffffffff00000001"),
    ]);
}

#[test]
fn stack() {
    all(&[
        (16, "6a ff", "sp=3000", "sp=2ffe [2ffe]=ffff"),
        (16, "66 6a ff", "sp=3000", "sp=2ffc [2ffc]=ffffffff"),
        (16, "50", "sp=0 ax=1234", "sp=fffe [fffe]=3412"),
        (16, "50", "sp=1 ax=1234", "fault=ss sp=1"),
        (16, "54", "sp=3000", "[2ffe]=0030 sp=2ffe"),
        (32, "54", "esp=3000", "[2ffc]=00300000 esp=2ffc"),
        (32, "5c", "esp=3000 [3000]=78563412", "esp=12345678"),
        (32, "8f 04 24", "esp=3000 [3000]=78563412", "esp=3004 [3004]=78563412"),
        (
            32,
            "60",
            "eax=1 ecx=2 edx=3 ebx=4 esp=3000 ebp=6 esi=7 edi=8",
            "esp=2fe0 [2fe0]=08000000070000000600000000300000040000000300000002000000 [2ffc]=01000000",
        ),
        (
            32,
            "61",
            "esp=2fe0 [2fe0]=08000000070000000600000099990000040000000300000002000000 [2ffc]=01",
            "eax=1 ecx=2 edx=3 ebx=4 esp=3000 ebp=6 esi=7 edi=8",
        ),
        (32, "c8 10 00 00", "esp=3000 ebp=1234", "esp=2fec ebp=2ffc [2ffc]=34120000"),
        (
            32,
            "c8 08 00 02",
            "esp=3000 ebp=2800 [27fc]=aabbccdd",
            "esp=2fec ebp=2ffc [2ff4]=fc2f0000aabbccdd00280000",
        ),
        (
            64,
            "c8 00 00 01",
            "rsp=20001000 rbp=5",
            "rsp=20000ff0 rbp=20000ff8 [20000ff0]=f80f0020000000000500000000000000",
        ),
        (64, "c8 00 10 00", "rsp=20001000 rbp=5", "fault=pf rsp=20001000 rbp=5"),
        (32, "c9", "ebp=2ffc esp=1 [2ffc]=34120000", "esp=3000 ebp=1234"),
        (16, "9d", "sp=3000 [3000]=ff7f", "if=1 cf=1 of=1 df=1"),
        (64, "66 68 34 12", "rsp=20001000", "rsp=20000ffe [20000ffe]=3412"),
        (64, "9d", "rsp=20001000 [20001000]=d50a", "cf=1 zf=1 of=1 if=0"), // without the right, IF stays
        (64, "9d", "rsp=20001000 if=1 [20001000]=0000", "cf=0 if=1"),
    ]);
}

#[test]
fn branches() {
    all(&[
        (16, "eb fe 90", "", "rip=0"), // to itself: the interpreter gives up after its patience
        (16, "e9 00 90", "", "rip=9003"),
        (16, "ff e0", "ax=1234", "rip=a234"),
        (32, "66 ff e0", "eax=ffff1234", "rip=a234"),
        (16, "e8 10 00", "sp=3000", "rip=13 [2ffe]=0370"),
        (32, "e8 10 00 00 00", "esp=3000", "rip=15 [2ffc]=05700000"),
        (32, "c2 08 00", "esp=3000 [3000]=10710000", "rip=110 esp=300c"),
        (64, "c3", "rsp=20001000 [20001000]=0000000000000080", "fault=gp rsp=20001000"),
        (64, "ff e0", "rax=800000000000", "fault=gp"),
        (32, "e3 10", "ecx=10000", "rip=2"),
        (32, "67 e3 10", "ecx=10000", "rip=13"),
        (16, "e2 10", "ecx=10001", "rip=2 ecx=10000"),
        (16, "67 e2 10", "ecx=10001", "rip=13 ecx=10000"),
        (32, "e1 10", "ecx=2 zf=1", "rip=12"),
        (32, "e0 10", "ecx=2 zf=1", "rip=2 ecx=1"),
        (32, "7c 10", "sf=1", "rip=12"),
        (32, "7c 10", "sf=1 of=1", "rip=2"),
        (32, "7e 10", "zf=1", "rip=12"),
        (32, "77 10", "cf=1", "rip=2"),
    ]);
}

#[test]
fn moves() {
    all(&[
        (32, "0f b6 c4", "eax=ff8012", "eax=80"),
        (32, "0f be c4", "eax=8012", "eax=ffffff80"),
        (32, "88 f4", "ax=1234 dx=5678", "ax=5634"),
        (64, "40 88 e0", "rsp=20001042 rax=ffff", "rax=ff42"),
        (64, "41 88 c0", "rax=99 r8=1111", "r8=1199"),
        (64, "0f 44 c3", "rax=ffffffff00000001 rbx=2", "rax=1"),
        (64, "0f 44 c3", "rax=ffffffff00000001 rbx=2 zf=1", "rax=2"),
        (64, "63 c3", "rbx=80000000", "rax=80000000"),
        (64, "48 63 c3", "rbx=80000000", "rax=ffffffff80000000"),
        (64, "67 8d 04 18", "rax=ffffffff rbx=2", "rax=1"),
        (16, "8d 40 02", "bx=ffff si=2", "ax=3"),
        (16, "d7", "ebx=1fffe al=5 [3]=77", "al=77"),
        (64, "48 0f c8", "rax=1122334455667788", "rax=8877665544332211"),
        (64, "0f 38 f0 07", "rdi=20000100 [20000100]=11223344", "rax=11223344"),
        (64, "66 0f 38 f1 07", "rdi=20000100 rax=1234", "[20000100]=1234"),
        (32, "98", "eax=8000", "eax=ffff8000"),
        (32, "66 98", "eax=80", "eax=ff80"),
        (64, "48 99", "rax=8000000000000000", "rdx=ffffffffffffffff"),
        (64, "99", "rax=80000000 rdx=ffffffffffffffff", "rdx=ffffffff"),
        (64, "9f", "cf=1 sf=1", "rax=8300"),
        (64, "9e", "ax=d500", "cf=1 pf=1 af=1 zf=1 sf=1"),
        (64, "36 8b 07", "rdi=800000000000", "fault=gp"), // the prefix does not make it the stack
        (64, "8b 45 00", "rbp=800000000000", "fault=ss"),
        (64, "0f 18 07", "rdi=0", ""),         // a prefetch of nothing
        (64, "0f ae 3f", "rdi=0", "fault=pf"), // but clflush looks
        (64, "f0 89 07", "rdi=20000100", "fault=ud"),
    ]);
}

#[test]
fn faults_that_the_oracle_found_wrong() {
    all(&[
        // A read-modify-write across pages faults at the second page's beginning.
        (64, "83 07 01", "rdi=20001ffe", "fault=pf cr2=20002000"),
        (64, "f0 83 07 01", "rdi=20001ffe", "fault=pf cr2=20002000"),
        // Where both sides of a comparison fault, the second one's fault is reported.
        (64, "a6", "rsi=5 rdi=10", "fault=pf cr2=10"),
        // A store that an x87 exception suppresses looks at its address all the same.
        (64, "dd 1f", "rdi=20002000", "fault=pf cr2=20002000"),
        (64, "db 0f", "rdi=20001ffe", "fault=pf cr2=20002000"),
        (64, "66 0f f7 c1", "rdi=800000000000", ""), // no byte is selected
    ]);
}
