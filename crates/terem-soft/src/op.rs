//! A decoded instruction.

use crate::cpu::Cpu;
use crate::fault::Exec;

/// Executes one decoded instruction. On `Err` nothing architectural may have changed (precise faults),
/// except where the manual says otherwise (a `rep` string instruction keeps its finished iterations).
pub type Handler = fn(&mut Cpu, &Op) -> Exec;

/// A decoded instruction: the handler, and its operands by fixed roles.
///
/// Registers are indices into [`Cpu::gpr`] (0–15), `Cpu::xmm` or whatever the handler takes them for.
/// A memory operand is `segment:[base + (index << shift) + disp]`; without base or index these are
/// [`NO_REG`], whose slot always holds zero; a RIP-relative one has base [`IP_REG`], whose slot holds the
/// block's first linear-less RIP, and a displacement that counts from there.
#[derive(Debug, Clone, Copy)]
pub struct Op {
    /// What to call.
    pub run: Handler,
    /// Immediate operand, sign-extended to 64 bits as the instruction says; for near branches the target
    /// relative to the block's start; handlers may use it as they like.
    pub imm: u64,
    /// Displacement of the memory operand.
    pub disp: u64,
    /// Base register's slot.
    pub base: u8,
    /// Index register's slot.
    pub index: u8,
    /// Left shift of the index (0–3).
    pub shift: u8,
    /// The memory operand's segment: ES … GS (0–5), or [`FLAT`].
    pub segment: u8,
    /// First register operand (the one that the ModRM `reg` field names, or what the handler wants).
    pub reg: u8,
    /// Second register operand (ModRM `rm` when it is a register).
    pub rm: u8,
    /// Length of the instruction in bytes.
    pub len: u8,
    /// [`ADDR32`], [`ADDR16`], [`CHECKED`] and bits of the handler's own above [`OWN_FLAGS`].
    pub flags: u8,
    /// From the block's start to the next instruction, in bytes.
    pub next: u16,
    /// Free for the handler (condition code, iced code…).
    pub extra: u16,
}

/// The slot of [`Cpu::gpr`] that is always zero.
pub const NO_REG: u8 = 16;
/// The slot of [`Cpu::gpr`] that holds the RIP of the block's first instruction.
pub const IP_REG: u8 = 17;
/// The segment index whose base is zero and that needs no check.
pub const FLAT: u8 = 6;

/// Flag: the effective address is cut to 32 bits.
pub const ADDR32: u8 = 1;
/// Flag: the effective address is cut to 16 bits.
pub const ADDR16: u8 = 2;
/// Flag: the segment's limit and rights are checked (all modes but 64-bit mode).
pub const CHECKED: u8 = 4;
/// Flag: the stack pointer is 16 bits wide (by SS.B), for pushes and pops.
pub const STACK16: u8 = 8;
/// Flag: the stack pointer is 32 bits wide. Neither: 64 bits.
pub const STACK32: u8 = 16;
/// Flags from this bit on are the handlers' own.
pub const OWN_FLAGS: u8 = 32;
