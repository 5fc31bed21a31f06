//! The code that stands between Rust and translations: entry, exit, and calls into Rust.

use std::mem::offset_of;

use super::access::{Page, stack, table};
use super::asm::host::{RAX, RCX, RDI, RDX, RSI, RSP, SP, T0, T1, T2};
use super::asm::{Asm, Place, cc};
use super::cache::CodeMemory;
use super::flow::look_up;
use super::{CrossLink, JumpEntry, Native, SET_SHIFT, Site, runtime};
use crate::cpu::{Cpu, Ymm};
use crate::mmu::{Entry, MIX, PAGE_MASK, PAIRS, PLACES, Pair, Place as CodePlace, Quick, Remembered, Tlb};
use crate::op::IP_REG;

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
    /// For the supervisor and the user: whether the code at the page in [`IP_REG`] plus T1 is what the [`super::CrossLink`]
    /// at T2 leads to. If so, that is made good; if not, the call returns 5 bytes further on.
    pub(super) same_code: [u64; 2],
    /// The [`JumpEntry`] at offset T1 of the table is for the linear address in T0, but has another key: the call returns if
    /// the code is the same and the key in T2 has been put in; leaves for T0 if not. T2 is lost.
    pub(super) same_target: u64,
    /// For each TLB set, for reads and writes: a memory access of the site in T2 to a page that is not known.
    pub(super) fill: [[Fill; 2]; 3],
    /// Executes the [`super::Call`] in T1.
    pub(super) handler: u64,
    /// Loads the XMM registers; T1 is the site.
    pub(super) vectors: u64,
    /// A store hit the page of the mark T1, which holds code; T0 is the site. Does not come back.
    pub(super) marked: u64,
}

/// T0 is the linear address less that of the page looked at; afterwards it is the host address. Or it does not come back: the
/// instruction faults, or the interpreter goes on with it. Pages that hold code are not known for writes. T1 and T2 are lost.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fill {
    /// The page is in the table, T1 its entry's offset.
    pub(super) table: u64,
    /// It is the stack's.
    pub(super) stack: u64,
}

impl Stubs {
    /// `avx`: with the upper halves of vector registers.
    pub(super) fn emit(memory: &mut CodeMemory, avx: bool, state: u32) -> Self {
        let mut stubs = Self::default();
        let mut a = Asm { base: memory.next(), state, ..Asm::default() };
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
        for user in 0..2 {
            stubs.same_code[user] = a.here();
            same_code(&mut a, user);
        }
        stubs.same_target = a.here();
        same_target(&mut a, stubs.exit_to);
        let elsewhere = a.code.len();
        stubs.look_up = go_elsewhere(&mut a, &stubs);
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
            for write in [false, true] {
                let mut made = Fill { table: a.here(), stack: 0 };
                fill(&mut a, slow, set, write, Page::Table);
                // The stack's page is known only if it may be written.
                made.stack = a.here();
                fill(&mut a, slow, set, true, Page::Stack);
                stubs.fill[set][usize::from(write)] = made;
            }
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
    // movaps
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
    // vmovaps
    vex256(a, n, 0, opcode);
    a.bytes(&[(n & 7) << 3 | 4, 0x25]);
    a.bytes(&(a.state as i32 + vector(n) as i32).to_le_bytes());
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
fn go_elsewhere(a: &mut Asm, stubs: &Stubs) -> u64 {
    a.load(RSP, native!(stack_bottom));
    load_registers(a);
    a.load(T0, Place::State(offset_of!(Cpu, rip)));
    let look = a.here();
    look_up(a, stubs.exit_to, stubs.same_target, false);
    look
}

/// The places of code of the supervisor or the user.
fn places(user: usize) -> usize {
    offset_of!(Cpu, tlb) + offset_of!(Tlb, places) + user * size_of::<[CodePlace; PLACES]>()
}

/// [`Stubs::same_code`].
fn same_code(a: &mut Asm, user: usize) {
    const SHIFT: u8 = size_of::<CodePlace>().trailing_zeros() as u8;
    a.op(true, &[0x03], T1, slot(IP_REG));
    a.copy(false, T0, T1);
    a.shift_right(false, T0, 12 - SHIFT);
    a.group1(false, 4, Place::Reg(T0), ((PLACES - 1) << SHIFT) as i32);
    a.lea_plus(T1, T1, user as i32);
    let place = |field| Place::StateAt(T0, places(user) + field);
    a.op(true, &[0x3b], T1, place(offset_of!(CodePlace, page)));
    let other = a.jump_if(cc::NE);
    a.load(T1, place(offset_of!(CodePlace, code)));
    a.op(true, &[0x3b], T1, Place::At(T2, offset_of!(CrossLink, code) as i32));
    let changed = a.jump_if(cc::NE);
    a.load(T1, native!(jump_key));
    a.store(Place::At(T2, offset_of!(CrossLink, key) as i32), T1);
    a.load(T0, slot(IP_REG));
    a.store(Place::At(T2, offset_of!(CrossLink, page) as i32), T0);
    a.code.push(0xc3);
    a.land(other);
    a.land(changed);
    a.group1(true, 0, Place::At(RSP, 0), 5);
    a.code.push(0xc3);
}

/// [`Stubs::same_target`].
fn same_target(a: &mut Asm, exit_to: u64) {
    const SHIFT: u8 = size_of::<CodePlace>().trailing_zeros() as u8;
    /// Bits of the key that are no epoch's.
    const MODE: i32 = (1 << (SET_SHIFT + 3)) - 1;
    let entry = |field| Place::StateAt(T1, offset_of!(Cpu, native) + offset_of!(Native, jumps) + field);
    push(a, RAX);
    a.copy(true, RAX, T2);
    a.op(true, &[0x33], RAX, entry(offset_of!(JumpEntry, key)));
    a.op(false, &[0xf7], 0, Place::Reg(RAX)); // test
    a.bytes(&MODE.to_le_bytes());
    let mode = a.jump_if(cc::NE);
    // The user's set is the one whose bit 1 is set.
    a.copy(true, RAX, T2);
    a.shift_right(true, RAX, SET_SHIFT as u8 + 1);
    a.group1(false, 4, Place::Reg(RAX), 1);
    push(a, RCX);
    a.copy(true, RCX, T0);
    a.group1(true, 4, Place::Reg(RCX), PAGE_MASK as i32);
    a.op(true, &[0x0b], RCX, Place::Reg(RAX));
    a.shift_left(false, RAX, PLACES.trailing_zeros() as u8 + SHIFT);
    a.copy(false, T2, T0);
    a.shift_right(false, T2, 12 - SHIFT);
    a.group1(false, 4, Place::Reg(T2), ((PLACES - 1) << SHIFT) as i32);
    a.op(false, &[0x03], RAX, Place::Reg(T2));
    let place = |field| Place::StateAt(RAX, places(0) + field);
    a.op(true, &[0x3b], RCX, place(offset_of!(CodePlace, page)));
    let other = a.jump_if(cc::NE);
    a.load(RCX, place(offset_of!(CodePlace, code)));
    a.op(true, &[0x3b], RCX, entry(offset_of!(JumpEntry, code)));
    let changed = a.jump_if(cc::NE);
    a.load(T2, native!(jump_key));
    a.store(entry(offset_of!(JumpEntry, key)), T2);
    pop(a, RCX);
    pop(a, RAX);
    a.code.push(0xc3);
    a.land(other);
    a.land(changed);
    pop(a, RCX);
    a.land(mode);
    pop(a, RAX);
    a.lea_plus(RSP, RSP, 8);
    a.jump_to(exit_to);
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
    a.set(RDI, u64::from(a.state));
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

/// [`Fill`]. `writable`: it must be one that may be written.
fn fill(a: &mut Asm, slow: u64, set: usize, writable: bool, page: Page) {
    const SHIFT: u32 = size_of::<Pair>().trailing_zeros();
    let tlb = offset_of!(Cpu, tlb);
    let entries = tlb + offset_of!(Tlb, sets) + set * size_of::<[Pair; PAIRS]>();
    let tag = if writable { offset_of!(Entry, write) } else { offset_of!(Entry, read) };
    let quick = |field| Place::StateAt(T1, table(set) + field);
    let (looked_at, host) = match page {
        Page::Stack => (stack(set, offset_of!(Remembered, page)), stack(set, offset_of!(Remembered, host))),
        Page::Table if writable => (quick(offset_of!(Quick, write)), quick(offset_of!(Quick, host))),
        Page::Table => (quick(offset_of!(Quick, read)), quick(offset_of!(Quick, host))),
    };
    a.op(true, &[0x03], T0, looked_at);
    [RAX, RCX, RDX].into_iter().for_each(|r| push(a, r));
    // The place in the set, as `Tlb::place` has it.
    a.copy(true, RAX, T0);
    a.shift_right(true, RAX, 12);
    a.copy(true, RCX, RAX);
    a.shift_right(true, RCX, MIX as u8);
    a.op(false, &[0x03], RAX, Place::Reg(RCX));
    a.group1(false, 4, Place::Reg(RAX), PAIRS as i32 - 1);
    a.shift_left(false, RAX, SHIFT as u8);
    a.copy(true, RDX, T0);
    a.group1(true, 4, Place::Reg(RDX), PAGE_MASK as i32);
    a.copy(true, RCX, RDX);
    a.op(true, &[0x0b], RCX, Place::State(tlb + offset_of!(Tlb, generations) + set * 8));
    a.op(true, &[0x3b], RCX, Place::StateAt(RAX, entries + tag));
    let first = a.short_jump_if(cc::E);
    a.lea_plus(RAX, RAX, size_of::<Entry>() as i32);
    a.op(true, &[0x3b], RCX, Place::StateAt(RAX, entries + tag));
    a.land_short(first);
    let mut others = vec![a.jump_if(cc::NE)];
    a.copy(true, RCX, T0);
    a.op(true, &[0x2b], RCX, Place::Reg(RDX));
    a.code.push(0x66); // 16 bits
    a.op(false, &[0x3b], RCX, Place::At(T2, offset_of!(Site, limit) as i32));
    others.push(a.jump_if(cc::A));
    a.op(false, &[0x84], T0, Place::At(T2, offset_of!(Site, mask) as i32)); // test
    others.push(a.jump_if(cc::NE));
    if writable {
        a.load(RCX, Place::StateAt(RAX, entries + offset_of!(Entry, mark)));
        a.op(false, &[0xf6], 0, Place::At(RCX, 0)); // test byte
        a.code.push(terem_memory::CODE as u8);
        others.push(a.jump_if(cc::NE));
    }
    match page {
        Page::Stack => {
            a.store(stack(set, offset_of!(Remembered, mark)), RCX);
            a.store(looked_at, RDX);
        }
        Page::Table => {
            a.store(quick(offset_of!(Quick, read)), RDX);
            if writable {
                a.store(quick(offset_of!(Quick, write)), RDX);
            } else {
                // Not known for writes: the next page is never this entry's.
                a.lea_plus(RCX, RDX, 0x1000);
                a.store(quick(offset_of!(Quick, write)), RCX);
            }
            a.set_byte(Place::State(tlb + offset_of!(Tlb, quick_used) + set), 1);
        }
    }
    a.load(RCX, Place::StateAt(RAX, entries + offset_of!(Entry, addend)));
    a.op(true, &[0x03], RDX, Place::Reg(RCX));
    a.store(host, RDX);
    a.op(true, &[0x03], T0, Place::Reg(RCX));
    [RDX, RCX, RAX].into_iter().for_each(|r| pop(a, r));
    a.code.push(0xc3);
    others.into_iter().for_each(|j| a.land(j));
    [RDX, RCX, RAX].into_iter().for_each(|r| pop(a, r));
    push(a, T1);
    if page == Page::Stack {
        a.set(T1, runtime::STACK);
    }
    a.call_to(slow);
    pop(a, T1);
    a.op(true, &[0x2b], T0, looked_at);
    a.op(true, &[0x03], T0, host);
    a.code.push(0xc3);
}
