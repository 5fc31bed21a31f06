//! Control, status and environment (Intel SDM vol. 1, 8.1.8 to 8.1.10).

use iced_x86::{Instruction, Mnemonic};

use super::{EXCEPTIONS, SUMMARY};
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op};

/// Bytes of the largest format: environment and registers.
const SAVE_SIZE: usize = 108;

fn fldcw(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let value = cpu.load_operand::<u16>(op)?;
    cpu.fpu.set_control(value);
    Ok(())
}

fn fnstcw(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.store_operand(op, cpu.fpu.control)
}

fn fnstsw(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.store_operand(op, cpu.fpu.status_word())
}

/// `fnstsw ax`.
fn fnstsw_ax(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.gpr[0] = cpu.gpr[0] & !0xffff | u64::from(cpu.fpu.status_word());
    Ok(())
}

fn fnclex(cpu: &mut Cpu, _: &Op) -> Exec {
    // The exception flags and the stack fault.
    cpu.fpu.status &= !(EXCEPTIONS | 0x40);
    Ok(())
}

fn fninit(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.fpu.initialise();
    Ok(())
}

fn wait(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.wait_x87()
}

/// What earlier processors needed to be told (`fneni`, `fndisi`, `fnsetpm`).
fn nothing(_: &mut Cpu, _: &Op) -> Exec {
    Ok(())
}

impl Cpu {
    /// The environment of 14 or 28 bytes, of whose fields the last four depend on the mode.
    fn environment(&self, size: usize) -> [u8; 28] {
        let fpu = &self.fpu;
        let words = [fpu.control, fpu.status_word(), fpu.tag_word()];
        let ((ip, cs), (dp, ds)) = (fpu.instruction, fpu.data);
        let (ip, dp) = (ip as u32, dp as u32);
        let pointers = if self.protected() {
            [ip, u32::from(cs) | u32::from(fpu.opcode) << 16, dp, u32::from(ds)]
        } else {
            let ip = ip.wrapping_add(u32::from(cs) << 4);
            let dp = dp.wrapping_add(u32::from(ds) << 4);
            [ip & 0xffff, ip >> 16 << 12 | u32::from(fpu.opcode & 0x7ff), dp & 0xffff, dp >> 16 << 12]
        };
        let mut bytes = [0; 28];
        if size == 14 {
            for (i, v) in words.into_iter().chain(pointers.map(|p| p as u16)).enumerate() {
                bytes[2 * i..2 * i + 2].copy_from_slice(&v.to_le_bytes());
            }
        } else {
            // Unused upper halves are written as ones.
            let words = words.map(|w| 0xffff_0000 | u32::from(w));
            for (i, v) in words.into_iter().chain(pointers).enumerate() {
                bytes[4 * i..4 * i + 4].copy_from_slice(&v.to_le_bytes());
            }
            if self.protected() {
                bytes[26..28].fill(0xff);
            }
        }
        bytes
    }

    fn set_environment(&mut self, bytes: &[u8]) {
        let protected = self.protected();
        let short = |i: usize| u16::from_le_bytes([bytes[i], bytes[i + 1]]);
        let long = |i: usize| u32::from(short(i)) | u32::from(short(i + 2)) << 16;
        let wide = bytes.len() == 28;
        let field = |i: usize| if wide { long(4 * i) } else { u32::from(short(2 * i)) };
        let fpu = &mut self.fpu;
        fpu.set_control(field(0) as u16);
        fpu.status = field(1) as u16 & !SUMMARY;
        fpu.set_tag_word(field(2) as u16);
        if protected {
            fpu.instruction = (field(3).into(), field(4) as u16);
            fpu.opcode = if wide { (field(4) >> 16) as u16 & 0x7ff } else { 0 };
            fpu.data = (field(5).into(), field(6) as u16);
        } else {
            let high = |f: u32| f >> 12 << 16;
            fpu.instruction = ((field(3) & 0xffff | high(field(4))).into(), 0);
            fpu.opcode = field(4) as u16 & 0x7ff;
            fpu.data = ((field(5) & 0xffff | high(field(6))).into(), 0);
        }
    }
}

fn fnstenv<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    let bytes = cpu.environment(SIZE);
    cpu.store_area(op, &bytes[..SIZE])?;
    cpu.fpu.control |= EXCEPTIONS;
    Ok(())
}

fn fldenv<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let mut bytes = [0; 28];
    cpu.load_area(op, &mut bytes[..SIZE])?;
    cpu.set_environment(&bytes[..SIZE]);
    Ok(())
}

/// `SIZE` is the environment's.
fn fnsave<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mut bytes = [0; SAVE_SIZE];
    bytes[..SIZE].copy_from_slice(&cpu.environment(SIZE)[..SIZE]);
    for i in 0..8 {
        let at = SIZE + 10 * usize::from(i);
        bytes[at..at + 10].copy_from_slice(&cpu.fpu.st(i).to_le_bytes()[..10]);
    }
    cpu.store_area(op, &bytes[..SIZE + 80])?;
    cpu.fpu.initialise();
    Ok(())
}

fn frstor<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.wait_x87()?;
    let mut bytes = [0; SAVE_SIZE];
    cpu.load_area(op, &mut bytes[..SIZE + 80])?;
    cpu.set_environment(&bytes[..SIZE]);
    for i in 0..8 {
        let at = SIZE + 10 * usize::from(i);
        let mut wide = [0; 16];
        wide[..10].copy_from_slice(&bytes[at..at + 10]);
        cpu.fpu.set_st(i, u128::from_le_bytes(wide));
    }
    Ok(())
}

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    let short = matches!(insn.memory_size().size(), 14 | 94);
    Some(match insn.mnemonic() {
        Mnemonic::Wait => wait,
        Mnemonic::Fneni | Mnemonic::Fndisi | Mnemonic::Fnsetpm => nothing,
        Mnemonic::Fldcw => fldcw,
        Mnemonic::Fnstcw => fnstcw,
        Mnemonic::Fnstsw if insn.op0_register() == iced_x86::Register::AX => fnstsw_ax,
        Mnemonic::Fnstsw => fnstsw,
        Mnemonic::Fnclex => fnclex,
        Mnemonic::Fninit => fninit,
        Mnemonic::Fnstenv if short => fnstenv::<14>,
        Mnemonic::Fnstenv => fnstenv::<28>,
        Mnemonic::Fldenv if short => fldenv::<14>,
        Mnemonic::Fldenv => fldenv::<28>,
        Mnemonic::Fnsave if short => fnsave::<14>,
        Mnemonic::Fnsave => fnsave::<28>,
        Mnemonic::Frstor if short => frstor::<14>,
        Mnemonic::Frstor => frstor::<28>,
        _ => return None,
    })
}
