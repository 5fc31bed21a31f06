//! Code that is written over: by itself, by another page's code, by a device.

use iced_x86::code_asm::*;
use terem_cpu::Stop;
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::{CODE, PAGES, Rig, WINDOW};

#[test]
fn a_store_into_the_running_block_counts_for_the_next_instruction() {
    let mut rig = Rig::new();
    // mov byte [patch + 1], 5; patch: mov al, 1 → 5 is what must be loaded.
    let stop = rig.run(|a| {
        let mut patch = a.create_label();
        a.lea(rcx, ptr(patch))?;
        a.mov(byte_ptr(rcx + 1), 5)?;
        a.set_label(&mut patch)?;
        a.mov(bl, 1)?;
        a.int3()
    });
    assert_eq!(stop, Stop::Kicked);
    assert_eq!(rig.vcpu.save().gpr[3] & 0xff, 5);
}

#[test]
fn a_loop_that_patches_a_function_each_time_calls_the_new_one() {
    let mut rig = Rig::new();
    rig.page(2, 3);
    rig.load(WINDOW + 0x2000, |a| {
        a.mov(eax, 0)?;
        a.ret()
    });
    let stop = rig.run(|a| {
        let mut again = a.create_label();
        a.mov(rcx, WINDOW + 0x2000)?;
        a.mov(edx, 1000)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(rcx + 1), edx)?;
        a.call(rcx)?;
        a.add(ebx, eax)?;
        a.dec(edx)?;
        a.jne(again)?;
        a.int3()
    });
    assert_eq!(stop, Stop::Kicked);
    assert_eq!(rig.vcpu.save().gpr[3], 1000 * 1001 / 2);
}

#[test]
fn what_a_device_writes_over_code_is_executed() {
    let mut rig = Rig::new();
    rig.page(2, 3);
    let function = |n: u32| {
        move |a: &mut CodeAssembler| {
            a.mov(ebx, n)?;
            a.int3()
        }
    };
    rig.load(WINDOW + 0x2000, function(1));
    let program = |a: &mut CodeAssembler| {
        a.mov(rcx, WINDOW + 0x2000)?;
        a.jmp(rcx)
    };
    assert_eq!(rig.run(program), Stop::Kicked);
    assert_eq!(rig.vcpu.save().gpr[3], 1);
    let mut code = [0; 5];
    rig.memory.read_slice(&mut code, GuestAddress(PAGES + 0x2000)).unwrap();
    code[1] = 2;
    rig.memory.write_slice(&code, GuestAddress(PAGES + 0x2000)).unwrap();
    rig.change(|s| s.rip = CODE);
    assert_eq!(rig.vcpu.run(), Stop::Kicked);
    assert_eq!(rig.vcpu.save().gpr[3], 2);
}

#[test]
fn the_same_address_in_another_address_space_is_other_code() {
    let mut rig = Rig::new();
    // Pages 2 and 3 hold different code; the page table entry of page 2 is switched between them.
    for (page, value) in [(2_u64, 1_u32), (3, 2)] {
        rig.page(page, 3);
        rig.load(WINDOW + page * 0x1000, |a| {
            a.add(ebx, value)?;
            a.ret()
        });
    }
    let entry = rig.get(super::PAGE_TABLE + 24);
    let stop = rig.run(|a| {
        a.xor(ebx, ebx)?;
        a.mov(rcx, WINDOW + 0x2000)?;
        a.call(rcx)?;
        a.mov(rax, super::PAGE_TABLE)?;
        a.mov(rdx, entry)?;
        a.mov(qword_ptr(rax + 16), rdx)?;
        a.invlpg(byte_ptr(rcx))?;
        a.call(rcx)?;
        a.int3()
    });
    assert_eq!(stop, Stop::Kicked);
    assert_eq!(rig.vcpu.save().gpr[3], 3);
}

#[test]
fn an_instruction_across_two_pages_follows_both() {
    let mut rig = Rig::new();
    rig.page(2, 3);
    rig.page(3, 3);
    rig.page(4, 3);
    let at = WINDOW + 0x3000 - 2;
    let body = super::assemble(at, |a| {
        a.mov(ebx, 0x0101_0101)?;
        a.ret()
    });
    rig.memory.write_slice(&body, GuestAddress(PAGES + 0x3000 - 2)).unwrap();
    // Page 4 has the second half with other bytes.
    let mut second = body[2..].to_vec();
    second[0] = 2;
    rig.memory.write_slice(&second, GuestAddress(PAGES + 0x4000)).unwrap();
    let entry = rig.get(super::PAGE_TABLE + 32);
    let stop = rig.run(|a| {
        a.mov(rcx, at)?;
        a.call(rcx)?;
        a.mov(r8d, ebx)?;
        a.mov(rax, super::PAGE_TABLE)?;
        a.mov(rdx, entry)?;
        a.mov(qword_ptr(rax + 24), rdx)?;
        a.invlpg(byte_ptr(rcx + 2))?;
        a.call(rcx)?;
        a.int3()
    });
    assert_eq!(stop, Stop::Kicked);
    let gpr = rig.vcpu.save().gpr;
    assert_eq!((gpr[8], gpr[3]), (0x0101_0101, 0x0101_0201));
}
