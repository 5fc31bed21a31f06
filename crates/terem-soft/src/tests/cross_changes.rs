//! Code that one vCPU changes while others run it (Intel SDM vol. 3, 9.1.3).

use iced_x86::code_asm::*;

use super::team::{Team, WAYS, back, end, keep, send, wait_for};
use super::{PAGES, WINDOW};

/// Words that the programs share, each in a line of its own.
const EPOCH: u64 = 0x4_0000;
const SEEN: u64 = 0x4_0040;
const WRONG: u64 = 0x4_0080;
const ACKNOWLEDGED: u64 = 0x4_00c0;
/// The function that is changed, on page 2 of the window; written by the mapping of all memory to itself.
const FUNCTION: u64 = WINDOW + 0x2003;
const WRITTEN: u64 = PAGES + 0x2003;
const ROUNDS: u32 = 100;

fn value(team: &Team, at: u64) -> u32 {
    team.rig.get(at) as u32
}

#[test]
fn what_was_said_to_be_new_is_what_runs() {
    for translate in WAYS {
        let mut team = Team::new(3, translate);
        team.rig.page(2, 3);
        team.rig.load(FUNCTION, |a| {
            a.mov(eax, 0)?;
            a.ret()
        });
        team.program(0, |a| {
            let mut again = a.create_label();
            a.mov(ebx, 1)?;
            a.set_label(&mut again)?;
            // The constant is aligned, so that nobody sees half of it.
            a.mov(dword_ptr(WRITTEN + 1), ebx)?;
            a.mov(dword_ptr(EPOCH), ebx)?;
            for id in [1, 2] {
                a.mov(eax, ebx)?;
                wait_for(a, SEEN + id * 4)?;
            }
            a.inc(ebx)?;
            a.cmp(ebx, ROUNDS as i32)?;
            a.jbe(again)?;
            end(a)
        });
        for id in [1, 2] {
            team.program(id, |a| {
                let (mut again, mut call, mut fine) = (a.create_label(), a.create_label(), a.create_label());
                a.mov(rdi, FUNCTION)?;
                a.mov(rsi, SEEN + id * 4)?;
                a.set_label(&mut again)?;
                a.mov(r12d, dword_ptr(EPOCH))?;
                a.xor(eax, eax)?;
                a.cpuid()?; // serialises
                a.mov(r13d, 100)?;
                a.set_label(&mut call)?;
                a.call(rdi)?;
                a.cmp(eax, r12d)?;
                a.jae(fine)?;
                a.lock().inc(dword_ptr(WRONG))?;
                a.set_label(&mut fine)?;
                a.dec(r13d)?;
                a.jne(call)?;
                a.mov(dword_ptr(rsi), r12d)?;
                a.jmp(again)
            });
        }
        team.run();
        assert_eq!(value(&team, WRONG), 0, "translate {translate}");
    }
}

/// Where the call that is patched is: on page 3, across two lines.
const SITE: u64 = WINDOW + 0x303e;
const SITE_WRITTEN: u64 = PAGES + 0x303e;
/// The functions that it calls, in turns.
const FUNCTIONS: [u64; 2] = [WINDOW + 0x3100, WINDOW + 0x4100];
/// [`EPOCH`] while the call is patched.
const IN_FLUX: u32 = 0x8000_0000;

/// As Linux patches running code: a breakpoint over the first byte, the rest, the first byte, with all others
/// interrupted after each step.
#[test]
fn a_call_is_patched_under_a_breakpoint() {
    for translate in WAYS {
        let mut team = Team::new(3, translate);
        team.rig.page(3, 3);
        team.rig.page(4, 3);
        for (n, at) in FUNCTIONS.into_iter().enumerate() {
            team.rig.load(at, |a| {
                a.mov(eax, n as u32)?;
                a.ret()
            });
        }
        team.rig.load(SITE, |a| a.call(FUNCTIONS[0]));
        // The breakpoint: the call is skipped, with 2 for an answer.
        team.handler(3, |a| {
            a.mov(rax, SITE + 5)?;
            a.mov(qword_ptr(rsp), rax)?;
            a.mov(eax, 2)?;
            a.iretq()
        });
        team.handler(0x50, |a| {
            keep(a)?;
            a.lock().inc(dword_ptr(ACKNOWLEDGED))?;
            back(a)
        });
        team.program(0, |a| {
            let mut again = a.create_label();
            let all_know = |a: &mut CodeAssembler| {
                a.mov(dword_ptr(ACKNOWLEDGED), 0)?;
                send(a, 1, 0x50)?;
                send(a, 2, 0x50)?;
                a.mov(eax, 2)?;
                wait_for(a, ACKNOWLEDGED)
            };
            a.mov(ebx, 1)?;
            a.set_label(&mut again)?;
            a.mov(dword_ptr(EPOCH), IN_FLUX)?;
            a.mov(byte_ptr(SITE_WRITTEN), 0xcc)?;
            all_know(a)?;
            // The distance to this round's function.
            let [even, odd] = FUNCTIONS.map(|f| f.wrapping_sub(SITE + 5) as u32);
            a.mov(eax, even)?;
            a.mov(edx, odd)?;
            a.test(ebx, 1)?;
            a.cmovne(eax, edx)?;
            a.mov(dword_ptr(SITE_WRITTEN + 1), eax)?;
            all_know(a)?;
            a.mov(byte_ptr(SITE_WRITTEN), 0xe8)?;
            all_know(a)?;
            a.mov(dword_ptr(EPOCH), ebx)?;
            for id in [1, 2] {
                a.mov(eax, ebx)?;
                wait_for(a, SEEN + id * 4)?;
            }
            a.inc(ebx)?;
            a.cmp(ebx, ROUNDS as i32 / 2)?;
            a.jbe(again)?;
            a.ud2()
        });
        // From before the call to behind it.
        let around = SITE - 0x1e;
        for id in [1, 2] {
            team.program(id, |a| {
                a.mov(rsi, SEEN + id * 4)?;
                a.mov(rdi, around)?;
                a.sti()?;
                a.jmp(rdi)
            });
        }
        team.rig.load(around, |a| {
            a.mov(r12d, dword_ptr(EPOCH))?;
            a.mov(r13d, 100)?;
            a.jmp(SITE)
        });
        team.rig.load(SITE + 5, |a| {
            let (mut changed, mut wrong) = (a.create_label(), a.create_label());
            a.cmp(r12d, dword_ptr(EPOCH))?;
            a.jne(changed)?;
            a.test(r12d, r12d)?;
            a.js(changed)?; // in flux anything goes
            a.mov(edx, r12d)?;
            a.and(edx, 1)?;
            a.cmp(eax, edx)?;
            a.jne(wrong)?;
            a.dec(r13d)?;
            a.jne(SITE)?;
            a.mov(dword_ptr(rsi), r12d)?;
            a.set_label(&mut changed)?;
            a.jmp(around)?;
            a.set_label(&mut wrong)?;
            a.lock().inc(dword_ptr(WRONG))?;
            a.jmp(around)
        });
        team.run_to(6);
        assert_eq!(value(&team, WRONG), 0, "translate {translate}");
    }
}

/// One vCPU writes functions where others were, another runs them.
#[test]
fn functions_written_by_one_run_on_another() {
    const JOB: u64 = 0x4_0100;
    const ANSWER: u64 = 0x4_0140;
    for translate in WAYS {
        let mut team = Team::new(2, translate);
        team.rig.page(2, 3);
        team.rig.page(3, 3);
        team.program(0, |a| {
            let (mut again, mut fine) = (a.create_label(), a.create_label());
            a.mov(ebx, 1)?;
            a.set_label(&mut again)?;
            // Anywhere on the two pages: mov eax, n; add eax, 7n; ret.
            a.imul_3(esi, ebx, 0x151)?;
            a.and(esi, 0x1fe0)?;
            a.mov(byte_ptr(rsi + (PAGES + 0x2000) as i32), 0xb8)?;
            a.mov(dword_ptr(rsi + (PAGES + 0x2001) as i32), ebx)?;
            a.imul_3(edx, ebx, 7)?;
            a.mov(byte_ptr(rsi + (PAGES + 0x2005) as i32), 0x05)?;
            a.mov(dword_ptr(rsi + (PAGES + 0x2006) as i32), edx)?;
            a.mov(byte_ptr(rsi + (PAGES + 0x200a) as i32), 0xc3)?;
            a.lea(edx, dword_ptr(rsi + (WINDOW + 0x2000) as i32))?;
            a.mov(dword_ptr(JOB), edx)?;
            a.mov(eax, ebx)?;
            wait_for(a, SEEN)?;
            a.imul_3(edx, ebx, 8 * 100)?;
            a.cmp(dword_ptr(ANSWER), edx)?;
            a.je(fine)?;
            a.inc(dword_ptr(WRONG))?;
            a.set_label(&mut fine)?;
            a.inc(ebx)?;
            a.cmp(ebx, ROUNDS as i32 * 3)?;
            a.jbe(again)?;
            end(a)
        });
        team.program(1, |a| {
            let (mut again, mut call) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.pause()?;
            a.xor(edi, edi)?;
            a.xchg(dword_ptr(JOB), edi)?;
            a.test(edi, edi)?;
            a.je(again)?;
            a.xor(ebp, ebp)?;
            a.mov(r13d, 100)?;
            a.set_label(&mut call)?;
            a.call(rdi)?;
            a.add(ebp, eax)?;
            a.dec(r13d)?;
            a.jne(call)?;
            a.mov(dword_ptr(ANSWER), ebp)?;
            a.inc(dword_ptr(SEEN))?;
            a.jmp(again)
        });
        team.run();
        assert_eq!(value(&team, WRONG), 0, "translate {translate}");
    }
}

/// Data beside code, written by all of its users: no store is lost, and none of another's is seen late.
#[test]
fn counters_beside_running_code_count() {
    const COUNTER: u64 = WINDOW + 0x2ff0;
    const EACH: u32 = 300;
    for translate in WAYS {
        let mut team = Team::new(3, translate);
        team.rig.page(2, 3);
        team.rig.load(FUNCTION, |a| {
            a.lock().inc(dword_ptr(COUNTER))?;
            // A counter of its own beside it, without a lock.
            a.inc(dword_ptr(COUNTER + 4 + rdi * 4))?;
            a.ret()
        });
        for id in 0..3 {
            team.program(id, |a| {
                let (mut again, mut here) = (a.create_label(), a.create_label());
                a.mov(ebx, EACH)?;
                a.mov(rsi, FUNCTION)?;
                a.set_label(&mut again)?;
                a.call(rsi)?;
                a.dec(ebx)?;
                a.jne(again)?;
                a.lock().inc(dword_ptr(SEEN))?;
                if id == 0 {
                    a.mov(eax, 3)?;
                    wait_for(a, SEEN)?;
                    return end(a);
                }
                a.set_label(&mut here)?;
                a.pause()?;
                a.jmp(here)
            });
        }
        team.run();
        let counter = |n: u64| value(&team, PAGES + 0x2ff0 + 4 * n);
        assert_eq!([0, 1, 2, 3].map(counter), [3 * EACH, EACH, EACH, EACH], "translate {translate}");
    }
}
