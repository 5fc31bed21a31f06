//! Pushes and pops: single ones, and runs of them as functions begin and end with.

use super::Site;
use super::access::Page;
use super::analyse::{Item, Kind};
use super::asm::Place;
use super::asm::host::{SP, T0, T2};
use super::emit::{CannotEncode, Cold, Emitter, at_home};
use super::stubs::slot;
use iced_x86::{OpKind, Register};

/// Pushes or pops in a run, at most.
const MOST: usize = 16;

impl Emitter<'_> {
    pub(super) fn push(&mut self, item: &Item) -> Result<(), CannotEncode> {
        let site = self.stack_site(item, true);
        let recipe = self.protect();
        self.asm.lea_plus(T0, SP, -8);
        let miss = self.check_stack(true);
        self.prepare(item);
        let insn = &item.insn;
        if insn.op0_kind() == OpKind::Register {
            let source = self.part(insn.op0_register(), T2).ok_or(CannotEncode)?;
            self.asm.store(Place::At(T0, 0), source);
        } else {
            self.asm.op(true, &[0xc7], 0, Place::At(T0, 0));
            let imm = insn.immediate(0) as i32;
            self.asm.bytes(&imm.to_le_bytes());
        }
        self.asm.lea_plus(SP, SP, -8);
        self.after(item, None);
        self.look_at_mark(item.observed_after, Page::Stack, site);
        self.cold.push(Cold::Miss { miss, site, recipe });
        Ok(())
    }

    pub(super) fn pop(&mut self, item: &Item) -> Result<(), CannotEncode> {
        let site = self.stack_site(item, false);
        let recipe = self.protect();
        self.asm.copy(true, T0, SP);
        let miss = self.check_stack(false);
        self.prepare(item);
        let to = item.insn.op0_register();
        let n = to.number() as u8;
        self.asm.load(T0, Place::At(T0, 0));
        if n == 4 {
            self.asm.copy(true, SP, T0);
        } else {
            self.asm.lea_plus(SP, SP, 8);
            match at_home(to) {
                Some(home) => self.asm.store(slot(home), T0),
                None => self.asm.copy(true, n, T0),
            }
        }
        self.after(item, None);
        self.cold.push(Cold::Miss { miss, site, recipe });
        Ok(())
    }

    pub(super) fn leave(&mut self, item: &Item) -> Result<(), CannotEncode> {
        const RBP: u8 = 5;
        let site = self.stack_site(item, false);
        let recipe = self.protect();
        self.asm.copy(true, T0, RBP);
        let miss = self.check_stack(false);
        self.prepare(item);
        self.asm.load(T0, Place::At(T0, 0));
        self.asm.lea_plus(SP, RBP, 8);
        self.asm.copy(true, RBP, T0);
        self.after(item, None);
        self.cold.push(Cold::Miss { miss, site, recipe });
        Ok(())
    }

    /// Emits the run of pushes or of pops that `items` begin with, if it is one; how many they are.
    pub(super) fn stack_run(&mut self, items: &[Item]) -> usize {
        let Some(kind @ (Kind::Push | Kind::Pop)) = items.first().map(|i| i.kind) else { return 0 };
        let plain = |i: &&Item| {
            let register = i.insn.op0_kind() == OpKind::Register;
            i.kind == kind && !(register && i.insn.op0_register() == Register::RSP)
        };
        let count = items.iter().take(MOST).take_while(plain).count();
        if count < 2 || self.opened {
            return 0;
        }
        self.several(&items[..count], kind == Kind::Push);
        count
    }

    /// A run: one check for all of it.
    fn several(&mut self, items: &[Item], push: bool) {
        let (first, last) = (&items[0], &items[items.len() - 1]);
        let bytes = items.len() as i32 * 8;
        let flags = if push { Site::WRITES } else { 0 };
        let site = self.site(first, bytes as u32, 0, flags | Site::SEVERAL);
        let recipe = self.protect();
        self.asm.lea_plus(T0, SP, if push { -bytes } else { 0 });
        let miss = self.check(Page::Stack, bytes as u32, 0, push);
        items.iter().for_each(|item| self.prepare(item));
        for (i, item) in items.iter().enumerate() {
            let at = if push { bytes - 8 * (i as i32 + 1) } else { 8 * i as i32 };
            self.move_one(item, push, Place::At(T0, at));
        }
        self.asm.lea_plus(SP, SP, if push { -bytes } else { bytes });
        items.iter().for_each(|item| self.after(item, None));
        if push {
            let end = self.stack_site(last, true);
            self.look_at_mark(last.observed_after, Page::Stack, end);
        }
        self.cold.push(Cold::Miss { miss, site, recipe });
    }

    /// Moves what is pushed or popped. Flags stay.
    fn move_one(&mut self, item: &Item, push: bool, at: Place) {
        let insn = &item.insn;
        if insn.op0_kind() != OpKind::Register {
            self.asm.op(true, &[0xc7], 0, at);
            let imm = insn.immediate(0) as i32;
            self.asm.bytes(&imm.to_le_bytes());
            return;
        }
        let register = insn.op0_register();
        match (push, at_home(register)) {
            (true, Some(home)) => {
                self.asm.load(T2, slot(home));
                self.asm.store(at, T2);
            }
            (true, None) => self.asm.store(at, register.number() as u8),
            (false, Some(home)) => {
                self.asm.load(T2, at);
                self.asm.store(slot(home), T2);
            }
            (false, None) => self.asm.load(register.number() as u8, at),
        }
    }
}
