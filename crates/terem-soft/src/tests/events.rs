//! Exceptions and interrupts in long mode (Intel SDM vol. 3, chapter 6), `syscall`, `iret`, saved state.

use iced_x86::code_asm::*;
use terem_cpu::{Stop, rflags};

use super::{CODE, HANDLER_SIZE, HANDLERS, INNER_STACK, IST, Rig, STACK, USER_CODE, WINDOW};

#[test]
fn a_fault_points_at_its_instruction_and_a_software_interrupt_behind_it() {
    let mut rig = Rig::new();
    assert_eq!(
        rig.run(|a| {
            a.nop()?;
            a.ud2()
        }),
        Stop::Kicked
    );
    assert_eq!((rig.vector(), rig.stack(0), rig.stack(1)), (6, CODE + 1, 8));
    let mut rig = Rig::new();
    assert_eq!(rig.run(CodeAssembler::int3), Stop::Kicked);
    assert_eq!((rig.vector(), rig.stack(0)), (3, CODE + 1));
    assert_eq!(rig.stack(3), STACK, "the frame has the old stack pointer");
}

#[test]
fn a_user_fault_switches_to_the_inner_stack_and_iret_goes_back() {
    let mut rig = Rig::new();
    rig.user();
    rig.load(USER_CODE, |a| {
        a.mov(ebx, 7)?;
        a.hlt() // #GP(0) at privilege 3
    });
    assert_eq!(rig.vcpu.run(), Stop::Kicked);
    let s = rig.vcpu.save();
    assert_eq!((rig.vector(), rig.stack(0), rig.stack(1), rig.stack(2)), (13, 0, USER_CODE + 5, 0x23));
    assert_eq!((rig.stack(4), rig.stack(5)), (WINDOW + 0x2000, 0x1b));
    assert_eq!((s.gpr[4], s.segments[2].selector, s.gpr[3]), (INNER_STACK - 48, 0, 7));
    // Back to the instruction after the `hlt`, which calls 80h from privilege 3 again.
    rig.gate(0x80, HANDLERS + 0x80 * HANDLER_SIZE, 0xee, 0);
    rig.load(USER_CODE + 6, |a| a.int(0x80));
    rig.load(CODE, |a| {
        a.add(rsp, 8)?;
        a.inc(qword_ptr(rsp))?;
        a.iretq()
    });
    rig.change(|s| s.rip = CODE);
    assert_eq!(rig.vcpu.run(), Stop::Kicked);
    assert_eq!((rig.vector(), rig.stack(0), rig.stack(1)), (0x80, USER_CODE + 8, 0x23));
}

#[test]
fn a_gate_of_higher_privilege_refuses_int_n() {
    let mut rig = Rig::new();
    rig.user();
    rig.load(USER_CODE, |a| a.int(0x81));
    assert_eq!(rig.vcpu.run(), Stop::Kicked);
    assert_eq!((rig.vector(), rig.stack(0), rig.stack(1)), (13, 0x81 << 3 | 2, USER_CODE));
}

#[test]
fn an_interrupt_stack_is_used_where_the_gate_says() {
    let mut rig = Rig::new();
    rig.gate(6, HANDLERS + 6 * HANDLER_SIZE, 0x8e, 1);
    assert_eq!(rig.run(CodeAssembler::ud2), Stop::Kicked);
    assert_eq!((rig.vector(), rig.vcpu.save().gpr[4]), (6, IST - 40));
}

#[test]
fn a_fault_in_delivery_is_a_double_fault_and_one_in_that_shuts_down() {
    let mut rig = Rig::new();
    rig.gate(13, HANDLERS, 0x0e, 0); // not present
    let program = |a: &mut CodeAssembler| {
        a.mov(rax, 0x8000_0000_0000_u64)?; // not canonical
        a.mov(rbx, qword_ptr(rax))
    };
    assert_eq!(rig.run(program), Stop::Kicked);
    assert_eq!((rig.vector(), rig.stack(0)), (8, 0));
    let mut rig = Rig::new();
    rig.gate(13, HANDLERS, 0x0e, 0);
    rig.gate(8, HANDLERS, 0x0e, 0);
    assert_eq!(rig.run(program), Stop::Shutdown);
    assert_eq!(rig.vcpu.run(), Stop::Shutdown, "until a reset");
    rig.vcpu.reset();
    assert_eq!(rig.vcpu.save().rip, 0xfff0);
}

#[test]
fn single_steps_trap_after_each_instruction() {
    let mut rig = Rig::new();
    rig.change(|s| s.rflags |= rflags::TF);
    assert_eq!(
        rig.run(|a| {
            a.inc(rbx)?;
            a.inc(rbx)
        }),
        Stop::Kicked
    );
    let s = rig.vcpu.save();
    assert_eq!((rig.vector(), rig.stack(0), s.gpr[3]), (1, CODE + 3, 1));
    assert_ne!(s.debug[4] & 1 << 14, 0, "DR6.BS");
}

#[test]
fn syscall_and_sysret_go_there_and_back() {
    let mut rig = Rig::new();
    rig.user();
    rig.load(USER_CODE, |a| {
        a.syscall()?;
        a.int(0x80)
    });
    rig.gate(0x80, HANDLERS + 0x80 * HANDLER_SIZE, 0xee, 0);
    rig.load(CODE, |a| {
        a.mov(r15, rcx)?;
        a.mov(r14, cs)?;
        a.sysretq()
    });
    rig.change(|s| {
        s.msrs.star = 0x10 << 48 | 8 << 32;
        s.msrs.lstar = CODE;
        s.msrs.sfmask = rflags::IF | rflags::DF;
        s.rflags |= rflags::IF | rflags::DF | rflags::CF;
    });
    assert_eq!(rig.vcpu.run(), Stop::Kicked);
    let s = rig.vcpu.save();
    assert_eq!((rig.vector(), s.gpr[15], s.gpr[14]), (0x80, USER_CODE + 2, 8));
    assert_eq!(s.gpr[11] & 0x701, rflags::IF | rflags::DF | rflags::CF);
    assert_eq!((rig.stack(0), rig.stack(1), rig.stack(4)), (USER_CODE + 4, 0x23, 0x1b));
    assert_eq!(rig.stack(2) & (rflags::IF | rflags::DF), rflags::IF | rflags::DF, "flags came back");
}

#[test]
fn a_saved_state_goes_on_in_another_vcpu() {
    let mut rig = Rig::new();
    let program = |a: &mut CodeAssembler| {
        a.xor(eax, eax)?;
        a.cvtsi2sd(xmm3, rbx)?;
        a.out(u32::from(super::EXIT_PORT), al)?;
        a.addsd(xmm3, xmm3)?;
        a.cvttsd2si(rdx, xmm3)?;
        a.int3()
    };
    rig.change(|s| s.gpr[3] = 21);
    assert_eq!(rig.run(program), Stop::Kicked);
    // The kick is noticed when the block ends; by then the handler of `int3` may not have run.
    let text = serde_json::to_string(&rig.vcpu.save()).unwrap();
    let mut other = Rig::new();
    other.load(CODE, program);
    other.vcpu.restore(&serde_json::from_str(&text).unwrap()).unwrap();
    if other.vcpu.save().rip < HANDLERS {
        assert_eq!(other.vcpu.run(), Stop::Kicked);
    }
    assert_eq!(other.vcpu.save().gpr[2], 42);
    let mut bad = other.vcpu.save();
    bad.cr0 &= !1;
    assert!(other.vcpu.restore(&bad).is_err());
}
