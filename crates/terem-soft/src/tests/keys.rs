//! Protection keys (Intel SDM vol. 3, 4.6.2).

use iced_x86::code_asm::*;
use terem_bus::Clock;
use terem_cpu::Stop;

use super::team::WAYS;
use super::{PAGE_TABLE, PAGES, Rig, USER_CODE, WINDOW};
use crate::cpu::{cr0, cr4};
use crate::fault::{Fault, vector};
use crate::oracle::guest::Guest;
use crate::oracle::{CODE, DATA};

/// Where [`Guest`] has the page-table entry of [`DATA`].
const ENTRY: usize = 0x5000;
/// Error code: present, user, and the key's doing.
const BY_KEY: u32 = 0x25;
const WRITE: u32 = 2;

/// The first data page has key 5.
fn guest() -> Guest {
    let mut g = Guest::new();
    let entry = &mut g.ram()[ENTRY + 7];
    *entry |= 5 << 3;
    g.cpu.cr4 |= cr4::PKE;
    g.cpu.flush_tlb();
    g.cpu.gpr[3] = DATA;
    g
}

fn run(
    g: &mut Guest,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Option<Fault> {
    let mut a = CodeAssembler::new(64).unwrap();
    write(&mut a).unwrap();
    g.execute(CODE, &a.assemble(CODE).unwrap()).1
}

/// What a read and a write give, under this PKRU.
fn access(g: &mut Guest, pkru: u32) -> (Option<u32>, Option<u32>) {
    (g.cpu.gpr[0], g.cpu.gpr[1], g.cpu.gpr[2]) = (pkru.into(), 0, 0);
    assert_eq!(run(g, CodeAssembler::wrpkru), None);
    let read = run(g, |a| a.mov(rax, ptr(rbx)));
    let write = run(g, |a| a.mov(ptr(rbx), rax));
    let code = |f: Option<Fault>| f.map(|f| if f.vector == vector::PF { f.code } else { u32::MAX });
    (code(read), code(write))
}

#[test]
fn keys_keep_from_reading_and_writing() {
    let mut g = guest();
    assert_eq!(access(&mut g, 0), (None, None));
    assert_eq!(access(&mut g, 2 << 10), (None, Some(BY_KEY | WRITE)));
    assert_eq!(access(&mut g, 1 << 10), (Some(BY_KEY), Some(BY_KEY | WRITE)));
    assert_eq!(access(&mut g, !(3 << 10)), (None, None), "other keys");
    assert_eq!(g.cpu.cr2, DATA);
    // Without CR4.PKE the key means nothing, and nobody gets at PKRU.
    let _ = access(&mut g, 1 << 10);
    let without = g.cpu.cr4 & !cr4::PKE;
    g.cpu.set_cr4(without).unwrap();
    assert_eq!(run(&mut g, |a| a.mov(rax, ptr(rbx))), None);
    assert_eq!(run(&mut g, CodeAssembler::rdpkru), Some(Fault::UD));
}

#[test]
fn the_supervisor_is_kept_from_user_pages_too() {
    let mut g = guest();
    g.cpu.cpl = 0;
    g.cpu.mode_changed();
    assert_eq!(access(&mut g, 1 << 10), (Some(BY_KEY & !4), Some(BY_KEY & !4 | WRITE)));
    assert_eq!(access(&mut g, 2 << 10), (None, Some(BY_KEY & !4 | WRITE)));
    // Write-disable counts for the supervisor only as CR0.WP does.
    g.cpu.cr0 &= !cr0::WP;
    g.cpu.flush_tlb();
    assert_eq!(access(&mut g, 2 << 10), (None, None));
}

#[test]
fn pkru_is_read_back_and_its_operands_are_checked() {
    let mut g = guest();
    let _ = access(&mut g, 0xabc0_0000);
    g.cpu.gpr[2] = 7;
    assert_eq!((run(&mut g, CodeAssembler::rdpkru), g.cpu.gpr[0], g.cpu.gpr[2]), (None, 0xabc0_0000, 0));
    g.cpu.gpr[2] = 1;
    assert_eq!(run(&mut g, CodeAssembler::wrpkru), Some(Fault::GP0));
    (g.cpu.gpr[1], g.cpu.gpr[2]) = (1, 0);
    assert_eq!(run(&mut g, CodeAssembler::wrpkru), Some(Fault::GP0));
    assert_eq!(run(&mut g, CodeAssembler::rdpkru), Some(Fault::GP0));
}

/// Code that has run with one PKRU meets the next one, translated or not, and back again.
#[test]
fn running_code_follows_pkru() {
    const PAGE: u64 = WINDOW + 0x3000;
    for translate in WAYS {
        for (user, denied) in [(true, 1_u32), (true, 2), (false, 1), (false, 2)] {
            let mut rig = Rig::modelled("max", 1, Clock::manual(), None, translate);
            if user {
                rig.user();
            }
            rig.change(|s| s.cr4 |= cr4::PKE);
            rig.put(PAGE_TABLE + 3 * 8, (5 << 59) + PAGES + 0x3067);
            let program = |a: &mut CodeAssembler| {
                let (mut round, mut again) = (a.create_label(), a.create_label());
                a.mov(rsi, PAGE)?;
                a.mov(r12d, 3)?;
                a.set_label(&mut round)?;
                for rights in [0, denied << 10] {
                    // With the page's key denied others are used, and this one is only read where it may be.
                    a.mov(eax, rights)?;
                    a.xor(ecx, ecx)?;
                    a.xor(edx, edx)?;
                    a.wrpkru()?;
                    a.mov(r13d, 200)?;
                    a.set_label(&mut again)?;
                    if rights == 0 {
                        a.inc(qword_ptr(rsi))?;
                    } else if denied == 2 {
                        a.add(rbx, qword_ptr(rsi))?;
                    }
                    a.dec(r13d)?;
                    a.jne(again)?;
                    again = a.create_label();
                }
                a.dec(r12d)?;
                a.jne(round)?;
                // Now the loop that stored does so with its key denied.
                a.mov(r13d, 200)?;
                a.set_label(&mut again)?;
                a.inc(r14)?;
                a.mov(qword_ptr(rsi), r14)?;
                a.dec(r13d)?;
                a.jne(again)?;
                a.ud2()
            };
            rig.load(if user { USER_CODE } else { super::CODE }, program);
            assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 14), "translate {translate}");
            let s = rig.vcpu.save();
            let code = u64::from(BY_KEY | WRITE) & if user { !0 } else { !4 };
            assert_eq!((s.cr2, rig.stack(0), s.gpr[14]), (PAGE, code, 1), "translate {translate}");
            let sum = if denied == 2 { 200 * (200 + 400 + 600) } else { 0 };
            assert_eq!((rig.get(PAGES + 0x3000), s.gpr[3]), (600, sum), "translate {translate}");
        }
    }
}
