//! Moves that access only the elements that a mask asks for, and instructions on all registers or on MXCSR.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::cpu::{Cpu, Xmm, Ymm};
use crate::fault::Exec;
use crate::mmu::Access;
use crate::op::{ADDR16, ADDR32, Handler, NO_REG, Op};
use crate::sse;

pub(super) fn handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    let wide = insn.op_count() > 0 && (0..insn.op_count()).any(|n| insn.op_register(n).is_ymm());
    if insn.is_vsib() {
        return gather_handler(insn, op);
    }
    let bytes = if wide { 32 } else { 16 };
    let store = insn.op_count() > 0 && insn.op0_kind() == OpKind::Memory;
    Some(match insn.mnemonic() {
        Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd => {
            op.extra = bytes / 4;
            if store { masked_store::<4> } else { masked_load::<4> }
        }
        Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq => {
            op.extra = bytes / 8;
            if store { masked_store::<8> } else { masked_load::<8> }
        }
        Mnemonic::Vmaskmovdqu => sse::masked_store,
        Mnemonic::Vldmxcsr => sse::ldmxcsr,
        Mnemonic::Vstmxcsr => sse::stmxcsr,
        Mnemonic::Vzeroall => zero_all,
        Mnemonic::Vzeroupper => zero_upper,
        _ => return None,
    })
}

/// Registers that the present mode has.
fn registers(cpu: &mut Cpu) -> &mut [Ymm] {
    let count = if cpu.code64() { 16 } else { 8 };
    &mut cpu.ymm[..count]
}

fn zero_all(cpu: &mut Cpu, _: &Op) -> Exec {
    registers(cpu).fill(Ymm::default());
    Ok(())
}

fn zero_upper(cpu: &mut Cpu, _: &Op) -> Exec {
    registers(cpu).iter_mut().for_each(|r| r.high = Xmm::default());
    cpu.uppers = cpu.ymm.iter().any(|r| r.high.0 != 0);
    Ok(())
}

/// Elements of a register, `E` bytes each.
#[derive(Clone, Copy)]
struct Elements<const E: usize>([u8; 32]);

impl<const E: usize> Elements<E> {
    fn of(ymm: Ymm) -> Self {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&ymm.low.0.to_le_bytes());
        bytes[16..].copy_from_slice(&ymm.high.0.to_le_bytes());
        Self(bytes)
    }

    fn ymm(self) -> Ymm {
        let [low, high] = [&self.0[..16], &self.0[16..]]
            .map(|half| Xmm(half.iter().rev().fold(0, |n, b| n << 8 | u128::from(*b))));
        Ymm { low, high }
    }

    /// Element `n`, sign-extended.
    fn get(&self, n: usize) -> u64 {
        let bytes = &self.0[n * E..(n + 1) * E];
        let value = bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
        if E == 4 { value as u32 as i32 as u64 } else { value }
    }

    fn set(&mut self, n: usize, value: u64) {
        self.0[n * E..(n + 1) * E].copy_from_slice(&value.to_le_bytes()[..E]);
    }

    /// Whether element `n`, of a mask, has its top bit set.
    fn wants(&self, n: usize) -> bool {
        self.0[n * E + E - 1] & 0x80 != 0
    }

    /// The first `count` elements, zeros above.
    fn cut(mut self, count: usize) -> Self {
        self.0[count * E..].fill(0);
        self
    }
}

impl Cpu {
    fn load_element<const E: usize>(&mut self, op: &Op, offset: u64) -> Exec<u64> {
        let at = self.linear(op, offset, E as u64, false)?;
        if E == 4 { Ok(self.load_in::<u32>(at, op.segment)?.into()) } else { self.load_in(at, op.segment) }
    }

    /// An offset cut to the address size.
    fn cut_offset(op: &Op, offset: u64) -> u64 {
        match op.flags & (ADDR16 | ADDR32) {
            0 => offset,
            ADDR32 => offset & 0xffff_ffff,
            _ => offset & 0xffff,
        }
    }
}

/// Destination [`Op::reg`], mask [`Op::rm`], [`Op::extra`] elements.
fn masked_load<const E: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mask = Elements::<E>::of(cpu.ymm[usize::from(op.rm)]);
    let mut result = Elements::<E>([0; 32]);
    for n in (0..usize::from(op.extra)).filter(|&n| mask.wants(n)) {
        let offset = Cpu::cut_offset(op, cpu.offset(op).wrapping_add((n * E) as u64));
        result.set(n, cpu.load_element::<E>(op, offset)?);
    }
    cpu.set_ymm(op.reg, result.ymm());
    Ok(())
}

/// Mask [`Op::reg`], source [`Op::rm`], [`Op::extra`] elements. All are checked before the first is written.
fn masked_store<const E: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    let mask = Elements::<E>::of(cpu.ymm[usize::from(op.reg)]);
    let source = Elements::<E>::of(cpu.ymm[usize::from(op.rm)]);
    let mut places = [None; 8];
    for n in (0..usize::from(op.extra)).filter(|&n| mask.wants(n)) {
        let offset = Cpu::cut_offset(op, cpu.offset(op).wrapping_add((n * E) as u64));
        let at = cpu.linear(op, offset, E as u64, true)?;
        cpu.canonical(at, E as u64, op.segment)?;
        cpu.translate(cpu.wrap(at), Access::Write)?;
        cpu.translate(cpu.wrap(at.wrapping_add(E as u64 - 1)), Access::Write)?;
        places[n] = Some(at);
    }
    for (n, at) in places.into_iter().enumerate().filter_map(|(n, at)| at.map(|at| (n, at))) {
        if E == 4 {
            cpu.store_in(at, source.get(n) as u32, op.segment)?;
        } else {
            cpu.store_in(at, source.get(n), op.segment)?;
        }
    }
    Ok(())
}

/// Destination [`Op::reg`], mask [`Op::rm`], indices [`Op::index`], [`Op::extra`] elements.
fn gather_handler(insn: &Instruction, op: &mut Op) -> Option<Handler> {
    use Mnemonic as M;
    let (run, index, element): (Handler, u16, u16) = match insn.mnemonic() {
        M::Vpgatherdd | M::Vgatherdps => (gather::<4, 4>, 4, 4),
        M::Vpgatherdq | M::Vgatherdpd => (gather::<4, 8>, 4, 8),
        M::Vpgatherqd | M::Vgatherqps => (gather::<8, 4>, 8, 4),
        M::Vpgatherqq | M::Vgatherqpd => (gather::<8, 8>, 8, 8),
        _ => return None,
    };
    let wide = insn.op0_register().is_ymm() || insn.memory_index().is_ymm();
    op.extra = if wide { 32 } else { 16 } / index.max(element);
    op.index = insn.memory_index().number() as u8;
    // Without a base the size of addresses shows in the displacement's.
    if op.base == NO_REG && insn.memory_displ_size() != 8 {
        op.flags |= ADDR32;
    }
    Some(run)
}

/// `I` bytes an index, `E` an element. A fault leaves what was gathered before it, with those elements' mask cleared, so
/// that the instruction can go on (Intel SDM vol. 2, VPGATHERDD); the rest of the mask is all ones or zeros then, in all
/// of VEX.L's width, as on Intel's processors.
fn gather<const I: usize, const E: usize>(cpu: &mut Cpu, op: &Op) -> Exec {
    let count = usize::from(op.extra);
    let indices = Elements::<I>::of(cpu.ymm[usize::from(op.index)]);
    let mut result = Elements::<E>::of(cpu.ymm[usize::from(op.reg)]);
    let mut mask = Elements::<E>::of(cpu.ymm[usize::from(op.rm)]);
    let base = cpu.slot(op.base).wrapping_add(op.disp);
    for n in 0..count {
        if mask.wants(n) {
            let offset = Cpu::cut_offset(op, base.wrapping_add(indices.get(n) << op.shift));
            match cpu.load_element::<E>(op, offset) {
                Ok(value) => result.set(n, value),
                Err(fault) => {
                    let all = count * I.max(E) / E;
                    (n..all).for_each(|n| mask.set(n, if mask.wants(n) { u64::MAX } else { 0 }));
                    cpu.set_ymm(op.reg, result.cut(all).ymm());
                    cpu.set_ymm(op.rm, mask.cut(all).ymm());
                    return Err(fault);
                }
            }
        }
        mask.set(n, 0);
    }
    cpu.set_ymm(op.reg, result.cut(count).ymm());
    cpu.set_ymm(op.rm, Ymm::default());
    Ok(())
}
