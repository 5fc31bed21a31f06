//! Random cases of the XSAVE family (Intel SDM vol. 1, chapter 13): any components asked for, any of them in their initial
//! configuration, both formats, areas whose headers are right or wrong in one place, and areas that fault.
//!
//! By default 10,000 cases; `XSAVE_CASES=300000 cargo test -p terem-soft --release areas_are` for more.
//!
//! Only components that both the host and the model have (x87, SSE, AVX) are asked for: a mask's other bits are such as
//! neither has.

use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError};

use super::case::{CODE, CODE_LEN, Case, DATA, DATA_LEN, FxArea, READ_ONLY, Random, Uppers, fill, value};
use super::generate::fx_area;
use super::{compare, guest, native, number};

/// What both have.
const COMMON: u64 = 7;
/// Bit 63 of XCOMP_BV.
const COMPACTED: u64 = 1 << 63;
/// Where the header is.
const HEADER: i32 = 512;
/// Bytes of an area with all of [`COMMON`].
const AREA: u64 = 832;

/// Bits that neither the host nor the model have in XCR0.
fn nobodys(guest: &guest::Guest) -> u64 {
    // SAFETY: the test has seen that there is XSAVE.
    let host = unsafe { core::arch::x86_64::_xgetbv(0) };
    !(host | guest.cpu.xcr0 | COMPACTED)
}

/// Bits that are all fine, or with one more.
fn nearly(r: &mut Random, fine: u64, nobodys: u64) -> u64 {
    if r.chance(90) { fine } else { fine | 1 << r.pick(&[3, 4, 8, 10, 20, 40, 62]) & nobodys }
}

/// State that is nowhere in its initial configuration.
fn state(r: &mut Random) -> (FxArea, Uppers) {
    let (mut fx, mut uppers) = (fx_area(r), [0; 256]);
    // Not that of `fninit`.
    fx.0[0] &= !0x20;
    fx.0[1] |= 0xc;
    fx.0[160] |= 1;
    fill(r.next(), &mut uppers);
    uppers[7] |= 1;
    (fx, uppers)
}

/// An area's address, mostly a good one.
fn area(r: &mut Random) -> u64 {
    let last = (DATA_LEN as u64 - AREA) / 64;
    match r.below(40) {
        0 => DATA + DATA_LEN as u64 - 64 * (1 + r.next() % 13),
        1 => DATA.wrapping_sub(64 * (1 + r.next() % 13)),
        2 => READ_ONLY + 64 * (r.next() % 48),
        3 => DATA + r.next() % 0x1000,
        4 => DATA + 0x1000 - 64 * (r.next() % 13),
        _ => DATA + 64 * (r.next() % last),
    }
}

/// Writes an area's header and MXCSR, as `xrstor` is to find them.
fn header(a: &mut CodeAssembler, r: &mut Random, nobodys: u64) -> Result<(), IcedError> {
    let compacted = r.chance(50);
    let layout = if compacted { nearly(r, r.clone().next() & COMMON, nobodys) } else { 0 };
    let within = if compacted { layout & COMMON } else { COMMON };
    let present = if r.chance(95) { r.next() & within } else { r.next() & COMMON };
    let format = match r.below(30) {
        0 => layout,
        1 => r.next() & 7,
        _ if compacted => layout | COMPACTED,
        _ => 0,
    };
    a.mov(rcx, nearly(r, present, nobodys))?;
    a.mov(qword_ptr(rbx + HEADER), rcx)?;
    a.mov(rcx, format)?;
    a.mov(qword_ptr(rbx + HEADER + 8), rcx)?;
    a.xor(ecx, ecx)?;
    let reserved = if r.chance(10) { r.below(6) } else { 9 };
    // The standard format looks at the first of these only, so that is the one that may be left out.
    let first = usize::from(reserved == 0);
    for i in first..6 {
        if i == reserved {
            continue;
        }
        a.mov(qword_ptr(rbx + HEADER + 16 + 8 * i as i32), rcx)?;
    }
    let mxcsr = if r.chance(90) { r.next() as u32 & 0xffff | 0x1f80 } else { r.next() as u32 & 0x3_ffff };
    a.mov(dword_ptr(rbx + 24), mxcsr)
}

fn one(a: &mut CodeAssembler, code: Code) -> Result<(), IcedError> {
    a.add_instruction(iced_x86::Instruction::with1(
        code,
        iced_x86::MemoryOperand::with_base(iced_x86::Register::RBX),
    )?)
}

fn program(a: &mut CodeAssembler, r: &mut Random, saves: &[Code], nobodys: u64) -> Result<(), IcedError> {
    const RESTORES: [Code; 2] = [Code::Xrstor_mem, Code::Xrstor64_mem];
    match r.below(10) {
        0..4 => one(a, r.pick(saves))?,
        4..8 => {
            header(a, r, nobodys)?;
            one(a, r.pick(&RESTORES))?;
        }
        // There and back, to another place.
        8 => {
            one(a, r.pick(saves))?;
            a.xor(edx, edx)?;
            a.mov(eax, r.next() as u32 & 7)?;
            one(a, r.pick(&RESTORES))?;
            a.add(rbx, 0x40 * r.pick(&[0, 1, 16]))?;
            one(a, r.pick(saves))?;
        }
        _ => {
            a.mov(ecx, r.pick(&[0, 1, 1, 1, 1, 2]))?;
            a.xgetbv()?;
            a.and(eax, COMMON as i32)?;
        }
    }
    Ok(())
}

fn case(seed: u64, saves: &[Code], nobodys: u64) -> Case {
    let mut r = Random::new(seed);
    let (fx, uppers) = state(&mut r);
    let mut case = Case {
        seed,
        code: [0xcc; CODE_LEN],
        len: 0,
        decoding: 0,
        gpr: std::array::from_fn(|_| value(&mut r)),
        rflags: 0x202,
        fx,
        uppers,
        present: r.next() & COMMON,
        undefined: 0,
    };
    let asked = r.next() & (COMMON | nobodys);
    (case.gpr[0], case.gpr[2]) = (asked | r.next() << 32, asked >> 32 | r.next() << 32);
    case.gpr[3] = area(&mut r);
    let mut a = CodeAssembler::new(64).unwrap();
    program(&mut a, &mut r, saves, nobodys).unwrap();
    let code = a.assemble(CODE).unwrap();
    case.code[..code.len()].copy_from_slice(&code);
    case.len = code.len();
    case
}

/// `xsaves` and `xrstors` of privilege 0, which the host's programs do not have, do what `xsavec` and `xrstor` do with
/// compacted areas.
#[test]
fn the_supervisors_instructions_are_the_compacted_ones() {
    let mut guest = guest::Guest::new();
    if !guest.cpu.cpuid.model().features.has("xsaves") {
        eprintln!("no XSAVES here: not tested");
        return;
    }
    let nobodys = nobodys(&guest);
    let saves = [Code::Xsavec_mem, Code::Xsavec64_mem];
    let (mut saved, mut restored, mut refused) = (0, 0, 0);
    for seed in 0..4000 {
        let user = case(seed, &saves, nobodys);
        let (mut supervisor, mut compacted) = (user, true);
        let (code, len) = (&mut supervisor.code, user.len);
        let at = (0..len - 2).rev().find(|&i| code[i] == 0x0f && matches!(code[i + 1], 0xc7 | 0xae));
        let Some(at) = at else { continue };
        // xsavec /4 and xrstor /5 are 0F C7 and 0F AE; xsaves and xrstors are 0F C7 /5 and /3, here off RBX.
        let restores = code[at + 1] == 0xae;
        (code[at + 1], code[at + 2]) = (0xc7, if restores { 0x1b } else { 0x2b });
        let expected = guest.run(&user);
        if restores {
            // The second constant that `header` stores is the format, if that is what comes before.
            compacted = len > 0x1b && user.code[0x11..0x13] == [0x48, 0xb9] && user.code[0x1a] == 0x80;
        }
        guest.cpu.cpl = 0;
        guest.cpu.mode_changed();
        let got = guest.run(&supervisor);
        guest.cpu.cpl = 3;
        guest.cpu.mode_changed();
        if !compacted {
            // The standard format is refused; another fault may come first.
            refused += u64::from(got.vector == 13);
            assert!(matches!(got.vector, 13 | 14), "{}", compare::report(&supervisor, &[]));
            continue;
        }
        assert_eq!(
            (expected.vector, expected.rip),
            (got.vector, got.rip),
            "{}",
            compare::report(&supervisor, &[])
        );
        let same = (expected.fx.0, expected.uppers, expected.data) == (got.fx.0, got.uppers, got.data);
        assert!(same, "{}", compare::report(&supervisor, &[]));
        *if restores { &mut restored } else { &mut saved } += 1;
        // Privilege 3 has neither.
        assert!(expected.vector == 14 || guest.run(&supervisor).vector == 13);
    }
    assert!(
        saved > 500 && restored > 300 && refused > 300,
        "{saved} saved, {restored} restored, {refused} refused"
    );
}

#[test]
fn areas_are_saved_and_restored_as_on_the_host() {
    let host = |f: &str| crate::supported_features().has(f);
    // "GenuineIntel": which bytes are touched and what counts as in use is each family's own affair.
    let intel = core::arch::x86_64::__cpuid(0).ebx == u32::from_le_bytes(*b"Genu");
    if !host("xsave") || !host("avx") || !intel {
        eprintln!("no XSAVE with AVX of Intel's here: not tested");
        return;
    }
    let mut saves = vec![Code::Xsave_mem, Code::Xsave64_mem];
    let optional = [
        ("xsaveopt", [Code::Xsaveopt_mem, Code::Xsaveopt64_mem]),
        ("xsavec", [Code::Xsavec_mem, Code::Xsavec64_mem]),
    ];
    saves.extend(optional.into_iter().filter(|(f, _)| host(f)).flat_map(|(_, codes)| codes));
    let (mut native, mut guest) = (native::Native::new(), guest::Guest::new());
    let nobodys = nobodys(&guest);
    let (seed, cases) = (number("ORACLE_SEED", 1), number("XSAVE_CASES", 10_000));
    let (mut faults, mut wrong) = (0, 0);
    for batch in (0..cases).collect::<Vec<_>>().chunks(super::BATCH) {
        let batch: Vec<Case> = batch.iter().map(|i| case(seed.wrapping_add(*i), &saves, nobodys)).collect();
        for (case, host) in batch.iter().zip(native.run(&batch)) {
            faults += u64::from(host.vector != super::case::END);
            for ours in [guest.run(case), guest.run_translated(case)] {
                let mut differences = compare::differences(case, &host, &ours, true);
                // What is in its initial configuration counts as in use now and then, when the host's thread was interrupted.
                for again in [case; 3] {
                    if !differences.is_empty() {
                        let host = native.run(std::slice::from_ref(again)).remove(0);
                        differences = compare::differences(case, &host, &ours, true);
                    }
                }
                if !differences.is_empty() {
                    wrong += 1;
                    if wrong < 8 {
                        println!("{}", compare::report(case, &differences));
                    }
                }
            }
        }
    }
    println!("{cases} cases, {faults} faulted");
    assert_eq!(wrong, 0, "the XSAVE family differs from the host");
    assert!(faults > cases / 50 && faults < cases / 2, "{faults} faulted");
}
