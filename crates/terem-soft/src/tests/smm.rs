//! System management mode (Intel SDM vol. 3, chapter 31; AMD APM vol. 2, chapter 10).

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use terem_bus::{Clock, MsiMessage};
use terem_cpu::{Accelerator, MpState, Segment, Stop, VcpuState, rflags};
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::team::{Team, WAYS, end, wait_for};
use super::{CODE, EXIT_PORT, Rig, STACK, USER_CODE};
use crate::cpu::{cr0, cr4};

/// Where the handler is, and the saved state (as an offset in its CS too).
const BASE: u64 = 0x3_0000;
const HANDLER: u64 = BASE + 0x8000;
const SAVED: u64 = BASE + 0xfe00;
/// How often the handler has run, by its DS of 0.
const COUNT: u64 = 0x9000;

/// A handler in real mode's code, which begins at offset 8000h.
fn handler(rig: &Rig, program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    let mut a = CodeAssembler::new(16).unwrap();
    a.inc(dword_ptr(COUNT)).unwrap();
    program(&mut a).unwrap();
    a.rsm().unwrap();
    rig.memory.write_slice(&a.assemble(0x8000).unwrap(), GuestAddress(HANDLER)).unwrap();
}

/// Stops here: between blocks somebody looks.
fn stop(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut on = a.create_label();
    a.mov(al, 0)?;
    a.out(u32::from(EXIT_PORT), al)?;
    a.jmp(on)?;
    a.set_label(&mut on)?;
    a.nop()
}

/// An SMI, or another delivery mode, for vCPU 0 by a message.
fn send(rig: &Rig, mode: u32) {
    rig.accelerator.msi_sink().send_msi(MsiMessage { address: 0xfee0_0000, data: mode << 8 });
}
const SMI: u32 = 2;
const NMI: u32 = 4;
const INIT: u32 = 5;

/// `program` with an SMI before its first instruction.
fn run(rig: &mut Rig, program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Stop {
    rig.load(CODE, program);
    send(rig, SMI);
    rig.vcpu.run()
}

#[test]
fn the_handler_is_entered_as_the_manual_says() {
    let mut rig = Rig::new();
    // It stops in the middle: what the processor is like there.
    handler(&rig, |a| {
        a.mov(ebx, 5)?;
        stop(a)
    });
    let before = rig.vcpu.save();
    assert_eq!(run(&mut rig, CodeAssembler::int3), Stop::Kicked);
    let s = rig.vcpu.save();
    assert!(s.smm.active && s.nmi_masked);
    assert_eq!(s.cr0, before.cr0 & !(cr0::PE | cr0::EM | cr0::TS | cr0::PG));
    assert_eq!((s.cr4, s.msrs.efer, s.debug[5], s.rflags & !rflags::ARITHMETIC), (0, 0, 0x400, 2));
    let code = s.segments[VcpuState::CS];
    assert_eq!(
        (code.selector, code.base, code.limit, code.access & Segment::BIG),
        (0x3000, BASE, u32::MAX, 0)
    );
    for n in [0, 2, 3, 4, 5] {
        let d = s.segments[n];
        assert_eq!((d.selector, d.base, d.limit), (0, 0, u32::MAX));
    }
    assert_eq!((s.gdtr, s.idtr, s.tr, s.ldtr), (before.gdtr, before.idtr, before.tr, before.ldtr));
    assert_eq!((s.gpr[3], &s.gpr[4..]), (before.gpr[3] & !0xffff_ffff | 5, &before.gpr[4..]));
    // A saved state has all of it: it goes on elsewhere and comes back from there.
    let json = serde_json::to_string(&s).unwrap();
    rig.vcpu.reset();
    rig.vcpu.restore(&serde_json::from_str(&json).unwrap()).unwrap();
    assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 3));
    let after = rig.vcpu.save();
    assert!(!after.smm.active && !after.nmi_masked);
    assert_eq!(after.gpr[1..4], before.gpr[1..4], "RSM gives back EBX");
}

#[test]
fn the_saved_state_is_where_firmware_looks_for_it() {
    let mut rig = Rig::new();
    handler(&rig, |_| Ok(()));
    let mut before = rig.vcpu.save();
    for (n, r) in before.gpr.iter_mut().enumerate() {
        *r = 0x1111_2222_3333_4400 + n as u64;
    }
    before.gpr[4] = STACK;
    before.ldtr = Segment { selector: 0x38, base: 0x1234_5678, limit: 0xfff, access: 0x82 };
    before.debug[5] = 0x500;
    before.segments[VcpuState::FS].base = 0xffff_8000_0000_1000;
    rig.vcpu.restore(&before).unwrap();
    assert_eq!((run(&mut rig, CodeAssembler::int3), rig.vector()), (Stop::Kicked, 3));
    let at = |offset: u64, size: u32| rig.get(SAVED + offset) & (u64::MAX >> (64 - 8 * size));
    // AMD APM vol. 2, table 10-1: offsets from FE00h.
    for (n, offset) in (0..16).map(|n| (n, 0x1f8 - 8 * n)) {
        assert_eq!(at(offset, 8), before.gpr[n as usize]);
    }
    assert_eq!((at(0x178, 8), at(0x170, 8)), (CODE, 2));
    assert_eq!((at(0x158, 8), at(0x150, 8), at(0x148, 8)), (before.cr0, before.cr3, before.cr4));
    assert_eq!((at(0x160, 8), at(0x168, 8), at(0xd0, 8)), (0x500, 0xffff_0ff0, before.msrs.efer));
    assert_eq!((at(0xfc, 4), at(0x100, 4), at(0xc9, 1)), (0x2_0064, BASE, 0));
    // CS: selector, attributes, limit, base; then FS' base, LDTR, TR, the tables.
    assert_eq!([at(0x10, 2), at(0x12, 2), at(0x14, 4), at(0x18, 8)], [8, 0xa09b, 0xffff_ffff, 0]);
    assert_eq!(at(0x48, 8), 0xffff_8000_0000_1000);
    assert_eq!([at(0x70, 2), at(0x72, 2), at(0x74, 4), at(0x78, 8)], [0x38, 0x82, 0xfff, 0x1234_5678]);
    assert_eq!([at(0x90, 2), at(0x92, 2), at(0x94, 4), at(0x98, 8)], [0x28, 0x8b, 0x67, super::TSS]);
    assert_eq!([at(0x64, 2), at(0x68, 8)], [7 * 8 - 1, super::GDT]);
    assert_eq!([at(0x84, 2), at(0x88, 8)], [0xfff, super::IDT]);
    // And it all comes back.
    let after = rig.vcpu.save();
    assert_eq!((&after.gpr[1..4], &after.gpr[5..]), (&before.gpr[1..4], &before.gpr[5..]));
    assert_eq!((after.segments[4], after.ldtr, after.tr), (before.segments[4], before.ldtr, before.tr));
    assert_eq!(
        (after.cr0, after.cr3, after.cr4, after.msrs),
        (before.cr0, before.cr3, before.cr4, before.msrs)
    );
    assert_eq!(after.debug, before.debug);
}

#[test]
fn a_model_without_long_mode_has_the_map_of_32_bits() {
    let mut rig = Rig::modelled("terem64,-lm", 1, Clock::manual(), None, true);
    let power_on = VcpuState::power_on(0, true);
    let mut before = VcpuState { apic: rig.vcpu.save().apic, ..power_on };
    for (n, s) in before.segments.iter_mut().enumerate() {
        *s = Segment::flat(if n == 1 { 8 } else { 0x10 }, n == 1, false);
    }
    before.gdtr = terem_cpu::DescriptorTable { base: 0x1234, limit: 0x567 };
    (before.cr0, before.rip, before.gpr) =
        (cr0::PE | cr0::ET, CODE, std::array::from_fn(|n| 0x4400 + n as u64));
    rig.vcpu.restore(&before).unwrap();
    handler(&rig, |a| a.add(dword_ptr(0xffd0), 1));
    rig.memory.write_slice(&[0xe6, EXIT_PORT as u8, 0xeb, 0xfe], GuestAddress(CODE)).unwrap(); // out; jmp $
    rig.change(|s| s.gpr[0] = 0);
    send(&rig, SMI);
    // The handler's DS is 0, so that was not the saved state: nothing is changed.
    assert_eq!(rig.vcpu.run(), Stop::Kicked);
    let at = |offset: u64| rig.get(BASE + 0x8000 + offset) & 0xffff_ffff;
    // Intel SDM vol. 3, table 31-1: offsets from SMBASE + 8000h.
    assert_eq!([at(0x7ffc), at(0x7ff4), at(0x7ff0)], [0x11, 2, CODE]);
    assert_eq!([at(0x7fd0), at(0x7fd4), at(0x7fd8), at(0x7fdc)], [0, 0x4401, 0x4402, 0x4403]);
    assert_eq!([at(0x7fe0), at(0x7fe4), at(0x7fe8), at(0x7fec)], [0x4404, 0x4405, 0x4406, 0x4407]);
    assert_eq!([at(0x7fac), at(0x7fb0), at(0x7fa8)], [8, 0x10, 0x10]);
    assert_eq!([at(0x7efc), at(0x7ef8), at(0x7f74), at(0x7f70)], [0x2_0000, BASE, 0x1234, 0x567]);
    let after = rig.vcpu.save();
    assert_eq!((&after.gpr[1..8], after.rip), (&before.gpr[1..8], CODE + 2));
    assert_eq!((after.segments, after.cr0), (before.segments, before.cr0));
}

#[test]
fn the_handler_changes_registers_and_where_the_next_one_is() {
    let mut rig = Rig::new();
    handler(&rig, |a| {
        a.db(&[0x2e])?; // CS
        a.mov(byte_ptr(0xfff8), 0x77)?; // RAX
        a.db(&[0x2e])?;
        a.mov(dword_ptr(0xff00), 0x5_0000) // SMBASE
    });
    // The second one.
    let mut a = CodeAssembler::new(16).unwrap();
    a.mov(dword_ptr(COUNT + 8), 2).unwrap();
    a.mov(ecx, 0x9e).unwrap();
    a.rdmsr().unwrap();
    a.mov(dword_ptr(COUNT + 16), eax).unwrap();
    a.rsm().unwrap();
    rig.memory.write_slice(&a.assemble(0x8000).unwrap(), GuestAddress(0x5_8000)).unwrap();
    let program = |a: &mut CodeAssembler| {
        a.mov(rbx, rax)?;
        a.int3()
    };
    assert_eq!((run(&mut rig, program), rig.vector()), (Stop::Kicked, 3));
    let s = rig.vcpu.save();
    assert_eq!((s.gpr[3], s.smm.base), (0x77, 0x5_0000));
    rig.change(|s| s.rip = CODE);
    assert_eq!((run(&mut rig, program), rig.vector()), (Stop::Kicked, 3));
    assert_eq!([rig.get(COUNT), rig.get(COUNT + 8), rig.get(COUNT + 16)], [1, 2, 0x5_0000]);
    assert_eq!(rig.get(0x5_0000 + 0xff00) & 0xffff_ffff, 0x5_0000);
}

#[test]
fn one_smi_waits_in_the_mode_and_nmi_until_its_end() {
    let mut rig = Rig::new();
    handler(&rig, |a| {
        let mut again = a.create_label();
        a.cmp(dword_ptr(COUNT), 1)?;
        a.jne(again)?;
        // To be sent more.
        stop(a)?;
        a.set_label(&mut again)?;
        a.nop()
    });
    assert_eq!(run(&mut rig, CodeAssembler::int3), Stop::Kicked);
    for mode in [SMI, NMI, SMI, NMI] {
        send(&rig, mode);
    }
    assert!(rig.vcpu.save().smm.pending);
    rig.change(|_| ()); // all of that is in a saved state
    assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 2), "the NMI comes after both");
    assert_eq!((rig.get(COUNT), rig.stack(0)), (2, CODE));
    // In an NMI's handler NMIs stay held back, also after another SMI.
    send(&rig, SMI);
    send(&rig, NMI);
    rig.change(|s| s.rip = CODE);
    assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 3));
    assert_eq!((rig.get(COUNT), rig.vcpu.save().nmi_masked), (3, true));
}

#[test]
fn an_init_waits_for_the_end_of_the_mode() {
    let mut rig = Rig::new();
    handler(&rig, |a| {
        stop(a)?;
        a.mov(dword_ptr(COUNT + 8), 1)?;
        // To stop after the INIT: that comes first, and `rsm` is in this block.
        a.mov(al, 0)?;
        a.out(u32::from(EXIT_PORT), al)
    });
    assert_eq!(run(&mut rig, CodeAssembler::int3), Stop::Kicked);
    send(&rig, INIT | 1 << 6); // asserted
    rig.accelerator.kick(0);
    assert_eq!(rig.vcpu.run(), Stop::Kicked);
    assert!(rig.vcpu.save().smm.active && rig.vcpu.save().smm.init_pending);
    assert_eq!(rig.vcpu.run(), Stop::Kicked);
    let s = rig.vcpu.save();
    assert_eq!((rig.get(COUNT + 8), s.smm.active, s.segments[1].selector), (1, false, 0xf000));
}

#[test]
fn rsm_elsewhere_is_undefined_and_to_nowhere_shuts_down() {
    let mut rig = Rig::new();
    assert_eq!((rig.run(CodeAssembler::rsm), rig.vector()), (Stop::Kicked, 6));
    type Change = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let bad: [(&str, Change); 6] = [
        ("paging without protection", |a| a.and(dword_ptr(0xff58), !1)),
        ("CR0.NW without CD", |a| a.or(dword_ptr(0xff58), 1 << 29)),
        ("an unknown bit of CR4", |a| a.or(dword_ptr(0xff48), 1 << 31)),
        ("long mode without PAE", |a| a.and(dword_ptr(0xff48), !0x20)),
        ("EFER.LMA without LME", |a| a.and(dword_ptr(0xfed0), !0x100)),
        ("virtual-8086 mode in long mode", |a| a.or(dword_ptr(0xff70), 1 << 17)),
    ];
    for (what, change) in bad {
        let mut rig = Rig::new();
        handler(&rig, |a| {
            a.db(&[0x2e])?;
            change(a)
        });
        assert_eq!(run(&mut rig, CodeAssembler::int3), Stop::Shutdown, "{what}");
    }
}

#[test]
fn a_halted_processor_goes_on_sleeping_unless_the_handler_says_otherwise() {
    for wakes in [false, true] {
        let mut rig = Rig::new();
        handler(&rig, |a| {
            stop(a)?;
            if wakes {
                a.db(&[0x2e])?;
                a.mov(byte_ptr(0xfec9), 0)?;
            }
            Ok(())
        });
        rig.load(CODE, |a| {
            a.hlt()?;
            a.int3()
        });
        rig.change(|s| (s.rip, s.mp_state) = (CODE + 1, MpState::Halted));
        send(&rig, SMI);
        assert_eq!(rig.vcpu.run(), Stop::Kicked);
        assert_eq!((rig.get(SAVED + 0xc9) & 0xff, rig.vcpu.save().mp_state), (1, MpState::Running));
        if wakes {
            assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 3));
            continue;
        }
        let accelerator = std::sync::Arc::clone(&rig.accelerator);
        let waker = std::thread::spawn(move || {
            while !accelerator.counters(0).unwrap().halted {
                std::thread::yield_now();
            }
            accelerator.kick(0);
        });
        assert_eq!(rig.vcpu.run(), Stop::Kicked);
        waker.join().unwrap();
        let s = rig.vcpu.save();
        assert_eq!((s.mp_state, s.rip, s.smm.active), (MpState::Halted, CODE + 1, false));
    }
}

#[test]
fn user_code_comes_back_as_user_code() {
    let mut rig = Rig::new();
    rig.user();
    rig.load(USER_CODE, CodeAssembler::hlt); // #GP(0): privilege 3
    handler(&rig, |_| Ok(()));
    rig.change(|s| s.cr4 |= cr4::SMEP);
    send(&rig, SMI);
    assert_eq!((rig.vcpu.run(), rig.vector(), rig.get(COUNT)), (Stop::Kicked, 13, 1));
    assert_eq!((rig.stack(1), rig.stack(2)), (USER_CODE, 0x23));
}

/// The port that firmware writes is the chipset's: it calls this.
#[test]
fn running_code_is_interrupted_and_does_not_notice() {
    for translate in WAYS {
        let mut team = Team::new(2, translate);
        handler(&team.rig, |a| {
            a.mov(ebx, 0x1234)?;
            a.xor(esi, esi)
        });
        let sum = COUNT + 8;
        team.program(0, |a| {
            let mut again = a.create_label();
            a.mov(r15d, 100)?;
            a.set_label(&mut again)?;
            // To vCPU 1 only, by the ICR.
            a.mov(r14d, dword_ptr(COUNT))?;
            super::team::send(a, 1, SMI << 8)?;
            a.lea(eax, dword_ptr(r14 + 1))?;
            wait_for(a, COUNT)?;
            a.dec(r15d)?;
            a.jne(again)?;
            end(a)
        });
        team.program(1, |a| {
            let (mut again, mut more) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.mov(esi, 1000)?;
            a.xor(ebx, ebx)?;
            a.set_label(&mut more)?;
            a.add(rbx, rsi)?;
            a.dec(rsi)?;
            a.jne(more)?;
            a.sub(rbx, 500_500)?;
            a.or(qword_ptr(sum), rbx)?;
            a.jmp(again)
        });
        team.run();
        assert_eq!((team.rig.get(COUNT) & 0xffff_ffff, team.rig.get(sum)), (100, 0), "translate {translate}");
    }
    let mut rig = Rig::new();
    handler(&rig, |_| Ok(()));
    rig.accelerator.apic_bus().pulse_smi();
    assert_eq!((rig.run(CodeAssembler::int3), rig.get(COUNT)), (Stop::Kicked, 1));
}
