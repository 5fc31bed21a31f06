//! Page tables that change under running code, with the shoot-down that the manual asks for (Intel SDM vol. 3, 4.10.5).

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use terem_bus::Clock;
use terem_cpu::{Stop, rflags};
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::team::{Team, WAYS, back, end, keep, send, wait_for};
use super::{PAGE_TABLE, PAGES, Rig, WINDOW, assemble};
use crate::cpu::{cr4, efer};

const EPOCH: u64 = 0x4_0000;
const PASSES: u64 = 0x4_0040;
const WRONG: u64 = 0x4_0080;
const ACKNOWLEDGED: u64 = 0x4_00c0;
const FAULTS: u64 = 0x4_0100;
/// The page of the window that is remapped.
const PAGE: u64 = WINDOW + 0x2000;
const ENTRY: u64 = PAGE_TABLE + 2 * 8;
const ROUNDS: u32 = 80;
const SHOOT_DOWN: u32 = 0x50;

fn value(team: &Team, at: u64) -> u32 {
    team.rig.get(at) as u32
}

/// A team of two whose vCPU 1 forgets [`PAGE`] when it is told to.
fn team(translate: bool) -> Team {
    let team = Team::new(2, translate);
    team.rig.page(2, 0x63);
    team.handler(u64::from(SHOOT_DOWN), |a| {
        keep(a)?;
        a.mov(rax, PAGE)?;
        a.invlpg(byte_ptr(rax))?;
        a.inc(dword_ptr(ACKNOWLEDGED))?;
        back(a)
    });
    team
}

/// Has vCPU 1 forget the page, which it has when this is over.
fn shoot_down(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dword_ptr(ACKNOWLEDGED), 0)?;
    send(a, 1, SHOOT_DOWN)?;
    a.mov(eax, 1)?;
    wait_for(a, ACKNOWLEDGED)
}

/// Waits until vCPU 1 has made two passes more, one of them whole.
fn two_passes(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(edx, dword_ptr(PASSES))?;
    a.set_label(&mut again)?;
    a.pause()?;
    a.mov(eax, dword_ptr(PASSES))?;
    a.sub(eax, edx)?;
    a.cmp(eax, 2)?;
    a.jb(again)
}

/// Counts R15 up to [`ROUNDS`] with `round` for each.
fn rounds(
    a: &mut CodeAssembler,
    round: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(r15d, 1)?;
    a.set_label(&mut again)?;
    round(a)?;
    a.inc(r15d)?;
    a.cmp(r15d, ROUNDS as i32)?;
    a.jbe(again)?;
    end(a)
}

/// What vCPU 1 does for ever, interrupts on: `pass` a hundred times, then one is counted.
fn passes(
    a: &mut CodeAssembler,
    pass: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let (mut again, mut more) = (a.create_label(), a.create_label());
    a.mov(rdi, PAGE)?;
    a.sti()?;
    a.set_label(&mut again)?;
    a.mov(r14d, 100)?;
    a.set_label(&mut more)?;
    pass(a)?;
    a.dec(r14d)?;
    a.jne(more)?;
    a.inc(dword_ptr(PASSES))?;
    a.jmp(again)
}

/// Counts EAX below R12D as wrong.
fn not_below(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut fine = a.create_label();
    a.cmp(eax, r12d)?;
    a.jae(fine)?;
    a.inc(dword_ptr(WRONG))?;
    a.set_label(&mut fine)?;
    a.nop()
}

#[test]
fn a_data_page_is_another_one_after_its_shoot_down() {
    for translate in WAYS {
        let mut team = team(translate);
        // Two pages in turns. Offset 0 says the round, at offset 8 vCPU 1 counts.
        team.program(0, |a| {
            rounds(a, |a| {
                a.mov(ebx, r15d)?;
                a.and(ebx, 1)?;
                a.shl(ebx, 12)?;
                a.mov(dword_ptr(rbx + (PAGES + 0x2000) as i32), r15d)?;
                a.lea(rax, qword_ptr(rbx + (PAGES + 0x2000) as i32 + 0x63))?;
                a.mov(qword_ptr(ENTRY), rax)?;
                shoot_down(a)?;
                a.mov(dword_ptr(EPOCH), r15d)?;
                // Nothing is stored to the other page any more.
                let mut fine = a.create_label();
                a.xor(ebx, 0x1000)?;
                a.mov(r13, qword_ptr(rbx + (PAGES + 0x2008) as i32))?;
                two_passes(a)?;
                a.cmp(r13, qword_ptr(rbx + (PAGES + 0x2008) as i32))?;
                a.je(fine)?;
                a.inc(dword_ptr(WRONG + 4))?;
                a.set_label(&mut fine)?;
                a.nop()
            })
        });
        team.program(1, |a| {
            passes(a, |a| {
                a.mov(r12d, dword_ptr(EPOCH))?;
                a.mov(eax, dword_ptr(rdi))?;
                not_below(a)?;
                a.inc(qword_ptr(rdi + 8))?;
                // The last bytes of this page, the first of the next.
                a.mov(rax, qword_ptr(rdi + 0xffc))
            })
        });
        team.rig.page(3, 0x63);
        team.run();
        assert_eq!((value(&team, WRONG), value(&team, WRONG + 4)), (0, 0), "translate {translate}");
    }
}

#[test]
fn a_code_page_is_another_one_after_its_shoot_down() {
    for translate in WAYS {
        let mut team = team(translate);
        for page in 4..8 {
            team.rig.load(WINDOW + page * 0x1000, |a| {
                a.mov(eax, page as u32)?;
                a.ret()
            });
        }
        team.program(0, |a| {
            rounds(a, |a| {
                a.mov(ebx, r15d)?;
                a.and(ebx, 3)?;
                a.shl(ebx, 12)?;
                a.lea(rax, qword_ptr(rbx + (PAGES + 0x4000) as i32 + 0x63))?;
                a.mov(qword_ptr(ENTRY), rax)?;
                shoot_down(a)?;
                a.mov(dword_ptr(EPOCH), r15d)?;
                two_passes(a)
            })
        });
        team.rig.put(ENTRY, PAGES + 0x4063);
        team.program(1, |a| {
            passes(a, |a| {
                // This round's page, or already the next one's.
                let (mut fine, mut wrong) = (a.create_label(), a.create_label());
                a.mov(r12d, dword_ptr(EPOCH))?;
                a.call(rdi)?;
                a.sub(eax, 4)?;
                a.sub(eax, r12d)?;
                a.and(eax, 3)?;
                a.cmp(eax, 1)?;
                a.jbe(fine)?;
                // Two rounds are too many unless this vCPU has slept meanwhile.
                a.cmp(r12d, dword_ptr(EPOCH))?;
                a.jne(fine)?;
                a.set_label(&mut wrong)?;
                a.inc(dword_ptr(WRONG))?;
                a.set_label(&mut fine)?;
                a.nop()
            })
        });
        team.run();
        assert_eq!(value(&team, WRONG), 0, "translate {translate}");
    }
}

/// What vCPU 0 takes from the page's entry each round (a bit), what vCPU 1 does with the page, and the error code of the
/// one page fault that it gets each time.
fn taken_away(bit: u32, set: bool, access: fn(&mut CodeAssembler) -> Result<(), IcedError>, code: u32) {
    for translate in WAYS {
        let mut team = team(translate);
        team.rig.load(PAGE + 0x100, CodeAssembler::ret);
        team.program(0, |a| {
            rounds(a, |a| {
                if set {
                    a.lock().bts(qword_ptr(ENTRY), bit)?;
                } else {
                    a.lock().btr(qword_ptr(ENTRY), bit)?;
                }
                shoot_down(a)?;
                a.mov(eax, r15d)?;
                wait_for(a, FAULTS)?;
                two_passes(a)
            })
        });
        team.program(1, |a| passes(a, access));
        team.handler(14, |a| {
            let mut fine = a.create_label();
            a.push(rax)?;
            a.cmp(dword_ptr(rsp + 8), code as i32)?;
            a.je(fine)?;
            a.inc(dword_ptr(WRONG))?;
            a.set_label(&mut fine)?;
            if set {
                a.lock().btr(qword_ptr(ENTRY), bit)?;
            } else {
                a.lock().bts(qword_ptr(ENTRY), bit)?;
            }
            a.mov(rax, cr2)?;
            a.invlpg(byte_ptr(rax))?;
            a.inc(dword_ptr(FAULTS))?;
            a.pop(rax)?;
            a.add(rsp, 8)?;
            a.iretq()
        });
        team.run();
        let counted = (value(&team, WRONG), value(&team, FAULTS));
        assert_eq!(counted, (0, ROUNDS), "translate {translate}");
    }
}

#[test]
fn a_page_that_is_made_read_only_faults_once() {
    taken_away(1, false, |a| a.inc(dword_ptr(rdi + 8)), 3);
}

#[test]
fn a_page_that_is_taken_away_faults_once() {
    taken_away(0, false, |a| a.mov(eax, dword_ptr(rdi + 8)), 0);
}

#[test]
fn code_that_is_made_data_faults_once() {
    taken_away(
        63,
        true,
        |a| {
            a.lea(rax, qword_ptr(rdi + 0x100))?;
            a.call(rax)
        },
        0x11,
    );
}

#[test]
fn a_dirty_bit_that_is_cleared_is_set_again() {
    for translate in WAYS {
        let mut team = team(translate);
        team.program(0, |a| {
            rounds(a, |a| {
                let mut again = a.create_label();
                a.lock().btr(qword_ptr(ENTRY), 6)?;
                shoot_down(a)?;
                a.set_label(&mut again)?;
                a.pause()?;
                a.test(byte_ptr(ENTRY), 0x40)?;
                a.je(again)
            })
        });
        team.program(1, |a| passes(a, |a| a.inc(dword_ptr(rdi + 8))));
        team.run();
    }
}

/// A large page at 4 MiB, and its parts after it was split.
const LARGE: u64 = 0x40_0000;
const LARGE_ENTRY: u64 = 0x3010;
const PARTS: u64 = 0x5000;

#[test]
fn a_large_page_that_is_split_is_its_parts() {
    for translate in WAYS {
        let mut rig = Rig::made(1, Clock::manual(), None, translate);
        rig.put(LARGE_ENTRY, 0x20_0000_u64 | 0xe3);
        for part in 0..512 {
            // The parts are the other way round.
            rig.put(PARTS + part * 8, 0x20_0000 + (511 - part) * 0x1000 + 0x63);
            let code = assemble(LARGE + part * 0x1000, |a| {
                a.mov(eax, part as u32)?;
                a.ret()
            });
            rig.memory.write_slice(&code, GuestAddress(0x20_0000 + part * 0x1000)).unwrap();
            rig.put(0x20_0800 + part * 0x1000, part);
        }
        let stop = rig.run(|a| {
            let (mut pass, mut again) = (a.create_label(), a.create_label());
            a.xor(ebp, ebp)?;
            a.set_label(&mut pass)?;
            a.mov(r13d, 200)?;
            a.set_label(&mut again)?;
            // Code and data of two pages, which are all summed up.
            for part in [7, 300] {
                a.mov(rdi, LARGE + part * 0x1000)?;
                a.call(rdi)?;
                a.add(rbx, rax)?;
                a.add(rbx, qword_ptr(rdi + 0x800))?;
                a.add(qword_ptr(rdi + 0x808), 1)?;
            }
            a.dec(r13d)?;
            a.jne(again)?;
            a.mov(qword_ptr(EPOCH + rbp * 8), rbx)?;
            a.xor(ebx, ebx)?;
            // Split, and one address of it invalidated, which is enough for all of it.
            a.mov(qword_ptr(LARGE_ENTRY), (PARTS | 3) as i32)?;
            a.mov(rax, LARGE + 0x12_3456)?;
            a.invlpg(byte_ptr(rax))?;
            a.inc(ebp)?;
            a.cmp(ebp, 2)?;
            a.jne(pass)?;
            a.int3()
        });
        assert_eq!((stop, rig.vector()), (Stop::Kicked, 3));
        let sum = |a: u64, b: u64| 200 * 2 * (a + b);
        assert_eq!(
            (rig.get(EPOCH), rig.get(EPOCH + 8)),
            (sum(7, 300), sum(504, 211)),
            "translate {translate}"
        );
        for part in [7, 300, 504, 211] {
            assert_eq!(rig.get(0x20_0808 + part * 0x1000), 200);
        }
    }
}

/// The other way: parts that become a large page, by a write to CR3.
#[test]
fn parts_that_become_a_large_page_are_one() {
    for translate in WAYS {
        let mut rig = Rig::made(1, Clock::manual(), None, translate);
        rig.put(LARGE_ENTRY, PARTS | 3);
        for part in 0..512 {
            rig.put(PARTS + part * 8, 0x20_0000 + (511 - part) * 0x1000 + 0x63);
            rig.put(0x20_0800 + part * 0x1000, part);
        }
        let stop = rig.run(|a| {
            let (mut pass, mut again) = (a.create_label(), a.create_label());
            a.xor(ebp, ebp)?;
            a.set_label(&mut pass)?;
            a.mov(r13d, 200)?;
            a.mov(rdi, LARGE + 0x9000)?;
            a.set_label(&mut again)?;
            a.add(rbx, qword_ptr(rdi + 0x800))?;
            a.dec(r13d)?;
            a.jne(again)?;
            a.mov(qword_ptr(EPOCH + rbp * 8), rbx)?;
            a.xor(ebx, ebx)?;
            a.mov(qword_ptr(LARGE_ENTRY), 0x20_00e3)?;
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
            a.inc(ebp)?;
            a.cmp(ebp, 2)?;
            a.jne(pass)?;
            a.int3()
        });
        assert_eq!((stop, rig.vector()), (Stop::Kicked, 3));
        assert_eq!((rig.get(EPOCH), rig.get(EPOCH + 8)), (200 * 502, 200 * 9), "translate {translate}");
    }
}

/// The same physical page at two linear addresses is the same bytes, but not the same addresses.
#[test]
fn code_at_two_addresses_knows_where_it_is() {
    for translate in WAYS {
        let mut rig = Rig::made(1, Clock::manual(), None, translate);
        // Pages 2 and 6 are one; behind them different ones.
        for page in [2, 3, 7] {
            rig.page(page, 0x63);
        }
        rig.put(PAGE_TABLE + 6 * 8, PAGES + 0x2063);
        let (first, second) = (WINDOW + 0x2000, WINDOW + 0x6000);
        rig.load(first, |a| {
            let (mut here, mut inner) = (a.create_label(), a.create_label());
            a.set_label(&mut here)?;
            a.lea(rax, qword_ptr(here))?;
            a.call(inner)?;
            // Goes on to the next page, wherever that is.
            a.jmp(first + 0x1000)?;
            a.set_label(&mut inner)?;
            a.mov(rdx, qword_ptr(rsp))?;
            a.ret()
        });
        for (page, number) in [(3_u64, 3_u32), (7, 7)] {
            rig.load(WINDOW + page * 0x1000, |a| {
                a.mov(ecx, number)?;
                a.ret()
            });
        }
        let stop = rig.run(|a| {
            let mut again = a.create_label();
            a.mov(r13d, 300)?;
            a.set_label(&mut again)?;
            for (i, at) in [(0, first), (1, second)] {
                a.mov(rsi, at)?;
                a.call(rsi)?;
                // Each time the same.
                a.sub(rax, rsi)?;
                a.sub(rdx, rsi)?;
                a.or(r8, rax)?;
                a.or(r9, rdx)?;
                a.add(qword_ptr(EPOCH + i * 8), ecx)?;
            }
            // In the middle the code changes, by either address.
            let mut unchanged = a.create_label();
            a.test(r13d, 63)?;
            a.jne(unchanged)?;
            a.mov(rsi, second)?;
            a.mov(byte_ptr(rsi + 0x800), r13b)?;
            a.set_label(&mut unchanged)?;
            a.dec(r13d)?;
            a.jne(again)?;
            a.int3()
        });
        let s = rig.vcpu.save();
        assert_eq!((stop, rig.vector()), (Stop::Kicked, 3));
        assert_eq!((s.gpr[8], s.gpr[9]), (0, 12), "translate {translate}");
        assert_eq!((rig.get(EPOCH), rig.get(EPOCH + 8)), (900, 2100), "translate {translate}");
    }
}

/// Where an instruction across pages 2 and 3 begins, and what runs it 200 times with R13 counting down.
const ACROSS: u64 = WINDOW + 0x3000 - 2;

fn across(rig: &mut Rig, after: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> (Stop, u64) {
    for page in 2..=5 {
        rig.page(page, 0x63);
    }
    let body = assemble(ACROSS, |a| {
        a.mov(eax, 1)?; // the constant's first byte is on page 2
        a.ret()
    });
    rig.memory.write_slice(&body, GuestAddress(PAGES + 0x3000 - 2)).unwrap();
    // Page 5 has the second half with another constant.
    rig.memory.write_slice(&[3, 0, 0, 0xc3], GuestAddress(PAGES + 0x5000)).unwrap();
    let stop = rig.run(|a| {
        let (mut again, mut before) = (a.create_label(), a.create_label());
        a.mov(r13d, 200)?;
        a.mov(rdi, ACROSS)?;
        a.set_label(&mut again)?;
        a.call(rdi)?;
        a.add(rbx, rax)?;
        a.cmp(r13d, 100)?;
        a.jne(before)?;
        after(a)?;
        a.set_label(&mut before)?;
        a.dec(r13d)?;
        a.jne(again)?;
        a.int3()
    });
    (stop, rig.vector())
}

#[test]
fn an_instruction_across_pages_follows_its_second_one() {
    let changed = 101 + 99 * 0x301;
    for translate in WAYS {
        let new = || Rig::made(1, Clock::manual(), None, translate);
        // Written over, by its own address and by another.
        for at in [WINDOW + 0x3000, PAGES + 0x3000] {
            let mut rig = new();
            assert_eq!(across(&mut rig, |a| a.mov(byte_ptr(at), 3)), (Stop::Kicked, 3));
            assert_eq!(rig.vcpu.save().gpr[3], changed, "translate {translate}");
        }
        // Another page in its place.
        let mut rig = new();
        let remap = |a: &mut CodeAssembler| {
            a.mov(dword_ptr(PAGE_TABLE + 3 * 8), (PAGES + 0x5063) as i32)?;
            a.mov(rax, WINDOW + 0x3000)?;
            a.invlpg(byte_ptr(rax))
        };
        assert_eq!(across(&mut rig, remap), (Stop::Kicked, 3));
        assert_eq!(rig.vcpu.save().gpr[3], changed, "translate {translate}");
        // None in its place, or one that cannot be executed: the fault is the second page's.
        for (entry, code) in [(0, 0x10), (1 << 63 | PAGES | 0x3063, 0x11)] {
            let mut rig = new();
            let take = |a: &mut CodeAssembler| {
                a.mov(rax, entry)?;
                a.mov(qword_ptr(PAGE_TABLE + 3 * 8), rax)?;
                a.mov(rax, WINDOW + 0x3000)?;
                a.invlpg(byte_ptr(rax))
            };
            assert_eq!(across(&mut rig, take), (Stop::Kicked, 14));
            let s = rig.vcpu.save();
            assert_eq!((s.cr2, s.gpr[13], s.gpr[3]), (WINDOW + 0x3000, 99, 101), "translate {translate}");
            assert_eq!((rig.stack(0), rig.stack(1)), (code, ACROSS), "translate {translate}");
        }
    }
}

/// The second page of an instruction is written and remapped by another vCPU.
#[test]
fn an_instruction_across_pages_follows_what_another_vcpu_does() {
    for translate in WAYS {
        let mut team = team(translate);
        team.rig.page(3, 0x63);
        let body = assemble(PAGE - 2, |a| {
            a.mov(eax, 0)?;
            a.ret()
        });
        // Page 1 and page 2; page 5 is the latter's double.
        team.rig.page(1, 0x63);
        team.rig.memory.write_slice(&body[..2], GuestAddress(PAGES + 0x2000 - 2)).unwrap();
        for page in [2, 5] {
            team.rig.memory.write_slice(&body[2..], GuestAddress(PAGES + page * 0x1000)).unwrap();
        }
        team.program(0, |a| {
            rounds(a, |a| {
                // The constant is r15 << 8: written in place, or on the double, which then takes the page's place.
                let (mut same, mut done) = (a.create_label(), a.create_label());
                a.test(r15d, 1)?;
                a.je(same)?;
                a.mov(word_ptr(PAGES + 0x5000), r15w)?;
                a.mov(qword_ptr(ENTRY), (PAGES + 0x5063) as i32)?;
                a.jmp(done)?;
                a.set_label(&mut same)?;
                a.mov(word_ptr(PAGES + 0x2000), r15w)?;
                a.mov(qword_ptr(ENTRY), (PAGES + 0x2063) as i32)?;
                a.set_label(&mut done)?;
                shoot_down(a)?;
                a.mov(dword_ptr(EPOCH), r15d)?;
                two_passes(a)
            })
        });
        team.program(1, |a| {
            passes(a, |a| {
                a.mov(r12d, dword_ptr(EPOCH))?;
                a.lea(rax, qword_ptr(rdi - 2))?;
                a.call(rax)?;
                a.shr(eax, 8)?;
                not_below(a)
            })
        });
        team.run();
        assert_eq!(value(&team, WRONG), 0, "translate {translate}");
    }
}

/// `invlpg` of a global page takes it out of all contexts (Intel SDM vol. 3, 4.10.4.1).
#[test]
fn a_global_page_is_forgotten_in_all_contexts() {
    for translate in WAYS {
        let mut rig = Rig::made(1, Clock::manual(), None, translate);
        rig.change(|s| {
            s.cr4 |= cr4::PGE | cr4::PCIDE;
            s.msrs.efer |= efer::NXE;
            s.rflags = rflags::FIXED;
        });
        rig.page(2, 0x163);
        rig.page(3, 0x163);
        rig.put(PAGES + 0x2000, 2_u64);
        rig.put(PAGES + 0x3000, 3_u64);
        let context = |a: &mut CodeAssembler, pcid: u64| {
            a.mov(rax, 1 << 63 | 0x1000 | pcid)?;
            a.mov(cr3, rax)
        };
        rig.load(WINDOW + 0x4000, |a| {
            let mut again = a.create_label();
            a.mov(r13d, 200)?;
            a.xor(ebx, ebx)?;
            a.set_label(&mut again)?;
            a.add(rbx, qword_ptr(rdi))?;
            a.dec(r13d)?;
            a.jne(again)?;
            a.ret()
        });
        rig.page(4, 0x163);
        let stop = rig.run(|a| {
            a.mov(rdi, PAGE)?;
            a.mov(rsi, WINDOW + 0x4000)?;
            // Twice, so that no code is new any more.
            for _ in 0..2 {
                context(a, 1)?;
                a.call(rsi)?;
                a.mov(r8, rbx)?;
                context(a, 2)?;
            }
            a.mov(qword_ptr(ENTRY), (PAGES + 0x3163) as i32)?;
            a.invlpg(byte_ptr(rdi))?;
            context(a, 1)?;
            a.call(rsi)?;
            a.int3()
        });
        let s = rig.vcpu.save();
        assert_eq!((stop, rig.vector()), (Stop::Kicked, 3));
        assert_eq!((s.gpr[8], s.gpr[3]), (400, 600), "translate {translate}");
    }
}
