//! The code that stands between Rust and translations: entry, exit, and calls into Rust.

use std::mem::offset_of;

use super::asm::host::{RAX, RDI, RDX, RSI, RSP, SP, T0, T1};
use super::asm::{Asm, Place, cc};
use super::cache::CodeMemory;
use super::runtime;
use crate::cpu::Cpu;

/// Guest registers that live in host registers of the same number. RSP is in [`SP`]; R9, R10, R11 and R15 are in
/// memory.
pub(super) const IN_REGISTERS: [u8; 11] = [0, 1, 2, 3, 5, 6, 7, 8, 12, 13, 14];

/// Where a general register's slot is.
pub(super) fn slot(n: u8) -> Place {
    Place::State(offset_of!(Cpu, gpr) + usize::from(n) * 8)
}

macro_rules! native {
    ($field:ident) => {
        crate::translate::asm::Place::State(
            std::mem::offset_of!(crate::cpu::Cpu, native)
                + std::mem::offset_of!(crate::translate::Native, $field),
        )
    };
}
pub(super) use native;

/// Addresses of the stubs.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Stubs {
    /// `extern "sysv64" fn(vCPU, translation) -> link`: enters a translation.
    pub(super) enter: u64,
    /// Leaves it; T1 is the link.
    pub(super) exit: u64,
    /// The same with [`Cpu::rip`] in T0 and no link.
    pub(super) exit_to: u64,
    /// A memory access that the TLB does not have: T0 is the linear address, T1 the site. Afterwards T0 is as before
    /// and T1 0: try again, or 1: the instruction is done.
    pub(super) slow: u64,
    /// Executes the site in T1 by its handler.
    pub(super) handler: u64,
    /// Loads the XMM registers; T1 is the site.
    pub(super) vectors: u64,
    /// A store hit the page of the mark T1, which holds code; T0 is the site. Does not come back.
    pub(super) marked: u64,
}

impl Stubs {
    pub(super) fn emit(memory: &mut CodeMemory) -> Self {
        let mut stubs = Self::default();
        let mut a = Asm { base: memory.next(), ..Asm::default() };
        stubs.exit_to = a.here();
        a.store(Place::State(offset_of!(Cpu, rip)), T0);
        a.set(T1, u64::from(super::NO_LINK));
        stubs.exit = a.here();
        save_registers(&mut a);
        spill_vectors(&mut a);
        a.copy(true, RAX, T1);
        let leave = a.code.len();
        epilogue(&mut a);
        stubs.enter = a.here();
        enter(&mut a, stubs.exit_to);
        let mut call = |rust: u64, vectors: bool| {
            let at = a.here();
            call_rust(&mut a, rust, vectors, leave);
            at
        };
        stubs.slow = call(runtime::slow as *const () as u64, false);
        stubs.handler = call(runtime::handler as *const () as u64, false);
        stubs.vectors = call(runtime::vectors as *const () as u64, true);
        stubs.marked = call(runtime::marked as *const () as u64, false);
        let added = memory.add(&a.code);
        debug_assert!(added);
        stubs
    }
}

const SAVED: [u8; 6] = [3, 5, 12, 13, 14, 15];

pub(super) fn push(a: &mut Asm, r: u8) {
    if r >= 8 {
        a.code.push(0x41);
    }
    a.code.push(0x50 | r & 7);
}

fn pop(a: &mut Asm, r: u8) {
    if r >= 8 {
        a.code.push(0x41);
    }
    a.code.push(0x58 | r & 7);
}

/// Bytes of frames of calls, at most.
const FRAMES: i32 = 256 << 10;
/// The return address of nobody; it is not canonical.
const NOBODY: u64 = 1 << 63;

/// Below what it saves, a first frame: a return from it leaves, to an address that faults.
fn enter(a: &mut Asm, exit_to: u64) {
    SAVED.iter().for_each(|&r| push(a, r));
    a.lea_plus(RSP, RSP, -8);
    a.store(native!(stack), RSP);
    a.lea_plus(T1, RSP, -FRAMES);
    a.store(native!(stack_limit), T1);
    a.set(T1, NOBODY);
    push(a, T1);
    a.set(T1, exit_to);
    push(a, T1);
    a.store(native!(stack_bottom), RSP);
    a.copy(true, T0, RSI);
    load_registers(a);
    a.op(false, &[0xff], 4, Place::Reg(T0));
}

/// Back to Rust, with RAX as the result.
fn epilogue(a: &mut Asm) {
    a.load(RSP, native!(stack));
    a.lea_plus(RSP, RSP, 8);
    SAVED.iter().rev().for_each(|&r| pop(a, r));
    a.code.push(0xc3);
}

fn load_registers(a: &mut Asm) {
    a.load(SP, slot(4));
    IN_REGISTERS.iter().for_each(|&r| a.load(r, slot(r)));
}

fn save_registers(a: &mut Asm) {
    a.store(slot(4), SP);
    IN_REGISTERS.iter().for_each(|&r| a.store(slot(r), r));
}

fn xmm(a: &mut Asm, opcode: u8, n: u8) {
    // gs movaps
    let at = Place::State(offset_of!(Cpu, xmm) + usize::from(n) * 16);
    a.op(false, &[0x0f, opcode], n, at);
}

/// Stores the XMM registers if they are the guest's. RSP-neutral; flags are lost.
fn spill_vectors(a: &mut Asm) {
    a.compare_byte(native!(vectors_loaded), 0);
    let none = a.jump_if(cc::E);
    (0..16).for_each(|n| xmm(a, 0x29, n));
    a.set_byte(native!(vectors_loaded), 0);
    a.land(none);
}

/// Calls `rust(cpu, T1, T0) -> what`: 2 leaves the translation, anything else comes back in T1. Jumps to `leave` (an
/// offset) for the former.
fn call_rust(a: &mut Asm, rust: u64, vectors: bool, leave: usize) {
    save_registers(a);
    push(a, T0);
    a.set_byte(native!(vectors_were_loaded), 0);
    a.compare_byte(native!(vectors_loaded), 0);
    let none = a.jump_if(cc::E);
    a.set_byte(native!(vectors_were_loaded), 1);
    (0..16).for_each(|n| xmm(a, 0x29, n));
    a.set_byte(native!(vectors_loaded), 0);
    a.land(none);
    a.load(RDI, native!(cpu));
    a.copy(true, RSI, T1);
    a.copy(true, RDX, T0);
    a.set(RAX, rust);
    a.op(false, &[0xff], 2, Place::Reg(RAX));
    a.group1(false, 7, Place::Reg(RAX), 2);
    let stay = a.jump_if(cc::NE);
    a.set(RAX, u64::from(super::NO_LINK));
    let out = a.jump();
    a.land_at(out, leave);
    a.land(stay);
    if !vectors {
        a.compare_byte(native!(vectors_were_loaded), 0);
    }
    let none = (!vectors).then(|| a.jump_if(cc::E));
    (0..16).for_each(|n| xmm(a, 0x28, n));
    a.set_byte(native!(vectors_loaded), 1);
    if let Some(none) = none {
        a.land(none);
    }
    a.copy(true, T1, RAX);
    load_registers(a);
    pop(a, T0);
    a.code.push(0xc3);
}
