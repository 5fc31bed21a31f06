//! Code that must not run directly: instructions that say something about the host where a model decides what guests see,
//! and do not trap in user mode.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

/// Bytes of the page before that come first, where they are known.
pub(super) const LEAD: usize = 128;
/// Bytes of the next page that an instruction may go on to.
pub(super) const TAIL: usize = 16;
/// Bytes before the opcode in which all are to be in step.
const STEPS: usize = 48;
/// Places one after the other from which decoding begins: one of them is where an instruction begins, since none is longer.
const STARTS: usize = 15;

/// What a page of code holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing that must not run.
    Clean,
    /// Such instructions at these offsets, ascending, and nowhere else.
    At(Vec<u16>),
    /// Perhaps such instructions, perhaps in places that only look so.
    Unsure,
}

/// Looks through a page. `bytes`: the end of the page before, `lead` bytes of it; the page; and, where they are known, the first
/// [`TAIL`] of the next one.
///
/// Opcodes are looked for; whether an instruction begins there is told by decoding towards it from [`STARTS`] places in a row,
/// [`LEAD`] bytes before. In code one of them is right; if all of them come to the same, and to it, they all are. Where there is
/// data among the code that might be wrong, so nothing is sure after what compilers do not put out.
///
/// Who jumps into the middle of an instruction on purpose can run it: what it learns is this host's, and harms nobody.
pub(super) fn look(bytes: &[u8], lead: usize) -> Verdict {
    let page = bytes.len().min(lead + 0x1000);
    let mut found = Vec::new();
    let mut at = lead + headers(&bytes[lead..]);
    while let Some(next) = bytes[at..page].iter().position(|&b| b == 0x0f) {
        let here = at + next;
        at = here + 1;
        if may_be(bytes, here) {
            match starts(bytes, here) {
                Some(None) => {}
                // Prefixes on the page before cannot be replaced here.
                Some(Some(start)) if start >= lead => found.push((start - lead) as u16),
                _ => return Verdict::Unsure,
            }
        }
    }
    if found.is_empty() { Verdict::Clean } else { Verdict::At(found) }
}

/// Bytes of an ELF file's headers at the start of a page, which are no code (System V ABI, chapter 4).
fn headers(page: &[u8]) -> usize {
    const ELF64: &[u8] = b"\x7fELF\x02";
    if !page.starts_with(ELF64) {
        return 0;
    }
    let number = |at: usize| usize::from(u16::from_le_bytes([page[at], page[at + 1]]));
    // The program headers follow the file's, each of 56 bytes.
    if page[0x20..0x28] == 64_u64.to_le_bytes() { (64 + 56 * number(0x38)).min(0x1000) } else { 64 }
}

/// Whether the opcode at `at`, which begins with 0Fh, is one of them.
fn may_be(bytes: &[u8], at: usize) -> bool {
    let Some(&second) = bytes.get(at + 1) else { return true };
    let modrm = bytes.get(at + 2).copied();
    let memory = modrm.is_none_or(|m| m < 0xc0);
    let reg = modrm.map(|m| m >> 3 & 7);
    let one_of = |of: &[u8]| reg.is_none_or(|r| of.contains(&r));
    match second {
        0x00 => one_of(&[0, 1, 4, 5]),
        0x01 if memory => one_of(&[0, 1, 4]),
        0x01 => {
            reg == Some(4)
                || matches!(modrm, Some(0xc1 | 0xd0 | 0xd4 | 0xd9 | 0xee | 0xef | 0xf9..=0xfb | 0xfd))
        }
        0x02 | 0x03 | 0x31 | 0x33 | 0x34 | 0xa2 => true,
        // In the register form of 6, prefixes tell `umwait` and `tpause` from `mfence`.
        0xae => (memory && one_of(&[4, 5, 6])) || reg == Some(6),
        0xc7 => (memory && one_of(&[3, 4, 5])) || (!memory && reg == Some(7)),
        _ => false,
    }
}

fn is_one(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Cpuid
            | Mnemonic::Rdtsc
            | Mnemonic::Rdtscp
            | Mnemonic::Rdpid
            | Mnemonic::Rdpru
            | Mnemonic::Rdpmc
            | Mnemonic::Umwait
            | Mnemonic::Tpause
            | Mnemonic::Monitorx
            | Mnemonic::Mwaitx
            | Mnemonic::Vmcall
            | Mnemonic::Vmmcall
            | Mnemonic::Vmfunc
            | Mnemonic::Sysenter
            | Mnemonic::Xgetbv
            | Mnemonic::Rdpkru
            | Mnemonic::Wrpkru
            | Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec
            | Mnemonic::Xsavec64
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64
            | Mnemonic::Lar
            | Mnemonic::Lsl
            | Mnemonic::Verr
            | Mnemonic::Verw
            | Mnemonic::Sldt
            | Mnemonic::Str
            | Mnemonic::Sgdt
            | Mnemonic::Sidt
            | Mnemonic::Smsw
    )
}

/// Where the instruction begins whose opcode is at `at`, if one does (else the inner `None`); `None`: it cannot be told.
fn starts(bytes: &[u8], at: usize) -> Option<Option<usize>> {
    let first = at.saturating_sub(LEAD);
    if at - first < STARTS {
        return None;
    }
    let mut all = (first..first + STARTS).map(|from| reach(bytes, from, at));
    let one = all.next()??;
    all.all(|other| other == Some(one)).then_some(one)
}

/// The same, decoding from `from` on.
fn reach(bytes: &[u8], from: usize, at: usize) -> Option<Option<usize>> {
    let mut decoder = Decoder::new(64, &bytes[from..], DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        let start = from + decoder.position();
        decoder.decode_out(&mut instruction);
        let end = from + decoder.position();
        if at < end {
            if bytes[start..at].iter().any(|&b| !is_prefix(b)) {
                return Some(None);
            }
            return if instruction.is_invalid() { None } else { Some(is_one(&instruction).then_some(start)) };
        }
        // Before that, not all have fallen into step.
        if start + STEPS >= at && unusual(&instruction, &bytes[start..end]) {
            return None;
        }
    }
    None
}

/// What data decodes to, and hardly any program has.
fn unusual(instruction: &Instruction, bytes: &[u8]) -> bool {
    instruction.is_invalid()
        || instruction.is_privileged()
        || bytes == [0, 0]
        || (instruction.flow_control() == FlowControl::Interrupt && instruction.mnemonic() != Mnemonic::Int3)
        || matches!(
            instruction.mnemonic(),
            Mnemonic::Retf
                | Mnemonic::Enter
                | Mnemonic::Xlatb
                | Mnemonic::Insb
                | Mnemonic::Insd
                | Mnemonic::Outsb
                | Mnemonic::Outsd
        )
}

fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page of `nop`s with `code` at `at`, and more before and behind it.
    fn page(at: usize, code: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x90; LEAD + 0x1000 + TAIL];
        bytes[LEAD + at..LEAD + at + code.len()].copy_from_slice(code);
        bytes
    }

    #[test]
    fn what_tells_of_the_host_is_found() {
        let codes: [&[u8]; 13] = [
            &[0x0f, 0xa2],                   // cpuid
            &[0x0f, 0x31],                   // rdtsc
            &[0x0f, 0x01, 0xf9],             // rdtscp
            &[0xf3, 0x0f, 0xc7, 0xf8],       // rdpid rax
            &[0xf3, 0x41, 0x0f, 0xc7, 0xf9], // rdpid r9
            &[0x0f, 0x01, 0xd0],             // xgetbv
            &[0x0f, 0x34],                   // sysenter
            &[0x0f, 0xc7, 0x64, 0x24, 0x40], // xsavec [rsp+40h]
            &[0x48, 0x0f, 0xae, 0x27],       // xsave64 [rdi]
            &[0x0f, 0x03, 0xc0],             // lsl eax, eax
            &[0x0f, 0x01, 0x44, 0x24, 0xf0], // sgdt [rsp-10h]
            &[0x0f, 0x01, 0xc1],             // vmcall
            &[0xf2, 0x0f, 0xae, 0xf1],       // umwait ecx
        ];
        for code in codes {
            for at in [0, 1, 7, 100, 0x1000 - code.len(), 0xfff] {
                // Prefixes alone at the end are for the next page to be found on.
                if at + code.iter().take_while(|&&b| is_prefix(b)).count() < 0x1000 {
                    assert_eq!(
                        look(&page(at, code), LEAD),
                        Verdict::At(vec![at as u16]),
                        "{code:x?} at {at:#x}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_only_looks_like_it_is_not() {
        let codes: [&[u8]; 7] = [
            &[0x0f, 0xae, 0xf0], // mfence
            &[0x90; 4],
            &[0xb8, 0x0f, 0xa2, 0, 0],       // mov eax, a20fh
            &[0x83, 0xe0, 0x0f, 0x03, 0xc1], // and eax, 15; add eax, ecx
            &[0x0f, 0xae, 0xe8],             // lfence
            &[0x0f, 0xc7, 0xf0],             // rdrand eax
            &[0x0f, 0x05],                   // syscall
        ];
        for code in codes {
            assert_eq!(look(&page(200, code), LEAD), Verdict::Clean, "{code:x?}");
        }
    }

    #[test]
    fn nothing_is_sure_after_data_or_nothing() {
        // Zeroes before it, and a number whose last byte may be an opcode's first.
        let mut bytes = page(300, &[0x0f, 0x31]);
        bytes[LEAD + 200..LEAD + 300].fill(0);
        assert_eq!(look(&bytes, LEAD), Verdict::Unsure);
        // At the beginning of a page with nothing known before it.
        assert_eq!(look(&page(3, &[0x0f, 0x31])[LEAD..], 0), Verdict::Unsure);
        // It goes on to a page that is not known.
        assert_eq!(look(&page(0xfff, &[0x0f])[..LEAD + 0x1000], LEAD), Verdict::Unsure);
        let mut bytes = page(0xfff, &[0x0f]);
        bytes[LEAD + 0x1000] = 0x05;
        assert_eq!(look(&bytes, LEAD), Verdict::Clean);
    }

    /// In real code, from whatever it is looked at: an instruction is found if and only if decoding from its beginning finds it.
    #[test]
    fn real_code_agrees_with_decoding_it_from_its_beginning() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let text = text_of(&own).expect("an ELF file with code");
        let mut decoder = Decoder::new(64, text, DecoderOptions::NONE);
        let mut real = std::collections::BTreeSet::new();
        let mut looks = 0;
        while decoder.can_decode() {
            let at = decoder.position();
            let instruction = decoder.decode();
            if is_one(&instruction) {
                real.insert(at);
            }
        }
        for at in (LEAD..text.len() - 0x1000 - TAIL).step_by(0x1000).take(2000) {
            if let Verdict::At(found) = look(&text[at - LEAD..at + 0x1000 + TAIL], LEAD) {
                looks += found.len();
                for offset in found {
                    assert!(
                        real.contains(&(at + usize::from(offset))),
                        "no such instruction at {at:#x}+{offset:#x}"
                    );
                }
            }
        }
        assert!(!real.is_empty() && looks > 0, "this program asks what the processor can do");
    }

    /// The bytes of the section `.text`.
    fn text_of(elf: &[u8]) -> Option<&[u8]> {
        let number = |at: usize, len: usize| {
            elf.get(at..at + len).map(|b| b.iter().rev().fold(0_usize, |n, &b| n << 8 | usize::from(b)))
        };
        let (table, size, count, names) =
            (number(0x28, 8)?, number(0x3a, 2)?, number(0x3c, 2)?, number(0x3e, 2)?);
        let names = number(table + names * size + 0x18, 8)?;
        (0..count).map(|i| table + i * size).find_map(|header| {
            let name = names + number(header, 4)?;
            (elf.get(name..name + 6)? == b".text\0").then(|| {
                let (at, len) = (number(header + 0x18, 8)?, number(header + 0x20, 8)?);
                elf.get(at..at + len)
            })?
        })
    }
}
