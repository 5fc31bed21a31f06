//! Random programs that change their own code and where it is mapped, against a model of what they compute: functions on
//! pages that are swapped under them, which patch each other's constants, also one in an instruction across two pages.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use terem_bus::Clock;
use terem_cpu::{Accelerator, Stop, rflags};
use terem_memory::vm_memory::{Bytes, GuestAddress};

use super::{CODE, PAGE_TABLE, PAGES, Rig, WINDOW, assemble};

/// Pages that are swapped; the one behind them stays.
const SWAPPED: usize = 8;
/// Where a page's functions begin. The last one's constant is half on the next page.
const SLOTS: [usize; 4] = [0x40, 0x140, 0x7c0, 0xff7];
/// From a function's first byte to its constant: behind `rol rbx, 5` and the opcode of `xor rbx, imm32`.
const CONSTANT: usize = 7;
/// Addresses of all functions.
const TABLE: u64 = 0x4_0000;
const CALLS: u64 = 12_000;
const MULTIPLIER: u64 = 0x5851_f42d_4c95_7f2d;
const INCREMENT: u64 = 0x1405_7b7e;

/// What a function does after `h = rotate(h, 5) ^ constant`.
#[derive(Debug, Clone, Copy)]
enum Then {
    Nothing,
    /// Patches the constant of the function at a linear address, if the mask's bits in `h` are 0.
    Patch {
        at: u64,
        mask: u8,
    },
    /// Patches an `add rbx, imm32` that comes at once, likewise.
    PatchNext {
        mask: u8,
    },
    /// Goes on in a function of the next page.
    GoOn {
        slot: usize,
    },
}

fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
    *seed >> 33
}

fn function(a: &mut CodeAssembler, page: u64, constant: i32, then: Then) -> Result<(), IcedError> {
    a.rol(rbx, 5)?;
    // Always with 32 bits.
    a.db(&[0x48, 0x81, 0xf3])?;
    a.db(&constant.to_le_bytes())?;
    let mut skip = a.create_label();
    match then {
        Then::Nothing => {}
        Then::Patch { at, mask } => {
            a.test(bl, i32::from(mask))?;
            a.jne(skip)?;
            a.mov(dword_ptr(at), ebx)?;
            a.set_label(&mut skip)?;
        }
        Then::PatchNext { mask } => {
            let mut add = a.create_label();
            a.test(bl, i32::from(mask))?;
            a.jne(add)?;
            a.lea(rsi, ptr(add))?;
            a.mov(dword_ptr(rsi + 3), ebx)?;
            a.set_label(&mut add)?;
            a.db(&[0x48, 0x81, 0xc3, 0, 0, 0, 0])?;
        }
        Then::GoOn { slot } => return a.jmp(page + 0x1000 + SLOTS[slot] as u64),
    }
    a.ret()
}

/// Offset of the constant of [`Then::PatchNext`]'s `add` from the function's first byte.
const ADDED: usize = 11 + 3 + 2 + 7 + 3 + 3;

struct Model {
    /// The pages' bytes, as they are in physical memory from [`PAGES`] on.
    bytes: Vec<u8>,
    /// What each function on a physical page does in the end.
    then: Vec<[Then; 4]>,
    /// The physical page of each linear one.
    mapped: Vec<usize>,
    h: u64,
}

impl Model {
    fn physical(&self, linear: u64) -> usize {
        let at = (linear - WINDOW) as usize;
        (self.mapped[at >> 12] << 12) + (at & 0xfff)
    }

    fn constant(&self, linear: u64) -> u64 {
        let byte = |i| self.bytes[self.physical(linear + i)];
        i32::from_le_bytes(std::array::from_fn(|i| byte(i as u64))) as u64
    }

    fn patch(&mut self, linear: u64) {
        for (i, byte) in (self.h as u32).to_le_bytes().into_iter().enumerate() {
            let at = if linear >= WINDOW {
                self.physical(linear + i as u64)
            } else {
                (linear - PAGES) as usize + i
            };
            self.bytes[at] = byte;
        }
    }

    fn call(&mut self, page: usize, slot: usize) {
        let at = WINDOW + (page << 12 | SLOTS[slot]) as u64;
        self.h = self.h.rotate_left(5) ^ self.constant(at + CONSTANT as u64);
        match self.then[self.mapped[page]][slot] {
            Then::Nothing => {}
            Then::Patch { at, mask } => {
                if self.h & u64::from(mask) == 0 {
                    self.patch(at);
                }
            }
            Then::PatchNext { mask } => {
                if self.h & u64::from(mask) == 0 {
                    self.patch(at + ADDED as u64);
                }
                self.h = self.h.wrapping_add(self.constant(at + ADDED as u64));
            }
            Then::GoOn { slot } => self.call(page + 1, slot),
        }
    }

    fn run(&mut self, mut random: u64, swaps: u64) -> u64 {
        for _ in 0..CALLS {
            let n = next(&mut random);
            if n & swaps == 0 {
                self.mapped.swap((n >> 8 & 7) as usize, (n >> 11 & 7) as usize);
            } else {
                self.call((n >> 10 & 7) as usize, (n >> 8 & 3) as usize);
            }
        }
        self.h
    }
}

/// Writes the pages into the guest's memory; their model.
fn pages(rig: &Rig, seed: &mut u64) -> Model {
    let mut model = Model {
        bytes: vec![0; (SWAPPED + 2) * 0x1000],
        then: Vec::new(),
        mapped: (0..SWAPPED + 2).collect(),
        h: 0,
    };
    let mask = if next(seed) & 1 == 0 { 0x3f } else { 0xff };
    for page in 0..=SWAPPED {
        let then = std::array::from_fn(|slot| {
            // The constant's address, as the window has it or by the mapping of all memory to itself.
            let from = if next(seed) & 1 == 0 { WINDOW } else { PAGES };
            let target = next(seed) as usize;
            let at = from + ((target & 7) << 12 | SLOTS[target >> 3 & 3]) as u64 + CONSTANT as u64;
            match next(seed) % 6 {
                _ if slot == 3 || page == SWAPPED => Then::Nothing,
                0 | 1 => Then::Patch { at, mask },
                2 => Then::PatchNext { mask },
                3 => Then::GoOn { slot: target >> 3 & 3 },
                _ => Then::Nothing,
            }
        });
        let linear = WINDOW + (page as u64) * 0x1000;
        for (slot, then) in then.into_iter().enumerate() {
            let constant = next(seed) as i32;
            let code = assemble(linear + SLOTS[slot] as u64, |a| function(a, linear, constant, then));
            let at = page * 0x1000 + SLOTS[slot];
            model.bytes[at..at + code.len()].copy_from_slice(&code);
        }
        model.then.push(then);
    }
    // Each page begins with the end of such a function, the first one of none.
    model.bytes[2] = 0xc3;
    rig.memory.write_slice(&model.bytes, GuestAddress(PAGES)).unwrap();
    for page in 0..SWAPPED + 2 {
        rig.page(page as u64, 0x63);
        for (slot, at) in SLOTS.iter().enumerate() {
            rig.put(TABLE + (page * 4 + slot) as u64 * 8, WINDOW + (page << 12 | at) as u64);
        }
    }
    model
}

/// Calls functions and swaps pages at random (R12), [`CALLS`] times.
fn driver(a: &mut CodeAssembler, swaps: i32) -> Result<(), IcedError> {
    let (mut again, mut on, mut swap, mut reload) =
        (a.create_label(), a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    a.mov(rax, MULTIPLIER)?;
    a.imul_2(r12, rax)?;
    a.add(r12, INCREMENT as i32)?;
    a.mov(rsi, r12)?;
    a.shr(rsi, 33)?;
    a.test(esi, swaps)?;
    a.je(swap)?;
    a.shr(esi, 8)?;
    a.and(esi, 31)?;
    // Slots are counted first.
    a.call(qword_ptr(TABLE + rsi * 8))?;
    a.set_label(&mut on)?;
    a.dec(r13)?;
    a.jne(again)?;
    a.int3()?;
    a.set_label(&mut swap)?;
    a.shr(esi, 8)?;
    a.mov(edi, esi)?;
    a.and(esi, 7)?;
    a.shr(edi, 3)?;
    a.and(edi, 7)?;
    a.mov(rax, qword_ptr(PAGE_TABLE + rsi * 8))?;
    a.mov(rdx, qword_ptr(PAGE_TABLE + rdi * 8))?;
    a.mov(qword_ptr(PAGE_TABLE + rsi * 8), rdx)?;
    a.mov(qword_ptr(PAGE_TABLE + rdi * 8), rax)?;
    a.bt(r12, 32)?;
    a.jb(reload)?;
    a.shl(esi, 12)?;
    a.shl(edi, 12)?;
    a.invlpg(byte_ptr(rsi + WINDOW as i32))?;
    a.invlpg(byte_ptr(rdi + WINDOW as i32))?;
    a.jmp(on)?;
    a.set_label(&mut reload)?;
    a.mov(rax, cr3)?;
    a.mov(cr3, rax)?;
    a.jmp(on)
}

#[test]
fn programs_that_patch_and_swap_their_code_compute_what_the_model_does() {
    for case in 0..24_u64 {
        for (translate, cpus) in [(false, 1), (true, 1), (true, 2)] {
            let mut seed = case.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut rig = Rig::made(cpus, Clock::manual(), None, translate);
            let swaps = [0x7f, 0x3ff, 0xf][case as usize % 3];
            let mut model = pages(&rig, &mut seed);
            rig.load(CODE, |a| driver(a, swaps));
            let random = next(&mut seed);
            rig.change(|s| {
                (s.gpr[12], s.gpr[13], s.gpr[3]) = (random, CALLS, 0);
                s.rflags = rflags::FIXED;
            });
            assert_eq!((rig.vcpu.run(), rig.vector()), (Stop::Kicked, 3), "case {case}");
            let translated = rig.accelerator.counters(0).unwrap().blocks_translated;
            assert_eq!(translated > 0, translate, "case {case}");
            let (expected, got) = (model.run(random, swaps as u64), rig.vcpu.save().gpr[3]);
            assert_eq!(got, expected, "case {case}, translate {translate}, {cpus} vCPUs");
            let mut bytes = vec![0; model.bytes.len()];
            rig.memory.read_slice(&mut bytes, GuestAddress(PAGES)).unwrap();
            assert!(bytes == model.bytes, "case {case}, translate {translate}: the code itself");
        }
    }
}
