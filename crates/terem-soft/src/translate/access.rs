//! Memory accesses: a look into a table of pages ([`crate::mmu::Quick`]) in line. The stack's page is remembered apart from
//! it, which takes half as many instructions.

use std::mem::offset_of;

use iced_x86::{Instruction, Register};

use super::analyse::{Item, Kind};
use super::asm::host::{SP, T0, T1, T2};
use super::asm::{Address, Jump, Place, cc};
use super::emit::{Cold, Emitter, Recipe, at_home};
use super::stubs::slot;
use super::{Call, Site};
use crate::cpu::Cpu;
use crate::mmu::{QUICK, Quick, Remembered, Tlb};
use crate::op::IP_REG;

/// Where an access looks for its page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Page {
    /// At the page of the stack.
    Stack,
    /// In the table.
    Table,
}

/// Where a TLB set's page of the stack is.
pub(super) fn stack(set: usize, field: usize) -> Place {
    let stacks = offset_of!(Cpu, tlb) + offset_of!(Tlb, stacks);
    Place::State(stacks + set * size_of::<Remembered>() + field)
}

/// Where a TLB set's table is.
pub(super) fn table(set: usize) -> usize {
    offset_of!(Cpu, tlb) + offset_of!(Tlb, quick) + set * size_of::<[Quick; QUICK]>()
}

/// The jumps that are taken where an access is not to a page that is known; `back` is where to go on with the host
/// address in T0.
#[derive(Debug, Clone, Copy)]
pub(super) struct Miss {
    jumps: [Option<Jump>; 2],
    back: usize,
    page: Page,
    pub(super) write: bool,
}

/// Whether an address is on the stack: off RSP alone.
fn on_stack(insn: &Instruction) -> bool {
    let prefixed = matches!(insn.memory_segment(), Register::FS | Register::GS);
    insn.memory_base() == Register::RSP && insn.memory_index() == Register::None && !prefixed
}

impl Emitter<'_> {
    /// Where an access looks for its page.
    pub(super) fn page(insn: &Instruction) -> Page {
        if on_stack(insn) { Page::Stack } else { Page::Table }
    }

    /// A site for an access of `bytes` bytes by `item`; its address.
    pub(super) fn site(&mut self, item: &Item, bytes: u32, mask: u8, flags: u8) -> u64 {
        let shadow = if self.polls { Site::SHADOW } else { 0 };
        self.sites.push(Site {
            next: item.next(),
            limit: 0x1000 - bytes as u16,
            len: item.op.len,
            mask,
            flags: flags | shadow,
            _pad: 0,
        });
        self.first_site + ((self.sites.len() - 1) * size_of::<Site>()) as u64
    }

    /// A site for an access of 8 bytes to the stack.
    pub(super) fn stack_site(&mut self, item: &Item, write: bool) -> u64 {
        let flow = !matches!(item.kind, Kind::Push | Kind::PushFlags | Kind::Pop | Kind::Leave);
        let flags = if write { Site::WRITES } else { 0 } | if flow { Site::FLOW } else { 0 };
        self.site(item, 8, 0, flags)
    }

    /// An instruction that is executed by its handler; the address of what that gets.
    pub(super) fn call(&mut self, item: &Item, flow: bool) -> u64 {
        self.calls.push(Call { op: item.op, flow });
        self.first_call + ((self.calls.len() - 1) * size_of::<Call>()) as u64
    }

    /// The host register of a guest register as part of an address; those in memory are loaded to `scratch`.
    pub(super) fn part(&mut self, register: Register, scratch: u8) -> Option<u8> {
        if register == Register::None {
            return None;
        }
        if matches!(register, Register::RIP | Register::EIP) {
            self.asm.load(scratch, slot(IP_REG));
            return Some(scratch);
        }
        if let Some(home) = at_home(register) {
            self.asm.load(scratch, slot(home));
            return Some(scratch);
        }
        let n = register.full_register().number() as u8;
        Some(if n == 4 { SP } else { n })
    }

    /// The parts of a memory operand, and whether it is 64 bits wide. T0 and T1 are lost.
    pub(super) fn parts(&mut self, insn: &Instruction) -> (Address, bool) {
        let base = self.part(insn.memory_base(), T0);
        let index = self.part(insn.memory_index(), T1);
        let index = index.map(|i| (i, insn.memory_index_scale().trailing_zeros() as u8));
        let disp = insn.memory_displacement64() as i64 as i32;
        let narrow = insn.memory_base().size() == 4 || insn.memory_index().size() == 4;
        (Address { base, index, disp }, !narrow)
    }

    /// The linear address of the memory operand in `to`. Flags are lost if it is in FS or GS.
    pub(super) fn address(&mut self, insn: &Instruction, to: u8) {
        let (address, wide) = self.parts(insn);
        match address {
            Address { base: Some(base), index: None, disp: 0 } if wide => {
                if base != to {
                    self.asm.copy(true, to, base);
                }
            }
            _ => self.asm.lea(wide, to, address),
        }
        let segment = match insn.memory_segment() {
            Register::FS => 4,
            Register::GS => 5,
            _ => return,
        };
        self.asm.op(true, &[0x03], to, Place::State(offset_of!(Cpu, segment_base) + segment * 8));
    }

    /// Turns the linear address in T0 into the host's, if `bytes` bytes there are on a page that is known, and none of the
    /// bits of `mask` is set. The host's flags and T1 are lost.
    pub(super) fn check(&mut self, page: Page, bytes: u32, mask: u8, write: bool) -> Miss {
        const SHIFT: u8 = size_of::<Quick>().trailing_zeros() as u8;
        let field = if write { offset_of!(Quick, write) } else { offset_of!(Quick, read) };
        let (known, host) = match page {
            Page::Stack => {
                let at = |field| stack(self.set, field);
                (at(offset_of!(Remembered, page)), at(offset_of!(Remembered, host)))
            }
            Page::Table => {
                self.asm.copy(false, T1, T0);
                self.asm.shift_right(false, T1, 12 - SHIFT);
                self.asm.group1(false, 4, Place::Reg(T1), ((QUICK - 1) << SHIFT) as i32); // and
                let table = table(self.set);
                (Place::StateAt(T1, table + field), Place::StateAt(T1, table + offset_of!(Quick, host)))
            }
        };
        let a = &mut self.asm;
        a.op(true, &[0x2b], T0, known); // sub
        a.group1(true, 7, Place::Reg(T0), 0x1000 - bytes as i32); // cmp
        let mut jumps = [Some(a.jump_if(cc::A)), None];
        if mask != 0 {
            a.bytes(&[0x41, 0xf6, 0xc3, mask]); // test r11b, mask
            jumps[1] = Some(a.jump_if(cc::NE));
        }
        a.op(true, &[0x03], T0, host); // add
        Miss { jumps, back: a.code.len(), page, write }
    }

    /// [`Self::check`] for a push or pop.
    pub(super) fn check_stack(&mut self, write: bool) -> Miss {
        self.check(Page::Stack, 8, 0, write)
    }

    /// Where the page of an access of `site` is not known: it is found, or the interpreter goes on; the code to go on with
    /// then comes next.
    pub(super) fn miss(&mut self, miss: Miss, site: u64, recipe: Option<Recipe>) {
        miss.jumps.into_iter().flatten().for_each(|j| self.asm.land(j));
        self.flags_of(recipe);
        self.asm.lea_rip(T2, site);
        let fill = &self.stubs.fill[self.set][usize::from(miss.write)];
        self.asm.call_to(if miss.page == Page::Stack { fill.stack } else { fill.table });
        self.back(miss.back, false);
    }

    /// After a store to the host address that T0 is near: does the page hold code now? Another vCPU may have decoded some
    /// from it since it was put in the table. T1 and T2 are lost.
    pub(super) fn look_at_mark(&mut self, observed: bool, page: Page, site: u64) {
        if self.alone {
            return;
        }
        let recipe = if observed {
            self.protect()
        } else {
            self.flags.host = false;
            None
        };
        let jump = self.is_marked(page);
        self.cold.push(Cold::Marked { jump, site, recipe });
    }

    /// Jumps if the page that a store went to holds code. T1 is where its mark is; flags and T2 are lost.
    pub(super) fn is_marked(&mut self, page: Page) -> Jump {
        match page {
            Page::Stack => self.asm.load(T1, stack(self.set, offset_of!(Remembered, mark))),
            Page::Table => {
                self.asm.copy(true, T1, T0);
                self.asm.op(true, &[0x2b], T1, Place::State(offset_of!(Cpu, window)));
                self.asm.shift_right(true, T1, 12);
                self.asm.load(T2, Place::State(offset_of!(Cpu, marks)));
                self.asm.lea(true, T1, Address { base: Some(T2), index: Some((T1, 2)), disp: 0 });
            }
        }
        self.asm.op(false, &[0xf6], 0, Place::At(T1, 0)); // test byte [t1], CODE
        self.asm.code.push(terem_memory::CODE as u8);
        self.asm.jump_if(cc::NE)
    }
}
