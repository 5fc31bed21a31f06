//! `xchg`, `xadd`, `cmpxchg` and its wide forms.

use iced_x86::{Instruction, Mnemonic};

use super::operand::{bus_lock, is_mem, reg, sized, width};
use super::width::{Int, ZERO};
use crate::cpu::Cpu;
use crate::fault::{Exec, Fault};
use crate::op::{Handler, Op};

const AX: u8 = 0;

pub(super) fn handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let (w, lock, memory) = (width(insn, 0), insn.has_lock_prefix(), is_mem(insn, 0));
    match insn.mnemonic() {
        Mnemonic::Cmpxchg8b => return Some(if lock { cmpxchg8b_locked } else { cmpxchg8b }),
        Mnemonic::Cmpxchg16b => return Some(cmpxchg16b),
        Mnemonic::Xchg if is_mem(insn, 1) => {
            op.rm = reg(insn, 0);
            return Some(sized!(w, xchg_memory));
        }
        Mnemonic::Xchg | Mnemonic::Xadd | Mnemonic::Cmpxchg => {}
        _ => return None,
    }
    op.rm = reg(insn, 1);
    if !memory {
        op.reg = reg(insn, 0);
    }
    Some(match (insn.mnemonic(), memory, lock) {
        (Mnemonic::Xchg, true, _) => sized!(w, xchg_memory),
        (Mnemonic::Xchg, false, _) => sized!(w, xchg_register),
        (Mnemonic::Xadd, true, true) => sized!(w, xadd_locked),
        (Mnemonic::Xadd, true, false) => sized!(w, xadd_memory),
        (Mnemonic::Xadd, false, _) => sized!(w, xadd_register),
        (_, true, true) => sized!(w, cmpxchg_locked),
        (_, true, false) => sized!(w, cmpxchg_memory),
        (_, false, _) => sized!(w, cmpxchg_register),
    })
}

fn xchg_register<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (W::get(cpu, op.reg), W::get(cpu, op.rm));
    b.set(cpu, op.reg);
    a.set(cpu, op.rm);
    Ok(())
}

/// Always atomic (Intel SDM vol. 2, XCHG).
fn xchg_memory<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = cpu.operand_address(op, W::SIZE, true)?;
    let new = W::get(cpu, op.rm);
    let old = if let Some(host) = cpu.atomic_address(at, W::SIZE, op.segment)? {
        // SAFETY: `atomic_address` gives a place in RAM for this width.
        let old = unsafe { W::exchange(host, new) };
        cpu.stored(host as u64);
        old
    } else {
        let _lock = bus_lock();
        let old = cpu.load_in::<W>(at, op.segment)?;
        cpu.store_in(at, new, op.segment)?;
        old
    };
    old.set(cpu, op.rm);
    Ok(())
}

fn xadd_register<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (a, b) = (W::get(cpu, op.reg), W::get(cpu, op.rm));
    let (sum, flags) = W::add(0, a, b);
    a.set(cpu, op.rm);
    sum.set(cpu, op.reg);
    cpu.set_flags(flags);
    Ok(())
}

fn xadd_memory<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (b, mut old, mut flags) = (W::get(cpu, op.rm), W::default(), 0);
    cpu.modify_operand(op, |a| {
        let (sum, f) = W::add(0, a, b);
        (old, flags) = (a, f);
        sum
    })?;
    old.set(cpu, op.rm);
    cpu.set_flags(flags);
    Ok(())
}

fn xadd_locked<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (b, mut old, mut flags) = (W::get(cpu, op.rm), W::default(), 0);
    cpu.modify_locked(op, |a| {
        let (sum, f) = W::add(0, a, b);
        (old, flags) = (a, f);
        sum
    })?;
    old.set(cpu, op.rm);
    cpu.set_flags(flags);
    Ok(())
}

/// After a comparison: the accumulator takes what was found unless it was what was expected.
#[inline(always)]
fn compared<W: Int>(cpu: &mut Cpu, found: W) {
    let (_, flags) = W::sub(0, W::get(cpu, AX), found);
    if flags & ZERO == 0 {
        found.set(cpu, AX);
    }
    cpu.set_flags(flags);
}

fn cmpxchg_register<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (old, new) = (W::get(cpu, op.reg), W::get(cpu, op.rm));
    let equal = old == W::get(cpu, AX);
    compared(cpu, old);
    if equal {
        new.set(cpu, op.reg);
    }
    Ok(())
}

fn cmpxchg_memory<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (expected, new) = (W::get(cpu, AX), W::get(cpu, op.rm));
    let mut old = expected;
    cpu.modify_operand(op, |a| {
        old = a;
        if a == expected { new } else { a }
    })?;
    compared(cpu, old);
    Ok(())
}

fn cmpxchg_locked<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = cpu.operand_address(op, W::SIZE, true)?;
    let (expected, new) = (W::get(cpu, AX), W::get(cpu, op.rm));
    let old = if let Some(host) = cpu.atomic_address(at, W::SIZE, op.segment)? {
        // SAFETY: `atomic_address` gives a place in RAM for this width.
        let old = unsafe { W::compare_exchange(host, expected, new) };
        cpu.stored(host as u64);
        old
    } else {
        let _lock = bus_lock();
        let old = cpu.load_in::<W>(at, op.segment)?;
        cpu.store_in(at, if old == expected { new } else { old }, op.segment)?;
        old
    };
    compared(cpu, old);
    Ok(())
}

fn set_zero(cpu: &mut Cpu, on: bool) {
    cpu.ah = cpu.ah & !0x40 | if on { 0x40 } else { 0 };
}

/// EDX:EAX and ECX:EBX.
fn pairs_32(cpu: &Cpu) -> (u64, u64) {
    let pair = |low: usize, high: usize| cpu.gpr[low] & 0xffff_ffff | cpu.gpr[high] << 32;
    (pair(0, 2), pair(3, 1))
}

fn compared_8b(cpu: &mut Cpu, expected: u64, found: u64) {
    if found != expected {
        (found as u32).set(cpu, 0);
        ((found >> 32) as u32).set(cpu, 2);
    }
    set_zero(cpu, found == expected);
}

fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Exec {
    let (expected, new) = pairs_32(cpu);
    let mut old = expected;
    cpu.modify_operand(op, |a: u64| {
        old = a;
        if a == expected { new } else { a }
    })?;
    compared_8b(cpu, expected, old);
    Ok(())
}

fn cmpxchg8b_locked(cpu: &mut Cpu, op: &Op) -> Exec {
    let (expected, new) = pairs_32(cpu);
    let mut old = expected;
    cpu.modify_locked(op, |a: u64| {
        old = a;
        if a == expected { new } else { a }
    })?;
    compared_8b(cpu, expected, old);
    Ok(())
}

/// The host's own; returns what was there. (The intrinsic of this name is a call into a library that is not
/// linked, unless all of the caller is compiled for hosts that have the instruction.)
///
/// # Safety
/// The host has the instruction; `at` is aligned to 16 bytes and may be written.
unsafe fn host_cmpxchg16b(at: *mut u8, expected: u128, new: u128) -> u128 {
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // SAFETY: as the function's own condition. RBX is the compiler's, so it is put back.
    unsafe {
        std::arch::asm!(
            "xchg {b}, rbx", "lock cmpxchg16b [{at}]", "mov rbx, {b}",
            at = in(reg) at, b = inout(reg) new as u64 => _, in("rcx") (new >> 64) as u64,
            inout("rax") low, inout("rdx") high, options(nostack),
        );
    }
    u128::from(low) | u128::from(high) << 64
}

/// Atomic with and without `lock`.
fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = cpu.operand_address(op, 16, true)?;
    if at & 15 != 0 {
        return Err(Fault::GP0);
    }
    let expected = u128::from(cpu.gpr[0]) | u128::from(cpu.gpr[2]) << 64;
    let new = u128::from(cpu.gpr[3]) | u128::from(cpu.gpr[1]) << 64;
    let host = cpu.atomic_address(at, 16, op.segment)?;
    let old = if let Some(host) = host
        && std::arch::is_x86_feature_detected!("cmpxchg16b")
    {
        // SAFETY: the host has the instruction, and `host` is an aligned place in RAM.
        let old = unsafe { host_cmpxchg16b(host, expected, new) };
        cpu.stored(host as u64);
        old
    } else {
        let _lock = bus_lock();
        let old = cpu.load_in::<u128>(at, op.segment)?;
        cpu.store_in(at, if old == expected { new } else { old }, op.segment)?;
        old
    };
    if old != expected {
        cpu.gpr[0] = old as u64;
        cpu.gpr[2] = (old >> 64) as u64;
    }
    set_zero(cpu, old == expected);
    Ok(())
}
