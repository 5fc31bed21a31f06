//! Accesses near each other: off the same registers, with one check for all of them.
//!
//! Structures, stack frames, unrolled loops: `[rbx+8]`, `[rbx+10h]`, `[rbx+18h]`. The first access checks the whole range
//! and leaves its host address in T0, which the others use. Where the range is not on one page that may be accessed (and,
//! for stores, holds no code), the interpreter goes on.

use iced_x86::{Instruction, Register};

use super::Site;
use super::analyse::{Item, Kind};
use super::asm::host::T0;
use super::emit::{Cold, Emitter, at_home};

/// Instructions looked at for a group.
const MOST: usize = 24;
/// Bytes from the first to the last byte of a group.
const RANGE: i64 = 1024;

/// What addresses in a group have in common.
#[derive(PartialEq, Eq)]
struct Base {
    base: Register,
    index: Register,
    scale: u32,
    segment: Option<Register>,
}

impl Base {
    fn of(insn: &Instruction) -> Option<Self> {
        let base = insn.memory_base();
        let wide = |r: Register| matches!(r, Register::None | Register::RIP) || (r.is_gpr64());
        let known = wide(base) && wide(insn.memory_index());
        let prefixed = matches!(insn.memory_segment(), Register::FS | Register::GS);
        known.then(|| Self {
            base,
            index: insn.memory_index(),
            scale: insn.memory_index_scale(),
            segment: prefixed.then(|| insn.memory_segment()),
        })
    }

    /// General registers in it (a bit each).
    fn registers(&self) -> u32 {
        let bit = |r: Register| if r.is_gpr() { 1 << r.number() } else { 0 };
        bit(self.base) | bit(self.index)
    }
}

/// A group, as it grows.
struct Group {
    count: usize,
    accesses: u32,
    low: i64,
    high: i64,
    mask: u8,
    write: bool,
    vectors: bool,
}

impl Group {
    /// With an access of `item`, unless that does not fit.
    fn with(&self, item: &Item, disp: i64) -> Option<Self> {
        let memory = item.memory?;
        let (low, high) = (self.low.min(disp), self.high.max(disp + i64::from(memory.size)));
        let mask = self.mask | memory.mask();
        // Only the lowest address is looked at for its alignment.
        let aligned = |at: i64| at & i64::from(mask) == 0;
        let fits = high - low <= RANGE
            && (!item.insn.is_ip_rel_memory_operand() || low >> 12 == (high - 1) >> 12)
            && (mask == 0 || (aligned(disp - low) && aligned(self.low - low)));
        fits.then_some(Self {
            count: self.count,
            accesses: self.accesses + 1,
            low,
            high,
            mask,
            write: self.write || memory.write,
            vectors: self.vectors || item.vector,
        })
    }
}

fn displacement(insn: &Instruction) -> i64 {
    insn.memory_displacement64() as i64
}

/// Whether `item`, which accesses no memory, leaves T0 alone.
fn spares(item: &Item) -> bool {
    let homes = (0..item.insn.op_count()).filter(|&n| at_home(item.insn.op_register(n)).is_some()).count();
    match item.kind {
        Kind::Nothing => true,
        Kind::Direct => homes <= 2,
        _ => false,
    }
}

impl Emitter<'_> {
    /// Emits the group that `items` begin with, if there is one; how many they are.
    pub(super) fn group(&mut self, items: &[Item]) -> usize {
        if self.opened || items[0].kind != Kind::Direct || items[0].memory.is_none() {
            return 0;
        }
        let Some(base) = Base::of(&items[0].insn) else { return 0 };
        let group = Self::grow(items, &base);
        if group.accesses < 2 {
            return 0;
        }
        let items = &items[..group.count];
        // If one of them cannot be encoded, none is.
        let (len, flags, vectors) = (self.asm.code.len(), self.flags.clone(), self.vectors);
        let (sites, cold) = (self.sites.len(), self.cold.len());
        if self.emit_group(items, &group).is_none() {
            self.asm.code.truncate(len);
            (self.flags, self.vectors) = (flags, vectors);
            self.sites.truncate(sites);
            self.cold.truncate(cold);
            return 0;
        }
        items.len()
    }

    fn grow(items: &[Item], base: &Base) -> Group {
        let first = displacement(&items[0].insn);
        let none =
            Group { count: 0, accesses: 0, low: first, high: first, mask: 0, write: false, vectors: false };
        let mut group = none;
        for (i, item) in items.iter().take(MOST).enumerate() {
            if item.kind == Kind::Direct && item.memory.is_some() {
                if Base::of(&item.insn).as_ref() != Some(base) {
                    break;
                }
                let Some(more) = group.with(item, displacement(&item.insn)) else { break };
                group = Group { count: i + 1, ..more };
            } else if !spares(item) {
                break;
            }
            if item.changes & base.registers() != 0 {
                break;
            }
        }
        group
    }

    fn emit_group(&mut self, items: &[Item], group: &Group) -> Option<()> {
        if group.vectors && !self.vectors {
            self.load_vectors(&items[0]);
        }
        let bytes = (group.high - group.low) as u32;
        let flags = if group.write { Site::WRITES } else { 0 };
        let site = self.site(&items[0], bytes, group.mask, flags | Site::SEVERAL);
        let page = Self::page(&items[0].insn);
        let recipe = self.protect();
        let mut lowest = items[0].insn;
        lowest.set_memory_displacement64(group.low as u64);
        self.address(&lowest, T0);
        let miss = self.check(page, bytes, group.mask, group.write);
        for item in items {
            if item.memory.is_none() {
                if item.kind == Kind::Direct {
                    self.direct(item).ok()?;
                }
                continue;
            }
            self.prepare(item);
            let disp = (displacement(&item.insn) - group.low) as i32;
            let again = self.access(item, disp).ok()?;
            self.after(item, again);
        }
        let last = &items[items.len() - 1];
        if group.write {
            let end = self.site(last, bytes, 0, flags);
            self.look_at_mark(last.observed_after, page, end);
        }
        self.cold.push(Cold::Miss { miss, site, recipe });
        Some(())
    }
}
