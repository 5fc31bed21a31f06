//! Emits the host instructions that stand around the guest's own.

use crate::cpu::Cpu;

/// Host registers, by number.
pub(super) mod host {
    pub(in super::super) const RAX: u8 = 0;
    pub(in super::super) const RCX: u8 = 1;
    pub(in super::super) const RDX: u8 = 2;
    pub(in super::super) const RSP: u8 = 4;
    pub(in super::super) const RSI: u8 = 6;
    pub(in super::super) const RDI: u8 = 7;
    /// Scratch: third.
    pub(in super::super) const T2: u8 = 9;
    /// Scratch: second; after a store's check, where the page's mark is.
    pub(in super::super) const T1: u8 = 10;
    /// Scratch: first; the address of memory accesses.
    pub(in super::super) const T0: u8 = 11;
    /// The guest's RSP.
    pub(in super::super) const SP: u8 = 15;
}

use host::{RAX, T2};

/// Condition codes, as opcodes have them.
pub(super) mod cc {
    pub(in super::super) const B: u8 = 2;
    pub(in super::super) const AE: u8 = 3;
    pub(in super::super) const E: u8 = 4;
    pub(in super::super) const NE: u8 = 5;
    pub(in super::super) const BE: u8 = 6;
    pub(in super::super) const A: u8 = 7;
}

/// A register or a place in memory.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place {
    Reg(u8),
    /// A field of [`Cpu`], by its offset.
    State(usize),
    /// A field of [`Cpu`] plus a register.
    StateAt(u8, usize),
    /// Memory at a register plus a displacement.
    At(u8, i32),
}

/// An address as instructions compute it, in host registers.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Address {
    pub(super) base: Option<u8>,
    pub(super) index: Option<(u8, u8)>,
    pub(super) disp: i32,
}

/// A forward jump whose target is not known yet: where its 4 bytes lie.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub(super) struct Jump(pub(super) usize);

/// A buffer of code that will lie at a known address.
#[derive(Debug, Default)]
pub(super) struct Asm {
    pub(super) code: Vec<u8>,
    /// Where the vCPU lies, below 2 GiB. (Behind GS its fields would be two cycles further away.)
    pub(super) state: u32,
    /// Where the first byte will be executed.
    pub(super) base: u64,
    /// Where code that is executed rarely begins in `code`, and where that will be executed.
    pub(super) cold: Option<(usize, u64)>,
}

impl Asm {
    pub(super) fn here(&self) -> u64 {
        self.address(self.code.len())
    }

    /// Where the byte at an offset of `code` will be executed.
    pub(super) fn address(&self, offset: usize) -> u64 {
        match self.cold {
            Some((begin, base)) if offset >= begin => base + (offset - begin) as u64,
            _ => self.base + offset as u64,
        }
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn imm32(&mut self, value: i32) {
        self.bytes(&value.to_le_bytes());
    }

    /// An instruction with ModRM: `opcode reg, place`, or `/reg` as an extension of the opcode.
    pub(super) fn op(&mut self, wide: bool, opcode: &[u8], reg: u8, place: Place) {
        let low = match place {
            Place::Reg(r) | Place::StateAt(r, _) | Place::At(r, _) => r,
            Place::State(_) => 0,
        };
        let rex = 0x40 | u8::from(wide) << 3 | (reg >> 3 & 1) << 2 | low >> 3 & 1;
        if rex != 0x40 {
            self.code.push(rex);
        }
        self.bytes(opcode);
        let reg = (reg & 7) << 3;
        match place {
            Place::Reg(r) => self.code.push(0xc0 | reg | r & 7),
            Place::State(offset) => {
                self.bytes(&[reg | 4, 0x25]);
                self.imm32(self.state as i32 + offset as i32);
            }
            Place::StateAt(r, offset) => self.based(reg, r, self.state as i32 + offset as i32, true),
            Place::At(r, disp) => self.based(reg, r, disp, false),
        }
    }

    fn based(&mut self, reg: u8, base: u8, disp: i32, far: bool) {
        let short = i8::try_from(disp).is_ok() && !far;
        let kind = if disp == 0 && base & 7 != 5 && !far {
            0
        } else if short {
            0x40
        } else {
            0x80
        };
        self.code.push(kind | reg | base & 7);
        if base & 7 == 4 {
            self.code.push(0x24);
        }
        match kind {
            0 => {}
            0x40 => self.code.push(disp as u8),
            _ => self.imm32(disp),
        }
    }

    pub(super) fn load(&mut self, reg: u8, place: Place) {
        self.op(true, &[0x8b], reg, place);
    }

    pub(super) fn store(&mut self, place: Place, reg: u8) {
        self.op(true, &[0x89], reg, place);
    }

    /// `mov to, from`, 64 or 32 bits.
    pub(super) fn copy(&mut self, wide: bool, to: u8, from: u8) {
        self.op(wide, &[0x8b], to, Place::Reg(from));
    }

    /// `lea to, [address]`, the result cut to 32 bits if not `wide`.
    pub(super) fn lea(&mut self, wide: bool, to: u8, address: Address) {
        let Address { base, index, disp } = address;
        let high = |r: Option<u8>| r.map_or(0, |r| r >> 3 & 1);
        let rex =
            0x40 | u8::from(wide) << 3 | (to >> 3 & 1) << 2 | high(index.map(|i| i.0)) << 1 | high(base);
        if rex != 0x40 {
            self.code.push(rex);
        }
        self.code.push(0x8d);
        let reg = (to & 7) << 3;
        let Some((index, shift)) = index else {
            match base {
                Some(base) => self.based(reg, base, disp, false),
                None => {
                    self.bytes(&[reg | 4, 0x25]);
                    self.imm32(disp);
                }
            }
            return;
        };
        let sib = shift << 6 | (index & 7) << 3;
        match base {
            None => {
                self.bytes(&[reg | 4, sib | 5]);
                self.imm32(disp);
            }
            Some(base) if disp == 0 && base & 7 != 5 => self.bytes(&[reg | 4, sib | base & 7]),
            Some(base) if i8::try_from(disp).is_ok() => {
                self.bytes(&[0x40 | reg | 4, sib | base & 7, disp as u8]);
            }
            Some(base) => {
                self.bytes(&[0x80 | reg | 4, sib | base & 7]);
                self.imm32(disp);
            }
        }
    }

    /// `lea to, [base + disp]`.
    pub(super) fn lea_plus(&mut self, to: u8, base: u8, disp: i32) {
        self.lea(true, to, Address { base: Some(base), index: None, disp });
    }

    /// An instruction of the group 81h (`add` 0, `or` 1, `and` 4, `sub` 5, `cmp` 7) with an immediate.
    pub(super) fn group1(&mut self, wide: bool, extension: u8, place: Place, imm: i32) {
        if let Ok(short) = i8::try_from(imm) {
            self.op(wide, &[0x83], extension, place);
            self.code.push(short as u8);
        } else {
            self.op(wide, &[0x81], extension, place);
            self.imm32(imm);
        }
    }

    pub(super) fn shift_right(&mut self, wide: bool, reg: u8, count: u8) {
        self.op(wide, &[0xc1], 5, Place::Reg(reg));
        self.code.push(count);
    }

    pub(super) fn shift_left(&mut self, wide: bool, reg: u8, count: u8) {
        self.op(wide, &[0xc1], 4, Place::Reg(reg));
        self.code.push(count);
    }

    /// `cmp byte [place], imm`.
    pub(super) fn compare_byte(&mut self, place: Place, imm: u8) {
        self.op(false, &[0x80], 7, place);
        self.code.push(imm);
    }

    /// `mov byte [place], imm`.
    pub(super) fn set_byte(&mut self, place: Place, imm: u8) {
        self.op(false, &[0xc6], 0, place);
        self.code.push(imm);
    }

    /// `mov reg, imm`, in the shortest way.
    pub(super) fn set(&mut self, reg: u8, value: u64) {
        if let Ok(short) = u32::try_from(value) {
            if reg >= 8 {
                self.code.push(0x41);
            }
            self.code.push(0xb8 | reg & 7);
            self.bytes(&short.to_le_bytes());
        } else {
            self.bytes(&[0x48 | reg >> 3, 0xb8 | reg & 7]);
            self.bytes(&value.to_le_bytes());
        }
    }

    pub(super) fn jump_if(&mut self, condition: u8) -> Jump {
        self.bytes(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        Jump(self.code.len() - 4)
    }

    /// A conditional jump over at most 127 bytes, to be landed by [`Self::land_short`].
    pub(super) fn short_jump_if(&mut self, condition: u8) -> Jump {
        self.bytes(&[0x70 | condition, 0]);
        Jump(self.code.len() - 1)
    }

    /// Lets a short jump lead to the present place.
    pub(super) fn land_short(&mut self, jump: Jump) {
        let distance = self.code.len() - jump.0 - 1;
        debug_assert!(distance < 0x80);
        self.code[jump.0] = distance as u8;
    }

    pub(super) fn jump(&mut self) -> Jump {
        self.bytes(&[0xe9, 0, 0, 0, 0]);
        Jump(self.code.len() - 4)
    }

    pub(super) fn call(&mut self) -> Jump {
        self.bytes(&[0xe8, 0, 0, 0, 0]);
        Jump(self.code.len() - 4)
    }

    /// Lets a jump lead to the present place.
    pub(super) fn land(&mut self, jump: Jump) {
        let at = self.code.len();
        self.land_at(jump, at);
    }

    /// Lets a jump lead to an offset in this buffer.
    pub(super) fn land_at(&mut self, jump: Jump, target: usize) {
        let distance = self.address(target).wrapping_sub(self.address(jump.0) + 4);
        self.code[jump.0..jump.0 + 4].copy_from_slice(&(distance as i32).to_le_bytes());
    }

    /// `jmp` to an address within 2 GiB.
    pub(super) fn jump_to(&mut self, address: u64) {
        self.code.push(0xe9);
        self.distance(address);
    }

    pub(super) fn call_to(&mut self, address: u64) {
        self.code.push(0xe8);
        self.distance(address);
    }

    pub(super) fn jump_if_to(&mut self, condition: u8, address: u64) {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.distance(address);
    }

    /// `opcode reg, [address]` with 64 bits; the address lies within 2 GiB, and no immediate follows.
    pub(super) fn op_rip(&mut self, opcode: u8, reg: u8, address: u64) {
        self.bytes(&[0x48 | (reg >> 3) << 2, opcode, (reg & 7) << 3 | 5]);
        self.distance(address);
    }

    /// `cmp reg, [address]`, which lies within 2 GiB.
    pub(super) fn compare_rip(&mut self, reg: u8, address: u64) {
        self.op_rip(0x3b, reg, address);
    }

    /// `lea reg, [address]`, which lies within 2 GiB.
    pub(super) fn lea_rip(&mut self, reg: u8, address: u64) {
        self.op_rip(0x8d, reg, address);
    }

    fn distance(&mut self, address: u64) {
        let from = self.here() + 4;
        self.imm32(address.wrapping_sub(from) as i32);
    }

    /// Puts the host's arithmetic flags into the vCPU's state. They stay as they are; T2 is lost.
    pub(super) fn save_flags(&mut self) {
        self.copy(true, T2, RAX);
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
        self.code.push(0x66); // mov [of, ah], ax
        self.op(false, &[0x89], RAX, Place::State(std::mem::offset_of!(Cpu, of)));
        self.copy(true, RAX, T2);
    }

    /// Takes the host's arithmetic flags from the vCPU's state. T2 is lost.
    pub(super) fn restore_flags(&mut self) {
        self.copy(true, T2, RAX);
        self.op(false, &[0x0f, 0xb7], RAX, Place::State(std::mem::offset_of!(Cpu, of)));
        self.bytes(&[0x04, 0x7f, 0x9e]); // add al, 7fh; sahf
        self.copy(true, RAX, T2);
    }
}
