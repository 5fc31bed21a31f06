//! The XSAVE family (Intel SDM vol. 1, chapter 13): standard and compacted format, with the initial-configuration
//! optimisation. The modified optimisation is allowed, not demanded, and there is no supervisor state, so that
//! `xsaves` is `xsavec` for the supervisor.

use iced_x86::{Instruction, Mnemonic};
use terem_cpu::xstate::{AVX, HEADER_END, SSE, X87, XSAVE_SIZE, compacted_size, places, standard_size};

use super::Fpu;
use super::state::{HEADER, LEGACY_SIZE, XMM, double, quad, xmm_at};
use crate::cpu::{Cpu, Xmm, cr0, cr4};
use crate::fault::{Exec, Fault};
use crate::op::{Handler, Op};
use crate::sse::{MXCSR_DEFAULT, MXCSR_MASK};

/// Bit 63 of XCOMP_BV, the header's second field: the area has the compacted format.
const COMPACTED: u64 = 1 << 63;

/// What all of the family asks of the control registers.
fn enabled(cpu: &Cpu) -> Exec {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    if cpu.cr0 & cr0::TS != 0 {
        return Err(Fault::NM);
    }
    Ok(())
}

/// The components that EDX:EAX asks for, as far as they are enabled.
fn requested(cpu: &Cpu) -> u64 {
    (cpu.gpr[0] & 0xffff_ffff | cpu.gpr[2] << 32) & cpu.xcr0
}

/// The components in use (XINUSE) as all but the standard format counts them: MXCSR is SSE's.
fn in_use_with_mxcsr(cpu: &Cpu) -> u64 {
    cpu.in_use() | if cpu.guest_mxcsr() == MXCSR_DEFAULT { 0 } else { SSE }
}

/// `xsave`, `xsaveopt`.
const STANDARD: u8 = 0;
/// `xsaveopt`: components in their initial configuration are not written.
const OPTIMISED: u8 = 1;
/// `xsavec`: compacted.
const COMPACT: u8 = 2;
/// `xsaves`.
const SUPERVISOR: u8 = 3;

fn xsave<const WIDE: bool, const KIND: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    enabled(cpu)?;
    if KIND == SUPERVISOR {
        cpu.privileged()?;
    }
    let asked = requested(cpu);
    let compacted = KIND >= COMPACT;
    let in_use = if compacted { in_use_with_mxcsr(cpu) } else { cpu.in_use() };
    let written = if KIND == STANDARD { asked } else { asked & in_use };
    let at = cpu.aligned_area(op, HEADER_END as u64, 64, true)?;
    let (from, to) = extent(asked, compacted);
    cpu.check_writable(at.wrapping_add(from as u64), op.segment, (to - from) as u64)?;
    save_legacy::<WIDE>(cpu, op.segment, at, asked, written, compacted)?;
    for (c, offset) in places(asked, compacted).filter(|(c, _)| written & c.bit != 0) {
        let mut bytes = [0; XSAVE_SIZE - HEADER_END];
        cpu.save_component(c.bit, &mut bytes[..c.size]);
        let size = if c.bit == AVX { 16 * cpu.xmm_count() } else { c.size };
        cpu.store_bytes(at.wrapping_add(offset as u64), op.segment, &bytes[..size])?;
    }
    let header = at.wrapping_add(HEADER as u64);
    if compacted {
        cpu.store_in(header, written, op.segment)?;
        return cpu.store_in(header.wrapping_add(8), asked | COMPACTED, op.segment);
    }
    let before = cpu.load_in::<u64>(header, op.segment)?;
    cpu.store_in(header, before & !asked | in_use & asked, op.segment)
}

/// First byte and end of what must be there to be written, which is asked for whether it is in use or not.
fn extent(asked: u64, compacted: bool) -> (usize, usize) {
    // MXCSR of the standard format is AVX's as well.
    let legacy = if compacted { X87 | SSE } else { X87 | SSE | AVX };
    let from = if asked & legacy == 0 { HEADER } else { 0 };
    (from, if compacted { compacted_size(asked) } else { standard_size(asked) })
}

/// The legacy region. In the compacted format MXCSR is part of the SSE state, else of both SSE and AVX whether
/// they are written or not.
fn save_legacy<const WIDE: bool>(
    cpu: &mut Cpu,
    segment: u8,
    at: u64,
    asked: u64,
    written: u64,
    compacted: bool,
) -> Exec {
    let mut bytes = [0; LEGACY_SIZE];
    if written & X87 != 0 {
        cpu.fpu.save(&mut bytes, WIDE);
        cpu.store_bytes(at, segment, &bytes[..24])?;
        cpu.store_bytes(at.wrapping_add(32), segment, &bytes[32..XMM])?;
    }
    if if compacted { written & SSE != 0 } else { asked & (SSE | AVX) != 0 } {
        cpu.save_mxcsr(&mut bytes);
        cpu.store_bytes(at.wrapping_add(24), segment, &bytes[24..32])?;
    }
    if written & SSE != 0 {
        let count = cpu.xmm_count();
        cpu.save_xmm(&mut bytes, count);
        cpu.store_bytes(at.wrapping_add(XMM as u64), segment, &bytes[XMM..XMM + 16 * count])?;
    }
    Ok(())
}

/// `SYSTEM`: `xrstors`, which takes the compacted format only.
fn xrstor<const WIDE: bool, const SYSTEM: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    enabled(cpu)?;
    if SYSTEM {
        cpu.privileged()?;
    }
    let at = cpu.aligned_area(op, HEADER_END as u64, 64, false)?;
    let mut bytes = [0; XSAVE_SIZE];
    cpu.load_bytes(at, op.segment, &mut bytes[..HEADER_END])?;
    let asked = requested(cpu);
    let (present, layout) = (quad(&bytes, HEADER), quad(&bytes, HEADER + 8));
    let compacted = layout & COMPACTED != 0;
    let header_bad = if compacted {
        let can = SYSTEM || cpu.cpuid.model().features.has("xsavec");
        let reserved = bytes[HEADER + 16..HEADER_END].iter().any(|&b| b != 0);
        !can || reserved || layout & !COMPACTED & !cpu.xcr0 != 0 || present & !layout != 0
    } else {
        SYSTEM || present & !cpu.xcr0 != 0 || layout != 0 || quad(&bytes, HEADER + 16) != 0
    };
    let loads_mxcsr = if compacted { asked & present & SSE != 0 } else { asked & (SSE | AVX) != 0 };
    let mxcsr = if loads_mxcsr { double(&bytes, 24) } else { MXCSR_DEFAULT };
    if header_bad || mxcsr & !MXCSR_MASK != 0 {
        return Err(Fault::GP0);
    }
    // Everything is read before anything changes.
    let mut parts = [None; 2];
    let all = if compacted { layout & !COMPACTED } else { u64::MAX };
    for (part, (c, offset)) in parts.iter_mut().zip(places(all, compacted)) {
        if asked & present & c.bit != 0 {
            let to = &mut bytes[offset..offset + c.size];
            cpu.load_bytes(at.wrapping_add(offset as u64), op.segment, to)?;
        }
        *part = Some((c, offset));
    }
    if asked & X87 != 0 {
        cpu.fpu = Fpu::default();
        if present & X87 != 0 {
            cpu.fpu.restore(&bytes, WIDE);
        }
    }
    if loads_mxcsr || asked & SSE != 0 {
        cpu.set_mxcsr(mxcsr);
    }
    if asked & SSE != 0 {
        for i in 0..cpu.xmm_count() {
            cpu.ymm[i].low = Xmm(if present & SSE != 0 { xmm_at(&bytes, i) } else { 0 });
        }
    }
    for c in terem_cpu::xstate::COMPONENTS.iter().filter(|c| asked & c.bit != 0) {
        let place = parts.iter().flatten().find(|(p, _)| p == c && present & p.bit != 0);
        let count = cpu.xmm_count();
        cpu.restore_component(c.bit, place.map(|&(c, offset)| &bytes[offset..offset + c.size]), count);
    }
    Ok(())
}

/// XCR0, and with `xgetbv1` which of its components are in use.
fn xgetbv(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    let value = match cpu.gpr[1] as u32 {
        0 => cpu.xcr0,
        1 if cpu.cpuid.model().features.has("xgetbv1") => cpu.xcr0 & in_use_with_mxcsr(cpu),
        _ => return Err(Fault::GP0),
    };
    cpu.gpr[0] = value & 0xffff_ffff;
    cpu.gpr[2] = value >> 32;
    Ok(())
}

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Xsave => xsave::<false, STANDARD>,
        Mnemonic::Xsave64 => xsave::<true, STANDARD>,
        Mnemonic::Xsaveopt => xsave::<false, OPTIMISED>,
        Mnemonic::Xsaveopt64 => xsave::<true, OPTIMISED>,
        Mnemonic::Xsavec => xsave::<false, COMPACT>,
        Mnemonic::Xsavec64 => xsave::<true, COMPACT>,
        Mnemonic::Xsaves => xsave::<false, SUPERVISOR>,
        Mnemonic::Xsaves64 => xsave::<true, SUPERVISOR>,
        Mnemonic::Xrstor => xrstor::<false, false>,
        Mnemonic::Xrstor64 => xrstor::<true, false>,
        Mnemonic::Xrstors => xrstor::<false, true>,
        Mnemonic::Xrstors64 => xrstor::<true, true>,
        Mnemonic::Xgetbv => xgetbv,
        _ => return None,
    })
}
