//! `monitor` and `mwait`: what wakes a vCPU that waits for a store (Intel SDM vol. 3, 9.10.3; vol. 2).

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use terem_bus::MsiMessage;
use terem_cpu::{Accelerator, Stop};
use terem_memory::GuestMemory;
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::Rig;
use super::team::{Team, WAYS, end};
use crate::SoftAccelerator;

const FLAG: u64 = 0x4_0000;
const ANSWER: u64 = 0x4_0040;
const SEEN: u64 = 0x4_0080;

fn team(translate: bool) -> Team {
    Team::of("terem64,+monitor", 2, translate)
}

/// Watches [`FLAG`].
fn monitor(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, FLAG)?;
    a.xor(ecx, ecx)?;
    a.xor(edx, edx)?;
    a.monitor()
}

/// Waits for it, with ECX and EAX (a hint).
fn mwait(a: &mut CodeAssembler, extensions: u32) -> Result<(), IcedError> {
    a.mov(ecx, extensions)?;
    a.xor(eax, eax)?;
    a.mwait()
}

#[test]
fn a_store_of_another_vcpu_wakes() {
    const ROUNDS: u32 = 40;
    for translate in WAYS {
        let mut team = team(translate);
        // vCPU 0 answers what vCPU 1 asks, each asleep while the other is at it.
        let turn = |mine: u64, theirs: u64, first: bool| {
            move |a: &mut CodeAssembler| {
                let (mut again, mut look, mut there) = (a.create_label(), a.create_label(), a.create_label());
                a.mov(ebx, 1)?;
                a.set_label(&mut again)?;
                if first {
                    a.mov(dword_ptr(theirs), ebx)?;
                }
                a.nop()?;
                a.set_label(&mut look)?;
                a.mov(rax, mine)?;
                a.xor(ecx, ecx)?;
                a.xor(edx, edx)?;
                a.monitor()?;
                a.cmp(dword_ptr(mine), ebx)?;
                a.je(there)?;
                mwait(a, 0)?;
                a.jmp(look)?;
                a.set_label(&mut there)?;
                if !first {
                    a.mov(dword_ptr(theirs), ebx)?;
                }
                a.inc(ebx)?;
                a.cmp(ebx, ROUNDS as i32)?;
                a.jbe(again)?;
                if first {
                    return end(a);
                }
                let mut here = a.create_label();
                a.set_label(&mut here)?;
                a.pause()?;
                a.jmp(here)
            }
        };
        team.program(0, turn(FLAG, ANSWER, true));
        team.program(1, turn(ANSWER, FLAG, false));
        team.run();
        let value = |at| team.rig.get(at) as u32;
        assert_eq!((value(FLAG), value(ANSWER)), (ROUNDS, ROUNDS), "translate {translate}");
    }
}

/// Runs the program of vCPU 0 on a thread until it is asleep; then `wake`; then it must come to its `int3`.
fn woken_by(rig: &mut Rig, wake: impl FnOnce(&SoftAccelerator, &GuestMemory)) {
    let Rig { vcpu, accelerator, memory, .. } = rig;
    let stop = std::thread::scope(|scope| {
        let thread = scope.spawn(|| vcpu.run());
        while !accelerator.counters(0).unwrap().halted {
            std::thread::yield_now();
        }
        wake(accelerator, memory);
        thread.join().unwrap()
    });
    assert_eq!((stop, rig.vector()), (Stop::Kicked, 3));
}

/// Sleeps again until `done` goes to its label.
fn until(
    a: &mut CodeAssembler,
    extensions: u32,
    done: impl FnOnce(&mut CodeAssembler, CodeLabel) -> Result<(), IcedError>,
) -> Result<(), IcedError> {
    let (mut again, mut over) = (a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    monitor(a)?;
    done(a, over)?;
    mwait(a, extensions)?;
    a.jmp(again)?;
    a.set_label(&mut over)?;
    end(a)
}

#[test]
fn devices_and_interrupts_wake() {
    let interrupt = |accelerator: &SoftAccelerator, _: &GuestMemory| {
        accelerator.msi_sink().send_msi(MsiMessage { address: 0xfee0_0000, data: 0x41 });
    };
    for translate in WAYS {
        let mut team = team(translate);
        team.program(0, |a| {
            until(a, 0, |a, over| {
                a.cmp(dword_ptr(FLAG + 60), 7)?;
                a.je(over)
            })
        });
        woken_by(&mut team.rig, |_, memory| memory.write_obj(7_u32, GuestAddress(FLAG + 60)).unwrap());

        // An interrupt that is taken comes back behind `mwait`.
        let mut team = self::team(translate);
        team.handler(0x41, |a| {
            a.inc(dword_ptr(SEEN))?;
            a.iretq()
        });
        team.program(0, |a| {
            a.sti()?;
            until(a, 0, |a, over| {
                a.cmp(dword_ptr(SEEN), 1)?;
                a.je(over)
            })
        });
        woken_by(&mut team.rig, interrupt);

        // One that is masked, if ECX says so: it waits in the IRR.
        let mut team = self::team(translate);
        team.program(0, |a| {
            until(a, 1, |a, over| {
                a.mov(ecx, 0x822)?;
                a.rdmsr()?;
                a.test(eax, 2)?;
                a.jne(over)
            })
        });
        woken_by(&mut team.rig, interrupt);
    }
}

#[test]
fn without_a_line_or_with_a_changed_one_nobody_sleeps() {
    for translate in WAYS {
        let mut team = team(translate);
        team.program(0, |a| {
            mwait(a, 0)?;
            monitor(a)?;
            a.inc(dword_ptr(FLAG + 4))?;
            mwait(a, 0)?;
            // Device registers are no line.
            a.mov(rax, super::WINDOW)?;
            a.monitor()?;
            mwait(a, 0)?;
            end(a)
        });
        team.rig.put(super::PAGE_TABLE, 0xf000_0000_u64 | 3);
        assert_eq!((team.rig.vcpu.run(), team.rig.vector()), (Stop::Kicked, 3));
    }
}

#[test]
fn what_they_refuse() {
    type Program = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let wrong: [(u64, Program); 4] = [
        (13, |a| {
            a.mov(ecx, 1)?;
            a.monitor()
        }),
        (13, |a| mwait(a, 2)),
        (14, |a| {
            a.mov(rax, super::WINDOW + 0x5000)?;
            a.xor(ecx, ecx)?;
            a.monitor()
        }),
        (13, |a| {
            a.mov(rax, 1_u64 << 63)?;
            a.xor(ecx, ecx)?;
            a.monitor()
        }),
    ];
    for (vector, program) in wrong {
        let mut team = team(true);
        team.program(0, program);
        assert_eq!((team.rig.vcpu.run(), team.rig.vector()), (Stop::Kicked, vector));
    }
    for program in [CodeAssembler::monitor, CodeAssembler::mwait] {
        let mut team = team(true);
        team.rig.user();
        team.rig.load(super::USER_CODE, program);
        assert_eq!((team.rig.vcpu.run(), team.rig.vector()), (Stop::Kicked, 6), "privilege 3");
    }
}
