//! What is seen of a vCPU from outside: steps, watchpoints, traces, counters, where addresses lead.

use std::sync::{Arc, Mutex};

use iced_x86::code_asm::*;
use terem_bus::{Clock, locked};
use terem_cpu::{
    Accelerator, DebugControl, DebugEvent, Exit, InterruptionKind, Stop, Trace, TraceEvent, TraceKind,
    TraceSink, WatchKind, Watchpoint, rflags,
};

use super::{CODE, EXIT_PORT, PAGES, Rig, WINDOW};

fn step() -> DebugControl {
    DebugControl { step: true, ..DebugControl::default() }
}

#[test]
fn a_step_is_one_instruction_and_interrupts_wait() {
    let mut rig = Rig::new();
    rig.load(CODE, |a| {
        a.sti()?;
        a.inc(rbx)?;
        a.inc(rbx)?;
        a.nop()
    });
    let vector = 0x40;
    rig.change(|s| s.apic.registers[0x0f] = 0x1ff);
    rig.accelerator.msi_sink().send_msi(terem_bus::MsiMessage { address: 0xfee0_0000, data: vector });
    for count in [0, 1, 2] {
        rig.vcpu.debug(&step()).unwrap();
        assert_eq!(rig.vcpu.run(), Stop::Debug(DebugEvent::Step));
        assert_eq!(rig.vcpu.save().gpr[3], count);
    }
    // Without the debugger it comes at once.
    rig.vcpu.debug(&DebugControl::default()).unwrap();
    assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, u64::from(vector)));
    assert_eq!(rig.vcpu.save().rflags & rflags::TF, 0);
}

#[test]
fn a_step_onto_a_fault_stops_before_its_handler() {
    let mut rig = Rig::new();
    rig.load(CODE, CodeAssembler::ud2);
    rig.vcpu.debug(&step()).unwrap();
    assert_eq!(rig.vcpu.run(), Stop::Debug(DebugEvent::Step));
    assert_eq!(rig.vcpu.save().rip, super::HANDLERS + 6 * super::HANDLER_SIZE);
}

#[test]
fn a_halted_vcpu_that_steps_wakes_up_with_its_interrupt() {
    let mut rig = Rig::new();
    rig.load(CODE, |a| {
        a.sti()?;
        a.hlt()
    });
    rig.change(|s| s.apic.registers[0x0f] = 0x1ff);
    for _ in 0..2 {
        rig.vcpu.debug(&step()).unwrap();
        assert_eq!(rig.vcpu.run(), Stop::Debug(DebugEvent::Step));
    }
    assert_eq!(rig.vcpu.save().mp_state, terem_cpu::MpState::Halted);
    rig.accelerator.msi_sink().send_msi(terem_bus::MsiMessage { address: 0xfee0_0000, data: 0x41 });
    rig.vcpu.debug(&step()).unwrap();
    assert_eq!(rig.vcpu.run(), Stop::Debug(DebugEvent::Step));
    assert_eq!(rig.vector(), 0x41);
}

#[test]
fn watchpoints_tell_reads_from_writes_also_in_translated_code() {
    for (kind, first) in [(WatchKind::Read, 2), (WatchKind::Write, 1), (WatchKind::Access, 1)] {
        let mut rig = Rig::new();
        rig.page(0, 3);
        let program = |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.mov(rsi, WINDOW)?;
            a.mov(ecx, 1000)?;
            a.set_label(&mut again)?;
            a.add(rax, rcx)?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.mov(rbx, 1_u64)?;
            a.mov(dword_ptr(rsi + 4), eax)?;
            a.mov(rbx, 2_u64)?;
            a.mov(al, byte_ptr(rsi + 7))?;
            a.mov(rbx, 3_u64)?;
            a.xadd(dword_ptr(rsi + 6), eax)?;
            a.mov(rbx, 4_u64)?;
            a.mov(al, byte_ptr(rsi + 8))?;
            a.mov(byte_ptr(rsi + 3), al)?;
            a.int3()
        };
        rig.load(CODE, program);
        let watchpoint = Watchpoint { address: WINDOW + 4, length: 4, kind };
        rig.vcpu.debug(&DebugControl { watchpoints: vec![watchpoint], ..DebugControl::default() }).unwrap();
        let stop = Stop::Debug(DebugEvent::Watchpoint(watchpoint));
        let expected: &[u64] = match kind {
            WatchKind::Access => &[1, 2, 3],
            _ => &[first, 3],
        };
        for count in expected {
            assert_eq!((rig.vcpu.run(), rig.vcpu.save().gpr[3]), (stop.clone(), *count), "{kind:?}");
        }
        assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 3), "{kind:?}");
    }
}

#[test]
fn a_watchpoint_under_pushes_stops_after_the_push_that_writes_there() {
    let mut rig = Rig::new();
    let program = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(ecx, 2000)?;
        a.set_label(&mut again)?;
        a.push(rax)?; // CODE + 5
        a.push(rbx)?;
        a.push(rcx)?;
        a.pop(rcx)?;
        a.pop(rbx)?;
        a.pop(rax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.int3()
    };
    // Once without, so that it is translated.
    assert_eq!((rig.run(program), rig.vector()), (Stop::Kicked, 3));
    rig.change(|s| (s.rip, s.gpr[4]) = (CODE, super::STACK));
    let watchpoint = Watchpoint { address: super::STACK - 16, length: 8, kind: WatchKind::Write };
    rig.vcpu.debug(&DebugControl { watchpoints: vec![watchpoint], ..DebugControl::default() }).unwrap();
    for left in [2000, 1999, 1998] {
        assert_eq!(rig.vcpu.run(), Stop::Debug(DebugEvent::Watchpoint(watchpoint)));
        let s = rig.vcpu.save();
        assert_eq!((s.rip, s.gpr[1], s.gpr[4]), (CODE + 7, left, super::STACK - 16));
    }
}

#[test]
fn a_breakpoint_in_code_that_is_translated_already_is_met() {
    let mut rig = Rig::new();
    rig.page(0, 3);
    rig.page(1, 3);
    // A loop over two pages: translations of both jump to each other.
    rig.load(WINDOW, |a| {
        a.inc(rbx)?;
        a.jmp(WINDOW + 0x1000)
    });
    rig.load(WINDOW + 0x1000, |a| {
        a.inc(rdx)?;
        a.dec(rcx)?;
        a.jne(WINDOW)?;
        a.int3()
    });
    rig.change(|s| {
        s.rip = WINDOW;
        s.gpr[1] = 1000;
        s.gpr[3] = 0;
        s.gpr[2] = 0;
    });
    assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 3));
    rig.change(|s| {
        s.rip = WINDOW;
        s.gpr[1] = 1000;
        s.gpr[2] = 0;
    });
    let mut wanted = DebugControl { breakpoints: vec![WINDOW + 0x1003], ..DebugControl::default() };
    for round in 1..4 {
        rig.vcpu.debug(&wanted).unwrap();
        assert_eq!(rig.vcpu.run(), Stop::Debug(DebugEvent::Breakpoint(WINDOW + 0x1003)));
        assert_eq!(rig.vcpu.save().gpr[2], round);
        wanted.pass = true;
    }
    assert_eq!(rig.get(PAGES + 0x1000) & 0xff, 0x48, "memory has no breakpoint in it");
}

#[test]
fn a_breakpoint_on_a_string_instruction_is_met_once_an_execution() {
    let mut rig = Rig::new();
    rig.page(0, 3);
    rig.load(CODE, |a| {
        a.mov(rdi, WINDOW)?;
        a.mov(ecx, 3000)?;
        a.rep().stosb()?;
        a.mov(rdi, WINDOW)?;
        a.mov(ecx, 2)?;
        a.rep().stosb()?;
        a.int3()
    });
    let at = CODE + 15;
    let mut wanted = DebugControl { breakpoints: vec![at], ..DebugControl::default() };
    // A watchpoint on the page has the instruction done in rounds.
    let elsewhere = Watchpoint { address: WINDOW + 0xff0, length: 1, kind: WatchKind::Write };
    wanted.watchpoints.push(elsewhere);
    rig.vcpu.debug(&wanted).unwrap();
    assert_eq!(rig.vcpu.run(), Stop::Debug(DebugEvent::Breakpoint(at)));
    wanted.pass = true;
    rig.vcpu.debug(&wanted).unwrap();
    assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 3));
}

#[test]
fn addresses_are_looked_up_without_any_effect() {
    let mut rig = Rig::new();
    rig.page(3, 1); // read-only, supervisor
    assert_eq!(rig.vcpu.translate(WINDOW + 0x3123), Some(PAGES + 0x3123));
    assert_eq!(rig.get(super::PAGE_TABLE + 3 * 8) & 0x60, 0, "not even accessed");
    assert_eq!(rig.vcpu.translate(WINDOW + 0x4000), None);
    assert_eq!(rig.vcpu.translate(0x12_3456), Some(0x12_3456), "a large page");
    assert_eq!(rig.vcpu.translate(1 << 47), None, "not canonical");
    rig.change(|s| s.cr0 &= !(1 << 31));
    assert_eq!(rig.vcpu.translate(WINDOW + 0x4000), Some(WINDOW + 0x4000));
}

/// Remembers what it is told.
#[derive(Default)]
struct Memory(Mutex<Vec<TraceEvent>>);

impl TraceSink for Memory {
    fn event(&self, vcpu: u32, event: TraceEvent) {
        assert_eq!(vcpu, 0);
        locked(&self.0).push(event);
    }
}

fn traced(instructions: bool, interrupts: bool, exits: bool) -> Vec<TraceEvent> {
    let memory = Arc::new(Memory::default());
    let trace = Trace { instructions, interrupts, exits, sink: Arc::clone(&memory) as _ };
    let mut rig = Rig::traced(1, Clock::manual(), Some(trace));
    let stop = rig.run(|a| {
        a.mov(eax, 0x1234)?;
        a.in_(ax, 0x60)?;
        a.mov(rcx, WINDOW)?;
        a.mov(dl, byte_ptr(rcx))
    });
    assert_eq!((stop, rig.vector()), (Stop::Kicked, 14));
    locked(&memory.0).clone()
}

#[test]
fn a_trace_has_each_instruction_event_and_exit_with_its_place() {
    let lengths: Vec<(u64, u8)> = traced(true, false, false)
        .iter()
        .map(|e| match e.kind {
            TraceKind::Instruction(i) => (e.rip, i.len),
            _ => panic!("{e:?}"),
        })
        .collect();
    let handler = super::HANDLERS + 14 * super::HANDLER_SIZE;
    let expected = [(0, 5), (5, 3), (8, 10), (18, 2)].map(|(at, len)| (CODE + at, len));
    assert_eq!(lengths[..4], expected);
    assert_eq!(lengths[4..6], [(handler, 2), (handler + 2, 2)]);

    let events = traced(false, true, false);
    let [TraceEvent { selector: 8, rip, kind: TraceKind::Interruption(i) }] = events[..] else {
        panic!("{events:?}")
    };
    assert_eq!((rip, i.kind, i.vector), (CODE + 18, InterruptionKind::Exception, 14));
    assert_eq!((i.error, i.address), (Some(0), Some(WINDOW)));

    let exits = traced(false, false, true);
    let port =
        |address, size, write, value| TraceKind::Exit(Exit { port: true, address, size, write, value });
    assert_eq!((exits[0].rip, exits[0].kind), (CODE + 5, port(0x60, 2, false, 0xffff)));
    assert_eq!((exits[1].rip, exits[1].kind), (handler + 2, port(u64::from(EXIT_PORT), 1, true, 0)));
    assert_eq!(exits.len(), 2);
}

#[test]
fn counters_count() {
    let mut rig = Rig::new();
    let before = rig.accelerator.counters(0).unwrap();
    rig.run(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 10_000)?;
        a.set_label(&mut again)?;
        a.in_(al, 0x60)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        a.int3()
    });
    let after = rig.accelerator.counters(0).unwrap();
    assert!(after.port_accesses - before.port_accesses >= 10_000, "{after:?}");
    assert!(after.instructions_interpreted > before.instructions_interpreted, "{after:?}");
    assert!(
        after.blocks_translated >= 1 && after.code_bytes > 0 && after.code_capacity > after.code_bytes,
        "{after:?}"
    );
    assert!(
        after.page_walks > 0 && after.tlb_flushes > before.tlb_flushes && after.exceptions >= 1,
        "{after:?}"
    );
    assert_eq!((after.interrupts, after.halted), (0, false));
    assert!(rig.accelerator.counters(1).is_none());
}
