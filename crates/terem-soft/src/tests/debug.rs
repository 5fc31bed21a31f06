//! Debug registers, single steps, and what a debugger outside asks for (Intel SDM vol. 3, chapter on debugging).

use iced_x86::code_asm::*;
use terem_cpu::{DebugControl, DebugEvent, Stop, VcpuState, Watchpoint, rflags};

use super::{CODE, Rig, WINDOW};
use crate::watch::dr6;

/// DR7 with register `n` on for `kind` (R/W field) and `len` (LEN field).
fn control(n: u32, kind: u64, len: u64) -> u64 {
    0x400 | 2 << (2 * n) | (kind | len << 2) << (16 + 4 * n)
}

fn with(rig: &mut Rig, registers: &[(usize, u64)], value: u64) {
    rig.change(|s| {
        for &(n, at) in registers {
            s.debug[n] = at;
        }
        s.debug[5] = value;
    });
}

#[test]
fn an_instruction_breakpoint_comes_before_its_instruction_and_rf_goes_beyond_it() {
    let mut rig = Rig::new();
    with(&mut rig, &[(1, CODE + 3)], control(1, 0, 0));
    let program = |a: &mut CodeAssembler| {
        a.inc(rbx)?;
        a.inc(rbx)?;
        a.int3()
    };
    assert_eq!(rig.run(program), Stop::Kicked);
    let s = rig.vcpu.save();
    assert_eq!((rig.vector(), rig.stack(0), s.gpr[3]), (1, CODE + 3, 1));
    assert_eq!(rig.stack(2) & rflags::RF, 0, "a breakpoint pushes RF as it was");
    assert_eq!(s.debug[dr6::INDEX] & 15, 2);
    // The handler sets RF in the image and returns: the breakpoint is passed, once.
    rig.load(0x3_0000, |a| {
        a.or(dword_ptr(rsp + 16), rflags::RF as i32)?;
        a.iretq()
    });
    rig.change(|s| s.rip = 0x3_0000);
    assert_eq!(rig.vcpu.run(), Stop::Kicked);
    assert_eq!((rig.vector(), rig.vcpu.save().gpr[3]), (3, 2));
    assert_eq!(rig.stack(2) & rflags::RF, 0, "RF is gone after one instruction");
}

#[test]
fn data_breakpoints_see_each_access_that_touches_them_and_no_other() {
    // (kind, length field, address, does the program hit it?)
    let cases = [
        (1, 0, WINDOW + 0x100, true),
        (1, 3, WINDOW + 0x104, true), // bytes 104h–107h of a store of eight at 100h
        (1, 1, WINDOW + 0x108, false),
        (1, 2, WINDOW + 0x100, true),
        (1, 0, WINDOW + 0x200, false), // read, but not written
        (3, 0, WINDOW + 0x200, true),
        (3, 3, WINDOW + 0x1ff, false), // aligned down to 1fch–1ffh
        (2, 0, WINDOW + 0x100, false), // I/O, with CR4.DE clear: undefined, never met
    ];
    for (kind, len, at, hits) in cases {
        let mut rig = Rig::new();
        rig.page(0, 3);
        with(&mut rig, &[(2, at)], control(2, kind, len));
        rig.run(|a| {
            a.mov(rbx, WINDOW)?;
            a.mov(qword_ptr(rbx + 0x100), rax)?;
            a.mov(cl, byte_ptr(rbx + 0x200))?;
            a.int3()
        });
        let s = rig.vcpu.save();
        let expected = if hits { (1, 4) } else { (3, 0) };
        assert_eq!((rig.vector(), s.debug[dr6::INDEX] & 15), expected, "{kind} {len} {at:x}");
    }
}

#[test]
fn a_data_breakpoint_is_found_by_translated_code_too() {
    let mut rig = Rig::new();
    rig.page(0, 3);
    rig.page(1, 3);
    let stop = rig.run(|a| {
        let mut again = a.create_label();
        a.mov(rbx, WINDOW)?;
        a.mov(ecx, 1000)?;
        a.set_label(&mut again)?;
        a.mov(qword_ptr(rbx), rcx)?;
        a.dec(rcx)?;
        a.jne(again)?;
        a.mov(rax, WINDOW)?;
        a.mov(dr0, rax)?;
        a.mov(eax, control(0, 1, 2) as u32)?;
        a.mov(dr7, rax)?;
        a.mov(ecx, 1000)?;
        let mut more = a.create_label();
        a.set_label(&mut more)?;
        a.mov(qword_ptr(rbx + rcx * 8), rcx)?;
        a.dec(rcx)?;
        a.jns(more)?;
        a.int3()
    });
    assert_eq!((stop, rig.vector(), rig.vcpu.save().gpr[1]), (Stop::Kicked, 1, 0));
}

#[test]
fn a_repeated_move_traps_where_it_hits() {
    let mut rig = Rig::new();
    rig.page(0, 3);
    with(&mut rig, &[(0, WINDOW + 0x40)], control(0, 1, 3));
    rig.run(|a| {
        a.mov(rdi, WINDOW)?;
        a.mov(ecx, 100)?;
        a.rep().stosb()?;
        a.int3()
    });
    let s = rig.vcpu.save();
    assert_eq!((rig.vector(), s.gpr[1], s.gpr[7]), (1, 100 - 0x41, WINDOW + 0x41));
    assert_ne!(rig.stack(2) & rflags::RF, 0, "in the middle of the instruction");
}

#[test]
fn a_load_of_ss_holds_debug_exceptions_back_for_one_instruction() {
    let mut rig = Rig::new();
    rig.page(0, 3);
    rig.put(super::PAGES, 0x10_u64);
    with(&mut rig, &[(0, WINDOW)], control(0, 3, 0));
    let next = |s: &VcpuState| (s.gpr[3], s.gpr[1]);
    rig.run(|a| {
        a.mov(rsi, WINDOW)?;
        a.mov(ss, word_ptr(rsi))?;
        a.inc(rbx)?;
        a.inc(rcx)?;
        a.int3()
    });
    assert_eq!((rig.vector(), next(&rig.vcpu.save())), (1, (1, 0)));
}

#[test]
fn ports_are_watched_with_cr4_de() {
    let mut rig = Rig::new();
    with(&mut rig, &[(3, 0x81)], control(3, 2, 0));
    rig.change(|s| s.cr4 |= crate::cpu::cr4::DE);
    rig.run(|a| {
        a.in_(al, 0x82)?;
        a.in_(ax, 0x80)?;
        a.int3()
    });
    assert_eq!((rig.vector(), rig.stack(0)), (1, CODE + 5));
    assert_eq!(rig.vcpu.save().debug[dr6::INDEX] & 15, 8);
}

#[test]
fn general_detect_guards_the_debug_registers_once() {
    let mut rig = Rig::new();
    with(&mut rig, &[], 0x400 | 1 << 13);
    rig.run(|a| a.mov(rax, dr0));
    let s = rig.vcpu.save();
    assert_eq!((rig.vector(), rig.stack(0)), (1, CODE));
    assert_eq!((s.debug[dr6::INDEX] & dr6::BD, s.debug[5]), (dr6::BD, 0x400));
}

#[test]
fn popf_that_sets_tf_is_not_stepped_and_the_next_instruction_is() {
    let mut rig = Rig::new();
    rig.run(|a| {
        a.push(0x102)?;
        a.popfq()?;
        a.inc(rbx)?;
        a.inc(rbx)?;
        a.int3()
    });
    assert_eq!((rig.vector(), rig.vcpu.save().gpr[3]), (1, 1));
}

#[test]
fn steps_from_branch_to_branch() {
    let mut rig = Rig::new();
    rig.change(|s| s.rflags |= rflags::TF);
    rig.change(|s| s.msrs.debugctl = 2);
    rig.run(|a| {
        let mut there = a.create_label();
        a.inc(rbx)?;
        a.jmp(there)?;
        a.nop()?;
        a.set_label(&mut there)?;
        a.inc(rbx)?;
        a.int3()
    });
    let s = rig.vcpu.save();
    assert_eq!((rig.vector(), s.gpr[3], s.msrs.debugctl), (1, 1, 0));
}

#[test]
fn a_debugger_stops_the_processor_and_goes_on() {
    let rig = Rig::new();
    let mut cpu = rig.accelerator.make(0).unwrap();
    rig.page(0, 3);
    let state = rig.kernel_state();
    rig.load(CODE, |a| {
        let mut again = a.create_label();
        a.mov(rsi, WINDOW)?;
        a.set_label(&mut again)?;
        a.inc(rbx)?; // CODE + 10
        a.mov(qword_ptr(rsi + 8), rbx)?;
        a.jmp(again)
    });
    terem_cpu::Vcpu::restore(&mut *cpu, &state).unwrap();
    let at_breakpoint = Stop::Debug(DebugEvent::Breakpoint(CODE + 10));
    let mut wanted = DebugControl { breakpoints: vec![CODE + 10], ..DebugControl::default() };
    for round in 0..3 {
        cpu.set_debugger(&wanted).unwrap();
        assert_eq!(cpu.run(), at_breakpoint);
        assert_eq!((cpu.rip, cpu.gpr[3]), (CODE + 10, round));
        wanted.pass = true;
    }
    wanted.pass = false;
    cpu.set_debugger(&wanted).unwrap();
    assert_eq!((cpu.run(), cpu.gpr[3]), (at_breakpoint, 2), "it has not been passed");
    let watchpoint = Watchpoint { address: WINDOW + 8, length: 4, kind: terem_cpu::WatchKind::Write };
    let wanted = DebugControl { watchpoints: vec![watchpoint], ..DebugControl::default() };
    cpu.set_debugger(&wanted).unwrap();
    assert_eq!(cpu.run(), Stop::Debug(DebugEvent::Watchpoint(watchpoint)));
    assert_eq!((cpu.rip, cpu.gpr[3]), (CODE + 17, 3), "after the store");
    cpu.set_debugger(&DebugControl { step: true, ..DebugControl::default() }).unwrap();
    assert_eq!((cpu.run(), cpu.rip), (Stop::Debug(DebugEvent::Step), CODE + 10));
    let long = Watchpoint { length: 9, ..watchpoint };
    assert!(cpu.set_debugger(&DebugControl { watchpoints: vec![long], ..DebugControl::default() }).is_err());
    assert_eq!(cpu.debug[dr6::INDEX] & 0xf, 0, "the guest's registers know nothing of it");
}

#[test]
fn misaligned_accesses_fault_at_privilege_3_where_both_flags_say_so() {
    for (am, ac, vector) in [(true, true, 17), (false, true, 13), (true, false, 13)] {
        let mut rig = Rig::new();
        rig.user();
        rig.load(super::USER_CODE, |a| {
            a.mov(rbx, WINDOW + 0x1001)?;
            a.mov(al, byte_ptr(rbx))?;
            a.mov(rax, qword_ptr(rbx + 7))?;
            a.mov(eax, dword_ptr(rbx))?;
            a.hlt()
        });
        rig.change(|s| {
            s.cr0 |= if am { crate::cpu::cr0::AM } else { 0 };
            s.rflags |= if ac { rflags::AC } else { 0 };
        });
        rig.vcpu.run();
        assert_eq!((rig.vector(), rig.stack(0)), (vector, 0), "{am} {ac}");
    }
}
