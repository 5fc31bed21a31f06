//! AVX state: when it can be used, how it is saved, and that stubs are few.

use iced_x86::code_asm::*;
use iced_x86::{Decoder, DecoderOptions};
use terem_cpu::xstate::{AVX, PKRU, SSE, X87};

use crate::cpu::{Cpu, Xmm, Ymm, cr0, cr4};
use crate::decode::CodeSize;
use crate::fault::{Fault, vector};
use crate::oracle::guest::Guest;
use crate::oracle::{CODE, DATA};

const COMPACTED: u64 = 1 << 63;

fn code(write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    write(&mut a).unwrap();
    a.assemble(CODE).unwrap()
}

/// In 64-bit user mode; `None` where the host has no AVX.
fn guest() -> Option<Guest> {
    super::available().then(Guest::new)
}

fn vector_of(n: u128) -> Ymm {
    Ymm { low: Xmm(n << 8 | 1), high: Xmm(n << 8 | 2) }
}

fn run(guest: &mut Guest, code: &[u8]) -> Option<Fault> {
    guest.cpu.refresh_mode();
    guest.execute(CODE, code).1
}

fn word(cpu: &mut Cpu, at: u64) -> u64 {
    cpu.load(DATA + at).unwrap()
}

#[test]
fn what_enables_avx() {
    let Some(mut g) = guest() else { return };
    let add = code(|a| a.vpaddd(ymm1, ymm2, ymm3));
    let andn = code(|a| a.andn(eax, ebx, ecx));
    assert_eq!(run(&mut g, &add), None);
    g.cpu.cr0 |= cr0::TS;
    assert_eq!((run(&mut g, &add), run(&mut g, &andn)), (Some(Fault::NM), None));
    g.cpu.xcr0 = 3;
    assert_eq!(run(&mut g, &add), Some(Fault::UD), "#UD comes before #NM");
    (g.cpu.xcr0, g.cpu.cr4) = (7, g.cpu.cr4 & !cr4::OSXSAVE);
    assert_eq!((run(&mut g, &add), run(&mut g, &andn)), (Some(Fault::UD), None));
}

#[test]
fn real_mode_has_no_vex() {
    if !super::available() {
        return;
    }
    // andn eax, ebx, ecx; in real mode these bytes are `les` with a register.
    let andn = [0xc4, 0xe2, 0x60, 0xf2, 0xc1];
    let mut real = Guest::unpaged(CodeSize::Code16);
    assert_eq!(real.execute(0x100, &andn).1, Some(Fault::UD));
    let mut protected = Guest::unpaged(CodeSize::Code32);
    (protected.cpu.gpr[3], protected.cpu.gpr[1]) = (0xf0, 0xff);
    assert_eq!((protected.execute(0x100, &andn).1, protected.cpu.gpr[0]), (None, 0x0f));
}

#[test]
fn registers_make_no_new_stubs() {
    if !super::available() {
        return;
    }
    let form = |code: Vec<u8>| {
        let insn = Decoder::new(64, &code, DecoderOptions::NONE).decode();
        std::ptr::from_ref(super::form::of(&insn).unwrap())
    };
    let one = form(code(|a| a.vaddps(ymm1, ymm2, ymm3)));
    assert_eq!(one, form(code(|a| a.vaddps(ymm9, ymm9, ymm15))));
    let memory = form(code(|a| a.vaddps(ymm1, ymm2, ptr(rax))));
    assert_eq!(memory, form(code(|a| a.vaddps(ymm9, ymm2, ptr(r9 + r10 * 8 + 77).fs()))));
    assert!(one != memory && one != form(code(|a| a.vaddps(xmm1, xmm2, xmm3))));
}

#[test]
fn narrow_results_and_vzeroupper_clear_upper_halves() {
    let Some(mut g) = guest() else { return };
    for n in 0..16 {
        g.cpu.set_ymm(n, vector_of(n.into()));
    }
    assert_eq!(run(&mut g, &code(|a| a.vmovdqa(xmm1, xmm2))), None);
    assert_eq!(g.cpu.ymm[1], Ymm { high: Xmm(0), ..vector_of(2) });
    assert_eq!(run(&mut g, &code(|a| a.movdqa(xmm3, xmm4))), None);
    assert_eq!(g.cpu.ymm[3], Ymm { low: vector_of(4).low, high: vector_of(3).high });
    assert_eq!(run(&mut g, &code(CodeAssembler::vzeroupper)), None);
    assert!(!g.cpu.uppers && g.cpu.ymm.iter().all(|y| y.high.0 == 0 && y.low.0 != 0));
}

#[test]
fn only_wanted_elements_are_touched() {
    let Some(mut g) = guest() else { return };
    let end = DATA + 0x2000;
    let all = u128::MAX;
    g.cpu.gpr[0] = end - 16;
    g.cpu.set_ymm(1, Ymm { low: Xmm(all), high: Xmm(0) });
    g.cpu.set_ymm(2, vector_of(2));
    let store = code(|a| a.vmaskmovps(ymmword_ptr(rax), ymm1, ymm2));
    assert_eq!(run(&mut g, &store), None);
    assert_eq!(g.cpu.load::<u128>(end - 16).unwrap(), vector_of(2).low.0);
    // Nothing is stored if an element that is wanted cannot be.
    g.cpu.set_ymm(1, Ymm { low: Xmm(all), high: Xmm(all) });
    g.cpu.set_ymm(2, vector_of(9));
    assert_eq!(run(&mut g, &store).map(|f| f.vector), Some(vector::PF));
    assert_eq!((g.cpu.load::<u128>(end - 16).unwrap(), g.cpu.cr2), (vector_of(2).low.0, end));
}

#[test]
fn compacted_areas_hold_what_is_in_use() {
    let Some(mut g) = guest() else { return };
    g.cpu.cpl = 0;
    let (at, area) = (DATA, 0);
    for n in 0..16 {
        g.cpu.set_ymm(n, vector_of(n.into()));
    }
    g.cpu.set_pkru(0x5554);
    (g.cpu.gpr[0], g.cpu.gpr[2], g.cpu.gpr[3]) = (AVX | PKRU, 0, at);
    let save = code(|a| a.xsavec(ptr(rbx)));
    assert_eq!(run(&mut g, &save), None);
    let cpu = &mut g.cpu;
    assert_eq!((word(cpu, area + 512), word(cpu, area + 520)), (AVX | PKRU, AVX | PKRU | COMPACTED));
    assert_eq!(
        (word(cpu, area + 576 + 16), word(cpu, area + 576 + 256)),
        (vector_of(1).high.0 as u64, 0x5554)
    );
    // Upper halves at rest take their place, but are not written.
    cpu.ymm.iter_mut().for_each(|y| y.high = Xmm(0));
    cpu.gpr[0] = X87 | SSE | AVX | PKRU;
    assert_eq!(run(&mut g, &code(|a| a.xsaves(ptr(rbx)))), None);
    let cpu = &mut g.cpu;
    assert_eq!(word(cpu, area + 512) & (SSE | AVX | PKRU), SSE | PKRU);
    assert_eq!(word(cpu, area + 576 + 16), vector_of(1).high.0 as u64);
    // And come back as zeros, the rest as it was.
    cpu.set_ymm(5, vector_of(77));
    cpu.set_pkru(0);
    assert_eq!(run(&mut g, &code(|a| a.xrstors(ptr(rbx)))), None);
    assert_eq!((g.cpu.ymm[5], g.cpu.pkru), (Ymm { high: Xmm(0), ..vector_of(5) }, 0x5554));
    assert!(!g.cpu.uppers);
}

#[test]
fn standard_areas_have_fixed_places() {
    let Some(mut g) = guest() else { return };
    g.cpu.set_ymm(15, vector_of(15));
    g.cpu.set_pkru(0xc);
    (g.cpu.gpr[0], g.cpu.gpr[2], g.cpu.gpr[3]) = (PKRU, 0, DATA);
    g.cpu.store(DATA + 512, 0_u64).unwrap();
    assert_eq!(run(&mut g, &code(|a| a.xsave(ptr(rbx)))), None);
    assert_eq!((word(&mut g.cpu, 512), word(&mut g.cpu, 832)), (PKRU, 0xc));
    g.cpu.gpr[0] = AVX | PKRU;
    assert_eq!(run(&mut g, &code(|a| a.xsaveopt(ptr(rbx)))), None);
    assert_eq!(word(&mut g.cpu, 576 + 240), vector_of(15).high.0 as u64);
    let saved = g.cpu.save_xsave();
    g.cpu.load_xsave(&Guest::new().cpu.save_xsave()).unwrap();
    assert_eq!((g.cpu.ymm[15], g.cpu.pkru), (Ymm::default(), 0));
    g.cpu.load_xsave(&saved).unwrap();
    assert_eq!((g.cpu.ymm[15], g.cpu.pkru, g.cpu.uppers), (vector_of(15), 0xc, true));
    // xgetbv tells what is in use.
    g.cpu.gpr[1] = 1;
    assert_eq!(run(&mut g, &code(CodeAssembler::xgetbv)), None);
    assert_eq!(g.cpu.gpr[0] & (SSE | AVX | PKRU), SSE | AVX | PKRU);
}

#[test]
fn damaged_headers_are_refused() {
    let Some(mut g) = guest() else { return };
    (g.cpu.gpr[0], g.cpu.gpr[2], g.cpu.gpr[3]) = (X87 | SSE | AVX, 0, DATA);
    let restore = code(|a| a.xrstor(ptr(rbx)));
    let before = g.cpu.save_xsave();
    let mut with = |bv: u64, layout: u64, reserved: u64| {
        for at in 0..105 {
            g.cpu.store(DATA + at * 8, 0_u64).unwrap();
        }
        g.cpu.store(DATA + 512, bv).unwrap();
        g.cpu.store(DATA + 520, layout).unwrap();
        g.cpu.store(DATA + 568, reserved).unwrap();
        let fault = run(&mut g, &restore);
        (fault, g.cpu.save_xsave() == before)
    };
    assert_eq!(with(1 << 5, 0, 0), (Some(Fault::GP0), true), "a component that is not enabled");
    assert_eq!(with(0, AVX, 0), (Some(Fault::GP0), true), "a layout in the standard format");
    assert_eq!(with(AVX, COMPACTED | SSE, 0), (Some(Fault::GP0), true), "present, but not in the layout");
    assert_eq!(with(0, COMPACTED | 1 << 5, 0), (Some(Fault::GP0), true));
    assert_eq!(with(0, COMPACTED, 1), (Some(Fault::GP0), true), "reserved bytes");
    assert_eq!(with(AVX, COMPACTED | AVX, 0).0, None);
    let system = code(|a| a.xrstors(ptr(rbx)));
    assert_eq!(run(&mut g, &system), Some(Fault::GP0), "the supervisor's");
}
