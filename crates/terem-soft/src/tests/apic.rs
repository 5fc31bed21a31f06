//! The local APIC: timer, priorities, inter-processor interrupts, EOI.

use std::sync::{Arc, Mutex};

use iced_x86::code_asm::*;
use terem_bus::{ApicMessage, Clock, DeliveryMode, EoiSink, locked};
use terem_cpu::{Accelerator, MpState, Stop, VcpuState, rflags};

use super::{CODE, Rig};
use crate::accelerator::TSC_KHZ;

const APIC_BASE: u32 = 0x1b;
const TPR: u32 = 0x808;
const EOI: u32 = 0x80b;
const SVR: u32 = 0x80f;
const LVT_TIMER: u32 = 0x832;
const INITIAL: u32 = 0x838;
const DIVIDE: u32 = 0x83e;
const TSC_DEADLINE: u32 = 0x6e0;

fn message(mode: DeliveryMode, destination: u32, vector: u8, level: bool) -> ApicMessage {
    ApicMessage { destination, logical: false, mode, vector, level_triggered: level, assert: true }
}

fn wrmsr(a: &mut CodeAssembler, number: u32, value: u64) -> Result<(), iced_x86::IcedError> {
    a.mov(ecx, number)?;
    a.mov(rax, value)?;
    a.mov(rdx, value >> 32)?;
    a.wrmsr()
}

/// x2APIC mode, software-enabled.
fn enable(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    wrmsr(a, APIC_BASE, 0xfee0_0d00)?;
    wrmsr(a, SVR, 0x1ff)
}

fn wait(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    let mut here = a.create_label();
    a.sti()?;
    a.set_label(&mut here)?;
    a.hlt()?;
    a.jmp(here)
}

#[test]
fn the_timer_fires_once_again_and_again_and_at_a_deadline() {
    for mode in [0_u64, 1, 2] {
        let mut rig = Rig::with(1, Clock::system(0));
        rig.bus.clock.resume();
        let before = rig.bus.clock.now();
        let stop = rig.run(|a| {
            enable(a)?;
            wrmsr(a, LVT_TIMER, mode << 17 | 0x40)?;
            wrmsr(a, DIVIDE, 0xb)?; // by 1
            if mode == 2 {
                a.rdtsc()?;
                a.shl(rdx, 32)?;
                a.or(rax, rdx)?;
                a.add(rax, 2_000_000)?;
                a.mov(rdx, rax)?;
                a.shr(rdx, 32)?;
                a.mov(ecx, TSC_DEADLINE)?;
                a.wrmsr()?;
            } else {
                wrmsr(a, INITIAL, 2_000_000)?;
            }
            wait(a)
        });
        assert_eq!((stop, rig.vector()), (Stop::Kicked, 0x40), "mode {mode}");
        let passed = rig.bus.clock.now() - before;
        assert!(passed >= 2_000_000, "fired after {passed} ns at {TSC_KHZ} kHz");
        if mode == 1 {
            // The second period, after an end of interrupt.
            rig.load(CODE, |a| {
                wrmsr(a, EOI, 0)?;
                wait(a)
            });
            rig.change(|s| s.rip = CODE);
            assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 0x40));
        }
    }
}

#[test]
fn the_task_priority_holds_back_what_is_not_above_it() {
    let mut rig = Rig::new();
    rig.run(|a| {
        enable(a)?;
        wrmsr(a, TPR, 0x40)?;
        a.sti()?;
        a.nop()?;
        a.int3()
    });
    assert_eq!(rig.vector(), 3);
    rig.accelerator.apic_bus().deliver(message(DeliveryMode::Fixed, 0, 0x45, false));
    rig.accelerator.apic_bus().deliver(message(DeliveryMode::Fixed, 0, 0x51, false));
    let again = |rig: &mut Rig| {
        rig.load(CODE, |a| {
            a.sti()?;
            a.nop()?;
            a.nop()?;
            a.int3()
        });
        rig.change(|s| s.rip = CODE);
        assert_eq!(rig.vcpu.run(), Stop::Kicked);
        rig.vector()
    };
    assert_eq!(again(&mut rig), 0x51, "the higher class comes");
    assert_eq!(again(&mut rig), 3, "45h waits: 51h is in service, and TPR is 40h");
    rig.load(CODE, |a| {
        wrmsr(a, EOI, 0)?;
        wrmsr(a, TPR, 0)?;
        a.sti()?;
        a.nop()?;
        a.int3()
    });
    rig.change(|s| s.rip = CODE);
    assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 0x45));
}

#[derive(Default)]
struct Ended(Mutex<Vec<u8>>);

impl EoiSink for Ended {
    fn end_of_interrupt(&self, vector: u8) {
        locked(&self.0).push(vector);
    }
}

#[test]
fn the_end_of_a_level_interrupt_is_told_and_of_an_edge_not() {
    let mut rig = Rig::new();
    let ended = Arc::new(Ended::default());
    rig.bus.set_eoi_sink(Arc::clone(&ended) as _);
    rig.run(|a| {
        enable(a)?;
        a.int3()
    });
    for (vector, level) in [(0x60, true), (0x70, false)] {
        rig.accelerator.apic_bus().deliver(message(DeliveryMode::Fixed, 0, vector, level));
        rig.load(CODE, |a| {
            a.sti()?;
            a.nop()?;
            a.hlt()
        });
        rig.change(|s| s.rip = CODE);
        assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, u64::from(vector)));
        rig.load(CODE, |a| {
            wrmsr(a, EOI, 0)?;
            a.int3()
        });
        rig.change(|s| s.rip = CODE);
        assert_eq!(rig.vcpu.run(), Stop::Kicked);
    }
    assert_eq!(*locked(&ended.0), [0x60]);
}

#[test]
fn another_processor_starts_where_the_start_up_message_says() {
    let rig = Rig::with(2, Clock::manual());
    let mut second = rig.accelerator.create_vcpu(1).unwrap();
    assert_eq!(second.save().mp_state, MpState::WaitForStartUp);
    // mov al, 1; out f4h, al; jmp $ in real mode.
    rig.put(0x3000, 0xfeeb_f4e6_01b0_u64);
    // Both are there before the processor's thread has looked once.
    let bus = rig.accelerator.apic_bus();
    bus.deliver(message(DeliveryMode::Init, 1, 0, false));
    bus.deliver(message(DeliveryMode::StartUp, 1, 3, false));
    assert_eq!(second.run(), Stop::Kicked);
    let s = second.save();
    assert_eq!((s.mp_state, s.segments[VcpuState::CS].selector, s.rip), (MpState::Running, 0x300, 4));
    // INIT sends it back to waiting; a kick is noticed there as well.
    bus.deliver(message(DeliveryMode::Init, 1, 0, false));
    rig.accelerator.kick(1);
    assert_eq!(second.run(), Stop::Kicked);
    rig.accelerator.kick(1);
    assert_eq!(second.run(), Stop::Kicked);
    assert_eq!(second.save().mp_state, MpState::WaitForStartUp);
}

#[test]
fn an_nmi_comes_in_spite_of_cli_and_not_twice() {
    let mut rig = Rig::new();
    rig.run(|a| {
        enable(a)?;
        a.int3()
    });
    rig.accelerator.apic_bus().deliver(message(DeliveryMode::Nmi, 0, 0, false));
    rig.load(CODE, |a| {
        a.nop()?;
        a.int3()
    });
    rig.change(|s| {
        s.rip = CODE;
        s.rflags &= !rflags::IF;
    });
    assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 2));
    rig.accelerator.apic_bus().deliver(message(DeliveryMode::Nmi, 0, 0, false));
    rig.change(|s| s.rip = CODE);
    assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 3), "held back until iret");
}
