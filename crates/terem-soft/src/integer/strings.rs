//! String instructions, single and repeated.
//!
//! Repeated moves and stores go in chunks as long as both sides stay on one page of RAM; the rest goes an
//! element at a time. One call does a bounded amount of work, then the instruction is begun again, so
//! that interrupts get in between. Registers are right after each chunk, as a fault in the middle needs.

use std::arch::asm;

use iced_x86::{Instruction, Mnemonic};
use terem_cpu::rflags;

use super::operand::sized;
use super::width::Int;
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::mmu::{Access, PAGE_MASK};
use crate::op::{ADDR16, ADDR32, CHECKED, Handler, Op};

const AX: u8 = 0;
const CX: u8 = 1;
const SI: u8 = 6;
const DI: u8 = 7;
/// The segment of destinations.
const ES: u8 = 0;
/// Elements handled one by one in one call.
const ELEMENTS: u64 = 4096;
/// Bytes handled in chunks in one call.
const BYTES: u64 = 0x1_0000;

pub(super) fn handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    if !insn.is_string_instruction() {
        return None;
    }
    let repe = insn.has_rep_prefix();
    let repne = insn.has_repne_prefix();
    // For movs, stos and lods F2 repeats as F3 does.
    let rep = repe || repne;
    let address = if op.flags & ADDR16 != 0 {
        2
    } else if op.flags & ADDR32 != 0 {
        4
    } else {
        8
    };
    macro_rules! pick {
        ($w:expr, $f:ident) => {
            match address {
                2 => sized!($w, $f, u16),
                4 => sized!($w, $f, u32),
                _ => sized!($w, $f, u64),
            }
        };
    }
    macro_rules! choose {
        ($w:expr, $one:ident, $all:ident) => {
            if rep { pick!($w, $all) } else { pick!($w, $one) }
        };
    }
    op.extra = u16::from(repe);
    Some(match insn.mnemonic() {
        Mnemonic::Movsb => choose!(1, movs, rep_movs),
        Mnemonic::Movsw => choose!(2, movs, rep_movs),
        Mnemonic::Movsd => choose!(4, movs, rep_movs),
        Mnemonic::Movsq => choose!(8, movs, rep_movs),
        Mnemonic::Stosb => choose!(1, stos, rep_stos),
        Mnemonic::Stosw => choose!(2, stos, rep_stos),
        Mnemonic::Stosd => choose!(4, stos, rep_stos),
        Mnemonic::Stosq => choose!(8, stos, rep_stos),
        Mnemonic::Lodsb => choose!(1, lods, rep_lods),
        Mnemonic::Lodsw => choose!(2, lods, rep_lods),
        Mnemonic::Lodsd => choose!(4, lods, rep_lods),
        Mnemonic::Lodsq => choose!(8, lods, rep_lods),
        Mnemonic::Scasb => choose!(1, scas, rep_scas),
        Mnemonic::Scasw => choose!(2, scas, rep_scas),
        Mnemonic::Scasd => choose!(4, scas, rep_scas),
        Mnemonic::Scasq => choose!(8, scas, rep_scas),
        Mnemonic::Cmpsb => choose!(1, cmps, rep_cmps),
        Mnemonic::Cmpsw => choose!(2, cmps, rep_cmps),
        Mnemonic::Cmpsd => choose!(4, cmps, rep_cmps),
        Mnemonic::Cmpsq => choose!(8, cmps, rep_cmps),
        _ => return None,
    })
}

/// The linear address of `size` bytes at SI or DI.
#[inline(always)]
fn place<A: Int>(cpu: &Cpu, op: &Op, register: u8, size: u64, write: bool) -> Exec<u64> {
    let offset = A::get(cpu, register).wide();
    let segment = if register == DI { ES } else { op.segment };
    if op.flags & CHECKED != 0 {
        return cpu.checked_linear(segment, offset, size, write);
    }
    Ok(cpu.segment_base[usize::from(segment)].wrapping_add(offset))
}

/// Whether addresses go down.
#[inline(always)]
fn down(cpu: &Cpu) -> bool {
    cpu.system_flags & rflags::DF != 0
}

/// Moves SI or DI on by `bytes`.
#[inline(always)]
fn advance<A: Int>(cpu: &mut Cpu, register: u8, bytes: u64) {
    let by = if down(cpu) { bytes.wrapping_neg() } else { bytes };
    A::cut(A::get(cpu, register).wide().wrapping_add(by)).set(cpu, register);
}

/// Takes `n` from the counter.
#[inline(always)]
fn count_down<A: Int>(cpu: &mut Cpu, n: u64) {
    A::cut(A::get(cpu, CX).wide().wrapping_sub(n)).set(cpu, CX);
}

/// Begins the instruction anew if it is not through.
#[inline(always)]
fn again<A: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    if A::get(cpu, CX) != A::default() {
        cpu.rip = cpu.wrap_rip(cpu.op_rip(op));
        cpu.resume_string();
    }
    Ok(())
}

/// Whether debug exceptions want the instruction to stop after this round.
#[inline(always)]
fn traps_between(cpu: &Cpu) -> bool {
    cpu.mode.single || cpu.watches.pending()
}

/// How many elements from `offset` upward lie on one page (of `linear`) and do not wrap the offset.
#[inline(always)]
fn run_length<A: Int, W: Int>(offset: u64, linear: u64) -> u64 {
    let on_page = 0x1000 - (linear & !PAGE_MASK);
    let top = if A::BITS == 64 { u64::MAX } else { (1 << A::BITS) - 1 };
    (on_page - 1).min(top - offset).wrapping_add(1) / W::SIZE
}

fn movs<A: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let from = place::<A>(cpu, op, SI, W::SIZE, false)?;
    let value = cpu.load_in::<W>(from, op.segment)?;
    let to = place::<A>(cpu, op, DI, W::SIZE, true)?;
    cpu.store_in(to, value, ES)?;
    advance::<A>(cpu, SI, W::SIZE);
    advance::<A>(cpu, DI, W::SIZE);
    Ok(())
}

fn rep_movs<A: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (mut bytes, mut elements) = (0, 0);
    while A::get(cpu, CX) != A::default() && bytes < BYTES && elements < ELEMENTS {
        let n = move_chunk::<A, W>(cpu, op)?;
        if n != 0 {
            bytes += n * W::SIZE;
            continue;
        }
        movs::<A, W>(cpu, op)?;
        count_down::<A>(cpu, 1);
        elements += 1;
        if traps_between(cpu) {
            break;
        }
    }
    again::<A>(cpu, op)
}

/// Moves as many elements as lie on one page on both sides; 0 where that cannot be done at once.
#[inline(always)]
fn move_chunk<A: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec<u64> {
    if down(cpu) || cpu.mode.single {
        return Ok(0);
    }
    let (Ok(from), Ok(to)) = (place::<A>(cpu, op, SI, 1, false), place::<A>(cpu, op, DI, 1, true)) else {
        return Ok(0);
    };
    let n = run_length::<A, W>(A::get(cpu, SI).wide(), from)
        .min(run_length::<A, W>(A::get(cpu, DI).wide(), to))
        .min(A::get(cpu, CX).wide());
    let bytes = n * W::SIZE;
    if n < 2
        || place::<A>(cpu, op, SI, bytes, false).is_err()
        || place::<A>(cpu, op, DI, bytes, true).is_err()
    {
        return Ok(0);
    }
    let Some(source) = page_of_ram(cpu, from, Access::Read)? else { return Ok(0) };
    let Some(target) = page_of_ram(cpu, to, Access::Write)? else { return Ok(0) };
    // SAFETY: both ranges lie within one page of RAM in the window. Other threads may change them
    // meanwhile, as other processors may: what is read then is as undefined as there.
    unsafe {
        if target.addr().abs_diff(source.addr()) >= bytes as usize {
            std::ptr::copy_nonoverlapping(source, target, bytes as usize);
        } else {
            copy_upward::<W>(source, target, n);
        }
    }
    cpu.stored(target as u64);
    advance::<A>(cpu, SI, bytes);
    advance::<A>(cpu, DI, bytes);
    count_down::<A>(cpu, n);
    Ok(n)
}

/// Copies an element after the other, which overlapping ranges show.
///
/// # Safety
/// Both ranges are valid for `n` elements.
unsafe fn copy_upward<W: Int>(source: *const u8, target: *mut u8, n: u64) {
    macro_rules! rep {
        ($ins:literal) => {
            // SAFETY: the caller's promise; the direction flag is clear.
            unsafe {
                asm!($ins, inout("rsi") source => _, inout("rdi") target => _, inout("rcx") n => _,
                    options(nostack, preserves_flags));
            }
        };
    }
    match W::SIZE {
        1 => rep!("rep movsb"),
        2 => rep!("rep movsw"),
        4 => rep!("rep movsd"),
        _ => rep!("rep movsq"),
    }
}

/// The host address of `linear`, if it is in RAM and its accesses need no look. A fault is the guest's.
#[inline(always)]
fn page_of_ram(cpu: &mut Cpu, linear: u64, access: Access) -> Exec<Option<*mut u8>> {
    if cpu.long_mode() && (linear as i64) << 16 >> 16 != linear as i64 {
        return Ok(None); // the way for single elements knows the right fault
    }
    let linear = cpu.wrap(linear);
    if cpu.tlb.strict() || cpu.watches.data_on(linear) {
        return Ok(None);
    }
    let physical = cpu.translate(linear, access)?;
    Ok(cpu.ram(physical))
}

fn stos<A: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let to = place::<A>(cpu, op, DI, W::SIZE, true)?;
    cpu.store_in(to, W::get(cpu, AX), ES)?;
    advance::<A>(cpu, DI, W::SIZE);
    Ok(())
}

fn rep_stos<A: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let (mut bytes, mut elements) = (0, 0);
    while A::get(cpu, CX) != A::default() && bytes < BYTES && elements < ELEMENTS {
        let n = fill_chunk::<A, W>(cpu, op)?;
        if n != 0 {
            bytes += n * W::SIZE;
            continue;
        }
        stos::<A, W>(cpu, op)?;
        count_down::<A>(cpu, 1);
        elements += 1;
        if traps_between(cpu) {
            break;
        }
    }
    again::<A>(cpu, op)
}

/// Fills as many elements as lie on one page; 0 where that cannot be done at once.
#[inline(always)]
fn fill_chunk<A: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec<u64> {
    if down(cpu) || cpu.mode.single {
        return Ok(0);
    }
    let Ok(to) = place::<A>(cpu, op, DI, 1, true) else { return Ok(0) };
    let n = run_length::<A, W>(A::get(cpu, DI).wide(), to).min(A::get(cpu, CX).wide());
    let bytes = n * W::SIZE;
    if n < 2 || place::<A>(cpu, op, DI, bytes, true).is_err() {
        return Ok(0);
    }
    let Some(target) = page_of_ram(cpu, to, Access::Write)? else { return Ok(0) };
    let value = W::get(cpu, AX);
    // SAFETY: the range lies within one page of RAM in the window.
    unsafe {
        if value == W::default() {
            target.write_bytes(0, bytes as usize);
        } else {
            for i in 0..n as usize {
                target.cast::<W>().add(i).write_unaligned(value);
            }
        }
    }
    cpu.stored(target as u64);
    advance::<A>(cpu, DI, bytes);
    count_down::<A>(cpu, n);
    Ok(n)
}

fn lods<A: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let from = place::<A>(cpu, op, SI, W::SIZE, false)?;
    cpu.load_in::<W>(from, op.segment)?.set(cpu, AX);
    advance::<A>(cpu, SI, W::SIZE);
    Ok(())
}

fn scas<A: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = place::<A>(cpu, op, DI, W::SIZE, false)?;
    let value = cpu.load_in::<W>(at, ES)?;
    let (_, flags) = W::sub(0, W::get(cpu, AX), value);
    cpu.set_flags(flags);
    advance::<A>(cpu, DI, W::SIZE);
    Ok(())
}

fn cmps<A: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    // Where both sides fault, the second one's fault is reported, as the host does it.
    let second = place::<A>(cpu, op, DI, W::SIZE, false)?;
    let b = cpu.load_in::<W>(second, ES)?;
    let first = place::<A>(cpu, op, SI, W::SIZE, false)?;
    let a = cpu.load_in::<W>(first, op.segment)?;
    let (_, flags) = W::sub(0, a, b);
    cpu.set_flags(flags);
    advance::<A>(cpu, SI, W::SIZE);
    advance::<A>(cpu, DI, W::SIZE);
    Ok(())
}

fn rep_lods<A: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    for _ in 0..ELEMENTS {
        if A::get(cpu, CX) == A::default() {
            return Ok(());
        }
        lods::<A, W>(cpu, op)?;
        count_down::<A>(cpu, 1);
        if traps_between(cpu) {
            break;
        }
    }
    again::<A>(cpu, op)
}

/// Repeats while the elements compare as the prefix says ([`Op::extra`] 1: equal, 0: not equal).
#[inline(always)]
fn compare_all<A: Int>(cpu: &mut Cpu, op: &Op, one: impl Fn(&mut Cpu, &Op) -> Exec) -> Exec {
    for _ in 0..ELEMENTS {
        if A::get(cpu, CX) == A::default() {
            return Ok(());
        }
        one(cpu, op)?;
        count_down::<A>(cpu, 1);
        if u16::from(cpu.ah >> 6 & 1) != op.extra {
            return Ok(());
        }
        if traps_between(cpu) {
            break;
        }
    }
    again::<A>(cpu, op)
}

fn rep_scas<A: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    compare_all::<A>(cpu, op, scas::<A, W>)
}

fn rep_cmps<A: Int, W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    compare_all::<A>(cpu, op, cmps::<A, W>)
}
