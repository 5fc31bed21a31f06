//! Memory accesses: each remembers the page that it last went to, so that the next one there is a subtraction, a comparison
//! and an addition. Accesses off the same registers share what they remember within a translation; all accesses off RSP do
//! so within a vCPU.

use std::mem::offset_of;

use iced_x86::{Instruction, Register};

use super::analyse::{Item, Kind, Memory};
use super::asm::host::{SP, T0, T1, T2};
use super::asm::{Address, Jump, Place, cc};
use super::emit::{Cold, Emitter, Recipe, at_home};
use super::stubs::slot;
use super::{Header, Site};
use crate::cpu::Cpu;
use crate::mmu::{Remembered, Tlb};
use crate::op::IP_REG;

/// What accesses have in common that share a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PageKey {
    base: Register,
    index: Register,
    /// Of addresses relative to RIP or nothing: which page.
    page: i64,
    /// FS or GS.
    segment: Register,
    write: bool,
}

/// Where an access remembers its page.
#[derive(Debug, Clone, Copy)]
pub(super) enum Page {
    /// In the vCPU, for the stack.
    Stack,
    /// At an address of the data beside the code.
    At(u64),
}

/// The jumps that are taken where an access is not to the page remembered; `back` is where to go on with the host
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
    /// Whether the translation of `item` remembers pages in the data beside the code.
    pub(super) fn remembers(&self, item: &Item) -> bool {
        let calls = matches!(item.kind, Kind::CallTo | Kind::JumpTo);
        (item.memory.is_some() || calls) && !on_stack(&item.insn)
    }

    /// Sees to it that what the pages remember is of the present epoch. T1 and flags are lost.
    pub(super) fn look_at_epoch(&mut self) {
        let epoch = offset_of!(Cpu, tlb) + offset_of!(Tlb, data_epochs) + self.set * 8;
        self.asm.load(T1, Place::State(epoch));
        self.asm.compare_rip(T1, self.data + offset_of!(Header, epoch) as u64);
        let jump = self.asm.jump_if(cc::NE);
        self.cold.push(Cold::Stale { jump, back: self.asm.code.len() });
    }

    /// The page of a memory operand.
    pub(super) fn page(&mut self, insn: &Instruction, write: bool) -> Page {
        if on_stack(insn) {
            return Page::Stack;
        }
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let fixed = index == Register::None && matches!(base, Register::None | Register::RIP);
        let prefixed = matches!(insn.memory_segment(), Register::FS | Register::GS);
        let key = PageKey {
            base,
            index,
            page: if fixed { insn.memory_displacement64() as i64 >> 12 } else { 0 },
            segment: if prefixed { insn.memory_segment() } else { Register::None },
            write,
        };
        let known = self.pages.iter().position(|k| *k == key);
        let n = known.unwrap_or(self.pages.len());
        if known.is_none() {
            self.pages.push(key);
        }
        Page::At(self.data + (size_of::<Header>() + n * size_of::<Remembered>()) as u64)
    }

    /// A site for `item`; its address.
    pub(super) fn site(&mut self, item: &Item, flow: bool) -> u64 {
        let m = item.memory;
        let size = m.map_or(8, |m| m.size);
        self.sites.push(Site {
            op: item.op,
            limit: 0x1000 - u16::from(size),
            mask: m.map_or(0, Memory::mask),
            size,
            write: m.is_some_and(|m| m.write),
            flow,
        });
        self.first_site + ((self.sites.len() - 1) * size_of::<Site>()) as u64
    }

    /// A site for an access to the stack.
    pub(super) fn stack_site(&mut self, item: &Item, write: bool) -> u64 {
        let flow = !matches!(item.kind, Kind::Push | Kind::PushFlags | Kind::Pop | Kind::Leave);
        let at = self.site(item, flow);
        if let Some(site) = self.sites.last_mut() {
            (site.size, site.limit, site.write, site.mask) = (8, 0xff8, write, 0);
        }
        at
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

    /// An instruction on T0 or T1 with a field of what is remembered.
    fn with_page(&mut self, opcode: u8, register: u8, page: Page, field: usize) {
        match page {
            Page::Stack => {
                let stacks = offset_of!(Cpu, tlb) + offset_of!(Tlb, stacks);
                let place = Place::State(stacks + self.set * size_of::<Remembered>() + field);
                self.asm.op(true, &[opcode], register, place);
            }
            Page::At(address) => self.asm.op_rip(opcode, register, address + field as u64),
        }
    }

    /// Turns the linear address in T0 into the host's, if `bytes` bytes there are on the page remembered, and none of the
    /// bits of `mask` is set. The host's flags are lost.
    pub(super) fn check(&mut self, page: Page, bytes: u32, mask: u8, write: bool) -> Miss {
        self.with_page(0x2b, T0, page, offset_of!(Remembered, page)); // sub
        let a = &mut self.asm;
        a.group1(true, 7, Place::Reg(T0), 0x1000 - bytes as i32); // cmp
        let mut jumps = [Some(a.jump_if(cc::A)), None];
        if mask != 0 {
            a.bytes(&[0x41, 0xf6, 0xc3, mask]); // test r11b, mask
            jumps[1] = Some(a.jump_if(cc::NE));
        }
        self.with_page(0x03, T0, page, offset_of!(Remembered, host)); // add
        Miss { jumps, back: self.asm.code.len(), page, write }
    }

    /// [`Self::check`] for a push or pop.
    pub(super) fn check_stack(&mut self, write: bool) -> Miss {
        self.check(Page::Stack, 8, 0, write)
    }

    /// Where an access of `site` is not on the page remembered: that is found anew, or the instruction done by Rust; the
    /// code to go on with then comes next. `find`: the instruction is not to be done.
    pub(super) fn miss(&mut self, miss: Miss, site: u64, recipe: Option<Recipe>, find: bool) {
        miss.jumps.into_iter().flatten().for_each(|j| self.asm.land(j));
        self.flags_of(recipe);
        self.asm.lea_rip(T2, site);
        let fill = &self.stubs.fill[self.set][usize::from(miss.write)][usize::from(find)];
        match miss.page {
            Page::Stack => self.asm.call_to(fill.stack),
            Page::At(page) => {
                self.asm.lea_rip(T1, page);
                self.asm.call_to(fill.page);
            }
        }
        let back = self.asm.jump();
        self.asm.land_at(back, miss.back);
    }

    /// After a store: does the page hold code now? Another vCPU may have decoded some from it since it was remembered. T1 is
    /// lost.
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

    /// Jumps if the page that a store went to holds code. T1 is where its mark is; flags are lost.
    pub(super) fn is_marked(&mut self, page: Page) -> Jump {
        self.with_page(0x8b, T1, page, offset_of!(Remembered, mark));
        self.asm.op(false, &[0xf6], 0, Place::At(T1, 0)); // test byte [t1], CODE
        self.asm.code.push(terem_memory::CODE as u8);
        self.asm.jump_if(cc::NE)
    }
}
