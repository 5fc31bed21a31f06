//! Paging: permissions, error codes, accessed and dirty bits, flushing (Intel SDM vol. 3, 4.6 and 4.7).

use iced_x86::code_asm::*;
use terem_cpu::{Stop, VcpuState, rflags};

use super::{CODE, PAGE_TABLE, PAGES, Rig, USER_CODE, WINDOW};
use crate::cpu::{cr0, cr4, efer};

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const NX: u64 = 1 << 63;
const RESERVED: u64 = 1 << 45;
const PAGE_FAULT: u64 = 14;

#[derive(Clone, Copy)]
enum Access {
    Read,
    Write,
    Fetch,
}
use Access::{Fetch, Read, Write};

/// Does the access to page 2 of the window, and gives the page fault's error code, if there is one.
fn access(rig: &mut Rig, user: bool, bits: u64, access: Access) -> Option<u64> {
    rig.page(2, bits);
    rig.put(PAGES + 0x2000, 0xf4e6_c031_u64 | 0xfeeb << 32); // xor eax, eax; out f4h, al; jmp $
    let target = WINDOW + 0x2000;
    if user {
        rig.user();
    }
    let at = if user { USER_CODE } else { CODE };
    rig.load(at, |a| {
        a.mov(rcx, target)?;
        match access {
            Read => a.mov(rbx, qword_ptr(rcx))?,
            Write => a.mov(qword_ptr(rcx), rbx)?,
            Fetch => a.jmp(rcx)?,
        }
        a.xor(eax, eax)?;
        a.int(0x80)
    });
    // Privilege 3 may call 80h, and may use the port.
    rig.gate(0x80, super::HANDLERS + 0x80 * super::HANDLER_SIZE, 0xee, 0);
    rig.change(|s| s.rflags |= rflags::IOPL);
    assert_eq!(rig.vcpu.run(), Stop::Kicked);
    let state = rig.vcpu.save();
    if state.rip >= WINDOW || rig.vector() == 0x80 {
        return None;
    }
    assert_eq!((rig.vector(), state.cr2), (PAGE_FAULT, target));
    Some(rig.stack(0))
}

#[test]
fn permissions_and_error_codes() {
    // user, entry, access, expected
    let table = [
        (false, P | W, Read, None),
        (false, P | W, Write, None),
        (false, P, Write, Some(3)),
        (false, 0, Read, Some(0)),
        (false, 0, Write, Some(2)),
        (false, P | W | U, Read, None),
        (false, P | W | NX, Fetch, Some(0x11)),
        (false, P | W, Fetch, None),
        (true, P | W | U, Read, None),
        (true, P | W | U, Write, None),
        (true, P | U, Read, None),
        (true, P | U, Write, Some(7)),
        (true, P | W, Read, Some(5)),
        (true, P | W, Write, Some(7)),
        (true, 0, Read, Some(4)),
        (true, 0, Fetch, Some(0x14)),
        (true, P | U | NX, Fetch, Some(0x15)),
        (true, P | U, Fetch, None),
        (true, P | W | U | RESERVED, Read, Some(0xd)),
        (false, P | W | RESERVED, Write, Some(0xb)),
    ];
    for (i, (user, bits, kind, expected)) in table.into_iter().enumerate() {
        assert_eq!(access(&mut Rig::new(), user, bits, kind), expected, "line {i}");
    }
}

#[test]
fn control_bits_change_what_a_supervisor_may() {
    let with = |f: fn(&mut VcpuState)| {
        let mut rig = Rig::new();
        rig.change(f);
        rig
    };
    let no_wp = |s: &mut VcpuState| s.cr0 &= !cr0::WP;
    assert_eq!(access(&mut with(no_wp), false, P, Write), None);
    assert_eq!(access(&mut with(no_wp), true, P | U, Write), Some(7), "WP is not for users");
    assert_eq!(access(&mut with(|s| s.cr4 |= cr4::SMEP), false, P | U, Fetch), Some(0x11));
    assert_eq!(access(&mut with(|s| s.cr4 |= cr4::SMEP), false, P | W | U, Read), None);
    assert_eq!(access(&mut with(|s| s.cr4 |= cr4::SMAP), false, P | W | U, Read), Some(1));
    assert_eq!(access(&mut with(|s| s.cr4 |= cr4::SMAP), false, P | W | U, Write), Some(3));
    let allowed = |s: &mut VcpuState| {
        s.cr4 |= cr4::SMAP;
        s.rflags |= rflags::AC;
    };
    assert_eq!(access(&mut with(allowed), false, P | W | U, Write), None);
    // Without NXE the bit is reserved, and fetches are not told apart.
    assert_eq!(access(&mut with(|s| s.msrs.efer &= !efer::NXE), false, P | W | NX, Read), Some(9));
    assert_eq!(access(&mut with(|s| s.msrs.efer &= !efer::NXE), true, 0, Fetch), Some(4));
}

#[test]
fn accessed_and_dirty_bits_are_set_when_they_must_be() {
    let mut rig = Rig::new();
    assert_eq!(access(&mut rig, false, P | W, Read), None);
    assert_eq!(rig.get(PAGE_TABLE + 16) & 0x60, 0x20);
    let mut rig = Rig::new();
    assert_eq!(access(&mut rig, false, P | W, Write), None);
    assert_eq!(rig.get(PAGE_TABLE + 16) & 0x60, 0x60);
    let mut rig = Rig::new();
    assert_eq!(access(&mut rig, false, P, Write), Some(3));
    assert_eq!(rig.get(PAGE_TABLE + 16) & 0x40, 0, "a refused write is not dirty");
}

#[test]
fn a_changed_entry_counts_after_invlpg_and_after_a_write_to_cr3() {
    for by_cr3 in [false, true] {
        let mut rig = Rig::new();
        rig.page(2, P | W);
        rig.page(3, P | W);
        rig.put(PAGES + 0x2000, 11_u64);
        rig.put(PAGES + 0x3000, 22_u64);
        let stop = rig.run(|a| {
            a.mov(rcx, WINDOW + 0x2000)?;
            a.mov(rbx, qword_ptr(rcx))?; // 11, and now in the TLB
            a.mov(rdx, PAGE_TABLE)?;
            a.mov(rsi, qword_ptr(rdx + 24))?; // the entry of page 3
            a.mov(qword_ptr(rdx + 16), rsi)?;
            if by_cr3 {
                a.mov(rdi, cr3)?;
                a.mov(cr3, rdi)?;
            } else {
                a.invlpg(byte_ptr(rcx))?;
            }
            a.mov(r8, qword_ptr(rcx))?; // 22
            a.int3()
        });
        assert_eq!(stop, Stop::Kicked);
        let gpr = rig.vcpu.save().gpr;
        assert_eq!((gpr[3], gpr[8]), (11, 22));
    }
}

#[test]
fn an_access_across_pages_faults_on_the_page_that_is_not_there_and_changes_nothing() {
    let mut rig = Rig::new();
    rig.page(2, P | W);
    rig.page(3, 0);
    let stop = rig.run(|a| {
        a.mov(rcx, WINDOW + 0x2ffc)?;
        a.mov(rbx, 0x1122_3344_5566_7788_u64)?;
        a.mov(qword_ptr(rcx), rbx)
    });
    assert_eq!(stop, Stop::Kicked);
    assert_eq!((rig.vector(), rig.vcpu.save().cr2, rig.stack(0)), (PAGE_FAULT, WINDOW + 0x3000, 2));
    assert_eq!(rig.get(PAGES + 0x2ff8), 0, "the first half was not written");
}

/// Maps the page at `linear` to `physical`, with tables of its own from `free` on.
fn map(rig: &Rig, free: &mut u64, linear: u64, physical: u64) {
    let mut table = 0x1000;
    for level in (1..4).rev() {
        let at = table + (linear >> (12 + 9 * level) & 511) * 8;
        if rig.get(at) & P == 0 || rig.get(at) & 0x80 != 0 {
            rig.put(at, *free | P | W | U);
            *free += 0x1000;
        }
        table = rig.get(at) & !0xfff;
    }
    rig.put(table + (linear >> 12 & 511) * 8, physical | P | W);
}

/// Where the page number's carry meets the bits that the TLB adds to it: the second page must not be taken for the first.
#[test]
fn an_access_across_pages_finds_both() {
    for boundary in [0x8_0000_0000_u64, 0x18_0000_0000, 0x100_0000_0000, 0x100_0000] {
        let mut rig = Rig::new();
        let mut free = 0x30_0000;
        map(&rig, &mut free, boundary - 0x1000, PAGES + 0x2000);
        map(&rig, &mut free, boundary, PAGES + 0x5000);
        let stop = rig.run(|a| {
            a.mov(rcx, boundary)?;
            a.mov(rbx, 0x1122_3344_5566_7788_u64)?;
            a.mov(rax, qword_ptr(rcx))?;
            a.mov(qword_ptr(rcx + 8), rax)?; // the second page is in the TLB now
            a.mov(qword_ptr(rcx - 4), rbx)?;
            a.mov(rdx, qword_ptr(rcx - 4))?;
            a.int3()
        });
        assert_eq!(stop, Stop::Kicked);
        assert_eq!(rig.vcpu.save().gpr[2], 0x1122_3344_5566_7788, "{boundary:#x}");
        assert_eq!(rig.get(PAGES + 0x2ff8), 0x5566_7788 << 32, "{boundary:#x}");
        assert_eq!(rig.get(PAGES + 0x5000), 0x1122_3344, "{boundary:#x}");
    }
}
