//! FXSAVE and XSAVE areas (Intel SDM vol. 1, 10.5 and chapter 13): x87 and SSE state, standard format.

use iced_x86::{Instruction, Mnemonic};
use terem_cpu::XSAVE_SIZE;

use super::Fpu;
use crate::cpu::{Cpu, Xmm, cr0, cr4};
use crate::fault::{Exec, Fault};
use crate::op::{Handler, Op};
use crate::sse::{MXCSR_DEFAULT, MXCSR_MASK};

/// Bytes of an FXSAVE area that have a meaning: x87, MXCSR and 16 XMM registers.
const LEGACY_SIZE: usize = 416;
/// Where the XMM registers are.
const XMM: usize = 160;
/// Where XSTATE_BV is: the header's first field.
const HEADER: usize = 512;

/// XSAVE component: x87.
const X87: u64 = 1;
/// XSAVE component: XMM registers.
const SSE: u64 = 2;
/// XSAVE component: the upper halves of YMM registers, which shares MXCSR with [`SSE`].
const AVX: u64 = 4;

/// Why a saved area cannot be loaded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AreaError {
    /// It is too short.
    #[error("XSAVE area of {0} bytes, expected {XSAVE_SIZE}")]
    Size(usize),
    /// MXCSR has bits that do not exist.
    #[error("reserved bits in MXCSR {0:#x} of the XSAVE area")]
    Mxcsr(u32),
    /// It has state that this CPU has not.
    #[error("XSAVE area holds components {0:#x}, this CPU has x87 and SSE")]
    Components(u64),
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn double(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) | u32::from(word(bytes, at + 2)) << 16
}

fn quad(bytes: &[u8], at: usize) -> u64 {
    u64::from(double(bytes, at)) | u64::from(double(bytes, at + 4)) << 32
}

fn xmm_at(bytes: &[u8], n: usize) -> u128 {
    let at = XMM + 16 * n;
    u128::from(quad(bytes, at)) | u128::from(quad(bytes, at + 8)) << 64
}

impl Fpu {
    /// Fills the x87 part (bytes 0–23 and 32–159). `wide`: with 64-bit pointers.
    fn save(&self, bytes: &mut [u8], wide: bool) {
        bytes[0..2].copy_from_slice(&self.control.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.status_word().to_le_bytes());
        bytes[4] = self.valid;
        bytes[6..8].copy_from_slice(&self.opcode.to_le_bytes());
        for (at, (offset, selector)) in [(8, self.instruction), (16, self.data)] {
            let value = if wide { offset } else { offset & 0xffff_ffff | u64::from(selector) << 32 };
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        for i in 0..8 {
            let at = 32 + 16 * usize::from(i);
            bytes[at..at + 16].copy_from_slice(&self.st(i).to_le_bytes());
        }
    }

    fn restore(&mut self, bytes: &[u8], wide: bool) {
        self.set_control(word(bytes, 0));
        self.status = word(bytes, 2) & !super::SUMMARY;
        self.valid = bytes[4];
        self.opcode = word(bytes, 6) & 0x7ff;
        let pointer = |at: usize| {
            if wide { (quad(bytes, at), 0) } else { (double(bytes, at).into(), word(bytes, at + 4)) }
        };
        (self.instruction, self.data) = (pointer(8), pointer(16));
        for i in 0..8 {
            let at = 32 + 16 * usize::from(i);
            self.set_st(i, u128::from(quad(bytes, at)) | u128::from(word(bytes, at + 8)) << 64);
        }
    }
}

impl Cpu {
    /// XMM registers that the present mode has.
    fn xmm_count(&self) -> usize {
        if self.code64() { 16 } else { 8 }
    }

    fn save_mxcsr(&self, bytes: &mut [u8]) {
        bytes[24..28].copy_from_slice(&self.guest_mxcsr().to_le_bytes());
        bytes[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    }

    fn save_xmm(&self, bytes: &mut [u8], count: usize) {
        for (i, value) in self.xmm.iter().enumerate().take(count) {
            bytes[XMM + 16 * i..XMM + 16 * (i + 1)].copy_from_slice(&value.0.to_le_bytes());
        }
    }

    /// The components that are not in their initial configuration.
    fn in_use(&self) -> u64 {
        let fpu = if self.fpu == Fpu::default() { 0 } else { X87 };
        let sse = if self.xmm.iter().take(self.xmm_count()).all(|v| v.0 == 0) { 0 } else { SSE };
        fpu | sse
    }

    /// x87 and SSE state as an XSAVE area in standard format, [`XSAVE_SIZE`] bytes, AVX state initial.
    #[must_use]
    pub fn save_xsave(&self) -> Vec<u8> {
        let mut bytes = vec![0; XSAVE_SIZE];
        self.fpu.save(&mut bytes, true);
        self.save_mxcsr(&mut bytes);
        self.save_xmm(&mut bytes, 16);
        bytes[HEADER..HEADER + 8].copy_from_slice(&(X87 | SSE).to_le_bytes());
        bytes
    }

    /// Takes over what [`Self::save_xsave`] gave, or another accelerator of the same CPU model.
    ///
    /// # Errors
    /// [`AreaError`]; nothing has changed then.
    pub fn load_xsave(&mut self, bytes: &[u8]) -> Result<(), AreaError> {
        if bytes.len() < HEADER + 64 {
            return Err(AreaError::Size(bytes.len()));
        }
        let mxcsr = double(bytes, 24);
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(AreaError::Mxcsr(mxcsr));
        }
        let present = quad(bytes, HEADER);
        let avx_is_zero = bytes[HEADER + 64..].iter().all(|&b| b == 0);
        if present & !(X87 | SSE | AVX) != 0 || (present & AVX != 0 && !avx_is_zero) {
            return Err(AreaError::Components(present));
        }
        self.fpu = Fpu::default();
        self.xmm = [Xmm::default(); 16];
        self.set_mxcsr(MXCSR_DEFAULT);
        if present & X87 != 0 {
            self.fpu.restore(bytes, true);
        }
        if present & (SSE | AVX) != 0 {
            self.set_mxcsr(mxcsr);
        }
        if present & SSE != 0 {
            for (i, to) in self.xmm.iter_mut().enumerate() {
                to.0 = xmm_at(bytes, i);
            }
        }
        Ok(())
    }
}

fn fxsave<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = cpu.aligned_area(op, HEADER as u64, 16, true)?;
    let mut bytes = [0; LEGACY_SIZE];
    cpu.fpu.save(&mut bytes, WIDE);
    cpu.save_mxcsr(&mut bytes);
    let count = cpu.xmm_count();
    cpu.save_xmm(&mut bytes, count);
    cpu.check_writable(at, op.segment, HEADER as u64)?;
    cpu.store_bytes(at, op.segment, &bytes[..XMM + 16 * count])
}

fn fxrstor<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    let at = cpu.aligned_area(op, HEADER as u64, 16, false)?;
    let mut bytes = [0; HEADER];
    cpu.load_bytes(at, op.segment, &mut bytes)?;
    let mxcsr = double(&bytes, 24);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(Fault::GP0);
    }
    cpu.fpu.restore(&bytes, WIDE);
    cpu.set_mxcsr(mxcsr);
    for i in 0..cpu.xmm_count() {
        cpu.xmm[i] = Xmm(xmm_at(&bytes, i));
    }
    Ok(())
}

/// What all of the XSAVE family asks of the control registers.
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

/// `OPTIMISED`: components in their initial configuration are not written (`xsaveopt`).
fn xsave<const WIDE: bool, const OPTIMISED: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    enabled(cpu)?;
    let size = HEADER as u64 + 64;
    let at = cpu.aligned_area(op, size, 64, true)?;
    cpu.check_writable(at, op.segment, size)?;
    let asked = requested(cpu);
    let in_use = cpu.in_use();
    let written = if OPTIMISED { asked & in_use } else { asked };
    let mut bytes = [0; LEGACY_SIZE];
    if written & X87 != 0 {
        cpu.fpu.save(&mut bytes, WIDE);
        cpu.store_bytes(at, op.segment, &bytes[..24])?;
        cpu.store_bytes(at.wrapping_add(32), op.segment, &bytes[32..XMM])?;
    }
    if asked & (SSE | AVX) != 0 {
        cpu.save_mxcsr(&mut bytes);
        cpu.store_bytes(at.wrapping_add(24), op.segment, &bytes[24..32])?;
    }
    if written & SSE != 0 {
        let count = cpu.xmm_count();
        cpu.save_xmm(&mut bytes, count);
        cpu.store_bytes(at.wrapping_add(XMM as u64), op.segment, &bytes[XMM..XMM + 16 * count])?;
    }
    let header = at.wrapping_add(HEADER as u64);
    let before = cpu.load_in::<u64>(header, op.segment)?;
    cpu.store_in(header, before & !asked | in_use & asked, op.segment)
}

fn xrstor<const WIDE: bool>(cpu: &mut Cpu, op: &Op) -> Exec {
    enabled(cpu)?;
    let size = HEADER as u64 + 64;
    let at = cpu.aligned_area(op, size, 64, false)?;
    let mut bytes = [0; HEADER + 64];
    cpu.load_bytes(at, op.segment, &mut bytes)?;
    let asked = requested(cpu);
    let present = quad(&bytes, HEADER);
    let mxcsr = double(&bytes, 24);
    let loads_mxcsr = asked & (SSE | AVX) != 0;
    if present & !cpu.xcr0 != 0
        || bytes[HEADER + 8..HEADER + 24].iter().any(|&b| b != 0)
        || (loads_mxcsr && mxcsr & !MXCSR_MASK != 0)
    {
        return Err(Fault::GP0);
    }
    if asked & X87 != 0 {
        if present & X87 != 0 {
            cpu.fpu.restore(&bytes, WIDE);
        } else {
            cpu.fpu = Fpu::default();
        }
    }
    if loads_mxcsr {
        cpu.set_mxcsr(mxcsr);
    }
    if asked & SSE != 0 {
        for i in 0..cpu.xmm_count() {
            cpu.xmm[i] = Xmm(if present & SSE != 0 { xmm_at(&bytes, i) } else { 0 });
        }
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
        1 if cpu.cpuid.model().features.has("xgetbv1") => cpu.xcr0 & cpu.in_use(),
        _ => return Err(Fault::GP0),
    };
    cpu.gpr[0] = value & 0xffff_ffff;
    cpu.gpr[2] = value >> 32;
    Ok(())
}

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Fxsave => fxsave::<false>,
        Mnemonic::Fxsave64 => fxsave::<true>,
        Mnemonic::Fxrstor => fxrstor::<false>,
        Mnemonic::Fxrstor64 => fxrstor::<true>,
        Mnemonic::Xsave => xsave::<false, false>,
        Mnemonic::Xsave64 => xsave::<true, false>,
        Mnemonic::Xsaveopt => xsave::<false, true>,
        Mnemonic::Xsaveopt64 => xsave::<true, true>,
        Mnemonic::Xrstor => xrstor::<false>,
        Mnemonic::Xrstor64 => xrstor::<true>,
        Mnemonic::Xgetbv => xgetbv,
        _ => return None,
    })
}
