//! The translator: guest code into host code, kept beside the interpreter's blocks.
//!
//! `docs/translator.md` says how it works, with an example. The files:
//!
//! ```text
//!   analyse.rs  which instructions go out as they are, whose flags are looked at
//!   emit.rs     one translation: instructions and flags;   access.rs  memory accesses
//!   group.rs    accesses near each other;   stack.rs  pushes and pops;   system.rs  what kernels do all the time
//!   flow.rs     jumps, calls, returns, and the links between translations
//!   stubs.rs    entry and exit, calls into Rust, from translated code
//!   runtime.rs  what they call, and the loop that goes from translation to translation
//!   asm.rs      host instructions;   cache.rs  memory for code
//! ```

mod access;
mod analyse;
mod asm;
mod cache;
mod emit;
mod flow;
mod group;
mod runtime;
mod stack;
mod stubs;
mod system;

use std::sync::atomic::AtomicBool;

use cache::CodeMemory;
use stubs::Stubs;

pub(crate) use flow::JUMP_ENTRIES;

use crate::op::Op;

/// Blocks are translated when they have been interpreted this often.
pub(crate) const HOT: u32 = 24;
/// Where the TLB set is in [`Native::jump_key`], above the mode's key ([`crate::decode::Mode::key`], 14 bits).
const SET_SHIFT: u32 = 14;
/// No link.
pub(crate) const NO_LINK: u32 = 0;

/// What translated code keeps in the vCPU beside the architecture's state.
pub(crate) struct Native {
    /// Whether somebody wants something of the vCPU ([`crate::apic::Apic`]).
    pub(crate) attention: *const AtomicBool,
    /// Whether an interrupt may be waiting.
    pub(crate) pending: *const AtomicBool,
    /// Epoch and mode: what jumps are remembered under.
    pub(crate) jump_key: u64,
    /// Guest XMM registers are in the host's.
    pub(crate) vectors_loaded: bool,
    /// They were, when Rust code was called.
    pub(crate) vectors_were_loaded: bool,
    /// The next block is the interpreter's.
    pub(crate) interpret: bool,
    /// A place for a call's target.
    pub(crate) target: u64,
    /// What was last compared with a register or a value.
    pub(crate) compared: u64,
    /// Host RSP as the entry stub left it: what lies below are the frames of calls.
    pub(crate) stack: u64,
    /// The first of them, where nobody has called.
    pub(crate) stack_bottom: u64,
    /// Where there are too many.
    pub(crate) stack_limit: u64,
    /// The link that the last translation was left by.
    pub(crate) link: u32,
    /// Targets of indirect jumps.
    pub(crate) jumps: [JumpEntry; JUMP_ENTRIES],
    /// How often code had been written over when the epochs began.
    pub(crate) changes: u64,
    pub(crate) translator: Option<Box<Translator>>,
}

impl Native {
    /// For a vCPU with these words ([`crate::apic::Apic::words`]); `translate`: with a translator, one of
    /// `vcpus`; `avx`: the model has AVX; `low`: where the vCPU will lie, if that is low.
    pub(crate) fn new(
        [attention, pending]: [*const AtomicBool; 2],
        translate: bool,
        vcpus: usize,
        avx: bool,
        low: Option<u32>,
    ) -> Self {
        Self {
            attention,
            pending,
            jump_key: 0,
            vectors_loaded: false,
            vectors_were_loaded: false,
            interpret: false,
            target: 0,
            compared: 0,
            stack: 0,
            stack_bottom: 0,
            stack_limit: 0,
            link: NO_LINK,
            jumps: [JumpEntry::NONE; JUMP_ENTRIES],
            changes: 0,
            translator: translate.then(|| Translator::new(vcpus, avx, low)).flatten(),
        }
    }
}

/// A target of indirect jumps.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct JumpEntry {
    linear: u64,
    key: u64,
    target: u64,
    /// Which code that is ([`crate::mmu::Place::code`]).
    code: u64,
}

impl JumpEntry {
    pub(crate) const NONE: Self = Self { linear: 0, key: 0, target: 0, code: crate::mmu::NOWHERE };
}

/// An access to memory in a translation, in the data beside the code: of one instruction, or of several to one page.
#[derive(Debug, Clone)]
#[repr(C)]
struct Site {
    /// Page offset of the (last) instruction's end.
    next: u16,
    /// The last offset in a page at which the access fits on it.
    limit: u16,
    /// Bytes of the (last) instruction.
    len: u8,
    /// Bits that must be 0 in the address.
    mask: u8,
    /// [`Self::WRITES`] and those after it.
    flags: u8,
    _pad: u8,
}

impl Site {
    /// The page is written.
    const WRITES: u8 = 1;
    /// The lowest address may be another than the first one that is accessed.
    const SEVERAL: u8 = 2;
    /// Interrupts come in after the instruction, not before it.
    const SHADOW: u8 = 4;
    /// What comes after it is elsewhere.
    const FLOW: u8 = 8;
}

/// An instruction of a translation that its handler executes, in the data beside the code.
#[derive(Debug, Clone)]
#[repr(C)]
struct Call {
    op: Op,
    /// It may go elsewhere: after its handler the translation is left.
    flow: bool,
}

/// A direct jump between translations.
#[derive(Debug, Clone, Copy)]
struct Link {
    /// Where the jump's distance is.
    at: u64,
    /// The target, from the source page's first byte.
    offset: i32,
    /// It leaves the page: the index of its [`CrossLink`].
    cross: Option<u32>,
}

/// What a jump to another page is good for, in the data beside the code.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct CrossLink {
    /// Linear address of the source page.
    page: u64,
    /// [`Native::jump_key`] then.
    key: u64,
    /// Which code it leads to ([`crate::mmu::Place::code`]): where that lies at the target, `page` and `key` are made right
    /// again without further ado.
    code: u64,
}

impl CrossLink {
    /// The page is none that is ever executed.
    const NONE: Self = Self { page: u64::MAX, key: 0, code: crate::mmu::NOWHERE };
}

/// Translations of one vCPU.
pub(crate) struct Translator {
    memory: CodeMemory,
    stubs: Stubs,
    /// Where the vCPU lies.
    state: u32,
    /// There is no other vCPU.
    alone: bool,
    links: Vec<Link>,
    cross_links: u32,
    encoder: iced_x86::Encoder,
}

impl Translator {
    /// `None` where the host gives no executable memory, or none at low addresses.
    pub(crate) fn new(vcpus: usize, avx: bool, low: Option<u32>) -> Option<Box<Self>> {
        let Some(state) = low else {
            tracing::warn!("no memory below 2 GiB for the vCPU: the interpreter runs all code");
            return None;
        };
        let mut memory = CodeMemory::new(vcpus)
            .inspect_err(|e| {
                tracing::warn!("no memory for translated code ({e}): the interpreter runs all of it");
            })
            .ok()?;
        let stubs = Stubs::emit(&mut memory, avx, state);
        memory.keep();
        let links = vec![Link { at: 0, offset: 0, cross: None }];
        Some(Box::new(Self {
            memory,
            stubs,
            state,
            alone: vcpus == 1,
            links,
            cross_links: 0,
            encoder: iced_x86::Encoder::new(64),
        }))
    }

    /// Drops all translations.
    fn clear(&mut self) {
        self.memory.clear();
        self.links.truncate(1);
        self.cross_links = 0;
    }
}
