//! As many vCPUs as there may be, on a host that has fewer processors: those that spin give way, those that are halted do
//! nothing at all.

use iced_x86::code_asm::*;
use terem_cpu::Accelerator;
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::team::{Team, WAYS, back, end, keep, send, wait_for};

const VCPUS: u32 = 64;
const LOCK: u64 = 0xc000;
const COUNTER: u64 = 0xc040;
const BARRIER: u64 = 0xc080;
const ANSWERS: u64 = 0xc0c0;
const GO: u64 = 0xc100;
const DONE: u64 = 0xc140;

#[test]
fn a_lock_and_a_barrier_of_sixty_four() {
    const ROUNDS: u32 = 10;
    for translate in WAYS {
        let mut team = Team::new(VCPUS, translate);
        for id in 0..u64::from(VCPUS) {
            team.program(id, |a| {
                let (mut round, mut locked, mut spin, mut wait, mut here) = (
                    a.create_label(),
                    a.create_label(),
                    a.create_label(),
                    a.create_label(),
                    a.create_label(),
                );
                a.mov(r15d, VCPUS)?;
                a.set_label(&mut round)?;
                a.mov(eax, 1)?;
                a.set_label(&mut spin)?;
                a.xchg(dword_ptr(LOCK), eax)?;
                a.test(eax, eax)?;
                a.je(locked)?;
                a.pause()?;
                a.jmp(spin)?;
                a.set_label(&mut locked)?;
                // Not atomic: the lock is what makes it right.
                a.mov(rbx, qword_ptr(COUNTER))?;
                a.inc(rbx)?;
                a.mov(qword_ptr(COUNTER), rbx)?;
                a.mov(dword_ptr(LOCK), 0)?;
                a.lock().inc(dword_ptr(BARRIER))?;
                a.set_label(&mut wait)?;
                a.pause()?;
                a.cmp(dword_ptr(BARRIER), r15d)?;
                a.jb(wait)?;
                a.add(r15d, VCPUS as i32)?;
                a.cmp(r15d, (VCPUS * ROUNDS) as i32)?;
                a.jbe(round)?;
                if id == 0 {
                    return end(a);
                }
                a.set_label(&mut here)?;
                a.hlt()?;
                a.jmp(here)
            });
        }
        team.run();
        assert_eq!(team.rig.get(COUNTER), u64::from(VCPUS * ROUNDS), "translate {translate}");
    }
}

#[test]
fn halted_ones_wake_together_and_cost_nothing() {
    const ROUNDS: u32 = 10;
    let mut team = Team::new(VCPUS, true);
    team.handler(0x50, |a| {
        keep(a)?;
        a.lock().inc(dword_ptr(ANSWERS))?;
        back(a)
    });
    team.program(0, |a| {
        let (mut round, mut wait, mut work) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(r15d, VCPUS - 1)?;
        a.set_label(&mut round)?;
        // To all but itself.
        send(a, 0, 0x50 | 3 << 18)?;
        a.mov(eax, r15d)?;
        wait_for(a, ANSWERS)?;
        a.add(r15d, VCPUS as i32 - 1)?;
        a.cmp(r15d, ((VCPUS - 1) * ROUNDS) as i32)?;
        a.jbe(round)?;
        // Some work, while the others are watched from outside.
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(GO), 1)?;
        a.jne(wait)?;
        a.mov(ecx, 3_000_000)?;
        a.set_label(&mut work)?;
        a.add(rbx, rcx)?;
        a.dec(ecx)?;
        a.jne(work)?;
        a.mov(dword_ptr(DONE), 1)?;
        a.mov(eax, 2)?;
        wait_for(a, GO)?;
        end(a)
    });
    for id in 1..u64::from(VCPUS) {
        team.program(id, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.sti()?;
            a.hlt()?;
            a.jmp(again)
        });
    }
    let (accelerator, memory) = (std::sync::Arc::clone(&team.rig.accelerator), team.rig.memory.clone());
    let watcher = std::thread::spawn(move || {
        let others = || (1..VCPUS).map(|id| accelerator.counters(id).unwrap());
        let value = |at| memory.read_obj::<u32>(GuestAddress(at)).unwrap();
        let until = |holds: &dyn Fn() -> bool| {
            while !holds() {
                std::thread::yield_now();
            }
        };
        until(&|| value(ANSWERS) == (VCPUS - 1) * ROUNDS && others().all(|c| c.halted));
        let numbers =
            || others().map(|c| (c.halted, c.instructions_interpreted, c.interrupts)).collect::<Vec<_>>();
        let before = numbers();
        memory.write_obj(1_u32, GuestAddress(GO)).unwrap();
        until(&|| value(DONE) == 1);
        let after = numbers();
        memory.write_obj(2_u32, GuestAddress(GO)).unwrap();
        (before, after)
    });
    team.run();
    let (before, after) = watcher.join().unwrap();
    assert_eq!(before, after);
    assert!(
        before.iter().all(|(halted, _, interrupts)| *halted && *interrupts == u64::from(ROUNDS)),
        "{before:?}"
    );
}
