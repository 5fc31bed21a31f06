//! What kernels do all the time and needs no help: interrupts on and off, `pushf`, `swapgs`, access to user pages.
//!
//! Only for privilege level 0 (levels 1 and 2 are left to the interpreter), but for `pushf`.

use std::mem::offset_of;

use terem_cpu::{Msrs, Segment, VcpuState, rflags};

use super::access::Page;
use super::analyse::{Item, Kind};
use super::asm::host::{SP, T0, T1, T2};
use super::asm::{Place, cc};
use super::emit::{CannotEncode, Cold, Emitter};
use super::stubs::native;
use crate::cpu::{Cpu, cr4};
use crate::mmu::{KERNEL, Tlb, USER};

/// A field of the state.
const SYSTEM_FLAGS: Place = Place::State(offset_of!(Cpu, system_flags));
/// What a change of the TLB set is in [`super::Native::jump_key`].
const SET: i32 = 1 << super::SET_SHIFT;

impl Emitter<'_> {
    pub(super) fn system(&mut self, item: &Item) -> Result<(), CannotEncode> {
        if item.kind == Kind::PushFlags {
            self.push_flags(item);
            return Ok(());
        }
        if self.set == USER {
            return Err(CannotEncode);
        }
        match item.kind {
            Kind::ClearIf => {
                let _ = self.protect();
                self.asm.group1(false, 4, SYSTEM_FLAGS, !(rflags::IF as i32));
            }
            Kind::SetIf => {
                // Nothing comes between this and the next instruction, which has to be in this translation then.
                if matches!(self.next_kind, None | Some(Kind::JumpIf | Kind::SetIf)) || self.polls {
                    return Err(CannotEncode);
                }
                self.set_if();
            }
            Kind::SwapGs => self.swap_gs(),
            Kind::SetAc => {
                let _ = self.protect();
                self.asm.group1(false, 1, SYSTEM_FLAGS, rflags::AC as i32);
                if self.set == KERNEL {
                    self.flags_to_memory();
                    self.change_set(1, SET);
                    self.link(i64::from(item.next()), false, false);
                }
            }
            _ => self.clear_ac(item),
        }
        Ok(())
    }

    /// Whether the translation ends with `item`, which changes the TLB set.
    pub(super) fn changes_set(&self, item: &Item) -> bool {
        match item.kind {
            Kind::SetAc => self.set == KERNEL,
            Kind::ClearAc => self.set != KERNEL && self.set != USER,
            _ => false,
        }
    }

    fn set_if(&mut self) {
        let _ = self.protect();
        let bit = rflags::IF as i32;
        self.asm.op(false, &[0xf7], 0, SYSTEM_FLAGS); // test
        self.asm.bytes(&bit.to_le_bytes());
        let set = self.asm.jump_if(cc::NE);
        self.asm.group1(false, 1, SYSTEM_FLAGS, bit);
        self.asm.load(T1, native!(pending));
        self.asm.compare_byte(Place::At(T1, 0), 0);
        let nothing = self.asm.jump_if(cc::E);
        self.asm.load(T1, native!(attention));
        self.asm.set_byte(Place::At(T1, 0), 1);
        self.asm.land(set);
        self.asm.land(nothing);
        self.opened = true;
    }

    /// After the instruction behind `sti`: leaves for `offset` if somebody wants something.
    pub(super) fn poll_for(&mut self, offset: i64) {
        self.flags_to_memory();
        self.flags.host = false;
        let jump = self.poll();
        self.cold.push(Cold::LeaveFor { jump, offset });
    }

    fn push_flags(&mut self, item: &Item) {
        let site = self.stack_site(item, true);
        self.flags_to_memory();
        self.flags.host = false;
        self.asm.lea_plus(T0, SP, -8);
        let miss = self.check_stack(true);
        self.asm.op(false, &[0x0f, 0xb6], T2, Place::State(offset_of!(Cpu, ah))); // movzx
        self.asm.group1(false, 4, Place::Reg(T2), 0xd5);
        self.asm.op(false, &[0x0f, 0xb6], T1, Place::State(offset_of!(Cpu, of)));
        self.asm.shift_left(false, T1, 11);
        self.asm.op(true, &[0x0b], T2, Place::Reg(T1)); // or
        self.asm.op(true, &[0x0b], T2, SYSTEM_FLAGS);
        self.asm.group1(true, 4, Place::Reg(T2), !((rflags::RF | rflags::VM) as i32));
        self.asm.group1(true, 1, Place::Reg(T2), rflags::FIXED as i32);
        self.asm.store(Place::At(T0, 0), T2);
        self.asm.lea_plus(SP, SP, -8);
        self.look_at_mark(false, Page::Stack, site);
        self.cold.push(Cold::Miss { miss, site, recipe: None });
    }

    fn swap_gs(&mut self) {
        let kernel = Place::State(offset_of!(Cpu, msrs) + offset_of!(Msrs, kernel_gs_base));
        let base = Place::State(offset_of!(Cpu, segment_base) + VcpuState::GS * 8);
        let hidden = offset_of!(Cpu, segments) + VcpuState::GS * size_of::<Segment>();
        self.asm.load(T0, base);
        self.asm.load(T1, kernel);
        self.asm.store(kernel, T0);
        self.asm.store(base, T1);
        self.asm.store(Place::State(hidden + offset_of!(Segment, base)), T1);
    }

    /// Goes to another TLB set, whose code is another translation. Flags are lost.
    fn change_set(&mut self, to: i32, key: i32) {
        self.flags.host = false;
        self.asm.op(false, &[0xc7], 0, Place::State(offset_of!(Cpu, tlb) + Tlb::SET)); // mov
        self.asm.bytes(&to.to_le_bytes());
        self.asm.group1(true, 0, native!(jump_key), key);
    }

    fn clear_ac(&mut self, item: &Item) {
        let next = i64::from(item.next());
        let _ = self.protect();
        self.asm.group1(false, 4, SYSTEM_FLAGS, !(rflags::AC as i32));
        if self.set == KERNEL {
            return;
        }
        self.flags_to_memory();
        self.flags.host = false;
        // Without SMAP the set stays what it is.
        self.asm.op(false, &[0xf7], 0, Place::State(offset_of!(Cpu, cr4))); // test
        self.asm.bytes(&(cr4::SMAP as i32).to_le_bytes());
        let smap = self.asm.jump_if(cc::NE);
        self.link(next, false, false);
        self.asm.land(smap);
        self.change_set(KERNEL as i32, -SET);
        self.link(next, false, false);
    }
}
