//! FXSAVE areas (Intel SDM vol. 1, 10.5), and the XSAVE area that holds a saved vCPU's x87 and vector state.

use iced_x86::{Instruction, Mnemonic};
use terem_cpu::xstate::{AVX, HEADER_END, PKRU, SSE, X87, XSAVE_SIZE, places, standard_size};

use super::Fpu;
use crate::cpu::{Cpu, Xmm, Ymm, cr4};
use crate::fault::{Exec, Fault};
use crate::op::{Handler, Op};
use crate::sse::{MXCSR_DEFAULT, MXCSR_MASK};

/// Bytes of an FXSAVE area that have a meaning: x87, MXCSR and 16 XMM registers.
pub(super) const LEGACY_SIZE: usize = 416;
/// Where the XMM registers are.
pub(super) const XMM: usize = 160;
/// Where XSTATE_BV is: the header's first field.
pub(super) const HEADER: usize = 512;

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
    #[error("XSAVE area holds components {0:#x}, this CPU model has not all of them")]
    Components(u64),
}

pub(super) fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn double(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) | u32::from(word(bytes, at + 2)) << 16
}

pub(super) fn quad(bytes: &[u8], at: usize) -> u64 {
    u64::from(double(bytes, at)) | u64::from(double(bytes, at + 4)) << 32
}

pub(super) fn xmm_at(bytes: &[u8], n: usize) -> u128 {
    let at = XMM + 16 * n;
    u128::from(quad(bytes, at)) | u128::from(quad(bytes, at + 8)) << 64
}

impl Fpu {
    /// Fills the x87 part (bytes 0–23 and 32–159). `wide`: with 64-bit pointers.
    pub(super) fn save(&self, bytes: &mut [u8], wide: bool) {
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

    pub(super) fn restore(&mut self, bytes: &[u8], wide: bool) {
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
    pub(super) fn xmm_count(&self) -> usize {
        if self.code64() { 16 } else { 8 }
    }

    pub(super) fn save_mxcsr(&self, bytes: &mut [u8]) {
        bytes[24..28].copy_from_slice(&self.guest_mxcsr().to_le_bytes());
        bytes[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    }

    pub(super) fn save_xmm(&self, bytes: &mut [u8], count: usize) {
        for (i, value) in self.ymm.iter().enumerate().take(count) {
            bytes[XMM + 16 * i..XMM + 16 * (i + 1)].copy_from_slice(&value.low.0.to_le_bytes());
        }
    }

    /// The components that are not in their initial configuration (XINUSE).
    pub(super) fn in_use(&self) -> u64 {
        let registers = &self.ymm[..self.xmm_count()];
        let uppers = self.uppers && registers.iter().any(|v| v.high.0 != 0);
        let parts = [
            (X87, self.fpu != Fpu::default()),
            (SSE, registers.iter().any(|v| v.low.0 != 0)),
            (AVX, uppers),
            (PKRU, self.pkru != 0),
        ];
        parts.into_iter().filter(|p| p.1).fold(0, |all, p| all | p.0)
    }

    /// A component behind the header, as [`places`] has it.
    pub(super) fn save_component(&self, bit: u64, bytes: &mut [u8]) {
        match bit {
            AVX => {
                for (to, from) in bytes.as_chunks_mut::<16>().0.iter_mut().zip(&self.ymm) {
                    *to = from.high.0.to_le_bytes();
                }
            }
            _ => bytes.copy_from_slice(&u64::from(self.pkru).to_le_bytes()),
        }
    }

    /// Takes over the first `count` registers' part of such a component; `None`: its initial configuration.
    pub(super) fn restore_component(&mut self, bit: u64, bytes: Option<&[u8]>, count: usize) {
        match bit {
            AVX => {
                let mut chunks = bytes.unwrap_or_default().as_chunks::<16>().0.iter();
                for to in &mut self.ymm[..count] {
                    to.high = Xmm(chunks.next().map_or(0, |b| u128::from_le_bytes(*b)));
                }
                self.uppers = self.ymm.iter().any(|v| v.high.0 != 0);
            }
            _ => self.set_pkru(bytes.map_or(0, |b| double(b, 0))),
        }
    }

    /// x87 and vector state and PKRU as an XSAVE area in standard format, [`XSAVE_SIZE`] bytes.
    #[must_use]
    pub fn save_xsave(&self) -> Vec<u8> {
        let mut bytes = vec![0; XSAVE_SIZE];
        self.fpu.save(&mut bytes, true);
        self.save_mxcsr(&mut bytes);
        self.save_xmm(&mut bytes, 16);
        // Registers that the present mode does not have count as well.
        let uppers = if self.ymm.iter().any(|v| v.high.0 != 0) { AVX } else { 0 };
        let present = X87 | SSE | uppers | self.in_use() & PKRU;
        for (c, at) in places(present, false) {
            self.save_component(c.bit, &mut bytes[at..at + c.size]);
        }
        bytes[HEADER..HEADER + 8].copy_from_slice(&present.to_le_bytes());
        bytes
    }

    /// Takes over what [`Self::save_xsave`] gave, or another accelerator of the same CPU model.
    ///
    /// # Errors
    /// [`AreaError`]; nothing has changed then.
    pub fn load_xsave(&mut self, bytes: &[u8]) -> Result<(), AreaError> {
        if bytes.len() < HEADER_END {
            return Err(AreaError::Size(bytes.len()));
        }
        let mxcsr = double(bytes, 24);
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(AreaError::Mxcsr(mxcsr));
        }
        let present = quad(bytes, HEADER);
        let known = terem_cpu::xstate::components(&self.cpuid.model().features) | X87 | SSE;
        // Older versions said of the upper halves that they are there, and zero.
        let zero = |from: usize| bytes[from..].iter().all(|&b| b == 0);
        if present & !(known | AVX) != 0 || (present & !known != 0 && !zero(HEADER_END)) {
            return Err(AreaError::Components(present));
        }
        if bytes.len() < standard_size(present & known) {
            return Err(AreaError::Size(bytes.len()));
        }
        self.fpu = Fpu::default();
        self.ymm = [Ymm::default(); 16];
        self.set_mxcsr(MXCSR_DEFAULT);
        if present & X87 != 0 {
            self.fpu.restore(bytes, true);
        }
        if present & (SSE | AVX) != 0 {
            self.set_mxcsr(mxcsr);
        }
        if present & SSE != 0 {
            for (i, to) in self.ymm.iter_mut().enumerate() {
                to.low.0 = xmm_at(bytes, i);
            }
        }
        for (c, at) in places(AVX | PKRU, false) {
            let part = (present & known & c.bit != 0).then(|| &bytes[at..at + c.size]);
            self.restore_component(c.bit, part, 16);
        }
        Ok(())
    }
}

/// Bytes of the state that programs that run directly share with the host: legacy region, header, upper halves of YMM.
pub(crate) const SHARED_SIZE: usize = HEADER_END + 256;

impl Cpu {
    /// x87 and vector registers in the standard format.
    pub(crate) fn save_shared(&self, bytes: &mut [u8; SHARED_SIZE]) {
        bytes.fill(0);
        self.fpu.save(bytes, true);
        self.save_mxcsr(bytes);
        self.save_xmm(bytes, 16);
        let mut present = X87 | SSE;
        if self.uppers {
            present |= AVX;
            self.save_component(AVX, &mut bytes[HEADER_END..]);
        }
        bytes[HEADER..HEADER + 8].copy_from_slice(&present.to_le_bytes());
    }

    /// Takes over what a host gives, which is all there whatever the header says. `before`: what it was given.
    pub(crate) fn load_shared(&mut self, bytes: &[u8; SHARED_SIZE], before: &[u8; SHARED_SIZE]) {
        if bytes[..24] != before[..24] || bytes[32..XMM] != before[32..XMM] {
            self.fpu.restore(bytes, true);
        }
        self.set_mxcsr(double(bytes, 24));
        for (i, to) in self.ymm.iter_mut().enumerate() {
            to.low.0 = xmm_at(bytes, i);
        }
        // A program may have used what its model does not have.
        let has = self.cr4 & cr4::OSXSAVE != 0 && self.xcr0 & AVX != 0;
        if has && (self.uppers || bytes[HEADER_END..].iter().any(|&b| b != 0)) {
            self.restore_component(AVX, Some(&bytes[HEADER_END..]), 16);
        }
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
        cpu.ymm[i].low = Xmm(xmm_at(&bytes, i));
    }
    Ok(())
}

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Fxsave => fxsave::<false>,
        Mnemonic::Fxsave64 => fxsave::<true>,
        Mnemonic::Fxrstor => fxrstor::<false>,
        Mnemonic::Fxrstor64 => fxrstor::<true>,
        _ => return None,
    })
}
