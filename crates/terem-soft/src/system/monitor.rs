//! `monitor` and `mwait` (Intel SDM vol. 3, 9.10.3): a vCPU that sleeps until somebody stores to a line of memory.
//!
//! Stores of other vCPUs are not trapped, since that would cost each of them. The sleeper looks at the line itself instead,
//! at first soon and then once in [`SELDOM`]; interrupts and all else that wakes a halted vCPU wake it at once. A store that
//! leaves the line as it was is not seen; the manual lets `mwait` end for reasons of the processor's own, so it ends by
//! [`LONGEST`], and the guest looks for itself.

use std::time::{Duration, Instant};

use terem_cpu::VcpuState;

use crate::cpu::Cpu;
use crate::fault::{Exec, Fault};
use crate::mmu::Access;
use crate::op::{ADDR16, ADDR32, FLAT, Handler, Op};

/// Bytes of a line, as CPUID leaf 5 tells.
const LINE: usize = 64;
/// How long the sleeper waits before it looks at the line, at first and at most.
const SOON: Duration = Duration::from_micros(20);
const SELDOM: Duration = Duration::from_millis(1);
/// How long it sleeps in all.
const LONGEST: Duration = Duration::from_millis(100);
/// ECX bit 0 of `mwait`: interrupts end it even where they are masked.
const MASKED_TOO: u32 = 1;

/// A line that is watched.
pub(crate) struct Monitored {
    line: *const u64,
    seen: [u64; LINE / 8],
}

impl Monitored {
    fn look(line: *const u64) -> [u64; LINE / 8] {
        // SAFETY: the line is aligned to its size, so that it lies on one page, which is RAM in the window.
        std::array::from_fn(|i| unsafe { line.add(i).read_volatile() })
    }

    fn changed(&self) -> bool {
        Self::look(self.line) != self.seen
    }
}

pub(super) fn handler(insn: &iced_x86::Instruction, op: &mut Op) -> Option<Handler> {
    use iced_x86::{Code, Mnemonic};
    match insn.mnemonic() {
        Mnemonic::Monitor => {
            op.flags |= match insn.code() {
                Code::Monitorw => ADDR16,
                Code::Monitord => ADDR32,
                _ => 0,
            };
            if op.segment == FLAT {
                op.segment = VcpuState::DS as u8;
            }
            Some(monitor)
        }
        Mnemonic::Mwait => Some(mwait),
        _ => None,
    }
}

fn monitor(cpu: &mut Cpu, op: &Op) -> Exec {
    supervisor_only(cpu)?;
    let offset = match op.flags & (ADDR16 | ADDR32) {
        0 => cpu.gpr[0],
        ADDR32 => cpu.gpr[0] & 0xffff_ffff,
        _ => cpu.gpr[0] & 0xffff,
    };
    if cpu.gpr[1] as u32 != 0 {
        return Err(Fault::GP0);
    }
    let at = cpu.linear(op, offset, 1, false)?;
    cpu.load_in::<u8>(at, op.segment)?;
    let physical = cpu.translate(cpu.wrap(at), Access::Read)? & !(LINE as u64 - 1);
    // Device registers are not watched: `mwait` ends at once then.
    cpu.monitored = cpu.ram(physical).map(|host| {
        let line = host.cast_const().cast();
        Monitored { line, seen: Monitored::look(line) }
    });
    Ok(())
}

fn mwait(cpu: &mut Cpu, _: &Op) -> Exec {
    supervisor_only(cpu)?;
    let extensions = cpu.gpr[1] as u32;
    if extensions & !MASKED_TOO != 0 {
        return Err(Fault::GP0);
    }
    let Some(monitored) = cpu.monitored.take() else { return Ok(()) };
    // Interrupts come before the next instruction.
    cpu.op_end = std::ptr::null();
    cpu.stats.sleeps(cpu.bus.clock.now());
    let (started, mut pause) = (Instant::now(), SOON);
    while !monitored.changed()
        && started.elapsed() < LONGEST
        && cpu.apic.doze(pause, extensions & MASKED_TOO != 0)
    {
        pause = (pause * 2).min(SELDOM);
    }
    cpu.stats.wakes(cpu.bus.clock.now());
    Ok(())
}

/// `#UD` outside privilege 0.
fn supervisor_only(cpu: &Cpu) -> Exec {
    if cpu.cpl == 0 { Ok(()) } else { Err(Fault::UD) }
}
