//! Instructions on single flags.

use iced_x86::{Instruction, Mnemonic};
use terem_cpu::rflags;

use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op};

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => sahf,
        Mnemonic::Clc => clc,
        Mnemonic::Stc => stc,
        Mnemonic::Cmc => cmc,
        Mnemonic::Cld => cld,
        Mnemonic::Std => std,
        _ => return None,
    })
}

fn lahf(cpu: &mut Cpu, _: &Op) -> Exec {
    let ah = u64::from(cpu.ah & 0xd5 | 2);
    cpu.gpr[0] = cpu.gpr[0] & !0xff00 | ah << 8;
    Ok(())
}

fn sahf(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.ah = (cpu.gpr[0] >> 8) as u8 & 0xd5;
    Ok(())
}

fn clc(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.ah &= !1;
    Ok(())
}

fn stc(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.ah |= 1;
    Ok(())
}

fn cmc(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.ah ^= 1;
    Ok(())
}

fn cld(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.system_flags &= !rflags::DF;
    Ok(())
}

fn std(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.system_flags |= rflags::DF;
    Ok(())
}
