//! Jumps, calls and returns, and the links between translations.
//!
//! A jump within its page is a direct jump: both ends are void when the page is written, and nothing can change where
//! the page lies while its code runs. A jump to another page is looked at first: it is good for one linear address of
//! its source and one epoch ([`crate::mmu::Tlb`]). Indirect jumps look into a table by linear address and epoch. Where it is
//! only the address or the epoch that is another (another process, another turn of the same one), but the code at the
//! target is the same, both are made good again in place ([`crate::mmu::Place`]).

use std::mem::offset_of;

use iced_x86::{ConditionCode, OpKind};

use super::access::{Miss, Page};
use super::analyse::{Item, Kind};
use super::asm::host::{RSP, SP, T0, T1, T2};
use super::asm::{Asm, Jump, Place, cc};
use super::emit::{CannotEncode, Cold, Emitter, Flags};
use super::stubs::{native, push, slot};
use super::{CrossLink, JumpEntry, Native};
use crate::cpu::Cpu;
use crate::op::IP_REG;

/// Entries of the table of indirect jumps.
pub(crate) const JUMP_ENTRIES: usize = 4096;

/// The table's entry for a linear address.
pub(super) fn jump_index(linear: u64) -> usize {
    (linear ^ linear >> 4) as usize % JUMP_ENTRIES
}

/// A link of a translation that is being emitted.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewLink {
    /// Where its distance is in the code.
    pub(super) at: usize,
    pub(super) offset: i32,
    pub(super) cross: Option<u32>,
}

impl Emitter<'_> {
    pub(super) fn flow(&mut self, item: &Item) -> Result<(), CannotEncode> {
        match item.kind {
            Kind::JumpIf => {
                self.jump_if(item);
                Ok(())
            }
            Kind::Jump => {
                self.flags_to_memory();
                let target = item.insn.near_branch_target() as i64;
                self.link(target, false, target <= i64::from(item.start()));
                Ok(())
            }
            Kind::Call => {
                self.push_return(item);
                let frame = self.frame(item);
                self.link_by(item.insn.near_branch_target() as i64, false, true, frame);
                if frame {
                    self.come_back();
                }
                Ok(())
            }
            Kind::Return => {
                self.flags_to_memory();
                let site = self.stack_site(item, false);
                self.asm.copy(true, T0, SP);
                let miss = self.check_stack(false);
                self.asm.load(T0, Place::At(T0, 0));
                let more = if item.insn.op_count() == 1 { item.insn.immediate16() } else { 0 };
                self.asm.lea_plus(SP, SP, 8 + i32::from(more));
                self.miss_flow(miss, site);
                self.asm.op(true, &[0x3b], T0, Place::At(RSP, 8));
                let jump = self.asm.jump_if(cc::NE);
                self.asm.group1(true, 4, Place::Reg(T0), -0x1000);
                self.asm.store(slot(IP_REG), T0);
                self.asm.code.push(0xc3);
                self.cold.push(Cold::Mismatch { jump });
                Ok(())
            }
            _ => self.jump_to(item, item.kind == Kind::CallTo),
        }
    }

    fn miss_flow(&mut self, miss: Miss, site: u64) {
        self.cold.push(Cold::Miss { miss, site, recipe: None });
    }

    /// An indirect jump or call.
    fn jump_to(&mut self, item: &Item, call: bool) -> Result<(), CannotEncode> {
        self.flags_to_memory();
        self.flags.host = false;
        let insn = &item.insn;
        let register = insn.op0_kind() == OpKind::Register;
        if !register {
            if i32::try_from(insn.memory_displacement64() as i64).is_err() {
                return Err(CannotEncode);
            }
            let site = self.stack_site(item, false);
            let page = Self::page(insn);
            self.address(insn, T0);
            let miss = self.check(page, 8, 0, false);
            self.asm.load(T0, Place::At(T0, 0));
            self.miss_flow(miss, site);
            if call {
                self.asm.store(native!(target), T0);
            }
        }
        if call {
            self.push_return(item);
        }
        if register {
            match self.part(insn.op0_register(), T0) {
                Some(T0) => {}
                Some(r) => self.asm.copy(true, T0, r),
                None => return Err(CannotEncode),
            }
        } else if call {
            self.asm.load(T0, native!(target));
        }
        let frame = call && self.frame(item);
        self.indirect(frame);
        if frame {
            self.come_back();
        }
        Ok(())
    }

    /// Pushes the address of the next instruction. Flags go to memory.
    fn push_return(&mut self, item: &Item) {
        self.flags_to_memory();
        self.flags.host = false;
        let site = self.stack_site(item, true);
        self.asm.lea_plus(T0, SP, -8);
        let miss = self.check_stack(true);
        self.asm.load(T2, slot(IP_REG));
        self.asm.lea_plus(T2, T2, i32::from(item.next()));
        self.asm.store(Place::At(T0, 0), T2);
        self.asm.lea_plus(SP, SP, -8);
        self.miss_flow(miss, site);
        if self.alone {
            return;
        }
        // If that was a page with code, attention is called for, and the jump that follows looks for that.
        let jump = self.is_marked(Page::Stack);
        let (back, next) = (self.asm.code.len(), i32::from(item.next()));
        self.cold.push(Cold::MarkedCall { jump, site, back, next });
    }

    /// Makes the frame of a call whose return address is in T2, unless it comes back to another page: that and, by the
    /// host's call, where the translation goes on. So the host's processor predicts where returns go. False: no frame.
    fn frame(&mut self, item: &Item) -> bool {
        if item.next() >= 0x1000 {
            return false;
        }
        self.asm.op(true, &[0x3b], RSP, native!(stack_limit));
        let jump = self.asm.jump_if(cc::B);
        self.cold.push(Cold::TooDeep { jump, back: self.asm.code.len() });
        push(&mut self.asm, T2);
        true
    }

    /// Where a call's return comes to.
    fn come_back(&mut self) {
        self.asm.lea_plus(RSP, RSP, 8);
        self.flags = Flags { host: false, memory: true, recipe: None };
        self.vectors = false;
    }

    /// What follows a jump that is not taken finds the flags where they are; whoever is jumped to, in the vCPU's state.
    fn jump_if(&mut self, item: &Item) {
        self.ensure_host();
        let saves = !item.taken_kills && !self.flags.memory;
        let condition = match item.insn.condition_code() {
            ConditionCode::None => return,
            c => c as u8 - 1,
        };
        let target = item.insn.near_branch_target() as i64;
        if !(0..0x1000).contains(&target) {
            let jump = self.asm.jump_if(condition);
            self.cold.push(Cold::Cross { jump, offset: target, saves });
        } else if target <= i64::from(item.start()) || saves {
            let over = self.asm.jump_if(condition ^ 1);
            if saves {
                self.asm.save_flags();
            }
            self.link(target, false, target <= i64::from(item.start()));
            self.asm.land(over);
        } else {
            let jump = self.asm.jump_if(condition);
            let link = self.new_link(jump.0, target, None);
            self.cold.push(Cold::Leave { jumps: vec![jump], link });
        }
    }

    fn new_link(&mut self, at: usize, offset: i64, cross: Option<u32>) -> u32 {
        self.links.push(NewLink { at, offset: offset as i32, cross });
        self.first_link + self.links.len() as u32 - 1
    }

    /// Goes to `offset` of the page that runs. `apart`: though it begins on this page, it must be treated as another.
    pub(super) fn link(&mut self, offset: i64, apart: bool, poll: bool) {
        self.link_by(offset, apart, poll, false);
    }

    fn link_by(&mut self, offset: i64, apart: bool, poll: bool, call: bool) {
        if apart || !(0..0x1000).contains(&offset) {
            self.cross_link(offset, call);
            return;
        }
        let mut jumps = Vec::new();
        if poll || self.polls {
            jumps.push(self.poll());
        }
        let jump = if call { self.asm.call() } else { self.asm.jump() };
        let link = self.new_link(jump.0, offset, None);
        jumps.push(jump);
        self.cold.push(Cold::Leave { jumps, link });
    }

    /// Jumps away if somebody wants something of the vCPU. T1 and flags are lost.
    pub(super) fn poll(&mut self) -> Jump {
        self.asm.load(T1, native!(attention));
        self.asm.compare_byte(Place::At(T1, 0), 0);
        self.asm.jump_if(cc::NE)
    }

    /// A jump to another page.
    pub(super) fn cross_link(&mut self, offset: i64, call: bool) {
        let cross = self.first_cross + self.crosses;
        self.crosses += 1;
        let data = self.cross_data + u64::from(cross) * size_of::<CrossLink>() as u64;
        self.asm.load(T0, slot(IP_REG));
        self.asm.compare_rip(T0, data + offset_of!(CrossLink, page) as u64);
        let page = self.asm.jump_if(cc::NE);
        self.asm.load(T1, native!(jump_key));
        self.asm.compare_rip(T1, data + offset_of!(CrossLink, key) as u64);
        let key = self.asm.jump_if(cc::NE);
        let back = self.asm.code.len();
        let poll = self.poll();
        let pages = (offset & !0xfff) as i32;
        if pages != 0 {
            self.asm.group1(true, 0, Place::Reg(T0), pages);
            self.asm.store(slot(IP_REG), T0);
        }
        let jump = if call { self.asm.call() } else { self.asm.jump() };
        let link = self.new_link(jump.0, offset, Some(cross));
        self.cold.push(Cold::Elsewhere { jumps: [page, key], data, pages, back, link });
        self.cold.push(Cold::Leave { jumps: vec![poll], link });
    }

    /// Goes to the linear address in T0; `call`: by the host's call.
    fn indirect(&mut self, call: bool) {
        look_up(&mut self.asm, self.stubs.exit_to, self.stubs.same_target, call);
    }
}

/// Goes to the translation at the linear address in T0, by a call or a jump; to `exit_to` where none is known, or
/// somebody wants something of the vCPU. `same_target`: [`super::stubs::Stubs::same_target`].
pub(super) fn look_up(asm: &mut Asm, exit_to: u64, same_target: u64, call: bool) {
    const SHIFT: u32 = size_of::<JumpEntry>().trailing_zeros();
    let table = offset_of!(Cpu, native) + offset_of!(Native, jumps);
    asm.load(T1, native!(attention));
    asm.compare_byte(Place::At(T1, 0), 0);
    asm.jump_if_to(cc::NE, exit_to);
    asm.copy(false, T1, T0);
    asm.shift_right(false, T1, 4);
    asm.op(false, &[0x33], T1, Place::Reg(T0));
    asm.group1(false, 4, Place::Reg(T1), JUMP_ENTRIES as i32 - 1);
    asm.shift_left(false, T1, SHIFT as u8);
    asm.load(T2, native!(jump_key));
    asm.op(true, &[0x3b], T0, Place::StateAt(T1, table + offset_of!(JumpEntry, linear)));
    asm.jump_if_to(cc::NE, exit_to);
    asm.op(true, &[0x3b], T2, Place::StateAt(T1, table + offset_of!(JumpEntry, key)));
    let known = asm.short_jump_if(cc::E);
    asm.call_to(same_target);
    asm.land_short(known);
    asm.group1(true, 4, Place::Reg(T0), -0x1000);
    asm.store(slot(IP_REG), T0);
    let target = Place::StateAt(T1, table + offset_of!(JumpEntry, target));
    asm.op(false, &[0xff], if call { 2 } else { 4 }, target);
}
