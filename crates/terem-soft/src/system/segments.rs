//! Segment registers, LDTR and TR, and instructions that look at descriptors.

use iced_x86::{Instruction, Mnemonic, OpKind};
use terem_cpu::{Segment, VcpuState};

use crate::cpu::{Cpu, cr4};
use crate::decode::{CodeSize, Mode, gpr_number, segment_number};
use crate::fault::{Exec, Fault, vector};
use crate::op::{Handler, Op};
use crate::segment::null;

/// ZF in `lahf` layout.
const ZF: u8 = 0x40;

pub(super) fn handler(insn: &Instruction, mode: Mode, op: &mut Op) -> Option<Handler> {
    let register = |i: u32| insn.op_kind(i) == OpKind::Register;
    let is_segment = |i: u32| insn.op_count() > i && register(i) && insn.op_register(i).is_segment_register();
    // `extra` is the general operand's size in bytes, 0 for memory.
    let size_of = |i: u32| if register(i) { insn.op_register(i).size() as u16 } else { 0 };
    Some(match insn.mnemonic() {
        Mnemonic::Mov if is_segment(0) => {
            op.reg = segment_number(insn.op0_register());
            if op.reg == VcpuState::CS as u8 {
                return None;
            }
            op.rm = if register(1) { gpr_number(insn.op1_register()) } else { 0 };
            op.extra = size_of(1);
            mov_to_segment
        }
        Mnemonic::Mov if is_segment(1) => {
            op.reg = segment_number(insn.op1_register());
            op.rm = if register(0) { gpr_number(insn.op0_register()) } else { 0 };
            op.extra = size_of(0);
            mov_from_segment
        }
        Mnemonic::Push if is_segment(0) => {
            op.reg = segment_number(insn.op0_register());
            op.extra = stack_size(insn, mode);
            push_segment
        }
        Mnemonic::Pop if is_segment(0) => {
            op.reg = segment_number(insn.op0_register());
            op.extra = stack_size(insn, mode);
            pop_segment
        }
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => {
            op.extra = insn.op0_register().size() as u16;
            op.reg = gpr_number(insn.op0_register());
            op.rm = match insn.mnemonic() {
                Mnemonic::Les => 0,
                Mnemonic::Lss => 2,
                Mnemonic::Lds => 3,
                Mnemonic::Lfs => 4,
                _ => 5,
            };
            load_far_pointer
        }
        Mnemonic::Lldt | Mnemonic::Ltr | Mnemonic::Verr | Mnemonic::Verw => {
            op.rm = if register(0) { gpr_number(insn.op0_register()) } else { 0 };
            op.extra = size_of(0);
            match insn.mnemonic() {
                Mnemonic::Lldt => lldt,
                Mnemonic::Ltr => ltr,
                Mnemonic::Verr => verr,
                _ => verw,
            }
        }
        Mnemonic::Sldt | Mnemonic::Str => {
            op.rm = if register(0) { gpr_number(insn.op0_register()) } else { 0 };
            op.extra = size_of(0);
            if insn.mnemonic() == Mnemonic::Sldt { sldt } else { str_ }
        }
        Mnemonic::Lar | Mnemonic::Lsl => {
            op.reg = gpr_number(insn.op0_register());
            op.rm = if register(1) { gpr_number(insn.op1_register()) } else { 0 };
            op.extra = size_of(1);
            op.imm = insn.op0_register().size() as u64;
            if insn.mnemonic() == Mnemonic::Lar { lar } else { lsl }
        }
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            op.rm = gpr_number(insn.op0_register());
            op.extra = size_of(0);
            match insn.mnemonic() {
                Mnemonic::Rdfsbase => rdfsbase,
                Mnemonic::Rdgsbase => rdgsbase,
                Mnemonic::Wrfsbase => wrfsbase,
                _ => wrgsbase,
            }
        }
        Mnemonic::Swapgs => swapgs,
        _ => return None,
    })
}

/// Bytes that a push or pop of a segment register moves.
fn stack_size(insn: &Instruction, mode: Mode) -> u16 {
    match insn.stack_pointer_increment().unsigned_abs() {
        0 if mode.code == CodeSize::Code64 => 8,
        0 => 4,
        n => n as u16,
    }
}

/// The 16-bit source operand in a register or in memory.
fn source(cpu: &mut Cpu, op: &Op) -> Exec<u16> {
    if op.extra == 0 { cpu.load_operand(op) } else { Ok(cpu.gpr[usize::from(op.rm)] as u16) }
}

fn mov_to_segment(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = source(cpu, op)?;
    cpu.load_segment(usize::from(op.reg), selector)?;
    if usize::from(op.reg) == VcpuState::SS {
        cpu.cast_stack_shadow();
    }
    Ok(())
}

fn destination(cpu: &mut Cpu, op: &Op, value: u16) -> Exec {
    if op.extra == 0 {
        return cpu.store_operand(op, value);
    }
    cpu.set_gpr(op.rm, u64::from(op.extra), u64::from(value));
    Ok(())
}

fn mov_from_segment(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = cpu.segments[usize::from(op.reg)].selector;
    destination(cpu, op, selector)
}

fn push_segment(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = u64::from(cpu.segments[usize::from(op.reg)].selector);
    cpu.stack_push(op, u64::from(op.extra), &[selector])
}

fn pop_segment(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = cpu.stack_load(op, 0, u64::from(op.extra))? as u16;
    cpu.load_segment(usize::from(op.reg), selector)?;
    cpu.stack_release(op, u64::from(op.extra));
    if usize::from(op.reg) == VcpuState::SS {
        cpu.cast_stack_shadow();
    }
    Ok(())
}

fn load_far_pointer(cpu: &mut Cpu, op: &Op) -> Exec {
    let size = u64::from(op.extra);
    let at = cpu.operand_address(op, size + 2, false)?;
    let offset = match size {
        2 => u64::from(cpu.load::<u16>(at)?),
        4 => u64::from(cpu.load::<u32>(at)?),
        _ => cpu.load::<u64>(at)?,
    };
    let selector: u16 = cpu.load(cpu.wrap(at.wrapping_add(size)))?;
    cpu.load_segment(usize::from(op.rm), selector)?;
    cpu.set_gpr(op.reg, size, offset);
    Ok(())
}

impl Cpu {
    /// After a load of SS neither interrupts nor debug exceptions come before the next instruction is done, so that
    /// it may load ESP (SDM vol. 3, "Masking exceptions and interrupts when switching stacks").
    fn cast_stack_shadow(&mut self) {
        self.interrupt_shadow = true;
        self.shadow_of_stack = true;
    }

    /// The descriptor of LDTR or TR: 16 bytes in long mode.
    fn system_segment(&mut self, selector: u16, types: &[u8]) -> Exec<Segment> {
        let bad = Fault::with_code(vector::GP, u32::from(selector & !3));
        if selector & 4 != 0 {
            return Err(bad);
        }
        let d = self.descriptor(selector, 0)?;
        if !d.system_type().is_some_and(|t| types.contains(&t)) {
            return Err(bad);
        }
        if !d.present() {
            return Err(Fault::with_code(vector::NP, u32::from(selector & !3)));
        }
        let mut s = d.segment(selector);
        if self.long_mode() {
            let at = self.descriptor_half(u64::from(selector & !7) + 8, selector).ok_or(bad)?;
            s.base |= self.load_system::<u64>(at)? << 32;
        }
        Ok(s)
    }
}

fn lldt(cpu: &mut Cpu, op: &Op) -> Exec {
    if !cpu.protected() {
        return Err(Fault::UD);
    }
    cpu.privileged()?;
    let selector = source(cpu, op)?;
    cpu.ldtr = if null(selector) {
        Segment { selector, access: Segment::UNUSABLE, ..Segment::default() }
    } else {
        cpu.system_segment(selector, &[2])?
    };
    Ok(())
}

fn ltr(cpu: &mut Cpu, op: &Op) -> Exec {
    if !cpu.protected() {
        return Err(Fault::UD);
    }
    cpu.privileged()?;
    let selector = source(cpu, op)?;
    if null(selector) {
        return Err(Fault::GP0);
    }
    let types: &[u8] = if cpu.long_mode() { &[9] } else { &[1, 9] };
    let mut s = cpu.system_segment(selector, types)?;
    // Mark it busy, in memory and here.
    let at = cpu.gdtr.base.wrapping_add(u64::from(selector & !7) + 5);
    s.access |= 2;
    cpu.store_system(at, s.access as u8)?;
    cpu.tr = s;
    Ok(())
}

fn sldt(cpu: &mut Cpu, op: &Op) -> Exec {
    if !cpu.protected() {
        return Err(Fault::UD);
    }
    cpu.not_under_umip()?;
    destination(cpu, op, cpu.ldtr.selector)
}

fn str_(cpu: &mut Cpu, op: &Op) -> Exec {
    if !cpu.protected() {
        return Err(Fault::UD);
    }
    cpu.not_under_umip()?;
    destination(cpu, op, cpu.tr.selector)
}

/// The descriptor that `lar`, `lsl`, `verr` and `verw` may see, or `None`.
fn visible(cpu: &mut Cpu, selector: u16) -> Exec<Option<Segment>> {
    if null(selector) {
        return Ok(None);
    }
    let d = match cpu.descriptor(selector, 0) {
        Ok(d) => d,
        Err(f) if f.vector == vector::GP => return Ok(None),
        Err(f) => return Err(f),
    };
    let s = d.segment(selector);
    let conforming = d.is_code() && s.access & Segment::DOWN != 0;
    let rpl = (selector & 3) as u8;
    let reachable = conforming || (cpu.cpl <= s.dpl() && rpl <= s.dpl());
    // The accessed bit is shown as it is in memory.
    Ok(reachable.then_some(Segment { access: d.access(), ..s }))
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    cpu.ah = if on { cpu.ah | ZF } else { cpu.ah & !ZF };
}

fn lar(cpu: &mut Cpu, op: &Op) -> Exec {
    if !cpu.protected() {
        return Err(Fault::UD);
    }
    let selector = source(cpu, op)?;
    let known: &[u8] = if cpu.long_mode() { &[2, 9, 11, 12] } else { &[1, 2, 3, 4, 5, 9, 11, 12] };
    let s = visible(cpu, selector)?
        .filter(|s| s.access & Segment::CODE_OR_DATA != 0 || known.contains(&s.kind()));
    if let Some(s) = s {
        let limit_bits = s.access & 0xf000;
        let value = u64::from((s.access & 0xff) << 8 | limit_bits << 8 | limit_19_16(&s) << 16);
        cpu.set_gpr(op.reg, op.imm, value);
    }
    set_zf(cpu, s.is_some());
    Ok(())
}

/// Bits 19:16 of the raw limit, which `lar` shows as well.
fn limit_19_16(s: &Segment) -> u32 {
    let raw = if s.access & Segment::PAGES != 0 { s.limit >> 12 } else { s.limit };
    raw >> 16 & 15
}

fn lsl(cpu: &mut Cpu, op: &Op) -> Exec {
    if !cpu.protected() {
        return Err(Fault::UD);
    }
    let selector = source(cpu, op)?;
    let known: &[u8] = if cpu.long_mode() { &[2, 9, 11] } else { &[1, 2, 3, 9, 11] };
    let s = visible(cpu, selector)?
        .filter(|s| s.access & Segment::CODE_OR_DATA != 0 || known.contains(&s.kind()));
    if let Some(s) = s {
        cpu.set_gpr(op.reg, op.imm, u64::from(s.limit));
    }
    set_zf(cpu, s.is_some());
    Ok(())
}

fn verr(cpu: &mut Cpu, op: &Op) -> Exec {
    verify(cpu, op, |s| s.access & Segment::CODE == 0 || s.access & Segment::WRITABLE != 0)
}

fn verw(cpu: &mut Cpu, op: &Op) -> Exec {
    verify(cpu, op, |s| s.access & Segment::CODE == 0 && s.access & Segment::WRITABLE != 0)
}

fn verify(cpu: &mut Cpu, op: &Op, allowed: fn(&Segment) -> bool) -> Exec {
    if !cpu.protected() {
        return Err(Fault::UD);
    }
    let selector = source(cpu, op)?;
    let s = visible(cpu, selector)?;
    set_zf(cpu, s.is_some_and(|s| s.access & Segment::CODE_OR_DATA != 0 && allowed(&s)));
    Ok(())
}

fn base_instructions(cpu: &Cpu) -> Exec {
    if cpu.cr4 & cr4::FSGSBASE == 0 { Err(Fault::UD) } else { Ok(()) }
}

fn read_base(cpu: &mut Cpu, op: &Op, index: usize) -> Exec {
    base_instructions(cpu)?;
    let base = cpu.segments[index].base;
    cpu.set_gpr(op.rm, u64::from(op.extra), base);
    Ok(())
}

fn rdfsbase(cpu: &mut Cpu, op: &Op) -> Exec {
    read_base(cpu, op, VcpuState::FS)
}

fn rdgsbase(cpu: &mut Cpu, op: &Op) -> Exec {
    read_base(cpu, op, VcpuState::GS)
}

fn write_base(cpu: &mut Cpu, op: &Op, index: usize) -> Exec {
    base_instructions(cpu)?;
    let mut value = cpu.gpr[usize::from(op.rm)];
    if op.extra == 4 {
        value &= 0xffff_ffff;
    }
    if (value as i64) << 16 >> 16 != value as i64 {
        return Err(Fault::GP0);
    }
    cpu.set_segment_base(index, value);
    Ok(())
}

fn wrfsbase(cpu: &mut Cpu, op: &Op) -> Exec {
    write_base(cpu, op, VcpuState::FS)
}

fn wrgsbase(cpu: &mut Cpu, op: &Op) -> Exec {
    write_base(cpu, op, VcpuState::GS)
}

fn swapgs(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.privileged()?;
    let kernel = cpu.msrs.kernel_gs_base;
    cpu.msrs.kernel_gs_base = cpu.segments[VcpuState::GS].base;
    cpu.set_segment_base(VcpuState::GS, kernel);
    Ok(())
}
