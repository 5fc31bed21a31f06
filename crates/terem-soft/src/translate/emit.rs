//! One translation: guest instructions in host registers, memory accesses through the TLB, and the flags.

use iced_x86::{Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::access::Miss;
use super::analyse::{Item, Kind};
use super::asm::host::{RAX, RDX, RSP, SP, T0, T1, T2};
use super::asm::{Address, Asm, Jump, Place, cc};
use super::flow::NewLink;
use super::stubs::{Stubs, native, slot};
use super::{Call, Site};
use crate::mmu::USER;
use crate::op::IP_REG;

/// Where the guest's arithmetic flags are. What is said here is true of all of them at once.
#[derive(Debug, Clone, Default)]
pub(super) struct Flags {
    /// In the host's.
    pub(super) host: bool,
    /// In the vCPU's state.
    pub(super) memory: bool,
    /// They can be made again.
    pub(super) recipe: Option<Recipe>,
}

/// Host code that makes the flags of an earlier instruction again, as long as registers are what it left.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    code: Vec<u8>,
    /// Guest registers that it takes (a bit each).
    registers: u32,
}

/// Code out of the way: what happens rarely.
#[derive(Debug)]
pub(super) enum Cold {
    /// A memory access to a page that is not known.
    Miss { miss: Miss, site: u64, recipe: Option<Recipe> },
    /// A division that faults or may do so.
    Divide { jumps: [Option<Jump>; 2], call: u64, recipe: Option<Recipe>, next: usize, restore: bool },
    /// A store has hit a page with code.
    Marked { jump: Jump, site: u64, recipe: Option<Recipe> },
    /// A call's push has.
    MarkedCall { jump: Jump, site: u64, back: usize, next: i32 },
    /// There are too many frames of calls.
    TooDeep { jump: Jump, back: usize },
    /// A return that is not from the last call.
    Mismatch { jump: Jump },
    /// The XMM registers have to be loaded.
    Vectors { jump: Jump, back: usize, site: u64, recipe: Option<Recipe> },
    /// Leaves for an offset of the page.
    LeaveFor { jump: Jump, offset: i64 },
    /// Leaves by a link.
    Leave { jumps: Vec<Jump>, link: u32 },
    /// A link to another page, `pages` bytes on, is not good as things are: perhaps it can be made so. If not, it is left by.
    Elsewhere { jumps: [Jump; 2], data: u64, pages: i32, back: usize, link: u32 },
    /// A conditional jump to another page.
    Cross { jump: Jump, offset: i64, saves: bool },
}

/// What can go wrong while emitting; the instruction is left to its handler then.
pub(super) struct CannotEncode;

/// The emitter of one translation.
pub(super) struct Emitter<'a> {
    pub(super) asm: Asm,
    pub(super) stubs: &'a Stubs,
    pub(super) encoder: &'a mut Encoder,
    info: InstructionInfoFactory,
    /// The guest's code, from page offset `start` on.
    bytes: &'a [u8],
    start: u16,
    /// The TLB set of the mode.
    pub(super) set: usize,
    pub(super) flags: Flags,
    pub(super) vectors: bool,
    /// The instruction before has set IF: after this one, interrupts come in.
    pub(super) opened: bool,
    /// That is so while an instruction is emitted.
    pub(super) polls: bool,
    /// What comes after the instruction that is being emitted.
    pub(super) next_kind: Option<Kind>,
    pub(super) sites: Vec<Site>,
    pub(super) calls: Vec<Call>,
    /// Where the first of them will lie.
    pub(super) first_call: u64,
    /// There is no other vCPU.
    pub(super) alone: bool,
    /// Where code that is executed rarely will lie.
    pub(super) cold_base: u64,
    /// Where the first site will lie.
    pub(super) first_site: u64,
    pub(super) cold: Vec<Cold>,
    pub(super) links: Vec<NewLink>,
    /// Number of the first link.
    pub(super) first_link: u32,
    /// Number and address of the first link to another page.
    pub(super) first_cross: u32,
    pub(super) cross_data: u64,
    pub(super) crosses: u32,
}

/// Whether it makes a register zero (or nothing but its flags), whatever is in it.
fn zeroes(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Xor | Mnemonic::Sub)
        && (0..2).all(|n| insn.op_kind(n) == OpKind::Register)
        && insn.op0_register() == insn.op1_register()
        && insn.op0_register().size() >= 4
}

/// A general register's number, if it is one that lives in memory.
pub(super) fn at_home(register: Register) -> Option<u8> {
    let n = register.full_register().number() as u8;
    (register.is_gpr() && matches!(n, 9 | 10 | 11 | 15)).then_some(n)
}

/// `register`'s namesake of host register `n` (8–15), of the same size.
fn namesake(register: Register, n: u8) -> Register {
    let first = match register.size() {
        1 => Register::R8L,
        2 => Register::R8W,
        4 => Register::R8D,
        _ => Register::R8,
    };
    first + u32::from(n - 8)
}

impl<'a> Emitter<'a> {
    pub(super) fn new(
        stubs: &'a Stubs,
        encoder: &'a mut Encoder,
        bytes: &'a [u8],
        start: u16,
        set: usize,
        state: u32,
    ) -> Self {
        Self {
            asm: Asm { code: Vec::with_capacity(1024), state, ..Asm::default() },
            stubs,
            encoder,
            info: InstructionInfoFactory::new(),
            bytes,
            start,
            set,
            flags: Flags { host: false, memory: true, recipe: None },
            vectors: false,
            opened: false,
            polls: false,
            next_kind: None,
            sites: Vec::with_capacity(32),
            calls: Vec::new(),
            first_call: 0,
            alone: false,
            cold_base: 0,
            first_site: 0,
            cold: Vec::new(),
            links: Vec::new(),
            first_link: 0,
            first_cross: 0,
            cross_data: 0,
            crosses: 0,
        }
    }

    /// Emits all of it. `cut`: the next instruction lies on two pages.
    pub(super) fn run(&mut self, items: &[Item], cut: bool) {
        // What comes after a change of the TLB set is another translation.
        let end = items.iter().position(|i| self.changes_set(i)).map_or(items.len(), |i| i + 1);
        let items = &items[..end];
        let mut at = 0;
        while at < items.len() {
            let run = self.stack_run(&items[at..]);
            let run = if run > 0 { run } else { self.group(&items[at..]) };
            if run > 0 {
                at += run;
                continue;
            }
            let item = &items[at];
            let poll = std::mem::take(&mut self.opened);
            self.polls = poll;
            self.next_kind = items.get(at + 1).map(|i| i.kind);
            self.item(item);
            self.polls = false;
            if self.changes_set(item) {
                self.emit_cold();
                return;
            }
            if poll && !item.ends() {
                self.poll_for(i64::from(item.next()));
            }
            at += 1;
        }
        let Some(last) = items.last() else { return };
        let goes_on = !last.ends();
        if goes_on {
            self.flags_to_memory();
            self.link(i64::from(last.next()), cut, false);
        }
        self.emit_cold();
    }

    pub(super) fn item(&mut self, item: &Item) {
        // If it cannot be encoded, what was emitted of it is taken back.
        let (len, flags, vectors) = (self.asm.code.len(), self.flags.clone(), self.vectors);
        let (sites, calls) = (self.sites.len(), self.calls.len());
        let (cold, links, crosses) = (self.cold.len(), self.links.len(), self.crosses);
        let done = match item.kind {
            Kind::Nothing => Ok(()),
            Kind::Direct => self.direct(item),
            Kind::Address => self.address_of(item),
            Kind::Push => self.push(item),
            Kind::Pop => self.pop(item),
            Kind::Leave => self.leave(item),
            Kind::Divide { signed } => self.divide(item, signed),
            Kind::SetIf | Kind::ClearIf | Kind::PushFlags | Kind::SwapGs | Kind::SetAc | Kind::ClearAc => {
                self.system(item)
            }
            Kind::Handler { ends } => {
                self.handler(item, ends);
                Ok(())
            }
            _ => self.flow(item),
        };
        if done.is_err() {
            self.asm.code.truncate(len);
            (self.flags, self.vectors) = (flags, vectors);
            self.sites.truncate(sites);
            self.calls.truncate(calls);
            self.cold.truncate(cold);
            self.links.truncate(links);
            self.crosses = crosses;
            self.handler(item, item.insn.flow_control() != iced_x86::FlowControl::Next);
        }
    }

    pub(super) fn handler(&mut self, item: &Item, ends: bool) {
        self.flags_to_memory();
        let call = self.call(item, ends);
        self.asm.lea_rip(T1, call);
        self.asm.call_to(self.stubs.handler);
        self.flags = Flags { host: false, memory: true, recipe: None };
    }

    // ---- flags ----

    fn make_again(&mut self, recipe: &Recipe) {
        self.asm.bytes(&recipe.code);
    }

    /// Sees to it that the host's flags are the guest's. Only T2 is lost.
    pub(super) fn ensure_host(&mut self) {
        if self.flags.host {
            return;
        }
        match self.flags.recipe.clone() {
            Some(recipe) => self.make_again(&recipe),
            None => self.asm.restore_flags(),
        }
        self.flags.host = true;
    }

    /// Sees to it that the vCPU's state has the flags. The host's stay if they were right. T2 is lost.
    pub(super) fn flags_to_memory(&mut self) {
        if self.flags.memory {
            return;
        }
        if !self.flags.host {
            let Some(recipe) = self.flags.recipe.clone() else { return };
            self.make_again(&recipe);
            self.flags.host = true;
        }
        self.asm.save_flags();
        self.flags.memory = true;
    }

    /// To be called before code that destroys the host's flags while the guest's may be looked at. Gives what has to
    /// be done first where they are.
    pub(super) fn protect(&mut self) -> Option<Recipe> {
        if !self.flags.memory && self.flags.recipe.is_none() && self.flags.host {
            self.asm.save_flags();
            self.flags.memory = true;
        }
        self.flags.host = false;
        if self.flags.memory { None } else { self.flags.recipe.clone() }
    }

    /// To be called right before an instruction that does not fault any more: the flags it reads, and those that it
    /// leaves, must survive it.
    pub(super) fn prepare(&mut self, item: &Item) {
        let partly = item.writes != 0 && !item.sets_all();
        let lost = !self.flags.host && !self.flags.memory;
        let spoils = self.flags.recipe.as_ref().is_some_and(|r| r.registers & item.changes != 0);
        if item.reads != 0
            || (partly && item.observed_after)
            || (lost && spoils && !item.sets_all() && item.observed_after)
        {
            self.ensure_host();
        }
    }

    /// What has become of the flags after `item`, whose host code was `code`.
    pub(super) fn after(&mut self, item: &Item, recipe: Option<Recipe>) {
        if item.sets_all() {
            self.flags = Flags { host: true, memory: false, recipe };
            return;
        }
        if item.writes != 0 {
            // The others were made right before, or nobody looks.
            self.flags = Flags { host: self.flags.host, memory: false, recipe: None };
        }
        if self.flags.recipe.as_ref().is_some_and(|r| r.registers & item.changes != 0) {
            self.flags.recipe = None;
        }
    }

    // ---- instructions ----

    /// Emits the guest's instruction with its registers where they are here, and its memory operand at
    /// `[T0 + disp]`; `free` are scratch registers for those that live in memory. Gives where its code begins and ends.
    pub(super) fn encode(
        &mut self,
        item: &Item,
        free: &[u8],
        disp: i32,
    ) -> Result<(usize, usize), CannotEncode> {
        let mut insn = item.insn;
        let mut homes: [(u8, u8); 3] = [(0, 0); 3];
        let mut count = 0;
        let mut stores = 0_u32;
        let mut changed = item.memory.is_some();
        for n in 0..insn.op_count() {
            if insn.op_kind(n) != OpKind::Register {
                continue;
            }
            let register = insn.op_register(n);
            if register.is_gpr() && register.full_register() == Register::RSP {
                insn.set_op_register(n, namesake(register, SP));
                changed = true;
            }
            let Some(home) = at_home(register) else { continue };
            changed = true;
            let known = homes[..count].iter().find(|h| h.0 == home).map(|h| h.1);
            let scratch = if let Some(scratch) = known {
                scratch
            } else {
                let scratch = *free.get(count).ok_or(CannotEncode)?;
                homes[count] = (home, scratch);
                count += 1;
                scratch
            };
            insn.set_op_register(n, namesake(register, scratch));
            let access = self.info.info(&item.insn).op_access(n);
            if zeroes(&item.insn) {
                // What the register holds does not matter.
            } else if known.is_none() && (access != OpAccess::Write || register.size() < 4) {
                self.asm.load(scratch, slot(home));
            } else if known.is_some() {
                // Both a source and a destination: it has to be loaded whatever the first one said.
                self.asm.load(scratch, slot(home));
            }
            if !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess) {
                stores |= 1 << count_of(&homes[..count], home);
            }
        }
        let begin = self.asm.code.len();
        if changed {
            if item.memory.is_some() {
                insn.set_memory_base(Register::R11);
                insn.set_memory_index(Register::None);
                insn.set_memory_index_scale(1);
                insn.set_memory_displacement64(i64::from(disp) as u64);
                insn.set_memory_displ_size(match disp {
                    0 => 0,
                    -0x80..=0x7f => 1,
                    _ => 8,
                });
                insn.set_segment_prefix(Register::None);
            }
            self.encoded(&insn)?;
        } else {
            let at = usize::from(item.start() - self.start);
            let (from, to) = (at, at + usize::from(item.op.len));
            self.asm.bytes(&self.bytes[from..to]);
        }
        let end = self.asm.code.len();
        for (i, (home, scratch)) in homes[..count].iter().enumerate() {
            if stores & 1 << i != 0 {
                self.asm.store(slot(*home), *scratch);
            }
        }
        Ok((begin, end))
    }

    /// How the flags of an instruction without memory operand can be made again. `begin..end` is its code, in which a
    /// register that lives in memory is T2, if it is the only one.
    fn recipe(&self, item: &Item, begin: usize, end: usize) -> Option<Recipe> {
        use Mnemonic as M;
        let insn = &item.insn;
        if insn.op_count() != 2 || insn.op0_kind() != OpKind::Register || item.memory.is_some() {
            return None;
        }
        let (mut registers, mut home) = (0, None);
        for n in 0..2 {
            if insn.op_kind(n) == OpKind::Register {
                let r = insn.op_register(n);
                if !r.is_gpr() {
                    return None;
                }
                registers |= 1 << r.full_register().number();
                if let Some(at) = at_home(r) {
                    if home.is_some_and(|h| h != at) {
                        return None;
                    }
                    home = Some(at);
                }
            }
        }
        let code = &self.asm.code[begin..end];
        let same = insn.op1_kind() == OpKind::Register
            && insn.op0_register().full_register() == insn.op1_register().full_register();
        let code = match insn.mnemonic() {
            M::Cmp | M::Test => code.to_vec(),
            M::Add | M::Sub if !same => [inverse(code)?.as_slice(), code].concat(),
            M::And | M::Or | M::Xor => {
                let result = insn.op0_register();
                let number = result.full_register().number();
                registers = 1 << number;
                home = at_home(result);
                test(if home.is_some() { namesake(result, T2) } else { result })?
            }
            _ => return None,
        };
        let mut all = self.aside();
        if let Some(home) = home {
            all.load(T2, slot(home));
        }
        all.bytes(&code);
        Some(Recipe { code: all.code, registers })
    }

    /// The guest's instruction on memory at `[T0 + disp]`, and how its flags can be made again. T1 and T2 are lost.
    pub(super) fn access(&mut self, item: &Item, disp: i32) -> Result<Option<Recipe>, CannotEncode> {
        let Some(size) = self.compares(item) else {
            self.encode(item, &[T2, T1], disp)?;
            return Ok(None);
        };
        // What is compared is kept: so the next access need not save the flags.
        let (wide, opcode): (bool, &[u8]) = match size {
            1 => (false, &[0x0f, 0xb6]), // movzx
            2 => (false, &[0x0f, 0xb7]),
            4 => (false, &[0x8b]),
            _ => (true, &[0x8b]),
        };
        self.asm.op(wide, opcode, T2, Place::At(T0, disp));
        self.asm.store(native!(compared), T2);
        let (mut insn, mut registers) = (item.insn, 0);
        for n in 0..insn.op_count() {
            match insn.op_kind(n) {
                OpKind::Memory => {
                    let register = match size {
                        1 => Register::R9L,
                        2 => Register::R9W,
                        4 => Register::R9D,
                        _ => Register::R9,
                    };
                    insn.set_op_kind(n, OpKind::Register);
                    insn.set_op_register(n, register);
                }
                OpKind::Register => {
                    let register = insn.op_register(n);
                    registers |= 1 << register.full_register().number();
                    if register.full_register() == Register::RSP {
                        insn.set_op_register(n, namesake(register, SP));
                    }
                }
                _ => {}
            }
        }
        let begin = self.asm.code.len();
        self.encoded(&insn)?;
        let mut again = self.aside();
        again.load(T2, native!(compared));
        again.bytes(&self.asm.code[begin..]);
        Ok(Some(Recipe { code: again.code, registers }))
    }

    /// Whether `item` compares memory with a value or a register that is in one of the host's, and somebody looks at that;
    /// the operands' size.
    fn compares(&self, item: &Item) -> Option<u8> {
        let insn = &item.insn;
        let known = matches!(insn.mnemonic(), Mnemonic::Cmp | Mnemonic::Test) && item.observed_after;
        let simple = (0..insn.op_count()).all(|n| {
            let register = insn.op_register(n);
            insn.op_kind(n) != OpKind::Register
                || (at_home(register).is_none() && !crate::decode::is_high_byte(register))
        });
        item.memory.map(|m| m.size).filter(|_| known && simple)
    }

    /// For code that is kept for later.
    fn aside(&self) -> Asm {
        Asm { state: self.asm.state, ..Asm::default() }
    }

    /// Emits an instruction as it is.
    fn encoded(&mut self, insn: &Instruction) -> Result<(), CannotEncode> {
        let encoded = self.encoder.encode(insn, 0);
        let mut code = self.encoder.take_buffer();
        if encoded.is_ok() {
            self.asm.bytes(&code);
        }
        code.clear();
        self.encoder.set_buffer(code);
        encoded.map(|_| ()).map_err(|_| CannotEncode)
    }

    pub(super) fn direct(&mut self, item: &Item) -> Result<(), CannotEncode> {
        if item.vector && !self.vectors {
            self.load_vectors(item);
        }
        let Some(memory) = item.memory else {
            self.prepare(item);
            let (begin, end) = self.encode(item, &[T2, T1, T0], 0)?;
            let recipe = self.recipe(item, begin, end);
            self.after(item, recipe);
            return Ok(());
        };
        let flags = if memory.write { Site::WRITES } else { 0 };
        let site = self.site(item, memory.size.into(), memory.mask(), flags);
        let page = Self::page(&item.insn);
        let recipe = self.protect();
        self.address(&item.insn, T0);
        let miss = self.check(page, memory.size.into(), memory.mask(), memory.write);
        self.prepare(item);
        let again = self.access(item, 0)?;
        self.after(item, again);
        if memory.write {
            self.look_at_mark(item.observed_after, page, site);
        }
        self.cold.push(Cold::Miss { miss, site, recipe });
        Ok(())
    }

    pub(super) fn load_vectors(&mut self, item: &Item) {
        let recipe = self.protect();
        let site = self.site(item, 1, 0, 0);
        self.asm.compare_byte(native!(vectors_loaded), 0);
        let jump = self.asm.jump_if(cc::E);
        self.cold.push(Cold::Vectors { jump, back: self.asm.code.len(), site, recipe });
        self.vectors = true;
    }

    fn address_of(&mut self, item: &Item) -> Result<(), CannotEncode> {
        self.prepare(item);
        let (address, wide) = self.parts(&item.insn);
        let to = item.insn.op0_register();
        let n = to.full_register().number() as u8;
        let wide_result = to.size() == 8;
        let target = if at_home(to).is_some() {
            T0
        } else if n == 4 {
            SP
        } else {
            n
        };
        self.asm.lea(wide && wide_result, target, address);
        if let Some(home) = at_home(to) {
            self.asm.store(slot(home), T0);
        }
        self.after(item, None);
        Ok(())
    }

    /// A division by a register that cannot overflow; the handler does the others.
    fn divide(&mut self, item: &Item, signed: bool) -> Result<(), CannotEncode> {
        let call = self.call(item, false);
        let recipe = self.protect();
        let register = item.insn.op0_register();
        let wide = register.size() == 8;
        let divisor = self.part(register, T1).ok_or(CannotEncode)?;
        let mut jumps = [None; 2];
        if signed {
            self.asm.copy(wide, T2, RAX);
            self.asm.op(wide, &[0xc1], 7, Place::Reg(T2)); // sar
            self.asm.code.push(if wide { 63 } else { 31 });
            self.asm.op(wide, &[0x3b], T2, Place::Reg(RDX));
            jumps[0] = Some(self.asm.jump_if(cc::NE));
            self.asm.lea(wide, T2, Address { base: Some(divisor), index: None, disp: 1 });
            self.asm.group1(wide, 7, Place::Reg(T2), 1);
            jumps[1] = Some(self.asm.jump_if(cc::BE));
        } else {
            self.asm.op(wide, &[0x3b], RDX, Place::Reg(divisor));
            jumps[0] = Some(self.asm.jump_if(cc::AE));
        }
        self.asm.op(wide, &[0xf7], if signed { 7 } else { 6 }, Place::Reg(divisor));
        self.after(item, None);
        let (next, restore) = (self.asm.code.len(), self.flags.host);
        self.cold.push(Cold::Divide { jumps, call, recipe, next, restore });
        Ok(())
    }

    // ---- what happens rarely ----

    fn emit_cold(&mut self) {
        self.asm.cold = Some((self.asm.code.len(), self.cold_base));
        let mut i = 0;
        // Emitting one may add others.
        while i < self.cold.len() {
            let cold = std::mem::replace(&mut self.cold[i], Cold::Leave { jumps: Vec::new(), link: 0 });
            self.emit_one(cold);
            i += 1;
        }
    }

    pub(super) fn flags_of(&mut self, recipe: Option<Recipe>) {
        if let Some(recipe) = recipe {
            self.make_again(&recipe);
            self.asm.save_flags();
        }
    }

    fn emit_one(&mut self, cold: Cold) {
        match cold {
            Cold::Miss { miss, site, recipe } => self.miss(miss, site, recipe),
            Cold::Divide { jumps, call, recipe, next, restore } => {
                jumps.into_iter().flatten().for_each(|j| self.asm.land(j));
                self.flags_of(recipe);
                self.asm.lea_rip(T1, call);
                self.asm.call_to(self.stubs.handler);
                self.back(next, restore);
            }
            Cold::Marked { jump, site, recipe } => {
                self.asm.land(jump);
                self.flags_of(recipe);
                self.asm.lea_rip(T0, site);
                self.asm.call_to(self.stubs.marked);
            }
            Cold::MarkedCall { jump, site, back, next } => {
                self.asm.land(jump);
                self.asm.lea_rip(T0, site);
                self.asm.call_to(self.stubs.marked);
                self.asm.load(T2, slot(IP_REG));
                self.asm.lea_plus(T2, T2, next);
                self.back(back, false);
            }
            Cold::TooDeep { jump, back } => {
                self.asm.land(jump);
                self.asm.load(RSP, native!(stack_bottom));
                self.back(back, false);
            }
            Cold::Mismatch { jump } => {
                self.asm.land(jump);
                self.asm.op(true, &[0x3b], RSP, native!(stack_bottom));
                self.asm.jump_if_to(cc::E, self.stubs.look_up);
                self.asm.lea_plus(RSP, RSP, 16);
                self.asm.jump_to(self.stubs.look_up);
            }
            Cold::Vectors { jump, back, site, recipe } => {
                self.asm.land(jump);
                self.flags_of(recipe);
                self.asm.lea_rip(T1, site);
                self.asm.call_to(self.stubs.vectors);
                let jump = self.asm.jump();
                self.asm.land_at(jump, back);
            }
            Cold::LeaveFor { jump, offset } => {
                self.asm.land(jump);
                self.asm.load(T0, slot(IP_REG));
                self.asm.lea_plus(T0, T0, offset as i32);
                self.asm.jump_to(self.stubs.exit_to);
            }
            Cold::Leave { jumps, link } => {
                if jumps.is_empty() {
                    return;
                }
                jumps.into_iter().for_each(|j| self.asm.land(j));
                self.asm.set(T1, u64::from(link));
                self.asm.jump_to(self.stubs.exit);
            }
            Cold::Elsewhere { jumps, data, pages, back, link } => {
                jumps.into_iter().for_each(|j| self.asm.land(j));
                self.asm.lea_rip(T2, data);
                self.asm.set(T1, i64::from(pages) as u64);
                self.asm.call_to(self.stubs.same_code[usize::from(self.set == USER)]);
                self.back(back, false);
                self.asm.set(T1, u64::from(link));
                self.asm.jump_to(self.stubs.exit);
            }
            Cold::Cross { jump, offset, saves } => {
                self.asm.land(jump);
                if saves {
                    self.asm.save_flags();
                }
                self.cross_link(offset, false);
            }
        }
    }

    pub(super) fn back(&mut self, next: usize, restore: bool) {
        if restore {
            self.asm.restore_flags();
        }
        let jump = self.asm.jump();
        self.asm.land_at(jump, next);
    }
}

fn count_of(homes: &[(u8, u8)], home: u8) -> usize {
    homes.iter().position(|h| h.0 == home).unwrap_or(0)
}

/// `add` for `sub` and the other way round, with the same operands.
fn inverse(code: &[u8]) -> Option<Vec<u8>> {
    let mut code = code.to_vec();
    let opcode = code
        .iter()
        .position(|b| !matches!(b, 0x66 | 0x40..=0x4f | 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65))?;
    match code[opcode] {
        0x00..=0x05 | 0x28..=0x2d => code[opcode] ^= 0x28,
        0x80 | 0x81 | 0x83 => code[opcode + 1] ^= 5 << 3,
        _ => return None,
    }
    Some(code)
}

/// `test register, register`.
fn test(register: Register) -> Option<Vec<u8>> {
    let mut n = register.full_register().number() as u8;
    if crate::decode::is_high_byte(register) {
        return None;
    }
    if n == 4 {
        n = SP;
    }
    let mut code = Vec::with_capacity(4);
    let size = register.size();
    if size == 2 {
        code.push(0x66);
    }
    let rex = 0x40 | u8::from(size == 8) << 3 | (n >> 3) << 2 | n >> 3;
    if rex != 0x40 || (size == 1 && n >= 4) {
        code.push(rex);
    }
    code.push(if size == 1 { 0x84 } else { 0x85 });
    code.push(0xc0 | (n & 7) << 3 | n & 7);
    Some(code)
}
