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
pub(crate) const HOT: u32 = 64;
/// Where the TLB set is in [`Native::jump_key`], above the mode's key ([`crate::decode::Mode::key`], 14 bits).
const SET_SHIFT: u32 = 14;
/// No link.
pub(crate) const NO_LINK: u32 = 0;

/// What translated code keeps in the vCPU beside the architecture's state.
pub(crate) struct Native {
    /// The vCPU itself: what GS points to.
    pub(crate) cpu: *mut crate::cpu::Cpu,
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
    /// `vcpus`; `avx`: the model has AVX.
    pub(crate) fn new(
        [attention, pending]: [*const AtomicBool; 2],
        translate: bool,
        vcpus: usize,
        avx: bool,
    ) -> Self {
        Self {
            cpu: std::ptr::null_mut(),
            attention,
            pending,
            jump_key: 0,
            vectors_loaded: false,
            vectors_were_loaded: false,
            interpret: false,
            target: 0,
            stack: 0,
            stack_bottom: 0,
            stack_limit: 0,
            link: NO_LINK,
            jumps: [JumpEntry::NONE; JUMP_ENTRIES],
            changes: 0,
            translator: if translate { Translator::new(vcpus, avx) } else { None },
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
    _pad: u64,
}

impl JumpEntry {
    pub(crate) const NONE: Self = Self { linear: 0, key: 0, target: 0, _pad: 0 };
}

/// An instruction of a translation from which Rust may be called, in the data beside the code.
#[derive(Debug, Clone)]
#[repr(C)]
struct Site {
    op: Op,
    /// Of its memory access: the last offset in a page at which that fits on it.
    limit: u16,
    /// Bits that must be 0 in the address.
    mask: u8,
    size: u8,
    write: bool,
    /// It may go elsewhere: after its handler the translation is left.
    flow: bool,
}

/// Before the pages that a translation remembers ([`crate::mmu::Remembered`]).
#[derive(Debug, Clone)]
#[repr(C)]
struct Header {
    /// The epoch ([`crate::mmu::Tlb::data_epochs`]) in which they are right.
    epoch: u64,
    /// How many follow.
    pages: u64,
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
}

/// Translations of one vCPU.
pub(crate) struct Translator {
    memory: CodeMemory,
    stubs: Stubs,
    /// There is no other vCPU.
    alone: bool,
    links: Vec<Link>,
    cross_links: u32,
    encoder: iced_x86::Encoder,
}

impl Translator {
    /// `None` where the host gives no executable memory.
    pub(crate) fn new(vcpus: usize, avx: bool) -> Option<Box<Self>> {
        let mut memory = CodeMemory::new(vcpus)
            .inspect_err(|e| {
                tracing::warn!("no memory for translated code ({e}): the interpreter runs all of it");
            })
            .ok()?;
        let stubs = Stubs::emit(&mut memory, avx);
        memory.keep();
        let links = vec![Link { at: 0, offset: 0, cross: None }];
        Some(Box::new(Self {
            memory,
            stubs,
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
