//! Instructions that leave the registers alone, fences and cache hints; and random numbers.

use std::cell::Cell;
use std::sync::atomic::{Ordering, fence};

use iced_x86::{Instruction, Mnemonic};

use super::operand::{is_mem, reg, width, worded};
use super::width::Int;
use crate::cpu::Cpu;
use crate::fault::Exec;
use crate::op::{Handler, Op};

/// One `pause` in this many gives the host's processor to another thread.
const PAUSES_TO_YIELD: u32 = 32;

pub(super) fn handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1 => nothing,
        Mnemonic::Pause => pause,
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => flush_line,
        Mnemonic::Mfence | Mnemonic::Lfence | Mnemonic::Sfence => full_fence,
        Mnemonic::Rdrand | Mnemonic::Rdseed if !is_mem(insn, 0) => {
            op.reg = reg(insn, 0);
            worded!(width(insn, 0), random)
        }
        _ => return None,
    })
}

fn nothing(_: &mut Cpu, _: &Op) -> Exec {
    Ok(())
}

fn pause(_: &mut Cpu, _: &Op) -> Exec {
    thread_local!(static PAUSES: Cell<u32> = const { Cell::new(0) });
    let n = PAUSES.get().wrapping_add(1);
    PAUSES.set(n);
    if n.is_multiple_of(PAUSES_TO_YIELD) {
        std::thread::yield_now();
    }
    Ok(())
}

/// Guest memory is coherent whatever the caches do; but the address must be good for a read.
fn flush_line(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.load_operand::<u8>(op).map(drop)
}

fn full_fence(_: &mut Cpu, _: &Op) -> Exec {
    fence(Ordering::SeqCst);
    Ok(())
}

fn random<W: Int>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mut bytes = [0_u8; 8];
    // SAFETY: the buffer is as long as said.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    let ok = got == bytes.len() as isize;
    let value = if ok { u64::from_le_bytes(bytes) } else { 0 };
    W::cut(value).set(cpu, op.reg);
    // CF says that there was a number; the other arithmetic flags are cleared.
    cpu.set_flags(if ok { 0x100 } else { 0 });
    Ok(())
}
