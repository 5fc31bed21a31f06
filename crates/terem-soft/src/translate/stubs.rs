//! The code that stands between Rust and translations: entry, exit, and calls into Rust.

use std::mem::offset_of;

use super::asm::host::{RAX, RCX, RDI, RDX, RSI, RSP, SP, T0, T1, T2};
use super::asm::{Asm, Place, cc};
use super::cache::CodeMemory;
use super::flow::look_up;
use super::{Header, Site, runtime};
use crate::cpu::{Cpu, Ymm};
use crate::mmu::{ENTRIES, Entry, MIX, NO_PAGE, Remembered, Tlb};

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
    /// Goes to the translation at the linear address in T0, or leaves for there.
    pub(super) look_up: u64,
    /// For each TLB set, for reads and writes, and whether only to find the page: a memory access of the site in T2 to
    /// another page than the one remembered.
    pub(super) fill: [[[Fill; 2]; 2]; 3],
    /// For each TLB set: the pages behind the header in T1 are of another epoch.
    pub(super) forget: [u64; 3],
    /// Executes the site in T1 by its handler.
    pub(super) handler: u64,
    /// Loads the XMM registers; T1 is the site.
    pub(super) vectors: u64,
    /// A store hit the page of the mark T1, which holds code; T0 is the site. Does not come back.
    pub(super) marked: u64,
}

/// T0 is the linear address less that of the page remembered. Afterwards it is the host address; or the call returns 5
/// bytes further on: then the instruction has been done, or (when the page was only to be found) the TLB does not have it.
/// Pages that hold code are not remembered for writes. T1 and T2 are lost.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fill {
    /// T1 is where the page is remembered.
    pub(super) page: u64,
    /// It is the stack's.
    pub(super) stack: u64,
}

impl Stubs {
    /// `avx`: with the upper halves of vector registers.
    pub(super) fn emit(memory: &mut CodeMemory, avx: bool) -> Self {
        let mut stubs = Self::default();
        let mut a = Asm { base: memory.next(), ..Asm::default() };
        stubs.exit_to = a.here();
        a.store(Place::State(offset_of!(Cpu, rip)), T0);
        a.set(T1, u64::from(super::NO_LINK));
        stubs.exit = a.here();
        save_registers(&mut a);
        spill_vectors(&mut a, avx);
        a.copy(true, RAX, T1);
        let leave = a.code.len();
        epilogue(&mut a);
        stubs.enter = a.here();
        enter(&mut a, stubs.exit_to);
        let elsewhere = a.code.len();
        stubs.look_up = go_elsewhere(&mut a, stubs.exit_to);
        let ways = Ways { leave, elsewhere };
        let mut call = |rust: u64, vectors: bool| {
            let at = a.here();
            call_rust(&mut a, rust, vectors, ways, avx);
            at
        };
        let slow = call(runtime::slow as *const () as u64, false);
        stubs.handler = call(runtime::handler as *const () as u64, false);
        stubs.vectors = call(runtime::vectors as *const () as u64, true);
        stubs.marked = call(runtime::marked as *const () as u64, false);
        for set in 0..3 {
            for (write, find) in [(false, false), (false, true), (true, false), (true, true)] {
                let way = (!find).then_some(slow);
                let mut made = Fill { page: a.here(), stack: 0 };
                fill(&mut a, way, set, write);
                // The stack's page is remembered only if it may be written.
                made.stack = a.here();
                a.load(T1, native!(cpu));
                let stacks = offset_of!(Cpu, tlb) + offset_of!(Tlb, stacks);
                a.lea_plus(T1, T1, (stacks + set * size_of::<Remembered>()) as i32);
                fill(&mut a, way, set, true);
                stubs.fill[set][usize::from(write)][usize::from(find)] = made;
            }
            stubs.forget[set] = a.here();
            forget(&mut a, set, memory.nothing());
        }
        let added = memory.add(&a.code, &[]);
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
    let at = Place::State(vector(n));
    a.op(false, &[0x0f, opcode], n, at);
}

/// Where a vector register's slot is.
fn vector(n: u8) -> usize {
    offset_of!(Cpu, ymm) + usize::from(n) * size_of::<Ymm>()
}

/// `C5h` and what follows it: an instruction on YMM registers `reg` and `second` with the opcode map 0Fh.
fn vex256(a: &mut Asm, reg: u8, second: u8, opcode: u8) {
    a.bytes(&[0xc5, u8::from(reg < 8) << 7 | (!second & 15) << 3 | 4, opcode]);
}

fn ymm(a: &mut Asm, opcode: u8, n: u8) {
    // gs vmovaps
    a.code.push(0x65);
    vex256(a, n, 0, opcode);
    a.bytes(&[(n & 7) << 3 | 4, 0x25]);
    a.bytes(&(vector(n) as i32).to_le_bytes());
}

const VZEROUPPER: [u8; 3] = [0xc5, 0xf8, 0x77];

/// Stores the vector registers. With AVX also whether there is anything in their upper halves, which are zero then:
/// in the code that follows they would cost time.
fn store_vectors(a: &mut Asm, avx: bool) {
    if !avx {
        return (0..16).for_each(|n| xmm(a, 0x29, n));
    }
    (0..16).for_each(|n| ymm(a, 0x29, n));
    for n in 1..8 {
        vex256(a, 0, 0, 0x56); // vorps ymm0, ymm0, ymm n
        a.code.push(0xc0 | n);
    }
    for n in 8..16 {
        vex256(a, 0, n, 0x56); // vorps ymm0, ymm n, ymm0
        a.code.push(0xc0);
    }
    a.bytes(&[0xc4, 0xe3, 0x7d, 0x19, 0xc0, 1]); // vextractf128 xmm0, ymm0, 1
    a.bytes(&[0xc4, 0xe2, 0x79, 0x17, 0xc0]); // vptest xmm0, xmm0
    a.op(false, &[0x0f, 0x95], 0, Place::State(offset_of!(Cpu, uppers))); // setne
    a.bytes(&VZEROUPPER);
}

/// Loads the vector registers; their upper halves only if there is anything in them. Flags are lost.
fn load_vectors(a: &mut Asm, avx: bool) {
    if !avx {
        return (0..16).for_each(|n| xmm(a, 0x28, n));
    }
    a.compare_byte(Place::State(offset_of!(Cpu, uppers)), 0);
    let lower = a.jump_if(cc::E);
    (0..16).for_each(|n| ymm(a, 0x28, n));
    let done = a.jump();
    a.land(lower);
    a.bytes(&VZEROUPPER);
    (0..16).for_each(|n| xmm(a, 0x28, n));
    a.land(done);
}

/// Stores the vector registers if they are the guest's. RSP-neutral; flags are lost.
fn spill_vectors(a: &mut Asm, avx: bool) {
    a.compare_byte(native!(vectors_loaded), 0);
    let none = a.jump_if(cc::E);
    store_vectors(a, avx);
    a.set_byte(native!(vectors_loaded), 0);
    a.land(none);
}

/// Offsets of code in the stubs.
#[derive(Clone, Copy)]
struct Ways {
    /// Leaves, with RAX as the link.
    leave: usize,
    /// Goes to the translation at [`Cpu::rip`].
    elsewhere: usize,
}

/// Goes to the translation at [`Cpu::rip`]; the frames of calls are gone. Gives where it looks for the address in T0.
fn go_elsewhere(a: &mut Asm, exit_to: u64) -> u64 {
    a.load(RSP, native!(stack_bottom));
    load_registers(a);
    a.load(T0, Place::State(offset_of!(Cpu, rip)));
    let look = a.here();
    look_up(a, exit_to, false);
    look
}

/// Calls `rust(cpu, T1, T0, T2) -> what`: [`runtime::LEAVE`] leaves the translation, [`runtime::ELSEWHERE`] goes to another
/// one, anything else comes back in T1.
fn call_rust(a: &mut Asm, rust: u64, vectors: bool, ways: Ways, avx: bool) {
    save_registers(a);
    push(a, T0);
    a.set_byte(native!(vectors_were_loaded), 0);
    a.compare_byte(native!(vectors_loaded), 0);
    let none = a.jump_if(cc::E);
    a.set_byte(native!(vectors_were_loaded), 1);
    store_vectors(a, avx);
    a.set_byte(native!(vectors_loaded), 0);
    a.land(none);
    a.load(RDI, native!(cpu));
    a.copy(true, RSI, T1);
    a.copy(true, RDX, T0);
    a.copy(true, RCX, T2);
    a.set(RAX, rust);
    a.op(false, &[0xff], 2, Place::Reg(RAX));
    a.group1(false, 7, Place::Reg(RAX), runtime::LEAVE as i32);
    let stay = a.jump_if(cc::B);
    let elsewhere = a.jump_if(cc::NE);
    a.land_at(elsewhere, ways.elsewhere);
    a.set(RAX, u64::from(super::NO_LINK));
    let out = a.jump();
    a.land_at(out, ways.leave);
    a.land(stay);
    if !vectors {
        a.compare_byte(native!(vectors_were_loaded), 0);
    }
    let none = (!vectors).then(|| a.jump_if(cc::E));
    load_vectors(a, avx);
    a.set_byte(native!(vectors_loaded), 1);
    if let Some(none) = none {
        a.land(none);
    }
    a.copy(true, T1, RAX);
    load_registers(a);
    pop(a, T0);
    a.code.push(0xc3);
}

/// [`Fill`]; only to find the page where `slow` is `None`. `writable`: it must be one that may be written.
fn fill(a: &mut Asm, slow: Option<u64>, set: usize, writable: bool) {
    const SHIFT: u32 = size_of::<Entry>().trailing_zeros();
    let tlb = offset_of!(Cpu, tlb);
    let entries = tlb + offset_of!(Tlb, sets) + set * size_of::<[Entry; ENTRIES]>();
    let tag = if writable { offset_of!(Entry, write) } else { offset_of!(Entry, read) };
    let page = |offset: usize| Place::At(T1, offset as i32);
    a.op(true, &[0x03], T0, page(offset_of!(Remembered, page)));
    [RAX, RCX, RDX].into_iter().for_each(|r| push(a, r));
    // The place in the set, as `Tlb::place` has it.
    a.copy(true, RAX, T0);
    a.shift_right(true, RAX, 12);
    a.copy(true, RCX, RAX);
    a.shift_right(true, RCX, MIX as u8);
    a.op(false, &[0x03], RAX, Place::Reg(RCX));
    a.group1(false, 4, Place::Reg(RAX), ENTRIES as i32 - 1);
    a.shift_left(false, RAX, SHIFT as u8);
    a.copy(true, RDX, T0);
    a.group1(true, 4, Place::Reg(RDX), -0x1000);
    a.copy(true, RCX, RDX);
    a.op(true, &[0x0b], RCX, Place::State(tlb + offset_of!(Tlb, generations) + set * 8));
    a.op(true, &[0x3b], RCX, Place::StateAt(RAX, entries + tag));
    let mut others = vec![a.jump_if(cc::NE)];
    a.copy(true, RCX, T0);
    a.op(true, &[0x2b], RCX, Place::Reg(RDX));
    a.code.push(0x66); // 16 bits
    a.op(false, &[0x3b], RCX, Place::At(T2, offset_of!(Site, limit) as i32));
    others.push(a.jump_if(cc::A));
    a.op(false, &[0x84], T0, Place::At(T2, offset_of!(Site, mask) as i32)); // test
    others.push(a.jump_if(cc::NE));
    a.load(RCX, Place::StateAt(RAX, entries + offset_of!(Entry, mark)));
    if writable {
        a.op(false, &[0xf6], 0, Place::At(RCX, 0)); // test byte
        a.code.push(terem_memory::CODE as u8);
        others.push(a.jump_if(cc::NE));
    }
    a.store(page(offset_of!(Remembered, mark)), RCX);
    a.store(page(offset_of!(Remembered, page)), RDX);
    a.load(RCX, Place::StateAt(RAX, entries + offset_of!(Entry, addend)));
    a.op(true, &[0x03], RDX, Place::Reg(RCX));
    a.store(page(offset_of!(Remembered, host)), RDX);
    a.op(true, &[0x03], T0, Place::Reg(RCX));
    [RDX, RCX, RAX].into_iter().for_each(|r| pop(a, r));
    a.code.push(0xc3);
    others.into_iter().for_each(|j| a.land(j));
    [RDX, RCX, RAX].into_iter().for_each(|r| pop(a, r));
    if let Some(slow) = slow {
        push(a, T1);
        a.call_to(slow);
        a.op(false, &[0x85], T1, Place::Reg(T1)); // test
        pop(a, T1);
        let done = a.jump_if(cc::NE);
        a.op(true, &[0x2b], T0, page(offset_of!(Remembered, page)));
        a.op(true, &[0x03], T0, page(offset_of!(Remembered, host)));
        a.code.push(0xc3);
        a.land(done);
    }
    a.group1(true, 0, Place::At(RSP, 0), 5);
    a.code.push(0xc3);
}

/// [`Stubs::forget`].
fn forget(a: &mut Asm, set: usize, nothing: u64) {
    push(a, RAX);
    push(a, RCX);
    a.load(RAX, Place::State(offset_of!(Cpu, tlb) + offset_of!(Tlb, data_epochs) + set * 8));
    a.store(Place::At(T1, offset_of!(Header, epoch) as i32), RAX);
    a.load(RCX, Place::At(T1, offset_of!(Header, pages) as i32));
    a.lea_plus(T1, T1, size_of::<Header>() as i32);
    a.set(T0, NO_PAGE);
    a.set(T2, nothing);
    let first = a.jump();
    let again = a.code.len();
    a.store(Place::At(T1, offset_of!(Remembered, page) as i32), T0);
    a.store(Place::At(T1, offset_of!(Remembered, host) as i32), T2);
    a.lea_plus(T1, T1, size_of::<Remembered>() as i32);
    a.land(first);
    a.group1(true, 5, Place::Reg(RCX), 1); // sub
    let more = a.jump_if(cc::AE);
    a.land_at(more, again);
    pop(a, RCX);
    pop(a, RAX);
    a.code.push(0xc3);
}
