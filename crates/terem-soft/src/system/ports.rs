//! Port I/O: `in`, `out`, `ins`, `outs`.

use iced_x86::{Instruction, Mnemonic, OpKind};
use terem_cpu::{Exit, Segment, rflags};

use crate::cpu::{Cpu, cr0};
use crate::decode::Mode;
use crate::fault::{Exec, Fault};
use crate::op::{ADDR16, ADDR32, Handler, OWN_FLAGS, Op};

/// Own flag: a `rep` prefix.
const REP: u8 = OWN_FLAGS;
/// Own flag: the port is DX.
const DX: u8 = OWN_FLAGS << 1;
/// Iterations of a `rep` done before interrupts are looked at.
const BATCH: u32 = 256;

pub(super) fn handler(insn: &Instruction, _: Mode, op: &mut Op) -> Option<Handler> {
    let immediate = |i: u32| insn.op_kind(i) == OpKind::Immediate8;
    Some(match insn.mnemonic() {
        Mnemonic::In => {
            op.extra = insn.op0_register().size() as u16;
            op.imm = if immediate(1) { insn.immediate(1) & 0xff } else { 0 };
            op.flags |= if immediate(1) { 0 } else { DX };
            port_in
        }
        Mnemonic::Out => {
            op.extra = insn.op1_register().size() as u16;
            op.imm = if immediate(0) { insn.immediate(0) & 0xff } else { 0 };
            op.flags |= if immediate(0) { 0 } else { DX };
            port_out
        }
        Mnemonic::Insb
        | Mnemonic::Insw
        | Mnemonic::Insd
        | Mnemonic::Outsb
        | Mnemonic::Outsw
        | Mnemonic::Outsd => {
            op.extra = match insn.mnemonic() {
                Mnemonic::Insb | Mnemonic::Outsb => 1,
                Mnemonic::Insw | Mnemonic::Outsw => 2,
                _ => 4,
            };
            if insn.has_rep_prefix() || insn.has_repne_prefix() {
                op.flags |= REP;
            }
            if matches!(insn.mnemonic(), Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd) {
                op.segment = 0;
                ins
            } else {
                outs
            }
        }
        _ => return None,
    })
}

impl Cpu {
    /// Checks the I/O permission of `size` ports (SDM vol. 1, 19.5.2).
    fn port_allowed(&mut self, port: u16, size: u16) -> Exec {
        let iopl = (self.system_flags & rflags::IOPL) >> 12;
        let vm = self.system_flags & rflags::VM != 0;
        if self.cr0 & cr0::PE == 0 || (!vm && u64::from(self.cpl) <= iopl) {
            return Ok(());
        }
        // A 32- or 64-bit TSS, available or busy.
        if self.tr.kind() & 9 != 9 || self.tr.access & Segment::UNUSABLE != 0 || self.tr.limit < 0x67 {
            return Err(Fault::GP0);
        }
        let map: u16 = self.load_system(self.tr.base.wrapping_add(0x66))?;
        let at = u64::from(map) + u64::from(port / 8);
        if at + 1 > u64::from(self.tr.limit) {
            return Err(Fault::GP0);
        }
        let bits: u16 = self.load_system(self.tr.base.wrapping_add(at))?;
        let wanted = ((1_u16 << size) - 1) << (port % 8);
        if bits & wanted == 0 { Ok(()) } else { Err(Fault::GP0) }
    }

    fn read_port(&mut self, port: u16, size: u8) -> u64 {
        let address = u64::from(port);
        let value = self.bus.ports.read(address, size);
        self.stats.port_accesses.add(1);
        self.trace_exit(|| Exit { port: true, address, size, write: false, value });
        value
    }

    fn write_port(&mut self, port: u16, size: u8, value: u64) {
        let address = u64::from(port);
        self.bus.ports.write(address, size, value);
        self.stats.port_accesses.add(1);
        self.trace_exit(|| Exit { port: true, address, size, write: true, value });
    }
}

fn port(cpu: &Cpu, op: &Op) -> u16 {
    if op.flags & DX != 0 { cpu.gpr[2] as u16 } else { op.imm as u16 }
}

fn port_in(cpu: &mut Cpu, op: &Op) -> Exec {
    let port = port(cpu, op);
    cpu.port_allowed(port, op.extra)?;
    let value = cpu.read_port(port, op.extra as u8);
    cpu.ports_accessed(port, op.extra);
    match op.extra {
        1 => cpu.gpr[0] = cpu.gpr[0] & !0xff | value & 0xff,
        n => cpu.set_gpr(0, u64::from(n), value),
    }
    Ok(())
}

fn port_out(cpu: &mut Cpu, op: &Op) -> Exec {
    let port = port(cpu, op);
    cpu.port_allowed(port, op.extra)?;
    cpu.write_port(port, op.extra as u8, cpu.gpr[0]);
    cpu.ports_accessed(port, op.extra);
    Ok(())
}

/// The bits of an address or count register that are used.
fn mask(op: &Op) -> u64 {
    match op.flags & (ADDR16 | ADDR32) {
        ADDR16 => 0xffff,
        ADDR32 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

fn set_masked(register: &mut u64, mask: u64, value: u64) {
    // A 32-bit register write clears the upper half; a 16-bit one keeps it.
    *register = if mask == 0xffff { *register & !0xffff | value & 0xffff } else { value & mask };
}

/// Repeats `one` as the prefix and the count say.
fn repeat(cpu: &mut Cpu, op: &Op, mut one: impl FnMut(&mut Cpu) -> Exec) -> Exec {
    if op.flags & REP == 0 {
        return one(cpu);
    }
    let mask = mask(op);
    for _ in 0..BATCH {
        let count = cpu.gpr[1] & mask;
        if count == 0 {
            return Ok(());
        }
        one(cpu)?;
        set_masked(&mut cpu.gpr[1], mask, count - 1);
        if cpu.mode.single || cpu.watches.pending() {
            break;
        }
    }
    if cpu.gpr[1] & mask != 0 {
        cpu.rip = cpu.wrap_rip(cpu.op_rip(op));
        cpu.resume_string();
    }
    Ok(())
}

fn step(cpu: &Cpu, op: &Op) -> u64 {
    let size = u64::from(op.extra);
    if cpu.system_flags & rflags::DF != 0 { 0_u64.wrapping_sub(size) } else { size }
}

fn ins(cpu: &mut Cpu, op: &Op) -> Exec {
    let port = cpu.gpr[2] as u16;
    cpu.port_allowed(port, op.extra)?;
    let (mask, step) = (mask(op), step(cpu, op));
    repeat(cpu, op, |cpu| {
        let offset = cpu.gpr[7] & mask;
        let at = cpu.linear(op, offset, u64::from(op.extra), true)?;
        // The page must be writable before the port is read.
        cpu.translate(at, crate::mmu::Access::Write)?;
        let value = cpu.read_port(port, op.extra as u8);
        cpu.ports_accessed(port, op.extra);
        match op.extra {
            1 => cpu.store(at, value as u8)?,
            2 => cpu.store(at, value as u16)?,
            _ => cpu.store(at, value as u32)?,
        }
        set_masked(&mut cpu.gpr[7], mask, offset.wrapping_add(step));
        Ok(())
    })
}

fn outs(cpu: &mut Cpu, op: &Op) -> Exec {
    let port = cpu.gpr[2] as u16;
    cpu.port_allowed(port, op.extra)?;
    let (mask, step) = (mask(op), step(cpu, op));
    repeat(cpu, op, |cpu| {
        let offset = cpu.gpr[6] & mask;
        let at = cpu.linear(op, offset, u64::from(op.extra), false)?;
        let value = match op.extra {
            1 => u64::from(cpu.load::<u8>(at)?),
            2 => u64::from(cpu.load::<u16>(at)?),
            _ => u64::from(cpu.load::<u32>(at)?),
        };
        cpu.write_port(port, op.extra as u8, value);
        cpu.ports_accessed(port, op.extra);
        set_masked(&mut cpu.gpr[6], mask, offset.wrapping_add(step));
        Ok(())
    })
}
