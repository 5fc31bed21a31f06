//! Executes an instruction by its form's stub.

use core::arch::asm;
use std::mem::offset_of;

use super::form::{Floats, Form, Implicit, Memory, OPERANDS, Operand};
use crate::cpu::{Cpu, Xmm, Ymm};
use crate::fault::{Exec, Fault};
use crate::op::Op;
use crate::sse::{MXCSR_DEFAULT, dot_product_exceptions};

/// What a stub finds in the host's registers, and leaves there.
#[repr(C, align(32))]
struct Frame {
    /// The memory operand, where RDI points.
    memory: [u8; 32],
    /// YMM0 to YMM4: XMM0, then the operands by place.
    vectors: [Ymm; 1 + OPERANDS],
    /// R8 to R10.
    general: [u64; 3],
    ax: u64,
    cx: u64,
    dx: u64,
    /// As [`Cpu::ah`] and [`Cpu::of`] in AX.
    flags: u16,
    mxcsr: u32,
}

static HOST_MXCSR: u32 = MXCSR_DEFAULT;

impl Frame {
    /// Executes a stub; with `controlled` under the frame's MXCSR, which then gets the flags raised.
    ///
    /// # Safety
    /// `code` is a stub's address, the host has its instruction, and the frame's MXCSR has all exceptions masked.
    unsafe fn call(&mut self, code: u64, controlled: bool) {
        // SAFETY: the stub is one instruction that works on the registers loaded here and the frame's memory. The
        // host's MXCSR is back at its default afterwards if it was changed.
        unsafe {
            asm!(
                "test esi, esi",
                "jz 2f",
                "ldmxcsr [rdi + {mxcsr}]",
                "2:",
                "vmovaps ymm0, [rdi + {vectors}]",
                "vmovaps ymm1, [rdi + {vectors} + 32]",
                "vmovaps ymm2, [rdi + {vectors} + 64]",
                "vmovaps ymm3, [rdi + {vectors} + 96]",
                "vmovaps ymm4, [rdi + {vectors} + 128]",
                "mov r8, [rdi + {general}]",
                "mov r9, [rdi + {general} + 8]",
                "mov r10, [rdi + {general} + 16]",
                "mov rcx, [rdi + {cx}]",
                "mov rdx, [rdi + {dx}]",
                "movzx eax, word ptr [rdi + {flags}]",
                "add al, 0x7f",
                "sahf",
                "mov rax, [rdi + {ax}]",
                "call r11",
                "lahf",
                "seto al",
                "mov [rdi + {flags}], ax",
                "mov [rdi + {cx}], rcx",
                "mov [rdi + {general}], r8",
                "mov [rdi + {general} + 8], r9",
                "mov [rdi + {general} + 16], r10",
                "vmovaps [rdi + {vectors}], ymm0",
                "vmovaps [rdi + {vectors} + 32], ymm1",
                "vmovaps [rdi + {vectors} + 64], ymm2",
                "vzeroupper",
                "test esi, esi",
                "jz 3f",
                "stmxcsr [rdi + {mxcsr}]",
                "ldmxcsr [{host}]",
                "3:",
                mxcsr = const offset_of!(Self, mxcsr),
                vectors = const offset_of!(Self, vectors),
                general = const offset_of!(Self, general),
                ax = const offset_of!(Self, ax),
                cx = const offset_of!(Self, cx),
                dx = const offset_of!(Self, dx),
                flags = const offset_of!(Self, flags),
                host = in(reg) &raw const HOST_MXCSR,
                in("rdi") &raw mut *self,
                in("esi") u32::from(controlled),
                in("r11") code,
                out("rax") _, out("rcx") _, out("rdx") _, out("r8") _, out("r9") _, out("r10") _,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _,
            );
        }
    }
}

/// Outside real and virtual-8086 mode only.
pub(super) fn in_protected_mode(cpu: &mut Cpu, op: &Op) -> Exec {
    if cpu.protected() { run(cpu, op) } else { Err(Fault::UD) }
}

/// [`Op::imm`] is the form's address; the operands' registers are [`Op::reg`], [`Op::rm`] and two in [`Op::extra`].
pub(super) fn run(cpu: &mut Cpu, op: &Op) -> Exec {
    // SAFETY: `super::handler` put a form's address there, and forms stay.
    let form: &Form = unsafe { &*(op.imm as *const Form) };
    let registers = [op.reg, op.rm, (op.extra & 15) as u8, (op.extra >> 4) as u8];
    let mut frame = cpu.frame(form, registers);
    let at = match form.memory {
        Some(memory) => cpu.memory_operand(op, memory, &mut frame.memory)?,
        None => 0,
    };
    if !form.vectors || cpu.runs_directly() {
        // SAFETY: the guest has only what the host has; the host's MXCSR has its exceptions masked.
        unsafe { frame.call(form.code, false) };
    } else {
        if let Some((width, lanes)) = form.dot_product {
            cpu.exceptions_of_steps(&frame, form, width, lanes)?;
        }
        frame.mxcsr = cpu.masked_mxcsr();
        // SAFETY: as above.
        unsafe { frame.call(form.code, true) };
        cpu.raised(frame.mxcsr, || form.tiny(&frame))?;
    }
    if let Some(memory) = form.memory.filter(|m| m.write) {
        return cpu.store_vector(at, op.segment, &frame.memory[..memory.size]);
    }
    cpu.take_results(form, registers, &frame);
    Ok(())
}

impl Form {
    /// Whether an element of the result is denormal.
    fn tiny(&self, frame: &Frame) -> bool {
        let mut bytes = [0; 32];
        if self.memory.is_some_and(|m| m.write) {
            bytes = frame.memory;
        } else {
            bytes[..16].copy_from_slice(&frame.vectors[1].low.0.to_le_bytes());
            bytes[16..].copy_from_slice(&frame.vectors[1].high.0.to_le_bytes());
        }
        let half = |b: &[u8; 2]| matches!(u16::from_le_bytes(*b) & 0x7fff, 1..0x400);
        match self.result {
            Floats::Whole => false,
            Floats::Half(n) => bytes.as_chunks().0[..n].iter().any(half),
            Floats::Single(n) => {
                bytes.as_chunks().0[..n].iter().any(|b| f32::from_le_bytes(*b).is_subnormal())
            }
            Floats::Double(n) => {
                bytes.as_chunks().0[..n].iter().any(|b| f64::from_le_bytes(*b).is_subnormal())
            }
        }
    }
}

impl Cpu {
    fn frame(&self, form: &Form, registers: [u8; OPERANDS]) -> Frame {
        let mut frame = Frame {
            memory: [0; 32],
            vectors: [Ymm::default(); 1 + OPERANDS],
            general: [0; 3],
            ax: self.gpr[0],
            cx: self.gpr[1],
            dx: self.gpr[2],
            flags: u16::from(self.ah) << 8 | u16::from(self.of),
            mxcsr: MXCSR_DEFAULT,
        };
        for (n, (operand, register)) in form.operands.iter().zip(registers).enumerate() {
            match operand {
                Operand::Vector => frame.vectors[n + 1] = self.ymm[usize::from(register & 15)],
                Operand::General => frame.general[n % 3] = self.slot(register & 15),
                Operand::Other => {}
            }
        }
        if form.implicit == Implicit::SourceXmm0 {
            frame.vectors[0] = self.ymm[0];
        }
        frame
    }

    /// The memory operand's linear address: read to `to`, or seen to that it can be written.
    fn memory_operand(&mut self, op: &Op, memory: Memory, to: &mut [u8; 32]) -> Exec<u64> {
        let at = self.operand_address(op, memory.size as u64, memory.write)?;
        if memory.aligned && at & (memory.size as u64 - 1) != 0 {
            return Err(Fault::GP0);
        }
        if memory.read {
            self.load_vector(at, op.segment, &mut to[..memory.size])?;
        }
        if memory.write {
            self.check_writable(at, op.segment, memory.size as u64)?;
        }
        Ok(at)
    }

    fn take_results(&mut self, form: &Form, registers: [u8; OPERANDS], frame: &Frame) {
        // `mulx` with one register twice leaves the high half, its first operand, there.
        for n in (0..OPERANDS).rev().filter(|n| form.written >> n & 1 != 0) {
            match form.operands[n] {
                Operand::Vector => self.set_ymm(registers[n], frame.vectors[n + 1]),
                Operand::General => self.set_slot(registers[n], frame.general[n % 3]),
                Operand::Other => {}
            }
        }
        match form.implicit {
            Implicit::ResultXmm0 => self.set_ymm(0, frame.vectors[0]),
            Implicit::ResultEcx => self.gpr[1] = frame.cx,
            Implicit::No | Implicit::SourceXmm0 => {}
        }
        (self.ah, self.of) = ((frame.flags >> 8) as u8, frame.flags as u8);
    }

    /// The exceptions of a dot product's multiplications and additions.
    fn exceptions_of_steps(&mut self, frame: &Frame, form: &Form, width: u32, lanes: usize) -> Exec {
        let second = if form.memory.is_some() {
            let (low, high) = frame.memory.split_at(16);
            [low, high].map(|b| b.iter().rev().fold(0, |n, b| n << 8 | u128::from(*b)))
        } else {
            [frame.vectors[3].low.0, frame.vectors[3].high.0]
        };
        let Ymm { low: Xmm(low), high: Xmm(high) } = frame.vectors[2];
        let pairs = [(low, second[0]), (high, second[1])];
        dot_product_exceptions(self, width, &pairs[..lanes], form.immediate)
    }

    /// Reads 1, 2, 4, 8, 16 or 32 bytes.
    pub(super) fn load_vector(&mut self, at: u64, segment: u8, to: &mut [u8]) -> Exec {
        self.canonical(at, to.len() as u64, segment)?;
        match to.len() {
            1 => to[0] = self.load_in(at, segment)?,
            2 => to.copy_from_slice(&self.load_in::<u16>(at, segment)?.to_le_bytes()),
            4 => to.copy_from_slice(&self.load_in::<u32>(at, segment)?.to_le_bytes()),
            8 => to.copy_from_slice(&self.load_in::<u64>(at, segment)?.to_le_bytes()),
            _ => {
                let mut at = at;
                for piece in to.as_chunks_mut::<16>().0 {
                    *piece = self.load_in::<u128>(at, segment)?.to_le_bytes();
                    at = self.wrap(at.wrapping_add(16));
                }
            }
        }
        Ok(())
    }

    /// Writes as many bytes, which are known to be writable.
    pub(super) fn store_vector(&mut self, at: u64, segment: u8, from: &[u8]) -> Exec {
        match *from {
            [a] => self.store_in(at, a, segment),
            [a, b] => self.store_in(at, u16::from_le_bytes([a, b]), segment),
            [a, b, c, d] => self.store_in(at, u32::from_le_bytes([a, b, c, d]), segment),
            _ if from.len() == 8 => self.store_bytes(at, segment, from),
            _ => {
                let mut at = at;
                for piece in from.as_chunks::<16>().0 {
                    self.store_in(at, u128::from_le_bytes(*piece), segment)?;
                    at = self.wrap(at.wrapping_add(16));
                }
                Ok(())
            }
        }
    }
}
