//! Blocks: decoded instructions up to the next jump, kept by where they lie in physical memory.
//!
//! A block is found in two steps: by linear address in a small direct-mapped table, where an entry counts
//! only while the TLB has the same physical page there, or else by physical address in a map. It is valid
//! while the marks of its pages are what they were when it was decoded ([`terem_memory::PageMarks`]).

use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::cpu::Cpu;
use crate::decode::decode;
use crate::fault::{Exec, Fault};
use crate::mmu::{Access, PAGE_MASK};
use crate::op::Op;

/// Instructions in a block, at most.
const BLOCK_OPS: usize = 48;
/// Bytes looked at for a block.
const BLOCK_BYTES: usize = 256;
/// The longest instruction.
const MAX_LEN: usize = 15;
/// Decoded instructions kept by one vCPU (about 7 MiB); more, and those of blocks that have run least are dropped.
const MAX_OPS: usize = 140_000;
/// Entries of the table by linear address.
const LINEAR_ENTRIES: usize = 16384;

/// In a block's key: one instruction only, for pages with breakpoints.
const STEPPED: u32 = 1 << 31;

/// A run of decoded instructions.
pub(crate) struct Block {
    /// None once it is translated; [`Cpu::decode_again`] brings them back.
    ops: Cell<Box<[Op]>>,
    /// Bytes.
    pub(crate) len: u16,
    /// The page(s) that it was decoded from, and their marks then.
    pages: [(u64, u32); 2],
    /// How often it was interpreted.
    pub(crate) runs: Cell<u32>,
    /// Where its translation for each TLB set is; 0: nowhere yet, all ones: it has none.
    pub(crate) code: [Cell<u64>; 3],
}

impl Block {
    /// The instructions.
    pub(crate) fn ops(&self) -> &[Op] {
        // SAFETY: they are replaced only by the vCPU's thread between two executions, when nobody holds what this gave.
        unsafe { &*self.ops.as_ptr() }
    }

    fn is_translated(&self) -> bool {
        self.code.iter().any(|c| !matches!(c.get(), 0 | u64::MAX))
    }

    /// The physical page that it begins on, and the mark under which its code is valid.
    pub(crate) fn page(&self) -> (u64, u32) {
        self.pages[0]
    }

    /// Whether it goes on to another page.
    pub(crate) fn straddles(&self) -> bool {
        self.pages[0].0 != self.pages[1].0
    }
}

#[derive(Clone, Copy)]
struct ByLinear {
    linear: u64,
    physical: u64,
    mode: u32,
    block: *const Block,
}

const NO_BLOCK: ByLinear =
    ByLinear { linear: u64::MAX, physical: u64::MAX, mode: u32::MAX, block: std::ptr::null() };

/// Hashes a physical address and a mode by multiplication.
#[derive(Default)]
pub(crate) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }

    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64(u64::from(*b));
        }
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0.rotate_left(5) ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_u32(&mut self, n: u32) {
        self.write_u64(u64::from(n));
    }
}

/// The blocks of one vCPU.
pub(crate) struct BlockCache {
    by_linear: Box<[ByLinear]>,
    /// Boxed, since `by_linear` points to them.
    #[allow(clippy::vec_box, reason = "the addresses must stay")]
    by_physical: HashMap<(u64, u32), Box<Block>, BuildHasherDefault<KeyHasher>>,
    ops: usize,
    /// All blocks are to be dropped.
    stale: bool,
    /// A block of code outside RAM, which is not kept.
    passing: Option<Box<Block>>,
}

impl BlockCache {
    pub(crate) fn new() -> Self {
        Self {
            by_linear: vec![NO_BLOCK; LINEAR_ENTRIES].into_boxed_slice(),
            by_physical: HashMap::default(),
            ops: 0,
            stale: false,
            passing: None,
        }
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        self.by_linear.fill(NO_BLOCK);
        self.by_physical.clear();
        self.ops = 0;
    }

    /// Drops the instructions of a block that has been translated.
    pub(crate) fn translated(&mut self, block: &Block) {
        self.ops -= block.ops.take().len();
    }

    /// Makes room: drops blocks that have run least. Most code of a boot runs once or twice; what has run more often stays,
    /// and goes on counting.
    fn make_room(&mut self) {
        self.by_linear.fill(NO_BLOCK);
        let mut least = 2;
        loop {
            self.by_physical.retain(|_, block| block.is_translated() || block.runs.get() >= least);
            self.ops = self.by_physical.values().map(|b| b.ops().len()).sum();
            if self.ops <= MAX_OPS / 2 {
                break;
            }
            least *= 2;
        }
    }

    /// Forgets at which linear addresses blocks are.
    pub(crate) fn forget_places(&mut self) {
        self.by_linear.fill(NO_BLOCK);
    }

    /// Forgets where translations are. The blocks themselves go as soon as none of them is in use.
    pub(crate) fn drop_translations(&mut self) {
        for block in self.by_physical.values() {
            block.runs.set(0);
            block.code.iter().filter(|c| c.get() != u64::MAX).for_each(|c| c.set(0));
        }
        self.stale = true;
    }

    /// Drops everything if that was put off. For between two blocks.
    #[inline]
    pub(crate) fn tidy(&mut self) {
        if std::mem::take(&mut self.stale) {
            self.clear();
        }
    }
}

impl Cpu {
    /// The bytes from page offset `start` of the block's page on, to the page's end or, if the block goes on to another,
    /// that one's first; how many. `None` if they are no longer what the block was decoded from.
    pub(crate) fn bytes_of(&self, block: &Block, start: u16, to: &mut [u8; 0x1000 + 16]) -> Option<usize> {
        let [(page, _), (second, _)] = block.pages;
        self.ram(page << 12)?;
        let mut len = 0x1000 - usize::from(start);
        self.fetch(page << 12 | u64::from(start), &mut to[..len]);
        if block.straddles() {
            self.fetch(second << 12, &mut to[len..len + MAX_LEN]);
            len += MAX_LEN;
        }
        self.fresh(block).then_some(len)
    }

    /// The bytes of an instruction of `block` at the linear address `linear`; false where they are not in RAM.
    pub(crate) fn bytes_of_op(&self, block: &Block, op: &Op, linear: u64, to: &mut [u8; MAX_LEN]) -> bool {
        let [(page, _), (second, _)] = block.pages;
        let (start, len) = ((linear & !PAGE_MASK) as usize, usize::from(op.len));
        let on_page = len.min(0x1000 - start);
        let (a, b) = to[..len].split_at_mut(on_page);
        let in_ram = self.ram(page << 12).is_some() && self.ram(second << 12).is_some();
        if in_ram {
            self.fetch(page << 12 | start as u64, a);
            self.fetch(second << 12, b);
        }
        in_ram
    }

    /// The block at CS:RIP.
    ///
    /// # Errors
    /// What fetching from there gives.
    #[inline]
    pub(crate) fn find_block(&mut self) -> Exec<*const Block> {
        let linear = self.segment_base[terem_cpu::VcpuState::CS].wrapping_add(self.rip);
        let at = (linear ^ linear >> 13) as usize % LINEAR_ENTRIES;
        // SAFETY: the index is in range.
        let found = unsafe { self.blocks.by_linear.get_unchecked(at) };
        if found.linear == linear && found.mode == self.mode_key {
            // Only what the TLB lets be fetched there, and from the same place.
            let addend = self.tlb.code(linear);
            if addend.is_some_and(|a| linear.wrapping_add(a).wrapping_sub(self.window) == found.physical) {
                // SAFETY: entries point into `by_physical`'s boxes, which are only dropped by `clear`, with the
                // table.
                let block = unsafe { &*found.block };
                if self.fresh(block) {
                    return Ok(found.block);
                }
            }
        }
        self.find_block_slow(linear)
    }

    /// Whether the bytes that the block was decoded from are still there.
    #[inline(always)]
    fn fresh(&self, block: &Block) -> bool {
        block.pages.iter().all(|&(page, word)| {
            // SAFETY: pages of blocks are pages of RAM, below the number of marks.
            word == unsafe { (*self.marks.add(page as usize)).load(std::sync::atomic::Ordering::Acquire) }
        })
    }

    #[inline(never)]
    fn find_block_slow(&mut self, linear: u64) -> Exec<*const Block> {
        let linear = self.wrap(linear);
        let stepped = self.watches.execute_on(linear);
        if stepped {
            self.check_breakpoints(linear)?;
        }
        self.fetch_allowed(linear)?;
        let physical = self.translate(linear, Access::Execute)?;
        let key = (physical, self.mode_key | if stepped { STEPPED } else { 0 });
        if let Some(known) = self.blocks.by_physical.get(&key)
            && self.fresh(known)
        {
            // A block that goes on to the next page is only right while that page is where it was.
            let second = known.pages[1].0;
            if second == known.pages[0].0
                || self.translate(self.wrap((linear & PAGE_MASK).wrapping_add(0x1000)), Access::Execute)?
                    >> 12
                    == second
            {
                let block = std::ptr::from_ref(block_of(&self.blocks, &key));
                self.remember(linear, physical, block, stepped || second != physical >> 12);
                return Ok(block);
            }
        }
        let block = self.decode_block(linear, physical, stepped)?;
        if self.ram(physical).is_none() {
            return Ok(&raw const **self.blocks.passing.insert(Box::new(block)));
        }
        if self.blocks.ops + block.ops().len() > MAX_OPS {
            self.blocks.make_room();
        }
        self.blocks.ops += block.ops().len();
        let passing = stepped || block.pages[0].0 != block.pages[1].0;
        // A block that is no longer right is replaced in its place: the table by linear address points there.
        match self.blocks.by_physical.get_mut(&key) {
            Some(old) => {
                self.blocks.ops -= old.ops().len();
                **old = block;
            }
            None => {
                self.blocks.by_physical.insert(key, Box::new(block));
            }
        }
        let block = std::ptr::from_ref(block_of(&self.blocks, &key));
        self.remember(linear, physical, block, passing);
        Ok(block)
    }

    fn remember(&mut self, linear: u64, physical: u64, block: *const Block, passing: bool) {
        // A second page's mapping, and breakpoints, are looked at each time: such blocks are not found by linear
        // address.
        if !passing {
            let at = (linear ^ linear >> 13) as usize % LINEAR_ENTRIES;
            self.blocks.by_linear[at] = ByLinear { linear, physical, mode: self.mode_key, block };
        }
    }

    /// Whether CS lets RIP be there at all.
    fn fetch_allowed(&self, linear: u64) -> Exec {
        if self.code64() {
            let canonical = (linear as i64) << 16 >> 16 == linear as i64;
            return if canonical { Ok(()) } else { Err(Fault::GP0) };
        }
        if self.rip > u64::from(self.segments[terem_cpu::VcpuState::CS].limit) {
            return Err(Fault::GP0);
        }
        Ok(())
    }

    fn decode_block(&mut self, linear: u64, physical: u64, stepped: bool) -> Exec<Block> {
        self.stats.blocks_decoded.add(1);
        let (mut bytes, mut have) = ([0; BLOCK_BYTES + MAX_LEN], 0);
        let on_page = (0x1000 - (physical as usize & 0xfff)).min(BLOCK_BYTES);
        let page = physical >> 12;
        let mut pages = [(page, 0); 2];
        let in_ram = self.ram(physical).is_some();
        if in_ram {
            pages = [(page, self.mark_code(page)); 2];
            self.fetch(physical, &mut bytes[..on_page]);
            have += on_page;
        } else {
            self.mmio_read(physical, &mut bytes[..on_page.min(16)]);
            have += on_page.min(16);
        }
        let mut ops: Vec<Op> = Vec::with_capacity(16);
        let mut offset = 0_usize;
        while ops.len() < BLOCK_OPS {
            let decoded = decode(&bytes[offset..have], offset as u16, self.mode, &self.instruction_set);
            let Some((op, last)) = decoded else {
                let whole_page = have == 0x1000 - (physical as usize & 0xfff);
                if !ops.is_empty() || !in_ram || !whole_page || have > on_page {
                    if ops.is_empty() {
                        return Err(if in_ram { Fault::GP0 } else { Fault::UD }); // longer than 15 bytes
                    }
                    break;
                }
                // The first instruction goes on to the next page.
                let next = self.wrap((linear & PAGE_MASK).wrapping_add(0x1000));
                let second = self.translate(next, Access::Execute)?;
                if self.ram(second).is_none() {
                    return Err(Fault::UD);
                }
                pages[1] = (second >> 12, self.mark_code(second >> 12));
                self.fetch(second, &mut bytes[have..have + MAX_LEN]);
                have += MAX_LEN;
                continue;
            };
            offset += usize::from(op.len);
            ops.push(op);
            if last || self.mode.single || stepped || pages[0].0 != pages[1].0 {
                break;
            }
        }
        Ok(Block {
            len: offset as u16,
            ops: Cell::new(ops.into_boxed_slice()),
            pages,
            runs: Cell::new(0),
            // A translation would go on beyond the one instruction.
            code: [const { Cell::new(0) }; 3].map(|c| if stepped { Cell::new(u64::MAX) } else { c }),
        })
    }

    /// Decodes the instructions of a block at [`Cpu::rip`] again that were dropped when it was translated.
    ///
    /// # Errors
    /// What fetching from there gives.
    pub(crate) fn decode_again(&mut self, block: &Block) -> Exec {
        let linear = self.segment_base[terem_cpu::VcpuState::CS].wrapping_add(self.rip);
        let new = self.decode_block(linear, block.pages[0].0 << 12 | linear & !PAGE_MASK, false)?;
        self.blocks.ops += new.ops().len();
        block.ops.set(new.ops.take());
        Ok(())
    }

    /// Marks a page as holding decoded code, visibly to all vCPUs, before its bytes are read.
    fn mark_code(&mut self, page: u64) -> u32 {
        let marks = self.memory.marks();
        let before = marks.word(page);
        let word = marks.mark_code(page);
        if before & terem_memory::CODE == 0 {
            crate::membarrier::all_threads();
            self.tlb.holds_code(self.window + (page << 12));
        }
        // Also where another vCPU has marked it: it may still be about to.
        self.keep_from_direct_writing(page);
        word
    }

    fn fetch(&self, physical: u64, to: &mut [u8]) {
        use terem_memory::vm_memory::{Bytes, GuestAddress};
        // The range is on a page of RAM, so it can be read.
        let read = self.memory.read_slice(to, GuestAddress(physical));
        debug_assert!(read.is_ok());
    }
}

/// The block of a key that is known to be there.
fn block_of<'a>(blocks: &'a BlockCache, key: &(u64, u32)) -> &'a Block {
    &blocks.by_physical[key]
}
